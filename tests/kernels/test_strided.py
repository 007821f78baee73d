"""Strided copies against numpy's own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy import kernels
from rarefy.kernels import copy_strided


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), max_size=8), st.sampled_from([1, 2, 3]))
def test_any_view_comes_out_in_the_order_of_its_axes(axes: list[tuple[int, int]], num_threads: int) -> None:
    sizes, strides = [size for size, _ in axes], [stride for _, stride in axes]
    memory = np.arange(1 + sum(max(0, size - 1) * stride for size, stride in axes), dtype=np.float32)
    view = np.lib.stride_tricks.as_strided(memory, sizes, [4 * stride for stride in strides], writeable=False)
    target = np.full(view.size, -1, np.float32)
    before = kernels.get_num_threads()
    kernels.set_num_threads(num_threads)
    try:
        copy_strided(view, target)
    finally:
        kernels.set_num_threads(before)
    np.testing.assert_array_equal(target, np.ascontiguousarray(view).ravel())


def test_a_long_copy_is_split_among_threads_without_a_seam() -> None:
    image = np.random.default_rng(0).standard_normal((3, 41, 43, 19)).astype(np.float32)
    view = np.lib.stride_tricks.sliding_window_view(image, (3, 5), axis=(1, 2)).transpose(0, 1, 2, 4, 5, 3)
    target = np.empty(view.shape, np.float32)
    copy_strided(view, target)
    np.testing.assert_array_equal(target, view)


def test_sizes_that_differ_are_refused() -> None:
    module = pytest.importorskip("rarefy._native")
    with pytest.raises(ValueError, match="differ in size"):
        module.copy_strided(np.zeros((2, 3), np.float32), np.zeros(5, np.float32))
    with pytest.raises(TypeError):
        module.copy_strided(np.zeros(3), np.zeros(3, np.float32))
