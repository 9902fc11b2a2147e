"""PyTorch's files, read without trusting them.

A pickle is a program. Here it can make tensors, dictionaries of names, lists and numbers; every class and function that it
asks for beyond is a stub. It can neither reserve memory that its bytes do not fill nor work longer than they are many.
(torch.load's own "weights_only" calls nothing, either, but a key of nested tuples keeps it busy for ever.)
"""

import contextlib
import io
import math
import pickle
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ZIP = b"PK\x03\x04"
PICKLE_BYTES = 2**22  # of a pickle apart from its tensors, at most; a whole Stable Diffusion's has 0.3 MB


def load(path: Path, most: int = PICKLE_BYTES) -> tuple[Any, str]:
    """Return what a file holds, its tensors if possible still on disk, and the container in words.

    most  bytes of the pickle, at most
    Raises ValueError, naming the file, for one that is damaged or holds what weights do not need.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        zipped = file.read(4) == ZIP
    if zipped:
        check_zip(path, size, most)
    # Tensors of a zip are read from disk when they are used; not where the extension would mislead PyTorch.
    mapped = zipped and path.suffix != ".safetensors"
    module = types.SimpleNamespace(Unpickler=type("Unpickler", (Inert,), {"size": size, "most": most}), __name__="inert")
    module.load = lambda file, **options: module.Unpickler(file, **options).load()
    with complete(path), Unnumbered(path) as file:
        source = str(path) if mapped else file
        content = torch.load(source, map_location="cpu", weights_only=False, pickle_module=module, mmap=mapped)
    return content, "PyTorch's zip" if zipped else "PyTorch's old container"


def read(path: Path) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a dictionary, or of its "state_dict", and the container in words.

    Raises ValueError, naming the file, for one that is damaged, holds no tensors, or claims larger ones than it has bytes.
    """
    content, container = load(path)
    for _ in range(8):  # a file may contain itself
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
    content = content if isinstance(content, dict) else {}
    for key, value in content.items():
        if isinstance(value, Odd):
            raise ValueError(f"{path}: {key!r:.200} is not a plain tensor ({value!r:.100}): save it as one")
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor) and type(key) is str}
    if not tensors:
        raise ValueError(f"{path} holds no dictionary of tensors: name a weights file")
    size, claimed = path.stat().st_size, sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
    if claimed > 2 * size:  # twice: two names may share a tensor
        raise ValueError(f"{path} has {size:,} bytes, but claims tensors of {claimed:,}: fetch it again")
    return tensors, container


@contextlib.contextmanager
def complete(path: Path) -> Iterator[None]:
    """Inside `with`, turn whatever a crafted or truncated file makes a reader raise into a ValueError that names it."""
    try:
        yield
    except Exception as error:
        reason = " ".join((str(error) if " " in str(error) else repr(error)).split())
        reason = reason.encode("unicode_escape").decode()[:200]  # it may quote what is in the file
        raise ValueError(f"{path} is not a complete PyTorch file ({reason}): fetch it again") from error


def check_zip(path: Path, size: int, most: int) -> None:
    """Raise ValueError for a zip that PyTorch did not write: it maps tensors as they lie in the file."""
    with complete(path):
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
        with torch.serialization._open_zipfile_reader(str(path)) as reader:
            program = torch.serialization._is_torchscript_zip(reader)  # torch.load would run it
    packed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ValueError(
            f"{path} is compressed ({packed[0]!r:.99}), which PyTorch's files are not: unpack it, or fetch it again"
        )
    if program:
        raise ValueError(f"{path} is a TorchScript program, not weights: save its state_dict")
    if sum(record.file_size for record in records) > size:
        raise ValueError(f"{path} has records that overlap, which PyTorch's files do not have: fetch it again")
    if max((record.file_size for record in records if record.filename.endswith(".pkl")), default=0) > most:
        raise ValueError(f"{path} has more than {most >> 20} MB beside its tensors: save its state_dict alone")


class Unnumbered(io.FileIO):
    """A file without a number: PyTorch would unpack one with a number if it can also be read as a tar."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")


class Row(tuple):
    """A tuple that cannot be a key: to hash tuples of tuples of tuples may take for ever."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]


class Stub:
    """Stands for every class and function that weights do not need."""


STUB = Stub()  # and for what they give


class Odd(str):
    """Stands for a tensor that is not plain; the function that would make it."""


def tensor(storage, offset, size, stride, *rest) -> Tensor:
    return typed_tensor(storage, offset, size, stride, False, {}, storage.dtype)


def typed_tensor(storage, offset, size, stride, requires_grad, hooks, dtype, *rest) -> Tensor:
    return torch.empty(0, dtype=dtype).set_(storage._untyped_storage, offset, tuple(size), tuple(stride))


def call(function: object, values: object) -> Any:
    if isinstance(function, types.FunctionType) and type(values) is Row:  # no function but those of CALLED comes here
        return function(*values)
    return STUB


CALLED: dict[tuple[str, str], Callable] = {  # all that a file can call
    ("collections", "OrderedDict"): lambda items=(): {name: value for name, value in items if type(name) is str},
    ("torch", "Size"): lambda sizes=(): sizes,
    ("torch._utils", "_rebuild_tensor"): tensor,
    ("torch._utils", "_rebuild_tensor_v2"): tensor,
    ("torch._utils", "_rebuild_tensor_v3"): typed_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *rest: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *rest: data,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda function, kind, values, state: call(function, values),
}
TYPES = {("torch", name): dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}
TYPES |= {("torch.storage", "UntypedStorage"): torch.UntypedStorage}


class Inert(pickle._Unpickler):
    """Python's unpickler in Python, for torch.load, with some instructions replaced. `size` is the file's, in bytes."""

    size, most = 0, PICKLE_BYTES

    def __init__(self, file, **options):
        self.file, self.start, self.work, self.claimed = file, file.tell(), 0, 0
        self.storages: dict[str, int] = {}  # their bytes
        self.buffer = io.BytesIO(file.read(self.most))
        super().__init__(self.buffer, **options)

    def load(self) -> Any:
        result = super().load()
        self.file.seek(self.start + self.buffer.tell())
        return result

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name.startswith("_rebuild") and (module, name) not in CALLED:
            return lambda *values: Odd(name)
        return CALLED.get((module, name)) or TYPES.get((module, name), Stub)

    def refuse(self) -> None:
        raise pickle.UnpicklingError("it has instructions that weights do not need")

    def load_binpersid(self) -> None:
        """Let PyTorch make a storage, if all of them together have no more bytes than the file."""
        row = self.stack[-1]
        if type(row) is not Row or len(row) < 5 or row[0] != "storage" or type(row[2]) is not str or type(row[4]) is not int:
            self.refuse()
        size = row[4] * getattr(row[1], "dtype", torch.uint8).itemsize
        more = max(0, size - self.storages.get(row[2], 0))
        self.storages[row[2]] = self.storages.get(row[2], 0) + more
        self.claimed += more
        if self.claimed > self.size:
            raise pickle.UnpicklingError(f"its tensors would have {self.claimed:,} bytes, but it has {self.size:,}")
        super().load_binpersid()

    def load_reduce(self) -> None:
        values = self.stack.pop()
        if type(values) is Row:  # a list of a million, asked for a million times, would take for ever
            self.work += sum(len(value) for value in values if isinstance(value, list | dict | Row))
        if self.work > PICKLE_BYTES // 4:
            raise pickle.UnpicklingError("it asks for the same again and again")
        self.stack[-1] = call(self.stack[-1], values)

    def load_newobj(self) -> None:
        self.stack[-2:] = [STUB]

    def load_newobj_ex(self) -> None:
        self.stack[-3:] = [STUB]

    def load_build(self) -> None:
        self.stack.pop()

    def load_empty_tuple(self) -> None:
        self.append(Row())

    def load_tuple1(self) -> None:
        self.stack[-1:] = [Row(self.stack[-1:])]

    def load_tuple2(self) -> None:
        self.stack[-2:] = [Row(self.stack[-2:])]

    def load_tuple3(self) -> None:
        self.stack[-3:] = [Row(self.stack[-3:])]

    def load_tuple(self) -> None:
        values = self.pop_mark()  # before self.append is looked up, which it exchanges
        self.append(Row(values))

    def load_empty_set(self) -> None:
        self.append(STUB)

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(STUB)

    def load_additems(self) -> None:
        self.pop_mark()

    def load_setitem(self) -> None:
        self.put(self.stack.pop(-2), self.stack.pop())

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.put(key, value)

    def put(self, key: object, value: object) -> None:
        """Keep what has a name or a number; nothing else that a dictionary of weights or moments may hold is needed."""
        if type(self.stack[-1]) is dict and (type(key) is str or type(key) is int and abs(key) < 2**63):
            self.stack[-1][key] = value

    def load_append(self) -> None:
        value = self.stack.pop()
        if type(self.stack[-1]) is list:
            self.stack[-1].append(value)

    def load_appends(self) -> None:
        values = self.pop_mark()
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(values)

    load_persid = load_inst = load_obj = load_ext1 = load_ext2 = load_ext4 = refuse  # what no file of weights has,
    load_long4 = load_bytearray8 = load_next_buffer = load_readonly_buffer = refuse  # and what reserves memory


Inert.dispatch = {code: getattr(Inert, load.__name__) for code, load in pickle._Unpickler.dispatch.items()}
