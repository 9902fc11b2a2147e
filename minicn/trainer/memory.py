"""How much memory a training run needs, before it begins: `minicn train --dry-run`.

A step on tensors that have shapes but no numbers (PyTorch's FakeTensorMode), counting what is alive.
`benchmarks/training.py --what ledger` compares it with a step that is run.
"""

import gc
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minicn import ddim, fast, training
from minicn.controlnet import ControlNet
from minicn.trainer import loop
from minicn.unet import UNet


@dataclass(frozen=True)
class Ledger:
    """Bytes. `peak` is the most in use at once, which is less than the sum: gradients come as activations are freed."""

    weights: int
    gradients: int
    optimiser: int
    activations: int  # kept for the backward pass: alive when the loss is known
    peak: int


class Living(TorchDispatchMode):
    """Inside `with`, count the bytes of tensors as they are made and freed: `now`, and `most` since it was last set."""

    def __init__(self, before: Iterable[torch.Tensor]):
        super().__init__()
        self.now = self.most = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return result

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def example(net: ControlNet, recipe: training.Recipe, size: int, world: int, device: torch.device) -> training.Batch:
    """Return a batch of noise, as large as the part that one process computes at once."""
    n, side, width = recipe.batch_size // (world * recipe.accumulate), size // 8, net.cfg.unet.context_dim
    latents = torch.randn(n, net.cfg.unet.in_channels, side, side, device=device)
    hints = torch.rand(n, 3, size, size, device=device)
    latents, hints = (each.contiguous(memory_format=fast.layout(device)) for each in (latents, hints))
    t = torch.zeros(n, dtype=torch.long, device=device)
    return training.Batch(t, latents, torch.randn_like(latents), hints, t, torch.randn(n, 77, width, device=device))


def step(unet, net, optimizer, batch, alphas_cumprod, recipe: training.Recipe, seen=lambda name: None) -> None:
    """Do what a training step does; call `seen` when the last loss is known, and when the gradients are."""
    for i in range(recipe.accumulate):
        with loop.autocast(batch.latents.device, recipe):
            loss = training.controlnet_loss(unet, net, batch, alphas_cumprod).sum()
        if i == recipe.accumulate - 1:
            seen("activations")
        loss.backward()
    del loss
    seen("gradients")
    optimizer.step()
    optimizer.zero_grad()


def predict(unet: UNet, net: ControlNet, recipe: training.Recipe, size: int, world: int, device: torch.device) -> Ledger:
    """Return what a process will need, from shapes alone.

    size  pixels a side; world  processes that share the batch
    """
    with FakeTensorMode(), torch.device(device):
        unet, net = UNet(unet.cfg), ControlNet(net.cfg)
        for model in (unet, net):
            fast.recompute(model, recipe.gradient_checkpointing)
            fast.prepare(model)
        groups = training.apply_regime(unet, net, recipe)
        optimizer = torch.optim.AdamW(groups, fused=loop.fused(device, recipe))
        batch, abar = example(net, recipe, size, world, device), torch.rand(ddim.NUM_TRAIN_TIMESTEPS)
        parameters = [p for model in (unet, net) for p in model.parameters()]
        learned = size_of(p for group in groups for p in group["params"])
        alive = {}
        with Living([*parameters, *vars(batch).values(), abar]) as living:
            for p in (p for group in groups for p in group["params"]):
                p.grad = torch.zeros_like(p)
            optimizer.step()  # allocates the moments
            optimizer.zero_grad()
            gc.collect()  # fake tensors point at each other
            optimiser, living.most = living.now, living.now
            step(unet, net, optimizer, batch, abar, recipe, lambda name: alive.update({name: living.now - optimiser}))
        held = learned if recipe.accumulate > 1 else 0  # gradients of the earlier parts
        whole = size_of(parameters)
    return Ledger(whole, learned, optimiser, alive["activations"] - held, whole + living.most)


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def table(predicted: Ledger, available: int | None) -> str:
    """Return the ledger in lines, in MB; with what is free, where that is known."""
    lines = [f"{name:<12}{value / 1e6:12,.1f} MB" for name, value in vars(predicted).items()]
    if available is not None:
        needed = predicted.peak - predicted.weights  # the weights are there already
        lines.append(f"{'free':<12}{available / 1e6:12,.1f} MB: {'enough' if needed < available else 'not enough'}")
    return "\n".join(lines)
