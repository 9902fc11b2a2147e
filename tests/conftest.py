"""Shared by all tests: fixed seeds, a tiny trained-like U-Net, its ControlNet and a batch of inputs."""

import copy
import gc
import os
from dataclasses import dataclass, replace

import minicn.threads  # noqa: F401  (before torch, see there)

# isort: split
import by_hand
import closeness
import pytest
import torch
from torch import Tensor

from minicn import ControlNet, UNet, UNetConfig

# The tensors are tiny: more threads only wait for each other. OMP_NUM_THREADS decides otherwise.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

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


def pytest_collection_finish():
    """Let the garbage collector leave what the imports made alone: else it goes through all of that, test after test."""
    gc.collect()
    gc.freeze()


SHARE = "largest share of a tolerance"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Keep, with the test's report, the largest share that it used of a tolerance."""
    closeness.USED.clear()
    try:
        return (yield)
    finally:
        if closeness.USED:
            item.user_properties.append((SHARE, (max(closeness.USED), len(closeness.USED))))


def pytest_addoption(parser):
    parser.addoption("--share", type=float, default=1.0, help=f"fail if the {SHARE} is more than this")


def shares(terminalreporter):
    """Return of each test that compared up to rounding: the largest share of a tolerance, how many there were, its name."""
    reports = [r for group in terminalreporter.stats.values() for r in group if getattr(r, "when", "") == "call"]
    return [(*value, r.nodeid) for r in reports for name, value in r.user_properties if name == SHARE]


def pytest_terminal_summary(terminalreporter):
    """Say how much of the tolerances was used, at most and where, and on what."""
    if used := shares(terminalreporter):
        (share, _, where), count = max(used), sum(each[1] for each in used)
        machine = f"{torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}"
        terminalreporter.write_line(f"{count} comparisons up to rounding ({machine}); {SHARE}: {share:.2f} in {where}")


def pytest_sessionfinish(session):
    terminalreporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminalreporter and any(used[0] > session.config.option.share for used in shares(terminalreporter)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


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
    return by_hand.dezero


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
        return by_hand.dezero(UNet(TINY)).eval()


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
