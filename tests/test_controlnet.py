"""ControlNet on the U-Net: how it wakes up, where its 13 outputs go, what it refuses, how it is saved."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import outputs_of
from safetensors import safe_open
from torch import nn

from minicn import ControlNet, ControlNetConfig, UNet, UNetConfig, hint_encoder
from minicn.unet import GroupNorm


def tensors(module):
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def randomise(net, seed=5):
    """Move every parameter away from where it starts, so that nothing is zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    return net


def random_control(net, b, seed=6):
    g = torch.Generator().manual_seed(seed)
    shapes = [c.shape for c in net(b.x, b.hint, b.timesteps, b.context)]
    return [torch.randn(shape, generator=g).to(b.x.dtype) for shape in shapes]


def inputs_of(modules, run):
    """Run, and return the first argument that each module got."""
    seen = []
    handles = [m.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach())) for m in modules]
    run()
    for handle in handles:
        handle.remove()
    return seen


# Learning


def group_of(name):
    """The part of the ControlNet that a parameter belongs to, counted from the outside in."""
    if name.startswith(("zero_convs.", "middle_block_out.")):
        return "zero_convs"
    if name.startswith(("time_embed.", "input_blocks.", "middle_block.")):
        return "encoder"
    return "hint_out" if name.startswith("input_hint_block.14.") else "hint_in"


@pytest.mark.parametrize(
    ("step", "awake"),
    [
        (1, {"zero_convs"}),
        (2, {"zero_convs", "encoder", "hint_out"}),
        (3, {"zero_convs", "encoder", "hint_out", "hint_in"}),
        (4, {"zero_convs", "encoder", "hint_out", "hint_in"}),
    ],
)
def test_gradient_wakes_the_controlnet_from_the_outside_in(unet, controlnet, batch, step, awake):
    """A zero convolution blocks the gradient behind it until its own first update.

    Every tensor of a group that is awake has a gradient; every gradient of the others is zero, bit for bit.
    """
    unet, net, b = unet.double(), controlnet.double(), batch.to(torch.float64)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    target = torch.randn_like(b.x)
    for i in range(step):
        if i:
            optimizer.step()
        optimizer.zero_grad()
        control = net(b.x, b.hint, b.timesteps, b.context)
        (unet(b.x, b.timesteps, b.context, control) - target).square().mean().backward()
    alive = {"zero_convs": set(), "encoder": set(), "hint_out": set(), "hint_in": set()}
    for name, p in net.named_parameters():
        alive[group_of(name)].add(bool(p.grad.any()))
    assert alive == {group: {group in awake} for group in alive}


def test_sizes_of_the_groups_that_wake(controlnet):
    """The three waves hold 26, 298 + 2 and 14 tensors: 340, all that there is."""
    names = [group_of(name) for name, _ in controlnet.named_parameters()]
    assert {g: names.count(g) for g in names} == {"zero_convs": 26, "encoder": 298, "hint_out": 2, "hint_in": 14}


def test_the_locked_unet_costs_no_graph_in_its_encoder(unet, controlnet, batch):
    """No gradient is stored anywhere in the locked U-Net, and its encoder and middle block build no graph at all.

    The gradient does pass through the decoder: it is the only way to the control.
    """
    net = randomise(controlnet)
    control = net(batch.x, batch.hint, batch.timesteps, batch.context)
    for c in control:
        c.retain_grad()
    outs = outputs_of(
        [*unet.input_blocks, unet.middle_block, *unet.output_blocks],
        lambda: unet(batch.x, batch.timesteps, batch.context, control).square().sum().backward(),
    )
    assert [out.grad_fn is None for out in outs] == [True] * 13 + [False] * 12
    assert [name for name, p in unet.named_parameters() if p.grad is not None] == []
    assert all(c.grad.any() for c in control)
    assert all(p.grad is not None for p in net.parameters())


# The 13 connections


@pytest.mark.parametrize("i", range(13))
def test_control_i_enters_at_its_own_block(unet, controlnet, batch, i):
    """control[12] goes to the middle block's output; control[i] to skip i, which decoder block 11 - i takes.

    Seen by changing one residual alone: decoder blocks before that one get the same input, bit for bit; in that one
    exactly the channels of the skip (the last ones) change, or for the middle exactly the others.
    """
    control = random_control(controlnet, batch)
    moved = [c.clone() for c in control]
    moved[i] += 1.0

    def run(residuals):
        blocks = unet.output_blocks
        return inputs_of(blocks, lambda: unet(batch.x, batch.timesteps, batch.context, residuals))

    base, other = run(control), run(moved)
    j = 0 if i == 12 else 11 - i
    assert all(torch.equal(base[k], other[k]) for k in range(j))
    skip_width = control[11 - j].shape[1]
    changed = (base[j] != other[j]).all(dim=(0, 2, 3))  # of each channel: changed at every position
    kept = (base[j] == other[j]).all(dim=(0, 2, 3))
    is_skip = torch.arange(base[j].shape[1]) >= base[j].shape[1] - skip_width
    assert torch.equal(changed, ~is_skip if i == 12 else is_skip)
    assert torch.equal(kept, ~changed)
    width = control[i].shape[1]
    part = other[j] - base[j]
    part = part[:, :width] if i == 12 else part[:, -width:]
    assert torch.allclose(part, torch.ones_like(part), atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 0.25, 1.0, 1.7])
def test_control_is_added_linearly_to_the_features(unet, controlnet, batch, scale):
    """Each feature becomes skip + s c, bit for bit: linear in the conditioning scale at all 13 places."""
    c = random_control(controlnet, batch)
    encoder = [*unet.input_blocks, unet.middle_block]

    def run(control=None):
        return unet(batch.x, batch.timesteps, batch.context, control)

    features = outputs_of(encoder, run)
    taken = inputs_of(unet.output_blocks, lambda: run([scale * r for r in c]))
    for j, got in enumerate(taken):
        i = 11 - j
        width = features[i].shape[1]
        assert torch.equal(got[:, -width:], features[i] + scale * c[i]), i
    assert torch.equal(taken[0][:, : features[12].shape[1]], features[12] + scale * c[12])


def test_scale_zero_is_no_control(unet, controlnet, batch):
    """conditioning_scale 0 gives, bit for bit, the picture without control; 1 does not."""
    control = random_control(controlnet, batch)
    plain = unet(batch.x, batch.timesteps, batch.context)
    assert torch.equal(plain, unet(batch.x, batch.timesteps, batch.context, [0.0 * c for c in control]))
    assert not torch.allclose(plain, unet(batch.x, batch.timesteps, batch.context, control))


def test_control_is_not_changed_by_the_call(unet, controlnet, batch):
    """The list and its tensors are only read: a second call with them gives the same."""
    control = random_control(controlnet, batch)
    before, values = list(control), [c.clone() for c in control]
    first = unet(batch.x, batch.timesteps, batch.context, control)
    assert len(control) == 13
    assert all(a is b for a, b in zip(control, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(control, values, strict=True))
    assert torch.equal(first, unet(batch.x, batch.timesteps, batch.context, control))


def test_control_of_one_serves_the_whole_batch(unet, controlnet, batch):
    """A residual of batch size 1 is added to every sample."""
    one = [c[:1] for c in random_control(controlnet, batch)]
    got = unet(batch.x, batch.timesteps, batch.context, one)
    want = unet(batch.x, batch.timesteps, batch.context, [c.expand(2, -1, -1, -1) for c in one])
    assert torch.equal(got, want)


def test_one_hint_serves_the_whole_batch(controlnet, batch):
    """A hint of batch size 1 counts for every sample, and different hints give different residuals."""
    net = randomise(controlnet)
    one = net(batch.x, batch.hint[:1], batch.timesteps, batch.context)
    both = net(batch.x, batch.hint[:1].expand(2, -1, -1, -1), batch.timesteps, batch.context)
    other = net(batch.x, batch.hint, batch.timesteps, batch.context)
    for a, b, c in zip(one, both, other, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
        assert not torch.allclose(a[1], c[1], atol=1e-5)


def test_residuals_from_the_hints_features_are_those_of_forward(controlnet, batch):
    """A sampler may compute E(hint) of eq. (9) once and reuse it at every step: the residuals are equal bit for bit."""
    net = randomise(controlnet)
    features = net.input_hint_block(batch.hint)
    for timesteps in (batch.timesteps, batch.timesteps + 20):
        want = net(batch.x, batch.hint, timesteps, batch.context)
        got = net.residuals(batch.x, features, timesteps, batch.context)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_every_residual_depends_on_every_input(controlnet, batch):
    """Each of the 13 residuals reads latents, hint, timesteps and text; the first block has no text and no time yet."""
    net = randomise(controlnet)
    inputs = {"x": batch.x, "hint": batch.hint, "timesteps": batch.timesteps, "context": batch.context}
    base = net(**inputs)
    changes = {"x": batch.x + 1, "hint": 1 - batch.hint, "timesteps": batch.timesteps + 20, "context": -batch.context}
    reads = {
        name: [not torch.equal(a, b) for a, b in zip(base, net(**(inputs | {name: value})), strict=True)]
        for name, value in changes.items()
    }
    late = [False] + [True] * 12
    assert reads == {"x": [True] * 13, "hint": [True] * 13, "timesteps": late, "context": late}


@pytest.mark.parametrize(("h", "w"), [(1, 1), (2, 1), (3, 5), (8, 8), (15, 17)])
def test_latents_of_any_size(unet, controlnet, h, w):
    """Latents of any size, odd ones too: each level is half the last, rounded up, on both sides of the U."""
    net = randomise(controlnet)
    x, hint = torch.randn(1, 4, h, w), torch.rand(1, 3, 8 * h, 8 * w)
    t, context = torch.tensor([500]), torch.randn(1, 7, 12)
    control = net(x, hint, t, context)
    sizes = [(-(-h // 2**k), -(-w // 2**k)) for k in range(4)]
    levels = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    widths = [8, 8, 8, 8, 16, 16, 16, 32, 32, 32, 32, 32, 32]
    assert [tuple(c.shape) for c in control] == [(1, c, *sizes[k]) for c, k in zip(widths, levels, strict=True)]
    y = unet(x, t, context, control)
    assert y.shape == x.shape
    assert y.isfinite().all()
    assert not torch.allclose(y, unet(x, t, context))


def test_samples_of_a_batch_do_not_meet(unet, controlnet, batch):
    """Each sample's noise prediction is what it is alone."""
    net = randomise(controlnet).double()
    unet, b = unet.double(), batch.to(torch.float64)
    both = unet(b.x, b.timesteps, b.context, net(b.x, b.hint, b.timesteps, b.context))
    for k in range(2):
        s = slice(k, k + 1)
        control = net(b.x[s], b.hint[s], b.timesteps[s], b.context[s])
        alone = unet(b.x[s], b.timesteps[s], b.context[s], control)
        assert torch.allclose(both[s], alone, rtol=0, atol=1e-10 * both.abs().max().item())


# The trainable copy


def test_from_unet_copies_and_leaves_the_unet_as_it_is(unet, hint_channels):
    """The copy is equal bit for bit and shares no memory; the U-Net's values, flags and mode stay as they were."""
    unet.train()
    before = tensors(unet)
    flags = [(p.requires_grad, p.data_ptr()) for p in unet.parameters()]
    net = ControlNet.from_unet(unet, hint_channels=hint_channels)
    assert same(tensors(unet), before)
    assert [(p.requires_grad, p.data_ptr()) for p in unet.parameters()] == flags
    assert unet.training
    shared = [k for k in net.state_dict() if k in before]
    assert len(shared) == 298
    assert all(torch.equal(net.state_dict()[k], before[k]) for k in shared)
    storages = [{t.untyped_storage().data_ptr() for t in m.state_dict().values()} for m in (net, unet)]
    assert len(storages[0]) == 340
    assert not storages[0] & storages[1]
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_from_unet_takes_the_unets_dtype(unet, hint_channels, dtype):
    """The copy has the U-Net's precision, and its values bit for bit."""
    net = ControlNet.from_unet(unet.to(dtype), hint_channels=hint_channels)
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert torch.equal(net.input_blocks[0][0].weight, unet.input_blocks[0][0].weight)


def test_fresh_zero_convolutions_are_zero_and_nothing_else_is(controlnet):
    """14 convolutions start at zero: 12 for the skips, 1 for the middle, 1 at the end of the hint encoder.

    No other weight does, and of the biases only the hint encoder's.
    """
    zero = {name for name, p in controlnet.named_parameters() if not p.any()}
    layers = [f"zero_convs.{i}.0" for i in range(12)] + ["middle_block_out.0", "input_hint_block.14"]
    biases = {f"input_hint_block.{i}.bias" for i in range(0, 14, 2)}
    assert zero == biases | {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    kernels = [dict(controlnet.named_modules())[layer].kernel_size for layer in layers]
    assert kernels == [(1, 1)] * 13 + [(3, 3)]  # Paper vs code: the one at the hint is 3x3


# The hint encoder


HINT_TABLE = [  # place, channels in and out, stride: those of the released weights
    (0, 3, 16, 1),
    (2, 16, 16, 1),
    (4, 16, 32, 2),
    (6, 32, 32, 1),
    (8, 32, 96, 2),
    (10, 96, 96, 1),
    (12, 96, 256, 2),
    (14, 256, 320, 1),
]


def test_hint_encoder_has_the_released_layout():
    """Eight 3x3 convolutions, three of stride 2, SiLU between them, the last one zero (and 3x3, not 1x1)."""
    encoder = hint_encoder(320)
    convs = [(i, m) for i, m in enumerate(encoder) if isinstance(m, nn.Conv2d)]
    assert [(i, m.in_channels, m.out_channels, m.stride[0]) for i, m in convs] == HINT_TABLE
    assert all(m.kernel_size == (3, 3) and m.padding == (1, 1) and m.stride[0] == m.stride[1] for _, m in convs)
    assert [type(m) for m in encoder] == [nn.Conv2d, nn.SiLU] * 7 + [nn.Conv2d]
    assert [i for i, m in convs if not m.weight.any() and not m.bias.any()] == [14]


def test_hint_encoder_of_the_paper_has_4x4_convolutions_of_stride_2():
    """Paper vs code: the paper writes 4x4 kernels and 2x2 strides with ReLU; then comes a zero convolution."""
    encoder = hint_encoder(8, paper=True)
    convs = [m for m in encoder if isinstance(m, nn.Conv2d)]
    shapes = [(m.in_channels, m.out_channels, m.kernel_size, m.stride) for m in convs]
    four, two, one = (4, 4), (2, 2), (1, 1)
    assert shapes == [(3, 16, four, two), (16, 32, four, two), (32, 64, four, two), (64, 8, one, one)]
    assert [type(m) for m in encoder] == [nn.Conv2d, nn.ReLU] * 3 + [nn.Conv2d]
    assert [i for i, m in enumerate(convs) if not m.weight.any()] == [3]


@pytest.mark.parametrize("paper", [False, True])
def test_hint_encoder_divides_the_size_by_eight(paper):
    """Eq. (9): E brings a hint of 8h x 8w pixels to h x w, in both versions."""
    encoder = hint_encoder(8, (4, 4, 8, 8), paper)
    assert encoder(torch.rand(2, 3, 40, 136)).shape == (2, 8, 5, 17)


def test_eq4_holds_with_the_hint_encoder_of_the_paper(unet, batch):
    """Eq. (4) with the paper's own hint encoder: fresh, it changes nothing, bit for bit."""
    net = ControlNet.from_unet(unet, paper_hint_encoder=True)
    assert net.input_hint_block[0].kernel_size == (4, 4)
    assert not net.input_hint_block(batch.hint).any()
    control = net(batch.x, batch.hint, batch.timesteps, batch.context)
    assert [c.abs().max().item() for c in control] == [0.0] * 13
    plain = unet(batch.x, batch.timesteps, batch.context)
    assert torch.equal(plain, unet(batch.x, batch.timesteps, batch.context, control))
    randomise(net)
    control = net(batch.x, batch.hint, batch.timesteps, batch.context)
    assert all(a.any() for a in control)
    assert not torch.allclose(plain, unet(batch.x, batch.timesteps, batch.context, control))


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
    assert [p.name for p in tmp_path.rglob("*.part")] == []


def test_the_paper_hint_encoder_is_saved_in_our_own_layout_alone(unet, batch, tmp_path):
    """layout "ldm" keeps the paper's hint encoder; diffusers has no place for it and says so."""
    net = randomise(ControlNet.from_unet(unet, paper_hint_encoder=True))
    net.save(tmp_path / "net.safetensors")
    again = ControlNet.load(tmp_path / "net.safetensors", unet=unet)
    assert again.cfg.paper_hint_encoder
    assert same(tensors(again), tensors(net))
    with pytest.raises(ValueError, match="no place for the hint encoder of the paper"):
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


def test_unknown_layouts_and_missing_files_are_refused(controlnet, tmp_path):
    """Errors name what came and what is known."""
    with pytest.raises(ValueError, match='layout is \'onnx\', but must be "ldm" or "diffusers"'):
        controlnet.save(tmp_path / "x", layout="onnx")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors is no file or folder"):
        ControlNet.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="no ControlNet toy-unheard-of; those that ship"):
        ControlNet.load("toy-unheard-of")


def test_a_file_cut_off_is_refused(controlnet, tmp_path):
    """Half a file is no file: the error names it."""
    path = tmp_path / "net.safetensors"
    controlnet.save(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"net\.safetensors is no whole \.safetensors file"):
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
    "7 pixels short": ((2, 3, 57, 128), r"hint is 57x128 pixels, but latents \(2, 4, 8, 16\) need 64x128: resize"),
    "turned": ((2, 3, 128, 64), r"hint is 128x64 pixels, .* need 64x128: resize the hint first .*resize_hint"),
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
        r"control\[3\] has shape \(2, 8, 4, 7\), but the model needs \(2, 8, 4, 8\): use a ControlNet of this U-Net",
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


@pytest.mark.parametrize("offset", [0.0, 3.0, 30.0])
def test_group_norm_keeps_its_digits_in_channels_last(offset):
    """Where the mean is 30 times the deviation, PyTorch's own kernel is off by 1e-4 or more; ours by less than 2e-6."""
    norm = GroupNorm(4, 16)
    x = (torch.randn(2, 16, 24, 40) + offset).to(memory_format=torch.channels_last)
    want = F.group_norm(x.double().contiguous(), 4, eps=norm.eps)
    assert (norm(x) - want).norm() <= 2e-6 * want.norm()
    x.requires_grad_(True)
    weights = torch.randn(x.shape)
    [mine] = torch.autograd.grad((norm(x) * weights).sum(), x)
    y = x.detach().double().contiguous().requires_grad_(True)
    [true] = torch.autograd.grad((F.group_norm(y, 4, eps=norm.eps) * weights).sum(), y)
    assert (mine - true).norm() <= 2e-6 * true.norm()
