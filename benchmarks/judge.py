"""Train the judge of scene accuracy (minicn/toy/judging.py), and measure how far it can be trusted.

    python benchmarks/judge.py --output judge.safetensors      half an hour on one core
    python benchmarks/judge.py --measure                       the one that ships, on held-out scenes: a minute

It learns from true scenes, as drawn and as the autoencoder reconstructs them, and from scenes spoiled on purpose: a part
cut out, a part added, two shapes fused, a thing drawn twice.
"""

import argparse
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from minicn import StableDiffusion, toy
from minicn.checkpoints import files
from minicn.toy import judging
from minicn.trainer import recording


def spoil(scene: toy.Scene, draw: random.Random) -> tuple[np.ndarray, dict[str, str]]:
    """Return a scene's picture with one of its things spoiled, and what each colour shows then."""
    verdicts = {thing.colour: thing.kind for thing in scene.things}
    number = draw.randrange(len(scene.things))
    thing = scene.things[number]
    way = draw.choice(("cut", "cut", "add", "add", "mix", "mix", "twice"))
    mine = scene.owners == number
    if mine.sum() < 60:
        return scene.image, verdicts
    image = scene.image
    if way in ("cut", "add"):
        rows, columns = np.nonzero(mine)
        for _ in range(20):
            at = draw.randrange(len(rows))
            brush = _stroke(columns[at], rows[at], draw, thing.radius)
            if way == "cut":
                changed, colour = brush & mine, np.array(toy.BACKGROUNDS[scene.background])
            else:
                changed = brush & (scene.owners == -1)
                colour = np.array(toy.COLOURS[thing.colour]) * draw.uniform(0.6, 1)
            if 0.1 * mine.sum() < changed.sum() < 0.7 * mine.sum():
                image = np.where(changed[..., None], colour, image).astype(np.uint8)
                return image, verdicts | {thing.colour: "other"}
        return image, verdicts
    if way == "mix":  # one half of this thing, the other half of another
        kinds = [kind for kind in toy.THINGS if kind != thing.kind]
        pose = tuple(draw.uniform(-1, 1) for _ in range(6))
        other = replace(thing, kind=draw.choice(kinds), pose=pose, turn=draw.random())
        there = toy.rendering.render((*scene.things[:number], other, *scene.things[number + 1 :]), scene.background)
        angle = draw.uniform(0, 2 * math.pi)
        y, x = np.mgrid[: toy.SIZE, : toy.SIZE]
        side = ((x - thing.x) * math.cos(angle) + (y - thing.y) * math.sin(angle)) > draw.uniform(-0.25, 0.25) * thing.radius
        image = np.where(side[..., None], there[0], image)
        changed = (image != scene.image).any(2).sum()
        kept = (mine & ~side).sum()
        if changed < 0.15 * mine.sum() or kept < 0.2 * mine.sum():
            return scene.image, verdicts
        return image, verdicts | {thing.colour: "other"}
    # twice: a second thing of the same colour, where there is most room
    y, x = np.mgrid[: toy.SIZE, : toy.SIZE]
    for _ in range(20):
        radius = draw.uniform(14, 24)
        cx, cy = draw.uniform(radius, toy.SIZE - radius), draw.uniform(radius, toy.SIZE - radius)
        if not (((x - cx) ** 2 + (y - cy) ** 2 < radius**2) & (scene.owners >= 0)).any():
            pose = tuple(draw.uniform(-1, 1) for _ in range(6))
            kind = draw.choice(toy.THINGS)
            second = toy.Thing(kind, thing.colour, cx, cy, radius, 0.0, draw.random(), pose)
            return toy.rendering.render((*scene.things, second), scene.background)[0], verdicts | {thing.colour: "other"}
    return scene.image, verdicts


def _stroke(x: float, y: float, draw: random.Random, radius: float) -> np.ndarray:
    """A thick stroke through (x, y), (128, 128) bool."""
    angle, length = draw.uniform(0, 2 * math.pi), draw.uniform(0.2, 1.2) * radius
    width = draw.uniform(0.12, 0.4) * radius
    row, column = np.mgrid[: toy.SIZE, : toy.SIZE].astype(np.float32)
    along = np.clip((column - x) * math.cos(angle) + (row - y) * math.sin(angle), 0, length)
    return (column - x - along * math.cos(angle)) ** 2 + (row - y - along * math.sin(angle)) ** 2 < width**2


def lessons(count: int, through: Callable) -> Iterator[tuple[np.ndarray, dict[str, str]]]:
    """Yield pictures and what each colour shows: scenes and spoiled scenes in turn, half of them through the autoencoder.

    through  encodes and decodes an array of pictures
    """
    for first in tqdm(range(0, count, 32), desc="drawing lessons", unit="batch"):
        made = []
        for i in range(first, first + 32):
            scene = toy.scene(i // 2)
            made.append(
                (scene.image, {thing.colour: thing.kind for thing in scene.things})
                if i % 2 == 0
                else spoil(scene, random.Random(i))
            )
        images = np.stack([image for image, _ in made])
        if first // 32 % 2:
            images = through(images)
        yield from zip(images, (verdicts for _, verdicts in made), strict=True)


def train(through: Callable, count: int = 16000, epochs: int = 6, batch_size: int = 64, seed: int = 0) -> judging.Judge:
    """Train a judge on `count` pictures."""
    masks, lights, targets = [], [], []
    for image, verdicts in lessons(count, through):
        seen, _ = judging.split(image)
        masks.append(seen[:, 0].bool())
        lights.append((seen[0, 1] * 255).byte())
        targets.append([judging.VERDICTS.index(verdicts.get(colour, "none")) for colour in toy.COLOURS])
    masks, lights, targets = torch.stack(masks), torch.stack(lights), torch.tensor(targets)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    judge = judging.Judge().to(memory_format=torch.channels_last).train()
    # Every colour that is there, and one of those that are not.
    present = targets > 0
    absent = torch.rand(targets.shape, generator=generator).masked_fill(present, -1).argmax(1)
    rows = torch.cat([present.nonzero(), torch.stack([torch.arange(len(targets)), absent], 1)])
    steps = epochs * (len(rows) // batch_size)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    with tqdm(total=steps, desc="training the judge", unit="step") as bar:
        for _ in range(epochs):
            for chosen in torch.randperm(len(rows), generator=generator).split(batch_size):
                if len(chosen) < batch_size:
                    continue
                picture, colour = rows[chosen].T
                x = torch.stack([masks[picture, colour].float(), lights[picture].float() / 255], 1)
                loss = F.cross_entropy(judge(x.contiguous(memory_format=torch.channels_last)), targets[picture, colour])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.update()
                if bar.n % 20 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}")
    return judge.eval()


def autoencoder(model: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return what a model's autoencoder makes of pictures, (N, 128, 128, 3) uint8."""
    vae = StableDiffusion.load(model).vae

    @torch.no_grad()
    def through(images: np.ndarray) -> np.ndarray:
        latents = recording.encode(vae, recording.stack(list(images))) / vae.cfg.scaling_factor
        pixels = (vae.decode(latents) / 2 + 0.5).clamp(0, 1) * 255
        return pixels.round().byte().permute(0, 2, 3, 1).numpy()

    return through


def measure(judge: judging.Judge, through: Callable, count: int = 400) -> None:
    """Print how often true held-out scenes are accepted, and spoiled ones are not."""
    scenes = [toy.scene(i, "test") for i in range(1000, 1000 + count)]
    drawn = [scene.image for scene in scenes]
    seen = [image for i in range(0, count, 50) for image in through(np.stack(drawn[i : i + 50]))]
    for what, images in (("as drawn", drawn), ("through the autoencoder", seen)):
        found = judging.scene_accuracy(judge, images, scenes)
        print(f"| true scenes, {what} | " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()) + " |")
    spoiled = [(spoil(scene, random.Random(i)), scene) for i, scene in enumerate(scenes)]
    wrong = [not judge.agrees(image, scene) for (image, verdicts), scene in spoiled if "other" in verdicts.values()]
    print(f"| spoiled scenes, noticed | {np.mean(wrong):.3f} of {len(wrong)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file for a judge to be trained")
    parser.add_argument("--measure", action="store_true", help="measure the judge that ships")
    parser.add_argument("--model", default="toy", help="whose autoencoder (default: toy)")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    through = autoencoder(args.model)
    if args.output:
        trained = train(through)
        files.write(args.output, {k: v.half() if v.is_floating_point() else v for k, v in trained.state_dict().items()})
        measure(trained, through)
    if args.measure:
        measure(judging.Judge.load(), through)
    if not (args.output or args.measure):
        parser.error("give --output FILE or --measure")


if __name__ == "__main__":
    main()
