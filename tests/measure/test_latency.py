import math
import time
from collections.abc import Mapping
from itertools import cycle

import numpy as np
import pytest

from rarefy.core.errors import NonFiniteError, UsageError
from rarefy.core.results import Spread
from rarefy.measure.latency import Timings, check_output, interleave
from rarefy.measure.measurement import Measurement, compare, exact
from rarefy.report.facts import change_of


class Scripted:
    """A contestant whose times are given."""

    def __init__(self, name: str, seconds: list[float], log: list[str] | None = None) -> None:
        self.name = name
        self._seconds = cycle(seconds)
        self._log = log

    def run(self) -> Mapping[str, float]:
        if self._log is not None:
            self._log.append(self.name)
        return {"work": next(self._seconds)}


class Sleeper:
    def __init__(self, name: str, seconds: float) -> None:
        self.name = name
        self._seconds = seconds

    def run(self) -> Mapping[str, float]:
        start = time.perf_counter()
        time.sleep(self._seconds)
        return {"work": time.perf_counter() - start}


def test_rounds_are_interleaved_and_warm_up_is_not_counted() -> None:
    log: list[str] = []
    contestants = [Scripted("a", [100.0, 1.0, 2.0, 3.0], log), Scripted("b", [100.0, 4.0, 4.0, 4.0], log)]
    timings = interleave(contestants, rounds=3, warmup=1)
    assert timings.seconds("a", "work") == Spread(2.0, 1.0, 3.0, 3)
    assert timings.rate("b", "work", 8) == Spread(2.0, 2.0, 2.0, 3)
    assert [sorted(log[i : i + 2]) for i in range(0, 8, 2)] == [["a", "b"]] * 4
    assert {log[i] for i in range(0, 8, 2)} == {"a", "b"}  # neither always goes first


def test_ratio_compares_rounds_that_ran_side_by_side() -> None:
    # The machine is twice as slow in the second round; the ratio is not.
    timings = interleave([Scripted("a", [1.0, 2.0]), Scripted("b", [3.0, 6.0])], rounds=2, warmup=0)
    assert timings.ratio("a", "b", "work") == Spread(3.0, 3.0, 3.0, 2)


def test_a_really_slower_contestant_is_seen_to_be_slower() -> None:
    timings = interleave([Sleeper("quick", 0.01), Sleeper("slow", 0.04)], rounds=3, warmup=0)
    assert timings.ratio("quick", "slow", "work").median > 2
    assert timings.ratio("slow", "quick", "work").median < 0.5
    quick, slow = (Measurement("rate", "1/s", True, timings.rate(n, "work", 1), "timed") for n in ("quick", "slow"))
    outcomes = [change_of(compare(*pair)).outcome for pair in ((quick, slow), (slow, quick), (slow, slow))]
    assert outcomes == ["worse", "better", "same"]


def test_the_same_examples_are_compared_one_by_one() -> None:
    def quantity(*examples: float, unit: str = "points") -> Measurement:
        value = Spread(sum(examples) / len(examples), min(examples), max(examples), len(examples))
        return Measurement("x", "", True, value, "how", examples, unit)

    # Examples differ by thousands, and each moves by about one: -1, -3, -2, with a standard deviation of 1.
    paired = compare(quantity(1000, 5000, 9000), quantity(999, 4997, 8998)).paired
    assert paired is not None
    assert (paired.mean, paired.num_pairs, paired.unit) == (-2.0, 3, "points")
    assert paired.standard_error == pytest.approx(3**-0.5)
    assert compare(quantity(1, 2), quantity(1, 2, 3)).paired is None
    assert compare(quantity(1), quantity(2)).paired is None  # one difference has no spread
    assert compare(None, quantity(1, 2)).paired is None
    assert compare(quantity(1, 2), Measurement("x", "", True, exact(2), "how")).paired is None


def test_only_the_same_quantity_is_compared() -> None:
    a = Measurement("disk_bytes", "bytes", False, exact(3), "size of a")
    b = Measurement("disk_bytes", "bytes", False, exact(4), "size of b")
    assert compare(a, b).how == "before: size of a; after: size of b"
    assert compare(None, b).before is None
    with pytest.raises(UsageError, match="unit"):
        compare(a, Measurement("disk_bytes", "MB", False, exact(4), "size of b"))
    with pytest.raises(UsageError, match="neither"):
        compare(None, None)


@pytest.mark.parametrize(
    "output", [np.array([1.0, np.nan]), np.array([np.inf, 1.0]), np.zeros((3, 4)), np.full(5, 2.0), np.array([])]
)
def test_implausible_output_is_refused(output: np.ndarray) -> None:
    with pytest.raises(NonFiniteError, match="its time means nothing"):
        check_output("contestant", output.astype(np.float32))


def test_plausible_output_passes() -> None:
    check_output("contestant", np.array([1.0, 2.0], np.float32))
    check_output("contestant", np.array([1.0], np.float32))


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_impossible_times_are_refused(seconds: float) -> None:
    with pytest.raises(NonFiniteError, match="a, work"):
        interleave([Scripted("a", [seconds])], rounds=1)


def test_impossible_requests() -> None:
    with pytest.raises(UsageError, match="contestants"):
        interleave([])
    with pytest.raises(UsageError, match="unique"):
        interleave([Scripted("a", [1.0]), Scripted("a", [1.0])])
    with pytest.raises(UsageError, match="rounds"):
        interleave([Scripted("a", [1.0])], rounds=0)
    with pytest.raises(KeyError):
        Timings().seconds("a", "work")
