"""Tiny random models of every family, saved by transformers, which is the oracle of these tests."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers

torch.set_num_threads(2)

_DECODER = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_ENCODER = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "max_position_embeddings": 64,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_GEMMA = {"head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 10, "pad_token_id": 0}


def _decoder(config: type, model: type, **changes: object) -> Callable[[], transformers.PreTrainedModel]:
    return lambda: model(config(**{**_DECODER, **changes}))


def _encoder(model: type, **changes: object) -> Callable[[], transformers.PreTrainedModel]:
    return lambda: model(transformers.BertConfig(**{**_ENCODER, **changes}))


def _distilbert(model: type, **changes: object) -> Callable[[], transformers.PreTrainedModel]:
    sizes = {"vocab_size": 97, "dim": 40, "hidden_dim": 72, "n_layers": 2, "n_heads": 5, "max_position_embeddings": 64}
    return lambda: model(transformers.DistilBertConfig(**{**sizes, **changes}))


_Llama = (transformers.LlamaConfig, transformers.LlamaForCausalLM)
_Mistral = (transformers.MistralConfig, transformers.MistralForCausalLM)
_Qwen2 = (transformers.Qwen2Config, transformers.Qwen2ForCausalLM)
_Gemma3 = (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM)

DECODERS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "llama": _decoder(*_Llama),
    "llama-tied": _decoder(*_Llama, tie_word_embeddings=True),
    "llama-biases": _decoder(*_Llama, attention_bias=True, mlp_bias=True),
    "llama-no-groups": _decoder(*_Llama, num_key_value_heads=6),
    "llama-one-kv-head": _decoder(*_Llama, num_key_value_heads=1, head_dim=10),
    "llama-gelu": _decoder(*_Llama, hidden_act="gelu", rms_norm_eps=1e-3),
    "llama-linear-rope": _decoder(
        *_Llama, rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 1000.0}
    ),
    "llama-llama3-rope": _decoder(*_Llama, rope_parameters=_LLAMA3),
    "mistral": _decoder(*_Mistral, sliding_window=None),
    "mistral-window": _decoder(*_Mistral, sliding_window=5),
    "qwen2": _decoder(*_Qwen2),
    "qwen2-window": _decoder(*_Qwen2, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "gemma3": _decoder(*_Gemma3, **_GEMMA, layer_types=["sliding_attention", "full_attention"]),
    "gemma3-untied": _decoder(*_Gemma3, **_GEMMA, num_hidden_layers=6, tie_word_embeddings=False),
    "gemma3-biases": _decoder(*_Gemma3, **{**_GEMMA, "head_dim": 12}, num_key_value_heads=3, attention_bias=True),
}
ENCODERS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "bert": _encoder(transformers.BertModel),
    "bert-masked-lm": _encoder(transformers.BertForMaskedLM, hidden_act="gelu_new", layer_norm_eps=1e-5),
    "bert-classifier": _encoder(transformers.BertForSequenceClassification, hidden_act="relu", type_vocab_size=3),
    "distilbert": _distilbert(transformers.DistilBertModel),
    "distilbert-masked-lm": _distilbert(transformers.DistilBertForMaskedLM, activation="relu"),
    "distilbert-sinusoidal": _distilbert(transformers.DistilBertForTokenClassification, sinusoidal_pos_embds=True),
}


@dataclass(frozen=True)
class TinyModel:
    path: Path
    model: transformers.PreTrainedModel


def randomize(model: transformers.PreTrainedModel, seed: int) -> None:
    """Give every parameter a size that matters: fresh models have norms of 1, biases of 0 and tiny weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
        model.tie_weights()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    made: dict[str, TinyModel] = {}

    def make(name: str) -> TinyModel:
        if name not in made:
            model = {**DECODERS, **ENCODERS}[name]().float().eval()
            randomize(model, seed=len(name))
            path = tmp_path_factory.mktemp(name)
            model.save_pretrained(path)
            made[name] = TinyModel(path, model)
        return made[name]

    return make


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes `decoder` or `encoder` with the name of every tiny model of that kind."""
    for argument, names in (("decoder", DECODERS), ("encoder", ENCODERS)):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, names)
