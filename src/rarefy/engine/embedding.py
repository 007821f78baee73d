"""From texts to one vector each: batches of similar length, then pooling.

B texts of a batch, T tokens of all of them one after the other, L tokens of the longest, E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rarefy.core.errors import UsageError
from rarefy.engine.families import Encoder
from rarefy.kernels.ops import Float32Array, Int64Array

Pooling = Literal["mean", "cls"]
POOLINGS: Final[tuple[Pooling, ...]] = ("mean", "cls")


def pooled_batches(
    encoder: Encoder, texts: Sequence[tuple[Int64Array, Int64Array]], pooling: Pooling, batch_size: int
) -> Iterator[tuple[Int64Array, Float32Array]]:
    """Encode texts in batches of similar length.

    Args:
        encoder: the model.
        texts: token ids and token types of each text; none is empty.
        pooling: "mean" over all tokens, special tokens included, or "cls": the first token.
        batch_size: texts per batch.

    Yields:
        Indices (B,) of a batch's texts, and their vectors (B, E).
    """
    by_length = np.argsort([-len(tokens) for tokens, _ in texts], kind="stable").astype(np.int64)
    for begin in range(0, len(texts), batch_size):
        batch = by_length[begin : begin + batch_size]
        lengths = np.array([len(texts[i][0]) for i in batch], dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        hidden_TE = encoder.forward(
            np.concatenate([texts[i][0] for i in batch]),
            np.concatenate([np.arange(length) for length in lengths]),
            np.concatenate([texts[i][1] for i in batch]),
            offsets,
        )
        if pooling == "cls":
            yield batch, hidden_TE[offsets[:-1]]
        else:
            sums_BE: Float32Array = np.add.reduceat(hidden_TE, offsets[:-1], axis=0)
            yield batch, np.asarray(sums_BE / lengths[:, None], dtype=np.float32)


def normalized(vectors_BE: Float32Array) -> Float32Array:
    """Return the vectors scaled to Euclidean length 1; a vector of zeros stays so."""
    lengths = np.sqrt(np.sum(vectors_BE * vectors_BE, axis=1, keepdims=True))
    return np.asarray(vectors_BE / np.maximum(lengths, np.float32(1e-12)), dtype=np.float32)


def padded_hidden_states(
    encoder: Encoder, tokens_BL: Int64Array, mask_BL: ArrayLike | None, types_BL: ArrayLike | None
) -> Float32Array:
    """Encode a padded batch as the PyTorch models do; returns (B, L, E) with zeros where the mask is 0.

    Args:
        encoder: the model.
        tokens_BL: token ids.
        mask_BL: 1 for tokens, 0 for padding on any side; None if nothing is padding.
        types_BL: token types; None means 0.

    Raises:
        UsageError: shapes differ, or the batch is longer than the model's positions.
    """
    kept_BL = np.ones(tokens_BL.shape, np.bool_) if mask_BL is None else _same_shape("mask", mask_BL, tokens_BL) != 0
    types = np.zeros_like(tokens_BL) if types_BL is None else _same_shape("token types", types_BL, tokens_BL)
    check_token_types(encoder, types)
    if tokens_BL.shape[1] > encoder.max_length:
        raise UsageError(
            "context", f"{tokens_BL.shape[1]} tokens", allowed=f"at most {encoder.max_length}, max_position_embeddings"
        )
    # Positions count from the start of the row, padding included, as in the PyTorch models.
    _, positions_T = np.nonzero(kept_BL)
    offsets = np.concatenate([[0], np.cumsum(kept_BL.sum(axis=1))]).astype(np.int64)
    hidden_BLE = np.zeros((*tokens_BL.shape, encoder.width), np.float32)
    if len(positions_T):
        hidden_BLE[kept_BL] = encoder.forward(tokens_BL[kept_BL], positions_T, types[kept_BL].astype(np.int64), offsets)
    return hidden_BLE


def check_token_types(encoder: Encoder, types: NDArray[np.generic]) -> None:
    """Refuse token types that the model does not have.

    Raises:
        UsageError: one is out of range.
    """
    if np.any(types < 0) or np.any(types >= encoder.num_token_types):  # type: ignore[operator]  # integers
        raise UsageError("token types", f"up to {types.max()}", allowed=f"0 to {encoder.num_token_types - 1}")


def _same_shape(name: str, array: ArrayLike, tokens_BL: Int64Array) -> NDArray[np.generic]:
    found = np.asarray(array)
    if found.shape != tokens_BL.shape:
        raise UsageError(name, f"shape {found.shape}", allowed=f"{tokens_BL.shape}, the shape of the token ids")
    return found
