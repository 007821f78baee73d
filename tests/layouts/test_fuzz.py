"""Random damage to metadata and arrays: a LayoutError, or a layout that can be decoded and multiplied."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.layouts.examples import example

from rarefy import kernels
from rarefy.core.errors import LayoutError
from rarefy.layouts import FORMATS

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300)
@given(
    st.sampled_from(sorted(FORMATS)),
    st.dictionaries(
        st.sampled_from(
            [
                *("shape", "num_values", "keep", "group", "group_size", "symmetric", "scaled"),
                *("block_shape", "rank", "parts", "num_runs", "inner_rank", "outer_rank", "x"),
            ]
        ),
        json_values,
        max_size=3,
    ),
)
def test_any_json_as_metadata(format, changes):
    meta, arrays = example(format)
    try:
        layout = FORMATS[format].from_arrays(format, {**meta, **changes}, arrays)
    except LayoutError:
        return
    assert list(layout.to_dense().shape) == meta["shape"]


@settings(max_examples=500)
@given(st.sampled_from(sorted(FORMATS)), st.data())
def test_any_bytes_as_arrays(format, data):
    meta, arrays = example(format)
    name = data.draw(st.sampled_from(sorted(arrays)))
    raw = bytearray(arrays[name].tobytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    damaged = np.frombuffer(bytes(raw), dtype=arrays[name].dtype).reshape(arrays[name].shape)
    try:
        layout = FORMATS[format].from_arrays(format, meta, {**arrays, name: damaged})
    except LayoutError:
        return
    assert np.all(np.isfinite(layout.to_dense()))
    assert np.array_equal(layout.arrays()[name], damaged)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.data())
def test_what_is_accepted_multiplies_on_every_instruction_set(format, data):
    meta, arrays = example(format)
    name = data.draw(st.sampled_from(sorted(arrays)))
    raw = bytearray(arrays[name].tobytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    damaged = np.frombuffer(bytes(raw), dtype=arrays[name].dtype).reshape(arrays[name].shape)
    try:
        layout = FORMATS[format].from_arrays(format, meta, {**arrays, name: damaged})
    except LayoutError:
        return
    x = np.ones((3, layout.shape[1]), np.float32)
    for isa in kernels.runnable_isas(kernels.detect_cpu()):
        if isa == "numpy" or kernels.extension_status()[0]:
            assert kernels.prepare(layout, isa=isa).matmul(x).shape == (3, layout.shape[0])
