"""`minicn convert` and `minicn inspect`: weights in another layout, and what a file or a picture holds."""

import argparse
import shlex
from pathlib import Path

from minicn.checkpoints import converting, files
from minicn.commands import cli
from minicn.commands.generate import recorded


def convert_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("source", help="model, ControlNet, U-Net or autoencoder: folder, file or repository")
    add("destination", type=Path, help="file (ldm) or folder (diffusers) to write")
    add("--layout", choices=("ldm", "diffusers"), required=True, help="names of the weights to write")
    add("--dtype", choices=cli.DTYPES, help="precision to write (default: the source's)")
    add("--part", choices=converting.KINDS, help="of a file with several models, the one to write")
    add("--unet", help='the model whose U-Net a "difference" file of a ControlNet is added to')
    add("--transfer-to", help="move a ControlNet to this other base: its copied layers get the difference of the bases")
    add("--transfer-from", help="the base that it was trained on (default: the source's own U-Net)")
    cli.add_tokenizer(add)
    cli.add_weights(add)


def inspect_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="folder, file or repository; or a PNG, for the settings that made it")
    command.add_argument("--compare-to", help="model with which to compare the U-Net, tensor by tensor")


def convert(args: argparse.Namespace) -> None:
    converting.check_destination(args.destination, args.layout)
    cli.check_folder(args.destination.parent)
    names = "part unet transfer_to transfer_from tokenizer variant ema"
    settings = {name: getattr(args, name) for name in names.split()}
    dtype = args.dtype and cli.DTYPES[args.dtype]
    print(files.printable(converting.convert(args.source, args.destination, args.layout, dtype=dtype, **settings)))


def inspect(args: argparse.Namespace) -> None:
    if Path(args.source).suffix.lower() == ".png":
        record = recorded(Path(args.source))
        for name, value in record.items():
            print(files.printable(f"{name}: {value}"))
        if record.get("command") == "generate":
            print(files.printable(f"draw it again: minicn generate --like {shlex.quote(args.source)}"))
        return
    for line in converting.describe(args.source):
        print(files.printable(line))
    if args.compare_to:
        for line in converting.compare(args.source, args.compare_to):
            print(files.printable(line))
