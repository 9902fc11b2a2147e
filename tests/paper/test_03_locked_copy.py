"""Sections 3.1 and 3.2: the locked weights stay as they are, the copy is a clone, the locked encoder costs no graph."""

import pytest
import torch
from by_hand import loss_of, outputs_of, randomise, same, tensors
from torch import nn

from minicn import ControlledBlock, ControlNet

pytestmark = pytest.mark.numbers


def test_the_copy_shares_no_memory_with_the_locked_block(controlled):
    """T_c is a clone of T: equal values, other memory."""
    _, net, *_ = controlled
    assert same(tensors(net.copy), tensors(net.locked))
    places = [{p.data_ptr() for p in part.parameters()} for part in (net.copy, net.locked)]
    assert not places[0] & places[1]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_the_locked_block_never_changes(controlled, optimizer):
    """T is locked: three steps in training mode leave it, and batch norm's counts in it, bit for bit as they were."""
    original, net, x, c, args = controlled
    net.train()
    before, first = tensors(net.locked), tensors(net)
    optimizer = optimizer(net.parameters(), lr=0.01)  # given everything: what is locked has no gradient
    for _ in range(3):
        optimizer.zero_grad()
        net(x, c, *args).square().sum().backward()
        optimizer.step()
    assert same(tensors(net.locked), before)
    assert same(before, tensors(original))
    assert all(p.grad is None and not p.requires_grad for p in net.locked.parameters())
    changed = {name for name, t in tensors(net).items() if not torch.equal(t, first[name])}
    assert changed == {name for name in first if not name.startswith("locked.")}


def test_the_locked_batch_norm_does_not_count():
    """In training mode a forward moves the copy's running statistics, and the locked block's not at all."""
    block = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
    net = ControlledBlock(block, 4, 6).train()
    before = tensors(net)
    net(torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6))
    moved = {name for name, t in tensors(net).items() if not torch.equal(t, before[name])}
    assert moved == {f"copy.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert [net.training, net.copy.training, net.locked.training, net.locked[1].training] == [True, True, False, False]


def test_from_unet_copies_and_leaves_the_unet_as_it_is(unet, hint_channels):
    """The copy is equal bit for bit and shares no memory; the U-Net's values, flags and mode stay as they were."""
    unet.train()
    before = tensors(unet)
    flags = [(p.requires_grad, p.data_ptr()) for p in unet.parameters()]
    net = ControlNet.from_unet(unet, hint_channels=hint_channels)
    assert same(tensors(unet), before)
    assert [(p.requires_grad, p.data_ptr()) for p in unet.parameters()] == flags
    assert unet.training
    copied = tensors(net)
    shared = [k for k in copied if k in before]
    assert len(shared) == 298
    assert all(torch.equal(copied[k], before[k]) for k in shared)
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


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_changes_the_controlnet_alone(whole, optimizer):
    """Steps of the optimizer, given both networks, leave every tensor of the locked U-Net bit for bit as it was."""
    unet, net, b = whole
    unet.train()
    net.train()
    before, first = tensors(unet), tensors(net)
    optimizer = optimizer([*unet.parameters(), *net.parameters()], lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(unet, b, net(b.x, b.hint, b.timesteps, b.context)).backward()
        optimizer.step()
    assert same(tensors(unet), before)
    assert all(p.grad is None for p in unet.parameters())
    assert all(not torch.equal(t, first[name]) for name, t in tensors(net).items())


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
