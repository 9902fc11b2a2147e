"""Damaged files of every kind that minicn reads: bits flipped, cut, spliced, numbers exchanged.

python tests/tool/fuzzing.py                   10,000 of each kind, about an hour and a half on one core
python tests/tool/fuzzing.py --count 500 --only npy png

Each file is given to what reads such files, in this process. It may be read, or refused by ValueError or OSError (of which
FileNotFoundError is one), in at most a second and 500 MB. Anything else is printed, and kept in --keep; a kind that
crashes the interpreter is named, for every kind runs in a process of its own. The exit status is 1 if there was any.
"""

import argparse
import functools
import gzip
import io
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from minicn import toy
from minicn.checkpoints import configs, converting, files, hub, models
from minicn.conditions import making
from minicn.controlnet import ControlNet, ControlNetConfig
from minicn.pipeline import StableDiffusion
from minicn.tokenizer import Tokenizer
from minicn.trainer import data, examples, loop, progress, recording
from minicn.training import Recipe, apply_regime
from minicn.unet import UNet, UNetConfig

SECONDS, MEGABYTES = 1.0, 500
REFUSED = (ValueError, OSError)
NARROW = UNetConfig(model_channels=8, channel_mult=(1, 2), num_res_blocks=1, num_heads=2, context_dim=8, norm_num_groups=2)
# What stands in for a number, or a word, of a text file.
EXTREMES = '0 -1 1e999 NaN 4294967296 99999999999999999999999 null true [] {} [[]] 0.5 "" "\\u202e\\u0007" 1e-320'.split()


class Kind(NamedTuple):
    name: str  # of the file that is read
    seeds: list[bytes]
    read: Callable[[Path], object]


def mutate(seeds: list[bytes], draw: random.Random) -> bytes:
    """Return one of some files, damaged in one to three ways."""
    raw = bytearray(draw.choice(seeds))
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(raw) + 1)
        end = min(len(raw), at + 2 ** draw.randrange(12))
        way = draw.randrange(7)
        if way == 0:
            for _ in range(draw.randint(1, 8)):
                i = draw.randrange(len(raw) or 1)
                raw[i : i + 1] = bytes([(raw[i] if raw else 0) ^ 1 << draw.randrange(8)])
        elif way == 1:
            del raw[at:]
        elif way == 2:
            del raw[at:end]
        elif way == 3:
            raw[at:at] = raw[at:end] * draw.randint(1, 20)
        elif way == 4:
            other = draw.choice(seeds)
            raw[at:end] = other[(i := draw.randrange(len(other))) : i + end - at]
        elif way == 5:
            raw[at : at + 4] = draw.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"])
        else:
            words = list(re.finditer(rb"[-+.\w]+", bytes(raw[:10000])))
            if words:
                word = draw.choice(words)
                raw[word.start() : word.end()] = draw.choice(EXTREMES).encode()
    return bytes(raw)


def saved(save: Callable, *args, **options) -> bytes:
    """Return what a function that takes a file as its last argument writes into it."""
    buffer = io.BytesIO()
    save(*args, buffer, **options)
    return buffer.getvalue()


@functools.cache
def model() -> tuple[StableDiffusion, ControlNet]:
    return StableDiffusion.load("toy"), ControlNet(ControlNetConfig(NARROW, hint_channels=(4, 4, 4, 4)))


# What is damaged, and who reads it


def weights(suffix: str) -> Kind:
    """A ControlNet's weights, as `inspect` and `ControlNet.load` read them."""
    folder, state = Path(tempfile.mkdtemp()), model()[1].half().state_dict()
    if suffix == "safetensors":
        model()[1].save(folder / "a.safetensors")
        seeds = [(folder / "a.safetensors").read_bytes(), safetensors.torch.save(dict(list(state.items())[:20]))]
    else:
        seeds = [saved(torch.save, {"state_dict": state}, _use_new_zipfile_serialization=new) for new in (False, True)]

    def read(path: Path) -> None:
        for line in converting.describe(path):
            assert line.isprintable(), line
        if suffix == "safetensors":
            ControlNet.load(path)
        else:
            files.read(path)

    return Kind(f"net.{suffix}", seeds, read)


def npy() -> Kind:
    """An array of depths."""
    draw = np.random.default_rng(0)
    arrays = [draw.random((12, 16)), draw.integers(0, 60000, (12, 16)).astype("u2"), draw.random((12, 16, 1))]
    read = functools.partial(making.make, "depth")
    return Kind("a.npy", [saved(lambda file, a=a: np.save(file, a)) for a in arrays], read)


def picture(suffix: str) -> Kind:
    """A picture, as a hint's source."""
    image = Image.fromarray(toy.scene(0).image).resize((48, 32))
    exif = Image.Exif()
    exif[0x0112], exif[0x0131] = 6, "a camera"
    modes = {"jpeg": ["RGB", "L", "CMYK"], "ppm": ["RGB", "L"], "bmp": ["RGB", "L", "P"]}.get(
        suffix, ["RGB", "RGBA", "L", "P"]
    )
    modes = ["RGB", "RGBA"] if suffix in ("webp", "avif") else modes
    options = {} if suffix in ("bmp", "ppm", "gif") else {"exif": exif}
    seeds = [saved(lambda file, m=m: image.convert(m).save(file, suffix, **options)) for m in modes]
    return Kind(f"a.{suffix}", seeds, lambda path: making.make("canny", path))


def map_of(name: str) -> Kind:
    """A map of numbers: labels, or depth of 16 bits."""
    values = np.random.default_rng(0).integers(0, 150, (32, 48))
    made = [values.astype("u1"), (values * 400 if name == "depth" else values).astype("u2")]
    pictures = [saved(lambda file, a=a, s=s: Image.fromarray(a).save(file, s)) for a in made for s in ("png", "tiff")]
    return Kind("map.png", pictures, functools.partial(making.make, "depth" if name == "depth" else "ade20k"))


def part(name: str) -> Kind:
    """The configuration of a part of the toy, beside its weights, or of its noise schedule."""
    file = "scheduler_config.json" if name == "scheduler" else "config.json"

    def read(path: Path) -> None:
        if name == "scheduler":
            write(path.parent / name / file, path.read_bytes())
            configs.check_scheduler(path.parent)
        else:
            models.load_model(name, folder_with(path, hub.TOY_BASE / name))

    return Kind(file, [(hub.TOY_BASE / name / file).read_bytes()], read)


def shards() -> Kind:
    """The index of a model's shards, beside them."""
    folder = Path(tempfile.mkdtemp())
    model()[1].save(folder / "a.safetensors")
    index = {"weight_map": dict.fromkeys(files.open_weights(folder / "a.safetensors").shapes, "a.safetensors")}

    def read(path: Path) -> None:
        folder_with(path, folder)
        for line in converting.describe(path):
            assert line.isprintable(), line

    return Kind("net.safetensors.index.json", [json.dumps(index).encode()], read)


def merges() -> Kind:
    """OpenAI's packed list of merges."""
    text = "\n".join(["#version", *(f"{a} {b}" for a in "abcdefgh" for b in "ijklmnop")])
    packed = [gzip.compress(text.encode(), level) for level in (1, 9)]
    return Kind("merges.txt.gz", packed, lambda path: Tokenizer.load(path).encode("abi, " + "x" * 500))


def config() -> Kind:
    """A model's config.json, beside its weights."""
    folder = Path(tempfile.mkdtemp())
    model()[1].save(folder, layout="diffusers")
    return Kind(
        "config.json", [(folder / "config.json").read_bytes()], lambda path: ControlNet.load(folder_with(path, folder))
    )


def folder_with(path: Path, others: Path) -> Path:
    """Link the other files of a folder beside a damaged one; return its folder."""
    for other in others.iterdir():
        link = path.parent / other.name
        if other.is_file() and not link.exists():
            link.symlink_to(other)
    return path.parent


def tokenizer(name: str) -> Kind:
    folder = Path(tempfile.mkdtemp())
    Tokenizer.from_merges([("a", "b"), ("ab", "c</w>"), ("r", "e"), ("re", "d</w>")]).save(folder)
    if name == "tokenizer.json":
        parts = {
            "type": "BPE",
            "vocab": json.loads((folder / "vocab.json").read_text("utf-8")),
            "merges": ["a b", "ab c</w>"],
        }
        (folder / "vocab.json").unlink(), (folder / "merges.txt").unlink()
        (folder / name).write_text(json.dumps({"version": "1.0", "model": parts}), "utf-8")

    def read(path: Path) -> None:
        found = Tokenizer.load(folder_with(path, folder))
        found.decode(found.encode("abc red, " + "x" * 500))

    return Kind(name, [(folder / name).read_bytes()], read)


def table(name: str) -> Kind:
    """The table of a data folder, and its first pairs."""
    folder = Path(tempfile.mkdtemp()) / "data"
    data.write_pairs(folder, data.circles(3, size=16))
    rows = [json.loads(line) for line in (folder / "prompt.json").read_text("utf-8").splitlines()]
    names = {"prompt.json": ("source", "target", "prompt"), "metadata.jsonl": ("conditioning_image", "file_name", "text")}[
        name
    ]
    lines = [json.dumps(dict(zip(names, (row["source"], row["target"], "a\u2028b \x1b[2J"), strict=True))) for row in rows]
    (folder / "prompt.json").unlink()

    def read(path: Path) -> None:
        for part in ("source", "target"):
            if not (path.parent / part).exists():
                (path.parent / part).symlink_to(folder / part)
        for pair in data.read_pairs(path.parent)[:2]:
            data.load_pair(pair, 16)

    return Kind(name, ["\n".join(lines).encode(), "\r\n".join(lines).encode("utf-8-sig")], read)


def key_points(name: str) -> Kind:
    if name == "openpose":
        points = [value for i in range(18) for value in (8 + i, 60 - 2 * i, 1.0)]
        people = {"people": [{"pose_keypoints_2d": points}], "canvas_width": 64, "canvas_height": 64}
    else:
        points = [value for i in range(17) for value in (8 + i, 60 - 2 * i, 1.0)]
        people = [{"keypoints": points, "bbox": [0, 0, 64, 64], "score": 0.9, "category_id": 1}]
    return Kind("points.json", [json.dumps(people).encode()], lambda path: making.make(name, path, size=(64, 64)))


def checkpoint() -> Kind:
    """The checkpoint of a run, which is resumed."""
    sd, recipe, folder = model()[0], Recipe(steps=9), Path(tempfile.mkdtemp())
    sd.unet, net = UNet(NARROW), ControlNet(ControlNetConfig(NARROW, hint_channels=(4, 4, 4, 4)))
    fresh = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    def resumed(path: Path) -> progress.Progress:
        net.load_state_dict(fresh)
        run, optimizer = recording.Run(path, {"steps": 9}), torch.optim.AdamW(apply_regime(sd.unet, net, recipe))
        return progress.Progress(run, sd, net, optimizer, recipe, None)

    run = resumed(folder)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    run.optimizer.step()
    run.step = 3
    run.save()

    def read(path: Path) -> None:
        under_way = resumed(path.parent)
        under_way.resume()
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        under_way.optimizer.step()  # reads and writes the moments

    return Kind("checkpoint.pt", [(folder / "checkpoint.pt").read_bytes()], read)


def encoded() -> Kind:
    """What a run has encoded, for --resume."""
    sd, folder = model()[0], Path(tempfile.mkdtemp())
    data.write_pairs(folder / "data", data.circles(2, size=16))
    pairs = data.read_pairs(folder / "data")
    examples.from_pairs(sd, pairs, 16, keep=folder / "kept")

    def read(path: Path) -> None:
        kept = examples.from_pairs(sd, pairs, 16, keep=path)
        kept.batch(0, 0, 2, 0.5, "cpu")

    return Kind("encoded.safetensors", [(folder / "kept").read_bytes()], read)


PICTURES = "png jpeg webp tiff bmp gif ppm avif".split()
KINDS: dict[str, Callable[[], Kind]] = {
    "safetensors": lambda: weights("safetensors"),
    "pth": lambda: weights("pth"),
    "npy": npy,
    **{suffix: functools.partial(picture, suffix) for suffix in PICTURES},
    **{name: functools.partial(map_of, name) for name in ("labels", "depth")},
    "config": config,
    **{name: functools.partial(part, name) for name in ("unet", "vae", "text_encoder", "scheduler")},
    "shards": shards,
    "gz": merges,
    **{name: functools.partial(tokenizer, name) for name in ("tokenizer.json", "vocab.json", "merges.txt")},
    **{name: functools.partial(table, name) for name in ("prompt.json", "metadata.jsonl")},
    **{name: functools.partial(key_points, name) for name in ("openpose", "openpifpaf")},
    "checkpoint": checkpoint,
    "encoded": encoded,
}


# Running them


def late(*_) -> None:
    raise TimeoutError("it takes longer than a minute")


def fuzz(name: str, count: int, seed: int, keep: Path | None = None) -> list[str]:
    """Read `count` damaged files of a kind; return what was wrong, a line each."""
    assert loop  # its import is no file's cost
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # a fault here must not take the machine
    kind, wrong, seen = KINDS[name](), [], set()
    with tempfile.TemporaryDirectory() as folder:
        kind.read(write(Path(folder) / "whole" / kind.name, kind.seeds[0]))
        signal.signal(signal.SIGALRM, late)
        for i in range(count):
            raw = mutate(kind.seeds, random.Random(f"{name} {seed} {i}"))
            path = write(Path(folder) / "damaged" / kind.name, raw)
            before, start = peak(), time.process_time()
            signal.alarm(60)
            try:
                kind.read(path)
                fault = None
            except REFUSED as error:
                fault = None if str(error).isprintable() else f"{type(error).__name__} with control characters: {error!r}"
                fault = fault if not isinstance(error, TimeoutError) else str(error)
            except BaseException as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                fault = f"{type(error).__name__}: {str(error)[:100]!r} ({Path(where.filename).name}, line {where.lineno})"
            signal.alarm(0)
            seconds, memory = time.process_time() - start, peak() - before
            if seconds > SECONDS or memory > MEGABYTES:
                fault = f"{seconds:.1f} s, {memory} MB"
            if fault:
                wrong.append(f"{name} {i}: {fault}")
                known = re.sub(r"\d+", "", fault)
                if keep and known not in seen:
                    write(keep / f"{name}-{i}-{kind.name}", raw)
                seen.add(known)
    return wrong


def write(path: Path, raw: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return path


def peak() -> int:
    """Return the most memory that this process has had, in MB (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10000, help="files of each kind (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="other files with another one (default: 0)")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds (default: all)")
    parser.add_argument("--keep", type=Path, help="folder for the first file of each fault")
    args = parser.parse_args()
    any_wrong, os.environ["TQDM_DISABLE"] = False, "1"  # bars of what reads
    for name in args.only:
        start = time.perf_counter()
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                wrong = pool.submit(fuzz, name, args.count, args.seed, args.keep).result()
            except BrokenProcessPool:
                wrong = [f"{name}: the interpreter crashed"]
        any_wrong |= bool(wrong)
        print(f"{name}: {args.count} files, {time.perf_counter() - start:.0f} s, {len(wrong)} wrong", flush=True)
        for line in wrong[:20]:
            print("   ", line, flush=True)
    return int(any_wrong)


if __name__ == "__main__":
    sys.exit(main())
