"""Layouts of version 1 must be read, and written again to the same bytes, for ever."""

import json
from pathlib import Path

import numpy as np
import pytest

from rarefy.layouts import FORMATS, pack, unpack

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

# formats that no solution asks for: their own constructors make them
NO_SOLUTION = (
    "ternary-v1",
    "binary-v1",
    "lut4-v1",
    "lut8-v1",
    "lowrank-bf16-v1",
    "lowrank-int8-v1",
    "tapwise-bf16-v1",
    "sum-v1",
)


def test_every_format_has_a_golden_file():
    assert {path.stem for path in (GOLDEN / "layouts").iterdir()} == set(FORMATS)


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_layout(format):
    golden = json.loads((GOLDEN / "layouts" / f"{format}.json").read_text())
    raw = {name: bytes.fromhex(text) for name, text in golden["arrays"].items()}
    spec = FORMATS[format].array_spec(format, golden["meta"])
    arrays = {name: np.frombuffer(raw[name], dtype).reshape(shape) for name, (dtype, shape) in spec.items()}
    layout = FORMATS[format].from_arrays(format, golden["meta"], arrays)
    assert golden["format"] == format
    assert layout.to_dense().tolist() == golden["dense"]
    assert {name: array.tobytes() for name, array in layout.arrays().items()} == raw
    assert np.array_equal(unpack(layout).value_OI, layout.to_dense())
    if format in NO_SOLUTION:
        return
    again = pack(unpack(layout), float_format="f32" if format == "dense-f32-v1" else "bf16")
    assert (again.format, again.meta()) == (format, golden["meta"])
    assert {name: array.tobytes() for name, array in again.arrays().items()} == raw


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_the_golden_values_follow_from_the_specification(format, read_by_the_specification):
    golden = json.loads((GOLDEN / "layouts" / f"{format}.json").read_text())
    raw = {name: bytes.fromhex(text) for name, text in golden["arrays"].items()}
    assert read_by_the_specification(format, golden["meta"], raw).tolist() == golden["dense"]
