"""Captions of pictures, for the paper's automatic prompts: by BLIP through transformers, or for the toy by its judge."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from minicn import toy
from minicn.checkpoints import hub
from minicn.pipeline import StableDiffusion
from minicn.toy import judging


def captioner(name: str | None, sd: StableDiffusion) -> Callable[[Image.Image], str]:
    """Return a function that captions a picture: a BLIP model by name or folder; for None the toy's own.

    Raises ValueError if there is none, or transformers is not installed.
    """
    if name is not None:
        return blip(name)
    if not {*toy.THINGS, *toy.COLOURS} <= {*sd.defaults.words.split()}:
        raise ValueError("automatic prompts need --captioner, a BLIP model for transformers; only the toy has its own")
    return toy_caption


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


def toy_caption(image: Image.Image) -> str:
    """Name, in the toy's words, what the judge of scene accuracy sees in a picture; up to three things, the largest."""
    (seen, background), found = judging.split(np.asarray(image)), []
    with torch.no_grad():
        verdicts = judging.Judge.load()(seen)[:, :-1]  # without "other": what is half a thing has a name, too
    for i, (mask, verdict) in enumerate(zip(seen[:, 0], verdicts.argmax(1).tolist(), strict=True)):
        if verdict:  # not "none"
            name = toy.thing_names()[i * len(toy.THINGS) + verdict - 1]
            found.append((mask.sum().item(), name, mask.nonzero().float().mean(0)))
    found = sorted(found, key=lambda thing: -thing[0])[:3]
    if len(found) != 2:
        return toy.sentence([name for _, name, _ in found] or ["things"], background)
    (_, one, at), (_, other, there) = found
    down, right = (there - at).tolist()
    if abs(down) < abs(right):
        return toy.sentence([one, other], background, "beside")
    return toy.sentence([one, other] if down > 0 else [other, one], background, "above")
