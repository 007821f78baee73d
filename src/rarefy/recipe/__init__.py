"""Recipes: which methods run on which layers. A recipe is data: it names methods, never an import path."""

from rarefy.recipe.load import load_recipe, shipped_names
from rarefy.recipe.model import Recipe, Step
from rarefy.recipe.resolve import LayerPlan, LayerRef, Structure, notes, resolve

__all__ = ["LayerPlan", "LayerRef", "Recipe", "Step", "Structure", "load_recipe", "notes", "resolve", "shipped_names"]
