"""Is another diffusion model controlled, too? A U-Net on pixels, without words, and several ways to bring the hint in.

The paper: "this architecture can be used in other diffusion models". A small U-Net is trained on toy pictures of 32x32
pixels, without autoencoder or text; then it is locked, and the same ControlNet class controls it by Canny edges, with a hint
encoder without strides. A report on such a model, whose encoder was a single zero convolution, says that it "simply ignores
the condition" after 50,000 steps (github.com/lllyasviel/ControlNet, issue 373): two zero layers in a row, or dim, or slow?
"""

import copy
import sys
from collections.abc import Sequence

import harness
import numpy as np
import torch
import torch.nn.functional as F
from harness import FIRST, Experiment, Figures
from learning import train
from PIL import Image
from torch import Tensor, nn

from minicn import ControlNet, UNet, UNetConfig, conditions, ddim, fast, toy, zero_conv
from minicn.commands import cli
from minicn.controlnet import init_he
from minicn.toy import measures
from minicn.trainer.recording import stack

SIDE, WIDTH, PLAIN = 32, 16, "without control"
CFG = UNetConfig(3, 3, WIDTH, (1, 2, 4), num_res_blocks=1, num_heads=1, context_dim=8, norm_num_groups=4)
BATCH, BASE_LR, LR, LOW_LR = 4, 1e-3, 1e-3, 1e-5  # LOW_LR is the published training code's


def convolutions() -> list[nn.Module]:
    """Three convolutions without a stride, as PyTorch initialises them."""
    layers: list[nn.Module] = []
    for c_in in (3, WIDTH, WIDTH):
        layers += [nn.Conv2d(c_in, WIDTH, 3, padding=1), nn.SiLU()]
    return layers


ENCODERS = {  # each from a hint (B, 3, 32, 32) to features (B, WIDTH, 32, 32)
    "three convolutions (He's start), a zero convolution": lambda: nn.Sequential(*init_he(convolutions()), zero_conv(WIDTH)),
    "three convolutions (PyTorch's start), a zero convolution": lambda: nn.Sequential(*convolutions(), zero_conv(WIDTH)),
    "a zero convolution": lambda: zero_conv(3, WIDTH),
    "a zero convolution, dim hints": lambda: nn.Sequential(nn.AvgPool2d(1, divisor_override=10), zero_conv(3, WIDTH)),
    "a convolution that is not zero": lambda: nn.Conv2d(3, WIDTH, 1),
}
WAYS = [(name, LR) for name in ENCODERS] + [(name, LOW_LR) for name in list(ENCODERS)[:3:2]]


class Pictures:
    """Toy pictures of 32x32 pixels (N, 3, 32, 32) in [-1, 1], their Canny edges (N, 3, 32, 32) in [0, 1]."""

    def __init__(self, count: int, split: str, first: int = 0):
        scenes = toy.scenes(count, split, first=first)
        self.shown = [np.asarray(Image.fromarray(s.image).resize((SIDE, SIDE), Image.Resampling.BOX)) for s in scenes]
        self.images = stack(self.shown).float() / 127.5 - 1
        self.hints = stack([conditions.canny(picture) for picture in self.shown]).float() / 255


class PixelModel:
    """The U-Net on pixels, and how it learns, is controlled, draws."""

    def __init__(self, pictures: Pictures, seed: int):
        torch.manual_seed(seed)
        self.unet, self.pictures, self.seed, self.abar = UNet(CFG), pictures, seed, ddim.alphas_cumprod()
        fast.prepare(self.unet)

    def predict(self, x: Tensor, t: Tensor, net: ControlNet | None = None, hints: Tensor | None = None) -> Tensor:
        context = torch.zeros(len(x), 1, CFG.context_dim)  # nothing is said
        control = None if net is None else net.residuals(x, net.hint_features(hints), t, context)
        return self.unet(x, t, context, control)

    def loss(self, step: int, net: ControlNet | None = None) -> Tensor:
        """Return the loss of a step, eq. (10) without words: a function of seed and step."""
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        some = torch.randint(len(self.pictures.images), (BATCH,), generator=random)
        t = torch.randint(ddim.NUM_TRAIN_TIMESTEPS, (BATCH,), generator=random)
        noise = torch.randn((BATCH, 3, SIDE, SIDE), generator=random)
        x_t = ddim.add_noise(self.pictures.images[some], noise, self.abar[t])
        return F.mse_loss(self.predict(x_t, t, net, self.pictures.hints[some]), noise)

    @torch.no_grad()
    def draw(self, hints: Tensor, net: ControlNet | None, seed: int, num_steps: int) -> list[np.ndarray]:
        """Draw a picture for each hint (N, 3, 32, 32), (32, 32, 3) uint8, by DDIM."""
        x = torch.randn((len(hints), 3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed))
        images = ddim.sample(lambda x, t, i: self.predict(x, torch.full((len(x),), t), net, hints), x, self.abar, num_steps)
        return [*((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()]


def measure(experiment: Experiment) -> None:
    args = experiment.args
    model = PixelModel(Pictures(args.pictures, "train"), args.seed)
    held_out = Pictures(args.scenes, "test", FIRST)
    took, _ = train(experiment, "pixel model", model.unet, model.loss, steps=args.base_steps, lr=BASE_LR)
    model.unet.requires_grad_(False)

    def drawn(net: ControlNet | None, more: Figures) -> tuple[Figures, list[Image.Image]]:
        images = model.draw(held_out.hints, net, args.seed, experiment.num_steps)
        value = measures.mean(measures.edge_f1, images, held_out.shown)
        floor = experiment.rows.get(PLAIN, {"measure": value})["measure"]
        return {"measure": value, "following": measures.score(value, floor, 1.0), **more}, enlarged(images)

    def controlled(i: int, name: str, lr: float) -> tuple[Figures, list[Image.Image]]:
        torch.manual_seed(args.seed)
        net = ControlNet.from_unet(model.unet).train()
        net.input_hint_block = ENCODERS[name]()
        fast.prepare(net)
        figures = first_gradients(copy.deepcopy(net), model, lr)
        figures |= train(experiment, f"encoder {i}", net, lambda step: model.loss(step, net), steps=args.steps, lr=lr)[0]
        with torch.no_grad():  # how large the hint's features are, relative to those of noise that they are added to
            noise = net.input_blocks[0][0](torch.randn_like(held_out.hints))
            figures["hint / features"] = (net.hint_features(held_out.hints).norm() / noise.norm()).item()
        return drawn(net.eval(), figures)

    experiment.show("hint", enlarged(held_out.hints.permute(0, 2, 3, 1).mul(255).byte().numpy()))
    experiment.show("truth", enlarged(held_out.shown))
    experiment.row(PLAIN, lambda: drawn(None, took), shown="following")
    for i, (name, lr) in enumerate(WAYS):
        experiment.row(f"{name}, learning rate {lr:g}", lambda way=(i, name, lr): controlled(*way), shown="following")


def first_gradients(net: ControlNet, model: PixelModel, lr: float) -> Figures:
    """Return the norm of the hint encoder's gradient in the first three steps; `net` is lost."""
    optimizer, found = torch.optim.AdamW(net.parameters(), lr), {}
    for step in (1, 2, 3):
        model.loss(step, net).backward()
        found[f"gradient {step}"] = torch.stack([p.grad.norm() for p in net.input_hint_block.parameters()]).norm().item()
        optimizer.step()
        optimizer.zero_grad()
    return found


def enlarged(pictures: Sequence[np.ndarray]) -> list[Image.Image]:
    return [Image.fromarray(picture).resize((toy.SIZE, toy.SIZE), Image.Resampling.NEAREST) for picture in pictures]


def options(add) -> None:
    add("--pictures", type=cli.whole(1, 10**6), default=2000, help="training scenes")
    add("--base-steps", type=cli.whole(1), default=3000, help="steps of the pixel model")
    add("--steps", type=cli.whole(3), default=1000, help="steps of each ControlNet")


def main(argv: Sequence[str] | None = None) -> int:
    quick = {"pictures": 8, "base_steps": 3, "steps": 3}
    return harness.main(__file__, __doc__, measure, argv, scenes=100, options=options, quick=quick)


if __name__ == "__main__":
    sys.exit(main())
