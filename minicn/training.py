"""Training a ControlNet on a locked Stable Diffusion: the loss, what is trained, and what a step is shown.

Source: Zhang and Agrawala, arXiv:2302.05543v1, eq. (10) and section "Training". The loop itself is in train_toy.py;
trainer/loop.py is the same loop for several processes, half precision and gradient accumulation.
"""

import math
import numbers
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields

import torch
from torch import Tensor

from minicn import ddim
from minicn.controlnet import ControlNet
from minicn.unet import UNet


def setting(default, help: str, low: float = 0, high: float | None = None, choices: Sequence[str] = ()):
    """Return a field of `Recipe`: its default, what it means, its range; the command lines make it an option."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class Recipe:
    """How to train. The default regime is the paper's: all 13 connections, all of Stable Diffusion locked."""

    steps: int = setting(MISSING, "optimiser steps", low=1)
    batch_size: int = setting(4, "samples per step, over all processes and parts", low=1)
    lr: float = setting(1e-5, "learning rate of AdamW", high=1)
    # At most what PyTorch's generators take, times the million of `Examples.batch`.
    seed: int = setting(0, "for initial weights, data order, noise, timesteps and dropped prompts", high=9 * 10**12)
    drop_prompt: float = setting(0.5, "fraction of prompts replaced by the empty prompt", high=1)
    connect: str = setting("all", "middle: the paper's small-scale regime", choices=("all", "middle"))
    unlock: str = setting("none", "part of Stable Diffusion to train, too", choices=("none", "decoder", "all"))
    unlock_lr: float = setting(2e-6, "learning rate of the unlocked part", high=1)
    accumulate: int = setting(1, "gradient accumulation: parts of each process's share of a batch, one at a time", low=1)
    precision: str = setting(
        "float32",
        "precision of the computation; weights and optimiser stay in float32",
        choices=("float32", "bfloat16", "float16"),
    )
    gradient_checkpointing: bool = setting(False, "recompute features in the backward pass: less memory, more time")
    lr_decay: float = setting(0.3, "fraction of the steps, at the end, over which the learning rate falls to 0", high=1)

    def __post_init__(self):
        """Raise ValueError for a value of another kind or out of its range; numpy's numbers become Python's."""
        for each in fields(self):
            value, (low, high, choices) = getattr(self, each.name), map(each.metadata.get, ("low", "high", "choices"))
            kind = {int: numbers.Integral, float: numbers.Real}.get(each.type, each.type)
            if not isinstance(value, kind) or (value not in choices if choices else not low <= value <= (high or math.inf)):
                expected = " or ".join(choices) or f"{each.type.__name__} from {low}" + f" to {high}" * (high is not None)
                raise ValueError(f"{each.name} is {value!r}, but must be {expected}")
            object.__setattr__(self, each.name, each.type(value))


@dataclass
class Batch:
    """Some samples of a step, as the paper's eq. (10) names them: z_0, epsilon, c_i (which E turns into c_f), t, c_t."""

    samples: Tensor  # (B,) indices into the data
    latents: Tensor  # (B, 4, h, w)
    noise: Tensor  # (B, 4, h, w)
    hints: Tensor  # (B, 3, H, W) in [0, 1]
    timesteps: Tensor  # (B,)
    context: Tensor  # (B, 77, C)


class Examples:
    """What the ControlNet learns from, encoded once, so that autoencoder and text encoder are not needed again.

    latents   (N, 4, h, w)   scaled, clean
    hints     (N, 3, H, W)   uint8, [0, 255] means [0, 1]; a tensor, or anything that returns one when indexed
    contexts  (M, 77, C)     text features of the M different prompts; row 0 is the empty prompt
    prompt    (N,)           each example's row of `contexts`

    rows      (S,)           where each sample lies in the N of the others, if not all are there; by default each is

    trainer/examples.py makes them from toy scenes or a data folder.
    """

    def __init__(self, latents: Tensor, hints: Tensor, contexts: Tensor, prompt: Tensor, rows: Tensor | None = None):
        self.latents, self.hints, self.contexts, self.prompt = latents, hints, contexts, prompt
        self.rows = torch.arange(len(latents)) if rows is None else rows

    def batch(
        self,
        seed: int,
        step: int,
        size: int,
        drop_prompt: float,
        device: str | torch.device,
        part: slice = slice(None),
    ) -> Batch:
        """Draw the batch of a step, or a part of it: sample i of step s is a function of (seed, s, i) alone.

        So a run can be resumed anywhere, and several processes, or accumulated parts, make up one batch.
        50% dropping: where the prompt is empty, the ControlNet must learn from the hint alone what is there.
        Paper vs code: the released training code drops none.
        """
        samples, random = draw_samples(len(self.rows), seed, step, size)
        dropped = torch.rand(size, generator=random) < drop_prompt
        timesteps = torch.randint(ddim.NUM_TRAIN_TIMESTEPS, (size,), generator=random)
        noise = torch.randn((size, *self.latents.shape[1:]), generator=random)
        rows = self.rows[samples]
        rows, prompts = rows[part], torch.where(dropped, 0, self.prompt[rows])[part]
        return Batch(
            samples[part],
            send(self.latents[rows], device),
            send(noise[part], device),
            send(self.hints[rows], device).float().div(255),
            send(timesteps[part], device),
            send(self.contexts[prompts], device),
        )


def draw_samples(count: int, seed: int, step: int, size: int) -> tuple[Tensor, torch.Generator]:
    """Return which of `count` samples a step is shown, (size,), and the generator of all else that it draws."""
    random = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.randint(count, (size,), generator=random), random


def seen(recipe: Recipe, count: int) -> list[int]:
    """List, in order, those of `count` samples that the steps of a recipe are shown."""
    found: set[int] = set()
    for step in range(1, recipe.steps + 1):
        if len(found) == count:
            break
        found.update(draw_samples(count, recipe.seed, step, recipe.batch_size)[0].tolist())
    return sorted(found)


def send(tensor: Tensor, device: str | torch.device) -> Tensor:
    """Copy a tensor from the CPU to a device, without making CUDA wait for earlier steps.

    Numerics: on MPS such a copy may read memory that was already freed, and give wrong numbers (pytorch issue 189690).
    """
    cuda = torch.device(device).type == "cuda"
    return tensor.pin_memory().to(device, non_blocking=True) if cuda else tensor.to(device)


def controlnet_loss(unet: UNet, net: ControlNet, batch: Batch, alphas_cumprod: Tensor) -> Tensor:
    """Return each sample's mean squared error of the predicted noise, (B,); its mean is eq. (10).

    With every parameter of `unet` locked, autograd builds no graph for its encoder, whose inputs require no gradient;
    the decoder passes gradients on to `net` and keeps none.
    """
    x_t = ddim.add_noise(batch.latents, batch.noise, alphas_cumprod[batch.timesteps])
    control = net(x_t, batch.hints, batch.timesteps, batch.context)
    eps = unet(x_t, batch.timesteps, batch.context, control)
    return (eps.float() - batch.noise).square().mean((1, 2, 3))


def apply_regime(unet: UNet, net: ControlNet, recipe: Recipe) -> list[dict]:
    """Lock and unlock parameters as a recipe says; return the optimiser's parameter groups, with their learning rates.

    Small-scale: only the middle block's residual is connected; the twelve other zero convolutions are not even computed.
    Large-scale: the decoder, or all, of Stable Diffusion is trained, too, at its own learning rate.
    Paper vs code: the paper unlocks "all weights in Stable Diffusion", the official code its decoder alone.
    """
    net.requires_grad_(True)
    net.only_middle = recipe.connect == "middle"
    if net.only_middle:
        net.zero_convs.requires_grad_(False)
    unet.requires_grad_(recipe.unlock == "all")  # the locked copy, but in the large-scale regime
    if recipe.unlock == "decoder":
        unet.output_blocks.requires_grad_(True)
        unet.out.requires_grad_(True)
    groups = [{"params": [p for p in net.parameters() if p.requires_grad], "lr": recipe.lr}]
    unlocked = [p for p in unet.parameters() if p.requires_grad]
    return groups + ([{"params": unlocked, "lr": recipe.unlock_lr}] if unlocked else [])


def learning_rate_factor(step: int, steps: int, decay: float = 0.3) -> float:
    """Return 1, falling to 0 over the last fraction `decay` of the steps, which sharpens the pictures; steps from 1."""
    return min(1.0, (steps - step + 1) / (decay * steps)) if decay else 1.0


def set_learning_rates(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> None:
    """Set the learning rates of the groups of `apply_regime` for a step, from 1."""
    factor = learning_rate_factor(step, recipe.steps, recipe.lr_decay)
    for group, lr in zip(optimizer.param_groups, (recipe.lr, recipe.unlock_lr), strict=False):  # one group, or two
        group["lr"] = lr * factor
