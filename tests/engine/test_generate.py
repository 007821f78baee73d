"""Generation, streaming, sampling, chat and their faults, on a tiny Llama with a tokenizer."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from rarefy.core.errors import DamagedFileError, NonFiniteError, PathError, UnsupportedModelError, UsageError
from rarefy.engine import Engine, Sampling
from rarefy.engine.text import decoded_pieces, until_stop


@pytest.fixture(scope="module")
def engine(tiny_llama_dir: Path) -> Engine:
    return Engine(tiny_llama_dir)


def without_end(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "eos_tokens", frozenset())


def test_greedy_text_is_that_of_transformers(tiny_llama_dir: Path, engine: Engine) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    prompt = "The small river runs"
    inputs = tokenizer(prompt, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert engine.encode_prompt(prompt).tolist() == inputs["input_ids"][0].tolist()
    assert engine.generate(prompt, 30) == tokenizer.decode(expected, skip_special_tokens=True)


def test_chat_prompt_is_that_of_transformers(tiny_llama_dir: Path, engine: Engine) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    messages.append({"role": "user", "content": "a stone"})
    expected = AutoTokenizer.from_pretrained(tiny_llama_dir).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert engine.encode_prompt(messages).tolist() == expected
    assert isinstance(engine.generate(messages, 3), str)


def test_a_chat_template_in_the_tokenizer_configuration(tiny_llama_dir: Path, tmp_path: Path) -> None:
    path = copied(tiny_llama_dir, tmp_path)
    (path / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((path / "tokenizer_config.json").read_text())
    template = (
        "{% for m in messages %}{{ bos_token }}{{ m.content | tojson }}{% endfor %}{{ raise_exception('x') if 0 }}"
    )
    for value in (template, [{"name": "tools", "template": "no"}, {"name": "default", "template": template}]):
        (path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": value}))
        prompt = Engine(path).encode_prompt([{"role": "user", "content": 'a "é"'}])
        expected = Tokenizer.from_file(str(path / "tokenizer.json")).encode('<s>"a \\"é\\""', add_special_tokens=False)
        assert prompt.tolist() == expected.ids


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{{ messages[7].content }}", "{% if %}", "{{ ''.__class__.mro() }}"]
)
def test_a_bad_chat_template_is_an_error(tiny_llama_dir: Path, tmp_path: Path, template: str) -> None:
    path = copied(tiny_llama_dir, tmp_path)
    (path / "chat_template.jinja").write_text(template)
    with pytest.raises(UsageError, match="chat template"):
        Engine(path).encode_prompt([{"role": "user", "content": "a"}])


def test_no_chat_template(tiny_llama_dir: Path, tmp_path: Path) -> None:
    path = copied(tiny_llama_dir, tmp_path)
    (path / "chat_template.jinja").unlink(missing_ok=True)
    engine = Engine(path)
    assert not engine.chat_template.exists
    with pytest.raises(PathError, match="no chat template"):
        engine.generate([{"role": "user", "content": "a"}])


def test_stream_gives_the_same_text_as_decoding_at_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    without_end(engine, monkeypatch)
    tokens = list(engine.stream_tokens([3, 4, 5], 60, Sampling(temperature=2.0), seed=5))
    pieces = list(engine.stream([3, 4, 5], 60, temperature=2.0, seed=5))
    assert len(tokens) == 60
    assert "".join(pieces) == engine.tokenizer.decode(tokens)
    assert len(pieces) > 10


def byte_tokenizer() -> Tokenizer:
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語", "🙂a🙃", "ends in half: 日", ""])
def test_pieces_never_cut_a_character(text: str) -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer.encode(text).ids
    assert len(tokens) == len(text.encode())
    assert list(decoded_pieces(tokenizer, tokens, [])) == list(text)
    if tokens:
        cut = list(decoded_pieces(tokenizer, tokens[:-1], []))
        assert "".join(cut) == text.encode()[:-1].decode(errors="replace")
        assert cut[: len(text) - 1] == list(text[:-1])


def test_a_space_between_prompt_and_text_is_kept() -> None:
    vocab = {"▁a": 0, "▁b": 1, "c": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    assert "".join(decoded_pieces(tokenizer, [1, 2, 0], before=[0])) == " bc a"
    assert "".join(decoded_pieces(tokenizer, [1, 2, 0], before=[])) == "bc a"


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        (["ab", "cd"], [], "abcd"),
        (["ab", "cd"], ["bc"], "a"),
        (["a", "b", "c", "d"], ["bcx", "cd"], "ab"),
        (["ab", "ab", "ac"], ["abac"], "ab"),
        (["abcabd"], ["abd", "c"], "ab"),
        (["x", "stop"], ["stop"], "x"),
        (["sto", "xy"], ["stop"], "stoxy"),
        (["a", "sto"], ["stop"], "asto"),
    ],
)
def test_stop_strings(pieces: list[str], stop: list[str], expected: str) -> None:
    assert "".join(until_stop(pieces, stop)) == expected


def test_text_behind_a_stop_string_is_not_generated() -> None:
    drawn = []

    def pieces() -> Iterator[str]:
        for letter in "abcdef":
            drawn.append(letter)
            yield letter

    assert "".join(until_stop(pieces(), ["c"])) == "ab"
    assert drawn == ["a", "b", "c"]


def test_stop_and_end_tokens_end_the_text(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    without_end(engine, monkeypatch)
    whole = engine.generate("river", 40)
    word = whole[5:8]
    assert engine.generate("river", 40, stop=word) == whole[: whole.index(word)]
    tokens = list(engine.stream_tokens([3, 4], 10))
    monkeypatch.setattr(engine, "eos_tokens", frozenset([tokens[4]]))
    assert list(engine.stream_tokens([3, 4], 10)) == tokens[: tokens.index(tokens[4])]


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 9]}, 5, {2, 7, 9}),
        ({"eos_token_id": 7}, 5, {2, 7}),
        (None, [5, 6], {2, 5, 6}),
        ({}, 5, {2, 5}),
    ],
)
def test_where_end_tokens_come_from(
    tiny_llama_dir: Path, tmp_path: Path, generation: dict[str, object] | None, config: object, expected: set[int]
) -> None:
    path = copied(tiny_llama_dir, tmp_path)
    (path / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    values = {**json.loads((path / "config.json").read_text()), "eos_token_id": config}
    (path / "config.json").write_text(json.dumps(values))
    assert Engine(path).eos_tokens == expected  # 2 is the tokenizer's own


def test_seeds(engine: Engine) -> None:
    texts = [engine.generate("a", 20, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_frequencies_of_samples_are_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    random = np.random.default_rng(0)

    def frequencies(sampling: Sampling) -> list[float]:
        counts = Counter(sampling.choose(logits, [], random) for _ in range(4000))
        return [counts[token] / 4000 for token in range(4)]

    # the standard deviation of a frequency is below 0.008
    assert frequencies(Sampling(1.0)) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.04)
    assert frequencies(Sampling(1.0, top_k=2)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.04)
    assert frequencies(Sampling(1.0, top_p=0.79)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.04)
    assert frequencies(Sampling(1.0, top_p=0.5001)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.04)
    assert frequencies(Sampling(1.0, top_p=0.49)) == [1, 0, 0, 0]
    squares = np.array([0.25, 0.09, 0.0225, 0.0025])
    assert frequencies(Sampling(0.5)) == pytest.approx((squares / squares.sum()).tolist(), abs=0.04)
    assert frequencies(Sampling(0.0)) == [1, 0, 0, 0]
    assert frequencies(Sampling(1e-30)) == [1, 0, 0, 0]
    assert frequencies(Sampling(1.0, top_k=99, top_p=1.0)) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.04)


def test_repetition_penalty() -> None:
    logits, random = np.array([2.0, 1.5, -1.0, -1.1], np.float32), np.random.default_rng(0)
    assert Sampling(repetition_penalty=1.5).choose(logits, [0, 0], random) == 1
    assert Sampling(repetition_penalty=1.1).choose(logits, [0], random) == 0
    assert Sampling(repetition_penalty=1.5).choose(logits[2:], [0], random) == 1
    assert logits.tolist() == [2.0, 1.5, -1.0, np.float32(-1.1)]


def test_logits_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(NonFiniteError):
        Sampling().choose(np.array([0, np.nan, 1], np.float32), [], np.random.default_rng(0))


@pytest.mark.parametrize(
    "call",
    [
        lambda e: e.generate(""),
        lambda e: e.generate([]),
        lambda e: e.logits([]),
        lambda e: e.logits([[1, 2]]),
        lambda e: e.logits([1.5]),
        lambda e: e.logits([-1]),
        lambda e: e.logits([10**6]),
        lambda e: e.prefill([3] * 513),
        lambda e: e.generate([3] * 500, 13),
        lambda e: e.generate("a", -1),
        lambda e: e.generate("a", temperature=-1.0),
        lambda e: e.generate("a", temperature=float("nan")),
        lambda e: e.generate("a", top_k=0),
        lambda e: e.generate("a", top_p=0.0),
        lambda e: e.generate("a", repetition_penalty=0.0),
        lambda e: e.generate("a", stop=["x", ""]),
        lambda e: e.generate([{"role": "user"}]),
        lambda e: e.stream("a", top_p=2.0),  # at once, not at the first piece
        lambda e: (e.prefill([3] * 511), e.decode_step(3), e.decode_step(3)),
    ],
)
def test_bad_use(tiny_llama_dir: Path, call: Callable[[Engine], object]) -> None:
    with pytest.raises(UsageError) as error:
        call(Engine(tiny_llama_dir))
    assert error.value.exit_code == 2


def test_the_context_can_be_filled_to_the_last_token(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    without_end(engine, monkeypatch)
    assert len(list(engine.stream_tokens([3] * 500, 12))) == 12
    assert engine.generate("a", 0) == ""


def test_decode_step_needs_a_session(tiny_llama_dir: Path) -> None:
    with pytest.raises(UsageError, match="prefill"):
        Engine(tiny_llama_dir).decode_step(3)


def test_sessions_scores_and_streams_do_not_disturb_each_other(engine: Engine) -> None:
    tokens = [5, 6, 7, 8, 9]
    expected, whole = engine.logits(tokens), engine.generate("a", 8)
    engine.prefill(tokens[:3])
    stream = engine.stream("a", 8)
    first = next(stream)
    engine.logits([9, 9, 9, 9])
    np.testing.assert_allclose(engine.decode_step(tokens[3]), expected[3], rtol=0, atol=1e-5)
    assert first + "".join(stream) == whole
    np.testing.assert_allclose(engine.decode_step(tokens[4]), expected[4], rtol=0, atol=1e-5)


def test_an_encoder_is_asked_to_encode(engine: Engine, tiny_bert_dir: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="generate"):
        engine.embed("a")
    with pytest.raises(UnsupportedModelError, match="embed"):
        Engine(tiny_bert_dir).generate("a")


def copied(source: Path, target: Path) -> Path:
    return shutil.copytree(source, target / "model")


def test_without_tokenizer_token_ids_still_work(tiny_llama_dir: Path, tmp_path: Path, engine: Engine) -> None:
    path = copied(tiny_llama_dir, tmp_path)
    (path / "tokenizer.json").unlink()
    bare = Engine(path)
    assert list(bare.stream_tokens([3, 4], 5)) == list(engine.stream_tokens([3, 4], 5))
    with pytest.raises(PathError, match=r"tokenizer\.json"):
        bare.generate("a")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"])
@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_damaged_files(tiny_llama_dir: Path, tmp_path: Path, name: str, content: str) -> None:
    path = copied(tiny_llama_dir, tmp_path)
    (path / name).write_text(content)
    with pytest.raises(DamagedFileError) as error:
        Engine(path).generate("a", 1)
    assert name in str(error.value)


def test_truncated_weights(tiny_llama_dir: Path, tmp_path: Path) -> None:
    path = copied(tiny_llama_dir, tmp_path)
    weights = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(DamagedFileError):
        Engine(path)


def test_wrong_path(tmp_path: Path) -> None:
    with pytest.raises(PathError):
        Engine(tmp_path / "absent")
    with pytest.raises(PathError):
        Engine(tmp_path)
