"""Models: loading from any source, streaming their weights, and finding what they are made of."""

from rarefy.models.load import load_model
from rarefy.models.loaded import LoadedModel
from rarefy.models.structure import BlockRef, LayerRef, Structure, discover

__all__ = ["BlockRef", "LayerRef", "LoadedModel", "Structure", "discover", "load_model"]
