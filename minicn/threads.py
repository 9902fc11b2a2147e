"""How many threads compute, and how they wait for each other. Imported before torch: see `bound_spinning`.

A step of a narrow model is hundreds of tiny parallel regions. Between two of them OpenMP's threads spin, and where another
program keeps a core busy (a browser, a video), they spin for whole time slices: a step then takes thirty times as long.
So the spinning is bounded, and a loop of such steps measures, now and then, how many threads pay off (`Pace`).
"""

import os
import sys
import time
from collections.abc import Callable, Sequence

NARROW = 50_000_000  # parameters up to which more threads may not pay off


def bound_spinning() -> None:
    """Let OpenMP's waiting threads spin for only a few microseconds, unless the environment says how they wait.

    The variables are read when torch loads its OpenMP library, so this comes before `import torch`. GNU's library (torch
    for Linux) counts turns: 10,000 are enough between the regions of a step, and few enough next to a busy neighbour
    (benchmarks/threads.py). Intel's and LLVM's (other builds, macOS) count milliseconds, 200 by default.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "10000"
        os.environ["KMP_BLOCKTIME"] = "1"


bound_spinning()


def candidates(wanted: int | None, parameters: int) -> tuple[int, ...]:
    """Return the numbers of threads to try, largest first: a single one if there is nothing to try.

    wanted      what the user asked for; None: try, for a narrow model, unless OMP_NUM_THREADS is set
    parameters  of the models that compute
    """
    import torch

    most = wanted or torch.get_num_threads()
    if wanted or "OMP_NUM_THREADS" in os.environ or parameters > NARROW:
        return (most,)
    return tuple(sorted({most, *(4**i for i in range(8) if 4**i < most)}, reverse=True))


class Pace:
    """Inside `with pace:`, a step of a loop; after some steps with each number of threads the fastest number is kept.

    It is tried again every `every` steps, as the machine's load changes. It affects results by rounding at most.

    numbers  numbers of threads to try, see `candidates`
    tries    steps with each, of which the fastest counts
    say      called with a line at the first choice and whenever it changes
    """

    def __init__(self, numbers: Sequence[int], every: int = 100, tries: int = 2, say: Callable[[str], None] | None = None):
        self.numbers, self.every, self.tries, self.say = tuple(numbers), every, tries, say or _say
        self.chosen: int | None = self.numbers[0] if len(self.numbers) == 1 else None
        self.clock = time.perf_counter
        self._restart()

    def _restart(self) -> None:
        self._left = [n for n in self.numbers for _ in range(self.tries)] if len(self.numbers) > 1 else []
        self._seconds: dict[int, float] = {}
        self._steps = 0

    def __enter__(self) -> "Pace":
        import torch

        wanted = self._left[0] if self._left else self.chosen
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)
        self._began = self.clock()
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is not None:
            return
        seconds = self.clock() - self._began
        if self._left:
            number = self._left.pop(0)
            self._seconds[number] = min(seconds, self._seconds.get(number, seconds))
            if not self._left:
                self._choose()
        else:
            self._steps += 1
            if len(self.numbers) > 1 and self._steps >= self.every:
                self._restart()

    def _choose(self) -> None:
        best = min(self._seconds, key=self._seconds.get)
        if self.chosen in self._seconds and self._seconds[best] > 0.9 * self._seconds[self.chosen]:
            best = self.chosen  # no change for a difference that is noise
        if best != self.chosen:
            times = ", ".join(f"{number}: {seconds:.3g} s" for number, seconds in self._seconds.items())
            self.say(f"note: computing with {best} of {max(self.numbers)} threads (a step takes {times}); --threads sets it")
        self.chosen = best


def fastest(step: Callable[[], object], numbers: Sequence[int]) -> int:
    """Set the number of threads with which `step` is fastest, tried twice with each, and return it."""
    pace = Pace(numbers, say=lambda line: None)
    while pace.chosen is None:
        with pace:
            step()
    with pace:
        return pace.chosen


def _say(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)
