"""Products of activations with packed weights, by the fastest kernel this CPU can run.

Shapes: T rows of activations, O outputs, I inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rarefy.core.errors import UsageError
from rarefy.kernels.dispatch import Kernel, compiled_kernels, runnable_isas, select
from rarefy.kernels.extension import ISAS, detect_cpu, isa_cap, native
from rarefy.kernels.reference import ReferenceWeights
from rarefy.layouts import BlockFloat, BlockInt, Layout, LowRank, Meta, Sum, Tapwise

if TYPE_CHECKING:
    from rarefy._native import Weights

Float32Array = NDArray[np.float32]


@final
@dataclass(frozen=True, slots=True)
class _Parts:
    """What a composed weight is made of.

    Attributes:
        first: x meets it, or with several runs each of x's.
        second: what comes out of `first` meets it; in a sum x does, and the outputs are added.
        num_runs: of x, 1 in a low-rank pair; 0 in a sum.
    """

    first: "Prepared"
    second: "Prepared"
    num_runs: int


@final
class Prepared:
    """A weight repacked for one kernel; immutable, and safe to use from several threads.

    Attributes:
        shape: (O, I).
        format: the format of the layout it was made from.
        isa: the instruction set of its kernel.
        nbytes: bytes it holds in memory.
        read_nbytes: those of them that a product of one row reads.
        weights: of the extension; None where numpy multiplies.
        reference: of numpy; None where the extension multiplies, or numpy with the parts.
        parts: None unless the weight is made of others.
    """

    __slots__ = ("format", "isa", "nbytes", "parts", "read_nbytes", "reference", "shape", "weights")

    def __init__(self, layout: Layout, kernel: Kernel) -> None:
        self.shape = layout.shape
        self.format = layout.format
        self.isa = kernel.isa
        self.nbytes: int
        self.read_nbytes: int
        self.parts: _Parts | None = None
        self.weights: Weights | None = None
        self.reference: ReferenceWeights | None = None
        match layout:
            case LowRank():
                self.parts = _Parts(_prepare_as(layout.right, kernel), _prepare_as(layout.left, kernel), 1)
            case Tapwise():
                right, left = _prepare_as(layout.right, kernel), _prepare_as(layout.left, kernel)
                self.parts = _Parts(right, left, layout.num_runs)
            case Sum():
                first, second = layout.parts
                self.parts = _Parts(_prepare_as(first, kernel), _prepare_as(second, kernel), 0)
        if self.parts is not None:
            self.weights = _composed(self.parts)
            self.nbytes = self.parts.first.nbytes + self.parts.second.nbytes
            self.read_nbytes = self.parts.first.read_nbytes + self.parts.second.read_nbytes
            return
        match _repack(layout, kernel):
            case ReferenceWeights() as reference:
                self.reference = reference
                self.nbytes = self.read_nbytes = reference.nbytes
            case weights:
                self.weights, self.nbytes, self.read_nbytes = weights, int(weights.nbytes), int(weights.read_nbytes)

    def __repr__(self) -> str:
        return f"Prepared({self.format}, shape={self.shape}, isa={self.isa}, nbytes={self.nbytes})"

    @property
    def tap_factors(self) -> "tuple[Prepared, Prepared] | None":
        """The right and the left factor of a tapwise weight, which a convolution meets one after the other."""
        if self.parts is None or not self.format.startswith("tapwise"):
            return None
        return self.parts.first, self.parts.second

    @property
    def takes_taps(self) -> bool:
        """Whether `matmul_taps` will do: activations that x itself is quantized to, in blocks of 64 columns."""
        match self.parts:
            case None:
                return self.weights is not None and self.weights.is_integer
            case _Parts(first, second, 0):
                return first.takes_taps and second.takes_taps
            case _Parts(first, _, _):
                return self.tap_factors is None and first.takes_taps

    def matmul(self, x_TI: ArrayLike) -> Float32Array:
        """x @ W^T in float32; see `matmul`."""
        weights = self.weights
        if weights is not None and (y_TO := weights.multiply(x_TI)) is not None:
            return y_TO
        return matmul_many(x_TI, (self,))[0]

    def matmul_into(self, x_TI: Float32Array, y_TO: Float32Array) -> None:
        """The same into memory that is there; x and y are C-contiguous."""
        module = None if self.weights is None else native()
        if module is None:
            y_TO[...] = self.matmul(x_TI)
        else:
            module.matmul(x_TI, [self.weights], [y_TO])

    def matmul_taps(
        self,
        x_PC: Float32Array,
        row_starts_T: NDArray[np.int64],
        tap_offsets_K: NDArray[np.int64],
        y_TO: Float32Array,
    ) -> None:
        """The product of rows that are pixels side by side, of which each is quantized once.

        Args:
            x_PC: pixels, float32, C-contiguous; the number of channels C is a multiple of 64, and I = K * C.
            row_starts_T: for each row the place that its taps count from.
            tap_offsets_K: where each tap lies from there.
            y_TO: float32, C-contiguous; becomes the bits of `matmul` on the rows written out.
        """
        match self.parts:
            case None:
                module = native()
                assert module is not None
                module.matmul_taps(x_PC, row_starts_T, tap_offsets_K, self.weights, y_TO)
            case _Parts(first, second, 0):
                other_TO = np.empty_like(y_TO)
                first.matmul_taps(x_PC, row_starts_T, tap_offsets_K, y_TO)
                second.matmul_taps(x_PC, row_starts_T, tap_offsets_K, other_TO)
                with np.errstate(over="ignore", invalid="ignore"):
                    np.add(y_TO, other_TO, out=y_TO)
            case _Parts(first, second, _):
                inner_TK = np.empty((len(row_starts_T), first.shape[0]), np.float32)
                first.matmul_taps(x_PC, row_starts_T, tap_offsets_K, inner_TK)
                second.matmul_into(inner_TK, y_TO)


def _prepare_as(part: Layout, kernel: Kernel) -> Prepared:
    return Prepared(part, Kernel(kernel.op, part.format, kernel.isa))


def _composed(parts: _Parts) -> "Weights | None":
    weights = parts.first.weights, parts.second.weights
    module = None if None in weights else native()
    if module is None:
        return None
    made: Weights = module.chain(*weights, parts.num_runs) if parts.num_runs else module.add(*weights)
    return made


def _repack(layout: Layout, kernel: Kernel) -> "Weights | ReferenceWeights":
    module = None if kernel.isa == "numpy" else native()
    if isinstance(layout, BlockFloat | BlockInt) and (module is None or not _has_half_cells(layout.block_shape)):
        layout = layout.as_bitmask()
    if module is None:
        return ReferenceWeights(layout)
    weights: Weights = module.prepare(
        layout.format,
        kernel.isa,
        layout.shape[0],
        layout.shape[1],
        _integers(layout.meta()),
        {name: np.ascontiguousarray(array) for name, array in layout.arrays().items()},
    )
    return weights


def _has_half_cells(block_shape: tuple[int, int]) -> bool:
    """Whether blocks are made of 16 outputs by 32 inputs, as native/matmul/encodings/block.h needs them."""
    return block_shape[0] % 16 == 0 and block_shape[1] % 32 == 0


def _integers(meta: Meta) -> dict[str, int]:
    """Integers of the metadata; those of a list get its name and their place in it."""
    integers = {name: int(value) for name, value in meta.items() if isinstance(value, int)}
    for name, value in meta.items():
        if isinstance(value, list) and name != "shape":
            integers |= {f"{name}_{i}": item for i, item in enumerate(value)}
    return integers


def prepare(layout: Layout, *, isa: str | None = None) -> Prepared:
    """Repack a weight for the fastest kernel, or for the one of the given instruction set.

    Args:
        layout: a packed weight.
        isa: one of `ISAS`; default: the fastest this CPU has, capped by RAREFY_ISA.

    Raises:
        UsageError: the instruction set is unknown, or this machine or build does not have it.
    """
    if isa is None:
        return Prepared(layout, select("matmul", layout.format, layout.shape, detect_cpu(), cap=isa_cap()))
    kernel = Kernel("matmul", layout.format, isa)
    available = [
        name
        for name in runnable_isas(detect_cpu())
        if name == "numpy" or Kernel("matmul", layout.format, name) in compiled_kernels()
    ]
    if isa not in available:
        found = f"{isa!r} is not available on this machine" if isa in ISAS else f"{isa!r} is not an instruction set"
        raise UsageError("instruction set", found, allowed=", ".join(available))
    return Prepared(layout, kernel)


def matmul(x_TI: ArrayLike, w: Layout | Prepared) -> Float32Array:
    """y = x @ W^T.

    Float layouts: float32 sums of exact products' roundings; with bfloat16 weights of x rounded to bfloat16. Int
    layouts: each row of x is quantized in blocks of 64 columns to 8 bits first. Low-rank pairs: x with the right
    factor, and what comes out with the left one; with tapwise ones each run of x meets the right factor. Sums: the
    products with both parts, added in float32. docs/format.md states the arithmetic.

    Args:
        x_TI: activations, (..., I), converted to float32.
        w: a weight; prepare it once if it is used more than once.

    Returns:
        float32 (..., O).

    Raises:
        UsageError: the last axis of x is not I.
    """
    return matmul_many(x_TI, (w if isinstance(w, Prepared) else prepare(w),))[0]


def matmul_many(x_TI: ArrayLike, weights: Sequence[Prepared]) -> list[Float32Array]:
    """Products of the same activations with several weights, in one fork-join of the threads.

    Args:
        x_TI: activations, (..., I), converted to float32.
        weights: prepared weights, all with I inputs.

    Returns:
        One float32 (..., O) for each weight; the same bits as separate calls.

    Raises:
        UsageError: the last axis of x is not the I of each weight.
    """
    operators = [w.weights for w in weights]
    module = None if None in operators else native()
    if module is not None:
        made: list[Float32Array] | None = module.multiply(x_TI, operators)
        if made is not None:
            return made
    x = np.asarray(x_TI, dtype=np.float32)
    if x.ndim == 0:
        raise UsageError("matmul", "x is a scalar", allowed="an array with at least one axis")
    for w in weights:
        if x.shape[-1] != w.shape[1]:
            raise UsageError(
                "matmul", f"x has shape {x.shape}, the weight {w.shape}", allowed=f"a last axis of {w.shape[1]}"
            )
    x = np.require(x, requirements=["C", "A"])
    if module is not None and operators:
        made = module.multiply(x, operators)
        assert made is not None
        return made
    leading = x.shape[:-1]
    rows_TI = x.reshape(prod(leading), x.shape[-1])
    return [_product(rows_TI, w).reshape(*leading, w.shape[0]) for w in weights]


def _product(x_TI: Float32Array, w: Prepared) -> Float32Array:
    """The product where some weight of a call is numpy's, part by part."""
    match w.parts:
        case None if w.reference is not None:
            return w.reference.matmul(x_TI)
        case _Parts(first, second, 0) if w.weights is None:
            with np.errstate(over="ignore", invalid="ignore"):
                y_TO: Float32Array = _product(x_TI, first) + _product(x_TI, second)
                return y_TO
        case _Parts(first, second, num_runs) if w.weights is None:
            runs = x_TI.reshape(x_TI.shape[0] * num_runs, first.shape[1])
            return _product(_product(runs, first).reshape(x_TI.shape[0], second.shape[1]), second)
        case _:
            return w.matmul(x_TI)
