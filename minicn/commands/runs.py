"""What `minicn train` and train_toy.py share: options, most of them the fields of `Recipe`, and the beginning of a run."""

import dataclasses
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from minicn.commands import cli
from minicn.controlnet import ControlNet
from minicn.pipeline import StableDiffusion
from minicn.training import Recipe


def add_recipe(add: Callable, names: str, **defaults) -> None:
    """Add an option for each of some fields of `Recipe`, with its type, range, help and default.

    defaults  other ones, by field; of a number also a text that says what it depends on: the option's default is None then
    """
    for field in dataclasses.fields(Recipe):
        if field.name not in names.split():
            continue
        default, meaning = defaults.get(field.name, field.default), field.metadata
        option = {"help": meaning["help"], "default": default}
        if field.type is bool:
            option["action"] = "store_true"
        elif field.type is str:
            option["choices"] = meaning["choices"]
        else:
            low, high = meaning["low"], meaning["high"]
            option["type"] = (
                cli.whole(low, math.inf if high is None else high) if field.type is int else cli.number(low, high)
            )
            option["help"] += f", {low} and up" if high is None else f", {low} to {high}"
            if default is dataclasses.MISSING:
                option |= {"required": True, "default": None}
            elif isinstance(default, str):
                option |= {"help": f"{option['help']} (default: {default})", "default": None}
        add("--" + field.name.replace("_", "-"), **option)


def add_run(add: Callable, *, pictures: int, pictures_help: str) -> None:
    """Add the options of a run that are not its recipe's."""
    add("--controlnet", help="continue from this one, e.g. one trained with --connect middle (default: a fresh copy)")
    add("--pictures", type=cli.whole(0, 1000), default=pictures, help=pictures_help)
    guidance = "of the validation pictures, 0 to 100 (default: the model's own)"
    add("--guidance-scale", type=cli.number(0, 100), help=guidance)
    add("--score-every", type=cli.whole(1), default=250, help="steps between validations and rows of the log")
    add("--checkpoint-every", type=cli.whole(1), default=1000, help="steps between checkpoints")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --output")
    cli.add_device(add)
    cli.add_threads(add)


def recipe_of(args: Namespace) -> Recipe:
    """Return the recipe of a command line; what it has no option for keeps its default."""
    return Recipe(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe) if hasattr(args, f.name)})


def begin(args: Namespace) -> torch.device:
    """Check the output folder and return the device, before any work."""
    device = cli.device(args.device)
    cli.check_folder(args.output)
    torch.set_flush_denormal(True)  # Numerics: gradients below 1e-38 are zero, or CPUs compute them many times slower
    return device


def controlnet(source: str | Path | None, sd: StableDiffusion, seed: int, **shape) -> ControlNet:
    """Return a trainable copy of a shape, whose new layers depend on the seed alone, or the ControlNet to continue from."""
    torch.manual_seed(seed)
    if source is None:
        return ControlNet.from_unet(sd.unet, **shape)
    return ControlNet.load(source, unet=sd.unet, device=sd.device)
