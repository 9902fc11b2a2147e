"""What a training step of the toy costs by how its threads wait, alone and beside busy neighbours.

python benchmarks/threads.py            about four minutes; ratios to the quickest setting on the quiet machine

Every setting runs in a process of its own, since OpenMP reads its variables once; a neighbour is a process that computes
without end. "as users run it" is what minicn does by itself: bounded spinning, and a number of threads by the clock.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

SETTINGS = {  # name: environment, options
    "torch's own default": ({"GOMP_SPINCOUNT": "", "KMP_BLOCKTIME": "200"}, ["--all"]),
    "spin 10,000 turns": ({"GOMP_SPINCOUNT": "10000"}, ["--all"]),
    "spin 1,000 turns": ({"GOMP_SPINCOUNT": "1000"}, ["--all"]),
    "wait passively": ({"OMP_WAIT_POLICY": "PASSIVE"}, ["--all"]),
    "one thread": ({"OMP_NUM_THREADS": "1"}, ["--all"]),
    "as users run it": ({}, []),
}


def child(steps: int, fixed: bool) -> None:
    """Print the median and the mean seconds of a step."""
    import minicn.threads  # noqa: F401  (before torch)

    # isort: split
    import torch

    from minicn import ControlNet, StableDiffusion, fast, training
    from minicn.commands import cli

    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    sd = StableDiffusion.load("toy")
    sd.prepare()
    net = ControlNet.from_unet(sd.unet, hint_channels=(8, 16, 32, 64)).train().to(memory_format=torch.channels_last)
    fast.prepare(net)
    optimizer = torch.optim.AdamW(training.apply_regime(sd.unet, net, training.Recipe(steps=1)), fused=True)
    context = sd.encode_prompts(["a red ball", ""]).float()
    examples = training.Examples(
        torch.randn(16, 4, 16, 16), torch.randint(256, (16, 3, 128, 128), dtype=torch.uint8), context, torch.zeros(16).long()
    )
    pace, seconds = cli.pace(torch.get_num_threads() if fixed else None, sd.unet, net), []
    for step in range(steps):
        began = time.perf_counter()
        with pace:
            batch = examples.batch(0, step, 4, 0.5, torch.device("cpu"))
            training.controlnet_loss(sd.unet, net, batch, sd.alphas_cumprod).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    later = seconds[4 * len(pace.numbers) :]
    print(json.dumps({"median": statistics.median(later), "mean": statistics.fmean(seconds[2:])}))


def measure(name: str, neighbours: int, steps: int) -> float:
    """Return the median seconds of a step under a setting beside some busy processes."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    environment, options = SETTINGS[name]
    environment = {k: v for k, v in environment.items() if v}
    if name == "torch's own default":
        environment["KMP_BLOCKTIME"] = "200"  # set, so that minicn leaves all alone
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(neighbours)]
    try:
        command = [sys.executable, __file__, "--child", "--steps", str(steps), *options]
        done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True)
    finally:
        for process in busy:
            process.kill()
    return json.loads(done.stdout.splitlines()[-1])["median"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40, help="steps of each process (default: 40)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--all", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.steps, args.all)
        return
    table = {}
    for name in SETTINGS:
        row = table[name] = []
        for neighbours in (0, 1, 2):
            steps = args.steps if neighbours == 0 or "default" not in name else max(args.steps // 5, 8)
            row.append(measure(name, neighbours, steps))
    quiet = min(row[0] for row in table.values())
    print(f"a step: {quiet:.3f} s with the quickest setting on {os.cpu_count()} quiet cores; all as ratios to it\n")
    print("| | quiet | beside one busy process | beside two |\n| --- | --- | --- | --- |")
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(f"{seconds / quiet:.2f}" for seconds in row) + " |")


if __name__ == "__main__":
    main()
