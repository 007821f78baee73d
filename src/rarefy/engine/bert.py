"""BERT encoders, MiniLM among them: post-norm blocks, absolute positions, both directions.

DistilBERT is the same arithmetic under other names (distilbert.py reads its configuration). Sequences lie one after the
other without padding, so no arithmetic is spent on padding and no mask is needed.
T tokens of all sequences, E embedding width, F features of the MLP.

References: arXiv:1810.04805.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

from rarefy.engine.config import Config
from rarefy.engine.weights import Linears, Weights
from rarefy.kernels.ops import Float32Array, Int64Array


@final
@dataclass(frozen=True)
class BertConfig:
    """What the arithmetic of an encoder depends on."""

    vocab_size: int
    width: int
    num_features: int
    num_layers: int
    num_heads: int
    max_length: int
    num_token_types: int | None
    """None: the model has no embedding of token types."""
    norm_eps: float
    activation: int


@final
@dataclass(frozen=True)
class BlockNames:
    """What the parts of a block are called; `block` holds the block's number."""

    block: str
    query: str
    key: str
    value: str
    output: str
    attention_norm: str
    up: str
    down: str
    mlp_norm: str


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


_NAMES: Final = BlockNames(
    block="encoder.layer.{}.",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    mlp_norm="output.LayerNorm",
)


def load_bert(config: Config, weights: Weights) -> Bert:
    """Load BertModel, or the encoder of a BertFor... model; the head of the latter is left aside."""
    config.only("position_embedding_type", "absolute")
    config.only("is_decoder", False)
    config.only("add_cross_attention", False)
    width, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if width % num_heads:
        raise config.unsupported("num_attention_heads", num_heads, f"divisors of hidden_size, {width}")
    shape = BertConfig(
        vocab_size=config.integer("vocab_size"),
        width=width,
        num_features=config.integer("intermediate_size"),
        num_layers=config.integer("num_hidden_layers"),
        num_heads=num_heads,
        max_length=config.integer("max_position_embeddings"),
        num_token_types=config.integer("type_vocab_size", 2),
        norm_eps=config.positive("layer_norm_eps", 1e-12),
        activation=config.activation("hidden_act", "gelu"),
    )
    return Bert(shape, _NAMES, weights)


@final
class Bert:
    """A BERT encoder.

    Args:
        config: its shape.
        names: what its layers are called.
        weights: where the layers are read from.
    """

    def __init__(self, config: BertConfig, names: BlockNames, weights: Weights) -> None:
        self.vocab_size, self.width, self.max_length = config.vocab_size, config.width, config.max_length
        self.num_token_types = config.num_token_types or 1
        self._config = config
        self._ops = weights.ops
        self._words = weights.embedding("embeddings.word_embeddings", (config.vocab_size, config.width))
        self._positions = weights.embedding("embeddings.position_embeddings", (config.max_length, config.width))
        self._types = None
        if config.num_token_types is not None:
            self._types = weights.embedding("embeddings.token_type_embeddings", (config.num_token_types, config.width))
        self._norm = _load_norm(weights, "embeddings.LayerNorm", config.width)
        self._blocks = [_load_block(config, names, i, weights) for i in range(config.num_layers)]

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
        config, ops, eps = self._config, self._ops, self._config.norm_eps
        scale = (config.width // config.num_heads) ** -0.5
        # token and type first, then the position: the order in which the reference rounds the sum
        words_TE = self._words.rows(tokens_T)
        if self._types is not None:
            words_TE = words_TE + self._types.rows(types_T)
        positions_TE = self._positions.rows(positions_T)
        x_TE = ops.add_layer_norm(words_TE, positions_TE, self._norm.weight, self._norm.bias, eps)
        for block in self._blocks:
            q_TE, k_TE, v_TE = block.qkv(x_TE)
            (attended_TE,) = block.output(ops.attention_segments(q_TE, k_TE, v_TE, offsets, config.num_heads, scale))
            norm = block.attention_norm
            x_TE = ops.add_layer_norm(attended_TE, x_TE, norm.weight, norm.bias, eps)
            (up_TF,) = block.up(x_TE)
            ops.activate(up_TF, config.activation)
            (down_TE,) = block.down(up_TF)
            x_TE = ops.add_layer_norm(down_TE, x_TE, block.mlp_norm.weight, block.mlp_norm.bias, eps)
        return x_TE


def _load_norm(weights: Weights, name: str, width: int) -> _Norm:
    return _Norm(weights.vector(f"{name}.weight", width), weights.vector(f"{name}.bias", width))


def _load_block(config: BertConfig, names: BlockNames, index: int, weights: Weights) -> _Block:
    width, block = config.width, names.block.format(index)
    qkv = [(f"{block}{part}", width) for part in (names.query, names.key, names.value)]
    return _Block(
        qkv=weights.linears(qkv, width, bias=True),
        output=weights.linears([(f"{block}{names.output}", width)], width, bias=True),
        attention_norm=_load_norm(weights, f"{block}{names.attention_norm}", width),
        up=weights.linears([(f"{block}{names.up}", config.num_features)], width, bias=True),
        down=weights.linears([(f"{block}{names.down}", width)], config.num_features, bias=True),
        mlp_norm=_load_norm(weights, f"{block}{names.mlp_norm}", width),
    )
