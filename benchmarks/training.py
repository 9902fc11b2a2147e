"""Measure training at full Stable Diffusion 1.5 widths: seconds and memory of a step, the memory ledger, kills survived.

    python benchmarks/training.py                     the paper's "34% more time, 23% more memory", regimes, diffusers
    python benchmarks/training.py --what ledger       memory predicted against memory measured
    python benchmarks/training.py --what kills        20 SIGKILLs at random moments of a toy run

Every row runs in a process of its own, in turn, several times; medians are printed, and ratios to the row that is named.
The weights are random, which changes neither. `--narrow` tries the script itself, in seconds, on a small model.
"""

import argparse
import contextlib
import ctypes
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from minicn import ControlNet, ControlNetConfig, UNet, UNetConfig, ddim, fast, training
from minicn.checkpoints import files
from minicn.commands import cli
from minicn.trainer import loop, memory

NARROW = UNetConfig(model_channels=32, context_dim=64)
ROWS = {  # of the table: what is timed, and the row that it is compared with
    "plain": ("the U-Net, all of it trained", None),
    "controlnet": ("ControlNet", "plain"),
    "middle": ("ControlNet, only the middle connected", "controlnet"),
    "checkpointing": ("ControlNet, gradient checkpointing", "controlnet"),
    "diffusers": ("ControlNet, the same step with diffusers' modules", None),
    "ours": ("ControlNet, minicn", "diffusers"),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--what", choices=("step", "ledger", "kills"), default="step")
    parser.add_argument("--rows", choices=ROWS, nargs="+", default=list(ROWS), help="step: what to time")
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="timed in each process, after one that is not")
    parser.add_argument("--repeats", type=int, default=1, help="processes of each row, in turn")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--narrow", action="store_true", help="a small model, to try the script")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--one", choices=ROWS, help=argparse.SUPPRESS)  # a process of its own
    return parser.parse_args(argv)


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Give the zero layers numbers, too: zeros are quicker."""
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(0, 0.02)
    return model


def our_step(args, device):
    """Return a step of minicn as a function, plain training of the U-Net included."""
    unet = fill(UNet(NARROW if args.narrow else UNetConfig())).to(device)
    fast.prepare(unet)
    recipe = training.Recipe(steps=1, batch_size=args.batch_size, gradient_checkpointing=args.one == "checkpointing")
    net = fill(ControlNet(ControlNetConfig(unet.cfg))).to(device) if args.one != "plain" else None
    batch = memory.example(net or ControlNet(ControlNetConfig(NARROW)), recipe, args.size, 1, device)
    abar = ddim.alphas_cumprod().to(device)
    if net is None:
        batch.context = torch.randn(args.batch_size, 77, unet.cfg.context_dim, device=device)
        optimizer = torch.optim.AdamW(unet.parameters(), fused=True)

        def plain():
            x_t = ddim.add_noise(batch.latents, batch.noise, abar[batch.timesteps]).contiguous(
                memory_format=torch.channels_last
            )
            (unet(x_t, batch.timesteps, batch.context) - batch.noise).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return plain
    fast.prepare(net)
    recipe = training.Recipe(steps=1, batch_size=args.batch_size, connect="middle" if args.one == "middle" else "all")
    optimizer = torch.optim.AdamW(training.apply_regime(unet, net, recipe), fused=True)
    for model in (unet, net):
        fast.recompute(model, args.one == "checkpointing")
    return lambda: memory.step(unet, net, optimizer, batch, abar, recipe)


def their_step(args, device):
    """Return the step written with diffusers' modules, as its training script does it."""
    import diffusers

    cfg = NARROW if args.narrow else UNetConfig()
    shape = {
        "block_out_channels": tuple(cfg.model_channels * mult for mult in cfg.channel_mult),
        "cross_attention_dim": cfg.context_dim,
        "attention_head_dim": cfg.num_heads,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    }
    unet = fill(diffusers.UNet2DConditionModel(up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, **shape)).to(
        device
    )
    unet.requires_grad_(False)
    net = fill(diffusers.ControlNetModel(**shape)).to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    n, side, abar = args.batch_size, args.size // 8, ddim.alphas_cumprod().to(device)
    latents, noise = (torch.randn(n, 4, side, side, device=device) for _ in range(2))
    hint, context = torch.rand(n, 3, args.size, args.size, device=device), torch.randn(n, 77, cfg.context_dim, device=device)
    t = torch.zeros(n, dtype=torch.long, device=device)

    def step():
        x_t = ddim.add_noise(latents, noise, abar[t])
        down, mid = net(x_t, t, encoder_hidden_states=context, controlnet_cond=hint, return_dict=False)
        eps = unet(
            x_t, t, context, down_block_additional_residuals=down, mid_block_additional_residual=mid, return_dict=False
        )[0]
        (eps - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_one(args) -> None:
    """Print the seconds of each step and the most memory above what the libraries alone take."""
    device = torch.device(args.device)
    if args.one == "diffusers":
        import diffusers  # noqa: F401
        from diffusers import ControlNetModel, UNet2DConditionModel  # noqa: F401
    else:
        cli.keep_freed_memory()  # as the command does
    torch.manual_seed(0)
    before, seconds = allocated(device), []
    step = (their_step if args.one == "diffusers" else our_step)(args, device)
    step()
    with Peak(device) as peak:
        for _ in range(args.steps):
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": seconds, "memory": peak.bytes - before}))


def measure(args) -> dict[str, dict[str, float]]:
    """Return seconds and memory of each row, medians."""
    found = {name: {"seconds": [], "memory": []} for name in args.rows}
    for _ in range(args.repeats):
        for name in args.rows:
            command = [sys.executable, __file__, "--one", name, "--size", args.size, "--batch-size", args.batch_size]
            command += ["--steps", args.steps, "--device", args.device, *(["--narrow"] if args.narrow else [])]
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            found[name]["seconds"] += result["seconds"]
            found[name]["memory"].append(result["memory"])
    return {name: {key: statistics.median(values) for key, values in row.items()} for name, row in found.items()}


def steps(args) -> None:
    """Print seconds and memory of each row, and their ratios."""
    middle = measure(args)
    print(f"{args.device}, {torch.get_num_threads()} threads, {args.size}x{args.size}, batch {args.batch_size}, float32")
    print("| a training step | seconds | GB | compared with | time | memory |\n| --- | --- | --- | --- | --- | --- |")
    for name, row in middle.items():
        text, other = ROWS[name]
        line = f"| {text} | {row['seconds']:.2f} | {row['memory'] / 1e9:.2f} |"
        if other in middle:
            ratios = " | ".join(f"{row[key] / middle[other][key]:.2f}" for key in ("seconds", "memory"))
            line += f" {ROWS[other][0]} | {ratios} |"
        print(line, flush=True)


def measure_step(unet: UNet, net: ControlNet, recipe: training.Recipe, size: int, device: torch.device) -> memory.Ledger:
    """Return what the third of three steps on noise took. The models' weights change, so the run must end here."""
    whole = memory.size_of(p for model in (unet, net) for p in model.parameters())
    optimizer = torch.optim.AdamW(training.apply_regime(unet, net, recipe), fused=loop.fused(device, recipe))
    batch, abar = memory.example(net, recipe, size, 1, device), ddim.alphas_cumprod().to(device)
    for model in (unet, net):
        fast.recompute(model, recipe.gradient_checkpointing)
    alive = {}
    warm_up = torch.optim.SGD(net.parameters(), lr=0.0)  # keeps no moments
    memory.step(unet, net, warm_up, batch, abar, recipe)  # libraries allocate what they keep for good
    before = allocated(device)
    memory.step(unet, net, optimizer, batch, abar, recipe)
    optimiser = allocated(device) - before

    def note(name: str) -> None:
        alive[name] = allocated(device) - before - optimiser

    with Peak(device) as peak:
        memory.step(unet, net, optimizer, batch, abar, recipe, note)
    held = alive["gradients"] if recipe.accumulate > 1 else 0
    return memory.Ledger(whole, alive["gradients"], optimiser, alive["activations"] - held, whole + peak.bytes - before)


def allocated(device: torch.device) -> int:
    """Return the bytes in use: of tensors on a GPU; on CPUs, where only the system knows, of the process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(AttributeError, OSError):  # not with every C library
        ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back to the system, which does the counting
    return cli.kilobytes(cli.STATUS, "VmRSS")


class Peak:
    """Inside `with`, note the most bytes in use."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> "Peak":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the system resets its peak
        return self

    def __exit__(self, *error) -> None:
        self.bytes = (
            torch.cuda.max_memory_allocated(self.device)
            if self.device.type == "cuda"
            else cli.kilobytes(cli.STATUS, "VmHWM")
        )


def ledgers(args) -> None:
    """Print memory predicted and measured, for several ways to train."""
    device = torch.device(args.device)
    cfg = NARROW if args.narrow else UNetConfig()
    for settings in ({}, {"gradient_checkpointing": True}, {"connect": "middle"}, {"accumulate": args.batch_size}):
        unet, net = fill(UNet(cfg)).to(device), fill(ControlNet(ControlNetConfig(cfg))).to(device)
        fast.prepare(unet), fast.prepare(net)
        recipe = training.Recipe(**{"steps": 1, "batch_size": args.batch_size} | settings)
        predicted = memory.predict(unet, net, recipe, args.size, 1, device)
        measured = measure_step(unet, net, recipe, args.size, device)
        print(f"\n{settings or 'defaults'}, {args.size}x{args.size}, batch {args.batch_size}")
        print(f"{'MB':<12}{'predicted':>12}{'measured':>12}{'ratio':>8}")
        for name, value in vars(predicted).items():
            found = getattr(measured, name)
            ratio = f"{value / found:8.2f}" if found > 0 else ""
            print(f"{name:<12}{value / 1e6:12,.1f}{found / 1e6:12,.1f}{ratio}", flush=True)
        del unet, net


def kills(args) -> None:
    """Kill a toy run again and again; compare its weights with those of a run that nobody disturbed."""
    script = Path(__file__).parent.parent / "train_toy.py"
    command = [sys.executable, str(script), "--steps", "120", "--scenes", "64", "--pictures", "2", "--device", "cpu"]
    command += ["--checkpoint-every", "3", "--score-every", "60"]
    with tempfile.TemporaryDirectory() as folder:
        whole, runs, count, lost, same = Path(folder) / "whole", 0, 0, 0, True
        start = time.perf_counter()
        subprocess.run([*command, "--output", str(whole)], check=True, capture_output=True)
        seconds, choose = time.perf_counter() - start, random.Random(0)
        killed, done = Path(folder) / "killed-0", 0
        while count < args.kills or done:
            more = ["--resume"] if (killed / "checkpoint.pt").is_file() else []
            arguments = [*command, "--output", str(killed), *more]
            run = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            try:
                run.wait(choose.uniform(0, 0.4 * seconds) if count < args.kills else None)
            except subprocess.TimeoutExpired:
                os.kill(run.pid, signal.SIGKILL)
                run.wait()
                count += 1
                before, done = done, 0
                if (killed / "checkpoint.pt").is_file():
                    done = torch.load(killed / "checkpoint.pt", weights_only=True)["step"]
                lost += done < before
                continue
            a, b = (files.read(folder / "controlnet.safetensors") for folder in (whole, killed))
            same = same and run.returncode == 0 and all(torch.equal(a[key], b[key]) for key in a)
            runs, done, killed = runs + 1, 0, killed.with_name(f"killed-{runs + 1}")
        print(
            f"{count} kills in {runs} runs; {lost} checkpoints damaged or gone; final weights "
            + ("equal bit for bit" if same else "DIFFERENT")
        )


def main() -> None:
    args = parse_args()
    if args.one:
        measure_one(args)
    else:
        {"step": steps, "ledger": ledgers, "kills": kills}[args.what](args)


if __name__ == "__main__":
    main()
