"""Time several contestants fairly: interleaved rounds, warm-up, median and spread, and a check of what was computed."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, final

import numpy as np
import numpy.typing as npt

from rarefy.core.errors import NonFiniteError, UsageError
from rarefy.core.results import Spread


class Contestant(Protocol):
    """Something that does one round of the work that is timed."""

    @property
    def name(self) -> str:
        """A unique name."""

    def run(self) -> Mapping[str, float]:
        """Do one round and return the seconds of each of its phases.

        Raises:
            RarefyError: what was computed is not plausible; see `check_output`.
        """


@final
class Timings:
    """Seconds of every round, per contestant and phase."""

    def __init__(self) -> None:
        self._seconds: dict[str, dict[str, list[float]]] = {}

    def add(self, contestant: str, seconds: Mapping[str, float]) -> None:
        """Add one round."""
        for phase, value in seconds.items():
            self._seconds.setdefault(contestant, {}).setdefault(phase, []).append(value)

    def seconds(self, contestant: str, phase: str) -> Spread:
        """Seconds per round: median, fastest and slowest."""
        values = self._seconds[contestant][phase]
        return Spread(float(np.median(values)), min(values), max(values), len(values))

    def rate(self, contestant: str, phase: str, units: float) -> Spread:
        """Units per second, where one round of the phase handles `units` of them."""
        spread = self.seconds(contestant, phase)
        return Spread(units / spread.median, units / spread.high, units / spread.low, spread.num_runs)

    def ratio(self, contestant: str, other: str, phase: str) -> Spread:
        """How many times faster `contestant` is than `other`: the ratios of the rounds that ran side by side."""
        pairs = zip(self._seconds[contestant][phase], self._seconds[other][phase], strict=True)
        ratios = [slow / fast for fast, slow in pairs]
        return Spread(float(np.median(ratios)), min(ratios), max(ratios), len(ratios))


def interleave(
    contestants: Sequence[Contestant],
    *,
    rounds: int = 5,
    warmup: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Timings:
    """Run all contestants in every round, so that a change of the machine's speed hits all of them.

    Args:
        contestants: with unique names.
        rounds: timed rounds, at least 1.
        warmup: rounds before them that are not timed.
        progress: called with (runs done, runs in all).

    Raises:
        UsageError: no contestants, two of one name, or no rounds.
    """
    names = [contestant.name for contestant in contestants]
    if not names or len(set(names)) < len(names):
        raise UsageError("contestants", f"{names}", allowed="at least one, with unique names")
    if rounds < 1 or warmup < 0:
        raise UsageError("rounds", f"{rounds} after {warmup} for warm-up", allowed="at least 1 after at least 0")
    timings = Timings()
    total, done = (rounds + warmup) * len(contestants), 0
    for number in range(-warmup, rounds):
        # Each round starts with another contestant: none always follows the one that leaves the caches hot or cold.
        first = number % len(contestants)
        for contestant in (*contestants[first:], *contestants[:first]):
            seconds = contestant.run()
            for phase, value in seconds.items():
                if not (math.isfinite(value) and value > 0):
                    raise NonFiniteError(f"{contestant.name}, {phase}", f"{value} seconds", allowed="a positive time")
            if number >= 0:
                timings.add(contestant.name, seconds)
            done += 1
            if progress is not None:
                progress(done, total)
    return timings


def check_output(name: str, output: npt.NDArray[np.float32]) -> None:
    """Refuse to time a computation whose result cannot be right: empty, NaN, infinite, or the same number everywhere.

    Raises:
        NonFiniteError: names the contestant and what is wrong.
    """
    if output.size == 0 or not np.isfinite(output).all():
        raise NonFiniteError(name, "its output is empty, NaN or infinite", hint="its time means nothing")
    if output.size > 1 and float(output.min()) == float(output.max()):
        raise NonFiniteError(name, f"its output is {float(output.flat[0])} everywhere", hint="its time means nothing")
