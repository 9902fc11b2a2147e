"""The engine of long runs, `minicn train`: the loop of train_toy.py, for more than one process, part, and precision.

With one process, one part and float32 it computes the same weights bit for bit.
"""

import contextlib
from collections.abc import Sequence

import torch

from minicn import fast, training
from minicn.controlnet import ControlNet
from minicn.pipeline import StableDiffusion
from minicn.trainer import distributed
from minicn.trainer.progress import Progress
from minicn.trainer.recording import Run, Validation
from minicn.training import Examples, Recipe


def train(
    sd: StableDiffusion,
    net: ControlNet,
    examples: Examples,
    validation: Validation | None,
    run: Run,
    recipe: Recipe,
    *,
    score_every: int = 250,
    score_after: Sequence[int] = (),
    checkpoint_every: int = 1000,
    resume: bool = False,
    pace: contextlib.AbstractContextManager | None = None,
) -> None:
    """Train a ControlNet by a recipe; leave log, sheets, checkpoints and weights (both layouts) in the run's folder.

    score_every, score_after, checkpoint_every  see `Progress`
    pace                                        entered for each step, e.g. threads.Pace
    Under torchrun every process computes its share of each batch (DDP; with unlock "all", of the model, too: FSDP2); the
    first one draws, logs and saves.
    Ctrl-C or SIGTERM lets the step end, saves checkpoint and weights, then raises KeyboardInterrupt. Raises ValueError,
    naming step and samples, if the loss is not finite.
    """
    try:
        spread = distributed.spread(sd.unet, prepare(sd, net, recipe), recipe)
    except BaseException:
        run.release()
        raise
    groups = training.apply_regime(spread.learner.unet, spread.learner.net, recipe)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=fused(sd.device, recipe))
    scaler = torch.amp.GradScaler(sd.device.type, enabled=recipe.precision == "float16")
    abar = sd.alphas_cumprod.to(sd.device)
    when = {"score_every": score_every, "score_after": score_after, "checkpoint_every": checkpoint_every}
    with Progress(run, sd, net, optimizer, recipe, validation, **when, spread=spread, scaler=scaler) as progress:
        if resume:
            progress.resume()
        for step in progress.steps():
            with pace or contextlib.nullcontext():
                loss, samples = gradients(spread, examples, abar, recipe, scaler, step)
            progress.note(loss, samples)
            training.set_learning_rates(optimizer, recipe, step)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if progress.looking:
                progress.validate()
            if progress.saving:
                progress.save()
        progress.finish()


def prepare(sd: StableDiffusion, net: ControlNet, recipe: Recipe) -> ControlNet:
    """Make both models fast, or small where the recipe says so; return the ControlNet."""
    sd.prepare()
    fast.prepare(net.train().to(memory_format=fast.layout(sd.device)))
    for module in (sd.unet, net):
        fast.recompute(module, recipe.gradient_checkpointing)
    return net


def gradients(
    spread: distributed.OneProcess,
    examples: Examples,
    abar: torch.Tensor,
    recipe: Recipe,
    scaler: torch.amp.GradScaler,
    step: int,
) -> tuple[torch.Tensor, list[int]]:
    """Add up the gradients of this process's share of a batch, part by part; return its part of the loss, its samples."""
    device, share = abar.device, recipe.batch_size // (spread.world * recipe.accumulate)
    total, samples = torch.zeros((), device=device), []
    for i in range(recipe.accumulate):
        begin = (spread.rank * recipe.accumulate + i) * share
        part = slice(begin, begin + share)
        batch = examples.batch(recipe.seed, step, recipe.batch_size, recipe.drop_prompt, device, part)
        samples += batch.samples.tolist()
        spread.sync_gradients(i == recipe.accumulate - 1)
        with autocast(device, recipe):
            loss = spread.model(batch, abar).sum() / recipe.batch_size
        scaler.scale(loss * spread.world).backward()  # both engines take the mean over the processes
        total += loss.detach()
    return total, samples


def autocast(device: torch.device, recipe: Recipe) -> torch.autocast:
    """Return what computes in a recipe's precision, inside `with`; the weights stay in float32."""
    half = recipe.precision != "float32"
    return torch.autocast(device.type, getattr(torch, recipe.precision) if half else None, enabled=half)


def fused(device: torch.device, recipe: Recipe) -> bool:
    """Tell whether AdamW may use its fused kernel on a device.

    Numerics: MPS's ignored the scale of float16's gradients, and infinite ones, until June 2026 (pytorch pull 186360).
    """
    return device.type in ("cpu", "cuda", "mps") and not (device.type == "mps" and recipe.precision == "float16")
