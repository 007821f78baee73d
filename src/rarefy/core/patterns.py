"""Zero patterns: which entries of a weight matrix are stored. Shape suffixes: O out, I in, G groups."""

from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

from rarefy.core.errors import PatternError

MAX_GROUP = 64
MAX_BLOCK = 4096  # rows or columns of a block that is stored
_MAX_AXIS = 2**31 - 1


@final
@dataclass(frozen=True)
class Unstructured:
    """Any entry may be zero.

    Args:
        sparsity: fraction of zeros, in [0, 1].

    Raises:
        PatternError: sparsity is outside [0, 1].
    """

    sparsity: float

    def __post_init__(self) -> None:
        number = isinstance(self.sparsity, int | float) and not isinstance(self.sparsity, bool)
        if not number or not 0.0 <= self.sparsity <= 1.0:
            raise PatternError("pattern", f"sparsity {self.sparsity!r}", allowed="a number in [0, 1]")


@final
@dataclass(frozen=True)
class NM:
    """Exactly `keep` entries are stored in every run of `group` columns of a row (along the input axis).

    A shorter last group of r columns keeps ceil(keep * r / group) entries. A kept entry may be zero: kept means stored.

    Args:
        keep: entries stored per group, 1 <= keep <= group.
        group: columns per group, 1 <= group <= 64.

    Raises:
        PatternError: keep or group is out of range.
    """

    keep: int
    group: int

    def __post_init__(self) -> None:
        ok = type(self.keep) is int and type(self.group) is int and 1 <= self.keep <= self.group <= MAX_GROUP
        if not ok:
            raise PatternError(
                "pattern",
                f"keep {self.keep!r}, group {self.group!r}",
                allowed=f"integers with 1 <= keep <= group <= {MAX_GROUP}",
            )

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in a full group."""
        return 1.0 - self.keep / self.group

    def num_groups(self, in_features: int) -> int:
        """Number of groups that cover a row, the shorter last one included."""
        return -(-in_features // self.group)

    def keep_counts_G(self, in_features: int) -> npt.NDArray[np.int64]:  # noqa: N802 (shape suffix)
        """Entries stored in each group of a row, shape (G,)."""
        counts = np.full(self.num_groups(in_features), self.keep, dtype=np.int64)
        rest = in_features % self.group
        if rest:
            counts[-1] = -(-self.keep * rest // self.group)
        return counts

    def num_kept_per_row(self, in_features: int) -> int:
        """Entries stored in one row."""
        full, rest = divmod(in_features, self.group)
        return full * self.keep + -(-self.keep * rest // self.group)

    def check_fits(self, in_features: int, layer: str) -> None:
        """Refuse a layer that is narrower than one group.

        Raises:
            PatternError: in_features < group.
        """
        if in_features < self.group:
            raise PatternError(
                f"layer {layer}",
                f"input axis {in_features} is smaller than the group of {self.group}",
                hint="exclude it in the step's targets, or choose a smaller group",
            )

    def count_kept_OG(self, mask_OI: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:  # noqa: N802 (shape suffix)
        """Entries that a mask stores in each group, (O, G); at most 64 each."""
        rows, width = mask_OI.shape
        full = width // self.group
        kept_OG = np.zeros((rows, self.num_groups(width)), dtype=np.uint8)
        body = mask_OI[:, : full * self.group].reshape(rows, full, self.group)
        if self.group <= 16:  # numpy's sums over so few neighbours are up to twenty times slower
            for column in range(self.group):
                kept_OG[:, :full] += body[:, :, column]
        else:
            kept_OG[:, :full] = body.sum(axis=2, dtype=np.uint8)
        if width % self.group:
            kept_OG[:, full] = mask_OI[:, full * self.group :].sum(axis=1, dtype=np.uint8)
        return kept_OG


@final
@dataclass(frozen=True)
class Blocks:
    """Whole blocks are zero: the matrix is cut into a grid of blocks, which are smaller at its lower and right edge.

    Args:
        block_shape: rows and columns of a block, each in [1, 2**31).
        sparsity: fraction of blocks that are zero, in [0, 1].

    Raises:
        PatternError: a field is out of range.
    """

    block_shape: tuple[int, int]
    sparsity: float

    def __post_init__(self) -> None:
        shape: object = self.block_shape
        ok = isinstance(shape, tuple) and len(shape) == 2
        if not ok or not all(type(size) is int and 1 <= size <= _MAX_AXIS for size in self.block_shape):
            raise PatternError("pattern", f"block {shape!r:.60}", allowed="two integers in [1, 2**31)")
        Unstructured(self.sparsity)  # the same bounds

    def grid_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of blocks that cover a matrix (O, I), the smaller ones included."""
        return -(-shape[0] // self.block_shape[0]), -(-shape[1] // self.block_shape[1])

    def is_even(self, shape: tuple[int, int]) -> bool:
        """Whether all blocks of a matrix (O, I) are whole."""
        return shape[0] % self.block_shape[0] == 0 and shape[1] % self.block_shape[1] == 0

    def stored(self, shape: tuple[int, int]) -> "Blocks":
        """Blocks of at most 4096 rows and columns that these consist of on a matrix (O, I), as few as possible."""
        rows, columns = (_piece(size, extent) for size, extent in zip(self.block_shape, shape, strict=True))
        return self if (rows, columns) == self.block_shape else Blocks((rows, columns), self.sparsity)

    def max_num_values(self, shape: tuple[int, int]) -> int:
        """Entries in the blocks that are kept, if those at the edges are the ones pruned; exact where all are whole."""
        rows, columns = self.block_shape
        (full_down, rest_down), (full_across, rest_across) = divmod(shape[0], rows), divmod(shape[1], columns)
        num_down, num_across = self.grid_shape(shape)
        num_keep = num_down * num_across - round(self.sparsity * num_down * num_across)
        kinds = [
            (rows * columns, full_down * full_across),
            (rows * rest_across, full_down if rest_across else 0),
            (rest_down * columns, full_across if rest_down else 0),
            (rest_down * rest_across, 1 if rest_down and rest_across else 0),
        ]
        total = 0
        for size, number in sorted(kinds, reverse=True):
            total += size * min(number, num_keep)
            num_keep -= min(number, num_keep)
        return total


@final
@dataclass(frozen=True)
class Lines:
    """Whole rows (outputs) or whole columns (inputs) are zero; on a given layer this is a pattern of blocks.

    Args:
        axis: "rows" or "columns".
        sparsity: fraction of them that is zero, in [0, 1].

    Raises:
        PatternError: a field is out of range.
    """

    axis: str
    sparsity: float

    def __post_init__(self) -> None:
        if self.axis not in ("rows", "columns"):
            raise PatternError("pattern", f"axis {self.axis!r}", allowed="rows or columns")
        Unstructured(self.sparsity)  # the same bounds

    def fit(self, shape: tuple[int, int]) -> Blocks:
        """The blocks that the rows or columns of a matrix (O, I) are."""
        return Blocks((1, max(1, shape[1])) if self.axis == "rows" else (max(1, shape[0]), 1), self.sparsity)


def _piece(size: int, extent: int) -> int:
    """How long the parts are that blocks of a size are cut into along an axis, where they are too long to be stored."""
    if size <= MAX_BLOCK:
        return size
    if extent <= size:  # one block, which any parts make up
        return max(1, -(-extent // max(1, -(-extent // MAX_BLOCK))))
    return next(part for part in range(MAX_BLOCK, 0, -1) if size % part == 0)


Pattern = Unstructured | NM | Blocks
# what a method may be asked for
WantedPattern = Pattern | Lines
