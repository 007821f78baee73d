"""The keys and values of the tokens seen so far, for every layer of a decoder.

K key/value heads, D head width; see `rarefy.kernels.ops` for why the keys are stored transposed in blocks.
"""

from __future__ import annotations

from typing import final

import numpy as np

from rarefy.core.errors import UsageError
from rarefy.kernels.ops import KEY_BLOCK, Float32Array


@final
class KVCache:
    """Preallocated key and value arrays that grow by doubling, up to the model's context.

    Args:
        num_layers: layers of the model.
        num_kv_heads: K.
        head_dim: D.
        limit: the model's context length in tokens.
        capacity: tokens to make room for now.
    """

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, limit: int, capacity: int = KEY_BLOCK
    ) -> None:
        self.length = 0
        """Tokens whose keys and values are valid."""
        self.limit = limit
        self._heads = (num_kv_heads, head_dim)
        self._num_blocks = 0
        self.keys: list[Float32Array] = [np.empty((num_kv_heads, 0, head_dim, KEY_BLOCK), np.float32)] * num_layers
        self.values: list[Float32Array] = [np.empty((num_kv_heads, 0, head_dim), np.float32)] * num_layers
        self._grow(min(capacity, limit))

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens in all.

        Raises:
            UsageError: more tokens than the model's context holds.
        """
        if length > self.limit:
            raise UsageError(
                "context", f"{length} tokens", allowed=f"at most {self.limit}, the model's max_position_embeddings"
            )
        if length > self._num_blocks * KEY_BLOCK:
            self._grow(min(max(length, 2 * self._num_blocks * KEY_BLOCK), self.limit))

    @property
    def nbytes(self) -> int:
        """Bytes reserved for keys and values."""
        return sum(array.nbytes for array in (*self.keys, *self.values))

    def _grow(self, capacity: int) -> None:
        num_kv_heads, head_dim = self._heads
        old_blocks, self._num_blocks = self._num_blocks, -(-capacity // KEY_BLOCK)
        for layer, (old_keys, old_values) in enumerate(zip(self.keys, self.values, strict=True)):
            keys = np.empty((num_kv_heads, self._num_blocks, head_dim, KEY_BLOCK), np.float32)
            values = np.empty((num_kv_heads, self._num_blocks * KEY_BLOCK, head_dim), np.float32)
            keys[:, :old_blocks] = old_keys
            values[:, : old_blocks * KEY_BLOCK] = old_values
            self.keys[layer], self.values[layer] = keys, values
