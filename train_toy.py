"""Train a ControlNet on the toy Stable Diffusion that ships with minicn, and watch it begin to follow.

python train_toy.py --steps 10000            a ControlNet for Canny edges
python train_toy.py --base --steps 6000      the toy Stable Diffusion itself, from scratch
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import minicn.threads  # noqa: F401  (before torch, see there)

# isort: split
import torch

from minicn import ControlNet, StableDiffusion, conditions, toy, training
from minicn.commands import cli
from minicn.toy import measures
from minicn.trainer import recording

HINT_CHANNELS = (8, 16, 32, 64)  # narrower than the published (16, 32, 96, 256), as all of the toy is
EARLY = (50, 100, 150, 200, 300, 400)  # steps after which to look, too: most conditions begin to follow there


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(description=__doc__.split("\n")[0])
    add, count = parser.add_argument, cli.whole(1)
    add("--steps", type=count, default=10000, help="optimiser steps, 1 and up")
    add("--batch-size", type=count, default=None, help="samples a step, 1 and up (default: 4, with --base 32)")
    add(
        "--lr",
        type=cli.number(0, 1),
        default=None,
        help="learning rate of AdamW, 0 to 1 (default: 3e-4, with --base 1e-3)",
    )
    add("--seed", type=cli.whole(0), default=0, help="of the start, the data order and the noise, 0 and up")
    add("--condition", choices=conditions.NAMES, default="canny", help="what the hints show")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    cli.add_threads(add)
    add("--output", type=Path, default=None, help="folder for weights, log and sheets (default: runs/CONDITION)")
    add(
        "--model",
        default=None,
        help='the locked model: "toy" (default) or a folder made by --base; with --base: go on from it',
    )
    add("--scenes", type=count, default=4096, help="training scenes; never more than steps x batch size")
    add("--drop-prompt", type=cli.number(0, 1), default=0.5, help="share of prompts replaced by the empty one")
    add("--connect", choices=("all", "middle"), default="all", help="middle: the paper's small-scale regime")
    add("--controlnet", default=None, help="go on from this ControlNet, e.g. one trained with --connect middle")
    add("--unlock", choices=("none", "decoder", "all"), default="none", help="part of Stable Diffusion that learns, too")
    add("--unlock-lr", type=cli.number(0, 1), default=1e-4, help="learning rate of what is unlocked, 0 to 1")
    add("--guidance-scale", type=cli.number(0, 100), default=3.0, help="of the pictures drawn on the way")
    add("--pictures", type=count, default=16, help="held-out scenes that are drawn and scored on the way")
    add("--score-every", type=count, default=250, help="steps between pictures drawn, scored and logged")
    add("--checkpoint-every", type=count, default=1000, help="steps between checkpoints")
    add("--resume", action="store_true", help="go on from the checkpoint in --output")
    add("--base", action="store_true", help="train the toy Stable Diffusion instead of a ControlNet")
    add("--vae-steps", type=count, default=3000, help="with --base: steps of the autoencoder")
    args = parser.parse_args(argv)
    args.batch_size = args.batch_size or (32 if args.base else 4)
    if args.lr is None:
        args.lr = 1e-3 if args.base else 3e-4
    args.model = args.model or (None if args.base else "toy")
    args.output = args.output or Path("runs") / ("base" if args.base else args.condition)
    return args


def train_controlnet(args: argparse.Namespace, device: torch.device) -> None:
    names = ("steps", "batch_size", "lr", "seed", "drop_prompt", "connect", "unlock", "unlock_lr")
    recipe = training.Recipe(**{name: getattr(args, name) for name in names})
    count = min(args.scenes, args.steps * args.batch_size)
    settings = {"condition": args.condition, "pictures": args.pictures, "scenes": count, "model": str(args.model)}
    run = recording.Run(args.output, dataclasses.asdict(recipe) | settings)

    # 1. The locked model, and the data as it sees them: latents, hints, text features, each computed once.
    sd = StableDiffusion.load(args.model, device=device)
    if training.process()[0] == 0:
        run.prepare(args.resume)
    examples = training.Examples.from_scenes(sd, toy.scenes(count, "train", args.condition), args.condition)
    held_out = list(toy.scenes(args.pictures, "test", args.condition))
    validation = recording.Validation(
        sd,
        [scene.image for scene in held_out],
        [scene.hint(args.condition) for scene in held_out],
        [scene.caption for scene in held_out],
        args.guidance_scale,
        measure=measures.measure(args.condition),
        wanted=held_out,
    )

    # 2. The trainable copy of its encoder, joined to it by zero convolutions; or one that was trained before.
    if args.controlnet is None:
        net = ControlNet.from_unet(sd.unet, hint_channels=HINT_CHANNELS)
    else:
        net = ControlNet.load(args.controlnet, unet=sd.unet, device=device)

    # 3. Predict the noise; let the gradient through the locked decoder into the copy; repeat.
    training.train(
        sd,
        net,
        examples,
        validation,
        run,
        recipe,
        score_every=args.score_every,
        score_after=EARLY,
        checkpoint_every=args.checkpoint_every,
        resume=args.resume,
        pace=cli.pace(args.threads, sd.unet, net),
    )


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    started = time.time()
    cli.keep_freed_memory()
    with cli.polite_errors(args.output):
        training.process()
        device = cli.device(args.device)
        cli.check_folder(args.output)
        torch.manual_seed(args.seed)
        torch.set_flush_denormal(True)  # Numerics: gradients below 1e-38 are zero, or CPUs compute them many times slower
        if args.base:
            from minicn.trainer import pretraining

            pretraining.train_base(
                args.output,
                args.model,
                args.scenes,
                args.vae_steps,
                args.steps,
                args.batch_size,
                args.lr,
                args.seed,
                device,
                args.checkpoint_every,
                args.resume,
            )
            print(f"The toy base is in {args.output}, after {(time.time() - started) / 60:.1f} minutes")
        else:
            train_controlnet(args, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
