"""Products against oracles that share no code with the kernels: exact for integers, derived bounds for floats."""

import numpy as np
import pytest

from rarefy import kernels
from rarefy.core.errors import UsageError

SHAPES = [
    (1, 1),
    (2, 31),
    (15, 32),
    (16, 63),
    (17, 64),
    (31, 65),
    (33, 97),
    (63, 127),
    (65, 128),
    (67, 131),
    (5, 577),
    (97, 1100),
]
ROWS = (0, 1, 2, 3, 5, 7, 16, 17, 128)
GRIDS = [(None, True), (32, False), (64, True), (96, True), (128, False)]


def quantize_exactly(x_TI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Loops over blocks of 64 in scalar float32: integers, and the scale of each column."""
    q = np.zeros(x_TI.shape, np.int64)
    scale = np.zeros(x_TI.shape, np.float64)
    for t in range(x_TI.shape[0]):
        for start in range(0, x_TI.shape[1], 64):
            block = x_TI[t, start : start + 64]
            amax = np.float32(max(abs(float(v)) for v in block))
            if amax == 0:
                continue
            inverse = np.float32(127) / amax
            if not np.isfinite(inverse):
                continue
            for i, v in enumerate(block):
                q[t, start + i] = round(float(np.float32(v * inverse)))  # Python rounds half to even
            scale[t, start : start + 64] = float(amax / np.float32(127))
    return q, scale


def segment_bound(x_TI: np.ndarray, scale_TI: np.ndarray, q: np.ndarray, w: np.ndarray) -> np.ndarray:
    """What float32 may lose: one rounding per factor and per addition, at most one segment per 32 columns."""
    num_segments = -(-x_TI.shape[1] // 32)
    return (num_segments + 4) * 2.0**-24 * (np.abs(scale_TI * q) @ np.abs(w).T) * 1.01


@pytest.mark.parametrize(("group_size", "symmetric"), GRIDS)
def test_integers_are_exact_where_every_sum_is(weight, int_format, isa, group_size, symmetric) -> None:
    rng = np.random.default_rng(1)
    for num_outputs, num_inputs in SHAPES:
        w = weight(
            int_format, num_outputs, num_inputs, group_size=group_size, symmetric=symmetric, scales=(0.5, 1.0, 2.0)
        )
        prepared = kernels.prepare(w.layout, isa=isa)
        for num_rows in ROWS:
            # A block that holds 127 has scale 1 and stays as it is.
            x = rng.integers(-127, 128, (num_rows, num_inputs)).astype(np.float32)
            x[:, ::64] = 127.0
            expected = x.astype(np.float64) @ w.dense_OI.T
            assert np.abs(2 * x).astype(np.float64).max(initial=0) * np.abs(w.level_OI).max() * num_inputs < 2**53
            assert np.all(np.abs(2 * expected) < 2**24)
            np.testing.assert_array_equal(prepared.matmul(x), expected.astype(np.float32))


PATTERNS = [(keep, 64) for keep in (1, 3, 4, 7, 8, 9, 12, 16, 17, 32, 33, 63, 64)]
PATTERNS += [(4, 32), (9, 32), (2, 16), (5, 16), (1, 8), (3, 8), (1, 4), (2, 4), (1, 2), (1, 1), (7, 48)]


@pytest.mark.parametrize("value", ["int4", "int8"])
@pytest.mark.parametrize(("keep", "group"), PATTERNS)
def test_every_arrangement_of_a_pattern_is_exact(weight, isa, num_threads, value, keep, group) -> None:
    rng = np.random.default_rng(12)
    for index, (num_outputs, num_inputs) in enumerate([(3, 53), (17, 64), (33, 127), (18, 191), (40, 193), (16, 449)]):
        group_size, symmetric = GRIDS[(index + keep) % len(GRIDS)]
        w = weight(
            f"nm-{value}-v1",
            num_outputs,
            num_inputs,
            group_size=group_size,
            symmetric=symmetric,
            scales=(0.5, 1.0, 2.0),
            keep=keep,
            group=group,
        )
        prepared = kernels.prepare(w.layout, isa=isa)
        x = rng.integers(-127, 128, (128, num_inputs)).astype(np.float32)
        x[:, ::64] = 127.0  # blocks of scale 1
        expected = x.astype(np.float64) @ w.dense_OI.T
        assert np.all(np.abs(2 * expected) < 2**24)
        for num_rows, threads in ((1, 1), (1, 3), (2, 1), (5, 2), (17, 1), (128, 3)):
            num_threads(threads)
            np.testing.assert_array_equal(prepared.matmul(x[:num_rows]), expected[:num_rows].astype(np.float32))


def test_integers_of_any_activations(weight, int_format, isa) -> None:
    rng = np.random.default_rng(2)
    for index, (num_outputs, num_inputs) in enumerate(SHAPES):
        group_size, symmetric = GRIDS[index % len(GRIDS)]
        w = weight(int_format, num_outputs, num_inputs, group_size=group_size, symmetric=symmetric)
        prepared = kernels.prepare(w.layout, isa=isa)
        for num_rows in (1, 7):
            x = (rng.standard_normal((num_rows, num_inputs)) * 10.0 ** rng.integers(-6, 6)).astype(np.float32)
            q, scale = quantize_exactly(x)
            expected = (q * scale) @ w.dense_OI.T
            error = np.abs(prepared.matmul(x).astype(np.float64) - expected)
            assert np.all(error <= segment_bound(x, scale, q, w.dense_OI))


def test_floats(weight, float_format, isa) -> None:
    rng = np.random.default_rng(3)
    for num_outputs, num_inputs in SHAPES:
        w = weight(float_format, num_outputs, num_inputs)
        prepared = kernels.prepare(w.layout, isa=isa)
        for num_rows in ROWS:
            x = rng.standard_normal((num_rows, num_inputs)).astype(np.float32)
            y = prepared.matmul(x)
            assert y.shape == (num_rows, num_outputs)
            assert y.dtype == np.float32
            expected = w.met(x) @ w.dense_OI.T
            # One rounding per product and per addition.
            bound = (num_inputs + 2) * 2.0**-24 * (np.abs(w.met(x)) @ np.abs(w.dense_OI).T) * 1.01
            assert np.all(np.abs(y - expected) <= bound)


def test_the_comparison_sees_one_wrong_bit(weight) -> None:
    w = weight("dense-int4-v1", 3, 70)
    x = np.random.default_rng(4).standard_normal((1, 70)).astype(np.float32)
    q, scale = quantize_exactly(x)
    expected = (q * scale) @ w.dense_OI.T
    level_OI = w.level_OI.copy()
    level_OI[1, 69] += 1
    wrong = (q * scale) @ (level_OI * w.scale_OI).T
    assert not np.all(np.abs(wrong - expected) <= segment_bound(x, scale, q, w.dense_OI))
    assert not np.all(np.full_like(expected, np.nan) <= 1)


@pytest.mark.parametrize("layout_format", ["lut4-v1", "lut8-v1"])
@pytest.mark.parametrize(("group_size", "scaled"), [(None, True), (None, False), (32, True), (64, True), (96, True)])
def test_lookup_tables_are_exact_where_every_sum_is(weight, layout_format, isa, group_size, scaled) -> None:
    rng = np.random.default_rng(13)
    for num_outputs, num_inputs in SHAPES:
        w = weight(layout_format, num_outputs, num_inputs, group_size=group_size, scaled=scaled, scales=(0.5, 1.0, 2.0))
        arrays = w.layout.arrays()
        entries = rng.integers(-64, 65, len(arrays["table"])).astype(np.float32)
        arrays["table"] = entries if layout_format == "lut4-v1" else (entries.view(np.uint32) >> 16).astype(np.uint16)
        layout = type(w.layout).from_arrays(layout_format, w.layout.meta(), arrays)
        scale_OI = np.ones(layout.shape)
        if scaled:
            scale_OG = (arrays["scales"].astype(np.uint32) << 16).view(np.float32).astype(np.float64)
            scale_OI = scale_OG[:, np.arange(num_inputs) // (group_size or num_inputs)]
        dense_OI = entries.astype(np.float64)[layout.codes_OI()] * scale_OI
        prepared = kernels.prepare(layout, isa=isa)
        for num_rows in ROWS:
            x = rng.integers(-20, 21, (num_rows, num_inputs)).astype(np.float32)
            np.testing.assert_array_equal(prepared.matmul(x), (x.astype(np.float64) @ dense_OI.T).astype(np.float32))


@pytest.mark.parametrize("value", [127.0, -127.0])
def test_extreme_codes_do_not_saturate(weight, int_format, isa, value) -> None:
    w = weight(int_format, 33, 192, scales=(1.0,), density=1.0, keep=12)
    arrays = {name: array.copy() for name, array in w.layout.arrays().items()}
    num_bits = int(int_format.split("-int")[1][0]) if "int" in int_format else 0
    ends = {"ternary-v1": ((242, 1), (0, -1)), "binary-v1": ((0xFF, 1), (0, -1))}.get(
        int_format, ((0xFF, (1 << num_bits) // 2 - 1), (0, -(1 << num_bits) // 2))
    )
    for fill, level in ends:
        arrays["codes"][...] = fill
        if int_format == "ternary-v1" and fill:
            arrays["codes"][:, -1] = 8  # two columns
        layout = type(w.layout).from_arrays(int_format, w.layout.meta(), arrays)
        x = np.full((3, 192), value, np.float32)
        for num_rows in (1, 3):
            y = kernels.prepare(layout, isa=isa).matmul(x[:num_rows])
            np.testing.assert_array_equal(y, np.full((num_rows, 33), value * level * 192, np.float32))


def test_extreme_activations(weight, layout_format, isa) -> None:
    w = weight(layout_format, 18, 200)
    prepared = kernels.prepare(w.layout, isa=isa)
    integer = w.is_integer
    for magnitude in (3e38, 1e30, 1e-30, 1e-37, 1e-40, 1e-45, 0.0):
        x = np.zeros((2, 200), np.float32)
        x[0, 70] = magnitude
        x[1, 131] = -magnitude
        with np.errstate(over="ignore"):
            expected = (w.met(x) @ w.dense_OI.T).astype(np.float32)
        y = prepared.matmul(x)
        bfloat16 = w.is_bf16
        if (integer and 0 < magnitude < 127 / np.finfo(np.float32).max) or (bfloat16 and magnitude < 2.0**-126):
            np.testing.assert_array_equal(y, np.zeros_like(y))  # below what a block can hold, or bfloat16
        elif bfloat16 and magnitude < 1e38:
            tiny = 2.0**-126 * w.scale_OI.max()  # sums below 2^-126 may count as zero, before they are scaled
            np.testing.assert_allclose(y, expected, rtol=1e-6, atol=tiny)
        elif magnitude < 1e38:
            np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-44)
        else:
            with np.errstate(over="ignore"):  # sums come before the scales of a table
                sums = (w.met(x) @ (w.dense_OI if integer else w.level_OI).T).astype(np.float32)
            finite = np.isfinite(expected) & np.isfinite(sums)
            np.testing.assert_allclose(y[finite], expected[finite], rtol=1e-6)
            assert not np.any(np.isnan(y))


@pytest.mark.parametrize("num_inputs", [130, 192])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_activation_spoils_its_row_only(weight, layout_format, isa, bad, num_inputs) -> None:
    w = weight(layout_format, 20, num_inputs)
    x = np.random.default_rng(5).standard_normal((4, num_inputs)).astype(np.float32)
    prepared = kernels.prepare(w.layout, isa=isa)
    clean = prepared.matmul(x)
    x[2, -1] = bad
    y = prepared.matmul(x)
    np.testing.assert_array_equal(y[[0, 1, 3]], clean[[0, 1, 3]])
    if w.is_integer:
        assert np.all(np.isnan(y[2]))
        assert np.all(np.isnan(prepared.matmul(x[2:3])))
    else:
        assert not np.any(np.isfinite(y[2]))


def test_same_bits_for_every_thread_count_row_count_and_instruction_set(weight, layout_format, num_threads) -> None:
    isas = [name for name in kernels.runnable_isas(kernels.detect_cpu()) if name != "numpy"]
    if not kernels.compiled_kernels():
        pytest.skip("the extension is not built")
    if layout_format in ("dense-bf16-v1", "bitmask-bf16-v1", "nm-bf16-v1"):
        isas = [name for name in isas if name != "amx"]  # ADR 0015: many rows are summed in another order
    rng = np.random.default_rng(6)
    for (num_outputs, num_inputs), (group_size, symmetric) in zip(SHAPES[-5:], GRIDS, strict=True):
        w = weight(layout_format, num_outputs, num_inputs, group_size=group_size, symmetric=symmetric)
        x = rng.standard_normal((131, num_inputs)).astype(np.float32)
        results = []
        for name in isas:
            prepared = kernels.prepare(w.layout, isa=name)
            for threads in (1, 2, 3, 7):
                num_threads(threads)
                results += [prepared.matmul(x), np.concatenate([prepared.matmul(x[i : i + 1]) for i in range(131)])]
                results.append(np.concatenate([prepared.matmul(x[:5]), prepared.matmul(x[5:])]))
        for result in results:
            np.testing.assert_array_equal(result, results[0])


def test_numpy_and_native_agree(weight, layout_format, isa) -> None:
    w = weight(layout_format, 50, 333, group_size=32, symmetric=False)
    x = np.random.default_rng(7).standard_normal((9, 333)).astype(np.float32)
    expected = kernels.prepare(w.layout, isa="numpy").matmul(x)
    y = kernels.prepare(w.layout, isa=isa).matmul(x)
    if w.is_integer:
        q, scale = quantize_exactly(x)
        bound = 2 * segment_bound(x, scale, q, w.dense_OI)
    else:
        bound = 2 * 335 * 2.0**-24 * (np.abs(w.met(x)) @ np.abs(w.dense_OI).T)
    assert np.all(np.abs(y.astype(np.float64) - expected) <= bound)


def test_products_of_several_weights(weight, isa) -> None:
    x = np.random.default_rng(8).standard_normal((3, 2, 100)).astype(np.float32)
    formats = ("dense-f32-v1", "bitmask-int8-v1", "dense-int4-v1", "nm-bf16-v1", "dense-int8-v1")
    prepared = [
        kernels.prepare(weight(name, 10 + 20 * i, 100).layout, isa=isa if i != 1 else None)
        for i, name in enumerate(formats)
    ]
    together = kernels.matmul_many(x, prepared)
    for w, y in zip(prepared, together, strict=True):
        assert y.shape == (3, 2, w.shape[0])
        np.testing.assert_array_equal(y, w.matmul(x))
        np.testing.assert_allclose(w.matmul(x[0, 0]), y[0, 0], rtol=1e-4, atol=1e-4)  # numpy sums in another order
    assert kernels.matmul_many(x, []) == []


def test_a_layout_can_be_given_unprepared(weight) -> None:
    w = weight("bitmask-int4-v1", 6, 40)
    x = np.linspace(-1, 1, 40)
    np.testing.assert_array_equal(kernels.matmul(x, w.layout), kernels.prepare(w.layout).matmul(x))


def test_empty_shapes(weight, layout_format, isa) -> None:
    for num_outputs, num_inputs in ((0, 8), (8, 0), (0, 0)):
        prepared = kernels.prepare(weight(layout_format, num_outputs, num_inputs).layout, isa=isa)
        for num_rows in (0, 1, 3):
            y = prepared.matmul(np.ones((num_rows, num_inputs), np.float32))
            np.testing.assert_array_equal(y, np.zeros((num_rows, num_outputs), np.float32))


def test_wrong_arguments(weight) -> None:
    prepared = kernels.prepare(weight("dense-int8-v1", 4, 8).layout)
    with pytest.raises(UsageError, match=r"last axis of 8"):
        prepared.matmul(np.zeros((2, 9), np.float32))
    with pytest.raises(UsageError, match="scalar"):
        prepared.matmul(1.0)
    with pytest.raises(UsageError, match=r"allowed: numpy"):
        kernels.prepare(weight("dense-int8-v1", 4, 8).layout, isa="sse2")
    with pytest.raises(UsageError, match="allowed: 1 to 256"):
        kernels.set_num_threads(0)


def test_strided_and_float64_activations(weight) -> None:
    prepared = kernels.prepare(weight("dense-int4-v1", 7, 50).layout)
    x = np.random.default_rng(9).standard_normal((6, 100))
    np.testing.assert_array_equal(prepared.matmul(x[::2, ::2]), prepared.matmul(x[::2, ::2].astype(np.float32)))


def test_activations_of_every_form_give_the_same_bits(weight, isa) -> None:
    prepared = kernels.prepare(weight("dense-int8-v1", 33, 70).layout, isa=isa)
    x = np.random.default_rng(13).standard_normal((4, 70)).astype(np.float32)
    expected = prepared.matmul(x)
    unaligned = np.frombuffer(b"x" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    assert not unaligned.flags.aligned
    read_only = x.copy()
    read_only.flags.writeable = False
    padded = np.zeros((8, 140), np.float32)
    padded[::2, ::2] = x
    forms = (
        *(x.tolist(), x.astype(np.float64), x.astype(">f4"), np.asfortranarray(x), padded[::2, ::2]),
        *(unaligned, read_only, memoryview(x), np.ma.masked_array(x), list(x)),
    )
    for form in forms:
        for y in (prepared.matmul(form), *kernels.matmul_many(form, [prepared, prepared])):
            assert type(y) is np.ndarray
            assert (y.dtype, y.shape, y.flags.c_contiguous, y.flags.writeable) == (np.float32, (4, 33), True, True)
            np.testing.assert_array_equal(y, expected)
    for shape in ((2, 2, 70), (1, 4, 1, 70), (4, 1, 70)):
        np.testing.assert_array_equal(prepared.matmul(x.reshape(shape)), expected.reshape((*shape[:-1], 33)))
    for row, y_O in zip(x, expected, strict=True):
        assert prepared.matmul(row).shape == (33,)
        np.testing.assert_allclose(prepared.matmul(row), y_O, rtol=1e-5, atol=1e-5)  # numpy sums in another order


def test_activations_are_rounded_for_bfloat16_alone(weight, isa) -> None:
    """One weight of 1, so that the product is the activation as it was met."""
    halfway = np.float32(1 + 2.0**-8)  # between 1 and the next bfloat16, 1 + 2^-7
    cases = {
        float(halfway): 1.0,  # to even
        1 + 3 * 2.0**-8: 1 + 2.0**-6,
        float(np.nextafter(halfway, np.float32(2))): 1 + 2.0**-7,
        -float(np.nextafter(halfway, np.float32(2))): -1 - 2.0**-7,
        2.0**-126: 2.0**-126,
        2.0**-126 - 2.0**-149: 0.0,
        3.4e38: np.inf,
        np.inf: np.inf,
        -np.inf: -np.inf,
    }
    for layout_format in ("dense-bf16-v1", "dense-f32-v1"):
        layout = weight(layout_format, 3, 1).layout
        arrays = layout.arrays()
        arrays["values"][...] = 0x3F80 if layout_format == "dense-bf16-v1" else 1.0
        prepared = kernels.prepare(type(layout).from_arrays(layout_format, layout.meta(), arrays), isa=isa)
        for num_rows in (1, 9):
            for value, rounded in cases.items():
                y = prepared.matmul(np.full((num_rows, 1), value, np.float32))
                expected = rounded if layout_format == "dense-bf16-v1" else np.float32(value)
                np.testing.assert_array_equal(y, np.full((num_rows, 3), expected, np.float32))
        assert np.isnan(prepared.matmul(np.full((9, 1), np.nan, np.float32))).all()
