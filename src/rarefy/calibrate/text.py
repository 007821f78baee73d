"""Calibration text: read it, tokenize it whole, cut it into windows, and choose some of them by seed.

Shape suffixes: N windows, L tokens of a window.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

import numpy as np
import torch
from torch import Tensor

from rarefy.core.errors import CalibrationError, PathError
from rarefy.core.results import CalibrationInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_SOURCE = "built-in: the language reference and module documentation of Python"

_JSON_LINES = {".jsonl", ".ndjson"}
_PLAIN = {".txt", ".md", ".text", ".rst"}
# One window in ten is kept from calibration for the verdict, where text is scarce.
_HELD_OUT_SHARE = 10


@final
@dataclass(frozen=True)
class Windows:
    """Windows of token ids for calibration, and others of the same text to judge the result by.

    Args:
        samples_NL: int64, for calibration.
        held_out_NL: int64, disjoint from the samples; may have no rows.
        info: what the report says about them.
    """

    samples_NL: Tensor
    held_out_NL: Tensor
    info: CalibrationInfo


def read_text(source: str | os.PathLike[str]) -> str:
    """Read calibration text.

    Args:
        source: a plain text file, a JSON-lines file (.jsonl, .ndjson), or a directory of those. A JSON line is an
            object with the field "text", or with one string field only.

    Raises:
        PathError: it does not exist.
        CalibrationError: it is empty, not UTF-8, or its JSON has no such field.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in _JSON_LINES | _PLAIN)
        if not files:
            allowed = ", ".join(sorted(_JSON_LINES | _PLAIN))
            raise CalibrationError(str(path), "a directory without text files", allowed=f"files that end in {allowed}")
        text = "\n\n".join(_read_file(file) for file in files)
    elif path.is_file():
        text = _read_file(path)
    else:
        raise PathError(str(path), "no such file or directory", allowed="a text file, a JSON-lines file, a directory")
    if not text.strip():
        raise CalibrationError(str(path), "no text in it", hint="leave --calibration out to use the built-in text")
    return text


def default_text() -> str:
    """English prose and code that comes with every Python: its language reference and its modules' documentation."""
    parts: list[str] = []
    try:
        from pydoc_data.topics import topics  # noqa: PLC0415 (some distributions leave it out)
    except ImportError:
        pass
    else:
        parts.extend(topics[name].strip() for name in sorted(topics))
    library = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names):
        for file in (library / f"{name}.py", library / name / "__init__.py"):
            if file.is_file():
                parts.extend(_docstrings(file))
    return "\n\n".join(parts)


def make_windows(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str,
    num_samples: int,
    sequence_length: int,
    num_held_out: int,
    seed: int | None,
) -> Windows:
    """Tokenize a text whole, cut it into windows, and draw samples without replacement.

    A tokenizer that puts special tokens around a text puts them around every window, within `sequence_length`.

    Args:
        text: the text.
        tokenizer: of the model.
        source: what the report names as the source.
        num_samples: windows to draw; fewer where the text has fewer.
        sequence_length: tokens of a window.
        num_held_out: windows to set aside for the verdict; fewer where the text is short.
        seed: of the draw; None takes the windows in order.

    Raises:
        CalibrationError: the text is shorter than one window.
    """
    prefix, suffix = special_tokens_around(tokenizer)
    body = sequence_length - len(prefix) - len(suffix)
    if body < 1:
        raise CalibrationError("sequence_length", str(sequence_length), allowed=f"> {len(prefix) + len(suffix)}")
    ids = np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    num_windows = len(ids) // body
    if num_windows < 1:
        raise CalibrationError(
            source,
            f"{len(ids)} tokens, which is less than one window of {sequence_length}",
            hint="give more text, or a smaller sequence length",
        )
    num_held_out = min(num_held_out, num_windows // _HELD_OUT_SHARE or int(num_windows > 1))
    order = np.arange(num_windows) if seed is None else np.random.default_rng(seed).permutation(num_windows)
    used = min(num_samples, num_windows - num_held_out)
    windows_NL = np.empty((num_windows, sequence_length), dtype=np.int64)
    windows_NL[:, : len(prefix)] = prefix
    windows_NL[:, len(prefix) : len(prefix) + body] = ids[: num_windows * body].reshape(num_windows, body)
    windows_NL[:, len(prefix) + body :] = suffix
    note = f"the text has {num_windows} windows of {sequence_length} tokens; {used} were " + (
        "taken in order" if seed is None else f"drawn with seed {seed}"
    )
    if used < num_samples:
        note += f", fewer than the {num_samples} asked for, because there are no more"
    info = CalibrationInfo(source, used, sequence_length, used * sequence_length, note)
    return Windows(
        torch.from_numpy(windows_NL[order[:used]]),
        torch.from_numpy(windows_NL[order[used : used + num_held_out]]),
        info,
    )


def special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text, such as [CLS] and [SEP]."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _read_file(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(str(path), f"not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise PathError(str(path), f"cannot be read ({error.strerror})") from error
    if path.suffix.lower() in _JSON_LINES:
        return "\n\n".join(_json_lines(path, text.splitlines()))
    return text


def _json_lines(path: Path, lines: Sequence[str]) -> list[str]:
    texts: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise CalibrationError(where, f"not a JSON line ({error})") from error
        if isinstance(record, str):
            texts.append(record)
            continue
        if not isinstance(record, dict):
            raise CalibrationError(where, f"a JSON {type(record).__name__}", allowed='an object with a field "text"')
        strings = [key for key, value in record.items() if isinstance(value, str)]
        key = "text" if "text" in strings else strings[0] if len(strings) == 1 else None
        if key is None:
            raise CalibrationError(
                where,
                f"the fields {', '.join(map(repr, record)) or '(none)'}",
                allowed='a field "text", or only one string field',
            )
        texts.append(str(record[key]))
    return texts


def _docstrings(file: Path) -> list[str]:
    """The docstring of a module and those of its functions and classes, longest ones only, in order."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in found if text is not None and len(text) > 200]
