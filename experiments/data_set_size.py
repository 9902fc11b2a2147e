"""How many pictures does a ControlNet need? The paper's comparison of data sets (X13), with Canny edges.

ControlNets are trained for equally many steps on 16, 128, 1,024 and 8,192 scenes, and draw held-out scenes, and 16 training
scenes that all the sets hold. Where a training scene is followed and a held-out one is not, the hint is not read, but
recognised: that difference is overfitting.
"""

import sys
from collections.abc import Sequence

import harness
import learning
from harness import Experiment, Figures, HeldOut

from minicn import ControlNet, StableDiffusion
from minicn.commands import cli
from minicn.training import Recipe

SIZES = (16, 128, 1024, 8192)  # scenes


def measure(experiment: Experiment) -> None:
    args, sd = experiment.args, StableDiffusion.load("toy")
    held_out, training = (
        HeldOut(experiment, sd, "canny"),
        HeldOut(experiment, sd, "canny", training=min(*SIZES, args.scenes)),
    )
    sizes = [size for size in SIZES if size <= args.largest]
    for size in sizes:
        names = [f"{scenes}, trained on {size:,} scenes" for scenes in ("held-out", "training scenes")]
        if set(names) <= experiment.rows.keys():  # all is measured
            net, took = None, {}
        else:
            recipe = Recipe(args.steps, lr=learning.LR, seed=args.seed)
            data = learning.first(learning.scenes(sd, "canny", sizes[-1], keep=not args.quick), size)
            net, took, _ = learning.controlnet(experiment, f"{size} scenes", sd, data, recipe)
        rows = [row(scenes, name, net, took) for scenes, name in zip((held_out, training), names, strict=True)]
        overfitting = rows[1]["following"] - rows[0]["following"]
        experiment.row(f"difference, {size:,} scenes", lambda value=overfitting: ({"overfitting": value}, []))


def row(scenes: HeldOut, name: str, net: ControlNet | None, took: Figures) -> Figures:
    return scenes.row(name, net, more=took)


def options(add) -> None:
    add("--largest", type=cli.whole(SIZES[0]), default=SIZES[-1], help="scenes of the largest data set")
    add("--steps", type=cli.whole(1), default=2000, help="steps of each ControlNet")


def main(argv: Sequence[str] | None = None) -> int:
    return harness.main(
        __file__, __doc__, measure, argv, scenes=50, options=options, quick={"steps": 2, "largest": SIZES[0]}
    )


if __name__ == "__main__":
    sys.exit(main())
