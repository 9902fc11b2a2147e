"""ControlNet beside sketch-guided diffusion (X16): a gradient that pulls the noisy latents towards a scribble.

Source: Voynov et al., arXiv:2211.13752. The model stays as it is. A small network, the paper's latent guidance predictor,
reads from the locked U-Net's features, position by position, which latents the scribble will have. While a picture is drawn,
each step is corrected by the gradient of that prediction's distance from the scribble that is wanted.
"""

import itertools
import sys
from collections.abc import Sequence

import harness
import learning
import torch
from harness import BATCH, GUIDANCE, Experiment, Figures, HeldOut
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from minicn import ControlNet, StableDiffusion, UNet, ddim
from minicn.commands import cli
from minicn.pipeline import Predictor
from minicn.trainer import recording
from minicn.unet import UNetConfig, timestep_embedding

WIDTHS, BATCH_SIZE, LR = (512, 256, 128, 64), 8, 1e-3  # of the predictor: its hidden layers, its training
STRENGTHS = [(1.6, 0.5), (0.8, 0.5), (3.2, 0.5), (1.6, 1.0)]  # beta; the share of the steps that are guided, from the first


def measure(experiment: Experiment) -> None:
    sd = StableDiffusion.load("toy")
    held_out = HeldOut(experiment, sd, "scribble")
    net = ControlNet.load("toy-scribble", unet=sd.unet)
    held_out.row("ControlNet", net, more={"parameters trained": sum(p.numel() for p in net.parameters())})
    predictor, took, log = train(experiment, sd)
    for beta, share in STRENGTHS[:1] if experiment.args.quick else STRENGTHS:

        def make(beta: float = beta, share: float = share) -> tuple[Figures, list[Image.Image]]:
            figures, images = held_out.measured(lambda: draw(held_out, predictor, beta, share))
            return {**figures, **took}, images

        experiment.row(f"sketch-guided, beta {beta:g}, {share:.0%} of the steps", make, shown="following")
    for look in log:
        experiment.row(f"the predictor at step {look['step']:,}", lambda look=look: ({"squared error": look["loss"]}, []))


def look_inside(unet: UNet, x: Tensor, timesteps: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Return the predicted noise (B, 4, h, w), and features (B, C, h, w): each level's last block's, and the middle's."""
    blocks, found = [*unet.input_blocks[2::3], unet.middle_block, *unet.output_blocks[2::3]], []
    hooks = [block.register_forward_hook(lambda block, inputs, h: found.append(h)) for block in blocks]
    eps = unet(x, timesteps, context)
    for hook in hooks:
        hook.remove()
    return eps, torch.cat([nn.functional.interpolate(h, x.shape[2:], mode="bilinear") for h in found], dim=1)


class SketchPredictor(nn.Module):
    """From the features of a position, and the timestep, to the latents of the scribble there."""

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        self.embedding = cfg.model_channels
        widths = self.embedding + cfg.model_channels * (2 * sum(cfg.channel_mult) + cfg.channel_mult[-1]), *WIDTHS
        hidden = [(nn.Conv2d(a, b, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
        self.layers = nn.Sequential(*itertools.chain(*hidden), nn.Conv2d(widths[-1], cfg.in_channels, 1))

    def forward(self, features: Tensor, timesteps: Tensor) -> Tensor:
        """Return the scribble's latents (B, 4, h, w) that features (B, C, h, w) at timesteps (B,) foretell."""
        emb = timestep_embedding(timesteps, self.embedding)[:, :, None, None].expand(-1, -1, *features.shape[2:])
        return self.layers(torch.cat([features, emb], dim=1))


def train(experiment: Experiment, sd: StableDiffusion) -> tuple[SketchPredictor, Figures, list[dict]]:
    """Train the predictor on scenes and their scribbles, at all timesteps, each scene with its caption."""
    args = experiment.args
    data = learning.scenes(sd, "scribble", args.examples, keep=not args.quick)
    sketches = recording.encode(sd.vae, data.hints)  # (N, 4, h, w)
    torch.manual_seed(args.seed)
    predictor = SketchPredictor(sd.unet.cfg)
    sd.unet.requires_grad_(False)
    sd.prepare()

    def loss(step: int) -> Tensor:
        batch = data.batch(args.seed, step, BATCH_SIZE, drop_prompt=0.0, device=sd.device)
        x_t = ddim.add_noise(batch.latents, batch.noise, sd.alphas_cumprod[batch.timesteps])
        _, features = torch.no_grad()(look_inside)(sd.unet, x_t, batch.timesteps, batch.context)
        return (predictor(features, batch.timesteps) - sketches[batch.samples]).square().mean()

    look = learning.Look(lambda: 0.0, every=250)  # for the loss alone
    took, log = learning.train(experiment, "predictor", predictor, loss, steps=args.steps, lr=LR, look=look)
    return predictor.eval(), took, log


class SketchGuidance:
    """What steers a batch's sampling: `predict` and `after` of `ddim.sample`.

    predictor    in evaluation mode; sketches (B, 4, h, w) are the latents that it should predict
    beta, share  length of a correction, relative to the step's own; share of the steps that are corrected, from the first
    """

    def __init__(self, plain: Predictor, predictor: SketchPredictor, sketches: Tensor, beta: float, share: float):
        self.plain, self.predictor, self.sketches, self.beta = plain, predictor, sketches, beta
        self.last, (self.uncond, self.cond) = share * plain.num_steps, plain.context.chunk(2)

    def predict(self, x: Tensor, t: int, i: int) -> Tensor:
        """Return the guided noise; in a guided step, keep the gradient of the sketch's distance, too."""
        if i >= self.last:
            with self.plain.fast():
                return self.plain(x, t, i)
        timesteps = torch.full((len(x),), t)
        self.before = x.detach().requires_grad_()
        with torch.enable_grad():
            eps, features = look_inside(self.plain.unet, self.before, timesteps, self.cond)
            distance = (self.predictor(features, timesteps) - self.sketches).square().sum()
        self.gradient = torch.autograd.grad(distance, self.before)[0]
        return ddim.guide(self.plain.unet(x, timesteps, self.uncond), eps.detach(), self.plain.guidance_scale)

    def after(self, x: Tensor, i: int) -> Tensor:
        """Return x - alpha gradient, with alpha = beta |x - x before the step| / |gradient|, for each picture."""
        if i >= self.last:
            return x
        step, slope = (each.flatten(1).norm(dim=1) for each in (x - self.before, self.gradient))
        return x - (self.beta * step / slope)[:, None, None, None] * self.gradient


@torch.no_grad()
def draw(held_out: HeldOut, predictor: SketchPredictor, beta: float, share: float) -> list[Image.Image]:
    """Draw the scenes as `HeldOut.draw` does, by the same seeds, guided by their scribbles."""
    sd, num_steps, images = held_out.sd, held_out.experiment.num_steps, []
    for i in tqdm(range(0, len(held_out.scenes), BATCH), desc="drawing", unit="batch", leave=False):
        captions = [scene.caption for scene in held_out.scenes[i : i + BATCH]]
        sketches = recording.encode(sd.vae, (255 * held_out.hints[i : i + BATCH]).byte())
        noise = torch.randn(sketches.shape, generator=torch.Generator().manual_seed(held_out.experiment.args.seed + i))
        plain = Predictor(sd.unet, sd.encode_prompts([""] * len(captions) + captions), GUIDANCE, [], (0, 1), num_steps)
        guided = SketchGuidance(plain, predictor, sketches, beta, share)
        images += sd.decode_latents(ddim.sample(guided.predict, noise, sd.alphas_cumprod, num_steps, after=guided.after))
    return images


def options(add) -> None:
    add("--examples", type=cli.whole(1), default=learning.SCENES, help="training scenes")
    add("--steps", type=cli.whole(1), default=2000, help=f"steps of the predictor, of {BATCH_SIZE} scenes each")


def main(argv: Sequence[str] | None = None) -> int:
    return harness.main(__file__, __doc__, measure, argv, scenes=50, options=options, quick={"examples": 8, "steps": 2})


if __name__ == "__main__":
    sys.exit(main())
