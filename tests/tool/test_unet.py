"""The layers of the U-Net, each against its formula written out, in float64."""

import math

import torch
import torch.nn.functional as F
from by_hand import attention, filled, normal, normed
from closeness import assert_close

from minicn.unet import (
    Attention,
    Downsample,
    FeedForward,
    ResBlock,
    SpatialTransformer,
    TransformerBlock,
    Upsample,
    timestep_embedding,
)


def test_timestep_embedding_is_cosines_then_sines():
    """Entry i is cos(t w_i), entry i + half sin(t w_i), with w_i = 10000^(-i / half)."""
    t = torch.tensor([0, 1, 500, 999])
    w = 10000 ** (-torch.arange(8, dtype=torch.float64) / 8)
    want = torch.cat([(t[:, None] * w).cos(), (t[:, None] * w).sin()], dim=1)
    assert (timestep_embedding(t, 16) - want).abs().max() < 1e-4  # float32 angles of up to 999


def test_a_resnet_block_is_two_convolutions_with_the_time_in_between():
    """x + conv(silu(norm(conv(silu(norm(x))) + time))), eps 1e-5; x through a 1x1 convolution where the width changes."""
    block = filled(ResBlock(4, 8, 6, groups=2))
    x, emb = 1e-2 * normal(2, 4, 3, 5), normal(2, 6)  # of variance 1e-4, so that eps counts
    h = block.in_layers[2](F.silu(normed(x, block.in_layers[0], 2, 1e-5)))
    h = h + block.emb_layers[1](F.silu(emb))[:, :, None, None]
    h = block.out_layers[3](F.silu(normed(h, block.out_layers[0], 2, 1e-5)))
    assert_close(block(x, emb), block.skip_connection(x) + h, rtol=1e-12)


def test_attention_of_the_unet_is_the_softmax_of_its_scores():
    """Neighbouring channels form a head; to a text of another width as to itself."""
    layer = filled(Attention(8, 6, heads=2))
    x, text = normal(2, 5, 8), normal(2, 7, 6)
    want = layer.to_out[0](attention(layer.to_q(x), layer.to_k(text), layer.to_v(text), 2))
    assert_close(layer(x, text), want, rtol=1e-12)


def test_the_feed_forward_is_gated_by_the_exact_gelu():
    """GEGLU: the first half times gelu(the second), gelu(x) = x (1 + erf(x / sqrt 2)) / 2."""
    layer = filled(FeedForward(4))
    x = normal(2, 3, 4)
    value, gate = layer.net[0].proj(x)[..., :16], layer.net[0].proj(x)[..., 16:]
    want = layer.net[2](value * gate * (1 + torch.erf(gate / math.sqrt(2))) / 2)
    assert_close(layer(x), want, rtol=1e-12)


def test_a_transformer_block_is_three_residuals():
    """To itself, to the text, feed-forward; each behind its own LayerNorm."""
    block = filled(TransformerBlock(8, 6, heads=2))
    x, text = normal(2, 5, 8), normal(2, 7, 6)
    h = block.norm1(x)
    want = x + block.attn1(h, h)
    want = want + block.attn2(block.norm2(want), text)
    want = want + block.ff(block.norm3(want))
    assert_close(block(x, text), want, rtol=1e-12)


def test_a_spatial_transformer_is_a_residual_over_all_positions():
    """x + proj_out(block(proj_in(norm(x)))), eps 1e-6, position by position in the order of reading."""
    layer = filled(SpatialTransformer(8, 6, heads=2, groups=2))
    x, text = 1e-2 * normal(2, 8, 3, 5), normal(2, 7, 6)
    h = layer.proj_in(normed(x, layer.norm, 2, 1e-6))
    tokens = torch.stack([h[:, :, i, j] for i in range(3) for j in range(5)], dim=1)
    tokens = layer.transformer_blocks[0](tokens, text)
    h = torch.zeros_like(x)
    for n in range(15):
        h[:, :, n // 5, n % 5] = tokens[:, n]
    assert_close(layer(x, text), x + layer.proj_out(h), rtol=1e-12)


def test_upsampling_repeats_pixels_and_downsampling_takes_every_second():
    """Nearest neighbour, then a 3x3 convolution; a 3x3 convolution at pixels 0, 2, 4, ... of the padded map."""
    up, down = filled(Upsample(3)), filled(Downsample(3))
    x = normal(1, 3, 3, 4)
    whole = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert_close(up(x, whole.shape[-2:]), F.conv2d(whole, up.conv.weight, up.conv.bias, padding=1), rtol=1e-12)
    assert_close(down(x), F.conv2d(x, down.op.weight, down.op.bias, padding=1)[:, :, ::2, ::2], rtol=1e-12)


def test_a_decoder_block_takes_what_came_and_then_its_skip(unet, batch):
    """Output block i sees [features, skip 11 - i], in this order: the order that the weights were trained in."""
    skips, inputs, outputs = [], [], []
    for block in unet.input_blocks:
        block.register_forward_hook(lambda _m, _i, out: skips.append(out))
    unet.middle_block.register_forward_hook(lambda _m, _i, out: outputs.append(out))
    for block in unet.output_blocks:
        block.register_forward_hook(lambda _m, args, _out: inputs.append(args[0]))
        block.register_forward_hook(lambda _m, _i, out: outputs.append(out))
    unet(batch.x, batch.timesteps, batch.context)
    assert len(inputs) == 12
    for given, came, skip in zip(inputs, outputs[:-1], reversed(skips), strict=True):
        assert torch.equal(given, torch.cat([came, skip], dim=1))
