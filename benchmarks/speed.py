"""Time Stable Diffusion 1.5 at full width beside diffusers: the same random weights, dtype, threads and steps.

    python benchmarks/speed.py --folder /tmp/full                    one guided step with ControlNet, float32 and bfloat16
    python benchmarks/speed.py --folder /tmp/full --what picture     a whole picture, with VAE and text
    python benchmarks/speed.py --folder /tmp/full --what memory      the most memory that a picture takes
    python benchmarks/speed.py --folder /tmp/full --what load        from safetensors to ready, with the peak memory
    python benchmarks/speed.py --folder /tmp/full --what parity      relative errors instead of seconds

Runs of the two are interleaved, and the table gives medians and their ratio. Needs the extra `parity` and 6 GB on disk,
where the weights are made at the first run. `--narrow` tries the script itself, in seconds, on a small model.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from minicn import VAE, ControlNet, StableDiffusion, TextConfig, TextEncoder, UNet, UNetConfig, VAEConfig, ddim
from minicn.checkpoints.hub import TOY_BASE
from minicn.commands import cli
from minicn.pipeline import Control, Predictor
from minicn.tokenizer import Tokenizer

NARROW = UNetConfig(model_channels=32, context_dim=64)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROMPT = "a red ball beside a yellow person on a white background"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the random weights are, or are to be made")
    parser.add_argument("--what", choices=("step", "picture", "memory", "load", "parity"), default="step")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, interleaved")
    parser.add_argument("--steps", type=int, default=20, help="picture: DDIM steps")
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--narrow", action="store_true", help="a small model, to try the script")
    parser.add_argument("--one", choices=("minicn", "diffusers"), help=argparse.SUPPRESS)  # a process of its own
    return parser.parse_args(argv)


def randomise(model, seed):
    """Give every parameter values that keep the sizes of what flows through."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                p.fill_(1.0)
            else:
                p.normal_(0, (p[0].numel() if p.ndim > 1 else 100) ** -0.5, generator=generator)
    return model


def make_weights(folder: Path, narrow: bool) -> None:
    """Write a Stable Diffusion and a ControlNet of random weights, as diffusers folders, if they are not there."""
    if (folder / "sd" / "model_index.json").is_file():
        return
    words = Tokenizer.load(TOY_BASE / "tokenizer")
    unet = UNet(NARROW if narrow else None)
    vae = VAE(VAEConfig(channels=(32, 32, 64, 64)) if narrow else None)
    text = TextConfig(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=1) if narrow else TextConfig()
    net = randomise(ControlNet.from_unet(unet), 3)
    sd = StableDiffusion(randomise(unet, 0), randomise(vae, 1), randomise(TextEncoder(text), 2), words)
    net.save(folder / "controlnet", layout="diffusers")
    sd.save(folder / "sd")


def ours(args, dtype):
    sd = StableDiffusion.load(args.folder / "sd", dtype=dtype, device=args.device)
    net = ControlNet.load(args.folder / "controlnet", unet=sd.unet, dtype=dtype, device=args.device)
    return sd, net


def theirs(args, dtype):
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    net = diffusers.ControlNetModel.from_pretrained(args.folder / "controlnet", torch_dtype=dtype)
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        args.folder / "sd", controlnet=net, torch_dtype=dtype, safety_checker=None
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(args.device)


def interleave(functions: dict, repeats: int, device: str, warm_up: int = 1) -> dict[str, list[float]]:
    """Time functions in turn, some times each unmeasured before."""
    seconds = {name: [] for name in functions}
    for repeat in range(1 - warm_up, repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if repeat > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


@torch.no_grad()
def time_steps(args, dtype) -> dict:
    """One guided step: ControlNet and U-Net on [unconditional, conditional], as each pipeline runs them."""
    sd, net = ours(args, dtype)
    sd.prepare(net)
    pipe = theirs(args, dtype)
    side, width = args.size // 8, sd.unet.cfg.context_dim
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, side, side, generator=g).to(args.device)
    hint = torch.rand(1, 3, args.size, args.size, generator=g).to(args.device, dtype)
    context = torch.randn(2, 77, width, generator=g).to(args.device, dtype)
    t = torch.tensor([951], device=args.device)
    predict = Predictor(sd.unet, context, 9.0, [Control(net, hint, 1.0, False, context, True, x)], (0, 1), 20)
    abar = sd.alphas_cumprod

    def minicn_step():
        return ddim.ddim_step(x, predict(x, 951, 0), abar[951], abar[901])

    pipe.scheduler.set_timesteps(20)
    twice = torch.cat([hint, hint])

    def diffusers_step():
        batch = torch.cat([x.to(dtype)] * 2)
        down, mid = pipe.controlnet(batch, t, context, twice, conditioning_scale=1.0, return_dict=False)
        eps = pipe.unet(
            batch,
            t,
            encoder_hidden_states=context,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]
        eps_u, eps_c = eps.chunk(2)
        return pipe.scheduler.step(eps_u + 9.0 * (eps_c - eps_u), t, x.to(dtype), return_dict=False)[0]

    a, b = minicn_step().float(), diffusers_step().float()
    print(f"  (relative difference of the two steps: {((a - b).norm() / b.norm()).item():.2g})")
    with predict.fast():
        return interleave({"minicn": minicn_step, "diffusers": diffusers_step}, args.repeats, args.device)


def time_pictures(args, dtype) -> dict:
    """A whole picture: text, steps, autoencoder."""
    sd, net = ours(args, dtype)
    pipe = theirs(args, dtype)
    hint = torch.rand(1, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))

    def minicn_picture(steps=args.steps):
        sd.generate(PROMPT, hint=hint, controlnet=net, num_steps=steps)

    def diffusers_picture(steps=args.steps):
        generator = torch.Generator("cpu").manual_seed(0)
        pipe(PROMPT, image=hint, num_inference_steps=steps, guidance_scale=9.0, generator=generator)

    minicn_picture(1)
    diffusers_picture(2)  # its scheduler wants two
    return interleave({"minicn": minicn_picture, "diffusers": diffusers_picture}, args.repeats, args.device, warm_up=0)


def in_process(args, dtype: str, name: str) -> dict:
    """Run one library in a process of its own and return what it measured of itself; the peak is there after 2 steps."""
    command = [sys.executable, __file__, "--folder", args.folder, "--what", args.what, "--one", name, "--dtype", dtype]
    command += ["--steps", 2, "--size", args.size, "--device", args.device]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_one(args) -> None:
    """Load one library's models (and draw, with --what picture) and print its seconds and peak memory."""
    dtype = DTYPES[args.dtype[0]]
    if args.one == "diffusers":
        import diffusers  # noqa: F401  (the time of importing is not that of loading)
        from diffusers import StableDiffusionControlNetPipeline  # noqa: F401
    before = cli.kilobytes(cli.STATUS, "VmHWM")
    start = time.perf_counter()
    if args.one == "minicn":
        sd, net = ours(args, dtype)
        models = [sd.unet, sd.vae, sd.text_encoder, net]
    else:
        pipe = theirs(args, dtype)
        models = [pipe.unet, pipe.vae, pipe.text_encoder, pipe.controlnet]
    seconds = time.perf_counter() - start
    if args.what == "memory":
        hint = torch.rand(1, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))
        if args.one == "minicn":
            sd.generate(PROMPT, hint=hint, controlnet=net, num_steps=args.steps)
        else:
            pipe(PROMPT, image=hint, num_inference_steps=args.steps, guidance_scale=9.0)
    peak = cli.kilobytes(cli.STATUS, "VmHWM")  # not getrusage's, which a process has from its parent
    size = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
    print(json.dumps({"seconds": seconds, "peak": (peak - before) / size, "gb": peak / 1e9}))


@torch.no_grad()
def parity(args) -> list[tuple[str, float]]:
    """Relative errors of each model in float32."""
    sd, net = ours(args, torch.float32)
    sd.prepare(net)
    pipe = theirs(args, torch.float32)
    g = torch.Generator().manual_seed(0)
    side = args.size // 8
    x, hint = torch.randn(2, 4, side, side, generator=g), torch.rand(2, 3, args.size, args.size, generator=g)
    t, context = torch.tensor([951, 1]), torch.randn(2, 77, sd.unet.cfg.context_dim, generator=g)
    tokens = sd.tokenizer([PROMPT, ""])

    def error(a, b):
        return ((a.double() - b.double()).norm() / b.double().norm()).item()

    rows = [("text", error(sd.text_encoder(tokens), pipe.text_encoder(tokens)[0]))]
    control = net(x, hint, t, context)
    down, mid = pipe.controlnet(x, t, context, hint, return_dict=False)
    rows += [(f"control {i}", error(a, b)) for i, (a, b) in enumerate(zip(control, [*down, mid], strict=True))]
    rows.append(("U-Net", error(sd.unet(x, t, context), pipe.unet(x, t, context).sample)))
    latents = pipe.vae.encode(hint[:1] * 2 - 1).latent_dist.mean
    rows.append(("VAE, encoded mean", error(sd.vae.encode(hint[:1] * 2 - 1)[0], latents)))
    rows.append(("VAE, decoded", error(sd.vae.decode(x[:1]), pipe.vae.decode(x[:1]).sample)))
    pipe.vae.double()
    rows.append(("VAE, decoded, against float64", error(sd.vae.decode(x[:1]), pipe.vae.decode(x[:1].double()).sample)))
    return rows


def compare(args, name: str) -> list[tuple[str, float, float]]:
    """Measure --what in one precision: what it is, minicn's median, diffusers' median."""
    if args.what == "memory":
        a, b = (in_process(args, name, one)["gb"] for one in ("minicn", "diffusers"))
        return [("peak memory of a process, GB", a, b)]
    if args.what == "load":
        runs = [{one: in_process(args, name, one) for one in ("minicn", "diffusers")} for _ in range(args.repeats)]
        return [
            (what, *(statistics.median(run[one][key] for run in runs) for one in ("minicn", "diffusers")))
            for key, what in (("seconds", "seconds to load"), ("peak", "peak memory / weights"))
        ]
    seconds = (time_steps if args.what == "step" else time_pictures)(args, DTYPES[name])
    gc.collect()
    return [(f"{args.what}, seconds", statistics.median(seconds["minicn"]), statistics.median(seconds["diffusers"]))]


def main() -> None:
    args = parse_args()
    if args.one:
        measure_one(args)
        return
    make_weights(args.folder, args.narrow)
    gc.collect()
    print(f"{args.device}, {torch.get_num_threads()} threads, {args.size}x{args.size}, torch {torch.__version__}")
    if args.what == "parity":
        for name, value in parity(args):
            print(f"| {name} | {value:.2g} |")
        return
    print("| | minicn | diffusers | ratio |\n| --- | --- | --- | --- |")
    for name in args.dtype:
        for what, a, b in compare(args, name):
            print(f"| {name}, {what} | {a:.3f} | {b:.3f} | {a / b:.2f} |", flush=True)


if __name__ == "__main__":
    main()
