"""The conformance suite of layer methods. Shape suffixes: O out, I in, T tokens."""

import dataclasses
from collections.abc import Mapping
from itertools import product

import numpy as np
import torch
from torch import Tensor

from rarefy.calibrate.row_counts import RowCounts
from rarefy.calibrate.statistics import GradientStatistic, Statistic
from rarefy.core.errors import NonFiniteError, PatternError, RarefyError
from rarefy.core.grids import FittedGrid, IntGrid, dequantize, fit_minmax, quantize
from rarefy.core.patterns import NM, Pattern, Unstructured
from rarefy.core.solution import Factors, Solution
from rarefy.core.tap_factors import TapFactors
from rarefy.layouts import pack
from rarefy.methods import LayerMethod
from rarefy.methods.base import HasSaliency

# a width that no group divides, one row, and a width of one group
_SHAPES = ((24, 200), (1, 64), (5, 64))
# the taps that the columns of such a width are, for methods of convolutions
_TAPS = {200: (5, 5), 64: (2, 2)}
_NUM_GRADIENTS = 48
_STARTS = (
    "dense", "pruned", "2 of 4", "on a grid", "pruned and on a grid", "factors", "factors beside a matrix",
    "factors beside a matrix that is pruned and on a grid", "factors on a grid", "factors of taps",
)  # fmt: skip


def check_method(method: LayerMethod, *, seed: int = 0) -> None:
    """Check that a method keeps the promises of the LayerMethod protocol on small random layers.

    Args:
        method: a method with its hyperparameters. An N:M group of at most 64 columns fits the layers used.
        seed: of the layers.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    _check_declaration(method)
    for (rows, width), start in product(_SHAPES, _STARTS):
        weight_OI, stats = make_problem(rows, width, method.needs(), seed=seed)
        solution = _start(weight_OI, start, method)
        _check_result(method, solution, stats, f"{rows} x {width}, {start}")
        if isinstance(method, HasSaliency) and start == "dense":
            _check_saliency(method, weight_OI, stats, f"{rows} x {width}")
    _check_refusals(method, seed)


def make_problem(
    rows: int, width: int, needs: tuple[Statistic, ...], *, num_tokens: int = 512, seed: int = 0
) -> tuple["np.ndarray[tuple[int, int], np.dtype[np.float32]]", dict[Statistic, Tensor]]:
    """Make a random layer with correlated inputs of very different sizes, one of them dead, and gradients to match.

    The rows are looked up unevenly.

    Returns:
        weight_OI float32, and the finished statistics.
    """
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(rows, width, generator=generator)
    mix_II = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    size_I = torch.exp(torch.randn(width, generator=generator))
    size_I[width // 3] = 0
    x_TI = torch.randn(num_tokens, width, generator=generator) @ mix_II * size_I
    # early rows are looked up more often, the last third never
    lookups_T1 = (torch.rand(num_tokens, 1, generator=generator) ** 3 * rows * 2 / 3).long()
    # of samples that agree in part, and of which no loss reaches the dead input
    gradient_NOI = torch.randn(_NUM_GRADIENTS, rows, width, generator=generator) + torch.randn(
        width, generator=generator
    )
    gradient_NOI *= size_I
    stats: dict[Statistic, Tensor] = {}
    for statistic in dict.fromkeys(needs):
        if isinstance(statistic, GradientStatistic):
            state = statistic.init((rows, width))
            for gradient_OI in gradient_NOI:
                state = statistic.add_gradient(state, gradient_OI)
            stats[statistic] = statistic.finish(state)
        else:
            inputs = lookups_T1 if isinstance(statistic, RowCounts) else x_TI
            stats[statistic] = statistic.finish(statistic.update(statistic.init(width), inputs))
    return weight_OI.numpy(), stats


def _require(condition: object, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _check_declaration(method: LayerMethod) -> None:
    cls = type(method)
    _require(dataclasses.is_dataclass(method), "the method is no dataclass")
    _require(cls.__dataclass_params__.frozen, "the dataclass is not frozen")  # type: ignore[attr-defined]
    _require(isinstance(method.paper, str) and method.paper, "`paper` names no paper")
    _require(bool(cls.__doc__), "no docstring")
    _require(hash(method) == hash(dataclasses.replace(method)), "equal methods have different hashes")  # type: ignore[type-var]
    needs = method.needs()
    _require(isinstance(needs, tuple), "needs() is no tuple")
    _require(needs == method.needs() and len(set(needs)) == len(needs), "needs() changes or repeats a statistic")


def _start(weight_OI: "np.ndarray[tuple[int, int], np.dtype[np.float32]]", start: str, method: LayerMethod) -> Solution:
    """A solution as an earlier step could have left it, in a way that the method is able to go on from."""
    mask_OI = None
    pattern: Pattern | None = None
    rank_OI = np.argsort(np.argsort(np.abs(weight_OI), axis=1), axis=1)
    if "pruned" in start:
        mask_OI, pattern = rank_OI >= weight_OI.shape[1] // 3, Unstructured(1 / 3)
    if "2 of 4" in start:
        grouped = np.abs(weight_OI).reshape(weight_OI.shape[0], -1, 4)
        mask_OI = (np.argsort(np.argsort(grouped, axis=2), axis=2) >= 2).reshape(weight_OI.shape)
        pattern = NM(2, 4)
    if start == "factors of taps":
        return Solution.low_rank(_tap_factors(weight_OI), weight_OI)
    values = getattr(method, "values", None)
    wanted = values if isinstance(values, IntGrid) else IntGrid(4, 32, False)
    if start in ("factors", "factors on a grid"):
        bytes_grid = wanted if wanted.num_bits == 8 else IntGrid(8, None, True)  # what layouts of factors store
        factors = _factors(weight_OI, None if start == "factors" else bytes_grid)
        return Solution.low_rank(factors, weight_OI)
    pair = _factors(weight_OI, None) if "factors" in start else None
    rest_OI = weight_OI if pair is None else weight_OI - pair.product_OI
    value_OI = rest_OI if mask_OI is None else np.where(mask_OI, rest_OI, np.float32(0))
    grid: FittedGrid | None = None
    if "grid" in start:
        grid = fit_minmax(value_OI, wanted)
        value_OI = dequantize(quantize(value_OI, grid), grid)
    return Solution(value_OI, mask_OI, pattern, grid, pair, weight_OI, _TAPS[weight_OI.shape[1]])


def _tap_factors(weight_OI: "np.ndarray[tuple[int, int], np.dtype[np.float32]]") -> TapFactors:
    """The columns of a weight as factors: two outputs of the core, one channel of each tap."""
    left, width = np.ascontiguousarray(weight_OI[:, :2]), weight_OI.shape[1]
    return TapFactors(left, np.resize(weight_OI, (2, 4)), np.resize(weight_OI, (1, width // 4)), 4)


def _factors(weight_OI: "np.ndarray[tuple[int, int], np.dtype[np.float32]]", grid: IntGrid | None) -> Factors:
    """Two of the rows and the first columns of a weight, as factors."""
    left, right = np.ascontiguousarray(weight_OI[:, :2]), np.resize(weight_OI, (2, weight_OI.shape[1]))
    if grid is None:
        return Factors(left, right)
    left_grid, right_grid = fit_minmax(left, grid), fit_minmax(right, grid)
    left, right = dequantize(quantize(left, left_grid), left_grid), dequantize(quantize(right, right_grid), right_grid)
    return Factors(left, right, left_grid, right_grid)


def _check_result(method: LayerMethod, solution: Solution, stats: Mapping[Statistic, Tensor], where: str) -> None:
    weight_before = solution.weight_OI.copy()
    stats_before = {statistic: value.clone() for statistic, value in stats.items()}
    try:
        result = method.compress(solution, stats, layer="conformance")
    except PatternError as error:
        # what no layout stores, such as zeros in factors, is refused with the reason
        _require(solution.factors is not None, f"{where}: {error}")
        _require("conformance" in str(error), f"{where}: a PatternError that does not name the layer")
        return
    _require(np.array_equal(weight_before, solution.weight_OI), f"{where}: compress() changed its input")
    for statistic, value in stats.items():
        _require(torch.equal(value, stats_before[statistic]), f"{where}: compress() changed a statistic")
    again = method.compress(solution, stats, layer="conformance")
    _require(result.weight_OI.tobytes() == again.weight_OI.tobytes(), f"{where}: two runs give different bytes")
    _require(result.shape == solution.shape, f"{where}: the shape changed")
    try:
        result.check()
        pack(result)
    except RarefyError as error:
        raise AssertionError(f"{where}: the result breaks the invariants of Solution: {error}") from error
    if solution.mask_OI is not None:
        _require(result.mask_OI is not None, f"{where}: the mask is gone")
        assert result.mask_OI is not None
        _require(not np.any(result.mask_OI & ~solution.mask_OI), f"{where}: a zero of an earlier step is kept again")
    if solution.factors is not None:
        _require(result.factors is not None, f"{where}: the factors are gone")
        assert result.factors is not None
        _require(result.factors.rank <= solution.factors.rank, f"{where}: the rank of the factors has grown")
        if solution.factors.left_grid is not None:
            _require(result.factors.left_grid is solution.factors.left_grid, f"{where}: the factors' grid is gone")
    if solution.grid is not None:
        _require(result.grid is not None, f"{where}: the grid is gone")
        assert result.grid is not None
        _require(
            result.grid.grid == solution.grid.grid
            and np.array_equal(result.grid.scale_OG, solution.grid.scale_OG)
            and np.array_equal(result.grid.zero_point_OG, solution.grid.zero_point_OG),
            f"{where}: the grid of an earlier step changed",
        )


def _check_saliency(
    method: HasSaliency,
    weight_OI: "np.ndarray[tuple[int, int], np.dtype[np.float32]]",
    stats: Mapping[Statistic, Tensor],
    where: str,
) -> None:
    before_OI = weight_OI.copy()
    stats_before = {statistic: value.clone() for statistic, value in stats.items()}
    score_OI = method.saliency(weight_OI, stats, layer="conformance")
    _require(score_OI.shape == weight_OI.shape, f"{where}: the saliency has another shape than the weights")
    _require(score_OI.dtype == np.float32, f"{where}: the saliency is no float32")
    _require(np.isfinite(score_OI).all(), f"{where}: the saliency is NaN or infinite")
    _require(np.array_equal(before_OI, weight_OI), f"{where}: saliency() changed its input")
    for statistic, value in stats.items():
        _require(torch.equal(value, stats_before[statistic]), f"{where}: saliency() changed a statistic")
    again_OI = method.saliency(weight_OI, stats, layer="conformance")
    _require(np.array_equal(score_OI, again_OI), f"{where}: two saliencies of the same layer differ")


def _check_refusals(method: LayerMethod, seed: int) -> None:
    weight_OI, stats = make_problem(4, 64, method.needs(), seed=seed)
    for bad in (np.nan, np.inf):
        broken_OI = weight_OI.copy()
        broken_OI[1, 2] = bad
        _require(
            _raises_naming_layer(method, Solution.dense(broken_OI, _TAPS[64]), stats, NonFiniteError),
            f"a weight that is {bad} raises no NonFiniteError that names the layer",
        )
    for statistic, value in stats.items():
        broken = value.clone()
        broken.view(-1)[min(3, broken.numel() - 1)] = float("nan")
        _require(
            _raises_naming_layer(
                method, Solution.dense(weight_OI, _TAPS[64]), {**stats, statistic: broken}, NonFiniteError
            ),
            f"{statistic} with NaN raises no NonFiniteError that names the layer",
        )
        _require(
            _raises_naming_layer(method, Solution.dense(weight_OI, _TAPS[64]), {}, RarefyError),
            f"a missing {statistic} raises no RarefyError that names the layer",
        )


def _raises_naming_layer(
    method: LayerMethod, solution: Solution, stats: Mapping[Statistic, Tensor], kind: type[RarefyError]
) -> bool:
    try:
        method.compress(solution, stats, layer="the.layer")
    except kind as error:
        return "the.layer" in str(error)
    return False
