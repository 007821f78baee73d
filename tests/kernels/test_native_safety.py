"""Damaged arrays straight into the extension: an exception, never an access out of bounds."""

import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rarefy import kernels

native = pytest.importorskip("rarefy._native")


def integers(meta) -> dict[str, int]:
    found = {name: int(value) for name, value in meta.items() if isinstance(value, int)}
    if "block_shape" in meta:
        found["block_shape_0"], found["block_shape_1"] = meta["block_shape"]
    return found


def arguments(w, isa: str = "reference") -> dict[str, object]:
    return {
        "format": w.layout.format,
        "isa": isa,
        "num_outputs": w.layout.shape[0],
        "num_inputs": w.layout.shape[1],
        "integers": integers(w.layout.meta()),
        "arrays": {name: np.ascontiguousarray(array) for name, array in w.layout.arrays().items()},
    }


def test_the_undamaged_arrays_are_accepted(weight, layout_format) -> None:
    assert native.prepare(**arguments(weight(layout_format, 5, 70))).shape == (5, 70)


def test_each_array_missing_short_long_or_of_another_dtype(weight, layout_format) -> None:
    good = arguments(weight(layout_format, 5, 70, symmetric=False, density=1.0))  # every block is there
    for name, array in good["arrays"].items():
        flat = array.reshape(-1)
        damaged = [flat[:-1], np.append(flat, flat[:1]), flat.astype(np.int64), flat.astype(np.float64), flat[:0]]
        for other in damaged:
            with pytest.raises(ValueError):  # noqa: PT011 (the message differs from array to array)
                native.prepare(**{**good, "arrays": {**good["arrays"], name: other}})
        if name == "zero_points":
            continue  # without them the grid is symmetric
        with pytest.raises(ValueError):  # noqa: PT011
            native.prepare(**{**good, "arrays": {k: v for k, v in good["arrays"].items() if k != name}})


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_outputs": 6},
        {"num_outputs": 4},
        {"num_outputs": -5},
        {"num_outputs": 2**62},
        {"num_inputs": 79},
        {"num_inputs": 63},
        {"num_inputs": -1},
        {"num_inputs": 2**40},
        {"num_outputs": 2**31 - 1, "num_inputs": 2**31 - 1},
        {"num_outputs": 2**31, "num_inputs": 2**33},
        {"format": "dense-int4-v2"},
        {"format": ""},
        {"isa": "sse"},
        {"integers": {"group_size": 33}},
        {"integers": {"group_size": -64}},
        {"integers": {"group_size": 2**62}},
    ],
)
def test_wrong_numbers(weight, layout_format, wrong) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        native.prepare(**{**arguments(weight(layout_format, 5, 70, density=1.0)), **wrong})


@pytest.mark.parametrize("layout_format", ["block-bf16-v1", "block-int8-v1"])
def test_blocks_that_do_not_fit(weight, layout_format) -> None:
    good = arguments(weight(layout_format, 40, 200, density=0.4))
    mask = good["arrays"]["mask"]
    for row, bit, message in ((0, 0, "wrong size"), (2, 3, "wrong size"), (1, 4, "last column"), (2, 7, "last column")):
        damaged = mask.copy()
        damaged[row, 0] ^= 1 << bit
        with pytest.raises(ValueError, match=message):
            native.prepare(**{**good, "arrays": {**good["arrays"], "mask": damaged}})
    for high, wide in (
        (0, 64),
        (-16, 64),
        (16, 0),
        (8, 64),
        (16, 48),
        (4112, 64),
        (16, 4128),
        (2**62, 2**62),
        (32, 64),
    ):
        integers = {**good["integers"], "block_shape_0": high, "block_shape_1": wide}
        with pytest.raises(ValueError):  # noqa: PT011
            native.prepare(**{**good, "integers": integers})
    with pytest.raises(ValueError, match="block_shape_1 missing"):
        native.prepare(**{**good, "integers": {k: v for k, v in good["integers"].items() if k != "block_shape_1"}})


def test_masks_that_do_not_fit(weight, layout_format) -> None:
    if layout_format.startswith("block"):
        pytest.skip("its mask is one of blocks")
    good = arguments(weight(layout_format, 5, 70, density=0.4))
    if "mask" not in good["arrays"]:
        good["arrays"]["mask"] = np.zeros((5, 9), np.uint8)
        with pytest.raises(ValueError, match="unexpected mask"):
            native.prepare(**good)
        return
    full = good["arrays"]["mask"].copy()
    full[:, :8] = 255
    with pytest.raises(ValueError, match="mask does not fit"):
        native.prepare(**{**good, "arrays": {**good["arrays"], "mask": full}})
    padding = good["arrays"]["mask"].copy()
    padding[4, 8] |= 128
    with pytest.raises(ValueError, match="beyond the last column"):
        native.prepare(**{**good, "arrays": {**good["arrays"], "mask": padding}})


@pytest.mark.parametrize("num_bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["dense", "bitmask", "nm"])
def test_zero_points_out_of_range(weight, kind, num_bits) -> None:
    good = arguments(weight(f"{kind}-int{num_bits}-v1", 5, 70, symmetric=False))
    good["arrays"]["zero_points"] = np.full_like(good["arrays"]["zero_points"], 2**num_bits)
    with pytest.raises(ValueError, match="zero point"):
        native.prepare(**good)


def test_random_damage_is_refused_or_harmless(weight, layout_format, isa) -> None:
    """Bytes changed, cut or added anywhere: what is accepted must also multiply without a fault."""
    if isa == "numpy":
        pytest.skip("the extension has no numpy kernels")
    rng = np.random.default_rng(12)
    good = arguments(weight(layout_format, 19, 150, symmetric=False), isa)
    accepted = 0
    for _ in range(150):
        arrays = {name: array.copy().reshape(-1) for name, array in good["arrays"].items()}
        name = str(rng.choice(sorted(arrays)))
        array = arrays[name].view(np.uint8)
        for _ in range(int(rng.integers(1, 4))):
            array[rng.integers(0, array.size)] = rng.integers(0, 256)
        if rng.random() < 0.2:
            arrays[name] = arrays[name][: rng.integers(0, arrays[name].size)]
        shape = {}
        if rng.random() < 0.2:
            shape = {"num_inputs": int(rng.integers(0, 300)), "num_outputs": int(rng.integers(0, 40))}
        try:
            weights = native.prepare(**{**good, "arrays": arrays, **shape})
        except ValueError:
            continue
        accepted += 1
        num_outputs, num_inputs = weights.shape
        for num_rows in (1, 5):
            y = np.empty((num_rows, num_outputs), np.float32)
            native.matmul(np.ones((num_rows, num_inputs), np.float32), [weights], [y])
    assert accepted > 0


def test_products_with_wrong_arguments(weight) -> None:
    weights = native.prepare(**arguments(weight("dense-int8-v1", 5, 70)))
    x = np.zeros((2, 70), np.float32)
    y = np.zeros((2, 5), np.float32)
    native.matmul(x, [weights], [y])
    for bad_x, bad_weights, bad_outputs in (
        (x[:, :69].copy(), [weights], [y]),
        (x, [weights], [np.zeros((3, 5), np.float32)]),
        (x, [weights], [np.zeros((2, 6), np.float32)]),
        (x, [weights], []),
        (x, [], [y]),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            native.matmul(bad_x, bad_weights, bad_outputs)
    read_only = y.copy()
    read_only.flags.writeable = False
    for bad_x, bad_weights, bad_outputs in (
        (x, [None], [y]),
        (x, [x], [y]),
        (x, [weights], [y.astype(np.float64)]),
        (x, [weights], [np.asfortranarray(np.zeros((2, 5), np.float32))]),
        (x, [weights], [read_only]),
        (x.astype(np.float64), [weights], [y]),
        (x[0], [weights], [y]),
    ):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            native.matmul(bad_x, bad_weights, bad_outputs)


def test_compositions_that_do_not_fit(weight) -> None:
    inner, outer = (native.prepare(**arguments(weight("dense-int8-v1", *shape))) for shape in ((5, 70), (9, 15)))
    assert native.chain(inner, outer, 3).shape == (9, 210)
    assert native.add(inner, inner).shape == (5, 70)
    for num_runs in (0, 1, 2, -3, 2**31, 2**62):
        with pytest.raises(ValueError, match="are not the inputs"):
            native.chain(inner, outer, num_runs)
    with pytest.raises(ValueError, match="unlike shapes"):
        native.add(inner, outer)
    for wrong in (None, 3, np.ones(3)):
        with pytest.raises(TypeError):
            native.add(inner, wrong)
        with pytest.raises(TypeError):
            native.chain(wrong, outer, 3)
    both = native.chain(native.add(inner, inner), outer, 3)
    assert both.nbytes == 2 * inner.nbytes + outer.nbytes
    assert (both.isa, both.is_integer) == (None, False)
    x = np.random.default_rng(14).standard_normal((2, 210)).astype(np.float32)
    expected = outer.multiply(2 * inner.multiply(x.reshape(6, 70)).reshape(2, 15))
    del inner, outer  # what they are made of lives on in what was made
    np.testing.assert_array_equal(both.multiply(x), expected)
    with pytest.raises(ValueError, match="one weight"):
        native.matmul_taps(x[:, :64].copy(), np.zeros(1, np.int64), np.zeros(1, np.int64), both, np.zeros((1, 9), "f4"))


def test_what_the_extension_does_not_take_as_it_is(weight) -> None:
    weights = native.prepare(**arguments(weight("dense-int8-v1", 5, 70)))
    x = np.zeros((2, 70), np.float32)
    for refused in (
        None,
        1,
        x.tolist(),
        x.astype(np.float64),
        x[:, :69],
        x[:, :69].copy(),
        x.T,
        np.float32(1),
        x[:, 0],
    ):
        assert weights.multiply(refused) is None
        assert native.multiply(refused, [weights]) is None
    for refused in ([], [None], [weights, None], [x], [[weights]]):
        assert native.multiply(x, refused) is None
    assert [y.shape for y in native.multiply(x, [weights] * 3)] == [(2, 5)] * 3


def test_weights_outlive_their_arrays(weight) -> None:
    w = weight("bitmask-int8-v1", 40, 90)
    prepared = kernels.prepare(w.layout)
    x = np.ones((1, 90), np.float32)
    expected = prepared.matmul(x)
    for array in w.layout.arrays().values():
        array.setflags(write=True)
        array[...] = 0
    np.testing.assert_array_equal(prepared.matmul(x), expected)


class MadeAsAskedFor(Sequence[Any]):
    """Nobody else holds its items."""

    def __init__(self, make: Callable[[], Any], count: int) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        if index >= self.count:
            raise IndexError
        return self.make()


def test_weights_that_nobody_else_holds(weight) -> None:
    made = arguments(weight("dense-f32-v1", 40, 900))
    kept = native.prepare(**made)
    x = np.random.default_rng(15).standard_normal((2, 900)).astype(np.float32)
    ys = [np.zeros((2, 40), np.float32) for _ in range(2)]
    native.matmul(x, MadeAsAskedFor(lambda: native.prepare(**made), 2), ys)
    for y in (*native.multiply(x, MadeAsAskedFor(lambda: native.prepare(**made), 2)), *ys):
        np.testing.assert_array_equal(y, kept.multiply(x))
    geometry = (None, 1, (15, 15), (1, 1), (1, 1), (7, 7), (30, 30), False, False)
    image = np.ones((1, 4, 30, 30), np.float32)
    found = native.convolve(image, MadeAsAskedFor(lambda: native.prepare(**made), 1), *geometry)
    np.testing.assert_array_equal(found, native.convolve(image, [kept], *geometry))


@pytest.mark.slow
def test_cpp_tests_under_sanitizers(
    cxx_compiler: str, run_cmake: Callable[..., str], run_program: Callable[..., str], tmp_path: Path
) -> None:
    """Builds native/*/*test.cc and fuzz.cc with address and undefined-behaviour sanitizers and runs them."""
    root = Path(__file__).resolve().parents[2]
    options = ["-DRAREFY_BUILD_TESTS=ON", "-DRAREFY_SANITIZE=address,undefined"]
    # What this machine cannot run would only be compiled.
    missing = {"avx_vnni", "avx512_bf16", "amx"} - set(kernels.runnable_isas(kernels.detect_cpu()))
    options += [f"-DRAREFY_HAS_{isa.upper()}=OFF" for isa in sorted(missing)]
    run_cmake("-S", root, "-B", tmp_path, *options)
    run_cmake("--build", tmp_path, "--parallel", "2")
    tests, fuzzers = sorted(tmp_path.glob("*_test")), sorted(tmp_path.glob("*_fuzz"))
    assert len(tests) >= 3
    assert len(fuzzers) >= 3
    for program in tests:
        run_program(program)
    for fuzzer in fuzzers:
        run_program(fuzzer, "--runs", "500")
    wrong = subprocess.run([fuzzers[0], "--runs", "-1"], capture_output=True, check=False)
    assert wrong.returncode == 2


def test_taps_outside_of_the_pixels_and_shapes_that_do_not_fit(weight) -> None:
    prepared = native.prepare(**arguments(weight("dense-int8-v1", 5, 128)))
    pixels, y = np.ones((6, 64), np.float32), np.zeros((3, 5), np.float32)
    rows, taps = np.array([0, 2, 4]), np.array([0, 1])
    native.matmul_taps(pixels, rows, taps, prepared, y)
    assert (y == y[0]).all()
    floats = native.prepare(**arguments(weight("dense-bf16-v1", 5, 128)))
    wrong = [
        (pixels, rows + 1, taps, prepared, y), (pixels, rows - 1, taps, prepared, y),
        (pixels, rows, taps - 1, prepared, y), (pixels, rows, taps + 2**62, prepared, y),
        (pixels, rows + 2**62, taps + 2**62, prepared, y), (pixels[:5], rows, taps, prepared, y),
        (pixels[:0], rows, taps, prepared, y), (pixels, rows[:2], taps, prepared, y),
        (pixels, rows, taps[:1], prepared, y), (pixels, rows, taps[:0], prepared, y),
        (np.ones((6, 32), np.float32), rows, np.arange(4), prepared, y), (pixels, rows, taps, floats, y),
        (pixels, rows, taps, prepared, y[:, :4].copy()),
    ]  # fmt: skip
    for damaged in wrong:
        with pytest.raises(ValueError):  # noqa: PT011 (several messages)
            native.matmul_taps(*damaged)
    native.matmul_taps(pixels, rows[:0], taps, prepared, y[:0])


def changed_meanwhile(call: Callable[[], None], array: np.ndarray, before: int, after: int) -> None:
    """Runs `call` in a thread, and sets the array from `before` to `after` as soon as that lets go of Python's lock."""
    array[:] = before
    begun, interval = threading.Event(), sys.getswitchinterval()
    thread = threading.Thread(target=lambda: (begun.set(), call()))
    sys.setswitchinterval(60)  # seconds: Python takes the lock from nobody
    try:
        thread.start()
        begun.wait()
        array[:] = after
        thread.join()
    finally:
        sys.setswitchinterval(interval)


def test_places_that_change_meanwhile_are_those_that_were_checked(weight) -> None:
    prepared = native.prepare(**arguments(weight("dense-int8-v1", 64, 128)))
    pixels = np.arange(1.0, 1001.0, dtype=np.float32)[:, None] * np.ones((1, 64), np.float32)
    rows, taps, y = np.empty(20000, np.int64), np.array([0, 1]), np.zeros((20000, 64), np.float32)
    for _ in range(10):
        changed_meanwhile(lambda: native.matmul_taps(pixels, rows, taps, prepared, y), rows, 3, 900)
        assert (y == y[0]).all()


def test_masks_that_change_meanwhile_are_those_that_were_checked(weight) -> None:
    good = arguments(weight("bitmask-int8-v1", 1, 512, group_size=None), "reference") | {"num_outputs": 4096}
    mask, scales = np.empty((4096, 64), np.uint8), np.full((4096, 1), 0x3F80, np.uint16)
    codes = np.full(4096 * 256, 129, np.uint8)  # 1, of every second input
    good["arrays"] = {"mask": mask, "codes": codes, "scales": scales}
    good["integers"] = good["integers"] | {"num_values": codes.size}
    made: list[Any] = []
    x = np.tile(np.array([1.0, 2.0], np.float32), 256)[None]
    for _ in range(10):
        changed_meanwhile(lambda: made.append(native.prepare(**good)), mask, 0x55, 0xAA)
        y = made[-1].multiply(x)
        assert (y == y[0, 0]).all(), y
