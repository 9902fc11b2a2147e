"""The U-Net of Stable Diffusion, in one file: 12 encoder blocks, the middle block, 12 decoder blocks.

Source: Rombach et al., arXiv:2112.10752; the module names are those of the published ldm checkpoints, so the paper's
block number, the loop index and the key of a weight agree. Left out: what Stable Diffusion 1.5 does not use (class
labels, scale-shift norms, dropout, transformers deeper than one block).

    x (B, 4, h, w) -> input_blocks 0..11 -> middle_block -> output_blocks 0..11 -> out -> noise_pred (B, 4, h, w)
                            |                    |               ^
                            +---- 12 skips ------|---------------+     `control` adds to the 12 skips and the middle
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the U-Net; the defaults are Stable Diffusion 1.5's."""

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320  # width of level 0
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)  # width of each level / model_channels; the last has no attention
    num_res_blocks: int = 2  # blocks of each level in the encoder; the decoder has one more
    num_heads: int = 8  # of every attention, whatever its width
    context_dim: int = 768  # width of the text features
    norm_num_groups: int = 32  # of every GroupNorm; keep at least 4 channels a group


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Return sinusoids of the timesteps (B,), as (B, dim): cosines first, wavelengths from 2 pi to 20,000 pi."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angles = timesteps[:, None].float() * freqs  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def embed_timesteps(time_embed: nn.Sequential, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the features of timesteps (B,), (B, 4 C), that every resnet block takes."""
    return time_embed(timestep_embedding(timesteps, time_embed[0].in_features).to(dtype))


class GroupNorm(nn.GroupNorm):
    """Group normalisation that keeps its digits in the channels-last layout, too.

    Numerics: for that layout PyTorch's kernel for CPUs takes the variance as E[x^2] - E[x]^2, which is off by 1e-5 or
    more of the result where the mean is ten times the deviation. So the mean of every 8th row and column is taken off.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and not x.is_contiguous():
            about = x.detach()[:, :, ::8, ::8].unflatten(1, (self.num_groups, -1)).mean((2, 3, 4), keepdim=True)
            x = x - about.expand(-1, -1, self.num_channels // self.num_groups, 1, 1).flatten(1, 2)  # one number a channel
        return super().forward(x)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps height and width."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.weight.numel() > 2**22 and x.shape[-2] * x.shape[-1] <= 256
        if wide and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
            return MatrixProduct.apply(x, self.weight, self.bias)
        return super().forward(x)


class MatrixProduct(torch.autograd.Function):
    """A 3x3 convolution as one matrix product, for wide weights and small maps on CPUs.

    There PyTorch's convolution spends most of its time on bringing the weights into an order of its own, at every call, up
    to three times in training; in channels-last they are a matrix as they lie.
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
        # Only a weight that learns needs x again, and then x alone is kept, not its neighbours.
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


class ResBlock(nn.Module):
    """Norm, SiLU, conv, twice, with the time embedding added in between."""

    def __init__(self, c_in: int, c_out: int, emb_dim: int, groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(GroupNorm(groups, c_in), nn.SiLU(), Conv3x3(c_in, c_out))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, c_out))
        self.out_layers = nn.Sequential(
            GroupNorm(groups, c_out),
            nn.SiLU(),
            nn.Identity(),  # Compat: dropout in ldm; keeps the convolution at index 3
            zero_module(Conv3x3(c_out, c_out)),
        )
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)  # (B, C_out, H, W)
        shift = repeat(self.emb_layers(emb), len(h))  # (B, C_out)
        h = self.out_layers(h + shift[:, :, None, None])
        return self.skip_connection(x) + h


class Attention(nn.Module):
    """Multi-head attention of positions x to `context`, or to x itself."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor, context: "Tensor | TextKeys") -> Tensor:
        q = self.split(self.to_q(x))
        k, v = context[self] if isinstance(context, TextKeys) else self.keys_and_values(context)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(h.transpose(1, 2).flatten(2))

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.to_k(context)), self.split(self.to_v(context))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, dim / heads)


class TextKeys(dict):
    """What every cross-attention of some models makes of the text, (keys, values), once for all steps of a sampler.

    It stands in for the context that it was made of; the numbers are the same.
    """

    def __init__(self, models: Iterable[nn.Module], context: Tensor):
        super().__init__()
        self.context = context
        for model in models:
            for module in model.modules():
                if isinstance(module, TransformerBlock):
                    self[module.attn2] = module.attn2.keys_and_values(context)


class GEGLU(nn.Module):
    """Project to twice the width; the second half, through GELU (the exact one), gates the first."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Widen four times, gate, narrow."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))  # Compat: dropout at 1

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each behind a LayerNorm, with a residual."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.attn1 = Attention(dim, dim, heads)
        self.attn2 = Attention(dim, context_dim, heads)
        self.ff = FeedForward(dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        text = context.context if isinstance(context, TextKeys) else context
        x = repeat(x + self.attn1(h, h), len(text))  # here the text comes in
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the positions of a feature map, as a residual."""

    def __init__(self, channels: int, context_dim: int, heads: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)  # Numerics: 1e-6 here, 1e-5 in ResBlock
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_dim, heads)])
        self.proj_out = zero_module(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, H*W, C)
        h = self.transformer_blocks[0](h, context)
        h = h.transpose(1, 2).unflatten(2, x.shape[2:])  # (k B, C, H, W), for k texts a sample
        return repeat(x, len(h)) + self.proj_out(h)


def repeat(x: Tensor, count: int) -> Tensor:
    """Repeat a batch to this many samples.

    A sampler gives [unconditional, conditional] text for latents that are the same in both halves: until the text comes
    in, at the first cross-attention, one half is enough.
    """
    return x if len(x) == count else x.repeat(count // len(x), *[1] * (x.ndim - 1))


class Downsample(nn.Module):
    """Halve height and width (rounding up) by a convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Enlarge to `size` (height, width) by nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Block(nn.Sequential):
    """One of the paper's 25 blocks: layers in a row, each given what it takes."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, size: torch.Size | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


def run(block: nn.Module, checkpointing: bool, *inputs):
    """Run a block; with gradient checkpointing its features are computed again going backwards, instead of kept."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def zero_module(module: nn.Module) -> nn.Module:
    """Set every parameter of a module to zero."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def build_encoder(cfg: UNetConfig) -> tuple[nn.Sequential, nn.ModuleList, Block, list[int]]:
    """Build the part that U-Net and ControlNet share: time_embed, input_blocks, middle_block.

    The paper's "trainable copy" is this function, called twice. Also returned: the width of each of the 12 skips.
    """
    emb_dim, groups = 4 * cfg.model_channels, cfg.norm_num_groups
    widths = [cfg.model_channels * mult for mult in cfg.channel_mult]
    time_embed = nn.Sequential(nn.Linear(cfg.model_channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
    input_blocks = nn.ModuleList([Block(nn.Conv2d(cfg.in_channels, widths[0], 3, padding=1))])
    skips = [widths[0]]
    for level, width in enumerate(widths):
        for _ in range(cfg.num_res_blocks):
            layers = [ResBlock(skips[-1], width, emb_dim, groups)]
            if level < len(widths) - 1:
                layers.append(SpatialTransformer(width, cfg.context_dim, cfg.num_heads, groups))
            input_blocks.append(Block(*layers))
            skips.append(width)
        if level < len(widths) - 1:
            input_blocks.append(Block(Downsample(width)))
            skips.append(width)
    middle_block = Block(
        ResBlock(widths[-1], widths[-1], emb_dim, groups),
        SpatialTransformer(widths[-1], cfg.context_dim, cfg.num_heads, groups),
        ResBlock(widths[-1], widths[-1], emb_dim, groups),
    )
    return time_embed, input_blocks, middle_block, skips


class UNet(nn.Module):
    """Predict the noise in noisy latents; `control` adds a ControlNet's 13 residuals."""

    def __init__(self, cfg: UNetConfig | None = None):
        super().__init__()
        self.gradient_checkpointing = False
        self.cfg = cfg = cfg or UNetConfig()
        self.time_embed, self.input_blocks, self.middle_block, skips = build_encoder(cfg)
        emb_dim, groups = 4 * cfg.model_channels, cfg.norm_num_groups
        self.output_blocks = nn.ModuleList()
        c_in = skips[-1]
        for level in reversed(range(len(cfg.channel_mult))):
            width = cfg.model_channels * cfg.channel_mult[level]
            for i in range(cfg.num_res_blocks + 1):
                layers = [ResBlock(c_in + skips.pop(), width, emb_dim, groups)]
                if level < len(cfg.channel_mult) - 1:
                    layers.append(SpatialTransformer(width, cfg.context_dim, cfg.num_heads, groups))
                if level > 0 and i == cfg.num_res_blocks:
                    layers.append(Upsample(width))
                self.output_blocks.append(Block(*layers))
                c_in = width
        self.out = nn.Sequential(
            GroupNorm(groups, c_in), nn.SiLU(), zero_module(nn.Conv2d(c_in, cfg.out_channels, 3, padding=1))
        )

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | TextKeys,
        control: list[Tensor] | None = None,
        emb: Tensor | None = None,
    ) -> Tensor:
        """Return the predicted noise, shaped like x.

        x          (B, 4, h, w)        noisy latents, any h and w
        timesteps  (B,)                0 to 999
        context    (B, 77, 768)        text features; or (k B, 77, 768), as if x came k times: then so does the result
        control    list of 13 tensors  added to the 12 skips and, the last, to the middle block's output; None adds none
        emb        (1 or B, 4 C)       the timesteps embedded, where a sampler has them already
        Raises ValueError for latents, timesteps, context or control that do not fit the model.
        """
        check_inputs(self.cfg, x, timesteps, context)
        emb = embed_timesteps(self.time_embed, timesteps, x.dtype) if emb is None else emb
        h, skips, again = x, [], self.gradient_checkpointing
        for block in self.input_blocks:
            h = run(block, again, h, emb, context)
            skips.append(h)
        h = run(self.middle_block, again, h, emb, context)
        if control is not None:
            check_control(control, [*skips, h], len(h))
            skips = [add(skip, residual) for skip, residual in zip(skips, control[:-1], strict=True)]
            h = add(h, control[-1])
        for block in self.output_blocks:
            h = torch.cat([h, repeat(skips.pop(), len(h))], dim=1)
            h = run(block, again, h, emb, context, skips[-1].shape[-2:] if skips else None)
        return self.out(h)


def add(feature: Tensor, residual: Tensor | None) -> Tensor:
    """Add a residual to a feature, either of which may stand for several samples."""
    if residual is None:
        return feature
    count = max(len(feature), len(residual))
    return repeat(feature, count) + repeat(residual, count)


def check_inputs(cfg: UNetConfig, x: Tensor, timesteps: Tensor, context: Tensor | TextKeys) -> None:
    """Raise ValueError, in words, for what would fail deep inside."""
    context = context.context if isinstance(context, TextKeys) else context
    if x.ndim != 4 or x.shape[1] != cfg.in_channels:
        raise ValueError(f"latents have shape {tuple(x.shape)}, but the model takes (B, {cfg.in_channels}, h, w)")
    if timesteps.shape != x.shape[:1]:
        raise ValueError(f"timesteps have shape {tuple(timesteps.shape)}, but {len(x)} latents need ({len(x)},)")
    if context.ndim != 3 or context.shape[2] != cfg.context_dim or len(context) % max(len(x), 1) or len(context) < len(x):
        raise ValueError(
            f"context has shape {tuple(context.shape)}, but {len(x)} latents need ({len(x)}, tokens, "
            f"{cfg.context_dim}): encode the prompts with this model's own text encoder"
        )


def check_control(control: list[Tensor], features: list[Tensor], count: int) -> None:
    """Raise ValueError where the residuals do not fit the skips and the middle that they are added to, for `count` texts."""
    if len(control) != len(features):
        raise ValueError(f"control has {len(control)} tensors, but the model has {len(features)} connections")
    for i, (residual, feature) in enumerate(zip(control, features, strict=True)):
        if residual is None:
            continue
        fits = residual.shape[2:] in (feature.shape[2:], (1, 1))  # 1x1: averaged over all positions
        if not fits or residual.shape[1] != feature.shape[1] or len(residual) not in (1, len(feature), count):
            raise ValueError(
                f"control[{i}] has shape {tuple(residual.shape)}, but the model needs {tuple(feature.shape)}: "
                "use a ControlNet of this U-Net's widths and latents of the same size"
            )
