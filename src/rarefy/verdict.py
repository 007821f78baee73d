"""What a run gained and what it cost: the same measurements before and after.

Quality is judged on held-out calibration text (or examples) that no method saw; speed by the runtime that the user
would have used before (the better of transformers float32 and bfloat16) and the one they will use after (the engine
where it knows the model, torch with packed layers elsewhere). Shape suffixes: N windows, L tokens of a window.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.calibrate.collect import Call, calibration_mode
from rarefy.calibrate.inputs import cast_inputs, without_cache
from rarefy.calibrate.precision import cast_parameters
from rarefy.core.errors import UnsupportedModelError
from rarefy.core.results import Metric, Spread
from rarefy.engine import Engine
from rarefy.layouts import AnyLayout
from rarefy.measure.latency import Timings, interleave
from rarefy.measure.measurement import Measurement, compare, exact
from rarefy.measure.module_runner import ModuleRunner
from rarefy.measure.opening import is_causal_language_model
from rarefy.measure.perplexity import Scorer, engine_scorer, module_scorer, perplexity
from rarefy.measure.runners import EngineRunner, Runner
from rarefy.measure.size import disk_bytes
from rarefy.models.loaded import LoadedModel
from rarefy.models.memory import release_freed_memory
from rarefy.models.positions import num_positions
from rarefy.nn import replace_linear

Role = Literal["decoder", "encoder", "other"]

_ROUNDS = 3
_PROMPT_TOKENS = 128
_DECODE_TOKENS = 16
_ENCODE_BATCH = 8
_ENGINE = "rarefy's engine"
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
        quality: perplexity of a decoder; None for others and where nothing was held out.
        outputs: output of each held-out batch, float32, for models whose outputs are compared.
        dtype: what was computed in.
    """

    role: Role
    held_out: tuple[Call, ...]
    windows_NL: Tensor | None
    source: str
    quality: Measurement | None
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
    quality: Measurement | None = None
    outputs: list[Tensor] = []
    if held_out:
        loaded.materialize("", dtype=dtype)
        with cast_parameters([model], dtype, restore=not loaded.streams), calibration_mode(model), without_cache(model):
            if role == "decoder" and windows_NL is not None:
                note = f"held-out windows of {source}; before compression, torch {_name(dtype)}"
                quality = _perplexity(module_scorer(model), windows_NL, note)
            else:
                for call in cast_inputs(held_out, dtype):
                    outputs.append(_main_output(_compared(model, role)(*call.args, **call.kwargs)))
                    if sum(output.nbytes for output in outputs) > _KEPT_OUTPUT_BYTES:
                        break
                held_out = held_out[: len(outputs)]
        loaded.release("")
        release_freed_memory()
    return Baseline(role, tuple(held_out), windows_NL, source, quality, tuple(outputs), dtype)


def judge(
    loaded: LoadedModel,
    baseline: Baseline,
    artifact: Path,
    layouts: Mapping[str, AnyLayout],
    tied: Mapping[str, str],
    *,
    tick: Callable[[str], None],
) -> tuple[tuple[Metric, ...], tuple[str, ...]]:
    """Measure the compressed model beside the original.

    Args:
        loaded: the model; what it holds has the shapes, if not the weights, of the original.
        baseline: from `measure_before`.
        artifact: the directory with the compressed model.
        layouts: its packed layers.
        tied: alias -> layer that shares its layout.
        tick: told what is measured next.

    Returns:
        The metrics, and warnings about what could not be measured.
    """
    warnings: list[str] = []
    engine: Engine | None = None
    if baseline.role != "other":
        try:
            engine = Engine(artifact)
        except UnsupportedModelError as error:
            # The report is published; where the artifact lay while it was measured is nobody's business.
            why = str(error).replace(f"{artifact}{os.sep}", "")
            warnings.append(f"rarefy's engine does not run this model ({why}); measured with torch instead")
    metrics = [_size(loaded, artifact)]
    tick("speed")
    packed = None if engine is not None else _packed_model(loaded, layouts, tied)
    metrics.append(_weight_bytes(loaded, engine, packed, layouts))
    metrics.extend(_speed(loaded, baseline, engine, packed))
    tick("quality")
    quality = _quality(baseline, engine, packed)
    if quality is None:
        warnings.append("quality was not measured: no calibration data was left over to judge it by")
    else:
        metrics.append(quality)
    return tuple(metrics), tuple(warnings)


def _packed_model(loaded: LoadedModel, layouts: Mapping[str, AnyLayout], tied: Mapping[str, str]) -> nn.Module:
    """A copy of the model that computes with the packed layers."""
    loaded.materialize("")
    packed = copy.deepcopy(loaded.model).eval()
    loaded.release("")
    replace_linear(packed, layouts, tied)
    return packed


def _size(loaded: LoadedModel, artifact: Path) -> Metric:
    after = disk_bytes(artifact)
    if loaded.kind == "module":
        words = "weights of the module in memory"
        before = Measurement("disk_bytes", "bytes", False, exact(loaded.stored_bytes()), words)
    else:
        before = disk_bytes(loaded.path)
    return compare(before, after)


def _weight_bytes(
    loaded: LoadedModel,
    engine: Engine | None,
    packed: nn.Module | None,
    layouts: Mapping[str, AnyLayout],
) -> Metric:
    """Bytes of weights that a running model holds: transformers in float32 before, the runtime after."""
    before = sum(p.numel() for p in loaded.model.parameters()) * 4
    if engine is not None:
        after, words = engine.nbytes, _ENGINE
    else:
        assert packed is not None
        after = sum(layout.nbytes for layout in layouts.values())
        after += sum(p.numel() * p.element_size() for p in packed.parameters())
        words = "torch with packed layers"
    how = f"weights in memory; before: float32 in torch; after: {words}"
    return Metric("weight_bytes", "bytes", False, exact(before), exact(after), how)


def _speed(loaded: LoadedModel, baseline: Baseline, engine: Engine | None, packed: nn.Module | None) -> list[Metric]:
    """Interleaved rounds of the result and of the original, in bfloat16 and then in float32; the better one counts.

    One copy of the original is in memory at a time.
    """
    after: Runner | None = None
    if baseline.role != "other":
        after = EngineRunner(engine) if engine is not None else ModuleRunner(packed)
    elif not baseline.held_out or packed is None:
        return []
    length = _prompt_tokens(loaded.model, baseline.role)
    phases = _phases(baseline.role, length)
    dtypes = (torch.float32,) if after is None else (torch.bfloat16, torch.float32)
    rounds: dict[str, Timings] = {}
    for dtype in dtypes:
        loaded.materialize("", dtype=dtype)
        model = loaded.model.eval()
        with cast_parameters([model], dtype, restore=not loaded.streams):
            if after is None:
                works = [_caller(part, baseline.held_out[0]) for part in (model, packed) if part is not None]
            else:
                shape = (_ENCODE_BATCH, length)
                tokens = np.random.default_rng(0).integers(0, after.vocabulary_size, size=shape).tolist()
                work = _decoder if baseline.role == "decoder" else _encoder
                works = [work(runner, tokens) for runner in (ModuleRunner(model), after)]
            contestants = [
                _Contestant(name, round_of) for name, round_of in zip(("before", "after"), works, strict=True)
            ]
            rounds[_name(dtype)] = interleave(contestants, rounds=_ROUNDS, warmup=1)
        loaded.release("")
        release_freed_memory()
    metrics = []
    for phase, (name, units, words) in phases.items():
        best = max(rounds, key=lambda dtype: rounds[dtype].rate("before", phase, units).median)
        how = (
            f"{words}; {_ROUNDS} interleaved rounds after 1 for warm-up, in one process; before: torch {best}"
            f"{', the better of bfloat16 and float32' if len(rounds) > 1 else ''}; after: "
            f"{'torch with packed layers' if engine is None else _ENGINE}"
        )
        before, result = (rounds[best].rate(side, phase, units) for side in ("before", "after"))
        metrics.append(Metric(name, f"{name.removesuffix('_per_s').rpartition('_')[2]}/s", True, before, result, how))
    return metrics


def _phases(role: Role, length: int) -> dict[str, tuple[str, int, str]]:
    """What is timed: for each phase of a round the metric's name, how many units a round does, and words for a reader.

    Args:
        role: of the model.
        length: tokens of a prompt or sequence.
    """
    if role == "decoder":
        return {
            "prompt": ("prompt_tokens_per_s", length, f"a prompt of {length} tokens"),
            "decode": ("decode_tokens_per_s", _DECODE_TOKENS, f"{_DECODE_TOKENS} tokens one by one"),
        }
    if role == "encoder":
        words = f"batches of {_ENCODE_BATCH} sequences of {length} tokens"
        return {"encode": ("sequences_per_s", _ENCODE_BATCH, words)}
    return {"call": ("calls_per_s", 1, "calls of the model on one held-out batch")}


def _prompt_tokens(model: nn.Module, role: Role) -> int:
    """How long a prompt or sequence is timed: as long as the model has positions for."""
    limit = num_positions(model)
    return _PROMPT_TOKENS if limit is None else min(_PROMPT_TOKENS, limit - _DECODE_TOKENS * (role == "decoder"))


def _quality(baseline: Baseline, engine: Engine | None, packed: nn.Module | None) -> Metric | None:
    if not baseline.held_out:
        return None
    if baseline.role == "decoder" and baseline.windows_NL is not None:
        if engine is not None:
            scorer, words = engine_scorer(engine), _ENGINE
        else:
            assert packed is not None
            scorer, words = module_scorer(packed), "torch with packed layers"
        note = f"held-out windows of {baseline.source}; after compression, {words}"
        return compare(baseline.quality, _perplexity(scorer, baseline.windows_NL, note))
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


@final
@dataclass(frozen=True)
class _Contestant:
    """A name and a round of work."""

    name: str
    work: Callable[[], Mapping[str, float]]

    def run(self) -> Mapping[str, float]:
        """Do one round and return the seconds of its phases."""
        return self.work()


def _decoder(runner: Runner, batch: list[list[int]]) -> Callable[[], Mapping[str, float]]:
    return lambda: runner.decode(batch[0], _DECODE_TOKENS)


def _encoder(runner: Runner, batch: list[list[int]]) -> Callable[[], Mapping[str, float]]:
    return lambda: runner.encode(batch)


def _caller(model: nn.Module, call: Call) -> Callable[[], Mapping[str, float]]:
    def work() -> Mapping[str, float]:
        with calibration_mode(model), without_cache(model):
            start = time.perf_counter()
            model(*call.args, **call.kwargs)
            return {"call": time.perf_counter() - start}

    return work


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
