"""What the README says is executed: its snippets run, its file guide is complete, the tests it names exist."""

import csv
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

import minicn
from minicn import StableDiffusion, __main__, conditions, toy
from minicn.conditions import palettes

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_run(snippet, tmp_path, monkeypatch):
    """Every Python snippet runs as it stands, with its assertions."""
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    if "out.png" in snippet:
        assert Image.open(tmp_path / "out.png").size == (128, 128)


def test_the_two_minicn_commands_run(tmp_path, monkeypatch):
    """The picture's line, `minicn condition` and `minicn generate`, word for word."""
    commands = re.findall(r"^    minicn (.*)$", README.split("## The real")[0], re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["condition", "generate"]
    monkeypatch.chdir(tmp_path)
    exec(re.search(r'^    python -c "(.*)"$', README, re.MULTILINE)[1], {})
    assert f'--prompt "{toy.scene(1, "test").caption}"' in README
    for command in commands:
        assert __main__.main(shlex.split(command)) == 0
    assert Image.open("out.png").size == Image.open("picture.png").size


def test_the_commands_for_real_weights_are_commands():
    """What cannot be run without the weights is at least understood, and ends where a file is missing."""
    text = README.split("## The real")[1].split("## Train on")[0]
    commands = re.findall(r"^    minicn (.*)$", text, re.MULTILINE)
    assert [__main__.parse_args(shlex.split(command)).command for command in commands] == ["generate", "inspect", "convert"]


def test_the_commands_for_training_run(tmp_path, monkeypatch):
    """`make-data`, `check-data` and `train`, as they stand but for the numbers, which are smaller here."""
    commands = re.findall(r"^    minicn (.*)$", README.split("## Train on")[1].split("\n## ")[0], re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["make-data", "check-data", "train", "train"]
    monkeypatch.chdir(tmp_path)
    for command in commands:
        fewer = command.replace("1000", "1") + (" --batch-size 1 --pictures 0" if command.startswith("train") else "")
        assert __main__.main(shlex.split(fewer)) == 0
    assert (tmp_path / "runs" / "circles" / "diffusers" / "config.json").is_file()
    [several] = re.findall(r"^    torchrun --nproc-per-node 2 -m minicn (.*)$", README, re.MULTILINE)
    assert several in (ROOT / ".ci" / "run").read_text()  # which runs it


def test_the_file_guide_names_every_file_and_no_other():
    """Each module of the package is in the table, and everything in the table exists."""
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", README.split("## Where to learn what")[1].split("## Claims")[0]))
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "minicn").rglob("*.py")}
    modules -= {name for name in modules if name.endswith("__init__.py")}
    assert modules <= named
    assert all((ROOT / name).exists() for name in named)


def test_the_hints_named_are_the_eleven():
    table = README.split("## Hints")[1].split("What ships")[0]
    assert sorted(re.findall(r"`(\w+)`", "".join(re.findall(r"(?m)^\| (`.*?) \|", table)))) == sorted(conditions.NAMES)


def test_the_tests_named_in_the_table_exist():
    """A claim's test is where the README says."""
    table = README.split("## Claims")[1].split("## Paper vs code")[0]
    sources = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("*.py"))
    names = re.findall(r"`(test_\w+)`", table)
    assert len(names) >= 4
    assert all(f"def {name}(" in sources for name in names)
    assert all((ROOT / path).exists() for path in re.findall(r"`((?:tests|benchmarks)/[\w/]+\.py)`", table))


def parameters(model):
    """Return tensors and parameters of a model that takes no memory."""
    with torch.device("meta"):
        found = list(model().state_dict().values())
    return len(found), sum(t.numel() for t in found)


def dimming():
    """Return by what factor the difference of two Canny hints shrinks in a hint encoder with PyTorch's first weights."""
    torch.manual_seed(0)
    encoder = minicn.hint_encoder(320)[:-1]
    for layer in encoder[::2]:
        layer.reset_parameters()
    a, b = (torch.from_numpy(toy.scene(i, "test").hint("canny")).permute(2, 0, 1)[None] / 255 for i in (0, 1))
    with torch.no_grad():
        after = (encoder(a) - encoder(b)).square().mean().sqrt()
    return ((a - b).square().mean().sqrt() / after).item()


def test_numbers_are_recomputed():
    """What the README counts is counted again. (What it measured is in logs, cards, and benchmarks.)"""
    models = (minicn.UNet, minicn.ControlNet, minicn.VAE, minicn.TextEncoder)
    counts = [parameters(model) for model in models]
    u, c, v, t = [f"{tensors} tensors, {numbers:,} parameters" for tensors, numbers in counts]
    short = [text.replace(" tensors", "").replace(" parameters", "") for text in (c, v, t)]
    assert f"U-Net {u}; ControlNet {short[0]}; VAE {short[1]}; text {short[2]}" in README
    assert "six things, eleven colours" in README
    assert (len(toy.THINGS), len(toy.COLOURS) + len(toy.BACKGROUNDS)) == (6, 11)
    assert "the 150 and 182 colours" in README
    assert (len(palettes.ADE20K_COLOURS), len(palettes.COCO_STUFF_COLOURS)) == (150, 182)
    assert "48 times fewer numbers" in README
    assert minicn.VAE().encode(torch.zeros(1, 3, 64, 64))[0].numel() * 48 == 3 * 64 * 64
    assert "dims a hint 6000 times" in README
    assert 4000 < dimming() < 9000
    assert "12 + 1 + 12 blocks" in README
    unet = StableDiffusion.load("toy").unet
    assert (len(unet.input_blocks), len(unet.output_blocks)) == (12, 12)
    assert "Prompts are cut at 77 tokens" in README
    assert minicn.TextConfig().max_positions == 77


def test_links_and_pictures_exist():
    """Every relative link of the README leads to a file."""
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_scores_of_the_log_are_those_of_the_log():
    """The following scores that the README quotes stand in the log of the ControlNet that ships."""
    with open(ROOT / "minicn" / "toy" / "controlnets" / "canny" / "log.csv") as file:
        scores = {row["step"]: float(row["score"]) for row in csv.DictReader(file)}
    quoted = re.search(r"following score (.*?) \(16 held-out", README)[1]
    pairs = re.findall(r"([\d.]+) at step (\d+)", quoted)
    assert len(pairs) == 3
    assert all(f"{scores[step]:.2f}" == score for score, step in pairs)


def test_the_table_of_speeds_is_what_was_measured():
    """Every ratio is the one in benchmarks/results.json, each machine and each figure there has its place, and no other."""
    results = json.loads((ROOT / "benchmarks" / "results.json").read_text("utf-8"))
    lines = re.findall(r"(?m)^\| (.*) \|$", README.split("## Speed\n")[1].split("\n## ")[0])
    (_, *machines), _, *rows = [line.split(" | ") for line in lines]
    assert machines == list(results)
    shown = {(name, machine): cell for name, *cells in rows for machine, cell in zip(machines, cells, strict=True)}
    measured = {(name, machine): figure["ratio"] for machine, figures in results.items() for name, figure in figures.items()}
    assert {place for place, cell in shown.items() if cell != "-"} == set(measured)
    for place, ratio in measured.items():
        assert shown[place] == (ratio if isinstance(ratio, str) else f"{ratio:.2f}"), place
