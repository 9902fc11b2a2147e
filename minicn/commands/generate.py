"""`minicn generate`: a picture from a prompt and a hint."""

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import minicn
from minicn import conditions, threads
from minicn.commands import cli
from minicn.controlnet import ControlNet
from minicn.pipeline import DEFAULT_PROMPT, StableDiffusion

SETTINGS = "negative_prompt num_steps guidance_scale control_start control_end denoise eta seed num_images height width"
SCALE, SHARE = cli.number(0, 100), cli.number(0, 1)


def generate_options(command: argparse.ArgumentParser) -> None:
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
    text = "picture to write; its extension determines the format; PNG keeps the settings"
    add("--output", type=Path, required=True, help=text)


def add_control(add: Callable) -> None:
    add("--controlnet", action="append", help='folder, file, repository, or "toy-canny"; may be given several times')
    add("--hint", type=Path, action="append", help="picture that steers, as large as the picture to draw; one a ControlNet")
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
        help=f'the paper\'s four: --prompt; the empty one; "{DEFAULT_PROMPT}"; a caption of what that one draws',
    )
    add("--captioner", help="automatic: a BLIP model for transformers, if installed (default: the toy's own, on the toy)")


def add_sampling(add: Callable) -> None:
    add("--num-steps", type=cli.whole(1, 1000), default=20, help="DDIM steps, 1 to 1000")
    add("--guidance-scale", type=SCALE, default=9.0, help="how strongly the prompt counts, 0 to 100; 1 is off")
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
    count, named = args.num_images, args.output
    outputs = [named] if count == 1 else [named.with_stem(f"{named.stem}-{i}") for i in range(count)]
    for path in outputs:
        cli.check_picture(path, *(args.hint or []), args.image, args.mask)
    check(args)
    hints = [conditions.load_image(path, hint=True) for path in args.hint or []]
    image = None if args.image is None else conditions.load_image(args.image)
    mask = None if args.mask is None else conditions.load_image(args.mask, "black")
    sd, nets = load(args)
    like = hints[0] if hints else image
    width, height = like.size if like else (sd.image_size, sd.image_size)
    width, height = args.width or width, args.height or height
    need = sd.vae.cfg.channels[0] * sd.vae_dtype.itemsize * count * height * width  # the decoder's last level
    cli.check_memory(sd.device, need, f"--num-images {count} of {width}x{height} pixels")
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
    record = {key: value for key, value in vars(args).items() if value is not None}
    record |= {"minicn": minicn.__version__, "device": str(sd.device)}
    said = [record | {"index": i, "prompt": captions[i] if captions else prompt} for i in range(len(drawn))]
    lost = [keep(*each) for each in zip(drawn, outputs, said, strict=True)]
    for picture, path, error in zip(drawn, outputs, lost, strict=True):
        if not error:
            print(f"{path}: {picture.width}x{picture.height} pixels, seed {args.seed}")
    if any(lost):
        raise OSError("; ".join(filter(None, lost)))


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
    nets, hints, scales = (len(some or []) for some in (args.controlnet, args.hint, args.conditioning_scale))
    if nets != hints:
        raise ValueError(f"--hint and --controlnet go together, got {hints} and {nets}: give as many of each")
    if nets and scales not in (0, 1, nets):
        raise ValueError(f"got {scales} --conditioning-scale for {nets} --controlnet: give one, or one for each")
    check_needs(args)
    if args.control_start > args.control_end:
        raise ValueError(f"--control-start {args.control_start} lies after --control-end {args.control_end}: swap them")


def check_needs(args: argparse.Namespace) -> None:
    """Raise ValueError for an option that has no effect without another one."""
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
        return {"user": args.prompt, "none": "", "default": DEFAULT_PROMPT}[args.prompt_setting], captions
    from minicn.toy import captioning

    caption = captioning.captioner(args.captioner, sd, args.model)

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
