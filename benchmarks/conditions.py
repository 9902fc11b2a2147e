"""Compare `conditions.canny` with OpenCV's on photographs: agreement, time, memory; and time the other conditions.

    python benchmarks/conditions.py

The photographs are the samples in scikit-image's wheel, enlarged for timing. Times are medians; peak memory is measured in
a fresh process that does nothing else. Needs opencv-python-headless and scikit-image.
"""

import argparse
import importlib.util
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from minicn import conditions

PHOTOGRAPHS = ("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
THRESHOLDS = ((100, 200), (50, 100), (1, 255), (30, 400), (150, 150))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="runs of each, after a warm-up run")
    parser.add_argument("--size", type=int, default=1024, help="side of the timed images, pixels")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)  # in a process of its own
    return parser.parse_args()


def photographs() -> dict[str, np.ndarray]:
    """Read the sample photographs."""
    folder = Path(importlib.util.find_spec("skimage").submodule_search_locations[0]) / "data"
    return {name: np.asarray(conditions.load_image(folder / name)) for name in PHOTOGRAPHS}


def enlarged(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def peak() -> float:
    """Return the peak memory of this process, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def seconds(function: Callable, repeats: int) -> float:
    """Return the median time of a call, after a warm-up call."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    args = parse_args()
    pictures = photographs()
    large = {name: enlarged(image, args.size) for name, image in pictures.items()}
    if args.memory:
        before = peak()
        for image in large.values():
            conditions.canny(image)
        print(
            f"peak memory, canny at {args.size}x{args.size}: {peak():.0f} MB (before: {before:.0f} MB, most of it PyTorch's)"
        )
        return
    import cv2

    print(f"{os.cpu_count()} cores\n")
    print(f"| photograph | pixels | lowest IoU with cv2.Canny of {len(THRESHOLDS)} thresholds | seconds | cv2 |")
    print("| --- | --- | --- | --- | --- |")
    for name, image in pictures.items():
        unions = []
        for low, high in THRESHOLDS:
            got, want = conditions.canny(image, low, high)[..., 0] > 0, cv2.Canny(image, low, high) > 0
            unions.append((got & want).sum() / max(1, (got | want).sum()))
        ours = seconds(lambda image=large[name]: conditions.canny(image), args.repeats)
        theirs = seconds(lambda image=large[name]: cv2.Canny(image, 100, 200), args.repeats)
        print(f"| {name} | {image.shape[1]}x{image.shape[0]} | {min(unions):.4f} | {ours:.3f} | {theirs:.3f} |")
    print(f"\nseconds: at {args.size}x{args.size} pixels, thresholds 100 and 200\n")
    subprocess.run([sys.executable, __file__, "--memory", "--size", str(args.size)], check=True)
    image = enlarged(pictures["astronaut.png"], 512)
    soft = conditions.hed(image, conditions.soft_edges)
    people = np.concatenate([np.random.default_rng(0).uniform(0, 512, (2, 18, 2)), np.ones((2, 18, 1))], axis=2)
    labels = image[..., 0] // 2
    others = {
        "hough": lambda: conditions.hough(image),
        "hed, without a network": lambda: conditions.hed(image, conditions.soft_edges),
        "fake_scribble": lambda: conditions.fake_scribble(soft),
        "lineart": lambda: conditions.lineart(image),
        "openpose, 2 people": lambda: conditions.openpose(people, 512, 512),
        "openpifpaf, 2 people": lambda: conditions.openpifpaf(people[:, :17], 512, 512),
        "ade20k": lambda: conditions.ade20k(labels),
        "normal_from_depth": lambda: conditions.normal_from_depth(labels),
        "depth": lambda: conditions.depth(labels),
        "official_resize to 768": lambda: conditions.official_resize(image, 768),
    }
    print("\n| at 512x512 | seconds |\n| --- | --- |")
    for name, function in others.items():
        print(f"| {name} | {seconds(function, args.repeats):.3f} |")


if __name__ == "__main__":
    main()
