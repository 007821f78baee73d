"""Random packed weights of every format, to time kernels with.

Shapes: O outputs, I inputs, P outputs that differ from each other (the rows after them repeat them).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast, final

import numpy as np
import numpy.typing as npt

from rarefy.core.grids import to_bf16_bits
from rarefy.core.patterns import NM
from rarefy.layouts import FORMATS, Layout, MetaValue
from rarefy.layouts.base import pack_mask, pack_nibbles

_Array = npt.NDArray[Any]

PERIOD: Final = 509
"""Rows that differ; a prime, so that no two panels of a kernel hold the same rows in the same places for long."""
_DENSITY: Final = 0.5
_GRIDS: Final[Mapping[str, Mapping[str, MetaValue]]] = {
    "f32": {},
    "bf16": {},
    "int8": {"group_size": None, "symmetric": True},
    "int4": {"group_size": 64, "symmetric": False},
}
_PATTERNS: Final[Mapping[str, tuple[Mapping[str, MetaValue], ...]]] = {
    "dense": ({},),
    "bitmask": ({},),
    "nm": ({"keep": 2, "group": 4}, {"keep": 8, "group": 64}),
}


@final
@dataclass(frozen=True)
class Sample:
    """A format with the parameters that its weights are made with.

    Attributes:
        format: key of FORMATS.
        note: what tells it from other samples of the format, such as "8:64"; "" where there is only one.
        parameters: its metadata without the shape and the number of values.
    """

    format: str
    note: str
    parameters: Mapping[str, MetaValue]

    @property
    def name(self) -> str:
        """Format and note."""
        return f"{self.format} {self.note}".rstrip()

    def make(self, shape: tuple[int, int], *, seed: int = 0) -> tuple[Layout, Layout]:
        """Make a weight with random values, and the first rows of it, which all others repeat.

        Args:
            shape: (O, I).
            seed: of the random numbers.

        Returns:
            The layout with O rows, whose row o equals row o % P of the second layout; that one has P rows.
        """
        num_rows, width = shape
        period = min(num_rows, PERIOD)
        kind, values, _ = self.format.split("-")
        rng = np.random.default_rng([seed, num_rows, width])
        mask_PI = _mask(kind, self.parameters, (period, width), rng)
        rows = _random_rows(values, self.parameters, (period, width), rng)
        repeated = np.arange(num_rows) % period
        every = {name: array[repeated] for name, array in rows.items()}
        return (
            self._pack(every, None if mask_PI is None else mask_PI[repeated], shape),
            self._pack(rows, mask_PI, (period, width)),
        )

    def _pack(
        self, rows: Mapping[str, _Array], mask_OI: npt.NDArray[np.bool_] | None, shape: tuple[int, int]
    ) -> Layout:
        meta = {"shape": list(shape), **self.parameters}
        arrays = dict(rows)
        stored = "codes" if "codes" in arrays else "values"
        if mask_OI is not None:
            arrays["mask"] = pack_mask(mask_OI)
            arrays[stored] = arrays[stored][mask_OI]
            if self.format.startswith("bitmask"):
                meta["num_values"] = int(np.count_nonzero(mask_OI))
        if "int4" in self.format:
            arrays[stored] = pack_nibbles(arrays[stored])
        return FORMATS[self.format].from_arrays(self.format, meta, arrays)


def samples_of(format: str) -> tuple[Sample, ...]:
    """What to time of a format: one sample, or one for each of a few N:M patterns; none if the format is not known."""
    kind, _, rest = format.partition("-")
    grid = _GRIDS.get(rest.partition("-")[0])
    if grid is None:
        return ()
    return tuple(
        Sample(format, f"{pattern['keep']}:{pattern['group']}" if pattern else "", {**pattern, **grid})
        for pattern in _PATTERNS.get(kind, ())
    )


def _mask(
    kind: str, parameters: Mapping[str, MetaValue], shape: tuple[int, int], rng: np.random.Generator
) -> npt.NDArray[np.bool_] | None:
    if kind == "dense":
        return None
    random_PI = rng.random(shape, dtype=np.float32)
    if kind == "bitmask":
        return random_PI < _DENSITY
    pattern = NM(cast(int, parameters["keep"]), cast(int, parameters["group"]))
    mask_PI = np.zeros(shape, dtype=np.bool_)
    num_full, rest = divmod(shape[1], pattern.group)
    _keep_smallest(random_PI, mask_PI, slice(0, num_full * pattern.group), num_full, pattern.keep)
    if rest:
        count = int(pattern.keep_counts_G(shape[1])[-1])
        _keep_smallest(random_PI, mask_PI, slice(num_full * pattern.group, None), 1, count)
    return mask_PI


def _keep_smallest(
    random_PI: npt.NDArray[np.float32], mask_PI: npt.NDArray[np.bool_], columns: slice, num_groups: int, keep: int
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
    num_rows, width = shape
    if values in {"f32", "bf16"}:
        floats = rng.standard_normal(shape, dtype=np.float32)
        return {"values": floats if values == "f32" else to_bf16_bits(floats)}
    num_codes = 1 << int(values.removeprefix("int"))
    group_size = cast("int | None", parameters["group_size"])
    groups = (num_rows, 1 if group_size is None else -(-width // group_size))
    arrays: dict[str, _Array] = {
        "codes": rng.integers(0, num_codes, shape, dtype=np.uint8),
        "scales": to_bf16_bits(rng.uniform(0.5, 1.5, groups).astype(np.float32) / np.float32(num_codes)),
    }
    if not parameters["symmetric"]:
        arrays["zero_points"] = rng.integers(0, num_codes, groups, dtype=np.uint8)
    return arrays
