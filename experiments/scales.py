"""Does a small machine gain by connecting the middle block first, and a large data set's training by unlocking everything?

The paper's section on improved training, with depth maps. Small scale: only the middle block's residual is connected, then
the others, too, in the time that training all of them takes; three seeds. Large scale: a ControlNet alone; a ControlNet
first, and from half of the steps on all of Stable Diffusion with it; both from the first step; on few scenes, and on many.
What is lost by unlocking shows where the model draws without control, and where training scenes are followed better.
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace

import harness
import learning
from harness import Experiment, Figures, HeldOut

from minicn import ControlNet, StableDiffusion
from minicn.commands import cli
from minicn.training import Recipe

LR = 1e-3  # three times train_toy.py's: all begin to follow early (see sudden_convergence.py)
UNLOCKED_LR = LR / 5  # of everything together, as in the published training code: 2e-6 instead of 1e-5
WAYS = {  # what is unlocked in the first half of the steps, and in the second
    "locked": ("none", "none"),
    "ControlNet first, then all": ("none", "all"),
    "all from the first step": ("all", "all"),
}


def small(experiment: Experiment, sd: StableDiffusion, recipe: Recipe, held_out: HeldOut) -> None:
    """Measure all connected, and the middle first, at equal training time."""
    args, data = experiment.args, learning.scenes(sd, "depth", experiment.args.examples, keep=not experiment.args.quick)

    def tuned(name: str, net: ControlNet, way: Recipe) -> Figures:
        took, _ = learning.tune(experiment, name, sd, net, data, way)
        more = {**took, "steps": way.steps, "seconds a step": 60 * took["minutes of training"] / way.steps}
        held_out.row(name, net, more=more)
        return took

    for seed in range(args.seed, args.seed + args.seeds):
        whole = replace(recipe, seed=seed)
        time = tuned(f"all connected, seed {seed}", learning.fresh(sd, whole), whole)["minutes of training"]
        net, half = learning.fresh(sd, whole), replace(whole, steps=args.steps // 2, connect="middle", lr_decay=0.0)
        left = time - tuned(f"middle alone, seed {seed}", net, half)["minutes of training"]
        rest = replace(whole, seed=seed + 1000, steps=max(1, round(args.steps * left / time)))  # other batches
        tuned(f"middle, then all, seed {seed}", net, rest)
    for name in ("all connected", "middle alone", "middle, then all"):
        found = [experiment.rows[f"{name}, seed {seed}"]["following"] for seed in range(args.seed, args.seed + args.seeds)]
        if len(found) > 1:
            spread = {"mean following": statistics.fmean(found), "deviation": statistics.stdev(found)}
            experiment.row(f"{name}, {len(found)} seeds", lambda spread=spread: (spread, []))


def large(experiment: Experiment, recipe: Recipe, scenes: int, shown: dict[str, HeldOut]) -> None:
    """Measure, by what is locked for how long, ControlNets trained on so many scenes; `shown` are those that are drawn."""
    args = experiment.args
    for way, parts in WAYS.items():
        name, sd = f"{scenes:,} scenes, {way}", StableDiffusion.load("toy")
        data = learning.scenes(sd, "depth", scenes, keep=not args.quick)
        net, minutes = learning.fresh(sd, recipe), 0.0
        for half, unlock in enumerate(parts):
            lr = recipe.lr if unlock == "none" else UNLOCKED_LR
            part = replace(recipe, seed=recipe.seed + half, steps=args.steps // 2, unlock=unlock, lr=lr, lr_decay=0.3 * half)
            took, _ = learning.tune(experiment, f"{name}, {half}", sd, net, data, part)
            minutes += took["minutes of training"]
        for which, held_out in shown.items():
            held_out.sd = sd
            held_out.row(f"{name}: {which}", net, more={**took, "minutes of training": minutes})
        shown["held-out"].row(f"{name}: without control")


def measure(experiment: Experiment) -> None:
    args, sd = experiment.args, StableDiffusion.load("toy")
    experiment.shown = 2
    recipe, held_out = Recipe(args.steps, lr=LR, seed=args.seed), HeldOut(experiment, sd, "depth")
    small(experiment, sd, recipe, held_out)
    trained_on = HeldOut(experiment, sd, "depth", training=min(args.few, args.scenes))
    large(experiment, recipe, args.few, {"held-out": held_out, "training scenes": trained_on})
    large(experiment, recipe, args.examples, {"held-out": held_out})


def options(add) -> None:
    add("--steps", type=cli.whole(2), default=800, help="steps of each ControlNet with all connected")
    add("--seeds", type=cli.whole(1, 100), default=3, help="runs of the small scale")
    add("--examples", type=cli.whole(1), default=learning.SCENES, help="training scenes")
    add("--few", type=cli.whole(2), default=64, help="training scenes, where they are few")


def main(argv: Sequence[str] | None = None) -> int:
    quick = {"steps": 2, "seeds": 1, "examples": 8, "few": 2}
    return harness.main(__file__, __doc__, measure, argv, scenes=50, options=options, quick=quick)


if __name__ == "__main__":
    sys.exit(main())
