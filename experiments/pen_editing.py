"""Can a part of a picture be redrawn with a pen? The paper's pen-based editing (X18), with a masked diffusion process.

In each held-out scene one thing is replaced: the mask covers the old thing and the new one, the prompt names the new one, a
scribble shows its outlines. Drawn are: mask and prompt alone; with the pen's strokes inside the mask; with the scribble of
the whole scene. Measured inside the mask: how well the edges follow the new outlines. Outside: whether every bit is kept.
"""

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import harness
import numpy as np
from harness import FIRST, GUIDANCE, Experiment, Figures
from PIL import Image
from tqdm import tqdm

from minicn import ControlNet, StableDiffusion, toy
from minicn.toy import judging, measures, rendering

BRUSH = 6  # pixels that the mask is wider than what it covers
KINDS = [kind for kind in toy.THINGS if kind != "person"]  # what is drawn instead; a person would need a pose
EXAMPLES = 10  # in the sheet


@dataclass
class Edit:
    """A picture before, the scene that is wanted, and what a person would draw to get there."""

    before: Image.Image
    wanted: toy.Scene
    mask: np.ndarray  # (128, 128) bool, where the picture is redrawn
    scribble: np.ndarray  # (128, 128, 3) uint8, the outlines of the scene that is wanted, white on black

    @property
    def strokes(self) -> np.ndarray:
        """What of the scribble the pen draws: that inside the mask."""
        return self.scribble * self.mask[..., None]

    def inside(self, image: Image.Image) -> float:
        """Return how well a picture's edges follow the new outlines inside the mask: F1, two pixels of tolerance."""
        return measures.f1(measures.edges(image) & self.mask, self.wanted.outlines() & self.mask, pixels=2)

    def kept(self, image: Image.Image) -> bool:
        """Return whether a picture is bit for bit the one before, outside the mask."""
        return np.array_equal(np.asarray(image)[~self.mask], np.asarray(self.before)[~self.mask])


def edit(scene: toy.Scene) -> Edit:
    """Replace the first thing of a scene by the next kind, in a colour that the scene does not have."""
    old = scene.things[0]
    kind = KINDS[(KINDS.index(old.kind) + 1) % len(KINDS)] if old.kind in KINDS else KINDS[0]
    colour = next(colour for colour in toy.COLOURS if colour not in scene.colours)
    new = replace(old, kind=kind, colour=colour, pose=())
    things = (new, *scene.things[1:])
    article = "an" if colour[0] in "aeiou" else "a"
    caption = re.sub(rf"\ban? {old.colour} {old.kind}\b", f"{article} {colour} {kind}", scene.caption)
    image, *truths = rendering.render(things, scene.background)
    wanted = toy.Scene(scene.index, scene.split, things, scene.background, caption, image, *truths)
    mask = measures.widen((scene.owners == 0) | (wanted.owners == 0), BRUSH)
    return Edit(Image.fromarray(scene.image), wanted, mask, wanted.hint("scribble"))


def measure(experiment: Experiment) -> None:
    experiment.shown = EXAMPLES
    sd = StableDiffusion.load("toy")
    net = ControlNet.load("toy-scribble", unet=sd.unet)
    edits = [edit(scene) for scene in toy.scenes(experiment.args.scenes, "test", first=FIRST)]
    judge = judging.Judge.load()

    def figures(images: Sequence[Image.Image]) -> Figures:
        scenes = [each.wanted for each in edits]
        return {
            "F1 inside": np.mean([each.inside(image) for each, image in zip(edits, images, strict=True)]),
            "unchanged outside": np.mean([each.kept(image) for each, image in zip(edits, images, strict=True)]),
            "scene accuracy": judging.scene_accuracy(judge, images, scenes)["all"],
            "prompt": measures.prompt_share(list(images), scenes),
        }

    def draw(hints: str) -> tuple[Figures, list[Image.Image]]:
        """Redraw what is masked, with a ControlNet if hints (the name of an Edit's picture) are given."""
        images, begin = [], time.process_time()
        for number, each in enumerate(tqdm(edits, desc="redrawing", unit="picture", leave=False)):
            control = {"hint": getattr(each, hints), "controlnet": net} if hints else {}
            mask = Image.fromarray(each.mask)
            settings = {"num_steps": experiment.num_steps, "guidance_scale": GUIDANCE, "seed": experiment.args.seed + number}
            images += sd.generate(each.wanted.caption, image=each.before, mask=mask, **control, **settings)
        return {**figures(images), "seconds a picture": (time.process_time() - begin) / len(images)}, images

    experiment.show("before", [each.before for each in edits])
    experiment.show(
        "mask, and the pen's strokes", [np.maximum(each.strokes, np.uint8(90) * each.mask[..., None]) for each in edits]
    )
    truths = sd.decode_latents(sd.encode_images([Image.fromarray(each.wanted.image) for each in edits]))
    truths = [Image.composite(new, each.before, Image.fromarray(each.mask)) for new, each in zip(truths, edits, strict=True)]
    floor = experiment.row("mask and prompt alone", lambda: draw(""), shown="F1 inside")["F1 inside"]
    ceiling = experiment.row("true pictures, through the autoencoder", lambda: (figures(truths), truths))["F1 inside"]
    for name, hints in (("with the pen's strokes", "strokes"), ("with the whole scene's scribble", "scribble")):

        def make(hints=hints):
            found, images = draw(hints)
            return {**found, "following": measures.score(found["F1 inside"], floor, ceiling)}, images

        experiment.row(name, make, shown="following")


def main(argv: Sequence[str] | None = None) -> int:
    return harness.main(__file__, __doc__, measure, argv, scenes=40)


if __name__ == "__main__":
    sys.exit(main())
