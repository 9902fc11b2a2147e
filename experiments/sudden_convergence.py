"""When, and how suddenly, does a ControlNet begin to follow? The paper's sudden convergence (X12), and what moves it.

"50,000 steps, and the condition is ignored" is a common complaint. So training is watched by its score, with three seeds
and several starts: ours (He's), the released code's (PyTorch's), one without the zero convolution in the hint encoder, and
for edges a ControlNet for depth maps; for depth maps also with other learning rates, batches, and shares of dropped prompts.
A run ends when it follows well, or with --steps. Its curve shows the score (black, 0 below, 1 above) and the loss (red) on
one axis of steps.
"""

import functools
import multiprocessing
import os
import signal
import statistics
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace

import harness
import learning
from harness import FIRST, GUIDANCE, Experiment, Figures
from PIL import Image
from torch import nn
from tqdm import tqdm

from minicn import ControlNet, StableDiffusion, toy
from minicn.commands import cli
from minicn.controlnet import init_he
from minicn.toy import measures
from minicn.trainer import recording
from minicn.training import Recipe

CONDITIONS, LR = ("depth", "canny"), 1e-3  # three times train_toy.py's learning rate: see what it does
ENDS = 0.6  # the score at which a run ends


def pytorch_start(net: ControlNet) -> None:
    """Start the hint encoder as the released training code does: with PyTorch's first weights, not He's."""
    for layer in net.input_hint_block[:-1]:
        if isinstance(layer, nn.Conv2d):
            layer.reset_parameters()


def depth_start(net: ControlNet) -> None:
    """Start all of it as a trained ControlNet for depth maps, as the paper's for Hough lines started from that for edges."""
    net.load_state_dict(ControlNet.load("toy-depth").state_dict())


def not_zero(net: ControlNet) -> None:
    """Start the hint encoder's last convolution as the others: those behind the copy alone keep the output zero at first."""
    init_he([net.input_hint_block[-1]])


STARTS = {
    "He's start": lambda net: None,
    "PyTorch's start": pytorch_start,
    "encoder's last layer not zero": not_zero,
    "a depth ControlNet": depth_start,
}


def runs(recipe: Recipe, seeds: int) -> Iterator[tuple[str, str, Recipe, str]]:
    """Yield name, condition, recipe and start of each run."""
    for condition in CONDITIONS:
        for start in list(STARTS)[: 3 if condition == "depth" else 4]:
            for seed in range(recipe.seed, recipe.seed + seeds):
                yield f"{condition}, {start}, seed {seed}", condition, replace(recipe, seed=seed), start
    changes = {"learning rate": ("lr", 1e-4, learning.LR), "batch": ("batch_size", 1, 16), "dropped": ("drop_prompt", 0, 1)}
    for words, (name, *values) in changes.items():
        for value in values:
            yield f"depth, {words} {value:g}", "depth", replace(recipe, **{name: value}), "He's start"


def begin(args: Namespace) -> None:
    """Begin a process that trains: Ctrl-C is the main one's, and the only bar."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    harness.compute(args.threads)


@functools.cache
def validation(condition: str, scenes: int, num_steps: int) -> recording.Validation:
    """Return what watches a training: held-out scenes, drawn in half as many steps as elsewhere."""
    held_out = list(toy.scenes(scenes, "test", condition, FIRST))
    shown = [scene.image for scene in held_out], [scene.hint(condition) for scene in held_out]
    captions, measured = [scene.caption for scene in held_out], measures.measure(condition)
    model = StableDiffusion.load("toy")
    return recording.Validation(model, *shown, captions, GUIDANCE, 0, num_steps // 2, measure=measured, wanted=held_out)


def run(work: tuple[Namespace, int, str, str, Recipe, str]) -> tuple[Figures, list[Image.Image]]:
    """Train, watched; return what it took, its curve, and what it draws in the end."""
    args, num_steps, name, condition, recipe, start = work
    watch, last = validation(condition, args.scenes, num_steps), []
    data = learning.scenes(watch.sd, condition, args.examples, keep=not args.quick)

    def score(net: ControlNet) -> float:
        last[:] = watch.draw(net.eval())
        net.train()
        return watch.score(last)

    at, look = Namespace(folder=args.output), {"every": args.every, "until": ENDS}
    _, took, log = learning.controlnet(at, name, watch.sd, data, recipe, STARTS[start], score, **look)
    return {**learning.begins(log), **took}, [learning.curve(log, recipe.steps), *last]


def measure(experiment: Experiment) -> None:
    args = experiment.args
    todo = list(runs(Recipe(args.steps, lr=LR, seed=args.seed, lr_decay=0.0), args.seeds))
    left = [(args, experiment.num_steps, *each) for each in todo if each[0] not in experiment.rows]
    with multiprocessing.get_context("spawn").Pool(args.processes, begin, (args,)) as pool:
        found = pool.imap(run, left)
        for name, *_ in tqdm(todo, desc="runs", unit="run"):
            experiment.row(name, lambda: next(found))
    for title in dict.fromkeys(name.rpartition(",")[0] for name in experiment.rows if ", seed " in name):
        found = [row for name, row in experiment.rows.items() if name.startswith(f"{title}, seed ")]
        steps = [row["step of 0.5"] for row in found if "step of 0.5" in row]
        if len(steps) > 1:
            spread = {"step of 0.5": statistics.fmean(steps), "step, deviation": statistics.stdev(steps)}
            experiment.row(f"{title}, mean of {len(steps)} seeds that follow", lambda spread=spread: (spread, []))


def options(add) -> None:
    add("--steps", type=cli.whole(1), default=1200, help="steps of a run that does not follow before")
    add("--examples", type=cli.whole(1), default=learning.SCENES, help="training scenes")
    add("--seeds", type=cli.whole(1, 100), default=3, help="runs of each start")
    add("--processes", type=cli.whole(1, 64), default=2, help="processes that train")
    add("--every", type=cli.whole(1, learning.CHECKPOINT_EVERY), default=50, help="steps between scores")


def main(argv: Sequence[str] | None = None) -> int:
    quick = {"steps": 1, "every": 1, "examples": 8, "seeds": 1}
    return harness.main(__file__, __doc__, measure, argv, scenes=8, options=options, quick=quick)


if __name__ == "__main__":
    sys.exit(main())
