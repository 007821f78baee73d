"""BERT encoders, MiniLM among them: post-norm blocks, absolute positions, both directions.

Sequences lie one after the other without padding, so no arithmetic is spent on padding and no mask is needed.
T tokens of all sequences, E embedding width, F features of the MLP.

References: arXiv:1810.04805.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from rarefy.engine.config import Config
from rarefy.engine.weights import Linears, Weights
from rarefy.kernels.ops import Float32Array, Int64Array


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


def load_bert(config: Config, weights: Weights) -> Bert:
    """Load BertModel, or the encoder of a BertFor... model; the head of the latter is left aside."""
    config.only("position_embedding_type", "absolute")
    config.only("is_decoder", False)
    config.only("add_cross_attention", False)
    return Bert(config, weights)


@final
class Bert:
    """A BERT encoder.

    Args:
        config: its shape.
        weights: where the layers are read from.
    """

    def __init__(self, config: Config, weights: Weights) -> None:
        self.vocab_size = config.integer("vocab_size")
        self.width = width = config.integer("hidden_size")
        self.max_length = config.integer("max_position_embeddings")
        self._num_heads = config.integer("num_attention_heads")
        if width % self._num_heads:
            raise config.unsupported("num_attention_heads", self._num_heads, f"divisors of hidden_size, {width}")
        self._scale = (width // self._num_heads) ** -0.5
        self._eps = config.positive("layer_norm_eps", 1e-12)
        self._activation = config.activation("hidden_act", "gelu")
        self._ops = weights.ops
        self._words = weights.embedding("embeddings.word_embeddings", (self.vocab_size, width))
        self._positions = weights.embedding("embeddings.position_embeddings", (self.max_length, width))
        self.num_token_types = config.integer("type_vocab_size", 2)
        self._types = weights.embedding("embeddings.token_type_embeddings", (self.num_token_types, width))
        self._norm = _load_norm(weights, "embeddings.LayerNorm", width)
        num_features = config.integer("intermediate_size")
        self._blocks = [
            _load_block(f"encoder.layer.{i}.", width, num_features, weights)
            for i in range(config.integer("num_hidden_layers"))
        ]

    def forward(
        self, tokens_T: Int64Array, positions_T: Int64Array, types_T: Int64Array, offsets: Int64Array
    ) -> Float32Array:
        """Return the hidden states (T, E) of sequences that lie one after the other.

        Args:
            tokens_T: token ids.
            positions_T: position of each token in its sequence.
            types_T: token type of each token (0 first, 1 second text of a pair).
            offsets: where each sequence begins, and T.
        """
        ops, eps = self._ops, self._eps
        # token and type first, then the position: the order in which the reference rounds the sum
        x_TE = ops.add_layer_norm(
            self._words.rows(tokens_T) + self._types.rows(types_T),
            self._positions.rows(positions_T),
            self._norm.weight,
            self._norm.bias,
            eps,
        )
        for block in self._blocks:
            q_TE, k_TE, v_TE = block.qkv(x_TE)
            (attended_TE,) = block.output(
                ops.attention_segments(q_TE, k_TE, v_TE, offsets, self._num_heads, self._scale)
            )
            norm = block.attention_norm
            x_TE = ops.add_layer_norm(attended_TE, x_TE, norm.weight, norm.bias, eps)
            (up_TF,) = block.up(x_TE)
            ops.activate(up_TF, self._activation)
            (down_TE,) = block.down(up_TF)
            x_TE = ops.add_layer_norm(down_TE, x_TE, block.mlp_norm.weight, block.mlp_norm.bias, eps)
        return x_TE


def _load_norm(weights: Weights, name: str, width: int) -> _Norm:
    return _Norm(weights.vector(f"{name}.weight", width), weights.vector(f"{name}.bias", width))


def _load_block(name: str, width: int, num_features: int, weights: Weights) -> _Block:
    attention = f"{name}attention."
    qkv = [(f"{attention}self.{part}", width) for part in ("query", "key", "value")]
    return _Block(
        qkv=weights.linears(qkv, width, bias=True),
        output=weights.linears([(f"{attention}output.dense", width)], width, bias=True),
        attention_norm=_load_norm(weights, f"{attention}output.LayerNorm", width),
        up=weights.linears([(f"{name}intermediate.dense", num_features)], width, bias=True),
        down=weights.linears([(f"{name}output.dense", width)], num_features, bias=True),
        mlp_norm=_load_norm(weights, f"{name}output.LayerNorm", width),
    )
