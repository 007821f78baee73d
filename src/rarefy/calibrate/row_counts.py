"""How often each row of an embedding is looked up. Shape suffixes: T lookups, O rows."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from rarefy.calibrate.statistics import Sum


@final
@dataclass(frozen=True)
class RowCounts:
    """The share of the lookups that read each row, up to the last row that any of them read: (at most O,)."""

    def init(self, in_features: int) -> Sum:
        """An empty sum; it grows with the largest index."""
        del in_features  # the width of a row says nothing of their number
        return Sum(torch.zeros(0, dtype=torch.float64))

    def update(self, state: Sum, x_TI: Tensor) -> Sum:
        """Count indices, int64 (T, 1)."""
        counts = torch.bincount(x_TI.reshape(-1), minlength=state.total.numel()).double()
        counts[: state.total.numel()] += state.total
        state.total = counts
        state.num_tokens += x_TI.shape[0]
        return state

    def merge(self, a: Sum, b: Sum) -> Sum:
        """The counts of both."""
        longer, shorter = (a, b) if a.total.numel() >= b.total.numel() else (b, a)
        total = longer.total.clone()
        total[: shorter.total.numel()] += shorter.total
        return Sum(total, a.num_tokens + b.num_tokens)

    def finish(self, state: Sum) -> Tensor:
        """The shares, float32."""
        return (state.total / max(1, state.num_tokens)).float()
