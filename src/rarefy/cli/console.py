"""Where output goes: data to stdout, progress and notes to stderr."""

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from rarefy.report.units import printable


def stdout_console() -> Console:
    """Return the console for what a command was asked for; 80 columns and plain text in a pipe."""
    return Console(highlight=False)


def stderr_console() -> Console:
    """Return the console for progress and notes."""
    return Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """Write one line to stderr, without markup and without control characters."""
    sys.stderr.write(printable(text) + "\n")


def write_json(data: object) -> None:
    """Write `data` to stdout as indented JSON; numbers that JSON lacks become "nan", "inf" or "-inf"."""
    sys.stdout.write(json.dumps(_encodable(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _encodable(value: object) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _encodable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
