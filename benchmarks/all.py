"""Measure every ratio of speed and memory that docs/claims.md states, in one go, and keep them in results.json.

    python benchmarks/all.py --folder /tmp/full                      hours on two cores: all of them, at full width
    python benchmarks/all.py --folder /tmp/full --only toy load      some of them; the others stay as they were measured
    python benchmarks/all.py --quick                                 minutes: narrow models, each ratio against a limit

`--quick` writes nothing; it exits with 1, and says which, if a ratio is above its limit. The limits leave room for another
machine and for a busy one: they are there to find what takes several times as long as it should. Needs the extra `parity`.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import speed
import torch
import training
from PIL import Image

from minicn import toy

Figure = tuple[str, float, float]  # what is compared, and the two sides of the ratio
RESULTS = Path(__file__).parent / "results.json"
LIMITS = {  # of --quick
    "toy: import minicn beyond torch / import torch": 0.3,
    "toy: load the model and toy-canny / import torch": 0.5,
    "toy: first picture / second picture": 1.6,
    "toy: `minicn generate`, whole process / import torch": 4.5,
    "load, float32: minicn / diffusers": 1.5,  # a tenth of a second here: 0.6 or 1.0, by how the libraries lie on disk
    "guided step, float32: minicn / diffusers": 1.3,
    "train a ControlNet: minicn / diffusers, time": 1.3,
}
FIRST = """
import json, time
clock, times = time.process_time, [time.process_time()]
import torch; times.append(clock())
import minicn; times.append(clock())
sd = minicn.StableDiffusion.load("toy"); net = minicn.ControlNet.load("toy-canny", unet=sd.unet); times.append(clock())
scene = minicn.toy.scene(1, "test")
for _ in range(2):
    sd.generate(scene.caption, hint=scene.hint("canny"), controlnet=net); times.append(clock())
print(json.dumps([b - a for a, b in zip(times, times[1:])]))
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--folder", type=Path, help="where the random weights are, or are to be made; needed but for --quick"
    )
    parser.add_argument("--only", choices=GROUPS, nargs="+", default=list(GROUPS), help="what to measure")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turn")
    parser.add_argument("--quick", action="store_true", help="narrow models, in minutes, against limits")
    parser.add_argument("--table", action="store_true", help="only print results.json as docs/claims.md shows it")
    args = parser.parse_args(argv)
    if not args.quick and not args.table and args.folder is None:
        parser.error("--folder is missing: name one with 6 GB, or give --quick")
    return args


def median(rows: list[list[float]]) -> list[float]:
    return [sorted(column)[len(column) // 2] for column in zip(*rows, strict=True)]


def toy_figures(args) -> Iterator[Figure]:
    """What a person waits for on the toy, in fresh processes of one thread; CPU seconds, as neighbours lengthen others."""
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        hint = Path(folder) / "hint.png"
        Image.fromarray(toy.scene(1, "test").hint("canny")).save(hint)
        generate = [sys.executable, "-m", "minicn", "generate", "--controlnet", "toy-canny", "--hint", hint]
        generate += ["--prompt", "a blue person on a white background", "--output", Path(folder) / "out.png"]
        for _ in range(args.repeats):
            done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, check=True, env=one_thread)
            before = cpu_seconds_of_children()
            subprocess.run(generate, capture_output=True, check=True, env=one_thread)
            rows.append([*json.loads(done.stdout), cpu_seconds_of_children() - before])
    import_torch, import_minicn, load, first, second, command = median(rows)
    yield "toy: import minicn beyond torch / import torch", import_minicn, import_torch
    yield "toy: load the model and toy-canny / import torch", load, import_torch
    yield "toy: first picture / second picture", first, second
    yield "toy: `minicn generate`, whole process / import torch", command, import_torch


def cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def beside_diffusers(args, what: str, name: str, row: int = 0) -> Iterator[Figure]:
    """One of speed.py's tables, in float32 and bfloat16."""
    settings = ["--folder", str(args.folder), "--what", what, "--repeats", str(args.repeats)]
    settings += ["--narrow", "--size", "128", "--dtype", "float32"] if args.quick else []
    settings = speed.parse_args(settings)
    speed.make_weights(settings.folder, settings.narrow)
    for dtype in settings.dtype:
        _, a, b = speed.compare(settings, dtype)[row]
        yield f"{name}, {dtype}: minicn / diffusers", a, b


def training_figures(args) -> Iterator[Figure]:
    """training.py's table: ControlNet and all of the U-Net, connections, diffusers."""
    settings = ["--rows", "ours", "diffusers", "--narrow", "--size", "128", "--batch-size", "4", "--steps", "10"]
    rows = training.measure(training.parse_args(settings if args.quick else []))
    names = [("train a ControlNet: minicn / diffusers", "ours", "diffusers")]
    if not args.quick:
        names += [
            ("train a ControlNet / all of the U-Net", "controlnet", "plain"),
            ("train a ControlNet: all connected / only the middle", "controlnet", "middle"),
        ]
    for name, a, b in names:
        yield f"{name}, time", rows[a]["seconds"], rows[b]["seconds"]
        yield f"{name}, memory", rows[a]["memory"], rows[b]["memory"]


GROUPS = {
    "toy": toy_figures,
    "load": lambda args: beside_diffusers(args, "load", "load"),
    "step": lambda args: beside_diffusers(args, "step", "guided step"),
    "picture": lambda args: beside_diffusers(args, "picture", "20-step picture"),
    "memory": lambda args: beside_diffusers(args, "memory", "peak memory of a picture"),
    "training": training_figures,
}
QUICK = ("toy", "load", "step", "training")


def machine() -> str:
    """Name this machine as people would: its processor, what it can, and its cores."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    names = [line.partition(": ")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    units = [name for name, flag in (("AVX-512", "avx512f"), ("AMX", "amx_tile")) if f" {flag} " in f"{text} "]
    processor = names[0] if names else platform.processor() or platform.machine()
    return f"{processor}, {' and '.join(units) or 'no AVX-512'}, {os.cpu_count()} cores"


def commit() -> str:
    """Return the commit that is measured, with "+" if files differ from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, cwd=RESULTS.parent)
    return done.stdout.strip() or "unknown"


def keep(figures: list[Figure]) -> None:
    """Write what was measured into results.json, in the place of this machine's earlier figures of the same names."""
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    about = {"commit": commit(), "threads": torch.get_num_threads(), **versions}
    mine = results.setdefault(machine(), {})
    for name, a, b in figures:
        mine[name] = {"ratio": round(a / b, 3), "sides": [float(f"{a:.4g}"), float(f"{b:.4g}")], **about}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


def table(results: dict[str, dict]) -> list[str]:
    """Return the lines of docs/claims.md: a ratio a row, a machine a column."""
    lines = [["ratio", *results], ["---"] * (1 + len(results))]
    for name in dict.fromkeys(name for figures in results.values() for name in figures):
        found = [figures[name]["ratio"] if name in figures else "-" for figures in results.values()]
        lines.append([name, *(f"{ratio:.2f}" if isinstance(ratio, float) else ratio for ratio in found)])
    return [f"| {' | '.join(cells)} |" for cells in lines]


def main() -> int:
    args = parse_args()
    if args.table:
        print("\n".join(table(json.loads(RESULTS.read_text("utf-8")))))
        return 0
    print(f"{machine()}, {torch.get_num_threads()} threads, commit {commit()}, torch {torch.__version__}")
    too_slow = []
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = Path(temporary) if args.quick else args.folder
        for group in args.only:
            if args.quick and group not in QUICK:
                continue
            figures = list(GROUPS[group](args))
            for name, a, b in figures:
                limit = LIMITS.get(name) if args.quick else None
                allowed = "" if limit is None else f", at most {limit:g}"
                print(f"{name}: {a:.3g} / {b:.3g} = {a / b:.2f}{allowed}", flush=True)
                if limit is not None and not a / b <= limit:
                    too_slow.append(f"{name} is {a / b:.2f}, but at most {limit:g} was expected")
            if not args.quick:
                keep(figures)
    for line in too_slow:
        print(f"error: {line}", file=sys.stderr)
    return 1 if too_slow else 0


if __name__ == "__main__":
    sys.exit(main())
