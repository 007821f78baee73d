"""The attention that loaded models run: the engine's where the mask allows it, sdpa's everywhere else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from rarefy import Engine
from rarefy.nn import attention

Write = Callable[..., Any]
TinyModel = Callable[[str], Any]
Loaded = Callable[..., Any]


@pytest.fixture
def load(tmp_path: Path, tiny_model: TinyModel, write_compressed: Write) -> Loaded:
    """Load a family with its embedding, head and linear layers in a format; it is written once."""

    def choose(format_name: str) -> Callable[[str, nn.Module], str | None]:
        dense = f"dense-{format_name.split('-')[1]}-v1"
        return lambda name, module: (
            dense if name.endswith(("embed_tokens", "word_embeddings"))
            else format_name if type(module) is nn.Linear else None
        )  # fmt: skip

    def load(family: str, format_name: str = "nm-bf16-v1", **options: Any) -> Any:
        path = tmp_path / f"{family}-{format_name}"
        if not path.exists():
            tied = {"lm_head": "model.embed_tokens"} if family in ("llama", "qwen2", "gemma3") else {}
            write_compressed(path, tiny_model(family), choose(format_name), tied=tied)
        auto = transformers.AutoModel if family in ("bert", "albert") else transformers.AutoModelForCausalLM
        model = auto.from_pretrained(path, **options)
        model.rarefy_path = path
        return model

    return load


@pytest.fixture
def by_sdpa(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shapes of the queries that go to sdpa."""
    calls: list[Any] = []
    inner = attention.sdpa_attention_forward

    def counted(module: nn.Module, query: Tensor, *others: Any, **named: Any) -> Any:
        calls.append(tuple(query.shape))
        return inner(module, query, *others, **named)

    monkeypatch.setattr(attention, "sdpa_attention_forward", counted)
    return calls


def tokens_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, 96, length).tolist()


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def padded(lengths: list[int], side: str) -> tuple[Tensor, Tensor]:
    ids, mask = torch.zeros(len(lengths), max(lengths), dtype=torch.int64), torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(max(lengths) - length, None)
        ids[row, place], mask[row, place] = torch.tensor(tokens_of(length, row)), 1
    return ids, mask.long()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2-window", "gemma3"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("format_name", ["nm-bf16-v1", "dense-int4-v1"])
@torch.no_grad()
def test_a_padded_batch(load: Loaded, by_sdpa: list[Any], family: str, side: str, format_name: str) -> None:
    """Sequences of a batch get the logits that the engine gives them alone, and padding those of sdpa."""
    model = load(family, format_name)
    ids, mask = padded([30, 17, 1], side)
    got = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    engine = Engine(model.rarefy_path)
    for row, length in enumerate([30, 17, 1]):
        assert np.array_equal(got[row][mask[row] == 1].numpy(), engine.logits(tokens_of(length, row)))
    assert torch.isfinite(got).all()
    assert by_sdpa
    assert all(shape[0] == 1 and shape[2] in (13, 29) for shape in by_sdpa)
    if format_name == "nm-bf16-v1":
        plain = load(family, format_name, attn_implementation="sdpa")
        expected = plain(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        # float32 sums in another order, in layers whose condition is that of a random matrix
        assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("cache", [None, "static", "dynamic"])
def test_generate(load: Loaded, by_sdpa: list[Any], family: str, cache: str | None) -> None:
    model = load(family, "dense-int4-v1")
    ids, mask = padded([30, 17], "left")
    new = model.generate(
        ids, attention_mask=mask, max_new_tokens=20, min_new_tokens=20, do_sample=False, cache_implementation=cache
    )
    engine = Engine(model.rarefy_path)
    for row, length in enumerate([30, 17]):
        logits, found = engine.prefill(tokens_of(length, row)), []
        for _ in range(20):
            logits[model.generation_config.eos_token_id or []] = -np.inf
            found.append(int(logits.argmax()))
            logits = engine.decode_step(found[-1])
        assert new[row, 30:].tolist() == found
    assert {shape[2] for shape in by_sdpa} == {13}  # the padding of the prompt alone


def test_beams_and_samples(load: Loaded) -> None:
    ids = torch.tensor([tokens_of(12)])
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "num_beams": 3}
    got, expected = (load("llama", attn_implementation=choice).generate(ids, **options) for choice in (None, "sdpa"))
    assert torch.equal(got, expected)


def custom_masks(length: int) -> dict[str, Tensor]:
    triangle = torch.ones(length, length, dtype=torch.bool).tril()
    hole, ahead, prefix, block = triangle.clone(), triangle.clone(), triangle.clone(), triangle.clone()
    hole[9, 4], ahead[5, 6], prefix[:4, :4] = False, True, True
    block[10:, :10] = False  # two packed sequences
    wide = triangle & ~torch.ones(length, length, dtype=torch.bool).tril(-7)
    narrow = wide.clone()
    narrow[12] &= torch.arange(length) > 8  # a window that is not the same for all
    masks = {"hole": hole, "ahead": ahead, "prefix": prefix, "block": block, "narrow": narrow, "wide": wide}
    return {name: mask[None, None] for name, mask in masks.items()}


@pytest.mark.parametrize("kind", ["hole", "ahead", "prefix", "block", "narrow", "wide", "float"])
@torch.no_grad()
def test_a_mask_of_another_kind_goes_to_sdpa(load: Loaded, by_sdpa: list[Any], kind: str) -> None:
    ids = torch.tensor([tokens_of(20)])
    triangle = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    as_float = torch.zeros(1, 1, 20, 20).masked_fill(~triangle, -torch.inf)
    mask = as_float if kind == "float" else custom_masks(20)[kind]
    model, plain = load("llama"), load("llama", attn_implementation="sdpa")
    got = model(ids, attention_mask=mask).logits
    # every layer, whole (queries past the end of the first of two packed sequences alone)
    assert by_sdpa
    assert all(shape[2] == 20 for shape in by_sdpa)
    assert relative(got, plain(ids, attention_mask=mask).logits) < 1e-5
    by_sdpa.clear()
    model(ids, attention_mask=triangle)
    assert not by_sdpa


@pytest.mark.parametrize("holes", [False, True])
@torch.no_grad()
def test_encoders_compute_padding_by_sdpa(load: Loaded, by_sdpa: list[Any], holes: bool) -> None:
    model, plain = load("bert"), load("bert", attn_implementation="sdpa")
    ids, mask = padded([12, 9, 5], "right")
    if holes:
        mask[0, 3] = mask[2, 1] = 0
    got = model(ids, attention_mask=mask)[0]
    assert {shape[2] for shape in by_sdpa} == ({1, 3, 8} if holes else {3, 7})
    assert relative(got, plain(ids, attention_mask=mask)[0]) < 1e-5
    by_sdpa.clear()
    assert relative(model(ids)[0], plain(ids)[0]) < 1e-5
    assert not by_sdpa


@torch.no_grad()
def test_a_mask_changed_in_place_is_looked_at_again(load: Loaded) -> None:
    model = load("llama")
    layer = model.model.layers[0].self_attn
    q, k = torch.randn(1, 4, 6, 12), torch.randn(1, 2, 6, 12)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    before, _ = attention.attention_forward(layer, q, k, k, mask)
    mask[0, 0, 5, 0] = False
    after, _ = attention.attention_forward(layer, q, k, k, mask)
    assert not torch.equal(before[:, 5], after[:, 5])
    expected, _ = attention.sdpa_attention_forward(layer, q, k, k, mask)
    assert relative(after, expected) < 1e-6


@pytest.mark.parametrize(
    "options",
    [{"softcap": 3.0}, {"position_bias": torch.ones(1, 4, 6, 6)}, {"dropout": 0.5}, {"output_attentions": True}],
)
@torch.no_grad()
def test_what_the_operation_does_not_know_goes_to_sdpa(
    load: Loaded, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *_, **named: seen.append(named) or ("sdpa", None))
    layer = load("llama").model.layers[0].self_attn
    q, k = torch.randn(1, 4, 6, 12), torch.randn(1, 2, 6, 12)
    assert attention.attention_forward(layer, q, k, k, None, **options) == ("sdpa", None)
    assert options.items() <= seen[0].items()
    for other in (q.double(), q[:, :3], torch.randn(1, 4, 7, 12)):  # dtype, heads, more queries than keys
        assert attention.attention_forward(layer, other, k.to(other.dtype), k.to(other.dtype), None)[0] == "sdpa"
    with torch.enable_grad():
        assert attention.attention_forward(layer, q.clone().requires_grad_(), k, k, None)[0] == "sdpa"
    assert attention.attention_forward(layer, q, k, k, None)[0] is not "sdpa"  # noqa: F632


@pytest.mark.parametrize("choice", ["eager", "sdpa"])
def test_the_users_choice_counts(load: Loaded, choice: str, token_ids: Tensor) -> None:
    model = load("llama", attn_implementation=choice)
    assert model.config._attn_implementation == choice
    with torch.no_grad():
        attentions = model(token_ids, output_attentions=True).attentions if choice == "eager" else None
        assert attentions is None or attentions[0].shape == (2, 4, 11, 11)
        assert relative(load("llama")(token_ids).logits, model(token_ids).logits) < 1e-5


def test_a_model_with_another_kind_of_attention_keeps_it(
    tmp_path: Path, tiny_model: TinyModel, write_compressed: Write, linear_only: Callable[[str], Any]
) -> None:
    write_compressed(tmp_path / "t5", tiny_model("t5"), linear_only("nm-bf16-v1"))
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5")
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_hidden_states_and_the_saved_configuration(load: Loaded, tmp_path: Path, token_ids: Tensor) -> None:
    model = load("llama", "dense-int4-v1")
    output = model(token_ids, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    model.save_pretrained(tmp_path / "again")
    assert "rarefy" not in (tmp_path / "again" / "config.json").read_text().replace('"quant_method": "rarefy"', "")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(token_ids).logits, output.logits)
    assert np.array_equal(Engine(tmp_path / "again").logits(token_ids[0].tolist()), output.logits[0].numpy())
    with torch.inference_mode():
        assert torch.equal(model(token_ids).logits, output.logits)
        ids, mask = padded([9, 4], "left")
        inferred = model(ids, attention_mask=mask).logits
    assert torch.equal(model(ids, attention_mask=mask).logits, inferred)
