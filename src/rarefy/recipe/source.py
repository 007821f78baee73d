"""Reading YAML so that every value knows its line."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from rarefy.core.errors import RecipeError

Path = tuple[str | int, ...]
MAX_BYTES = 1_000_000


def parse_yaml(text: str, name: str) -> tuple[Any, dict[Path, int]]:
    """Parse a recipe.

    Args:
        text: YAML: mappings with text keys, lists, and scalars. Anchors, aliases and tags are refused.
        name: what error messages call the file.

    Returns:
        The plain data, and for the path of every key and list item its line, counted from 1.

    Raises:
        RecipeError: it is no such YAML, or a key stands twice in one mapping.
    """
    if len(text) > MAX_BYTES:
        raise RecipeError(name, f"{len(text)} characters", allowed=f"at most {MAX_BYTES}")
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.AliasToken | yaml.AnchorToken | yaml.TagToken):
                raise RecipeError(
                    f"{name}:{token.start_mark.line + 1}",
                    "a word that begins with *, & or !",
                    hint='put names with a star in quotes: "*.mlp.*"',
                )
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise RecipeError(f"{name}{line}", f"not valid YAML: {problem}", hint=_hint(text, mark)) from None
    except RecursionError:
        raise RecipeError(name, "lists or mappings nested too deeply") from None
    lines: dict[Path, int] = {}
    if node is None:
        raise RecipeError(name, "an empty file", allowed="a mapping with `steps`")
    return _build(node, (), lines, name), lines


def line_of(path: Sequence[str | int], lines: Mapping[Path, int]) -> int | None:
    """Line of a value, or of the closest thing around it that has one."""
    for end in range(len(path), -1, -1):
        found = lines.get(tuple(path[:end]))
        if found is not None:
            return found
    return None


def _build(node: yaml.Node, path: Path, lines: dict[Path, int], name: str) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{name}:{line}", "a key that is a list or mapping", allowed="text")
            key = str(key_node.value)
            if key in result:
                raise RecipeError(f"{name}:{line}", f"the key {key!r} a second time")
            lines[(*path, key)] = line
            result[key] = _build(value_node, (*path, key), lines, name)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*path, index), lines, name) for index, item in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)
    constructor = yaml.constructor.SafeConstructor()
    try:
        return constructor.construct_object(node)
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{name}:{node.start_mark.line + 1}", f"{node.value!r}: {error}") from None


def _hint(text: str, mark: Any) -> str | None:
    lines = text.splitlines()
    line = lines[mark.line] if mark is not None and mark.line < len(lines) else ""
    return 'put names with a star in quotes: "*.mlp.*"' if "*" in line else None
