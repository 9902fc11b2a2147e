"""The eleven toy ControlNets that ship: there is one for each condition, it follows, and its card says what its log says."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest

from minicn import ControlNet, StableDiffusion, conditions, toy
from minicn.checkpoints import hub
from minicn.toy import measures
from minicn.trainer import recording

CLAIMS = (Path(__file__).parents[3] / "docs" / "claims.md").read_text("utf-8")
TABLE = CLAIMS.split("## What ships")[1].split("\n## ")[0]


def log(condition: str, name: str = "log.csv") -> list[dict[str, float]]:
    with open(hub.TOY_CONTROLNETS / condition / name) as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion.load("toy")


def test_there_is_one_for_each_condition():
    assert sorted(folder.name for folder in hub.TOY_CONTROLNETS.glob("*/")) == sorted(conditions.NAMES)


@pytest.mark.parametrize("condition", conditions.NAMES)
def test_it_follows_its_own_hint_and_no_other(sd, condition):
    """Four held-out scenes, ten steps: the pictures agree with their own scenes, and far less with each other's."""
    scenes = list(toy.scenes(4, "test", condition, first=1300))
    net = ControlNet.load(f"toy-{condition}", unet=sd.unet)
    hints = recording.stack([scene.hint(condition) for scene in scenes]).float() / 255
    images = sd.generate([s.caption for s in scenes], hint=hints, controlnet=net, num_steps=10, guidance_scale=3.0)
    measure = measures.measure(condition)
    ceiling = measures.mean(measure, [scene.image for scene in scenes], scenes)
    own, other = (measures.mean(measure, images, np.roll(np.array(scenes, object), k)) for k in (0, 1))
    assert own > 0.6 * ceiling
    assert own > other + 0.25


@pytest.mark.parametrize("condition", conditions.NAMES)
def test_card_and_table_say_what_the_log_says(condition):
    """Steps trained, steps between which it began to follow, and the measured score, in the card and in docs/claims.md."""
    rows = log(condition)
    i = next(i for i, row in enumerate(rows) if row["score"] >= recording.FOLLOWS)
    before, after, last = rows[i - 1], rows[i], rows[-1]
    card = (hub.TOY_CONTROLNETS / condition / "README.md").read_text("utf-8")
    assert f"--steps {last['step']:.0f}" in card
    assert ("--condition" not in card.split("\n| recipe")[0]) == (condition == "canny")
    assert re.search(
        rf"{before['score']:.2f} at step {before['step']:.0f} to {after['score']:.2f} at step {after['step']:.0f}", card
    )
    assert f"ends at {last['score']:.2f}" in card
    measured = re.search(
        r"following score (\d\.\d\d) on 200 held-out scenes; scene accuracy ([\d./ ]+) of one, two, three", card
    )
    row = re.search(rf"(?m)^\| `{condition}` \|.* \| (\d\.\d\d) \| ([\d./ ]+) \| (\d+) and (\d+) \|$", TABLE)
    assert row.groups() == (*measured.groups(), f"{before['step']:.0f}", f"{after['step']:.0f}")
    floor, ceiling, value = map(float, re.findall(r"\| (\d\.\d{3})", row[0]))
    assert abs(measures.score(value, floor, ceiling) - float(measured[1])) < 0.01


def test_all_were_trained_by_one_recipe():
    """The same number of steps and, but for seeds, the same command on every card."""
    commands = set()
    for condition in conditions.NAMES:
        assert log(condition)[-1]["step"] == 5000
        card = (hub.TOY_CONTROLNETS / condition / "README.md").read_text("utf-8")
        [command] = re.findall(r"\| command \| `(.*?)`", card)
        commands.add(command.replace(f" --condition {condition}", ""))
    assert commands == {"python train_toy.py --steps 5000 --score-every 500" + seed for seed in ("", " --seed 1")}
    assert "`python train_toy.py --condition NAME --steps 5000 --score-every 500`" in TABLE


def test_with_pytorchs_initial_weights_following_does_not_begin():
    """The claim of docs/claims.md and of `controlnet.init_he`, from the two logs: after 400 steps, or not within 5000."""
    ours, theirs = (log("depth", name) for name in ("log.csv", "log_pytorch_start.csv"))
    assert next(row["step"] for row in ours if row["score"] >= recording.FOLLOWS) == 400
    assert theirs[-1]["step"] == 5000
    assert max(row["score"] for row in theirs) < 0.005
    assert "begins to follow after 400 steps; with PyTorch's it has not begun after 5,000" in CLAIMS
