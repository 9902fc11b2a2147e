"""Section 3.3, eq. (10): predict the noise that was added, from noisy latents, time, text and condition."""

import pytest
import torch
from closeness import assert_close

from minicn import ddim, training

pytestmark = pytest.mark.numbers


STEPS = torch.tensor([0, 250, 999])


@pytest.fixture
def drawn():
    """A batch of three with x_0, noise, time, text and condition told apart by their numbers; float64."""
    g = torch.Generator().manual_seed(4)

    def random(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    return training.Batch(
        torch.arange(3), 2 + random(3, 4, 2, 3), random(3, 4, 2, 3), random(3, 3, 16, 24), STEPS, random(3, 7, 2)
    )


def noisy(batch):
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, each sample with its own t."""
    abar = ddim.alphas_cumprod().double()[batch.timesteps][:, None, None, None]
    return abar.sqrt() * batch.latents + (1 - abar).sqrt() * batch.noise


def test_eq10_the_loss_is_the_mean_square_of_noise_minus_prediction(drawn):
    """Eq. (10): E |eps - eps_theta(x_t, t, c_t, c_f)|^2, by hand, with networks that mix all they are given.

    The target is the noise: not the clean latents, not x_t.
    """

    def net(x, hint, t, context):
        return [x * hint.mean() + context.mean(), t.double()[:, None, None, None] / 1000]

    def unet(x, t, context, control):
        return (x + control[0] * control[1]) * context.std() - t.double()[:, None, None, None] / 500

    x_t, t = noisy(drawn), STEPS.double()[:, None, None, None]
    c_t, c_f = drawn.context, drawn.hints
    predicted = (x_t + (x_t * c_f.mean() + c_t.mean()) * t / 1000) * c_t.std() - t / 500
    want = torch.stack([(drawn.noise[i] - predicted[i].float()).square().mean() for i in range(3)])
    got = training.controlnet_loss(unet, net, drawn, ddim.alphas_cumprod().double())
    assert got.shape == (3,)  # one for each sample; eq. (10) is their mean
    assert_close(got, want)


@pytest.mark.parametrize("answer", ["noise", "latents", "x_t", "nothing"])
def test_eq10_only_the_noise_has_no_loss(drawn, answer):
    """A network that answers with the noise has a loss of zero; x_0, x_t or nothing that of their distance to it."""
    drawn.noise = drawn.noise.float().double()  # what a float32 network can answer with
    answers = {"noise": drawn.noise, "latents": drawn.latents, "x_t": noisy(drawn), "nothing": torch.zeros_like(drawn.noise)}
    loss = training.controlnet_loss(lambda *_: answers[answer], lambda *_: [], drawn, ddim.alphas_cumprod().double())
    want = (answers[answer].float() - drawn.noise).square().mean((1, 2, 3))
    assert torch.equal(loss, want)
    assert loss.any() == (answer != "noise")


def test_eq10_both_networks_see_the_same_noisy_latents_time_and_text(drawn):
    """x_t is the forward process's (exact), for ControlNet and U-Net alike; the hint goes to the ControlNet alone."""
    seen = {}

    def net(*args):
        seen["net"] = args
        return ["control"]

    def unet(*args):
        seen["unet"] = args
        return args[0]

    training.controlnet_loss(unet, net, drawn, ddim.alphas_cumprod().double())
    x_t, hint, t, context = seen["net"]
    assert torch.equal(x_t, ddim.add_noise(drawn.latents, drawn.noise, ddim.alphas_cumprod().double()[STEPS]))
    assert_close(x_t, noisy(drawn))
    assert all(a is b for a, b in ((hint, drawn.hints), (t, drawn.timesteps), (context, drawn.context)))
    assert all(a is b for a, b in zip(seen["unet"][:3], (x_t, t, context), strict=True))
    assert seen["unet"][3] == ["control"]


def test_a_batch_is_a_function_of_seed_and_step():
    """The same (seed, step) draws the same samples, noise, timesteps and dropped prompts."""
    examples = training.Examples(
        torch.randn(5, 4, 2, 2),
        torch.zeros(5, 3, 16, 16, dtype=torch.uint8),
        torch.randn(3, 7, 2),
        torch.tensor([1, 2, 1, 2, 1]),
    )
    first, again, other = (examples.batch(0, step, 4, 0.5, torch.device("cpu")) for step in (7, 7, 8))
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in vars(first))
    assert not torch.equal(first.noise, other.noise)


def test_half_of_the_prompts_are_dropped():
    """The paper drops 50% of the prompts: row 0 of the contexts, the empty prompt, takes their place."""
    contexts = torch.tensor([0.0, 1.0])[:, None, None]
    examples = training.Examples(
        torch.zeros(1, 4, 1, 1), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), contexts, torch.tensor([1])
    )
    kept = {drop: examples.batch(0, 1, 4000, drop, torch.device("cpu")).context.mean().item() for drop in (0, 0.5, 1)}
    assert kept[0] == 1
    assert kept[1] == 0
    assert abs(kept[0.5] - 0.5) < 0.03  # four standard deviations of 4000 draws
