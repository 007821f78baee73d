"""How many columns the factors of a matrix have. Shape suffixes: O out, I in, K rank."""

from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

from rarefy.core.errors import PatternError

MAX_RANK = 2**20
FACTOR_ITEM_BYTES = 2  # bfloat16


@final
@dataclass(frozen=True)
class Rank:
    """The rank of a factorization, said in exactly one of four ways. It is at least 1, and at most min(O, I).

    Args:
        ratio: numbers in the two factors, as a fraction of those in the matrix: K = floor(ratio * O * I / (O + I)).
        energy: the least K with which the factors hold this fraction of the squared singular values.
        count: K itself.
        num_bytes: what the two factors of a layer may take in bfloat16.

    Raises:
        PatternError: none or several are given, or one is out of range.
    """

    ratio: float | None = None
    energy: float | None = None
    count: int | None = None
    num_bytes: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("ratio", "energy", "count", "num_bytes") if getattr(self, name) is not None]
        if len(given) != 1:
            raise PatternError(
                "rank", " and ".join(given) or "nothing", allowed="exactly one of ratio, energy, count, num_bytes"
            )
        for name in ("ratio", "energy"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value <= 1):
                raise PatternError("rank", f"{name} {value!r}", allowed="a number > 0 and <= 1")
        for name, most in (("count", MAX_RANK), ("num_bytes", 2**50)):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and 1 <= value <= most):
                raise PatternError("rank", f"{name} {value!r}", allowed=f"an integer in [1, {most}]")

    def most(self, shape: tuple[int, int]) -> int:
        """The rank for a matrix (O, I), or the largest one that it can become where singular values decide."""
        rows, width = shape
        if self.ratio is not None:
            wanted = int(self.ratio * rows * width / max(1, rows + width))
        elif self.count is not None:
            wanted = self.count
        elif self.num_bytes is not None:
            wanted = self.num_bytes // (FACTOR_ITEM_BYTES * max(1, rows + width))
        else:
            wanted = min(rows, width)
        return min(max(1, wanted), rows, width)

    def choose(self, shape: tuple[int, int], squares_K: npt.NDArray[np.float64]) -> int:
        """The rank for a matrix (O, I) with these squared singular values, which fall from one to the next."""
        most = self.most(shape)
        if self.energy is None or not squares_K.size or not squares_K.sum() > 0:
            return most
        held_K = np.cumsum(squares_K) / squares_K.sum()
        # by rounding, the last of the sums may miss 1
        return min(max(1, int(np.searchsorted(held_K, self.energy * (1 - 1e-12))) + 1), most)


@final
@dataclass(frozen=True)
class TapRanks:
    """How large the factors of a convolution's weight are; see core.tap_factors.

    Args:
        num_runs: runs of columns that meet the same right factor, G.
        inner_rank: rows of that factor, R.
        outer_rank: columns of the left factor where there is a core, A.
    """

    num_runs: int
    inner_rank: int
    outer_rank: int | None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
