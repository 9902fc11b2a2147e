"""A model in parts, one a process (FSDP2): for `--unlock all`, where weights, gradients and moments are the memory.

A block is whole only while it computes. PyTorch does it; here is what `training` needs of it.
"""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(joint: nn.Module) -> nn.Module:
    """Return a copy of U-Net and ControlNet of which each process holds a part.

    The original goes to the CPU; `gather` brings it up to date, to be drawn with and saved.
    """
    model = copy.deepcopy(joint.to("cpu")).to(memory_format=torch.contiguous_format)  # as FSDP wants it
    for part in (model.unet, model.net):
        for block in (*part.input_blocks, part.middle_block, *getattr(part, "output_blocks", ())):
            fully_shard(block)
    return fully_shard(model)


def gather(model: nn.Module, joint: nn.Module) -> None:
    """Copy the weights that the processes share into the original, on the first of them. All must call it."""
    state = get_model_state_dict(model, options=WHOLE)
    if dist.get_rank() == 0:
        joint.load_state_dict(state)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Return the whole optimiser's state, by the parameters' names, on the first process. All must call it."""
    return get_optimizer_state_dict(model, optimizer, options=WHOLE)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Share out what `optimizer_state` gave. Raises ValueError for the state of an optimiser that was not shared."""
    if not any(isinstance(key, str) for key in state["state"]):
        raise ValueError("the checkpoint was made by one process: resume it so")
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
