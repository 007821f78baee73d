"""Ternary, binary and lookup-table layouts: their constructors, by brute force and by published values."""

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rarefy.core.errors import LayoutError, NonFiniteError
from rarefy.layouts import NF4, Binary, LookupTable, Ternary, packed_nbytes, unpack
from rarefy.testing import check_layout

SHAPES = [(0, 5), (5, 0), (1, 1), (3, 4), (2, 5), (1, 8), (2, 31), (3, 67), (4, 64), (5, 97), (7, 130)]
GROUP_SIZES = [None, 32, 64, 96]


def scales_for(rows, width, group_size, seed=0):
    num_groups = 1 if group_size is None else -(-width // group_size)
    rng = np.random.default_rng([seed, rows, width])
    return (rng.integers(128, 256, (rows, num_groups)) * 2.0 ** rng.integers(-20, 3, (rows, num_groups))).astype(
        np.float32
    )


def multiplied(values_OI, scale_OG, group_size):
    """Loops, and one product at a time."""
    dense = np.zeros(values_OI.shape, dtype=np.float32)
    for (o, i), value in np.ndenumerate(values_OI):
        dense[o, i] = np.float32(value) * scale_OG[o, 0 if group_size is None else i // group_size]
    return dense


def check(layout, read_by_the_specification, expected):
    check_layout(layout)
    assert np.array_equal(layout.to_dense(), expected)
    raw = {name: array.tobytes() for name, array in layout.arrays().items()}
    assert np.array_equal(read_by_the_specification(layout.format, layout.meta(), raw), expected)
    assert layout.nbytes == sum(map(len, raw.values())) == packed_nbytes(layout.format, layout.meta())
    solution = unpack(layout)
    solution.check()
    assert np.array_equal(solution.weight_OI, expected)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("cls", "levels"), [(Ternary, (-1, 0, 1)), (Binary, (-1, 1))])
def test_levels(read_by_the_specification, cls, levels, group_size):
    rng = np.random.default_rng(1)
    for rows, width in SHAPES:
        level_OI = rng.choice(levels, (rows, width))
        scale_OG = scales_for(rows, width, group_size)
        layout = cls.from_levels(level_OI, scale_OG, group_size)
        check(layout, read_by_the_specification, multiplied(level_OI, scale_OG, group_size))
        assert np.array_equal(layout.levels_OI(), level_OI)
        assert layout.levels_OI().dtype == np.int8


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("cls", "levels"), [(Ternary, (-1, 0, 1)), (Binary, (-1, 1))])
def test_a_dense_matrix_of_the_right_kind_keeps_its_values(cls, levels, group_size):
    rng = np.random.default_rng(2)
    for rows, width in SHAPES:
        dense = multiplied(rng.choice(levels, (rows, width)), scales_for(rows, width, group_size), group_size)
        layout = cls.from_dense(dense, group_size)
        assert np.array_equal(layout.to_dense(), dense)
        check_layout(layout)


def test_bytes_of_a_ternary_row():
    # 2 + 0*3 + 1*9 + 2*27 + 2*81, then one digit alone
    layout = Ternary.from_levels(np.array([[1, -1, 0, 1, 1, 0]]), np.ones((1, 1), np.float32), None)
    assert layout.codes.tolist() == [[227, 1]]
    assert Ternary.from_levels(np.ones((4, 640), int), np.ones((4, 10), np.float32), 64).nbytes == 4 * 128 + 4 * 10 * 2


def test_a_group_of_zeros_is_ternary():
    dense = np.zeros((2, 64), dtype=np.float32)
    dense[1, 40] = -0.25
    layout = Ternary.from_dense(dense, 32)
    assert np.array_equal(layout.to_dense(), dense)
    assert layout.scales.tolist() == [[0x3F80, 0x3F80], [0x3F80, 0x3E80]]


@pytest.mark.parametrize(
    ("cls", "dense", "message"),
    [
        (Ternary, [[1.0, -2.0]], "more than one magnitude"),
        (Binary, [[1.0, -2.0]], "more than one magnitude"),
        (Binary, [[1.0, 0.0]], "more than one magnitude"),
        (Ternary, [[1.001, 0.0]], "bfloat16 cannot represent"),
        (Binary, [[2.0**-127, -(2.0**-127)]], "scale out of range"),
        (Ternary, [[np.nan, 1.0]], "cannot represent"),
        (Binary, [[np.inf, np.inf]], "out of range"),
        (Ternary, [1.0, 1.0], "float32 \\(O, I\\)"),
    ],
)
def test_matrices_of_another_kind_are_refused(cls, dense, message):
    with pytest.raises(LayoutError, match=message):
        cls.from_dense(np.array(dense, dtype=np.float32), None)


@pytest.mark.parametrize(
    ("level", "scale_shape", "group_size"),
    [(2, (2, 1), None), (-2, (2, 1), None), (1, (2, 2), None), (1, (1, 1), None), (1, (2, 1), 33), (1, (2, 1), True)],
)
def test_impossible_levels(level, scale_shape, group_size):
    for cls in (Ternary, Binary):
        with pytest.raises(LayoutError):
            cls.from_levels(np.full((2, 5), level), np.ones(scale_shape, np.float32), group_size)
    with pytest.raises(LayoutError, match="-1 and 1"):
        Binary.from_levels(np.zeros((2, 5), int), np.ones((2, 1), np.float32), None)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("num_entries", [16, 256])
def test_codes(read_by_the_specification, num_entries, group_size):
    rng = np.random.default_rng(3)
    table = rng.standard_normal(num_entries).astype(np.float32)
    stored = table if num_entries == 16 else (table.view(np.uint32) & 0xFFFF0000).view(np.float32)
    for rows, width in SHAPES:
        code_OI = rng.integers(0, num_entries, (rows, width)).astype(np.uint8)
        scale_OG = scales_for(rows, width, group_size)
        scaled = LookupTable.from_codes(code_OI, stored, scale_OG=scale_OG, group_size=group_size)
        check(scaled, read_by_the_specification, multiplied(stored[code_OI], scale_OG, group_size))
        assert np.array_equal(scaled.codes_OI(), code_OI)
        plain = LookupTable.from_codes(code_OI, stored)
        check(plain, read_by_the_specification, stored[code_OI])
        assert np.array_equal(plain.table_K, stored)


def test_a_table_of_256_is_rounded_to_nearest_even():
    table = np.zeros(256, np.float32)
    table[:3] = 1.00390625, 1.01171875, -1.00390625
    codes = np.array([[0, 1, 2]], dtype=np.uint8)
    assert LookupTable.from_codes(codes, table).to_dense().tolist() == [[1.0, 1.015625, -1.0]]


@given(
    st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=70),
    st.lists(st.floats(-4, 4, width=32), min_size=16, max_size=16),
)
def test_nearest_entry(weights, entries):
    weight_OI, table = np.array([weights], dtype=np.float32), np.array(entries, dtype=np.float32)
    values = LookupTable.from_dense(weight_OI, table, scaled=False).to_dense()
    for w, v in zip(weight_OI[0], values[0], strict=True):
        assert abs(float(w) - float(v)) == min(abs(float(w) - float(t)) for t in table)


def test_scaled_rounding_divides_each_group_by_its_largest_magnitude():
    weight = np.random.default_rng(4).standard_normal((3, 80)).astype(np.float32)
    weight[2, 64:] = 0
    layout = LookupTable.from_dense(weight, NF4, scaled=True, group_size=64)
    for o in range(3):
        for columns in (slice(0, 64), slice(64, 80)):
            largest = np.abs(weight[o, columns]).max()
            values = layout.to_dense()[o, columns]
            # the widest gap of the table is 0.304; a bfloat16 scale is within 1/256
            assert np.all(np.abs(values - weight[o, columns]) <= largest * (0.152 + 0.004))
            assert abs(np.abs(values).max() - largest) <= largest / 256


def test_nf4_is_the_table_of_the_paper():
    # Equation 4 and appendix E as the authors' code has it: quantiles of a normal distribution, 8 above zero, 7 below.
    offset = 0.9677083
    positive = [NormalDist().inv_cdf(offset + (0.5 - offset) * k / 8) for k in range(8)]
    negative = [-NormalDist().inv_cdf(offset + (0.5 - offset) * k / 7) for k in range(7)]
    expected = np.array(sorted([*negative, 0.0, *positive])) / max(positive)
    np.testing.assert_allclose(NF4, expected, atol=2e-7)
    assert NF4[7] == 0
    assert NF4[0] == -1
    assert NF4[15] == 1
    with pytest.raises(ValueError, match="read-only"):
        NF4[0] = 0


def test_impossible_tables():
    codes = np.zeros((2, 3), dtype=np.uint8)
    with pytest.raises(LayoutError, match="16 or 256"):
        LookupTable.from_codes(codes, np.zeros(17, np.float32))
    with pytest.raises(LayoutError, match="below 16"):
        LookupTable.from_codes(codes + np.uint8(16), NF4)
    with pytest.raises(LayoutError, match="entry out of range"):
        LookupTable.from_codes(codes, np.full(16, np.nan, np.float32))
    with pytest.raises(LayoutError, match="255 at most"):
        LookupTable.from_codes(codes, NF4 * 256, scale_OG=np.ones((2, 1), np.float32))
    with pytest.raises(LayoutError, match="group_size null"):
        LookupTable.from_codes(codes, NF4, group_size=32)
    with pytest.raises(NonFiniteError):
        LookupTable.from_dense(np.full((2, 3), np.inf, np.float32), NF4, scaled=True)
