"""Many small square matrices at once, for oBERT: sums of outer products, inverses, and dropping entries from them.

Sums are kept as lower triangles, row after row. Shape suffixes: N blocks, B columns of a block, T numbers of a
triangle.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rarefy.kernels.extension import extension_status, isa_cap, native

Float32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


def has_fisher_kernels() -> bool:
    """Whether the functions below can run: compiled kernels, and RAREFY_ISA is not numpy.

    Raises:
        UsageError: RAREFY_ISA names no instruction set.
    """
    return isa_cap() != "numpy" and extension_status()[0]


def add_outer_products(
    rows: Sequence[npt.NDArray[np.uint16]] | Sequence[Float32Array], size: int, total_NT: Float32Array
) -> None:
    """Add v v^T of the vectors of each block, in place, row after row.

    Args:
        rows: each with the vectors of all blocks, (N * B,); float32, or bfloat16 bits as uint16.
        size: B.
        total_NT: the sums.
    """
    module = native()
    assert module is not None
    add = module.fisher_add_bf16 if rows and rows[0].dtype == np.uint16 else module.fisher_add_float
    add(rows, size, total_NT)


def invert_blocks(block_NT: Float32Array, size: int, scale: float, damp: float) -> Float32Array:
    """(block / scale + damp I)^-1 of positive semidefinite blocks (N, B, B), computed in float64; B is `size`."""
    module = native()
    assert module is not None
    inverse_NBB = np.empty((len(block_NT), size, size), dtype=np.float32)
    module.fisher_invert(block_NT, scale, damp, inverse_NBB)
    return inverse_NBB


def costs_in_order(weight_NB: Float32Array, inverse_NBB: Float32Array, free_NB: BoolArray) -> Float32Array:
    """Drop the cheapest free entry of every block until none is left; what each cost then, or one before it if more.

    An entry costs w^2 / [F^-1]_ii, and those left move to make up for it. What is not free costs 0.
    """
    module = native()
    assert module is not None
    cost_NB = np.empty_like(weight_NB)
    module.fisher_costs(weight_NB, inverse_NBB, free_NB, cost_NB)
    return cost_NB


def drop_entries(drop_NB: BoolArray, weight_NB: Float32Array, inverse_NBB: Float32Array) -> None:
    """Drop entries, in place: they become 0, the others move, and the inverses are then those of the others' blocks."""
    module = native()
    assert module is not None
    module.fisher_drop(drop_NB, weight_NB, inverse_NBB)
