"""Does a ControlNet read hints better if prompts are dropped in training? The paper drops half of them.

With an empty prompt the hint alone says what is there, so the copy should learn to read its meaning. ControlNets are trained
on scribbles with 0, 50 and 100% of the prompts replaced by the empty one, and draw with the caption, the default prompt, and
none. Without a caption colours do not count; the things do.
"""

import sys
from collections.abc import Sequence

import harness
import learning
from harness import Experiment, HeldOut

from minicn import StableDiffusion
from minicn.commands import cli
from minicn.training import Recipe

SHARES = (0.0, 0.5, 1.0)  # of the prompts that are dropped


def measure(experiment: Experiment) -> None:
    args, sd = experiment.args, StableDiffusion.load("toy")
    held_out = HeldOut(experiment, sd, "scribble", also=harness.things_right)
    prompts = {"caption": None, "default prompt": sd.defaults.default_prompt, "no prompt": ""}
    for share in SHARES:
        names = {f"{share:.0%} dropped, {name}": prompt for name, prompt in prompts.items()}
        net, took = None, {}
        if not names.keys() <= experiment.rows.keys():
            recipe = Recipe(args.steps, lr=learning.LR, seed=args.seed, drop_prompt=share)
            data = learning.scenes(sd, "scribble", args.examples, keep=not args.quick)
            net, took, _ = learning.controlnet(experiment, f"{share:.0%} dropped", sd, data, recipe)
        for name, prompt in names.items():
            said = {} if prompt is None else {"prompt": [prompt] * len(held_out.scenes)}
            held_out.row(name, net, more=took, **said)


def options(add) -> None:
    add("--examples", type=cli.whole(1), default=learning.SCENES, help="training scenes")
    add("--steps", type=cli.whole(1), default=1500, help="steps of each ControlNet")


def main(argv: Sequence[str] | None = None) -> int:
    return harness.main(__file__, __doc__, measure, argv, scenes=50, options=options, quick={"examples": 8, "steps": 2})


if __name__ == "__main__":
    sys.exit(main())
