"""What ControlNet is compared with in the experiments: each rival does what its paper says."""

import itertools

import code_transformer
import pytest
import torch
from code_transformer import SIDE, WORDS, Transformer

from minicn import StableDiffusion, toy
from minicn.trainer import recording

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
