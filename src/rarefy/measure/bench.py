"""`rarefy bench`: several models under the runtimes that can run them, interleaved, each in a process of its own."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from rarefy.core.errors import RarefyError, UnsupportedModelError, UsageError
from rarefy.core.results import Spread
from rarefy.measure.latency import Timings, interleave
from rarefy.measure.opening import is_artifact
from rarefy.measure.runners import RUNTIMES
from rarefy.measure.size import disk_bytes
from rarefy.measure.worker import Worker


def bench(
    models: Sequence[str | Path],
    *,
    runtimes: Sequence[str] | None = None,
    prompt_tokens: int = 128,
    decode_tokens: int = 32,
    batch_size: int = 8,
    rounds: int = 5,
    warmup: int = 1,
    num_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Time models side by side.

    Args:
        models: artifacts, Hugging Face directories or GGUF files; one that is given twice competes with itself, and the
            difference between the two is the noise of the measurement.
        runtimes: which of "engine", "transformers-float32" and "transformers-bfloat16"; None for the first
            that can run an artifact, and on other models for every one that can.
        prompt_tokens: tokens of the prompt of a decoder, or of each sequence of an encoder.
        decode_tokens: tokens that a decoder generates after the prompt.
        batch_size: sequences that an encoder handles at once.
        rounds: timed rounds.
        warmup: rounds before them.
        num_threads: threads of every contestant; None for each runtime's own choice.
        progress: called with (runs done, runs in all).

    Returns:
        One row per contestant, as plain data: name, model, runtime, kind, disk_bytes, peak_memory_bytes, how, and the
        spreads prompt_tokens_per_s and decode_tokens_per_s, or sequences_per_s.

    Raises:
        UsageError: no models, decoders mixed with encoders, or a number out of range.
        RarefyError: a model cannot be loaded or gives implausible output.
    """
    for name, value in (("prompt-tokens", prompt_tokens), ("decode-tokens", decode_tokens), ("batch-size", batch_size)):
        if value < 1:
            raise UsageError(name, str(value), allowed="at least 1")
    for runtime in runtimes or ():
        if runtime not in RUNTIMES:
            raise UsageError("runtime", repr(runtime), allowed=", ".join(RUNTIMES))
    with ExitStack() as stack:
        workers: list[Worker] = []
        for model, label in zip(models, _labels(models), strict=True):
            for worker in _open(model, runtimes, num_threads, label):
                stack.callback(worker.close)
                workers.append(worker)
        kinds = {worker.kind for worker in workers}
        if len(kinds) != 1:
            raise UsageError("models", f"kinds {', '.join(sorted(kinds)) or 'none'}", allowed="one kind in one run")
        kind = kinds.pop()
        # Contestants with different vocabularies get the same tokens.
        vocabulary = min(worker.vocabulary_size for worker in workers)
        tokens = np.random.default_rng(0).integers(0, vocabulary, size=(batch_size, prompt_tokens)).tolist()
        for worker in workers:
            if kind == "decoder":
                worker.set_decoding(tokens[0], decode_tokens)
            else:
                worker.set_encoding(tokens)
        timings = interleave(workers, rounds=rounds, warmup=warmup, progress=progress)
        threads = "the runtime's own choice of threads" if num_threads is None else f"{num_threads} threads"
        if kind == "decoder":
            task = f"a prompt of {prompt_tokens} tokens, then {decode_tokens} tokens one by one"
        else:
            task = f"batches of {batch_size} sequences of {prompt_tokens} tokens"
        how = f"{task}; {threads}; {rounds} interleaved rounds after {warmup} for warm-up; one process per contestant"
        units = {"prompt": prompt_tokens, "decode": decode_tokens, "encode": batch_size}
        return [_row(worker, timings, units, how) for worker in workers]


def _row(worker: Worker, timings: Timings, units: dict[str, int], how: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": worker.name,
        "model": worker.model,
        "runtime": worker.runtime,
        "kind": worker.kind,
        "disk_bytes": _disk_bytes(worker.model),
        "peak_memory_bytes": worker.peak_memory_bytes(),
        "how": how,
    }
    phases = (
        {"prompt": "prompt_tokens_per_s", "decode": "decode_tokens_per_s"}
        if worker.kind == "decoder"
        else {"encode": "sequences_per_s"}
    )
    for phase, key in phases.items():
        spread: Spread = timings.rate(worker.name, phase, units[phase])
        row[key] = spread.to_json()
    return row


def _open(model: str | Path, runtimes: Sequence[str] | None, num_threads: int | None, label: str) -> list[Worker]:
    compressed = is_artifact(model)
    workers: list[Worker] = []
    refused: list[str] = []
    for runtime in dict.fromkeys(runtimes or RUNTIMES):
        if runtimes is None and compressed and workers:
            break  # bfloat16 around the same kernels says nothing new
        try:
            workers.append(Worker(f"{label} ({runtime})", model, runtime, num_threads=num_threads))
        except RarefyError as error:
            # Where the runtimes were not chosen by the user, one that cannot read the model is left out.
            if runtimes is not None:
                for worker in workers:
                    worker.close()
                raise
            refused.append(str(error))
    if not workers:
        raise UnsupportedModelError(str(model), "no runtime can run it: " + "; ".join(refused))
    return workers


def _labels(models: Sequence[str | Path]) -> list[str]:
    """The last part of each path, or the whole path where two models share it; a repeated one is numbered."""
    labels: list[str] = []
    for model in models:
        name = Path(model).name or str(model)
        rivals = {str(other) for other in models if (Path(other).name or str(other)) == name}
        base = name if len(rivals) == 1 else str(model)
        label, number = base, 1
        while label in labels:
            number += 1
            label = f"{base} ({number})"
        labels.append(label)
    return labels


def _disk_bytes(model: str) -> int | None:
    return int(disk_bytes(model).value.median) if Path(model).exists() else None
