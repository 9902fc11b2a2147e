"""`minicn check-data` and `minicn make-data`: folders to train on."""

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

from minicn import conditions
from minicn.checkpoints import files
from minicn.commands import cli
from minicn.trainer import data


def check_data_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=Path, help="with prompt.json (Fill50K's format) or metadata.jsonl (Hugging Face's)")
    command.add_argument("--sheet", type=Path, help="picture to write, a contact sheet, not in the folder (default: none)")


def make_data_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=Path, help="to write, in Fill50K's format")
    command.add_argument("--count", type=cli.whole(1, 10**6), default=1000, help="pairs, 1 to a million")
    choices = ("circles", *conditions.NAMES)
    command.add_argument("--condition", choices=choices, default="circles", help="as Fill50K, or toy scenes with this hint")
    command.add_argument("--seed", type=cli.whole(0), default=0, help="of the circles, 0 and up")


def check_data(args: argparse.Namespace) -> None:
    pairs = data.read_pairs(args.folder)
    if args.sheet is not None:
        if Path(os.path.realpath(args.folder)) in Path(os.path.realpath(args.sheet)).parents:
            raise ValueError(f"--sheet {args.sheet} would lie among the data: name a file elsewhere")
        cli.check_picture(args.sheet, *(path for pair in pairs for path in (pair.hint, pair.image)))
    found = [text for pair in tqdm(pairs, desc="checking", unit="pair") for text in data.problems(pair)]
    for text in found:
        print(files.printable(text))
    sheet = "--sheet FILE draws some of them"
    if args.sheet is not None:
        conditions.save_image(data.contact_sheet(pairs), args.sheet)
        sheet = f"contact sheet: {args.sheet}"
    print(f"{len(pairs)} pairs, {len(found) or 'no'} problem{'' if len(found) == 1 else 's'}; {sheet}")
    if found:
        sys.exit(1)


def make_data(args: argparse.Namespace) -> None:
    cli.check_folder(args.folder)
    if args.condition == "circles":
        pairs = data.circles(args.count, args.seed)
    else:
        pairs = data.toy_pairs(args.count, args.condition)
    count = data.write_pairs(args.folder, pairs, args.count)
    print(f"{args.folder}: {count} pairs; look at them with: minicn check-data {args.folder}")
