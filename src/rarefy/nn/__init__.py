"""Compressed layers as torch modules, and their registration with transformers."""

from rarefy.nn.embedding import CompressedEmbedding
from rarefy.nn.linear import CompressedLinear
from rarefy.nn.loading import load_into
from rarefy.nn.replace import replace_linear, why_not_replaceable

__all__ = ["CompressedEmbedding", "CompressedLinear", "load_into", "replace_linear", "why_not_replaceable"]
