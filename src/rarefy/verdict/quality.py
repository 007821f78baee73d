"""Quality before and after, on held-out calibration text (or examples) that no method saw.

Shape suffixes: N windows, L tokens of a window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.calibrate.calls import Call, calibration_mode
from rarefy.calibrate.inputs import cast_inputs, without_cache
from rarefy.calibrate.precision import cast_parameters
from rarefy.core.errors import UnsupportedModelError
from rarefy.core.results import Metric, Spread
from rarefy.engine import Engine
from rarefy.measure.measurement import Measurement, compare, exact
from rarefy.measure.opening import is_causal_language_model
from rarefy.measure.perplexity import Scorer, engine_scorer, module_scorer, perplexity
from rarefy.models.loaded import LoadedModel
from rarefy.models.memory import release_freed_memory

Role = Literal["decoder", "encoder", "other"]

ENGINE = "rarefy's engine"
# Of the original's outputs on held-out data (logits of a large vocabulary), so much is kept for comparison.
_KEPT_OUTPUT_BYTES = 64 << 20


@final
@dataclass(frozen=True)
class Baseline:
    """What the model did before it was compressed.

    Args:
        role: how its quality is judged.
        held_out: the arguments of the model for each held-out batch.
        windows_NL: the held-out windows of a text model, else None.
        source: where they come from, in words.
        perplexity: of a decoder; None for others and where nothing was held out.
        outputs: output of each held-out batch, float32, for models whose outputs are compared.
        dtype: what was computed in.
    """

    role: Role
    held_out: tuple[Call, ...]
    windows_NL: Tensor | None
    source: str
    perplexity: Measurement | None
    outputs: tuple[Tensor, ...]
    dtype: torch.dtype


def role_of(model: nn.Module) -> Role:
    """How the quality and speed of a model are measured."""
    if is_causal_language_model(model):
        return "decoder"
    config = getattr(model, "config", None)
    text = str(getattr(model, "main_input_name", "")) == "input_ids"
    return "encoder" if config is not None and text and not getattr(config, "is_encoder_decoder", False) else "other"


def measure_before(
    loaded: LoadedModel,
    held_out: Sequence[Call],
    windows_NL: Tensor | None,
    *,
    source: str,
    dtype: torch.dtype,
) -> Baseline:
    """Judge the model as it is; to be called before the weights change.

    Args:
        loaded: the model; a streaming one is materialised whole for the time of this call.
        held_out: the model's arguments for each held-out batch.
        windows_NL: the same windows as token ids, for a text model.
        source: where they come from.
        dtype: to compute in.
    """
    model = loaded.model
    role = role_of(model)
    measured: Measurement | None = None
    outputs: list[Tensor] = []
    if held_out:
        loaded.materialize("", dtype=dtype)
        with cast_parameters([model], dtype, restore=not loaded.streams), calibration_mode(model), without_cache(model):
            if role == "decoder" and windows_NL is not None:
                note = f"held-out windows of {source}; before compression, torch {_name(dtype)}"
                measured = _perplexity(module_scorer(model), windows_NL, note)
            else:
                for call in cast_inputs(held_out, dtype):
                    outputs.append(_main_output(_compared(model, role)(*call.args, **call.kwargs)))
                    if sum(output.nbytes for output in outputs) > _KEPT_OUTPUT_BYTES:
                        break
                held_out = held_out[: len(outputs)]
        loaded.release("")
        release_freed_memory()
    return Baseline(role, tuple(held_out), windows_NL, source, measured, tuple(outputs), dtype)


def quality(baseline: Baseline, engine: Engine | None, packed: nn.Module | None) -> Metric | None:
    """The quality before and after; None where nothing was held out.

    Args:
        baseline: from `measure_before`.
        engine: the engine with the result, if it runs it.
        packed: otherwise the result in torch.
    """
    if not baseline.held_out:
        return None
    if baseline.role == "decoder" and baseline.windows_NL is not None:
        if engine is not None:
            scorer, words = engine_scorer(engine), ENGINE
        else:
            assert packed is not None
            scorer, words = module_scorer(packed), "torch with packed layers"
        note = f"held-out windows of {baseline.source}; after compression, {words}"
        return compare(baseline.perplexity, _perplexity(scorer, baseline.windows_NL, note))
    similarities: list[float] = []
    for call, before in zip(baseline.held_out, baseline.outputs, strict=True):
        after = _output_after(call, baseline.role, engine, packed)
        similarities.extend(_cosines(before, after, pooled=baseline.role == "encoder"))
    values = np.array(similarities)
    what = "mean-pooled embeddings" if baseline.role == "encoder" else "outputs"
    how = (
        f"mean cosine similarity of the {what} before and after, {len(values)} held-out inputs from {baseline.source}; "
        f"before: torch {_name(baseline.dtype)}; spread: the least and the most similar input"
    )
    spread = Spread(float(values.mean()), float(values.min()), float(values.max()), len(values))
    same, found = (1.0,) * len(values), tuple(map(float, values))
    return compare(
        Measurement("fidelity", "", True, exact(1.0), how, same), Measurement("fidelity", "", True, spread, how, found)
    )


def _output_after(call: Call, role: Role, engine: Engine | None, packed: nn.Module | None) -> Tensor:
    if engine is not None:
        ids_BL = call.kwargs["input_ids"].numpy()
        return torch.from_numpy(engine.hidden_states(ids_BL, np.ones_like(ids_BL)))
    assert packed is not None
    with calibration_mode(packed), without_cache(packed):
        return _main_output(_compared(packed, role)(*call.args, **call.kwargs))


def _compared(model: nn.Module, role: Role) -> nn.Module:
    """The part whose outputs are compared: of an encoder the encoder itself, without the head of a task."""
    part = getattr(model, str(getattr(model, "base_model_prefix", "")), model) if role == "encoder" else model
    assert isinstance(part, nn.Module)
    return part


def _cosines(before: Tensor, after: Tensor, *, pooled: bool) -> list[float]:
    if pooled and before.ndim == 3:
        before, after = before.mean(1), after.mean(1)
    if before.ndim < 2:
        before, after = before.reshape(1, -1), after.reshape(1, -1)
    cosine = nn.functional.cosine_similarity(before.flatten(1), after.flatten(1), dim=1)
    return [float(value) for value in cosine]


def _perplexity(scorer: Scorer, windows_NL: Tensor, note: str) -> Measurement:
    return perplexity(scorer, windows_NL.flatten().numpy(), window=windows_NL.shape[1], note=note)


def _main_output(output: Any) -> Tensor:
    """The first tensor of whatever a model returns, in float32."""
    if isinstance(output, Tensor):
        return output.detach().float()
    values = output.values() if isinstance(output, Mapping) else output
    for value in values:
        if isinstance(value, Tensor):
            return value.detach().float()
    raise UnsupportedModelError(type(output).__name__, "an output without a tensor")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
