"""From tensors of a file to a model: built without initialising it, and checked tensor by tensor."""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minicn.checkpoints import files
from minicn.checkpoints.weights import Keys

# Methods that write numbers into a tensor. (Others that end in _ change its attributes, e.g. requires_grad_.)
WRITES = {getattr(Tensor, f"{name}_") for name in "normal uniform zero fill copy add mul div sub clamp erfinv".split()}


class Unfilled(TorchFunctionMode):
    """Inside `with`, modules are built on "meta", and their weights, which a file replaces, are not initialised.

    (Initialising on "meta" writes nothing, but random numbers there make PyTorch import its compiler, a second or two.)
    Functions of nn.init and in-place methods of tensors return what they were given. Only this thread is affected.
    """

    def __enter__(self) -> "Unfilled":
        self.meta = torch.device("meta")
        self.meta.__enter__()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.meta.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init" or func in WRITES:
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


CHECKED_AT_ONCE = 1e8  # bytes of a model up to which every number is checked while loading; of larger ones, at first use


def load_into(
    model: torch.nn.Module, file: files.WeightFile, keys: Keys, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> None:
    """Load a file's tensors into a model built on "meta", without a copy where precision and device are the file's.

    Raises ValueError, naming file and tensor, for a missing, unexpected, misshapen or non-finite tensor. (Large models are
    only mapped: a non-finite tensor is then found by `prepare`, at first use.)
    """
    own = model.state_dict()
    missing, unknown = [k for k in own if k not in keys], [k for k in keys if k not in own]
    if missing or unknown:
        raise ValueError(
            f"{file.path} does not fit: {len(missing)} tensors are missing ({', '.join(missing[:3]) or '-'}), "
            f"{len(unknown)} are unexpected ({', '.join(keys[k] for k in unknown[:3]) or '-'})"
        )
    state = {}
    for name, like in own.items():
        state[name] = file.weight(keys[name], like.shape).to(device, dtype)
    model.load_state_dict(state, assign=True)
    model.unchecked = (str(file.path), keys)
    if sum(tensor.numel() * tensor.element_size() for tensor in state.values()) <= CHECKED_AT_ONCE:
        check_finite(model)


def check_finite(model: torch.nn.Module) -> None:
    """Check every number of a model once after loading. Raises ValueError, naming file and tensor, for NaN or infinity."""
    path, keys = getattr(model, "unchecked", None) or (None, {})
    if path is None:
        return
    for name, tensor in model.state_dict().items():
        files.check_numbers(tensor, f"{path}: {keys[name]}")
    model.unchecked = None
