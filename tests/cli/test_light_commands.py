"""doctor, recipes, generate and embed, on tiny models made here."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import rarefy
from rarefy.engine.sampling import Sampling
from rarefy.kernels.extension import ISAS


def test_doctor_reports_the_machine(run: Callable) -> None:
    done = run("doctor", "--json")
    assert done.code == 0
    data = json.loads(done.out)
    assert set(data) == {"cpu", "bandwidth", "fork_join_us", "versions", "compress_extra"}
    assert data["bandwidth"]["bytes_per_s"] > 1e8
    assert 0 < data["fork_join_us"] < 1e6
    assert data["cpu"]["num_threads"] >= 1
    assert set(data["cpu"]["chosen"].values()) <= set(ISAS)
    text = run("doctor", "--no-bandwidth").out
    assert data["cpu"]["model"].split(",")[0][:20] in text
    assert "bandwidth" not in text


def test_doctor_shows_the_cap_of_the_instruction_set(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAREFY_ISA", "numpy")
    chosen = json.loads(run("doctor", "--no-bandwidth", "--json").out)["cpu"]["chosen"]
    assert set(chosen.values()) == {"numpy"}
    monkeypatch.setenv("RAREFY_ISA", "sse1")
    done = run("doctor")
    assert done.code == 2
    assert "sse1" in done.err
    assert "avx512" in done.err


def test_recipes_are_listed_and_shown(run: Callable) -> None:
    listed = json.loads(run("recipes", "list", "--json").out)
    names = [entry["name"] for entry in listed]
    assert "sparse-50-int4" in names
    assert all(entry["description"] for entry in listed), "each recipe starts with a comment that says what it is for"
    text = run("recipes", "list").out
    assert run("recipes").out == text
    assert json.loads(run("recipes", "--json").out) == listed
    for name in names:
        assert name in text
        shown = run("recipes", "show", name)
        assert shown.code == 0
        assert "steps:" in shown.out
        assert json.loads(run("recipes", "show", name, "--json").out)["text"] == shown.out


def test_the_schema_accepts_every_shipped_recipe_and_refuses_unknown_keys(run: Callable) -> None:
    import jsonschema
    import yaml

    schema = json.loads(run("recipes", "schema").out)
    jsonschema.Draft202012Validator.check_schema(schema)
    for entry in json.loads(run("recipes", "list", "--json").out):
        recipe = yaml.safe_load(run("recipes", "show", entry["name"]).out)
        jsonschema.validate(recipe, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**recipe, "nonsense": 1}, schema)


def test_an_unknown_recipe_name_lists_the_known_ones(run: Callable) -> None:
    done = run("recipes", "show", "nonsense")
    assert done.code == 2
    assert "nonsense" in done.err
    assert "sparse-50-int4" in done.err


def test_generate_streams_to_stdout_and_tells_the_speed_on_stderr(run: Callable, tiny_llama_dir: Path) -> None:
    done = run("generate", tiny_llama_dir, "The river", "--max-new-tokens", 8, "--no-chat")
    assert done.code == 0
    assert "tokens/s" in done.err
    assert "tokens/s" not in done.out
    again = json.loads(run("generate", tiny_llama_dir, "The river", "--max-new-tokens", 8, "--no-chat", "--json").out)
    assert again["text"] == done.out.removesuffix("\n")
    assert again["num_tokens"] <= 8


def test_generate_uses_the_chat_template_exactly_if_there_is_one(run: Callable, tiny_llama_dir: Path) -> None:
    def text(*options: str) -> str:
        return json.loads(run("generate", tiny_llama_dir, "The river", "--max-new-tokens", 8, "--json", *options).out)[
            "text"
        ]

    assert text() == text("--chat")
    assert text() != text("--no-chat")


def test_sampling_repeats_with_its_seed_and_differs_with_another(run: Callable, tiny_llama_dir: Path) -> None:
    def text(seed: int) -> str:
        return run(
            "generate", tiny_llama_dir, "The", "--temperature", 1.5, "--top-k", 50, "--top-p", 0.95, "--seed", seed
        ).out

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_the_tokens_of_an_answer_are_counted_as_they_come(run: Callable, tiny_llama_dir: Path) -> None:
    """Its text may encode to others: half characters become U+FFFD, and two tokens may be one."""
    engine = rarefy.Engine(tiny_llama_dir)
    options = ("--no-chat", "--max-new-tokens", 30, "--temperature", 3.0, "--json")
    for seed in range(4):
        counted = json.loads(run("generate", tiny_llama_dir, "The", *options, "--seed", seed).out)["num_tokens"]
        made = engine.stream_tokens(engine.encode_prompt("The"), 30, Sampling(temperature=3.0), seed=seed)
        assert counted == len(list(made))


def test_generate_reads_the_prompt_from_stdin(run: Callable, tiny_llama_dir: Path) -> None:
    options = ("--max-new-tokens", 4, "--no-chat")
    piped = run("generate", tiny_llama_dir, "-", *options, text="The river")
    assert piped.out == run("generate", tiny_llama_dir, "The river", *options).out


def test_embed_writes_one_row_for_each_text(run: Callable, tiny_bert_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("a stone\nthe sky\n", encoding="utf-8")
    done = run("embed", tiny_bert_dir, "water", "--file", file)
    assert done.code == 0
    rows = [[float(value) for value in line.split()] for line in done.out.splitlines()]
    assert [len(row) for row in rows] == [64, 64, 64]
    assert sum(value * value for value in rows[0]) == pytest.approx(1, abs=1e-4)
    data = json.loads(run("embed", tiny_bert_dir, "water", "--json", "--no-normalize", "--pooling", "cls").out)
    assert data["dimension"] == 64
    assert data["rows"][0]["text"] == "water"
    assert len(data["rows"][0]["embedding"]) == 64


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (["embed", "LLAMA", "text"], "use rarefy generate"),
        (["generate", "BERT", "text"], "use rarefy embed"),
        (["generate", "BERT-without-template", "text", "--chat"], "use rarefy embed"),
        (["embed", "BERT"], "no text given"),
        (["embed", "BERT", "--file", "missing.txt"], "missing.txt"),
        (["generate", "no/such/model", "text"], "no/such/model"),
        (["embed", "no/such/model", "text"], "no/such/model"),
    ],
)
def test_misuse_is_told_with_exit_code_2(
    run: Callable, tiny_llama_dir: Path, tiny_bert_dir: Path, command: list[str], complaint: str
) -> None:
    models = {"LLAMA": tiny_llama_dir, "BERT": tiny_bert_dir, "BERT-without-template": tiny_bert_dir}
    done = run(*(models.get(word, word) for word in command))
    assert done.code == 2
    assert complaint in done.err
    assert done.out == ""


def test_inspect_lists_every_layer_with_its_verdict(run: Callable, tiny_llama_dir: Path) -> None:
    done = run("inspect", tiny_llama_dir)
    assert done.code == 0
    assert "model.layers.*" in done.out
    data = json.loads(run("inspect", tiny_llama_dir, "--json").out)
    assert len(data["blocks"]) == 2
    by_name = {layer["name"]: layer for layer in data["layers"]}
    assert by_name["model.layers.1.mlp.up_proj"]["shape"] == [160, 64]
    assert by_name["model.layers.1.mlp.up_proj"]["compressible"]
    assert by_name["model.layers.1.mlp.up_proj"]["num_zeros"] == 0
    assert by_name["model.norm"]["reason"]
    assert not by_name["model.norm"]["compressible"]
    every = run("inspect", tiny_llama_dir, "--all", "--no-zeros").out
    for name in by_name:
        assert name in every.replace("\n", "").replace(" ", "") or name[:30] in every
