"""Sentence embeddings against transformers with explicit pooling."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from rarefy.core.errors import UsageError
from rarefy.engine import Engine, TruncationWarning

TEXTS = ["a small river", "The quick fish sleeps below the old stone and grows.", "x", "", "sky " * 60]


def expected_vectors(path: Path, texts: list[str], pooling: str, max_length: int) -> np.ndarray:
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path, dtype=torch.float32)
    vectors = []
    for text in texts:  # one by one: no padding, no mask
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=max_length)
        with torch.no_grad():
            hidden_TE = model(**inputs).last_hidden_state[0]
        vectors.append((hidden_TE.mean(0) if pooling == "mean" else hidden_TE[0]).numpy())
    return np.stack(vectors)


@pytest.fixture(scope="module")
def minilm(minilm_dir: Path) -> Engine:
    return Engine(minilm_dir)


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_minilm(minilm_dir: Path, minilm: Engine, pooling: str) -> None:
    expected = expected_vectors(minilm_dir, TEXTS, pooling, 256)
    found = minilm.embed(TEXTS, pooling=pooling, normalize=False, batch_size=2)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    unit = minilm.embed(TEXTS, pooling=pooling)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(unit, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)


@pytest.mark.slow
def test_batches_do_not_change_a_vector(minilm: Engine) -> None:
    one_by_one = np.concatenate([minilm.embed(text) for text in TEXTS])
    for batch_size in (1, 2, 5, 32):
        np.testing.assert_allclose(minilm.embed(TEXTS, batch_size=batch_size), one_by_one, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_long_texts_are_cut_and_it_is_said(minilm_dir: Path, minilm: Engine) -> None:
    assert minilm.max_text_length == 256  # sentence_bert_config.json says so, the positions would allow 512
    texts = ["river " * 300, "short"]
    with pytest.warns(TruncationWarning, match="1 of 2 texts are longer than 256 tokens"):
        found = minilm.embed(texts, normalize=False)
    expected = expected_vectors(minilm_dir, texts, "mean", 256)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minilm.embed("river " * 254)


def test_the_positions_limit_the_text(tiny_bert_dir: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_bert_dir, tmp_path / "model")
    assert Engine(path).max_text_length == 128
    for found, expected in ((50, 50), (4000, 128), ("x", 128), (0, 128)):
        (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": found}))
        assert Engine(path).max_text_length == expected


def test_no_texts_and_bad_use(tiny_bert_dir: Path) -> None:
    engine = Engine(tiny_bert_dir)
    assert engine.embed([]).shape == (0, 64)
    assert engine.embed("a river").shape == (1, 64)
    for call in (
        lambda: engine.embed(""),  # this tokenizer adds no token to it
        lambda: engine.embed("a", pooling="max"),  # type: ignore[arg-type]
        lambda: engine.embed("a", batch_size=0),
        lambda: engine.hidden_states([1, 2]),
        lambda: engine.hidden_states([[1.0, 2.0]]),
        lambda: engine.hidden_states([[1, -2]]),
        lambda: engine.hidden_states([[1] * 129]),
        lambda: engine.hidden_states([[1, 2]], [[1, 1, 1]]),
        lambda: engine.hidden_states([[1, 2]], None, [[0, 9]]),
    ):
        with pytest.raises(UsageError):
            call()


def test_a_row_of_padding_alone(tiny_bert_dir: Path) -> None:
    engine = Engine(tiny_bert_dir)
    hidden = engine.hidden_states([[1, 2], [3, 4]], [[0, 0], [1, 1]])
    assert not hidden[0].any()
    np.testing.assert_allclose(hidden[1], engine.hidden_states([[3, 4]])[0], atol=1e-6)
    assert not engine.hidden_states([[1, 2]], [[0, 0]]).any()
