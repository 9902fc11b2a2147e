"""What if a hint is read wrongly? The paper's limitation (X21), in three ways, each with what may repair it.

1. The prompt contradicts the hint: the hint shows a cone, the prompt says "a red ring". Which of the two is drawn?
2. The hint can mean two things: a circle is the outline of a ball, and of a ring whose hole was not drawn.
3. The hint cannot say it: two equal things one above the other, and the prompt says which colour is above.
What a picture shows is said by the judge of scene accuracy.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import harness
import numpy as np
from harness import BATCH, FIRST, GUIDANCE, Experiment, Figures
from PIL import Image

from minicn import ControlNet, StableDiffusion, toy
from minicn.toy import judging, rendering
from minicn.trainer import recording


class Reader:
    """Draws scenes from hints and prompts that may not agree with them, and says what is seen."""

    def __init__(self, experiment: Experiment):
        self.experiment, self.sd, self.judge = experiment, StableDiffusion.load("toy"), judging.Judge.load()
        self.nets = {name: ControlNet.load(f"toy-{name}", unet=self.sd.unet) for name in ("canny", "scribble", "ade20k")}

    def draw(self, scenes: Sequence[toy.Scene], prompts: list[str], hints: str, **settings) -> list[Image.Image]:
        """Draw from each scene's hints, of one kind or of several (two words), by prompts that need not be the captions."""
        images, names = [], hints.split()
        for i in range(0, len(scenes), BATCH):
            given = [recording.stack([scene.hint(name) for scene in scenes[i : i + BATCH]]).float() / 255 for name in names]
            nets = [self.nets[name] for name in names]
            defaults = {"num_steps": self.experiment.num_steps, "guidance_scale": GUIDANCE}
            settings = {**defaults, **settings, "hint": given, "controlnet": nets}
            images += self.sd.generate(prompts[i : i + BATCH], **settings, seed=self.experiment.args.seed + i)
        return images

    def row(self, name: str, count: Callable[[list[Image.Image]], Figures], *drawn, **settings) -> None:
        """Add a row: what is counted of pictures drawn with the arguments of `draw`."""

        def make() -> tuple[Figures, list[Image.Image]]:
            images = self.draw(*drawn, **settings)
            return count(images), images

        self.experiment.row(name, make)


def built(scene: toy.Scene, *things: toy.Thing) -> toy.Scene:
    """Return a scene with other things, and a caption that joins them with "above"."""
    image, *truths = rendering.render(things, scene.background)
    caption = toy.sentence([named(thing) for thing in things], scene.background, "above")
    return toy.Scene(scene.index, scene.split, things, scene.background, caption, image, *truths)


def named(thing: toy.Thing) -> str:
    return next(name for name in toy.thing_names() if name.endswith(f" {thing.colour} {thing.kind}"))


def contradictions(reader: Reader, alone: list[toy.Scene]) -> None:
    """A hint of one thing, a prompt of another."""
    other = {kind: toy.THINGS[(i + 1) % len(toy.THINGS)] for i, kind in enumerate(toy.THINGS)}
    said = [replace(scene.things[0], kind=other[scene.things[0].kind]) for scene in alone]
    wrong = [toy.sentence([named(thing)], scene.background) for thing, scene in zip(said, alone, strict=True)]
    right = [scene.caption for scene in alone]

    def count(images: list[Image.Image]) -> Figures:
        seen = [reader.judge.see(image)[0].get(scene.things[0].colour) for image, scene in zip(images, alone, strict=True)]
        hints = np.mean([found == scene.things[0].kind for found, scene in zip(seen, alone, strict=True)])
        prompts = np.mean([found == thing.kind for found, thing in zip(seen, said, strict=True)])
        return {"the hint's thing": hints, "the prompt's thing": prompts, "neither": 1 - hints - prompts}

    def count_alone(images: list[Image.Image]) -> Figures:
        """Of pictures drawn without a prompt: the hint's thing, in any colour, and nothing else."""
        seen = [[*reader.judge.see(image)[0].values()] for image in images]
        right = np.mean([found == [scene.things[0].kind] for found, scene in zip(seen, alone, strict=True)])
        return {"the hint's thing": right, "neither": 1 - right}

    reader.experiment.show("1. hint: canny", [scene.hint("canny") for scene in alone])
    reader.row("1. prompt of another thing", count, alone, wrong, "canny")
    reader.row("1. the same, scale 0.5", count, alone, wrong, "canny", conditioning_scale=0.5)
    reader.row("1. the same, scale 2", count, alone, wrong, "canny", conditioning_scale=2.0)
    reader.row("1. the same, guidance 9", count, alone, wrong, "canny", guidance_scale=9.0)
    reader.row("1. the same, with labels of the hint's thing", count, alone, wrong, "canny ade20k")
    reader.row("1. no prompt", count_alone, alone, [""] * len(alone), "canny")
    reader.row("1. prompt of the hint's thing", count, alone, right, "canny")


def circles(reader: Reader, alone: list[toy.Scene]) -> None:
    """A circle, and prompts that say ball, ring, or nothing."""
    balls = [built(scene, replace(scene.things[0], kind="ball", pose=())) for scene in alone]
    rings = [built(scene, replace(scene.things[0], kind="ring")) for scene in balls]

    def count(images: list[Image.Image]) -> Figures:
        seen = [[*reader.judge.see(image)[0].values()] for image in images]
        ball, ring = (np.mean([found == [kind] for found in seen]) for kind in ("ball", "ring"))
        return {"a ball": ball, "a ring": ring, "anything else": 1 - ball - ring}

    say_ball, say_ring = ([scene.caption for scene in scenes] for scenes in (balls, rings))
    reader.experiment.show("2. hint: a circle", [scene.hint("scribble") for scene in balls])
    reader.row("2. no prompt", count, balls, [""] * len(balls), "scribble")
    reader.row("2. default prompt", count, balls, [reader.sd.defaults.default_prompt] * len(balls), "scribble")
    reader.row('2. prompt "ball"', count, balls, say_ball, "scribble")
    reader.row('2. prompt "ring"', count, balls, say_ring, "scribble")
    reader.row('2. prompt "ring", the hole drawn', count, rings, say_ring, "scribble")
    reader.row("2. no prompt, the hole drawn", count, rings, [""] * len(rings), "scribble")


def exchanged(reader: Reader, alone: list[toy.Scene]) -> None:
    """Two equal things, one above the other: is the colour above the one that the prompt names there?"""
    colours = [next(colour for colour in toy.COLOURS if colour != scene.things[0].colour) for scene in alone]
    upper = [replace(scene.things[0], x=64.0, y=34.0, radius=24.0) for scene in alone]
    pairs = [built(s, a, replace(a, y=94.0, colour=c)) for s, a, c in zip(alone, upper, colours, strict=True)]

    def count(images: list[Image.Image]) -> Figures:
        ways = []
        for image, pair in zip(images, pairs, strict=True):
            colour_at = toy.name_colours(np.asarray(image))
            rows = [np.argwhere(colour_at == [*toy.COLOURS].index(thing.colour))[:, 0] for thing in pair.things]
            there = all(len(row) >= 40 for row in rows)  # as `toy.shows_caption`
            ways.append("missing" if not there else "as said" if rows[0].mean() < rows[1].mean() else "exchanged")
        return {f"colours {way}": ways.count(way) / len(ways) for way in ("as said", "exchanged", "missing")}

    captions = [pair.caption for pair in pairs]
    reader.experiment.show("3. hint: canny", [pair.hint("canny") for pair in pairs])
    reader.row("3. prompt says which is above", count, pairs, captions, "canny")
    reader.row("3. the same, scale 0.5", count, pairs, captions, "canny", conditioning_scale=0.5)
    reader.row("3. the same, guidance 9", count, pairs, captions, "canny", guidance_scale=9.0)
    reader.row("3. the same, with labels", count, pairs, captions, "canny ade20k")
    reader.row("3. the same, control from 0.2", count, pairs, captions, "canny", control_start=0.2)


def measure(experiment: Experiment) -> None:
    reader = Reader(experiment)
    scenes = toy.scenes(4 * experiment.args.scenes, "test", first=FIRST)  # about one in three has a single thing
    alone = [scene for scene in scenes if len(scene.things) == 1][: experiment.args.scenes]
    for part in (contradictions, circles, exchanged):
        part(reader, alone)


def main(argv: Sequence[str] | None = None) -> int:
    return harness.main(__file__, __doc__, measure, argv, scenes=20)


if __name__ == "__main__":
    sys.exit(main())
