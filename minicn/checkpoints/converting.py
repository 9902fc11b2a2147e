"""What a file holds, in words, and the same model in another layout: `minicn inspect` and `minicn convert`.

Source of the transfer: the arithmetic of the official tool_transfer_control, copy + new base - old base.
"""

import collections
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from minicn.checkpoints import configs, files, hub, loading, weights
from minicn.checkpoints.models import MODELS, load_model, read_defaults, save_model
from minicn.controlnet import ControlNet
from minicn.pipeline import StableDiffusion
from minicn.tokenizer import Tokenizer
from minicn.unet import UNet

KINDS = ("model", "controlnet", "unet", "vae")


def open_contents(path: Path, variant: str | None = None) -> list[weights.Contents]:
    """Return what a file holds, or each weights file of a diffusers folder."""
    if path.is_file():
        return [weights.contents(files.open_weights(path))]
    folders = [path / kind for kind in MODELS if (path / kind).is_dir()] or [path]
    names = ("diffusion_pytorch_model", "model", "pytorch_model")
    return [weights.contents(files.open_weights(files.find_weights(folder, names, variant))) for folder in folders]


def describe(source: str | Path) -> Iterator[str]:
    """Yield lines that say what a file or folder holds, from its headers alone."""
    path = hub.resolve(source)
    for found in open_contents(path):
        yield f"{found.file.path}: {found.layout}, {found.file.container}"
        for kind, keys in found.parts.items():
            yield "  " + _row(weights.DISPLAY_NAMES[kind], found, keys)
        if found.ema:
            yield "  " + _row("U-Net, moving average", found, found.ema)
        if found.difference:
            yield "  a difference file: the copied layers must be added to those of a U-Net"
        if found.other:
            yield f"  {found.other} other tensors, which minicn does not use"


def _row(name: str, found: weights.Contents, keys: weights.Keys) -> str:
    count, size, kinds = 0, 0, set()
    for key in keys.values():
        count += math.prod(found.file.shapes[key])
        size += found.file.nbytes(key)
        kinds.add(found.file.dtypes[key])
    return f"{name}: {len(keys)} tensors, {count:,} parameters, {' and '.join(sorted(kinds))}, {size / 1e6:,.1f} MB"


def compare(source: str | Path, other: str | Path) -> Iterator[str]:
    """Yield lines that say in which tensors the U-Net of a source differs from that of a model."""
    mine = _unet(hub.resolve(source))
    different = weights.differences(mine, "unet", _base(other))
    yield f"{len(different)} of {len(mine.parts['unet'])} tensors of the U-Net differ from {other}" + ":" * bool(different)
    for name, _, words in different:
        yield f"  {name}: {words}"


def _unet(path: Path) -> weights.Contents:
    for found in open_contents(path):
        if "unet" in found.parts:
            return found
    raise ValueError(f"{path} holds no U-Net: name a model")


def _base(source: str) -> UNet:
    path = hub.resolve(source)
    return _load(path, _unet(path), "unet", torch.float32, None, False)


def check_destination(path: Path, layout: str) -> None:
    """Raise ValueError, before any work, for a destination that does not fit its layout or already holds something."""
    if layout == "ldm" and path.suffix != ".safetensors":
        raise ValueError(f"destination {path} must end in .safetensors: layout ldm is one file")
    if layout == "ldm" and path.is_dir():
        raise ValueError(f"destination {path} is a folder: layout ldm is one file")
    if layout == "ldm" and path.exists():
        raise ValueError(f"destination {path} exists already: name another file, or remove it")
    if layout == "diffusers" and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
        raise ValueError(f"destination {path} exists already: layout diffusers is a new folder")


def convert(
    source: str | Path,
    destination: Path,
    layout: str,
    *,
    dtype: torch.dtype | None = None,
    part: str | None = None,
    unet: str | None = None,
    transfer_to: str | None = None,
    transfer_from: str | None = None,
    tokenizer: str | None = None,
    variant: str | None = None,
    ema: bool = False,
) -> str:
    """Write a model in another layout and return a sentence that says what was written.

    part  one of KINDS; None: a ControlNet if there is one, else the whole model, else the one model that is there
    See `minicn convert --help` for the rest. Raises ValueError, naming the file, for what it does not hold.
    """
    path = hub.resolve(source, variant)
    if path.is_dir():
        configs.check_scheduler(path)
    held = {kind: contents for contents in open_contents(path, variant) for kind in contents.parts}
    if part is None:
        whole = all(kind in held for kind in MODELS)
        part = "controlnet" if "controlnet" in held else "model" if whole or len(held) > 1 else next(iter(held))
    if part not in KINDS:
        raise ValueError(f"{path} holds a text encoder alone, which is converted only as part of a whole model")
    wanted = tuple(MODELS) if part == "model" else (part,)
    absent = [weights.DISPLAY_NAMES[kind] for kind in wanted if kind not in held]
    if absent:
        there = ", ".join(weights.DISPLAY_NAMES[kind] for kind in held)
        raise ValueError(f"{path} holds no {' and no '.join(absent)}, only: {there} (--part names one to convert)")
    name = weights.DISPLAY_NAMES.get(part, "whole model")
    if transfer_to is not None and part != "controlnet":
        raise ValueError(f"--transfer-to moves a ControlNet, but what is converted from {path} is its {name}")
    if transfer_from is not None and transfer_to is None:
        raise ValueError("--transfer-from has no effect without --transfer-to: give the new base, too")
    keep = {kind: dtype or precision(held[kind], kind) for kind in wanted}
    if part == "controlnet":
        base = None if unet is None else _base(unet)
        net = ControlNet.load(path, unet=base, dtype=torch.float32 if transfer_to else keep[part], variant=variant)
        loading.check_finite(net)
        if transfer_to is not None:
            if transfer_from is None and "unet" not in held:
                raise ValueError(f"{path} holds no U-Net: name the base that it was trained on (--transfer-from)")
            transfer(net, _unet(hub.resolve(transfer_to)), _unet(hub.resolve(transfer_from) if transfer_from else path))
        net.save(destination, layout=layout, dtype=keep[part])
    else:
        models = {kind: _load(path, held[kind], kind, keep[kind], variant, ema and kind == "unet") for kind in wanted}
        if part == "model":
            words = _tokenizer(path, tokenizer) if layout == "diffusers" else None  # a single file has no place for it
            defaults = read_defaults(path, None if path.is_dir() else held["unet"])
            StableDiffusion(**models, tokenizer=words, defaults=defaults).save(destination, layout=layout)
        else:
            save_model(part, models[part], destination, layout)
    precisions = " and ".join(sorted({str(own).removeprefix("torch.") for own in keep.values()}))
    return f"{destination}: {name}, layout {layout}, {precisions}"


def _load(path: Path, found: weights.Contents, kind: str, dtype: torch.dtype, variant: str | None, ema: bool):
    """Load one model, and check every number."""
    at = path / kind if (path / kind).is_dir() else path
    model = load_model(kind, at if at.is_dir() else found, dtype, variant=variant, ema=ema)
    loading.check_finite(model)
    return model


def _tokenizer(path: Path, given: str | None) -> Tokenizer:
    """Return the tokenizer that was given, else the folder's own, else CLIP's."""
    if given is not None:
        return Tokenizer.load(hub.tokenizer_folder(given))
    return Tokenizer.load(path / "tokenizer" if path.is_dir() else hub.default_tokenizer())


def precision(found: weights.Contents, kind: str) -> torch.dtype:
    """Return the precision in which most weights of a model are stored."""
    counts = collections.Counter()
    for key in found.parts[kind].values():
        counts[found.file.dtypes[key]] += math.prod(found.file.shapes[key])
    common = counts.most_common(1)[0][0]
    return getattr(torch, common) if common in files.FLOATS else torch.float32


@torch.no_grad()
def transfer(net: ControlNet, new: weights.Contents, old: weights.Contents) -> None:
    """Move a ControlNet to another base, in place: add new - old to every copied tensor.

    Raises ValueError if a base has different shapes.
    """
    for name, tensor in net.state_dict().items():
        if name.startswith(("zero_convs.", "middle_block_out.", "input_hint_block.")):
            continue
        values = []
        for base in (new, old):
            key = base.parts["unet"].get(name)
            if key is None:
                raise ValueError(f"{base.file.path} has no {name} of shape {tuple(tensor.shape)}: the bases do not fit")
            values.append(base.file.weight(key, tensor.shape).float())
            files.check_numbers(values[-1], f"{base.file.path}: {key}")
        tensor += values[0] - values[1]
