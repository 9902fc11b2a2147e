"""Section 3.2: 12 + 1 blocks, copied, give 12 + 1 residuals, added to the skips and the middle."""

import pytest
import torch
from by_hand import inputs_of, outputs_of, random_control, randomise
from closeness import assert_close

pytestmark = pytest.mark.numbers


@pytest.mark.parametrize("i", range(13))
def test_control_i_enters_at_its_own_block(unet, controlnet, batch, i):
    """control[12] goes to the middle block's output; control[i] to skip i, which decoder block 11 - i takes.

    Seen by changing one residual alone: decoder blocks before that one get the same input, bit for bit; in that one
    exactly the channels of the skip (the last ones) change, or for the middle exactly the others.
    """
    unet, b = unet.double(), batch.to(torch.float64)
    control = random_control(controlnet.double(), b)
    moved = [c.clone() for c in control]
    moved[i] += 1.0

    def run(residuals):
        return inputs_of(unet.output_blocks, lambda: unet(b.x, b.timesteps, b.context, residuals))

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
    assert_close(part, torch.ones_like(part))


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
    net, b = randomise(controlnet).double(), batch.to(torch.float64)
    hints = (b.hint[:1], b.hint[:1].expand(2, -1, -1, -1), b.hint)
    for one, both, other in zip(*(net(b.x, hint, b.timesteps, b.context) for hint in hints), strict=True):
        assert_close(one, both)
        assert not torch.allclose(one[1], other[1])


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


def test_samples_of_a_batch_do_not_meet(unet, controlnet, batch):
    """Each sample's noise prediction is what it is alone."""
    net = randomise(controlnet).double()
    unet, b = unet.double(), batch.to(torch.float64)
    both = unet(b.x, b.timesteps, b.context, net(b.x, b.hint, b.timesteps, b.context))
    for k in range(2):
        s = slice(k, k + 1)
        control = net(b.x[s], b.hint[s], b.timesteps[s], b.context[s])
        alone = unet(b.x[s], b.timesteps[s], b.context[s], control)
        assert_close(both[s], alone)


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
