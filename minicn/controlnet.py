"""ControlNet: a trainable copy of the U-Net's encoder, joined to the locked model by zero convolutions.

Source: Zhang and Agrawala, arXiv:2302.05543v1, eqs. (1) to (9); the module names are those of the published checkpoints.
`ControlledBlock` joins locked and trainable copy for any block; `ControlNet` does it for the U-Net of Stable Diffusion,
with 12 + 1 connections: the twelve skips and the middle block.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from minicn.unet import UNet, UNetConfig, build_encoder, check_inputs, zero_module


def zero_conv(c_in: int, c_out: int | None = None, kernel_size: int = 1) -> nn.Conv2d:
    """Return a zero convolution, eq. (5): weight and bias start at zero.

    Its output is zero at first, yet its weight's gradient is its input times the upstream gradient, eq. (6). So after one
    step of gradient descent the weight is not zero, eq. (7), and gradients reach the layers before it, eq. (8).
    """
    return zero_module(nn.Conv2d(c_in, c_out or c_in, kernel_size, padding=kernel_size // 2))


def zero_linear(dim_in: int, dim_out: int | None = None) -> nn.Linear:
    """Return a zero convolution for tokens (B, N, C), where a 1x1 convolution is a linear layer."""
    return zero_module(nn.Linear(dim_in, dim_out or dim_in))


class ControlledBlock(nn.Module):
    """Eq. (2): y_c = F(x; T) + Z(F(x + Z(c; T_z1); T_c); T_z2), for any block F.

    block  any nn.Module that takes a tensor (further arguments are passed on); it is locked, and a copy of it is trained
    c_in, c_out  widths of x and of F(x)
    zero   makes the zero convolutions: `zero_conv` for maps, `zero_linear` for tokens
    """

    def __init__(
        self, block: nn.Module, c_in: int, c_out: int | None = None, zero: Callable[[int, int], nn.Module] = zero_conv
    ):
        super().__init__()
        self.copy = copy.deepcopy(block).requires_grad_(True)  # T_c, the trainable copy
        self.locked = block.requires_grad_(False).eval()  # T, the locked copy
        self.zero_in = zero(c_in, c_in)  # T_z1
        self.zero_out = zero(c_out or c_in, c_out or c_in)  # T_z2

    def train(self, mode: bool = True) -> "ControlledBlock":
        super().train(mode)
        self.locked.eval()  # a locked batch norm must not update its statistics
        return self

    def forward(self, x: Tensor, c: Tensor, *args) -> Tensor:
        y = self.locked(x, *args)  # eq. (1)
        # At first both zero convolutions give 0: the copy computes what the locked block does, eq. (3), so y_c = y, eq. (4)
        return y + self.zero_out(self.copy(x + self.zero_in(c), *args))


@dataclass(frozen=True)
class ControlNetConfig:
    """Shape of a ControlNet; the defaults are the published ones for Stable Diffusion 1.5."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    hint_channels: tuple[int, ...] = (16, 32, 96, 256)  # widths of the hint encoder, at 1, 1/2, 1/4, 1/8 resolution
    paper_hint_encoder: bool = False  # the 4x4 convolutions that the paper describes
    global_pool: bool = False  # residuals averaged over all positions, as in v1.1's "shuffle"
    bgr: bool = False  # trained on hints in BGR order


def hint_encoder(c_out: int, channels: tuple[int, ...] = (16, 32, 96, 256), paper: bool = False) -> nn.Sequential:
    """Return the hint encoder E, c_f = E(c_i), eq. (9): (B, 3, H, W) in [0, 1] to (B, C, H/8, W/8), zero at first.

    Paper vs code: the paper describes 4x4 stride-2 convolutions with ReLU; the released weights were trained with eight
    3x3 ones and SiLU, three of stride 2. The weights decide; `paper=True` gives the paper's. (It lists four widths, 16
    to 128, which would shrink 512 pixels to 32, not 64; three reach the latents' size.)
    """
    if paper:
        layers, width = [], 3
        for c in (16, 32, 64):
            layers += [nn.Conv2d(width, c, 4, stride=2, padding=1), nn.ReLU()]
            width = c
        return nn.Sequential(*init_he(layers), zero_conv(width, c_out))
    layers = [nn.Conv2d(3, channels[0], 3, padding=1), nn.SiLU()]
    for c, wider in zip(channels[:-1], channels[1:], strict=True):
        layers += [nn.Conv2d(c, c, 3, padding=1), nn.SiLU(), nn.Conv2d(c, wider, 3, stride=2, padding=1), nn.SiLU()]
    # Paper vs code: this zero convolution is 3x3, the thirteen others are 1x1.
    return nn.Sequential(*init_he(layers), zero_conv(channels[-1], c_out, kernel_size=3))


def init_he(layers: list[nn.Module]) -> list[nn.Module]:
    """Give convolutions the initial weights of He et al., arXiv:1502.01852, which preserve the scale of a signal.

    Paper vs code: the released training code keeps PyTorch's default initialisation, under which the difference between
    two hints arrives at the end several thousand times smaller, and must be amplified first: on the toy a ControlNet
    for depth then has not begun to follow after 5000 steps, instead of after 400 (logs: toy/next/controlnets/depth).
    """
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.constant_(layer.get_parameter("bias"), 0)
    return layers


class ControlNet(nn.Module):
    """Turn (noisy latents, hint, timestep, text) into the 13 residuals that steer the locked U-Net."""

    def __init__(self, cfg: ControlNetConfig | None = None):
        super().__init__()
        self.cfg = cfg = cfg or ControlNetConfig()
        self.time_embed, self.input_blocks, self.middle_block, skip_channels = build_encoder(cfg.unet)
        self.input_hint_block = hint_encoder(cfg.unet.model_channels, cfg.hint_channels, cfg.paper_hint_encoder)
        self.zero_convs = nn.ModuleList(nn.Sequential(zero_conv(c)) for c in skip_channels)  # Compat: key zero_convs.{i}.0
        self.middle_block_out = nn.Sequential(zero_conv(skip_channels[-1]))
        self.only_middle = False  # the small-scale regime: the other twelve are not connected, and not computed

    @classmethod
    def from_unet(
        cls, unet: UNet, *, hint_channels: tuple[int, ...] = (16, 32, 96, 256), paper_hint_encoder: bool = False
    ) -> "ControlNet":
        """Make the trainable copy of a U-Net's encoder, in its dtype and on its device; the U-Net is left unchanged."""
        net = cls(ControlNetConfig(unet.cfg, hint_channels, paper_hint_encoder))
        for part in ("time_embed", "input_blocks", "middle_block"):
            # Numerics: a deep copy also keeps the memory layout, so that its results are equal bit for bit.
            setattr(net, part, copy.deepcopy(getattr(unet, part)).requires_grad_(True))
        like = next(unet.parameters())
        return net.to(like.device, like.dtype)

    @classmethod
    def load(
        cls,
        source: str | Path,
        unet: UNet | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        variant: str | None = None,
    ) -> "ControlNet":
        """Load a ControlNet in any published layout, or "toy-canny"; see `checkpoints.models.load_controlnet`."""
        from minicn.checkpoints import models

        return models.load_controlnet(source, unet, dtype, device, variant)

    def save(self, path: str | Path, layout: str = "ldm", dtype: torch.dtype | None = None) -> None:
        """Write an "ldm" file or a "diffusers" folder; see `checkpoints.models.save_model`."""
        from minicn.checkpoints import models

        models.save_model("controlnet", self, path, layout, dtype)

    def __repr__(self) -> str:
        like, size = next(self.parameters()), sum(p.numel() for p in self.parameters()) / 1e6
        held = f"{like.dtype} on {like.device}".removeprefix("torch.")
        return f"<ControlNet for a U-Net of width {self.cfg.unet.model_channels}, {held}; million parameters: {size:.1f}>"

    def forward(self, x: Tensor, hint: Tensor, timesteps: Tensor, context: Tensor) -> list[Tensor | None]:
        """Return 12 residuals for the skips (None where `only_middle`), then 1 for the middle block.

        x          (B, 4, h, w)    noisy latents
        hint       (B, 3, 8h, 8w)  in [0, 1]
        timesteps  (B,)            0 to 999
        context    (B, 77, 768)    text features, the same as the U-Net's
        Raises ValueError for inputs that do not fit the model or each other.
        """
        check_inputs(self.cfg.unet, x, timesteps, context)
        check_hint(hint, x)
        return self.residuals(x, self.hint_features(hint), timesteps, context)

    def hint_features(self, hint: Tensor) -> Tensor:
        """Return c_f = E(hint), (B, C, h, w), which does not change from step to step."""
        return self.input_hint_block(hint.flip(1) if self.cfg.bgr else hint)

    def residuals(self, x: Tensor, hint_features: Tensor, timesteps: Tensor, context: Tensor) -> list[Tensor | None]:
        """Do what `forward` does, given hint_features (B, C, h, w), E(hint), which a sampler computes once for all steps."""
        check_inputs(self.cfg.unet, x, timesteps, context)
        h, emb, control = x, self.time_embed(timesteps), []
        for i, (block, zero) in enumerate(zip(self.input_blocks, self.zero_convs, strict=True)):
            h = block(h, emb, context)
            # Paper vs code: the figure adds the hint to x before the first convolution; the weights expect it after.
            h = h + hint_features if i == 0 else h
            control.append(None if self.only_middle else zero(h))
        control.append(self.middle_block_out(self.middle_block(h, emb, context)))  # 12 + 1
        if self.cfg.global_pool:
            control = [c if c is None else c.mean((2, 3), keepdim=True) for c in control]
        return control


def check_hint(hint: Tensor, latents: Tensor) -> None:
    """Raise ValueError for a hint of any shape other than (B, 3, 8h, 8w).

    The stride-2 convolutions alone would accept 121 to 128 pixels for 16 latents, and silently shift the geometry.
    """
    if hint.ndim != 4 or hint.shape[1] != 3:
        raise ValueError(
            f"hint has shape {tuple(hint.shape)}, but a ControlNet takes (B, 3, H, W): make it RGB (conditions.load_hint)"
        )
    height, width = 8 * latents.shape[-2], 8 * latents.shape[-1]
    if hint.shape[-2:] != (height, width):
        raise ValueError(
            f"hint is {hint.shape[-1]}x{hint.shape[-2]} pixels, but latents {tuple(latents.shape)} "
            f"need {width}x{height}: resize the hint first (--fit, conditions.fit)"
        )
    if hint.shape[0] not in (1, latents.shape[0]):
        raise ValueError(f"{hint.shape[0]} hints for {latents.shape[0]} latents: give one hint, or one for each")
