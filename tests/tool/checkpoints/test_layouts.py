"""Every published layout of weights loads, and gives the model that was written; what is something else is named."""

import dataclasses
import gc
import json
import os
import pickle
import subprocess
import sys
import types
import warnings
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors.torch
import torch

from minicn import VAE, ControlNet, StableDiffusion, TextConfig, TextEncoder, UNet, UNetConfig, VAEConfig
from minicn.checkpoints import converting, files, hub, pickles, weights
from minicn.checkpoints.models import MODELS, load_model, load_vae, save_file
from minicn.tokenizer import Tokenizer

# Narrow, but with the heads and groups of Stable Diffusion 1.5, which leave no trace in a file.
UNET = UNetConfig(model_channels=32, channel_mult=(1, 2, 3, 3), context_dim=64)
VAE_CONFIG = VAEConfig(channels=(32, 32, 32, 64))
TOKENIZER = hub.TOY_BASE / "tokenizer"
OTHER_BUFFERS = {"betas": torch.zeros(1000), "logvar": torch.zeros(1000), "model_ema.num_updates": torch.tensor(3)}


def randomise(model):
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.05)
    return model


@pytest.fixture(scope="module")
def sd():
    torch.manual_seed(0)
    words = Tokenizer.load(TOKENIZER)
    text = TextConfig(vocab_size=len(words.vocab), hidden_size=64, intermediate_size=128, num_layers=2, num_heads=1)
    return StableDiffusion(randomise(UNet(UNET)), randomise(VAE(VAE_CONFIG)), randomise(TextEncoder(text)), words)


@pytest.fixture(scope="module")
def net(sd):
    torch.manual_seed(1)
    return randomise(ControlNet.from_unet(sd.unet))


@pytest.fixture(scope="module")
def ldm(sd):
    """The keys of a whole ldm checkpoint, as Stable Diffusion 1.5's, with its buffers."""
    parts = {weights.PREFIXES[kind]: getattr(sd, kind).state_dict() for kind in ("unet", "vae", "text_encoder")}
    state = {prefix + key: tensor for prefix, part in parts.items() for key, tensor in part.items()}
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return state | OTHER_BUFFERS


def control(net):
    return {"control_model." + key: tensor for key, tensor in net.state_dict().items()}


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def assert_whole(loaded, sd):
    for kind in ("unet", "vae", "text_encoder"):
        assert getattr(loaded, kind).cfg == getattr(sd, kind).cfg, kind
        assert same(getattr(loaded, kind), getattr(sd, kind)), kind


class Callback:
    """Stands for a class of a training framework, which the reader does not have."""

    def __init__(self):
        self.history = {"loss": [1.0, 2.0]}


def lightning(state):
    return {
        "state_dict": state,
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 1e-4}]}],
        "callbacks": {"ModelCheckpoint": Callback()},
        "pytorch-lightning_version": "1.5.0",
    }


WRITERS = {
    "ldm .safetensors": ("m.safetensors", lambda s, p: safetensors.torch.save_file(s, p)),
    "ldm .ckpt": ("m.ckpt", lambda s, p: torch.save({"state_dict": s, "global_step": 7}, p)),
    "ldm .ckpt in PyTorch's old container": (
        "m.ckpt",
        lambda s, p: torch.save({"state_dict": s}, p, _use_new_zipfile_serialization=False),
    ),
    "Lightning": ("m.ckpt", lambda s, p: torch.save(lightning(s), p)),
    "Lightning in the old container": (
        "m.ckpt",
        lambda s, p: torch.save(lightning(s), p, _use_new_zipfile_serialization=False),
    ),
    "state_dict in state_dict, module. in front": (
        "m.pth",
        lambda s, p: torch.save({"state_dict": {"state_dict": {"module._orig_mod." + k: t for k, t in s.items()}}}, p),
    ),
    "parameters, not tensors": (
        "m.pth",
        lambda s, p: torch.save({k: torch.nn.Parameter(t) if t.is_floating_point() else t for k, t in s.items()}, p),
    ),
    "text encoder without text_model": (
        "m.safetensors",
        lambda s, p: safetensors.torch.save_file({k.replace(".text_model.", "."): t for k, t in s.items()}, p),
    ),
}


@pytest.mark.parametrize("layout", WRITERS)
def test_whole_ldm_checkpoints_load(sd, ldm, tmp_path, layout):
    """Stable Diffusion in one file, in every container it comes in."""
    name, write = WRITERS[layout]
    write(ldm, tmp_path / name)
    assert_whole(StableDiffusion.load(tmp_path / name, tokenizer=TOKENIZER), sd)


def test_files_in_half_precision_load(sd, ldm, tmp_path):
    half = {key: t.half() if t.is_floating_point() else t for key, t in ldm.items()}
    safetensors.torch.save_file(half, tmp_path / "half.safetensors")
    loaded = StableDiffusion.load(tmp_path / "half.safetensors", tokenizer=TOKENIZER)
    assert loaded.dtype == torch.float32
    found = loaded.unet.state_dict()
    for key, tensor in sd.unet.state_dict().items():
        assert torch.equal(found[key], tensor.half().float())


def test_the_moving_average_is_taken_only_when_asked_for(sd, ldm, tmp_path):
    """A file with EMA copies: which set is used is said, and `ema` chooses."""
    flat = {"model_ema.diffusion_model" + key.replace(".", ""): tensor + 1 for key, tensor in sd.unet.state_dict().items()}
    safetensors.torch.save_file(ldm | flat, tmp_path / "both.safetensors")
    with pytest.warns(UserWarning, match="twice: non-EMA weights are used"):
        loaded = StableDiffusion.load(tmp_path / "both.safetensors", tokenizer=TOKENIZER)
    assert_whole(loaded, sd)
    with pytest.warns(UserWarning, match="twice: EMA weights are used"):
        loaded = StableDiffusion.load(tmp_path / "both.safetensors", tokenizer=TOKENIZER, ema=True)
    found = loaded.unet.state_dict()
    assert all(torch.equal(found[key], tensor + 1) for key, tensor in sd.unet.state_dict().items())
    assert same(loaded.vae, sd.vae)
    safetensors.torch.save_file(ldm, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="holds no moving average"):
        StableDiffusion.load(tmp_path / "one.safetensors", tokenizer=TOKENIZER, ema=True)


def old_vae_names(state):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, tensor in state.items():
        for new, old in names.items():
            if f".attentions.0.{new}." in key:
                key = key.replace(f".{new}.", f".{old}.")
        renamed[key] = tensor
    return renamed


def to_bin(path):
    torch.save(safetensors.torch.load_file(path), path.with_suffix(".bin"))
    path.unlink()


def rewrite(path, change):
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path)


def shard(path):
    state = safetensors.torch.load_file(path)
    parts = {f"{path.stem}-0000{i + 1}-of-00002.safetensors": list(state)[i::2] for i in range(2)}
    for name, keys in parts.items():
        safetensors.torch.save_file({key: state[key] for key in keys}, path.with_name(name))
    index = {"metadata": {}, "weight_map": {key: name for name, keys in parts.items() for key in keys}}
    path.with_name(path.name + ".index.json").write_text(json.dumps(index))
    path.unlink()


UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
FOLDERS = {
    "as it is": lambda f: None,
    "only the fp16 variant": lambda f: [p.rename(p.with_suffix(".fp16.safetensors")) for p in f.glob("*/*.safetensors")],
    ".bin": lambda f: (
        to_bin(f / UNET_FILE),
        to_bin(f / "vae/diffusion_pytorch_model.safetensors"),
        (f / "text_encoder/model.safetensors").rename(f / "text_encoder/pytorch_model.safetensors"),
        to_bin(f / "text_encoder/pytorch_model.safetensors"),
    ),
    "in shards": lambda f: shard(f / UNET_FILE),
    "old names of the VAE's attention": lambda f: rewrite(f / "vae/diffusion_pytorch_model.safetensors", old_vae_names),
    "text encoder without text_model": lambda f: rewrite(
        f / "text_encoder/model.safetensors", lambda s: {k.removeprefix("text_model."): t for k, t in s.items()}
    ),
}


@pytest.mark.parametrize("layout", FOLDERS)
def test_diffusers_folders_load(sd, tmp_path, layout):
    """Variants, shards, .bin, old names, and transformers 5's text encoder."""
    sd.save(tmp_path)
    FOLDERS[layout](tmp_path)
    assert_whole(StableDiffusion.load(tmp_path), sd)


def test_a_variant_is_chosen_by_name(sd, tmp_path):
    sd.save(tmp_path)
    path = tmp_path / UNET_FILE
    other = {key: tensor + 1 for key, tensor in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(other, path.with_suffix(".other.safetensors"))
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        (tmp_path / f"{part}.safetensors").rename(tmp_path / f"{part}.other.safetensors")
    assert same(StableDiffusion.load(tmp_path).unet, sd.unet)
    moved = StableDiffusion.load(tmp_path, variant="other").unet.state_dict()
    assert all(torch.equal(moved[key], tensor + 1) for key, tensor in sd.unet.state_dict().items())
    with pytest.raises(FileNotFoundError, match=r"diffusion_pytorch_model\.fp32\.safetensors"):
        StableDiffusion.load(tmp_path, variant="fp32")


def test_another_autoencoder_can_be_given(sd, ldm, tmp_path):
    """A stand-alone autoencoder (vae-ft-mse), with leftovers of its training, takes the place of the model's own."""
    other = {key: tensor + 1 for key, tensor in sd.vae.state_dict().items()}
    junk = {"loss.logvar": torch.zeros(()), "model_ema.decoderconv_inweight": torch.zeros(1)}
    torch.save({"state_dict": other | junk}, tmp_path / "vae.ckpt")
    sd.save(tmp_path / "sd")
    loaded = StableDiffusion.load(tmp_path / "sd", vae=tmp_path / "vae.ckpt", vae_dtype=torch.float64)
    assert loaded.vae.quant_conv.weight.dtype == torch.float64
    found = loaded.vae.state_dict()
    assert all(torch.equal(found[key], t.double()) for key, t in other.items())
    assert same(loaded.unet, sd.unet)
    assert same(load_vae(tmp_path / "sd"), sd.vae)
    assert same(load_vae(tmp_path / "sd" / "vae"), sd.vae)


def write_diff(net, unet, path, prefix, keep_zeros=False):
    base, state = unet.state_dict(), {}
    for key, tensor in net.state_dict().items():
        copied = not key.startswith(("zero_convs.", "middle_block_out.", "input_hint_block."))
        difference = tensor - base[key] if copied else tensor
        if keep_zeros or not copied or difference.abs().max() >= 1e-6:
            state[prefix + key] = difference
    torch.save(state | {"difference": torch.tensor(1.0)}, path)
    return len(state)


def write_controlnet(layout, net, sd, ldm, tmp_path):
    path = tmp_path / "control.pth"
    if layout == "v1.0, with a U-Net":
        torch.save(ldm | control(net), path)
    elif layout == "v1.1":
        torch.save(control(net), path)
    elif layout == "bare .safetensors in half precision":
        path = tmp_path / "control.safetensors"
        safetensors.torch.save_file({key: t.half() for key, t in net.state_dict().items()}, path)
    elif layout == "diffusers, a single file":
        path = tmp_path / "control.safetensors"
        safetensors.torch.save_file(weights.to_diffusers("controlnet", net.state_dict()), path)
    elif layout == "diffusers folder, .bin":
        path = tmp_path / "folder"
        net.save(path, layout="diffusers")
        to_bin(path / "diffusion_pytorch_model.safetensors")
    elif layout == "as minicn saves it":
        net.save(path := tmp_path / "own.safetensors")
    return path


CONTROLNETS = (
    "v1.0, with a U-Net",
    "v1.1",
    "bare .safetensors in half precision",
    "diffusers, a single file",
    "diffusers folder, .bin",
    "as minicn saves it",
)


@pytest.mark.parametrize("layout", CONTROLNETS)
def test_controlnets_load(sd, net, ldm, tmp_path, layout):
    """Every layout of a ControlNet, widths read from the tensors; nothing is said where nothing differs."""
    path = write_controlnet(layout, net, sd, ldm, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = ControlNet.load(path, unet=sd.unet)
    assert loaded.cfg == net.cfg
    precision = torch.Tensor.half if "half" in layout else torch.Tensor.float
    written = net.state_dict()
    assert all(torch.equal(t, precision(written[key]).float()) for key, t in loaded.state_dict().items())


def test_v10_files_hold_a_unet_of_their_own(sd, net, ldm, tmp_path):
    """The file's own U-Net can be used as the model; with another base the difference is said, tensor by tensor."""
    moved = dict(ldm)
    key = "model.diffusion_model.output_blocks.3.0.in_layers.2.weight"
    moved[key] = moved[key] * 1.5
    torch.save(moved | control(net), tmp_path / "control_sd15_toy.pth")
    with pytest.warns(UserWarning, match=r"1 of 686 tensors differ .* by 0\.5: output_blocks\.3\.0\.in_layers\.2\.weight"):
        ControlNet.load(tmp_path / "control_sd15_toy.pth", unet=sd.unet)
    own = StableDiffusion.load(tmp_path / "control_sd15_toy.pth", tokenizer=TOKENIZER)
    assert torch.equal(own.unet.state_dict()[key.removeprefix("model.diffusion_model.")], moved[key])
    sd.save(tmp_path / "sd")
    lines = list(converting.compare(tmp_path / "control_sd15_toy.pth", tmp_path / "sd"))
    assert lines[0].startswith("1 of 686 tensors")
    assert lines[1:] == ["  output_blocks.3.0.in_layers.2.weight: ||a - b|| / ||b|| = 0.5"]


@pytest.mark.parametrize("prefix", ["", "control_model."])
def test_difference_files_are_added_to_the_unet(sd, tmp_path, prefix):
    """p = difference + U-Net; what was dropped as unchanged is filled from the U-Net; without a U-Net, an error."""
    torch.manual_seed(2)
    trained = ControlNet.from_unet(sd.unet)
    with torch.no_grad():
        for key, tensor in trained.state_dict().items():
            if key.startswith(("input_blocks.4", "zero_convs", "input_hint_block", "middle_block_out")):
                tensor += 0.05 * torch.randn_like(tensor)
    kept = write_diff(trained, sd.unet, tmp_path / "diff.pth", prefix)
    assert kept < 100  # of 340
    loaded = ControlNet.load(tmp_path / "diff.pth", unet=sd.unet)
    found, want, base = loaded.state_dict(), trained.state_dict(), sd.unet.state_dict()
    assert all(torch.allclose(t, want[key], atol=1e-7) for key, t in found.items())
    untouched = [key for key in loaded.state_dict() if key.startswith("input_blocks.1.")]
    assert all(torch.equal(found[key], base[key]) for key in untouched)
    with pytest.raises(ValueError, match="is a difference file: give the U-Net"):
        ControlNet.load(tmp_path / "diff.pth")
    assert any("difference file" in line for line in converting.describe(tmp_path / "diff.pth"))


def test_shuffle_and_bgr_are_read_from_name_and_configuration(sd, net, tmp_path):
    """v1.1's shuffle averages its residuals over all positions; a "bgr" ControlNet sees its hints with blue first."""
    torch.save(control(net), tmp_path / "control_v11e_sd15_shuffle.pth")
    shuffle = ControlNet.load(tmp_path / "control_v11e_sd15_shuffle.pth")
    inputs = torch.randn(2, 4, 8, 8), torch.rand(1, 3, 64, 64), torch.tensor([1, 500]), torch.randn(2, 77, 64)
    plain = ControlNet.load(tmp_path / "control_v11e_sd15_shuffle.pth")
    plain.cfg = net.cfg
    with torch.no_grad():
        averaged = [c.mean((2, 3), keepdim=True) for c in plain(*inputs)]
        assert all(torch.equal(a, b) for a, b in zip(shuffle(*inputs), averaged, strict=True))
        sd.unet(inputs[0], inputs[2], inputs[3], averaged)  # the U-Net takes them
    net.save(tmp_path / "folder", layout="diffusers")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config | {"controlnet_conditioning_channel_order": "bgr"}))
    bgr = ControlNet.load(tmp_path / "folder")
    x, hint, t, context = inputs
    with torch.no_grad():
        for a, b in zip(bgr(x, hint, t, context), plain(x, hint.flip(1), t, context), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_shuffle_and_bgr_survive_saving(sd, net, tmp_path, layout):
    """What was read from a name or a configuration is written, too."""
    odd = ControlNet(dataclasses.replace(net.cfg, global_pool=True, bgr=True))
    path = tmp_path / ("odd.safetensors" if layout == "ldm" else "odd")
    odd.save(path, layout=layout)
    assert ControlNet.load(path, unet=sd.unet).cfg == odd.cfg


def test_a_tokenizer_of_another_model_is_refused(sd, tmp_path):
    sd.save(tmp_path / "sd")
    Tokenizer.from_merges([*sd.tokenizer.merges, ("q", "x")]).save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"its text encoder knows \d+ tokens, but the tokenizer gives others"):
        StableDiffusion.load(tmp_path / "sd", tokenizer=tmp_path / "other")


def test_a_moving_average_of_a_part_is_refused(sd, ldm, tmp_path):
    some = {"model_ema.diffusion_modelout2bias": torch.zeros(4)}
    safetensors.torch.save_file(ldm | some, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"holds a moving average \(EMA\) of only a part"):
        StableDiffusion.load(tmp_path / "part.safetensors", tokenizer=TOKENIZER, ema=True)


def test_odd_contents_of_pickles_are_refused(tmp_path):
    """A file that holds itself, and tensors that are none in memory."""
    itself = {}
    itself["state_dict"] = itself
    torch.save(itself, tmp_path / "itself.pth")
    torch.save({"zero_convs.0.0.weight": torch.eye(3).to_sparse()}, tmp_path / "sparse.pth")
    for name, words in (("itself", "holds no dictionary of tensors"), ("sparse", "is not a plain tensor")):
        with pytest.raises(ValueError, match=words):
            ControlNet.load(tmp_path / f"{name}.pth")


@pytest.mark.parametrize("shape", [(), (0,), (4,), (8, 0, 3, 3)])
@pytest.mark.parametrize("key", ["input_blocks.0.0.weight", "input_hint_block.0.weight", "zero_convs.0.0.weight"])
def test_shapes_that_no_weight_has_are_named(tmp_path, key, shape):
    safetensors.torch.save_file(
        {"zero_convs.0.0.weight": torch.zeros(8, 8, 1, 1)} | {key: torch.zeros(shape)}, tmp_path / "x.safetensors"
    )
    words = "expected|has a different structure|incomplete" if shape == (4,) else "which no weight has"
    with pytest.raises(ValueError, match=f"x.safetensors.*({words})"):
        ControlNet.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("key", ["encoder.mid_block.attentions.x", "encoder.mid_block.attentions.0.weight"])
def test_odd_names_in_an_autoencoder_are_unknown(sd, tmp_path, key):
    sd.save(tmp_path / "sd")
    rewrite(tmp_path / "sd" / "vae" / "diffusion_pytorch_model.safetensors", lambda state: state | {key: torch.zeros(1)})
    with pytest.raises(ValueError, match="1 are unexpected"):
        load_vae(tmp_path / "sd")


def test_a_compressed_zip_is_refused(net, tmp_path):
    """PyTorch maps a zip's tensors as they lie in the file: compressed, they would be noise."""
    torch.save(control(net), tmp_path / "net.pth")
    with zipfile.ZipFile(tmp_path / "net.pth") as old, zipfile.ZipFile(tmp_path / "packed.pth", "w") as new:
        for record in old.namelist():
            new.writestr(record, old.read(record), compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="packed.pth is compressed"):
        ControlNet.load(tmp_path / "packed.pth")


# What is something else


def of_width(width, channels=4, prefix="model.diffusion_model."):
    return {
        f"{prefix}input_blocks.0.0.weight": torch.zeros(8, channels, 3, 3),
        f"{prefix}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(8, width),
    }


OTHERS = {
    "a Stable Diffusion 2 U-Net (context width 1024)": of_width(1024),
    "a Stable Diffusion 2 ControlNet (context width 1024)": of_width(1024, prefix="control_model."),
    "an SDXL ControlNet (context width 2048)": of_width(2048, prefix="control_model."),
    "an SDXL model (context width 2048)": of_width(2048) | {"conditioner.embedders.0.x": torch.zeros(1)},
    "an inpainting U-Net (9 input channels)": of_width(768, 9),
    "an instruct-pix2pix U-Net (8 input channels)": of_width(768, 8),
    "a T2I-Adapter": {"body.0.in_conv.weight": torch.zeros(1), "conv_in.weight": torch.zeros(1)},
    "a Control-LoRA": {"lora_controlnet": torch.zeros(()), "input_hint_block.0.weight": torch.zeros(1)},
    "a LoRA": {"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(1)},
    "a SparseCtrl ControlNet": {"down_blocks.0.motion_modules.0.x": torch.zeros(1)},
    "a ControlNet Union": {"control_add_embedding.linear_1.weight": torch.zeros(1)},
    "no model that minicn knows": {"weight": torch.zeros(1)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_models_are_refused_by_name(tmp_path, what):
    """Relatives of Stable Diffusion 1.5 get their own name, whoever asks."""
    safetensors.torch.save_file(OTHERS[what], tmp_path / "other.safetensors")
    words = what.removeprefix("no ").replace("(", r"\(").replace(")", r"\)")
    for load in (ControlNet.load, StableDiffusion.load, load_vae, lambda p: list(converting.describe(p))):
        with pytest.raises(ValueError, match=rf"other\.safetensors (is|holds no) {words}.* Stable Diffusion 1\.5"):
            load(tmp_path / "other.safetensors")


def test_a_controlnet_is_no_model_and_a_model_no_controlnet(sd, net, ldm, tmp_path):
    torch.save(control(net), tmp_path / "control.pth")
    with pytest.raises(ValueError, match=r"holds no U-Net and no autoencoder and no text encoder, only: ControlNet"):
        StableDiffusion.load(tmp_path / "control.pth")
    torch.save(ldm, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="holds no ControlNet, only: U-Net, autoencoder, text encoder; give it as"):
        ControlNet.load(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="holds no autoencoder, only: ControlNet"):
        load_vae(tmp_path / "control.pth")


# Files that cannot be trusted


class Attack:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("new_container", [True, False])
def test_a_pickle_is_never_executed(net, tmp_path, new_container):
    """A file that asks for os.mkdir gets its tensors read and its call ignored; nothing it names is imported."""
    target = tmp_path / "made-by-a-file"
    state = control(net) | {"x": Attack(os.mkdir, str(target)), "y": Attack(exec, "raise SystemExit")}
    torch.save(state, tmp_path / "evil.pth", _use_new_zipfile_serialization=new_container)
    loaded = ControlNet.load(tmp_path / "evil.pth")
    assert not target.exists()
    assert same(loaded, net)


def test_a_pickle_cannot_change_what_reads_the_next(net, tmp_path):
    """State set upon functions (BUILD) reaches only this file's own stand-ins."""
    before = dict(vars(torch._utils._rebuild_tensor_v2)), torch._utils._rebuild_tensor.__defaults__
    code = b"\x80\x02ctorch._utils\n_rebuild_tensor\n}X\x08\x00\x00\x00poisonedK\x01sb."
    (tmp_path / "p.pkl").write_bytes(code)
    with open(tmp_path / "p.pkl", "rb") as file:
        pickles.Inert(file).load()
    assert (dict(vars(torch._utils._rebuild_tensor_v2)), torch._utils._rebuild_tensor.__defaults__) == before
    assert not hasattr(torch._utils._rebuild_tensor, "poisoned")


def test_modules_named_in_a_file_are_not_imported(net, tmp_path, monkeypatch):
    """Unknown names become stubs without their module being looked for."""
    module = types.ModuleType("planted_module")
    module.Planted = type("Planted", (), {"__module__": "planted_module"})
    monkeypatch.setitem(sys.modules, "planted_module", module)
    torch.save(control(net) | {"callback": module.Planted()}, tmp_path / "planted.pth")
    (tmp_path / "planted_module.py").write_text("import pathlib; pathlib.Path('imported').touch()\nclass Planted: pass\n")
    code = f"from minicn import ControlNet; ControlNet.load({str(tmp_path / 'planted.pth')!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), str(tmp_path)])}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    assert not (tmp_path / "imported").exists()


def header(entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


BROKEN = {
    "is empty": b"",
    "is a web page": b"<!DOCTYPE html><html>log in</html>",
    "is a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4265146304\n",
    "is not a weights file: it begins with": b"\x89PNG\r\n\x1a\n" + b"\0" * 80,
    "not a complete .safetensors file": header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}) + b"\0" * 7,
    "not a complete .safetensors (": header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [9, 25]}}) + b"\0" * 16,
    "is not a complete .safetensors file (E": (10**12).to_bytes(8, "little") + b"{",
    "is not a complete PyTorch file": b"PK\x03\x04" + b"\0" * 200,
    "is not a complete PyTorch file (": b"\x80\x02}q\x00X\x05",
    "holds no dictionary of tensors": pickle.dumps([1, 2], protocol=2),
}


@pytest.mark.parametrize("words", BROKEN)
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_broken_files_are_named_with_their_cause(tmp_path, words, ending):
    """Whatever the ending says: one line with file and cause."""
    path = tmp_path / f"file.{ending}"
    path.write_bytes(BROKEN[words])
    if words.startswith("holds"):
        torch.save([1, 2], path)
    for load in (ControlNet.load, StableDiffusion.load, load_vae):
        with pytest.raises(ValueError, match=f"file.{ending} ") as caught:
            load(path)
        assert words.split(" (")[0] in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["net.safetensors", "net.pth"])
@pytest.mark.parametrize("share", [0.999, 0.5, 0.001])
def test_truncated_files_are_named(net, tmp_path, name, share):
    path = tmp_path / name
    if name.endswith(".pth"):
        torch.save(control(net), path)
    else:
        safetensors.torch.save_file(control(net), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=rf"{name} is not a complete .* file"):
        ControlNet.load(path)


def damage(state, how):
    key = "control_model.input_blocks.4.0.in_layers.2.weight"
    if how == "NaN":
        state[key][0, 0, 0, 0] = float("nan")
    elif how == "infinite":
        state[key][-1, -1, 0, 0] = float("inf")
    elif how == "shape":
        state[key] = state[key][:, :-1].clone()
    elif how == "missing":
        del state[key]
    elif how == "unknown":
        state["control_model.input_blocks.4.0.extra.weight"] = torch.zeros(1)
    elif how == "integers":
        state[key] = state[key].to(torch.int32)
    return state


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("NaN", r"input_blocks\.4\.0\.in_layers\.2\.weight holds NaN or infinite values"),
        ("infinite", r"input_blocks\.4\.0\.in_layers\.2\.weight holds NaN or infinite values"),
        ("shape", r"input_blocks\.4\.0\.in_layers\.2\.weight has shape \(64, 31, 3, 3\), but expected \(64, 32, 3, 3\)"),
        ("missing", r"1 tensors are missing \(input_blocks\.4\.0\.in_layers\.2\.weight\)|has no input_blocks\.4"),
        ("unknown", r"1 are unexpected \(control_model\.input_blocks\.4\.0\.extra\.weight\)"),
        ("integers", r"holds int32, but weights are floating-point"),
    ],
)
def test_a_damaged_tensor_is_named(net, tmp_path, how, words):
    state = damage({key: tensor.clone() for key, tensor in control(net).items()}, how)
    safetensors.torch.save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=words) as caught:
        ControlNet.load(tmp_path / "net.safetensors")
    assert "net.safetensors" in str(caught.value)


@pytest.mark.parametrize("content", ['{"weight_map": 3}', '{"weight_map": {"a": "../other.safetensors"}}', "[]", "no JSON"])
def test_an_index_of_shards_stays_in_its_folder(sd, tmp_path, content):
    sd.save(tmp_path)
    (tmp_path / UNET_FILE).unlink()
    (tmp_path / f"{UNET_FILE}.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json (is not|names)"):
        StableDiffusion.load(tmp_path)


@pytest.mark.parametrize(
    ("part", "config"),
    [
        ("unet", {"block_out_channels": "wide"}),
        ("unet", {"cross_attention_dim": None}),
        ("unet", {"layers_per_block": -1}),
        ("unet", {"attention_head_dim": 0}),
        ("unet", {"attention_head_dim": [8, 8, 8, 8]}),
        ("unet", {"attention_head_dim": 7}),
        ("unet", {"class_embed_type": "timestep"}),
        ("text_encoder", {"num_attention_heads": 7}),
        ("text_encoder", {"hidden_act": "gelu"}),
        ("vae", {"scaling_factor": 0}),
        ("scheduler", {"prediction_type": "v_prediction"}),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(sd, tmp_path, part, config):
    """Broken ones, and those of other models: the file and the setting are named."""
    sd.save(tmp_path)
    path = tmp_path / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(ValueError, match=rf"{part}.*"):
        StableDiffusion.load(tmp_path)


def test_a_single_file_needs_a_tokenizer(ldm, tmp_path, monkeypatch):
    """Without --tokenizer and without CLIP's in the cache the error says what to give."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    torch.save(ldm, tmp_path / "model.ckpt")
    with pytest.raises(FileNotFoundError, match="carries no tokenizer.*--tokenizer"):
        StableDiffusion.load(tmp_path / "model.ckpt")


def test_a_repository_needs_huggingface_hub(monkeypatch):
    """Without the extra the error says what to install; what cannot be a repository is not taken for one."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for load in (StableDiffusion.load, ControlNet.load, load_vae):
        with pytest.raises(FileNotFoundError, match="owner/name is not a file .*pip install huggingface_hub"):
            load("owner/name")
        for name in ("nowhere", "a/b/../c", "/root/nothing", "owner/", "./folder/name"):
            with pytest.raises(FileNotFoundError, match="is not a file or folder: name one"):
                load(name)


# Written, and read again


@pytest.mark.parametrize("part", ["model", "controlnet", "unet", "vae"])
def test_convert_goes_both_ways(sd, net, tmp_path, part):
    """diffusers -> ldm -> diffusers gives the files of the beginning, bit for bit."""
    if part == "controlnet":
        net.save(tmp_path / "first", layout="diffusers")
    else:
        sd.save(tmp_path / "first")
    first = tmp_path / "first" / part if part in ("unet", "vae") else tmp_path / "first"
    converting.convert(first, tmp_path / "ldm.safetensors", "ldm", tokenizer=TOKENIZER)
    converting.convert(tmp_path / "ldm.safetensors", tmp_path / "again", "diffusers", tokenizer=TOKENIZER)
    for path in first.rglob("*.safetensors"):
        again = files.read(tmp_path / "again" / path.relative_to(first))
        before = files.read(path)
        assert before.keys() == again.keys()
        assert all(torch.equal(before[key], again[key]) for key in before)
    for path in first.rglob("config.json"):
        before, again = (json.loads(p.read_text()) for p in (path, tmp_path / "again" / path.relative_to(first)))
        before.pop("sample_size", None), again.pop("sample_size", None)
        assert before == again


def another_base():
    unet = randomise(UNet(UNET))
    with torch.no_grad():
        for p in unet.parameters():
            p.mul_(1.5)
    return unet


def test_transfer_adds_the_difference_of_the_bases(sd, net, tmp_path):
    """copy + new base - old base, in every copied layer and in no other."""
    other = another_base()
    converting.save_model("unet", other, tmp_path / "other.safetensors", "ldm")
    sd.save(tmp_path / "sd")
    net.save(tmp_path / "net.safetensors")
    options = {"transfer_to": tmp_path / "other.safetensors", "transfer_from": tmp_path / "sd"}
    converting.convert(tmp_path / "net.safetensors", tmp_path / "moved.safetensors", "ldm", **options)
    moved, old, new = (m.state_dict() for m in (ControlNet.load(tmp_path / "moved.safetensors"), sd.unet, other))
    for key, tensor in net.state_dict().items():
        want = tensor + (new[key] - old[key]) if key in old and not key.startswith("zero") else tensor
        assert torch.equal(moved[key], want), key


def test_transfer_from_a_v10_file_starts_at_its_own_unet(sd, net, ldm, tmp_path):
    """Without --transfer-from, the U-Net that lies in the file is the base that the ControlNet was trained on."""
    other = another_base()
    converting.save_model("unet", other, tmp_path / "other.safetensors", "ldm")
    torch.save(ldm | control(net), tmp_path / "v10.pth")
    converting.convert(
        tmp_path / "v10.pth", tmp_path / "moved.safetensors", "ldm", transfer_to=tmp_path / "other.safetensors"
    )
    moved, old, new = (m.state_dict() for m in (ControlNet.load(tmp_path / "moved.safetensors"), sd.unet, other))
    assert any(not torch.equal(new[key], old[key]) for key in new)
    for key, tensor in net.state_dict().items():
        want = tensor + (new[key] - old[key]) if key in old and not key.startswith("zero") else tensor
        assert torch.equal(moved[key], want), key


def test_convert_keeps_each_models_own_precision(sd, tmp_path):
    """An fp16 U-Net beside float32 others stays so; nothing is said or rounded that was not asked for."""
    sd.save(tmp_path / "sd")
    rewrite(tmp_path / "sd" / UNET_FILE, lambda state: {key: tensor.half() for key, tensor in state.items()})
    said = converting.convert(tmp_path / "sd", tmp_path / "one.safetensors", "ldm")
    assert said.endswith("layout ldm, float16 and float32")
    dtypes = files.open_weights(tmp_path / "one.safetensors").dtypes
    for prefix, dtype in (("model.", "float16"), ("first_stage_model.", "float32"), ("cond_stage_model.", "float32")):
        assert {d for key, d in dtypes.items() if key.startswith(prefix)} == {dtype}


def test_transfer_needs_both_bases(net, tmp_path):
    net.save(tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="holds no U-Net: name the base .*--transfer-from"):
        converting.convert(tmp_path / "net.safetensors", tmp_path / "x.safetensors", "ldm", transfer_to="toy")
    with pytest.raises(ValueError, match="--transfer-from has no effect without --transfer-to"):
        converting.convert(tmp_path / "net.safetensors", tmp_path / "x.safetensors", "ldm", transfer_from="toy")


def test_inspect_says_what_is_inside(sd, net, ldm, tmp_path):
    """Layout, models, number of tensors, parameters, precision, size; without reading the tensors."""
    flat = {"model_ema.diffusion_model" + key.replace(".", ""): t.clone() for key, t in sd.unet.state_dict().items()}
    safetensors.torch.save_file(ldm | flat | control(net), tmp_path / "all.safetensors")
    lines = list(converting.describe(tmp_path / "all.safetensors"))
    parameters = sum(p.numel() for p in sd.unet.parameters())
    assert lines[0].endswith("all.safetensors: ldm checkpoint with ControlNet (v1.0), safetensors")
    assert f"  U-Net: 686 tensors, {parameters:,} parameters, float32, {parameters * 4 / 1e6:,.1f} MB" in lines
    assert any(line.startswith("  ControlNet: 340 tensors") for line in lines)
    assert any(line.startswith("  U-Net, moving average: 686 tensors") for line in lines)
    assert lines[-1] == "  4 other tensors, which minicn does not use"


def test_configurations_travel_with_a_whole_model(tmp_path):
    """The toy has other heads and groups than Stable Diffusion 1.5; its single file says so."""
    toy = StableDiffusion.load("toy")
    toy.save(tmp_path / "toy.safetensors", layout="ldm")
    for tokenizer in (TOKENIZER, hub.TOY_BASE, "toy"):
        assert_whole(StableDiffusion.load(tmp_path / "toy.safetensors", tokenizer=tokenizer), toy)


def test_defaults_travel_with_a_whole_model(sd, tmp_path):
    """In a folder and in a file, there and back; those of Stable Diffusion 1.5 are written nowhere."""
    toy = StableDiffusion.load("toy")
    toy.save(tmp_path / "toy.safetensors", layout="ldm")
    converting.convert(tmp_path / "toy.safetensors", tmp_path / "folder", "diffusers", tokenizer="toy")
    converting.convert(tmp_path / "folder", tmp_path / "again.safetensors", "ldm")
    for name in ("toy.safetensors", "folder", "again.safetensors"):
        assert StableDiffusion.load(tmp_path / name, tokenizer="toy").defaults == toy.defaults
    sd.save(tmp_path / "plain")
    sd.save(tmp_path / "plain.safetensors", layout="ldm")
    assert not (tmp_path / "plain" / "minicn.json").exists()
    assert "defaults" not in weights.written(weights.contents(files.open_weights(tmp_path / "plain.safetensors")))


def test_the_folder_of_a_run_is_a_model_everywhere(tmp_path):
    """Loaded, inspected, converted; the whole model if it was unlocked. Without weights yet: what to do."""
    toy, run = StableDiffusion.load("toy"), tmp_path / "run"
    net = ControlNet.load("toy-canny", unet=toy.unet)
    (run / "stages").mkdir(parents=True)
    (run / "checkpoint.pt").touch()
    with pytest.raises(FileNotFoundError, match=r"run is the folder of a run that has written no weights yet: .*--resume"):
        ControlNet.load(run)
    net.save(run / "controlnet.safetensors")
    net.save(run / "diffusers", layout="diffusers")
    assert same(ControlNet.load(run, unet=toy.unet), net)
    assert "  ControlNet: 340 tensors" in next(line for line in converting.describe(run) if "340" in line)
    converting.convert(run, tmp_path / "folder", "diffusers")
    assert same(ControlNet.load(tmp_path / "folder"), net)
    whole = {kind: getattr(toy, kind) for kind in MODELS} | {"controlnet": net}
    save_file(whole, run / "model.safetensors", defaults=toy.defaults)
    assert_whole(StableDiffusion.load(run, tokenizer="toy"), toy)
    assert same(ControlNet.load(run, unet=toy.unet), net)


def test_a_folder_without_weights_need_not_have_been_fetched(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no .*safetensors \(nor .bin, nor shards\): name another"):
        list(converting.describe(tmp_path))


def test_an_unknown_name_lists_what_ships():
    for name in ("canny", "toycanny", "toy-cany"):
        with pytest.raises(FileNotFoundError, match="toy-ade20k, toy-canny, toy-coco_stuff, .*, toy-scribble"):
            ControlNet.load(name)


def test_configuration_travels_with_what_minicn_writes(tmp_path, tiny_config):
    """Heads and groups leave no trace in shapes; minicn's own files say them."""
    unet = UNet(tiny_config)
    converting.save_model("unet", unet, tmp_path / "unet.safetensors", "ldm")
    found = weights.contents(files.open_weights(tmp_path / "unet.safetensors"))
    assert load_model("unet", found).cfg == tiny_config
    assert json.loads(found.file.metadata["minicn"])["unet"]["num_heads"] == asdict(tiny_config)["num_heads"]


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="the system does not list what is mapped")
def test_what_is_copied_leaves_the_memory(tmp_path):
    """3x3 convolutions, which are copied into a faster layout, share no mapping with what stays mapped, 1x1 ones too."""
    path = tmp_path / "x.safetensors"
    shapes = {"wide": (8, 8, 3, 3), "narrow": (8, 8, 1, 1), "linear": (8, 8), "bias": (8,)}
    safetensors.torch.save_file({key: torch.ones(shape) for key, shape in shapes.items()}, path)

    def mappings():
        gc.collect()
        return Path("/proc/self/maps").read_text().count(str(path))

    file = files.open_weights(path)
    tensors = {key: file.get(key) for key in shapes}
    del file
    before = mappings()
    del tensors["wide"]
    assert mappings() < before
    del tensors["narrow"], tensors["linear"]
    assert mappings() == 1
    assert tensors["bias"].sum() == 8
