"""Finding and reading a recipe: a shipped one by name, a file, or plain data."""

import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from rarefy.core.errors import PathError
from rarefy.recipe.model import Recipe
from rarefy.recipe.schema import build, did_you_mean
from rarefy.recipe.source import parse_yaml


def load_recipe(source: str | os.PathLike[str] | Mapping[str, Any]) -> Recipe:
    """Read a recipe and check the whole of it.

    Args:
        source: the name of a shipped recipe, the path of a YAML file (which goes first), or the content as a mapping.

    Raises:
        PathError: no such file or name.
        RecipeError: naming the line, what is wrong there, and what is allowed.
    """
    if isinstance(source, Mapping):
        return build(source, "recipe", {})
    path = Path(source)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        path = path / "recipe.yaml"
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PathError(str(path), f"cannot be read as text: {error}") from None
        data, lines = parse_yaml(text, str(path))
        return build(data, str(path), lines)
    name = os.fspath(source)
    if name in shipped_names():
        text = _folder().joinpath(f"{name}.yaml").read_text(encoding="utf-8")
        data, lines = parse_yaml(text, f"{name}.yaml")
        return build(data, f"{name}.yaml", lines)
    known = shipped_names()
    raise PathError(
        name,
        "neither a recipe file nor the name of a shipped recipe",
        allowed=f"a file, or one of {', '.join(known)}",
        hint=did_you_mean(name, known),
    )


def shipped_names() -> tuple[str, ...]:
    """Names of the recipes that come with rarefy, in alphabetical order."""
    names = (item.name for item in _folder().iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


def _folder() -> Any:
    return resources.files("rarefy").joinpath("recipes")
