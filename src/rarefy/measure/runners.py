"""One model under one runtime, ready to be timed: a decoder (prompt, then token by token) or an encoder (a batch).

Legend of shape suffixes: B sequences, T tokens, V vocabulary entries.
"""

import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Literal, Protocol, final, runtime_checkable

import numpy as np

from rarefy.core.errors import UsageError
from rarefy.engine import Engine
from rarefy.measure.latency import check_output

Kind = Literal["decoder", "encoder"]
RUNTIMES = ("engine", "transformers-float32", "transformers-bfloat16")


class Runner(Protocol):
    """A loaded model."""

    @property
    def kind(self) -> Kind:
        """What it does."""

    @property
    def vocabulary_size(self) -> int:
        """How many tokens it knows."""

    def decode(self, prompt: list[int], num_tokens: int) -> Mapping[str, float]:
        """Process a prompt, then generate greedily; return the seconds of "prompt" and "decode"."""

    def encode(self, batch: list[list[int]]) -> Mapping[str, float]:
        """Encode sequences of equal length; return the seconds of "encode"."""


@runtime_checkable
class CastableRunner(Protocol):
    """A loaded model that can go on in another type."""

    def cast(self, dtype: str) -> None:
        """Compute in "float32" or "bfloat16" from now on."""


def open_runner(model: str | Path, runtime: str, *, num_threads: int | None = None) -> Runner:
    """Load a model to be timed.

    Args:
        model: artifact, Hugging Face directory or GGUF file.
        runtime: "engine", "transformers-float32" or "transformers-bfloat16".
        num_threads: threads to compute with; None for the runtime's own choice.

    Raises:
        UsageError: an unknown runtime.
        RarefyError: the model cannot be loaded.
    """
    if runtime == "engine":
        return EngineRunner(Engine(model, num_threads=num_threads))
    if runtime not in RUNTIMES:
        raise UsageError("runtime", repr(runtime), allowed=", ".join(RUNTIMES))
    # Not imported above: the engine's peak memory is measured in a process without torch.
    module = import_module("rarefy.measure.module_runner")
    runner: Runner = module.open_module_runner(model, runtime.removeprefix("transformers-"), num_threads)
    return runner


@final
class EngineRunner:
    """The torch-free engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.kind: Kind = engine.kind
        self.vocabulary_size = int(engine.config["vocab_size"])

    def decode(self, prompt: list[int], num_tokens: int) -> Mapping[str, float]:
        """Process a prompt, then generate greedily."""
        start = time.perf_counter()
        logits_V = self._engine.prefill(prompt)
        middle = time.perf_counter()
        for _ in range(num_tokens):
            logits_V = self._engine.decode_step(int(logits_V.argmax()))
        end = time.perf_counter()
        check_output("engine", logits_V)
        return {"prompt": middle - start, "decode": end - middle}

    def encode(self, batch: list[list[int]]) -> Mapping[str, float]:
        """Encode a batch."""
        ids_BT = np.array(batch, dtype=np.int64)
        start = time.perf_counter()
        hidden = self._engine.hidden_states(ids_BT, np.ones_like(ids_BT))
        end = time.perf_counter()
        check_output("engine", hidden)
        return {"encode": end - start}
