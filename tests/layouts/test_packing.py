import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rarefy.core.errors import LayoutError, NonFiniteError
from rarefy.core.grids import IntGrid, dequantize, fit_minmax, from_bf16_bits, quantize, to_bf16_bits
from rarefy.core.patterns import NM, Blocks, Unstructured
from rarefy.core.solution import Solution
from rarefy.layouts import (
    FORMATS,
    NF4,
    Binary,
    LookupTable,
    LowRank,
    Sum,
    Tapwise,
    Ternary,
    choose_format,
    pack,
    packed_nbytes,
    unpack,
)
from rarefy.layouts.sum import PARTS
from rarefy.testing import check_layout

SIZES = [0, 1, 2, 7, 8, 9, 31, 32, 33, 61, 64, 67, 97, 130]
GRIDS = [None, *(IntGrid(b, size, sym) for b in (2, 3, 4, 8) for size in (None, 32, 64) for sym in (True, False))]
PATTERNS = [None, Unstructured(0.5), Unstructured(0.95), NM(2, 4), NM(1, 1), NM(3, 7), NM(16, 32), NM(5, 64)]
PATTERNS += [
    Blocks((16, 64), 0.5),
    Blocks((4, 4), 0.7),
    Blocks((1, 8), 0.3),
    Blocks((32, 1), 0.6),
    Blocks((100, 3), 0.5),
]


def make_solution(rows, width, pattern, grid, seed) -> Solution:
    rng = np.random.default_rng(seed)
    weight = from_bf16_bits(to_bf16_bits(rng.standard_normal((rows, width)).astype(np.float32)))
    mask = None
    if isinstance(pattern, Unstructured):
        mask = rng.random((rows, width)) >= pattern.sparsity
    elif isinstance(pattern, Blocks):
        high, wide = pattern.block_shape
        kept = rng.random(pattern.grid_shape((rows, width))) >= pattern.sparsity
        mask = np.array([[kept[o // high, i // wide] for i in range(width)] for o in range(rows)], bool)
        mask = mask.reshape(rows, width)
    elif pattern is not None:
        mask = np.zeros((rows, width), dtype=bool)
        for o in range(rows):
            for start in range(0, width, pattern.group):
                columns = min(pattern.group, width - start)
                kept = rng.permutation(columns)[: math.ceil(Fraction(pattern.keep * columns, pattern.group))]
                mask[o, start + kept] = True
    if mask is not None:
        weight = weight * mask
    if grid is None:
        return Solution(weight, mask, pattern, None)
    fitted = fit_minmax(weight, grid)
    return Solution(dequantize(quantize(weight, fitted), fitted), mask, pattern, fitted)


solutions = st.builds(
    make_solution,
    st.sampled_from(SIZES),
    st.sampled_from(SIZES),
    st.sampled_from(PATTERNS),
    st.sampled_from(GRIDS),
    st.integers(0, 2**32),
)


@settings(max_examples=300)
@given(solutions, st.sampled_from(["bf16", "f32"]))
@example(make_solution(3, 67, NM(2, 4), IntGrid(4, 64, True), 0), "bf16")
@example(make_solution(5, 61, Unstructured(0.5), IntGrid(4, 32, False), 0), "bf16")
def test_round_trip(read_by_the_specification, solution, float_format):
    layout = pack(solution, float_format=float_format)
    assert FORMATS[layout.format] is type(layout)
    assert layout.shape == solution.shape
    assert np.array_equal(layout.to_dense(), solution.weight_OI)
    raw = {name: array.tobytes() for name, array in layout.arrays().items()}
    assert np.array_equal(read_by_the_specification(layout.format, layout.meta(), raw), solution.weight_OI)
    assert layout.nbytes == sum(map(len, raw.values())) == packed_nbytes(layout.format, layout.meta())

    back = unpack(layout)
    back.check()
    assert np.array_equal(back.weight_OI, solution.weight_OI)
    if solution.grid is not None:
        assert back.grid is not None
        assert back.grid.grid == solution.grid.grid
        assert np.array_equal(back.grid.scale_OG, solution.grid.scale_OG)
        assert np.array_equal(back.grid.zero_point_OG, solution.grid.zero_point_OG)
    if not layout.format.startswith("dense"):
        assert np.array_equal(back.mask_OI, solution.mask_OI)
        if isinstance(solution.pattern, NM):
            assert back.pattern == solution.pattern
    if layout.format.startswith("block"):
        assert back.pattern.block_shape == solution.pattern.block_shape
    again = pack(back, float_format=float_format)
    assert {name: array.tobytes() for name, array in again.arrays().items()} == raw
    assert again.meta() == layout.meta()


PATTERN_OF = {"dense": None, "bitmask": Unstructured(0.6), "nm": NM(2, 5), "block": Blocks((2, 24), 0.6)}


@pytest.mark.parametrize("format", sorted(name for name in FORMATS if name.split("-")[0] in PATTERN_OF))
def test_conformance(format):
    packing, values, _ = format.split("-")
    num_bits = int(values[3:]) if values.startswith("int") else None
    seen = 0
    for rows, width in ((3, 67), (4, 64), (1, 33), (2, 8), (1, 1), (0, 5), (5, 0)):
        for size, symmetric in ((32, True), (None, False)):
            grid = None if num_bits is None else IntGrid(num_bits, size, symmetric)
            # without columns nothing stored says how many rows a row of blocks has
            pattern = Blocks((1, 24), 0.6) if packing == "block" and width == 0 else PATTERN_OF[packing]
            solution = make_solution(rows, width, pattern, grid, seed=1)
            layout = pack(solution, float_format="f32" if values == "f32" else "bf16")
            check_layout(layout)
            seen += layout.format == format
    assert seen >= 4


def low_rank(rows, width, rank, grid, seed=0) -> LowRank:
    return LowRank(*(pack(make_solution(*shape, None, grid, seed)) for shape in ((rows, rank), (rank, width))))


@pytest.mark.parametrize("grid", [None, IntGrid(8, 32, True), IntGrid(8, None, False)])
def test_conformance_of_low_rank_pairs(read_by_the_specification, grid):
    for rows, width, rank in ((3, 67, 2), (4, 64, 33), (1, 1, 1), (5, 7, 0), (0, 5, 2), (5, 0, 2)):
        layout = low_rank(rows, width, rank, grid)
        assert layout.format == ("lowrank-bf16-v1" if grid is None else "lowrank-int8-v1")
        assert (layout.shape, layout.rank) == ((rows, width), rank)
        assert layout.nbytes == packed_nbytes(layout.format, layout.meta())
        check_layout(layout)
        raw = {name: array.tobytes() for name, array in layout.arrays().items()}
        exact = read_by_the_specification(layout.format, layout.meta(), raw)
        assert np.array_equal(layout.to_dense(), exact.astype(np.float32))
        assert np.array_equal(unpack(layout).value_OI, layout.to_dense())


def tapwise(rows, width, runs, inner, outer, seed=0) -> Tapwise:
    factor = lambda *shape: pack(make_solution(*shape, None, None, seed))  # noqa: E731
    left = factor(rows, runs * inner) if outer is None else low_rank(rows, runs * inner, outer, None)
    return Tapwise(left, factor(inner, width // runs), runs)


@pytest.mark.parametrize("outer", [None, 0, 1, 3])
def test_conformance_of_tapwise_factors(read_by_the_specification, outer):
    for rows, width, runs, inner in (
        (3, 54, 9, 2),
        (4, 64, 2, 5),
        (1, 1, 1, 1),
        (5, 6, 3, 0),
        (0, 6, 2, 2),
        (5, 0, 4, 2),
    ):
        layout = tapwise(rows, width, runs, inner, outer)
        assert (layout.format, layout.shape) == ("tapwise-bf16-v1", (rows, width))
        assert layout.nbytes == packed_nbytes(layout.format, layout.meta())
        check_layout(layout)
        raw = {name: array.tobytes() for name, array in layout.arrays().items()}
        exact = read_by_the_specification(layout.format, layout.meta(), raw)
        assert np.allclose(layout.to_dense(), exact, rtol=1e-6, atol=1e-12)
        assert np.array_equal(unpack(layout).value_OI, layout.to_dense())


def test_tapwise_factors_that_do_not_fit():
    ones = lambda *shape: pack(Solution.dense(np.ones(shape, np.float32)))  # noqa: E731
    for left, right, runs in ((ones(3, 4), ones(2, 5), 3), (ones(3, 4), ones(2, 5), 0), (ones(3, 4), ones(4, 5), 2)):
        with pytest.raises(LayoutError, match=r"\(O, G R\) and \(R, I / G\)"):
            Tapwise(left, right, runs)
    with pytest.raises(LayoutError, match="allowed: dense-bf16-v1 or lowrank-bf16-v1"):
        Tapwise(low_rank(3, 4, 2, IntGrid(8, None, True)), ones(2, 5), 2)


def test_factors_that_do_not_fit():
    left, right = (pack(Solution.dense(np.ones(shape, np.float32))) for shape in ((3, 2), (2, 5)))
    with pytest.raises(LayoutError, match=r"\(O, K\) and \(K, I\)"):
        LowRank(right, left)
    with pytest.raises(LayoutError, match="two of bf16, two of int8"):
        LowRank(left, pack(make_solution(2, 5, None, IntGrid(8, None, True), 0)))
    with pytest.raises(LayoutError, match="two of bf16, two of int8"):
        LowRank(*(pack(Solution.dense(part.to_dense()), float_format="f32") for part in (left, right)))
    with pytest.raises(LayoutError, match="the same for both"):
        LowRank(*(pack(make_solution(2, 2, None, IntGrid(8, size, True), 0)) for size in (32, 64)))


PART_FORMATS = sorted(set(FORMATS) - {"sum-v1"})
TABLE = np.linspace(-3, 3, 256, dtype=np.float32)


def ones(code_OI):
    return np.ones((len(code_OI), 1), np.float32)


CODEBOOKS = {  # from random bytes
    "ternary": lambda code_OI: Ternary.from_levels(code_OI % 3 - np.int8(1), ones(code_OI), None),
    "binary": lambda code_OI: Binary.from_levels(code_OI % 2 * np.int8(2) - np.int8(1), ones(code_OI), None),
    "lut4": lambda code_OI: LookupTable.from_codes(code_OI % np.uint8(16), NF4, scale_OG=ones(code_OI)),
    "lut8": lambda code_OI: LookupTable.from_codes(code_OI, TABLE),
}


def part(format, rows, width):
    packing, values = format.split("-")[:2]
    if packing in CODEBOOKS:
        return CODEBOOKS[packing](np.random.default_rng(5).integers(0, 256, (rows, width), dtype=np.uint8))
    num_bits = int(values[3:]) if values.startswith("int") else None
    grid = None if num_bits is None else IntGrid(num_bits, 32, num_bits == 4)
    if packing == "lowrank":
        return low_rank(rows, width, 4, grid)
    if packing == "tapwise":
        return tapwise(rows, width, 5 if width % 5 == 0 else 1, 2, 3)
    solution = make_solution(rows, width, PATTERN_OF[packing], grid, seed=5)
    return pack(solution, float_format="f32" if values == "f32" else "bf16")


@pytest.mark.parametrize("format", PART_FORMATS)
def test_conformance_of_sums(read_by_the_specification, format):
    assert PARTS[format] is FORMATS[format]
    for rows, width in ((3, 67), (16, 130), (1, 1), (0, 5), (5, 0)):
        for layout in (Sum(part(format, rows, width), part("bitmask-int4-v1", rows, width)),
                       Sum(part("lowrank-bf16-v1", rows, width), part(format, rows, width))):  # fmt: skip
            check_layout(layout)
            assert layout.nbytes == packed_nbytes("sum-v1", layout.meta())
            raw = {name: array.tobytes() for name, array in layout.arrays().items()}
            exact = read_by_the_specification("sum-v1", layout.meta(), raw)
            assert np.allclose(layout.to_dense(), exact, rtol=1e-6, atol=1e-6)
            assert np.array_equal(unpack(layout).value_OI, layout.to_dense())


def test_parts_that_do_not_fit():
    first = part("dense-bf16-v1", 3, 4)
    with pytest.raises(LayoutError, match="the same shape"):
        Sum(first, part("dense-bf16-v1", 4, 3))
    with pytest.raises(LayoutError, match="a part of format 'sum-v1'"):
        Sum(first, Sum(first, first))


@pytest.mark.parametrize(
    ("block", "grid", "expected"),
    [
        ((16, 64), None, "block-bf16-v1"),
        ((16, 64), IntGrid(8, 64, True), "block-int8-v1"),
        ((16, 64), IntGrid(4, 64, True), "bitmask-int4-v1"),
        ((4, 4), None, "block-bf16-v1"),
        ((32, 1), IntGrid(8, None, True), "block-int8-v1"),
    ],
)
def test_formats_of_blocks(block, grid, expected):
    for shape in ((64, 256), (67, 250)):
        pattern = Blocks(block, 0.5)
        mask = np.zeros(pattern.grid_shape(shape), bool)
        mask.reshape(-1)[: mask.size - round(mask.size / 2)] = True  # the whole ones
        mask_OI = np.kron(mask, np.ones(block, bool))[: shape[0], : shape[1]]
        weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * mask_OI
        fitted = None if grid is None else fit_minmax(weight, grid)
        weight = weight if fitted is None else dequantize(quantize(weight, fitted), fitted)
        layout = pack(Solution(weight, mask_OI, pattern, fitted))
        name, num_bytes = choose_format(shape, pattern, grid)
        assert layout.format == name == expected
        assert layout.nbytes == num_bytes if pattern.is_even(shape) else layout.nbytes <= num_bytes


def test_blocks_that_earlier_zeros_thinned_out_take_fewer_bytes_as_a_bitmask():
    pattern = Blocks((16, 64), 0.5)
    blocks = np.kron(np.eye(2, dtype=bool), np.ones((16, 64), bool))
    weight = np.random.default_rng(0).standard_normal((32, 128)).astype(np.float32)
    for density, expected in ((0.9, "block-bf16-v1"), (0.5, "bitmask-bf16-v1")):
        mask = blocks & (np.random.default_rng(1).random((32, 128)) < density)
        layout = pack(Solution(weight * mask, mask, pattern, None))
        assert layout.format == expected
        kept_zeros = blocks if expected.startswith("block") else mask
        assert np.array_equal(unpack(layout).mask_OI, kept_zeros)


def test_a_kept_zero_is_stored():
    weight = np.zeros((2, 64), dtype=np.float32)
    weight[:, 0] = 7
    mask = np.zeros((2, 64), dtype=bool)
    mask[:, :2] = True
    for grid in (None, fit_minmax(weight, IntGrid(4, 32, True)), fit_minmax(weight, IntGrid(8, None, False))):
        stored = weight if grid is None else dequantize(quantize(weight, grid), grid)
        layout = pack(Solution(stored, mask, Unstructured(0.96), grid))
        assert layout.format.startswith("bitmask")
        assert layout.num_values == 4
        assert np.array_equal(unpack(layout).mask_OI, mask)


def test_floats_are_rounded_to_nearest_even():
    weight = np.array([[1.00390625, 1.01171875, -1.00390625]], dtype=np.float32)
    assert pack(Solution.dense(weight)).to_dense().tolist() == [[1.0, 1.015625, -1.0]]
    assert np.array_equal(pack(Solution.dense(weight), float_format="f32").to_dense(), weight)


@pytest.mark.parametrize(
    ("pattern", "grid", "expected"),
    [
        (Unstructured(0.05), None, "dense-bf16-v1"),
        (Unstructured(0.07), None, "bitmask-bf16-v1"),
        (Unstructured(0.10), IntGrid(8, None, True), "dense-int8-v1"),
        (Unstructured(0.15), IntGrid(8, None, True), "bitmask-int8-v1"),
        (Unstructured(0.20), IntGrid(4, None, True), "dense-int4-v1"),
        (Unstructured(0.30), IntGrid(4, None, True), "bitmask-int4-v1"),
        (NM(7, 8), IntGrid(4, None, True), "dense-int4-v1"),
        (NM(2, 4), IntGrid(4, None, True), "nm-int4-v1"),
        (NM(2, 4), IntGrid(3, None, True), "nm-int3-v1"),
        (Unstructured(0.30), IntGrid(3, None, False), "dense-int3-v1"),
        (Unstructured(0.45), IntGrid(2, None, False), "dense-int2-v1"),
        (Unstructured(0.55), IntGrid(2, None, False), "bitmask-int2-v1"),
    ],
)
def test_a_mask_that_does_not_pay_is_not_stored(pattern, grid, expected):
    solution = make_solution(128, 256, pattern, grid, seed=0)
    layout = pack(solution)
    assert layout.format == expected
    assert np.array_equal(layout.to_dense(), solution.weight_OI)
    if isinstance(pattern, NM) or expected.startswith("dense"):
        assert choose_format((128, 256), pattern, grid) == (layout.format, layout.nbytes)
    kept = int(np.count_nonzero(solution.mask_OI))
    assert choose_format((128, 256), pattern, grid, num_values=kept) == (layout.format, layout.nbytes)


def test_the_size_can_be_predicted_from_the_sparsity():
    _, predicted = choose_format((100, 200), Unstructured(0.5), IntGrid(4, 64, True))
    assert predicted == 100 * 25 + 5000 + 100 * 4 * 2
    assert choose_format((10, 10), None, None) == ("dense-bf16-v1", 200)
    assert choose_format((10, 10), None, None, float_format="f32") == ("dense-f32-v1", 400)


def test_an_nm_group_that_keeps_too_few_is_filled():
    weight = np.array([[1, 0, 0, 0, 0, 2, 3, 0, 4, 0]], dtype=np.float32)
    solution = Solution(weight, weight != 0, NM(2, 4), None)
    layout = pack(solution)
    assert layout.format == "nm-bf16-v1"
    assert np.array_equal(layout.to_dense(), weight)
    assert layout.mask_OI().tolist() == [[True, True, False, False, False, True, True, False, True, False]]


def test_solutions_that_break_their_invariants_are_refused():
    weight = np.ones((2, 8), dtype=np.float32)
    with pytest.raises(LayoutError, match="pruned"):
        pack(Solution(weight, np.zeros((2, 8), bool), Unstructured(1.0), None))
    with pytest.raises(NonFiniteError):
        pack(Solution.dense(np.full((2, 2), np.inf, dtype=np.float32)))
    with pytest.raises(NonFiniteError, match="bfloat16"):
        pack(Solution.dense(np.full((2, 2), np.finfo(np.float32).max, dtype=np.float32)))


def test_a_view_is_packed_like_its_copy():
    weight = np.random.default_rng(0).standard_normal((64, 40)).astype(np.float32)
    for float_format in ("bf16", "f32"):
        view = pack(Solution.dense(weight.T), float_format=float_format)
        assert np.array_equal(
            view.arrays()["values"], pack(Solution.dense(weight.T.copy()), float_format=float_format).values
        )
        assert view.arrays()["values"].flags.c_contiguous


def test_rows_of_an_embedding():
    for grid in (None, IntGrid(8, None, True), IntGrid(4, 32, False)):
        layout = pack(make_solution(9, 33, None, grid, seed=2))
        indices = np.array([[8, 0, 3], [3, 3, 1]])
        assert np.array_equal(layout.rows(indices), layout.to_dense()[indices])
        with pytest.raises(IndexError):
            layout.rows(np.array([9]))
