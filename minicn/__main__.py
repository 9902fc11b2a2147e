"""The command line: `minicn generate`, `condition`, `convert`, ...; the same as `python -m minicn`."""

import argparse
import sys

import minicn
from minicn.commands import check_device, cli, condition, convert, data, generate, scene, train

COMMANDS = {
    "generate": generate.generate,
    "condition": condition.condition,
    "convert": convert.convert,
    "inspect": convert.inspect,
    "train": train.train,
    "check-data": data.check_data,
    "make-data": data.make_data,
    "scene": scene.scene,
    "check-device": check_device.check_device,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(prog="minicn", description="ControlNet on Stable Diffusion 1.5, from scratch")
    parser.add_argument("--version", action="version", version=f"minicn {minicn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (generate, condition, convert, train, data, scene, check_device):
        module.add_to(commands)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    cli.keep_freed_memory()
    with cli.polite_errors(args.output if args.command == "train" else None):
        COMMANDS[args.command](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
