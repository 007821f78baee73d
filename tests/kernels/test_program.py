"""Programs: one call of the extension gives the bits of their steps one by one."""

import resource
import threading
from pathlib import Path

import numpy as np
import pytest

from rarefy import kernels
from rarefy.kernels import extension_status
from rarefy.kernels.ops import KEY_BLOCK, load_ops
from rarefy.kernels.program import Program, Recorder
from rarefy.layouts import Sum

NUM_LAYERS = 3
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
WIDTH, FEATURES = 40, 72
MAX_TOKENS = 2 * KEY_BLOCK
NATIVE = pytest.mark.skipif(not extension_status()[0], reason="the compiled extension is missing")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


@pytest.fixture
def make(weight):
    """A decoder's pass with every kind of step; instruction set -> program."""

    def matrix(name: str, outputs: int, inputs: int):
        return weight(name, outputs, inputs).layout

    def build(isa: str | None) -> Program:
        def prepared(layout):
            return kernels.prepare(layout, isa=isa)

        recorder, q_width, kv_width = Recorder(WIDTH), HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        total = recorder.start
        x = recorder.rms_norm(total, normal(WIDTH, seed=1), 1e-5)
        for layer in range(NUM_LAYERS):
            formats = ("dense-int4-v1", "dense-bf16-v1", "bitmask-int8-v1")
            sizes = (q_width, kv_width, kv_width)
            qkv = [prepared(matrix(name, size, WIDTH)) for name, size in zip(formats, sizes, strict=True)]
            q, k, v = recorder.products(x, qkv, [normal(q_width, seed=2), None, normal(kv_width, seed=3)])
            q = recorder.rms_norm(q, normal(HEAD_DIM, seed=4), 1e-6)
            recorder.rope_store(q, k, v, layer=layer, rotation=layer % 2)
            attended = recorder.attention(q, layer=layer, window=(0, 9, 0)[layer], scale=0.3)
            both = Sum(matrix("dense-int8-v1", WIDTH, q_width), matrix("bitmask-int4-v1", WIDTH, q_width))
            (out,) = recorder.products(attended, [prepared(both)], [None])
            x = recorder.add_rms_norm(total, out, normal(WIDTH, seed=5), 1e-5)
            gated = [prepared(matrix(name, FEATURES, WIDTH)) for name in ("dense-int8-v1", "dense-f32-v1")]
            gate, up = recorder.products(x, gated, [None, None])
            recorder.gate(gate, up, layer % 3)
            (down,) = recorder.products(gate, [prepared(matrix("nm-int4-v1", WIDTH, FEATURES))], [None])
            x = recorder.add_rms_norm(total, down, normal(WIDTH, seed=6), 1e-5)
        return recorder.finish(load_ops(isa), x)

    return build


class Session:
    """The cache of one text, and what its passes gave."""

    def __init__(self, program: Program) -> None:
        self.program, self.length = program, 0
        shape = KV_HEADS, MAX_TOKENS // KEY_BLOCK
        self.keys = [np.zeros((*shape, HEAD_DIM, KEY_BLOCK), np.float32) for _ in range(NUM_LAYERS)]
        self.values = [np.zeros((KV_HEADS, MAX_TOKENS, HEAD_DIM), np.float32) for _ in range(NUM_LAYERS)]

    def run(self, num_tokens: int) -> np.ndarray:
        x = normal(num_tokens, WIDTH, seed=self.length)
        rotations = [
            (normal(MAX_TOKENS, HEAD_DIM // 2, seed=s), normal(MAX_TOKENS, HEAD_DIM // 2, seed=s)) for s in (7, 8)
        ]
        y = self.program.run(x, rotations, self.keys, self.values, self.length)
        self.length += num_tokens
        assert y.shape == (num_tokens, WIDTH)
        return np.concatenate([y, x])  # the steps change x


PASSES = (5, 1, 1, 70, 0, 1, 33, 1)


def outputs(program: Program, passes: tuple[int, ...] = PASSES) -> list[np.ndarray]:
    session = Session(program)
    return [session.run(num_tokens) for num_tokens in passes] + session.keys + session.values


def assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


ISAS = [name for name in kernels.runnable_isas(kernels.detect_cpu()) if name != "numpy"]


@NATIVE
@pytest.mark.parametrize("isa", ISAS)
def test_one_call_gives_the_bits_of_its_steps(make, isa, num_threads) -> None:
    program, stepwise = make(isa), make(isa)
    assert program._native is not None
    stepwise._native = None
    expected = outputs(stepwise)
    assert np.isfinite(expected[0]).all()
    assert np.ptp(expected[0]) > 0.1
    for threads in (1, 2, 5):
        num_threads(threads)
        assert_same(outputs(program), expected)


@NATIVE
def test_numpy_runs_the_same_steps(make) -> None:
    numpy_program = make("numpy")
    assert numpy_program._native is None
    passes = (5, 1, 40, 1)
    for found, expected in zip(outputs(numpy_program, passes), outputs(make(None), passes), strict=True):
        # A rounding of an activation to 8 bits may go the other way.
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.1 * np.abs(expected).max(initial=1e-9))


@NATIVE
def test_registers_share_memory(make) -> None:
    program = make(None)
    # That many of one width live at once: two or three of each width, whatever the number of layers.
    slot, widths = program._slots([0] * 200)
    assert len(slot) > 10 * NUM_LAYERS
    assert len(widths) <= 6


@NATIVE
def test_several_threads_run_one_program(make, num_threads) -> None:
    num_threads(2)
    program = make(None)
    expected = outputs(program)
    wrong: list[int] = []

    def work(index: int) -> None:
        try:
            for _ in range(20):
                assert_same(outputs(program), expected)
        except AssertionError:
            wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@NATIVE
def test_what_does_not_fit_is_refused_before_anything_is_changed(make) -> None:
    program = make(None)
    session = Session(program)
    session.run(3)
    rotation = np.zeros((MAX_TOKENS, HEAD_DIM // 2), np.float32)
    good = {
        "x": normal(2, WIDTH),
        "cos": [rotation] * 2,
        "sin": [rotation] * 2,
        "keys": session.keys,
        "values": session.values,
        "start": 3,
    }
    wrong = {
        "x": [normal(2, WIDTH + 1), normal(2, WIDTH).astype(np.float64), normal(WIDTH, 2).T, normal(WIDTH), None],
        "cos": [[rotation], [rotation[:4]] * 2, [rotation[:, :3].copy()] * 2, [rotation.T] * 2, 3],
        "sin": [[rotation], [rotation[:4]] * 2],
        "keys": [session.keys[:2], [keys[:1] for keys in session.keys], [keys[..., :32] for keys in session.keys]],
        "values": [session.values[:2], [values[:, :64].copy() for values in session.values], session.keys],
        "start": [-1, MAX_TOKENS - 1, 2**62],
    }
    kept = [array.copy() for array in session.keys + session.values]
    for name, bad_values in wrong.items():
        for bad in bad_values:
            x = normal(2, WIDTH)
            with pytest.raises((ValueError, TypeError)):
                program._native.run(**{**good, "x": x, name: bad})
            np.testing.assert_array_equal(x, normal(2, WIDTH))
    assert_same(session.keys + session.values, kept)
    assert program._native.run(**good).shape == (2, WIDTH)


@NATIVE
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system has no /proc")
def test_calls_leave_no_memory_behind(make) -> None:
    program = make(None)
    session = Session(program)
    weight = program._steps[1].weights[0]
    x = normal(40, WIDTH)

    def calls(count: int) -> None:
        for i in range(count):
            session.length = i % 40
            session.run(1 + i % 60)
            weight.matmul(x)
            weight.matmul(x.tolist())
            kernels.matmul_many(x[0], [weight, weight])
            with pytest.raises(kernels.products.UsageError):
                weight.matmul(x[:, :1])
            with pytest.raises(ValueError, match="outside"):
                program.run(x, [(x, x)] * 2, session.keys, session.values, MAX_TOKENS)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    calls(100)
    before = resident()
    calls(400)  # a lost output of the smallest call alone would be 2.5 MB
    assert resident() - before < 1.5e6
