"""train_toy.py and the command line, as a person runs them: short runs, refusals, interruption and resumption."""

import csv
import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_toy
from benchmarks import toy as benchmark
from minicn import ControlNet, StableDiffusion, __main__, toy, training
from minicn.checkpoints import files
from minicn.trainer import examples, loop, pretraining, recording

ROOT = Path(__file__).parents[2]
CONTROL = ["--hint", "{tmp}/ok.png", "--controlnet", "toy-canny"]
SHORT = "--scenes 2 --batch-size 1 --pictures 1 --guidance-scale 1 --score-every 4 --checkpoint-every 4 --device cpu".split()


def log(folder):
    with open(folder / "log.csv") as file:
        return list(csv.DictReader(file))


def train(folder, *arguments):
    return train_toy.main([*SHORT, "--output", str(folder), *arguments])


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """Pictures on the way are drawn in one step; the run in tests/paper draws them in ten, as a person's does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "Validation", functools.partial(recording.Validation, num_steps=1))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps, undisturbed."""
    folder = tmp_path_factory.mktemp("run") / "four"
    train(folder, "--steps", "4")
    return folder


def test_the_loop_on_the_page_is_the_engines(tmp_path):
    """train_toy.py and `trainer.loop` compute the same: all 340 tensors and both moments of each, bit for bit."""
    train(tmp_path / "page", *"--steps 3 --batch-size 3 --pictures 0".split())
    sd = StableDiffusion.load("toy")
    learned = examples.from_scenes(sd, toy.scenes(2, "train", "canny"), "canny")
    torch.manual_seed(0)
    net = ControlNet.from_unet(sd.unet, hint_channels=train_toy.HINT_CHANNELS)
    recipe, engine = training.Recipe(3, 3, lr=3e-4, unlock_lr=1e-4), recording.Run(tmp_path / "engine", {})
    engine.prepare(False)
    loop.train(sd, net, learned, None, engine, recipe)
    a, b = (files.read(tmp_path / name / "controlnet.safetensors") for name in ("page", "engine"))
    assert len(a) == 340
    assert all(torch.equal(a[key], b[key]) for key in a)
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("page", "engine"))
    for key, moments in a["optimizer"]["state"].items():
        assert all(torch.equal(moments[name], b["optimizer"]["state"][key][name]) for name in ("exp_avg", "exp_avg_sq"))
    assert a.keys() == b.keys()


def test_several_processes_are_sent_to_the_engine(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(train_toy.distributed, "init_distributed", lambda: (0, 2))
    assert "for several, use `minicn train`" in refused(train, tmp_path / "out")


def test_a_run_leaves_log_sheet_checkpoint_and_weights(run):
    """log.csv has a row a stage; the sheet is hint, truth and one column a stage; the weights load."""
    rows = log(run)
    assert [row["step"] for row in rows] == ["0", "4"]
    sheet = Image.open(run / "sheet.png")
    assert sheet.size == (4 * 132 - 4, 30 + 128)
    settings = json.loads(sheet.text["minicn"])
    assert (settings["condition"], settings["batch_size"], settings["lr"]) == ("canny", 1, 3e-4)
    assert np.array_equal(np.asarray(sheet)[30:158, :128], toy.scene(0, "test").hint("canny"))
    net = ControlNet.load(run / "controlnet.safetensors", unet=StableDiffusion.load("toy").unet)
    assert all(zero[0].weight.abs().max() > 0 for zero in net.zero_convs)
    assert not list(run.glob(".minicn-*"))


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(run, capsys):
    """Nothing is left to do: the same weights, the same sentence."""
    before = files.read(run / "controlnet.safetensors")
    train(run, "--steps", "4", "--resume")
    out = capsys.readouterr().out
    assert "(Score: 0 is as without a hint" in out and "from 0.3 it follows.)" in out  # noqa: PT018
    assert "Weights: " in out and f"Pictures: {run / 'sheet.png'}" in out  # noqa: PT018
    after = files.read(run / "controlnet.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_short_run_goes_on_to_more_steps(tmp_path, capsys):
    """As the README does; --resume also begins a run that was killed before its first checkpoint, with a note."""
    wide = ["--scenes", "4096", "--pictures", "0"]
    train(tmp_path, "--steps", "2", *wide, "--resume")
    assert f"note: {tmp_path} holds no checkpoint yet: the run begins\n" in capsys.readouterr().err
    train(tmp_path, "--steps", "5", *wide, "--resume")
    assert "holds no checkpoint" not in capsys.readouterr().err
    assert [row["step"] for row in log(tmp_path)] == ["0", "2", "4", "5"]


def test_every_wait_has_its_bar(tmp_path, capsys):
    """Before training, too, when the floor is drawn."""
    train(tmp_path, "--steps", "1")
    bars = dict.fromkeys(re.findall(r"(?m)(?:^|\r)([a-z ]+): +\d+%", capsys.readouterr().err))
    assert list(bars) == ["drawing train scenes", "encoding", "drawing test scenes", "denoising", "training"]


def test_the_benchmark_shows_its_progress(capsys):
    """benchmarks/toy.py draws for minutes, with a bar, and what it draws is `generate`'s."""
    sd, [scene] = StableDiffusion.load("toy"), toy.scenes(1, "test", first=1000)
    [drawn] = benchmark.draw(sd, [scene], 3.0)
    assert "drawing pictures: 100%" in capsys.readouterr().err
    [expected] = sd.generate(scene.caption, guidance_scale=3.0, seed=0)
    assert np.array_equal(np.asarray(drawn), np.asarray(expected))


def test_before_training_the_score_is_zero(run):
    """Eq. (4) in the log: at step 0 the pictures are those without control, so the score is 0."""
    first = log(run)[0]
    assert float(first["score"]) == 0.0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_resuming_gives_the_weights_of_an_undisturbed_run(run, tmp_path, monkeypatch, capsys, number):
    """Ctrl-C in step 3 leaves that step's checkpoint and says where; --resume ends bit for bit as if nothing happened."""
    calls, loss = [], training.controlnet_loss

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return loss(*args)

    monkeypatch.setattr(training, "controlnet_loss", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "run", "--steps", "4")
    assert stopped.value.code == 130
    assert str(tmp_path / "run") in capsys.readouterr().err
    ControlNet.load(tmp_path / "run" / "controlnet.safetensors")
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 3
    monkeypatch.undo()
    train(tmp_path / "run", "--steps", "4", "--resume")
    expected = files.read(run / "controlnet.safetensors")
    resumed = files.read(tmp_path / "run" / "controlnet.safetensors")
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)
    assert [r["step"] for r in log(tmp_path / "run")] == ["0", "4"]


def train_base(folder, *arguments):
    short = "--base --scenes 2 --vae-steps 3 --steps 3 --batch-size 1 --checkpoint-every 2 --device cpu".split()
    return train_toy.main([*short, "--output", str(folder), *arguments])


def base_weights(folder):
    return {part: files.read(next((folder / part).glob("*.safetensors"))) for part in ("unet", "vae", "text_encoder")}


def test_the_base_resumes_as_if_undisturbed(tmp_path, monkeypatch, capsys):
    """`--base`, stopped once in the autoencoder and once in the U-Net, ends with the weights of a run left alone."""
    train_base(tmp_path / "whole")
    stopped = tmp_path / "stopped"
    for i, (module, name) in enumerate(((pretraining, "vae_loss"), (pretraining.ddim, "add_noise"))):
        calls, function = [], getattr(module, name)

        def interrupted(*args, calls=calls, function=function, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, interrupted)
        with pytest.raises(SystemExit) as stop:
            train_base(stopped, *["--resume"] * i)
        assert stop.value.code == 130
        assert f"{stopped} holds a checkpoint" in capsys.readouterr().err
        assert torch.load(stopped / "checkpoint.pt", weights_only=True)["done"] == 2
        monkeypatch.undo()
    with pytest.raises(SystemExit):
        train_base(stopped)
    assert "already holds a run" in capsys.readouterr().err
    train_base(stopped, "--resume")
    expected, resumed = base_weights(tmp_path / "whole"), base_weights(stopped)
    for part in expected:
        assert all(torch.equal(expected[part][key], resumed[part][key]) for key in expected[part]), part
    assert not (stopped / "checkpoint.pt").exists()


def test_the_base_can_go_on_from_a_model(tmp_path):
    """`--base --model FOLDER` keeps the autoencoder and moves the other weights a little."""
    train_base(tmp_path / "first")
    train_base(tmp_path / "second", "--model", str(tmp_path / "first"))
    before, after = base_weights(tmp_path / "first"), base_weights(tmp_path / "second")
    assert all(torch.equal(before["vae"][key], after["vae"][key]) for key in before["vae"])
    for part in ("unet", "text_encoder"):
        moved = max((after[part][key].float() - before[part][key].float()).abs().max().item() for key in before[part])
        assert 0 < moved < 1e-2  # three steps of at most 0.001, and rounding to half precision


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], "expected an integer from 1, got '0'"),
        (["--steps", "many"], "expected an integer from 1, got 'many'"),
        (["--batch-size", "0"], "got '0'"),
        (["--lr", "-1"], "expected a number from 0 to 1, got '-1'"),
        (["--seed", "-1"], "expected an integer from 0 to 9000000000000, got '-1'"),
        (["--device", "abacus"], "device 'abacus' is not available"),
        (["--device", "meta"], "computes nothing"),
        (["--condition", "smell"], "canny"),
        (["--model", "nowhere"], "nowhere is not a file or folder"),
    ],
)
def test_train_toy_refuses_in_one_line(tmp_path, refused, arguments, words):
    """Bad input: exit status 2, one line that says what came, no traceback, nothing written."""
    assert words in refused(train, tmp_path / "out", "--steps", "1", *arguments)
    assert not list(tmp_path.rglob("*.*"))


def test_an_output_folder_that_cannot_be_written_is_said_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("here first")
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "file" / "run", "--steps", "1")
    assert stopped.value.code == 2
    assert "cannot be made" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "here first"


def test_a_run_is_not_overwritten_and_not_mixed(run, capsys):
    """A folder with a run needs --resume; other settings are named."""
    for arguments, words in (
        (["--steps", "4"], "already holds a run"),
        (["--steps", "4", "--resume", "--seed", "1"], "--seed 0, not 1"),
        (["--steps", "3", "--resume"], "has done 4 steps already"),
    ):
        with pytest.raises(SystemExit) as stopped:
            train(run, *arguments)
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err


def test_help_shows_every_default(capsys):
    for main in (train_toy.main, __main__.main):
        arguments = [["--help"]] if main is train_toy.main else [["--help"], ["generate", "--help"], ["condition", "--help"]]
        for argument in arguments:
            with pytest.raises(SystemExit) as stopped:
                main(argument)
            assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 10000)" in text
    assert "(default: the model's own" in text
    assert "1 to 1000" in text


def test_minicn_condition_and_generate_make_pictures(tmp_path, capsys):
    """`minicn condition canny` then `minicn generate`: what Python gives, from the command line."""
    scene = toy.scene(1, "test")
    Image.fromarray(scene.image).save(tmp_path / "image.png")
    __main__.main(["condition", "canny", str(tmp_path / "image.png"), str(tmp_path / "hint.png")])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "hint.png")), scene.hint("canny"))
    arguments = "generate --model toy --controlnet toy-canny --num-steps 2 --seed 3 --device cpu".split()
    paths = ["--hint", str(tmp_path / "hint.png"), "--output", str(tmp_path / "out.png")]
    assert __main__.main([*arguments, *paths, "--prompt", scene.caption]) == 0
    sd = StableDiffusion.load("toy")
    net = ControlNet.load("toy-canny", unet=sd.unet)
    [expected] = sd.generate(scene.caption, hint=scene.hint("canny"), controlnet=net, num_steps=2, seed=3)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), np.asarray(expected))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output", "{tmp}"], "is a folder"),
        (["--output", "{tmp}/none/out.png"], "a folder that does not exist"),
        (["--output", "{tmp}/out.xyz"], "no extension of a writable picture format"),
        (["--output", "{tmp}/out.psd"], "no extension of a writable picture format"),
        (["--output", "{tmp}/out.png", "--num-steps", "0"], "expected an integer from 1 to 1000, got '0'"),
        (["--output", "{tmp}/out.png", "--seed", "-1"], "from 0 to"),
        (["--output", "{tmp}/out.png", "--model", "{tmp}/none"], "is not a file or folder"),
        (["--output", "{tmp}/out.png", "--hint", "{tmp}/none.png"], "go together"),
        (["--output", "{tmp}/out.png", "--hint", "{tmp}/none.png", "--controlnet", "toy-canny"], "does not exist"),
        (["--output", "{tmp}/out.png", "--hint", "{tmp}/text.png", "--controlnet", "toy-canny"], "is not a readable image"),
        (["--output", "{tmp}/out.png", "--hint", "{tmp}/odd.png", "--controlnet", "toy-canny"], "multiples of 8"),
        (["--output", "{tmp}/out.png", "--hint", "{tmp}/ok.png", "--controlnet", "toy-smell"], "toy-canny"),
        (["--output", "{tmp}/out.png", *CONTROL, "--control-start", "0.9", "--control-end", "0.1"], "lies after"),
    ],
)
def test_minicn_generate_refuses_in_one_line(tmp_path, refused, arguments, words):
    """Bad input: exit status 2, one line, no traceback, no picture written."""
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (30, 30)).save(tmp_path / "odd.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "ok.png")
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    assert words in refused(__main__.main, ["generate", "--prompt", "a red ball", "--device", "cpu", *arguments])
    assert not (tmp_path / "out.png").exists()


def test_python_m_minicn_is_the_command():
    """`python -m minicn` answers, with one line and status 2 when nothing is asked."""
    done = subprocess.run([sys.executable, "-m", "minicn"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: the following arguments are required: COMMAND (minicn --help lists all options)\n"
