"""Llama and the models built like it: SmolLM2, Mistral, and Qwen2 (qwen2.py reads its configuration).

A block is x += attention(norm(x)); x += mlp(norm(x)), with RMS norms, rotary positions, grouped key/value heads and a
gated MLP. T tokens, E embedding width, F features of the MLP, V vocabulary.

References: arXiv:2302.13971 (Llama), arXiv:2310.06825 (Mistral).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from rarefy.engine.cache import KVCache
from rarefy.engine.config import Config
from rarefy.engine.rope import RotaryTable, rotary_table
from rarefy.engine.weights import Linears, Weights
from rarefy.kernels.ops import Float32Array, Int64Array, Ops
from rarefy.kernels.program import Program, Recorder


@final
@dataclass(frozen=True)
class LlamaConfig:
    """What the arithmetic of a Llama-like decoder depends on."""

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
    tied_head: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    windows: tuple[int, ...]
    """Per layer: how many of the last tokens a token sees; 0 means all."""


@final
@dataclass(frozen=True)
class _Block:
    attention_norm: Float32Array
    qkv: Linears
    output: Linears
    mlp_norm: Float32Array
    gate_up: Linears
    down: Linears


def load_llama(config: Config, weights: Weights) -> Llama:
    """Load LlamaForCausalLM."""
    config.only("pretraining_tp", 1)
    attention_bias = config.boolean("attention_bias", False)
    shape = read_llama_config(
        config,
        num_kv_heads=config.integer("num_attention_heads"),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=config.boolean("mlp_bias", False),
        windows=None,
    )
    return Llama(shape, rotary_table(config, shape.head_dim, default_theta=10000.0), weights)


def load_mistral(config: Config, weights: Weights) -> Llama:
    """Load MistralForCausalLM: Llama without biases, every layer with the same sliding window if there is one."""
    window = 0 if config.values.get("sliding_window") is None else config.integer("sliding_window")
    windows = (window,) * config.integer("num_hidden_layers")
    shape = read_llama_config(
        config, num_kv_heads=8, qkv_bias=False, output_bias=False, mlp_bias=False, windows=windows
    )
    return Llama(shape, rotary_table(config, shape.head_dim, default_theta=10000.0), weights)


def read_llama_config(
    config: Config,
    *,
    num_kv_heads: int,
    qkv_bias: bool,
    output_bias: bool,
    mlp_bias: bool,
    windows: tuple[int, ...] | None,
) -> LlamaConfig:
    """Read the fields that Llama-like configurations share; `num_kv_heads` is the default of the family."""
    width, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", num_kv_heads)
    if num_heads % num_kv_heads:
        raise config.unsupported("num_key_value_heads", num_kv_heads, f"divisors of num_attention_heads, {num_heads}")
    num_layers = config.integer("num_hidden_layers")
    return LlamaConfig(
        vocab_size=config.integer("vocab_size"),
        width=width,
        num_features=config.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=config.integer("head_dim", width // num_heads),
        context_length=config.integer("max_position_embeddings"),
        norm_eps=config.positive("rms_norm_eps", 1e-6),
        activation=config.activation("hidden_act", "silu"),
        tied_head=config.boolean("tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        windows=(0,) * num_layers if windows is None else windows,
    )


@final
class Llama:
    """A Llama-like decoder.

    Args:
        config: its shape.
        rope: rotary positions.
        weights: where the layers are read from.
    """

    def __init__(self, config: LlamaConfig, rope: RotaryTable, weights: Weights) -> None:
        self.vocab_size = config.vocab_size
        self.context_length = config.context_length
        self._config = config
        self._rope = rope
        self._embedding = weights.embedding("model.embed_tokens", (config.vocab_size, config.width))
        blocks = [_load_block(config, f"model.layers.{i}.", weights) for i in range(config.num_layers)]
        final_norm = weights.vector("model.norm.weight", config.width)
        self._program = _record(config, blocks, final_norm, weights.ops)
        if config.tied_head:
            self._head = weights.tied_head("model.embed_tokens", (config.vocab_size, config.width))
        else:
            self._head = weights.linears([("lm_head", config.vocab_size)], config.width, bias=False)

    def new_cache(self, capacity: int) -> KVCache:
        """Return an empty cache with room for `capacity` tokens."""
        config = self._config
        return KVCache(config.num_layers, config.num_kv_heads, config.head_dim, config.context_length, capacity)

    def forward(self, tokens_T: Int64Array, cache: KVCache) -> Float32Array:
        """Append tokens to the cache and return their hidden states (T, E) after the last norm."""
        start = cache.length
        end = start + len(tokens_T)
        cache.reserve(end)
        sum_TE = self._embedding.rows(tokens_T)
        x_TE = self._program.run(sum_TE, [self._rope.upto(end)], cache.keys, cache.values, start)
        cache.length = end
        return x_TE

    def head(self, hidden_TE: Float32Array) -> Float32Array:
        """Return the logits (T, V) of hidden states that `forward` gave."""
        return self._head(hidden_TE)[0]


def _record(config: LlamaConfig, blocks: list[_Block], final_norm: Float32Array, ops: Ops) -> Program:
    program, eps, scale = Recorder(config.width), config.norm_eps, config.head_dim**-0.5
    total = program.start
    next_norms = [block.attention_norm for block in blocks[1:]] + [final_norm]
    x = program.rms_norm(total, blocks[0].attention_norm, eps)
    for layer, (block, next_norm, window) in enumerate(zip(blocks, next_norms, config.windows, strict=True)):
        q, k, v = block.qkv.record(program, x)
        program.rope_store(q, k, v, layer=layer)
        (attended,) = block.output.record(program, program.attention(q, layer=layer, window=window, scale=scale))
        x = program.add_rms_norm(total, attended, block.mlp_norm, eps)
        gate, up = block.gate_up.record(program, x)
        program.gate(gate, up, config.activation)
        (down,) = block.down.record(program, gate)
        x = program.add_rms_norm(total, down, next_norm, eps)
    return program.finish(ops, x)


def _load_block(config: LlamaConfig, name: str, weights: Weights) -> _Block:
    width, q_size, kv_size = config.width, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention, mlp = f"{name}self_attn.", f"{name}mlp."
    qkv = [(f"{attention}q_proj", q_size), (f"{attention}k_proj", kv_size), (f"{attention}v_proj", kv_size)]
    gate_up = [(f"{mlp}gate_proj", config.num_features), (f"{mlp}up_proj", config.num_features)]
    return _Block(
        attention_norm=weights.vector(f"{name}input_layernorm.weight", width),
        qkv=weights.linears(qkv, width, bias=config.qkv_bias),
        output=weights.linears([(f"{attention}o_proj", width)], q_size, bias=config.output_bias),
        mlp_norm=weights.vector(f"{name}post_attention_layernorm.weight", width),
        gate_up=weights.linears(gate_up, width, bias=config.mlp_bias),
        down=weights.linears([(f"{mlp}down_proj", width)], config.num_features, bias=config.mlp_bias),
    )
