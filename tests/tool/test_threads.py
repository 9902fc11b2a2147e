"""How many threads compute, and how they wait: bounded before torch is loaded, then chosen by the clock."""

import os
import subprocess
import sys

import pytest
import torch

from minicn import threads


@pytest.fixture(autouse=True)
def _as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Machine:
    """A clock by which a step takes as long as `seconds` says for the number of threads that is set."""

    def __init__(self, seconds: dict[int, float]):
        self.now, self.seconds = 0.0, seconds

    def __call__(self) -> float:
        return self.now

    def run(self, pace: threads.Pace, steps: int) -> list[int]:
        """Take steps, and return under how many threads each ran."""
        pace.clock, used = self, []
        for _ in range(steps):
            with pace:
                used.append(torch.get_num_threads())
                self.now += self.seconds[used[-1]]
        return used


def test_the_quickest_number_is_tried_said_and_kept():
    said = []
    pace = threads.Pace((4, 2, 1), say=said.append)
    used = Machine({4: 5.0, 2: 0.3, 1: 0.2}).run(pace, 10)
    assert used == [4, 4, 2, 2, 1, 1] + [1] * 4
    (line,) = said
    assert "1 of 4 threads" in line
    assert "4: 5 s" in line
    assert "--threads" in line


def test_the_number_follows_the_load():
    """A neighbour comes, and goes again: the choice is made anew every so many steps."""
    pace, machine = threads.Pace((2, 1), every=10, say=lambda line: None), Machine({2: 0.16, 1: 0.21})
    assert machine.run(pace, 10)[-1] == 2
    machine.seconds = {2: 5.0, 1: 0.2}
    assert machine.run(pace, 14)[-1] == 1
    machine.seconds = {2: 0.16, 1: 0.21}
    assert machine.run(pace, 20)[-1] == 2


def test_a_difference_that_is_noise_changes_nothing():
    said = []
    pace, machine = threads.Pace((2, 1), every=5, say=said.append), Machine({2: 0.2, 1: 0.3})
    machine.run(pace, 6)
    machine.seconds = {2: 0.2, 1: 0.19}
    machine.run(pace, 30)
    assert pace.chosen == 2
    assert len(said) == 1


def test_a_settled_number_is_never_left():
    pace = threads.Pace((3,), every=2)
    assert Machine({3: 1.0}).run(pace, 8) == [3] * 8


def test_a_step_that_failed_is_not_timed():
    pace = threads.Pace((2, 1))
    with pytest.raises(ValueError, match="step"), pace:
        raise ValueError("step")
    assert Machine({2: 1.0, 1: 2.0}).run(pace, 5)[:4] == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("wanted", "parameters", "environment", "found"),
    [
        (None, 10**6, {}, (6, 4, 1)),
        (None, 10**9, {}, (6,)),  # full width keeps all cores
        (5, 10**6, {}, (5,)),
        (None, 10**6, {"OMP_NUM_THREADS": "6"}, (6,)),
    ],
)
def test_who_decides(monkeypatch, wanted, parameters, environment, found):
    """The option, then the environment, then the width, then the clock."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    torch.set_num_threads(6)
    assert threads.candidates(wanted, parameters) == found


@pytest.mark.parametrize(
    ("environment", "count"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None), ({"KMP_BLOCKTIME": "200"}, None)],
)
def test_spinning_is_bounded_unless_the_user_says_how_to_wait(monkeypatch, environment, count):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    threads.bound_spinning()
    assert os.environ.get("GOMP_SPINCOUNT") == count


@pytest.mark.parametrize(
    "line",
    [
        "from minicn import UNet",
        "import train_toy",
        "from minicn.__main__ import main; main(['generate', '--help'])",
    ],
)
def test_the_bound_is_set_before_torch_is_loaded(line):
    """OpenMP reads the variable once: when torch is loaded."""
    code = (
        "import builtins, os, sys\n"
        "real = builtins.__import__\n"
        "def spy(name, *rest):\n"
        "    if name.split('.')[0] == 'torch' and 'torch' not in sys.modules:\n"
        "        print('bound' if 'GOMP_SPINCOUNT' in os.environ else 'unbound')\n"
        "        sys.stdout.flush()\n"
        "        os._exit(0)\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = spy\n" + line
    )
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "bound"
