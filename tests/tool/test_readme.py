"""What the README and docs/ say is executed: commands and snippets run, the map is complete, the tests named exist."""

import contextlib
import csv
import dataclasses
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import minicn
import train_toy
from minicn import StableDiffusion, __main__, conditions, inputs, toy, training
from minicn.conditions import palettes
from minicn.toy import measures, sketching
from tests.tool import test_house

ROOT = Path(__file__).parents[2]
FIRST = ("A picture in ten seconds", "Your own drawing")
PATHS = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in PATHS}
README = PAGES["README.md"]
CLAIMS, FILES, HINTS, TRAINING = (PAGES[f"docs/{name}.md"] for name in ("claims", "files", "hints", "training"))
SNIPPETS = [snippet for text in PAGES.values() for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
ALL = "\n".join(PAGES.values())


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def commands(text: str, program: str = "minicn") -> list[str]:
    """Return the arguments of each line that calls the program, in a block of commands."""
    return re.findall(rf"(?m)^    (?:.* && )?{re.escape(program)} (.*)$", text)


def test_the_readme_has_at_most_1500_words():
    assert len(README.split()) <= 1500


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_run(snippet, tmp_path, monkeypatch):
    """Every Python snippet runs as it stands, with its assertions; the shape in a comment is that of the line's result."""
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(snippet, "README.md", "exec"), names)
    for name, shape in re.findall(r"(?m)^(\w+) = .*# (\(\d[\d, ]*\))", snippet):
        assert str(tuple(names[name].shape)) == shape
    if "python.png" in snippet:
        assert Image.open(tmp_path / "python.png").size == (128, 128)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_understood(page):
    """Whether it needs a network, hours, or nothing: each line parses as it stands, and each option is one of ours."""
    for line in commands(PAGES[page]) + commands(PAGES[page], "torchrun --nproc-per-node 2 -m minicn"):
        __main__.parse_args(shlex.split(line))
    for line in commands(PAGES[page], "python train_toy.py"):
        train_toy.parse_args(shlex.split(line))
    sources = [path for folder in ("minicn", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    sources = "".join(path.read_text("utf-8") for path in [*sources, ROOT / "train_toy.py"])
    known = set(re.findall(r'"(--[a-z-]+)"', sources))
    known |= {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(training.Recipe)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PAGES[page]))
    assert named <= known | {"--nproc-per-node", "--help"}


def test_what_is_installed_is_an_extra_and_leaves_the_clone_in_place():
    """`pip install '.[hub]'` would replace the editable installation of requirements.txt by a copy."""
    extras = re.search(r"(?s)optional-dependencies\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text("utf-8"))[1]
    text = ALL + (ROOT / "notebooks" / "README.md").read_text("utf-8")
    lines = re.findall(r"(?m)pip install .*?(?=`| && |$)", text)
    for line in lines:
        extra = re.fullmatch(r"pip install (?:-r requirements\.txt|-e '\.\[(\w+)\]')", line)
        assert extra, line
        assert not extra[1] or f"{extra[1]} = [" in extras


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder in which the commands of the first minutes ran, word for word, and what they printed, by section."""
    folder, said = tmp_path_factory.mktemp("first"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        [demo] = commands(README.split("\n## ")[0])
        for title, text in (("demo", f"    minicn {demo}"), *((title, section(README, title)) for title in FIRST)):
            Path("pose.json").write_text("".join(re.findall(r"```json\n(.*?)```", text, re.DOTALL)))
            with contextlib.redirect_stdout(io.StringIO()) as out:
                for line in commands(text):
                    if "runs/depth" not in line:
                        assert __main__.main(shlex.split(line)) == 0
            said[title] = out.getvalue()
            if Path("scene").is_dir():
                shutil.copy("scene/drawing.png", "drawing.png")
    return folder, said


def test_the_first_pictures_are_drawn(first):
    """The demo, the first picture, one with another prompt; a drawing and a pose: all follow, and sheets show hints."""
    folder, said = first
    pictures = [re.findall(r"(?m)^(out[-\d]*\.png): 128x128 pixels", said[title]) for title in FIRST]
    assert pictures == [["out.png", "out-2.png"], ["out-3.png", "out-4.png"]]
    assert Image.open(folder / "demo.png").size == (3 * 132 - 4, 128 + 30)
    scene = toy.scene(1, "test")
    assert f'--prompt "{scene.caption}"' in README
    here = scene.labels > 0
    for name, colour in (("out.png", "blue"), ("out-2.png", "red"), ("out-3.png", "red")):
        found = toy.name_colours(np.asarray(Image.open(folder / name)))
        assert (found[here] == [*toy.COLOURS].index(colour)).mean() > 0.8
    hint = np.asarray(conditions.load_image(folder / "sheet.png"))[30:, :128]
    assert np.array_equal(hint, conditions.scribble(conditions.load_image(folder / "drawing.png")))


def test_a_pose_is_drawn_from_its_key_points(first):
    """The key points that the README shows: the picture is green at each of its joints, but for what the head hides."""
    folder, _ = first
    [person] = json.loads((folder / "pose.json").read_text())["people"]
    points = np.array(person["pose_keypoints_2d"]).reshape(18, 3)
    green = toy.name_colours(np.asarray(Image.open(folder / "out-4.png"))) == [*toy.COLOURS].index("green")
    assert all(green[int(y) - 2 : int(y) + 3, int(x) - 2 : int(x) + 3].any() for x, y, _ in points[:14])


def test_the_papers_four_settings_are_drawn(first, monkeypatch, capsys):
    """Each of the four commands draws what follows the hint; the caption is in the toy's words."""
    monkeypatch.chdir(first[0])
    scene, f1 = toy.scene(1, "test"), measures.measure("canny")
    lines = commands(section(HINTS, "Everything that `generate` can do"))
    assert len(lines) == 4
    for i, line in enumerate(lines):
        assert __main__.main([*shlex.split(line), "--output", f"setting-{i}.png"]) == 0
    caption = re.search(r"automatic prompt: (.*)", capsys.readouterr().out)[1]
    assert {*caption.replace(",", "").split()} <= {*StableDiffusion.load("toy").defaults.words.split()}
    [plain] = StableDiffusion.load("toy").generate(scene.caption, seed=0)
    reached = [f1(Image.open(f"setting-{i}.png"), scene) for i in range(4)]
    assert min(reached) > f1(plain, scene) + 0.3, reached


def test_what_the_toy_knows_is_named():
    known = section(README, "A picture in ten seconds").replace("\n", " ")
    assert f"({', '.join(toy.THINGS)}) in six colours ({', '.join(toy.COLOURS)})" in known
    *backgrounds, last = toy.BACKGROUNDS
    assert f"on a {', '.join(backgrounds)} or {last} background" in known


def test_the_headline_is_drawn_by_its_command():
    """The settings that docs/sheet.png holds are those of the command that is said to have made it."""
    [line] = re.findall(r"Made by `python train_toy\.py (.*?)`", README)
    args = train_toy.parse_args(shlex.split(line))
    settings = train_toy.settings(args, StableDiffusion.load(args.model))
    sheet = Image.open(ROOT / "docs" / "sheet.png")
    assert json.loads(sheet.text["minicn"]) == json.loads(json.dumps(settings, default=str))
    looks = {0, *train_toy.EARLY, *range(0, args.steps + 1, args.score_every)}
    assert sheet.size == (132 * (2 + min(len(looks), 11)) - 4, 30 + 6 * 128)


def test_the_commands_for_training_run(tmp_path, monkeypatch):
    """`make-data`, `check-data` and `train`, as they stand but for the numbers, which are smaller here."""
    lines = commands(section(TRAINING, "On your own pictures"))
    assert [line.split()[0] for line in lines] == ["make-data", "check-data", "train", "train"]
    assert commands(section(README, "Your own data")) == lines[:3]
    monkeypatch.chdir(tmp_path)
    for line in lines:
        fewer = line.replace("1000", "1") + (" --batch-size 1 --pictures 0" if line.startswith("train") else "")
        assert __main__.main(shlex.split(fewer)) == 0
    assert (tmp_path / "runs" / "circles" / "diffusers" / "config.json").is_file()
    [several] = commands(TRAINING, "torchrun --nproc-per-node 2 -m minicn")
    assert several in (ROOT / ".ci" / "run").read_text()  # which runs it


def test_the_file_guide_names_every_file_and_no_other():
    """Each module of the package is in the table, and everything in the tables exists."""
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", FILES))
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "minicn").rglob("*.py")}
    modules -= {name for name in modules if name.endswith("__init__.py")}
    assert modules <= named
    assert all((ROOT / name).exists() for name in named)


def test_the_map_of_the_book_is_the_book():
    """The README's ten files and the page of the loop; `test_house.py` holds what they may import."""
    ten = {f"minicn/{name}.py" for name in test_house.BOOK}
    assert len(ten) == 10
    assert set(re.findall(r"`([\w/]+\.py)`", section(README, "A map of the book"))) == ten | {"train_toy.py"}


def test_the_hints_named_are_the_eleven():
    table = section(HINTS, "Make a hint").split("What is transparent")[0]
    assert sorted(re.findall(r"`(\w+)`", "".join(re.findall(r"(?m)^\| (`.*?) \|", table)))) == sorted(conditions.NAMES)


def test_the_tests_named_in_the_table_exist():
    """A claim's test is where the table says."""
    table = section(CLAIMS, "Claims, tests, measured values")
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
    """What the pages count is counted again. (What it measured is in logs, cards, and benchmarks.)"""
    models = (minicn.UNet, minicn.ControlNet, minicn.VAE, minicn.TextEncoder)
    counts = [parameters(model) for model in models]
    u, c, v, t = [f"{tensors} tensors, {numbers:,} parameters" for tensors, numbers in counts]
    short = [text.replace(" tensors", "").replace(" parameters", "") for text in (c, v, t)]
    assert f"U-Net {u}; ControlNet {short[0]}; VAE {short[1]}; text {short[2]}" in ALL
    assert "six things, eleven colours" in ALL
    assert (len(toy.THINGS), len(toy.COLOURS) + len(toy.BACKGROUNDS)) == (6, 11)
    assert "the 150 and 182 colours" in ALL
    assert (len(palettes.ADE20K_COLOURS), len(palettes.COCO_STUFF_COLOURS)) == (150, 182)
    assert "48 times fewer numbers" in ALL
    assert minicn.VAE().encode(torch.zeros(1, 3, 64, 64))[0].numel() * 48 == 3 * 64 * 64
    assert "dims a hint 6000 times" in ALL
    assert 4000 < dimming() < 9000
    assert "12 + 1 + 12 blocks" in ALL
    unet = StableDiffusion.load("toy").unet
    assert (len(unet.input_blocks), len(unet.output_blocks)) == (12, 12)
    assert "outlines in one to five pixels" in HINTS
    assert (sketching.NARROWEST, sketching.WIDEST) == (1, 5)
    assert "guidance 9 for Stable Diffusion, 3 for the toy" in HINTS
    own = [defaults.guidance_scale for defaults in (inputs.Defaults(), StableDiffusion.load("toy").defaults)]
    assert own == [9, 3]
    assert all(f'"{defaults}"' in HINTS for defaults in ("a picture", inputs.Defaults().default_prompt))
    assert "Prompts are cut at 77 tokens" in ALL
    assert minicn.TextConfig().max_positions == 77


def test_links_and_pictures_exist():
    """Every relative link leads to a file, and to a heading of it; every page is reached from the README."""
    for page, text in [*PAGES.items(), ("CONTRIBUTING.md", (ROOT / "CONTRIBUTING.md").read_text("utf-8"))]:
        for target, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
            if not target.startswith("https://"):
                path = (ROOT / page).parent / target if target else ROOT / page
                assert path.exists(), f"{page}: {target}"
                titles = re.findall(r"(?m)^#+ (.*)$", path.read_text("utf-8")) if path.suffix == ".md" else []
                anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
                assert not heading or heading in anchors, f"{page}: {target}#{heading}"
    assert all(f"]({page})" in README for page in PAGES if page != "README.md")


def test_the_scores_of_the_log_are_those_of_the_log():
    """The following scores that are quoted stand in the log of the ControlNet that ships."""
    with open(ROOT / "minicn" / "toy" / "next" / "controlnets" / "canny" / "log.csv") as file:
        scores = {row["step"]: float(row["score"]) for row in csv.DictReader(file)}
    quoted = re.search(r"following score (.*?) \(16 held-out", CLAIMS)[1]
    pairs = re.findall(r"([\d.]+) at step (\d+)", quoted)
    assert len(pairs) == 3
    assert all(f"{scores[step]:.2f}" == score for score, step in pairs)
    with open(ROOT / "minicn" / "toy" / "next" / "controlnets" / "depth" / "log.csv") as file:
        scores = {row["step"]: float(row["score"]) for row in csv.DictReader(file)}
    quoted = section(README, "A ControlNet of your own, in five minutes").split("ships scored")[1]
    pairs = re.findall(r"([\d.]+) at step (\d+)", quoted)
    assert len(pairs) == 3
    assert all(f"{scores[step]:.2f}" == score for score, step in pairs)


def test_the_table_of_speeds_is_what_was_measured():
    """Every ratio is the one in benchmarks/results.json, each machine and each figure there has its place, and no other."""
    results = json.loads((ROOT / "benchmarks" / "results.json").read_text("utf-8"))
    lines = re.findall(r"(?m)^\| (.*) \|$", section(CLAIMS, "Speed"))
    (_, *machines), _, *rows = [line.split(" | ") for line in lines]
    assert machines == list(results)
    shown = {(name, machine): cell for name, *cells in rows for machine, cell in zip(machines, cells, strict=True)}
    measured = {(name, machine): figure["ratio"] for machine, figures in results.items() for name, figure in figures.items()}
    assert {place for place, cell in shown.items() if cell != "-"} == set(measured)
    for place, ratio in measured.items():
        assert shown[place] == (ratio if isinstance(ratio, str) else f"{ratio:.2f}"), place
