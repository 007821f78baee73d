"""The steps of recurrent layers: the extension against numpy, and arguments that it must refuse."""

import itertools
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy import kernels
from rarefy.kernels import Prepared, detect_cpu, extension_status, runnable_isas
from rarefy.kernels.recurrent import MODES, Steps, run_in_numpy, run_steps
from rarefy.layouts import Sum

NATIVE = pytest.mark.skipif(not extension_status()[0], reason="the compiled extension is missing")
ISAS = [isa for isa in runnable_isas(detect_cpu()) if isa != "numpy"] if extension_status()[0] else []
GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="session")
def arguments(weight):
    """Fields of `Steps` but `reverse`, of any shape."""

    def make(
        mode: str, num_steps: int, batch: int, hidden: int, *, isa: str | None = None, projected: int = 0
    ) -> dict[str, Any]:
        outputs, num_gates = projected or hidden, GATES[mode] * hidden

        def prepared(*shape: int) -> Prepared:
            return kernels.prepare(weight("dense-f32-v1", *shape).layout, isa=isa)

        return {
            "mode": mode,
            "x_LBG": normal(num_steps, batch, num_gates),
            "input_bias_G": normal(num_gates, seed=1),
            "hidden_bias_G": normal(num_gates, seed=2),
            "meet_hidden": prepared(num_gates, outputs),
            "project": prepared(projected, hidden) if projected else None,
            "hidden_BO": normal(batch, outputs, seed=3) / 10,
            "cell_BH": normal(batch, hidden, seed=4) if mode == "LSTM" else None,
            "lengths_B": None,
        }

    return make


def assert_close(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        if b is None:
            assert a is None
            continue
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(1.0, float(np.abs(b).max(initial=0))))


@NATIVE
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_extension_gives_what_numpy_gives(arguments, data) -> None:
    draw = data.draw
    mode = draw(st.sampled_from(sorted(MODES)))
    batch, num_steps, hidden = draw(st.integers(0, 20)), draw(st.integers(0, 4)), draw(st.integers(1, 70))
    projected = draw(st.integers(0, hidden)) if mode == "LSTM" else 0
    made = arguments(mode, num_steps, batch, hidden, isa=draw(st.sampled_from(ISAS)), projected=projected)
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, num_steps), min_size=batch, max_size=batch))
        made["lengths_B"] = np.array(sorted(lengths, reverse=True), np.int64)
    for name in ("input_bias_G", "hidden_bias_G"):
        if draw(st.booleans()):
            made[name] = None
    reverse = draw(st.booleans())
    assert_close(run_steps(Steps(**made, reverse=reverse)), run_in_numpy(Steps(**made, reverse=reverse)))


@NATIVE
@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("batch", [1, 3, 9, 40])
def test_the_bits_do_not_depend_on_the_threads(arguments, mode: str, batch: int) -> None:
    """Nor on the other sequences, and what a call gave is not written to by the next one."""
    made = arguments(mode, 7, batch, 150)
    made["lengths_B"] = np.arange(batch, dtype=np.int64)[::-1] % 8
    made["lengths_B"][::-1].sort()
    before, found = kernels.get_num_threads(), []
    try:
        for num_threads, reverse in itertools.product((1, 2, 3), (False, True)):
            kernels.set_num_threads(num_threads)
            found.append(run_steps(Steps(**made, reverse=reverse)))
    finally:
        kernels.set_num_threads(before)
    for i, each in enumerate(found):
        for a, b in zip(each, found[i % 2], strict=True):
            np.testing.assert_array_equal(a, b)
    last = {
        name: a[-1:].copy() if name.endswith(("BO", "BH", "_B")) and a is not None else a for name, a in made.items()
    }
    last["x_LBG"] = np.ascontiguousarray(made["x_LBG"][:, -1:])
    np.testing.assert_array_equal(run_steps(Steps(**last, reverse=True))[0][:, 0], found[1][0][:, -1])


@NATIVE
def test_results_are_new_memory(arguments) -> None:
    made = arguments("LSTM", 3, 2, 8)
    inputs = [a for a in made.values() if isinstance(a, np.ndarray)]
    copies = [a.copy() for a in inputs]
    first = run_steps(Steps(**made, reverse=False))
    kept = [a.copy() for a in first]
    second = run_steps(Steps(**{**made, "x_LBG": made["x_LBG"] + 1}, reverse=True))
    for a, b in zip((*inputs, *first), (*copies, *kept), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in itertools.product(first, (*second, *inputs)):
        assert not np.shares_memory(a, b)


@NATIVE
def test_compositions_run_inside(weight, arguments) -> None:
    made = arguments("GRU", 4, 3, 40)
    parts = [weight(name, 120, 40).layout for name in ("dense-f32-v1", "bitmask-bf16-v1")]
    made["meet_hidden"] = kernels.prepare(Sum(*parts))
    assert made["meet_hidden"].weights is not None
    assert_close(run_steps(Steps(**made, reverse=False)), run_in_numpy(Steps(**made, reverse=False)))


@NATIVE
def test_without_kernels_numpy_runs(arguments) -> None:
    made = arguments("LSTM", 4, 3, 40, isa="numpy", projected=11)
    assert made["meet_hidden"].weights is None
    assert_close(
        run_steps(Steps(**made, reverse=True)),
        run_steps(Steps(**arguments("LSTM", 4, 3, 40, projected=11), reverse=True)),
    )


@NATIVE
def test_what_is_not_finite_stays_in_its_sequence(arguments) -> None:
    made = arguments("GRU", 3, 4, 20)
    made["x_LBG"][1, 2, 5] = np.nan
    y_LBO = run_steps(Steps(**made, reverse=False))[0]
    assert np.isfinite(np.delete(y_LBO, 2, axis=1)).all()
    assert np.isfinite(y_LBO[0]).all()
    assert np.isnan(y_LBO[2, 2]).all()


def native_arguments(made: dict[str, Any]) -> dict[str, Any]:
    return {
        "isa": "reference",
        "mode": MODES[made["mode"]],
        "x": made["x_LBG"],
        "input_bias": made["input_bias_G"],
        "hidden_bias": made["hidden_bias_G"],
        "meet_hidden": made["meet_hidden"].weights,
        "project": None if made["project"] is None else made["project"].weights,
        "hidden": made["hidden_BO"],
        "cell": made["cell_BH"],
        "lengths": np.array([3, 1], np.int64),
        "reverse": False,
    }


@NATIVE
def test_arguments_that_do_not_fit_are_refused(arguments) -> None:
    native = pytest.importorskip("rarefy._native")
    good = native_arguments(arguments("LSTM", 3, 2, 8, projected=5))
    assert [a.shape for a in native.run_recurrent(**good)] == [(3, 2, 5), (2, 5), (2, 8)]
    x, hidden, cell, bias = good["x"], good["hidden"], good["cell"], good["input_bias"]
    other = native_arguments(arguments("LSTM", 3, 2, 8))
    for wrong in (
        {"isa": "sse"},
        {"mode": -1},
        {"mode": 4},
        {"mode": 1},
        {"mode": 2},
        {"x": x[:, :, :31].copy()},
        {"x": x[0]},
        {"x": x.astype(np.float64)},
        {"x": x.transpose(1, 0, 2)},
        {"input_bias": bias[:31].copy()},
        {"hidden_bias": bias[None]},
        {"hidden_bias": bias.astype(np.float16)},
        {"project": None},
        {"meet_hidden": other["meet_hidden"]},
        {"meet_hidden": good["project"]},
        {"project": good["meet_hidden"]},
        {"hidden": cell},
        {"hidden": hidden[:1]},
        {"hidden": np.asfortranarray(hidden)},
        {"hidden": hidden[0]},
        {"cell": None},
        {"cell": hidden},
        {"lengths": np.array([3], np.int64)},
        {"lengths": np.array([1, 3], np.int64)},
        {"lengths": np.array([4, 3], np.int64)},
        {"lengths": np.array([3, -1], np.int64)},
        {"lengths": np.array([2**62, 2**62], np.int64)},
    ):
        with pytest.raises(ValueError):  # noqa: PT011 (the message differs)
            native.run_recurrent(**{**good, **wrong})
    for wrong in (
        {"x": None},
        {"meet_hidden": None},
        {"meet_hidden": x},
        {"project": 3},
        {"lengths": np.array([3, 1], np.int32)},
        {"lengths": np.array([3, 0, 1, 0], np.int64)[::2]},
        {"lengths": [3, 1]},
        {"mode": 2**40},
    ):
        with pytest.raises(TypeError):
            native.run_recurrent(**{**good, **wrong})
    plain = native_arguments(arguments("GRU", 3, 2, 8))
    for wrong in ({"cell": cell}, {"project": native_arguments(arguments("LSTM", 3, 2, 8, projected=8))["project"]}):
        with pytest.raises(ValueError):  # noqa: PT011
            native.run_recurrent(**{**plain, **wrong})


@NATIVE
def test_other_threads_run_meanwhile(arguments) -> None:
    """Several callers at once, each with its own memory."""
    made = arguments("LSTM", 20, 9, 64)
    expected = run_steps(Steps(**made, reverse=False))
    wrong: list[int] = []

    def call() -> None:
        for i in range(30):
            found = run_steps(Steps(**made, reverse=False))
            if not all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)):
                wrong.append(i)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
