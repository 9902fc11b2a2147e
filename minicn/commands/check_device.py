"""`minicn check-device`: does this device compute what the CPU does, and how fast? A report from machines we do not have.

The toy's picture is compared with the CPU's in float64, which MPS has not; a short training, by the trainer itself, with
the CPU's in float32. The limits stand in LIMITS, with what was measured on CPUs. Left out: full width, several processes.
"""

import argparse
import contextlib
import io
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import minicn
from minicn import toy, training
from minicn.commands import cli
from minicn.controlnet import ControlNet
from minicn.pipeline import StableDiffusion
from minicn.trainer import examples, loop, recording

HINT_CHANNELS = (8, 16, 32, 64)  # train_toy.py's
SCENE = 1  # held out; drawn and, with others, learned from
# Off by at most, and why. Measured on two CPUs: as they compute, and with oneDNN switched off, which is other code for the
# same sums. Gradients are compared, as AdamW has averaged them, and not the weights: its first steps go by their signs
# alone, which mean nothing where a gradient is next to none.
LIMITS = {
    ("picture", "float32"): (0.01, "CPUs are 0.00006 off, with TF32 or float16 it would be 0.1"),
    ("picture", "tf32"): (0.6, "5 times a CPU's float16, which has as many digits"),
    ("picture", "bfloat16"): (6.0, "3 to 5 times a CPU's"),
    ("picture", "float16"): (0.6, "5 times a CPU's"),
    ("gradients", "float32"): (0.01, "two ways to sum on a CPU are 0.0006 apart, float16 0.03"),
    ("gradients", "bfloat16"): (0.6, "a CPU's are 0.3 apart; another direction would be 1 or more"),
    ("gradients", "float16"): (0.1, "4 times a CPU's"),
    ("loss", "float32"): (0.001, "the log has 5 digits, the last is 0.0004 of the loss"),
    ("loss", "bfloat16"): (4 / 2**8, "4 roundings of 8 bits"),
    ("loss", "float16"): (4 / 2**11, "4 roundings of 11 bits"),
}
UNITS = {
    "picture": "grey levels, root mean square",
    "gradients": "fraction of their norm",
    "loss": "fraction of it",
}


def check_device_options(command: argparse.ArgumentParser) -> None:
    text = "compare a device with the CPU on the toy, and take times; prints a Markdown table to paste into an issue"
    command.description = f"{text}. A minute; exit status 1 if a comparison fails, 2 if the device is not available."
    cli.add_device(command.add_argument)


def check_device(args: argparse.Namespace) -> None:
    device = cli.device(args.device)
    torch.set_flush_denormal(True)
    text, holds = check(device)
    print(text)
    if not holds:
        sys.exit(1)


@dataclass
class Row:
    """A comparison: what, how far off (None: an error), the limit, and why that."""

    what: str
    off: float | None
    limit: float
    why: str

    @property
    def holds(self) -> bool:
        return self.off is not None and self.off <= self.limit  # nan does not

    def __str__(self) -> str:
        off = "-" if self.off is None else f"{self.off:.2g}"
        return f"| {self.what} | {off} | {self.limit:.2g} | {'holds' if self.holds else 'FAILS'} | {self.why} |"


def picture(device: torch.device, dtype: torch.dtype, num_steps: int) -> Tensor:
    """Draw the scene by the toy and toy-canny; return it before rounding, (1, 3, 128, 128) float64 in grey levels."""
    sd = StableDiffusion.load("toy", dtype, device)
    net, seen = ControlNet.load("toy-canny", unet=sd.unet, dtype=dtype, device=device), []
    sd.vae.decoder.register_forward_hook(lambda module, args, result: seen.append(result.cpu().double()))
    draw(sd, net, num_steps)
    return (seen[0] / 2 + 0.5).clamp(0, 1) * 255


def draw(sd: StableDiffusion, net: ControlNet, num_steps: int) -> None:
    scene = toy.scene(SCENE, "test")
    sd.generate(scene.caption, hint=scene.hint("canny"), controlnet=net, guidance_scale=3.0, num_steps=num_steps)


def fresh(device: torch.device) -> tuple[StableDiffusion, ControlNet]:
    """Return the toy and a ControlNet before its training, the same on every device."""
    sd = StableDiffusion.load("toy", device=device)
    torch.manual_seed(0)
    return sd, ControlNet.from_unet(sd.unet, hint_channels=HINT_CHANNELS)


def trained(
    device: torch.device, learned: training.Examples, precision: str, steps: int, early: int
) -> tuple[Tensor, dict[int, float]]:
    """Train a ControlNet as users do; return the gradients, averaged by AdamW, after `early` steps, and the mean loss up to
    each look.
    """
    sd, net = fresh(device)
    recipe = training.Recipe(steps, batch_size=2, lr=3e-4, precision=precision, lr_decay=0.0)
    with tempfile.TemporaryDirectory() as folder, quiet():
        run = recording.Run(Path(folder), {"steps": steps}, keep=2)
        run.prepare(resume=False)
        loop.train(sd, net, learned, None, run, recipe, score_every=early, checkpoint_every=early)
        kept = Path(folder) / f"checkpoint-{early:08d}.pt"
        state = torch.load(kept if kept.is_file() else run.checkpoint, map_location="cpu", weights_only=True)
    moments = [moment["exp_avg"] for moment in state["optimizer"]["state"].values()]
    return torch.cat([moment.double().flatten() for moment in moments]), {row["step"]: row["loss"] for row in run.rows[1:]}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside `with`, what a run prints, its bar too, is not seen: ours is."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def whole_float32() -> Iterator[None]:
    """Inside `with`, CUDA computes float32 in float32; PyTorch lets its convolutions round to TF32, 11 bits."""
    parts = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [part.allow_tf32 for part in parts]
    try:
        for part in parts:
            part.allow_tf32 = False
        yield
    finally:
        for part, allowed in zip(parts, before, strict=True):
            part.allow_tf32 = allowed


def has(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether a device computes in a precision at all: a convolution is tried."""
    try:
        x = torch.ones(1, 1, 4, 4, device=device, dtype=dtype)
        return torch.nn.functional.conv2d(x, x[..., :3, :3]).cpu().float().isfinite().all().item()
    except (RuntimeError, TypeError):
        return False


def seconds(device: torch.device, learned: training.Examples, num_steps: int, count: int) -> tuple[float, float]:
    """Return how long a picture of `num_steps` steps and a training step of 4 samples take, float32, when warm."""
    sd, net = fresh(device)
    draw(sd, net, 1)
    start = time.perf_counter()
    draw(sd, net, num_steps)  # ends with a picture on the CPU
    drawn = time.perf_counter() - start
    recipe, abar = training.Recipe(count, lr=3e-4), sd.alphas_cumprod.to(device)
    groups = training.apply_regime(sd.unet, net.train(), recipe)
    optimizer = torch.optim.AdamW(groups, fused=loop.fused(device, recipe))
    for step in range(count + 2):
        batch = learned.batch(0, step, recipe.batch_size, recipe.drop_prompt, device)
        loss = training.controlnet_loss(sd.unet, net, batch, abar).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step == count + 1:  # reading the loss waits for the device, two warm steps first
            loss.item()
            start, end = (time.perf_counter(), None) if step == 1 else (start, time.perf_counter())
    return drawn, (end - start) / count


class Comparisons:
    """The rows of a report, filled part by part; an error of the device is a row, too.

    num_steps, steps, early  see `check`
    """

    def __init__(self, device: torch.device, num_steps: int, steps: int, early: int):
        self.device, self.num_steps, self.steps, self.early = device, num_steps, steps, early
        self.rows: list[Row] = []
        self.halves = [name for name in ("bfloat16", "float16") if has(device, getattr(torch, name))]
        self.tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
        self.bar = tqdm(total=5 + self.tf32 + 2 * len(self.halves), desc="checking", unit="part")

    def part(self, what: str, compute: Callable):
        """Compute a part, shown by the bar; None, and the reason, if the device gives an error."""
        self.bar.set_postfix_str(what)
        try:
            return compute(), ""
        except (RuntimeError, TypeError, ValueError) as error:
            return None, f"{type(error).__name__}: {' '.join(str(error).replace('|', '/').split())[:200]}"
        finally:
            self.bar.update()

    def compare(self, kind: str, precision: str, what: str, off: float | None, reason: str) -> None:
        limit, why = LIMITS[kind, precision]
        self.rows.append(Row(f"{what} ({UNITS[kind]})", off, limit, reason or why))

    def pictures(self, exact: Tensor) -> None:
        """Compare the picture in each precision with the CPU's in float64."""
        ways = [("float32", "float32", whole_float32), *[(half, half, contextlib.nullcontext) for half in self.halves]]
        for precision, name, setting in ways + [("float32", "tf32", contextlib.nullcontext)] * self.tf32:
            dtype = getattr(torch, precision)
            with setting():
                found, reason = self.part(f"picture, {name}", lambda d=dtype: picture(self.device, d, self.num_steps))
            off = None if found is None else (found - exact).square().mean().sqrt().item()
            self.compare("picture", name, f"picture, {'float32 with TF32' if name == 'tf32' else name}", off, reason)

    def trainings(self, learned: training.Examples, gradients: Tensor, losses: dict[int, float]) -> None:
        """Compare a training in each precision with the CPU's in float32, which had these gradients and losses."""
        for precision in ("float32", *self.halves):
            count = self.steps if precision == "float32" else self.early
            settings = (self.device, learned, precision, count, self.early)
            with whole_float32():
                found, reason = self.part(f"training, {precision}", lambda s=settings: trained(*s))
            far = None if found is None else ((found[0] - gradients).norm() / gradients.norm()).item()
            off = None if found is None else max(abs(value / losses[at] - 1) for at, value in found[1].items())
            self.compare("loss", precision, f"loss of {count} training steps, {precision}", off, reason)
            self.compare("gradients", precision, f"gradients of {self.early} training steps, {precision}", far, reason)


def check(device: torch.device, num_steps: int = 10, steps: int = 20, early: int = 8, timed: int = 5) -> tuple[str, bool]:
    """Compare a device with the CPU; return the report in Markdown, and whether everything held.

    num_steps  of the compared picture; the timed one takes twice as many
    steps      of the training in float32; in half precision `early`
    early      after so many the gradients are compared
    timed      training steps whose time is taken
    """
    cpu, found = torch.device("cpu"), Comparisons(device, num_steps, steps, early)
    found.bar.set_postfix_str("the CPU's part")
    exact, sd = picture(cpu, torch.float64, num_steps), fresh(cpu)[0]
    with quiet():
        learned = examples.from_scenes(sd, toy.scenes(8, "train", "canny"), "canny")
    gradients, losses = trained(cpu, learned, "float32", steps, early)
    found.bar.update()
    found.pictures(exact)
    found.trainings(learned, gradients, losses)
    times = [
        found.part(f"times, {where.type}", lambda d=where: seconds(d, learned, 2 * num_steps, timed))[0]
        for where in (cpu, device)
    ]
    found.bar.close()
    holds = all(row.holds for row in found.rows)
    return report(device, found.rows, times, found.halves, 2 * num_steps), holds


def report(device: torch.device, rows: list[Row], times: list, halves: list[str], num_steps: int) -> str:
    """Return the Markdown that people paste into an issue: machine, comparisons, times."""
    missing = [name for name in ("bfloat16", "float16") if name not in halves]
    lines = [f"### minicn check-device: {device.type}, {sum(row.holds for row in rows)} of {len(rows)} comparisons hold", ""]
    lines += ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in machine(device).items())]
    lines += [f"| not on this device | {', '.join(missing)} |"] if missing else []
    lines += ["", "| against the CPU | off by | at most | verdict | why that much, or what went wrong |"]
    lines += ["| --- | --- | --- | --- | --- |", *map(str, rows), ""]
    lines += ["| seconds, float32 as PyTorch is set | CPU | device |", "| --- | --- | --- |"]
    for i, what in enumerate((f"a picture, {num_steps} steps, guided, one ControlNet", "a training step, 4 samples")):
        lines.append(f"| {what} | " + " | ".join("-" if pair is None else f"{pair[i]:.3g}" for pair in times) + " |")
    return "\n".join(lines)


def machine(device: torch.device) -> dict[str, str]:
    """Return what computes, in words."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    capability = torch.backends.cpu.get_cpu_capability()
    found = {"system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}"}
    found["CPU"] = f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used, {capability}"
    found["device"] = device.type
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = f"{properties.total_memory / 1e9:.0f} GB, capability {properties.major}.{properties.minor}"
        found["device"] = f"{properties.name}, {memory}, CUDA {torch.version.cuda or torch.version.hip}"
    elif device.type == "mps":
        found["device"] = f"MPS, macOS {platform.mac_ver()[0]}, {platform.machine()}"
    return found | {"torch, minicn": f"{torch.__version__}, {minicn.__version__}"}
