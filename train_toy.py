"""Train a ControlNet on the toy Stable Diffusion that ships with minicn, and watch it begin to follow.

python train_toy.py --steps 10000            a ControlNet for Canny edges
python train_toy.py --base --steps 6000      the toy Stable Diffusion itself, from scratch
"""

import minicn.commands.stopping  # before all else, see there
import minicn.threads  # noqa: F401  (before torch, see there)

# isort: split
import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch

from minicn import StableDiffusion, conditions, fast, toy, training
from minicn.commands import cli, runs
from minicn.toy import measures
from minicn.trainer import distributed, examples, recording, resuming
from minicn.trainer.progress import Progress

HINT_CHANNELS = (8, 16, 32, 64)  # narrower than the published (16, 32, 96, 256), as all of the toy is
EARLY = (50, 100, 150, 200, 300, 400)  # extra steps after which to validate: most conditions begin to follow there


def train_controlnet(args: argparse.Namespace, device: torch.device) -> None:
    # 1. The locked model, and the data as it sees them: latents, hints, text features, each computed once.
    sd = StableDiffusion.load(args.model, device=device)
    recipe, run = runs.recipe_of(args), recording.Run(args.output, settings(args, sd))
    run.prepare(args.resume)
    data = examples.from_toy(sd, args.condition, args.scenes, recipe)
    validation = held_out(sd, args) if args.pictures else None

    # 2. The trainable copy of its encoder, joined to it by zero convolutions; or a pretrained one.
    net = runs.controlnet(args.controlnet, sd, args.seed, hint_channels=HINT_CHANNELS)
    sd.prepare()
    fast.prepare(net.train().to(memory_format=fast.layout(device)))
    optimizer = torch.optim.AdamW(training.apply_regime(sd.unet, net, recipe), weight_decay=0.01, fused=True)

    # 3. Predict the noise; let the gradient flow through the locked decoder into the copy; repeat.
    when = {"score_every": args.score_every, "score_after": EARLY, "checkpoint_every": args.checkpoint_every}
    pace, abar = cli.pace(args.threads, sd.unet, net), sd.alphas_cumprod.to(device)
    with Progress(run, sd, net, optimizer, recipe, validation, **when) as progress:
        if args.resume:
            progress.resume()
        for step in progress.steps():
            with pace:
                batch = data.batch(recipe.seed, step, recipe.batch_size, recipe.drop_prompt, device)
                loss = training.controlnet_loss(sd.unet, net, batch, abar).mean()  # eq. (10)
                loss.backward()
            progress.note(loss, batch.samples.tolist())  # stops at a loss of NaN, before it reaches the weights
            training.set_learning_rates(optimizer, recipe, step)
            optimizer.step()
            optimizer.zero_grad()
            if progress.looking:
                progress.validate()  # log.csv, sheet.png
            if progress.saving:
                progress.save()  # checkpoint.pt
        progress.finish()  # controlnet.safetensors, diffusers/


def settings(args: argparse.Namespace, sd: StableDiffusion) -> dict:
    """Return what decides how a run ends: --resume asks for the same, and sheet.png holds it."""
    own = {"condition": args.condition, "pictures": args.pictures, "scenes": args.scenes, "model": resuming.digest(sd)}
    return dataclasses.asdict(runs.recipe_of(args)) | own


def held_out(sd: StableDiffusion, args: argparse.Namespace) -> recording.Validation:
    """Return the validation, which draws held-out scenes and scores how well they follow."""
    scenes = list(toy.scenes(args.pictures, "test", args.condition))
    pictures, hints = [scene.image for scene in scenes], [scene.hint(args.condition) for scene in scenes]
    captions, measure = [scene.caption for scene in scenes], measures.measure(args.condition)
    return recording.Validation(sd, pictures, hints, captions, args.guidance_scale, measure=measure, wanted=scenes)


def train_base(args: argparse.Namespace, device: torch.device) -> None:
    from minicn.trainer import pretraining

    started = time.time()
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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(description=__doc__.split("\n")[0])
    add, count = parser.add_argument, cli.whole(1)
    add("--condition", choices=conditions.NAMES, default="canny", help="what the hints show")
    add("--output", type=Path, default=None, help="folder for weights, log and sheets (default: runs/CONDITION)")
    model = 'the locked model: "toy" (default) or a folder made by --base; with --base: continue from it'
    add("--model", default=None, help=model)
    names = "steps batch_size lr seed drop_prompt connect unlock unlock_lr"
    depends = {"batch_size": "4, with --base 32", "lr": "3e-4, with --base 1e-3"}
    runs.add_recipe(add, names, steps=10000, unlock_lr=1e-4, **depends)
    add("--scenes", type=cli.whole(1, 10**6), default=4096, help="training scenes; drawn are those that the steps show")
    pictures = "held-out scenes that are drawn and scored during training; 0: none"
    runs.add_run(add, pictures=16, pictures_help=pictures)
    add("--base", action="store_true", help="train the toy Stable Diffusion instead of a ControlNet")
    add("--vae-steps", type=count, default=3000, help="with --base: steps of the autoencoder")
    args = parser.parse_args(argv)
    args.batch_size = args.batch_size or (32 if args.base else 4)
    if args.lr is None:
        args.lr = 1e-3 if args.base else 3e-4
    args.model = args.model or (None if args.base else "toy")
    args.output = args.output or Path("runs") / ("base" if args.base else args.condition)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    cli.keep_freed_memory()
    with cli.polite_errors(args, run=True):
        alone = distributed.init_distributed()[1] == 1
        device = runs.begin(args)
        torch.manual_seed(args.seed)
        if args.base:
            train_base(args, device)
        elif alone:
            at_once = 4 * toy.SIZE**2 * HINT_CHANNELS[0] * args.batch_size  # bytes of the hint encoder's first maps
            cli.check_memory(device, at_once, f"--batch-size {args.batch_size}")
            train_controlnet(args, device)
        else:
            raise ValueError("train_toy.py trains a ControlNet in one process: for several, use `minicn train`, or --base")
    return 0


if __name__ == "__main__":
    sys.exit(main())
