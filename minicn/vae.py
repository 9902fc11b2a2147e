"""The variational autoencoder of Stable Diffusion: pictures to latents, eight times smaller, and back.

Source: Rombach et al., arXiv:2112.10752 (first stage, KL-regularised); the layout of the CompVis checkpoints.
Left out: the discriminator and the perceptual loss that trained it; attention outside the middle block (SD has none).
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VAEConfig:
    """Shape of the autoencoder; the defaults are Stable Diffusion 1.5's."""

    channels: tuple[int, ...] = (128, 256, 512, 512)  # width of each level, finest first
    layers_per_block: int = 2  # resnet blocks per encoder level; the decoder has one more
    latent_channels: int = 4
    norm_num_groups: int = 32  # keep at least 4 channels per group, or GroupNorm discards the colours
    scaling_factor: float = 0.18215  # 1 / std of the latents; applied by the pipeline, not here


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)  # Numerics: 1e-6 here, 1e-5 in the U-Net's resnet blocks


class ResnetBlock(nn.Module):
    """Norm, SiLU, conv, twice; a 1x1 convolution on the shortcut where the width changes."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = group_norm(c_in, groups)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out, groups)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions. Compat: 1x1 convolutions where linear layers would do."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))  # (B, 1, H*W, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)  # (B, C, H*W)
        return x + self.proj_out(h.reshape(x.shape))


class Downsample(nn.Module):
    """Halve height and width. The padding is on the right and bottom only, as in training."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Resnet block, attention, resnet block."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """Resnet blocks of one width."""

    def __init__(self, c_in: int, c_out: int, blocks: int, groups: int):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c_out if i else c_in, c_out, groups) for i in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x


class DownLevel(Level):
    """Resnet blocks, then half the size, except at the last level."""

    def __init__(self, c_in: int, c_out: int, blocks: int, groups: int, last: bool):
        super().__init__(c_in, c_out, blocks, groups)
        self.downsample = nn.Identity() if last else Downsample(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(super().forward(x))


class UpLevel(Level):
    """Resnet blocks, then twice the size, except at the last level."""

    def __init__(self, c_in: int, c_out: int, blocks: int, groups: int, last: bool):
        super().__init__(c_in, c_out, blocks, groups)
        self.upsample = nn.Identity() if last else Upsample(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(super().forward(x))


class Encoder(nn.Module):
    """Pictures (B, 3, H, W) to the moments of the latents, (B, 2 * latent_channels, H/8, W/8)."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        groups, widths, blocks = cfg.norm_num_groups, cfg.channels, cfg.layers_per_block
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        pairs = zip((widths[0], *widths), widths, strict=False)
        self.down = nn.ModuleList(DownLevel(*pair, blocks, groups, i == len(widths) - 1) for i, pair in enumerate(pairs))
        self.mid = Middle(widths[-1], groups)
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * cfg.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents (B, latent_channels, h, w) to pictures (B, 3, 8h, 8w)."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        groups, widths, blocks = cfg.norm_num_groups, cfg.channels, cfg.layers_per_block + 1
        self.conv_in = nn.Conv2d(cfg.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        pairs = zip((*widths[1:], widths[-1]), widths, strict=True)
        # Compat: stored in the encoder's order; the last runs first.
        self.up = nn.ModuleList(UpLevel(*pair, blocks, groups, i == 0) for i, pair in enumerate(pairs))
        self.norm_out = group_norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class VAE(nn.Module):
    """Pictures <-> latents, unscaled in both directions: the pipeline multiplies latents by `cfg.scaling_factor`."""

    def __init__(self, cfg: VAEConfig | None = None):
        super().__init__()
        self.cfg = cfg = cfg or VAEConfig()
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.latent_channels, 2 * cfg.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.latent_channels, cfg.latent_channels, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of q(z | images), a normal distribution for each latent.

        images     (B, 3, H, W)      in [-1, 1]; H and W multiples of 8
        mean, std  (B, 4, H/8, W/8)  unscaled; the log-variance is clamped to [-30, 20]
        Raises ValueError for pictures of another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % 8 or images.shape[3] % 8:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, but the encoder takes (B, 3, H, W) "
                "with H and W multiples of 8: resize or crop them first"
            )
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, (0.5 * logvar.clamp(-30.0, 20.0)).exp()

    def decode(self, latents: Tensor) -> Tensor:
        """Return pictures (B, 3, 8h, 8w), about [-1, 1] but not clamped, for unscaled latents (B, 4, h, w)."""
        if latents.ndim != 4 or latents.shape[1] != self.cfg.latent_channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, but the decoder takes (B, {self.cfg.latent_channels}, h, w)"
            )
        return self.decoder(self.post_quant_conv(latents))
