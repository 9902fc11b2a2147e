"""The command line: `minicn generate`, `condition`, `convert`, ...; the same as `python -m minicn`.

A command is imported when it is called: PyTorch takes a second, which `minicn --help` need not wait for.
"""

import minicn.commands.stopping  # before all else, see there

# isort: split
import argparse
import importlib
import sys

import minicn
from minicn.commands import options

COMMANDS = {  # its module in minicn.commands, and what it does
    "demo": ("demo", "draw a first picture: a hint, what the toy draws from it, and the truth, side by side"),
    "generate": ("generate", "draw a picture from a prompt and a hint"),
    "condition": ("condition", "make a hint from a picture, a drawing, key points, labels, normals or depth"),
    "train": ("train", "train a ControlNet on a data folder"),
    "check-data": ("data", "look at every pair of a data folder before training"),
    "make-data": ("data", "make a data folder of circles, or of the toy world"),
    "scene": ("scene", "write a scene of the toy world: picture, caption, depth, normals, labels, key points, all hints"),
    "inspect": ("convert", "say what a file or folder of weights holds"),
    "convert": ("convert", "write a model in another layout"),
    "check-device": ("check_device", "see whether a graphics card computes what the CPU does"),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    parser = options.parser(prog="minicn", description="ControlNet on Stable Diffusion 1.5, from scratch")
    parser.add_argument("--version", action="version", version=f"minicn {minicn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, formatter_class=options.Formatter)
        if name in argv[:1]:
            _function(name, "_options")(command)
    args = parser.parse_args(argv)
    args.argv = argv[1:]  # of the command: `generate --like` tells what was given from defaults
    return args


def _function(command: str, ending: str = ""):
    """Return a command's function from its module, or the one that adds its options to a parser."""
    module = importlib.import_module(f"minicn.commands.{COMMANDS[command][0]}")
    return getattr(module, command.replace("-", "_") + ending)


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse_args(argv)
        from minicn.commands import cli
    except KeyboardInterrupt:  # while PyTorch is imported
        print("stopped", file=sys.stderr)
        return 130
    cli.keep_freed_memory()
    with cli.polite_errors(args, run=args.command == "train"):
        _function(args.command)(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
