"""Every method passes the public suite, every ordered pair keeps what the first step did, and the suite can fail."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pytest
from tests.methods.conftest import EXAMPLES, examples
from torch import Tensor

from rarefy.calibrate.statistics import SquaredNorm, Statistic
from rarefy.core.errors import PatternError
from rarefy.core.patterns import NM, Blocks, Lines, Unstructured
from rarefy.core.solution import Factors, Solution
from rarefy.core.tap_factors import TapFactors
from rarefy.layouts import pack, unpack
from rarefy.methods import METHODS, LayerMethod, Magnitude
from rarefy.testing import check_method
from rarefy.testing.method import make_problem

TAPS = (2, 4)  # of the 136 columns of the pairs below


@pytest.mark.parametrize("method", examples(), ids=repr)
def test_every_method_conforms(method: LayerMethod) -> None:
    check_method(method)


@pytest.mark.parametrize("second", METHODS)
@pytest.mark.parametrize("first", METHODS)
def test_a_later_step_never_undoes_an_earlier_one(first: str, second: str) -> None:
    for one in EXAMPLES[first]:
        for two in EXAMPLES[second]:
            weight_OI, stats = make_problem(9, 136, (*one.needs(), *two.needs()), seed=3)
            middle = one.compress(Solution.dense(weight_OI, TAPS), stats, layer="x")
            grid = getattr(two, "values", None)
            if middle.grid is not None and grid is not None and middle.grid.grid != grid:
                with pytest.raises(PatternError, match=r"layer x: an earlier step put it on int\d"):
                    two.compress(middle, stats, layer="x")
                continue
            if middle.factors is not None and _unstorable(middle, two):
                with pytest.raises(PatternError, match=r"layer x: .*factors"):
                    two.compress(middle, stats, layer="x")
                continue
            result = two.compress(middle, stats, layer="x")
            result.check()
            if middle.mask_OI is not None:
                assert not result.weight_OI[~middle.mask_OI].any()
                assert result.mask_OI is not None
                assert not (result.mask_OI & ~middle.mask_OI).any()
            if middle.grid is not None:
                assert result.grid is middle.grid
            if middle.factors is not None:
                assert result.factors is not None
                assert result.factors.rank == middle.factors.rank
                assert result.only_factors == middle.only_factors
                # only rounding what has nothing beside its factors changes their values
                assert result.factors is middle.factors or (middle.only_factors and grid is not None)
            pattern = getattr(two, "pattern", None)
            if pattern is not None:
                assert result.mask_OI is not None
                most = (1 - pattern.sparsity + 0.02) * result.mask_OI.size
                if isinstance(pattern, Lines):
                    pattern = pattern.fit(result.shape)
                if isinstance(pattern, Blocks):  # smaller ones at the edges
                    most = pattern.max_num_values(result.shape)
                assert result.mask_OI.sum() <= most
            # what is stored is what was computed (floats are stored in bfloat16)
            stored = unpack(pack(result))
            if result.factors is None:
                tolerance = 0 if result.grid is not None else 2**-8 * np.abs(result.weight_OI)
                assert (np.abs(stored.weight_OI - result.weight_OI) <= tolerance).all()
            else:
                size_OI = _magnitude(result.factors) + np.abs(result.weight_OI)
                assert (np.abs(stored.value_OI - result.value_OI) <= 2**-6 * size_OI).all()


def _magnitude(factors: Factors | TapFactors) -> np.ndarray:
    """The product of the factors' magnitudes."""
    if isinstance(factors, Factors):
        return np.abs(factors.left_OK) @ np.abs(factors.right_KI)
    core = None if factors.core_AM is None else np.abs(factors.core_AM)
    return TapFactors(np.abs(factors.left_OA), core, np.abs(factors.right_RC), factors.num_runs).product_OI


def _unstorable(middle: Solution, two: LayerMethod) -> bool:
    """Whether the second step asks for what no layout stores: zeros in factors, other than 8 bits, a second pair."""
    values = getattr(two, "values", None)
    of_taps = isinstance(middle.factors, TapFactors)
    zeros_or_bits = getattr(two, "pattern", None) is not None or (
        values is not None and (values.num_bits != 8 or of_taps)
    )
    return getattr(two, "rank", None) is not None or (middle.only_factors and zeros_or_bits)


def test_two_of_four_then_thirty_per_cent_stays_two_of_four() -> None:
    weight_OI, _ = make_problem(4, 64, ())
    first = Magnitude(NM(2, 4)).compress(Solution.dense(weight_OI), {}, layer="x")
    second = Magnitude(Unstructured(0.3)).compress(first, {}, layer="x")
    assert second.pattern == NM(2, 4)
    third = Magnitude(Unstructured(0.7)).compress(first, {}, layer="x")
    assert third.pattern == Unstructured(0.7)
    assert third.mask_OI is not None
    assert third.mask_OI.sum() == 256 - round(0.7 * 256)


@dataclasses.dataclass(frozen=True)
class _Forgetful:
    """Undoes what earlier steps did."""

    paper: ClassVar[str] = "none"
    needs_data: bool = False

    def needs(self) -> tuple[Statistic, ...]:
        return (SquaredNorm(),) if self.needs_data else ()

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        return Solution.dense(solution.weight_OI)


@dataclasses.dataclass(frozen=True)
class _Unsteady:
    """Gives other bytes each time, and writes into its input."""

    paper: ClassVar[str] = "none"

    def needs(self) -> tuple[Statistic, ...]:
        return ()

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        solution.weight_OI[...] += 1
        return solution


@dataclasses.dataclass(frozen=True)
class _Careless:
    """Does nothing, and so takes NaN as well."""

    paper: ClassVar[str] = "none"

    def needs(self) -> tuple[Statistic, ...]:
        return ()

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        return solution


@dataclasses.dataclass(frozen=True)
class _Ranks:
    """Prunes by magnitude, and gives weights an importance in the way that `fault` says."""

    paper: ClassVar[str] = "none"
    fault: str = ""

    def needs(self) -> tuple[Statistic, ...]:
        return ()

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        return Magnitude(Unstructured(0.5)).compress(solution, stats, layer=layer)

    def saliency(self, weight_OI: np.ndarray, stats: Mapping[Statistic, Tensor], *, layer: str) -> np.ndarray:
        if self.fault == "writes":
            weight_OI[0, 0] += 1
        score_OI = np.abs(weight_OI)
        if self.fault == "NaN":
            score_OI[0, 0] = np.nan
        if self.fault == "unsteady":
            score_OI[0, 0] += np.random.default_rng().random()
        if self.fault == "transposed":
            score_OI = score_OI.T
        return score_OI.astype(np.float64) if self.fault == "wide" else score_OI


def test_the_suite_takes_a_saliency_that_is_in_order() -> None:
    check_method(_Ranks())


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (_Forgetful(), "the mask is gone"),
        (_Unsteady(), "changed its input"),
        (_Careless(), "raises no NonFiniteError"),
        (_Ranks("writes"), "saliency.. changed its input"),
        (_Ranks("NaN"), "saliency is NaN"),
        (_Ranks("unsteady"), "two saliencies of the same layer differ"),
        (_Ranks("transposed"), "another shape"),
        (_Ranks("wide"), "no float32"),
    ],
    ids=repr,
)
def test_the_suite_fails_methods_that_break_a_promise(method: LayerMethod, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_method(method)
