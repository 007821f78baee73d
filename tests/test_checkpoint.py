"""An interrupted run, continued, gives the bytes of one that was not; and never continues what it should not."""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import transformers

import rarefy
from rarefy import checkpoint
from rarefy.checkpoint import what_is_left
from rarefy.core.errors import NonFiniteError, PathError, UsageError
from rarefy.methods import GPTQ, SparseGPT
from rarefy.recipe import Recipe, Step

sys.path.insert(0, str(Path(__file__).parent / "models"))

import tiny

SPARSE = {"steps": [{"method": "sparsegpt", "pattern": {"sparsity": 0.5}}]}
INT4 = {
    "steps": [
        {"method": "sparsegpt", "pattern": {"sparsity": 0.5}, "exclude": ["lm_head"]},
        {"method": "gptq", "targets": ["*_proj", "lm_head"], "values": {"num_bits": 4, "group_size": 32}},
        {"method": "rtn", "targets": ["embed_tokens"], "values": {"num_bits": 8}},
    ]
}
NUM_BLOCKS = 4


@pytest.fixture(scope="module")
def model_dir(tiny_llama_dir, tmp_path_factory):
    """Four blocks, and a head of its own, which is solved after them."""
    path = tmp_path_factory.mktemp("resume") / "m"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama_dir)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def compress(model_dir, text_file, tmp_path):
    """compress(recipe, stop_at=layer, ...) -> what was told. Stops like Ctrl-C when that layer is done."""

    def call(recipe=INT4, *, source=model_dir, out="OUT", stop_at=None, **options):
        told = []

        def progress(phase, done, total, detail):
            assert done <= total
            if phase == "compress" and detail == stop_at:
                raise KeyboardInterrupt

        given = {"calibration": text_file, "samples": 16, "sequence_length": 32, "measure": False, "tell": told.append}
        rarefy.compress(source, recipe, out=tmp_path / out, progress=progress, **given | options)
        return told

    return call


@pytest.fixture
def solved(monkeypatch):
    """The layers that a method was called for."""
    names = []
    for method in (SparseGPT, GPTQ):
        original = method.compress

        def spy(self, solution, stats, *, layer, original=original):
            names.append(layer)
            return original(self, solution, stats, layer=layer)

        monkeypatch.setattr(method, "compress", spy)
    return names


def same_bytes(one: Path, two: Path) -> bool:
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in two.iterdir())
    assert {"model.safetensors", "config.json", "recipe.yaml"} <= set(files)
    # Reports hold times.
    measured = {"report.json", "report.html", "README.md"}
    return all((one / name).read_bytes() == (two / name).read_bytes() for name in files if name not in measured)


def test_work_without_a_finished_block_is_told_of(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_artifact", interrupted)
    assert what_is_left(tmp_path / "OUT") == ""
    with pytest.raises(KeyboardInterrupt):
        checkpoint.Checkpoint(tmp_path / "OUT.partial", {}).save("0", checkpoint.Finished({}, {}, {}, {}, {}))
    left = what_is_left(tmp_path / "OUT")
    assert left == "interrupted before a block was finished; the same command begins anew (and replaces OUT.partial)"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", [SPARSE, INT4], ids=["sparse", "int4"])
def test_a_run_that_is_interrupted_again_and_again_gives_the_same_bytes(compress, solved, tmp_path, recipe, dtype):
    options = {"compute_dtype": dtype}
    assert compress(recipe, out="whole", **options) == []
    in_one_go = list(solved)
    solved.clear()
    for number in range(NUM_BLOCKS):
        with pytest.raises(KeyboardInterrupt):
            compress(recipe, stop_at=f"model.layers.{number}.mlp.down_proj", **options)
        assert not (tmp_path / "OUT").exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == (["OUT.partial", "whole"] if number else ["whole"])
        left = what_is_left(tmp_path / "OUT")
        assert f"the same command will go on after {number} finished block" in left if number else left == ""
    told = compress(recipe, **options)
    assert told == [
        f"OUT.partial holds the work of an interrupted run: going on after {NUM_BLOCKS - 1} finished blocks"
    ]
    assert same_bytes(tmp_path / "OUT", tmp_path / "whole")
    assert not (tmp_path / "OUT.partial").exists()
    assert what_is_left(tmp_path / "OUT") == ""
    # Every block was solved once more at most: the one in which the run was interrupted.
    assert set(solved) == set(in_one_go)
    assert max(solved.count(name) for name in solved) <= 2 * max(in_one_go.count(name) for name in in_one_go)
    report = json.loads((tmp_path / "OUT" / "report.json").read_text())
    assert f"an interrupted run had finished {NUM_BLOCKS - 1} of the blocks" in " ".join(report["warnings"])


def test_nothing_is_solved_again_after_an_interruption_at_the_end(compress, solved, monkeypatch, tmp_path):
    compress(out="whole")
    with monkeypatch.context() as patch:
        patch.setattr("rarefy.run.documents", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compress()
    solved.clear()
    (told,) = compress()
    assert "after 5 finished blocks" in told  # four blocks, and what lies outside of them
    assert solved == []
    assert same_bytes(tmp_path / "OUT", tmp_path / "whole")


def test_weights_that_layouts_round_are_kept_as_they_were(compress, tmp_path):
    """In float32 the later blocks see the solutions unrounded, in bfloat16 what the layouts hold."""
    for dtype, num_kept in (("float32", 7), ("bfloat16", 0)):
        with pytest.raises(KeyboardInterrupt):
            compress(SPARSE, out=dtype, stop_at="model.layers.1.self_attn.q_proj", compute_dtype=dtype)
        block = rarefy.artifact.read_artifact(tmp_path / f"{dtype}.partial" / "block-0000")
        assert len(block.specs) == 7
        assert len(block.names()) == num_kept


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recipe": SPARSE}, "another recipe"),
        ({"seed": 1}, "another calibration"),
        ({"samples": 15}, "another calibration"),
        ({"sequence_length": 31}, "another calibration"),
        ({"compute_dtype": "float32"}, "another machine or version"),
        ({"recipe": SPARSE, "seed": 1}, "another recipe and another calibration"),
        ({"force": True}, "--force was given"),
    ],
    ids=str,
)
def test_another_run_starts_anew_and_says_so(compress, tmp_path, change, words):
    with pytest.raises(KeyboardInterrupt):
        compress(stop_at="model.layers.2.mlp.down_proj", compute_dtype="bfloat16")
    options = {"compute_dtype": "bfloat16", **change}
    told = compress(**options)
    assert len(told) == 1
    assert words in told[0]
    assert told[0].endswith("starting anew")
    assert not (tmp_path / "OUT.partial").exists()
    assert compress(out="whole", **options) == []
    assert same_bytes(tmp_path / "OUT", tmp_path / "whole")


def test_another_text_and_another_model_start_anew(compress, model_dir, text_file, tmp_path):
    source = shutil.copytree(model_dir, tmp_path / "m")
    text = Path(shutil.copy(text_file, tmp_path / "text.txt"))
    stop = {"source": source, "calibration": text, "stop_at": "model.layers.1.mlp.up_proj"}
    with pytest.raises(KeyboardInterrupt):
        compress(**stop)
    text.write_text(text.read_text().replace("river", "stone"))
    with pytest.raises(KeyboardInterrupt):
        compress(**stop)
    os.utime(source / "model.safetensors", (1, 1))
    told = compress(source=source, calibration=text)
    assert "it had another model: starting anew" in told[0]
    shutil.rmtree(tmp_path / "OUT")
    assert compress(source=source, calibration=text) == []


def test_a_damaged_block_is_solved_again(compress, tmp_path):
    compress(out="whole")
    with pytest.raises(KeyboardInterrupt):
        compress(stop_at="model.layers.3.mlp.down_proj")
    first, second, third = sorted((tmp_path / "OUT.partial").glob("block-*"))
    (first / "results.json").write_text("{}")
    data = (second / "model.safetensors").read_bytes()
    (second / "model.safetensors").write_bytes(data[: len(data) // 2])
    record = json.loads((third / "results.json").read_text())
    (third / "results.json").write_text(json.dumps({**record, "results": record["results"][1:]}))
    compress()
    assert same_bytes(tmp_path / "OUT", tmp_path / "whole")


def test_what_is_not_ours_is_neither_used_nor_removed(compress, tmp_path):
    (tmp_path / "OUT.partial").mkdir()
    (tmp_path / "OUT.partial" / "run.json").write_text('{"mine": true}')
    for options in ({}, {"force": True}):
        with pytest.raises(PathError, match=r"OUT\.partial: something else is in the way"):
            compress(**options)
    assert (tmp_path / "OUT.partial" / "run.json").read_text() == '{"mine": true}'


def test_a_run_that_would_fail_again_leaves_nothing(compress, model_dir, tmp_path):
    source = tmp_path / "nan"
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] = float("nan")
    shutil.copytree(model_dir, source)
    model.save_pretrained(source)
    with pytest.raises(NonFiniteError):
        compress(source=source)
    assert [path.name for path in tmp_path.iterdir()] == ["nan"]


def test_a_failure_of_the_measurements_costs_no_solution(compress, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise UsageError("measuring", "went wrong")

    monkeypatch.setattr("rarefy.run.judge", fail)
    with pytest.raises(UsageError, match="went wrong"):
        compress(measure=True)
    assert "after 5 finished blocks" in what_is_left(tmp_path / "OUT")


@dataclass(frozen=True)
class Own:
    """A method of the caller: a later run cannot know whether it is still the same."""

    paper: ClassVar[str] = "none"

    def needs(self):
        return ()

    def compress(self, solution, stats, *, layer):
        return solution


@pytest.mark.parametrize("kind", ["module", "own method"])
def test_runs_that_cannot_be_recognised_keep_nothing(compress, tmp_path, kind):
    if kind == "module":
        model = tiny.llama()
        batches = [{"input_ids": torch.randint(3, 99, (2, 16))} for _ in range(4)]
        options = {"source": model, "recipe": SPARSE, "calibration": batches}
    else:
        steps = (Step(Own(), targets=("q_proj",)), *rarefy.load_recipe(SPARSE).steps)
        options = {"recipe": Recipe(steps)}
    with pytest.raises(KeyboardInterrupt):
        compress(stop_at="model.layers.2.mlp.down_proj", **options)
    assert list(tmp_path.iterdir()) == []
