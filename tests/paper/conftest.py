"""What the equations are tested on, in float64: one zero convolution, a block under control, the whole network."""

import copy

import pytest
import torch
from torch import nn

from minicn import ControlledBlock, ControlNet, zero_conv, zero_linear
from minicn.unet import ResBlock, TransformerBlock

KINDS = {  # what makes it, and its input: 3 channels in, 5 out
    "map": (zero_conv, (2, 3, 4, 5)),
    "tokens": (zero_linear, (2, 7, 3)),
}


@pytest.fixture(params=KINDS)
def single(request):
    """A fresh zero convolution Z, an input I and a gradient G behind it, in float64."""
    make, shape = KINDS[request.param]
    z = make(3, 5).double()
    inputs = torch.randn(shape, dtype=torch.float64)
    return z, inputs, torch.randn_like(z(inputs))


def res_block():
    return ResBlock(4, 6, emb_dim=10, groups=2), zero_conv, 4, 6, ((3, 4, 5, 6), (3, 10))


def conv_bn_relu():
    block = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
    nn.init.normal_(block[1].running_mean, std=0.2)
    nn.init.uniform_(block[1].running_var, 0.5, 1.5)
    return block, zero_conv, 4, 6, ((3, 4, 5, 6),)


def transformer():
    return TransformerBlock(8, context_dim=12, heads=2), zero_linear, 8, None, ((3, 5, 8), (3, 7, 12))


BLOCKS = {f.__name__: f for f in (res_block, conv_bn_relu, transformer)}


@pytest.fixture(params=BLOCKS)
def controlled(request, dezero):
    """F as it was before (an independent copy), the controlled block, x, c and F's further arguments, in float64."""
    block, zero, c_in, c_out, shapes = BLOCKS[request.param]()
    dezero(block.double(), std=0.3)
    original = copy.deepcopy(block).eval()
    x, *args = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return original, ControlledBlock(block, c_in, c_out, zero).double(), x, torch.randn_like(x), args


@pytest.fixture
def whole(unet, hint_channels, batch):
    """The locked U-Net, its fresh ControlNet and inputs, in float64."""
    unet = unet.double()
    return unet, ControlNet.from_unet(unet, hint_channels=hint_channels), batch.to(torch.float64)
