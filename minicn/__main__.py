"""The command line: `minicn generate` and `minicn condition`, the same as `python -m minicn`."""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from minicn import cli, conditions
from minicn.controlnet import ControlNet
from minicn.pipeline import StableDiffusion

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(prog="minicn", description="ControlNet on Stable Diffusion 1.5, from scratch")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    style = {"formatter_class": cli.Formatter}

    command = commands.add_parser("generate", help="draw a picture from a prompt and a hint", **style)
    add = command.add_argument
    add("--model", default="toy", help='a diffusers folder, or "toy", the small model that ships')
    add("--controlnet", help='a diffusers folder, a .safetensors file, or "toy-canny"')
    add("--hint", type=Path, help="picture that steers, as large as the picture to draw; needs --controlnet")
    add("--prompt", required=True, help="what to draw")
    add("--negative-prompt", default="", help="what to keep away from")
    add("--num-steps", type=cli.whole(1, 1000), default=20, help="DDIM steps, 1 to 1000")
    add("--guidance-scale", type=cli.number(0, 100), default=9.0, help="how strongly the prompt counts; 1 is off")
    add("--conditioning-scale", type=cli.number(0, 100), default=1.0, help="how strongly the hint counts; 1 as trained")
    add("--control-start", type=cli.number(0, 1), default=0.0, help="share of the steps at which control begins, 0 to 1")
    add("--control-end", type=cli.number(0, 1), default=1.0, help="share of the steps at which control ends, 0 to 1")
    add("--eta", type=cli.number(0, 1), default=0.0, help="noise that each step adds, 0 (DDIM) to 1 (DDPM)")
    add("--seed", type=cli.whole(0, 2**63 - 1), default=0, help="of the first noise, 0 and up")
    add("--dtype", choices=DTYPES, default="float32", help="precision of the models")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--output", type=Path, required=True, help="picture to write; its ending chooses the format")

    command = commands.add_parser("condition", help="make a hint from a picture", **style)
    add = command.add_argument
    add("name", choices=conditions.NAMES, help="the condition")
    add("image", type=Path, help="picture to read")
    add("hint", type=Path, help="picture to write")
    add("--low", type=cli.number(0, 10000), default=100, help="canny: edges above it are kept if connected")
    add("--high", type=cli.number(0, 10000), default=200, help="canny: edges above it are kept")
    return parser.parse_args(argv)


def generate(args: argparse.Namespace) -> None:
    check_output(args.output)
    if (args.hint is None) != (args.controlnet is None):
        raise ValueError("--hint and --controlnet go together: give both or neither")
    hint = None if args.hint is None else conditions.load_image(args.hint)
    device, dtype = cli.device(args.device), DTYPES[args.dtype]
    sd = StableDiffusion.load(args.model, dtype=dtype, device=device)
    net = None
    if args.controlnet is not None:
        net = ControlNet.load(args.controlnet, unet=sd.unet, dtype=dtype, device=device)
    names = "prompt negative_prompt num_steps guidance_scale conditioning_scale control_start control_end eta seed"
    settings = {name: getattr(args, name) for name in names.split()}
    [image] = sd.generate(**settings, hint=hint, controlnet=net, progress=True)
    image.save(args.output)


def condition(args: argparse.Namespace) -> None:
    check_output(args.hint)
    edges = conditions.canny(conditions.load_image(args.image), args.low, args.high)
    Image.fromarray(edges).save(args.hint)
    print(f"{args.hint}: {edges.shape[1]}x{edges.shape[0]} pixels, {np.mean(edges > 0):.1%} of them edges")


def check_output(path: Path) -> None:
    """Raise ValueError, before any work, for a picture that could not be written afterwards."""
    if path.is_dir():
        raise ValueError(f"output {path} is a folder: name a file in it, as {path / 'out.png'}")
    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"output {path} has no ending of a picture: name it .png or .jpg")
    if not path.parent.is_dir():
        raise ValueError(f"output {path} lies in no existing folder: make {path.parent} first")
    cli.check_folder(path.parent)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with cli.polite_errors():
        {"generate": generate, "condition": condition}[args.command](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
