"""Compression methods: one file each, and the one dictionary that recipes, documentation and tests go through."""

from rarefy.methods.base import LayerMethod
from rarefy.methods.pruning.magnitude import Magnitude
from rarefy.methods.pruning.sparsegpt import SparseGPT
from rarefy.methods.pruning.wanda import Wanda
from rarefy.methods.quantization.gptq import GPTQ
from rarefy.methods.quantization.rtn import RTN

METHODS: dict[str, type[LayerMethod]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "rtn": RTN,
    "gptq": GPTQ,
}

__all__ = ["GPTQ", "METHODS", "RTN", "LayerMethod", "Magnitude", "SparseGPT", "Wanda"]
