"""Is a picture the scene that its caption names? A small, strict classifier.

scene accuracy = the share of pictures that show exactly the named things, each in its colour, on the named background

Every colour of the toy world is looked at on its own: where in the picture it is (`toy.name_colours`), and how bright. A
small convolutional network says what these pixels are: nothing, one of the six things, or "other": two things, half a
thing, a person with an extra limb. It learns from true scenes, as drawn and as the autoencoder reconstructs them, and
from scenes spoiled on purpose: a part cut out, a part added, two shapes fused, a thing drawn twice.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from minicn import toy
from minicn.checkpoints import files

VERDICTS = ("none", *toy.THINGS, "other")
WEIGHTS = Path(__file__).parent / "toy_judge.safetensors"


class Judge(nn.Module):
    """Say what is drawn in one colour.

    forward: (B, 2, 128, 128) float, where the colour is (0 or 1) and the picture's brightness in [0, 1] -> (B, 8) logits
    of VERDICTS.
    """

    def __init__(self, width: int = 24):
        super().__init__()
        layers, c_in = [], 2
        for i in range(4):
            c_out = width * 2 ** min(i, 2)
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
            c_in = c_out
        for _ in range(2):
            layers += [nn.Conv2d(c_in, c_in, 3, padding=1, bias=False), nn.BatchNorm2d(c_in), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.out = nn.Sequential(nn.Linear(2 * c_in, c_in), nn.ReLU(), nn.Linear(c_in, len(VERDICTS)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x)  # (B, C, 8, 8)
        return self.out(torch.cat([h.amax((2, 3)), h.mean((2, 3))], 1))

    @classmethod
    def load(cls, file: Path = WEIGHTS) -> "Judge":
        """Load the judge that ships with minicn."""
        judge = cls()
        judge.load_state_dict({name: tensor.float() for name, tensor in files.read(file).items()})
        return judge.eval()

    @torch.no_grad()
    def see(self, image: np.ndarray | Image.Image) -> tuple[dict[str, str], str]:
        """Return what a picture (128, 128, 3) shows: each colour that is there with its thing or "other", the background."""
        seen, background = split(np.asarray(image))
        found = self(seen).argmax(1).tolist()
        return {c: VERDICTS[v] for c, v in zip(toy.COLOURS, found, strict=True) if VERDICTS[v] != "none"}, background

    def agrees(self, image: np.ndarray | Image.Image, scene: toy.Scene) -> bool:
        """Return whether a picture shows exactly a scene's things in their colours, and its background."""
        found, background = self.see(image)
        return background == scene.background and found == {thing.colour: thing.kind for thing in scene.things}


def split(image: np.ndarray) -> tuple[Tensor, str]:
    """Return a picture as the judge sees it, (6, 2, 128, 128), a row for each of toy.COLOURS, and its background's name."""
    named = toy.name_colours(image)
    counts = np.bincount(named.ravel(), minlength=len(toy.COLOURS) + len(toy.BACKGROUNDS))[len(toy.COLOURS) :]
    light = torch.from_numpy(image.astype(np.float32).mean(2) / 255).expand(len(toy.COLOURS), 1, -1, -1)
    masks = torch.stack([torch.from_numpy(named == i) for i in range(len(toy.COLOURS))])[:, None].float()
    return torch.cat([masks, light], 1), list(toy.BACKGROUNDS)[counts.argmax()]


def scene_accuracy(judge: Judge, images: Sequence, scenes: Sequence[toy.Scene]) -> dict[str, float]:
    """Return the share of pictures that are right: "all", by number of things "1", "2", "3", and by kind of thing.

    By kind: the share of the things of that kind that are there in their colour, whatever else is in the picture.
    """
    counts: dict[str, list[bool]] = {}
    for image, scene in zip(images, scenes, strict=True):
        found, background = judge.see(image)
        right = background == scene.background and found == {thing.colour: thing.kind for thing in scene.things}
        for name in ("all", str(len(scene.things))):
            counts.setdefault(name, []).append(right)
        for thing in scene.things:
            counts.setdefault(thing.kind, []).append(found.get(thing.colour) == thing.kind)
    return {name: float(np.mean(rights)) for name, rights in sorted(counts.items())}


# What the judge learns from


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


def lessons(count: int, through) -> Iterator[tuple[np.ndarray, dict[str, str]]]:
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


def train_judge(through, count: int = 16000, epochs: int = 6, batch_size: int = 64, seed: int = 0) -> Judge:
    """Train a judge on `count` pictures."""
    masks, lights, targets = [], [], []
    for image, verdicts in lessons(count, through):
        seen, _ = split(image)
        masks.append(seen[:, 0].bool())
        lights.append((seen[0, 1] * 255).byte())
        targets.append([VERDICTS.index(verdicts.get(colour, "none")) for colour in toy.COLOURS])
    masks, lights, targets = torch.stack(masks), torch.stack(lights), torch.tensor(targets)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    judge = Judge().to(memory_format=torch.channels_last).train()
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
