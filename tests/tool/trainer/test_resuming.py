"""What a run finds in its folder and does not trust: checkpoints, encoded data, stages, locks, the files of others."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import train_toy
from minicn import ControlNet, StableDiffusion, UNet, UNetConfig, __main__, toy, training
from minicn.checkpoints import files
from minicn.trainer import data, pretraining, recording, resuming
from minicn.trainer import examples as examples_module
from minicn.trainer.examples import from_pairs
from minicn.trainer.progress import Progress


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion.load("toy")


@pytest.fixture(scope="module")
def few(sd):
    """The toy with a U-Net of two levels."""
    torch.manual_seed(0)
    cfg = UNetConfig(model_channels=8, channel_mult=(1, 2), num_res_blocks=1, num_heads=2, norm_num_groups=2, context_dim=64)
    return StableDiffusion(UNet(cfg), sd.vae, sd.text_encoder, sd.tokenizer)


def progress(few, folder, keep=0, **settings) -> Progress:
    """A run in a folder, ready to begin or to resume."""
    net = ControlNet.from_unet(few.unet, hint_channels=(4, 4, 8, 8))
    recipe = training.Recipe(**{"steps": 9} | settings)
    optimizer = torch.optim.AdamW(training.apply_regime(few.unet, net, recipe), lr=0.1, fused=True)
    run = recording.Run(folder, dataclasses.asdict(recipe), keep)
    return Progress(run, few, net, optimizer, recipe, None)


def step(begun: Progress) -> None:
    """Make and save a step whose gradients are the parameters."""
    for p in begun.net.parameters():
        p.grad = p.detach().clone() + 1
    begun.optimizer.step()
    begun.step += 1
    begun.save()


@pytest.fixture(scope="module")
def saved(few, tmp_path_factory):
    """The folder of a run that was killed after its first step."""
    folder = tmp_path_factory.mktemp("saved")
    begun = progress(few, folder)
    begun.run.log(step=0, loss=float("nan"), score=float("nan"), seconds=0.0)
    step(begun)
    return folder


# Checkpoints


def moment(**more):
    """Change what the optimiser keeps of the first weight."""
    return lambda state: state["optimizer"]["state"][0].update(more)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (moment(exp_avg=torch.zeros(7)), r"optimizer.state.0.exp_avg is torch.float32 of shape \(7,\), but must be"),
        (moment(exp_avg_sq=torch.zeros(0)), r"exp_avg_sq is .* shape \(0,\)"),
        (moment(exp_avg=torch.zeros(32, 8, dtype=torch.float64)), "exp_avg is torch.float64"),
        (moment(exp_avg=torch.zeros(32, 8).to_sparse()), "exp_avg is"),
        (moment(step="many"), "optimizer.state.0.step is 'many'"),
        (moment(step=torch.tensor(-1.0)), "optimizer.state.0.step is -1, but must be 0 or more"),
        (lambda s: s["optimizer"]["param_groups"][0].update(betas=(0.9, 1.0)), r"has lr 1e-05 and betas \(0.9, 1.0\)"),
        (
            lambda s: s["optimizer"]["param_groups"][0].update(betas=(-0.9, 0.9)),
            r"param_groups.0 has lr 1e-05 and betas \(-0.9, 0.9\)",
        ),
        (lambda s: s["optimizer"]["param_groups"][0].update(lr=1e15), r"param_groups.0 has lr 1e\+15 and"),
        (moment(max_exp_avg_sq=torch.zeros(8)), "state.0 is a dict of 4, but must be a dict of 3"),
        (lambda s: s["optimizer"]["state"].update({10**6: {}, 10**6 + 1: torch.zeros(1)}), "optimizer.state.1000001 is"),
        (lambda s: s["optimizer"].update(state=[1]), "optimizer.state is a list of 1"),
        (lambda s: s["optimizer"].update(param_groups=[{}]), "param_groups.0.lr is of type NoneType"),
        (lambda s: s["optimizer"].update(param_groups=7), "param_groups is of type int"),
        (lambda s: s["optimizer"]["param_groups"][0].update(betas=(0.9, 10**400)), "betas.1 is of type int"),
        (lambda s: s.pop("optimizer"), "optimizer"),
        (lambda s: s.pop("net"), "net is of type NoneType"),
        (lambda s: s["net"].popitem(), r"net is a \w+ of \d+, but must be a \w+ of \d+"),
        (lambda s: s["net"].update({"time_embed.0.bias": torch.zeros(3)}), r"net.time_embed.0.bias is .*shape \(3,\)"),
        (lambda s: s["net"]["time_embed.0.bias"].fill_(float("nan")), "net.time_embed.0.bias holds NaN"),
        (lambda s: s["net"].update({"time_embed.0.bias": 0}), "net.time_embed.0.bias is of type int"),
        (lambda s: s.update(step=1.5), "its step"),
        (lambda s: s.update(step=-1), "its step"),
        (lambda s: s.update(step=True), "its step"),
        (lambda s: s.update(settings="x"), "its settings"),
        (lambda s: s.update(rows=[{"a": 1}]), "its rows"),
        (lambda s: s["rows"][0].update(score="good"), "its rows"),
        (lambda s: s["rows"][0].update(seconds=10**400), "its rows"),
        (lambda s: s["rows"][0].update(seconds=10**5000), ""),  # PyTorch does not read it
        (lambda s: s.update(losses=[[]]), "its losses"),
        (lambda s: s.update(kept=["../x"]), "its kept"),
        (lambda s: s.update(threads=[]), "its threads"),
        (lambda s: s.clear(), "its step"),
    ],
)
def test_a_checkpoint_is_compared_with_the_run_before_any_of_it_is_used(few, saved, tmp_path, change, words):
    """Whatever differs is named in a line; neither weights nor moments are touched."""
    state = torch.load(saved / "checkpoint.pt", weights_only=True)
    change(state)
    torch.save(state, tmp_path / "checkpoint.pt")
    begun = progress(few, tmp_path)
    before = [p.detach().clone() for p in begun.net.parameters()]
    with pytest.raises(ValueError, match=rf"checkpoint\.pt is damaged.*{words}.*no older one is kept"):
        begun.resume()
    assert all(torch.equal(a, b) for a, b in zip(before, begun.net.parameters(), strict=True))
    assert not begun.optimizer.state


@pytest.mark.parametrize("content", [torch.zeros(3), [], "text", b"no checkpoint", b"", None])
def test_what_is_no_checkpoint_is_said(few, tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt (is damaged|does not exist or is not an ordinary file)"):
        progress(few, tmp_path).resume()


def test_a_checkpoint_of_another_run_is_not_damaged_but_another(few, saved):
    with pytest.raises(ValueError, match="was made with --seed 0, not 1: give the same"):
        progress(few, saved, seed=1).resume()
    with pytest.raises(ValueError, match="was made with --unlock none, not all: give the same"):
        progress(few, saved, unlock="all").resume()
    for name in ("global_pool", "bgr"):  # which the weights do not show
        begun = progress(few, saved)
        begun.net.cfg = dataclasses.replace(begun.net.cfg, **{name: True})
        with pytest.raises(ValueError, match=f"is of a ControlNet whose {name} is not True: give the same --controlnet"):
            begun.resume()


@pytest.mark.filterwarnings("error")
def test_a_resumed_run_has_its_weights_and_moments(few, saved):
    begun = progress(few, saved)
    begun.resume()
    state = torch.load(saved / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(begun.net.state_dict().values(), state["net"].values(), strict=True))
    moments = begun.optimizer.state_dict()["state"]
    assert len(moments) == len(list(begun.net.parameters()))
    assert all(torch.equal(v, state["optimizer"]["state"][k][n]) for k, m in moments.items() for n, v in m.items())
    assert (begun.step, len(begun.run.rows)) == (1, 1)
    assert {type(group["betas"]) for group in begun.optimizer.param_groups} == {tuple}  # other types are not written again


def test_moments_get_the_memory_layout_of_their_weights(few, saved, tmp_path):
    """A run may go on on another device, where convolutions lie otherwise; the fused kernel goes by the order in memory."""
    state = torch.load(saved / "checkpoint.pt", weights_only=True)
    for moments in state["optimizer"]["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            if moments[name].ndim == 4:
                turned = torch.randn(moments[name].shape).abs()
                moments[name] = turned.clone(memory_format=torch.channels_last)
    torch.save(state, tmp_path / "checkpoint.pt")
    weights = []
    for layout in (torch.contiguous_format, torch.channels_last):
        begun = progress(few, tmp_path)
        begun.net.to(memory_format=layout)
        begun.resume()
        step_like(begun)
        weights.append([p.detach().clone() for p in begun.net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def step_like(begun: Progress) -> None:
    for i, p in enumerate(begun.net.parameters()):
        torch.manual_seed(i)
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape))
    begun.optimizer.step()


def test_an_older_checkpoint_is_taken_with_a_word(few, tmp_path):
    begun = progress(few, tmp_path, keep=1)
    step(begun), step(begun)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1)
    torch.save(state, tmp_path / "checkpoint.pt")
    again = progress(few, tmp_path, keep=1)
    with pytest.warns(UserWarning, match=r"exp_avg is .*; checkpoint-00000001\.pt is whole, and taken instead"):
        again.resume()
    assert again.step == 1


def test_only_the_runs_own_checkpoints_are_removed(few, tmp_path):
    """Not a user's copies, whatever their names, and not those of an earlier run."""
    for name in ("checkpoint-mine.pt", "checkpoint-00000007.pt", "checkpoint.part", "checkpoint.pt.part"):
        (tmp_path / name).write_text("mine")
    begun = progress(few, tmp_path, keep=1)
    for _ in range(3):
        step(begun)
    assert all((tmp_path / name).read_text() == "mine" for name in ("checkpoint-mine.pt", "checkpoint-00000007.pt"))
    assert {path.name for path in tmp_path.glob("*") if path.read_bytes()[:2] == b"PK"} == {
        "checkpoint.pt",
        "checkpoint-00000002.pt",
    }
    again = progress(few, tmp_path, keep=1)
    again.resume()
    step(again)
    assert not (tmp_path / "checkpoint-00000002.pt").exists()  # kept before the run was resumed
    assert (tmp_path / "checkpoint-00000003.pt").exists()


def test_rows_with_and_without_pictures_make_one_table(tmp_path):
    """A run may be resumed with --pictures 0, or with some."""
    run = recording.Run(tmp_path, {})
    run.log(step=0, score=0.0, sensitivity=1.0)
    run.log(step=1, score=0.5)
    assert (tmp_path / "log.csv").read_text().splitlines() == ["step,score,sensitivity", "0,0.0,1.0", "1,0.5,"]


def test_a_stage_that_the_run_did_not_write_is_red(sd, tmp_path):
    """In the sheet, with a word: missing, no picture, or of another width."""
    scene = toy.scene(0, "test")
    validation = recording.Validation.__new__(recording.Validation)
    validation.truths, validation.hint_pictures = [scene.image], [scene.hint("canny")]
    run = recording.Run(tmp_path, {})
    run.rows = [{"step": i, "score": 0.0} for i in range(4)]
    run.save_stage(0, [Image.fromarray(scene.image)])
    run.stage(1).write_text("no picture")
    Image.new("RGB", (64, 128)).save(run.stage(2))
    with pytest.warns(UserWarning, match="it is red in the sheet") as said:
        run.save_sheet(validation)
    assert len(said) == 3
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))[30:, :]
    assert np.array_equal(sheet[:, 2 * 132 : 2 * 132 + 128], scene.image)
    assert all((sheet[:, i * 132 : i * 132 + 128] == (255, 0, 0)).all() for i in (3, 4, 5))


# The folder


@pytest.mark.parametrize("name", ["controlnet.safetensors", "diffusers", "model.safetensors"])
def test_a_new_run_replaces_no_earlier_weights(tmp_path, name):
    recording.Run(tmp_path, {}).prepare(False)  # killed before its first checkpoint
    (tmp_path / name).write_text("weeks of work")
    with pytest.raises(ValueError, match=rf"{name} is there already, and would be replaced: move it, or name another"):
        recording.Run(tmp_path, {}).prepare(False)
    assert (tmp_path / name).read_text() == "weeks of work"


def test_a_new_run_replaces_only_the_reports_of_a_run(tmp_path):
    """A log of something else stays; one that a killed run left does not matter."""
    (tmp_path / "log.csv").write_text("of something else")
    with pytest.raises(ValueError, match=r"log\.csv is there already"):
        recording.Run(tmp_path, {}).prepare(False)
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]
    killed = recording.Run(tmp_path / "killed", {})
    killed.prepare(False)
    killed.log(step=0, score=0.0)
    killed.release()
    recording.Run(tmp_path / "killed", {}).prepare(False)


@pytest.mark.parametrize("locked", [True, False])
def test_a_refused_run_touches_nothing(few, saved, tmp_path, locked):
    """Nor does it keep the folder, or leave a lock where none was."""
    folder = shutil.copytree(saved, tmp_path / "run")
    (folder / ".lock").unlink(missing_ok=True)
    if locked:
        (folder / ".lock").touch()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    for settings in ({"seed": 1}, {"steps": 0}):
        with pytest.raises(ValueError, match="give"):
            recording.Run(folder, dataclasses.asdict(training.Recipe(9)) | settings).prepare(True)
    with pytest.raises(ValueError, match="already holds a run"):
        recording.Run(folder, {}).prepare(False)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before
    progress(few, folder).run.prepare(True)


@pytest.mark.parametrize("name", ["stages", "log.csv"])
def test_a_run_writes_through_no_link(tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    run = recording.Run(tmp_path / "run", {})
    run.prepare(False)
    run.release()
    (tmp_path / "run" / name).symlink_to(outside)
    with pytest.raises(ValueError, match=f"{name} is a link"):
        recording.Run(tmp_path / "run", {}).prepare(False)


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_what_lies_in_the_locks_place_is_neither_waited_for_nor_emptied(tmp_path, kind):
    lock, victim = tmp_path / ".lock", tmp_path / "victim"
    victim.write_text("precious")
    {"pipe": os.mkfifo, "link": lambda p: p.symlink_to(victim), "folder": Path.mkdir}[kind](lock)
    with pytest.raises(ValueError, match=r"\.lock (is not an ordinary file|cannot be opened)"):
        recording.Run(tmp_path, {}).prepare(False)
    assert victim.read_text() == "precious"


# Encoded data


@pytest.fixture(scope="module")
def circles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "circles"
    data.write_pairs(folder, data.circles(3, size=64))
    return folder


def changed(folder, name):
    """Change something of a data folder."""
    table = folder / "prompt.json"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    if name == "order":
        rows.reverse()
    elif name == "caption":
        rows[1]["prompt"] += "!"
    elif name == "swapped captions":
        rows[0]["prompt"], rows[1]["prompt"] = rows[1]["prompt"], rows[0]["prompt"]
    elif name == "row":
        rows.pop()
    else:
        picture = folder / rows[2][name]
        pixels = np.asarray(Image.open(picture)).copy()
        pixels[0, 0, 0] ^= 1
        Image.fromarray(pixels).save(picture)
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data.read_pairs(folder)


@pytest.mark.parametrize("name", ["order", "caption", "swapped captions", "row", "source", "target"])
def test_encoded_data_are_those_of_the_same_rows_captions_pictures_and_order(sd, circles, tmp_path, name):
    """Whatever is different: the digest is another, and what was encoded before is not taken."""
    folder = shutil.copytree(circles, tmp_path / "data")
    before = data.read_pairs(folder)
    was, kept = data.digest(before), tmp_path / "encoded.safetensors"
    from_pairs(sd, before, 64, keep=kept)
    pairs = changed(folder, name)
    assert data.digest(pairs) != was
    fresh, found = from_pairs(sd, pairs, 64), from_pairs(sd, pairs, 64, keep=kept)
    assert torch.equal(found.latents, fresh.latents)
    assert torch.equal(found.contexts[found.prompt], fresh.contexts[fresh.prompt])


def test_the_same_data_elsewhere_are_the_same(circles, tmp_path, monkeypatch):
    """In a moved folder, and by a relative path."""
    was = data.digest(data.read_pairs(circles))
    shutil.copytree(circles, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert data.digest(data.read_pairs("moved")) == data.digest(data.read_pairs(f"{tmp_path}/./moved")) == was


def test_the_same_model_elsewhere_is_the_same(sd, few):
    """By all its weights and its vocabulary, not by its name."""
    was = resuming.digest(sd)
    assert resuming.digest(StableDiffusion.load("toy")) == was != resuming.digest(few)
    for part in (sd.unet, sd.vae, sd.text_encoder):
        p = next(part.parameters()).data.view(-1)
        p[0] += 1
        assert resuming.digest(sd) != was
        p[0] -= 1
    sd.tokenizer.vocab["another"] = 7
    assert resuming.digest(sd) != was
    del sd.tokenizer.vocab["another"]


def test_what_was_encoded_of_the_same_is_not_encoded_again(sd, circles, tmp_path, monkeypatch):
    pairs, keep = data.read_pairs(circles), tmp_path / "encoded.safetensors"
    first = from_pairs(sd, pairs, 64, keep=keep)
    with monkeypatch.context() as patch:
        patch.setattr(examples_module, "encode", lambda *_: pytest.fail("encoded again"))
        again = from_pairs(sd, pairs, 64, keep=keep)
    for name in ("latents", "contexts", "prompt"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert from_pairs(sd, pairs, 32, keep=keep).latents.shape[-1] == 4  # of another size it is


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.pop("latents"),
        lambda e: e.update(latents=torch.zeros(4000, 4, 8, 8)),
        lambda e: e.update(latents=torch.zeros(1)),
        lambda e: e.update(latents=e["latents"].int()),
        lambda e: e.update(latents=e["latents"].transpose(0, 1).contiguous()),
        lambda e: e.update(contexts=torch.zeros(4, 77, 65)),
        lambda e: e.update(contexts=torch.zeros(0, 77, 64)),
        lambda e: e.update(prompt=e["prompt"].float()),
        lambda e: e.update(prompt=e["prompt"] + 100),
        lambda e: e.update(prompt=e["prompt"] - 100),
        lambda e: e["latents"][0, 0, 0].fill_(float("nan")),
        lambda e: e["contexts"][0, 0, :1].fill_(float("inf")),
    ],
)
def test_what_is_kept_encoded_is_looked_at(sd, circles, tmp_path, change):
    pairs, keep = data.read_pairs(circles), tmp_path / "encoded.safetensors"
    from_pairs(sd, pairs, 64, keep=keep)
    metadata, kept = files.open_weights(keep).metadata, safetensors.torch.load_file(keep)
    change(kept)
    safetensors.torch.save_file(kept, keep, metadata)
    with pytest.raises(ValueError, match=r"encoded\.safetensors does not hold what the run wrote: remove it"):
        from_pairs(sd, pairs, 64, keep=keep)


def test_a_file_of_that_name_that_no_run_wrote_is_left_alone(sd, circles, tmp_path):
    keep = tmp_path / "encoded.safetensors"
    safetensors.torch.save_file({"mine": torch.zeros(3)}, keep)
    before = keep.read_bytes()
    with pytest.raises(ValueError, match="was not written by a run: move it"):
        from_pairs(sd, data.read_pairs(circles), 64, keep=keep)
    assert keep.read_bytes() == before


def test_a_run_goes_on_where_it_was_moved_to_and_not_with_other_data(circles, tmp_path, monkeypatch, refused, capsys):
    """Data and run in other folders, by a relative path: the same run. The same folder with its rows reordered: another."""
    command = "train --model toy --batch-size 1 --pictures 0 --resolution 64 --device cpu --data data --output run".split()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(circles, "data")
    __main__.main([*command, "--steps", "1"])
    for name in ("data", "run"):
        shutil.move(name, f"{name}-moved")
    command = [f"{tmp_path}/{word}-moved" if word in ("data", "run") else word for word in command]
    before = Path("run-moved/encoded.safetensors").read_bytes()
    __main__.main([*command, "--steps", "2", "--resume"])
    changed(tmp_path / "data-moved", "order")
    words = "was made with --data 3 pairs of digest"
    assert words in refused(__main__.main, [*command, "--steps", "3", "--resume"])
    assert Path("run-moved/encoded.safetensors").read_bytes() == before


# The base


BASE = "--base --scenes 2 --vae-steps 1 --steps 1 --batch-size 1 --checkpoint-every 1 --device cpu".split()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("vae.pt", b"cut", "vae.pt is damaged"),
        ("vae.pt", {}, "vae.pt is damaged: its content is a dict of 0"),
        ("checkpoint.pt", b"cut", "checkpoint.pt is damaged"),
        ("checkpoint.pt", {}, "checkpoint.pt is damaged: done, steps.0"),
        ("checkpoint.pt", {"done": 0, "steps": 1, "stage": "autoencoder"}, "checkpoint.pt is damaged: vae is"),
        ("checkpoint.pt", {"done": 0, "steps": 1, "stage": {}}, "from a run of 1 steps of the {}"),
        ("unet", b"", "is there already, and would be replaced"),
    ],
)
def test_what_a_base_left_is_looked_at(tmp_path, refused, monkeypatch, name, content, words):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / name).write_bytes(content) if isinstance(content, bytes) else torch.save(content, folder / name)
    resume = ["--resume"] if name == "checkpoint.pt" else []
    assert words in refused(train_toy.main, [*BASE, "--output", str(folder), *resume])


def test_the_autoencoder_of_a_base_is_finite(tmp_path):
    vae = pretraining.VAE(pretraining.TOY_VAE)
    vae.quant_conv.weight.data[0] = float("nan")
    torch.save(vae.state_dict(), tmp_path / "vae.pt")
    with pytest.raises(ValueError, match=r"vae\.pt is damaged: its content.quant_conv.weight holds NaN"):
        pretraining.autoencoder(tmp_path / "vae.pt", 1, 1, 0, torch.device("cpu"), None)


# Several processes


def test_a_checkpoint_of_shards_is_resumed_by_shards(few, saved):
    begun = progress(few, saved)
    path = saved / "checkpoint.pt"
    with pytest.raises(ValueError, match="was made with --unlock all by several processes: resume it so"):
        begun.spread.check_optimizer(begun.optimizer, {"state": {"net.a": {}}, "param_groups": []}, path)
    begun.spread.parameters = lambda optimizer: {"net.a": torch.zeros(1)}
    with pytest.raises(ValueError, match="was made by one process"):
        begun.spread.check_optimizer(begun.optimizer, {"state": {0: {}}, "param_groups": []}, path)


def test_a_dry_run_refuses_the_batch_that_the_run_refuses(circles, tmp_path, refused):
    command = f"train --model toy --data {circles} --output {tmp_path / 'run'} --steps 1 --dry-run --unlock all".split()
    assert "a batch of 4 cannot be shared by 1 processes in 3" in refused(__main__.main, [*command, "--accumulate", "3"])
