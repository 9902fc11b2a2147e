"""What does control in only a part of the diffusion steps do? The paper's 50% (X20), and every other part, in tenths.

A picture's first steps decide where things are, its last ones how their surfaces look. So a ControlNet is switched on at
each tenth of the steps and off at each later one: 55 windows, and a score for each. Windows with the same start share their
trajectory until the first one ends, so that all 55 cost as much as some 26 pictures.
"""

import functools
import sys
from collections.abc import Iterator, Sequence

import harness
import torch
from harness import BATCH, GUIDANCE, Experiment, Figures, HeldOut
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from minicn import ControlNet, StableDiffusion, ddim
from minicn.pipeline import Control, Predictor

IN_SHEET = [(0, 10), (0, 1), (0, 2), (0, 3), (0, 5), (5, 10), (2, 10)]  # windows, in tenths
FIGURES = ("following", "scene accuracy")


def measure(experiment: Experiment) -> None:
    sd = StableDiffusion.load("toy")
    net = ControlNet.load("toy-canny", unet=sd.unet)
    held_out = HeldOut(experiment, sd, "canny")
    trajectories = functools.cache(lambda: [Trajectories(held_out, net, i) for i in range(0, len(held_out.scenes), BATCH)])
    for start in tqdm(range(10), desc="starts", unit="tenth", leave=False):
        drawn = functools.cache(lambda start=start: draw(held_out, trajectories(), start))
        for figure in FIGURES:
            experiment.row(row_name(figure, start), lambda drawn=drawn, figure=figure: (cells(drawn(), figure), []))
        for end in range(start + 1, 11):
            if (start, end) in IN_SHEET:
                name = f"control from {start / 10} to {end / 10}"
                experiment.row(name, lambda drawn=drawn, end=end: drawn()[end], shown="following")
    experiment.below = heat_map(experiment.rows)


def row_name(figure: str, start: int) -> str:
    return f"{figure}: from {start / 10}"


def draw(held_out: HeldOut, trajectories: "list[Trajectories]", start: int) -> dict[int, tuple[Figures, list[Image.Image]]]:
    """Return figures and pictures of the windows that begin at a tenth, by the tenth at which they end."""
    images: dict[int, list[Image.Image]] = {}
    for part in trajectories:
        for end, latents in part.windows(start):
            images.setdefault(end, []).extend(held_out.sd.decode_latents(latents))
    return {end: (held_out.figures(drawn), drawn) for end, drawn in images.items()}


def cells(drawn: dict[int, tuple[Figures, list[Image.Image]]], figure: str) -> Figures:
    return {f"to {end / 10}": figures[figure] for end, (figures, _) in drawn.items()}


class Trajectories:
    """The ways of some scenes' latents from noise to picture, tenth by tenth, with and without control.

    first  of the scenes, of which a batch is taken; they have the seeds that `HeldOut.draw` gives them
    """

    def __init__(self, held_out: HeldOut, net: ControlNet, first: int):
        self.sd, self.num_steps = held_out.sd, held_out.experiment.num_steps
        self.sd.prepare(net)
        captions = [scene.caption for scene in held_out.scenes[first : first + BATCH]]
        random = torch.Generator().manual_seed(held_out.experiment.args.seed + first)
        noise = torch.randn((len(captions), 4, *[side // 8 for side in held_out.hints.shape[-2:]]), generator=random)
        with torch.no_grad():
            context = self.sd.encode_prompts([""] * len(captions) + captions)
            control = Control(net, held_out.hints[first : first + BATCH], 1.0, False, context, True, noise)
        self.plain, self.controlled = (
            Predictor(self.sd.unet, context, GUIDANCE, controls, (0, 1), self.num_steps) for controls in ([], [control])
        )
        self.without = [noise]  # latents after each tenth without control
        for tenth in range(10):
            self.without.append(self.go(self.plain, self.without[-1], tenth))

    @torch.no_grad()
    def go(self, predict: Predictor, x: Tensor, tenth: int) -> Tensor:
        """Return latents (B, 4, h, w) a tenth of the steps further on."""
        visited, abar = ddim.timesteps(self.num_steps), self.sd.alphas_cumprod
        with predict.fast():
            for i in range(tenth * self.num_steps // 10, (tenth + 1) * self.num_steps // 10):
                after = ddim.next_timestep(visited[i], self.num_steps)
                x = ddim.ddim_step(x, predict(x, visited[i], i), abar[visited[i]], abar[after])
        return x

    def windows(self, start: int) -> Iterator[tuple[int, Tensor]]:
        """Yield for each later tenth the clean latents (B, 4, h, w) that control from `start` to this tenth leads to."""
        x = self.without[start]
        for tenth in range(start, 10):
            x = self.go(self.controlled, x, tenth)
            y = x
            for later in range(tenth + 1, 10):
                y = self.go(self.plain, y, later)
            yield tenth + 1, y


def heat_map(rows: dict[str, Figures]) -> Image.Image:
    """Draw the scores of the windows: from top to bottom where control begins, from left to right where it ends."""
    width, height, head = 52, 26, 60
    maps = Image.new("RGB", (len(FIGURES) * (head + 11 * width), 40 + 11 * height), "white")
    pen = ImageDraw.Draw(maps)
    for m, figure in enumerate(FIGURES):
        left = m * (head + 11 * width)
        pen.text((left, 8), f"{figure}; down: control begins at; across: it ends at", fill="black")
        for start in range(10):
            pen.text((left, 48 + (start + 1) * height), f"{start / 10}", fill="black")
            pen.text((left + head + start * width + 16, 48), f"{(start + 1) / 10}", fill="black")
            for end in range(start + 1, 11):
                value = rows[row_name(figure, start)][f"to {end / 10}"]
                shade = round(255 * (1 - min(max(value, 0), 1)))
                x, y = left + head + (end - 1) * width, 40 + (start + 1) * height
                pen.rectangle((x, y, x + width - 3, y + height - 3), fill=(shade, shade, 255))
                pen.text((x + 12, y + 6), harness.number(figure, value), fill="white" if shade < 128 else "black")
    return maps


def main(argv: Sequence[str] | None = None) -> int:
    return harness.main(__file__, __doc__, measure, argv, scenes=20)


if __name__ == "__main__":
    sys.exit(main())
