"""The small ops of every instruction set against loops in float64."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rarefy.core.errors import UsageError
from rarefy.kernels import detect_cpu, get_num_threads, set_num_threads
from rarefy.kernels.dispatch import runnable_isas
from rarefy.kernels.extension import extension_status
from rarefy.kernels.ops import ACTIVATIONS, KEY_BLOCK, NumpyOps, Ops, load_ops

ISAS = runnable_isas(detect_cpu()) if extension_status()[0] else ("numpy",)
EPSILON = float(np.finfo(np.float32).eps)
NATIVE = pytest.mark.skipif(len(ISAS) == 1, reason="the compiled extension is missing")
SIZES = [1, 3, 15, 16, 17, 64, 97]


@pytest.fixture(params=ISAS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return load_ops(request.param)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def assert_within(found: np.ndarray, expected: np.ndarray, error: np.ndarray | float) -> None:
    """Check |found - expected| <= error, in a way that a NaN fails."""
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert (np.abs(found - expected) <= error).all(), np.max(np.abs(found - expected) / error, initial=0)


# --- norms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_rms_norm(ops: Ops, rows: int, width: int) -> None:
    x, weight = normal(rows, width) * 3, normal(width)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 0.01) * weight
    # a sum of `width` squares, then five roundings
    assert_within(ops.rms_norm(x, weight, 0.01), expected, (width / 2 + 5) * EPSILON * np.abs(expected) + 1e-30)


@pytest.mark.parametrize("width", SIZES)
def test_add_rms_norm(ops: Ops, width: int) -> None:
    total, x, weight = normal(4, width, seed=1), normal(4, width), normal(width)
    expected_sum = total + x
    expected = NumpyOps().rms_norm(expected_sum, weight, 1e-5)
    found = ops.add_rms_norm(total, x, weight, 1e-5)
    np.testing.assert_array_equal(total, expected_sum)
    assert_within(found, expected, (width + 10) * EPSILON * np.abs(expected) + 1e-30)


@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_add_layer_norm(ops: Ops, width: int, mean: float) -> None:
    x, residual, weight, bias = (
        normal(4, width) + np.float32(mean),
        normal(4, width, seed=1),
        normal(width),
        normal(width),
    )
    total = x.astype(np.float64) + residual
    centred = total - total.mean(axis=1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True) + 0.01)
    expected = centred / deviation * weight + bias
    # The mean and each sum are off by their size times a few eps; the norm divides that by the deviation.
    error = (width / 2 + 8) * EPSILON * (np.abs(total).max() / deviation + 4) * (np.abs(weight) + np.abs(bias))
    assert_within(ops.add_layer_norm(x, residual, weight, bias, 0.01), expected, error)


@pytest.mark.parametrize("width", SIZES)
def test_layer_norm_is_that_of_a_sum(ops: Ops, width: int) -> None:
    x, residual, weight, bias = normal(4, width), normal(4, width, seed=1), normal(width), normal(width, seed=2)
    expected = ops.add_layer_norm(x, residual, weight, bias, 0.01)
    np.testing.assert_array_equal(ops.layer_norm(x + residual, weight, bias, 0.01), expected)


# --- activations ----------------------------------------------------------------------------------------------------

EXACT: dict[str, Callable[[float], float]] = {
    "silu": lambda x: x / (1 + math.exp(-x)) if x > -700 else 0.0,
    "gelu": lambda x: 0.5 * x * math.erfc(-x / math.sqrt(2)),
    "gelu_new": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("width", [1, 7, 40, 1000])
def test_activations(ops: Ops, name: str, width: int) -> None:
    x = np.concatenate([np.linspace(-12, 12, 3 * width), normal(width) * 50]).astype(np.float32).reshape(4, width)
    expected = np.vectorize(EXACT[name])(x.astype(np.float64))
    found = x.copy()
    ops.activate(found, ACTIVATIONS[name])
    # The exponent of e^x or erfc is up to 90 here and rounded to float32; tanh cancels in the oracle itself.
    error = 100 * EPSILON * np.abs(expected) + 1e-7
    assert_within(found, expected, error)
    gated, up = x.copy(), normal(4, width, seed=2)
    ops.gate(gated, up, ACTIVATIONS[name])
    assert_within(gated, expected * up, error * np.abs(up) + EPSILON * np.abs(expected * up))


@pytest.mark.parametrize("name", EXACT)
def test_activations_of_extreme_values(ops: Ops, name: str) -> None:
    x = np.array([[np.inf, 3e38, -3e38, -1e-38, 0.0, -0.0, np.nan]], np.float32)
    ops.activate(x, ACTIVATIONS[name])
    assert x[0, 0] == np.inf
    assert x[0, 1] == pytest.approx(3e38)
    assert abs(x[0, 2]) < 1e-6
    assert np.abs(x[0, 3:6]).max() < 1e-30
    assert np.isnan(x[0, 6])


def test_gelu_is_accurate_in_its_tail(ops: Ops) -> None:
    x = -np.linspace(0.01, 12, 500).astype(np.float32).reshape(1, -1)
    expected = np.vectorize(EXACT["gelu"])(x.astype(np.float64))
    ops.activate(x, ACTIVATIONS["gelu"])
    assert_within(x, expected, 1e-4 * np.abs(expected) + 1e-37)  # relative, where 1 + erf(x) would cancel to 0


def test_add_bias(ops: Ops) -> None:
    for width in SIZES:
        x, bias = normal(3, width), normal(width)
        expected = x + bias
        ops.add_bias(x, bias)
        np.testing.assert_array_equal(x, expected)


# --- rotary positions and attention ---------------------------------------------------------------------------------


def empty_cache(num_kv_heads: int, head_dim: int, num_keys: int) -> tuple[np.ndarray, np.ndarray]:
    """A cache of NaN: whatever lies outside the visible keys must not matter."""
    blocks = -(-num_keys // KEY_BLOCK)
    shape = (num_kv_heads, blocks * KEY_BLOCK, head_dim)
    return np.full((num_kv_heads, blocks, head_dim, KEY_BLOCK), np.nan, np.float32), np.full(shape, np.nan, np.float32)


@pytest.mark.parametrize(("head_dim", "num_tokens", "start"), [(2, 1, 0), (6, 3, 62), (16, 70, 1), (34, 2, 200)])
def test_rope_store(ops: Ops, head_dim: int, num_tokens: int, start: int) -> None:
    num_heads, num_kv_heads, num_positions = 4, 2, start + num_tokens + 1
    q, k = normal(num_tokens, num_heads * head_dim), normal(num_tokens, num_kv_heads * head_dim)
    v = normal(num_tokens, num_kv_heads * head_dim, seed=1)
    angles = np.random.default_rng(0).uniform(0, 6, (num_positions, head_dim // 2))
    keys, values = empty_cache(num_kv_heads, head_dim, num_positions)
    turned = q.copy()
    ops.rope_store(
        turned, k.copy(), v, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), keys, values, start
    )

    def rotated(x: np.ndarray) -> np.ndarray:  # as complex numbers
        x = x.astype(np.float64).reshape(num_tokens, -1, 2, head_dim // 2)
        z = (x[:, :, 0] + 1j * x[:, :, 1]) * np.exp(1j * angles[start : start + num_tokens])[:, None]
        return np.concatenate([z.real, z.imag], axis=2)

    assert_within(turned.reshape(num_tokens, num_heads, head_dim), rotated(q), 1e-6)
    for token in range(num_tokens):
        position = start + token
        found = keys[:, position // KEY_BLOCK, :, position % KEY_BLOCK]
        assert_within(found, rotated(k)[token], 1e-6)
        np.testing.assert_array_equal(values[:, position], v[token].reshape(num_kv_heads, head_dim))
    assert np.isnan(keys).sum() == keys.size - num_kv_heads * head_dim * num_tokens  # nothing else is touched
    assert np.isnan(values).sum() == values.size - num_kv_heads * head_dim * num_tokens


def test_rotation_rounds_every_product_as_torch_does(ops: Ops) -> None:
    q, v, angles = normal(40, 64), normal(40, 64, seed=1), normal(40, 16, seed=2)
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = np.split(q.reshape(40, 2, 32), 2, axis=-1)
    c, s = cos[:, None], sin[:, None]
    expected = np.concatenate([first * c - second * s, second * c + first * s], axis=-1)
    ops.rope_store(q, v.copy(), v, cos, sin, *empty_cache(2, 32, 40), 0)
    np.testing.assert_array_equal(q.reshape(40, 2, 32), expected)


def attention_loop(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: Callable[[int, int], bool], scale: float
) -> Any:
    """(H, T, D) queries over (H, P, D) keys and values, in float64; also the sum of |weight * value|."""
    out, size = np.zeros(q.shape), np.zeros(q.shape)
    for head in range(len(q)):
        for token in range(q.shape[1]):
            seen = [key for key in range(k.shape[1]) if visible(token, key)]
            scores = np.array([scale * (q[head, token].astype(np.float64) @ k[head, key]) for key in seen])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            for weight, key in zip(weights, seen, strict=True):
                out[head, token] += weight * v[head, key]
                size[head, token] += weight * abs(v[head, key])
    return out, size


CASES = [
    # query heads, key/value heads, head_dim, tokens, start, window
    (1, 1, 1, 1, 0, 0),
    (9, 3, 64, 1, 99, 0),
    (4, 1, 20, 1, 700, 0),  # keys split over tasks
    (4, 2, 17, 1, 600, 513),
    (2, 2, 8, 1, 200, 3),
    (6, 2, 33, 70, 0, 0),
    (6, 2, 16, 40, 90, 0),
    (3, 3, 8, 70, 30, 1),
    (3, 1, 8, 70, 63, 64),
    (40, 1, 4, 5, 60, 20),  # more heads in a group than rows in a tile
    (70, 2, 2, 1, 10, 0),
]


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "num_tokens", "start", "window"), CASES)
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_attention(
    ops: Ops, num_heads: int, num_kv_heads: int, head_dim: int, num_tokens: int, start: int, window: int, spread: float
) -> None:
    num_keys = start + num_tokens
    q = normal(num_tokens, num_heads * head_dim) * np.float32(spread)
    k, v = normal(num_kv_heads, num_keys, head_dim, seed=1), normal(num_kv_heads, num_keys, head_dim, seed=2)
    keys, values = empty_cache(num_kv_heads, head_dim, num_keys)
    for position in range(num_keys):
        keys[:, position // KEY_BLOCK, :, position % KEY_BLOCK] = k[:, position]
        values[:, position] = v[:, position]
    scale = head_dim**-0.5
    found = ops.attention(q, keys, values, start, window, scale)
    group = num_heads // num_kv_heads
    q_HTD = q.reshape(num_tokens, num_heads, head_dim).swapaxes(0, 1)
    k_HPD, v_HPD = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)

    def visible(token: int, key: int) -> bool:
        return key <= start + token and (not window or key > start + token - window)

    expected, size = attention_loop(q_HTD, k_HPD, v_HPD, visible, scale)
    # An error in a score is relative in its weight: head_dim products of a score, and the sum of num_keys weights.
    largest = np.abs(q_HTD).max() * np.abs(k).max() * head_dim * scale
    error = (2 * (head_dim + 4) * EPSILON * largest + (num_keys + 20) * EPSILON) * size + 1e-30
    assert_within(found.reshape(num_tokens, num_heads, head_dim).swapaxes(0, 1), expected, error)


@NATIVE
@pytest.mark.parametrize("isa", ISAS[1:])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "num_tokens", "start", "window"), CASES)
@pytest.mark.parametrize("num_later", [0, 70])
def test_attention_over_rows_has_the_bits_of_the_cache(
    isa: str, num_heads: int, num_kv_heads: int, head_dim: int, num_tokens: int, start: int, window: int, num_later: int
) -> None:
    """Keys that follow the last query are never seen; keys that a window hides may be missing."""
    ops, num_keys = load_ops(isa), start + num_tokens
    q = normal(num_tokens, num_heads * head_dim)
    k, v = (
        normal(num_kv_heads, num_keys + num_later, head_dim, seed=1),
        normal(num_kv_heads, num_keys + num_later, head_dim, seed=2),
    )
    keys, values = empty_cache(num_kv_heads, head_dim, num_keys)
    for position in range(num_keys):
        keys[:, position // KEY_BLOCK, :, position % KEY_BLOCK] = k[:, position]
        values[:, position] = v[:, position]
    expected = ops.attention(q, keys, values, start, window, 0.3)
    np.testing.assert_array_equal(ops.attention_rows(q, k, v, start, window, 0.3, 0), expected)
    if window:
        first = max(0, start + 1 - window)
        left = [np.ascontiguousarray(x[:, first:]) for x in (k, v)]
        shift = first % KEY_BLOCK if start - first + 1 >= window else 0
        np.testing.assert_array_equal(ops.attention_rows(q, *left, start - first, window, 0.3, shift), expected)


@pytest.mark.parametrize("window", [0, 40])
def test_attention_over_rows_in_numpy(window: int) -> None:
    q, k, v = normal(3, 12), normal(1, 103, 6, seed=1), normal(1, 103, 6, seed=2)
    keys, values = empty_cache(1, 6, 103)
    keys[:, 0], keys[:, 1, :, :39], values[:, :103] = k[:, :64].swapaxes(1, 2), k[:, 64:].swapaxes(1, 2), v
    expected = NumpyOps().attention(q, keys, values, 100, window, 0.3)
    assert_within(NumpyOps().attention_rows(q, k, v, 100, window, 0.3, 0), expected, 1e-6)
    if window:
        left = [np.ascontiguousarray(x[:, 61:]) for x in (k, v)]
        assert_within(NumpyOps().attention_rows(q, *left, 39, window, 0.3, 61), expected, 1e-6)


@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 1), (2, 5), (3, 32)])
def test_attention_segments(ops: Ops, num_heads: int, head_dim: int) -> None:
    offsets = np.array([0, 1, 1, 34, 100, 170])
    q, k, v = (normal(170, num_heads * head_dim, seed=seed) for seed in range(3))
    found = ops.attention_segments(q, k, v, offsets, num_heads, 0.3)
    for begin, end in itertools.pairwise(offsets):
        parts = (x[begin:end].reshape(end - begin, num_heads, head_dim).swapaxes(0, 1) for x in (q, k, v))
        expected, size = attention_loop(*parts, lambda token, key: True, 0.3)
        error = (2 * (head_dim + 4) * EPSILON * 16 * head_dim * 0.3 + 200 * EPSILON) * size
        assert_within(found[begin:end].reshape(-1, num_heads, head_dim).swapaxes(0, 1), expected, error)


def test_attention_of_a_nan_is_nan(ops: Ops) -> None:
    keys, values = empty_cache(1, 4, 3)
    keys[:, 0, :, :3], values[:, :3] = 1, 1
    q = np.ones((2, 4), np.float32)
    q[1, 2] = np.nan
    found = ops.attention(q, keys, values, 1, 0, 1.0)
    assert (found[0] == 1).all()
    assert np.isnan(found[1]).all()


# --- threads, dispatch, checks --------------------------------------------------------------------------------------


@NATIVE
@pytest.mark.parametrize("isa", ISAS[1:])
def test_the_number_of_threads_changes_no_bit(isa: str) -> None:
    ops, before = load_ops(isa), get_num_threads()
    keys, values = normal(3, 12, 64, KEY_BLOCK), normal(3, 12 * KEY_BLOCK, 64)
    q, one, x = normal(150, 576), normal(1, 576), normal(150, 1536)

    def run(num_threads: int) -> list[np.ndarray]:
        set_num_threads(num_threads)
        gate = x.copy()
        ops.gate(gate, x, 0)
        return [
            gate,
            ops.rms_norm(x, x[0], 1e-5),
            ops.attention(q, keys, values, 300, 0, 0.1),
            ops.attention(one, keys, values, 700, 0, 0.1),
            ops.attention_segments(q, q, q, np.array([0, 70, 150]), 9, 0.1),
        ]

    try:
        single = run(1)
        for num_threads in (2, 3, 8):
            for found, expected in zip(run(num_threads), single, strict=True):
                np.testing.assert_array_equal(found, expected)
    finally:
        set_num_threads(before)


def test_the_environment_caps_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_ops().isa == ISAS[-1]
    for isa in ISAS:
        monkeypatch.setenv("RAREFY_ISA", isa)
        assert load_ops().isa == isa
    monkeypatch.setenv("RAREFY_ISA", "mmx")
    with pytest.raises(UsageError, match="mmx"):
        load_ops()
    with pytest.raises(UsageError, match="sse9"):
        load_ops("sse9")


def test_numpy_runs_where_the_extension_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rarefy.kernels.ops.native", lambda: None)
    assert load_ops().isa == "numpy"
    with pytest.raises(UsageError, match="reference"):
        load_ops("reference")


@NATIVE
@pytest.mark.parametrize(
    "call",
    [
        lambda ops, x, keys, values: ops.rms_norm(x, x[0, :7], 1e-5),
        lambda ops, x, keys, values: ops.add_rms_norm(x, x[:1], x[0], 1e-5),
        lambda ops, x, keys, values: ops.add_layer_norm(x, x, x[0], x[0, :3], 1e-5),
        lambda ops, x, keys, values: ops.add_bias(x, x[0, :3]),
        lambda ops, x, keys, values: ops.activate(x, 4),
        lambda ops, x, keys, values: ops.activate(x, -1),
        lambda ops, x, keys, values: ops.gate(x, x[:, :4].copy(), 0),
        lambda ops, x, keys, values: ops.attention(x, keys, values, 126, 0, 1.0),
        lambda ops, x, keys, values: ops.attention(x, keys, values, -1, 0, 1.0),
        lambda ops, x, keys, values: ops.attention(x, keys, values, 2**62, 0, 1.0),
        lambda ops, x, keys, values: ops.attention(x, keys, values, 0, -1, 1.0),
        lambda ops, x, keys, values: ops.attention(x[:, :6].copy(), keys, values, 0, 0, 1.0),
        lambda ops, x, keys, values: ops.attention(x, keys, values[:, :64].copy(), 0, 0, 1.0),
        lambda ops, x, keys, values: ops.attention(x, keys[:, :, :, :32].copy(), values, 0, 0, 1.0),
        lambda ops, x, keys, values: ops.layer_norm(x, x[0], x[0, :3], 1e-5),
        lambda ops, x, keys, values: ops.attention_rows(x, values, values, 126, 0, 1.0, 0),
        lambda ops, x, keys, values: ops.attention_rows(x, values, values, -1, 0, 1.0, 0),
        lambda ops, x, keys, values: ops.attention_rows(x, values, values[:, :5].copy(), 0, 0, 1.0, 0),
        lambda ops, x, keys, values: ops.attention_rows(x[:, :6].copy(), values, values, 0, 0, 1.0, 0),
        lambda ops, x, keys, values: ops.attention_rows(x, values, values, 9, -1, 1.0, 0),
        lambda ops, x, keys, values: ops.attention_rows(x, values, values, 9, 0, 1.0, 1),
        lambda ops, x, keys, values: ops.attention_rows(x, values, values, 9, 11, 1.0, 1),
        lambda ops, x, keys, values: ops.attention_rows(x, values, values, 9, 3, 1.0, 64),
        lambda ops, x, keys, values: ops.attention_rows(x, values, values, 9, 3, 1.0, -1),
        lambda ops, x, keys, values: ops.rope_store(x, x, x, x[:, :2].copy(), x[:, :2].copy(), keys, values, 0),
        lambda ops, x, keys, values: ops.rope_store(
            x, x[:, :4].copy(), x[:, :4].copy(), x[:2, :2].copy(), x[:2, :2].copy(), keys, values, 0
        ),
        lambda ops, x, keys, values: ops.attention_segments(x, x, x, np.array([0, 4]), 2, 1.0),
        lambda ops, x, keys, values: ops.attention_segments(x, x, x, np.array([0, 9, 3]), 2, 1.0),
        lambda ops, x, keys, values: ops.attention_segments(x, x, x, np.array([], np.int64), 2, 1.0),
        lambda ops, x, keys, values: ops.attention_segments(x, x, x, np.array([0, 3]), 3, 1.0),
        lambda ops, x, keys, values: ops.attention_segments(x, x, x, np.array([0, 3]), 0, 1.0),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call: Callable[..., object]) -> None:
    keys, values = normal(1, 2, 4, KEY_BLOCK), normal(1, 2 * KEY_BLOCK, 4)
    with pytest.raises(ValueError, match=r"."):
        call(load_ops(ISAS[-1]), normal(3, 8), keys, values)


@NATIVE
@pytest.mark.parametrize("x", [normal(3, 16)[:, ::2], normal(3, 8).astype(np.float64), normal(8), [[1.0] * 8]])
def test_arrays_of_another_kind_are_refused(x: np.ndarray) -> None:
    with pytest.raises(TypeError):
        load_ops(ISAS[-1]).activate(x, 0)


@NATIVE
def test_a_read_only_array_is_not_written() -> None:
    x = normal(3, 8)
    x.setflags(write=False)
    with pytest.raises(TypeError):
        load_ops(ISAS[-1]).activate(x, 0)
