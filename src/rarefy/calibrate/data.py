"""The data of a run: batches to calibrate with, and others of the same kind to judge the result by.

Shape suffixes: N windows, L tokens of a window.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor

from rarefy.calibrate.calls import Call
from rarefy.calibrate.inputs import example_calls, example_labels, num_rows, text_calls
from rarefy.calibrate.text import DEFAULT_SOURCE, Windows, default_text, make_windows, read_text
from rarefy.core.errors import CalibrationError
from rarefy.core.results import CalibrationInfo
from rarefy.models.loaded import LoadedModel
from rarefy.models.positions import num_positions

Examples = Iterable[Any]

# Tokens of one batch of calibration: activations then stay in the caches, and calls are still few.
_TOKENS_PER_BATCH = 1024
_HELD_OUT_WINDOWS = 8


@final
@dataclass(frozen=True)
class CalibrationData:
    """Calibration data, and the part of it that is kept for the verdict.

    Args:
        calls: the model's arguments for each batch; none where no method reads data.
        labels: of the samples in each of them, where the caller gave any.
        held_out: the same for batches that calibration does not see.
        windows_NL: the held-out windows as token ids, for a model that reads text.
        info: what the report says about `calls`; no path in it.
        source: where the held-out data comes from, in words.
        sequence_length: tokens of a window.
    """

    calls: list[Call]
    labels: list[Tensor | None]
    held_out: list[Call]
    windows_NL: Tensor | None
    info: CalibrationInfo | None
    source: str
    sequence_length: int


def gather(
    loaded: LoadedModel,
    calibration: str | os.PathLike[str] | Examples | None,
    evaluation: str | os.PathLike[str] | None,
    samples: int,
    sequence_length: int,
    seed: int,
    needs_data: bool,
    measure: bool,
    labels: Iterable[Any] | None = None,
) -> CalibrationData:
    """Calibration batches and held-out ones, from text or from examples, which may have labels."""
    if calibration is not None and not isinstance(calibration, str | os.PathLike):
        calls = example_calls(calibration, samples)
        return _from_examples(calls, example_labels(labels, calls), sequence_length, needs_data)
    if labels is not None:
        raise CalibrationError("labels", "labels without examples", hint="pass example inputs as `calibration`")
    if not (needs_data or measure):
        return CalibrationData([], [], [], None, None, "", sequence_length)
    reads_text = str(getattr(loaded.model, "main_input_name", "")) == "input_ids"
    if loaded.tokenizer is None or not reads_text:
        if needs_data or calibration is not None:
            raise CalibrationError(
                loaded.source,
                "no tokenizer was found for it" if reads_text else f"{loaded.architecture} does not read text",
                hint="call rarefy.compress in Python with an iterable of example inputs as `calibration`, "
                "or use methods that need no data (magnitude, rtn)",
            )
        return CalibrationData([], [], [], None, None, "", sequence_length)
    source = DEFAULT_SOURCE if calibration is None else os.fspath(calibration)
    text = default_text() if calibration is None else read_text(calibration)
    length, note = fitting_length(loaded, sequence_length)
    windows = make_windows(
        text,
        loaded.tokenizer,
        source=source,
        num_samples=samples,
        sequence_length=length,
        num_held_out=0 if evaluation is not None else _HELD_OUT_WINDOWS,
        seed=seed,
    )
    held_out_NL = windows.held_out_NL
    if evaluation is not None:
        held_out_NL = _evaluation_windows(loaded, evaluation, length)
    told = calibration if evaluation is None else evaluation
    batch_size = max(1, _TOKENS_PER_BATCH // length)
    info = CalibrationInfo(
        source if calibration is None else _shown(calibration),
        windows.info.num_samples,
        length,
        windows.info.num_tokens,
        "; ".join(filter(None, (windows.info.note, note))),
    )
    calls = text_calls(loaded.model, windows.samples_NL, batch_size) if needs_data else []
    return CalibrationData(
        calls=calls,
        labels=[None] * len(calls),
        held_out=text_calls(loaded.model, held_out_NL, batch_size) if len(held_out_NL) else [],
        windows_NL=held_out_NL if len(held_out_NL) else None,
        info=info if needs_data else None,
        source=source if told is None else _shown(told),
        sequence_length=length,
    )


def _shown(path: str | os.PathLike[str]) -> str:
    """The last part of a path: what is published must not tell where on a disk the text lies."""
    return (Path.cwd() / path).name or os.fspath(path)


def _from_examples(
    calls: list[Call], labels: list[Tensor | None], sequence_length: int, needs_data: bool
) -> CalibrationData:
    num_held_out = min(_HELD_OUT_WINDOWS, len(calls) // 10 or int(len(calls) > 1))
    kept = calls[: len(calls) - num_held_out]
    held_out = calls[len(kept) :]
    note = f"{len(kept)} batches for calibration, the last {num_held_out} kept for the verdict"
    rows = sum(num_rows(call) for call in kept)
    info = CalibrationInfo("example inputs given by the caller", len(kept), 0, rows, note)
    told = info if needs_data else None
    return CalibrationData(kept, labels[: len(kept)], held_out, None, told, "the example inputs", sequence_length)


def _evaluation_windows(loaded: LoadedModel, evaluation: str | os.PathLike[str], length: int) -> Tensor:
    """The first windows of a text, in order."""
    assert loaded.tokenizer is not None
    windows: Windows = make_windows(
        read_text(evaluation),
        loaded.tokenizer,
        source=os.fspath(evaluation),
        num_samples=1 << 30,
        sequence_length=length,
        num_held_out=0,
        seed=None,
    )
    return windows.samples_NL[:_HELD_OUT_WINDOWS]


def fitting_length(loaded: LoadedModel, sequence_length: int) -> tuple[int, str]:
    """The window length, cut to what the model has positions for."""
    limit = num_positions(loaded.model)
    if limit is not None and limit < sequence_length:
        return limit, f"windows were cut to {limit} tokens, the most that the model has positions for"
    return sequence_length, ""
