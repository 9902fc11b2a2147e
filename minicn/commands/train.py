"""`minicn train`: a ControlNet from a data folder."""

import argparse
import dataclasses
import sys
from pathlib import Path

from minicn.commands import cli, runs
from minicn.controlnet import ControlNet
from minicn.pipeline import StableDiffusion
from minicn.trainer import data, distributed, examples, loop, recording, resuming
from minicn.training import Recipe


def train_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--model", required=True, help=cli.MODEL)
    add("--data", type=Path, required=True, help="folder with prompt.json (Fill50K) or metadata.jsonl (Hugging Face)")
    add("--output", type=Path, required=True, help="folder for weights, log, sheets and checkpoints")
    runs.add_recipe(add, " ".join(field.name for field in dataclasses.fields(Recipe)), lr_decay=0.0)
    add("--resolution", type=cli.whole(8), help="pixels a side, a multiple of 8 (default: what the model was trained at)")
    add("--keep", type=cli.whole(0), default=0, help="older checkpoints to keep")
    add("--dry-run", action="store_true", help="only print what memory the run would need, and what is free")
    cli.add_tokenizer(add)
    held = "pairs, the first of the folder, to draw and score, not to learn from (default: 4, but at most half of all)"
    add("--held-out", type=cli.whole(0), help=held)
    shown = "held-out pairs that are drawn and scored during training; 0: none"
    runs.add_run(add, pictures=4, pictures_help=shown)


def train(args: argparse.Namespace) -> None:
    first, device = distributed.init_distributed()[0] == 0, runs.begin(args)
    pairs, recipe = data.read_pairs(args.data), runs.recipe_of(args)
    distributed.check_shares(recipe, device)
    sd = StableDiffusion.load(args.model, device=device, tokenizer=args.tokenizer)
    size = args.resolution or sd.image_size
    if size % 8:
        raise ValueError(f"--resolution is {size}, but must be a multiple of 8")
    net = runs.controlnet(args.controlnet, sd, args.seed)
    if args.dry_run:
        dry_run(sd, net, recipe, size)
        return
    held = min(4, len(pairs) // 2) if args.held_out is None else args.held_out
    shown, learned = hold_out(pairs, held)
    part = recipe.batch_size // (distributed.init_distributed()[1] * recipe.accumulate)
    widest = max(part * net.cfg.hint_channels[0], min(8, len(pairs)) * sd.vae.cfg.channels[0])  # maps at full size at once
    cli.check_memory(device, 4 * size**2 * widest, f"--batch-size {recipe.batch_size} with --resolution {size}")
    of = {"data": data.digest(pairs), "held_out": held, "model": resuming.digest(sd)}
    run = recording.Run(args.output, dataclasses.asdict(recipe) | of | {"resolution": size}, args.keep)
    if first:
        run.prepare(args.resume)
    try:
        with distributed.first_alone():  # it encodes, the others read
            encoded = examples.from_pairs(sd, learned, size, keep=run.encoded, of=of)
    except BaseException:
        run.release(unused=True)
        raise
    loop.train(
        sd,
        net,
        encoded,
        validation(sd, shown[: args.pictures], size, args.guidance_scale) if first and args.pictures else None,
        run,
        recipe,
        score_every=args.score_every,
        checkpoint_every=args.checkpoint_every,
        resume=args.resume,
        pace=cli.pace(args.threads, sd.unet, net),
    )


def hold_out(pairs: list[data.Pair], count: int) -> tuple[list[data.Pair], list[data.Pair]]:
    """Return the pairs to draw and score, and those to learn from; say how many. Raises ValueError if too few are left."""
    if count >= len(pairs):
        raise ValueError(f"--held-out is {count}, but the data are {len(pairs)} pairs: leave some to learn from")
    if distributed.init_distributed()[0] == 0:
        said = f"note: held out: {count} of {len(pairs)} pairs, drawn and scored, not learned from"
        print(said if count else "note: held out: none; the pairs drawn and scored are learned from, too", file=sys.stderr)
    return pairs[: count or None], pairs[count:]


def validation(sd: StableDiffusion, pairs: list[data.Pair], size: int, guidance_scale: float | None) -> recording.Validation:
    """Return what draws the hints of some pairs."""
    hints, truths = zip(*(data.load_pair(pair, size) for pair in pairs), strict=True)
    return recording.Validation(sd, list(truths), list(hints), [pair.prompt for pair in pairs], guidance_scale)


def dry_run(sd: StableDiffusion, net: ControlNet, recipe: Recipe, size: int) -> None:
    """Print what memory a run would need, and what is free."""
    from minicn.trainer import memory  # its imports take a second

    predicted = memory.predict(sd.unet, net, recipe, size, distributed.init_distributed()[1], sd.device)
    print(memory.table(predicted, cli.free_memory(sd.device)))
