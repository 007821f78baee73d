"""Arrays and metadata from a hostile file: each defect alone must give a LayoutError."""

import numpy as np
import pytest
from tests.layouts.examples import ASYMMETRIC, NM_MASK, VALUES, changed, example

from rarefy.core.errors import LayoutError
from rarefy.layouts import FORMATS


def refuse(format, meta, arrays, match=None):
    with pytest.raises(LayoutError, match=match):
        FORMATS[format].from_arrays(format, meta, arrays)


@pytest.fixture(params=sorted(FORMATS))
def format(request):
    return request.param


def test_the_example_itself_is_valid(format):
    meta, arrays = example(format)
    layout = FORMATS[format].from_arrays(format, meta, arrays)
    assert layout.format == format
    assert layout.meta() == meta


def test_a_class_does_not_read_formats_of_another(format):
    meta, arrays = example(format)
    for other, cls in FORMATS.items():
        if cls is not FORMATS[format]:
            with pytest.raises(LayoutError, match="format"):
                cls.from_arrays(format, meta, arrays)
            with pytest.raises(LayoutError, match="format"):
                cls.array_spec(format, example(other)[0])


@pytest.mark.parametrize(
    "shape",
    [None, 5, [5], [2, 5, 1], [2, -5], [2.0, 5], [True, 5], ["2", 5], [2, 2**31], [2, 2**70], [3, 5], [2, 9], [5, 2]],
)
def test_shape(format, shape):
    meta, arrays = example(format)
    refuse(format, {**meta, "shape": shape}, arrays)


@pytest.mark.parametrize("value", [-1, 4, 6, 11, 2**70, 5.0, "5", None, True, []])
def test_num_values(format, value):
    meta, arrays = example(format)
    if "num_values" in meta and value != meta["num_values"]:
        refuse(format, {**meta, "num_values": value}, arrays)


@pytest.mark.parametrize(
    ("keep", "group"), [(0, 4), (1, 4), (3, 4), (5, 4), (2, 0), (2, 65), (2, 5), (2.0, 4), (None, 4)]
)
def test_keep_and_group(format, keep, group):
    meta, arrays = example(format)
    if "keep" in meta:
        refuse(format, {**meta, "keep": keep, "group": group}, arrays)


@pytest.mark.parametrize("value", [0, 16, -32, 2**40, 64.0, "64", True, []])
def test_group_size(format, value):
    meta, arrays = example(format)
    if "group_size" in meta:
        refuse(format, {**meta, "group_size": value}, arrays, "group_size")


@pytest.mark.parametrize("value", [0, 1, None, "true"])
def test_symmetric(format, value):
    meta, arrays = example(format)
    if "symmetric" in meta:
        refuse(format, {**meta, "symmetric": value}, arrays, "symmetric")


def test_symmetry_and_zero_points_must_agree(format):
    meta, arrays = example(format)
    if "symmetric" in meta:
        refuse(format, {**meta, "symmetric": not meta["symmetric"]}, arrays, "exactly")


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF])
def test_non_finite_values(format, bits):
    meta, arrays = example(format)
    if format.endswith("bf16-v1"):
        name = next(name for name in arrays if name.endswith("values"))
        refuse(format, meta, {**arrays, name: changed(arrays[name], (-1,), bits)}, "NaN")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_float32(value):
    meta, arrays = example("dense-f32-v1")
    refuse("dense-f32-v1", meta, {"values": changed(arrays["values"], (1, 4), value)}, "NaN")


@pytest.mark.parametrize("bits", [0, 0x0001, 0x007F, 0x7B01, 0x7F80, 0x7FC0, 0x8000, 0xBF80, 0xFFFF])
def test_scales(format, bits):
    meta, arrays = example(format)
    for name in arrays:
        if name.endswith("scales"):
            refuse(format, meta, {**arrays, name: changed(arrays[name], (1, 0), bits)}, "scale out of range")


@pytest.mark.parametrize("num_bits", [2, 3, 4])
@pytest.mark.parametrize("packing", ["dense", "bitmask", "nm"])
def test_zero_point_beyond_the_codes(packing, num_bits):
    format = f"{packing}-int{num_bits}-v1"
    meta, arrays = example(format)
    meta = {**meta, **ASYMMETRIC}
    zero_points = np.array([[0], [2**num_bits - 1]], dtype=np.uint8)
    FORMATS[format].from_arrays(format, meta, {**arrays, "zero_points": zero_points})
    refuse(format, meta, {**arrays, "zero_points": changed(zero_points, (0, 0), 2**num_bits)}, "zero point")


def test_mask_padding_bits(format):
    meta, arrays = example(format)
    if "mask" in arrays and not format.startswith("block"):
        for bit in (5, 6, 7):
            damaged = arrays["mask"].copy()
            damaged[1, 0] = damaged[1, 0] & ~np.uint8(2) | np.uint8(1 << bit)  # the number of bits stays
            refuse(format, meta, {**arrays, "mask": damaged}, "padding bit")


def test_number_of_mask_bits(format):
    meta, arrays = example(format)
    if "mask" in arrays and not format.startswith("block"):
        refuse(format, meta, {**arrays, "mask": changed(arrays["mask"], (0, 0), 0b10101 ^ 0b10)}, "bits set")
        refuse(format, meta, {**arrays, "mask": changed(arrays["mask"], (0, 0), 0b10100)}, "bits set")


@pytest.mark.parametrize("format", ["block-bf16-v1", "block-int8-v1"])
def test_marked_blocks(format):
    meta, arrays = example(format)
    FORMATS[format].from_arrays(format, {**meta, "num_values": 6}, {**arrays, "mask": np.array([[0b110]], np.uint8)})
    for mask in (0b001, 0b011, 0b111, 0b100, 0):  # blocks of another number of entries
        refuse(format, meta, {**arrays, "mask": np.array([[mask]], np.uint8)}, r"blocks of \d+ entries")
    for bit in range(3, 8):
        refuse(format, meta, {**arrays, "mask": np.array([[0b101 | 1 << bit]], np.uint8)}, "padding bit")


@pytest.mark.parametrize(
    "shape", [None, 4, [4], [4, 2, 1], [0, 2], [4, -2], [4.0, 2], [True, 2], [4, 4097], [4, 3], "42"]
)
@pytest.mark.parametrize("format", ["block-bf16-v1", "block-int8-v1"])
def test_block_shape(format, shape):
    meta, arrays = example(format)
    refuse(format, {**meta, "block_shape": shape}, arrays)


def test_a_block_far_larger_than_the_matrix_costs_no_memory():
    meta, arrays = example("block-bf16-v1")
    meta |= {"block_shape": [4096, 4096], "num_values": 10}
    arrays = {"mask": np.array([[1]], np.uint8), "values": np.resize(VALUES, 10)}
    layout = FORMATS["block-bf16-v1"].from_arrays("block-bf16-v1", meta, arrays)
    assert layout.mask_OI().all()
    assert layout.to_dense().shape == (2, 5)


@pytest.mark.parametrize("rank", [2, 4, -1, 2**31, 3.0, True, None])
def test_rank(rank):
    meta, arrays = example("lowrank-bf16-v1")
    refuse("lowrank-bf16-v1", {**meta, "rank": rank}, arrays)


@pytest.mark.parametrize("key", ["num_runs", "inner_rank", "outer_rank"])
@pytest.mark.parametrize("value", [0, 3, 4, -1, 2**31, 2.0, True, "1", [1]])
def test_runs_and_ranks(key, value):
    meta, arrays = example("tapwise-bf16-v1")
    refuse("tapwise-bf16-v1", {**meta, key: value}, arrays)


def test_a_core_that_is_not_declared_or_not_there():
    meta, arrays = example("tapwise-bf16-v1")
    refuse("tapwise-bf16-v1", {**meta, "outer_rank": None}, arrays)
    del arrays["core_values"]
    refuse("tapwise-bf16-v1", meta, arrays)
    arrays["left_values"] = np.resize(VALUES, (2, 5))
    refuse("tapwise-bf16-v1", meta, arrays)
    layout = FORMATS["tapwise-bf16-v1"].from_arrays("tapwise-bf16-v1", {**meta, "outer_rank": None}, arrays)
    assert layout.shape == (2, 5)


@pytest.mark.parametrize("pair", [("left", "core"), ("left", "right"), ("core", "right")])
def test_a_product_of_tapwise_factors_that_could_overflow(pair):
    meta, arrays = example("tapwise-bf16-v1")
    for name in pair:
        arrays[f"{name}_values"] = changed(arrays[f"{name}_values"], (0, 0), 0x5F80)  # 2**64
    refuse("tapwise-bf16-v1", meta, arrays, "magnitudes up to")


def test_a_product_that_could_overflow():
    meta, arrays = example("lowrank-bf16-v1")
    for side in ("left", "right"):
        arrays[f"{side}_values"] = changed(arrays[f"{side}_values"], (0, 0), 0x5F80)  # 2**64
    refuse("lowrank-bf16-v1", meta, arrays, "magnitudes up to")


def test_a_sum_that_could_overflow():
    bits = np.full((2, 5), 0x7F7F, dtype=np.uint16)
    meta = {"shape": [2, 5], "parts": [{"format": "dense-bf16-v1"}, {"format": "dense-bf16-v1"}]}
    refuse("sum-v1", meta, {"0_values": bits, "1_values": bits}, "magnitudes up to")


@pytest.mark.parametrize(("entry", "scale"), [(2.0**8 - 1, 0x7B00), (2.0**-100, 0x7B00), (1.0, 0x3F80)])
def test_a_sum_with_a_table_that_could_overflow(entry, scale):
    """The largest entry times the largest scale, 2**119, and the largest bfloat16 or half of it."""
    table_meta, table = example("lut4-v1")
    table |= {"table": np.full(16, entry, np.float32), "scales": np.full((2, 1), scale, np.uint16)}
    arrays = {f"0_{name}": array for name, array in table.items()}
    del table_meta["shape"]
    meta = {"shape": [2, 5], "parts": [{"format": "lut4-v1", **table_meta}, {"format": "dense-bf16-v1"}]}
    for bits in (0x7F7F, 0x7EFF):
        arrays["1_values"] = np.full((2, 5), bits, dtype=np.uint16)
        if bits == 0x7F7F and entry > 1:
            refuse("sum-v1", meta, arrays, "magnitudes up to")
        else:
            assert np.isfinite(FORMATS["sum-v1"].from_arrays("sum-v1", meta, arrays).to_dense()).all()


PART = {"format": "dense-bf16-v1"}


@pytest.mark.parametrize(
    "parts",
    [
        None,
        {},
        "ab",
        [],
        [PART],
        [PART, PART, PART],
        [PART, None],
        [PART, {}],
        [PART, {"format": 3}],
        [PART, {"format": "dense-bf16-v9"}],
        [PART, {"format": "dense-bf16-v1", "rank": 1}],
        [PART, {"format": "dense-bf16-v1", "shape": [2, 5]}],
        [PART, {"format": "dense-int8-v1"}],
        [PART, {"format": "sum-v1", "parts": [PART, PART]}],
    ],
)
def test_parts(parts):
    arrays = {f"{i}_values": np.resize(VALUES, (2, 5)) for i in range(2)}
    FORMATS["sum-v1"].from_arrays("sum-v1", {"shape": [2, 5], "parts": [PART, PART]}, arrays)
    refuse("sum-v1", {"shape": [2, 5], "parts": parts}, arrays)


def test_parts_without_end():
    parts = [PART]
    for _ in range(5000):
        parts = [PART, {"format": "sum-v1", "parts": parts}]
    refuse("sum-v1", {"shape": [2, 5], "parts": parts}, {})


def test_nm_counts_hold_in_every_group_not_only_in_sum(format):
    meta, arrays = example(format)
    if "keep" in meta:
        refuse(format, meta, {**arrays, "mask": changed(NM_MASK, (0, 0), 0b00001101)}, "group with a wrong number")


@pytest.mark.parametrize(
    ("format", "last_byte"),
    [
        ("dense-int4-v1", 0x15),
        ("bitmask-int4-v1", 0x15),
        ("lut4-v1", 0x10),
        ("dense-int3-v1", 0x80),
        ("bitmask-int3-v1", 0x80),
        ("nm-int3-v1", 0x04),
        ("dense-int2-v1", 0x04),
        ("bitmask-int2-v1", 0x80),
        ("nm-int2-v1", 0x10),
        ("binary-v1", 0x20),
        ("ternary-v1", 81),
    ],
)
def test_padding_of_codes(format, last_byte):
    meta, arrays = example(format)
    refuse(format, meta, {**arrays, "codes": changed(arrays["codes"], (..., -1), last_byte)}, "padding that is not 0")


@pytest.mark.parametrize("byte", [243, 255])
def test_bytes_that_are_no_five_ternary_digits(byte):
    meta, arrays = example("ternary-v1")
    refuse("ternary-v1", meta, {**arrays, "codes": changed(arrays["codes"], (1, 0), byte)}, "above 242")


@pytest.mark.parametrize("entry", [np.nan, np.inf, -np.inf, 255.5, -1e30])
def test_entries_of_a_table(entry):
    meta, arrays = example("lut4-v1")
    refuse("lut4-v1", meta, {**arrays, "table": changed(arrays["table"], 3, entry)}, "entry out of range")
    unscaled = {"codes": arrays["codes"], "table": changed(arrays["table"], 3, entry)}
    meta = {"shape": [2, 5], "group_size": None, "scaled": False}
    if np.isfinite(entry):
        FORMATS["lut4-v1"].from_arrays("lut4-v1", meta, unscaled)
    else:
        refuse("lut4-v1", meta, unscaled, "entry out of range")


@pytest.mark.parametrize("bits", [0x7F80, 0xFFC0])
def test_entries_of_a_bfloat16_table(bits):
    meta, arrays = example("lut8-v1")
    refuse("lut8-v1", meta, {**arrays, "table": changed(arrays["table"], 255, bits)}, "entry out of range")


@pytest.mark.parametrize(("scaled", "group_size"), [(False, 32), (0, None), ("true", None), (None, None)])
def test_scaled(scaled, group_size):
    meta, arrays = example("lut8-v1")
    refuse("lut8-v1", {**meta, "scaled": scaled, "group_size": group_size}, arrays, "scaled")


def test_foreign_byte_order(format):
    meta, arrays = example(format)
    for name, array in arrays.items():
        if array.dtype.itemsize > 1:
            swapped = {**arrays, name: array.astype(array.dtype.newbyteorder())}
            refuse(format, meta, swapped)


def test_strided_and_read_only_arrays_are_read(format):
    meta, arrays = example(format)
    wanted = FORMATS[format].from_arrays(format, meta, arrays).to_dense()
    strided = {name: np.stack([a, a], axis=-1)[..., 0] for name, a in arrays.items()}
    for array in strided.values():
        array.flags.writeable = False
    layout = FORMATS[format].from_arrays(format, meta, strided)
    assert all(array.flags.c_contiguous for array in layout.arrays().values())
    assert np.array_equal(layout.to_dense(), wanted)
