"""Speed before and after, by the runtimes that users have: the better of transformers float32 and bfloat16 before, and
after it the engine where it knows the model, torch with packed layers elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import nn

from rarefy.calibrate.calls import Call, calibration_mode
from rarefy.calibrate.inputs import without_cache
from rarefy.calibrate.precision import cast_parameters
from rarefy.core.results import Metric
from rarefy.engine import Engine
from rarefy.measure.latency import Contestant, Timings, interleave
from rarefy.measure.module_runner import ModuleRunner
from rarefy.measure.runners import EngineRunner, Runner
from rarefy.measure.worker import Worker
from rarefy.models.loaded import LoadedModel
from rarefy.models.memory import release_freed_memory
from rarefy.models.positions import num_positions
from rarefy.verdict.quality import ENGINE, Baseline, Role

_ROUNDS = 3
_PROMPT_TOKENS = 128
_DECODE_TOKENS = 16
_ENCODE_BATCH = 8
_DTYPES = ("bfloat16", "float32")
_CLEARLY_SLOWER = 1.5


@contextmanager
def original(loaded: LoadedModel, baseline: Baseline) -> Iterator[Worker | None]:
    """The original in a process of its own, which loads it meanwhile; None for what cannot be loaded by a path.

    Such a process has the user's environment: torch's threads and ours would take the processor from each other, and
    the command line makes torch's wait in a way that suits ours and costs torch a third of its speed.
    """
    if baseline.role == "other" or loaded.kind == "module":
        yield None
        return
    with Worker("before", loaded.path, "transformers-float32", wait=False) as before:
        yield before


def speed(
    loaded: LoadedModel,
    baseline: Baseline,
    before: Worker | None,
    engine: Engine | None,
    packed: nn.Module | None,
) -> list[Metric]:
    """Interleaved rounds of the result and of the original, in bfloat16 and in float32; the better one counts.

    Args:
        loaded: the original; what it holds has its shapes, if not its weights.
        baseline: from `measure_before`.
        before: from `original`.
        engine: the engine with the result, if it runs it.
        packed: otherwise the result in torch.
    """
    after: Runner | None = None
    if baseline.role != "other":
        after = EngineRunner(engine) if engine is not None else ModuleRunner(packed)
    elif not baseline.held_out or packed is None:
        return []
    length = _prompt_tokens(loaded.model, baseline.role)
    where = "in one process"
    if after is None:
        assert packed is not None
        rounds = {"float32": _call_rounds(loaded, baseline.held_out[0], packed)}
    else:
        shape = (_ENCODE_BATCH, length)
        tokens = np.random.default_rng(0).integers(0, after.vocabulary_size, size=shape).tolist()
        if before is None:
            rounds = _module_rounds(loaded, baseline.role, after, tokens)
        else:
            rounds = _process_rounds(before, baseline.role, after, tokens)
            where = "the original in a process of its own"
    metrics = []
    for phase, (name, units, words) in _phases(baseline.role, length).items():
        best = max(rounds, key=lambda dtype: rounds[dtype].rate("before", phase, units).median)
        how = (
            f"{words}; {_ROUNDS} interleaved rounds after 1 for warm-up, {where}; before: torch {best}"
            f"{'' if after is None else ', the better of bfloat16 and float32'}; after: "
            f"{'torch with packed layers' if engine is None else ENGINE}"
        )
        was, result = (rounds[best].rate(side, phase, units) for side in ("before", "after"))
        metrics.append(Metric(name, f"{name.removesuffix('_per_s').rpartition('_')[2]}/s", True, was, result, how))
    return metrics


def _process_rounds(before: Worker, role: Role, after: Runner, tokens: list[list[int]]) -> dict[str, Timings]:
    before.wait_until_loaded()
    if role == "decoder":
        before.set_decoding(tokens[0], _DECODE_TOKENS)
    else:
        before.set_encoding(tokens)
    contestants = before, _Contestant("after", _round_of(after, role, tokens))
    look = interleave([before], rounds=1, warmup=1)
    before.cast("bfloat16")
    rounds = {"bfloat16": _interleaved(*contestants)}
    times = {
        phase: (look.seconds("before", phase).median, rounds["bfloat16"].seconds("before", phase).median)
        for phase in _phases(role, len(tokens[0]))
    }
    # Where one look shows float32 far behind, more rounds of it would say nothing new.
    if any(float32 < _CLEARLY_SLOWER * bfloat16 for float32, bfloat16 in times.values()):
        before.cast("float32")  # the values were rounded by now; the time of a product does not depend on them
        rounds["float32"] = _interleaved(*contestants)
    return rounds


def _module_rounds(loaded: LoadedModel, role: Role, after: Runner, tokens: list[list[int]]) -> dict[str, Timings]:
    rounds: dict[str, Timings] = {}
    model = loaded.model.eval()
    for dtype in _DTYPES:
        with cast_parameters([model], getattr(torch, dtype), restore=True):
            works = (_round_of(runner, role, tokens) for runner in (ModuleRunner(model), after))
            rounds[dtype] = _interleaved(*map(_Contestant, ("before", "after"), works))
    release_freed_memory()
    return rounds


def _call_rounds(loaded: LoadedModel, call: Call, packed: nn.Module) -> Timings:
    loaded.materialize("")
    model = loaded.model.eval()
    with cast_parameters([model], torch.float32, restore=not loaded.streams):
        works = (_caller(each, call) for each in (model, packed))
        rounds = _interleaved(*map(_Contestant, ("before", "after"), works))
    loaded.release("")
    release_freed_memory()
    return rounds


def _interleaved(*contestants: Contestant) -> Timings:
    return interleave(contestants, rounds=_ROUNDS, warmup=1)


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


@final
@dataclass(frozen=True)
class _Contestant:
    """A name and a round of work."""

    name: str
    work: Callable[[], Mapping[str, float]]

    def run(self) -> Mapping[str, float]:
        """Do one round and return the seconds of its phases."""
        return self.work()


def _round_of(runner: Runner, role: Role, tokens: list[list[int]]) -> Callable[[], Mapping[str, float]]:
    if role == "decoder":
        return lambda: runner.decode(tokens[0], _DECODE_TOKENS)
    return lambda: runner.encode(tokens)


def _caller(model: nn.Module, call: Call) -> Callable[[], Mapping[str, float]]:
    def work() -> Mapping[str, float]:
        with calibration_mode(model), without_cache(model):
            start = time.perf_counter()
            model(*call.args, **call.kwargs)
            return {"call": time.perf_counter() - start}

    return work
