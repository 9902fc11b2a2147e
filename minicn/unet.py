"""The U-Net of Stable Diffusion, in one file: 12 encoder blocks, the middle block, 12 decoder blocks.

Source: Rombach et al., arXiv:2112.10752; the module names are those of the published ldm checkpoints, so the paper's
block number, the loop index and the key of a weight agree. Left out: what Stable Diffusion 1.5 does not use (class
labels, scale-shift norms, dropout, transformers deeper than one block).

    x (B, 4, h, w) -> input_blocks 0..11 -> middle_block -> output_blocks 0..11 -> out -> noise_pred (B, 4, h, w)
                            |                    |               ^
                            +---- 12 skips ------|---------------+     `control` adds to the 12 skips and the middle
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the U-Net; the defaults are Stable Diffusion 1.5's."""

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320  # width of level 0
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)  # width of each level / model_channels; the last has no attention
    num_res_blocks: int = 2  # blocks per encoder level; the decoder has one more
    num_heads: int = 8  # in every attention layer, whatever its width
    context_dim: int = 768  # width of the text features
    norm_num_groups: int = 32  # in every GroupNorm; keep at least 4 channels per group


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Return sinusoidal embeddings of timesteps (B,), as (B, dim): cosines first, wavelengths from 2 pi to 20,000 pi."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angles = timesteps[:, None].float() * freqs  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Sequential):
    """Timesteps (B,), as sinusoids through two linear layers, to the features (B, 4 C) that every resnet block takes."""

    def __init__(self, channels: int):
        super().__init__(nn.Linear(channels, 4 * channels), nn.SiLU(), nn.Linear(4 * channels, 4 * channels))
        self.channels = channels

    def forward(self, timesteps: Tensor) -> Tensor:
        return super().forward(timestep_embedding(timesteps, self.channels).to(next(self.parameters()).dtype))


class ResBlock(nn.Module):
    """Norm, SiLU, conv, twice, with the time embedding added in between."""

    def __init__(self, c_in: int, c_out: int, emb_dim: int, groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(groups, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, c_out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, c_out),
            nn.SiLU(),
            nn.Identity(),  # Compat: dropout in ldm; keeps the convolution at index 3
            zero_module(nn.Conv2d(c_out, c_out, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]  # (B, C_out, H, W)
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """Multi-head attention from positions x to `context`, or to x itself."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, (k, v) = self.split(self.to_q(x)), self.keys_and_values(context)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(h.transpose(1, 2).flatten(2))

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.to_k(context)), self.split(self.to_v(context))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, dim / heads)


class GEGLU(nn.Module):
    """Project to twice the width; the second half, through the exact GELU, gates the first."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Widen fourfold, gate, project back."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))  # Compat: dropout at 1

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each after a LayerNorm, with a residual connection."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.attn1 = Attention(dim, dim, heads)
        self.attn2 = Attention(dim, context_dim, heads)
        self.ff = FeedForward(dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)  # here the text comes in
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the positions of a feature map, as a residual."""

    def __init__(self, channels: int, context_dim: int, heads: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)  # Numerics: 1e-6 here, 1e-5 in ResBlock
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_dim, heads)])
        self.proj_out = zero_module(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, H*W, C)
        h = self.transformer_blocks[0](h, context)
        h = h.transpose(1, 2).unflatten(2, x.shape[2:])  # (B, C, H, W)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halve height and width (rounding up) with a stride-2 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Enlarge to `size` (height, width) by nearest neighbour, then convolve."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Block(nn.Sequential):
    """One of the paper's 25 blocks: layers in sequence, each given the inputs it takes."""

    def forward(  # type: ignore[override]
        self, x: Tensor, emb: Tensor, context: Tensor, size: torch.Size | None = None
    ) -> Tensor:
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


def zero_module(module: M) -> M:
    """Set every parameter of a module to zero."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def build_encoder(cfg: UNetConfig) -> tuple[TimeEmbedding, nn.ModuleList, Block, list[int]]:
    """Build the part that U-Net and ControlNet share: time_embed, input_blocks, middle_block.

    The paper's "trainable copy" is this function, called twice. Also returned: the width of each of the 12 skips.
    """
    emb_dim, groups = 4 * cfg.model_channels, cfg.norm_num_groups
    widths = [cfg.model_channels * mult for mult in cfg.channel_mult]
    time_embed = TimeEmbedding(cfg.model_channels)
    input_blocks = nn.ModuleList([Block(nn.Conv2d(cfg.in_channels, widths[0], 3, padding=1))])
    skip_channels = [widths[0]]
    for level, width in enumerate(widths):
        for _ in range(cfg.num_res_blocks):
            layers: list[nn.Module] = [ResBlock(skip_channels[-1], width, emb_dim, groups)]
            if level < len(widths) - 1:
                layers.append(SpatialTransformer(width, cfg.context_dim, cfg.num_heads, groups))
            input_blocks.append(Block(*layers))
            skip_channels.append(width)
        if level < len(widths) - 1:
            input_blocks.append(Block(Downsample(width)))
            skip_channels.append(width)
    middle_block = Block(
        ResBlock(widths[-1], widths[-1], emb_dim, groups),
        SpatialTransformer(widths[-1], cfg.context_dim, cfg.num_heads, groups),
        ResBlock(widths[-1], widths[-1], emb_dim, groups),
    )
    return time_embed, input_blocks, middle_block, skip_channels


class UNet(nn.Module):
    """Predict the noise in noisy latents; `control` adds a ControlNet's 13 residuals."""

    def __init__(self, cfg: UNetConfig | None = None):
        super().__init__()
        self.cfg = cfg = cfg or UNetConfig()
        self.time_embed, self.input_blocks, self.middle_block, skip_channels = build_encoder(cfg)
        emb_dim, groups = 4 * cfg.model_channels, cfg.norm_num_groups
        self.output_blocks = nn.ModuleList()
        c_in = skip_channels[-1]
        for level in reversed(range(len(cfg.channel_mult))):
            width = cfg.model_channels * cfg.channel_mult[level]
            for i in range(cfg.num_res_blocks + 1):
                layers: list[nn.Module] = [ResBlock(c_in + skip_channels.pop(), width, emb_dim, groups)]
                if level < len(cfg.channel_mult) - 1:
                    layers.append(SpatialTransformer(width, cfg.context_dim, cfg.num_heads, groups))
                if level > 0 and i == cfg.num_res_blocks:
                    layers.append(Upsample(width))
                self.output_blocks.append(Block(*layers))
                c_in = width
        self.out = nn.Sequential(
            nn.GroupNorm(groups, c_in), nn.SiLU(), zero_module(nn.Conv2d(c_in, cfg.out_channels, 3, padding=1))
        )

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, control: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """Return the predicted noise, shaped like x.

        x          (B, 4, h, w)        noisy latents, any h and w
        timesteps  (B,)                0 to 999
        context    (B, 77, 768)        text features
        control    list of 13 tensors  added to the 12 skips and (the last) to the middle block's output; None adds nothing
        Raises ValueError for latents, timesteps, context or control that do not fit the model.
        """
        check_inputs(self.cfg, x, timesteps, context)
        emb = self.time_embed(timesteps)
        h, skips = x, []
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        if control is not None:
            check_control(control, [*skips, h])
            *skips, h = (f if c is None else f + c for f, c in zip([*skips, h], control, strict=True))
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, emb, context, skips[-1].shape[-2:] if skips else None)
        return self.out(h)


def check_inputs(cfg: UNetConfig, x: Tensor, timesteps: Tensor, context: Tensor) -> None:
    """Raise a readable ValueError for inputs that would otherwise fail deep inside the model."""
    if x.ndim != 4 or x.shape[1] != cfg.in_channels:
        raise ValueError(f"latents have shape {tuple(x.shape)}, but the model takes (B, {cfg.in_channels}, h, w)")
    if timesteps.shape != x.shape[:1]:
        raise ValueError(f"timesteps have shape {tuple(timesteps.shape)}, but {len(x)} latents need ({len(x)},)")
    if context.ndim != 3 or context.shape[2] != cfg.context_dim or len(context) != len(x):
        raise ValueError(
            f"context has shape {tuple(context.shape)}, but {len(x)} latents need ({len(x)}, tokens, "
            f"{cfg.context_dim}): encode the prompts with this model's own text encoder"
        )


def check_control(control: Sequence[Tensor | None], features: list[Tensor]) -> None:
    """Raise ValueError if the residuals do not fit the skips and the middle block's output that they are added to."""
    if len(control) != len(features):
        raise ValueError(f"control has {len(control)} tensors, but the model has {len(features)} connections")
    for i, (residual, feature) in enumerate(zip(control, features, strict=True)):
        if residual is None:
            continue
        fits = residual.shape[2:] in (feature.shape[2:], (1, 1))  # 1x1: averaged over all positions
        if not fits or residual.shape[1] != feature.shape[1] or len(residual) not in (1, len(feature)):
            raise ValueError(
                f"control[{i}] has shape {tuple(residual.shape)}, but the model needs {tuple(feature.shape)}: "
                "use a ControlNet with this U-Net's widths and latents of the same size"
            )
