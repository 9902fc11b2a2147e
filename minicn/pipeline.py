"""StableDiffusion: prompt and hint to picture. The only file that knows all parts.

Source: Rombach et al., arXiv:2112.10752; with a ControlNet, Zhang and Agrawala, arXiv:2302.05543v1.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minicn import ddim, fast
from minicn.clip import TextEncoder
from minicn.controlnet import ControlNet, check_hint
from minicn.inputs import Defaults, check_settings, check_words, pair_hints, size_of, to_rgb
from minicn.tokenizer import Tokenizer
from minicn.unet import UNet, UNetConfig
from minicn.vae import VAE

Hint = str | Path | Image.Image | np.ndarray | Tensor


class StableDiffusion:
    """The four parts of Stable Diffusion, in evaluation mode: tokenizer, text_encoder, unet, vae; and its defaults."""

    def __init__(
        self, unet: UNet, vae: VAE, text_encoder: TextEncoder, tokenizer: Tokenizer, defaults: Defaults | None = None
    ):
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet.eval(), vae.eval(), text_encoder.eval(), tokenizer
        self.defaults = defaults or Defaults()
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
        """Load a model in any published layout, or "toy"; see `checkpoints.models.load_stable_diffusion`."""
        from minicn.checkpoints import models

        return cls(**models.load_stable_diffusion(source, dtype, device, tokenizer, vae, vae_dtype, variant, ema))

    def save(self, path: str | Path, dtype: torch.dtype | None = None, layout: str = "diffusers") -> None:
        """Write a "diffusers" folder or an "ldm" file; see `checkpoints.models.save_stable_diffusion`."""
        from minicn.checkpoints import models

        models.save_stable_diffusion(self, path, dtype, layout)

    def prepare(self, *controlnets: ControlNet) -> None:
        """Check all weights once, and make the U-Net and the ControlNets fast; `generate` does this first."""
        from minicn.checkpoints import loading

        for model in (self.unet, *controlnets, self.vae, self.text_encoder):
            loading.check_finite(model)
        # Numerics: not the autoencoder; over its large maps PyTorch's channels-last GroupNorm adds up squares one by one,
        # with an error of about 1e-5 at 512x512 on CPUs.
        for model in (self.unet, *controlnets):
            fast.prepare(model)

    def to(self, device: str | torch.device) -> "StableDiffusion":
        """Move the models to a device."""
        for model in (self.unet, self.vae, self.text_encoder):
            model.to(device)
        return self

    def __repr__(self) -> str:
        parts = {"U-Net": self.unet, "autoencoder": self.vae, "text encoder": self.text_encoder}
        sizes = (f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.1f}" for name, part in parts.items())
        side, held = self.image_size, f"{self.dtype} on {self.device}".removeprefix("torch.")
        return f"<StableDiffusion for {side}x{side} pixels, {held}; million parameters: {', '.join(sizes)}>"

    @property
    def image_size(self) -> int:
        """Side length, in pixels, of the pictures that the model was trained on."""
        return 512 if self.unet.cfg.model_channels == UNetConfig.model_channels else 128

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def vae_dtype(self) -> torch.dtype:
        return self.vae.quant_conv.weight.dtype

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Return the context (B, 77, 768) of B prompts. Warns if a prompt is too long, naming the words that are lost."""
        tokens = self.tokenizer(prompts)  # also refuses anything but text
        for prompt in dict.fromkeys(prompts):
            lost = self.tokenizer.lost(prompt)
            if lost:
                warnings.warn(
                    f"the prompt is longer than {self.tokenizer.max_length} tokens: {lost!r} is cut off", stacklevel=3
                )
        return self.text_encoder(tokens.to(self.device))

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return scaled latents (B, 4, h, w) of pictures of the same size: the means."""
        pixels = torch.from_numpy(np.stack([np.asarray(to_rgb(image)) for image in images]))
        pixels = (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).to(self.device, self.vae_dtype)
        latents = self.vae.encode(pixels)[0].float() * self.vae.cfg.scaling_factor
        self.check_vae(latents)
        return latents

    def check_vae(self, result: Tensor) -> None:
        """Raise ValueError, with the remedy, if the autoencoder overflowed."""
        if not torch.isfinite(result).all():
            remedy = "load it in float32 (vae_dtype, --vae-dtype float32)"
            if self.vae_dtype == torch.float32:
                remedy = "its weights are damaged, or not those of Stable Diffusion 1.5's autoencoder"
            raise ValueError(f"the autoencoder gave NaN in {self.vae_dtype}: {remedy}")

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> list[Image.Image]:
        """Return the pictures of scaled latents (B, 4, h, w), as the U-Net sees them.

        Raises ValueError if the autoencoder overflows.
        """
        images = self.vae.decode(latents.to(self.vae_dtype).contiguous() / self.vae.cfg.scaling_factor).float()
        self.check_vae(images)
        pixels = (images / 2 + 0.5).clamp(0, 1).mul(255).round().byte()  # diffusers rounds; ldm truncates
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
        guidance_scale: float | None = None,
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
                             paper's automatic prompts, where a picture for the default prompt is captioned and drawn again
        hint                 picture, its path, array or tensor in [0, 1], height x width pixels; a tensor may hold one each
        controlnet           one, or several with as many hints, whose residuals are added
        num_steps            1 to 1000
        guidance_scale       1 is off; by default the model's own: 9, as in the paper, or what its folder says
        conditioning_scale   factor on the 13 residuals, 0 and up; 1 is as trained; or one for each ControlNet
        control_start, _end  fractions of the steps that run, 0 to 1, between which the ControlNet does, too; with
                             denoise 0.5 and 20 steps, 10 run
        guess_mode           control only the conditional half, the i-th residual scaled by 0.825^(12 - i), so that the
                             hint decides where the prompt says nothing; "diffusers": spaced as in diffusers
        image                picture to start from: its latents, noised as far as `denoise` says
        mask                 white where the image is to be redrawn; where it is black or transparent, pixels stay unchanged
        denoise              fraction of the steps to run with an image, above 0, up to 1; 1 keeps nothing of it
        eta                  0 is DDIM, 1 adds DDPM's noise
        seed                 0 and up; picture i of num_images is row i of the noise of this seed
        height, width        pixels, multiples of 8; by default those of the hint or the image, else of the training pictures
        Raises ValueError or TypeError, saying what was expected, for anything out of range.
        """
        if guidance_scale is None:
            guidance_scale = self.defaults.guidance_scale
        settings = {name: value for name, value in locals().items() if name not in ("self", "prompt")}
        if callable(prompt):
            first = self.generate([self.defaults.default_prompt] * num_images, **settings | {"num_images": 1})
            return self.generate([prompt(picture) for picture in first], **settings | {"num_images": 1})
        prompt = prompt if isinstance(prompt, str) else list(prompt)
        check_settings(prompt, settings)
        num_steps, seed, num_images = int(num_steps), int(seed), int(num_images)  # of numpy's some have no sign
        nets, hints, scales = pair_hints(controlnet, hint, conditioning_scale)
        height, width = size_of(height, width, hints, image, self.image_size)
        self.prepare(*nets)

        prompts = [prompt] * num_images if isinstance(prompt, str) else prompt
        guided = guidance_scale != 1
        context = self.encode_prompts([negative_prompt] * len(prompts) + prompts if guided else prompts)
        check_words([*prompts, negative_prompt], self.defaults.words)
        generator = torch.Generator("cpu").manual_seed(seed)
        noise = torch.randn((len(prompts), 4, height // 8, width // 8), generator=generator).to(self.device)
        controls = [
            Control(net, h.to(self.device, self.dtype), scale, guess_mode, context, guided, noise)
            for net, h, scale in zip(nets, hints, scales, strict=True)
        ]
        start = Start(self, noise, image, mask, denoise, num_steps)
        window = (control_start, control_end)
        predict = Predictor(self.unet, context, guidance_scale, controls, window, num_steps, start.step)
        if controls and not any(predict.controlled(i) for i in range(start.step, num_steps)):
            warnings.warn(
                f"none of the {num_steps - start.step} steps lies between control_start {control_start:g} and control_end "
                f"{control_end:g}: the hint steers nothing",
                stacklevel=3,  # the caller: between are torch's
            )
        with predict.fast():
            x = ddim.sample(
                predict, start.x, self.alphas_cumprod, num_steps, start.step, eta, generator, start.restore, progress
            )
        return start.paste(self.decode_latents(x))


class Start:
    """Where the sampler starts: pure noise, or a partly noised image; with a mask, what is kept of the image."""

    def __init__(
        self,
        sd: StableDiffusion,
        noise: Tensor,
        image: Image.Image | None,
        mask: Image.Image | None,
        denoise: float,
        steps: int,
    ):
        self.x, self.step, self.image, self.mask = noise, 0, image, mask
        if image is None:
            return
        height, width = 8 * noise.shape[-2], 8 * noise.shape[-1]
        for name, picture in (("image", image), ("mask", mask)):
            if picture is not None and picture.size != (width, height):
                came = f"{picture.width}x{picture.height}"
                raise ValueError(
                    f"the {name} is {came} pixels, but the picture {width}x{height}: make them the same size (--fit)"
                )
        self.image, self.noise, self.num_steps, self.abar = to_rgb(image), noise, steps, sd.alphas_cumprod
        self.x_0, self.visited = sd.encode_images([self.image]), ddim.timesteps(steps)
        self.step = steps - max(1, round(steps * denoise))
        if denoise < 1:
            self.x = ddim.add_noise(self.x_0, noise, self.abar[self.visited[self.step]])
        if mask is not None:
            anew = np.asarray(to_rgb(mask, "black").convert("L")) >= 128
            if anew.all() or not anew.any():
                colour, which = ("white", "all") if anew.any() else ("black or transparent", "nothing")
                warnings.warn(f"the mask is {colour} everywhere, so {which} of the image is redrawn", stacklevel=2)
            self.mask = Image.fromarray(anew)
            self.anew = F.max_pool2d(torch.from_numpy(anew).float()[None, None].to(sd.device), 8).bool()

    def restore(self, x: Tensor, i: int) -> Tensor:
        """After step i, reset what is not redrawn to the image, noised to the same timestep."""
        if self.mask is None:
            return x
        after = ddim.next_timestep(self.visited[i], self.num_steps)
        kept = ddim.add_noise(self.x_0, self.noise, self.abar[after]) if i + 1 < self.num_steps else self.x_0
        return torch.where(self.anew, x, kept)

    def paste(self, pictures: list[Image.Image]) -> list[Image.Image]:
        """Put back the pixels of the image where nothing was redrawn."""
        if self.image is None or self.mask is None:
            return pictures
        return [Image.composite(picture, self.image, self.mask) for picture in pictures]


class Predictor:
    """The noise that U-Net and ControlNets predict together, guided: what a sampler asks for at every step.

    running  fractions of the steps that run, from and to, between which the ControlNets do, too
    begin    the first step that runs
    """

    def __init__(
        self,
        unet: UNet,
        context: Tensor,
        guidance_scale: float,
        controls: "list[Control]",
        running: tuple[float, float],
        num_steps: int,
        begin: int = 0,
    ):
        self.unet, self.context, self.guidance_scale, self.controls = unet, context, guidance_scale, controls
        self.running, self.num_steps, self.begin = running, num_steps, begin

    def controlled(self, i: int) -> bool:
        """Tell whether the ControlNets run in step i: whether all of it lies within their fractions, as in diffusers."""
        count = self.num_steps - self.begin
        return self.running[0] <= (i - self.begin) / count and (i - self.begin + 1) / count <= self.running[1]

    def __call__(self, x: Tensor, t: int, i: int) -> Tensor:
        """Return the predicted noise (B, 4, h, w) float32 at timestep t, in step i."""
        guided = len(self.context) > len(x)  # [unconditional, conditional]
        batch = torch.cat([x, x]) if guided else x
        batch = batch.to(self.context.dtype, memory_format=fast.layout(x.device))
        timesteps = torch.full((len(batch),), t, device=x.device)
        residuals = [control.residuals(batch, timesteps) for control in self.controls if self.controlled(i)]
        control = sum_residuals(residuals) if residuals else None
        eps = self.unet(batch, timesteps, self.context, control).float()
        if guided:
            eps_uncond, eps_cond = eps.chunk(2)
            eps = ddim.guide(eps_uncond, eps_cond, self.guidance_scale)
        if not torch.isfinite(eps).all():
            remedy = "the weights are damaged" if batch.dtype == torch.float32 else "use float32 (dtype, --dtype)"
            raise ValueError(f"step {i + 1} of {self.num_steps} (t = {t}) gave NaN in {batch.dtype}: {remedy}")
        return eps

    @contextlib.contextmanager
    def fast(self) -> Iterator[None]:
        """Inside `with`, compute once what does not change from step to step, or from half to half."""
        guided = self.guidance_scale != 1
        with contextlib.ExitStack() as stack:
            stack.enter_context(fast.sampling(self.unet, guided))
            for control in self.controls:
                stack.enter_context(fast.sampling(control.net, guided and not control.half))
            yield


class Control:
    """A ControlNet at work on one hint, for a batch of [unconditional, conditional] latents if guided."""

    def __init__(
        self,
        net: ControlNet,
        hint: Tensor,
        scale: float,
        guess_mode: bool | str,
        context: Tensor,
        guided: bool,
        latents: Tensor,
    ):
        check_hint(hint, latents)
        self.net = net
        # Compat: residuals that are averaged over all positions control only the conditional half, as in diffusers.
        self.half = guided and (bool(guess_mode) or net.cfg.global_pool)
        self.scales = [scale] * 13
        if guess_mode and not net.cfg.global_pool:
            ratio = 0.825 if guess_mode is True else 0.1 ** (1 / 12)
            self.scales = [scale * ratio ** (12 - i) for i in range(13)]
        self.features = net.hint_features(hint)  # once for all steps
        if guided and not self.half and len(hint) > 1:
            self.features = torch.cat([self.features, self.features])
        self.context = context.chunk(2)[1] if self.half else context

    def residuals(self, x: Tensor, timesteps: Tensor) -> list[Tensor | None]:
        """Return the 13 scaled residuals for a batch of latents."""
        if self.half:
            x, timesteps = x.chunk(2)[1], timesteps.chunk(2)[1]
        control = self.net.residuals(x, self.features, timesteps, self.context)
        control = [c if scale == 1 or c is None else scale * c for scale, c in zip(self.scales, control, strict=True)]
        if self.half:
            control = [c if c is None else torch.cat([torch.zeros_like(c), c]) for c in control]
        return control


def sum_residuals(controls: list[list[Tensor | None]]) -> list[Tensor | None]:
    """Add the residuals of several ControlNets, connection by connection."""
    columns = [[c for c in residuals if c is not None] for residuals in zip(*controls, strict=True)]
    return [functools.reduce(torch.add, column) if column else None for column in columns]
