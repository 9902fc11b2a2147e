"""What a run left in its folder, read again without trusting it: anyone may have changed it, or put it there.

A checkpoint is compared, tensor by tensor, with what the run itself would write, before any of it is used: PyTorch's fused
optimisers go by the weights' shapes alone, and read and write past the end of smaller moments.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

from minicn.checkpoints import files, pickles
from minicn.pipeline import StableDiffusion

LOCK = ".lock"
PICKLE_BYTES = 2**26  # of a checkpoint beside its tensors, at most: the log of millions of steps
RATES = {"lr": 0.0, "betas": (0.0, 0.0)}  # what schedules change in an optimiser's settings
Parameters = dict[int | str, nn.Parameter]  # an optimiser's, by their keys in its state


class Damaged(ValueError):
    """A file in a run's folder is not what a run writes. (An older one may be.)"""


def read(path: Path) -> dict:
    """Return what a checkpoint holds, its tensors still on disk. Raises Damaged, naming it, unless that is a dictionary."""
    if not path.is_file():
        raise Damaged(f"{path} does not exist or is not an ordinary file")
    try:
        state, _ = pickles.load(path, PICKLE_BYTES)
    except (OSError, ValueError) as error:
        raise Damaged(f"{path} is damaged ({files.printable(error.__cause__ or error, 200)})") from error
    if not isinstance(state, dict):
        raise Damaged(f"{path} is damaged: it holds {_words(state)}, but must hold a dict")
    return state


def compare(found, wanted, path: Path, where: str) -> None:
    """Raise Damaged, naming the place, unless something read from a file is built like something wanted.

    Alike are dictionaries with the same keys, and lists of the same length, of what is alike; tensors of the same shape and
    type, if finite; numbers, but for a fraction where an integer is wanted; and else what is the same.
    """
    parts = ()
    if isinstance(wanted, dict) and isinstance(found, dict):
        same, parts = found.keys() == wanted.keys(), wanted
    elif isinstance(wanted, (list, tuple)) and isinstance(found, (list, tuple)):
        same, parts = len(found) == len(wanted), range(len(wanted))
    elif isinstance(wanted, Tensor) and isinstance(found, Tensor):
        same = (found.shape, found.dtype, found.layout) == (wanted.shape, wanted.dtype, torch.strided)
    elif type(wanted) in (int, float):
        same = type(found) in (int, type(wanted)) and abs(found) < 2**63
    else:
        same = type(found) is type(wanted) and found == wanted
    if not same:
        raise Damaged(f"{path} is damaged: {where} is {_words(found)}, but must be {_words(wanted)}")
    if isinstance(found, Tensor) and found.is_floating_point() and not found.sum(dtype=torch.float32).isfinite():
        raise Damaged(f"{path} is damaged: {where} holds NaN or infinite values")
    for part in parts:
        compare(found[part], wanted[part], path, f"{where}.{part}")


def _words(value) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{value!r:.50}" if type(value) in (bool, float, str) else f"of type {type(value).__name__}"


def compare_optimizer(found, parameters: Parameters, groups: int, path: Path) -> None:
    """Raise Damaged, naming the place, unless `found` can be the state of AdamW with these parameters, in so many groups."""
    state, settings = (found.get(name) if isinstance(found, dict) else None for name in ("state", "param_groups"))
    stepped = state if isinstance(state, dict) else {}  # float16's first steps may all be left out
    moments = {key: {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for key, p in parameters.items()}
    if isinstance(settings, list):
        settings = [{name: each.get(name) for name in RATES} for each in settings if isinstance(each, dict)]
    wanted = {"state": {key: moments.get(key, {}) for key in stepped}, "param_groups": [RATES] * groups}
    compare({"state": state, "param_groups": settings}, wanted, path, "optimizer")
    for name, (lr, betas) in {f"param_groups.{i}": group.values() for i, group in enumerate(settings)}.items():
        if not (0 <= lr < 1e3 and all(0 <= beta < 1 for beta in betas)):
            raise Damaged(f"{path} is damaged: optimizer.{name} has lr {lr:g} and betas {betas}, out of their ranges")
    for key, each in stepped.items():
        if not each["step"] >= 0:
            raise Damaged(f"{path} is damaged: optimizer.state.{key}.step is {each['step'].item():g}, but must be 0 or more")


def as_own(found: dict, optimizer: torch.optim.Optimizer, parameters: Parameters) -> dict:
    """Return a state that was compared with an optimiser's parameters, with the optimiser's own settings but for the rates.

    Numerics: moments get the memory layout of their weights, which may have been another where they were saved: the fused
    kernel on CPUs goes through both as they lie in memory.
    """
    for key, moments in found["state"].items():
        p = parameters[key]
        for name, old in moments.items():
            moments[name] = old.clone() if old.ndim == 0 else torch.empty_strided(p.shape, p.stride()).copy_(old)
    keys = {id(p): key for key, p in parameters.items()}
    groups = [
        own | {"lr": then["lr"], "betas": tuple(then["betas"]), "params": [keys[id(p)] for p in own["params"]]}
        for own, then in zip(optimizer.param_groups, found["param_groups"], strict=True)
    ]
    return {"state": found["state"], "param_groups": groups}


def check_log(state: dict, path: Path) -> None:
    """Raise Damaged unless a checkpoint of `Run` says how the run went so far."""

    def number(value, kinds=(int, float)) -> bool:
        return type(value) in kinds and not abs(value) >= 2**63  # nan: no score

    def listed(name: str, good: Callable[[object], bool]) -> bool:
        return isinstance(state.get(name, []), list) and all(map(good, state.get(name, [])))

    def row(value) -> bool:
        named = isinstance(value, dict) and {"step", "loss", "score", "seconds"} <= value.keys()
        return named and type(value["step"]) is int and all(type(k) is str and number(v) for k, v in value.items())

    checks = {
        "step": number(state.get("step"), (int,)) and state["step"] >= 0,
        "settings": isinstance(state.get("settings"), dict),
        "rows": "rows" in state and listed("rows", row),
        "losses": "losses" in state and listed("losses", number),
        "kept": listed("kept", lambda step: number(step, (int,))),
        "threads": state.get("threads") is None or number(state["threads"], (int,)),
    }
    wrong = [name for name, good in checks.items() if not good]
    if wrong:
        raise Damaged(f"{path} is damaged: its {wrong[0]} is not what a run writes")


def resumable(folder: Path) -> bool:
    """Tell whether a run left a checkpoint in a folder: whole, damaged, or only an older one."""
    return any(folder.glob("checkpoint*.pt"))


def check_free(folder: Path, results: Sequence[str], reports: Sequence[str]) -> None:
    """Raise ValueError if a new run in a folder would replace what is not its own.

    results, reports  names of what a run writes at its end, and before. The reports of a run that never came to a
                      checkpoint, whose lock is there, may be replaced.
    """
    begun = (folder / LOCK).is_file()
    for name in (*results, *(() if begun else reports)):
        if os.path.lexists(folder / name):
            raise ValueError(f"{folder / name} is there already, and would be replaced: move it, or name another --output")


def lock(folder: Path) -> IO:
    """Keep other processes out of a run's folder until what is returned is closed.

    Raises ValueError if another process has the folder, or what lies in the lock's place is no ordinary file.
    """
    try:
        import fcntl
    except ImportError:  # Compat: not on Windows
        return open(os.devnull)
    path = folder / LOCK
    try:  # nothing is emptied, no link followed, no pipe waited for
        file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666))  # noqa: SIM115
    except OSError as error:
        raise ValueError(f"{path} cannot be opened ({error.strerror}): remove it, or name another --output") from error
    try:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path} is not an ordinary file: remove it, or name another --output")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):  # another process, refused, removed it meanwhile
            raise BlockingIOError
    except (OSError, ValueError) as error:
        file.close()
        if isinstance(error, ValueError):
            raise
        raise ValueError(f"{folder} is in use by another run: wait for it, or name another --output") from error
    return file


def digest(sd: StableDiffusion) -> str:
    """Return in words which model it is: by its weights and its vocabulary, wherever they lie."""
    found = hashlib.blake2b(json.dumps([sd.tokenizer.vocab, sd.tokenizer.merges]).encode(), digest_size=8)
    for part in (sd.unet, sd.vae, sd.text_encoder):
        for name, tensor in part.state_dict().items():
            found.update(f"{name} {tuple(tensor.shape)} {torch.hash_tensor(tensor.cpu()).item()}".encode())
    return f"of digest {found.hexdigest()}"
