"""Logits and hidden states of every family against transformers in float32."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rarefy.core.errors import DamagedFileError, UnsupportedModelError
from rarefy.engine import FAMILIES, Engine

Models = Callable[[str], Any]  # name -> TinyModel of conftest.py


def tokens_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 97, length).tolist()


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    assert difference <= tolerance, difference  # fails for NaN


def expected_logits(tiny: Any, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return tiny.model(torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize("length", [1, 90])
def test_logits(tiny_models: Models, decoder: str, length: int) -> None:
    tiny = tiny_models(decoder)
    tokens = tokens_of(length)
    assert_close(Engine(tiny.path).logits(tokens), expected_logits(tiny, tokens))


def test_cache_gives_the_same_as_the_whole_prompt(tiny_models: Models, decoder: str) -> None:
    engine, tokens = Engine(tiny_models(decoder).path), tokens_of(140)
    whole = engine.logits(tokens)
    stepwise = [engine.prefill(tokens[:60]), *(engine.decode_step(token) for token in tokens[60:])]
    assert_close(np.stack(stepwise), whole[59:])


@pytest.mark.parametrize("isa", ["numpy", "reference", "avx2"])
@pytest.mark.parametrize("name", ["llama-biases", "qwen2-window", "gemma3", "bert", "distilbert"])
def test_every_instruction_set(tiny_models: Models, name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_models(name).path
    tokens = tokens_of(50)

    def run() -> np.ndarray:
        engine = Engine(path)
        return engine.logits(tokens) if engine.kind == "decoder" else engine.hidden_states([tokens])

    fastest = run()
    monkeypatch.setenv("RAREFY_ISA", isa)
    assert_close(run(), fastest)


def test_a_long_prompt_goes_through_in_chunks(tiny_models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, tokens = Engine(tiny_models("mistral-window").path), tokens_of(200)
    whole = engine.logits(tokens)
    monkeypatch.setattr("rarefy.engine.engine._PROMPT_CHUNK", 64)
    assert_close(engine.logits(tokens), whole)
    assert_close(engine.prefill(tokens), whole[-1])


@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
def test_hidden_states(tiny_models: Models, encoder: str, padding: str) -> None:
    tiny = tiny_models(encoder)
    random = np.random.default_rng(1)
    tokens_BL = random.integers(0, 97, (3, 37))
    lengths = np.array([[37], [20], [1]])
    columns = np.arange(37)[None, :]
    mask_BL = {
        "none": np.ones((3, 37), bool),
        "right": columns < lengths,
        "left": columns >= 37 - lengths,
        "holes": random.random((3, 37)) < 0.7,
    }[padding]
    types_BL = (tokens_BL % 2) if encoder.startswith("bert") else None
    arguments = {} if types_BL is None else {"token_type_ids": torch.from_numpy(types_BL)}
    with torch.no_grad():
        expected = tiny.model.base_model(
            torch.from_numpy(tokens_BL), attention_mask=torch.from_numpy(mask_BL).long(), **arguments
        ).last_hidden_state.numpy()
    found = Engine(tiny.path).hidden_states(tokens_BL, mask_BL.astype(np.int64), types_BL)
    assert_close(found[mask_BL], expected[mask_BL])
    assert not found[~mask_BL].any()


def changed(tiny: Any, target: Path, **values: object) -> Path:
    """Copy a tiny model with another configuration; None removes a key."""
    config = json.loads((tiny.path / "config.json").read_text())
    config = {key: value for key, value in {**config, **values}.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    (target / "model.safetensors").write_bytes((tiny.path / "model.safetensors").read_bytes())
    return target


@pytest.mark.parametrize("name", ["llama-linear-rope", "llama-llama3-rope", "qwen2"])
def test_rope_in_the_old_style(tiny_models: Models, name: str, tmp_path: Path) -> None:
    tiny, tokens = tiny_models(name), tokens_of(90)
    rope = dict(json.loads((tiny.path / "config.json").read_text())["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    scaling = None if kind == "default" else {"type": kind, **rope}
    old = changed(tiny, tmp_path, rope_parameters=None, rope_theta=theta, rope_scaling=scaling)
    assert_close(Engine(old).logits(tokens), expected_logits(tiny, tokens))


def test_gemma3_rope_in_the_old_style(tiny_models: Models, tmp_path: Path) -> None:
    tiny, tokens = tiny_models("gemma3"), tokens_of(90)
    old = changed(tiny, tmp_path, rope_parameters=None, rope_theta=1_000_000.0, rope_local_base_freq=10_000.0)
    assert_close(Engine(old).logits(tokens), expected_logits(tiny, tokens))
    other = changed(tiny, tmp_path, rope_parameters=None, rope_theta=1_000_000.0, rope_local_base_freq=50.0)
    assert np.abs(Engine(other).logits(tokens) - expected_logits(tiny, tokens)).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "hidden_act", "quick_gelu"),
        ("llama", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
        ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("llama", "rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("llama", "partial_rotary_factor", 0.25),
        ("llama", "num_key_value_heads", 4),
        ("llama", "architectures", ["GPT2LMHeadModel"]),
        ("llama", "architectures", None),
        ("llama", "quantization_config", {"quant_method": "gptq"}),
        ("qwen2", "layer_types", ["full_attention", "linear_attention"]),
        ("qwen2", "layer_types", ["full_attention", "sliding_attention"]),
        ("gemma3", "final_logit_softcapping", 30.0),
        ("gemma3", "attn_logit_softcapping", 50.0),
        ("gemma3", "use_bidirectional_attention", True),
        ("gemma3", "rope_parameters", {"rope_type": "default", "rope_theta": 1e4}),
        ("bert", "position_embedding_type", "relative_key"),
        ("bert", "is_decoder", True),
        ("distilbert", "activation", "mish"),
    ],
)
def test_what_is_not_implemented_is_refused(
    tiny_models: Models, tmp_path: Path, name: str, key: str, value: object
) -> None:
    extra = {"rope_parameters": None} if key == "rope_scaling" else {}
    path = changed(tiny_models(name), tmp_path, **{key: value}, **extra)
    with pytest.raises(UnsupportedModelError) as error:
        Engine(path)
    assert key in str(error.value)
    assert error.value.allowed


def test_unknown_architecture_names_what_is_supported(tiny_models: Models, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        Engine(changed(tiny_models("llama"), tmp_path, architectures=["WhisperForConditionalGeneration"]))
    assert all(name in str(error.value) for name in FAMILIES)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "hidden_size", "48"),
        ("llama", "hidden_size", None),
        ("llama", "num_hidden_layers", 0),
        ("llama", "num_hidden_layers", 3),
        ("llama", "intermediate_size", 81),
        ("llama", "rms_norm_eps", -1.0),
        ("llama", "vocab_size", True),
        ("llama", "mlp_bias", True),
        ("llama", "tie_word_embeddings", "yes"),
        ("bert", "max_position_embeddings", 65),
        ("bert", "hidden_size", 45),
    ],
)
def test_a_configuration_that_contradicts_the_weights(
    tiny_models: Models, tmp_path: Path, name: str, key: str, value: object
) -> None:
    with pytest.raises(DamagedFileError) as error:
        Engine(changed(tiny_models(name), tmp_path, **{key: value}))
    assert str(tmp_path) in str(error.value)


def test_weights_that_are_not_finite_are_refused(tiny_models: Models, tmp_path: Path) -> None:
    tiny = tiny_models("llama")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"):
        broken = type(tiny.model)(tiny.model.config)
        broken.load_state_dict(tiny.model.state_dict())
        with torch.no_grad():
            broken.get_parameter(name).view(-1)[3] = torch.nan
        broken.save_pretrained(tmp_path)
        with pytest.raises(DamagedFileError, match=name.removesuffix(".weight")):
            Engine(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits(tiny_models: Models, tmp_path: Path, dtype: torch.dtype) -> None:
    tiny, tokens = tiny_models("llama-tied"), tokens_of(40)
    half = type(tiny.model)(tiny.model.config).to(dtype)
    half.load_state_dict(tiny.model.state_dict())
    half.save_pretrained(tmp_path)
    engine, full_engine = Engine(tmp_path), Engine(tiny.path)
    widened = type(tiny.model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    if dtype == torch.bfloat16:  # its weights meet activations of their kind
        for module in widened.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda _, arguments: (arguments[0].bfloat16().float(),))
    # Where a value lies between two numbers of bfloat16, the last bit of float32 decides.
    tolerance = 2e-3 if dtype == torch.bfloat16 else 1e-4
    assert_close(engine.logits(tokens), expected_logits(SimpleNamespace(model=widened), tokens), tolerance)
    if dtype == torch.bfloat16:
        assert engine.nbytes < 0.6 * full_engine.nbytes


def test_nbytes_counts_the_weights(tiny_models: Models) -> None:
    for name in ("llama-tied", "llama", "gemma3", "bert"):
        tiny = tiny_models(name)
        used = sum(p.numel() for n, p in tiny.model.named_parameters() if "pooler" not in n)
        # kernels may pad rows, and do pad these tiny ones
        assert 4 * used <= Engine(tiny.path).nbytes < 8 * used
