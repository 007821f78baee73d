"""The verdict on a run: size, speed and quality, before and after."""

from rarefy.verdict.judge import judge
from rarefy.verdict.quality import Baseline, measure_before

__all__ = ["Baseline", "judge", "measure_before"]
