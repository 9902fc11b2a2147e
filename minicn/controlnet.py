"""ControlNet: a trainable copy of the U-Net's encoder, joined to the locked model by zero convolutions.

Source: Zhang and Agrawala, arXiv:2302.05543v1, eqs. (2) to (9); the module names are those of the published
checkpoints. `ControlledBlock` is eq. (2) for any block, `ControlNet` the same idea for the U-Net of Stable Diffusion.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from minicn.checkpoints import files, hub, weights
from minicn.unet import TextKeys, UNet, UNetConfig, build_encoder, check_inputs, embed_timesteps, run, zero_module


def zero_conv(c_in: int, c_out: int | None = None, kernel_size: int = 1) -> nn.Conv2d:
    """Return a convolution whose weight and bias start at zero, eq. (5).

    Its output is zero at first, yet its weight's gradient is its input times the gradient behind it, eq. (6): it learns
    from the first step on.
    """
    return zero_module(nn.Conv2d(c_in, c_out or c_in, kernel_size, padding=kernel_size // 2))


def zero_linear(dim_in: int, dim_out: int | None = None) -> nn.Linear:
    """Return a zero convolution for tokens (B, N, C), where a 1x1 convolution is a linear layer."""
    return zero_module(nn.Linear(dim_in, dim_out or dim_in))


class ControlledBlock(nn.Module):
    """Eq. (2): y_c = F(x; T) + Z(F(x + Z(c; T_z1); T_c); T_z2), for any block F.

    block  any nn.Module of one tensor (further arguments are passed on); it is locked, and a copy of it learns.
    c_in, c_out  widths of x and of F(x)
    zero   makes the zero convolutions: `zero_conv` for maps, `zero_linear` for tokens
    """

    def __init__(
        self, block: nn.Module, c_in: int, c_out: int | None = None, zero: Callable[[int, int], nn.Module] = zero_conv
    ):
        super().__init__()
        self.copy = copy.deepcopy(block).requires_grad_(True)  # T_c
        self.locked = block.requires_grad_(False).eval()  # T
        self.zero_in = zero(c_in, c_in)  # T_z1
        self.zero_out = zero(c_out or c_in, c_out or c_in)  # T_z2

    def train(self, mode: bool = True) -> "ControlledBlock":
        super().train(mode)
        self.locked.eval()  # a locked batch norm must not go on counting
        return self

    def forward(self, x: Tensor, c: Tensor, *args) -> Tensor:
        y = self.locked(x, *args)
        return y + self.zero_out(self.copy(x + self.zero_in(c), *args))


@dataclass(frozen=True)
class ControlNetConfig:
    """Shape of a ControlNet; the defaults are the published ones for Stable Diffusion 1.5."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    hint_channels: tuple[int, ...] = (16, 32, 96, 256)  # widths of the hint encoder, at 1, 1/2, 1/4, 1/8 of the size
    paper_hint_encoder: bool = False  # the 4x4 convolutions that the paper describes
    global_pool: bool = False  # residuals averaged over all positions, as in v1.1's "shuffle"
    bgr: bool = False  # trained on hints with blue first


def hint_encoder(c_out: int, channels: tuple[int, ...] = (16, 32, 96, 256), paper: bool = False) -> nn.Sequential:
    """Return E of eq. (9): hint (B, 3, H, W) in [0, 1] to features (B, C, H/8, W/8), zero at first.

    Paper vs code: the paper describes 4x4 stride-2 convolutions with ReLU; the released weights were trained with eight
    3x3 ones and SiLU, three of stride 2. The weights decide; `paper=True` is the paper's. (It writes of four widths, 16
    to 128, which would shrink 512 pixels to 32, not 64; three reach the latents' size.)
    """
    if paper:
        layers, width = [], 3
        for c in (16, 32, 64):
            layers += [nn.Conv2d(width, c, 4, stride=2, padding=1), nn.ReLU()]
            width = c
        return nn.Sequential(*start(layers), zero_conv(width, c_out))
    layers = [nn.Conv2d(3, channels[0], 3, padding=1), nn.SiLU()]
    for c, wider in zip(channels[:-1], channels[1:], strict=True):
        layers += [nn.Conv2d(c, c, 3, padding=1), nn.SiLU(), nn.Conv2d(c, wider, 3, stride=2, padding=1), nn.SiLU()]
    # Paper vs code: this zero convolution is 3x3, the thirteen others are 1x1.
    return nn.Sequential(*start(layers), zero_conv(channels[-1], c_out, kernel_size=3))


def start(layers: list[nn.Module]) -> list[nn.Module]:
    """Give convolutions their first weights, of He et al., arXiv:1502.01852, by which a signal keeps its size.

    Paper vs code: the released training code leaves them as PyTorch makes them, by which the difference between two
    hints reaches the end several thousand times smaller, and has to be grown first: on the toy a ControlNet for depth
    then begins to follow after 2500 steps instead of 150 (the two logs in toy/controlnets/depth).
    """
    for convolution in layers[::2]:
        nn.init.kaiming_normal_(convolution.weight)
        nn.init.zeros_(convolution.bias)
    return layers


class ControlNet(nn.Module):
    """Turn (noisy latents, hint, timestep, text) into the 13 residuals that steer the locked U-Net."""

    def __init__(self, cfg: ControlNetConfig | None = None):
        super().__init__()
        self.cfg = cfg = cfg or ControlNetConfig()
        self.time_embed, self.input_blocks, self.middle_block, skips = build_encoder(cfg.unet)
        self.input_hint_block = hint_encoder(cfg.unet.model_channels, cfg.hint_channels, cfg.paper_hint_encoder)
        self.zero_convs = nn.ModuleList(nn.Sequential(zero_conv(c)) for c in skips)  # Compat: key zero_convs.{i}.0
        self.middle_block_out = nn.Sequential(zero_conv(skips[-1]))
        self.only_middle = False  # the small-scale regime: the other twelve are not connected, and not computed
        self.gradient_checkpointing = False

    @classmethod
    def from_unet(
        cls, unet: UNet, *, hint_channels: tuple[int, ...] = (16, 32, 96, 256), paper_hint_encoder: bool = False
    ) -> "ControlNet":
        """Make the trainable copy of a U-Net's encoder, in its dtype and on its device; the U-Net is left as it is."""
        net = cls(ControlNetConfig(unet.cfg, hint_channels, paper_hint_encoder))
        for part in ("time_embed", "input_blocks", "middle_block"):
            # Numerics: a deep copy keeps the memory layout, too, so that eq. (3) holds bit for bit.
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
        """Load a ControlNet, whichever published layout it has.

        source   a diffusers folder; a .safetensors, .pth, .ckpt or .bin file; a Hugging Face repository; or "toy-canny"
        unet     the U-Net to be controlled: the ControlNet must fit its widths, and "difference" files are added to it
        variant  of a folder's weights, as "fp16"
        Raises FileNotFoundError or ValueError, naming the file, for what is missing or does not fit. Warns if the file
        holds a U-Net of its own (v1.0, "control_sd15_*.pth") that is not `unet`.
        """
        path = hub.resolve(source, variant)
        config: dict = {}
        if not (path / "config.json").is_file() and (path / "controlnet.safetensors").is_file():
            path = path / "controlnet.safetensors"  # the folder of a training run
        if path.is_dir():
            config = files.read_json(path / "config.json")
            file = files.open_weights(files.find_weights(path, ("diffusion_pytorch_model",), variant))
        else:
            file = files.open_weights(path)
        found = weights.contents(file)
        if "controlnet" not in found.parts:
            held = ", ".join(weights.WORDS[kind] for kind in found.parts)
            raise ValueError(f"{file.path} holds no ControlNet, but: {held}; give it as the model instead")
        with weights.building(file.path, "ControlNet"):
            if config:
                shape = UNetConfig(**weights.unet_fields(config, path / "config.json"))
            elif found.difference:
                if unet is None:
                    raise ValueError(f"{file.path} is a difference file: give the U-Net that it was made for (unet=sd.unet)")
                shape = unet.cfg
            else:
                shape = UNetConfig(**weights.fields_of(found, "controlnet"))
            hints = weights.written(found).get("hints", {})
            paper = found.shapes("controlnet").get("input_hint_block.0.weight", (0,))[-1] == 4  # its convolutions are 4x4
            cfg = ControlNetConfig(
                shape,
                hint_channels=ControlNetConfig.hint_channels if paper else weights.hint_channels_of(found),
                paper_hint_encoder=paper,
                # Compat: nothing in a published single file tells, so the field goes by the name.
                global_pool=config.get("global_pool_conditions", hints.get("global_pool", "shuffle" in path.name)),
                bgr=config.get("controlnet_conditioning_channel_order", "bgr" if hints.get("bgr") else "rgb") == "bgr",
            )
            if unet is not None and unet.cfg != cfg.unet:
                raise ValueError(f"{file.path} was made for a U-Net of shape {cfg.unet}, but this one is {unet.cfg}")
            net = cls(cfg)
        if found.difference:
            found.file, found.parts["controlnet"] = _add_difference(found, unet, net)
        weights.load_into(net, found.file, found.parts["controlnet"], dtype, device)
        if unet is not None and "unet" in found.parts and not unet.out[2].weight.is_meta:
            _warn_of_another_unet(found, unet)
        return net.eval()

    def save(self, path: str | Path, layout: str = "ldm", dtype: torch.dtype | None = None) -> None:
        """Write the weights, in their own precision unless `dtype` is given.

        path    layout "ldm": a .safetensors file with the names of the official ones; "diffusers": a folder with config.json
        Raises ValueError for another layout, or the paper's hint encoder in diffusers, which has none.
        """
        state = {key: tensor.to(dtype or tensor.dtype) for key, tensor in self.state_dict().items()}
        if layout == "ldm":
            state = {weights.PREFIXES["controlnet"] + key: tensor for key, tensor in state.items()}
            hints = {"global_pool": self.cfg.global_pool, "bgr": self.cfg.bgr}
            files.write(path, state, {"minicn": weights.metadata({"controlnet": asdict(self.cfg.unet), "hints": hints})})
        elif layout == "diffusers":
            if self.cfg.paper_hint_encoder:
                raise ValueError('diffusers has no place for the hint encoder of the paper: save with layout "ldm"')
            files.write_json(Path(path) / "config.json", weights.controlnet_config(self.cfg))
            file = Path(path) / "diffusion_pytorch_model.safetensors"
            files.write(file, weights.to_diffusers("controlnet", state))
        else:
            raise ValueError(f'layout is {layout!r}, but must be "ldm" or "diffusers"')

    def forward(self, x: Tensor, hint: Tensor, timesteps: Tensor, context: Tensor) -> list[Tensor]:
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
        """Return E(hint) of eq. (9), (B, C, h, w), which does not change from step to step."""
        return self.input_hint_block(hint.flip(1) if self.cfg.bgr else hint)

    def residuals(
        self, x: Tensor, hint_features: Tensor, timesteps: Tensor, context: Tensor | TextKeys, emb: Tensor | None = None
    ) -> list[Tensor]:
        """Do what `forward` does from hint_features (B, C, h, w), E(hint): a sampler computes that once, not every step.

        context  also `TextKeys`, computed once by a sampler
        emb      (1 or B, 4 C), the timesteps embedded, likewise
        """
        check_inputs(self.cfg.unet, x, timesteps, context)
        emb = embed_timesteps(self.time_embed, timesteps, x.dtype) if emb is None else emb
        # Paper vs code: the figure adds the hint to x before the first convolution; the weights want it after.
        h = self.input_blocks[0](x, emb, context) + hint_features
        control = [None if self.only_middle else self.zero_convs[0](h)]
        for block, zero in zip(self.input_blocks[1:], self.zero_convs[1:], strict=True):
            h = run(block, self.gradient_checkpointing, h, emb, context)
            control.append(None if self.only_middle else zero(h))
        h = run(self.middle_block, self.gradient_checkpointing, h, emb, context)
        control.append(self.middle_block_out(h))
        if self.cfg.global_pool:
            control = [c if c is None else c.mean((2, 3), keepdim=True) for c in control]
        return control


def _add_difference(found: weights.Contents, unet: UNet, net: ControlNet) -> tuple[files.WeightFile, weights.Keys]:
    """Return the whole weights of a "difference" file: copied layers hold copy - U-Net, or nothing where that is small."""
    keys, base, state = found.parts["controlnet"], unet.state_dict(), {}
    for name in net.state_dict():
        if name in keys:
            state[name] = found.file.get(keys[name])
        copied = name.startswith(("time_embed.", "input_blocks.", "middle_block."))
        if copied:
            whole = base[name].detach().float().cpu()
            state[name] = whole + state[name].float().view(whole.shape) if name in state else whole
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in state.items()}
    return files.WeightFile(found.file.path, state.__getitem__, shapes, dtypes), {name: name for name in state}


def _warn_of_another_unet(found: weights.Contents, unet: UNet) -> None:
    """Say so if the file's own U-Net, with which the ControlNet was trained, is another one."""
    different = weights.differences(found, "unet", unet)
    if different:
        name, most = different[0]
        warnings.warn(
            f"{found.file.path} holds a U-Net of its own: {len(different)} of {len(found.parts['unet'])} tensors differ "
            f"from this base (most, by {most:.2g}: {name}); to draw with it, load the file as the model",
            stacklevel=3,
        )


def check_hint(hint: Tensor, latents: Tensor) -> None:
    """Raise ValueError for a hint of another shape than (B, 3, 8h, 8w).

    The stride-2 convolutions alone would take 121 to 128 pixels for 16 latents, and shift the geometry silently.
    """
    if hint.ndim != 4 or hint.shape[1] != 3:
        raise ValueError(
            f"hint has shape {tuple(hint.shape)}, but a ControlNet takes (B, 3, H, W): make it RGB (conditions.load_hint)"
        )
    height, width = 8 * latents.shape[-2], 8 * latents.shape[-1]
    if hint.shape[-2:] != (height, width):
        raise ValueError(
            f"hint is {hint.shape[-2]}x{hint.shape[-1]} pixels, but latents {tuple(latents.shape)} "
            f"need {height}x{width}: resize the hint first (conditions.resize_hint)"
        )
    if hint.shape[0] not in (1, latents.shape[0]):
        raise ValueError(f"{hint.shape[0]} hints for {latents.shape[0]} latents: give one hint, or one for each")
