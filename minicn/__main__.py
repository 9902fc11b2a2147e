"""The command line: `minicn generate`, `condition`, `convert`, ...; the same as `python -m minicn`."""

import argparse
import dataclasses
import io
import json
import os
import sys
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import minicn
from minicn import conditions, threads, training
from minicn.checkpoints import converting
from minicn.commands import cli, device_check
from minicn.conditions import making
from minicn.controlnet import ControlNet
from minicn.pipeline import DEFAULT_PROMPT, StableDiffusion
from minicn.trainer import data, recording

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODEL = 'a diffusers folder, an ldm checkpoint, a Hugging Face repository (owner/name), or "toy", the small model that ships'


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(prog="minicn", description="ControlNet on Stable Diffusion 1.5, from scratch")
    parser.add_argument("--version", action="version", version=f"minicn {minicn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    style = {"formatter_class": cli.Formatter}

    command = commands.add_parser("generate", help="draw a picture from a prompt and a hint", **style)
    add = command.add_argument
    add("--model", default="toy", help=MODEL)
    add("--controlnet", action="append", help='folder, file, repository, or "toy-canny"; may be given several times')
    add("--hint", type=Path, action="append", help="picture that steers, as large as the picture to draw; one a ControlNet")
    add("--prompt", help="what to draw; needed but with --prompt-setting")
    add("--negative-prompt", default="", help="what to keep away from")
    add(
        "--prompt-setting",
        choices=("user", "none", "default", "automatic"),
        default="user",
        help=f'the paper\'s four: --prompt; the empty one; "{DEFAULT_PROMPT}"; a caption of what that one draws',
    )
    add("--captioner", help="automatic: a BLIP model for transformers, if installed (default: the toy's own, on the toy)")
    add("--num-steps", type=cli.whole(1, 1000), default=20, help="DDIM steps, 1 to 1000")
    add("--guidance-scale", type=cli.number(0, 100), default=9.0, help="how strongly the prompt counts; 1 is off")
    scale = cli.number(0, 100)
    add(
        "--conditioning-scale",
        type=scale,
        action="append",
        help="how strongly a hint counts (default: 1, as trained)",
    )
    add("--control-start", type=cli.number(0, 1), default=0.0, help="share of the steps at which control begins, 0 to 1")
    add("--control-end", type=cli.number(0, 1), default=1.0, help="share of the steps at which control ends, 0 to 1")
    add(
        "--guess-mode",
        nargs="?",
        const="official",
        choices=("official", "diffusers"),
        help="the hint counts where the prompt says nothing; residuals are scaled as the official code or diffusers does",
    )
    add("--image", type=Path, help="picture to begin from")
    add("--mask", type=Path, help="picture, white where --image is to be drawn anew; the rest comes back unchanged")
    add(
        "--denoise",
        type=cli.number(0, 1),
        default=1.0,
        help="with --image: share of the steps that is run, above 0 to 1",
    )
    add("--eta", type=cli.number(0, 1), default=0.0, help="noise that each step adds, 0 (DDIM) to 1 (DDPM)")
    add("--seed", type=cli.whole(0, 2**63 - 1), default=0, help="of the first noise, 0 and up")
    add(
        "--num-images",
        type=cli.whole(1, 1000),
        default=1,
        help="pictures, 1 and up; several are named NAME-0, NAME-1, ...",
    )
    add("--height", type=cli.whole(8), help="pixels, a multiple of 8 (default: the hint's)")
    add("--width", type=cli.whole(8), help="pixels, a multiple of 8 (default: the hint's)")
    add("--dtype", choices=DTYPES, default="float32", help="precision of the models")
    add("--vae-dtype", choices=DTYPES, help="precision of the autoencoder (default: --dtype); float16 may overflow")
    add("--vae", help="another autoencoder: file, folder or repository")
    add("--tokenizer", help="folder with vocab.json and merges.txt, for a single file (default: CLIP's from the cache)")
    add("--variant", help="of a folder's weights, as fp16")
    add("--ema", action="store_true", help="of a file that holds both, take the moving average of the U-Net's weights")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    cli.add_threads(add)
    add("--output", type=Path, required=True, help="picture to write; its ending chooses the format; PNG keeps the settings")

    command = commands.add_parser(
        "condition",
        help="make a hint from a picture, a drawing, key points, labels, normals or depth",
        description="Make the hint of a condition. Each takes:\n"
        + "\n".join(f"  {name:10}  {takes}" for name, takes in making.TAKES.items()),
        formatter_class=Lines,
    )
    add, side = command.add_argument, cli.whole(64, 8192)
    add("name", choices=conditions.NAMES, metavar="NAME", help=f"the condition: {', '.join(conditions.NAMES)}")
    add("image", type=Path, metavar="INPUT", help="file to read: any picture that Pillow reads, .json or .npy, see above")
    add("hint", type=Path, metavar="HINT", help="picture to write")
    add(
        "--resolution", type=side, help="shorter side, rounded to 64s as in the official apps, which use 512 (default: kept)"
    )
    add("--ready", action="store_true", help="the picture is a hint already: only look at it, and resize it")
    add("--version", choices=conditions.VERSIONS, help="ControlNet's conventions, where they differ (default: v1.1)")
    add("--low", type=cli.number(0, 10000), help="Canny: edges above it are kept if connected (default: 100)")
    add("--high", type=cli.number(0, 10000), help="Canny: edges above it are kept (default: 200)")
    add("--weights", type=Path, help="released file of HED (hed, scribble --fake), M-LSD (hough) or OpenPose (openpose)")
    add("--detect-resolution", type=side, help="shorter side at which lines or people are looked for (default: the hint's)")
    add("--safe", action="store_true", help="hed: three grey levels, as in v1.1")
    add("--fake", action="store_true", help="scribble: from a picture")
    add(
        "--size",
        type=size,
        metavar="WxH",
        help="key points: width and height of their picture, pixels (default: the file's)",
    )
    add("--like", type=Path, metavar="PICTURE", help="key points: a picture of that size")
    add("--first-label", type=cli.whole(0, 255), help="label of wall or person (default: 0 for ade20k, 1 for coco_stuff)")
    add(
        "--unlabelled",
        type=cli.whole(0, 65535),
        help="label that becomes black (default: none for ade20k, 0 for coco_stuff)",
    )
    add("--axes", choices=conditions.NORMAL_AXES, help="what a normal map's colours mean (default: opengl)")
    add("--from-depth", action="store_true", help="normal: from a depth map, as v1.0's app")
    add("--background", type=cli.number(0, 1), help="normal from depth: share of the range that is far (default: 0.4)")
    add("--far-is-white", action="store_true", help="the depth map is white, or large, where it is far")

    command = commands.add_parser("convert", help="write a model in another layout", **style)
    add = command.add_argument
    add("source", help="model, ControlNet, U-Net or autoencoder: folder, file or repository")
    add("destination", type=Path, help="file (ldm) or folder (diffusers) to write")
    add("--layout", choices=("ldm", "diffusers"), required=True, help="names of the weights to write")
    add("--dtype", choices=DTYPES, help="precision to write (default: the source's)")
    add(
        "--part",
        choices=converting.KINDS,
        help="of a file with several models, the one to write",
    )
    add("--unet", help='the model whose U-Net a "difference" file of a ControlNet is added to')
    add("--transfer-to", help="move a ControlNet to this other base: its copied layers get the difference of the bases")
    add("--transfer-from", help="the base that it was trained on (default: the source's own U-Net)")
    add("--tokenizer", help="folder with vocab.json and merges.txt, for a single file (default: CLIP's from the cache)")
    add("--variant", help="of a folder's weights, as fp16")
    add("--ema", action="store_true", help="of a file that holds both, take the moving average of the U-Net's weights")

    command = commands.add_parser("inspect", help="say what a file or folder of weights holds", **style)
    command.add_argument("source", help="folder, file or repository")
    command.add_argument("--compare-to", help="model with which to compare the U-Net, tensor by tensor")

    command = commands.add_parser("train", help="train a ControlNet on a data folder", **style)
    add, count = command.add_argument, cli.whole(1)
    add("--model", required=True, help=MODEL)
    add("--data", type=Path, required=True, help="folder with prompt.json (Fill50K) or metadata.jsonl (Hugging Face)")
    add("--output", type=Path, required=True, help="folder for weights, log, sheets and checkpoints")
    add("--steps", type=count, required=True, help="optimiser steps, 1 and up")
    add("--controlnet", help="go on from this one, e.g. one trained with --connect middle (default: a fresh copy)")
    add("--batch-size", type=count, default=4, help="samples a step, over all processes and parts, 1 and up")
    add("--accumulate", type=count, default=1, help="parts, one after the other, of each process's share of a batch")
    add("--lr", type=cli.number(0, 1), default=1e-5, help="learning rate of AdamW, 0 to 1")
    add("--lr-decay", type=cli.number(0, 1), default=0.0, help="share of the steps, at the end, over which it falls to 0")
    add("--seed", type=cli.whole(0), default=0, help="of data order, noise, timesteps and dropped prompts, 0 and up")
    add("--drop-prompt", type=cli.number(0, 1), default=0.5, help="share of prompts replaced by the empty one, 0 to 1")
    add("--connect", choices=("all", "middle"), default="all", help="middle: the paper's small-scale regime")
    add("--unlock", choices=("none", "decoder", "all"), default="none", help="part of Stable Diffusion that learns, too")
    add("--unlock-lr", type=cli.number(0, 1), default=2e-6, help="learning rate of what is unlocked, 0 to 1")
    add("--precision", choices=training.PRECISIONS, default="float32", help="of the computation; weights stay float32")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    add("--resolution", type=cli.whole(8), help="pixels a side, a multiple of 8 (default: what the model was trained at)")
    add("--pictures", type=cli.whole(0), default=4, help="pairs, the first of the folder, drawn on the way; 0: none")
    add("--guidance-scale", type=cli.number(0, 100), default=9.0, help="of the pictures drawn on the way")
    add("--score-every", type=count, default=250, help="steps between pictures drawn and rows of the log")
    add("--checkpoint-every", type=count, default=1000, help="steps between checkpoints")
    add("--keep", type=cli.whole(0), default=0, help="older checkpoints that stay")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --output")
    cli.add_threads(add)
    add("--dry-run", action="store_true", help="only print what memory the run would need, predicted and measured")
    add("--tokenizer", help="folder with vocab.json and merges.txt, for a single file (default: CLIP's from the cache)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")

    command = commands.add_parser("check-data", help="look at every pair of a data folder before training", **style)
    command.add_argument("folder", type=Path, help="with prompt.json (Fill50K's format) or metadata.jsonl (Hugging Face's)")
    command.add_argument("--sheet", type=Path, help="contact sheet to write (default: FOLDER/sheet.png)")

    command = commands.add_parser("make-data", help="make a data folder of circles, or of the toy world", **style)
    command.add_argument("folder", type=Path, help="to write, in Fill50K's format")
    command.add_argument("--count", type=cli.whole(1), default=1000, help="pairs, 1 and up")
    choices = ("circles", *conditions.NAMES)
    command.add_argument("--condition", choices=choices, default="circles", help="as Fill50K, or toy scenes with this hint")
    command.add_argument("--seed", type=cli.whole(0), default=0, help="of the circles, 0 and up")

    text = "compare a device with the CPU on the toy, and take times; prints a Markdown table to paste into an issue"
    command = commands.add_parser("check-device", help="see whether a graphics card computes what the CPU does", **style)
    command.description = f"{text}. A minute; exit status 1 if a comparison fails, 2 if the device is not there."
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    return parser.parse_args(argv)


def generate(args: argparse.Namespace) -> None:
    check_output(args.output)
    if args.prompt_setting == "user" and args.prompt is None:
        raise ValueError("--prompt is missing: say what to draw, or choose --prompt-setting none, default or automatic")
    if args.prompt_setting != "user" and args.prompt is not None:
        raise ValueError(f"--prompt and --prompt-setting {args.prompt_setting} exclude each other: give one")
    nets, hints, scales = args.controlnet or [], args.hint or [], args.conditioning_scale or [1.0]
    if len(nets) != len(hints):
        raise ValueError(f"--hint and --controlnet go together, but {len(hints)} and {len(nets)} came: give as many")
    scales = scales * len(nets) if len(scales) == 1 else scales
    if nets and len(scales) != len(nets):
        raise ValueError(f"{len(scales)} --conditioning-scale came for {len(nets)} --controlnet: give one, or one for each")
    check_needs(args)
    if args.control_start > args.control_end:
        raise ValueError(f"--control-start {args.control_start} lies after --control-end {args.control_end}: swap them")
    hints = [conditions.load_image(path) for path in hints]
    image, mask = (None if path is None else conditions.load_image(path) for path in (args.image, args.mask))
    device, dtype = cli.device(args.device), DTYPES[args.dtype]
    sd = StableDiffusion.load(
        args.model,
        dtype=dtype,
        device=device,
        tokenizer=args.tokenizer,
        vae=args.vae,
        vae_dtype=args.vae_dtype and DTYPES[args.vae_dtype],
        variant=args.variant,
        ema=args.ema,
    )
    nets = [ControlNet.load(net, unet=sd.unet, dtype=dtype, device=device) for net in nets]
    settle_threads(args, sd, nets)
    names = "negative_prompt num_steps guidance_scale control_start control_end denoise eta seed num_images height width"
    settings = {name: getattr(args, name) for name in names.split()}
    prompt = {"user": args.prompt, "none": "", "default": DEFAULT_PROMPT}.get(args.prompt_setting)
    if prompt is None:
        from minicn.toy import captioning

        caption, prompts = captioning.captioner(args.captioner, sd, args.model), []

        def prompt(picture: Image.Image) -> str:
            prompts.append(caption(picture))
            print(f"automatic prompt: {prompts[-1]}")
            return prompts[-1]

    images = sd.generate(
        prompt,
        **settings,
        hint=hints or None,
        controlnet=nets or None,
        conditioning_scale=scales if nets else 1.0,
        guess_mode={None: False, "official": True}.get(args.guess_mode, args.guess_mode),
        image=image,
        mask=mask,
        progress=True,
    )
    record = {key: value for key, value in vars(args).items() if value is not None}
    record |= {"minicn": minicn.__version__, "device": str(device)}
    for i, image in enumerate(images):
        path = args.output if len(images) == 1 else args.output.with_stem(f"{args.output.stem}-{i}")
        drawn = {"index": i, "prompt": prompts[i] if callable(prompt) else prompt}
        information = PngInfo()
        information.add_text("minicn", json.dumps(record | drawn, default=str))
        image.save(path, **({"pnginfo": information} if path.suffix.lower() == ".png" else {}))
        print(f"{path}: {image.width}x{image.height} pixels, seed {args.seed}")


def settle_threads(args: argparse.Namespace, sd: StableDiffusion, nets: list[ControlNet]) -> None:
    """Choose the number of threads for a picture: a narrow model tries a step or two under each."""
    found = threads.candidates(args.threads, sum(p.numel() for model in (sd.unet, *nets) for p in model.parameters()))
    side = sd.image_size // 8
    x = torch.zeros(2, sd.unet.cfg.in_channels, side, side, device=sd.device, dtype=sd.dtype)
    inputs = (x, torch.zeros(2, dtype=torch.long, device=sd.device), sd.encode_prompts(["", ""]))
    with torch.no_grad():
        threads.fastest(lambda: sd.unet(*inputs), found)


def check_needs(args: argparse.Namespace) -> None:
    """Raise ValueError for an option that would count for nothing without another one."""
    control = ["conditioning-scale", "guess-mode", "control-start", "control-end"]
    defaults = {"control-start": 0.0, "control-end": 1.0, "denoise": 1.0}
    automatic = args.prompt_setting == "automatic"
    for options, needed, there in (
        (control, "--controlnet", args.controlnet),
        (["denoise", "mask"], "--image", args.image),
        (["captioner"], "--prompt-setting automatic", automatic),
    ):
        for option in options:
            if getattr(args, option.replace("-", "_")) != defaults.get(option) and not there:
                raise ValueError(f"--{option} counts for nothing without {needed}: give both or none")


class Lines(cli.Formatter):
    """Keep the lines of the description as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text


def size(text: str) -> tuple[int, int]:
    """Convert "640x480" to 640 and 480, the width first."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        width = height = 0
    if not (8 <= width <= 16384 and 8 <= height <= 16384):
        raise argparse.ArgumentTypeError(f"{text!r} came, but WIDTHxHEIGHT is needed, each 8 to 16384, as 768x512")
    return width, height


def condition(args: argparse.Namespace) -> None:
    check_output(args.hint)
    options = {key: value for key, value in vars(args).items() if key not in ("command", "name", "image", "hint")}
    hint, did = making.make(args.name, args.image, **options)
    Image.fromarray(hint).save(args.hint)
    print(f"{args.hint}: {hint.shape[1]}x{hint.shape[0]} pixels, {did}")
    for doubt in conditions.doubts(args.name, hint, args.version or "v1.1"):
        print(f"note: {args.hint} may be wrong: {doubt}", file=sys.stderr)


def convert(args: argparse.Namespace) -> None:
    converting.check_destination(args.destination, args.layout)
    cli.check_folder(args.destination.parent)
    print(
        converting.convert(
            args.source,
            args.destination,
            args.layout,
            dtype=args.dtype and DTYPES[args.dtype],
            part=args.part,
            unet=args.unet,
            transfer_to=args.transfer_to,
            transfer_from=args.transfer_from,
            tokenizer=args.tokenizer,
            variant=args.variant,
            ema=args.ema,
        )
    )


def inspect(args: argparse.Namespace) -> None:
    for line in converting.describe(args.source):
        print(line)
    if args.compare_to:
        for line in converting.compare(args.source, args.compare_to):
            print(line)


def train(args: argparse.Namespace) -> None:
    cli.check_folder(args.output)
    first, device = training.process()[0] == 0, cli.device(args.device)
    pairs = data.read_pairs(args.data)
    names = [field.name for field in dataclasses.fields(training.Recipe)]
    recipe = training.Recipe(**{name: getattr(args, name) for name in names})
    sd = StableDiffusion.load(args.model, device=device, tokenizer=args.tokenizer)
    size = args.resolution or sd.image_size
    if size % 8:
        raise ValueError(f"--resolution is {size}, but must be a multiple of 8")
    settings = {"data": str(args.data), "pairs": len(pairs), "model": str(args.model), "resolution": size}
    run = recording.Run(args.output, dataclasses.asdict(recipe) | settings, args.keep)
    if first and not args.dry_run:
        run.prepare(args.resume)
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)  # Numerics: gradients below 1e-38 are zero, or CPUs compute them many times slower
    if args.controlnet is None:
        net = ControlNet.from_unet(sd.unet)
    else:
        net = ControlNet.load(args.controlnet, unet=sd.unet, device=device)
    if args.dry_run:
        dry_run(sd, net, recipe, size)
        return
    with training.first_alone():  # it encodes, the others read
        examples = training.Examples.from_pairs(sd, pairs, size, keep=run.encoded)
    shown = [data.load_pair(pair, size) for pair in pairs[: args.pictures]] if first else []
    validation = None
    if shown:
        hints, truths = zip(*shown, strict=True)
        prompts = [pair.prompt for pair in pairs[: args.pictures]]
        validation = recording.Validation(sd, list(truths), list(hints), prompts, args.guidance_scale)
    training.train(
        sd,
        net,
        examples,
        validation,
        run,
        recipe,
        score_every=args.score_every,
        checkpoint_every=args.checkpoint_every,
        resume=args.resume,
        pace=cli.pace(args.threads, sd.unet, net),
    )


def dry_run(sd: StableDiffusion, net: ControlNet, recipe: training.Recipe, size: int) -> None:
    """Print what a run would need of memory: predicted, then, if this machine has as much, measured over a step."""
    from minicn.trainer import memory  # its imports take a second

    device, world = sd.device, training.process()[1]
    predicted, free = memory.predict(sd.unet, net, recipe, size, world, device), memory.free(device)
    measured = None
    if free is not None and predicted.peak - predicted.weights < free:
        sd.prepare(net)
        measured = memory.measure(sd.unet, net, recipe, size, world, device)
    print(memory.table(predicted, measured))
    if measured is None:
        there = "this system does not say how much memory is used" if free is None else f"only {free / 1e6:,.0f} MB are free"
        print(f"not measured: {there}")


def check_data(args: argparse.Namespace) -> None:
    pairs = data.read_pairs(args.folder)
    sheet = args.sheet or args.folder / "sheet.png"
    check_output(sheet)
    found = [text for pair in tqdm(pairs, desc="checking", unit="pair") for text in data.problems(pair)]
    for text in found:
        print(text)
    data.contact_sheet(pairs).save(sheet)
    print(f"{len(pairs)} pairs, {len(found) or 'no'} problem{'' if len(found) == 1 else 's'}; contact sheet: {sheet}")
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


def check_device(args: argparse.Namespace) -> None:
    device = cli.device(args.device)
    torch.set_flush_denormal(True)
    report, holds = device_check.check(device)
    print(report)
    if not holds:
        sys.exit(1)


COMMANDS = {
    "generate": generate,
    "condition": condition,
    "convert": convert,
    "inspect": inspect,
    "train": train,
    "check-data": check_data,
    "make-data": make_data,
    "check-device": check_device,
}


def check_output(path: Path) -> None:
    """Raise ValueError, before any work, for a picture that could not be written afterwards."""
    if path.is_dir():
        raise ValueError(f"output {path} is a folder: name a file in it, as {path / 'out.png'}")
    form = Image.registered_extensions().get(path.suffix.lower())
    try:
        Image.new("RGB", (8, 8)).save(io.BytesIO(), form or "none")
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(f"output {path} has no ending of a picture that can be written: name it .png or .jpg") from error
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"output {path} exists and must not be written: name another file")
    if not path.parent.is_dir():
        raise ValueError(f"output {path} lies in no existing folder: make {path.parent} first")
    cli.check_folder(path.parent)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    cli.keep_freed_memory()
    with cli.polite_errors(args.output if args.command == "train" else None):
        COMMANDS[args.command](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
