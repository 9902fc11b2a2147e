"""ControlNet's rivals: what each of them does that ControlNet does not, exactly."""

import condition_channels
import torch

from minicn import StableDiffusion
from minicn.training import Examples, Recipe


def test_a_condition_is_brought_to_the_latents_size():
    """The condition as an input channel: each latent's 8x8 pixels averaged; black is -1, white 1, grey the blank 0."""
    hints = torch.zeros(1, 3, 16, 24)
    hints[..., :8, :8], hints[..., 8:, 16:20] = 1, 1
    assert condition_channels.channel(hints).tolist() == [[[[1, -1, -1], [-1, -1, 0]]]]
    assert not condition_channels.channel(torch.full((1, 3, 8, 8), 0.5)).any()


def test_a_new_input_channel_changes_nothing_until_it_has_learnt():
    """Its weights are zero at the start; they learn at the first step; then both halves of a guided batch read it."""
    sd = StableDiffusion.load("toy")
    rival = condition_channels.Rival(sd)
    before = next(sd.unet.input_blocks[0].parameters()).clone()
    torch.manual_seed(0)
    latents, hints = torch.randn(2, 4, 16, 16), torch.randint(256, (2, 3, 128, 128), dtype=torch.uint8)
    data = Examples(latents, hints, sd.encode_prompts(["", "a red ball"]), torch.tensor([1, 1]))
    t, x, recipe = torch.tensor([500, 500]), torch.cat([latents[:1]] * 2), Recipe(1, batch_size=2)
    rival.first.condition = condition_channels.channel(hints[:1] / 255)
    expected = sd.unet(x, t, data.contexts)
    assert torch.allclose(rival.sd.unet(x, t, data.contexts), expected, atol=1e-5)
    rival.loss(data, recipe, 1).backward()
    assert all(p.grad is not None for p in rival.sd.unet.parameters())
    with torch.no_grad():
        rival.first.weight -= rival.first.weight.grad
    assert torch.equal(next(sd.unet.input_blocks[0].parameters()), before)  # the model that is compared with stays as it was
    assert rival.first.weight[:, 4].abs().min() > 0
    rival.first.condition = condition_channels.channel(hints[:1] / 255)
    both = rival.first(x)
    assert torch.equal(both[0], both[1])
    rival.first.condition = torch.zeros(1, 1, 16, 16)
    assert not torch.allclose(rival.first(x), both, atol=1e-4)
    assert torch.allclose(rival.first(x), torch.conv2d(x, rival.first.weight[:, :4], rival.first.bias, padding=1), atol=1e-5)
