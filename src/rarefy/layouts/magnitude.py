"""How large the numbers of a layout can be, so that products and sums of them are known to be finite."""

from collections.abc import Mapping

import numpy as np

from rarefy.core.errors import LayoutError
from rarefy.core.grids import from_bf16_bits
from rarefy.layouts.base import Array

MAX_CODE = 255


def largest_value(arrays: Mapping[str, Array]) -> float:
    """A bound on the magnitudes that `values` (floats), entries of a `table`, or codes and `scales`, stand for."""
    if "values" in arrays:
        return _largest(arrays["values"])
    largest_scale = _largest(arrays["scales"]) if "scales" in arrays else 1.0
    return largest_scale * (_largest(arrays["table"]) if "table" in arrays else MAX_CODE)


def require_finite(format: str, bound: float) -> None:
    """Refuse a layout whose matrix may not be finite in float32."""
    if not bound <= float(np.finfo(np.float32).max):
        raise LayoutError(f"{format} values", f"magnitudes up to {bound:.3g}", allowed="what float32 can hold")


def _largest(values: Array) -> float:
    if values.size == 0:
        return 0.0
    if values.dtype == np.uint16:
        largest = np.bitwise_and(values, np.uint16(0x7FFF)).max()
        return float(from_bf16_bits(np.array([largest], dtype=np.uint16))[0])
    return float(np.abs(values).max())
