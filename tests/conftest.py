"""Shared by all tests: fixed seeds, a tiny trained-like U-Net, its ControlNet and a batch of inputs."""

import copy
from dataclasses import dataclass, replace

import minicn.threads  # noqa: F401  (before torch, see there)

# isort: split
import pytest
import torch
from torch import Tensor, nn

from minicn import ControlNet, UNet, UNetConfig

torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other

TINY = UNetConfig(model_channels=8, num_heads=2, context_dim=12, norm_num_groups=2)
HINT_CHANNELS = (4, 4, 8, 8)


@dataclass(frozen=True)
class Batch:
    """Inputs of the tiny models. Not square, and 1x2 at the coarsest level: attention over one position is constant."""

    x: Tensor  # (2, 4, 8, 16)
    hint: Tensor  # (2, 3, 64, 128) in [0, 1]
    timesteps: Tensor  # (2,)
    context: Tensor  # (2, 7, 12)

    def to(self, dtype: torch.dtype) -> "Batch":
        return replace(self, x=self.x.to(dtype), hint=self.hint.to(dtype), context=self.context.to(dtype))


def _dezero(module: nn.Module, std: float = 0.05, seed: int = 1) -> nn.Module:
    """Give every parameter that is all zero normal values of this standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if not p.any():
                p.copy_(std * torch.randn(p.shape, generator=generator))
    return module


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def refused(capsys):
    """A function that runs what must be refused and returns the line that says why: status 2, no traceback."""

    def run(function, *args) -> str:
        with pytest.raises(SystemExit) as stopped:
            function(*args)
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        assert "Traceback" not in error
        return error.splitlines()[-1]

    return run


@pytest.fixture(scope="session")
def dezero():
    """A function that fills zero parameters: Stable Diffusion's own zero layers are not zero once it is trained."""
    return _dezero


@pytest.fixture(scope="session")
def tiny_config() -> UNetConfig:
    return TINY


@pytest.fixture(scope="session")
def hint_channels() -> tuple[int, ...]:
    return HINT_CHANNELS


@pytest.fixture(scope="session")
def _unet_once() -> UNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _dezero(UNet(TINY)).eval()


@pytest.fixture
def unet(_unet_once) -> UNet:
    """A tiny U-Net as if trained (no parameter is zero), locked; each test gets its own copy."""
    return copy.deepcopy(_unet_once).requires_grad_(False)


@pytest.fixture
def controlnet(unet) -> ControlNet:
    """A fresh ControlNet of that U-Net: its zero convolutions are zero."""
    return ControlNet.from_unet(unet, hint_channels=HINT_CHANNELS)


@pytest.fixture(scope="session")
def batch() -> Batch:
    g = torch.Generator().manual_seed(2)
    return Batch(
        x=torch.randn(2, 4, 8, 16, generator=g),
        hint=torch.rand(2, 3, 64, 128, generator=g),
        timesteps=torch.tensor([1, 951]),
        context=torch.randn(2, 7, 12, generator=g),
    )


def outputs_of(modules, run):
    """Run, and return what each module gave, with its graph."""
    seen = []
    handles = [m.register_forward_hook(lambda _m, _i, out: seen.append(out)) for m in modules]
    run()
    for handle in handles:
        handle.remove()
    return seen
