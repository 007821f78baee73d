"""What a model is called with: windows of text as a language model takes them, or examples that the caller gives."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.calibrate.calls import Call
from rarefy.core.errors import CalibrationError


def text_calls(model: nn.Module, windows_NL: Tensor, batch_size: int) -> list[Call]:
    """The calls of a text model over windows of token ids, `batch_size` windows each.

    An encoder-decoder reads each window and predicts the same window, shifted by its start token.

    Raises:
        CalibrationError: the model takes something else than text.
    """
    main_input = str(getattr(model, "main_input_name", "input_ids"))
    parameters = inspect.signature(model.forward).parameters
    if main_input != "input_ids" or "input_ids" not in parameters:
        raise CalibrationError(
            type(model).__name__,
            f"it takes {main_input}, and text gives input_ids",
            hint="call rarefy.compress in Python with example inputs, or use a method that needs no data",
        )
    fixed: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
    calls = []
    for window_BL in torch.split(windows_NL, batch_size):
        kwargs = {"input_ids": window_BL, **fixed}
        if "decoder_input_ids" in parameters:
            kwargs["decoder_input_ids"] = _shifted(model, window_BL)
        calls.append(Call((), kwargs))
    return calls


def example_calls(examples: Iterable[Any], num_samples: int) -> list[Call]:
    """The calls of any module over example inputs: a tensor or array, a tuple of arguments, or a dict of named ones.

    Args:
        examples: the inputs, one batch each.
        num_samples: how many of them to use at most.

    Raises:
        CalibrationError: there is none, or one is of another kind.
    """
    calls = []
    for index, example in enumerate(examples):
        if index == num_samples:
            break
        match example:
            case Tensor() | np.ndarray():
                calls.append(Call((torch.as_tensor(example),), {}))
            case tuple() | list():
                calls.append(Call(tuple(_tensor(item) for item in example), {}))
            case Mapping():
                calls.append(Call((), {str(key): _tensor(value) for key, value in example.items()}))
            case _:
                raise CalibrationError(
                    f"calibration example {index}",
                    type(example).__name__,
                    allowed="a tensor, a tuple of arguments, or a dict of named arguments",
                )
    if not calls:
        raise CalibrationError("calibration", "no example inputs", hint="pass an iterable of the model's inputs")
    return calls


def example_labels(labels: Iterable[Any] | None, calls: Sequence[Call]) -> list[Tensor | None]:
    """The labels of example inputs: of each batch a tensor or array with one entry for each example in it.

    Args:
        labels: of the batches, in the same order; None: there are none.
        calls: the batches.

    Raises:
        CalibrationError: a batch has none, or another number of them than of examples.
    """
    if labels is None:
        return [None] * len(calls)
    found: list[Tensor | None] = []
    for index, (call, own) in enumerate(zip(calls, labels, strict=False)):
        tensor = torch.as_tensor(own)
        if tensor.ndim == 0 or tensor.shape[0] != num_rows(call):
            raise CalibrationError(
                f"labels of batch {index}", f"shape {tuple(tensor.shape)}", allowed=f"{num_rows(call)} labels"
            )
        found.append(tensor)
    if len(found) < len(calls):
        raise CalibrationError("labels", f"labels of {len(found)} batches", allowed=f"of all {len(calls)}")
    return found


def num_rows(call: Call) -> int:
    """How long the first axis of the first tensor in a call is."""
    tensors = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor) and value.ndim]
    return tensors[0].shape[0] if tensors else 0


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Keep a transformers model from filling a key-value cache, which a second pass over a block would fill twice."""
    configs: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "use_cache"):
            configs.setdefault(id(config), (config, config.use_cache))
    for config, _ in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in configs.values():
            config.use_cache = value


def cast_inputs(calls: Iterable[Call], dtype: torch.dtype) -> list[Call]:
    """The calls with floating-point tensors in another type (spectrograms and pixels for a bfloat16 pass)."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return [
        Call(tuple(cast(item) for item in call.args), {key: cast(item) for key, item in call.kwargs.items()})
        for call in calls
    ]


def _shifted(model: nn.Module, window_BL: Tensor) -> Tensor:
    config: Any = model.config
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        start = getattr(config, "bos_token_id", None) or getattr(config, "pad_token_id", None) or 0
    return torch.cat([torch.full_like(window_BL[:, :1], int(start)), window_BL[:, :-1]], dim=1)


def _tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
