"""Captions of pictures, for the paper's automatic prompts: by BLIP through transformers, or by the toy's own captioner.

The toy needs no second network: the sentence of its grammar under which the toy base itself removes noise best is the
caption (Li et al., arXiv:2303.16203, classify with diffusion models in this way).
"""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from minicn import ddim, toy
from minicn.checkpoints import hub
from minicn.pipeline import StableDiffusion

TIMESTEPS = (400, 650)  # the middle of the schedule; a fixed noise at each


def captioner(name: str | None, sd: StableDiffusion, model: str | Path) -> Callable[[Image.Image], str]:
    """Return a function that captions a picture: a BLIP model by name or folder; for None on the toy, the toy's own.

    Raises ValueError if there is none, or transformers is not installed.
    """
    if name is not None:
        return blip(name)
    if str(model) != "toy":
        raise ValueError("automatic prompts need --captioner, a BLIP model for transformers; only the toy has its own")
    return ToyCaptioner(sd)


def blip(name: str) -> Callable[[Image.Image], str]:
    """Return a BLIP model (such as Salesforce/blip-image-captioning-base) as a function. Raises ValueError."""
    try:
        from transformers import BlipForConditionalGeneration, BlipProcessor
    except ImportError as error:
        raise ValueError("--captioner needs transformers: pip install transformers, or write a --prompt") from error
    folder = hub.resolve(name)  # not by transformers, which would wait and complain without a network
    try:
        processor, model = BlipProcessor.from_pretrained(folder), BlipForConditionalGeneration.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"--captioner {name} cannot be loaded as a BLIP model: {error}") from error

    def caption(image: Image.Image) -> str:
        tokens = model.generate(**processor(images=image, return_tensors="pt"), max_new_tokens=40)
        return processor.decode(tokens[0], skip_special_tokens=True)

    return caption


class ToyCaptioner:
    """Search the grammar of the toy world, one word after the other, for the caption under which noise is removed best."""

    def __init__(self, sd: StableDiffusion):
        self.sd = sd

    def __call__(self, image: Image.Image) -> str:
        x_0, things = self.sd.encode_images([image]), toy.thing_names()
        # A background and a thing; then a second one, how the two stand, and a third: kept if the error is smaller.
        ones = {toy.sentence([thing], ground): (thing, ground) for thing in things for ground in toy.BACKGROUNDS}
        one = self.best(x_0, list(ones))
        first, ground = ones[one]
        twos = {toy.sentence([first, thing], ground, "beside"): thing for thing in things}
        second = twos[self.best(x_0, list(twos))]
        orders = ([first, second], [second, first])
        pairs = [toy.sentence(names, ground, relation) for relation in toy.RELATIONS for names in orders]
        return self.best(x_0, [one, *pairs, *(toy.sentence([first, second, third], ground) for third in things)])

    @torch.no_grad()
    def best(self, x_0: torch.Tensor, captions: list[str], batch: int = 64) -> str:
        """Return the caption with the smallest error, with the same noise for all."""
        generator = torch.Generator().manual_seed(0)
        noise = [torch.randn(x_0.shape, generator=generator).to(x_0) for _ in TIMESTEPS]
        errors = []
        for i in range(0, len(captions), batch):
            context = self.sd.encode_prompts(captions[i : i + batch])
            total = torch.zeros(len(context), device=x_0.device)
            for t, eps in zip(TIMESTEPS, noise, strict=True):
                x = ddim.add_noise(x_0, eps, self.sd.alphas_cumprod[t]).to(self.sd.dtype).expand(len(context), -1, -1, -1)
                steps = torch.full((len(context),), t, device=x_0.device)
                total += (self.sd.unet(x, steps, context).float() - eps).square().mean((1, 2, 3))
            errors += total.tolist()
        return captions[errors.index(min(errors))]
