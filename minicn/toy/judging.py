"""Is a picture the scene that its caption names? A small, strict classifier.

scene accuracy = the share of pictures that show exactly the named things, each in its colour, on the named background

Every colour of the toy world is looked at on its own: where in the picture it is (`toy.name_colours`), and how bright. A
small convolutional network says what these pixels are: nothing, one of the six things, or "other": two things, half a
thing, a person with an extra limb. `benchmarks/judge.py` trained it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from minicn import toy
from minicn.checkpoints import files

VERDICTS = ("none", *toy.THINGS, "other")
WEIGHTS = Path(__file__).parent / "judge.safetensors"


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
