"""One product that every contestant computes, and what a contestant is.

Shapes: T rows of activations, O outputs, I inputs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rarefy.kernels import last_level_cache_bytes

GROUP_SIZE = 64
"""Columns per scale of the 4-bit weights (ggml's formats have 32)."""

PATTERNS = {"87.5 %": (8, 64), "2:4": (2, 4)}
"""Zeros that lie in a pattern: how many columns of each group are kept."""

MAX_RELATIVE_ERROR = 0.02
"""Of ||y - y*|| / ||y*||. The weights are made so that every format holds them exactly, so that only activations are
rounded: to 8 bits with one scale per row that is max|x| / 127 / sqrt(12), for these x 0.9 %; a format that scales
weights by 127 instead of a power of two adds 8 / 127 / sqrt(12) / 4.6 = 0.4 %. A wrong product is off by 100 %."""


@dataclass(frozen=True)
class Problem:
    """y = x W^T with W = scale_O * level_OI: levels in [-8, 7], scales powers of two, a -8 in every 32 columns."""

    num_outputs: int
    num_inputs: int
    num_rows: int
    num_threads: int

    @property
    def num_products(self) -> int:
        """Products of two numbers in one product of the weight."""
        return self.num_outputs * self.num_inputs * self.num_rows

    @cached_property
    def level_OI(self) -> NDArray[np.int8]:  # noqa: N802 (shape suffix)
        rng = np.random.default_rng(1)
        level_OI = rng.integers(-8, 8, (self.num_outputs, self.num_inputs), dtype=np.int8)
        level_OI[:, ::32] = -8
        return level_OI

    @cached_property
    def scale_O(self) -> NDArray[np.float32]:  # noqa: N802
        return np.exp2(np.random.default_rng(2).integers(-6, -3, self.num_outputs)).astype(np.float32)

    @cached_property
    def x_TI(self) -> NDArray[np.float32]:  # noqa: N802
        return np.random.default_rng(3).standard_normal((self.num_rows, self.num_inputs), dtype=np.float32)

    @cache  # noqa: B019 (there is one problem in a process)
    def mask(self, zeros: str) -> NDArray[np.bool_]:
        """Which weights are kept, for the sparse contestants: anywhere, or some in every group of columns."""
        rng = np.random.default_rng(4)
        if zeros in PATTERNS:
            keep, group = PATTERNS[zeros]
            order = rng.random((self.num_outputs, self.num_inputs // group, group), dtype=np.float32).argsort(axis=2)
            return (order < keep).reshape(self.num_outputs, self.num_inputs)
        return rng.random((self.num_outputs, self.num_inputs), dtype=np.float32) >= float(zeros.rstrip(" %")) / 100

    @cache  # noqa: B019
    def expected(self, zeros: str) -> NDArray[np.float32]:
        """The right product, (T, O)."""
        level_OI = self.level_OI * self.mask(zeros) if zeros else self.level_OI
        return self.x_TI @ (level_OI * self.scale_O[:, None]).T

    def num_copies(self, weight_bytes: int) -> int:
        """Different weights that a contestant multiplies with in turn: three times the last-level cache, or two.

        A product of many rows is limited by arithmetic, and two will do.
        """
        if self.num_rows > 16:
            return 2
        return max(2, math.ceil(3 * last_level_cache_bytes() / weight_bytes))

    def level(self, copy: int, zeros: str = "") -> NDArray[np.int8]:
        """Levels of one copy: the outputs rotated, so that no library can tell that two copies are the same."""
        return np.roll(self.level_OI * self.mask(zeros) if zeros else self.level_OI, copy, axis=0)

    def scale(self, copy: int) -> NDArray[np.float32]:
        """Scales of one copy, (O,)."""
        return np.roll(self.scale_O, copy)

    def weight(self, copy: int, zeros: str = "") -> NDArray[np.float32]:
        """One copy in float32."""
        return self.level(copy, zeros) * self.scale(copy)[:, None]

    def group_scales(self, copy: int, group_size: int = GROUP_SIZE) -> NDArray[np.float32]:
        """Scales of one copy for each group, (O, G)."""
        return np.repeat(self.scale(copy)[:, None], self.num_inputs // group_size, axis=1)

    def nibbles(self, codes_OI: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        """Codes packed in pairs, the even column in the low half, (O, I / 2)."""
        codes = codes_OI.astype(np.uint8) & 15
        return codes[:, ::2] | codes[:, 1::2] << 4


@dataclass(frozen=True)
class Contestant:
    """One library with one kind of weights, holding its copies of the weight.

    Attributes:
        peer: the library.
        values: what the weights are, for example "int4"; contestants with the same values are compared.
        note: how, for the reader.
        weight_bytes: bytes of one copy that a product reads.
        num_copies: products of one call of `run`.
        run: multiplies with every copy once and returns the results in the library's own form.
        outputs: those results as one array (T, O) per copy.
        zeros: how many weights are zero, such as "50 %", or a pattern of PATTERNS; "" if none need be.
    """

    peer: str
    values: str
    note: str
    weight_bytes: int
    num_copies: int
    run: Callable[[], Any]
    outputs: Callable[[Any], Sequence[NDArray[np.float32]]]
    zeros: str = ""
    facts: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        return f"{self.peer} {self.values}"

    def worst_error(self, problem: Problem, results: Any) -> float:
        """The largest relative error of any copy's product; NaN if one is not a number."""
        expected_TO = problem.expected(self.zeros)
        outputs = self.outputs(results)
        assert len(outputs) == self.num_copies
        errors = []
        for copy, y_TO in enumerate(outputs):
            right = np.roll(expected_TO, copy, axis=1)
            assert y_TO.shape == right.shape, (y_TO.shape, right.shape)
            errors.append(float(np.linalg.norm(y_TO - right) / np.linalg.norm(right)))
        return float(np.max(errors))


@dataclass(frozen=True)
class Missing:
    """A contestant that its library refuses to make here, such as bfloat16 without the instructions for it."""

    name: str
    reason: str
