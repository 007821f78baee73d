"""Products of activations with packed weights, by the fastest kernel this CPU can run.

Shapes: T rows of activations, O outputs, I inputs.
"""

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rarefy.core.errors import UsageError
from rarefy.kernels.dispatch import Kernel, compiled_kernels, runnable_isas, select
from rarefy.kernels.extension import ISAS, detect_cpu, isa_cap, native
from rarefy.kernels.reference import ReferenceWeights
from rarefy.layouts import Layout

if TYPE_CHECKING:
    from rarefy._native import Weights

Float32Array = NDArray[np.float32]


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
        self.weights: Weights | ReferenceWeights
        module = None if kernel.isa == "numpy" else native()
        if module is None:
            self.weights = ReferenceWeights(layout)
        else:
            self.weights = module.prepare(
                self.format,
                self.isa,
                self.shape[0],
                self.shape[1],
                {name: int(value) for name, value in layout.meta().items() if isinstance(value, int)},
                {name: np.ascontiguousarray(array) for name, array in layout.arrays().items()},
            )
        self.nbytes = int(self.weights.nbytes)

    def __repr__(self) -> str:
        return f"Prepared({self.format}, shape={self.shape}, isa={self.isa}, nbytes={self.nbytes})"

    def matmul(self, x_TI: ArrayLike) -> Float32Array:
        """x @ W^T in float32; see `matmul`."""
        return matmul_many(x_TI, (self,))[0]


def prepare(layout: Layout, *, isa: str | None = None) -> Prepared:
    """Repack a weight for the fastest kernel, or for the one of the given instruction set.

    Args:
        layout: a packed weight.
        isa: "numpy", "reference", "avx2" or "avx512"; default: the fastest this CPU has, capped by RAREFY_ISA.

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
    columns to 8 bits first; docs/formats.md states the arithmetic.

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
    for w in weights:
        if x.shape[-1] != w.shape[1]:
            raise UsageError(
                "matmul", f"x has shape {x.shape}, the weight {w.shape}", allowed=f"a last axis of {w.shape[1]}"
            )
    leading = x.shape[:-1]
    rows_TI = np.ascontiguousarray(x if x.ndim == 2 else x.reshape(prod(leading), x.shape[-1]))
    outputs: list[Float32Array] = []
    native_weights = []
    native_outputs = []
    for w in weights:
        if isinstance(w.weights, ReferenceWeights):
            y_TO = w.weights.matmul(rows_TI)
        else:
            y_TO = np.empty((rows_TI.shape[0], w.shape[0]), np.float32)
            native_weights.append(w.weights)
            native_outputs.append(y_TO)
        outputs.append(y_TO)
    if native_weights:
        module = native()
        assert module is not None
        module.matmul(rows_TI, native_weights, native_outputs)
    return outputs if x.ndim == 2 else [y_TO.reshape(*leading, y_TO.shape[1]) for y_TO in outputs]
