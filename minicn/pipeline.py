"""StableDiffusion: prompt and hint to picture. The only file that knows all parts.

Source: Rombach et al., arXiv:2112.10752; with a ControlNet, Zhang and Agrawala, arXiv:2302.05543v1.
"""

import functools
import math
import numbers
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from minicn import conditions, ddim
from minicn.checkpoints import files, hub, weights
from minicn.clip import TextConfig, TextEncoder
from minicn.controlnet import ControlNet, check_hint
from minicn.tokenizer import Tokenizer
from minicn.unet import TextKeys, UNet, UNetConfig, add, embed_timesteps
from minicn.vae import VAE, VAEConfig

MODELS = {  # kind: model class, config class, our fields from its config.json, names of the file of its weights
    "unet": (UNet, UNetConfig, weights.unet_fields, ("diffusion_pytorch_model",)),
    "vae": (VAE, VAEConfig, weights.vae_fields, ("diffusion_pytorch_model",)),
    "text_encoder": (TextEncoder, TextConfig, weights.text_fields, ("model", "pytorch_model")),
}
Hint = Image.Image | np.ndarray | Tensor
DEFAULT_PROMPT = "a professional, detailed, high-quality image"  # the paper's "default prompt"


def load_model(
    kind: str,
    source: weights.Contents | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    variant: str | None = None,
    ema: bool = False,
) -> nn.Module:
    """Load one model, a key of MODELS, from what a file holds or from its own diffusers folder.

    Raises FileNotFoundError or ValueError, naming the file, for what is missing or does not fit.
    """
    model_class, config_class, fields, names = MODELS[kind]
    if isinstance(source, Path):
        config = source / "config.json"
        read = fields(files.read_json(config), config)
        found = weights.contents(files.open_weights(files.find_weights(source, names, variant)))
    else:
        found, read = source, None
    if kind not in found.parts:
        held = ", ".join(weights.WORDS[k] for k in found.parts)
        raise ValueError(f"{found.file.path} holds no {weights.WORDS[kind]}, only: {held}")
    keys = found.parts[kind]
    if kind == "unet" and found.ema:
        lost = [key for key in keys if key not in found.ema]
        if ema and lost:
            raise ValueError(
                f"{found.file.path} holds the moving average of a part only ({lost[0]} is missing): leave out ema"
            )
        using, other = ("the moving average", "training's last") if ema else ("training's last", "the moving average")
        warnings.warn(f"{found.file.path} holds the U-Net twice: {using} weights are used, not {other} (ema)", stacklevel=3)
        keys = found.ema if ema else keys
    elif kind == "unet" and ema:
        raise ValueError(f"{found.file.path} holds no moving average of the weights: leave out ema")
    with weights.building(found.file.path, weights.WORDS[kind]):
        model = model_class(config_class(**(read or weights.fields_of(found, kind))))
    weights.load_into(model, found.file, keys, dtype, device)
    return model.eval()


class StableDiffusion:
    """The four parts of Stable Diffusion, in evaluation mode: tokenizer, text_encoder, unet, vae."""

    def __init__(self, unet: UNet, vae: VAE, text_encoder: TextEncoder, tokenizer: Tokenizer):
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet.eval(), vae.eval(), text_encoder.eval(), tokenizer
        self.alphas_cumprod = ddim.alphas_cumprod()  # (1000,), on the CPU

    @classmethod
    def load(
        cls,
        source: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        tokenizer: str | Path | None = None,
        *,
        vae: str | Path | None = None,
        vae_dtype: torch.dtype | None = None,
        variant: str | None = None,
        ema: bool = False,
    ) -> "StableDiffusion":
        """Load a model, whichever published layout it has.

        source     a diffusers folder; an ldm .safetensors, .ckpt or .pth; a Hugging Face repository; or "toy", the small
                   model that ships with the package
        tokenizer  a folder with vocab.json and merges.txt, a model's folder, or "toy"; by default the model's own, for a
                   single file the cached CLIP's
        vae        another autoencoder: a file or a folder
        vae_dtype  precision of the autoencoder, if another than `dtype`: in float16 it may overflow
        variant    of a folder's weights, as "fp16"
        ema        of a file that holds both, take the moving average of the U-Net's weights
        Raises FileNotFoundError or ValueError, naming the file, for what is missing or does not fit. Warns which set of
        weights is used if there are two.
        """
        path = hub.resolve(source, variant)
        found = None
        if path.is_dir():
            if not (path / "unet").is_dir():
                raise FileNotFoundError(f"{path} holds no unet/: name a diffusers folder of a whole Stable Diffusion")
            scheduler = path / "scheduler" / "scheduler_config.json"
            if scheduler.is_file():
                weights.check_fixed(files.read_json(scheduler), scheduler)
        else:
            found = weights.contents(files.open_weights(path))
            missing = [weights.WORDS[kind] for kind in MODELS if kind not in found.parts and not (kind == "vae" and vae)]
            if missing:
                held = ", ".join(weights.WORDS[kind] for kind in found.parts)
                raise ValueError(f"{path} holds no {' and no '.join(missing)}, only: {held}; name a whole Stable Diffusion")
        own = path / "tokenizer" if path.is_dir() else None
        words = Tokenizer.load(hub.tokenizer_folder(tokenizer) if tokenizer else own or hub.default_tokenizer())
        models = {}
        for kind in MODELS:
            if kind == "vae" and vae is not None:
                models[kind] = load_vae(vae, vae_dtype or dtype, device, variant)
                continue
            precision = vae_dtype or dtype if kind == "vae" else dtype
            models[kind] = load_model(kind, found or path / kind, precision, device, variant, ema and kind == "unet")
        size = models["text_encoder"].cfg.vocab_size
        if not all(isinstance(i, int) and 0 <= i < size for i in words.vocab.values()):
            raise ValueError(
                f"{path}: its text encoder knows {size} tokens, but the tokenizer gives others: give its own one"
            )
        return cls(**models, tokenizer=words)

    def save(self, path: str | Path, dtype: torch.dtype | None = None, layout: str = "diffusers") -> None:
        """Write the whole model, in its own precision unless `dtype` is given.

        path    layout "diffusers": a folder of weights, configurations, tokenizer and scheduler; "ldm": one .safetensors
        Raises ValueError for another layout.
        """
        states = {
            kind: {key: tensor.to(dtype or tensor.dtype) for key, tensor in getattr(self, kind).state_dict().items()}
            for kind in MODELS
        }
        if layout == "ldm":
            whole = {weights.PREFIXES[kind] + key: tensor for kind, state in states.items() for key, tensor in state.items()}
            configs = {kind: asdict(getattr(self, kind).cfg) for kind in MODELS}
            files.write(path, whole, {"minicn": weights.metadata(configs)})
            return
        if layout != "diffusers":
            raise ValueError(f'layout is {layout!r}, but must be "ldm" or "diffusers"')
        folder = Path(path)
        sample_size = self.image_size // 8  # latents' side that diffusers draws by default
        configs = {
            "unet": weights.unet_config(self.unet.cfg) | {"sample_size": sample_size},
            "vae": weights.vae_config(self.vae.cfg, 8 * sample_size),
            "text_encoder": weights.text_config(self.text_encoder.cfg, self.tokenizer),
        }
        for kind, state in states.items():
            files.write_json(folder / kind / "config.json", configs[kind])
            files.write(folder / kind / f"{MODELS[kind][3][0]}.safetensors", weights.to_diffusers(kind, state))
        self.tokenizer.save(folder / "tokenizer")
        files.write_json(folder / "scheduler" / "scheduler_config.json", weights.SCHEDULER_CONFIG)
        files.write_json(folder / "model_index.json", weights.MODEL_INDEX)

    def prepare(self, *controlnets: ControlNet) -> None:
        """Check all weights once, and lay out the U-Net's and the ControlNets' for speed; `generate` begins with it."""
        for model in (self.unet, *controlnets):
            weights.prepare(model)
        # Numerics: not the autoencoder; over its large maps PyTorch's GroupNorm for channels last adds up squares one by
        # one, off by about 1e-5 at 512x512 on CPUs.
        for model in (self.vae, self.text_encoder):
            weights.check_finite(model)

    def to(self, device: str | torch.device) -> "StableDiffusion":
        """Move the models to a device."""
        for model in (self.unet, self.vae, self.text_encoder):
            model.to(device)
        return self

    @property
    def image_size(self) -> int:
        """Pixels a side of the pictures that the model was trained on."""
        return 512 if self.unet.cfg.model_channels == UNetConfig.model_channels else 128

    @property
    def device(self) -> torch.device:
        return self.unet.out[2].weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.out[2].weight.dtype

    @property
    def vae_dtype(self) -> torch.dtype:
        return self.vae.quant_conv.weight.dtype

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Return the context (B, 77, 768) of B prompts. Warns, naming the words lost, of one that is too long."""
        tokens = self.tokenizer(prompts)  # also refuses what is no text
        for prompt in dict.fromkeys(prompts):
            lost = self.tokenizer.lost(prompt)
            if lost:
                warnings.warn(
                    f"the prompt is longer than {self.tokenizer.max_length} tokens: lost is {lost!r}", stacklevel=3
                )
        return self.text_encoder(tokens.to(self.device))

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return scaled latents (B, 4, h, w) of pictures of one size: the means."""
        pixels = torch.from_numpy(np.stack([np.asarray(conditions.to_rgb(image)) for image in images]))
        pixels = (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).to(self.device, self.vae_dtype)
        latents = self.vae.encode(pixels)[0].float() * self.vae.cfg.scaling_factor
        self.check_vae(latents)
        return latents

    def check_vae(self, result: Tensor) -> None:
        """Raise ValueError, with the remedy, if the autoencoder's numbers overflowed."""
        if not torch.isfinite(result).all():
            remedy = "load it in float32 (vae_dtype, --vae-dtype float32)"
            if self.vae_dtype == torch.float32:
                remedy = "its weights are damaged, or not an autoencoder's of Stable Diffusion 1.5"
            raise ValueError(f"the autoencoder gave NaN in {self.vae_dtype}: {remedy}")

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> list[Image.Image]:
        """Return the pictures of scaled latents (B, 4, h, w), as the U-Net sees them.

        Raises ValueError if the autoencoder's numbers overflow.
        """
        images = self.vae.decode(latents.to(self.vae_dtype).contiguous() / self.vae.cfg.scaling_factor).float()
        self.check_vae(images)
        pixels = (images / 2 + 0.5).clamp(0, 1).mul(255).round().byte()  # diffusers rounds; ldm cuts off
        return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]

    @torch.no_grad()
    def generate(
        self,
        prompt: str | list[str] | Callable[[Image.Image], str],
        *,
        hint: Hint | Sequence[Hint] | None = None,
        controlnet: ControlNet | Sequence[ControlNet] | None = None,
        negative_prompt: str = "",
        num_steps: int = 20,
        guidance_scale: float = 9.0,
        conditioning_scale: float | Sequence[float] = 1.0,
        control_start: float = 0.0,
        control_end: float = 1.0,
        guess_mode: bool | str = False,
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        denoise: float = 1.0,
        eta: float = 0.0,
        seed: int = 0,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        progress: bool = False,
    ) -> list[Image.Image]:
        """Draw pictures by DDIM with classifier-free guidance, steered by a hint if a ControlNet is given.

        prompt               text; a list of texts, one picture each (then num_images must be 1); or a captioner: the
                             paper's automatic prompts, where a picture of DEFAULT_PROMPT is captioned and drawn again
        hint                 picture, array or tensor in [0, 1], height x width pixels; a tensor may hold one a picture
        controlnet           one, or several with as many hints, whose residuals are added
        num_steps            1 to 1000
        guidance_scale       1 is off; the paper's value is 9
        conditioning_scale   factor on the 13 residuals, 0 and up; 1 is as trained; or one for each ControlNet
        control_start, _end  shares of the steps, 0 to 1, between which the ControlNet runs
        guess_mode           control the conditional half alone, the i-th residual scaled by 0.825^(12 - i), so that the
                             hint counts where the prompt says nothing; "diffusers": spaced as in diffusers
        image                picture to begin from: its latents, noised as far as `denoise` says
        mask                 white where the image is to be drawn anew; elsewhere its pixels come back unchanged
        denoise              share of the steps that is run with an image, above 0 to 1; 1 keeps nothing of it
        eta                  0 is DDIM, 1 adds DDPM's noise
        seed                 0 and up; picture i of num_images is row i of the noise of this seed
        height, width        pixels, multiples of 8; by default those of the hint or the image, else of the training
        Raises ValueError or TypeError, saying what was expected, for anything out of range.
        """
        settings = {name: value for name, value in locals().items() if name not in ("self", "prompt")}
        if callable(prompt):
            first = self.generate([DEFAULT_PROMPT] * num_images, **settings | {"num_images": 1})
            return self.generate([prompt(picture) for picture in first], **settings | {"num_images": 1})
        prompts = [prompt] * num_images if isinstance(prompt, str) else list(prompt)
        check_ranges(num_steps, guidance_scale, control_start, control_end, denoise, eta, seed, num_images)
        if not isinstance(prompt, str) and (num_images != 1 or not prompts):
            raise ValueError(f"{len(prompts)} prompts with num_images {num_images}: a list gives one picture a prompt")
        if guess_mode not in (False, True, "diffusers"):
            raise ValueError(f'guess_mode is {guess_mode!r}, but must be False, True or "diffusers"')
        for name, picture in (("image", image), ("mask", mask)):
            if picture is not None and not isinstance(picture, Image.Image):
                raise TypeError(f"{name} is {type(picture).__name__}, but must be a PIL picture: Image.open reads one")
        if mask is not None and image is None:
            raise ValueError("a mask needs the image that it masks: give both")
        nets, hints, scales = pair_hints(controlnet, hint, conditioning_scale)
        hints = [conditions.hint_tensor(h).to(self.device, self.dtype) for h in hints]
        height, width = size_of(height, width, hints, image, self.image_size)

        # Everything that does not change from step to step, once.
        self.prepare(*nets)
        n, guided = len(prompts), guidance_scale != 1
        context = self.encode_prompts([negative_prompt] * n + prompts if guided else prompts)
        generator = torch.Generator("cpu").manual_seed(seed)
        noise = torch.randn((n, 4, height // 8, width // 8), generator=generator).to(self.device)
        steps = ddim.timesteps(num_steps)
        t_all = torch.tensor(steps, device=self.device)
        keys = TextKeys([self.unet], context)
        emb = embed_timesteps(self.unet.time_embed, t_all, self.dtype)
        controls = []
        for net, one, scale in zip(nets, hints, scales, strict=True):
            check_hint(one, noise)
            controls.append(Control(net, one, scale, guess_mode, context, t_all, guided))
        abar = self.alphas_cumprod
        x, begin = noise, 0
        if image is not None:
            x_0, drawn, keep = self.prepare_image(image, mask, height, width)
            begin = num_steps - max(1, round(num_steps * denoise))
            x = ddim.add_noise(x_0, noise, abar[steps[begin]]) if denoise < 1 else noise

        for i in tqdm(range(begin, num_steps), desc="denoising", unit="step", disable=not progress):
            batch = x.to(self.dtype, memory_format=weights.layout(x.device))  # once for both halves, see unet.repeat
            t = t_all[i].expand(n)
            running = i / num_steps >= control_start and (i + 1) / num_steps <= control_end
            control = total([c.residuals(batch, t, i) for c in controls]) if controls and running else None
            eps = self.unet(batch, t, keys, control, emb[i : i + 1]).float()
            if guided:
                eps = ddim.guide(*eps.chunk(2), guidance_scale)
            abar_t, abar_s = abar[steps[i]], abar[max(steps[i] - 1000 // num_steps, 0)]
            x = ddim.ddim_step(x, eps, abar_t, abar_s, eta, torch.randn(x.shape, generator=generator).to(x) if eta else None)
            if mask is not None:  # what is not drawn anew follows the forward process of the image
                x = torch.where(drawn, x, ddim.add_noise(x_0, noise, abar_s) if i + 1 < num_steps else x_0)
            if not torch.isfinite(x).all():
                raise ValueError(
                    f"step {i + 1} of {num_steps} (t = {steps[i]}) gave NaN in {self.dtype}: "
                    + ("the weights are damaged" if self.dtype == torch.float32 else "use float32 (dtype, --dtype)")
                )
        pictures = self.decode_latents(x)
        return pictures if mask is None else [Image.composite(picture, keep[0], keep[1]) for picture in pictures]

    def prepare_image(
        self, image: Image.Image, mask: Image.Image | None, height: int, width: int
    ) -> tuple[Tensor, Tensor | None, tuple | None]:
        """Return an image's latents; where to draw anew, in latents; and (image, mask) in pixels, to put back what stays."""
        image = conditions.to_rgb(image)
        if image.size != (width, height):
            raise ValueError(
                f"the image has {image.width}x{image.height} pixels, but the picture {width}x{height}: make them equal"
            )
        x_0 = self.encode_images([image])
        if mask is None:
            return x_0, None, None
        if mask.size != image.size:
            raise ValueError(
                f"the mask has {mask.width}x{mask.height} pixels, but the image {width}x{height}: make them equal"
            )
        anew = np.asarray(conditions.to_rgb(mask).convert("L")) >= 128
        cells = torch.from_numpy(anew).float()[None, None].to(self.device)
        return x_0, F.max_pool2d(cells, 8).bool(), (image, Image.fromarray(anew))


def load_vae(
    source: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", variant: str | None = None
) -> VAE:
    """Load an autoencoder from a file that holds one or from a folder, its own or that of a whole model."""
    path = hub.resolve(source, variant)
    if path.is_dir():
        return load_model("vae", path / "vae" if (path / "vae").is_dir() else path, dtype, device, variant)
    return load_model("vae", weights.contents(files.open_weights(path)), dtype, device)


class Control:
    """A ControlNet at work on one hint: E(hint), text keys and time features are computed here, once."""

    def __init__(
        self, net: ControlNet, hint: Tensor, scale: float, guess_mode: bool | str, context: Tensor, t: Tensor, guided: bool
    ):
        self.net = net
        # Compat: residuals that are averaged over all positions control the conditional half alone, as in diffusers.
        self.half = guided and (bool(guess_mode) or net.cfg.global_pool)
        self.scales = [scale] * 13
        if guess_mode and not net.cfg.global_pool:
            ratio = 0.825 if guess_mode is True else 0.1 ** (1 / 12)
            self.scales = [scale * ratio ** (12 - i) for i in range(13)]
        self.features = net.hint_features(hint)  # E(hint) of eq. (9)
        self.keys = TextKeys([net], context.chunk(2)[1] if self.half else context)
        self.emb = embed_timesteps(net.time_embed, t, hint.dtype)

    def residuals(self, x: Tensor, t: Tensor, i: int) -> list[Tensor]:
        """Return the 13 scaled residuals of step i for the latents x, [unconditional, conditional] if guided."""
        control = self.net.residuals(x, self.features, t, self.keys, self.emb[i : i + 1])
        control = [c if scale == 1 or c is None else scale * c for scale, c in zip(self.scales, control, strict=True)]
        if self.half:
            control = [c if c is None else torch.cat([torch.zeros_like(c), c]) for c in control]
        return control


def total(controls: list[list[Tensor]]) -> list[Tensor]:
    """Add the residuals of several ControlNets."""
    columns = [[c for c in residuals if c is not None] for residuals in zip(*controls, strict=True)]
    return [functools.reduce(add, column) if column else None for column in columns]


def pair_hints(controlnet, hint, scale) -> tuple[list[ControlNet], list, list[float]]:
    """Return ControlNets, hints and scales as lists of one length. Raises ValueError, saying what is missing."""
    nets = [] if controlnet is None else list(controlnet) if isinstance(controlnet, (list, tuple)) else [controlnet]
    for net in nets:
        if not isinstance(net, ControlNet):
            raise TypeError(f"controlnet is {net!r}, but must be a ControlNet: ControlNet.load reads one")
    hints = [] if hint is None else list(hint) if isinstance(hint, (list, tuple)) else [hint]
    scales = list(scale) if isinstance(scale, (list, tuple)) else [scale] * max(len(nets), 1)
    if bool(nets) != bool(hints):
        raise ValueError(f"hint and ControlNet go together, but the {'ControlNet' if hints else 'hint'} is missing")
    if len(nets) != len(hints) or len(scales) != max(len(nets), 1):
        raise ValueError(
            f"{len(nets)} ControlNets came with {len(hints)} hints and {len(scales)} conditioning scales: give each one"
        )
    for value in scales:
        check_range("conditioning_scale", value, 0, math.inf)
    return nets, hints, scales[: len(nets)]


def size_of(height, width, hints: list[Tensor], image: Image.Image | None, default: int) -> tuple[int, int]:
    """Return height and width of the picture. Raises ValueError unless they are multiples of 8."""
    like = (*hints[0].shape[-2:],) if hints else (image.height, image.width) if image is not None else (default, default)
    height, width = like[0] if height is None else height, like[1] if width is None else width
    if (
        not all(isinstance(side, numbers.Integral) for side in (height, width))
        or height < 8
        or width < 8
        or height % 8
        or width % 8
    ):
        raise ValueError(
            f"the picture is to be {width}x{height} pixels, but both sides must be multiples of 8: resize the hint"
        )
    return height, width


def check_ranges(num_steps, guidance_scale, control_start, control_end, denoise, eta, seed, num_images):
    """Raise ValueError, naming the value and its range, for a setting that is out of it."""
    check_range("num_steps", num_steps, 1, 1000)
    check_range("guidance_scale", guidance_scale, 0, math.inf)
    check_range("control_start", control_start, 0, 1)
    check_range("control_end", control_end, 0, 1)
    check_range("eta", eta, 0, 1)
    check_range("seed", seed, 0, 2**63 - 1)
    check_range("num_images", num_images, 1, math.inf)
    check_range("denoise", denoise, 0, 1)
    for name, value in (("num_steps", num_steps), ("seed", seed), ("num_images", num_images)):
        if not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} is {value!r}, but must be a whole number")
    if denoise == 0:
        raise ValueError("denoise is 0, which would draw nothing: give more, up to 1")
    if control_start > control_end:
        raise ValueError(f"control_start {control_start} lies after control_end {control_end}: swap them")


def check_range(name: str, value: float, low: float, high: float) -> None:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}, but must be a number")
    if not (low <= value <= high and math.isfinite(value)):
        raise ValueError(f"{name} is {value}, but must lie in [{low}, {high}]")
