"""The contestants run in processes of their own, so these tests start a few."""

from pathlib import Path

import pytest

from rarefy.core.errors import RarefyError, UnsupportedModelError, UsageError
from rarefy.core.results import Spread
from rarefy.measure.bench import _labels, bench
from rarefy.measure.worker import Worker


def test_decoders_side_by_side(tiny_llama_dir: Path) -> None:
    calls: list[tuple[int, int]] = []
    rows = bench(
        [tiny_llama_dir],
        runtimes=("engine", "transformers-float32"),
        prompt_tokens=16,
        decode_tokens=4,
        rounds=2,
        num_threads=1,
        progress=lambda *a: calls.append(a),
    )
    assert calls[-1] == (6, 6)
    assert [row["runtime"] for row in rows] == ["engine", "transformers-float32"]
    for row in rows:
        assert row["kind"] == "decoder"
        assert row["disk_bytes"] == (tiny_llama_dir / "model.safetensors").stat().st_size
        for key in ("prompt_tokens_per_s", "decode_tokens_per_s"):
            spread = Spread.from_json(row[key])
            assert 0 < spread.low <= spread.median <= spread.high
            assert spread.num_runs == 2
        assert "a prompt of 16 tokens, then 4 tokens one by one; 1 threads" in row["how"]
    # The engine's process has no torch in it.
    assert 20e6 < rows[0]["peak_memory_bytes"] < 120e6 < rows[1]["peak_memory_bytes"]


def test_a_model_can_be_timed_against_itself(tiny_llama_dir: Path) -> None:
    rows = bench([tiny_llama_dir] * 3, runtimes=("engine", "engine"), prompt_tokens=4, decode_tokens=1, rounds=1)
    assert [row["name"] for row in rows] == ["llama (engine)", "llama (2) (engine)", "llama (3) (engine)"]
    assert all(row["decode_tokens_per_s"]["num_runs"] == 1 for row in rows)


def test_models_of_one_name_are_told_apart_by_their_paths() -> None:
    assert _labels(["a/model", Path("b/model"), "b/model", "c"]) == ["a/model", "b/model", "b/model (2)", "c"]
    assert _labels(["x", "x", "x (2)"]) == ["x", "x (2)", "x (2) (2)"]


def test_encoders_and_errors(tiny_bert_dir: Path, tmp_path: Path) -> None:
    rows = bench([tiny_bert_dir], runtimes=("engine",), prompt_tokens=8, batch_size=2, rounds=1, warmup=0)
    assert [row["kind"] for row in rows] == ["encoder"]
    assert rows[0]["sequences_per_s"]["median"] > 0
    (tmp_path / "config.json").write_text('{"model_type": "mystery", "architectures": ["Mystery"]}')
    with pytest.raises(RarefyError):
        bench([tmp_path], runtimes=("engine",))


def test_a_round_that_fails_is_an_error_with_the_contestants_name(tiny_bert_dir: Path) -> None:
    with Worker("tiny", tiny_bert_dir, "engine") as worker:
        worker.set_decoding([1, 2], 1)
        with pytest.raises(RarefyError, match=r"tiny: .*an encoder"):
            worker.run()
        worker.set_encoding([[1, 2]])
        assert worker.run()["encode"] > 0
        worker._process.kill()
        with pytest.raises(RarefyError, match="its process ended with code -9"):
            worker.run()


def test_wrong_requests(tiny_llama_dir: Path) -> None:
    with pytest.raises(UsageError, match="runtime: 'onnx'"):
        bench([tiny_llama_dir], runtimes=("onnx",))
    with pytest.raises(UsageError, match="decode-tokens: 0"):
        bench([tiny_llama_dir], decode_tokens=0)
    with pytest.raises(UsageError, match="models: kinds none"):
        bench([])
    assert issubclass(UnsupportedModelError, UsageError)
