"""Convolutions with few outputs in a group: what they decode against the layouts' own numbers, and what they refuse."""

import numpy as np
import pytest

from rarefy import kernels
from rarefy.core.solution import Solution
from rarefy.kernels import Convolution, Taps, convolve_direct, convolve_patches, takes_channels_last
from rarefy.layouts import LowRank, Sum, Tapwise, pack

SIZES = [(1, 1), (16, 64), (17, 9), (33, 65), (5, 200), (40, 128)]


def decoded(prepared: kernels.Prepared) -> np.ndarray:
    """A pointwise convolution of the unit matrix: one product of 1 and zeros beside it."""
    width = prepared.shape[1]
    x_BCS, taps = np.eye(width, dtype=np.float32)[None], Taps((1,), (1,), (1,), (0,))
    return convolve_direct(Convolution(x_BCS, (prepared,), None, 1, taps, (width,)))[0]


def skip_numpy(isa: str) -> None:
    if isa == "numpy":
        pytest.skip("numpy has no direct convolution")


@pytest.mark.parametrize("shape", SIZES)
def test_every_layout_is_decoded_exactly(weight, isa, layout_format, shape) -> None:
    skip_numpy(isa)
    made = weight(layout_format, *shape)
    np.testing.assert_array_equal(decoded(kernels.prepare(made.layout, isa=isa)), made.dense_OI)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 32, 64, 96])
def test_every_grid_is_decoded_exactly(weight, isa, int_format, group_size, symmetric) -> None:
    skip_numpy(isa)
    if "int" not in int_format:
        pytest.skip("it has no grid")
    made = weight(int_format, 35, 200, group_size=group_size, symmetric=symmetric)
    np.testing.assert_array_equal(decoded(kernels.prepare(made.layout, isa=isa)), made.dense_OI)


def test_compositions_are_multiplied_and_added(weight, isa) -> None:
    skip_numpy(isa)
    inner, outer = weight("dense-bf16-v1", 37, 66).layout, weight("dense-bf16-v1", 21, 37).layout
    pair = LowRank(outer, inner)
    taps = Tapwise(weight("dense-bf16-v1", 21, 3 * 37).layout, inner, 3)
    both = Sum(pair, weight("bitmask-int4-v1", 21, 66).layout)
    for layout in (pair, taps, both):
        expected = layout.to_dense()
        np.testing.assert_allclose(decoded(kernels.prepare(layout, isa=isa)), expected, rtol=1e-4, atol=1e-4)


def test_more_channels_than_are_decoded_at_once(isa) -> None:
    skip_numpy(isa)
    channels, side, height, width = 300, 15, 3, 4  # some 18 panels of 225 taps fill 256 KB
    random = np.random.default_rng(5)
    weights_OI = random.integers(-3, 4, (channels, side * side)).astype(np.float32)
    x_BHWC = random.integers(-8, 9, (2, height, width, channels)).astype(np.float32)
    bias_O = np.arange(channels, dtype=np.float32)
    made = kernels.prepare(pack(Solution.dense(weights_OI)), isa=isa)
    taps = Taps((side, side), (1, 1), (1, 1), (7, 7))
    y = convolve_direct(Convolution(x_BHWC, (made,), bias_O, channels, taps, (height, width), channels_last=True))
    padded = np.pad(x_BHWC, ((0, 0), (7, 7), (7, 7), (0, 0)))
    expected = np.broadcast_to(bias_O, y.shape).copy()
    for i in range(side):
        for j in range(side):
            expected += padded[:, i : i + height, j : j + width] * weights_OI[:, i * side + j]
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(("group_channels", "group_outputs"), [(8, 8), (4, 4), (3, 4), (1, 2), (16, 16)])
@pytest.mark.parametrize("last", [False, True])
def test_groups_of_which_16_outputs_are_whole_ones(isa, group_channels: int, group_outputs: int, last: bool) -> None:
    skip_numpy(isa)
    groups, height, width = 5, 6, 9  # the last panel of 16 outputs is not full
    assert takes_channels_last(group_channels, group_outputs)
    random = np.random.default_rng(group_outputs)
    weights_GOTC = random.integers(-3, 4, (groups, group_outputs, 9, group_channels)).astype(np.float32)
    x_BHWC = random.integers(-8, 9, (2, height, width, groups * group_channels)).astype(np.float32)
    bias_O = np.arange(groups * group_outputs, dtype=np.float32)
    made = [kernels.prepare(pack(Solution.dense(group.reshape(group_outputs, -1))), isa=isa) for group in weights_GOTC]
    taps = Taps((3, 3), (2, 1), (1, 2), (1, 2))
    x = x_BHWC if last else np.ascontiguousarray(np.moveaxis(x_BHWC, -1, 1))
    y = convolve_direct(Convolution(x, made, bias_O, groups, taps, (3, width), last))
    padded = np.pad(x_BHWC, ((0, 0), (1, 1), (2, 2), (0, 0))).reshape(2, height + 2, width + 4, groups, group_channels)
    expected = np.broadcast_to(bias_O, (2, 3, width, groups * group_outputs)).copy()
    for i in range(3):
        for j in range(3):
            seen = padded[:, i : i + 5 : 2, 2 * j : 2 * j + width]
            expected += np.einsum("bhwgc,goc->bhwgo", seen, weights_GOTC[:, :, 3 * i + j]).reshape(expected.shape)
    np.testing.assert_array_equal(y if last else np.moveaxis(y, 1, -1), expected)


def test_groups_of_which_a_panel_holds_parts_are_refused_with_channels_last() -> None:
    module = pytest.importorskip("rarefy._native")
    made = kernels.prepare(pack(Solution.dense(np.ones((6, 9), np.float32))))
    with pytest.raises(ValueError, match="divide 16"):
        module.convolve(
            *arguments(weights=[made.weights], groups=2, x=np.ones((2, 5, 6, 2), np.float32), channels_last=True)
        )


def arguments(**changes: object) -> list[object]:
    made = kernels.prepare(pack(Solution.dense(np.ones((4, 9), np.float32))))
    found: dict[str, object] = {
        "x": np.ones((2, 4, 5, 6), np.float32),
        "weights": [made.weights],
        "bias": np.ones(4, np.float32),
        "groups": 4,
        "kernel": (3, 3),
        "stride": (1, 1),
        "dilation": (1, 1),
        "before": (1, 1),
        "out": (5, 6),
        "channels_last": False,
        "by_patches": False,
    }
    return list((found | changes).values())


@pytest.mark.parametrize(
    "changes",
    [
        {"x": np.ones((2, 4, 5, 6))},
        {"x": np.ones((2, 4, 30), np.float32)},
        {"x": np.ones((2, 4, 6, 5), np.float32).transpose(0, 1, 3, 2)},
        {"x": np.ones((2, 4, 0, 6), np.float32)},
        {"x": np.ones((2, 0, 5, 6), np.float32)},
        {"x": np.ones((2, 5, 5, 6), np.float32)},
        {"weights": []},
        {"bias": np.ones(3, np.float32)},
        {"bias": np.ones((4, 1), np.float32)},
        {"bias": np.ones(4)},
        {"groups": 0},
        {"groups": -4},
        {"groups": 3},
        {"groups": 2},
        {"groups": 1 << 62},
        {"kernel": (3,)},
        {"kernel": ()},
        {"kernel": (1, 1, 3, 3)},
        {"kernel": (0, 9)},
        {"kernel": (3, 2)},
        {"kernel": (1 << 31, 1 << 31)},
        {"stride": (0, 1)},
        {"stride": (1,)},
        {"dilation": (1, 0)},
        {"dilation": (1 << 62, 1)},
        {"dilation": (1 << 31, 1 << 31)},
        {"before": (-1, 0)},
        {"before": (1 << 62, 0)},
        {"out": (0, 6)},
        {"out": (1 << 40, 1)},
        {"out": (1 << 31, 1 << 31)},
        {"x": np.ones((2, 5, 6, 5), np.float32), "channels_last": True},
        {"groups": 2, "x": np.ones((2, 5, 6, 4), np.float32), "channels_last": True},
    ],
)
def test_what_contradicts_itself_is_refused(changes: dict[str, object]) -> None:
    module = pytest.importorskip("rarefy._native")
    assert module.convolve(*arguments()).shape == (2, 4, 5, 6)
    with pytest.raises((ValueError, TypeError, MemoryError)):
        module.convolve(*arguments(**changes))


@pytest.mark.parametrize(
    "changes", [{"groups": 4}, {"out": (1 << 31, 1 << 31)}, {"kernel": (3, 2)}, {"bias": np.ones(3)}]
)
def test_patches_that_contradict_the_weight_are_refused(changes: dict[str, object]) -> None:
    module = pytest.importorskip("rarefy._native")
    fits: dict[str, object] = {"groups": 1, "x": np.ones((2, 1, 5, 6), np.float32), "by_patches": True}
    assert module.convolve(*arguments(**fits)).shape == (2, 4, 5, 6)
    with pytest.raises((ValueError, TypeError, MemoryError)):
        module.convolve(*arguments(**(fits | changes)))


def test_patches_that_would_hold_too_much_memory_are_left_to_others() -> None:
    wide = kernels.prepare(pack(Solution.dense(np.ones((2, 5000), np.float32))))
    taps = Taps((1,), (1,), (1,), (0,))
    if wide.weights is None:
        pytest.skip("numpy has no direct convolution")
    assert convolve_patches(Convolution(np.ones((1, 5000, 3), np.float32), (wide,), None, 1, taps, (3,))) is None
    long = kernels.prepare(pack(Solution.dense(np.ones((2, 8), np.float32))))
    far = Taps((2, 1), (1, 1), (5000, 1), (0, 0))
    x = np.ones((1, 4, 5001, 64), np.float32)
    assert convolve_patches(Convolution(x, (long,), None, 1, far, (1, 64))) is None
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    y = convolve_patches(Convolution(last, (long,), None, 1, far, (1, 64), channels_last=True))
    np.testing.assert_array_equal(y, np.full((1, 1, 64, 2), 8, np.float32))


def test_places_far_outside_of_the_input_are_zeros() -> None:
    module = pytest.importorskip("rarefy._native")
    y = module.convolve(*arguments(before=(1000, 1000), out=(3, 2)))
    np.testing.assert_array_equal(y, np.ones((2, 4, 3, 2), np.float32))
    assert module.convolve(*arguments(x=np.ones((0, 4, 5, 6), np.float32))).shape == (0, 4, 5, 6)


@pytest.mark.parametrize("stride", [(1 << 31) - 1, 1 << 30, 1 << 22])
def test_outputs_that_lie_too_far_from_each_other_are_refused(stride: int) -> None:
    """Padded, what they see has so many floats that 64 bits do not count them."""
    module = pytest.importorskip("rarefy._native")
    made = kernels.prepare(pack(Solution.dense(np.ones((1, 2), np.float32))))
    geometry = {"kernel": (1, 2), "stride": (stride, 1), "dilation": (1, 511), "before": (0, 0), "channels_last": True}
    x = np.ones((1, 3, 513, 1), np.float32)
    few = {"x": x, "weights": [made.weights], "bias": None, "groups": 1} | geometry
    y = module.convolve(*arguments(**few, out=(2, 1)))
    np.testing.assert_array_equal(y.reshape(-1), [2, 0])
    with pytest.raises(ValueError, match="too far"):
        module.convolve(*arguments(**few, out=((1 << 51) // stride + 1, 1)))
