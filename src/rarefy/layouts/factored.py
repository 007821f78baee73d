"""Solutions with factors: the pair alone, or the sum of it and a matrix. Shape suffixes: O out, I in, K rank."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from rarefy.core.errors import LayoutError, NonFiniteError
from rarefy.core.grids import FittedGrid, Float32Array, IntGrid, quantize, to_bf16_bits
from rarefy.core.ranks import TapRanks
from rarefy.core.solution import Factors, Solution
from rarefy.core.tap_factors import TapFactors
from rarefy.layouts import base
from rarefy.layouts.dense_float import DenseFloat
from rarefy.layouts.dense_int import DenseInt
from rarefy.layouts.low_rank import FACTORS, LowRank
from rarefy.layouts.scales import stored_grid
from rarefy.layouts.sum import Part, Sum
from rarefy.layouts.tapwise import Tapwise

FloatFormat = Literal["bf16", "f32"]


def factor_format(grid: IntGrid | None) -> str:
    """The format of a pair whose factors lie on a grid.

    Raises:
        LayoutError: there is none.
    """
    name = "lowrank-bf16-v1" if grid is None else f"lowrank-int{grid.num_bits}-v1"
    if name not in FACTORS:
        raise LayoutError("factors", f"values of {name.split('-')[1]}", allowed=", ".join(FACTORS))
    return name


def choose_factored(
    shape: tuple[int, int], rank: int | TapRanks, grid: IntGrid | None, matrix_bytes: int | None, dense: tuple[str, int]
) -> tuple[str, int]:
    """Which format `pack` stores factors in, and how many bytes that takes; see packing.choose_format.

    Args:
        shape: (O, I).
        rank: K, or those of factors of taps.
        grid: of the factors, None for floats.
        matrix_bytes: of the matrix beside them; None: there is none.
        dense: format and bytes of the matrix that all of it makes.
    """
    if isinstance(rank, TapRanks):
        format = "tapwise-bf16-v1"
        spec = Tapwise.array_spec(format, {"shape": list(shape), **dataclasses.asdict(rank)})
    else:
        format = factor_format(grid)
        meta: dict[str, object] = {"shape": list(shape), "rank": rank}
        if grid is not None:
            meta |= {"group_size": grid.group_size, "symmetric": grid.symmetric}
        spec = LowRank.array_spec(format, meta)
    num_bytes = sum(dtype.itemsize * int(np.prod(size, dtype=object)) for dtype, size in spec.values())
    name, num_bytes = (format, num_bytes) if matrix_bytes is None else ("sum-v1", num_bytes + matrix_bytes)
    return (name, num_bytes) if num_bytes < dense[1] else dense


def pack_factored(
    solution: Solution,
    factors: Factors | TapFactors,
    pack_matrix: Callable[[Solution, FloatFormat], Part],
    float_format: FloatFormat,
) -> Part | Sum:
    """Store factors and, where there is one, the matrix beside them, or V itself where that takes fewer bytes."""
    pair = _pack_taps(factors) if isinstance(factors, TapFactors) else _pack_pair(factors)
    result = pair if solution.only_factors else Sum(pair, pack_matrix(solution, float_format))
    dense_bytes = solution.weight_OI.size * (2 if float_format == "bf16" else 4)
    if result.nbytes < dense_bytes:
        return result
    return pack_matrix(Solution.dense(solution.value_OI), float_format)


def unpack_factors(pair: LowRank | Tapwise) -> Factors | TapFactors:
    """The factors that a pair stores."""
    if isinstance(pair, Tapwise):
        sides = (pair.left.left, pair.left.right) if isinstance(pair.left, LowRank) else (pair.left, None)
        core = None if sides[1] is None else sides[1].to_dense()
        return TapFactors(sides[0].to_dense(), core, pair.right.to_dense(), pair.num_runs)
    grids = [side.fitted if isinstance(side, DenseInt) else None for side in (pair.left, pair.right)]
    return Factors(pair.left.to_dense(), pair.right.to_dense(), *grids)


def _pack_pair(factors: Factors) -> LowRank:
    factor_format(None if factors.left_grid is None else factors.left_grid.grid)
    return LowRank(_pack(factors.left_OK, factors.left_grid), _pack(factors.right_KI, factors.right_grid))


def _pack_taps(factors: TapFactors) -> Tapwise:
    left, right = _bf16(factors.left_OA), _bf16(factors.right_RC)
    if factors.core_AM is None:
        return Tapwise(left, right, factors.num_runs)
    return Tapwise(LowRank(left, _bf16(factors.core_AM)), right, factors.num_runs)


def _pack(weight: Float32Array, fitted: FittedGrid | None) -> DenseFloat | DenseInt:
    if fitted is not None:
        codes = base.pack_codes(quantize(weight, fitted), fitted.grid.num_bits)
        return DenseInt((weight.shape[0], weight.shape[1]), fitted.grid, codes, *stored_grid(fitted))
    return _bf16(weight)


def _bf16(weight: Float32Array) -> DenseFloat:
    bits = to_bf16_bits(weight)
    if not base.all_finite_bf16(bits):
        raise NonFiniteError("factors", "a value too large for bfloat16", hint="the input model is likely damaged")
    return DenseFloat(bits)
