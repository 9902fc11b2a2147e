"""How a training is spread over processes: not at all, each with the whole model (DDP), or each with a part (FSDP2).

PyTorch does it; here are the few things that a training asks of it. torchrun starts the processes.
"""

import contextlib
import copy
import dataclasses
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minicn import fast, training
from minicn.controlnet import ControlNet
from minicn.trainer import resuming
from minicn.training import Batch, Recipe
from minicn.unet import UNet


def init_distributed() -> tuple[int, int]:
    """Return this process's rank and how many there are: (0, 1) unless torchrun started several."""
    if "RANK" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # what "cuda" means from now on
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=3))
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Inside `with`, the first process goes ahead; the others follow when it is through."""
    rank, world = init_distributed()
    if rank:
        dist.barrier()
    yield
    if world > 1 and not rank:
        dist.barrier()


class Joint(nn.Module):
    """U-Net and ControlNet as one module: a batch in, its samples' losses out."""

    def __init__(self, unet: UNet, net: ControlNet):
        super().__init__()
        self.unet, self.net = unet, net

    def forward(self, batch: Batch, alphas_cumprod: Tensor) -> Tensor:
        layout = fast.layout(batch.latents.device)  # shards are contiguous, so the faster layout must come from the inputs
        made = {name: getattr(batch, name).contiguous(memory_format=layout) for name in ("latents", "hints")}
        batch = dataclasses.replace(batch, **made)
        return training.controlnet_loss(self.unet, self.net, batch, alphas_cumprod)


class OneProcess:
    """U-Net and ControlNet in one process: nothing to share. The others do what this one does, together.

    joint    both models as they were given, with which the first process draws, and which it saves
    learner  the models whose parameters the optimiser gets
    model    what computes the losses
    """

    rank, world = 0, 1

    def __init__(self, joint: Joint):
        self.joint = self.learner = self.model = joint

    def sync_gradients(self, on: bool) -> None:
        """Let the next backward pass exchange gradients, or only add to them: all parts of a batch but the last."""

    def total(self, losses: Tensor, stop: bool) -> tuple[list[float], bool]:
        """Return the losses of whole batches, and whether any process was asked to stop."""
        return losses.tolist(), stop

    def gather(self) -> None:
        """Bring `joint` up to date on the first process."""

    def scatter(self) -> None:
        """Bring `model` up to date with `joint`."""

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict:
        """Return the whole optimiser's state, at least on the first process."""
        return optimizer.state_dict()

    def parameters(self, optimizer: torch.optim.Optimizer) -> resuming.Parameters:
        """Return the optimiser's parameters by their keys in `optimizer_state`."""
        return dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))

    def check_optimizer(self, optimizer: torch.optim.Optimizer, state, path: Path) -> None:
        """Raise ValueError, naming the checkpoint, unless `state` is of such an optimiser in this kind of run."""
        parameters = self.parameters(optimizer)
        if isinstance(state, dict) and isinstance(state.get("state"), dict):
            of_shards = any(isinstance(key, str) for key in state["state"])  # else its parameters are numbered
            if state["state"] and of_shards != isinstance(next(iter(parameters)), str):
                made = "with --unlock all by several processes" if of_shards else "by one process, or without --unlock all"
                raise ValueError(f"{path} was made {made}: resume it so")
        resuming.compare_optimizer(state, parameters, len(optimizer.param_groups), path)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Load what `optimizer_state` gave, and `check_optimizer` has seen."""
        optimizer.load_state_dict(resuming.as_own(state, optimizer, self.parameters(optimizer)))


class Replicas(OneProcess):
    """Each process has the whole model, and a share of the batch; gradients are averaged (DDP)."""

    def __init__(self, joint: Joint):
        super().__init__(joint)
        self.rank, self.world = init_distributed()
        self.model = nn.parallel.DistributedDataParallel(joint)

    def sync_gradients(self, on: bool) -> None:
        self.model.require_backward_grad_sync = on

    def total(self, losses: Tensor, stop: bool) -> tuple[list[float], bool]:
        both = torch.cat([losses.double(), losses.new_tensor([stop], dtype=torch.float64)])
        dist.all_reduce(both)
        return both[:-1].tolist(), both[-1].item() > 0


class Shards(Replicas):
    """Each process has a part of the model (FSDP2): for `--unlock all`, where weights, gradients and moments are the memory.

    A block is gathered only while it computes. `joint` stays on the CPU.
    """

    def __init__(self, joint: Joint):
        from torch.distributed.fsdp import fully_shard

        OneProcess.__init__(self, joint)
        self.rank, self.world = init_distributed()
        model = copy.deepcopy(joint.to("cpu")).to(memory_format=torch.contiguous_format)  # as FSDP requires
        for part in (model.unet, model.net):
            for block in (*part.input_blocks, part.middle_block, *getattr(part, "output_blocks", ())):
                fully_shard(block)
        self.learner = self.model = fully_shard(model)

    def sync_gradients(self, on: bool) -> None:
        self.model.set_requires_gradient_sync(on)

    def gather(self) -> None:
        state = _state_dicts().get_model_state_dict(self.model, options=_whole(cpu_offload=True))
        if self.rank == 0:
            self.joint.load_state_dict(state)

    def scatter(self) -> None:
        _state_dicts().set_model_state_dict(self.model, self.joint.state_dict(), options=_whole())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict:
        return _state_dicts().get_optimizer_state_dict(self.model, optimizer, options=_whole(cpu_offload=True))

    def parameters(self, optimizer: torch.optim.Optimizer) -> resuming.Parameters:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict) -> None:
        state = resuming.as_own(state, optimizer, self.parameters(optimizer))
        _state_dicts().set_optimizer_state_dict(self.model, optimizer, state, options=_whole())


def _state_dicts():
    from torch.distributed.checkpoint import state_dict  # takes a second, and is needed for shards alone

    return state_dict


def _whole(**options):
    return _state_dicts().StateDictOptions(full_state_dict=True, **options)


def spread(unet: UNet, net: ControlNet, recipe: Recipe) -> OneProcess:
    """Spread both models over the processes that torchrun started, the recipe's regime applied.

    Raises ValueError as `check_shares` does.
    """
    check_shares(recipe, unet.out[2].weight.device)
    world = init_distributed()[1]
    training.apply_regime(unet, net, recipe)
    kind = OneProcess if world == 1 else Shards if recipe.unlock == "all" else Replicas
    return kind(Joint(unet, net))


def check_shares(recipe: Recipe, device: torch.device) -> None:
    """Raise ValueError for a batch that the processes cannot share, or a device on which they cannot train together."""
    world = init_distributed()[1]
    if recipe.batch_size % (world * recipe.accumulate):
        raise ValueError(
            f"a batch of {recipe.batch_size} cannot be shared by {world} processes in {recipe.accumulate} parts each: "
            "make it a multiple"
        )
    if world > 1 and device.type not in ("cpu", "cuda"):
        raise ValueError(f"{world} processes cannot share a training on {device.type}: use --device cpu, or one process")
