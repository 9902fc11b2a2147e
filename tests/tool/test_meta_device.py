"""Nothing is left on the CPU, read back, or in float64: models, sampler and training on the meta device.

The meta device has shapes and no numbers: what a card would have to wait for, a number that is read, raises an error. Of
its own it mixes with the CPU in many operations; `Card` lets it mix as little as a graphics card does.
"""

import contextlib
import copy
import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minicn import VAE, ControlNet, StableDiffusion, UNet, UNetConfig, fast, toy, training
from minicn.checkpoints import hub
from minicn.clip import TextConfig, TextEncoder
from minicn.tokenizer import Tokenizer
from minicn.trainer import loop, progress, recording
from minicn.trainer.examples import from_scenes
from minicn.vae import VAEConfig

META = torch.device("meta")
WIDTHS = UNetConfig(model_channels=8, num_heads=2, context_dim=64, norm_num_groups=2)
HINT_CHANNELS = (4, 4, 8, 8)


class Card(TorchDispatchMode):
    """Inside `with`, the meta device is as strict as a card: no tensors of the CPU but single numbers, and no float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        taken, given = ([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)] for x in ((args, kwargs), result))
        if func is not torch.ops.aten.copy_.default and {t.device.type for t in taken if t.ndim} == {"meta", "cpu"}:
            raise RuntimeError(f"{func} takes tensors of the meta device and of the CPU")
        if any(t.dtype == torch.float64 and t.device.type == "meta" for t in given):
            raise RuntimeError(f"{func} gives float64 on the meta device")
        return result


@pytest.fixture(autouse=True)
def _card():
    with Card():
        yield


@pytest.fixture(scope="module")
def sd():
    """The toy's tokenizer, narrow models; all made on the CPU and moved, as when loading."""
    tokenizer = Tokenizer.load(hub.TOY_BASE / "tokenizer")
    text = TextConfig(len(tokenizer.vocab), 64, 64, num_layers=1, num_heads=2)
    models = UNet(WIDTHS), VAE(VAEConfig(channels=(8, 8, 8, 8), norm_num_groups=2)), TextEncoder(text)
    return StableDiffusion(*models, tokenizer).to("meta")


@pytest.fixture(scope="module")
def net(sd):
    return ControlNet.from_unet(sd.unet, hint_channels=HINT_CHANNELS)


def test_the_meta_device_refuses_what_a_card_does():
    """The tests' own ground: CPU and meta do not mix but for single numbers, nothing can be read, nothing is in float64."""
    x, y = torch.ones(2, 4, 8, 8, device=META), torch.ones(2, 4, 8, 8)
    for refused in (
        lambda: x + y,
        lambda: x @ y,
        lambda: torch.cat([x, y]),
        lambda: torch.nn.functional.conv2d(x, y),
        lambda: y[torch.zeros(1, dtype=torch.long, device=META)],
        lambda: x.double(),
        lambda: x.sum().item(),
        lambda: x.tolist(),
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            refused()
    assert (x * torch.tensor(2.0)).device == META


def test_the_models_compute_where_their_weights_are(sd, net):
    """U-Net with ControlNet, autoencoder both ways, text: every result is on the weights' device."""
    latents, hint = torch.empty(2, 4, 8, 16, device=META), torch.empty(2, 3, 64, 128, device=META)
    t, tokens = torch.zeros(2, dtype=torch.long, device=META), sd.tokenizer(["a", "b"]).to(META)
    context = sd.text_encoder(tokens)
    control = net(latents, hint, t, context)
    noise_pred = sd.unet(latents, t, context, control=control)
    results = [context, *control, noise_pred, *sd.vae.encode(hint), sd.vae.decode(latents)]
    assert {result.device for result in results} == {META}


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("guess_mode", [False, True])
def test_the_sampler_draws_where_the_weights_are(sd, net, monkeypatch, eta, guess_mode):
    """All of `generate` but its two readings, of "is it finite?" and of the picture; latents stay in float32."""
    monkeypatch.setattr(torch, "isfinite", lambda x: torch.ones(()))
    monkeypatch.setattr(sd, "decode_latents", lambda latents: sd.vae.decode(latents))
    hint = torch.rand(1, 3, 64, 64)
    images = sd.generate("a red ball", hint=hint, controlnet=net, num_steps=2, eta=eta, guess_mode=guess_mode)
    assert (images.device, images.dtype, images.shape) == (META, torch.float32, (1, 3, 64, 64))


def examples():
    """Two samples of 64x64 pixels, on the CPU, as in a run."""
    hints = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    return training.Examples(torch.zeros(2, 4, 8, 8), hints, torch.zeros(1, 77, 64), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("unlock", ["none", "all"])
def test_a_training_step_reads_nothing(sd, net, unlock):
    """Batch, loss, gradients and AdamW: all are there, on the device, without a number read."""
    recipe = training.Recipe(1, unlock=unlock)
    groups = training.apply_regime(sd.unet, net, recipe)
    optimizer = torch.optim.AdamW(groups, fused=loop.fused(META, recipe))
    batch = examples().batch(0, 1, 4, 0.5, META)
    on_device = {name: tensor for name, tensor in vars(batch).items() if name != "samples"}
    assert {tensor.device for tensor in on_device.values()} == {META}
    loss = training.controlnet_loss(sd.unet, net, batch, sd.alphas_cumprod.to(META))
    assert (loss.device, loss.shape) == (META, (4,))
    loss.mean().backward()
    learned = [p for group in groups for p in group["params"]]
    assert all(p.grad is not None and p.grad.device == META for p in learned)
    optimizer.step()


def test_the_loop_reads_the_loss_not_before_it_must(sd, net, tmp_path, monkeypatch):
    """Of 3 steps without a look or a checkpoint the third is the first to be read, where the meta device gives up."""
    steps, loss = [], training.controlnet_loss
    monkeypatch.setattr(training, "controlnet_loss", lambda *args: steps.append(1) or loss(*args))
    monkeypatch.setattr(progress, "zero_norms", lambda net: {})
    monkeypatch.setattr(loop, "autocast", lambda device, recipe: contextlib.nullcontext())  # knows no meta device
    run = recording.Run(tmp_path, {})
    run.prepare(resume=False)
    locked = copy.copy(sd)
    locked.vae = locked.text_encoder = torch.nn.Identity()  # they go to the CPU, which meta tensors cannot
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        loop.train(locked, net, examples(), None, run, training.Recipe(3))
    assert len(steps) == 3


# What differs from card to card


@pytest.mark.parametrize(
    ("device", "precision", "fused"),
    [("cpu", "float16", True), ("cuda", "float16", True), ("mps", "float32", True)]
    + [("mps", "bfloat16", True), ("mps", "float16", False), ("meta", "float32", False)],
)
def test_the_optimiser_is_fused_where_that_is_right(device, precision, fused):
    """Not on MPS in float16, whose kernel ignored the scale of the gradients; nor where there is no such kernel."""
    assert loop.fused(torch.device(device), training.Recipe(1, precision=precision)) is fused


def test_convolutions_lie_channels_last_but_on_mps():
    """There channels-last is slow, and was wrong."""
    layouts = {name: fast.layout(torch.device(name)) for name in ("cpu", "cuda", "mps")}
    assert layouts == {"cpu": torch.channels_last, "cuda": torch.channels_last, "mps": torch.contiguous_format}


def test_only_cuda_gets_copies_that_nobody_waits_for(monkeypatch):
    """On MPS such a copy may read memory that is free again."""
    seen = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **more: seen.append(more.get("non_blocking", False)))
    for name in ("cpu", "mps", "cuda"):
        training.send(torch.zeros(1), torch.device(name))
    assert seen == [False, False, True]


# The loss, read late


@pytest.fixture
def tiny(dezero):
    base = StableDiffusion.load("toy")
    torch.manual_seed(0)
    widths = dataclasses.replace(WIDTHS, context_dim=base.unet.cfg.context_dim)
    return StableDiffusion(dezero(UNet(widths)), base.vae, base.text_encoder, base.tokenizer)


def train(sd, folder, every, monkeypatch, spoil=None, **more):
    """Train a fresh ControlNet for 5 steps and return it with its log; `spoil` gets (call, loss) and returns the loss."""
    monkeypatch.setitem(progress.READ_EVERY, "cpu", every)
    calls, loss = [], training.controlnet_loss
    if spoil is not None:
        monkeypatch.setattr(training, "controlnet_loss", lambda *args: spoil(calls.append(1) or len(calls), loss(*args)))
    torch.manual_seed(0)
    net = ControlNet.from_unet(sd.unet, hint_channels=HINT_CHANNELS)
    data = from_scenes(sd, toy.scenes(3), "canny")
    run = recording.Run(folder, {})
    run.prepare(resume=False)
    loop.train(sd, net, data, None, run, training.Recipe(5, lr=1e-3), score_every=3, **more)
    return net, [{name: value for name, value in row.items() if name != "seconds"} for row in run.rows]


def test_reading_the_loss_late_changes_neither_weights_nor_log(tiny, tmp_path, monkeypatch):
    """Weights bit for bit, and every number of the log."""
    (a, early), (b, late) = (train(tiny, tmp_path / str(every), every, monkeypatch) for every in (1, 20))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert repr(early) == repr(late)  # nan is not equal to nan
    assert [row["step"] for row in late] == [0, 3, 5]


@pytest.mark.parametrize(("every", "computed"), [(1, 2), (20, 3)])
def test_nan_is_named_by_its_own_step_however_late(tiny, tmp_path, monkeypatch, every, computed):
    """The loss of step 2 is no number: read at once, or at the look after step 3, it is step 2, with its samples."""
    seen = []

    def spoil(call, loss):
        seen.append(call)
        return loss * float("nan") if call == 2 else loss

    samples = examples_of_step(tiny, 2)
    with pytest.raises(ValueError, match=rf"the loss is nan at step 2 \(samples {samples}\)"):
        train(tiny, tmp_path, every, monkeypatch, spoil, checkpoint_every=4)
    assert len(seen) == computed
    assert not (tmp_path / "checkpoint.pt").exists()


def examples_of_step(sd, step: int) -> str:
    data = from_scenes(sd, toy.scenes(3), "canny")
    return ", ".join(map(str, data.batch(0, step, 4, 0.5, torch.device("cpu")).samples.tolist()))


def test_a_run_of_a_card_goes_on_without_one(tmp_path, monkeypatch):
    """A checkpoint whose tensors lay on CUDA is read on a machine without, not called damaged."""
    run = recording.Run(tmp_path, {"steps": 3})
    run.prepare(resume=False)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        run.save(2, {"net": {"weight": torch.arange(3.0)}})
    state = recording.Run(tmp_path, {"steps": 3}).load()
    assert state["net"]["weight"].tolist() == [0, 1, 2]
    assert state["net"]["weight"].device.type == "cpu"
