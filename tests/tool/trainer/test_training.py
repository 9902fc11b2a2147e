"""Training by a recipe: the regimes, shares of a batch, what is logged, what is kept, `minicn train`."""

import contextlib
import csv
import dataclasses
import functools
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import assert_close
from PIL import Image

from minicn import ControlNet, ControlNetConfig, StableDiffusion, UNet, UNetConfig, __main__, ddim, fast, toy, training
from minicn.checkpoints import files, hub, weights
from minicn.checkpoints.models import load_model
from minicn.commands import cli
from minicn.trainer import data, loop, memory, recording
from minicn.trainer.examples import from_pairs, from_scenes, from_toy
from minicn.unet import Block

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def sd(dezero):
    return tiny(dezero)


def tiny(dezero, **smaller):
    """The toy with a U-Net a sixteenth as large, as if trained, or a smaller one."""
    toy_sd = StableDiffusion.load("toy")
    torch.manual_seed(0)
    width = toy_sd.unet.cfg.context_dim
    cfg = UNetConfig(model_channels=8, num_heads=2, context_dim=width, norm_num_groups=2, **smaller)
    return StableDiffusion(dezero(UNet(cfg)), toy_sd.vae, toy_sd.text_encoder, toy_sd.tokenizer)


FEW = {"channel_mult": (1, 2), "num_res_blocks": 1}  # two levels of one block: 4 + 1 connections


@pytest.fixture(scope="module")
def few(dezero):
    """A smaller one, where the number of connections does not matter."""
    return tiny(dezero, **FEW)


@pytest.fixture(scope="module")
def examples(sd):
    return from_scenes(sd, toy.scenes(6), "canny")


def test_scenes_are_those_that_the_steps_show(few):
    """Only these are drawn; a batch is the same whatever the number of steps, as if all were."""
    every = from_scenes(few, toy.scenes(20, "train", "openpose"), "openpose")
    for steps in (2, 4):
        shown, samples = from_toy(few, "openpose", 20, training.Recipe(steps, 2)), set()
        for step in range(1, steps + 1):
            batch, like = (each.batch(0, step, 2, 0.5, "cpu") for each in (shown, every))
            samples |= set(batch.samples.tolist())
            assert torch.equal(batch.samples, like.samples)
            assert torch.equal(batch.hints, like.hints)
            assert (batch.latents - like.latents).abs().max() < 1e-3
            assert (batch.context - like.context).abs().max() < 1e-3
        assert len(shown.latents) == len(samples) < 20
    with pytest.raises(IndexError):
        shown.batch(0, 7, 9, 0.5, "cpu")  # not a step of this recipe


def fresh(sd, seed=0):
    torch.manual_seed(seed)
    return ControlNet.from_unet(sd.unet, hint_channels=(4, 4, 8, 8))


def train(sd, examples, folder, net=None, validation=None, every=100, after=(), **settings):
    """Train in a folder and return the ControlNet."""
    recipe = training.Recipe(**{"steps": 3, "lr": 1e-3} | settings)
    run = recording.Run(folder, dataclasses.asdict(recipe))
    run.prepare(False)
    net = net or fresh(sd)
    loop.train(sd, net, examples, validation, run, recipe, score_every=every, score_after=after)
    return net


def distance(a, b):
    """Relative distance of two models' parameters."""
    a, b = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (a, b))
    return ((a - b).norm() / b.norm()).item()


# Regimes


def test_middle_alone_leaves_the_twelve_others_untouched(sd, examples, tmp_path):
    """Small-scale regime: the 12 zero convolutions are not computed and stay exactly zero; then the decoder reconnects."""
    calls = []
    net = fresh(sd)
    for zero in net.zero_convs:
        zero.register_forward_hook(lambda *_: calls.append(1))
    train(sd, examples, tmp_path / "middle", net, connect="middle")
    assert not calls
    assert not any(p.any() for p in net.zero_convs.parameters())
    assert net.middle_block_out[0].weight.any()
    again = ControlNet.load(tmp_path / "middle" / "controlnet.safetensors", unet=sd.unet)
    train(sd, examples, tmp_path / "all", again, connect="all")
    assert all(zero[0].weight.any() for zero in again.zero_convs)


def test_middle_alone_is_the_middle_residual_of_all(sd, examples):
    """Only the middle's residual is added: what the U-Net gives with the twelve others at zero, bit for bit."""
    net = fresh(sd)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.01)
    batch = examples.batch(0, 1, 2, 0.0, torch.device("cpu"))
    with torch.no_grad():
        control = net(batch.latents, batch.hints, batch.timesteps, batch.context)
        net.only_middle = True
        alone = net(batch.latents, batch.hints, batch.timesteps, batch.context)
        assert alone[:12] == [None] * 12
        assert torch.equal(alone[12], control[12])
        silent = [torch.zeros_like(c) for c in control[:12]]
        a, b = (sd.unet(batch.latents, batch.timesteps, batch.context, c) for c in (alone, [*silent, control[12]]))
    assert torch.equal(a, b)


@pytest.mark.parametrize("unlock", ["none", "decoder", "all"])
def test_unlocking_moves_what_it_says_and_nothing_else(examples, tmp_path, unlock, dezero):
    """Large-scale regime: the decoder, or all, of the U-Net learns at its own rate; the whole is saved as one file."""
    sd, before = tiny(dezero, **FEW), tiny(dezero, **FEW).unet.state_dict()
    train(sd, examples, tmp_path, unlock=unlock, unlock_lr=1e-4)
    moved = {key for key, tensor in sd.unet.state_dict().items() if not torch.equal(tensor, before[key])}
    decoder = {key for key in before if key.startswith(("output_blocks.", "out."))}
    assert moved == {"none": set(), "decoder": decoder, "all": set(before)}[unlock]
    after = sd.unet.state_dict()
    largest = max((after[key] - before[key]).abs().max().item() for key in before)
    assert largest <= 3 * 1.1e-4
    assert all(p.grad is None for p in sd.unet.parameters())
    assert (tmp_path / "model.safetensors").is_file() == (unlock != "none")
    if unlock != "none":
        found = weights.contents(files.open_weights(tmp_path / "model.safetensors"))
        assert set(found.parts) == {"unet", "vae", "text_encoder", "controlnet"}
        whole = StableDiffusion.load(tmp_path / "model.safetensors", tokenizer=hub.TOY_BASE / "tokenizer")
        assert torch.equal(whole.unet.out[2].weight, sd.unet.out[2].weight)
        ControlNet.load(tmp_path / "model.safetensors", unet=whole.unet)


def test_the_learning_rate_falls_to_zero_over_the_last_share():
    """1 for the first 70 of 100 steps, then evenly to 1/30 at the last; without decay 1 throughout."""
    factors = [training.learning_rate_factor(step, 100) for step in range(1, 101)]
    assert factors[:71] == [1.0] * 71
    for step in range(72, 101):
        assert abs(factors[step - 1] - (101 - step) / 30) < 1e-12
    assert training.learning_rate_factor(100, 100, 0.0) == 1


# Shares of a batch


def test_accumulation_gives_the_same_weights(few, examples, tmp_path):
    """A batch of 4 in one, two and four parts, up to rounding: relative distance at most 1e-6 of weights that moved 1e-3."""
    one, two, four = (train(few, examples, tmp_path / str(n), batch_size=4, accumulate=n) for n in (1, 2, 4))
    start = fresh(few)
    moved = distance(one, start)
    assert moved > 1e-3
    # Adam divides by the gradient's size: where that is rounding alone, so is the step.
    assert distance(two, one) < 0.02 * moved
    assert distance(four, one) < 0.02 * moved


def test_the_parts_of_a_batch_are_the_batch(examples):
    """Sample i of step s is a function of (seed, s, i): shares of several processes, put together, are the whole."""
    whole = examples.batch(3, 7, 6, 0.5, torch.device("cpu"))
    parts = [examples.batch(3, 7, 6, 0.5, torch.device("cpu"), slice(i, i + 2)) for i in (0, 2, 4)]
    for field in dataclasses.fields(whole):
        joined = torch.cat([getattr(part, field.name) for part in parts])
        assert torch.equal(joined, getattr(whole, field.name)), field.name


@pytest.mark.parametrize("arguments", [["--accumulate", "3"], ["--accumulate", "8"]])
def test_a_batch_that_cannot_be_shared_is_refused(tmp_path, capsys, arguments):
    __main__.main(["make-data", str(tmp_path / "data"), "--count", "2"])
    command = ["train", "--model", "toy", "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        __main__.main([*command, "--steps", "1", "--pictures", "0", "--device", "cpu", *arguments])
    assert stopped.value.code == 2
    assert "a batch of 4 cannot be shared by 1 processes" in capsys.readouterr().err


SHARED = {"lr": 1e-3, "batch_size": 8, "unlock_lr": 1e-3, "lr_decay": 0}


def _one_of_two(rank, folder, dezero, examples, port):
    """A process of its own, as torchrun starts them: a run with DDP, then one with FSDP2, which is resumed."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    for unlock, steps, resume in (("none", 3, False), ("all", 2, False), ("all", 3, True)):
        model = tiny(dezero, **FEW)
        recipe = training.Recipe(steps=steps, accumulate=2, unlock=unlock, **SHARED)
        run = recording.Run(folder / unlock, dataclasses.asdict(recipe))
        if rank == 0:
            run.prepare(resume)
        loop.train(model, fresh(model), examples, None, run, recipe, score_every=1, resume=resume)
        torch.distributed.barrier()


@pytest.fixture(scope="module")
def two_processes(examples, tmp_path_factory, dezero):
    """The folder that two processes, started once, left their runs in.

    On Linux they are forked, so that they need not import everything again.
    """
    folder = tmp_path_factory.mktemp("two")
    method = "fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn"
    arguments = (folder, dezero, examples, 29517)
    torch.multiprocessing.start_processes(_one_of_two, arguments, nprocs=2, start_method=method)
    return folder


@pytest.mark.parametrize("unlock", ["none", "all"])
def test_two_processes_give_the_weights_of_one(two_processes, examples, tmp_path, dezero, unlock):
    """Over gloo, each process with two parts: the models of one process, up to rounding; one log.

    DDP; with all unlocked FSDP2, in parts, and resumed from a checkpoint.
    """
    sd, start = tiny(dezero, **FEW), tiny(dezero, **FEW)
    one = train(sd, examples, tmp_path / "one", every=1, unlock=unlock, **SHARED)
    two = ControlNet.load(two_processes / unlock / "controlnet.safetensors")
    assert distance(two, one) < 0.02 * distance(one, fresh(start))
    if unlock == "all":
        unet = load_model("unet", weights.contents(files.open_weights(two_processes / unlock / "model.safetensors")))
        assert distance(sd.unet, start.unet) > 1e-3
        assert distance(unet, sd.unet) < 0.02 * distance(sd.unet, start.unet)
    paths = (tmp_path / "one" / "log.csv", two_processes / unlock / "log.csv")
    logs = [list(csv.DictReader(path.read_text().splitlines())) for path in paths]
    assert [row["step"] for row in logs[1]] == ["0", "1", "2", "3"]
    for a, b in zip(*(log[1:] for log in logs), strict=True):
        assert abs(float(a["loss"]) - float(b["loss"])) <= 2e-5


# Memory and precision


@pytest.mark.numbers
def test_without_fast_gradients_are_the_same(dezero):
    """Of the models as they stand in their files, and with exchanged layers and recomputed blocks; in float64."""
    unet = tiny(dezero, **FEW).unet.double()
    net = dezero(ControlNet.from_unet(unet, hint_channels=(4, 4, 8, 8)))
    latents, hints, context = (
        torch.rand(2, *shape).double() for shape in ((4, 16, 16), (3, 128, 128), (77, unet.cfg.context_dim))
    )
    batch = training.Batch(
        torch.arange(2), latents, torch.randn(latents.shape).double(), hints, torch.tensor([10, 900]), context
    )

    def gradients():
        net.zero_grad()
        training.controlnet_loss(unet, net, batch, ddim.alphas_cumprod().double()).mean().backward()
        return [p.grad for p in net.parameters()]

    plain = gradients()
    for model in (unet, net):
        fast.prepare(model)
        fast.recompute(model)
    assert {type(m) for model in (unet, net) for m in model.modules()} >= {fast.GroupNorm, fast.RecomputedBlock}
    for a, b in zip(gradients(), plain, strict=True):
        assert_close(a, b)


def test_gradient_checkpointing_changes_nothing_but_memory(few, sd, examples, tmp_path):
    """The same weights bit for bit, with fewer tensors kept for the backward pass."""
    plain, again = (train(few, examples, tmp_path / str(c), gradient_checkpointing=c) for c in (False, True))
    blocks = [type(model.middle_block) for model in (plain, again, few.unet)]
    assert blocks == [Block, fast.RecomputedBlock, fast.RecomputedBlock]  # the recipe reached both
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), again.parameters(), strict=True))

    def kept(checkpointing):
        net, sizes = fresh(sd), []
        for model in (sd.unet, net):
            fast.recompute(model, checkpointing)
        batch = examples.batch(0, 1, 2, 0.5, torch.device("cpu"))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            training.controlnet_loss(sd.unet, net, batch, sd.alphas_cumprod)
        fast.recompute(sd.unet, False)
        return sum(sizes)

    assert kept(True) < 0.5 * kept(False)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_autocast_keeps_the_weights_in_float32(few, examples, tmp_path, precision):
    net = train(few, examples, tmp_path / "half", precision=precision, steps=2)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert distance(net, fresh(few)) > 1e-4
    assert distance(net, train(few, examples, tmp_path / "whole", steps=2)) > 0  # the rounding is seen


# What is seen


def test_pictures_are_drawn_after_the_steps_asked_for(sd, examples, tmp_path):
    """Every so many steps, after those named, and at both ends."""
    scene = toy.scene(0, "test")
    validation = recording.Validation(sd, [scene.image], [scene.hint("canny")], [scene.caption], 1.0, num_steps=1)
    train(sd, examples, tmp_path, validation=validation, every=4, after=(1, 3), steps=5)
    rows = csv.DictReader((tmp_path / "log.csv").read_text().splitlines())
    assert [row["step"] for row in rows] == ["0", "1", "3", "4", "5"]


def test_the_log_holds_what_changes(sd, examples, tmp_path):
    """At step 0: sensitivity and zero convolutions 0, and the losses of the locked model; then they grow."""
    held = [toy.scene(i, "test") for i in range(2)]
    pictures = [s.image for s in held], [s.hint("canny") for s in held], [s.caption for s in held]
    validation = recording.Validation(sd, *pictures, 3.0, num_steps=1)
    train(sd, examples, tmp_path, validation=validation, every=3, steps=6)
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["0", "3", "6"]
    names = [f"zero_{i}" for i in range(12)] + ["zero_middle"]
    assert all(float(rows[0][name]) == 0 for name in (*names, "sensitivity", "score"))
    assert all(float(rows[2][name]) > float(rows[1][name]) > 0 for name in names)
    assert float(rows[2]["sensitivity"]) > 0
    assert all(float(rows[0][f"loss_q{i}"]) > 0 for i in (1, 2, 3, 4))
    assert Image.open(tmp_path / "sheet.png").size[0] == 5 * 132 - 4


def test_the_less_noise_there_is_the_harder_it_is_to_tell():
    """The losses of the toy itself in the four quarters of the timesteps, the least noisy first."""
    sd, scene = StableDiffusion.load("toy"), toy.scene(0, "test")
    validation = recording.Validation(sd, [scene.image], [scene.hint("canny")], [scene.caption], 1.0, num_steps=1)
    losses = validation.losses(ControlNet.from_unet(sd.unet, hint_channels=(4, 4, 4, 4)))
    quarters = [losses[f"loss_q{i}"] for i in (1, 2, 3, 4)]
    assert quarters == sorted(quarters, reverse=True)


def test_nan_stops_with_step_and_samples(few, examples, tmp_path):
    """A loss that is no number ends the run at once, and says what to do; no checkpoint is spoilt."""
    net = fresh(few)
    with torch.no_grad():
        net.middle_block_out[0].bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"the loss is nan at step 1 \(samples \d+, \d+, \d+, \d+\): lower --lr"):
        train(few, examples, tmp_path, net)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_tensorboard_gets_the_log_where_it_is_installed(tmp_path, monkeypatch):
    """Every number of a row by its name, at its step; what is not known yet (nan) is left out."""
    written = []

    class Board(contextlib.nullcontext):
        def add_scalar(self, *scalar):
            written.append(scalar)

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda folder: Board()
    Board.__enter__ = lambda self: self
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run = recording.Run(tmp_path, {})
    run.log(step=3, loss=0.5, score=float("nan"))
    assert written == [("loss", 0.5, 3)]


# Checkpoints


def test_a_stop_within_an_accumulation_loses_nothing(few, examples, tmp_path, monkeypatch):
    """SIGTERM in the first of two parts of step 2: the step ends, is kept, and --resume ends with the same weights."""
    settings = {"steps": 4, "batch_size": 4, "accumulate": 2, "lr": 1e-3}
    whole, recipe = train(few, examples, tmp_path / "whole", **settings), training.Recipe(**settings)
    calls, loss = [], training.controlnet_loss

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*arguments)

    for resume in (False, True):
        run, net = recording.Run(tmp_path / "stopped", dataclasses.asdict(recipe)), fresh(few, seed=int(resume))
        run.prepare(resume)
        monkeypatch.setattr(training, "controlnet_loss", loss if resume else interrupted)
        with contextlib.nullcontext() if resume else pytest.raises(KeyboardInterrupt, match="after step 2 of 4"):
            loop.train(few, net, examples, None, run, recipe, resume=resume)
        assert torch.load(run.checkpoint, weights_only=True)["step"] == (4 if resume else 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), net.parameters(), strict=True))


def test_older_checkpoints_are_kept_and_used_if_the_newest_is_damaged(tmp_path):
    run = recording.Run(tmp_path, {"steps": 9}, keep=2)
    run.prepare(False)
    for step in (1, 2, 3, 4):
        run.save(step, {"net": torch.tensor(step)})
    names = ["checkpoint-00000002.pt", "checkpoint-00000003.pt", "checkpoint.pt"]
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == names
    assert run.load()["step"] == 4
    run.checkpoint.write_bytes(run.checkpoint.read_bytes()[:100])
    with pytest.warns(UserWarning, match=r"is damaged .*; checkpoint-00000003\.pt is whole, and taken instead"):
        assert run.load()["step"] == 3
    run.save(4, {"net": torch.tensor(4)})  # over the damaged one
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == names
    assert run.load()["step"] == 4
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"is damaged .*no older one is kept"):
        run.load()


def test_a_folder_serves_one_run_at_a_time(tmp_path):
    first, second = recording.Run(tmp_path, {}), recording.Run(tmp_path, {})
    first.prepare(False)
    with pytest.raises(ValueError, match="is in use by another run"):
        second.prepare(False)
    first.release()
    second.prepare(False)


def test_a_full_disk_leaves_the_checkpoint_before_whole(tmp_path, monkeypatch):
    """Writing fails half way: the message says what to do, the old checkpoint loads, nothing half-written stays."""
    run = recording.Run(tmp_path, {"steps": 9})
    run.prepare(False)
    run.save(1, {"net": torch.tensor(1)})

    def full(state, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="cannot be written .*No space left.*free space.*what was there is intact"):
            run.save(2, {"net": torch.tensor(2)})
    assert run.load()["step"] == 1
    assert not list(tmp_path.glob(".minicn-*"))


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "circles"
    __main__.main(["make-data", str(path), "--count", "6"])
    return path


@pytest.fixture
def quick(monkeypatch):
    """Pictures on the way are drawn in one step."""
    monkeypatch.setattr(recording, "Validation", functools.partial(recording.Validation, num_steps=1))


def command(folder, output, *more):
    arguments = "train --model toy --steps 2 --batch-size 1 --pictures 1".split()
    arguments += "--score-every 2 --checkpoint-every 1 --resolution 64 --device cpu".split()
    return __main__.main([*arguments, "--data", str(folder), "--output", str(output), *more])


def test_minicn_train_leaves_what_other_tools_load(folder, tmp_path, capsys, quick):
    """Log, sheet, checkpoint, weights in both layouts; resuming after a kill gives the same weights bit for bit."""
    assert command(folder, tmp_path / "whole") == 0
    assert "Weights: " in capsys.readouterr().out
    a = ControlNet.load(tmp_path / "whole" / "controlnet.safetensors")
    b = ControlNet.load(tmp_path / "whole" / "diffusers")
    run = ControlNet.load(tmp_path / "whole")  # the folder itself, too
    for other in (b, run):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), other.parameters(), strict=True))
    assert a.cfg.hint_channels == (16, 32, 96, 256)
    assert Image.open(tmp_path / "whole" / "sheet.png").size[0] == 4 * 68 - 4
    process = [sys.executable, "-m", "minicn", *"train --model toy --steps 2 --batch-size 1 --pictures 0".split()]
    process += "--score-every 2 --checkpoint-every 1 --resolution 64 --device cpu".split()
    process += ["--data", str(folder), "--output", str(tmp_path / "killed")]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # as here (conftest): more threads add up in another order
    running = subprocess.Popen(process, cwd=ROOT, env=alone, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "checkpoint.pt").is_file() and running.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(0.01)
    running.kill()
    running.wait()
    command(folder, tmp_path / "killed", "--resume", "--pictures", "0")
    c = ControlNet.load(tmp_path / "killed" / "controlnet.safetensors")
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters(), strict=True))


@pytest.mark.parametrize(("more", "held"), [([], 3), (["--held-out", "1"], 1), (["--held-out", "0"], 0)])
def test_the_first_pairs_are_held_out(folder, tmp_path, capsys, monkeypatch, more, held):
    """Drawn and scored, not learned from; of few pairs half. Said before the work."""
    shown = []
    monkeypatch.setattr("minicn.commands.train.validation", lambda sd, pairs, *_: shown.extend(pairs))
    command(folder, tmp_path, "--steps", "1", "--pictures", "2", *more)
    pairs = data.read_pairs(folder)
    assert shown == pairs[: min(2, held or 2)]
    learned = files.open_weights(tmp_path / "encoded.safetensors")
    assert learned.shapes["latents"][0] == 6 - held
    assert torch.equal(learned.get("latents"), from_pairs(StableDiffusion.load("toy"), pairs[held:], 64).latents)
    said = f"held out: {held} of 6 pairs, drawn" if held else "held out: none; the pairs drawn and scored are learned from"
    assert f"note: {said}" in capsys.readouterr().err


def test_hints_of_a_folder_are_read_as_they_are(sd, folder):
    """Hints in [0, 1], latents of the images, the folder's prompts."""
    pairs = data.read_pairs(folder)
    examples = from_pairs(sd, pairs, 128, batch_size=2)
    batch = examples.batch(0, 1, 3, 0.0, torch.device("cpu"))
    for i, sample in enumerate(batch.samples.tolist()):
        hint, image = data.load_pair(pairs[sample], 128)
        assert torch.equal(batch.hints[i], torch.from_numpy(hint.copy()).permute(2, 0, 1).float() / 255)
        latents = sd.encode_images([Image.fromarray(image)])[0]
        assert (batch.latents[i] - latents).abs().max() < 1e-4
        assert torch.equal(batch.context[i], examples.contexts[examples.prompt[sample]])
    assert not np.array_equal(batch.hints[0], batch.hints[1])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data", "{tmp}/none"], "none is not a folder"),
        (["--data", "{tmp}"], "holds no prompt.json"),
        (["--data", "{tmp}/vanished"], "does not exist"),
        (["--resolution", "100"], "must be a multiple of 8"),
        (["--model", "{tmp}/none"], "is not a file or folder"),
        (["--controlnet", "{tmp}/none"], "is not a file or folder"),
        (["--held-out", "6"], "--held-out is 6, but the data are 6 pairs: leave some to learn from"),
        (["--connect", "left"], "'left'"),
        (["--output", "{tmp}/file/run"], "cannot be made"),
        (["--data", "{tmp}/cut", "--held-out", "0"], "0.png is not a readable image"),
    ],
)
def test_minicn_train_refuses_in_one_line(folder, tmp_path, refused, more, words):
    """Nor does it leave a folder."""
    (tmp_path / "file").write_text("")
    (tmp_path / "vanished").mkdir()
    (tmp_path / "vanished" / "prompt.json").write_text('{"source": "a.png", "target": "b.png", "prompt": "x"}')
    cut = shutil.copytree(folder, tmp_path / "cut") / "target" / "0.png"
    cut.write_bytes(cut.read_bytes()[:200])
    assert words in refused(command, folder, tmp_path / "out", *(argument.format(tmp=tmp_path) for argument in more))
    assert not (tmp_path / "out").exists()


def test_a_picture_that_vanishes_during_training_is_named(few, folder, tmp_path):
    __main__.main(["make-data", str(tmp_path / "data"), "--count", "2"])
    pairs = data.read_pairs(tmp_path / "data")
    examples = from_pairs(few, pairs, 128)
    for pair in pairs:
        pair.hint.unlink()
    with pytest.raises(FileNotFoundError, match=r"source/\d\.png does not exist"):
        train(few, examples, tmp_path / "run")


# The ledger


SHAPES = (UNetConfig(model_channels=64, channel_mult=(1, 2), context_dim=64), 128)


@functools.cache
def predicted(unlock="none", **settings):
    """The ledger of a recipe, from shapes alone; the same one is asked for by several tests."""
    cfg, size = SHAPES
    with torch.device("meta"):
        unet, net = UNet(cfg), ControlNet(ControlNetConfig(cfg))
    recipe = training.Recipe(**{"steps": 1, "batch_size": 2} | settings, unlock=unlock)
    return memory.predict(unet, net, recipe, size, 1, torch.device("cpu"))


def test_the_ledger_counts_weights_gradients_and_moments(dezero):
    """Exactly, for each regime: a gradient and two moments of float32 for each weight that learns."""
    cfg, _ = SHAPES
    with torch.device("meta"):
        unet, net = UNet(cfg), ControlNet(ControlNetConfig(cfg))
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in (("unet", unet), ("net", net))}
    learned = {"none": count["net"], "all": count["net"] + count["unet"]}
    for unlock, numbers in learned.items():
        found = predicted(unlock)
        assert found.weights == 4 * (count["unet"] + count["net"])
        assert found.gradients == 4 * numbers
        assert abs(found.optimiser - 8 * numbers) < 1e5  # and a counter for each tensor
        assert found.weights + found.optimiser < found.peak
        assert found.peak < found.weights + found.optimiser + found.gradients + 1.5 * found.activations


def test_the_ledger_knows_what_saves_memory():
    """Gradient checkpointing, parts of a batch and the small-scale regime keep less for the backward pass."""
    plain = predicted().activations
    assert predicted(gradient_checkpointing=True).activations < 0.4 * plain
    assert abs(predicted(accumulate=2).activations / plain - 0.5) < 0.05
    assert predicted(connect="middle").activations < plain


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("steps", 0, "int from 1"),
        ("steps", 1.5, "int from 1"),
        ("batch_size", -1, "int from 1"),
        ("lr", float("nan"), "float from 0 to 1"),
        ("seed", 10**13, "int from 0 to 9000000000000"),
        ("seed", "1", "int"),
        ("connect", "side", "all or middle"),
        ("gradient_checkpointing", 1, "bool"),
    ],
)
def test_a_recipe_out_of_range_is_refused(name, value, words):
    with pytest.raises(ValueError, match=f"^{name} is {value!r}, but must be {words}"):
        training.Recipe(**{"steps": 3} | {name: value})


def test_numpys_numbers_make_the_same_recipe():
    """A checkpoint keeps it, in which numpy's numbers would be calls of functions."""
    recipe = training.Recipe(np.int64(3), np.uint8(2), lr=np.float64(0.5), gradient_checkpointing=False)
    assert recipe == training.Recipe(3, 2, lr=0.5)
    assert {type(value) for value in dataclasses.asdict(recipe).values()} == {int, float, str, bool}


def test_the_ledger_counts_what_autograd_keeps():
    """Predicted without a number computed: within 1% of the tensors that a real forward pass saves for the backward pass."""
    cfg, size = SHAPES
    unet, net = UNet(cfg), ControlNet(ControlNetConfig(cfg))
    recipe = training.Recipe(steps=1, batch_size=2)
    fast.prepare(unet), fast.prepare(net)
    training.apply_regime(unet, net, recipe)
    fast.prepare(unet), fast.prepare(net)  # as in a run
    own = {p.untyped_storage().data_ptr() for model in (unet, net) for p in model.parameters()}
    batch, kept = memory.example(net, recipe, size, 1, torch.device("cpu")), {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = training.controlnet_loss(unet, net, batch, ddim.alphas_cumprod())
    found = predicted().activations
    assert loss.requires_grad
    assert abs(found / sum(storage.nbytes() for storage in kept.values()) - 1) < 0.01


def test_a_dry_run_prints_the_ledger_and_leaves_nothing(folder, tmp_path, capsys, monkeypatch):
    for free, verdict in ((10**12, "enough"), (10**6, "not enough")):
        monkeypatch.setattr(cli, "free_memory", lambda device, free=free: free)
        assert command(folder, tmp_path / "out", "--dry-run") == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == "weights gradients optimiser activations peak free".split()
        assert lines[-1].endswith(f"MB: {verdict}")
    assert not (tmp_path / "out").exists()
