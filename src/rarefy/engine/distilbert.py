"""DistilBERT encoders: BERT's arithmetic without token types, under other names.

Sequences lie one after the other without padding. T tokens of all sequences, E embedding width, F features of the MLP.

References: arXiv:1910.01108.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

from rarefy.engine.config import Config
from rarefy.engine.weights import Linears, Weights
from rarefy.kernels.ops import Float32Array, Int64Array

_EPS: Final = 1e-12
"""Constant in the reference implementation, whatever the configuration says."""


@final
@dataclass(frozen=True)
class _Norm:
    weight: Float32Array
    bias: Float32Array


@final
@dataclass(frozen=True)
class _Block:
    qkv: Linears
    output: Linears
    attention_norm: _Norm
    up: Linears
    down: Linears
    mlp_norm: _Norm


def load_distilbert(config: Config, weights: Weights) -> DistilBert:
    """Load DistilBertModel, or the encoder of a DistilBertFor... model; the head of the latter is left aside."""
    return DistilBert(config, weights)


@final
class DistilBert:
    """A DistilBERT encoder.

    Args:
        config: its shape.
        weights: where the layers are read from.
    """

    def __init__(self, config: Config, weights: Weights) -> None:
        self.vocab_size = config.integer("vocab_size", 30522)
        self.width = width = config.integer("dim", 768)
        self.max_length = config.integer("max_position_embeddings", 512)
        self.num_token_types = 1
        self._num_heads = config.integer("n_heads", 12)
        if width % self._num_heads:
            raise config.unsupported("n_heads", self._num_heads, f"divisors of dim, {width}")
        self._scale = (width // self._num_heads) ** -0.5
        self._activation = config.activation("activation", "gelu")
        self._ops = weights.ops
        self._words = weights.embedding("embeddings.word_embeddings", (self.vocab_size, width))
        self._positions = weights.embedding("embeddings.position_embeddings", (self.max_length, width))
        self._norm = _load_norm(weights, "embeddings.LayerNorm", width)
        num_features = config.integer("hidden_dim", 3072)
        self._blocks = [
            _load_block(f"transformer.layer.{i}.", width, num_features, weights)
            for i in range(config.integer("n_layers", 6))
        ]

    def forward(
        self,
        tokens_T: Int64Array,
        positions_T: Int64Array,
        types_T: Int64Array,  # noqa: ARG002 (the model has no token types; encoders share one signature)
        offsets: Int64Array,
    ) -> Float32Array:
        """Return the hidden states (T, E) of sequences that lie one after the other; see `Bert.forward`."""
        ops = self._ops
        x_TE = ops.add_layer_norm(
            self._words.rows(tokens_T), self._positions.rows(positions_T), self._norm.weight, self._norm.bias, _EPS
        )
        for block in self._blocks:
            q_TE, k_TE, v_TE = block.qkv(x_TE)
            (attended_TE,) = block.output(
                ops.attention_segments(q_TE, k_TE, v_TE, offsets, self._num_heads, self._scale)
            )
            norm = block.attention_norm
            x_TE = ops.add_layer_norm(attended_TE, x_TE, norm.weight, norm.bias, _EPS)
            (up_TF,) = block.up(x_TE)
            ops.activate(up_TF, self._activation)
            (down_TE,) = block.down(up_TF)
            x_TE = ops.add_layer_norm(down_TE, x_TE, block.mlp_norm.weight, block.mlp_norm.bias, _EPS)
        return x_TE


def _load_norm(weights: Weights, name: str, width: int) -> _Norm:
    return _Norm(weights.vector(f"{name}.weight", width), weights.vector(f"{name}.bias", width))


def _load_block(name: str, width: int, num_features: int, weights: Weights) -> _Block:
    qkv = [(f"{name}attention.{part}_lin", width) for part in ("q", "k", "v")]
    return _Block(
        qkv=weights.linears(qkv, width, bias=True),
        output=weights.linears([(f"{name}attention.out_lin", width)], width, bias=True),
        attention_norm=_load_norm(weights, f"{name}sa_layer_norm", width),
        up=weights.linears([(f"{name}ffn.lin1", num_features)], width, bias=True),
        down=weights.linears([(f"{name}ffn.lin2", width)], num_features, bias=True),
        mlp_norm=_load_norm(weights, f"{name}output_layer_norm", width),
    )
