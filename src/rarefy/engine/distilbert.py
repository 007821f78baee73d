"""DistilBERT encoders: BERT without token types, under other names.

References: arXiv:1910.01108.
"""

from __future__ import annotations

from typing import Final

from rarefy.engine.bert import Bert, BertConfig, BlockNames
from rarefy.engine.config import Config
from rarefy.engine.weights import Weights

_EPS: Final = 1e-12
"""Constant in the reference implementation, whatever the configuration says."""

_NAMES: Final = BlockNames(
    block="transformer.layer.{}.",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    output="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    mlp_norm="output_layer_norm",
)


def load_distilbert(config: Config, weights: Weights) -> Bert:
    """Load DistilBertModel, or the encoder of a DistilBertFor... model; the head of the latter is left aside."""
    width, num_heads = config.integer("dim", 768), config.integer("n_heads", 12)
    if width % num_heads:
        raise config.unsupported("n_heads", num_heads, f"divisors of dim, {width}")
    shape = BertConfig(
        vocab_size=config.integer("vocab_size", 30522),
        width=width,
        num_features=config.integer("hidden_dim", 3072),
        num_layers=config.integer("n_layers", 6),
        num_heads=num_heads,
        max_length=config.integer("max_position_embeddings", 512),
        num_token_types=None,
        norm_eps=_EPS,
        activation=config.activation("activation", "gelu"),
    )
    return Bert(shape, _NAMES, weights)
