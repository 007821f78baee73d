"""Records of what a run did and measured. Reports and the command line read these, or their JSON, and nothing else.

`to_json` gives plain dicts, lists, strings and numbers for `json.dumps`; `from_json` checks them and gives the record
back. JSON has no NaN or infinity, so that such a number is written as the string "nan", "inf" or "-inf".
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, final

import numpy as np

from rarefy.core.errors import DamagedFileError

REPORT_VERSION = 2
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

# A perplexity is the exponential of a mean in this unit, so that a difference in it is a ratio of perplexities.
NATS = "nats per token"

ErrorMetric = Literal["output", "weight"]


class Record:
    """Abstract base of the records: JSON in and out, by the annotations of the fields."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data for `json.dumps`."""
        encoded = _encode(self)
        assert isinstance(encoded, dict)
        return encoded

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Read what `to_json` gave.

        Raises:
            DamagedFileError: a field is missing, unknown or of the wrong type.
        """
        record: Self = _decode(cls, data, cls.__name__)
        return record


@final
@dataclass(frozen=True)
class Spread(Record):
    """Median and extremes of repeated runs of one measurement."""

    median: float
    low: float
    high: float
    num_runs: int


@final
@dataclass(frozen=True)
class PairedDifference(Record):
    """How far the same examples moved, after minus before: how hard each is cancels out.

    Args:
        mean: of the differences.
        standard_error: of that mean, from how much the differences vary between examples.
        num_pairs: examples.
        unit: of the differences, such as NATS; empty for a pure number.
    """

    mean: float
    standard_error: float
    num_pairs: int
    unit: str


@final
@dataclass(frozen=True)
class Metric(Record):
    """One measurement before and after compression.

    Args:
        name: e.g. perplexity, disk_bytes, decode_tokens_per_s, prompt_tokens_per_s, peak_memory_bytes.
        unit: e.g. bytes, tokens/s; empty where there is none.
        higher_is_better: direction.
        before: of the input model; None if not measured.
        after: of the result; None if not measured.
        how: how it was measured, in words a reader can repeat.
        paired: the difference example by example, where both sides saw the same ones.
    """

    name: str
    unit: str
    higher_is_better: bool
    before: Spread | None
    after: Spread | None
    how: str
    paired: PairedDifference | None = None


@final
@dataclass(frozen=True)
class LayerResult(Record):
    """One compressed layer.

    Args:
        name: module name.
        shape: (O, I).
        format: storage format, a key of layouts.FORMATS.
        steps: names of the methods applied, in order.
        sparsity: fraction of zeros.
        num_bits: bits of a stored code; None for float values.
        group_size: columns per scale; None for one per row or float values.
        bits_per_weight: packed_bytes * 8 / (O * I).
        error: relative squared error, see error_metric.
        error_metric: "output": ||(W - V) X||_F^2 / ||W X||_F^2; "weight": ||W - V||_F^2 / ||W||_F^2.
        dense_bytes: bytes of the weight before.
        packed_bytes: bytes of all arrays of the layout.
        seconds: time spent on the layer.
    """

    name: str
    shape: tuple[int, int]
    format: str
    steps: tuple[str, ...]
    sparsity: float
    num_bits: int | None
    group_size: int | None
    bits_per_weight: float
    error: float
    error_metric: ErrorMetric
    dense_bytes: int
    packed_bytes: int
    seconds: float


@final
@dataclass(frozen=True)
class UntouchedLayer(Record):
    """A layer that the run left alone, and why."""

    name: str
    kind: str
    shape: tuple[int, ...]
    num_bytes: int
    reason: str


@final
@dataclass(frozen=True)
class CalibrationInfo(Record):
    """Where the calibration data came from and how much of it was used."""

    source: str
    num_samples: int
    sequence_length: int
    num_tokens: int
    note: str


@final
@dataclass(frozen=True)
class RunReport(Record):
    """Everything a compression run has to say; the content of report.json.

    Args:
        model: where the model came from.
        architecture: class name of the model.
        num_parameters: of the input model.
        num_blocks: repeated blocks found.
        recipe: the recipe as plain data.
        seed: of the run.
        calibration: None if no method needed data.
        machine: CPU, cores, memory, instruction sets.
        versions: of packages.
        layers: the compressed layers.
        untouched: the others, with reasons.
        metrics: measurements before and after.
        warnings: plain sentences.
        notes: the same of what is as it was asked for.
        seconds: time per phase.
        peak_memory_bytes: of the process.
        report_version: of this record's fields.
    """

    model: str
    architecture: str
    num_parameters: int
    num_blocks: int
    recipe: dict[str, Any]
    seed: int
    calibration: CalibrationInfo | None
    machine: dict[str, str | int | float]
    versions: dict[str, str]
    layers: tuple[LayerResult, ...]
    untouched: tuple[UntouchedLayer, ...]
    metrics: tuple[Metric, ...]
    warnings: tuple[str, ...]
    seconds: dict[str, float]
    peak_memory_bytes: int
    notes: tuple[str, ...] = ()
    report_version: int = REPORT_VERSION

    def __post_init__(self) -> None:
        if self.report_version != REPORT_VERSION:
            raise DamagedFileError("report", f"report_version {self.report_version}", allowed=str(REPORT_VERSION))


def _encode(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, np.generic):
        return _encode(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _decode(expected: Any, value: object, where: str) -> Any:
    """Convert plain data to the annotated type, or raise DamagedFileError."""
    if expected is Any:
        return value
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if dataclasses.is_dataclass(expected):
        return _decode_record(expected, value, where)
    if origin in (types.UnionType, typing.Union):
        return _decode_union(args, value, where)
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, list):
        variadic = len(args) == 2 and args[1] is Ellipsis
        kinds = (args[0],) * len(value) if variadic else args
        if len(kinds) == len(value):
            return tuple(_decode(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict and isinstance(value, dict):
        return {str(key): _decode(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if expected is float:
        if isinstance(value, str) and value in _NON_FINITE:
            return _NON_FINITE[value]
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    if expected is type(None) and value is None:
        return None
    if expected in (str, bool, int) and type(value) is expected:
        return value
    raise DamagedFileError(where, f"{value!r:.80}", allowed=str(getattr(expected, "__name__", expected)))


def _decode_record(expected: Any, value: object, where: str) -> Any:
    if not isinstance(value, dict):
        raise DamagedFileError(where, f"{value!r:.80}", allowed=f"an object with the fields of {expected.__name__}")
    hints = typing.get_type_hints(expected)
    missing, unknown = sorted(hints.keys() - value.keys()), sorted(map(str, value.keys() - hints.keys()))
    if missing or unknown:
        raise DamagedFileError(where, f"missing fields {missing}, unknown fields {unknown}", allowed=f"{sorted(hints)}")
    return expected(**{name: _decode(hints[name], value[name], f"{where}.{name}") for name in hints})


def _decode_union(args: tuple[Any, ...], value: object, where: str) -> Any:
    # an exact type first, so that 1 in `str | int | float` stays an int
    for option in args:
        if type(value) is option:
            return value
    for option in args:
        try:
            return _decode(option, value, where)
        except DamagedFileError:
            if option is args[-1] or not isinstance(value, dict):
                continue
            raise
    raise DamagedFileError(where, f"{value!r:.80}", allowed=" or ".join(getattr(a, "__name__", str(a)) for a in args))
