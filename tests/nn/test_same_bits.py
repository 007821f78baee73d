"""`from_pretrained` and the engine give the same bits, on every layout and instruction set."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from rarefy import Engine
from rarefy.kernels import detect_cpu
from rarefy.kernels.dispatch import runnable_isas
from rarefy.kernels.extension import extension_status
from rarefy.layouts import FORMATS

Write = Callable[..., Any]
TinyModel = Callable[[str], Any]

DECODERS = {
    "llama": {"lm_head": "model.embed_tokens"},
    "llama-untied": {},
    "mistral": {},
    "qwen2": {"lm_head": "model.embed_tokens"},
    "qwen2-window": {},
    "gemma3": {"lm_head": "model.embed_tokens"},
}
ENCODERS = ("bert", "distilbert")
ISAS = runnable_isas(detect_cpu()) if extension_status()[0] else ("numpy",)
FEW_FORMATS = ["bitmask-bf16-v1", "dense-int8-v1", "nm-int4-v1"]


def everything(format_name: str) -> Callable[[str, nn.Module], str | None]:
    """Every linear layer in the given format, and the embedding of words."""

    def choose(name: str, module: nn.Module) -> str | None:
        chosen = name.endswith(("embed_tokens", "word_embeddings")) or type(module) is nn.Linear
        return format_name if chosen else None

    return choose


@pytest.fixture
def load(tmp_path: Path, tiny_model: TinyModel, write_compressed: Write) -> Callable[..., tuple[Any, Engine]]:
    """Write a family in a format; return what transformers and the engine make of it."""

    def load(family: str, format_name: str, **options: Any) -> tuple[Any, Engine]:
        tied = DECODERS.get(family, {})
        write_compressed(tmp_path / "out", tiny_model(family), everything(format_name), tied=tied)
        auto = transformers.AutoModel if family in ENCODERS else transformers.AutoModelForCausalLM
        return auto.from_pretrained(tmp_path / "out", **options), Engine(tmp_path / "out")

    return load


def tokens_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, 96, length).tolist()


@torch.no_grad()
def check_decoder(model: Any, engine: Engine, tokens: list[int], num_steps: int) -> None:
    """Compare a whole prompt, a prompt and steps with a cache, and a prompt in two chunks."""
    assert np.array_equal(model(torch.tensor([tokens])).logits[0].numpy(), engine.logits(tokens))
    prompt, rest = tokens[:-num_steps], tokens[-num_steps:]
    output = model(torch.tensor([prompt]), use_cache=True)
    assert np.array_equal(output.logits[0, -1].numpy(), engine.prefill(prompt))
    for token in rest:
        output = model(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
        assert np.array_equal(output.logits[0, -1].numpy(), engine.decode_step(token))
    middle = len(tokens) // 3
    first = model(torch.tensor([tokens[:middle]]), use_cache=True)
    second = model(torch.tensor([tokens[middle:]]), past_key_values=first.past_key_values)
    both = torch.cat([first.logits, second.logits], dim=1)[0]
    assert np.array_equal(both.numpy(), engine.logits(tokens))


@pytest.mark.parametrize("family", sorted(DECODERS))
@pytest.mark.parametrize("format_name", sorted(FORMATS))
def test_decoders(load: Callable[..., tuple[Any, Engine]], family: str, format_name: str) -> None:
    check_decoder(*load(family, format_name), tokens_of(40), 6)


@pytest.mark.parametrize("family", ["mistral", "qwen2-window"])
@pytest.mark.parametrize("length", [200, 513, 600])
def test_long_prompts_and_windows_that_have_moved_on(
    load: Callable[..., tuple[Any, Engine]], family: str, length: int
) -> None:
    """Windows begin inside blocks of keys; the engine takes prompts in pieces of 512."""
    check_decoder(*load(family, "dense-int4-v1"), tokens_of(length), 70)


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("format_name", sorted(FORMATS))
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_encoders(load: Callable[..., tuple[Any, Engine]], family: str, format_name: str, padding: str) -> None:
    model, engine = load(family, format_name)
    tokens_BL = np.array([tokens_of(37, seed) for seed in range(3)])
    lengths, columns = np.array([[37], [20], [1]]), np.arange(37)[None, :]
    mask_BL = {"none": columns < 37, "right": columns < lengths, "left": columns >= 37 - lengths}[padding]
    mask_BL = np.broadcast_to(mask_BL, (3, 37))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens_BL), attention_mask=torch.tensor(mask_BL).long())[0].numpy()
    found = engine.hidden_states(tokens_BL, mask_BL.astype(np.int64))
    assert np.array_equal(found[mask_BL], expected[mask_BL])
    assert np.isfinite(expected).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format_name", FEW_FORMATS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "bert"])
def test_every_instruction_set(
    load: Callable[..., tuple[Any, Engine]], family: str, format_name: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAREFY_ISA", isa)
    model, engine = load(family, format_name)
    tokens = tokens_of(30)
    with torch.no_grad():
        got = model(torch.tensor([tokens]))[0][0].numpy()
    assert np.array_equal(got, engine.logits(tokens) if family != "bert" else engine.hidden_states([tokens])[0])
