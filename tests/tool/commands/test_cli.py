"""What all commands share: errors in one line, memory that ends, consoles that cannot print."""

import argparse
import io
import os
import struct
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

import train_toy
from minicn import __main__, pipeline
from minicn.commands import cli

CPU = torch.device("cpu")


def guarded(work, **options):
    """Do something as a command does it."""
    with cli.polite_errors(argparse.Namespace(**options)):
        work()


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize("kept", [True, False])
def test_a_stopped_run_says_how_it_goes_on(kept, tmp_path, capsys):
    """--resume where there is a checkpoint, else the same command again."""
    if kept:
        (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(SystemExit) as stopped, cli.polite_errors(argparse.Namespace(output=tmp_path), run=True):
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    words = "a checkpoint, --resume continues" if kept else "no checkpoint yet: begin again"
    assert capsys.readouterr().err == f"stopped; {tmp_path} holds {words}\n"


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (lambda: torch.empty(2**55), "(tried to allocate 144115188075855872 bytes)"),
        (lambda: torch.randn(2**40, 2**40), ""),
        (lambda: torch.empty(2**70), ""),
        (lambda: torch.zeros(1).expand(2**60).contiguous(), ""),
        (lambda: np.zeros(2**55), "(unable to allocate 256. pib)"),
        (lambda: np.zeros((2**40, 2**40)), ""),
        (lambda: bytearray(2**60), ""),
        (lambda: len(range(2**70)), ""),
        (raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")), "(tried to allocate 2.00 gib)"),
        (raising(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB). Tried to allocate 9 GB")), "9 gb"),
        (raising(RuntimeError("Invalid buffer size: 96.00 GiB")), ""),
        (raising(RuntimeError("std::bad_alloc")), ""),
        (raising(RuntimeError("could not create a primitive")), ""),
    ],
)
def test_memory_that_ends_is_one_line_with_a_remedy(refused, work, words):
    """Whatever library asked for it, on any device, also for sizes that no memory holds."""
    line = refused(lambda: guarded(work, height=80_000, num_images=1, resolution=None))
    assert line.startswith("error: out of memory")
    assert words in line
    assert line.endswith(": take less than --num-images 1 and --height 80000, and smaller pictures")


CLAIMS = ["(2**62,)", "(4611686018427387904,)", "(10**9, 10**9)", "(1000000, 1000000)", "(-3, 4)", "(1e3, 3)", "('a',)"]


@pytest.mark.parametrize("shape", [*CLAIMS, "(" * 300 + ")" * 300])
def test_what_a_file_claims_is_no_memory_that_ends(tmp_path, refused, shape):
    """An array of 2**62 numbers in 200 bytes: the file is at fault, and named."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': %s, }\n" % shape.encode()
    (tmp_path / "d.npy").write_bytes(b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + bytes(72))
    line = refused(__main__.main, ["condition", "depth", str(tmp_path / "d.npy"), str(tmp_path / "hint.png")])
    assert line.startswith(f"error: {tmp_path / 'd.npy'} is not a readable .npy file: ")


@pytest.mark.parametrize("count", ["0", "-1", "1000001", "1e3", "nan"])
def test_no_more_data_are_made_than_a_folder_holds(tmp_path, refused, count):
    line = refused(__main__.main, ["make-data", str(tmp_path / "data"), "--count", count])
    assert line.startswith("error: argument --count: expected an integer from 1 to 1000000, got ")
    assert not (tmp_path / "data").exists()


def test_a_mistake_of_ours_is_no_users(refused):
    with pytest.raises(RuntimeError, match="shapes"):
        guarded(raising(RuntimeError("shapes do not fit")))


def test_work_for_which_memory_does_not_suffice_is_refused_before(tmp_path, monkeypatch):
    """The system's free memory counts, or a container's limit; where memory ends, a system may kill without a word."""
    free = cli.free_memory(CPU)
    cli.check_memory(CPU, 1000, "this")
    if free is None:
        pytest.skip("this system does not report its memory")
    with pytest.raises(ValueError, match=r"this needs at least 1,000,000\.0 GB of memory, but \S+ GB are free: take less"):
        cli.check_memory(CPU, 10**15, "this")
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "other").write_text("max\n")
    monkeypatch.setattr(cli, "CONTAINER", (tmp_path / "other", tmp_path / "memory.max", tmp_path / "none"))
    assert cli.free_memory(CPU) == 1000


def test_pictures_that_no_memory_holds_are_not_begun(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(pipeline.StableDiffusion, "generate", lambda *_, **__: pytest.fail("begun"))
    command = ["generate", "--prompt", "a", "--height", "800000", "--width", "800000", "--output", str(tmp_path / "o.png")]
    assert "--num-images 1 of 800000x800000 pixels needs at least 40,960.0 GB" in refused(__main__.main, command)
    command = ["--batch-size", str(10**9), "--output", str(tmp_path / "run")]
    assert "--batch-size 1000000000 needs at least 524,288.0 GB" in refused(train_toy.main, command)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", ["9223372036854775808", "9" * 300, "9" * 5000])
def test_numbers_beyond_64_bits_are_refused(tmp_path, refused, number):
    line = refused(train_toy.main, ["--steps", number, "--output", str(tmp_path / "out")])
    assert "expected an integer from 1" in line
    assert len(line) < 1000


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_a_console_cannot_print_stops_nothing(monkeypatch, encoding):
    """Other consoles' encodings: what they lack is escaped."""
    console = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", console)
    guarded(lambda: print("a café \u4e2d \ud800"))
    console.flush()
    text = console.buffer.getvalue().decode(encoding)
    assert text.startswith("a caf")
    assert text.endswith("\\ud800\n")


class Gone(io.StringIO):
    def write(self, text):
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("stream", [Gone(), None])
def test_a_console_that_is_gone_or_closed_stops_nothing(monkeypatch, stream):
    """Neither notes nor bars, which go there; what is wrong still has its exit status."""

    def work():
        cli.show_warning("a note", UserWarning, cli.__file__, 1)
        done.extend(tqdm(range(3), mininterval=0))

    monkeypatch.setattr(sys, "stderr", stream)
    done = []
    with warnings.catch_warnings():
        guarded(work)
    assert done == [0, 1, 2]
    with pytest.raises(SystemExit, match="2"):
        guarded(raising(ValueError("what is wrong")))
    assert sys.stderr is stream


@pytest.mark.skipif(os.name != "posix", reason="a shell closes the streams")
def test_closed_standard_streams_do_not_lose_a_picture(tmp_path):
    """A file that is written must not get one of their numbers, to which libraries write, too."""
    command = [sys.executable, "-m", "minicn", *"generate --prompt a --num-steps 1 --height 32 --width 32 --output".split()]
    shell = ["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', *command, str(tmp_path / "a.png")]
    assert subprocess.run(shell, timeout=200).returncode == 0
    assert Image.open(tmp_path / "a.png").size == (32, 32)
