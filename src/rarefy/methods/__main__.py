"""Print docs/methods.md from the methods: `python -m rarefy.methods docs/measured.json > docs/methods.md`."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rarefy.core.grids import IntGrid
from rarefy.core.patterns import Lines, Unstructured
from rarefy.core.ranks import Rank
from rarefy.methods import METHODS, LayerMethod
from rarefy.methods.allocation import ALLOCATIONS

_HEAD = """# Methods

Printed by `python -m rarefy.methods docs/measured.json` from the methods' own fields; a test keeps it current.
[recipes.md](recipes.md) says how a recipe names them. Every method is a file in `src/rarefy/methods/` that reads like
its paper, with the deviations noted.
"""
_ALLOCATIONS_HEAD = (
    "How many of a step's zeros each layer gives ([recipes.md](recipes.md#how-much-each-layer-gives)). All of its "
    "layers together give what the pattern says, whatever the rule. Each is a file in `src/rarefy/methods/allocation/`."
)
_EXAMPLES: dict[str, Any] = {
    "pattern": Unstructured(0.5),
    "APoZ.pattern": Lines("columns", 0.5),
    "rank": Rank(ratio=0.5),
    "values": IntGrid(4, 64, False),
}


def render(measured: Mapping[str, Any]) -> str:
    """The document.

    Args:
        measured: `how`, a paragraph; `effects`, for each method a phrase with its figures.
    """
    lines = [_HEAD, measured["how"], "", "| method | paper | needs | does | measured |", "|---|---|---|---|---|"]
    for name, cls in METHODS.items():
        does = (cls.__doc__ or "").strip().split("\n", 1)[0].rstrip(".").replace("|", "\\|")
        effect = measured["effects"].get(name, "not measured")
        lines.append(f"| `{name}` | {_paper(cls.paper)} | {_needs(cls)} | {does} | {effect} |")
    lines += ["", "## Hyperparameters", "", "`pattern`, `values`, `rank` as in recipes.md.", ""]
    lines += ["| method | key | default | meaning |", "|---|---|---|---|"]
    for name, cls in METHODS.items():
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            default = "required" if field.default is dataclasses.MISSING else f"`{_plain(field.default)}`"
            lines.append(f"| `{name}` | `{field.name}` | {default} | {field.metadata['doc']} |")
    return "\n".join([*lines, *_allocations(measured["allocations"])]) + "\n"


def _allocations(effects: Mapping[str, str]) -> list[str]:
    """The rules for the amounts of zeros in each layer."""
    lines = ["", "## Allocations", "", _ALLOCATIONS_HEAD, ""]
    lines += ["| allocation | paper | looks at | does | keys | measured |", "|---|---|---|---|---|---|"]
    for name, cls in ALLOCATIONS.items():
        looks_at = "the dense model" if hasattr(cls, "measured_amounts") else "shapes"
        does = (cls.__doc__ or "").strip().split("\n", 1)[0].rstrip(".")
        keys = [
            f"`{field.name}` ({field.metadata['doc']}; {_plain(field.default)})"
            for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        ]
        row = (f"`{name}`", _paper(cls.paper), looks_at, does, ", ".join(keys), effects.get(name, "not measured"))
        lines.append(f"| {' | '.join(row)} |")
    ranking = ", ".join(f"`{name}`" for name, cls in METHODS.items() if hasattr(cls, "saliency"))
    return [*lines, "", f"`global` is for the methods that say what each weight matters: {ranking}."]


def _paper(paper: str) -> str:
    number = paper.removeprefix("arXiv:")
    return paper if number == paper else f"[{paper}](https://arxiv.org/abs/{number})"


def _needs(cls: type[LayerMethod]) -> str:
    required = {
        field.name: _EXAMPLES.get(f"{cls.__name__}.{field.name}", _EXAMPLES.get(field.name))
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING
    }
    names = [type(statistic).__name__ for statistic in cls(**required).needs()]
    return "calibration data: " + ", ".join(f"`{name}`" for name in names) if names else "nothing"


def _plain(value: object) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


if __name__ == "__main__":
    sys.stdout.write(render(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
