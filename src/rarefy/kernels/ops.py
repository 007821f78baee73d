"""The small operations between the matrix products: norms, rotary positions, attention, activations.

`load_ops` gives the compiled version (native/ops) for the best instruction set of this CPU, or `NumpyOps` where the
extension is missing or `RAREFY_ISA=numpy` asks for it. All take and return C-contiguous float32 arrays and agree up to
float32 rounding.

Shapes: T tokens (rows), E embedding width, F features of an MLP, H query heads, K key/value heads, D head width,
P positions, S sequences. Q = H * D and C = K * D are head axes flattened into one. The cache of keys is
(K, blocks, D, KEY_BLOCK): transposed inside blocks of KEY_BLOCK keys, so that one vector holds the scores of
neighbouring keys; the cache of values is (K, blocks * KEY_BLOCK, D).
"""

from __future__ import annotations

import itertools
from typing import Final, Protocol, TypeAlias, cast, final

import numpy as np
from numpy.typing import NDArray

from rarefy.core.errors import UsageError
from rarefy.kernels.dispatch import runnable_isas
from rarefy.kernels.extension import ISAS, detect_cpu, isa_cap, native

Float32Array: TypeAlias = NDArray[np.float32]
Int64Array: TypeAlias = NDArray[np.int64]

KEY_BLOCK: Final = 64
"""Keys per block of the key cache."""

ACTIVATIONS: Final[dict[str, int]] = {
    "silu": 0,
    "swish": 0,
    "gelu": 1,
    "gelu_new": 2,
    "gelu_pytorch_tanh": 2,
    "relu": 3,
}
"""Activation names of Hugging Face configurations -> the number that `activate` and `gate` take."""


class Ops(Protocol):
    """What an engine family needs between its matrix products. All arrays are C-contiguous and float32."""

    @property
    def isa(self) -> str:
        """The instruction set: one of `rarefy.kernels.extension.ISAS`."""
        ...

    def rms_norm(self, x_TE: Float32Array, weight_E: Float32Array, eps: float) -> Float32Array:
        """Return x / sqrt(mean(x^2) + eps) * weight, row by row."""
        ...

    def add_rms_norm(
        self, sum_TE: Float32Array, x_TE: Float32Array, weight_E: Float32Array, eps: float
    ) -> Float32Array:
        """Add x to `sum_TE` in place and return the `rms_norm` of the sum."""
        ...

    def add_layer_norm(
        self, x_TE: Float32Array, residual_TE: Float32Array, weight_E: Float32Array, bias_E: Float32Array, eps: float
    ) -> Float32Array:
        """Return the layer norm of x + residual: (s - mean(s)) / sqrt(var(s) + eps) * weight + bias."""
        ...

    def layer_norm(self, x_TE: Float32Array, weight_E: Float32Array, bias_E: Float32Array, eps: float) -> Float32Array:
        """Return the layer norm of x; the same bits as `add_layer_norm` where x is the rounded sum."""
        ...

    def add_bias(self, x_TF: Float32Array, bias_F: Float32Array) -> None:
        """Add the bias to every row in place."""
        ...

    def activate(self, x_TF: Float32Array, activation: int) -> None:
        """Apply one of `ACTIVATIONS` in place."""
        ...

    def gate(self, gate_TF: Float32Array, up_TF: Float32Array, activation: int) -> None:
        """Replace the gate by activation(gate) * up, in place."""
        ...

    def rope_store(
        self,
        q_TQ: Float32Array,
        k_TC: Float32Array,
        v_TC: Float32Array,
        cos_PD: Float32Array,
        sin_PD: Float32Array,
        k_cache: Float32Array,
        v_cache: Float32Array,
        start: int,
    ) -> None:
        """Rotate q (in place) and k at positions start..start+T-1, and write k and v into the cache there.

        Halves are rotated as Hugging Face models do: (a, b) -> (a cos - b sin, b cos + a sin) with a the first and b
        the second half of a head. `cos_PD` and `sin_PD` are (P, D / 2) and hold a row for every position used.
        """
        ...

    def attention(
        self, q_TQ: Float32Array, k_cache: Float32Array, v_cache: Float32Array, start: int, window: int, scale: float
    ) -> Float32Array:
        """Causal attention of T queries at positions start..start+T-1 over the cache; returns (T, Q).

        Query head h reads key/value head h // (H / K). The query at position p sees the keys at positions
        max(0, p - window + 1)..p, or all up to p when `window` is 0.
        """
        ...

    def attention_rows(
        self,
        q_TQ: Float32Array,
        k_KPD: Float32Array,
        v_KPD: Float32Array,
        start: int,
        window: int,
        scale: float,
        shift: int,
    ) -> Float32Array:
        """`attention` over keys and values without blocks, (K, P, D), with P >= start + T.

        The bits are those of `attention` over a cache in which key 0 stands at the absolute position `shift` modulo
        KEY_BLOCK and the queries `start` after it. A `shift` above 0 is for windows that have left the first keys
        behind: no query may see further back than key 0.
        """
        ...

    def attention_segments(
        self,
        q_TQ: Float32Array,
        k_TQ: Float32Array,
        v_TQ: Float32Array,
        offsets: Int64Array,
        num_heads: int,
        scale: float,
    ) -> Float32Array:
        """Attention in both directions inside each of S sequences that lie one after the other; returns (T, Q).

        Sequence s holds the rows offsets[s]..offsets[s + 1] - 1, so there are S + 1 offsets, from 0 to T.
        """
        ...


# log(erfc(x) / t) + x^2 as a polynomial in t = 1 / (1 + x / 2), for x >= 0. Fitted here (weighted least squares at
# Chebyshev nodes, Lawson's iteration) to scipy's erfcx; the relative error of erfc is below 4e-7 in float32.
# native/ops/kernels.inc holds the same numbers.
_ERFC: Final = np.array(
    [
        *(-1.26551226, 1.00002544, 0.3740727, 0.0968341385, -0.186020203),
        *(0.276890703, -1.13009738, 1.4819118, -0.81786551, 0.169760509),
    ],
    dtype=np.float32,
)


def _erfc(x: Float32Array) -> Float32Array:
    """Return the complementary error function, relative error below 1e-5 where it is a normal number."""
    z = np.abs(x)
    t = np.float32(1) / (np.float32(1) + np.float32(0.5) * z)
    exponent = np.full_like(t, _ERFC[-1])
    for coefficient in _ERFC[-2::-1]:
        exponent = exponent * t + coefficient
    tail = t * np.exp(exponent - z * z)
    return np.asarray(np.where(x < 0, np.float32(2) - tail, tail), dtype=np.float32)


def _activated(x: Float32Array, activation: int) -> Float32Array:
    y: NDArray[np.floating]
    # an overflow gives x / inf = 0, the right limit
    with np.errstate(over="ignore"):
        match activation:
            case 0:
                y = x / (np.float32(1) + np.exp(-x))
            case 1:
                y = np.float32(0.5) * x * _erfc(x * np.float32(-(0.5**0.5)))
            case 2:
                z = np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x * x * x)
                # 0.5 (1 + tanh(z)) = 1 / (1 + exp(-2 z)): no cancellation for large negative z
                y = x / (np.float32(1) + np.exp(np.float32(-2) * z))
            case 3:
                y = np.maximum(np.float32(0), x)
            case _:
                raise ValueError(f"activation: {activation}; allowed: {sorted(set(ACTIVATIONS.values()))}")
    return y.astype(np.float32, copy=False)


@final
class NumpyOps:
    """The numpy version of `Ops`: short, slow, and what the compiled versions are tested against."""

    isa: Final = "numpy"

    def rms_norm(self, x_TE: Float32Array, weight_E: Float32Array, eps: float) -> Float32Array:
        """See `Ops.rms_norm`."""
        mean_square: Float32Array = np.mean(x_TE * x_TE, axis=-1, keepdims=True)
        return np.asarray(x_TE / np.sqrt(mean_square + np.float32(eps)) * weight_E)

    def add_rms_norm(
        self, sum_TE: Float32Array, x_TE: Float32Array, weight_E: Float32Array, eps: float
    ) -> Float32Array:
        """See `Ops.add_rms_norm`."""
        sum_TE += x_TE
        return self.rms_norm(sum_TE, weight_E, eps)

    def add_layer_norm(
        self, x_TE: Float32Array, residual_TE: Float32Array, weight_E: Float32Array, bias_E: Float32Array, eps: float
    ) -> Float32Array:
        """See `Ops.add_layer_norm`."""
        return self.layer_norm(x_TE + residual_TE, weight_E, bias_E, eps)

    def layer_norm(self, x_TE: Float32Array, weight_E: Float32Array, bias_E: Float32Array, eps: float) -> Float32Array:
        """See `Ops.layer_norm`."""
        centred_TE: Float32Array = x_TE - np.mean(x_TE, axis=-1, keepdims=True)
        variance: Float32Array = np.mean(centred_TE * centred_TE, axis=-1, keepdims=True)
        return np.asarray(centred_TE / np.sqrt(variance + np.float32(eps)) * weight_E + bias_E)

    def add_bias(self, x_TF: Float32Array, bias_F: Float32Array) -> None:
        """See `Ops.add_bias`."""
        x_TF += bias_F

    def activate(self, x_TF: Float32Array, activation: int) -> None:
        """See `Ops.activate`."""
        x_TF[...] = _activated(x_TF, activation)

    def gate(self, gate_TF: Float32Array, up_TF: Float32Array, activation: int) -> None:
        """See `Ops.gate`."""
        gate_TF[...] = _activated(gate_TF, activation) * up_TF

    def rope_store(
        self,
        q_TQ: Float32Array,
        k_TC: Float32Array,
        v_TC: Float32Array,
        cos_PD: Float32Array,
        sin_PD: Float32Array,
        k_cache: Float32Array,
        v_cache: Float32Array,
        start: int,
    ) -> None:
        """See `Ops.rope_store`."""
        num_tokens, head_dim = len(q_TQ), v_cache.shape[2]
        positions = np.arange(start, start + num_tokens)
        cos, sin = cos_PD[positions, None, :], sin_PD[positions, None, :]
        q_THD = q_TQ.reshape(num_tokens, -1, head_dim)
        q_THD[...] = _rotated(q_THD, cos, sin)
        k_TKD = _rotated(k_TC.reshape(num_tokens, -1, head_dim), cos, sin)
        k_cache[:, positions // KEY_BLOCK, :, positions % KEY_BLOCK] = k_TKD
        v_cache[:, positions] = v_TC.reshape(num_tokens, -1, head_dim).swapaxes(0, 1)

    def attention(
        self, q_TQ: Float32Array, k_cache: Float32Array, v_cache: Float32Array, start: int, window: int, scale: float
    ) -> Float32Array:
        """See `Ops.attention`."""
        num_kv_heads, _, head_dim, _ = k_cache.shape
        num_tokens, num_keys = len(q_TQ), start + len(q_TQ)
        query_positions, key_positions = np.arange(start, num_keys)[:, None], np.arange(num_keys)[None, :]
        hidden = key_positions > query_positions
        if window:
            hidden |= key_positions <= query_positions - window
        k_KDP = k_cache.swapaxes(1, 2).reshape(num_kv_heads, head_dim, -1)[:, :, :num_keys]
        q_TKGD = q_TQ.reshape(num_tokens, num_kv_heads, -1, head_dim)
        out_TKGD = np.empty_like(q_TKGD)
        for head in range(num_kv_heads):
            scores_GTP = (q_TKGD[:, head].swapaxes(0, 1) @ k_KDP[head]) * np.float32(scale)
            scores_GTP[:, hidden] = -np.inf
            out_TKGD[:, head] = (_softmax(scores_GTP) @ v_cache[head, :num_keys]).swapaxes(0, 1)
        return out_TKGD.reshape(q_TQ.shape)

    def attention_rows(
        self,
        q_TQ: Float32Array,
        k_KPD: Float32Array,
        v_KPD: Float32Array,
        start: int,
        window: int,
        scale: float,
        shift: int,
    ) -> Float32Array:
        """See `Ops.attention_rows`."""
        num_kv_heads, num_keys, head_dim = k_KPD.shape
        num_blocks = -(-(shift + num_keys) // KEY_BLOCK)
        values = np.zeros((num_kv_heads, num_blocks * KEY_BLOCK, head_dim), np.float32)
        keys = values.copy()
        keys[:, shift : shift + num_keys], values[:, shift : shift + num_keys] = k_KPD, v_KPD
        k_cache = keys.reshape(num_kv_heads, num_blocks, KEY_BLOCK, head_dim).swapaxes(2, 3)
        return self.attention(q_TQ, np.ascontiguousarray(k_cache), values, shift + start, window, scale)

    def attention_segments(
        self,
        q_TQ: Float32Array,
        k_TQ: Float32Array,
        v_TQ: Float32Array,
        offsets: Int64Array,
        num_heads: int,
        scale: float,
    ) -> Float32Array:
        """See `Ops.attention_segments`."""
        out_TQ, head_dim = np.empty_like(q_TQ), q_TQ.shape[1] // num_heads
        for begin, end in itertools.pairwise(offsets):
            q_HTD, k_HTD, v_HTD = (
                x_TQ[begin:end].reshape(end - begin, num_heads, head_dim).swapaxes(0, 1) for x_TQ in (q_TQ, k_TQ, v_TQ)
            )
            weights_HTT = _softmax(q_HTD @ k_HTD.swapaxes(1, 2) * np.float32(scale))
            out_TQ[begin:end] = (weights_HTT @ v_HTD).swapaxes(0, 1).reshape(end - begin, q_TQ.shape[1])
        return out_TQ


def _rotated(x_THD: Float32Array, cos: Float32Array, sin: Float32Array) -> Float32Array:
    first, second = np.split(x_THD, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _softmax(scores: Float32Array) -> Float32Array:
    if scores.size == 0:
        return scores
    weights: Float32Array = np.exp(scores - np.max(scores, axis=-1, keepdims=True))
    return np.asarray(weights / np.sum(weights, axis=-1, keepdims=True))


def load_ops(isa: str | None = None) -> Ops:
    """Return the small operations for an instruction set.

    Args:
        isa: one of `ISAS`; default: the fastest this CPU has, capped by RAREFY_ISA.

    Raises:
        UsageError: the instruction set is unknown, or this machine or build does not have it.
    """
    if isa == "numpy":
        return NumpyOps()
    cap = isa_cap() if isa is None else isa
    if cap is not None and cap not in ISAS:
        raise UsageError("instruction set", repr(cap), allowed=", ".join(ISAS))
    runnable = runnable_isas(detect_cpu())
    best = next(name for name in reversed(runnable) if cap is None or ISAS.index(name) <= ISAS.index(cap))
    module = None if best == "numpy" else native()
    if isa is not None and (best != isa or module is None):
        raise UsageError("instruction set", f"{isa!r} is not available on this machine", allowed="numpy")
    return NumpyOps() if module is None else cast(Ops, module.Ops(best))
