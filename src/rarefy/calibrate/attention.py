"""Attention for calibration passes on a CPU: plain products over a few queries at a time.

Shape suffixes: B sequences, H heads, K key-value heads, L queries, S keys, D width of a head.

torch's fused kernel is slow in bfloat16 on CPUs, and plain products over all queries compute twice what a causal mask
leaves. A chunk of queries needs the keys up to its last one only, and its scores stay in the cache: on windows of 512
tokens (9 heads of 64) 1.4 times as fast as the fused kernel, 1.8 times with gradients, with the same result up to
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_QUERIES_PER_CHUNK = 256
# Arguments that change the result of the attention function; with any of them torch's own kernel is used.
_SPECIAL = ("softcap", "s_aux", "position_bias", "cache", "head_mask")


def chunked_attention(
    query_BHLD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, *, scaling: float, is_causal: bool
) -> Tensor:
    """softmax(scaling q k^T) v, each key-value head serving H / K heads.

    Args:
        query_BHLD: the queries; as many as keys when causal.
        key_BKSD: the keys.
        value_BKSD: the values.
        scaling: of the scores.
        is_causal: whether query l sees the keys up to l only.

    Returns:
        Shape (B, L, H, D), as transformers wants it.
    """
    arguments = query_BHLD, key_BKSD, value_BKSD, scaling, is_causal
    output: Tensor = _Chunked.apply(*arguments)  # type: ignore[no-untyped-call]
    return output


class _Chunked(torch.autograd.Function):
    """The same with its gradients, for which the softmax of every chunk is kept."""

    @staticmethod
    def forward(
        ctx: Any, query_BHLD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, scaling: float, causal: bool
    ) -> Tensor:
        """The attention."""
        num_sequences, num_heads, num_queries, _ = query_BHLD.shape
        num_keys = key_BKSD.shape[2]
        query, key, value = (
            _by_group(query_BHLD * scaling, key_BKSD.shape[1]),
            key_BKSD.flatten(0, 1),
            value_BKSD.flatten(0, 1),
        )
        output = query_BHLD.new_empty(num_sequences, num_queries, num_heads, value.shape[-1])
        chances = []
        for chunk, seen in _chunks(num_queries, num_keys, causal):
            scores = torch.bmm(query[:, :, chunk].flatten(1, 2), key[:, :seen].transpose(1, 2))
            if causal:
                length = chunk.stop - chunk.start
                future = torch.ones(length, length, dtype=torch.bool).triu_(1)
                scores.view(-1, length, seen)[:, :, chunk].masked_fill_(future, -torch.inf)
            chances.append(torch.softmax(scores, dim=-1))
            mixed = torch.bmm(chances[-1], value[:, :seen])
            output[:, chunk] = mixed.view(num_sequences, num_heads, -1, mixed.shape[-1]).transpose(1, 2)
            if not any(ctx.needs_input_grad):
                chances.clear()
        ctx.save_for_backward(query, key, value, *chances)
        ctx.scaling, ctx.causal, ctx.shapes = scaling, causal, (query_BHLD.shape, key_BKSD.shape, value_BKSD.shape)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_BLHD: Tensor) -> tuple[Tensor | None, ...]:
        """What comes back to queries, keys and values."""
        query, key, value, *chances = ctx.saved_tensors
        gradient = _by_group(gradient_BLHD.transpose(1, 2), ctx.shapes[1][1])
        to_query, to_key, to_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for (chunk, seen), chance in zip(_chunks(query.shape[2], key.shape[1], ctx.causal), chances, strict=True):
            own = gradient[:, :, chunk].flatten(1, 2)
            to_value[:, :seen].baddbmm_(chance.transpose(1, 2), own)
            to_chance = torch.bmm(own, value[:, :seen].transpose(1, 2))
            to_scores = torch.ops.aten._softmax_backward_data(to_chance, chance, -1, chance.dtype)
            to_key[:, :seen].baddbmm_(to_scores.transpose(1, 2), query[:, :, chunk].flatten(1, 2))
            to_query[:, :, chunk] = torch.bmm(to_scores, key[:, :seen]).view_as(query[:, :, chunk])
        found = (to_query.mul_(ctx.scaling), to_key, to_value)
        return *(each.view(shape) for each, shape in zip(found, ctx.shapes, strict=True)), None, None


def _by_group(tensor_BHLD: Tensor, num_groups: int) -> Tensor:
    """(B K, H / K, L, D): the heads that share keys, which become rows of one product."""
    num_sequences, num_heads, length, width = tensor_BHLD.shape
    return tensor_BHLD.reshape(num_sequences * num_groups, num_heads // num_groups, length, width)


def _chunks(num_queries: int, num_keys: int, causal: bool) -> Iterator[tuple[slice, int]]:
    """Runs of queries, and how many keys any of them sees."""
    for start in range(0, num_queries, _QUERIES_PER_CHUNK):
        stop = min(num_queries, start + _QUERIES_PER_CHUNK)
        yield slice(start, stop), stop if causal else num_keys


@contextmanager
def fast_attention() -> Iterator[None]:
    """Let transformers models that use the fused kernel use `chunked_attention` wherever no mask is given."""
    fused: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and query.shape[2] > 1
        special = any(kwargs.get(name) is not None for name in _SPECIAL)
        if attention_mask is not None or special or dropout or (causal and query.shape[2] != key.shape[2]):
            kwargs |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
            result: tuple[Tensor, None] = fused(module, query, key, value, attention_mask, **kwargs)
            return result
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return chunked_attention(query, key, value, scaling=scaling, is_causal=causal), None

    AttentionInterface.register("sdpa", attend)
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", fused)
