"""The layers of the autoencoder, each against its formula written out, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from by_hand import attention, filled, normal, normed
from closeness import assert_close

from minicn.vae import VAE, AttnBlock, Downsample, ResnetBlock, Upsample, VAEConfig


@pytest.fixture
def small_vae() -> VAE:
    return filled(VAE(VAEConfig(channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2)))


def test_a_resnet_block_of_the_autoencoder_is_two_convolutions():
    """x + conv(silu(norm(conv(silu(norm(x)))))), eps 1e-6; x through a 1x1 convolution where the width changes."""
    block = filled(ResnetBlock(4, 8, groups=2))
    x = 1e-3 * normal(2, 4, 3, 5)
    h = block.conv1(F.silu(normed(x, block.norm1, 2, 1e-6)))
    h = block.conv2(F.silu(normed(h, block.norm2, 2, 1e-6)))
    assert_close(block(x), block.nin_shortcut(x) + h, rtol=1e-12)


def test_attention_of_the_autoencoder_is_one_head_over_all_positions():
    layer = filled(AttnBlock(4, groups=2))
    x = normal(2, 4, 3, 5)
    q, k, v = (f(normed(x, layer.norm, 2, 1e-6)).flatten(2).transpose(1, 2) for f in (layer.q, layer.k, layer.v))
    h = attention(q, k, v, 1).transpose(1, 2).reshape(x.shape)
    assert_close(layer(x), x + layer.proj_out(h), rtol=1e-12)


def test_the_autoencoder_pads_right_and_below():
    """Before a stride-2 convolution one row and one column of zeros are added at the far ends alone."""
    down = filled(Downsample(3))
    x = normal(1, 3, 4, 6)
    padded = torch.zeros(1, 3, 5, 7, dtype=torch.float64)
    padded[:, :, :4, :6] = x
    assert_close(down(x), F.conv2d(padded, down.conv.weight, down.conv.bias, stride=2), rtol=1e-12)


def test_the_autoencoder_enlarges_by_repeating_pixels():
    up = filled(Upsample(3))
    x = normal(1, 3, 3, 4)
    whole = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert_close(up(x), F.conv2d(whole, up.conv.weight, up.conv.bias, padding=1), rtol=1e-12)


def test_encode_gives_mean_and_standard_deviation(small_vae):
    """The first half of the moments is the mean, the second log var, held to [-30, 20]; std = exp(log var / 2)."""
    images = normal(1, 3, 16, 24)
    moments = F.conv2d(small_vae.encoder(images), small_vae.quant_conv.weight, small_vae.quant_conv.bias)
    mean, std = small_vae.encode(images)
    assert torch.equal(mean, moments[:, :4])
    assert_close(std, (moments[:, 4:].exp()).sqrt(), rtol=1e-12)
    small_vae.quant_conv.bias[4:6] = 1e4
    small_vae.quant_conv.bias[6:8] = -1e4
    std = small_vae.encode(images)[1]
    assert_close(std[:, :2], torch.full_like(std[:, :2], math.exp(10)), rtol=1e-12)
    assert_close(std[:, 2:], torch.full_like(std[:, 2:], math.exp(-15)), rtol=1e-12)


def test_the_decoder_is_blocks_and_a_last_norm(small_vae):
    """post_quant_conv, conv_in, the middle, the levels from coarse to fine, silu(norm), conv_out."""
    z, decoder = normal(1, 4, 2, 3), small_vae.decoder
    h = decoder.conv_in(small_vae.post_quant_conv(z))
    h = decoder.mid.block_2(decoder.mid.attn_1(decoder.mid.block_1(h)))
    for i in (3, 2, 1, 0):
        for block in decoder.up[i].block:
            h = block(h)
        h = decoder.up[i].upsample(h) if i else h
    want = decoder.conv_out(F.silu(normed(h, decoder.norm_out, 2, 1e-6)))
    assert_close(small_vae.decode(z), want, rtol=1e-12)


def test_the_encoder_is_blocks_and_a_last_norm(small_vae):
    """conv_in, the levels from fine to coarse, the middle, silu(norm), conv_out."""
    images, encoder = normal(1, 3, 16, 24), small_vae.encoder
    h = encoder.conv_in(images)
    for i in range(4):
        for block in encoder.down[i].block:
            h = block(h)
        h = encoder.down[i].downsample(h) if i < 3 else h
    h = encoder.mid.block_2(encoder.mid.attn_1(encoder.mid.block_1(h)))
    assert_close(encoder(images), encoder.conv_out(F.silu(normed(h, encoder.norm_out, 2, 1e-6))), rtol=1e-12)
