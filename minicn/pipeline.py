"""StableDiffusion: prompt and hint to picture. The only file that knows all parts.

Source: Rombach et al., arXiv:2112.10752; with a ControlNet, Zhang and Agrawala, arXiv:2302.05543v1.
"""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minicn import conditions, ddim, weights
from minicn.clip import TextConfig, TextEncoder
from minicn.controlnet import ControlNet, check_hint
from minicn.tokenizer import Tokenizer
from minicn.unet import UNet, UNetConfig
from minicn.vae import VAE, VAEConfig

PARTS = {  # folder: model class, config class, our fields from its config.json, file of the weights
    "unet": (UNet, UNetConfig, weights.unet_fields, "diffusion_pytorch_model"),
    "vae": (VAE, VAEConfig, lambda c, s: weights.fields_from_config(weights.VAE_FIELDS, c, s), "diffusion_pytorch_model"),
    "text_encoder": (TextEncoder, TextConfig, lambda c, s: weights.fields_from_config(weights.TEXT_FIELDS, c, s), "model"),
}


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
    ) -> "StableDiffusion":
        """Load a model.

        source     a diffusers folder, or "toy": the small model that ships with the package
        tokenizer  a folder with vocab.json and merges.txt; by default the model's own
        Raises FileNotFoundError or ValueError, naming the file, for what is missing or does not fit.
        """
        folder = weights.TOY_BASE if str(source) == "toy" else Path(source)
        if not folder.is_dir():
            raise FileNotFoundError(f'{source} is no folder: name a diffusers folder, or "toy"')
        parts = {}
        for name, (model_class, config_class, fields, file) in PARTS.items():
            config = folder / name / "config.json"
            with torch.device("meta"):
                model = model_class(config_class(**fields(weights.read_json(config), config)))
            path = folder / name / f"{file}.safetensors"
            state = weights.from_diffusers(name, weights.read(path)[0], model.state_dict())
            weights.load_into(model, state, path, dtype)
            parts[name] = model.to(device, memory_format=torch.channels_last)  # convolutions are faster so
        return cls(**parts, tokenizer=Tokenizer.load(tokenizer or folder / "tokenizer"))

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write a diffusers folder: weights as safetensors of `dtype`, configurations, tokenizer, scheduler."""
        folder = Path(folder)
        sample_size = 64 if self.unet.cfg.model_channels == 320 else 16  # latents' side that diffusers draws by default
        configs = {
            "unet": weights.unet_config(self.unet.cfg) | {"sample_size": sample_size},
            "vae": weights.vae_config(self.vae.cfg, 8 * sample_size),
            "text_encoder": weights.text_config(self.text_encoder.cfg, self.tokenizer),
        }
        for name, config in configs.items():
            state = weights.to_diffusers(name, getattr(self, name).state_dict())
            state = {key: tensor.to(dtype) for key, tensor in state.items()}
            weights.write_json(folder / name / "config.json", config)
            weights.write(folder / name / f"{PARTS[name][3]}.safetensors", state)
        self.tokenizer.save(folder / "tokenizer")
        weights.write_json(folder / "scheduler" / "scheduler_config.json", weights.SCHEDULER_CONFIG)
        weights.write_json(folder / "model_index.json", weights.MODEL_INDEX)

    def to(self, device: str | torch.device) -> "StableDiffusion":
        """Move the models to a device."""
        for model in (self.unet, self.vae, self.text_encoder):
            model.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.unet.out[2].weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.out[2].weight.dtype

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Return the context (B, 77, 768) of B prompts."""
        return self.text_encoder(self.tokenizer(prompts).to(self.device))

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> list[Image.Image]:
        """Return the pictures of scaled latents (B, 4, h, w), as the U-Net sees them."""
        images = self.vae.decode(latents.to(self.dtype) / self.vae.cfg.scaling_factor).float()
        pixels = (images / 2 + 0.5).clamp(0, 1).mul(255).round().byte()  # diffusers rounds; ldm cuts off
        return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]

    @torch.no_grad()
    def generate(
        self,
        prompt: str | list[str],
        *,
        hint: Image.Image | np.ndarray | Tensor | None = None,
        controlnet: ControlNet | None = None,
        negative_prompt: str = "",
        num_steps: int = 20,
        guidance_scale: float = 9.0,
        conditioning_scale: float = 1.0,
        control_start: float = 0.0,
        control_end: float = 1.0,
        eta: float = 0.0,
        seed: int = 0,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        progress: bool = False,
    ) -> list[Image.Image]:
        """Draw pictures by DDIM with classifier-free guidance, steered by a hint if a ControlNet is given.

        prompt               text, or a list of texts: one picture each (then num_images must be 1)
        hint                 picture, array or tensor in [0, 1], height x width pixels; a tensor may hold one a picture
        num_steps            1 to 1000
        guidance_scale       1 is off; the paper's value is 9
        conditioning_scale   factor on the 13 residuals, 0 and up; 1 is as trained
        control_start, _end  shares of the steps, 0 to 1, between which the ControlNet runs
        eta                  0 is DDIM, 1 adds DDPM's noise
        seed                 0 and up; picture i of num_images is row i of the noise of this seed
        height, width        pixels, multiples of 8; by default the hint's, else 8 times the size that was trained
        Raises ValueError or TypeError, saying what was expected, for anything out of range.
        """
        prompts = [prompt] * num_images if isinstance(prompt, str) else list(prompt)
        check_ranges(num_steps, guidance_scale, conditioning_scale, control_start, control_end, eta, seed, num_images)
        if not isinstance(prompt, str) and (num_images != 1 or not prompts):
            raise ValueError(f"{len(prompts)} prompts with num_images {num_images}: a list gives one picture a prompt")
        if (hint is None) != (controlnet is None):
            missing = "hint" if hint is None else "ControlNet"
            raise ValueError(f"hint and ControlNet go together, but the {missing} is missing")
        default = 512 if self.unet.cfg.model_channels == 320 else 128
        if hint is not None:
            hint = conditions.hint_tensor(hint).to(self.device, self.dtype)
            height, width = height or hint.shape[-2], width or hint.shape[-1]
        height, width = height or default, width or default
        if height < 8 or width < 8 or height % 8 or width % 8:
            raise ValueError(f"the picture is to be {width}x{height} pixels, but both sides must be multiples of 8")

        n = len(prompts)
        guided = guidance_scale != 1
        texts = [negative_prompt] * n + prompts if guided else prompts
        context = self.encode_prompts(texts)
        generator = torch.Generator("cpu").manual_seed(seed)
        x = torch.randn((n, 4, height // 8, width // 8), generator=generator).to(self.device, self.dtype)
        features = None
        if controlnet is not None:
            check_hint(hint, x)
            features = controlnet.input_hint_block(hint)  # E(hint) of eq. (9), once for all steps
            features = torch.cat([features, features]) if guided and len(features) > 1 else features

        steps = ddim.timesteps(num_steps)
        for i, t in enumerate(tqdm(steps, desc="denoising", unit="step", disable=not progress)):
            batch = torch.cat([x, x]) if guided else x
            timesteps = torch.full((len(batch),), t, device=self.device)
            control = None
            if controlnet is not None and i / num_steps >= control_start and (i + 1) / num_steps <= control_end:
                control = [conditioning_scale * c for c in controlnet.residuals(batch, features, timesteps, context)]
            eps = self.unet(batch, timesteps, context, control)
            if guided:
                eps = ddim.guide(*eps.chunk(2), guidance_scale)
            abar_t, abar_s = self.alphas_cumprod[t], self.alphas_cumprod[max(t - 1000 // num_steps, 0)]
            noise = torch.randn(x.shape, generator=generator).to(x) if eta else None
            x = ddim.ddim_step(x, eps, abar_t, abar_s, eta, noise)
        return self.decode_latents(x)


def check_ranges(num_steps, guidance_scale, conditioning_scale, control_start, control_end, eta, seed, num_images):
    """Raise ValueError, naming the value and its range, for a setting that is out of it."""
    for name, value, low, high in (
        ("num_steps", num_steps, 1, 1000),
        ("guidance_scale", guidance_scale, 0, math.inf),
        ("conditioning_scale", conditioning_scale, 0, math.inf),
        ("control_start", control_start, 0, 1),
        ("control_end", control_end, 0, 1),
        ("eta", eta, 0, 1),
        ("seed", seed, 0, 2**63 - 1),
        ("num_images", num_images, 1, math.inf),
    ):
        if not (low <= value <= high and math.isfinite(value)):
            raise ValueError(f"{name} is {value}, but must lie in [{low}, {high}]")
    if control_start > control_end:
        raise ValueError(f"control_start {control_start} lies after control_end {control_end}: swap them")
