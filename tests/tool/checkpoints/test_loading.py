"""Loading does what it must and no more: nothing is filled that a file replaces, nothing is imported that is not used."""

import gc
import json
import subprocess
import sys
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minicn import ControlNet, StableDiffusion
from minicn.checkpoints import files
from minicn.conditions import networks


class Written(TorchDispatchMode):
    """Inside `with`, notes every operation that writes into a tensor. (`set_` is how a reader gives one its memory.)"""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable and func is not torch.ops.aten.set_.source_Storage:
            self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def load_annotator(folder):
    """Load the smallest of the three, from random weights."""
    files.write(folder / "mlsd.safetensors", networks.MLSD().state_dict())
    return lambda: networks.MLSD.load(folder / "mlsd.safetensors")


@pytest.mark.parametrize(
    "load",
    [
        lambda _: lambda: StableDiffusion.load("toy"),
        lambda _: lambda: ControlNet.load("toy-canny"),
        load_annotator,
    ],
    ids=["StableDiffusion", "ControlNet", "annotator"],
)
def test_nothing_is_filled_that_a_file_replaces(load, tmp_path):
    """While a model is loaded, no first weights are written, of whatever kind, and no random number is drawn."""
    run, state = load(tmp_path), torch.get_rng_state()
    with Written() as written:
        run()
    assert written.names == set()
    assert torch.equal(torch.get_rng_state(), state)


def modules_after(code: str) -> set[str]:
    """Run code in a fresh process and return the names of the modules that it has imported."""
    code += "; import json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_loading_imports_no_compiler():
    """Random numbers on the meta device would import torch._dynamo, which takes longer than loading the whole toy."""
    loaded = modules_after("import minicn; minicn.StableDiffusion.load('toy'); minicn.ControlNet.load('toy-canny')")
    assert "minicn.pipeline" in loaded
    assert not loaded & {"torch._dynamo", "torch._inductor", "sympy"}


def test_a_file_is_let_go_with_its_last_tensor(tmp_path):
    """At once, not when the garbage collector comes by: a mapping counts as memory of the process."""
    files.write(tmp_path / "a.safetensors", {"a": torch.ones(3)})
    gc.disable()
    try:
        opened = files.open_weights(tmp_path / "a.safetensors")
        assert opened.get("a").sum() == 3
        alive = weakref.ref(opened)
        del opened
        assert alive() is None
    finally:
        gc.enable()
