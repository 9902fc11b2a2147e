"""Every trick for speed and memory, applied to a model from outside; without this file everything works, only slower.

A layer is swapped for one of a subclass, with the same parameters under the same names, and the same results up to
rounding. `prepare` is for any use, `recompute` for training, `sampling` for the steps of a sampler.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from minicn.controlnet import ControlNet
from minicn.unet import Attention, Block, ResBlock, SpatialTransformer, TransformerBlock, UNet

# What a convolution has that Conv3x3 may take over.
SAME = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}


def layout(device: str | torch.device) -> torch.memory_format:
    """Return the memory layout in which convolutions are fast on a device.

    Numerics: on MPS, channels-last gave wrong gradients up to PyTorch 2.5 (pytorch issue 142344), and makes the
    backward pass 30 times slower in the versions of 2026 (issue 193349).
    """
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


def prepare(model: nn.Module) -> None:
    """Put convolutions into the faster layout, and swap in layers that are faster, or more accurate, there."""
    for module in model.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = GroupNorm
        elif type(module) is nn.Conv2d and all(getattr(module, name) == value for name, value in SAME.items()):
            module.__class__ = Conv3x3
    for parameter in model.parameters():
        if parameter.ndim == 4:
            # Numerics: 1x1 weights fit both layouts and keep their strides, by which PyTorch may choose another kernel.
            parameter.data = parameter.data.contiguous(memory_format=layout(parameter.device))


class GroupNorm(nn.GroupNorm):
    """Group normalisation that stays accurate in the channels-last layout, too.

    Numerics: for that layout PyTorch's CPU kernel computes the variance as E[x^2] - E[x]^2, with a relative error of 1e-5
    or more where the mean is ten times the standard deviation. So the mean of every 8th row and column is subtracted.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and not x.is_contiguous():
            about = x.detach()[:, :, ::8, ::8].unflatten(1, (self.num_groups, -1)).mean((2, 3, 4), keepdim=True)
            x = x - about.expand(-1, -1, self.num_channels // self.num_groups, 1, 1).flatten(1, 2)  # one per channel
        return super().forward(x)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps height and width: for wide weights and small maps, on CPUs, a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        wide = self.weight.numel() > 2**22 and x.shape[-2] * x.shape[-1] <= 256
        if wide and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
            return MatrixProduct.apply(x, self.weight, self.bias)
        return super().forward(x)


class MatrixProduct(torch.autograd.Function):
    """A 3x3 convolution as one matrix product, for wide weights and small maps on CPUs.

    There PyTorch's convolution spends most of its time reordering the weights, at every call, up to three times in
    training; in channels-last they already lie in memory as a matrix.
    """

    @staticmethod
    def neighbours(x: Tensor) -> Tensor:
        """Return the 3x3 positions around each one: (B, C, H, W) to (B, H, W, 9 C)."""
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # (B, H + 2, W + 2, C)
        return padded.unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3).flatten(3)

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        """Return the weights (C_out, C, 3, 3) as (C_out, 9 C): in channels-last the same memory."""
        return weight.permute(0, 2, 3, 1).flatten(1)

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # Only a trainable weight needs x again, and then only x is kept, not its neighbours.
        ctx.save_for_backward(x if weight.requires_grad else x.new_empty(0), weight)
        ctx.shape = x.shape
        return F.linear(MatrixProduct.neighbours(x), MatrixProduct.matrix(weight), bias).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (b, c, h, w) = ctx.saved_tensors, ctx.shape
        grad = grad.permute(0, 2, 3, 1).flatten(0, 2)  # (b * h * w, C_out)
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            parts = (grad @ MatrixProduct.matrix(weight)).view(b, h, w, 3, 3, c)
            padded = grad.new_zeros(b, h + 2, w + 2, c)
            for i, j in itertools.product(range(3), range(3)):
                padded[:, i : i + h, j : j + w] += parts[:, :, :, i, j]
            to_x = padded[:, 1:-1, 1:-1].permute(0, 3, 1, 2)
        if ctx.needs_input_grad[1]:
            to_weight = (grad.t() @ MatrixProduct.neighbours(x).flatten(0, 2)).view(-1, 3, 3, c).permute(0, 3, 1, 2)
            to_bias = grad.sum(0)
        return to_x, to_weight, to_bias


class RecomputedBlock(Block):
    """A block whose features are recomputed in the backward pass."""

    def forward(self, *inputs) -> Tensor:
        if torch.is_grad_enabled():
            return checkpoint(super().forward, *inputs, use_reentrant=False)
        return super().forward(*inputs)


def recompute(model: nn.Module, on: bool = True) -> None:
    """Gradient checkpointing: recompute a block's features in the backward pass, instead of keeping them."""
    for module in model.modules():
        if type(module) in (Block, RecomputedBlock):
            module.__class__ = RecomputedBlock if on else Block


class TextOnce(Attention):
    """Cross-attention that computes the keys and values of a text once, for all steps of a sampler."""

    kept: tuple = (None, None)

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        if self.kept[0] is not context:
            self.kept = context, super().keys_and_values(context)
        return self.kept[1]


class HalfBlock(Block):
    """A block before the text comes in, for a batch of two equal halves: only one half is computed.

    A sampler gives [unconditional, conditional] text for the same latents: up to the first cross-attention, both halves
    are the same numbers.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, emb: Tensor, context: Tensor, size: torch.Size | None = None
    ) -> Tensor:
        h = x[: len(x) // 2]
        for layer in self:
            if isinstance(layer, ResBlock):
                h = layer(h, emb[: len(h)])
            else:
                h = half_transformer(layer, h, context) if isinstance(layer, SpatialTransformer) else layer(h)
        return h if len(h) == len(x) else twice(h)


def half_transformer(layer: SpatialTransformer, x: Tensor, context: Tensor) -> Tensor:
    """Do what SpatialTransformer does, for one x that serves both halves of `context`; return both results."""
    block = cast(TransformerBlock, layer.transformer_blocks[0])
    h = layer.proj_in(layer.norm(x)).flatten(2).transpose(1, 2)
    normed = block.norm1(h)
    h = twice(h + block.attn1(normed, normed))
    h = h + block.attn2(block.norm2(h), context)
    h = h + block.ff(block.norm3(h))
    return twice(x) + layer.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))


def twice(x: Tensor) -> Tensor:
    return torch.cat([x, x])  # keeps the memory layout, which `repeat` does not


@contextlib.contextmanager
def sampling(model: UNet | ControlNet, equal_halves: bool) -> Iterator[None]:
    """Inside `with`, a U-Net or ControlNet computes once what does not change from step to step, or from half to half.

    equal_halves  every batch consists of the same latents and timesteps twice
    """
    before = []

    def exchange(module: nn.Module, kind: type) -> None:
        before.append((module, type(module)))
        module.__class__ = kind

    for module in list(model.modules()):
        if isinstance(module, TransformerBlock):
            exchange(module.attn2, TextOnce)
    for block in model.input_blocks.children():
        if not equal_halves:
            break
        exchange(block, HalfBlock)
        if any(isinstance(layer, SpatialTransformer) for layer in block.children()):
            break  # here the text comes in
    try:
        yield
    finally:
        for module, kind in before:
            module.__class__ = kind
            module.__dict__.pop("kept", None)
