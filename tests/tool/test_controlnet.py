"""ControlNet on the U-Net: how it is saved, what it refuses, where its numbers keep their digits."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from by_hand import random_control, randomise, same, tensors
from closeness import assert_as_exact
from safetensors import safe_open

from minicn import ControlNet, ControlNetConfig, UNet, UNetConfig
from minicn.checkpoints import hub
from minicn.fast import GroupNorm

# Files


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_is_the_same(unet, controlnet, batch, tmp_path, layout, dtype):
    """A round trip through either layout gives the same names, values and residuals, bit for bit."""
    net = randomise(controlnet).to(dtype)
    path = tmp_path / ("net.safetensors" if layout == "ldm" else "net")
    net.save(path, layout=layout)
    again = ControlNet.load(path, unet=unet, dtype=dtype)
    assert again.cfg == net.cfg
    assert same(tensors(again), tensors(net))
    assert not again.training
    b = batch.to(dtype)
    want = net(b.x, b.hint, b.timesteps, b.context)
    got = again(b.x, b.hint, b.timesteps, b.context)
    assert all(torch.equal(a, c) for a, c in zip(want, got, strict=True))
    assert [p.name for p in tmp_path.rglob(".minicn-*")] == []


def test_the_paper_hint_encoder_is_saved_in_our_own_layout_alone(unet, batch, tmp_path):
    """layout "ldm" keeps the paper's hint encoder; diffusers has no place for it and says so."""
    net = randomise(ControlNet.from_unet(unet, paper_hint_encoder=True))
    net.save(tmp_path / "net.safetensors")
    again = ControlNet.load(tmp_path / "net.safetensors", unet=unet)
    assert again.cfg.paper_hint_encoder
    assert same(tensors(again), tensors(net))
    with pytest.raises(ValueError, match="does not have the paper's hint encoder"):
        net.save(tmp_path / "folder", layout="diffusers")
    assert not (tmp_path / "folder").exists()


def test_a_diffusers_folder_has_diffusers_names(controlnet, tmp_path):
    """The folder holds config.json with diffusers' class name and fields, and its file diffusers' keys."""
    controlnet.save(tmp_path, layout="diffusers")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "ControlNetModel"
    assert config["block_out_channels"] == [8, 16, 32, 32]
    assert config["attention_head_dim"] == 2  # diffusers' word for the number of heads
    assert config["cross_attention_dim"] == 12
    assert config["conditioning_embedding_out_channels"] == [4, 4, 8, 8]
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        keys = set(file.keys())
        assert file.metadata()["format"] == "pt"
    assert len(keys) == 340
    assert {"conv_in.weight", "controlnet_mid_block.bias", "controlnet_down_blocks.11.weight"} <= keys


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_a_controlnet_of_another_unet_is_refused(controlnet, tmp_path, layout, tiny_config):
    """A file made for other widths is refused in words that name both shapes, before anything is computed."""
    path = tmp_path / ("net.safetensors" if layout == "ldm" else "net")
    controlnet.save(path, layout=layout)
    wider = UNet(replace(tiny_config, model_channels=16))
    with pytest.raises(ValueError, match=r"was made for a U-Net of shape .*model_channels=8.*this one is .*=16"):
        ControlNet.load(path, unet=wider)
    assert ControlNet.load(path).cfg.unet == tiny_config  # without a U-Net there is nothing to compare


def test_unknown_layouts_and_missing_files_are_refused(controlnet, tmp_path, monkeypatch):
    """Errors name what came and what is known."""
    with pytest.raises(ValueError, match='layout is \'onnx\', but must be "ldm" or "diffusers"'):
        controlnet.save(tmp_path / "x", layout="onnx")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors is not a file or folder"):
        ControlNet.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="no ControlNet toy-unheard-of; those that are installed: [a-z0-9_, -]*$"):
        ControlNet.load("toy-unheard-of")  # all are there, in the repository
    (tmp_path / "canny").mkdir()
    monkeypatch.setattr(hub, "TOY_CONTROLNETS", tmp_path)
    with pytest.raises(FileNotFoundError, match="installed: toy-canny; minicn's repository holds 11, in minicn/toy/next"):
        ControlNet.load("toy-depth")


def test_a_file_cut_off_is_refused(controlnet, tmp_path):
    """Half a file is no file: the error names it."""
    path = tmp_path / "net.safetensors"
    controlnet.save(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"net\.safetensors is not a complete \.safetensors file"):
        ControlNet.load(path)


# Errors in words


BAD_INPUTS = {
    "three dimensions": ({"x": (4, 8, 16)}, r"latents have shape \(4, 8, 16\), but the model takes \(B, 4, h, w\)"),
    "wrong channels": ({"x": (2, 3, 8, 16)}, r"latents have shape \(2, 3, 8, 16\), .* \(B, 4, h, w\)"),
    "one timestep too many": ({"timesteps": (3,)}, r"timesteps have shape \(3,\), but 2 latents need \(2,\)"),
    "timestep as a number": ({"timesteps": ()}, r"timesteps have shape \(\), but 2 latents need \(2,\)"),
    "timesteps as a matrix": ({"timesteps": (2, 1)}, r"timesteps have shape \(2, 1\), but 2 latents need \(2,\)"),
    "context of one text": ({"context": (1, 7, 12)}, r"context has shape \(1, 7, 12\), .* \(2, tokens, 12\): encode"),
    "context of another width": ({"context": (2, 7, 768)}, r"context has shape \(2, 7, 768\), .* own text encoder"),
    "context of tokens": ({"context": (2, 7)}, r"context has shape \(2, 7\), but 2 latents need \(2, tokens, 12\)"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_inputs_that_do_not_fit_are_refused_in_words(unet, controlnet, batch, case):
    """U-Net and ControlNet say what came and what they take."""
    shapes, words = BAD_INPUTS[case]
    inputs = {"x": batch.x, "timesteps": batch.timesteps, "context": batch.context}
    inputs |= {name: torch.zeros(shape, dtype=inputs[name].dtype) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=words):
        unet(**inputs)
    with pytest.raises(ValueError, match=words):
        controlnet(hint=batch.hint, **inputs)


BAD_HINTS = {
    "grey": ((2, 1, 64, 128), r"hint has shape \(2, 1, 64, 128\), but .* \(B, 3, H, W\): make it RGB .*load_hint"),
    "no batch": ((3, 64, 128), r"hint has shape \(3, 64, 128\), but a ControlNet takes \(B, 3, H, W\)"),
    "7 pixels short": ((2, 3, 57, 128), r"hint is 128x57 pixels, but latents \(2, 4, 8, 16\) need 128x64: resize"),
    "turned": ((2, 3, 128, 64), r"hint is 64x128 pixels, .* need 128x64: resize the hint first .*conditions.fit"),
    "three for two": ((3, 3, 64, 128), r"3 hints for 2 latents: give one hint, or one for each"),
}


@pytest.mark.parametrize("case", BAD_HINTS)
def test_hints_that_do_not_fit_are_refused_in_words(controlnet, batch, case):
    """A hint must be RGB and exactly 8 times the latents: 121 to 127 pixels would pass silently, shifted."""
    shape, words = BAD_HINTS[case]
    with pytest.raises(ValueError, match=words):
        controlnet(batch.x, torch.zeros(shape), batch.timesteps, batch.context)


BAD_CONTROLS = {
    "12 tensors": (lambda c: c[:12], r"control has 12 tensors, but the model has 13 connections"),
    "none": (lambda c: [], r"control has 0 tensors, but the model has 13 connections"),
    "reversed": (lambda c: c[::-1], r"control\[0\] has shape \(2, 32, 1, 2\), but the model needs \(2, 8, 8, 16\)"),
    "other size": (
        lambda c: [*c[:3], c[3][..., :-1], *c[4:]],
        r"control\[3\] has shape \(2, 8, 4, 7\), but the model needs \(2, 8, 4, 8\): use a ControlNet with this U-Net",
    ),
    "other batch": (
        lambda c: [*c[:12], c[12].expand(2, -1, -1, -1).repeat(2, 1, 1, 1)],
        r"control\[12\] has shape \(4, 32, 1, 2\), but the model needs \(2, 32, 1, 2\): .* latents of the same size",
    ),
}


@pytest.mark.parametrize("case", BAD_CONTROLS)
def test_control_that_does_not_fit_is_refused_in_words(unet, controlnet, batch, case):
    """Residuals of other number, widths, size or batch are named with their place."""
    change, words = BAD_CONTROLS[case]
    control = change(random_control(controlnet, batch))
    with pytest.raises(ValueError, match=words):
        unet(batch.x, batch.timesteps, batch.context, control)


def test_config_defaults_are_the_published_ones():
    """ControlNetConfig() is Stable Diffusion 1.5's ControlNet."""
    cfg = ControlNetConfig()
    assert (cfg.hint_channels, cfg.paper_hint_encoder, cfg.unet) == ((16, 32, 96, 256), False, UNetConfig())
    assert (cfg.unet.model_channels, cfg.unet.channel_mult, cfg.unet.num_heads) == (320, (1, 2, 4, 4), 8)


@pytest.mark.numbers
@pytest.mark.parametrize("offset", [0.0, 3.0, 30.0])
def test_group_norm_keeps_its_digits_in_channels_last(offset):
    """As near to float64 as PyTorch's kernel for the ordinary layout.

    PyTorch's own for channels last is off by 1e-4 or more where the mean is 30 times the deviation.
    """
    norm = GroupNorm(4, 16)
    x = torch.randn(2, 16, 24, 40) + offset
    weights = torch.randn(x.shape)

    def there_and_back(function, x):
        x = x.detach().requires_grad_(True)
        y = function(x)
        return [y.detach(), *torch.autograd.grad((y * weights.to(y.dtype)).sum(), x)]

    got = there_and_back(norm, x.to(memory_format=torch.channels_last))
    plain, exact = (there_and_back(lambda x: F.group_norm(x, 4, eps=norm.eps), t) for t in (x, x.double()))
    assert_as_exact(got, plain, exact)
