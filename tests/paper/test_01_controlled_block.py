"""Section 3.1, eqs. (1) to (4): a locked block, its trainable copy between zero convolutions, nothing changed at first.

For any block (residual, batch norm, transformer), for the whole network, up to the picture.
"""

import copy

import numpy as np
import pytest
import torch
from by_hand import by_hand, encoder, outputs_of, randomise
from closeness import assert_close

from minicn import ControlNet, StableDiffusion

pytestmark = pytest.mark.numbers


def test_eq1_a_block_turns_x_into_y(controlled):
    """Eq. (1): y = F(x; T) is what is locked, bit for bit, and neither the condition c nor the copy's T_c enter it.

    Seen with copy and inner zero convolution at random, and the outer one still zero: whatever c, y_c is y.
    """
    original, net, x, c, args = controlled
    net.eval()
    y = original(x, *args)
    assert torch.equal(net.locked(x, *args), y)
    with torch.no_grad():
        for p in [*net.copy.parameters(), *net.zero_in.parameters()]:
            p.add_(torch.randn_like(p))
    assert not torch.allclose(net.copy(x, *args), y)
    for condition in (c, 0 * c, 1e3 * c):
        assert torch.equal(net(x, condition, *args), y)
    assert not torch.allclose(original(2 * x, *args), y)


def test_eq2_is_the_block_plus_its_copy_between_zero_convolutions(controlled):
    """Eq. (2): y_c = F(x; T) + Z(F(x + Z(c; T_z1); T_c); T_z2), away from zero, each part written by hand."""
    original, net, x, c, args = controlled
    net.eval()
    with torch.no_grad():
        for p in [*net.copy.parameters(), *net.zero_in.parameters(), *net.zero_out.parameters()]:
            p.add_(0.3 * torch.randn_like(p))
    copied = copy.deepcopy(original)
    copied.load_state_dict(net.copy.state_dict())
    want = original(x, *args) + by_hand(net.zero_out, copied(x + by_hand(net.zero_in, c), *args))
    got = net(x, c, *args)
    assert_close(got, want)
    assert not torch.allclose(got, original(x, *args))
    assert not torch.allclose(got, net(x, 0 * c, *args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eq3_fresh_copy_sees_the_same_input_and_its_output_is_blocked(controlled, dtype):
    """Eq. (3), bit for bit: Z(c) = 0, so F(x + Z(c); T_c) = F(x; T), and Z of that is 0."""
    original, net, x, c, args = controlled
    original, net = original.to(dtype), net.to(dtype).eval()
    x, c, *args = (t.to(dtype) for t in (x, c, *args))
    seen = {}
    for name in ("zero_in", "copy", "zero_out"):
        getattr(net, name).register_forward_hook(lambda _m, ins, out, name=name: seen.update({name: (ins[0], out)}))
    net(x, c, *args)
    assert torch.equal(seen["zero_in"][0], c)
    assert not seen["zero_in"][1].any()
    assert torch.equal(seen["copy"][0], x)
    assert torch.equal(seen["copy"][1], original(x, *args))
    assert torch.equal(seen["zero_out"][0], original(x, *args))
    assert seen["zero_out"][0].any()
    assert not seen["zero_out"][1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eq3_fresh_controlnet_computes_the_unets_own_features(unet, controlnet, batch, dtype):
    """Eq. (3) for the whole network, bit for bit: each of the copy's 13 blocks gives what the U-Net's block gives."""
    unet, net, b = unet.to(dtype), controlnet.to(dtype), batch.to(dtype)
    own = outputs_of(encoder(unet), lambda: unet(b.x, b.timesteps, b.context))
    copied = outputs_of(encoder(net), lambda: net(b.x, b.hint, b.timesteps, b.context))
    assert len(own) == len(copied) == 13
    for i, (a, c) in enumerate(zip(own, copied, strict=True)):
        assert torch.equal(a, c), i
    assert not net.input_hint_block(b.hint).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_eq4_fresh_controlled_block_changes_nothing(controlled, dtype, training):
    """Eq. (4): y_c = y, bit for bit, in evaluation and in training mode."""
    original, net, x, c, args = controlled
    original, net = original.to(dtype), net.to(dtype).train(training)
    x, c, *args = (t.to(dtype) for t in (x, c, *args))
    assert torch.equal(net(x, c, *args), original(x, *args))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eq4_fresh_controlnet_changes_nothing(unet, controlnet, batch, dtype, training):
    """Eq. (4) for the whole network: while every zero convolution is zero, y_c equals y, bit for bit."""
    unet, net, b = unet.to(dtype), controlnet.to(dtype).train(training), batch.to(dtype)
    control = net(b.x, b.hint, b.timesteps, b.context)
    assert [c.abs().max().item() for c in control] == [0.0] * 13
    y = unet(b.x, b.timesteps, b.context)
    assert y.any()
    assert torch.equal(y, unet(b.x, b.timesteps, b.context, control=control))


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


def test_eq4_a_fresh_controlnet_leaves_the_picture_as_it_is():
    """Eq. (4), up to the picture: before training, with and without ControlNet are the same, bit for bit."""
    sd = StableDiffusion.load("toy")
    fresh = ControlNet.from_unet(sd.unet, hint_channels=(4, 4, 8, 8)).eval()
    plain = sd.generate("a red ball", num_steps=2, height=32, width=32)
    control = sd.generate("a red ball", num_steps=2, hint=torch.rand(1, 3, 32, 32), controlnet=fresh)
    assert np.array_equal(np.asarray(plain[0]), np.asarray(control[0]))
