"""The memory of a prepared weight goes back to the system with it, though weights share mappings."""

import resource
import sys
from pathlib import Path

import numpy as np
import pytest

from rarefy.kernels import extension_status, prepare
from rarefy.layouts import FORMATS
from rarefy.layouts.base import Layout

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
    pytest.mark.skipif(not extension_status()[0], reason="the extension is not built"),
]


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _weight(num_rows: int) -> Layout:
    values = np.ones((num_rows, 1024), np.float32)
    return FORMATS["dense-f32-v1"].from_arrays("dense-f32-v1", {"shape": [num_rows, 1024]}, {"values": values})


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
