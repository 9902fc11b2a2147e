"""Eq. (10), the learning objective: L = E[||eps - eps_theta(z_t, t, c_t, c_f)||^2], exactly, with models of one line."""

import pytest
import torch
from torch import nn

from minicn import ddim, training


class Recorder(nn.Module):
    """A model that keeps what it was called with and gives what it was told to."""

    def __init__(self, result):
        super().__init__()
        self.result, self.calls = result, []

    def forward(self, *args):
        self.calls.append(args)
        return self.result


@pytest.fixture
def batch():
    """Three samples; every number is a multiple of 1/8, so that sums and squares round nothing."""
    g = torch.Generator().manual_seed(4)
    latents, noise = (torch.randint(-16, 17, (3, 4, 2, 4), generator=g) / 8 for _ in range(2))
    hints, context = torch.rand(3, 3, 16, 32, generator=g), torch.randn(3, 7, 12, generator=g)
    return training.Batch(torch.arange(3), latents, noise, hints, torch.tensor([0, 500, 999]), context)


def loss_of(batch, eps, control=()):
    net, unet = Recorder(list(control)), Recorder(eps)
    return training.controlnet_loss(unet, net, batch, ddim.alphas_cumprod()), net, unet


def test_eq10_the_loss_is_the_error_of_the_predicted_noise(batch):
    """A sample's loss is the mean of (eps_theta - eps)^2: 0 for the noise itself, 1 beside it, and nothing of z_0."""
    assert loss_of(batch, batch.noise)[0].tolist() == [0, 0, 0]
    assert loss_of(batch, batch.noise + 1)[0].tolist() == [1, 1, 1]
    assert torch.equal(loss_of(batch, 0 * batch.noise)[0], (batch.noise**2).mean((1, 2, 3)))
    assert torch.equal(loss_of(batch, batch.latents)[0], ((batch.latents - batch.noise) ** 2).mean((1, 2, 3)))


def test_eq10_each_sample_has_its_own_loss(batch):
    """An error in one sample is that sample's alone."""
    eps = batch.noise.clone()
    eps[1] -= 2
    assert loss_of(batch, eps)[0].tolist() == [0, 4, 0]


def test_eq10_both_models_see_the_same_noisy_latents_step_and_text(batch):
    """z_t is the forward process at each sample's t; ControlNet (z_t, c_f, t, c_t), U-Net (z_t, t, c_t, its residuals)."""
    control = [torch.zeros(1)]
    _, net, unet = loss_of(batch, batch.noise, control)
    [(x_net, hint, t_net, context_net)], [(x, t, context, given)] = net.calls, unet.calls
    abar = ddim.alphas_cumprod()[batch.timesteps]
    x_t = torch.stack([a.sqrt() * z + (1 - a).sqrt() * e for a, z, e in zip(abar, batch.latents, batch.noise, strict=True)])
    assert torch.equal(x, x_t)
    assert torch.equal(x_net, x_t)
    assert hint is batch.hints
    assert t is t_net is batch.timesteps
    assert context is context_net is batch.context
    assert given == control
