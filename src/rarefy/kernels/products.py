"""Products of activations with packed weights, by the fastest kernel this CPU can run.

Shapes: T rows of activations, O outputs, I inputs.
"""

from collections.abc import Iterator, Sequence
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
class _Chain:
    """x meets `inner`, and what comes out meets `outer`: a low-rank pair."""

    inner: "Prepared"
    outer: "Prepared"


@final
@dataclass(frozen=True, slots=True)
class _Tapwise:
    """Each run of x meets `inner`, and what comes out of all runs meets `outer`."""

    inner: "Prepared"
    outer: "Prepared"


@final
@dataclass(frozen=True, slots=True)
class _Sum:
    """x meets both, and the outputs are added."""

    first: "Prepared"
    second: "Prepared"


@final
class Prepared:
    """A weight repacked for one kernel; immutable, and safe to use from several threads.

    Attributes:
        shape: (O, I).
        format: the format of the layout it was made from.
        isa: the instruction set of its kernel.
        nbytes: bytes it holds in memory.
    """

    __slots__ = ("format", "isa", "nbytes", "shape", "weights")

    def __init__(self, layout: Layout, kernel: Kernel) -> None:
        self.shape = layout.shape
        self.format = layout.format
        self.isa = kernel.isa
        self.nbytes: int
        self.weights: Weights | ReferenceWeights | _Chain | _Tapwise | _Sum
        match layout:
            case LowRank():
                self.weights = _Chain(*(_prepare_as(part, kernel) for part in (layout.right, layout.left)))
                self.nbytes = self.weights.inner.nbytes + self.weights.outer.nbytes
            case Tapwise():
                self.weights = _Tapwise(*(_prepare_as(part, kernel) for part in (layout.right, layout.left)))
                self.nbytes = self.weights.inner.nbytes + self.weights.outer.nbytes
            case Sum():
                self.weights = _Sum(*(_prepare_as(part, kernel) for part in layout.parts))
                self.nbytes = self.weights.first.nbytes + self.weights.second.nbytes
            case _:
                self.weights = _repack(layout, kernel)
                self.nbytes = int(self.weights.nbytes)

    def __repr__(self) -> str:
        return f"Prepared({self.format}, shape={self.shape}, isa={self.isa}, nbytes={self.nbytes})"

    @property
    def tap_factors(self) -> "tuple[Prepared, Prepared] | None":
        """The right and the left factor of a tapwise weight, which a convolution meets one after the other."""
        return (self.weights.inner, self.weights.outer) if isinstance(self.weights, _Tapwise) else None

    @property
    def takes_taps(self) -> bool:
        """Whether `matmul_taps` will do: activations that x itself is quantized to, in blocks of 64 columns."""
        match self.weights:
            case ReferenceWeights() | _Tapwise():
                return False
            case _Chain(inner, _):
                return inner.takes_taps
            case _Sum(first, second):
                return first.takes_taps and second.takes_taps
            case weights:
                return bool(weights.is_integer)

    def matmul(self, x_TI: ArrayLike) -> Float32Array:
        """x @ W^T in float32; see `matmul`."""
        return matmul_many(x_TI, (self,))[0]

    def matmul_taps(
        self, x_PC: Float32Array, row_starts_T: NDArray[np.int64], tap_offsets_K: NDArray[np.int64]
    ) -> Float32Array:
        """The product of rows that are pixels side by side, of which each is quantized once.

        Args:
            x_PC: pixels, float32, C-contiguous; the number of channels C is a multiple of 64, and I = K * C.
            row_starts_T: for each row the place that its taps count from.
            tap_offsets_K: where each tap lies from there.

        Returns:
            float32 (T, O): the bits of `matmul` on the rows written out.
        """
        match self.weights:
            case _Chain(inner, outer):
                return outer.matmul(inner.matmul_taps(x_PC, row_starts_T, tap_offsets_K))
            case _Sum(first, second):
                y_TO = first.matmul_taps(x_PC, row_starts_T, tap_offsets_K)
                with np.errstate(over="ignore", invalid="ignore"):
                    return np.add(y_TO, second.matmul_taps(x_PC, row_starts_T, tap_offsets_K), out=y_TO)
            case weights:
                module = native()
                assert module is not None
                y_TO = np.empty((len(row_starts_T), self.shape[0]), np.float32)
                module.matmul_taps(x_PC, row_starts_T, tap_offsets_K, weights, y_TO)
                return y_TO


def _prepare_as(part: Layout, kernel: Kernel) -> Prepared:
    return Prepared(part, Kernel(kernel.op, part.format, kernel.isa))


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

    Float layouts: float32 sums of exact products' roundings. Int layouts: each row of x is quantized in blocks of 64
    columns to 8 bits first. Low-rank pairs: x with the right factor, and what comes out with the left one; with
    tapwise ones each run of x meets the right factor. Sums: the
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
    x = np.asarray(x_TI, dtype=np.float32)
    if x.ndim == 0:
        raise UsageError("matmul", "x is a scalar", allowed="an array with at least one axis")
    composed = False
    for w in weights:
        composed |= isinstance(w.weights, _Chain | _Tapwise | _Sum)
        if x.shape[-1] != w.shape[1]:
            raise UsageError(
                "matmul", f"x has shape {x.shape}, the weight {w.shape}", allowed=f"a last axis of {w.shape[1]}"
            )
    leading = x.shape[:-1]
    rows_TI = np.ascontiguousarray(x if x.ndim == 2 else x.reshape(prod(leading), x.shape[-1]))
    if composed:
        results = iter(_products(rows_TI, [part for w in weights for part in _first_parts(w)]))
        outputs = [_finish(w, rows_TI, results) for w in weights]
    else:
        outputs = _products(rows_TI, weights)
    return outputs if x.ndim == 2 else [y_TO.reshape(*leading, y_TO.shape[1]) for y_TO in outputs]


def _first_parts(w: Prepared) -> list[Prepared]:
    """The weights that x itself meets, so that those of all products share one fork-join."""
    match w.weights:
        case _Chain(inner, _):
            return [inner]
        case _Tapwise():
            return []
        case _Sum(first, second):
            return _first_parts(first) + _first_parts(second)
        case _:
            return [w]


def _finish(w: Prepared, x_TI: Float32Array, results: Iterator[Float32Array]) -> Float32Array:
    """Make the product out of those with its first parts, which come in their order."""
    match w.weights:
        case _Chain(_, outer):
            return _products(next(results), [outer])[0]
        case _Tapwise(inner, outer):
            if not x_TI.size:
                return np.zeros((x_TI.shape[0], w.shape[0]), np.float32)
            runs = inner.matmul(x_TI.reshape(-1, inner.shape[1]))
            return outer.matmul(runs.reshape(x_TI.shape[0], outer.shape[1]))
        case _Sum(first, second):
            y_TO = _finish(first, x_TI, results)
            with np.errstate(over="ignore", invalid="ignore"):
                return np.add(y_TO, _finish(second, x_TI, results), out=y_TO)
        case _:
            return next(results)


def _products(x_TI: Float32Array, weights: Sequence[Prepared]) -> list[Float32Array]:
    outputs: list[Float32Array] = []
    native_weights = []
    native_outputs = []
    for w in weights:
        if isinstance(w.weights, ReferenceWeights):
            y_TO = w.weights.matmul(x_TI)
        else:
            y_TO = np.empty((x_TI.shape[0], w.shape[0]), np.float32)
            native_weights.append(w.weights)
            native_outputs.append(y_TO)
        outputs.append(y_TO)
    if native_weights:
        module = native()
        assert module is not None
        module.matmul(x_TI, native_weights, native_outputs)
    return outputs
