"""Weights files, read without trusting them, and written whole or not at all.

Three containers: .safetensors, read by its own library; PyTorch's zip; PyTorch's older pickle (see `pickles`).
"""

import codecs
import contextlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minicn.checkpoints import pickles

State = dict[str, Tensor]


class WeightFile:
    """The tensors of one or several files, read on demand; `shapes` and `dtypes` need only the header.

    path      the file named by the user
    shapes    key: shape, of every tensor
    dtypes    key: "float32", "float16", ...
    metadata  strings that a .safetensors file may carry
    container in words, for people
    Raises ValueError for a file with a tensor whose name is no text of at most 500 characters, so that it can be shown.
    """

    container = "safetensors"

    def __init__(self, path: Path, get: Callable[[str], Tensor], shapes: dict, dtypes: dict, metadata: dict | None = None):
        self.path, self.get, self.shapes, self.dtypes, self.metadata = path, get, shapes, dtypes, metadata or {}
        for key in shapes:
            if len(key) > 500 or not key.isprintable():
                raise ValueError(f"{path} holds a tensor named {key!r:.100}, as no weight is: fetch it again")

    def __contains__(self, key: str) -> bool:
        return key in self.shapes

    def nbytes(self, key: str) -> int:
        return nbytes(self.shapes[key], self.dtypes[key])

    def weight(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor in the shape that a model has, which for a 1x1 convolution may be a linear layer's in the file.

        Raises ValueError, naming file and tensor, for another shape, or for what is no number or of fewer than 8 bits.
        """
        there, shape = self.shapes[key], tuple(shape)
        if there != shape and not (len(shape) == 4 and there == shape[:2] and shape[2:] == (1, 1)):
            raise ValueError(f"{self.path}: {key} has shape {there}, but expected {shape}")
        if self.dtypes[key] not in FLOATS:
            raise ValueError(
                f"{self.path}: {key} holds {self.dtypes[key]}, but weights are floating-point numbers of 8 to 64 bits"
            )
        return self.get(key).view(shape)


def nbytes(shape: tuple[int, ...], dtype: str) -> int:
    known = getattr(torch, dtype, None)
    return math.prod(shape) * (known.itemsize if isinstance(known, torch.dtype) else 1)


def finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity. A sum only reads; `isfinite` of each would write a mask."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32)))


def check_numbers(tensor: Tensor, what: str) -> None:
    if not finite(tensor):
        raise ValueError(f"{what} holds NaN or infinite values: the file is damaged, fetch it again")


def read(path: str | Path) -> State:
    """Return all tensors of a file. Raises what `open_weights` raises."""
    file = open_weights(path)
    return {key: file.get(key) for key in file.shapes}


HEADER_BYTES = 2**22  # of a .safetensors, at most; that of a whole Stable Diffusion with its moving average has 0.3 MB
FLOATS = {"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"}
SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


def open_weights(path: str | Path) -> WeightFile:
    """Open a weights file, or the index of a sharded one (*.index.json).

    Raises FileNotFoundError or ValueError, naming the file and the cause, for anything but a complete weights file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file: name a weights file")
    if path.name.endswith(".json"):
        return _open_shards(path)
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        raise ValueError(f"{path} is empty: fetch it again")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` where it came from")
    if head.lstrip().startswith(b"<"):
        raise ValueError(f"{path} is a web page, perhaps a login page, not weights: fetch it again")
    if head.startswith(b"PK\x03\x04") or (head[0] == 0x80 and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return _open_pickle(path)
    if head[8:9] == b"{":
        if int.from_bytes(head[:8], "little") > HEADER_BYTES:
            raise ValueError(f"{path} is not a complete .safetensors file (a header of more than 4 MB): fetch it again")
        return _open_safetensors(path)
    raise ValueError(f"{path} is not a weights file: it begins with {head[:8]!r}; name a .safetensors, .ckpt, .pth or .bin")


def _open_safetensors(path: Path) -> WeightFile:
    try:
        file = safe_open(path, framework="pt")
        shapes, dtypes = {}, {}
        for key in file.keys():  # noqa: SIM118
            view = file.get_slice(key)
            shapes[key] = tuple(view.get_shape())
            dtypes[key] = SAFETENSORS_DTYPES.get(view.get_dtype(), view.get_dtype())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete .safetensors file ({printable(error, 300)}): fetch it again") from error
    metadata, maps = file.metadata(), {}

    def get(key: str) -> Tensor:
        """Return a tensor that lies in the memory-mapped file.

        A mapping, and what was read from it, counts as used memory as long as one of its tensors is alive. So there is a
        new one every 256 MB, and convolutions, which are copied into another layout, are mapped apart from tensors that
        stay (as 1x1 convolutions do).
        """
        copied = len(shapes[key]) == 4 and shapes[key][-1] > 1
        mapped, used = maps.get(copied, (None, math.inf))
        size = nbytes(shapes[key], dtypes[key])  # not of the WeightFile: in a circle with it, mappings would stay
        if used + size > 256e6:
            mapped, used = safe_open(path, framework="pt"), 0
        maps[copied] = mapped, used + size
        return mapped.get_tensor(key)

    return WeightFile(path, get, shapes, dtypes, metadata)


def _open_pickle(path: Path) -> WeightFile:
    tensors, container = pickles.read(path)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    dtypes = {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in tensors.items()}
    opened = WeightFile(path, tensors.__getitem__, shapes, dtypes)
    opened.container = container
    return opened


def _open_shards(path: Path) -> WeightFile:
    index = read_json(path)
    names = index.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{path} is not an index of shards: it has no weight_map")
    shards = {}
    for name in sorted(set(names.values())):
        if Path(name).name != name or name.endswith(".json") or not name.isprintable():
            raise ValueError(f"{path} names {name!r:.200}, which is not a file beside it, or another index: not opened")
        shards[name] = open_weights(path.parent / name)
    for key, name in names.items():
        if key not in shards[name]:
            raise ValueError(f"{path} expects {key!r:.200} in {name!r:.200}, which does not hold it: fetch the shards again")
    return WeightFile(
        path,
        lambda key: shards[names[key]].get(key),
        {key: shards[name].shapes[key] for key, name in names.items()},
        {key: shards[name].dtypes[key] for key, name in names.items()},
    )


def find_weights(folder: Path, names: tuple[str, ...], variant: str | None = None) -> Path:
    """Return the weights file in a diffusers folder: .safetensors before .bin, one file before shards.

    names    without extension, e.g. "diffusion_pytorch_model"
    variant  "fp16" for model.fp16.safetensors; None: the plain file, else whichever variant is there
    Raises FileNotFoundError if there is none.
    """
    endings = [".safetensors", ".safetensors.index{}.json", ".bin", ".bin.index{}.json"]
    variants = [f".{variant}"] if variant else [""]
    for pick in variants:
        for ending in endings:
            for name in names:
                path = folder / (f"{name}{ending.format(pick)}" if "{}" in ending else f"{name}{pick}{ending}")
                if path.is_file():
                    return path
    if not variant:
        for name in names:
            for path in sorted(folder.glob(f"{name}.*")):
                if path.suffix in (".safetensors", ".bin") and "-of-" not in path.name:
                    return path
                if ".index." in path.name and path.suffix == ".json":
                    return path
    wanted = f"{names[0]}{variants[0]}.safetensors"
    raise FileNotFoundError(f"{folder} holds no {wanted} (nor .bin, nor shards): name another, or fetch it again")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a name under which to write a file, or a new folder, that becomes `path` when `with` ends without an error.

    The name lies in a fresh folder beside `path`, so nothing that a user has is touched, and no link is followed.
    Raises OSError, saying why, if it cannot be written: nothing half-written remains, and what was there is intact.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".minicn-", dir=path.parent, ignore_cleanup_errors=True) as fresh:
            yield Path(fresh, path.name)
            os.replace(Path(fresh, path.name), path)
    except (OSError, RuntimeError, SafetensorError) as error:  # PyTorch and safetensors have their own for a full disk
        first: BaseException = error  # a folder's error has that of a file in it as its cause, and that one the system's
        while first.__cause__ is not None:
            first = first.__cause__
        reason = getattr(first, "strerror", None) or printable(first, 100)
        raise OSError(
            f"{path} cannot be written ({reason}): free space, or name another place; what was there is intact"
        ) from error


@contextlib.contextmanager
def filling(folder: str | Path) -> Iterator[Path]:
    """Give a folder to write files into, which a new or empty `folder` becomes when `with` ends without an error.

    One that holds something already is given as it is. Raises OSError as `replacing` does.
    """
    folder = Path(folder)
    if folder.is_symlink() or (folder.is_dir() and any(folder.iterdir())):
        yield folder
    else:
        with replacing(folder) as new:
            new.mkdir()
            yield new


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Give a folder to write files into, which `folder` becomes when `with` ends without an error.

    Raises ValueError if that one holds something already, OSError as `replacing` does.
    """
    folder = Path(os.path.realpath(folder))  # resolve() raises RuntimeError for a link to itself
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already, and not empty: name another folder")
    with replacing(folder) as new:
        new.mkdir()
        yield new


def write(path: str | Path, state: State, metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file: one of this name is always whole. Raises ValueError for NaN and infinity."""
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    for key, tensor in state.items():
        if tensor.is_floating_point() and not finite(tensor):
            raise ValueError(f"{Path(path).name} is not written: in {tensor.dtype}, {key} holds NaN or infinite values")
    with replacing(path) as new:
        new.touch()
        mode = new.stat().st_mode  # what the user's umask gives; safetensors makes its files private
        safetensors.torch.save_file(state, new, {"format": "pt", **(metadata or {})})
        new.chmod(mode)


TEXT_BYTES = 2**24  # of a text file that is read whole, at most; CLIP's largest, tokenizer.json, has 3.6 MB
DEPTH = 32  # of lists and objects within each other, at most


def read_text(path: str | Path, what: str, most: int = TEXT_BYTES) -> str:
    """Read an ordinary text file: UTF-8, with or without a byte-order mark, or UTF-16 with one.

    what  the file is meant to be, in words
    most  bytes, at most
    Raises FileNotFoundError or ValueError, naming it, also for pipes and devices, which might never end, and for more bytes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file: name {what}")
    with open(path, "rb") as file:
        raw = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None
    if raw is None or len(raw) > most:
        raise ValueError(f"{path} is not {what}: it is larger than {most >> 20} MB")
    try:
        return raw.decode("utf-16" if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not {what} in UTF-8: {error}") from error


def parse_json(text: str, where: str | Path, what: str = "JSON") -> Any:
    """Return what a text in JSON says. Raises ValueError, naming `where`, for another or one nested more than 32 deep."""
    try:
        content = json.loads(text, strict=False)  # a tab may stand in a string as it is
        depth, parts = 0, [content]
    except RecursionError:
        depth, parts = DEPTH, [None]
    except ValueError as error:
        remedy = "; in paths, write / instead of \\" if "escape" in str(error) else ""
        raise ValueError(f"{where} is not {what}: {error}{remedy}") from error
    while parts and depth < DEPTH:
        inner = (part.values() if isinstance(part, dict) else part for part in parts if isinstance(part, dict | list))
        depth, parts = depth + 1, [value for values in inner for value in values]
    if parts:
        raise ValueError(f"{where} is not {what}: lists or objects are nested more than {DEPTH} deep")
    return content


def read_json(path: str | Path, what: str = "a JSON configuration") -> dict:
    """Read a JSON object. Raises FileNotFoundError or ValueError naming the file, as `read_text` and `parse_json` do."""
    content = parse_json(read_text(path, what), path, what)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not {what}: expected an object, {{...}}")
    return content


def printable(text: object, longest: int = 600) -> str:
    """Return what came from a file, or may have, as one line that a terminal only shows.

    Control characters, those that turn the direction of writing, and halves of characters become escapes (\\x1b); of a
    long text the middle is left out.
    """

    def cut(line: str) -> str:
        return line if len(line) <= longest else f"{line[: longest * 2 // 3]} ... {line[-longest // 3 :]}"

    line = re.sub(r"[^\S ]\s*", " ", cut(str(text)))  # a new line, with the indentation of the next
    return cut("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))


def write_json(path: str | Path, config: dict) -> None:
    with replacing(path) as new:
        new.write_text(json.dumps(config, indent=2, default=int) + "\n", "utf-8")  # numpy's integers are no JSON
