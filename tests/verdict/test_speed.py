"""Which rounds of the original count: bfloat16's, and float32's unless one look shows it far behind."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from rarefy.measure.worker import Worker
from rarefy.verdict import speed


class _Original:
    """Stands in for the process with the original: its float32 rounds take `factor` times as long."""

    name = "before"

    def __init__(self, factor: float) -> None:
        self._seconds = {"float32": 0.01 * factor, "bfloat16": 0.01}
        self._dtype = "float32"
        self.rounds: list[str] = []

    def wait_until_loaded(self) -> None:
        pass

    def set_encoding(self, batch: list[list[int]]) -> None:
        assert batch

    def cast(self, dtype: str) -> None:
        self._dtype = dtype

    def run(self) -> Mapping[str, float]:
        self.rounds.append(self._dtype)
        return {"encode": self._seconds[self._dtype]}


class _Result:
    kind = "encoder"
    vocabulary_size = 8

    def decode(self, prompt: list[int], num_tokens: int) -> Mapping[str, float]:
        raise NotImplementedError

    def encode(self, batch: list[list[int]]) -> Mapping[str, float]:
        return {"encode": 0.005}


@pytest.mark.parametrize(("factor", "timed"), [(0.5, True), (1.2, True), (2.0, False)])
def test_float32_is_timed_fully_unless_it_is_clearly_slower(factor: float, timed: bool) -> None:
    original = _Original(factor)
    rounds = speed._process_rounds(original, "encoder", _Result(), [[1, 2]])  # type: ignore[arg-type]
    assert set(rounds) == ({"float32", "bfloat16"} if timed else {"bfloat16"})
    assert original.rounds == ["float32"] * 2 + ["bfloat16"] * 4 + ["float32"] * 4 * timed
    best = max(rounds, key=lambda dtype: rounds[dtype].rate("before", "encode", 1).median)
    assert best == ("float32" if factor < 1 else "bfloat16")


def test_the_process_goes_on_in_another_type(tiny_llama_dir: Path) -> None:
    tokens = np.arange(1, 9).tolist()
    with Worker("original", tiny_llama_dir, "transformers-float32", wait=False) as worker:
        worker.wait_until_loaded()
        worker.set_decoding(tokens, 2)
        for dtype in ("bfloat16", "float32"):
            worker.cast(dtype)
            assert worker.runtime == f"transformers-{dtype}"
            assert worker.run()["decode"] > 0
