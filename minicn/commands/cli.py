"""What the commands share: devices, options of many, output folders, errors in one line."""

import argparse
import contextlib
import ctypes
import io
import itertools
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import torch

from minicn import threads
from minicn.checkpoints import files
from minicn.commands.options import Formatter, Parser, number, parser, whole  # noqa: F401
from minicn.conditions import images

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODEL = 'a diffusers folder, an ldm checkpoint, a Hugging Face repository (owner/name), or "toy", the small model that ships'
STATUS, MEMINFO = Path("/proc/self/status"), Path("/proc/meminfo")
CONTAINER = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # versions 2 and 1
MEMORY_ENDS = re.compile(  # in PyTorch's words for each device and library, and numpy's
    "(allocate|out of|enough) memory|calculation overflowed|multiplication overflow|unpacking long|bad_alloc|"
    "nvalid buffer size|could not (create|execute) a (primitive|memory)|array is too big|aximum allowed dimension"
)
REMEDY = re.compile(r"\((--[a-z-]+), [\w.=]+\)")  # as "(--fit, conditions.fit)": an option, and what it is in Python
SIZES = "batch_size resolution num_images height width count scenes pictures".split()


def device(name: str) -> torch.device:
    """Return the device of a name; "auto" is cuda, mps or cpu, the first that is available.

    Raises ValueError for a device that PyTorch does not know or this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(name)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} is not available: use auto, cpu, cuda or mps") from error
    if chosen.type == "meta":
        raise ValueError("device 'meta' computes nothing: use auto, cpu, cuda or mps")
    return chosen


def add_device(add: Callable) -> None:
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


def add_tokenizer(add: Callable) -> None:
    add("--tokenizer", help="folder with vocab.json and merges.txt, for a single file (default: CLIP's from the cache)")


def add_weights(add: Callable) -> None:
    add("--variant", help="of a folder's weights, as fp16")
    add("--ema", action="store_true", help="of a file that holds both, take the moving average of the U-Net's weights")


def add_threads(add: Callable) -> None:
    add("--threads", type=whole(1, 1024), help="threads to compute with (default: all; narrow models: the fastest number)")


def pace(wanted: int | None, *models: torch.nn.Module) -> threads.Pace:
    """Return the pace for a loop of steps of these models; a number of threads that is settled holds at once."""
    found = threads.candidates(wanted, sum(p.numel() for model in models for p in model.parameters()))
    if len(found) == 1:
        torch.set_num_threads(found[0])
    return threads.Pace(found)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next tensor, instead of giving it back to the system each time.

    On CPUs that saves about a tenth of a training step at full width: new pages are filled with zeros first. It holds for
    the whole process, so the command lines call it, and the library does not. GNU's C library alone knows it.
    """
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(mmap_max, 0)
        library.mallopt(trim_threshold, 2**31 - 1)


def free(name: str) -> Path:
    """Return the first of NAME.png, NAME-2.png, ... of which the folder holds none, nor pictures numbered after it."""
    path = Path(name)
    names = (path.with_stem(path.stem + f"-{i}" * (i > 1)) for i in itertools.count(1))
    return next(each for each in names if not any(Path().glob(f"{each.stem}*{each.suffix}")))


def check_picture(path: Path, *inputs: Path | None) -> None:
    """Raise ValueError, before any work, for a picture that could not be written afterwards, or would replace an input."""
    if path.is_dir():
        raise ValueError(f"output {path} is a folder: name a file in it, as {path / 'out.png'}")
    images.format_of(path)
    if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
        raise ValueError(f"output {path} exists and is not writable as a file: name another file")
    if path.exists() and any(given is not None and given.exists() and given.samefile(path) for given in inputs):
        raise ValueError(f"output {path} is also read, and would be lost: name another file")
    if not path.parent.is_dir():
        raise ValueError(f"output {path} is in a folder that does not exist: make {path.parent} first")
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Raise ValueError unless a folder can be made and written; leave nothing that was not there before."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"output {folder} cannot be made: {existing} is not a folder; name another --output")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"output {folder} cannot be written: no permission in {existing}; name another --output")


def kilobytes(path: Path, name: str) -> int:
    """Return an entry of one of Linux's /proc tables, in bytes."""
    return next(int(line.split()[1]) * 1024 for line in path.read_text().splitlines() if line.startswith(name))


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free; None where neither device nor system reports them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu" or not MEMINFO.is_file():
        return None
    limits = [kilobytes(MEMINFO, "MemAvailable")]
    for path in CONTAINER:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            limits.append(int(path.read_text()))
    return min(limits)


def check_memory(device: torch.device, need: int, what: str) -> None:
    """Raise ValueError, before the work, if it needs more bytes than are free: where memory ends, a system may just kill.

    need  a lower bound
    """
    free = free_memory(device)
    if free is not None and need > free + (kilobytes(MEMINFO, "SwapFree") if device.type == "cpu" else 0):
        raise ValueError(
            f"{what} needs at least {need / 1e9:,.1f} GB of memory, but {free / 1e9:,.1f} GB are free: take less"
        )


def out_of_memory(error: Exception, args: argparse.Namespace) -> str | None:
    """Return what asked for how much memory, and what to make smaller; None for an error of another kind."""
    if isinstance(error.__cause__, ValueError):  # what a file claims is no memory that ends
        return None
    if not (isinstance(error, (MemoryError, OverflowError)) or MEMORY_ENDS.search(str(error))):
        return None
    asked = re.search(r"(tried|unable) to allocate [\d.,]+ ?\w+", str(error), re.IGNORECASE)
    given = [f"--{name.replace('_', '-')} {size}" for name in SIZES if (size := getattr(args, name, None))]
    amount = f" ({asked[0].lower()})" if asked else ""
    return f"out of memory{amount}: take less than {' and '.join(given) or 'this'}, and smaller pictures"


def spoken(message: object) -> str:
    """Return a message of the library as a line for the command line: it names the option, not what it is in Python."""
    return files.printable(REMEDY.sub(r"(\1)", str(message)))


def show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Print minicn's own warnings as one line; other libraries' warnings are for developers."""
    if Path(__file__).parents[1] in Path(filename).parents:
        print(f"note: {spoken(message)}", file=sys.stderr)


class Aside:
    """Standard error, without which the work goes on: it may be closed, or its disk full."""

    def __init__(self, stream: TextIO | None):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextlib.contextmanager
def polite_errors(args: argparse.Namespace, run: bool = False) -> Iterator[None]:
    """Turn what a user can fix into one line on standard error and exit status 2, Ctrl-C into 130.

    run  the output is a folder that --resume continues
    """
    warnings.showwarning = show_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a console's encoding does not have stops nothing
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs as an error, it also raises
    while (opened := os.open(os.devnull, os.O_RDWR)) < 3:  # in a closed standard stream's place, or a file would get it
        pass
    os.close(opened)
    with contextlib.redirect_stderr(Aside(sys.stderr)), _ended_by_signals():
        yield from _said(args, run)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Inside `with`, a signal to end is an exit like others, so that nothing half-written remains; not if it is ignored."""
    ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    ends = [end for end in ends if signal.getsignal(end) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():  # the only one that signals reach
        ends = []
    for end in ends:
        signal.signal(end, lambda end, _: sys.exit(128 + end))
    try:
        yield
    finally:
        for end in ends:
            signal.signal(end, signal.SIG_DFL)


def _said(args: argparse.Namespace, run: bool) -> Iterator[None]:
    """Do what `polite_errors` says, with a standard error that can be written."""
    try:
        yield
    except Exception as error:
        line = out_of_memory(error, args)
        if line is None and not isinstance(error, (ValueError, TypeError, OSError)):
            raise
        print(f"error: {spoken(line or error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        ending = ""
        if run:
            kept = (args.output / "checkpoint.pt").is_file()
            held = "a checkpoint, --resume continues" if kept else "no checkpoint yet: begin again"
            ending = f"; {args.output} holds {held}"
        print(f"stopped {stop}".rstrip() + ending, file=sys.stderr)
        sys.exit(130)
