"""`minicn demo`: a first picture that follows a hint, drawn with what ships."""

import argparse
from pathlib import Path

from PIL import Image

from minicn import conditions, toy
from minicn.commands import cli
from minicn.controlnet import ControlNet
from minicn.pipeline import StableDiffusion

NEXT = """Next, one of:
  minicn generate --controlnet toy-scribble --hint-from scribble --fit --hint YOURS.png --prompt "a red ball"
                                    where YOURS.png is a drawing of a ball, dark on white
  minicn generate --help            what the toy can draw, and every option
  minicn scene 1 --output scene     all that is known of this scene: its depth, its labels, all eleven hints"""


def demo_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--condition", choices=conditions.NAMES, default="canny", help="what the hint shows")
    add("--scene", type=cli.whole(0, 2**53), default=1, help="of the toy world, held out from all training; 0 and up")
    add("--seed", type=cli.whole(0, 2**63 - 1), default=0, help="of the initial noise, 0 and up")
    add("--output", type=Path, help="picture to write (default: demo.png, demo-2.png, ...)")
    cli.add_device(add)


def demo(args: argparse.Namespace) -> None:
    output, device = args.output or cli.free("demo.png"), cli.device(args.device)
    cli.check_picture(output)
    scene = toy.scene(args.scene, "test")
    hint, sd = Image.fromarray(scene.hint(args.condition)), StableDiffusion.load("toy", device=device)
    net = ControlNet.load(f"toy-{args.condition}", unet=sd.unet, device=device)
    [drawn] = sd.generate(scene.caption, hint=hint, controlnet=net, seed=args.seed, progress=True)
    columns = [("hint", hint), ("drawn", drawn), ("truth", Image.fromarray(scene.image))]
    conditions.save_image(conditions.side_by_side(columns), output)
    print(f'{output}: a hint, what the toy drew from it and "{scene.caption}", and the truth that it never saw')
    print(NEXT)
