"""ControlNet beside Taming Transformers (X17): a picture as a sequence of codes, written one after the other.

The latents of the toy's autoencoder get a code book; a causal transformer, trained from scratch, reads the condition
(ADE20K's labels), then writes the picture's 256 codes: arXiv:2012.09841. That paper has no text; here the caption's features
stand before the labels, as nothing else says which colour a thing has. What the code book preserves is a row of its own.
"""

import sys
from collections.abc import Sequence

import harness
import learning
import torch
import torch.nn.functional as F
from code_transformer import SIDE, Transformer, fit_codes, latents_of, tokens_of, vectors_of
from harness import BATCH, Experiment, Figures, HeldOut
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minicn import ControlNet, StableDiffusion, training
from minicn.commands import cli
from minicn.toy import measures
from minicn.trainer import recording
from minicn.training import Examples

CONDITION = "ade20k"
FITTED = 1024  # scenes of whose vectors every eighth makes the code book
ROWS = 1000  # steps between the rows that say how it learned


class Rival:
    """The transformer, its code book, and what it learns from: the training scenes of the toy's ControlNets."""

    def __init__(self, held_out: HeldOut, data: Examples):
        self.args, self.held_out, self.data = held_out.experiment.args, held_out, data
        self.codes = fit_codes(vectors_of(data.latents[:FITTED])[::8], self.args.codes)
        self.tokens = self.encode(data.latents)
        torch.manual_seed(self.args.seed)
        self.net = Transformer(data.contexts.shape[2], self.codes)

    def encode(self, latents: Tensor) -> Tensor:
        """Return the tokens (B, 256) of latents (B, 4, 16, 16)."""
        return tokens_of(vectors_of(latents), self.codes).unflatten(0, (-1, SIDE**2))

    def decode(self, tokens: Tensor) -> list[Image.Image]:
        parts = latents_of(tokens, self.codes).split(BATCH)
        return [image for part in parts for image in self.held_out.sd.decode_latents(part)]

    def through_codes(self) -> list[Image.Image]:
        true = recording.stack([scene.image for scene in self.held_out.scenes])
        return self.decode(self.encode(recording.encode(self.held_out.sd.vae, true)))

    def loss(self, step: int) -> Tensor:
        """Return the mean cross-entropy, in nats, of the tokens of a step's pictures; the condition is only read."""
        samples, _ = training.draw_samples(len(self.tokens), self.args.seed, step, self.args.batch_size)
        context, hints = self.data.contexts[self.data.prompt[samples]], self.data.hints[samples].float() / 255
        logits = self.net(context, hints, self.tokens[samples])
        return F.cross_entropy(logits.flatten(0, 1), self.tokens[samples].flatten())

    def draw(self, count: int) -> list[Image.Image]:
        """Draw the first held-out scenes from their captions and labels, each batch by its own seed."""
        context, tokens = self.held_out.sd.encode_prompts([s.caption for s in self.held_out.scenes[:count]]), []
        for i in tqdm(range(0, count, BATCH), desc="drawing", unit="batch", leave=False):
            part = slice(i, min(i + BATCH, count))
            drawn, _ = self.net.sample(context[part], self.held_out.hints[part], self.args.seed + i, self.args.top_k)
            tokens.append(drawn)
        return self.decode(torch.cat(tokens))

    def score(self) -> float:
        """Return how well the first eight held-out scenes are followed: what is watched while it learns."""
        scenes, rows = self.held_out.scenes[:8], self.held_out.experiment.rows
        value = measures.mean(measures.measure(CONDITION), self.draw(len(scenes)), scenes)
        ceiling, floor = (rows[bound]["measure"] for bound in reversed(self.held_out.bounds))
        return measures.score(value, floor, ceiling)


def measure(experiment: Experiment) -> None:
    args, sd = experiment.args, StableDiffusion.load("toy")
    held_out = HeldOut(experiment, sd, CONDITION)
    rival = Rival(held_out, learning.scenes(sd, CONDITION, args.examples, keep=not args.quick))
    experiment.row("true pictures, through autoencoder and code book", lambda: held_out.measured(rival.through_codes))
    settings = {"steps": args.steps, "lr": args.lr, "betas": (0.9, 0.95), "look": learning.Look(rival.score, args.every)}
    took, log = learning.train(experiment, "transformer", rival.net, rival.loss, **settings)
    seen = {"pictures seen": args.steps * args.batch_size}

    def transformer() -> tuple[Figures, list[Image.Image]]:
        figures, images = held_out.measured(lambda: rival.draw(len(held_out.scenes)))
        return {**figures, **took, **seen}, images

    experiment.row("Taming Transformers' way", transformer, shown="following")
    net = ControlNet.load(f"toy-{CONDITION}", unet=sd.unet)
    held_out.row("ControlNet", net, more={"parameters trained": sum(p.numel() for p in net.parameters())})
    experiment.show("following (black) and\ncross-entropy (red) over\nits training", [learning.curve(log, args.steps)])
    for look in log:
        if look["step"] % ROWS == 0 or look is log[-1]:
            figures = {"cross-entropy": look["loss"], "following so far": look["score"]}
            experiment.row(f"the transformer at step {look['step']:,}", lambda figures=figures: (figures, []))


def options(add) -> None:
    add("--examples", type=cli.whole(1), default=learning.SCENES, help="training scenes")
    add("--codes", type=cli.whole(2, 16384), default=512, help="vectors in the code book")
    add("--steps", type=cli.whole(1), default=6500, help="steps of the transformer")
    add("--batch-size", type=cli.whole(1), default=4, help="pictures a step")
    add("--lr", type=cli.number(0, 1), default=1e-3, help="learning rate")
    add("--top-k", type=cli.whole(1), default=100, help="likeliest codes among which each is drawn")
    add("--every", type=cli.whole(1, learning.CHECKPOINT_EVERY), default=250, help="steps between scores")


def main(argv: Sequence[str] | None = None) -> int:
    quick = {"examples": 8, "steps": 2, "every": 1, "codes": 16}
    return harness.main(__file__, __doc__, measure, argv, scenes=50, options=options, quick=quick)


if __name__ == "__main__":
    sys.exit(main())
