"""Solutions with factors: the pair alone, or the sum of it and a matrix. Shape suffixes: O out, I in, K rank."""

from collections.abc import Callable
from typing import Literal

import numpy as np

from rarefy.core.errors import LayoutError, NonFiniteError
from rarefy.core.grids import FittedGrid, Float32Array, IntGrid, quantize, to_bf16_bits
from rarefy.core.solution import Factors, Solution
from rarefy.layouts import base
from rarefy.layouts.dense_float import DenseFloat
from rarefy.layouts.dense_int import DenseInt
from rarefy.layouts.low_rank import FACTORS, LowRank
from rarefy.layouts.scales import stored_grid
from rarefy.layouts.sum import Part, Sum

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
    shape: tuple[int, int], rank: int, grid: IntGrid | None, matrix_bytes: int | None, dense: tuple[str, int]
) -> tuple[str, int]:
    """Which format `pack` stores factors in, and how many bytes that takes; see packing.choose_format.

    Args:
        shape: (O, I).
        rank: K.
        grid: of the factors, None for floats.
        matrix_bytes: of the matrix beside them; None: there is none.
        dense: format and bytes of the matrix that all of it makes.
    """
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
    factors: Factors,
    pack_matrix: Callable[[Solution, FloatFormat], Part],
    float_format: FloatFormat,
) -> Part | Sum:
    """Store factors and, where there is one, the matrix beside them, or V itself where that takes fewer bytes."""
    grid = None if factors.left_grid is None else factors.left_grid.grid
    factor_format(grid)
    pair = LowRank(_pack(factors.left_OK, factors.left_grid), _pack(factors.right_KI, factors.right_grid))
    result = pair if solution.only_factors else Sum(pair, pack_matrix(solution, float_format))
    dense_bytes = solution.weight_OI.size * (2 if float_format == "bf16" else 4)
    if result.nbytes < dense_bytes:
        return result
    return pack_matrix(Solution.dense(solution.value_OI), float_format)


def unpack_factors(pair: LowRank) -> Factors:
    """The factors that a pair stores."""
    grids = [side.fitted if isinstance(side, DenseInt) else None for side in (pair.left, pair.right)]
    return Factors(pair.left.to_dense(), pair.right.to_dense(), *grids)


def _pack(weight: Float32Array, fitted: FittedGrid | None) -> DenseFloat | DenseInt:
    if fitted is not None:
        codes = base.pack_codes(quantize(weight, fitted), fitted.grid.num_bits)
        return DenseInt((weight.shape[0], weight.shape[1]), fitted.grid, codes, *stored_grid(fitted))
    bits = to_bf16_bits(weight)
    if not base.all_finite_bf16(bits):
        raise NonFiniteError("factors", "a value too large for bfloat16", hint="the input model is likely damaged")
    return DenseFloat(bits)
