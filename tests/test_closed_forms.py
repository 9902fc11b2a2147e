"""The layers of U-Net, autoencoder and text transformer, each against its formula written out, in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from minicn import ControlNetConfig, StableDiffusion, clip, pipeline, training, unet, vae


def filled(module: nn.Module) -> nn.Module:
    """Give every parameter normal values, in float64, so that none is neutral."""
    g = torch.Generator().manual_seed(5)
    module = module.double().eval().requires_grad_(False)
    for p in module.parameters():
        p.copy_(0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64))
    return module


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


def close(a: torch.Tensor, b: torch.Tensor, bound: float = 1e-12) -> bool:
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item() < bound


def norm(x, module, groups, eps):
    """Group normalisation, as its definition says."""
    parts = x.reshape(len(x), groups, -1)
    mean, var = parts.mean(-1, keepdim=True), parts.var(-1, unbiased=False, keepdim=True)
    parts = ((parts - mean) / (var + eps).sqrt()).reshape(x.shape)
    return parts * module.weight[:, None, None] + module.bias[:, None, None]


def attention(q, k, v, heads, mask=None):
    """softmax(q k^T / sqrt(d)) v, head by head; (B, N, C) each."""
    results, d = [], q.shape[-1] // heads
    for i in range(heads):
        part = slice(i * d, (i + 1) * d)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(d)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        results.append(scores.softmax(-1) @ v[..., part])
    return torch.cat(results, -1)


# U-Net


def test_timestep_embedding_is_cosines_then_sines():
    """Entry i is cos(t w_i), entry i + half sin(t w_i), with w_i = 10000^(-i / half)."""
    t = torch.tensor([0, 1, 500, 999])
    w = 10000 ** (-torch.arange(8, dtype=torch.float64) / 8)
    want = torch.cat([(t[:, None] * w).cos(), (t[:, None] * w).sin()], dim=1)
    assert (unet.timestep_embedding(t, 16) - want).abs().max() < 1e-4  # float32 angles of up to 999


def test_a_resnet_block_is_two_convolutions_with_the_time_in_between():
    """x + conv(silu(norm(conv(silu(norm(x))) + time))), eps 1e-5; x through a 1x1 convolution where the width changes."""
    block = filled(unet.ResBlock(4, 8, 6, groups=2))
    x, emb = 1e-2 * draw(2, 4, 3, 5), draw(2, 6)  # of variance 1e-4, so that eps counts
    h = block.in_layers[2](F.silu(norm(x, block.in_layers[0], 2, 1e-5)))
    h = h + block.emb_layers[1](F.silu(emb))[:, :, None, None]
    h = block.out_layers[3](F.silu(norm(h, block.out_layers[0], 2, 1e-5)))
    assert close(block(x, emb), block.skip_connection(x) + h)


def test_attention_of_the_unet_is_the_softmax_of_its_scores():
    """Neighbouring channels form a head; to a text of another width as to itself."""
    layer = filled(unet.Attention(8, 6, heads=2))
    x, text = draw(2, 5, 8), draw(2, 7, 6)
    want = layer.to_out[0](attention(layer.to_q(x), layer.to_k(text), layer.to_v(text), 2))
    assert close(layer(x, text), want)


def test_the_feed_forward_is_gated_by_the_exact_gelu():
    """GEGLU: the first half times gelu(the second), gelu(x) = x (1 + erf(x / sqrt 2)) / 2."""
    layer = filled(unet.FeedForward(4))
    x = draw(2, 3, 4)
    value, gate = layer.net[0].proj(x)[..., :16], layer.net[0].proj(x)[..., 16:]
    want = layer.net[2](value * gate * (1 + torch.erf(gate / math.sqrt(2))) / 2)
    assert close(layer(x), want)


def test_a_transformer_block_is_three_residuals():
    """To itself, to the text, feed-forward; each behind its own LayerNorm."""
    block = filled(unet.TransformerBlock(8, 6, heads=2))
    x, text = draw(2, 5, 8), draw(2, 7, 6)
    h = block.norm1(x)
    want = x + block.attn1(h, h)
    want = want + block.attn2(block.norm2(want), text)
    want = want + block.ff(block.norm3(want))
    assert close(block(x, text), want)


def test_a_spatial_transformer_is_a_residual_over_all_positions():
    """x + proj_out(block(proj_in(norm(x)))), eps 1e-6, position by position in the order of reading."""
    layer = filled(unet.SpatialTransformer(8, 6, heads=2, groups=2))
    x, text = 1e-2 * draw(2, 8, 3, 5), draw(2, 7, 6)
    h = layer.proj_in(norm(x, layer.norm, 2, 1e-6))
    tokens = torch.stack([h[:, :, i, j] for i in range(3) for j in range(5)], dim=1)
    tokens = layer.transformer_blocks[0](tokens, text)
    h = torch.zeros_like(x)
    for n in range(15):
        h[:, :, n // 5, n % 5] = tokens[:, n]
    assert close(layer(x, text), x + layer.proj_out(h))


def test_upsampling_repeats_pixels_and_downsampling_takes_every_second():
    """Nearest neighbour, then a 3x3 convolution; a 3x3 convolution at pixels 0, 2, 4, ... of the padded map."""
    up, down = filled(unet.Upsample(3)), filled(unet.Downsample(3))
    x = draw(1, 3, 3, 4)
    whole = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert close(up(x, whole.shape[-2:]), F.conv2d(whole, up.conv.weight, up.conv.bias, padding=1))
    assert close(down(x), F.conv2d(x, down.op.weight, down.op.bias, padding=1)[:, :, ::2, ::2])


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


# Autoencoder


@pytest.fixture
def small_vae() -> vae.VAE:
    return filled(vae.VAE(vae.VAEConfig(channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2)))


def test_a_resnet_block_of_the_autoencoder_is_two_convolutions():
    """x + conv(silu(norm(conv(silu(norm(x)))))), eps 1e-6; x through a 1x1 convolution where the width changes."""
    block = filled(vae.ResnetBlock(4, 8, groups=2))
    x = 1e-3 * draw(2, 4, 3, 5)
    h = block.conv1(F.silu(norm(x, block.norm1, 2, 1e-6)))
    h = block.conv2(F.silu(norm(h, block.norm2, 2, 1e-6)))
    assert close(block(x), block.nin_shortcut(x) + h)


def test_attention_of_the_autoencoder_is_one_head_over_all_positions():
    layer = filled(vae.AttnBlock(4, groups=2))
    x = draw(2, 4, 3, 5)
    q, k, v = (f(norm(x, layer.norm, 2, 1e-6)).flatten(2).transpose(1, 2) for f in (layer.q, layer.k, layer.v))
    h = attention(q, k, v, 1).transpose(1, 2).reshape(x.shape)
    assert close(layer(x), x + layer.proj_out(h))


def test_the_autoencoder_pads_right_and_below():
    """Before a stride-2 convolution one row and one column of zeros are added at the far ends alone."""
    down = filled(vae.Downsample(3))
    x = draw(1, 3, 4, 6)
    padded = torch.zeros(1, 3, 5, 7, dtype=torch.float64)
    padded[:, :, :4, :6] = x
    assert close(down(x), F.conv2d(padded, down.conv.weight, down.conv.bias, stride=2))


def test_the_autoencoder_enlarges_by_repeating_pixels():
    up = filled(vae.Upsample(3))
    x = draw(1, 3, 3, 4)
    whole = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert close(up(x), F.conv2d(whole, up.conv.weight, up.conv.bias, padding=1))


def test_encode_gives_mean_and_standard_deviation(small_vae):
    """The first half of the moments is the mean, the second log var, held to [-30, 20]; std = exp(log var / 2)."""
    images = draw(1, 3, 16, 24)
    moments = F.conv2d(small_vae.encoder(images), small_vae.quant_conv.weight, small_vae.quant_conv.bias)
    mean, std = small_vae.encode(images)
    assert torch.equal(mean, moments[:, :4])
    assert close(std, (moments[:, 4:].exp()).sqrt())
    small_vae.quant_conv.bias[4:6] = 1e4
    small_vae.quant_conv.bias[6:8] = -1e4
    std = small_vae.encode(images)[1]
    assert close(std[:, :2], torch.full_like(std[:, :2], math.exp(10)))
    assert close(std[:, 2:], torch.full_like(std[:, 2:], math.exp(-15)))


def test_the_decoder_is_blocks_and_a_last_norm(small_vae):
    """post_quant_conv, conv_in, the middle, the levels from coarse to fine, silu(norm), conv_out."""
    z, decoder = draw(1, 4, 2, 3), small_vae.decoder
    h = decoder.conv_in(small_vae.post_quant_conv(z))
    h = decoder.mid.block_2(decoder.mid.attn_1(decoder.mid.block_1(h)))
    for i in (3, 2, 1, 0):
        for block in decoder.up[i].block:
            h = block(h)
        h = decoder.up[i].upsample(h) if i else h
    want = decoder.conv_out(F.silu(norm(h, decoder.norm_out, 2, 1e-6)))
    assert close(small_vae.decode(z), want)


def test_the_encoder_is_blocks_and_a_last_norm(small_vae):
    """conv_in, the levels from fine to coarse, the middle, silu(norm), conv_out."""
    images, encoder = draw(1, 3, 16, 24), small_vae.encoder
    h = encoder.conv_in(images)
    for i in range(4):
        for block in encoder.down[i].block:
            h = block(h)
        h = encoder.down[i].downsample(h) if i < 3 else h
    h = encoder.mid.block_2(encoder.mid.attn_1(encoder.mid.block_1(h)))
    assert close(encoder(images), encoder.conv_out(F.silu(norm(h, encoder.norm_out, 2, 1e-6))))


def test_default_sizes_that_no_weight_shows():
    """Stable Diffusion 1.5's heads, groups and scale, which no shape of a weight gives away."""
    assert (unet.UNetConfig().num_heads, unet.UNetConfig().norm_num_groups) == (8, 32)
    assert (vae.VAEConfig().norm_num_groups, vae.VAEConfig().scaling_factor) == (32, 0.18215)
    assert clip.TextConfig().num_heads == 12


# Text transformer


@pytest.fixture
def text_encoder() -> clip.TextEncoder:
    sizes = dict(vocab_size=20, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2, max_positions=9)
    return filled(clip.TextEncoder(clip.TextConfig(**sizes)))


def test_the_text_transformer_is_its_formula(text_encoder):
    """Token + position; per layer causal attention, then x sigmoid(1.702 x) between two linear layers; a last LayerNorm."""
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5], [0, 19, 7, 7, 7, 7, 7, 7, 7]])
    model = text_encoder.text_model
    x = model.embeddings.token_embedding.weight[tokens] + model.embeddings.position_embedding.weight
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    for layer in model.encoder.layers:
        h, a = layer.layer_norm1(x), layer.self_attn
        x = x + a.out_proj(attention(a.q_proj(h), a.k_proj(h), a.v_proj(h), 2, mask))
        h = layer.mlp.fc1(layer.layer_norm2(x))
        x = x + layer.mlp.fc2(h / (1 + (-1.702 * h).exp()))
    assert close(text_encoder(tokens), model.final_layer_norm(x))


def test_a_word_does_not_change_the_features_before_it(text_encoder):
    """Causal: features 0 to i - 1 are the same, bit for bit, whatever stands at i; those from i on are not."""
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5]])
    other = tokens.clone()
    other[0, 4] = 8
    a, b = text_encoder(tokens), text_encoder(other)
    assert torch.equal(a[:, :4], b[:, :4])
    assert (a[:, 4:] != b[:, 4:]).any(-1).all()


def test_tokens_that_do_not_fit_are_refused(text_encoder):
    """Another shape, too many, or not whole numbers: the error says what came."""
    for tokens in (torch.zeros(9, dtype=torch.int64), torch.zeros(1, 10, dtype=torch.int64), torch.zeros(1, 9)):
        with pytest.raises(ValueError, match="tokens are .* but the text encoder takes int64 of shape"):
            text_encoder(tokens)


# Around the models


def test_the_learning_rate_falls_to_zero_over_the_last_share():
    """1 for the first 70 of 100 steps, then evenly to 1/30 at the last; without decay 1 throughout."""
    factors = [training.learning_rate_factor(step, 100) for step in range(1, 101)]
    assert factors[:71] == [1.0] * 71
    for step in range(72, 101):
        assert abs(factors[step - 1] - (101 - step) / 30) < 1e-12
    assert training.learning_rate_factor(100, 100, 0.0) == 1


def test_pictures_become_latents_and_back_by_one_scale():
    """encode_images: [0, 255] to [-1, 1], times 0.18215; decode_latents divides by it, rounds to the nearest level."""

    class Open(nn.Module):
        """An autoencoder that keeps what it is given."""

        cfg = vae.VAEConfig()
        quant_conv = nn.Conv2d(1, 1, 1)

        def encode(self, images):
            return images, None

        def decode(self, latents):
            return latents

    sd = StableDiffusion.__new__(StableDiffusion)
    sd.vae, sd.unet = Open(), nn.Module()
    sd.unet.out = nn.Sequential(nn.Identity(), nn.Identity(), nn.Conv2d(1, 1, 1))
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    latents = sd.encode_images([Image.fromarray(levels)])
    want = (torch.arange(256) / 127.5 - 1).view(1, 1, 16, 16).expand(1, 3, 16, 16) * 0.18215
    assert (latents - want).abs().max() < 1e-7
    [back] = sd.decode_latents(latents)
    assert np.array_equal(np.asarray(back), levels)
    [nearest] = sd.decode_latents(torch.full((1, 3, 1, 1), 2 * 100.7 / 255 - 1) * 0.18215)
    assert np.asarray(nearest)[0, 0, 0] == 101


@pytest.mark.parametrize(("mode", "ratio"), [(True, 0.825), ("diffusers", 10 ** (-1 / 12)), (False, 1.0)])
@pytest.mark.parametrize("guided", [True, False])
def test_guess_mode_scales_the_conditional_half_by_hand(mode, ratio, guided):
    """Residual i is scaled by ratio^(12 - i), and where there are two halves, the unconditional one gets zeros."""

    class Ones(nn.Module):
        """A ControlNet whose 13 residuals are 1."""

        cfg = ControlNetConfig()
        time_embed = nn.Sequential(nn.Linear(4, 4))

        def hint_features(self, hint):
            return hint

        def residuals(self, x, *_):
            return [torch.ones(1, 2, 1, 1)] * 13

    context, t = torch.zeros(1 + guided, 7, 12), torch.tensor([501, 1])
    control = pipeline.Control(Ones(), torch.zeros(1, 3, 8, 8), 0.5, mode, context, t, guided)
    residuals = control.residuals(torch.zeros(1, 4, 1, 1), t[:1], 0)
    assert len(residuals) == 13
    for i, c in enumerate(residuals):
        halves = c.flatten(1).tolist()
        assert halves[:-1] == ([[0, 0]] if guided and mode else [])
        assert halves[-1] == pytest.approx([0.5 * ratio ** (12 - i)] * 2, rel=1e-6)
