"""Random packed weights of every format, to time kernels with.

Shapes: O outputs, I inputs, P outputs that differ from each other (the rows after them repeat them), K rank.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast, final

import numpy as np
import numpy.typing as npt

from rarefy.core.grids import from_bf16_bits, to_bf16_bits
from rarefy.core.patterns import NM, Blocks
from rarefy.layouts import (
    FORMATS,
    NF4,
    Binary,
    DenseFloat,
    DenseInt,
    Layout,
    LookupTable,
    LowRank,
    MetaValue,
    Sum,
    Tapwise,
    Ternary,
)
from rarefy.layouts.base import pack_codes, pack_mask
from rarefy.layouts.block_order import blocks_of, entry_mask, to_stream
from rarefy.layouts.sum import Part

_Array = npt.NDArray[Any]
_Mask = npt.NDArray[np.bool_]
_Factor = DenseFloat | DenseInt

PERIOD: Final = 509
"""Rows that differ; a prime, so that no two panels of a kernel hold the same rows in the same places for long."""
_BLOCK_ROWS: Final = 16
_OTHER_SEED: Final = 1_000_000  # far from the seeds that anyone asks for
_DENSITY: Final = 0.5
_DENSITIES: Final[Mapping[str, tuple[float, ...]]] = {"block": (0.5, 0.25)}
"""Of kinds that are timed with several."""
_LEVELS: Final[Mapping[str, tuple[type[Ternary | Binary], tuple[int, ...]]]] = {
    "ternary": (Ternary, (-1, 0, 1)),
    "binary": (Binary, (-1, 1)),
}
_GRIDS: Final[Mapping[str, Mapping[str, MetaValue]]] = {
    "f32": {},
    "bf16": {},
    "int8": {"group_size": None, "symmetric": True},
    "int4": {"group_size": 64, "symmetric": False},
    "int3": {"group_size": 64, "symmetric": False},
    "int2": {"group_size": 64, "symmetric": False},
    "v1": {},  # kinds without a choice of values
}
_PATTERNS: Final[Mapping[str, tuple[Mapping[str, MetaValue], ...]]] = {
    "dense": ({},),
    "bitmask": ({},),
    "nm": ({"keep": 2, "group": 4}, {"keep": 8, "group": 64}),
    "block": ({"block_shape": [_BLOCK_ROWS, 64]},),
    "ternary": ({"group_size": None},),
    "binary": ({"group_size": 128},),
    "lut4": ({"group_size": 64, "scaled": True},),
    "lut8": ({"group_size": None, "scaled": False},),
    "lowrank": ({"rank": 128},),
    "tapwise": ({"inner_rank": 64},),
    "sum": (
        {
            "parts": [
                {"format": "dense-int4-v1", "group_size": 64, "symmetric": False},
                {"format": "lowrank-bf16-v1", "rank": 32},
            ]
        },
    ),
}


@final
@dataclass(frozen=True)
class Sample:
    """A format with the parameters that its weights are made with.

    Attributes:
        format: key of FORMATS.
        note: what tells it from other samples of the format, such as "8:64" or "50 %", the zeros; "" where there is
            only one.
        parameters: its metadata without the shape and the number of values.
        density: how much of a mask is kept, of entries or of blocks.
    """

    format: str
    note: str
    parameters: Mapping[str, MetaValue]
    density: float = _DENSITY

    @property
    def name(self) -> str:
        """Format and note."""
        return f"{self.format} {self.note}".rstrip()

    @property
    def period(self) -> int:
        """Rows that differ: PERIOD, or the multiple of a block's rows before it."""
        return PERIOD // _BLOCK_ROWS * _BLOCK_ROWS if "block_shape" in self.parameters else PERIOD

    def make(self, shape: tuple[int, int], *, seed: int = 0) -> tuple[Layout, Layout]:
        """Make a weight with random values, and the first rows of it, which all others repeat.

        Args:
            shape: (O, I).
            seed: of the random numbers.

        Returns:
            The layout with O rows, whose row o equals row o % P of the second layout; that one has P rows.
        """
        num_rows, width = shape
        kind, values = self.format.split("-")[:2]
        match kind:
            case "sum":
                return _make_sum(self.parameters, shape, seed)
            case "tapwise":
                return _make_tapwise(self.parameters, shape, seed)
            case "lowrank":
                return _make_low_rank(values, self.parameters, shape, seed)
        small_shape = min(num_rows, self.period), width
        rng = np.random.default_rng([seed, num_rows, width])
        repeated = np.arange(num_rows) % small_shape[0]
        if kind in _LEVELS or kind.startswith("lut"):
            return _make_codebook(kind, self.parameters, small_shape, repeated, rng)
        mask_PI = _mask(kind, self.parameters, self.density, small_shape, rng)
        rows = _random_rows(values, self.parameters, small_shape, rng)
        every = {name: array[repeated] for name, array in rows.items()}
        return (
            self._pack(every, None if mask_PI is None else mask_PI[repeated], shape),
            self._pack(rows, mask_PI, small_shape),
        )

    def _pack(self, rows: Mapping[str, _Array], mask_OI: _Mask | None, shape: tuple[int, int]) -> Layout:
        meta = {"shape": list(shape), **self.parameters}
        arrays = dict(rows)
        stored = "codes" if "codes" in arrays else "values"
        if "block_shape" in meta and mask_OI is not None:
            blocks = _blocks(self.parameters, self.density)
            mask_RC = blocks_of(mask_OI, blocks)
            arrays |= {"mask": pack_mask(mask_RC), stored: to_stream(arrays[stored], mask_RC, blocks)}
            meta["num_values"] = len(arrays[stored])
        elif mask_OI is not None:
            arrays |= {"mask": pack_mask(mask_OI), stored: arrays[stored][mask_OI]}
            if self.format.startswith("bitmask"):
                meta["num_values"] = int(np.count_nonzero(mask_OI))
        if stored == "codes":
            arrays[stored] = pack_codes(arrays[stored], _num_bits(self.format.split("-")[1]))
        return FORMATS[self.format].from_arrays(self.format, meta, arrays)


def samples_of(format: str) -> tuple[Sample, ...]:
    """What to time of a format: one sample, or one for each of a few patterns; none if the format is not known."""
    kind, _, rest = format.partition("-")
    grid = _GRIDS.get(rest.partition("-")[0])
    if grid is None:
        return ()
    return tuple(
        Sample(format, _note(pattern, density), {**pattern, **grid}, density)
        for pattern in _PATTERNS.get(kind, ())
        for density in _DENSITIES.get(kind, (_DENSITY,))
    )


def _note(pattern: Mapping[str, MetaValue], density: float) -> str:
    if "keep" in pattern:
        return f"{pattern['keep']}:{pattern['group']}"
    return f"{100 * (1 - density):.0f} %" if "block_shape" in pattern else ""


def _make_codebook(
    kind: str,
    parameters: Mapping[str, MetaValue],
    small_shape: tuple[int, int],
    repeated: _Array,
    rng: np.random.Generator,
) -> tuple[Layout, Layout]:
    """Ternary, binary and lookup-table weights."""
    group_size = cast("int | None", parameters["group_size"])
    scale_PG = _random_scales(group_size, small_shape, rng)
    if kind in _LEVELS:
        cls, levels = _LEVELS[kind]
        level_PI = rng.choice(np.array(levels, dtype=np.int8), small_shape)
        return (
            cls.from_levels(level_PI[repeated], scale_PG[repeated], group_size),
            cls.from_levels(level_PI, scale_PG, group_size),
        )
    table_K = NF4 if kind == "lut4" else rng.standard_normal(256, dtype=np.float32)
    code_PI = rng.integers(0, len(table_K), small_shape, dtype=np.uint8)
    scaled = bool(parameters["scaled"])

    def make(rows: _Array | slice) -> LookupTable:
        scale_OG = scale_PG[rows] if scaled else None
        return LookupTable.from_codes(code_PI[rows], table_K, scale_OG=scale_OG, group_size=group_size)

    return make(repeated), make(slice(None))


def _make_low_rank(
    values: str, parameters: Mapping[str, MetaValue], shape: tuple[int, int], seed: int
) -> tuple[Layout, Layout]:
    """Random factors; the rows of the left one repeat."""
    rank = cast(int, parameters["rank"])
    factor = samples_of(f"dense-{values}-v1")[0]
    left, small_left = (cast(_Factor, made) for made in factor.make((shape[0], rank), seed=seed))
    right = cast(_Factor, factor.make((rank, shape[1]), seed=seed + _OTHER_SEED)[0])
    return LowRank(left, right), LowRank(small_left, right)


def _make_tapwise(parameters: Mapping[str, MetaValue], shape: tuple[int, int], seed: int) -> tuple[Layout, Layout]:
    """Random factors of as many runs as a small kernel has taps, where the width divides so; the rows repeat."""
    num_runs = next(runs for runs in (9, 8, 4, 2, 1) if shape[1] % runs == 0)
    inner = cast(int, parameters["inner_rank"])
    factor = samples_of("dense-bf16-v1")[0]
    left, small_left = (cast(DenseFloat, made) for made in factor.make((shape[0], num_runs * inner), seed=seed))
    right = cast(DenseFloat, factor.make((inner, shape[1] // num_runs), seed=seed + _OTHER_SEED)[0])
    return Tapwise(left, right, num_runs), Tapwise(small_left, right, num_runs)


def _make_sum(parameters: Mapping[str, MetaValue], shape: tuple[int, int], seed: int) -> tuple[Layout, Layout]:
    """Two samples of other formats, whose rows repeat alike."""
    parts = []
    for i, part in enumerate(cast("list[dict[str, MetaValue]]", parameters["parts"])):
        own = {name: value for name, value in part.items() if name != "format"}
        sample = Sample(cast(str, part["format"]), "", own)
        parts.append(sample.make(shape, seed=seed + 2 * i * _OTHER_SEED))
    whole, small = (Sum(*(cast(Part, made) for made in pair)) for pair in zip(*parts, strict=True))
    return whole, small


def _mask(
    kind: str, parameters: Mapping[str, MetaValue], density: float, shape: tuple[int, int], rng: np.random.Generator
) -> _Mask | None:
    if kind == "dense":
        return None
    if kind == "block":
        blocks = _blocks(parameters, density)
        random_RC = rng.random(blocks.grid_shape(shape), dtype=np.float32)
        mask_RC = random_RC <= np.sort(random_RC, axis=None)[math.ceil(random_RC.size * density) - 1]
        return entry_mask(mask_RC, blocks, shape)
    random_PI = rng.random(shape, dtype=np.float32)
    if kind == "bitmask":
        return random_PI < density
    pattern = NM(cast(int, parameters["keep"]), cast(int, parameters["group"]))
    mask_PI = np.zeros(shape, dtype=np.bool_)
    num_full, rest = divmod(shape[1], pattern.group)
    _keep_smallest(random_PI, mask_PI, slice(0, num_full * pattern.group), num_full, pattern.keep)
    if rest:
        count = int(pattern.keep_counts_G(shape[1])[-1])
        _keep_smallest(random_PI, mask_PI, slice(num_full * pattern.group, None), 1, count)
    return mask_PI


def _blocks(parameters: Mapping[str, MetaValue], density: float) -> Blocks:
    rows, columns = cast("list[int]", parameters["block_shape"])
    return Blocks((rows, columns), 1.0 - density)


def _keep_smallest(
    random_PI: npt.NDArray[np.float32], mask_PI: _Mask, columns: slice, num_groups: int, keep: int
) -> None:
    """Set the `keep` places with the smallest numbers in each of `num_groups` groups of the columns."""
    if not num_groups:
        return
    groups = random_PI[:, columns].reshape(random_PI.shape[0], num_groups, -1)
    kept = np.zeros(groups.shape, dtype=np.bool_)
    np.put_along_axis(kept, np.argpartition(groups, keep - 1, axis=2)[:, :, :keep], True, axis=2)
    mask_PI[:, columns] = kept.reshape(random_PI.shape[0], -1)


def _random_rows(
    values: str, parameters: Mapping[str, MetaValue], shape: tuple[int, int], rng: np.random.Generator
) -> dict[str, _Array]:
    """The stored arrays of every entry, kept or not, with one element per entry."""
    if values in {"f32", "bf16"}:
        floats = rng.standard_normal(shape, dtype=np.float32)
        return {"values": floats if values == "f32" else to_bf16_bits(floats)}
    num_codes = 1 << _num_bits(values)
    scale_PG = _random_scales(cast("int | None", parameters["group_size"]), shape, rng) / np.float32(num_codes)
    arrays: dict[str, _Array] = {
        "codes": rng.integers(0, num_codes, shape, dtype=np.uint8),
        "scales": to_bf16_bits(scale_PG),
    }
    if not parameters["symmetric"]:
        arrays["zero_points"] = rng.integers(0, num_codes, scale_PG.shape, dtype=np.uint8)
    return arrays


def _random_scales(group_size: int | None, shape: tuple[int, int], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """One number around 1 for each group, exactly a bfloat16."""
    groups = (shape[0], 1 if group_size is None else -(-shape[1] // group_size))
    return from_bf16_bits(to_bf16_bits(rng.uniform(0.5, 1.5, groups).astype(np.float32)))


def _num_bits(values: str) -> int:
    return int(values.removeprefix("int"))
