"""Planted bugs: small edits of the source, each with the test that must then fail.

python tests/mutants.py                  all of them, some minutes on one core
python tests/mutants.py --dozen          a fixed dozen, as .ci/run does
python tests/mutants.py --only PATTERN   those whose file, words, or test match a regular expression
python tests/mutants.py --list           name them, run nothing

First the named tests run on an unchanged copy of the package, and must pass. Then each edit is made in that copy, its test
runs in a process of its own, which had PyTorch imported already, and the edit is taken back. A mutant is

    caught     its test fails
    survived   its test passes: the test is too weak
    broken     the edit no longer applies (its old text must occur exactly once in the file), the test is gone or cannot be
               collected, or it took longer than five minutes

The exit status is 1 if any survives or is broken. Every edit is checked for applying, also those that are not run.
"""

import argparse
import contextlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300  # longer than any test here takes
PRELOADED = "torch torch.distributed torch.utils.checkpoint safetensors.torch numpy PIL.Image regex ftfy tqdm pytest".split()


class Mutant(NamedTuple):
    file: str
    words: str  # what is wrong
    old: str  # must occur exactly once in the file
    new: str
    test: str  # name of the function that must fail, in whichever file it is; with [case], that case alone

    def __str__(self) -> str:
        return f"{self.file}: {self.words} ({self.test})"


# One copy of the package, an edit at a time


def copy_of_the_package(folder: Path) -> None:
    """Copy code, tests and settings; weights and other data become links."""

    def copy(source: str, destination: str) -> None:
        if source.endswith(".py"):
            shutil.copy2(source, destination)
        else:
            os.symlink(source, destination)

    for name in ("minicn", "tests"):
        shutil.copytree(ROOT / name, folder / name, copy_function=copy, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy2(file, folder)


@contextlib.contextmanager
def planted(mutant: Mutant, folder: Path):
    """Inside `with`, the copy has the bug."""
    file = folder / mutant.file
    whole, before = file.read_text("utf-8"), file.stat()
    file.write_text(whole.replace(mutant.old, mutant.new), "utf-8")
    os.utime(file, (before.st_atime, before.st_mtime + 10))  # or bytecode of the same size and second would be used
    try:
        yield
    finally:
        file.write_text(whole, "utf-8")
        os.utime(file, (before.st_atime, before.st_mtime))


def fault(mutant: Mutant, root: Path = ROOT) -> str:
    """Return why an edit does not apply; "" if it does."""
    file = root / mutant.file
    if not file.is_file():
        return f"there is no {mutant.file}"
    whole = file.read_text("utf-8")
    if whole.count(mutant.old) != 1:
        return f"the old text occurs {whole.count(mutant.old)} times, not once"
    try:
        compile(whole.replace(mutant.old, mutant.new), mutant.file, "exec")
    except SyntaxError as error:
        return f"the new text is no Python: {error}"
    return "" if nodes(mutant.test, root) else "there is no such test"


def nodes(test: str, root: Path = ROOT) -> list[str]:
    """Return what pytest calls a test function, in every file that defines one of this name."""
    name = re.compile(rf"^def {test.partition('[')[0]}\(", re.MULTILINE)
    files = sorted(file for file in (root / "tests").rglob("test_*.py") if name.search(file.read_text("utf-8")))
    return [f"{file.relative_to(root)}::{test}" for file in files]


# The tests, in processes that begin with PyTorch imported


def pytest_there(folder: Path, arguments: list[str], planted: bool) -> None:
    """Run pytest in the copy and exit with its status; what it prints goes to a file."""
    with open(folder / "output.txt", "w") as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = str(folder)
    sys.dont_write_bytecode = planted
    import pytest

    status = pytest.main([*arguments, "--basetemp", str(folder / "tmp"), "-q", "--tb=short", "-p", "no:cacheprovider"])
    used = Path(sys.modules["minicn"].__file__) if "minicn" in sys.modules else None
    if used is not None and folder not in used.parents:
        print(f"{used} was imported, not the copy")
        status = 3
    sys.stdout.flush()
    os._exit(int(status))


def status_of(folder: Path, arguments: list[str], planted: bool = True) -> int | None:
    """Return pytest's exit status: 0 passed, 1 failed, else it could not run; None if it took too long."""
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=pytest_there, args=(folder, arguments, planted))
    process.start()
    process.join(SECONDS if planted else None)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None
    return process.exitcode


def outcome(mutant: Mutant, folder: Path) -> tuple[str, str]:
    """Return caught, survived or broken, and why it is broken."""
    why = fault(mutant, folder)
    if why:
        return "broken", why
    with planted(mutant, folder):
        status = status_of(folder, ["-x", *nodes(mutant.test, folder)])
    if status is None:
        return "broken", f"the test took longer than {SECONDS} s"
    if status in (0, 1):
        return ("survived", "") if status == 0 else ("caught", "")
    lines = (folder / "output.txt").read_text("utf-8", "replace").strip().splitlines()
    return "broken", f"the test could not run: {' / '.join(lines[-4:])}"


def chosen(args: argparse.Namespace) -> list[Mutant]:
    """Return the mutants that the arguments ask for."""
    if args.dozen:
        return [m for m in MUTANTS if m.words in DOZEN]
    return [m for m in MUTANTS if re.search(args.only, str(m))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="those whose file, words or test match it")
    parser.add_argument("--dozen", action="store_true", help="a fixed dozen")
    parser.add_argument("--list", action="store_true", help="name them, run nothing")
    args = parser.parse_args(argv)
    mutants, start = chosen(args), time.time()
    if not mutants:
        parser.error(f"no mutant matches {args.only!r}: --list names them")
    if args.list:
        print("\n".join(map(str, mutants)))
        return 0
    counts = {"caught": 0, "survived": 0, "broken": 0}
    for mutant in MUTANTS:
        why = "" if mutant in mutants else fault(mutant)
        if why:
            counts["broken"] += 1
            print(f"broken    {mutant}: {why}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are tiny
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copy_of_the_package(folder)
        tests = sorted({node for mutant in mutants for node in nodes(mutant.test)})
        print(f"{len(tests)} tests without a planted bug ...", flush=True)
        if tests and status_of(folder, tests, planted=False) != 0:
            print((folder / "output.txt").read_text("utf-8", "replace"))
            print("These tests must pass before anything is planted.")
            return 1
        for mutant in (bar := tqdm(mutants, unit="mutant")):
            bar.set_postfix_str(mutant.words[:40])
            result, why = outcome(mutant, folder)
            counts[result] += 1
            if result != "caught":
                bar.write(f"{result:9} {mutant}{': ' if why else ''}{why}")
    minutes = (time.time() - start) / 60
    print(f"{', '.join(f'{count} {result}' for result, count in counts.items())}; {minutes:.1f} minutes")
    return 0 if counts["caught"] == sum(counts.values()) else 1


# The bugs: file, then (what is wrong, old text, new text, the test that must fail)

