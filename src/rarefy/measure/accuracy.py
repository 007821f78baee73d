"""Accuracy of classifiers: sequence classification in transformers, and any torch module on arrays."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rarefy.core.errors import NonFiniteError, UnsupportedModelError, UsageError
from rarefy.core.results import Spread
from rarefy.measure.data import Labelled
from rarefy.measure.measurement import Measurement


def text_accuracy(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Labelled],
    *,
    batch_size: int = 32,
    max_length: int = 512,
    note: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Measure the share of texts whose most likely class is their label.

    Args:
        model: a transformers model with a classification head.
        tokenizer: its transformers tokenizer.
        examples: texts with labels; a label is a class number or one of the names in the model's `id2label`.
        batch_size: texts per forward pass.
        max_length: longer texts are cut to so many tokens.
        note: words for the description.
        progress: called with (texts done, texts in all).

    Raises:
        UnsupportedModelError: the model has no classification head.
        UsageError: no examples, or a label that the model does not know.
        NonFiniteError: the model gives NaN or infinity.
    """
    config = getattr(model, "config", None)
    if config is None or not type(model).__name__.endswith("ForSequenceClassification"):
        raise UnsupportedModelError(
            type(model).__name__,
            "it has no classification head",
            allowed="a model with architecture ...ForSequenceClassification",
            hint="fine-tune a head first, or measure with --metric sts or perplexity",
        )
    if not examples:
        raise UsageError("data", "no examples")
    label = [_class_number(example.label, config.id2label) for example in examples]
    predicted = np.empty(len(examples), dtype=np.int64)
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].text))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        texts = [examples[index].text for index in indices]
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.inference_mode():
            predicted[indices] = _classes(model(**inputs).logits)
        if progress is not None:
            progress(start + len(indices), len(order))
    return _measurement(predicted, np.array(label), note)


def array_accuracy(
    module: Callable[[Tensor], Tensor],
    inputs: npt.NDArray[Any] | Tensor,
    labels: npt.NDArray[Any] | Tensor,
    *,
    batch_size: int = 256,
    note: str = "",
) -> Measurement:
    """Measure the accuracy of any module that maps a batch of inputs to logits of shape (batch, classes).

    Args:
        module: the classifier, in evaluation mode.
        inputs: batch along the first axis; passed on with their dtype.
        labels: class numbers, one per input.
        batch_size: inputs per call.
        note: words for the description.

    Raises:
        UsageError: no inputs, numbers of inputs and labels that differ, or outputs that are not (batch, classes).
        NonFiniteError: the module gives NaN or infinity.
    """
    x, y = torch.as_tensor(inputs), np.asarray(labels, dtype=np.int64).reshape(-1)
    if len(x) == 0 or len(x) != len(y):
        raise UsageError("data", f"{len(x)} inputs and {len(y)} labels", allowed="equally many, at least one")
    with torch.inference_mode():
        predicted = [_classes(module(x[start : start + batch_size])) for start in range(0, len(x), batch_size)]
    return _measurement(np.concatenate(predicted), y, note)


def _class_number(label: str, id2label: Mapping[Any, str]) -> int:
    numbers = {str(name): int(number) for number, name in id2label.items()}
    stripped = label.strip()
    if stripped in numbers:
        return numbers[stripped]
    if stripped.isdecimal() and int(stripped) in numbers.values():
        return int(stripped)
    raise UsageError("data", f"label {label!r}", allowed=", ".join(f"{n} or {name!r}" for name, n in numbers.items()))


def _classes(logits: Tensor) -> npt.NDArray[np.int64]:
    if logits.ndim != 2:
        raise UsageError("model output", f"shape {tuple(logits.shape)}", allowed="(batch, classes)")
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError("model output", "NaN or infinity", hint="the model's weights may be damaged")
    return logits.argmax(dim=-1).numpy().astype(np.int64)


def _measurement(predicted: npt.NDArray[np.int64], label: npt.NDArray[np.int64], note: str) -> Measurement:
    share = float((predicted == label).mean())
    error = math.sqrt(share * (1 - share) / len(label))
    value = Spread(median=share, low=max(0.0, share - error), high=min(1.0, share + error), num_runs=len(label))
    how = f"share of {len(label)} examples classified right; spread: one binomial standard error"
    return Measurement("accuracy", "", True, value, f"{note}; {how}" if note else how)
