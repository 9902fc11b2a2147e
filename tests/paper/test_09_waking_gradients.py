"""Section 3.3, how training begins: the gradient wakes the ControlNet from the outside in."""

import pytest
import torch

pytestmark = pytest.mark.numbers


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
