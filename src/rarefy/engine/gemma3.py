"""Gemma 3 (text): sliding and global layers with a rotary base each, norms of q and k, four norms per block.

T tokens, E embedding width, F features of the MLP, D head width, V vocabulary.

References: arXiv:2503.19786.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from rarefy.engine.cache import KVCache
from rarefy.engine.config import Config
from rarefy.engine.layer_types import layer_windows
from rarefy.engine.rope import RotaryTable, rotary_table
from rarefy.engine.weights import Linears, Weights
from rarefy.kernels.ops import Float32Array, Int64Array, Ops
from rarefy.kernels.program import Program, Recorder


@final
@dataclass(frozen=True)
class Gemma3Config:
    """What the arithmetic of a Gemma 3 text decoder depends on."""

    vocab_size: int
    width: int
    num_features: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    norm_eps: float
    activation: int
    attention_scale: float
    attention_bias: bool
    tied_head: bool
    windows: tuple[int, ...]


@final
@dataclass(frozen=True)
class _Block:
    before_attention: Float32Array
    qkv: Linears
    q_norm: Float32Array
    k_norm: Float32Array
    output: Linears
    after_attention: Float32Array
    before_mlp: Float32Array
    gate_up: Linears
    down: Linears
    after_mlp: Float32Array


def load_gemma3(config: Config, weights: Weights) -> Gemma3:
    """Load Gemma3ForCausalLM."""
    config.only("use_bidirectional_attention", False)
    config.only("attn_logit_softcapping")
    config.only("final_logit_softcapping")
    num_layers = config.integer("num_hidden_layers", 26)
    pattern = config.integer("sliding_window_pattern", 6)
    window = config.integer("sliding_window", 4096)
    num_heads, num_kv_heads = config.integer("num_attention_heads", 8), config.integer("num_key_value_heads", 4)
    if num_heads % num_kv_heads:
        raise config.unsupported("num_key_value_heads", num_kv_heads, f"divisors of num_attention_heads, {num_heads}")
    shape = Gemma3Config(
        vocab_size=config.integer("vocab_size", 262208),
        width=config.integer("hidden_size", 2304),
        num_features=config.integer("intermediate_size", 9216),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=config.integer("head_dim", 256),
        context_length=config.integer("max_position_embeddings", 131072),
        norm_eps=config.positive("rms_norm_eps", 1e-6),
        activation=config.activation("hidden_activation", "gelu_pytorch_tanh"),
        attention_scale=config.positive("query_pre_attn_scalar", 256) ** -0.5,
        attention_bias=config.boolean("attention_bias", False),
        tied_head=config.boolean("tie_word_embeddings", True),
        windows=layer_windows(config, window, [(i + 1) % pattern != 0 for i in range(num_layers)]),
    )
    return Gemma3(shape, *_rotary_tables(config, shape.head_dim), weights)


def _rotary_tables(config: Config, head_dim: int) -> tuple[RotaryTable, RotaryTable]:
    """Return the tables of sliding and of global layers; only the latter is scaled in old-style configurations."""
    nested = config.mapping("rope_parameters")
    if nested is not None and not all(nested.mapping(kind) for kind in ("full_attention", "sliding_attention")):
        raise config.unsupported("rope_parameters", nested.values, "one object each for full and sliding_attention")
    local_values = {**config.values, "rope_theta": config.values.get("rope_local_base_freq")}
    local_values.pop("rope_scaling", None)
    local = Config(local_values, config.where)
    return (
        rotary_table(local, head_dim, default_theta=10_000.0, layer_type="sliding_attention"),
        rotary_table(config, head_dim, default_theta=1_000_000.0, layer_type="full_attention"),
    )


@final
class Gemma3:
    """A Gemma 3 text decoder.

    Args:
        config: its shape.
        local_rope: rotary positions of sliding layers.
        global_rope: rotary positions of layers that see all tokens.
        weights: where the layers are read from.
    """

    def __init__(
        self, config: Gemma3Config, local_rope: RotaryTable, global_rope: RotaryTable, weights: Weights
    ) -> None:
        self.vocab_size = config.vocab_size
        self.context_length = config.context_length
        self._config = config
        self._local_rope, self._global_rope = local_rope, global_rope
        self._embedding = weights.embedding("model.embed_tokens", (config.vocab_size, config.width))
        self._embedding_scale = np.float32(config.width**0.5)
        blocks = [_load_block(config, f"model.layers.{i}.", weights) for i in range(config.num_layers)]
        self._program = _record(config, blocks, _norm(weights, "model.norm", config.width), weights.ops)
        if config.tied_head:
            self._head = weights.tied_head("model.embed_tokens", (config.vocab_size, config.width))
        else:
            self._head = weights.linears([("lm_head", config.vocab_size)], config.width, bias=False)

    def new_cache(self, capacity: int) -> KVCache:
        """Return an empty cache with room for `capacity` tokens; sliding layers keep all of them too."""
        config = self._config
        return KVCache(config.num_layers, config.num_kv_heads, config.head_dim, config.context_length, capacity)

    def forward(self, tokens_T: Int64Array, cache: KVCache) -> Float32Array:
        """Append tokens to the cache and return their hidden states (T, E) after the last norm."""
        start = cache.length
        end = start + len(tokens_T)
        cache.reserve(end)
        rotations = [self._global_rope.upto(end), self._local_rope.upto(end)]
        sum_TE = self._embedding.rows(tokens_T) * self._embedding_scale
        x_TE = self._program.run(sum_TE, rotations, cache.keys, cache.values, start)
        cache.length = end
        return x_TE

    def head(self, hidden_TE: Float32Array) -> Float32Array:
        """Return the logits (T, V) of hidden states that `forward` gave."""
        return self._head(hidden_TE)[0]


def _record(config: Gemma3Config, blocks: list[_Block], final_norm: Float32Array, ops: Ops) -> Program:
    program, eps, scale = Recorder(config.width), config.norm_eps, config.attention_scale
    total = program.start
    next_norms = [block.before_attention for block in blocks[1:]] + [final_norm]
    x = program.rms_norm(total, blocks[0].before_attention, eps)
    for layer, (block, next_norm, window) in enumerate(zip(blocks, next_norms, config.windows, strict=True)):
        q, k, v = block.qkv.record(program, x)
        q, k = program.rms_norm(q, block.q_norm, eps), program.rms_norm(k, block.k_norm, eps)
        program.rope_store(q, k, v, layer=layer, rotation=1 if window else 0)
        (attended,) = block.output.record(program, program.attention(q, layer=layer, window=window, scale=scale))
        attended = program.rms_norm(attended, block.after_attention, eps)
        x = program.add_rms_norm(total, attended, block.before_mlp, eps)
        gate, up = block.gate_up.record(program, x)
        program.gate(gate, up, config.activation)
        (down,) = block.down.record(program, gate)
        x = program.add_rms_norm(total, program.rms_norm(down, block.after_mlp, eps), next_norm, eps)
    return program.finish(ops, x)


def _norm(weights: Weights, name: str, size: int) -> Float32Array:
    # Gemma stores the weight of a norm as its distance from 1.
    return weights.vector(f"{name}.weight", size) + np.float32(1)


def _load_block(config: Gemma3Config, name: str, weights: Weights) -> _Block:
    width, q_size, kv_size = config.width, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention, mlp = f"{name}self_attn.", f"{name}mlp."
    qkv = [(f"{attention}q_proj", q_size), (f"{attention}k_proj", kv_size), (f"{attention}v_proj", kv_size)]
    gate_up = [(f"{mlp}gate_proj", config.num_features), (f"{mlp}up_proj", config.num_features)]
    return _Block(
        before_attention=_norm(weights, f"{name}input_layernorm", width),
        qkv=weights.linears(qkv, width, bias=config.attention_bias),
        q_norm=_norm(weights, f"{attention}q_norm", config.head_dim),
        k_norm=_norm(weights, f"{attention}k_norm", config.head_dim),
        output=weights.linears([(f"{attention}o_proj", width)], q_size, bias=config.attention_bias),
        after_attention=_norm(weights, f"{name}post_attention_layernorm", width),
        before_mlp=_norm(weights, f"{name}pre_feedforward_layernorm", width),
        gate_up=weights.linears(gate_up, width, bias=False),
        down=weights.linears([(f"{mlp}down_proj", width)], config.num_features, bias=False),
        after_mlp=_norm(weights, f"{name}post_feedforward_layernorm", width),
    )
