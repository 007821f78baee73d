"""One measured quantity of one model, with the words that say how it was measured."""

import math
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from rarefy.core.errors import UsageError
from rarefy.core.results import Metric, PairedDifference, Spread


@final
@dataclass(frozen=True)
class Measurement:
    """A quantity measured on one model.

    Args:
        name: e.g. perplexity, sts_spearman, accuracy, decode_tokens_per_s, peak_memory_bytes.
        unit: e.g. "bytes", "tokens/s"; empty for a pure number.
        higher_is_better: direction of improvement.
        value: the value and its spread.
        how: what was measured and how, complete enough to repeat it.
        examples: what the value is the mean of (for a perplexity its logarithm is), one number for each example, if
            every example counts the same; empty elsewhere.
        examples_unit: of those numbers.
    """

    name: str
    unit: str
    higher_is_better: bool
    value: Spread
    how: str
    examples: tuple[float, ...] = ()
    examples_unit: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return a dict that `json.dumps` accepts."""
        return {
            "metric": self.name,
            "unit": self.unit,
            "higher_is_better": self.higher_is_better,
            "value": self.value.median,
            "low": self.value.low,
            "high": self.value.high,
            "num_runs": self.value.num_runs,
            "how": self.how,
        }


def exact(value: float) -> Spread:
    """The spread of a quantity that does not vary, such as a file size."""
    return Spread(median=float(value), low=float(value), high=float(value), num_runs=1)


def compare(before: Measurement | None, after: Measurement | None) -> Metric:
    """Put the same measurement of two models side by side.

    Args:
        before: of the input model, or None if it could not be measured.
        after: of the compressed model, or None.

    Raises:
        UsageError: both are None, or they are different quantities or were measured differently.
    """
    known = after or before
    if known is None:
        raise UsageError("comparison", "neither side was measured")
    if before is not None and after is not None:
        for field in ("name", "unit", "higher_is_better"):
            if getattr(before, field) != getattr(after, field):
                raise UsageError(
                    "comparison",
                    f"{field} {getattr(before, field)!r} against {getattr(after, field)!r}",
                    allowed="one quantity",
                )
    how = known.how
    if before is not None and after is not None and before.how != after.how:
        how = f"before: {before.how}; after: {after.how}"
    return Metric(
        name=known.name,
        unit=known.unit,
        higher_is_better=known.higher_is_better,
        before=None if before is None else before.value,
        after=None if after is None else after.value,
        how=how,
        paired=None if before is None or after is None else _paired(before, after),
    )


def _paired(before: Measurement, after: Measurement) -> PairedDifference | None:
    if len(before.examples) != len(after.examples) or len(after.examples) < 2:
        return None
    differences = np.subtract(after.examples, before.examples)
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return PairedDifference(float(differences.mean()), error, len(differences), after.examples_unit)
