"""Attention of transformers models through the engine's operation, where the mask is proven to be the one it implies.

Registered with transformers as the implementation "rarefy". The mask is made as for sdpa, so None means what it means
there: all keys for one query, a triangle for a causal module, everything for another. A mask that is there is compared
element by element. Whatever is not covered goes to sdpa, as it would have without rarefy.

B sequences of a batch, H query heads, K key/value heads, T queries, P keys, D head width.
"""

import weakref
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rarefy.kernels.ops import KEY_BLOCK
from rarefy.nn.runtime_ops import engine_ops, runs_native

NAME: Final = "rarefy"


def attention_forward(
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
    """Attention with the signature that transformers' models call.

    Args:
        module: the attention layer.
        query: (B, H, T, D).
        key: (B, K, P, D); query head h reads key head h // (H / K).
        value: (B, K, P, D).
        attention_mask: boolean (B or 1, 1, T, P), any other mask that sdpa takes, or None.
        dropout: probability.
        scaling: of the scores; default D^-0.5.
        is_causal: default: `module.is_causal`.
        kwargs: what models pass on; `position_ids` and `sliding_window` are read.

    Returns:
        (B, T, H, D), and None for the weights.
    """
    output = None
    if dropout == 0 and _is_covered(module, query, key, value, kwargs):
        causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        call = _Call(module, query, key, value, attention_mask, scale, kwargs)
        output = call.without_mask(causal) if attention_mask is None else call.with_mask(attention_mask)
    if output is not None:
        return output, None
    answer: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return answer


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _is_covered(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> bool:
    if any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache")):
        return False
    if module.training or kwargs.get("output_attentions") or not all(runs_native(x) for x in (query, key, value)):
        return False
    if query.ndim != 4 or key.shape != value.shape or not query.numel() or not key.numel():
        return False
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        return False
    groups = getattr(module, "num_key_value_groups", 1)
    return bool(query.shape[1] == groups * key.shape[1])


@final
@dataclass(frozen=True)
class _Span:
    """What the causal operation computes of one sequence: queries [begin, end) over keys from `first_key` on.

    The first of these queries stands `start` keys after `first_key`, and none sees more than `window` keys back (0:
    all). Other queries are padding.
    """

    begin: int
    end: int
    first_key: int
    start: int
    window: int


@final
@dataclass(frozen=True)
class _Call:
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    kwargs: dict[str, Any]

    def without_mask(self, causal: bool) -> Tensor | None:
        """Attention as sdpa understands a missing mask; None where the operations do not cover it."""
        num_queries, num_keys = self.query.shape[2], self.key.shape[2]
        if num_queries == 1:
            return self._causal([_Span(0, 1, 0, num_keys - 1, 0)] * len(self.query))
        if causal:
            # More keys than queries: an empty static cache, of which the triangle hides the rest.
            if num_keys < num_queries:
                return None
            return self._causal([_Span(0, num_queries, 0, 0, 0)] * len(self.query))
        if num_keys != num_queries:
            return None
        return self._both_ways(torch.ones(len(self.query), num_keys, dtype=torch.bool))

    def with_mask(self, mask: Tensor) -> Tensor | None:
        """Attention under a mask, if it is causal or hides nothing but padding; None otherwise."""
        num_queries, num_keys = self.query.shape[2], self.key.shape[2]
        batch = len(self.query)
        if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:] != (1, num_queries, num_keys):
            return None
        if mask.shape[0] not in (1, batch) or mask.device.type != "cpu":
            return None
        window = self.kwargs.get("sliding_window") or 0
        found = _described(mask, window)
        if isinstance(found, Tensor):
            return self._both_ways(found.expand(batch, num_keys))
        if found is None:
            return None
        return self._causal(found * batch if len(found) == 1 else found)

    def _causal(self, spans: list[_Span]) -> Tensor:
        batch, num_heads, num_queries, head_dim = self.query.shape
        output = self.query.new_empty(batch, num_queries, num_heads, head_dim)
        for row, span in enumerate(spans):
            queries = self.query[row, :, span.begin : span.end].transpose(0, 1)
            keys, values = (x[row, :, span.first_key :].contiguous().numpy() for x in (self.key, self.value))
            found = engine_ops().attention_rows(
                queries.reshape(span.end - span.begin, -1).contiguous().numpy(),
                keys,
                values,
                span.start,
                span.window,
                self.scale,
                self._shift(row, span),
            )
            output[row, span.begin : span.end] = torch.from_numpy(found).view(-1, num_heads, head_dim)
            for begin, end in ((0, span.begin), (span.end, num_queries)):
                if begin < end:
                    output[row, begin:end] = self._by_sdpa(row, slice(begin, end))
        return output

    def _shift(self, row: int, span: _Span) -> int:
        """Where in its block the first key stands in the engine's cache, which keeps the keys behind a window too.

        This decides no more than the order of sums: any number gives the right result, the right one the same bits.
        """
        if not span.window or span.start + 1 != span.window:
            return 0
        positions = self.kwargs.get("position_ids")
        if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[1] != self.query.shape[2]:
            return 0
        position = int(positions[row if len(positions) > 1 else 0, span.begin])
        return (position - span.start) % KEY_BLOCK

    def _both_ways(self, kept_BP: Tensor) -> Tensor | None:
        """Every query sees the kept keys of its sequence; those of padding are computed by sdpa."""
        batch, num_heads, num_queries, head_dim = self.query.shape
        lengths = kept_BP.sum(dim=1)
        if self.key.shape[1] != num_heads or not bool((lengths > 0).all()):
            return None
        padded = not bool(kept_BP.all())

        def rows(x: Tensor) -> Any:
            flat = x.transpose(1, 2).reshape(batch * num_queries, -1)
            return (flat[kept_BP.reshape(-1)] if padded else flat).contiguous().numpy()

        offsets = np.concatenate([[0], np.cumsum(lengths.numpy())]).astype(np.int64)
        attended = engine_ops().attention_segments(
            rows(self.query), rows(self.key), rows(self.value), offsets, num_heads, self.scale
        )
        found = torch.from_numpy(attended).view(-1, num_heads, head_dim)
        if not padded:
            return found.view(batch, num_queries, num_heads, head_dim)
        output = self.query.new_empty(batch, num_queries, num_heads, head_dim)
        output[kept_BP] = found
        for row in torch.nonzero(lengths < num_queries).flatten().tolist():
            padding = ~kept_BP[row]
            output[row, padding] = self._by_sdpa(row, padding)
        return output

    def _by_sdpa(self, row: int, queries: slice | Tensor) -> Tensor:
        assert self.mask is not None
        mask = self.mask[row if len(self.mask) > 1 else 0][:, queries]
        one = slice(row, row + 1)
        output, _ = sdpa_attention_forward(
            self.module, self.query[one][:, :, queries], self.key[one], self.value[one], mask[None], scaling=self.scale
        )
        part: Tensor = output[0]
        return part


_Description = Tensor | list[_Span] | None
# All layers of a forward pass get the same mask: what the last one was found to be.
_last: tuple[weakref.ref[Tensor], int, int, _Description] | None = None


def _described(mask: Tensor, window: int) -> _Description:
    """What a boolean mask (B or 1, 1, T, P) hides.

    Returns:
        The kept keys (B or 1, P) if all queries of a sequence see the same keys of as many as there are queries; a
        span for each sequence if every mask is causal inside it; None otherwise.
    """
    global _last  # noqa: PLW0603 (a memo of one)
    # In-place changes count; tensors of inference mode do not count theirs and are looked at again.
    version = -1 if mask.is_inference() else mask._version
    last = _last
    if version >= 0 and last is not None and last[0]() is mask and last[1:3] == (version, window):
        return last[3]
    found: _Description
    num_queries, num_keys = mask.shape[2:]
    if 1 < num_queries == num_keys and bool((mask == mask[:, :, :1]).all()):
        found = mask[:, 0, 0].clone()  # not a view, which would keep the mask
    else:
        spans = [_span(one[0], window) for one in mask]
        found = [span for span in spans if span is not None]
        if len(found) < len(spans):
            found = None
    _last = (weakref.ref(mask), version, window, found)
    return found


def _span(mask_TP: Tensor, window: int) -> _Span | None:
    """Return the span whose mask `mask_TP` is, whatever it shows to queries outside of it; None if there is none."""
    num_queries, num_keys = mask_TP.shape
    seeing = mask_TP.any(dim=1)
    if not bool(seeing.any()):
        return None
    begin = int(seeing.to(torch.uint8).argmax())
    visible = torch.nonzero(mask_TP[begin]).flatten()
    first_key, own_key = int(visible[0]), int(visible[-1])
    # Key of query 0; the queries from `begin` on that see their own key, until the first that does not.
    offset = own_key - begin
    if offset + num_queries > num_keys:
        return None
    own_T = mask_TP[begin:].diagonal(own_key)
    count = len(own_T) if bool(own_T.all()) else int(own_T.to(torch.uint8).argmin())
    queries = torch.arange(own_key, own_key + count)[:, None]
    keys = torch.arange(num_keys)[None, :]
    causal = (keys >= first_key) & (keys <= queries)
    for candidate in (window, 0) if window else (0,):
        implied = causal & (keys > queries - candidate) if candidate else causal
        if torch.equal(mask_TP[begin : begin + count], implied):
            return _Span(begin, begin + count, first_key, own_key - first_key, candidate)
    return None
