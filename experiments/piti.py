"""ControlNet beside PITI (X15): the condition takes the place of the text, and then the whole U-Net is trained.

Source: Wang et al., Pretraining is All You Need for Image-to-Image Translation, arXiv:2205.12952. An encoder turns labels
into tokens, to which the U-Net attends as to text features: first the encoder alone is trained, then both; guidance is
normalised. PITI has no prompt; here it is read beside the tokens, as ControlNet does. Labels say no colours: without a
prompt, "things right" counts, not scene accuracy.
"""

import copy
import sys
from collections.abc import Sequence

import harness
import learning
import torch
from harness import BATCH, GUIDANCE, Experiment, Figures, HeldOut
from PIL import Image
from torch import Tensor, nn

from minicn import ControlNet, StableDiffusion, ddim, fast
from minicn.commands import cli
from minicn.controlnet import init_he
from minicn.training import Examples, Recipe
from minicn.unet import timestep_embedding

CHANNELS, LAYERS, HEADS = (3, 16, 32, 64, 128), 2, 3  # of the encoder's convolutions, each of stride 2, and transformer
SIDE = 8  # SIDE^2 tokens: as in PITI, the middle one of the U-Net's resolutions with attention
DROPPED = 0.2  # share of the samples without condition and prompt, PITI's; of the others, half are without prompt
BATCH_SIZE, LRS, LOOK, EVERY = 4, (1e-3, 3e-4), 16, 250  # the stages' learning rates; scenes and steps of a score
# Guidance, normalised or not, with the prompt or not; after the first stage, the first two.
WAYS = (GUIDANCE, True, True), (GUIDANCE, False, True), (9.0, True, True), (9.0, False, True), (GUIDANCE, True, False)


def normalise(guided: Tensor, eps_cond: Tensor) -> Tensor:
    """Return a guided prediction (B, 4, h, w) with each sample's mean and deviation those of the conditional one."""
    std, mean = torch.std_mean(guided, (1, 2, 3), keepdim=True)
    return (guided - mean) / std * eps_cond.std((1, 2, 3), keepdim=True) + eps_cond.mean((1, 2, 3), keepdim=True)


class Piti(nn.Module):
    """An encoder of labels, and a U-Net of its own, which attends to text features and tokens; how they learn, and draw."""

    def __init__(self, sd: StableDiffusion, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        width, layers = sd.unet.cfg.context_dim, []
        for c_in, c_out in zip(CHANNELS, CHANNELS[1:], strict=False):
            layers += [nn.Conv2d(c_in, c_out, 3, 2, padding=1), nn.InstanceNorm2d(c_out, affine=True), nn.LeakyReLU(0.2)]
        self.convolutions = nn.Sequential(*init_he([*layers, nn.Conv2d(c_out, width, 3, padding=1)]))
        place = timestep_embedding(16 * torch.arange(SIDE), width // 2)  # learned, but begun as sinusoids of the pixels
        self.positions = nn.Parameter(torch.cat(torch.broadcast_tensors(place[:, None], place), -1).flatten(0, 1))
        layer = nn.TransformerEncoderLayer(width, HEADS, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.transformer = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(width), enable_nested_tensor=False)
        self.unet, self.abar = copy.deepcopy(sd.unet), sd.alphas_cumprod

    def context(self, text: Tensor, hints: Tensor) -> Tensor:
        """Return text features (B, 77, C), then the tokens of hints (B, 3, 128, 128): (B, 77 + SIDE^2, C)."""
        tokens = self.convolutions(hints).flatten(2).transpose(1, 2) + self.positions
        return torch.cat([text, self.transformer(tokens)], dim=1)

    def loss(self, data: Examples, seed: int, step: int) -> Tensor:
        """Return the loss of a step, eq. (10) with the condition in the context; a dropped one is a black hint."""
        batch = data.batch(seed, step, BATCH_SIZE, 0.5, "cpu")
        kept = torch.rand((BATCH_SIZE, 1, 1), generator=torch.Generator().manual_seed(~(seed * 1_000_003 + step))) >= DROPPED
        text = torch.where(kept, batch.context, data.contexts[0])  # there the empty prompt is
        x_t = ddim.add_noise(batch.latents, batch.noise, self.abar[batch.timesteps])
        eps = self.unet(x_t, batch.timesteps, self.context(text, batch.hints * kept[..., None]))
        return (eps - batch.noise).square().mean()

    @torch.no_grad()
    def draw(self, held_out: HeldOut, steps: int, guidance: float, normalised: bool, prompt: bool) -> list[Image.Image]:
        """Draw the scenes, in `steps` steps, from the noise that `generate` starts from."""
        sd, side, seed, images = held_out.sd, held_out.sd.image_size // 8, held_out.experiment.args.seed, []
        for i in range(0, len(held_out.scenes), BATCH):
            hints, scenes = held_out.hints[i : i + BATCH], held_out.scenes[i : i + BATCH]
            text = sd.encode_prompts([""] * len(scenes) + [scene.caption if prompt else "" for scene in scenes])
            context = self.context(text, torch.cat([torch.zeros_like(hints), hints]))

            def predict(x: Tensor, t: int, _: int, context: Tensor = context) -> Tensor:
                eps_uncond, eps_cond = self.unet(fast.twice(x), torch.full((2 * len(x),), t), context).chunk(2)
                guided = ddim.guide(eps_uncond, eps_cond, guidance)
                return normalise(guided, eps_cond) if normalised else guided

            with fast.sampling(self.unet, equal_halves=True):
                x = torch.randn((len(scenes), 4, side, side), generator=torch.Generator().manual_seed(seed + i))
                images += sd.decode_latents(ddim.sample(predict, x, self.abar, steps))
        return images


def train(piti: Piti, held_out: HeldOut, stage: int, steps: int) -> Figures:
    """Train stage 1, the encoder alone, or 2, the U-Net too; add a row of its scores; return what it took."""
    experiment, args = held_out.experiment, held_out.experiment.args
    piti.unet.requires_grad_(stage == 2)
    some = copy.copy(held_out)
    some.scenes, some.hints = held_out.scenes[:LOOK], held_out.hints[:LOOK]

    def score() -> float:
        return some.figures(piti.draw(some, experiment.num_steps // 2, *WAYS[0]))["following"]

    def loss(step: int) -> Tensor:
        data = learning.scenes(held_out.sd, "ade20k", args.examples, keep=not args.quick)
        return piti.loss(data, args.seed + stage, step)

    name, look = f"PITI, stage {stage}", learning.Look(score, min(EVERY, steps))
    took, log = learning.train(experiment, name, piti, loss, steps=steps, lr=LRS[stage - 1], look=look)
    course = {f"after {row['step']:,} steps": row["score"] for row in log}
    experiment.row(f"{name}: following", lambda: (course, [learning.curve(log, steps)]))
    return took


def measure(experiment: Experiment) -> None:
    args, sd, spent = experiment.args, StableDiffusion.load("toy"), 0.0
    sd.prepare()
    held_out = HeldOut(experiment, sd, "ade20k", also=harness.things_right)
    net = ControlNet.load("toy-ade20k", unet=sd.unet)
    held_out.row("ControlNet, 5,000 steps", net, {"parameters trained": sum(p.numel() for p in net.parameters())})
    held_out.row("ControlNet, 5,000 steps, no prompt", net, prompt=[""] * args.scenes)
    piti = Piti(sd, args.seed)

    def drawn(way: tuple, took: Figures) -> tuple[Figures, list[Image.Image]]:
        figures, images = held_out.measured(lambda: piti.draw(held_out, experiment.num_steps, *way))
        return {**figures, **took}, images

    for stage, steps in enumerate((args.encoder_steps, args.steps), 1):
        took = train(piti, held_out, stage, steps)
        spent = took["minutes of training"] = spent + took["minutes of training"]  # of both stages
        for way in WAYS[: 1 if args.quick else 2 if stage == 1 else None]:
            name = f"PITI, stage {stage}, guidance {way[0]:g}{', normalised' * way[1]}{', no prompt' * (not way[2])}"
            experiment.row(name, lambda given=(way, took): drawn(*given), shown="following")
    name = f"ControlNet, {args.controlnet_steps:,} steps"
    if name not in experiment.rows:
        data = learning.scenes(sd, "ade20k", args.examples, keep=not args.quick)
        recipe = Recipe(args.controlnet_steps, lr=learning.LR, seed=args.seed)
        held_out.row(name, *learning.controlnet(experiment, name, sd, data, recipe)[:2])


def options(add) -> None:
    add("--examples", type=cli.whole(1), default=learning.SCENES, help="training scenes")
    add("--encoder-steps", type=cli.whole(1), default=1250, help="steps of PITI's first stage, the encoder alone")
    add("--steps", type=cli.whole(1), default=2250, help="steps of its second stage, encoder and U-Net")
    add("--controlnet-steps", type=cli.whole(1), default=1000, help="steps of a ControlNet that is trained beside it")


def main(argv: Sequence[str] | None = None) -> int:
    quick = {"examples": 8, "encoder_steps": 2, "steps": 2, "controlnet_steps": 2}
    return harness.main(__file__, __doc__, measure, argv, scenes=50, options=options, quick=quick)


if __name__ == "__main__":
    sys.exit(main())
