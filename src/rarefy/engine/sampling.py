"""Choosing the next token from the logits. V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from rarefy.core.errors import NonFiniteError, UsageError
from rarefy.kernels.ops import Float32Array


@final
@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens; None keeps all.
        top_p: then keep the fewest tokens whose probabilities reach p; None keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens that were seen before.

    Raises:
        UsageError: a value out of its range.

    References:
        top_p: arXiv:1904.09751. repetition_penalty: arXiv:1909.05858, section 4.1.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        # written so that NaN is refused
        if not 0 <= self.temperature < float("inf"):
            raise UsageError("temperature", str(self.temperature), allowed="a finite number of at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError("top_k", str(self.top_k), allowed="an integer of at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError("top_p", str(self.top_p), allowed="a number above 0 and up to 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UsageError("repetition_penalty", str(self.repetition_penalty), allowed="a finite number above 0")

    def choose(self, logits_V: Float32Array, seen: Sequence[int], random: np.random.Generator) -> int:
        """Return the id of the next token.

        Args:
            logits_V: scores of the vocabulary.
            seen: tokens of the prompt and the text so far.
            random: drawn from once per token where temperature > 0, and not at all where it is 0.

        Raises:
            NonFiniteError: the logits hold NaN.
        """
        if self.repetition_penalty != 1.0 and len(seen):
            logits_V = logits_V.copy()
            ids = np.unique(np.asarray(seen, dtype=np.int64))
            old = logits_V[ids]
            logits_V[ids] = np.where(old > 0, old / self.repetition_penalty, old * self.repetition_penalty)
        best = int(np.argmax(logits_V))
        if not np.isfinite(logits_V[best]):  # argmax finds NaN first
            raise NonFiniteError("logits", str(logits_V[best]), hint="the model's weights or activations overflow")
        return best if self.temperature == 0 else self._draw(logits_V, random)

    def _draw(self, logits_V: Float32Array, random: np.random.Generator) -> int:
        if self.top_k is not None and self.top_k < len(logits_V):
            candidates = np.argpartition(logits_V, -self.top_k)[-self.top_k :]
        else:
            candidates = np.arange(len(logits_V))
        # most likely first, ties by id: the draw then does not depend on how argpartition orders them
        candidates = candidates[np.lexsort((candidates, -logits_V[candidates]))]
        scores = logits_V[candidates].astype(np.float64)
        cumulative = np.cumsum(np.exp((scores - scores[0]) / self.temperature))
        if self.top_p is not None:
            num_kept = int(np.searchsorted(cumulative, self.top_p * cumulative[-1])) + 1
            cumulative = cumulative[:num_kept]
        drawn = int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))
        return int(candidates[min(drawn, len(cumulative) - 1)])
