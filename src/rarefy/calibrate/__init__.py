"""Calibration: the data, the statistics, and the walk over a model's blocks."""

from rarefy.calibrate.calls import Call, calibration_mode
from rarefy.calibrate.collect import collect_statistics
from rarefy.calibrate.inputs import cast_inputs, example_calls, text_calls, without_cache
from rarefy.calibrate.statistics import AbsMean, Activity, Gram, Mean, SquaredNorm, Statistic, Sum
from rarefy.calibrate.text import DEFAULT_SOURCE, Windows, default_text, make_windows, read_text
from rarefy.calibrate.walk import BlockWalk

__all__ = [
    "DEFAULT_SOURCE",
    "AbsMean",
    "Activity",
    "BlockWalk",
    "Call",
    "Gram",
    "Mean",
    "SquaredNorm",
    "Statistic",
    "Sum",
    "Windows",
    "calibration_mode",
    "cast_inputs",
    "collect_statistics",
    "default_text",
    "example_calls",
    "make_windows",
    "read_text",
    "text_calls",
    "without_cache",
]
