"""When, and how suddenly, does a ControlNet begin to follow? The paper's sudden convergence (X12), and what moves it.

"50,000 steps, and the condition is ignored" is a common complaint. So training is watched by its score, with three seeds,
and with the released code's start of the hint encoder; for depth maps also with other learning rates, batches, and shares of
dropped prompts. A run ends when it follows well, or with --steps. Its curve shows the score (black, 0 below, 1 above) and
the loss (red) on one axis of steps.
"""

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import harness
import learning
import numpy as np
from harness import FIRST, GUIDANCE, Experiment, Figures
from PIL import Image, ImageDraw
from torch import nn

from minicn import ControlNet, StableDiffusion, toy
from minicn.commands import cli
from minicn.toy import measures
from minicn.trainer import recording
from minicn.training import Recipe

CONDITIONS, SEEDS = ("depth", "canny"), 3
BEGINS, FOLLOWS = 0.1, 0.5  # scores between which it becomes sudden
ENDS = 0.6  # the score at which a run ends


def pytorch_start(net: ControlNet) -> None:
    """Start the hint encoder as the released training code does: with PyTorch's first weights, not He's."""
    for layer in net.input_hint_block[:-1]:
        if isinstance(layer, nn.Conv2d):
            layer.reset_parameters()


def runs(recipe: Recipe) -> Iterator[tuple[str, str, Recipe, Callable]]:
    """Yield name, condition, recipe and start of each run."""
    plain = lambda net: None  # noqa: E731
    for condition in CONDITIONS:
        for seed in range(SEEDS):
            yield f"{condition}, seed {recipe.seed + seed}", condition, replace(recipe, seed=recipe.seed + seed), plain
        yield f"{condition}, PyTorch's start", condition, recipe, pytorch_start
    changes = [
        ("learning rate", "lr", (1e-4, 1e-3)),
        ("batch", "batch_size", (1, 16)),
        ("dropped", "drop_prompt", (0.0, 1.0)),
    ]
    for words, name, values in changes:
        for value in values:
            yield f"depth, {words} {value:g}", "depth", replace(recipe, **{name: value}), plain


def measure(experiment: Experiment) -> None:
    args, sd = experiment.args, StableDiffusion.load("toy")
    validations: dict[str, recording.Validation] = {}

    def run(name: str, condition: str, recipe: Recipe, start: Callable) -> tuple[Figures, list[Image.Image]]:
        data = learning.scenes(sd, condition, args.examples, keep=not args.quick)
        if condition not in validations:
            scenes = list(toy.scenes(args.scenes, "test", condition, FIRST))
            shown = [scene.image for scene in scenes], [scene.hint(condition) for scene in scenes]
            measured, captions = measures.measure(condition), [scene.caption for scene in scenes]
            validations[condition] = recording.Validation(sd, *shown, captions, GUIDANCE, measure=measured, wanted=scenes)
        validation, last = validations[condition], []

        def score(net: ControlNet) -> float:
            last[:] = validation.draw(net.eval())
            net.train()
            return validation.score(last)

        _, took, log = learning.controlnet(experiment, name, sd, data, recipe, start, score, every=args.every, until=ENDS)
        return {**begins(log), **took}, [curve(log, recipe.steps), *last]

    for name, condition, recipe, start in runs(Recipe(args.steps, lr=learning.LR, seed=args.seed, lr_decay=0.0)):
        experiment.row(name, lambda run_of=(name, condition, recipe, start): run(*run_of))
    for condition in CONDITIONS:
        found = [experiment.rows[f"{condition}, seed {args.seed + seed}"] for seed in range(SEEDS)]
        steps = [row["step of 0.5"] for row in found if "step of 0.5" in row]
        if len(steps) > 1:
            spread = {"step of 0.5": statistics.fmean(steps), "step, deviation": statistics.stdev(steps)}
            experiment.row(f"{condition}, mean of {len(steps)} seeds that follow", lambda spread=spread: (spread, []))


def begins(log: list[dict]) -> Figures:
    """Return the steps at which the score reached BEGINS and FOLLOWS, interpolated; what was not reached is not there."""
    found: Figures = {"last score": log[-1]["score"] if log else 0.0}
    for level in (BEGINS, FOLLOWS):
        before = {"step": 0, "score": 0.0}
        for row in log:
            if row["score"] >= level:
                share = (level - before["score"]) / (row["score"] - before["score"])
                found[f"step of {level}"] = before["step"] + share * (row["step"] - before["step"])
                break
            before = row
    if f"step of {FOLLOWS}" in found:
        found["steps from 0.1 to 0.5"] = found[f"step of {FOLLOWS}"] - found[f"step of {BEGINS}"]
    return found


def curve(log: list[dict], steps: int) -> Image.Image:
    """Draw the score (black, 0 to 1) and the loss (red, up to the largest) over the steps, 128x128 pixels."""
    picture = Image.new("RGB", (toy.SIZE, toy.SIZE), "white")
    pen, side = ImageDraw.Draw(picture), toy.SIZE - 1
    largest = max((row["loss"] for row in log), default=1.0)
    for name, most, colour in (("loss", largest, "red"), ("score", 1.0, "black")):
        points = [(side * row["step"] / steps, side * (1 - np.clip(row[name] / most, 0, 1))) for row in log]
        if len(points) > 1:
            pen.line(points, fill=colour, width=2)
    pen.rectangle((0, 0, side, side), outline="grey")
    return picture


def options(add) -> None:
    add("--steps", type=cli.whole(1), default=1000, help="steps of a run that does not follow before")
    add("--examples", type=cli.whole(1), default=learning.SCENES, help="training scenes")
    add("--every", type=cli.whole(1, learning.CHECKPOINT_EVERY), default=50, help="steps between scores")


def main(argv: Sequence[str] | None = None) -> int:
    quick = {"steps": 1, "every": 1, "examples": 8}
    return harness.main(__file__, __doc__, measure, argv, scenes=8, options=options, quick=quick)


if __name__ == "__main__":
    sys.exit(main())
