"""Captions of pictures, for the paper's automatic prompts: by BLIP through transformers, or for the toy by its judge."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
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


@torch.no_grad()
def toy_caption(image: Image.Image) -> str:
    """Name, in the toy's words, what the judge of scene accuracy sees in a picture; up to three things, the largest.

    What hangs together is looked at first as a whole, as without words a thing may be of two colours: then the one that
    covers more counts. Where the whole is no single thing, each of its colours is one.
    """
    (seen, background), judge, found = judging.split(np.asarray(image)), judging.Judge.load(), []
    for whole in pieces(seen[:, 0].sum(0) > 0):
        parts = seen * torch.stack([whole, torch.ones_like(whole)])  # (6, 2, 128, 128); the brightness stays
        verdict = judge(torch.stack([whole, seen[0, 1]])[None]).argmax(1).item()
        if 0 < verdict <= len(toy.THINGS):
            verdicts = [verdict * (i == parts[:, 0].sum((1, 2)).argmax()) for i in range(len(parts))]
            parts[:, 0] = whole
        else:
            verdicts = judge(parts)[:, :-1].argmax(1).tolist()  # without "other": what is half a thing has a name, too
        for i, (mask, each) in enumerate(zip(parts[:, 0], verdicts, strict=True)):
            if each:  # not "none"
                name = toy.thing_names()[i * len(toy.THINGS) + each - 1]
                found.append((mask.sum().item(), name, mask.nonzero().float().mean(0)))
    found = sorted(found, key=lambda thing: -thing[0])[:3]
    if len(found) != 2:
        return toy.sentence([name for _, name, _ in found] or ["things"], background)
    (_, one, at), (_, other, there) = found
    down, right = (there - at).tolist()
    if abs(down) < abs(right):
        return toy.sentence([one, other], background, "beside")
    return toy.sentence([one, other] if down > 0 else [other, one], background, "above")


def pieces(mask: torch.Tensor) -> list[torch.Tensor]:
    """Return the parts of a mask (H, W) bool that hang together, as float masks, without specks of under 20 pixels."""
    numbers, before = torch.arange(1.0, mask.numel() + 1).view(mask.shape) * mask, None
    while before is None or not torch.equal(numbers, before):
        before, numbers = numbers, F.max_pool2d(numbers[None], 3, 1, 1)[0] * mask
    return [(numbers == i).float() for i in numbers[mask].unique() if (numbers == i).sum() >= 20]
