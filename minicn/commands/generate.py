"""`minicn generate`: a picture from a prompt and a hint."""

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import minicn
from minicn import conditions, threads, toy
from minicn.checkpoints import files
from minicn.commands import cli
from minicn.commands.condition import look
from minicn.conditions import images, making
from minicn.controlnet import ControlNet
from minicn.pipeline import StableDiffusion

SETTINGS = "negative_prompt num_steps guidance_scale control_start control_end denoise eta seed num_images height width"
OF_A_RUN = "command argv like output sheet device threads prompt_setting captioner".split()  # not of a picture
SCALE, SHARE = cli.number(0, 100), cli.number(0, 1)


def generate_options(command: argparse.ArgumentParser) -> None:
    command.epilog = (
        f"The toy knows one to three things ({', '.join(toy.THINGS)}) in {', '.join(toy.COLOURS)}, on a background that is "
        f"{', '.join(toy.BACKGROUNDS)}: a red ball {toy.RELATIONS[0]} a blue box on a white background "
        f"(or {', '.join(toy.RELATIONS[1:])}); a red ball, a blue box and a green star on a grey background."
    )
    add = command.add_argument
    add("--model", default="toy", help=cli.MODEL)
    add_control(add)
    add_prompt(add)
    add_sampling(add)
    add("--dtype", choices=cli.DTYPES, default="float32", help="precision of the models")
    add("--vae-dtype", choices=cli.DTYPES, help="precision of the autoencoder (default: --dtype); float16 may overflow")
    add("--vae", help="another autoencoder: file, folder or repository")
    cli.add_tokenizer(add)
    cli.add_weights(add)
    cli.add_device(add)
    cli.add_threads(add)
    text = "picture to write; its extension determines the format; PNG keeps the settings (default: out.png, out-2.png, ...)"
    add("--output", type=Path, help=text)
    add("--sheet", type=Path, help="also write hints and pictures side by side, into this file")
    add("--like", type=Path, metavar="PICTURE", help="take the settings that a PNG keeps, but for those given here")


def add_control(add: Callable) -> None:
    add("--controlnet", action="append", help='folder, file, repository, or "toy-canny"; may be given several times')
    add("--hint", type=Path, action="append", help="picture that steers, as large as the picture to draw; one a ControlNet")
    text = "make the hint of this condition from --hint, as `minicn condition` does; one, or one a hint"
    add("--hint-from", choices=conditions.NAMES, metavar="CONDITION", action="append", help=text)
    text = "scale and crop hint, image and mask to the size at which the model was trained, or to --width and --height"
    add("--fit", action="store_true", help=text)
    add("--conditioning-scale", type=SCALE, action="append", help="weight of a hint, 0 to 100 (default: 1, as trained)")
    add("--control-start", type=SHARE, default=0.0, help="fraction of the steps that run at which control begins, 0 to 1")
    add("--control-end", type=SHARE, default=1.0, help="fraction of the steps that run at which control ends, 0 to 1")
    add(
        "--guess-mode",
        nargs="?",
        const="official",
        choices=("official", "diffusers"),
        help="the hint counts where the prompt says nothing; residuals are scaled as the official code or diffusers does",
    )


def add_prompt(add: Callable) -> None:
    add("--prompt", help="what to draw; required unless --prompt-setting is given")
    add("--negative-prompt", default="", help="what to keep away from")
    add(
        "--prompt-setting",
        choices=("user", "none", "default", "automatic"),
        default="user",
        help="the paper's four: --prompt; the empty one; the model's default; a caption of what that one draws",
    )
    add("--captioner", help="automatic: a BLIP model for transformers, if installed (default: the toy's own, on the toy)")


def add_sampling(add: Callable) -> None:
    add("--num-steps", type=cli.whole(1, 1000), default=20, help="DDIM steps, 1 to 1000")
    add("--guidance-scale", type=SCALE, help="how strongly the prompt counts, 0 to 100; 1 is off (default: the model's own)")
    add("--image", type=Path, help="picture to start from")
    add("--mask", type=Path, help="picture, white where --image is redrawn; black or transparent where it stays")
    add("--denoise", type=SHARE, default=1.0, help="with --image: fraction of the steps to run, above 0 to 1")
    add("--eta", type=SHARE, default=0.0, help="noise added at each step, 0 (DDIM) to 1 (DDPM)")
    add("--seed", type=cli.whole(0, 2**63 - 1), default=0, help="of the initial noise, 0 and up")
    text = "pictures, 1 to 1000; several are named NAME-0, NAME-1, ..."
    add("--num-images", type=cli.whole(1, 1000), default=1, help=text)
    add("--height", type=cli.whole(8), help="pixels, a multiple of 8 (default: the hint's)")
    add("--width", type=cli.whole(8), help="pixels, a multiple of 8 (default: the hint's)")


def generate(args: argparse.Namespace) -> None:
    args = args if args.like is None else again(args)
    check(args)
    outputs = places(args)
    hints = [None if args.hint_from else conditions.load_image(path, hint=True) for path in args.hint or []]
    image = None if args.image is None else conditions.load_image(args.image)
    mask = None if args.mask is None else conditions.load_image(args.mask, "black")
    sd, nets = load(args)
    if args.guidance_scale is None:
        args.guidance_scale = sd.defaults.guidance_scale
    hints = [sized(args, i, hint, sd.image_size) for i, hint in enumerate(hints)]
    if args.fit:
        target = args.width or sd.image_size, args.height or sd.image_size
        image = image and conditions.fit(image, target)
        mask = mask and conditions.fit(mask, target, hint=True)
    like = hints[0] if hints else image
    width, height = like.size if like else (sd.image_size, sd.image_size)
    width, height = args.width or width, args.height or height
    need = sd.vae.cfg.channels[0] * sd.vae_dtype.itemsize * args.num_images * height * width  # the decoder's last level
    cli.check_memory(sd.device, need, f"--num-images {args.num_images} of {width}x{height} pixels")
    settle_threads(args, sd, nets)
    scales = args.conditioning_scale or [1.0]
    prompt, captions = prompt_of(args, sd)
    drawn = sd.generate(
        prompt,
        **{name: getattr(args, name) for name in SETTINGS.split()},
        hint=hints or None,
        controlnet=nets or None,
        conditioning_scale=scales * len(nets) if len(scales) == 1 and nets else scales if nets else 1.0,
        guess_mode={None: False, "official": True}.get(args.guess_mode, args.guess_mode),
        image=image,
        mask=mask,
        progress=True,
    )
    record = {key: value for key, value in vars(args).items() if value is not None and key not in ("argv", "like", "sheet")}
    record |= {"minicn": minicn.__version__, "device": str(sd.device)}
    said = [record | {"index": i, "prompt": captions[i] if captions else prompt} for i in range(len(drawn))]
    lost = [keep(*each) for each in zip(drawn, outputs, said, strict=True)]
    for picture, path, error in zip(drawn, outputs, lost, strict=True):
        if not error:
            print(f"{path}: {picture.width}x{picture.height} pixels, seed {args.seed}")
    if args.sheet:
        columns = [("hint", hint) for hint in hints] + [("drawn", picture) for picture in drawn]
        conditions.save_image(conditions.side_by_side(columns), args.sheet)
        print(f"{args.sheet}: side by side")
    if any(lost):
        raise OSError("; ".join(filter(None, lost)))


def places(args: argparse.Namespace) -> list[Path]:
    """Return where each picture goes. Raises ValueError, before any work, where one, or the sheet, cannot be written."""
    named, count = args.output or cli.free("out.png"), args.num_images
    outputs = [named] if count == 1 else [named.with_stem(f"{named.stem}-{i}") for i in range(count)]
    for path in outputs if args.sheet is None else [*outputs, args.sheet]:
        cli.check_picture(path, *(args.hint or []), args.image, args.mask, args.like)
    if args.sheet in outputs:
        raise ValueError(f"--sheet {args.sheet} would replace the picture: name another file")
    return outputs


def sized(args: argparse.Namespace, i: int, hint: Image.Image | None, side: int) -> Image.Image:
    """Return hint i as it was read, or made (None) from what --hint names; fitted if asked; note what looks wrong in it.

    side  of the pictures that the model was trained on; a hint that is made has it as its shorter one, if nothing is said
    """
    path, net = args.hint[i], Path(args.controlnet[i]).name.removeprefix("toy-")
    size = (args.width or side, args.height or side) if args.fit or args.hint_from and (args.width or args.height) else None
    if hint is None:
        name = args.hint_from[i % len(args.hint_from)]
        pixels, did = making.make(name, path, resolution=size or side)
        print(f"hint from {path}: {pixels.shape[1]}x{pixels.shape[0]} pixels, {did}")
        look(name, pixels, f"the hint from {path}", remedy="; draw dark on white" if name == "scribble" else "")
        return Image.fromarray(pixels)
    hint = conditions.fit(hint, size, hint=True) if size else hint
    if any(low < high for low, high in hint.getextrema()):  # of a single colour: that is said while drawing
        name = net if net in conditions.NAMES else None
        look(name, np.asarray(hint), str(path), remedy=f"; --hint-from {name or 'CONDITION'} makes a hint of it")
    return hint


def again(args: argparse.Namespace) -> argparse.Namespace:
    """Return the settings that the picture --like keeps, in place of those not given on the command line."""

    def refuse(message: str):
        raise ValueError(f"{args.like} keeps a setting that does not fit: {message}")

    words = []
    record = recorded(args.like)
    if record.get("command") != "generate":
        raise ValueError(f"{args.like} keeps the settings of something else: name a PNG that `minicn generate` wrote")
    for name, value in record.items():
        if name in vars(args) and name not in OF_A_RUN and value is not False:
            option = "--" + name.replace("_", "-")
            values = value if isinstance(value, list) else [value]
            words += [option if each is True else f"{option}={each}" for each in values]
    parser = cli.parser()
    generate_options(parser)
    given = parser.parse_args(args.argv, argparse.Namespace(**dict.fromkeys(vars(args))))
    parser.error = refuse
    kept = parser.parse_args(words)
    if given.prompt_setting is not None:
        kept.prompt = None
    return argparse.Namespace(**vars(kept) | {name: value for name, value in vars(given).items() if value is not None})


def recorded(path: Path) -> dict:
    """Return the settings that a PNG keeps. Raises ValueError if it keeps none."""
    text = images.open_image(path).info.get("minicn")
    found = files.parse_json(text, path, "a picture with settings") if isinstance(text, str) else None
    if not isinstance(found, dict):
        raise ValueError(f"{path} keeps no settings: name a PNG that minicn wrote")
    return found


def keep(picture: Image.Image, path: Path, record: dict) -> str:
    """Write a picture, as a PNG with its settings. If its place fails, use that of temporary files, and say so."""
    settings = PngInfo()
    settings.add_text("minicn", json.dumps(record, default=str))
    try:
        conditions.save_image(picture, path, **({"pnginfo": settings} if path.suffix.lower() == ".png" else {}))
    except (OSError, ValueError) as error:
        instead = Path(tempfile.mkdtemp(prefix="minicn-"), f"{path.stem}.png")
        conditions.save_image(picture, instead, pnginfo=settings)
        return f"{error}; the picture is kept as {instead}"
    return ""


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that contradict each other, or have no effect."""
    given = args.prompt is not None
    if args.prompt_setting == "user" and not given:
        raise ValueError("--prompt is missing: say what to draw, or choose --prompt-setting none, default or automatic")
    if args.prompt_setting != "user" and given:
        raise ValueError(f"--prompt and --prompt-setting {args.prompt_setting} exclude each other: give one")
    lists = (args.controlnet, args.hint, args.conditioning_scale, args.hint_from)
    nets, hints, scales, sources = (len(some or []) for some in lists)
    if nets != hints:
        raise ValueError(f"--hint and --controlnet go together, got {hints} and {nets}: give as many of each")
    for option, count in (("conditioning-scale", scales), ("hint-from", sources)):
        if nets and count not in (0, 1, nets):
            raise ValueError(f"got {count} --{option} for {nets} --controlnet: give one, or one for each")
    for path in args.hint or []:
        images.check_file(path, "an image")
    check_needs(args)
    if args.control_start > args.control_end:
        raise ValueError(f"--control-start {args.control_start} lies after --control-end {args.control_end}: swap them")


def check_needs(args: argparse.Namespace) -> None:
    """Raise ValueError for an option that has no effect without another one."""
    control = ["hint-from", "conditioning-scale", "guess-mode", "control-start", "control-end"]
    defaults = {"fit": False, "control-start": 0.0, "control-end": 1.0, "denoise": 1.0}
    automatic = args.prompt_setting == "automatic"
    for options, needed, there in (
        (control, "--controlnet", args.controlnet),
        (["denoise", "mask"], "--image", args.image),
        (["fit"], "--hint or --image", args.hint or args.image),
        (["captioner"], "--prompt-setting automatic", automatic),
    ):
        for option in options:
            if getattr(args, option.replace("-", "_")) != defaults.get(option) and not there:
                raise ValueError(f"--{option} has no effect without {needed}: give both or none")


def load(args: argparse.Namespace) -> tuple[StableDiffusion, list[ControlNet]]:
    """Return the models that the command line names."""
    device, dtype = cli.device(args.device), cli.DTYPES[args.dtype]
    sd = StableDiffusion.load(
        args.model,
        dtype=dtype,
        device=device,
        tokenizer=args.tokenizer,
        vae=args.vae,
        vae_dtype=args.vae_dtype and cli.DTYPES[args.vae_dtype],
        variant=args.variant,
        ema=args.ema,
    )
    return sd, [controlnet(net, sd, dtype, device, args.variant) for net in args.controlnet or []]


def controlnet(
    source: str, sd: StableDiffusion, dtype: torch.dtype, device: torch.device, variant: str | None
) -> ControlNet:
    """Return a ControlNet in the variant of the model; with a warning the plain one if it has no such variant."""
    try:
        return ControlNet.load(source, sd.unet, dtype, device, variant)
    except FileNotFoundError as error:
        if variant is None:
            raise
        net = ControlNet.load(source, sd.unet, dtype, device)
        warnings.warn(f"{error}; --controlnet {source} is taken without --variant", stacklevel=1)
        return net


def prompt_of(args: argparse.Namespace, sd: StableDiffusion) -> tuple[str | Callable[[Image.Image], str], list[str]]:
    """Return the prompt, or a function that captions a picture, and the list in which that one keeps its captions."""
    captions = []
    if args.prompt_setting != "automatic":
        return {"user": args.prompt, "none": "", "default": sd.defaults.default_prompt}[args.prompt_setting], captions
    from minicn.toy import captioning

    caption = captioning.captioner(args.captioner, sd)

    def automatic(picture: Image.Image) -> str:
        captions.append(caption(picture))
        print(f"automatic prompt: {captions[-1]}")
        return captions[-1]

    return automatic, captions


def settle_threads(args: argparse.Namespace, sd: StableDiffusion, nets: list[ControlNet]) -> None:
    """Choose the number of threads for a picture: a narrow model tries a step or two under each."""
    found = threads.candidates(args.threads, sum(p.numel() for model in (sd.unet, *nets) for p in model.parameters()))
    side = sd.image_size // 8
    x = torch.zeros(2, sd.unet.cfg.in_channels, side, side, device=sd.device, dtype=sd.dtype)
    inputs = (x, torch.zeros(2, dtype=torch.long, device=sd.device), sd.encode_prompts(["", ""]))
    with torch.no_grad():
        threads.fastest(lambda: sd.unet(*inputs), found)
