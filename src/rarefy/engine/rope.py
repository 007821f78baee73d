"""Rotary position tables: the cosine and sine of position * frequency that rotate query and key heads.

P positions, D head width; a table has D / 2 columns, one for each pair of coordinates that turns together.
"""

from __future__ import annotations

import math
from typing import Final, final

import numpy as np

from rarefy.engine.config import Config
from rarefy.kernels.ops import Float32Array

ROPE_TYPES: Final = ("default", "linear", "llama3")


@final
class RotaryTable:
    """Cosines and sines for positions 0..n-1, computed in blocks as sequences get longer.

    Args:
        frequencies: (D / 2,) float32, radians per position.
    """

    _BLOCK: Final = 1024

    def __init__(self, frequencies: Float32Array) -> None:
        self.frequencies: Final = frequencies
        self._cos = np.empty((0, len(frequencies)), np.float32)
        self._sin = self._cos

    def upto(self, num_positions: int) -> tuple[Float32Array, Float32Array]:
        """Return (cos, sin), each (P, D / 2) with P >= num_positions."""
        if num_positions > len(self._cos):
            size = -(-max(num_positions, 2 * len(self._cos)) // self._BLOCK) * self._BLOCK
            # The product is rounded to float32 as the reference implementations round it: at position 8000 that
            # rounding moves the angle by 2e-4, so a more exact product would give other logits than the trained model.
            angles = np.arange(size, dtype=np.float32)[:, None] * self.frequencies[None, :]
            self._cos, self._sin = np.cos(angles), np.sin(angles)
        return self._cos, self._sin


def rotary_table(config: Config, head_dim: int, *, default_theta: float, layer_type: str | None = None) -> RotaryTable:
    """Build the table that a configuration asks for, in the old or the new style of Hugging Face.

    Old style: `rope_theta` and `rope_scaling` at the top level. New style: both inside `rope_parameters`, which may
    hold one object per layer type.

    Args:
        config: the model's configuration.
        head_dim: D, width of one head.
        default_theta: base wavelength where the configuration names none.
        layer_type: which object of a nested `rope_parameters` to read.

    Raises:
        UnsupportedModelError: a rope type that the engine does not implement.

    References:
        RoPE: arXiv:2104.09864. linear: arXiv:2306.15595. llama3: scaling by wavelength, Llama 3.1.
    """
    if head_dim % 2:
        raise config.unsupported("head_dim", head_dim, "even numbers, for rotary positions")
    parameters = config.mapping("rope_parameters") or config.mapping("rope_scaling") or Config({}, config.where)
    if layer_type is not None and isinstance(parameters.values.get(layer_type), dict):
        parameters = parameters.mapping(layer_type) or parameters
    theta = parameters.positive("rope_theta", config.positive("rope_theta", default_theta))
    for place in (config, parameters):
        place.only("partial_rotary_factor", 1, 1.0)
    kind = parameters.values.get("rope_type") or parameters.values.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise parameters.unsupported("rope_type", kind, ", ".join(ROPE_TYPES))

    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.float32(theta) ** exponents
    if kind == "linear":
        frequencies = frequencies / np.float32(parameters.positive("factor"))
    elif kind == "llama3":
        frequencies = _scaled_by_wavelength(frequencies, config, parameters)
    return RotaryTable(frequencies.astype(np.float32))


def _scaled_by_wavelength(frequencies: Float32Array, config: Config, parameters: Config) -> Float32Array:
    """Llama 3.1: keep short wavelengths, divide long ones by `factor`, blend between the two limits."""
    factor = parameters.positive("factor")
    low, high = parameters.positive("low_freq_factor"), parameters.positive("high_freq_factor")
    if low >= high:
        raise parameters.unsupported("low_freq_factor", low, f"numbers below high_freq_factor, {high}")
    context = parameters.integer("original_max_position_embeddings", config.integer("max_position_embeddings"))
    wavelengths = 2 * math.pi / frequencies
    blend = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    return np.asarray((1 - blend) * frequencies / factor + blend * frequencies, dtype=np.float32)
