"""Compressed layers as torch modules, and their registration with transformers."""

from rarefy.nn.conv import PackedConv, PackedDepthwiseConv, PackedGroupedConv
from rarefy.nn.embedding import CompressedEmbedding
from rarefy.nn.linear import CompressedLinear
from rarefy.nn.loading import load_into
from rarefy.nn.matrices import Weight
from rarefy.nn.recurrent import PackedRecurrent
from rarefy.nn.replace import all_weights, find_weight, replace_linear, why_not_replaceable

__all__ = [
    "CompressedEmbedding",
    "CompressedLinear",
    "PackedConv",
    "PackedDepthwiseConv",
    "PackedGroupedConv",
    "PackedRecurrent",
    "Weight",
    "all_weights",
    "find_weight",
    "load_into",
    "replace_linear",
    "why_not_replaceable",
]
