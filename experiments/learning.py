"""How the experiments train: any module, by a loss that is a function of the step, with checkpoints for --resume."""

import functools
import hashlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from harness import FOLDER, Experiment, Figures
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

from minicn import ControlNet, StableDiffusion, toy, training
from minicn.checkpoints import files
from minicn.trainer import examples, recording, resuming
from minicn.training import Examples, Recipe

CHECKPOINT_EVERY = 250  # steps
HINT_CHANNELS = (8, 16, 32, 64)  # of the toy's ControlNets, as in train_toy.py
LR = 3e-4  # likewise
SCENES = 4096  # training scenes, where their number is not the question
LEVELS = 0.1, 0.5  # scores between which following becomes sudden
MADE_OF = "minicn.made_of"  # in a kept file's metadata: which model encoded the scenes


@functools.lru_cache(maxsize=2)
def scenes(sd: StableDiffusion, condition: str, count: int = SCENES, keep: bool = True) -> Examples:
    """Return the toy's first `count` training scenes, encoded, with their hints.

    keep  latents that another run has kept in runs/experiments/ are read instead of computed, and kept
    """
    drawn = [(s.image, s.hint(condition), s.caption) for s in toy.scenes(count, "train", condition)]
    images, hints, captions = zip(*drawn, strict=True)
    pictures = recording.stack(images)
    made_of = f"{hashlib.blake2b(pictures.numpy()).hexdigest()} {resuming.digest(sd)}"
    place = FOLDER / f"latents-{count}.safetensors"
    kept = files.open_weights(place) if keep and place.is_file() else None
    if kept and kept.metadata.get(MADE_OF) == made_of:
        latents = kept.get("latents")
    else:
        latents = recording.encode(sd.vae, pictures)
        if keep:
            files.write(place, {"latents": latents}, {MADE_OF: made_of})
    return Examples(latents, recording.stack(hints), *examples.encode_prompts(sd, captions))


def first(data: Examples, count: int) -> Examples:
    """Return the first `count` of some examples."""
    return Examples(data.latents[:count], data.hints[:count], data.contexts, data.prompt[:count])


@dataclass(frozen=True)
class Look:
    """How a training is watched: scored every so many steps (a divisor of CHECKPOINT_EVERY), until a score is reached."""

    score: Callable[[], float]
    every: int = 50
    until: float = math.inf


def train(
    experiment: Experiment,
    name: str,
    module: nn.Module,
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    decay: float = 0.3,
    betas: tuple[float, float] = (0.9, 0.999),
    look: Look | None = None,
) -> tuple[Figures, list[dict]]:
    """Train the parameters of a module that require gradients; return what it took, and a log.

    name     of the checkpoint in the experiment's folder, from which a resumed run goes on
    loss_of  the loss of a step, from 1: a function of the step and the module alone, so that a resumed run ends alike
    decay    fraction of the steps, at the end, over which the learning rate falls to 0
    betas    of AdamW
    look     scores the module now and then, for the log: {"step": ..., "loss": ..., "score": ...}
    Raises ValueError, naming the step, if the loss is not finite, or a checkpoint is not what such a run writes.
    """
    path = experiment.folder / "checkpoints" / f"{name}.pt"
    path.parent.mkdir(exist_ok=True)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, betas, weight_decay=0.01, fused=True)
    done, earlier, log = load(path, module, optimizer) if path.is_file() else (0, 0.0, [])
    began, losses = time.process_time(), []
    for step in tqdm(range(done + 1, steps + 1), desc=name, unit="step", initial=done, total=steps, leave=False):
        if look and log and log[-1]["score"] >= look.until:
            break
        loss = loss_of(step)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss is {losses[-1]} at step {step} of {name}: this should not happen, please report it")
        loss.backward()
        optimizer.param_groups[0]["lr"] = lr * training.learning_rate_factor(step, steps, decay)
        optimizer.step()
        optimizer.zero_grad()
        if look and step % look.every == 0:
            before = time.process_time()
            log.append({"step": step, "loss": statistics.fmean(losses), "score": look.score()})
            losses.clear()
            began += time.process_time() - before  # to look is not to train
        if step % CHECKPOINT_EVERY == 0 or step == steps or (look and log and log[-1]["score"] >= look.until):
            seconds = earlier + time.process_time() - began
            state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
            recording.save_whole({**state, "log": log}, path)
    seconds = earlier + time.process_time() - began
    return {"parameters trained": sum(p.numel() for p in parameters), "minutes of training": seconds / 60}, log


def load(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float, list[dict]]:
    """Load a checkpoint, compared with what is to be loaded; return the steps done, their seconds, their log."""
    state = resuming.read(path)
    parameters = dict(enumerate(optimizer.param_groups[0]["params"]))
    resuming.compare(state.get("module"), module.state_dict(), path, "module")
    resuming.compare_optimizer(state.get("optimizer"), parameters, 1, path)
    rows = state["log"] if isinstance(state.get("log"), list) else [None]
    told = {"step": 0, "seconds": 0.0, "log": [{"step": 0, "loss": 0.0, "score": 0.0}] * len(rows)}
    resuming.compare({key: state.get(key) for key in told}, told, path, "progress")
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(resuming.as_own(state["optimizer"], optimizer, parameters))
    return state["step"], state["seconds"], state["log"]


def controlnet(
    experiment: Experiment,
    name: str,
    sd: StableDiffusion,
    data: Examples,
    recipe: Recipe,
    change: Callable[[ControlNet], None] = lambda net: None,
    score: Callable[[ControlNet], float] | None = None,
    **look,
) -> tuple[ControlNet, Figures, list[dict]]:
    """Train a ControlNet as train_toy.py does; return it, what it took, and its log.

    change  what a fresh ControlNet is given besides
    score   scores it, for the log, as `look` says
    """
    net = fresh(sd, recipe)
    change(net)
    seen = Look(lambda: score(net), **look) if score else None
    return net.eval(), *tune(experiment, name, sd, net, data, recipe, seen)


def fresh(sd: StableDiffusion, recipe: Recipe) -> ControlNet:
    """Return a ControlNet as train_toy.py starts it."""
    torch.manual_seed(recipe.seed)
    return ControlNet.from_unet(sd.unet, hint_channels=HINT_CHANNELS)


def tune(
    experiment: Experiment,
    name: str,
    sd: StableDiffusion,
    net: ControlNet,
    data: Examples,
    recipe: Recipe,
    look: Look | None = None,
) -> tuple[Figures, list[dict]]:
    """Train a ControlNet, and what a recipe unlocks, at one learning rate; return what it took, and its log."""
    sd.prepare(net.train())
    training.apply_regime(sd.unet, net, recipe)

    def loss(step: int) -> Tensor:
        batch = data.batch(recipe.seed, step, recipe.batch_size, recipe.drop_prompt, sd.device)
        return training.controlnet_loss(sd.unet, net, batch, sd.alphas_cumprod).mean()  # eq. (10)

    module = net if recipe.unlock == "none" else nn.ModuleList([net, sd.unet])
    took = train(experiment, name, module, loss, steps=recipe.steps, lr=recipe.lr, decay=recipe.lr_decay, look=look)
    net.eval()
    return took


def begins(log: list[dict]) -> Figures:
    """Return the steps at which the score reached LEVELS, interpolated; what was not reached is not there."""
    found: Figures = {"last score": log[-1]["score"] if log else 0.0}
    for level in LEVELS:
        before = {"step": 0, "score": 0.0}
        for row in log:
            if row["score"] >= level:
                share = (level - before["score"]) / (row["score"] - before["score"])
                found[f"step of {level}"] = before["step"] + share * (row["step"] - before["step"])
                break
            before = row
    if "step of 0.5" in found:
        found["steps from 0.1 to 0.5"] = found["step of 0.5"] - found["step of 0.1"]
    return found


def curve(log: list[dict], steps: int) -> Image.Image:
    """Draw the score (black, 0 to 1) and the loss (red, up to the largest) over the steps, 128x128 pixels."""
    picture = Image.new("RGB", (toy.SIZE, toy.SIZE), "white")
    pen, side = ImageDraw.Draw(picture), toy.SIZE - 1
    largest = max((row["loss"] for row in log), default=1.0)
    for name, most, colour in (("loss", largest, "red"), ("score", 1.0, "black")):
        points = [(side * row["step"] / steps, side * (1 - np.clip(row[name] / most, 0, 1))) for row in log]
        if len(points) > 1:
            pen.line(points, fill=colour, width=2)
    pen.rectangle((0, 0, side, side), outline="grey")
    return picture
