"""The experiments: what they share, what they count, and what their page says of their results."""

import dataclasses
import json
import re
from argparse import Namespace
from pathlib import Path

import another_model
import harness
import learning
import numpy as np
import part_of_the_steps
import pen_editing
import piti
import pytest
import simple_objects
import sudden_convergence
import torch
import wrong_readings
from PIL import Image
from torch import nn

from minicn import ControlNet, StableDiffusion, UNet, toy, training
from minicn.toy import judging, measures
from tests.tool import test_house

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "experiments").glob("*.py") if "harness.main(" in path.read_text("utf-8"))
RECORDED = sorted(path.stem for path in harness.RESULTS.glob("*.json"))
PAGE = (ROOT / "experiments" / "README.md").read_text("utf-8")


def run(tmp_path, measure, *argv):
    """Run an experiment of two rows in a folder."""
    return harness.main("some.py", "Some experiment.", measure, ["--output", str(tmp_path / "out"), *argv], scenes=3)


def two_rows(made, fails=False):
    """Return a `measure` that notes which rows it makes, and may fail before the second."""

    def measure(experiment):
        for name, value in (("first", 0.25), ("second", 0.5)):
            if fails and name == "second":
                raise ValueError("the power is gone")
            picture = np.full((128, 128, 3), int(255 * value), np.uint8)
            experiment.row(name, lambda name=name, v=value, p=picture: (made.append(name), ({"following": v}, [p]))[1])

    return measure


def begun(tmp_path, num_steps):
    """Return an experiment of two scenes."""
    args = Namespace(output=tmp_path, resume=False, quick=True, scenes=2, seed=0)
    experiment = harness.Experiment("some", args, vars(args))
    experiment.num_steps = num_steps
    return experiment


def results(tmp_path):
    return json.loads((tmp_path / "out" / "results.json").read_text())


# What they share


def test_an_experiment_goes_on_after_the_last_row(tmp_path, capsys):
    """What was measured is not measured again; the sheet and the table hold all of it."""
    made: list[str] = []
    with pytest.raises(SystemExit):
        run(tmp_path, two_rows(made, fails=True))
    assert capsys.readouterr().err == "error: the power is gone\n"
    assert list(results(tmp_path)["rows"]) == ["first"]
    assert run(tmp_path, two_rows(made), "--resume") == 0
    assert made == ["first", "second"]
    assert results(tmp_path)["rows"] == {"first": {"following": 0.25}, "second": {"following": 0.5}}
    assert capsys.readouterr().out.splitlines()[-2:] == ["| first | 0.25 |", "| second | 0.50 |"]
    sheet = Image.open(tmp_path / "out" / "sheet.png").convert("RGB")
    assert [sheet.getpixel((x, 100))[0] for x in (64, 132 + 64)] == [63, 127]


def test_results_say_how_they_were_made(tmp_path):
    run(tmp_path, two_rows([]), "--seed", "7")
    found = results(tmp_path)
    assert found["command"] == "python experiments/some.py --seed 7"
    assert found["seed"] == 7
    assert found["settings"]["scenes"] == "3"
    assert re.fullmatch(r"[0-9a-f]{7,}\+?|unknown", found["commit"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "already holds results: --resume goes on, another --output starts anew"),
        (["--resume", "--scenes", "4"], "was made with --scenes 3, not 4: give the same"),
        (["--resume", "--seed", "1"], "was made with --seed 0, not 1"),
        (["--scenes", "1"], "expected an integer from 2"),
        (["--quick", "--record"], "two scenes measure nothing"),
        (["--sheet"], "unrecognized arguments: --sheet"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, capsys, argv, words):
    run(tmp_path, two_rows([]))
    before = results(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, two_rows([]), *argv)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert words in said
    assert len(said.splitlines()) == 1
    assert results(tmp_path) == before


@pytest.mark.parametrize("text", ["[]", "{}", '{"settings": {}, "cpu_seconds": 1, "rows": {"a": {"b": "c"}}}', "no JSON"])
def test_damaged_results_are_one_line(tmp_path, capsys, text):
    run(tmp_path, two_rows([]))
    (tmp_path / "out" / "results.json").write_text(text)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, two_rows([]), "--resume")
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert len(said.splitlines()) == 1
    assert "results.json" in said


def test_what_lies_in_the_folder_is_not_replaced(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sheet.png").write_text("mine")
    with pytest.raises(SystemExit):
        run(tmp_path, two_rows([]))
    assert "sheet.png is there already" in capsys.readouterr().err
    assert (tmp_path / "out" / "sheet.png").read_text() == "mine"


def test_held_out_scenes_are_those_of_the_benchmark(tmp_path):
    """Test scenes from 1000 on, each from its caption by its own seed; the bounds are 0 and 1, drawn once for all hints."""
    experiment = begun(tmp_path, num_steps=1)
    sd = StableDiffusion.load("toy")
    held_out = harness.HeldOut(experiment, sd, "canny")
    assert [scene.index for scene in held_out.scenes] == [1000, 1001]
    assert torch.equal(held_out.hints[1], torch.from_numpy(toy.scene(1001, "test").hint("canny")).permute(2, 0, 1) / 255)
    floor, ceiling = (
        experiment.rows["canny: without control"],
        experiment.rows["canny: true pictures, through the autoencoder"],
    )
    assert (floor["following"], ceiling["following"]) == (0, 1)
    captions = [scene.caption for scene in held_out.scenes]
    images = sd.generate(captions, num_steps=1, guidance_scale=3.0, seed=0)
    value = measures.mean(measures.edge_f1, images, [scene.image for scene in held_out.scenes])
    assert floor["measure"] == pytest.approx(value, abs=1e-4)
    experiment.drawn.clear()  # as in a resumed run
    harness.HeldOut(experiment, sd, "depth")
    assert len(experiment.drawn) == 2
    assert [title.split("\n")[0] for title, _ in experiment.columns][3:] == ["hint"]
    trained_on = harness.HeldOut(experiment, sd, "canny", training=1)
    assert [(scene.split, scene.index) for scene in trained_on.scenes] == [("train", 0)]
    assert len(experiment.columns) == 7
    experiment.release()


def test_a_resumed_training_ends_alike(tmp_path, monkeypatch):
    """Interrupted after a checkpoint, and gone on: the same weights bit for bit; one of something else is refused."""
    monkeypatch.setattr(learning, "CHECKPOINT_EVERY", 2)
    experiment = Namespace(folder=tmp_path)

    def trained(name, stop=7):
        torch.manual_seed(0)
        layer = nn.Linear(3, 3)

        def loss(step):
            if step == stop:
                raise KeyboardInterrupt
            return (layer(torch.full((1, 3), 1.0 + step)) - step).square().mean()

        look = learning.Look(lambda: layer.bias.sum().item(), every=2)
        took, log = learning.train(experiment, name, layer, loss, steps=6, lr=0.1, look=look)
        assert took["parameters trained"] == 12
        return layer.weight.detach(), log

    whole, log = trained("whole")
    with pytest.raises(KeyboardInterrupt):
        trained("parted", stop=6)
    assert torch.load(tmp_path / "checkpoints" / "parted.pt")["step"] == 4
    again, told = trained("parted", stop=4)
    assert torch.equal(again, whole)
    assert told == log
    assert [row["step"] for row in log] == [2, 4, 6]
    with pytest.raises(ValueError, match=r"whole.pt is damaged: module.weight"):
        learning.train(experiment, "whole", nn.Linear(2, 3), lambda step: None, steps=6, lr=0.1)


@pytest.mark.parametrize(("unlock", "connect"), [("none", "all"), ("none", "middle"), ("all", "all")])
def test_what_is_locked_is_not_trained(tmp_path, unlock, connect):
    """In two steps the zero convolutions change that are connected, and the locked model only where it is unlocked."""
    sd, first = StableDiffusion.load("toy"), StableDiffusion.load("toy").unet.state_dict()
    recipe = training.Recipe(2, 2, lr=1e-3, unlock=unlock, connect=connect)
    net = learning.fresh(sd, recipe)
    learning.tune(Namespace(folder=tmp_path), "x", sd, net, learning.scenes(sd, "depth", 2, keep=False), recipe)
    assert all(torch.equal(value, first[name]) for name, value in sd.unet.state_dict().items()) == (unlock == "none")
    assert bool(net.zero_convs[0][0].weight.any()) == (connect == "all")
    assert net.middle_block_out[0].weight.any()


def test_latents_are_kept_for_the_same_scenes_alone(tmp_path, monkeypatch):
    """A second run reads them, bit for bit; those of other scenes are not taken for them."""
    monkeypatch.setattr(learning, "FOLDER", tmp_path)
    sd, made = StableDiffusion.load("toy"), []
    encode = learning.recording.encode
    monkeypatch.setattr(learning.recording, "encode", lambda *args: made.append(1) or encode(*args))
    fresh = learning.scenes.__wrapped__  # without the cache of this process
    one, two = fresh(sd, "canny", 2), fresh(sd, "depth", 2)
    assert torch.equal(one.latents, two.latents)
    assert made == [1]
    assert not torch.equal(fresh(sd, "openpose", 2).latents, one.latents)  # scenes with people
    assert made == [1, 1]
    assert torch.equal(learning.first(one, 1).latents, one.latents[:1])


def test_a_wide_table_is_turned():
    """A row each, until there are more figures than fit beside each other."""
    rows = {"a": {"following": 0.123, "parameters": 1234.0}, "b": {"following": -0.001}}
    assert harness.table(rows)[0] == "| | following | parameters |"
    assert harness.table(rows)[2:] == ["| a | 0.12 | 1,234 |", "| b | 0.00 | - |"]
    assert harness.table({"a": {"x": 1}, "b": {"y": 2}, "c": {"x": 3}})[3:5] == ["| c | 3.00 |", ""]
    wide = {"a": {str(i): i for i in range(9)}}
    assert harness.table(wide)[:3] == ["| | a |", "| --- | --- |", "| 0 | 0.00 |"]


# What each counts


def test_a_thing_that_is_moved_is_off_by_as_much():
    """Simple objects: the farthest part of the outline, in pixels, around that thing alone."""
    scene = next(scene for scene in toy.scenes(50, "test") if len(scene.things) == 2 and scene.things[0].kind == "ball")
    outline, near = scene.outlines() & (scene.owners == 0), simple_objects.around(scene, 0)
    true = measures.edges(scene.image)
    assert simple_objects.deviation(true, true, outline, near) <= 2  # Canny's edges lie beside the outline
    moved = np.where(near, np.roll(true & near, 4, axis=1), true)
    assert 3 <= simple_objects.deviation(moved, true, outline, near) <= 5.5
    assert simple_objects.deviation(true, true, scene.outlines() & (scene.owners == 1), simple_objects.around(scene, 1)) <= 2
    assert simple_objects.deviation(np.zeros_like(true), true, outline, near) == 128
    assert not (near & (scene.owners == 1)).any()
    half = true.copy()
    half[: round(scene.things[0].y)] &= ~near[: round(scene.things[0].y)]  # no upper half: its top is far from any edge
    assert simple_objects.deviation(half, true, outline, near) > 20
    figures = simple_objects.by_thing([Image.fromarray(scene.image)], [scene])
    assert figures["F1, ball"] == 1
    assert figures["at most 2 pixels off"] == 1


def test_windows_that_share_a_trajectory_are_those_that_are_drawn_alone(tmp_path):
    """Part of the steps: a window's pictures are those of `generate` with its control_start and control_end."""
    experiment = begun(tmp_path, num_steps=10)
    sd = StableDiffusion.load("toy")
    net = ControlNet.load("toy-canny", unet=sd.unet)
    held_out = harness.HeldOut(experiment, sd, "canny")
    windows = dict(part_of_the_steps.Trajectories(held_out, net, 0).windows(7))
    assert list(windows) == [8, 9, 10]
    alone, other = (held_out.draw(net, control_start=0.7, control_end=end) for end in (0.9, 1.0))
    for a, b, c in zip(sd.decode_latents(windows[9]), alone, other, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1  # a picture's 8 bits, if roundings differ
        assert not np.array_equal(a, c)
    experiment.release()


def test_an_edit_is_inside_its_mask():
    """Pen editing: the wanted scene differs from the one before inside the mask alone, and its strokes lie there."""
    for scene in toy.scenes(12, "test", first=1000):
        edit = pen_editing.edit(scene)
        old, new = scene.things[0], edit.wanted.things[0]
        assert f"{new.colour} {new.kind}" in edit.wanted.caption
        assert f"{old.colour} {old.kind}" not in edit.wanted.caption
        assert new.colour not in scene.colours
        wanted = Image.fromarray(edit.wanted.image)
        assert edit.kept(wanted)
        assert edit.kept(edit.before)
        assert edit.inside(wanted) > 0.8 > edit.inside(edit.before)
        assert not edit.strokes[~edit.mask].any()
        assert edit.strokes[edit.mask].any()
        other = np.array(edit.before)
        other[0, 0, 0] ^= 1  # a corner is never redrawn
        assert not edit.kept(Image.fromarray(other))


class Counted:
    """A reader that draws nothing: it keeps what would be drawn, and what counts it."""

    def __init__(self):
        self.sd, self.judge, self.experiment, self.rows = StableDiffusion.load("toy"), judging.Judge.load(), self, {}

    def show(self, title, pictures):
        pass

    def row(self, name, count, scenes, prompts, hints, **settings):
        assert len(scenes) == len(prompts)
        self.rows[name] = count, scenes, prompts


def test_readings_are_counted_as_what_they_are():
    """Wrong readings: of true pictures the hint's thing is seen; upside down, the colours are exchanged."""
    alone = [scene for scene in toy.scenes(12, "test", first=1000) if len(scene.things) == 1]
    for part in (wrong_readings.contradictions, wrong_readings.circles, wrong_readings.exchanged):
        part(reader := Counted(), alone)
        for count, scenes, _ in reader.rows.values():
            found = count([Image.fromarray(scene.image) for scene in scenes])
            assert sum(found.values()) == pytest.approx(1)
            assert next(iter(found.values())) == 1 or found.get("a ring") == 1
    count, pairs, prompts = reader.rows["3. prompt says which is above"]
    assert count([Image.fromarray(pair.image[::-1]) for pair in pairs])["colours exchanged"] == 1
    assert count([Image.fromarray(alone[0].image) for _ in pairs])["colours missing"] == 1
    assert all(p.index(f" {pair.things[0].colour} ") < p.index(" above ") for p, pair in zip(prompts, pairs, strict=True))
    wrong_readings.contradictions(reader, alone)
    _, scenes, prompts = reader.rows["1. prompt of another thing"]
    assert not any(scene.things[0].kind in prompt for scene, prompt in zip(scenes, prompts, strict=True))


def test_another_model_is_controlled_by_the_same_code():
    """A fresh ControlNet changes nothing; behind two zero layers a single zero convolution wakes at the second step."""
    torch.manual_seed(0)
    pictures = another_model.Pictures(4, "train")
    assert pictures.images.shape == pictures.hints.shape == (4, 3, 32, 32)
    assert set(pictures.hints.unique().tolist()) == {0, 1}
    model = another_model.PixelModel(pictures, 0)
    for p in model.unet.parameters():  # as after training: what starts at zero is not
        nn.init.normal_(p, std=0.1) if not p.any() else None
    model.unet.requires_grad_(False)
    for name, encoder in another_model.ENCODERS.items():
        net = ControlNet.from_unet(model.unet)
        net.input_hint_block = encoder()
        assert net.hint_features(pictures.hints).shape == (4, another_model.WIDTH, 32, 32)
        assert bool(net.hint_features(pictures.hints).any()) == (name == "a convolution that is not zero")
        assert model.loss(1, net) == model.loss(1)
        found = another_model.first_gradients(net, model, 1e-3)
        assert found["gradient 1"] == 0 < found["gradient 2"]


def test_the_step_of_following_lies_between_two_looks():
    """Sudden convergence: interpolated between the scores before and after; what is never reached is not there."""
    log = [{"step": 100 * i, "loss": 1.0, "score": score} for i, score in enumerate((0.0, 0.2, 0.2, 0.8), 1)]
    found = learning.begins(log)
    assert found["step of 0.1"] == pytest.approx(150)
    assert found["step of 0.5"] == pytest.approx(350)
    assert found["steps from 0.1 to 0.5"] == pytest.approx(200)
    assert learning.begins(log[:3]) == {"last score": 0.2, "step of 0.1": pytest.approx(150)}
    assert learning.begins([]) == {"last score": 0.0}


def test_the_runs_are_one_change_apart():
    """Three seeds of each start; six more of depth, each with one other setting."""
    recipe = training.Recipe(10, lr=sudden_convergence.LR, seed=5)
    runs = {name: (each, start) for name, _, each, start in sudden_convergence.runs(recipe, 3)}
    assert len(runs) == (3 + 4) * 3 + 6
    for name, (each, start) in runs.items():
        changed = {f.name for f in dataclasses.fields(each) if getattr(each, f.name) != getattr(recipe, f.name)}
        assert len(changed) == (0 if name.endswith("seed 5") else 1), name
        assert (changed <= {"seed"}) == ("seed" in name), name
        assert start in name or start == "He's start", name
    assert {each.seed for name, (each, _) in runs.items()} == {5, 6, 7}
    net = ControlNet.from_unet(UNet(another_model.CFG))
    torch.manual_seed(0)
    sudden_convergence.pytorch_start(net)
    torch.manual_seed(0)
    first = nn.Conv2d(3, 16, 3)
    assert torch.equal(net.input_hint_block[0].weight, first.weight)
    assert not net.input_hint_block[-1].weight.any()


def test_normalised_guidance_keeps_mean_and_deviation():
    """PITI: each sample's mean and deviation are those of the conditional prediction; at guidance 1 nothing changes."""
    torch.manual_seed(0)
    eps_uncond, eps_cond = torch.randn((2, 3, 4, 8, 8), dtype=torch.float64) * torch.arange(1, 4)[:, None, None, None] + 1
    guided = piti.ddim.guide(eps_uncond, eps_cond, 9.0)
    found = piti.normalise(guided, eps_cond)
    for measured in (torch.mean, torch.std):
        torch.testing.assert_close(measured(found, (1, 2, 3)), measured(eps_cond, (1, 2, 3)))
        assert (measured(guided, (1, 2, 3)) - measured(eps_cond, (1, 2, 3))).abs().min() > 0.1
    for one, other in zip(found, guided, strict=True):  # otherwise as guided
        assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1] == pytest.approx(1)
    torch.testing.assert_close(piti.normalise(piti.ddim.guide(eps_uncond, eps_cond, 1.0), eps_cond), eps_cond)


def test_the_first_stage_trains_the_encoder_alone(tmp_path):
    """PITI: stage 1 leaves the U-Net as it was, bit for bit, stage 2 does not; without guidance normalising does nothing."""
    experiment, sd = begun(tmp_path, num_steps=2), StableDiffusion.load("toy")
    experiment.args.examples = 4
    held_out = harness.HeldOut(experiment, sd, "ade20k")
    model = piti.Piti(sd, 0)
    for stage in (1, 2):
        before = {name: p.clone() for name, p in model.named_parameters()}
        took = piti.train(model, held_out, stage, 1)
        same = {name.startswith("unet.") for name, p in model.named_parameters() if torch.equal(p, before[name])}
        assert same == ({True} if stage == 1 else set())
        of_unet = sum(p.numel() for p in sd.unet.parameters())
        assert took["parameters trained"] == sum(p.numel() for p in model.parameters()) - of_unet * (stage == 1)
    plain, normalised, guided = (
        np.asarray(model.draw(held_out, 1, scale, normal, True)[0], int)
        for scale, normal in ((1.0, False), (1.0, True), (3.0, False))
    )
    assert np.abs(plain - normalised).max() <= 1 < np.abs(plain - guided).max()
    experiment.release()


# What the page says


def test_an_experiment_is_a_page():
    """At most 150 lines; functions as short as the package's."""
    assert {path.stem: n for path in FILES if (n := len(path.read_text("utf-8").splitlines())) > 150} == {}
    assert test_house.long_functions(ROOT / "experiments") == {}


def test_the_tables_are_what_was_measured():
    """The overview, and each experiment's table, sheet and default command, are those of experiments/results/."""
    lines = PAGE.splitlines()
    assert "\n".join(harness.overview(RECORDED)) in PAGE
    for name in RECORDED:
        kept = json.loads((harness.RESULTS / f"{name}.json").read_text("utf-8"))
        assert "\n".join(harness.table(kept["rows"])) in PAGE, name
        assert f"## {name}" in lines
        assert f"](../docs/experiments/{name}.png)" in PAGE
        assert (harness.SHEETS / f"{name}.png").stat().st_size < 300_000
        assert re.fullmatch(rf"python experiments/{name}\.py( --scenes \d+)?", kept["command"])
    assert {path.stem for path in harness.SHEETS.glob("*.png")} == set(RECORDED)


def test_every_number_of_a_sentence_was_measured():
    """What a section says with a decimal point stands in its table."""
    for section in PAGE.split("\n## ")[1:]:
        prose = "\n".join(line for line in section.splitlines() if not line.startswith("|"))
        table = "\n".join(line for line in section.splitlines() if line.startswith("|"))
        measured = set(re.findall(r"-?\d+\.\d+", table))
        assert set(re.findall(r"-?\d+\.\d+", prose)) <= measured, section.split("\n")[0]


def test_an_experiment_has_results_or_is_named_as_not_run():
    section = PAGE.split("Not run yet")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)\.py`", section)) == {path.stem for path in FILES} - set(RECORDED)
