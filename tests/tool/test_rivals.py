"""What ControlNet is compared with in the experiments: each rival does what its paper says."""

import itertools

import code_transformer
import condition_channels
import pytest
import torch
from code_transformer import SIDE, WORDS, Transformer
from sketch_guided import SketchGuidance, SketchPredictor, look_inside

from minicn import StableDiffusion, ddim, toy
from minicn.pipeline import Predictor
from minicn.trainer import recording
from minicn.training import Examples, Recipe

# Taming Transformers


@pytest.fixture(scope="module")
def told():
    """A fresh transformer of 32 codes, and caption features, label maps and tokens of two scenes."""
    torch.manual_seed(0)
    net = Transformer(96, torch.randn(32, 4), width=32, depth=2).eval()
    hints = recording.stack([toy.scene(i).hint("ade20k") for i in (0, 1)]).float() / 255
    return net, torch.randn(2, 77, 96), hints, torch.randint(32, (2, SIDE**2))


def test_a_code_depends_on_the_condition_and_the_codes_before_it_alone(told):
    """p(s_i | s_<i, c): another code changes no logits up to its own, and those that follow; another condition all."""
    net, context, hints, tokens = told
    with torch.no_grad():
        logits = net(context, hints, tokens)
        assert logits.shape == (2, 256, 32)
        other = tokens.clone()
        other[:, 100] = (other[:, 100] + 1) % 32
        changed = (net(context, hints, other) - logits).abs().amax((0, 2))
        assert changed[:101].max() < 1e-6  # rounding, if sums are split otherwise
        assert changed[101:].min() > 1e-5
        for another in ((context.roll(1, 0), hints), (context, hints.roll(1, 0))):
            assert (net(*another, tokens) - logits).abs().amax((0, 2)).min() > 1e-5


def test_drawing_with_kept_keys_and_values_is_the_whole_pass(told):
    """The logits from which each code was drawn are those of the whole sequence at once; a seed draws alike."""
    net, context, hints, _ = told
    tokens, logits = net.sample(context, hints, seed=3, top_k=5)
    with torch.no_grad():
        whole = net(context, hints, tokens)
    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=0)  # logits of about 1, sums of at most 337 float32
    assert (whole.topk(5).indices == tokens[..., None]).any(2).all()
    assert torch.equal(net.sample(context, hints, seed=3, top_k=5)[0], tokens)
    assert not torch.equal(net.sample(context, hints, seed=4, top_k=5)[0], tokens)


def test_codes_are_the_means_of_what_they_stand_for():
    """The code of a code is itself; well separated clusters, however unequal, each get one; latents come back in place."""
    centres = 10.0 * torch.tensor([*itertools.product((0, 1), repeat=4)])
    sizes = torch.arange(1, 17) ** 2
    noise = 0.01 * torch.randn(int(sizes.sum()), 4, generator=torch.Generator().manual_seed(0))
    vectors = centres.repeat_interleave(sizes, 0) + noise
    codes = code_transformer.fit_codes(vectors, 16)
    order = code_transformer.tokens_of(centres, codes)
    assert sorted(order.tolist()) == [*range(16)]
    means = torch.stack([part.mean(0) for part in vectors.split(sizes.tolist())])
    torch.testing.assert_close(codes[order], means, atol=1e-5, rtol=0)
    assert torch.equal(code_transformer.tokens_of(codes, codes), torch.arange(16))
    latents = codes[torch.randint(16, (2, SIDE, SIDE))].permute(0, 3, 1, 2)
    tokens = code_transformer.tokens_of(code_transformer.vectors_of(latents), codes).unflatten(0, (2, -1))
    assert torch.equal(code_transformer.latents_of(tokens, codes), latents)


def test_the_condition_holds_the_whole_caption_and_each_label():
    """The longest caption fits; the pieces' shares add up to one everywhere, and lie where the label map has them."""
    names, tokenizer = toy.thing_names(), StableDiffusion.load("toy").tokenizer
    longest = max(len(tokenizer.encode(toy.sentence([name] * 3, b))) for name in names for b in toy.BACKGROUNDS)
    assert longest + 2 == WORDS
    scene = toy.scene(3)
    pieces = code_transformer.pieces(recording.stack([scene.hint("ade20k")]).float() / 255)
    assert pieces.shape == (1, 64, 112)
    torch.testing.assert_close(pieces.unflatten(2, (7, 16)).sum(2), torch.ones(1, 64, 16))
    blocks = torch.from_numpy(scene.labels).reshape(8, 16, 8, 16).transpose(1, 2).reshape(64, 4, 4, 4, 4)
    for label in range(7):
        shares = (blocks == label).float().mean((2, 4)).flatten(1)
        torch.testing.assert_close(pieces[0].unflatten(1, (7, 16))[:, label], shares)


# Sketch-guided diffusion


@pytest.fixture(scope="module")
def sketched():
    """The toy, a predictor that is not trained, a scene's noisy latents, its scribble's latents, and its plain drawing."""
    torch.manual_seed(0)
    sd = StableDiffusion.load("toy")
    sd.prepare()
    sd.unet.requires_grad_(False)
    scenes = [toy.scene(i, "test") for i in (0, 1)]
    captions = [scene.caption for scene in scenes]
    plain = Predictor(sd.unet, sd.encode_prompts([""] * 2 + captions), 3.0, [], (0, 1), num_steps=2)
    sketches = recording.encode(sd.vae, recording.stack([scene.hint("scribble") for scene in scenes]))
    return sd, SketchPredictor(sd.unet.cfg).eval(), torch.randn(2, 4, 16, 16), sketches, plain


@torch.no_grad()
def guided(sketched, beta, share):
    """Return the latents of a drawing of two steps."""
    sd, predictor, noise, sketches, plain = sketched
    guidance = SketchGuidance(plain, predictor, sketches, beta, share)
    return ddim.sample(guidance.predict, noise, sd.alphas_cumprod, 2, after=guidance.after)


def test_sketch_guidance_of_strength_zero_is_plain_drawing(sketched):
    """With no guided steps bit for bit; with beta 0, too, but for the rounding of a text's half of the batch alone."""
    sd, _, noise, _, plain = sketched
    with torch.no_grad(), plain.fast():
        drawn = ddim.sample(plain, noise, sd.alphas_cumprod, 2)
    assert torch.equal(guided(sketched, 1.6, 0.0), drawn)
    assert (guided(sketched, 0.0, 0.5) - drawn).abs().max() < 1e-4
    assert (guided(sketched, 1.6, 0.5) - drawn).abs().max() > 0.1


def test_a_correction_is_as_long_as_beta_says_and_lowers_the_distance(sketched):
    """alpha |gradient| = beta |z_t - z_(t-1)|, picture by picture; a short one brings the sketch nearer."""
    sd, predictor, noise, sketches, plain = sketched
    guidance = SketchGuidance(plain, predictor, sketches, 0.01, 0.5)
    with torch.no_grad():
        guidance.predict(noise, 751, 0)
        stepped = noise + torch.randn_like(noise)
        corrected = guidance.after(stepped, 0)
        ratio = (corrected - stepped).flatten(1).norm(dim=1) / (stepped - noise).flatten(1).norm(dim=1)
        assert torch.allclose(ratio, torch.tensor(0.01), rtol=1e-3)
        timesteps, distances = torch.full((2,), 751), []
        for x in (noise, noise + corrected - stepped):
            _, features = look_inside(sd.unet, x, timesteps, plain.context[2:])
            distances.append((predictor(features, timesteps) - sketches).square().sum((1, 2, 3)))
        assert (distances[1] < distances[0]).all()
        assert guidance.after(stepped, 1) is stepped  # past the guided half
        guidance.beta = 0
        assert torch.equal(guidance.after(stepped, 0), stepped)


def test_the_sketch_is_predicted_position_by_position(sketched):
    sd, predictor, noise, _, plain = sketched
    timesteps = torch.tensor([10, 900])
    with torch.no_grad():
        _, features = look_inside(sd.unet, noise, timesteps, plain.context[2:])
        assert features.shape == (2, 832, 16, 16)
        other = features.clone()
        other[0, :, 3, 5] += 1
        changed = (predictor(other, timesteps) - predictor(features, timesteps)).abs().amax(1)
        assert changed[0, 3, 5] > 1e-4
        changed[0, 3, 5] = 0
        assert changed.max() < 1e-6  # rounding, if sums are split otherwise
        assert not torch.equal(predictor(features, timesteps), predictor(features, timesteps.flip(0)))


# The condition as an input channel


def test_a_condition_is_brought_to_the_latents_size():
    """The condition as an input channel: each latent's 8x8 pixels averaged, or a channel each; black is -1, white 1."""
    hints = torch.zeros(1, 3, 16, 24)
    hints[..., :8, :8], hints[..., 8:, 16:20] = 1, 1
    assert condition_channels.channels(hints, 1).tolist() == [[[[1, -1, -1], [-1, -1, 0]]]]
    every = condition_channels.channels(hints, 64)
    assert every.shape == (1, 64, 2, 3)
    assert every[0, :, 1, 2].tolist() == [1, 1, 1, 1, -1, -1, -1, -1] * 8
    assert not condition_channels.channels(torch.full((1, 3, 8, 8), 0.5), 1).any()


def test_a_new_input_channel_changes_nothing_until_it_has_learnt():
    """Its weights are zero at the start; they learn at the first step; then both halves of a guided batch read it."""
    sd = StableDiffusion.load("toy")
    rival = condition_channels.Rival(sd, 1)
    before = next(sd.unet.input_blocks[0].parameters()).clone()
    torch.manual_seed(0)
    latents, hints = torch.randn(2, 4, 16, 16), torch.randint(256, (2, 3, 128, 128), dtype=torch.uint8)
    data = Examples(latents, hints, sd.encode_prompts(["", "a red ball"]), torch.tensor([1, 1]))
    t, x, recipe = torch.tensor([500, 500]), torch.cat([latents[:1]] * 2), Recipe(1, batch_size=2)
    rival.first.condition = condition_channels.channels(hints[:1] / 255, 1)
    expected = sd.unet(x, t, data.contexts)
    assert torch.allclose(rival.sd.unet(x, t, data.contexts), expected, atol=1e-5)
    rival.loss(data, recipe, 1).backward()
    assert all(p.grad is not None for p in rival.sd.unet.parameters())
    with torch.no_grad():
        rival.first.weight -= rival.first.weight.grad
    assert torch.equal(next(sd.unet.input_blocks[0].parameters()), before)  # the model that is compared with stays as it was
    assert rival.first.weight[:, 4].abs().min() > 0
    rival.first.condition = condition_channels.channels(hints[:1] / 255, 1)
    both = rival.first(x)
    assert torch.equal(both[0], both[1])
    rival.first.condition = torch.zeros(1, 1, 16, 16)
    assert not torch.allclose(rival.first(x), both, atol=1e-4)
    assert torch.allclose(rival.first(x), torch.conv2d(x, rival.first.weight[:, :4], rival.first.bias, padding=1), atol=1e-5)
