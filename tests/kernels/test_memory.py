"""Memory of weights goes back to the system with them, though they share mappings; that of outputs is used again."""

import resource
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rarefy.kernels import extension_status, prepare
from rarefy.kernels.extension import detect_cpu, native
from rarefy.layouts import FORMATS
from rarefy.layouts.base import Layout
from rarefy.measure.kernel_samples import samples_of

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
    pytest.mark.skipif(not extension_status()[0], reason="the extension is not built"),
]


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _weight(num_rows: int) -> Layout:
    values = np.ones((num_rows, 1024), np.float32)
    return FORMATS["dense-f32-v1"].from_arrays("dense-f32-v1", {"shape": [num_rows, 1024]}, {"values": values})


def test_what_only_more_rows_read_is_held_but_does_not_count_as_read() -> None:
    # Lists for one row, and all codes for several.
    (sample,) = samples_of("bitmask-int8-v1")
    layout, _ = replace(sample, density=0.2).make((512, 1024))
    if not detect_cpu().avx_vnni:
        pytest.skip("no AVX-VNNI here")
    with_lists, dense = prepare(layout, isa="avx_vnni"), prepare(_weight(512), isa="avx2")
    assert with_lists.read_nbytes < 0.8 * 512 * 1024 < 512 * 1024 < with_lists.nbytes
    assert dense.read_nbytes == dense.nbytes


def test_a_weight_gives_its_pages_back_while_its_neighbours_live() -> None:
    small, large = _weight(16), _weight(3072)
    neighbours = [prepare(small)]
    x_TI = np.ones((1, 1024), np.float32)
    before = _resident_bytes()
    middle = prepare(large)  # 12 MB
    held = _resident_bytes() - before
    neighbours.append(prepare(small))
    del middle
    kept = _resident_bytes() - before
    assert held > 11e6
    assert kept < 3e6
    for neighbour in neighbours:
        np.testing.assert_array_equal(neighbour.matmul(x_TI), np.full((1, 16), 1024, np.float32))


def test_outputs_use_memory_again_and_never_that_of_a_living_array() -> None:
    weight = prepare(_weight(160))
    x_TI = np.ones((256, 1024), np.float32)
    first = weight.matmul(x_TI)
    address = first.ctypes.data
    second = weight.matmul(x_TI * 2)
    assert second.ctypes.data != address
    corner = first[1:2, 5:9]  # a view keeps all of it
    del first
    third = weight.matmul(x_TI * 3)
    assert third.ctypes.data != address
    np.testing.assert_array_equal(corner, np.full((1, 4), 1024, np.float32))
    del corner
    fourth = weight.matmul(x_TI * 4)
    assert fourth.ctypes.data == address
    assert address % 64 == 0
    assert fourth.flags.writeable
    assert fourth.flags.c_contiguous
    for factor, y_TO in ((2, second), (3, third), (4, fourth)):
        np.testing.assert_array_equal(y_TO, np.full((256, 160), 1024 * factor, np.float32))


def test_outputs_that_are_gone_hold_little_memory() -> None:
    module = native()
    assert module is not None
    weight = prepare(_weight(3072))
    outputs = [weight.matmul(np.ones((1024, 1024), np.float32)) for _ in range(4)]  # 12 MB each
    before = _resident_bytes()
    del outputs
    assert 12e6 <= module.waiting_bytes() <= 32 << 20
    assert before - _resident_bytes() > 20e6
