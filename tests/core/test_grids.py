"""The oracles are exact fractions and bit patterns from the standard library."""

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rarefy.core.errors import NonFiniteError, PatternError
from rarefy.core.grids import (
    MAX_SCALE,
    MIN_SCALE,
    FittedGrid,
    IntGrid,
    dequantize,
    fit_minmax,
    from_bf16_bits,
    quantize,
    round_scale,
    to_bf16_bits,
)

GRIDS = [IntGrid(bits, size, symmetric) for bits in (4, 8) for size in (None, 32, 64) for symmetric in (True, False)]

weights = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=70),
    elements=st.floats(-1000, 1000, width=32),
)


def float_of_bits(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits << 16))[0]


@given(st.floats(width=32))
@example(math.nan)
@example(-0.0)
@example(1.00390625)  # halfway: ties to even, down
@example(1.01171875)  # halfway: ties to even, up
@example(3.4028234663852886e38)  # rounds up to infinity
@example(1e-45)
def test_bf16_rounds_to_the_nearest(value):
    bits = int(to_bf16_bits(np.array([value], dtype=np.float32))[0])
    back = float(from_bf16_bits(np.array([bits], dtype=np.uint16))[0])
    if math.isnan(value):
        assert math.isnan(back)
        return
    assert math.copysign(1, back) == math.copysign(1, value)
    if math.isinf(value):
        assert back == value
        return
    # truncation gives the neighbour towards zero; the next pattern is the one away from it
    low = struct.unpack("<I", struct.pack("<f", value))[0] >> 16
    away = Fraction(2) ** 128 if (low + 1) & 0x7FFF == 0x7F80 else abs(Fraction(float_of_bits(low + 1)))
    down, up = abs(Fraction(value)) - abs(Fraction(float_of_bits(low))), away - abs(Fraction(value))
    expected = low if down < up or (down == up and low % 2 == 0) else low + 1
    assert bits == expected
    assert struct.pack("<f", back) == struct.pack("<f", float_of_bits(expected))


def test_bf16_keeps_every_pattern_but_quietens_nan():
    bits = np.arange(2**16, dtype=np.uint16)
    nan = ((bits & 0x7F80) == 0x7F80) & ((bits & 0x7F) != 0)
    again = to_bf16_bits(from_bf16_bits(bits))
    assert np.array_equal(again[~nan], bits[~nan])
    assert np.array_equal(again[nan], bits[nan] | 0x40)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4)])
def test_bf16_keeps_the_shape(shape):
    assert to_bf16_bits(np.ones(shape, dtype=np.float32)).shape == shape
    assert from_bf16_bits(np.ones(shape, dtype=np.uint16)).shape == shape


@pytest.mark.parametrize(
    ("num_bits", "group_size", "symmetric"),
    [
        (1, 64, True),
        (5, 64, True),
        (True, 64, True),
        (4, 0, True),
        (4, 33, True),
        (4, -32, True),
        (4, 64.0, True),
        (4, 64, 1),
        (8, 2**31, True),
    ],
)
def test_impossible_grid(num_bits, group_size, symmetric):
    with pytest.raises(PatternError, match="allowed"):
        IntGrid(num_bits, group_size, symmetric)


def test_number_of_groups():
    assert [IntGrid(4, 64, True).num_groups(width) for width in (0, 1, 64, 65, 576)] == [0, 1, 1, 2, 9]
    assert IntGrid(4, None, True).num_groups(1000) == 1


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_every_value_is_exact_in_float32(num_bits):
    grid = IntGrid(num_bits, None, False)
    codes = np.arange(2**num_bits, dtype=np.uint8)[None, :]
    for scale in (MIN_SCALE, 1.9921875 * 2.0**-5, 1.5, 1.9921875 * 2.0**118, MAX_SCALE):
        for zero in (0, 1, 2 ** (num_bits - 1), 2**num_bits - 1):
            fitted = FittedGrid(grid, np.array([[scale]], dtype=np.float32), np.array([[zero]], dtype=np.uint8))
            values = dequantize(codes, fitted)
            assert [Fraction(float(v)) for v in values[0]] == [Fraction(scale) * (int(c) - zero) for c in codes[0]]
            assert np.array_equal(quantize(values, fitted), codes)


@given(weights, st.sampled_from(GRIDS))
@example(np.zeros((3, 40), dtype=np.float32), IntGrid(4, 32, True))
@example(np.full((2, 33), 1e-42, dtype=np.float32), IntGrid(8, 32, False))
@example(np.array([[7.5, -7.5]], dtype=np.float32), IntGrid(4, None, False))
def test_fit_covers_the_weights(weight_OI, grid):
    fitted = fit_minmax(weight_OI, grid)
    codes = quantize(weight_OI, fitted)
    values = dequantize(codes, fitted)
    assert fitted.scale_OG.shape == (weight_OI.shape[0], grid.num_groups(weight_OI.shape[1]))
    assert codes.max() < 2**grid.num_bits
    size = grid.group_size or weight_OI.shape[1]
    for (o, i), w in np.ndenumerate(weight_OI):
        scale, zero = float(fitted.scale_OG[o, i // size]), int(fitted.zero_point_OG[o, i // size])
        assert values[o, i] == scale * (int(codes[o, i]) - zero)
        # nothing is clipped: no weight is further than half a step from its value
        assert abs(float(w) - float(values[o, i])) <= scale * 0.5 * (1 + 1e-6)
        if w == 0:
            assert values[o, i] == 0
    assert np.array_equal(quantize(values, fitted), codes)
    assert np.array_equal(dequantize(quantize(values, fitted), fitted), values)


def test_fit_is_tight():
    weight = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    for grid in GRIDS:
        fitted = fit_minmax(weight, grid)
        for o in range(50):
            for g in range(grid.num_groups(64)):
                size = grid.group_size or 64
                group = weight[o, g * size : (g + 1) * size]
                low, high = min(0.0, float(group.min())), max(0.0, float(group.max()))
                half = 2 ** (grid.num_bits - 1)
                exact = max(high / (half - 1), -low / half) if grid.symmetric else (high - low) / (2 * half - 1)
                assert abs(float(fitted.scale_OG[o, g]) / exact - 1) <= 2**-7  # one step of bfloat16


def test_a_group_of_zeros():
    for grid in GRIDS:
        fitted = fit_minmax(np.zeros((2, 70), dtype=np.float32), grid)
        assert np.all(fitted.scale_OG == 1)
        assert np.array_equal(
            quantize(np.zeros((2, 70), np.float32), fitted), np.repeat(fitted.zero_point_OG[:, :1], 70, 1)
        )


def test_extreme_weights_stay_finite():
    largest = np.finfo(np.float32).max
    for grid in GRIDS:
        fitted = fit_minmax(np.array([[largest, -largest]], dtype=np.float32), grid)
        assert np.all(np.isfinite(dequantize(quantize(np.array([[largest, 0]], dtype=np.float32), fitted), fitted)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_fit_refuses_non_finite(bad):
    weight = np.zeros((2, 70), dtype=np.float32)
    weight[1, 66] = bad
    for grid in GRIDS:
        with pytest.raises(NonFiniteError):
            fit_minmax(weight, grid)


def test_empty_matrices():
    for grid in GRIDS:
        for shape in ((0, 5), (3, 0), (0, 0)):
            fitted = fit_minmax(np.zeros(shape, dtype=np.float32), grid)
            assert dequantize(quantize(np.zeros(shape, dtype=np.float32), fitted), fitted).shape == shape


@pytest.mark.parametrize(
    "change",
    [
        {"scale_OG": np.ones((2, 3), dtype=np.float64)},
        {"scale_OG": np.ones(3, dtype=np.float32)},
        {"scale_OG": np.full((2, 3), 1.001, dtype=np.float32)},
        {"scale_OG": np.zeros((2, 3), dtype=np.float32)},
        {"scale_OG": -np.ones((2, 3), dtype=np.float32)},
        {"scale_OG": np.full((2, 3), np.nan, dtype=np.float32)},
        {"scale_OG": np.full((2, 3), np.inf, dtype=np.float32)},
        {"scale_OG": np.full((2, 3), 1e-40, dtype=np.float32)},
        {"zero_point_OG": np.zeros((2, 2), dtype=np.uint8)},
        {"zero_point_OG": np.zeros((2, 3), dtype=np.int64)},
        {"zero_point_OG": np.full((2, 3), 16, dtype=np.uint8)},
        {"grid": IntGrid(4, 32, True)},
    ],
)
def test_a_wrong_fitted_grid(change):
    right = {
        "grid": IntGrid(4, 32, False),
        "scale_OG": np.ones((2, 3), dtype=np.float32),
        "zero_point_OG": np.zeros((2, 3), dtype=np.uint8),
    }
    FittedGrid(**right)
    with pytest.raises(PatternError):
        FittedGrid(**{**right, **change})


def test_width_must_match_the_grid():
    fitted = fit_minmax(np.ones((2, 64), dtype=np.float32), IntGrid(4, 32, True))
    with pytest.raises(PatternError, match="shape"):
        quantize(np.ones((2, 65), dtype=np.float32), fitted)
    with pytest.raises(PatternError, match="shape"):
        dequantize(np.ones((3, 64), dtype=np.uint8), fitted)


@given(hnp.arrays(np.float64, 7, elements=st.floats(0, 1e300)))
def test_round_scale_gives_valid_scales(scale):
    rounded = round_scale(scale)
    FittedGrid(IntGrid(4, None, True), rounded[:, None], np.full((7, 1), 8, dtype=np.uint8))
    inside = (scale >= MIN_SCALE) & (scale <= MAX_SCALE)
    assert np.all(np.abs(rounded[inside] / scale[inside] - 1) <= 2.0**-8)  # half a step


def test_torch_computes_the_same_bits():
    torch = pytest.importorskip("torch")
    weight = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)
    for grid in GRIDS:
        fitted = fit_minmax(weight, grid)
        size = grid.group_size or 256
        scale = torch.from_numpy(fitted.scale_OG).repeat_interleave(size, 1)[:, :256]
        zero = torch.from_numpy(fitted.zero_point_OG).repeat_interleave(size, 1)[:, :256].float()
        codes = (torch.round(torch.from_numpy(weight) / scale) + zero).clamp(0, 2**grid.num_bits - 1)
        assert np.array_equal(codes.numpy(), quantize(weight, fitted))
        assert np.array_equal(((codes - zero) * scale).numpy(), dequantize(quantize(weight, fitted), fitted))
        assert np.array_equal(torch.from_numpy(fitted.scale_OG).bfloat16().float().numpy(), fitted.scale_OG)
