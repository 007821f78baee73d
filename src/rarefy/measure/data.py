"""Read evaluation data: running text, sentence pairs with a score, labelled texts.

Tables are comma-separated (`.csv`, with quotes), tab-separated (`.tsv`, without) or JSON lines (`.jsonl`). A first row
that names the columns is recognised by those names; without one the order of the columns counts.
"""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from rarefy.core.errors import PathError, UsageError

FIRST = ("sentence1", "text1", "first")
SECOND = ("sentence2", "text2", "second")
SCORE = ("score", "similarity")
TEXT = ("text", "sentence")
LABEL = ("label", "class")


@final
@dataclass(frozen=True)
class Pair:
    """Two texts and how similar people find them."""

    first: str
    second: str
    score: float


@final
@dataclass(frozen=True)
class Labelled:
    """A text and its label, as written in the file."""

    text: str
    label: str


def read_text(path: str | Path) -> str:
    """Read running text: a plain text file whole, or the `text` fields of JSON lines joined by blank lines.

    Raises:
        PathError: there is no such file.
        UsageError: the file is empty, is not UTF-8, or a JSON line has no `text`.
    """
    path = _existing(path)
    is_jsonl = path.suffix == ".jsonl"
    text = "\n\n".join(row[0] for row in _rows(path, (TEXT,))) if is_jsonl else _decoded(path)
    if not text.strip():
        raise UsageError(str(path), "no text in it")
    return text


def read_pairs(path: str | Path) -> list[Pair]:
    """Read sentence pairs: columns sentence1, sentence2, score.

    Raises:
        PathError: there is no such file.
        UsageError: no rows, a missing column, a score that is not a finite number; names the line.
    """
    path = _existing(path)
    pairs = []
    for number, row in enumerate(_rows(path, (FIRST, SECOND, SCORE)), start=1):
        try:
            score = float(row[2])
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise UsageError(f"{path}, row {number}", f"score {row[2]!r}", allowed="a finite number")
        pairs.append(Pair(row[0], row[1], score))
    return pairs


def read_labelled(path: str | Path) -> list[Labelled]:
    """Read labelled texts: columns text, label.

    Raises:
        PathError: there is no such file.
        UsageError: no rows, or a missing column; names the line.
    """
    path = _existing(path)
    return [Labelled(row[0], row[1]) for row in _rows(path, (TEXT, LABEL))]


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise PathError(str(path), "a directory" if path.is_dir() else "no such file", allowed="a data file")
    return path


def _decoded(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(str(path), f"not UTF-8 text ({error.reason} at byte {error.start})") from error


def _rows(path: Path, columns: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return the wanted columns of every row as text; each column is given by the names it may have."""
    content = _decoded(path)
    if path.suffix == ".jsonl":
        rows = _json_rows(path, content, columns)
    elif path.suffix in (".csv", ".tsv"):
        rows = _table_rows(path, content, columns)
    else:
        raise UsageError(str(path), f"extension {path.suffix!r}", allowed=".csv, .tsv or .jsonl")
    if not rows:
        raise UsageError(str(path), "no rows in it")
    return rows


def _json_rows(path: Path, content: str, columns: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    rows = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(where, f"not JSON ({error.msg})") from error
        if not isinstance(record, dict):
            raise UsageError(where, f"a {type(record).__name__}", allowed="an object")
        values = []
        for names in columns:
            name = next((name for name in names if name in record), None)
            if name is None:
                raise UsageError(where, f"no field {names[0]!r}; it has {', '.join(map(repr, record)) or 'none'}")
            values.append(str(record[name]))
        rows.append(tuple(values))
    return rows


def _table_rows(path: Path, content: str, columns: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    lines = content.splitlines(keepends=True)
    try:
        if path.suffix == ".csv":
            table = [row for row in csv.reader(lines, strict=True) if row]
        else:
            # Tab-separated data sets hold unpaired quotes as ordinary characters.
            table = [row for row in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if row]
    except csv.Error as error:
        raise UsageError(str(path), f"not a table ({error})") from error
    if not table:
        return []
    head = [cell.strip().lower() for cell in table[0]]
    position = [next((head.index(name) for name in names if name in head), None) for names in columns]
    # One word that happens to be a column's name may be data; two columns named right are a header.
    has_header = sum(index is not None for index in position) >= min(2, len(columns))
    if has_header and None in position:
        missing = columns[position.index(None)][0]
        raise UsageError(f"{path}, line 1", f"no column {missing!r}; it has {', '.join(map(repr, table[0]))}")
    wanted = [index for index in position if index is not None] if has_header else list(range(len(columns)))
    rows = []
    for number, row in enumerate(table[1:] if has_header else table, start=2 if has_header else 1):
        if len(row) <= max(wanted):
            expected = ", ".join(names[0] for names in columns)
            raise UsageError(f"{path}, row {number}", f"{len(row)} column(s)", allowed=f"the columns {expected}")
        rows.append(tuple(row[index] for index in wanted))
    return rows
