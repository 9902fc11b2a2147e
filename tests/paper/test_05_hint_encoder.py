"""Section 3.2, eq. (9): E turns the condition, an image c_i, into features c_f of the latents' size."""

import pytest
import torch
import torch.nn.functional as F
from by_hand import inputs_of, outputs_of, randomise
from closeness import assert_close
from torch import nn

from minicn import ControlNet, hint_encoder

pytestmark = pytest.mark.numbers


# Of each convolution of E, in order: stride, padding, activation.
RELEASED = [(stride, 1, F.silu) for stride in (1, 1, 2, 1, 2, 1, 2)] + [(1, 1, lambda h: h)]
PAPER = [(2, 1, F.relu)] * 3 + [(1, 0, lambda h: h)]


@pytest.mark.parametrize("paper", [False, True])
def test_eq9_the_features_are_the_encoder_of_the_hint(unet, hint_channels, batch, paper):
    """Eq. (9): c_f = E(c_i), its convolutions and activations one by one, away from zero, in float64.

    c_f is what the sampler keeps (`hint_features`), whatever latents, time and text are.
    """
    net = ControlNet.from_unet(unet.double(), hint_channels=hint_channels, paper_hint_encoder=paper)
    randomise(net)
    hint = batch.hint.double()
    convs = [m for m in net.input_hint_block if isinstance(m, nn.Conv2d)]
    features = hint
    for conv, (stride, padding, activation) in zip(convs, PAPER if paper else RELEASED, strict=True):
        features = activation(F.conv2d(features, conv.weight, conv.bias, stride, padding))
    assert features.shape == (*batch.x.shape[:1], 8, *batch.x.shape[2:])
    assert_close(net.hint_features(hint), features)


def test_eq9_the_features_join_the_latents_after_their_first_convolution(controlnet, batch):
    """c_f of eq. (9) is added to the copy's first convolution of x_t: the second block sees that sum, and no other the hint.

    Paper vs code: the figure adds it before; the weights want it after.
    """
    net, b = randomise(controlnet).double(), batch.to(torch.float64)

    def run():
        net(b.x, b.hint, b.timesteps, b.context)

    [first] = outputs_of([net.input_blocks[0]], run)
    taken = inputs_of(net.input_blocks[:2], run)
    assert torch.equal(taken[0], b.x)
    assert torch.equal(taken[1], first + net.input_hint_block(b.hint))
    assert_close(first, F.conv2d(b.x, net.input_blocks[0][0].weight, net.input_blocks[0][0].bias, padding=1))


@pytest.mark.parametrize("paper", [False, True])
def test_hint_encoder_divides_the_size_by_eight(paper):
    """Eq. (9): E brings a hint of 8h x 8w pixels to h x w, in both versions."""
    encoder = hint_encoder(8, (4, 4, 8, 8), paper)
    assert encoder(torch.rand(2, 3, 40, 136)).shape == (2, 8, 5, 17)


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


def test_residuals_from_the_hints_features_are_those_of_forward(controlnet, batch):
    """A sampler may compute E(hint) of eq. (9) once and reuse it at every step: the residuals are equal bit for bit."""
    net = randomise(controlnet)
    features = net.input_hint_block(batch.hint)
    for timesteps in (batch.timesteps, batch.timesteps + 20):
        want = net(batch.x, batch.hint, timesteps, batch.context)
        got = net.residuals(batch.x, features, timesteps, batch.context)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("channels", [(8, 16, 32, 64), (16, 32, 96, 256)])
@pytest.mark.parametrize("paper", [False, True])
def test_a_hint_arrives_at_the_end_of_the_hint_encoder(channels, paper):
    """The difference between two hints keeps its size up to the last layer, not as with PyTorch's own first weights.

    Those dim it several thousand times in the released encoder of eight layers.
    """
    torch.manual_seed(0)
    encoder, (a, b) = hint_encoder(32, channels, paper)[:-1], (torch.rand(2, 1, 3, 64, 64) > 0.9).float()

    def arrives():
        return ((encoder(a) - encoder(b)).norm() / encoder(a).numel() ** 0.5) / ((a - b).norm() / a.numel() ** 0.5)

    with torch.no_grad():
        assert (0.1 if paper else 0.02) < arrives() < 1
        for layer in encoder[::2]:
            layer.reset_parameters()
        assert arrives() < (0.1 if paper else 1 / 2000)
