"""The house: a book that stands by itself, and rooms of tools, each built on the book and on the rooms before it."""

import ast
import graphlib
import importlib
import re
import sys
from pathlib import Path

import pytest

import minicn

PACKAGE = Path(__file__).parents[2] / "minicn"
BOOK = "unet controlnet vae clip tokenizer ddim inputs fast pipeline training".split()
ROOMS = "checkpoints conditions toy trainer commands".split()  # each may use the book and the rooms before it
OUTSIDE = {"torch", "numpy", "PIL", "tqdm", "ftfy", "regex"} | sys.stdlib_module_names  # ftfy, regex: the tokenizer's
FILES = [path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.AST) -> set[str]:
    """Return the modules that a syntax tree imports, those of minicn as `minicn.room.file`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                path = PACKAGE.parent.joinpath(*inner.split("."))
                ours = path.is_dir() or path.with_suffix(".py").is_file()
                found.add(inner if ours and node.module.startswith("minicn") else node.module)
    return found


def at_once(path: Path) -> set[str]:
    """Return what a file imports when it is imported: not what its functions import when they run."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = []
    return imported(tree)


def room_of(module: str) -> str:
    return module.split(".")[1] if module.count(".") else module


@pytest.mark.parametrize("name", BOOK)
def test_the_book_stands_by_itself(name):
    """It imports PyTorch, numpy, Pillow, tqdm and itself; a door to `checkpoints` opens where a model is loaded or saved,
    one to `conditions` where a hint is read from its path.
    """
    path = PACKAGE / f"{name}.py"
    for module in at_once(path):
        assert room_of(module) in BOOK if module.startswith("minicn") else module.split(".")[0] in OUTSIDE, module
    doors = {room_of(m) for m in imported(ast.parse(path.read_text("utf-8"))) if m.startswith("minicn")} - {*BOOK}
    assert doors <= ({"conditions"} if name == "inputs" else {"checkpoints"})


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_uses_the_book_and_the_rooms_before_it(room):
    before = {*BOOK, "threads", "minicn", *ROOMS[: ROOMS.index(room) + 1]}
    for path in (PACKAGE / room).rglob("*.py"):
        for module in imported(ast.parse(path.read_text("utf-8"))):
            assert not module.startswith("minicn") or room_of(module) in before, f"{path.name}: {module}"


def test_nothing_goes_in_circles():
    arrows = {name_of(path): {m for m in at_once(path) if m.startswith("minicn.")} for path in FILES}
    assert len([*graphlib.TopologicalSorter(arrows).static_order()]) >= len(FILES)


def test_no_file_is_longer_than_450_lines():
    lengths = {name_of(path): len(path.read_text("utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 450} == {}


def long_functions(folder: Path) -> dict[str, int]:
    """Return the functions of more than 60 lines in a folder's files, and their lengths without the docstring."""
    long = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                first = node.body[0]
                docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
                length = node.end_lineno - node.lineno + 1 - docstring
                if length > 60:
                    long[f"{path.stem}.{node.name}"] = length
    return long


def test_no_function_is_longer_than_60_lines():
    """Without its docstring."""
    assert long_functions(PACKAGE) == {}


def test_what_is_installed_weighs_at_most_40_mb():
    """Weights are all but all of a wheel: the base, and the ControlNets that pyproject.toml names."""
    data = re.findall(r'"((?:toy|conditions)/[^"]+)"', (PACKAGE.parent / "pyproject.toml").read_text("utf-8"))
    files = {path for pattern in data for path in PACKAGE.glob(pattern) if path.is_file()}
    assert {"canny", "scribble"} == {path.parts[-2] for path in files if "controlnets" in path.parts}
    assert sum(path.stat().st_size for path in files) < 40e6


def test_modules_are_still_found_where_they_lay():
    """Before they had rooms: as attributes of the package, and `measures` as a module of it."""
    for name, place in minicn.MOVED.items():
        assert getattr(minicn, name) is importlib.import_module(f"minicn.{place}")
    assert importlib.import_module("minicn.measures") is minicn.measures
    with pytest.raises(AttributeError, match="no attribute 'sampler'"):
        minicn.sampler  # noqa: B018
