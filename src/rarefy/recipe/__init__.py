"""Recipes: which methods run on which layers. A recipe is data: it names methods, never an import path."""

from rarefy.recipe.load import load_recipe, shipped_names
from rarefy.recipe.model import Recipe, Step
from rarefy.recipe.resolve import (
    UNTARGETED,
    LayerPlan,
    LayerRef,
    Structure,
    amounts_in_words,
    left_alone,
    notes,
    resolve,
    shapes_of,
    sparsity_of,
    with_amounts,
)

__all__ = [
    "UNTARGETED",
    "LayerPlan",
    "LayerRef",
    "Recipe",
    "Step",
    "Structure",
    "amounts_in_words",
    "left_alone",
    "load_recipe",
    "notes",
    "resolve",
    "shapes_of",
    "shipped_names",
    "sparsity_of",
    "with_amounts",
]
