"""Layer names in tables of 80 columns: what repeats in every block is said once."""

from collections.abc import Iterable, Iterator

from rarefy.report.facts import split_block
from rarefy.report.units import printable


def pattern_of(name: str) -> str:
    """Return the name with a star for the number of its block: "model.layers.*.mlp.up_proj"."""
    place = split_block(name)
    return name if place is None else f"{name.partition(f'.{place[0]}.')[0]}.*.{place[1]}"


def sectioned(names: Iterable[str]) -> Iterator[tuple[str | None, str]]:
    """Yield for each name the heading to put before it, None where the last one goes on, and the text of its row."""
    current: str | None = None
    for name in names:
        prefix, star, role = name.partition(".*.")
        heading = f"{prefix}.*" if star else None
        new = heading is not None and heading != current
        yield (printable(f"{prefix}.*") if new else None), printable(f"  {role}" if star else name)
        current = heading
