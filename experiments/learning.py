"""How the experiments train: any module, by a loss that is a function of the step, with checkpoints for --resume."""

import math
import time
from collections.abc import Callable

import torch
from harness import Experiment, Figures
from torch import Tensor, nn
from tqdm import tqdm

from minicn import training
from minicn.trainer import recording, resuming

CHECKPOINT_EVERY = 250  # steps
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
