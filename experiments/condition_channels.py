"""Without ControlNet: the condition as further input channels of the U-Net, all of it trained on, as for Depth-to-Image.

The ablation (X11), and Stability's way (X14), beside ControlNet after as many steps, for depth and Canny edges. A step of
either costs about the same, as the table says, so equal steps are equal time. What the whole model has forgotten shows where
the condition is blank: the paper's reason for locking.
"""

import copy
import functools
import sys
from collections.abc import Sequence

import harness
import learning
import torch
import torch.nn.functional as F
from harness import BATCH, GUIDANCE, Experiment, Figures, HeldOut
from PIL import Image
from torch import Tensor, nn

from minicn import ControlNet, StableDiffusion, ddim
from minicn.commands import cli
from minicn.toy import measures
from minicn.training import Examples, Recipe

LR = 3e-4  # of the whole U-Net, as of the ControlNets
LOOK = 8  # scenes of a score
CHANNELS = {"depth": 1, "canny": 64}


def channels(hints: Tensor, count: int) -> Tensor:
    """Return hints (B, 3, 8h, 8w) in [0, 1] at the latents' size: (B, 1 or 64, h, w) in [-1, 1].

    1   depth, averaged over areas, as Stable Diffusion 2 takes it
    64  of each latent's 8x8 pixels every one: an average would lose where an edge lies
    """
    grey = 2 * hints.mean(1, keepdim=True) - 1
    return F.avg_pool2d(grey, 8) if count == 1 else F.pixel_unshuffle(grey, 8)


class FirstConvolution(nn.Conv2d):
    """The U-Net's first convolution with more input channels: `condition`, (B, C, h, w), set for each batch.

    The new weights are zero, so that at first the U-Net predicts what it did before.
    """

    def __init__(self, before: nn.Conv2d, more: int):
        super().__init__(before.in_channels + more, before.out_channels, 3, padding=1)
        with torch.no_grad():
            self.weight.zero_()[:, :-more].copy_(before.weight)
            self.get_parameter("bias").copy_(before.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        times = len(x) // len(self.condition)  # a guided batch holds the latents twice: the condition is for both halves
        return super().forward(torch.cat([x, self.condition.repeat(times, 1, 1, 1)], 1))


class Rival:
    """Stable Diffusion with a U-Net of its own, which reads the condition in its first convolution, and is trained on."""

    def __init__(self, sd: StableDiffusion, count: int):
        self.count, unet = count, copy.deepcopy(sd.unet).requires_grad_(True)
        unet.input_blocks[0][0] = self.first = FirstConvolution(unet.input_blocks[0][0], count)
        self.sd = StableDiffusion(unet, sd.vae, sd.text_encoder, sd.tokenizer, sd.defaults)
        self.sd.prepare()

    def loss(self, data: Examples, recipe: Recipe, step: int) -> Tensor:
        """Return the loss of eq. (10) of the batch that a ControlNet is shown at that step."""
        batch = data.batch(recipe.seed, step, recipe.batch_size, recipe.drop_prompt, self.sd.device)
        x_t = ddim.add_noise(batch.latents, batch.noise, self.sd.alphas_cumprod[batch.timesteps])
        self.first.condition = channels(batch.hints, self.count)
        return (self.sd.unet(x_t, batch.timesteps, batch.context) - batch.noise).square().mean()

    def draw(self, held_out: HeldOut, count: int, blank: float | None = None) -> list[Image.Image]:
        """Draw the first scenes as HeldOut.draw does, from their hints, or from hints of one value, in [0, 1]."""
        images, captions = [], [scene.caption for scene in held_out.scenes[:count]]
        hints = held_out.hints if blank is None else torch.full_like(held_out.hints, blank)
        settings = {"num_steps": held_out.experiment.num_steps, "guidance_scale": GUIDANCE}
        for i in range(0, len(captions), BATCH):
            self.first.condition = channels(hints[i : i + BATCH][: len(captions) - i], self.count)
            images += self.sd.generate(captions[i : i + BATCH], seed=held_out.experiment.args.seed + i, **settings)
        return images


def compare(experiment: Experiment, sd: StableDiffusion, condition: str) -> None:
    """Measure the ControlNet that ships, and the rival, which is trained for as many steps."""
    args, held_out = experiment.args, HeldOut(experiment, sd, condition)
    data, recipe = (
        learning.scenes(sd, condition, args.examples, keep=not args.quick),
        Recipe(args.steps, lr=LR, seed=args.seed),
    )
    _, took, _ = learning.controlnet(experiment, f"{condition}, timed", sd, data, Recipe(args.timed, lr=learning.LR))
    a_step = {
        "seconds a step": 60 * took["minutes of training"] / args.timed,
        "parameters trained": took["parameters trained"],
    }
    net = ControlNet.load(f"toy-{condition}", unet=sd.unet)
    held_out.row(f"{condition}: ControlNet, 5,000 steps", net, more=a_step)
    held_out.row(f"{condition}: ControlNet, scale 0", net, conditioning_scale=0.0)
    rival = Rival(sd, CHANNELS[condition])

    def score() -> float:
        value = measures.mean(measures.measure(condition), rival.draw(held_out, LOOK), held_out.scenes[:LOOK])
        ceiling, floor = (experiment.rows[bound]["measure"] for bound in reversed(held_out.bounds))
        return measures.score(value, floor, ceiling)

    loss, name = functools.partial(rival.loss, data, recipe), f"{condition}: input channels"
    look = learning.Look(score, min(learning.CHECKPOINT_EVERY, args.steps))
    took, log = learning.train(experiment, name.replace(":", ","), rival.sd.unet, loss, steps=args.steps, lr=LR, look=look)
    took["seconds a step"] = 60 * took["minutes of training"] / args.steps

    def drawn(**settings) -> tuple[Figures, list[Image.Image]]:
        figures, images = held_out.measured(lambda: rival.draw(held_out, len(held_out.scenes), **settings))
        return {**figures, **took}, images

    experiment.row(f"{name}, {args.steps:,} steps", drawn, shown="following")
    experiment.row(f"{name}, black hint", lambda: drawn(blank=0.0), shown="following")
    experiment.row(f"{name}, grey hint", lambda: drawn(blank=0.5), shown="following")  # zeros: the new weights add nothing
    course = {f"after {row['step']:,} steps": row["score"] for row in log if row["step"] % (args.steps // 5 or 1) == 0}
    experiment.row(f"{name}: following so far", lambda: (course, [learning.curve(log, args.steps)]))


def measure(experiment: Experiment) -> None:
    sd = StableDiffusion.load("toy")
    for condition in CHANNELS if experiment.args.condition == "both" else [experiment.args.condition]:
        compare(experiment, sd, condition)


def options(add) -> None:
    add("--condition", choices=("both", *CHANNELS), default="both", help="hints to train on")
    add("--examples", type=cli.whole(1), default=learning.SCENES, help="training scenes")
    add("--steps", type=cli.whole(1), default=5000, help="steps of the whole U-Net; the ControlNets that ship took 5000")
    add("--timed", type=cli.whole(1), default=25, help="steps of a fresh ControlNet, to time them")


def main(argv: Sequence[str] | None = None) -> int:
    quick = {"condition": "depth", "examples": 8, "steps": 2, "timed": 1}
    return harness.main(__file__, __doc__, measure, argv, scenes=50, options=options, quick=quick)


if __name__ == "__main__":
    sys.exit(main())
