"""The notebooks as committed: run from the top, without an error, complete, light, and with links that lead somewhere.

That their cells still do what they did is for nbmake, which executes them on a fresh kernel (`.ci/run`).
"""

import base64
import importlib.util
import json
import re
import runpy
from pathlib import Path

import pytest

import minicn

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
NAMES = (
    *("01_noise_and_denoising", "02_latents", "03_words", "04_unet", "05_zero_convolution", "06_controlnet", "07_training"),
    *("08_conditions", "09_the_real_thing"),
)
INDEX = (FOLDER / "README.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")


def cells(name: str, kind: str) -> list[dict]:
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text("utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def prose(name: str) -> str:
    return "\n\n".join("".join(cell["source"]) for cell in cells(name, "markdown"))


def code(name: str) -> str:
    return "\n\n".join("".join(cell["source"]) for cell in cells(name, "code"))


def test_the_nine_are_there_and_no_other():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_was_run_in_order_without_an_error(name):
    """Execution counts are 1, 2, 3, ...; no output is an error, a warning, or what a progress bar leaves."""
    code = cells(name, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert any(kind.startswith("image/") for output in outputs for kind in output.get("data", {}))


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_weighs_at_most_600_kilobytes(name):
    assert (FOLDER / f"{name}.ipynb").stat().st_size <= 600_000


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_asks_lets_predict_asserts_and_sums_up(name):
    """A question first, predictions, assertions, captions, two or three exercises with folded answers, a summary."""
    text, code = prose(name), "\n".join("".join(cell["source"]) for cell in cells(name, "code"))
    assert text.startswith(f"# {int(name[:2])}. ")
    assert "**The question.**" in text.split("\n## ")[0]
    assert "**Predict.**" in text
    assert 2 <= text.count("<details>") == text.count("</details>") <= 3
    assert "## Summary" in text
    assert len(re.findall(r"^ *assert ", code, re.MULTILINE)) >= 8
    assert "caption=" in code or "figures.say(" in code
    following = NAMES[(NAMES.index(name) + 1) :][:1]
    assert all(f"]({each}.ipynb)" in text for each in following)
    imports = re.findall(r"^(?:import|from) (figures|torch|numpy|matplotlib|PIL|minicn)", code, re.MULTILINE)
    assert imports[0] == "figures"  # which says what to install, should one of the others be missing


@pytest.mark.parametrize("name", NAMES)
def test_figures_come_before_pytorch(name):
    """They load minicn first, which bounds how long OpenMP's threads spin: too late once PyTorch is loaded."""
    modules = re.findall(r"^(?:import|from) (\w+)", code(name), re.MULTILINE)
    assert modules.index("figures") < modules.index("torch")
    loaded = (FOLDER / "figures.py").read_text("utf-8")
    assert re.search(r"^import minicn\b.*\n", loaded, re.MULTILINE).start() < loaded.index("import matplotlib")
    assert not re.search(r"^import torch", loaded, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_notebook_names_exists(name):
    """Links lead to files; named files are there; what stands as `minicn.x`, `toy.x`, ... is a name of minicn."""
    check_links(prose(name))
    for path in re.findall(r"`((?:minicn|tests|benchmarks|docs|notebooks)/[\w./]*)`", prose(name)):
        assert (ROOT / path).exists(), path
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "minicn").rglob("[a-z]*.py")]
    modules = {path.name: ".".join(path.parts) for path in files} | {
        room: f"minicn.{room}" for room in ("conditions", "toy")
    }
    for before, module, attribute in re.findall(rf"`(minicn\.)?({'|'.join(modules)})\.(\w+)", prose(name)):
        if not before and not re.search(rf"import .*\b{module}\b", code(name)):
            continue  # the notebook's own
        place = modules[module]
        known = attribute == "py" or hasattr(importlib.import_module(place), attribute)
        assert known or importlib.util.find_spec(f"{place}.{attribute}"), f"{module}.{attribute}"
    for attribute in re.findall(r"`minicn\.(\w+)", prose(name)):
        assert hasattr(minicn, attribute) or attribute in modules, attribute


def check_links(text: str) -> None:
    without_code = re.sub(r"```.*?```|`[^`]*`|\$[^$]*\$", "", text, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", without_code):
        assert target.startswith("https://") or (FOLDER / target).exists(), target


def test_the_index_and_the_readme_lead_to_all_nine():
    """The index says of each what it teaches, in their order; the README shows a picture of each."""
    assert re.findall(r"\]\((\w+)\.ipynb\)", INDEX) == list(NAMES)
    check_links(INDEX)
    assert re.findall(r"\]\(notebooks/(\d\w+)\.ipynb\)", README) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_shows_a_picture_of_each_notebook(name):
    """The picture in docs/notebooks is one that the committed notebook holds, byte for byte."""
    file = re.search(rf"\]\(docs/notebooks/({name}\.(?:jpg|png))\)", README)[1]
    kind = {"jpg": "image/jpeg", "png": "image/png"}[file[-3:]]
    outputs = [output.get("data", {}) for cell in cells(name, "code") for output in cell["outputs"]]
    held = [base64.b64decode("".join(data[kind])) for data in outputs if kind in data]
    assert (ROOT / "docs" / "notebooks" / file).read_bytes() in held


def test_a_missing_extra_is_said_in_one_sentence(monkeypatch):
    """Without matplotlib, the first cell ends with a sentence that names the command, not with a traceback."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else object())
    with pytest.raises(Exception, match="matplotlib cannot be imported: run ") as raised:
        runpy.run_path(str(FOLDER / "figures.py"))
    [sentence] = raised.value._render_traceback_()
    assert ".[notebooks]" in sentence
    assert "\n" not in sentence
