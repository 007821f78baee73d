"""Rules for how many zeros each layer gives: one file each, and the one dictionary that all else goes through."""

from rarefy.methods.allocation.base import (
    Allocation,
    DenseLayer,
    DenseModel,
    LayerShape,
    ModelAllocation,
    ShapeAllocation,
)
from rarefy.methods.allocation.erk import ERK
from rarefy.methods.allocation.global_threshold import Global
from rarefy.methods.allocation.owl import OWL
from rarefy.methods.allocation.rounding import patterns_of
from rarefy.methods.allocation.uniform import Uniform

ALLOCATIONS: dict[str, type[Allocation]] = {
    "uniform": Uniform,
    "erk": ERK,
    "owl": OWL,
    "global": Global,
}

__all__ = [
    "ALLOCATIONS",
    "ERK",
    "OWL",
    "Allocation",
    "DenseLayer",
    "DenseModel",
    "Global",
    "LayerShape",
    "ModelAllocation",
    "ShapeAllocation",
    "Uniform",
    "patterns_of",
]
