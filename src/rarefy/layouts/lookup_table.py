"""lut4-v1 and lut8-v1: every entry is a code that a table of 16 or 256 numbers translates.

Shape suffixes: O out, I in, G groups, K entries of the table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self, cast, final

import numpy as np
import numpy.typing as npt

from rarefy.core.errors import LayoutError, NonFiniteError
from rarefy.core.grids import Float32Array, Uint8Array, Uint16Array, chunks, from_bf16_bits, round_scale, to_bf16_bits
from rarefy.layouts import base
from rarefy.layouts.base import Array, ArraySpec, Meta, MetaValue
from rarefy.layouts.scales import expand_scales, group_maximum, stored_scales

_KEYS = ("group_size", "scaled")
_NUM_BITS = {"lut4-v1": 4, "lut8-v1": 8}
_MAX_SCALED_ENTRY = 255.0  # 255 * 2**119, the largest scale, is finite

NF4: Final = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=np.float32,
)
"""NormalFloat4: quantiles of a normal distribution, to be used with one scale per group of 64 columns.

Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, arXiv:2305.14314, section 3 and appendix E.
"""
NF4.flags.writeable = False


@final
@dataclass(frozen=True, eq=False)
class LookupTable:
    """Row-major codes; value = float32(table[code] * scale), or table[code] without scales.

    Bytes (version 1), all little-endian:
        codes: uint8. lut4: (O, ceil(I / 2)), column 2j in the low nibble of byte j and column 2j + 1 in the high one;
            for odd I the last high nibble of a row is 0. lut8: (O, I).
        table: lut4: float32 (16,). lut8: uint16 (256,), bfloat16 bits. Finite, in any order, repetitions allowed; where
            there are scales, of magnitude 255 at most.
        scales: uint16 (O, G), bfloat16 bits in [2**-126, 2**119], one per group of `group_size` columns (the last
            may be shorter) or one per row; absent if not `scaled`.

    Args:
        shape: (O, I).
        group_size: columns that share a scale, a multiple of 32; None: a whole row, and where there are no scales.
        codes: as above.
        table: as above.
        scales: as above; None if not scaled.
    """

    shape: tuple[int, int]
    group_size: int | None
    codes: Uint8Array
    table: Float32Array | Uint16Array
    scales: Uint16Array | None

    @classmethod
    def from_codes(
        cls,
        code_OI: Uint8Array,
        table_K: Float32Array,
        *,
        scale_OG: Float32Array | None = None,
        group_size: int | None = None,
    ) -> Self:
        """Pack codes.

        Args:
            code_OI: uint8 (O, I), indices of the table.
            table_K: float32; 16 entries make a lut4, 256 a lut8, for which they are rounded to bfloat16.
            scale_OG: float32 (O, G), each exactly a bfloat16 in [2**-126, 2**119]; None: no scales.
            group_size: columns that share a scale, a multiple of 32; None: a whole row.

        Raises:
            LayoutError: a code, an entry or a scale is out of range, or the shapes do not fit.
        """
        table_K = np.ascontiguousarray(table_K, dtype=np.float32)
        if table_K.shape not in ((16,), (256,)):
            raise LayoutError("lookup table", f"a table of shape {table_K.shape}", allowed="16 or 256 entries")
        if code_OI.ndim != 2 or code_OI.dtype != np.uint8 or np.any(code_OI > len(table_K) - 1):
            raise LayoutError("lookup table", "codes beyond the table", allowed=f"uint8 (O, I) below {len(table_K)}")
        num_bits = 4 if len(table_K) == 16 else 8
        format = f"lut{num_bits}-v1"
        meta = {"shape": list(code_OI.shape), "group_size": group_size, "scaled": scale_OG is not None}
        table = table_K if num_bits == 4 else to_bf16_bits(table_K)
        arrays: dict[str, Array] = {"codes": base.pack_codes(code_OI, num_bits), "table": table}
        if scale_OG is not None:
            arrays["scales"] = stored_scales(format, scale_OG)
        return cls.from_arrays(format, meta, arrays)

    @classmethod
    def from_dense(
        cls, weight_OI: Float32Array, table_K: Float32Array, *, scaled: bool, group_size: int | None = None
    ) -> Self:
        """Round every weight to the nearest entry, the lower one if two are as near.

        Args:
            weight_OI: float32 (O, I), finite.
            table_K: float32, as in `from_codes`.
            scaled: divide each group by its largest magnitude first, rounded to the nearest bfloat16 (a group of zeros
                by 1), as NF4 does.
            group_size: columns that share a scale, a multiple of 32; None: a whole row.

        Raises:
            NonFiniteError: a weight is NaN or infinite.
            LayoutError: the table is not one, or the group size is impossible.
        """
        if not np.all(np.isfinite(weight_OI)):
            raise NonFiniteError("weight", "NaN or infinity")
        scale_OG = None
        if scaled:
            largest_OG = group_maximum("lookup table", weight_OI, group_size)
            scale_OG = round_scale(np.where(largest_OG == 0, np.float32(1), largest_OG))
        stored_K = np.asarray(table_K, dtype=np.float32)
        stored_K = stored_K if stored_K.shape == (16,) else from_bf16_bits(to_bf16_bits(stored_K))
        order_K = np.argsort(stored_K, kind="stable").astype(np.uint8)
        sorted_K = stored_K[order_K].astype(np.float64)
        middles = (sorted_K[1:] + sorted_K[:-1]) / 2
        code_OI = np.empty(weight_OI.shape, dtype=np.uint8)
        for rows in chunks(*weight_OI.shape):
            part = weight_OI[rows]
            if scale_OG is not None:
                part = part / expand_scales(scale_OG[rows], group_size, weight_OI.shape[1])
            code_OI[rows] = order_K[np.searchsorted(middles, part)]
        return cls.from_codes(code_OI, stored_K, scale_OG=scale_OG, group_size=group_size)

    @property
    def num_bits(self) -> int:
        """Of a code: 4 or 8."""
        return 4 if self.table.shape[0] == 16 else 8

    @property
    def format(self) -> str:
        """lut4-v1 or lut8-v1."""
        return f"lut{self.num_bits}-v1"

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays().values())

    @property
    def table_K(self) -> Float32Array:  # noqa: N802 (shape suffix)
        """The table as float32."""
        return cast(Float32Array, self.table) if self.num_bits == 4 else from_bf16_bits(cast(Uint16Array, self.table))

    def codes_OI(self) -> Uint8Array:  # noqa: N802 (shape suffix)
        """One code per byte, uint8 (O, I)."""
        return base.unpack_codes(self.codes, self.shape[1], self.num_bits)

    def to_dense(self) -> Float32Array:
        """The matrix as float32 (O, I)."""
        values_OI = np.empty(self.shape, dtype=np.float32)
        for rows in chunks(*self.shape):
            values_OI[rows] = self._rows(rows)
        return values_OI

    def rows(self, indices: npt.ArrayLike) -> Float32Array:
        """Rows of the matrix (an embedding look-up): integer indices of shape S give float32 (*S, I)."""
        index = np.asarray(indices)
        return self._rows(index.reshape(-1)).reshape(*index.shape, self.shape[1])

    def _rows(self, rows: slice | npt.NDArray[np.integer]) -> Float32Array:
        width = self.shape[1]
        values: Float32Array = self.table_K[base.unpack_codes(self.codes[rows], width, self.num_bits)]
        if self.scales is not None:
            values *= expand_scales(from_bf16_bits(self.scales[rows]), self.group_size, width)
        return values

    def arrays(self) -> dict[str, Array]:
        """The arrays to store, by name."""
        arrays: dict[str, Array] = {"codes": self.codes, "table": self.table}
        if self.scales is not None:
            arrays["scales"] = self.scales
        return arrays

    def meta(self) -> dict[str, MetaValue]:
        """Shape, group size, and whether there are scales."""
        return {"shape": list(self.shape), "group_size": self.group_size, "scaled": self.scales is not None}

    @classmethod
    def array_spec(cls, format: str, meta: Meta) -> ArraySpec:
        """See Layout.array_spec."""
        base.check_format(format, *_NUM_BITS)
        rows, width = base.read_shape(format, meta, *_KEYS)
        num_bits = _NUM_BITS[format]
        spec: ArraySpec = {
            "codes": (base.UINT8, (rows, base.code_bytes(width, num_bits))),
            "table": (base.FLOAT32, (16,)) if num_bits == 4 else (base.UINT16, (256,)),
        }
        group_size, scaled = base.read_group_size(format, meta), meta["scaled"]
        if type(scaled) is not bool or (group_size is not None and not scaled):
            raise LayoutError(format, f"scaled {scaled!r:.60}", allowed="true, or false with group_size null")
        return {**spec, **base.scales_spec(group_size, (rows, width))} if scaled else spec

    @classmethod
    def from_arrays(cls, format: str, meta: Meta, arrays: Mapping[str, Array]) -> Self:
        """See Layout.from_arrays."""
        arrays = base.check_arrays(format, cls.array_spec(format, meta), arrays)
        shape = base.read_shape(format, meta, *_KEYS)
        codes = cast(Uint8Array, arrays["codes"])
        base.check_code_padding(format, codes, shape[1], _NUM_BITS[format])
        table, scales = (
            cast("Float32Array | Uint16Array", arrays["table"]),
            cast("Uint16Array | None", arrays.get("scales")),
        )
        layout = cls(shape, base.read_group_size(format, meta), codes, table, scales)
        largest = np.inf if scales is None else _MAX_SCALED_ENTRY
        # written so that NaN fails
        if not np.all(np.isfinite(layout.table_K) & (np.abs(layout.table_K) <= largest)):
            allowed = "finite numbers" if scales is None else f"numbers of magnitude {_MAX_SCALED_ENTRY:g} at most"
            raise LayoutError(f"{format} table", "an entry out of range", allowed=allowed)
        if scales is not None:
            base.check_scales(format, arrays)
        return layout
