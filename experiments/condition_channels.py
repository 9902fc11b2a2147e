"""Without ControlNet: the condition as a further input channel of the U-Net, all of it trained on, as for Depth-to-Image.

The ablation (X11), and Stability's way (X14), beside ControlNet after as many steps, and after as much time, for depth and
Canny edges. What the whole model has forgotten shows where the condition is blank: the paper's reason for locking.
"""

import copy
import functools
import shutil
import sys
from collections.abc import Callable, Sequence

import harness
import learning
import torch
import torch.nn.functional as F
from harness import BATCH, GUIDANCE, Experiment, Figures, HeldOut
from PIL import Image
from torch import Tensor, nn

from minicn import StableDiffusion, ddim
from minicn.commands import cli
from minicn.training import Examples, Recipe

CONDITIONS = ("depth", "canny")
QUICK = {"condition": "depth", "examples": 8, "steps": 2}
LR = 1e-4  # of the whole U-Net, as Stable Diffusion was trained
TRUNK = 0.6  # of the steps: so far both lengths of training are the same, since the learning rate is still constant
Trained = tuple[Callable[..., list[Image.Image]], Figures]  # what draws the scenes, and what its training took
ROWS: dict[str, tuple[str, dict]] = {  # what is drawn, by which model, with which settings
    "ControlNet": ("ControlNet", {}),
    "input channel, equal steps": ("equal steps", {}),
    "input channel, equal time": ("equal time", {}),
    "ControlNet, scale 0": ("ControlNet", {"conditioning_scale": 0.0}),
    "input channel, black hint": ("equal steps", {"blank": 0.0}),
    "input channel, grey hint": ("equal steps", {"blank": 0.5}),  # a channel of zeros: the new weights add nothing
}


def channel(hints: Tensor) -> Tensor:
    """Average hints (B, 3, 8h, 8w) in [0, 1] over areas: (B, 1, h, w) in [-1, 1], as Stable Diffusion 2 takes depth."""
    return 2 * F.avg_pool2d(hints.mean(1, keepdim=True), 8) - 1


class FirstConvolution(nn.Conv2d):
    """The U-Net's first convolution with one more input channel: `condition`, (B, 1, h, w), set for each batch.

    The new weights are zero, so that at first the U-Net predicts what it did before.
    """

    def __init__(self, before: nn.Conv2d):
        super().__init__(before.in_channels + 1, before.out_channels, 3, padding=1)
        with torch.no_grad():
            self.weight.zero_()[:, :-1].copy_(before.weight)
            self.get_parameter("bias").copy_(before.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        times = len(x) // len(self.condition)  # a guided batch holds the latents twice: the condition is for both halves
        return super().forward(torch.cat([x, self.condition.repeat(times, 1, 1, 1)], 1))


class Rival:
    """Stable Diffusion with a U-Net of its own, which reads the condition in its first convolution, and is trained on."""

    def __init__(self, sd: StableDiffusion):
        unet = copy.deepcopy(sd.unet).requires_grad_(True)
        unet.input_blocks[0][0] = self.first = FirstConvolution(unet.input_blocks[0][0])
        self.sd = StableDiffusion(unet, sd.vae, sd.text_encoder, sd.tokenizer, sd.defaults)
        self.sd.prepare()

    def loss(self, data: Examples, recipe: Recipe, step: int) -> Tensor:
        """Return the loss of eq. (10) of the batch that a ControlNet is shown at that step."""
        batch = data.batch(recipe.seed, step, recipe.batch_size, recipe.drop_prompt, self.sd.device)
        x_t = ddim.add_noise(batch.latents, batch.noise, self.sd.alphas_cumprod[batch.timesteps])
        self.first.condition = channel(batch.hints)
        return (self.sd.unet(x_t, batch.timesteps, batch.context) - batch.noise).square().mean()

    def draw(self, held_out: HeldOut, blank: float | None = None) -> list[Image.Image]:
        """Draw the scenes as HeldOut.draw does, from their hints, or from hints of one value, in [0, 1]."""
        images, captions = [], [scene.caption for scene in held_out.scenes]
        hints = held_out.hints if blank is None else torch.full_like(held_out.hints, blank)
        settings = {"num_steps": held_out.experiment.num_steps, "guidance_scale": GUIDANCE}
        for i in range(0, len(captions), BATCH):
            self.first.condition = channel(hints[i : i + BATCH])
            images += self.sd.generate(captions[i : i + BATCH], seed=held_out.experiment.args.seed + i, **settings)
        return images


class Comparison:
    """What is trained for a condition, each when it is first asked for."""

    def __init__(self, experiment: Experiment, sd: StableDiffusion, condition: str):
        self.experiment, self.sd, self.condition, args = experiment, sd, condition, experiment.args
        self.held_out = HeldOut(experiment, sd, condition)
        self.recipe = Recipe(args.steps, lr=learning.LR, seed=args.seed)
        self.data = functools.partial(learning.scenes, sd, condition, args.examples, keep=not args.quick)

    @functools.cached_property
    def controlnet(self) -> Trained:
        name = f"{self.condition} ControlNet"
        net, took, _ = learning.controlnet(self.experiment, name, self.sd, self.data(), self.recipe)
        return functools.partial(self.held_out.draw, net), {"steps": self.recipe.steps, **took}

    @functools.cached_property
    def rivals(self) -> dict[str, Trained]:
        """Train for as many steps as the ControlNet, and for as much time; both go on from the same trunk."""
        trunk = max(1, int(TRUNK * self.recipe.steps))
        a_step = self.rival("trunk", trunk, decay=0)[1]["minutes of training"] / trunk
        lengths = {"steps": self.recipe.steps, "time": max(trunk, round(self.controlnet[1]["minutes of training"] / a_step))}
        return {f"equal {name}": self.rival(name, steps, self.recipe.lr_decay) for name, steps in lengths.items()}

    def rival(self, name: str, steps: int, decay: float) -> Trained:
        rival, folder = Rival(self.sd), self.experiment.folder / "checkpoints"
        place, trunk = (folder / f"{self.condition} {which}.pt" for which in (name, "trunk"))
        if trunk.is_file() and not place.is_file():
            shutil.copy(trunk, place)
        loss = functools.partial(rival.loss, self.data(), self.recipe)
        took, _ = learning.train(self.experiment, place.stem, rival.sd.unet, loss, steps=steps, lr=LR, decay=decay)
        return functools.partial(rival.draw, self.held_out), {"steps": steps, **took}

    def measure(self) -> None:
        for name, (which, settings) in ROWS.items():
            make = functools.partial(self.drawn, which, settings)
            self.experiment.row(f"{self.condition}: {name}", make, shown="following")

    def drawn(self, which: str, settings: dict) -> tuple[Figures, list[Image.Image]]:
        draw, took = self.controlnet if which == "ControlNet" else self.rivals[which]
        figures, images = self.held_out.measured(lambda: draw(**settings))
        return {**figures, **took}, images


def measure(experiment: Experiment) -> None:
    sd = StableDiffusion.load("toy")
    for condition in CONDITIONS:
        if experiment.args.condition in ("both", condition):
            Comparison(experiment, sd, condition).measure()


def options(add) -> None:
    add("--condition", choices=("both", *CONDITIONS), default="both", help="hints to train on")
    add("--examples", type=cli.whole(1), default=learning.SCENES, help="training scenes")
    add("--steps", type=cli.whole(1), default=2000, help="steps of each ControlNet, and of the whole U-Net")


def main(argv: Sequence[str] | None = None) -> int:
    return harness.main(__file__, __doc__, measure, argv, scenes=50, options=options, quick=QUICK)


if __name__ == "__main__":
    sys.exit(main())
