"""Measure what the toy reaches, and print a table: following, scene accuracy, prompt, seconds a picture, import time.

    python benchmarks/toy.py                                     the weights that ship
    python benchmarks/toy.py runs/seed0/controlnet.safetensors ...   ControlNets of your own, too
    python benchmarks/toy.py --condition depth runs/depth            of another condition, measured by what it is

200 held-out scenes (test scenes from 1000 on, never used in training; for poses those with people), 20 DDIM steps.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time

import torch
from tqdm import tqdm

from minicn import ControlNet, StableDiffusion, conditions, toy
from minicn.toy import judging, measures
from minicn.trainer import recording

COUNTS = {"1": "one thing", "2": "two things", "3": "three things"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("controlnets", nargs="*", help="names, files or folders (default: toy-CONDITION)")
    parser.add_argument("--condition", choices=conditions.NAMES, default="canny", help="of these ControlNets")
    parser.add_argument("--model", default="toy", help="diffusers folder or toy")
    parser.add_argument("--scenes", type=int, default=200, help="held-out scenes")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="1 is off")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    return parser.parse_args()


def bar(batches, what):
    return tqdm(batches, desc=what, unit="batch", leave=False)


def draw(sd, scenes, guidance_scale, condition="canny", net=None, batch=25):
    """Draw each scene from its caption with its own seed row; with its hint if a ControlNet is given."""
    images = []
    for i in bar(range(0, len(scenes), batch), "drawing pictures"):
        chunk = scenes[i : i + batch]
        hints = recording.stack([scene.hint(condition) for scene in chunk]).float() / 255
        images += sd.generate(
            [scene.caption for scene in chunk],
            hint=None if net is None else hints,
            controlnet=net,
            guidance_scale=guidance_scale,
            seed=i,
        )
    return images


def main() -> None:
    args = parse_args()
    torch.set_flush_denormal(True)
    sd = StableDiffusion.load(args.model, device=args.device)
    scenes = list(toy.scenes(args.scenes, "test", args.condition, first=1000))
    truths = [scene.image for scene in scenes]
    rows = []

    latents = recording.encode(sd.vae, recording.stack(truths))
    through_vae = [image for chunk in bar(latents.split(25), "decoding") for image in sd.decode_latents(chunk.to(sd.device))]
    measure, what = measures.measure(args.condition), args.condition
    ceiling = measures.mean(measure, through_vae, scenes)
    plain = draw(sd, scenes, args.guidance_scale)
    floor = measures.mean(measure, plain, scenes)
    others = measures.mean(measure, [*through_vae[1:], through_vae[0]], scenes)
    rows += [(f"{what}, ceiling (truth through the autoencoder)", ceiling), (f"{what}, floor (no control)", floor)]
    rows += [(f"{what}, another scene's truth through the autoencoder", others)]
    reached, possible = measures.prompt_share(plain, scenes), measures.prompt_share(truths, scenes)
    rows += [("prompt, base without control / true pictures", reached / possible)]
    judge, sheets = judging.Judge.load(), {"ceiling": through_vae, "base without control": plain}
    for name in args.controlnets or [f"toy-{args.condition}"]:
        net = ControlNet.load(name, unet=sd.unet, device=args.device)
        images = draw(sd, scenes, args.guidance_scale, args.condition, net)
        value = measures.mean(measure, images, scenes)
        rows.append((f"{what}, {name}", value))
        rows.append((f"following score, {name}", measures.score(value, floor, ceiling)))
        rows.append((f"prompt, {name} / true pictures", measures.prompt_share(images, scenes) / possible))
        sheets[name] = images
    for name, images in sheets.items():
        found = judging.scene_accuracy(judge, images, scenes)
        rows += [(f"scene accuracy, {name}, {COUNTS.get(of, of)}", value) for of, value in found.items()]

    hint = scenes[0].hint(args.condition)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        sd.generate(scenes[0].caption, hint=hint, controlnet=net)
        seconds.append(time.perf_counter() - start)
    rows.append((f"seconds, one controlled picture, {args.device}, {torch.get_num_threads()} threads", min(seconds)))
    loads = [[import_seconds(name) for _ in range(5)] for name in ("torch", "torch, minicn")]
    rows.append(("seconds, import minicn beyond import torch", statistics.median(loads[1]) - statistics.median(loads[0])))
    rows.append(("peak memory of this script, GB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6))
    for name, value in rows:
        print(f"| {name} | {value:.3f} |")


def import_seconds(names: str) -> float:
    code = f"import time; t = time.perf_counter(); import {names}; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
