"""How the experiments train: any module, by a loss that is a function of the step, with checkpoints for --resume."""

import math
import time
from collections.abc import Callable

import torch
from harness import Experiment, Figures
from torch import Tensor, nn
from tqdm import tqdm

from minicn import ControlNet, StableDiffusion, training
from minicn.trainer import examples, recording, resuming
from minicn.training import Recipe

CHECKPOINT_EVERY = 250  # steps
HINT_CHANNELS = (8, 16, 32, 64)  # of the toy's ControlNets, as in train_toy.py
LR = 3e-4  # likewise
DECAY = 0.3  # fraction of the steps, at the end, over which the learning rate falls to 0


def train(
    experiment: Experiment,
    name: str,
    module: nn.Module,
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
) -> Figures:
    """Train the parameters of a module that require gradients; return what it took.

    name     of the checkpoint in the experiment's folder, from which a resumed run goes on
    loss_of  the loss of a step, from 1: a function of the step and the module alone, so that a resumed run ends alike
    Raises ValueError, naming the step, if the loss is not finite, or a checkpoint is not what such a run writes.
    """
    path = experiment.folder / "checkpoints" / f"{name}.pt"
    path.parent.mkdir(exist_ok=True)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.01, fused=True)
    done, earlier = load(path, module, optimizer) if path.is_file() else (0, 0.0)
    began = time.process_time()
    for step in tqdm(range(done + 1, steps + 1), desc=name, unit="step", initial=done, total=steps, leave=False):
        loss = loss_of(step)
        if not math.isfinite(loss.item()):
            raise ValueError(f"the loss is {loss.item()} at step {step} of {name}: this should not happen, please report it")
        loss.backward()
        optimizer.param_groups[0]["lr"] = lr * training.learning_rate_factor(step, steps, DECAY)
        optimizer.step()
        optimizer.zero_grad()
        if step % CHECKPOINT_EVERY == 0 or step == steps:
            seconds = earlier + time.process_time() - began
            state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
            recording.save_whole(state, path)
    seconds = earlier + time.process_time() - began
    return {"parameters trained": sum(p.numel() for p in parameters), "minutes of training": seconds / 60}


def load(path, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Load a checkpoint, compared with what is to be loaded; return the steps done, and the seconds that they took."""
    state = resuming.read(path)
    parameters = dict(enumerate(optimizer.param_groups[0]["params"]))
    resuming.compare(state.get("module"), module.state_dict(), path, "module")
    resuming.compare_optimizer(state.get("optimizer"), parameters, 1, path)
    resuming.compare({key: state.get(key) for key in ("step", "seconds")}, {"step": 0, "seconds": 0.0}, path, "progress")
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(resuming.as_own(state["optimizer"], optimizer, parameters))
    return state["step"], state["seconds"]


def controlnet(
    experiment: Experiment, name: str, sd: StableDiffusion, condition: str, recipe: Recipe, scenes: int
) -> tuple[ControlNet, Figures]:
    """Train a ControlNet on the toy's first training scenes, as train_toy.py does; return it, and what it took."""
    data = examples.from_toy(sd, condition, scenes, recipe)
    torch.manual_seed(recipe.seed)
    net = ControlNet.from_unet(sd.unet, hint_channels=HINT_CHANNELS)
    sd.prepare(net.train())
    training.apply_regime(sd.unet, net, recipe)

    def loss(step: int) -> Tensor:
        batch = data.batch(recipe.seed, step, recipe.batch_size, recipe.drop_prompt, sd.device)
        return training.controlnet_loss(sd.unet, net, batch, sd.alphas_cumprod).mean()  # eq. (10)

    figures = train(experiment, name, net, loss, steps=recipe.steps, lr=recipe.lr)
    return net.eval(), figures
