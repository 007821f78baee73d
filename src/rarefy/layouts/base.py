"""What every storage layout offers, and the checks that hostile metadata and arrays must pass.

Shape suffixes: O out, I in, G groups, B bytes of a row.
"""

import math
from collections.abc import Mapping
from typing import Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from rarefy.core.errors import LayoutError, PatternError
from rarefy.core.grids import MAX_SCALE, MIN_SCALE, NUM_BITS, Float32Array, IntGrid, chunks, to_bf16_bits
from rarefy.core.patterns import NM

Array = npt.NDArray[np.generic]
_Scalar = TypeVar("_Scalar", bound=np.generic)
MetaValue = int | bool | None | list[int] | list[dict[str, object]]
Meta = Mapping[str, object]
ArraySpec = dict[str, tuple[np.dtype[np.generic], tuple[int, ...]]]

MAX_DIMENSION = 2**31 - 1

UINT8: np.dtype[np.generic] = np.dtype(np.uint8)
UINT16: np.dtype[np.generic] = np.dtype(np.uint16)
FLOAT32: np.dtype[np.generic] = np.dtype(np.float32)

_BF16_EXPONENT = np.uint16(0x7F80)
_MIN_SCALE_BITS, _MAX_SCALE_BITS = (int(b) for b in to_bf16_bits(np.array([MIN_SCALE, MAX_SCALE], dtype=np.float32)))
POPCOUNT = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


class Layout(Protocol):
    """A weight matrix (O, I) as it lies in memory and on disk: pure data. One final class per packing."""

    @property
    def format(self) -> str:
        """Key of FORMATS, e.g. "bitmask-int4-v1": written to disk, never reused for other bytes."""

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""

    def to_dense(self) -> Float32Array:
        """The matrix as float32 (O, I)."""

    def rows(self, indices: npt.ArrayLike) -> Float32Array:
        """Rows of the matrix (an embedding look-up): integer indices of shape S give float32 (*S, I)."""

    def arrays(self) -> dict[str, Array]:
        """The arrays to store, by name."""

    def meta(self) -> dict[str, MetaValue]:
        """What the arrays do not say, as JSON values; always contains "shape"."""

    @classmethod
    def array_spec(cls, format: str, meta: Meta) -> ArraySpec:
        """Dtype and shape of each array of a layout with this format and metadata.

        Raises:
            LayoutError: format or metadata are not valid.
        """

    @classmethod
    def from_arrays(cls, format: str, meta: Meta, arrays: Mapping[str, Array]) -> Self:
        """Build a layout from stored arrays, trusting nothing.

        Raises:
            LayoutError: anything contradicts the format's specification.
        """


def bits_of(format: str, prefix: str) -> int:
    """Read num_bits from the name of an integer format, e.g. 4 from "dense-int4-v1"."""
    names = {f"{prefix}-int{num_bits}-v1": num_bits for num_bits in NUM_BITS}
    if format not in names:
        raise LayoutError("format", repr(format), allowed=", ".join(names))
    return names[format]


def check_format(format: str, *allowed: str) -> None:
    """Refuse a format name that the class does not read."""
    if format not in allowed:
        raise LayoutError("format", repr(format), allowed=", ".join(allowed))


def read_shape(format: str, meta: Meta, *other_keys: str) -> tuple[int, int]:
    """Check that the metadata has exactly `shape` and the other keys, and return the shape."""
    expected = {"shape", *other_keys}
    if set(meta) != expected:
        raise LayoutError(format, f"metadata fields {sorted(map(str, meta))}", allowed=f"exactly {sorted(expected)}")
    shape = meta["shape"]
    if not isinstance(shape, list | tuple) or len(shape) != 2:
        raise LayoutError(format, f"shape {shape!r:.60}", allowed="two integers [O, I]")
    rows, width = (read_integer(format, "shape", size, 0, MAX_DIMENSION) for size in shape)
    return rows, width


def read_grid(format: str, num_bits: int, meta: Meta) -> IntGrid:
    """Read group_size and symmetric."""
    try:
        return IntGrid(num_bits, meta["group_size"], meta["symmetric"])  # type: ignore[arg-type]  # IntGrid checks them
    except PatternError as error:
        raise LayoutError(format, error.found, allowed=error.allowed) from error


def read_pattern(format: str, meta: Meta) -> NM:
    """Read keep and group."""
    try:
        return NM(meta["keep"], meta["group"])  # type: ignore[arg-type]  # NM checks them
    except PatternError as error:
        raise LayoutError(format, error.found, allowed=error.allowed) from error


def read_num_values(format: str, meta: Meta, shape: tuple[int, int]) -> int:
    """Read num_values."""
    return read_integer(format, "num_values", meta["num_values"], 0, shape[0] * shape[1])


def read_group_size(format: str, meta: Meta) -> int | None:
    """Read group_size of a format without zero points."""
    return read_grid(format, 8, {"group_size": meta["group_size"], "symmetric": True}).group_size


def num_groups(width: int, group_size: int | None) -> int:
    """Number of scales of one row."""
    return 1 if group_size is None else -(-width // group_size)


def scales_spec(group_size: int | None, shape: tuple[int, int]) -> ArraySpec:
    """One scale per group."""
    return {"scales": (UINT16, (shape[0], num_groups(shape[1], group_size)))}


def grid_spec(grid: IntGrid, shape: tuple[int, int]) -> ArraySpec:
    """Scales, and zero points of an asymmetric grid."""
    spec = scales_spec(grid.group_size, shape)
    if not grid.symmetric:
        spec["zero_points"] = (UINT8, spec["scales"][1])
    return spec


def mask_spec(shape: tuple[int, int]) -> ArraySpec:
    """One bit per entry, rows padded to whole bytes."""
    return {"mask": (UINT8, (shape[0], -(-shape[1] // 8)))}


def check_arrays(format: str, spec: ArraySpec, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Check names, dtypes and shapes; return the arrays, C-contiguous and aligned."""
    if set(arrays) != set(spec):
        raise LayoutError(format, f"arrays {sorted(map(str, arrays))}", allowed=f"exactly {sorted(spec)}")
    for name, (dtype, shape) in spec.items():
        array = arrays[name]
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
            found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise LayoutError(f"{format} {name}", found, allowed=f"{dtype} {shape}")
    return {name: np.require(arrays[name], requirements=["C", "A"]) for name in spec}


def check_finite_bf16(format: str, values: npt.NDArray[np.uint16]) -> None:
    """Refuse bfloat16 bits of NaN or infinity."""
    if not all_finite_bf16(values):
        raise LayoutError(f"{format} values", "NaN or infinity", allowed="finite numbers")


def all_finite_bf16(values: npt.NDArray[np.uint16]) -> bool:
    """Whether no bfloat16 (given as bits, C-contiguous) is NaN or infinite."""
    flat = values.reshape(-1)
    return not any(np.any((flat[c] & _BF16_EXPONENT) == _BF16_EXPONENT) for c in chunks(flat.shape[0], 1))


def check_scales(format: str, arrays: Mapping[str, Array]) -> None:
    """Scales are positive, normal and at most 2**119."""
    scales = arrays["scales"]
    if np.any((scales < _MIN_SCALE_BITS) | (scales > _MAX_SCALE_BITS)):  # type: ignore[operator]  # uint16 by its spec
        raise LayoutError(f"{format} scales", "a scale out of range", allowed="bfloat16 in [2**-126, 2**119]")


def check_grid_arrays(format: str, grid: IntGrid, arrays: Mapping[str, Array]) -> None:
    """Scales are in range; zero points are codes."""
    check_scales(format, arrays)
    if not grid.symmetric and np.any(arrays["zero_points"] > grid.max_code):  # type: ignore[operator]  # uint8 by its spec
        raise LayoutError(f"{format} zero_points", "a zero point out of range", allowed=f"[0, {grid.max_code}]")


def check_mask(format: str, mask_OB: npt.NDArray[np.uint8], width: int) -> None:
    """Padding bits of every row are zero."""
    if width % 8 and np.any(mask_OB[:, -1] >> np.uint8(width % 8)):
        raise LayoutError(f"{format} mask", "a padding bit that is 1", allowed="0 in the bits beyond the last column")


def check_popcount(format: str, mask_OB: npt.NDArray[np.uint8], num_values: int) -> None:
    """As many bits are set as values are stored."""
    found = int(POPCOUNT[mask_OB].sum(dtype=np.int64))
    if found != num_values:
        raise LayoutError(f"{format} mask", f"{found} bits set", allowed=f"{num_values}, the number of values")


def check_group_counts(format: str, mask_OB: npt.NDArray[np.uint8], width: int, pattern: NM) -> None:
    """Every group of every row has exactly the bits that the pattern keeps."""
    kept_OG = pattern.count_kept_OG(unpack_mask(mask_OB, width))
    if np.any(kept_OG != pattern.keep_counts_G(width)):
        raise LayoutError(f"{format} mask", "a group with a wrong number of bits set", allowed=str(pattern))


def take_kept(values_OI: npt.NDArray[_Scalar], mask_OI: npt.NDArray[np.bool_]) -> npt.NDArray[_Scalar]:
    """The entries that the mask marks, in row-major order: `values_OI[mask_OI]`, several times as fast."""
    # in chunks, since compress makes an int64 of every position
    parts = [np.compress(mask_OI[c].ravel(), values_OI[c].ravel()) for c in chunks(*mask_OI.shape)]
    return np.concatenate(parts) if parts else values_OI.reshape(-1)


def pack_mask(mask_OI: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Column i of a row becomes bit i % 8 (least significant first) of byte i // 8."""
    return np.packbits(mask_OI, axis=1, bitorder="little")


def unpack_mask(mask_OB: npt.NDArray[np.uint8], width: int) -> npt.NDArray[np.bool_]:
    """Inverse of pack_mask: bool (O, width)."""
    return np.unpackbits(mask_OB, axis=1, count=width, bitorder="little").view(np.bool_)


def code_bytes(length: int, num_bits: int) -> int:
    """Bytes of a run of codes."""
    return -(-length * num_bits // 8)


def pack_codes(codes: npt.NDArray[np.uint8], num_bits: int) -> npt.NDArray[np.uint8]:
    """Codes of 1, 2, 3, 4 or 8 bits along the last axis as a run of bits, least significant first, padded with 0."""
    codes_per_unit, unit_bytes = _unit(num_bits)
    *leading, length = codes.shape
    units = np.zeros((*leading, -(-length // codes_per_unit)), dtype=np.uint8 if unit_bytes == 1 else "<u4")
    for k in range(codes_per_unit):
        part = codes[..., k::codes_per_unit].astype(units.dtype)
        units[..., : part.shape[-1]] |= part << units.dtype.type(k * num_bits)
    if unit_bytes == 1:
        return units.view(np.uint8)
    # the last byte of each four is 0
    run = (
        units.view(np.uint8).reshape(*units.shape, 4)[..., :unit_bytes].reshape(*leading, units.shape[-1] * unit_bytes)
    )
    return np.ascontiguousarray(run[..., : code_bytes(length, num_bits)])


def unpack_codes(packed: npt.NDArray[np.uint8], length: int, num_bits: int) -> npt.NDArray[np.uint8]:
    """Inverse of pack_codes: uint8 (..., length); the array itself where a code is a byte."""
    if num_bits == 8:
        return packed
    codes_per_unit, unit_bytes = _unit(num_bits)
    leading, num_units = packed.shape[:-1], -(-length // codes_per_unit)
    if unit_bytes == 1:
        units: npt.NDArray[np.uint8 | np.uint32] = packed
    else:
        units = np.zeros((*leading, num_units), dtype=np.uint32)
        for k in range(unit_bytes):
            part = packed[..., k::unit_bytes].astype(np.uint32)
            units[..., : part.shape[-1]] |= part << np.uint32(8 * k)
    codes = np.empty((*leading, num_units * codes_per_unit), dtype=np.uint8)
    for k in range(codes_per_unit):
        codes[..., k::codes_per_unit] = units >> units.dtype.type(k * num_bits) & units.dtype.type(2**num_bits - 1)
    return codes[..., :length]


def check_code_padding(format: str, packed: npt.NDArray[np.uint8], length: int, num_bits: int) -> None:
    """The bits beyond the last code of a run (along the last axis) are zero."""
    used = length * num_bits % 8
    if used and np.any(packed[..., -1] >> np.uint8(used)):
        raise LayoutError(f"{format} codes", "padding that is not 0", allowed="0 in the bits beyond the last code")


def _unit(num_bits: int) -> tuple[int, int]:
    """The smallest number of codes that fills whole bytes, and how many bytes."""
    shared = math.gcd(num_bits, 8)
    return 8 // shared, num_bits // shared


def without_prefix(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    """The arrays whose names begin with the prefix, under the rest of their names."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def read_integer(format: str, name: str, value: object, low: int, high: int) -> int:
    """Refuse what is no integer in [low, high]."""
    if type(value) is not int or not low <= value <= high:
        raise LayoutError(format, f"{name} {value!r:.60}", allowed=f"an integer in [{low}, {high}]")
    return value
