import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.core.errors import DamagedFileError
from rarefy.core.results import (
    NATS,
    CalibrationInfo,
    LayerResult,
    Metric,
    PairedDifference,
    RunReport,
    Spread,
    UntouchedLayer,
)

REPORT = RunReport(
    model="m",
    architecture="LlamaForCausalLM",
    num_parameters=10,
    num_blocks=2,
    recipe={"steps": [{"method": "wanda", "pattern": {"keep": 2, "group": 4}, "x": None}]},
    seed=0,
    calibration=CalibrationInfo("file.txt", 128, 512, 65536, "note"),
    machine={"cpu": "x", "cores": 2, "memory_gb": 7.5},
    versions={"numpy": "2"},
    layers=(
        LayerResult("a.q", (4, 8), "nm-int4-v1", ("wanda", "rtn"), 0.5, 4, None, 3.25, 0.01, "output", 128, 13, 0.5),
    ),
    untouched=(UntouchedLayer("n", "LayerNorm", (8,), 32, "1-D"),),
    metrics=(
        Metric("perplexity", "", False, Spread(26.0, 26.0, 26.0, 1), None, "how"),
        Metric("x", "", True, None, Spread(1.0, 1.0, 1.0, 1), "how", PairedDifference(0.25, 0.125, 8, NATS)),
    ),
    warnings=("slow",),
    seconds={"load": 1.5},
    peak_memory_bytes=5,
)


def through_json(record):
    return type(record).from_json(json.loads(json.dumps(record.to_json(), allow_nan=False)))


def test_round_trip():
    assert through_json(REPORT) == REPORT
    assert REPORT.to_json()["report_version"] == 2
    machine = through_json(REPORT).machine
    assert type(machine["cores"]) is int
    assert type(machine["memory_gb"]) is float


@pytest.mark.parametrize("record", [Metric, LayerResult, UntouchedLayer, CalibrationInfo, Spread])
@settings(max_examples=30)
@given(st.data())
def test_round_trip_of_anything(record, data):
    value = data.draw(st.from_type(record))
    assert repr(through_json(value)) == repr(value)  # repr, since nan != nan


def test_non_finite_numbers_survive():
    again = through_json(Spread(math.inf, -math.inf, math.nan, 1))
    assert (again.median, again.low) == (math.inf, -math.inf)
    assert math.isnan(again.high)


def test_numpy_numbers_become_plain():
    spread = Spread(np.float32(1.5), np.float64(1), np.float32(np.inf), np.int64(3))
    assert through_json(spread) == Spread(1.5, 1.0, math.inf, 3)


def test_an_integer_is_a_float_too():
    assert Spread.from_json({"median": 1, "low": 0, "high": 2, "num_runs": 3}) == Spread(1.0, 0.0, 2.0, 3)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("report_version",), 1, "report_version 1"),
        (("seed",), "0", r"RunReport\.seed"),
        (("seed",), True, r"RunReport\.seed"),
        (("layers",), {}, r"RunReport\.layers"),
        (("layers", 0, "shape"), [1], r"layers\[0\]\.shape"),
        (("layers", 0, "error"), "big", r"layers\[0\]\.error"),
        (("layers", 0, "error_metric"), "none", r"layers\[0\]\.error_metric"),
        (("layers", 0, "num_bits"), 4.5, r"layers\[0\]\.num_bits"),
        (("metrics", 0, "before", "low"), None, "low"),
        (("metrics", 0, "before"), 3, "before"),
        (("calibration",), [], "calibration"),
        (("machine", "cpu"), [], "machine"),
        (("surprise",), 1, "unknown fields"),
    ],
)
def test_damage_is_named(path, value, message):
    data = json.loads(json.dumps(REPORT.to_json()))
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(DamagedFileError, match=message):
        RunReport.from_json(data)


def test_missing_field():
    data = REPORT.to_json()
    del data["seed"]
    with pytest.raises(DamagedFileError, match=r"missing fields \['seed'\]"):
        RunReport.from_json(data)
    with pytest.raises(DamagedFileError, match="an object"):
        RunReport.from_json([])
