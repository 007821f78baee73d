"""Qwen2 and Qwen2.5: Llama's arithmetic with biases on query, key and value, and sliding windows in the upper layers.

References: arXiv:2407.10671.
"""

from __future__ import annotations

from rarefy.engine.config import Config
from rarefy.engine.layer_types import layer_windows
from rarefy.engine.llama import Llama, read_llama_config
from rarefy.engine.rope import rotary_table
from rarefy.engine.weights import Weights


def load_qwen2(config: Config, weights: Weights) -> Llama:
    """Load Qwen2ForCausalLM."""
    num_layers = config.integer("num_hidden_layers")
    window = config.integer("sliding_window", 4096) if config.boolean("use_sliding_window", False) else 0
    if config.values.get("sliding_window", 4096) is None:
        window = 0
    first_sliding = config.integer("max_window_layers", 28, minimum=0)
    windows = layer_windows(config, window, [window > 0 and i >= first_sliding for i in range(num_layers)])
    shape = read_llama_config(
        config, num_kv_heads=32, qkv_bias=True, output_bias=False, mlp_bias=False, windows=windows
    )
    return Llama(shape, rotary_table(config, shape.head_dim, default_theta=10000.0), weights)
