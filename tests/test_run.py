"""`rarefy.compress` from source to artifact and verdict."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import rarefy
from rarefy.core.errors import CalibrationError, PathError, RecipeError, UsageError
from rarefy.core.results import RunReport
from rarefy.nn.holder import LayoutHolder
from rarefy.run import plan

sys.path.insert(0, str(Path(__file__).parent / "models"))

import tiny

SPARSE = {"steps": [{"method": "sparsegpt", "pattern": {"sparsity": 0.5}}]}
SPARSE_INT4 = {
    "steps": [
        {"method": "sparsegpt", "pattern": {"sparsity": 0.5}, "values": {"num_bits": 4, "group_size": 32}},
        {"method": "rtn", "targets": ["embed_tokens"], "values": {"num_bits": 8}},
    ]
}
MAGNITUDE = {"steps": [{"method": "magnitude", "pattern": {"sparsity": 0.5}}]}
SMALL = {"samples": 16, "sequence_length": 32}


@pytest.fixture(scope="module")
def run(tiny_llama_dir, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "OUT"
    phases = []
    result = rarefy.compress(
        tiny_llama_dir, SPARSE_INT4, calibration=text_file, out=out, progress=lambda *a: phases.append(a), **SMALL
    )
    return result, out, phases


def test_the_directory_has_everything(run):
    _, out, _ = run
    expected = {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
        "recipe.yaml", "report.json", "report.html", "README.md",
    }  # fmt: skip
    assert expected <= {path.name for path in out.iterdir()}
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "rarefy"
    assert config["quantization_config"]["tied"] == {"lm_head": "model.embed_tokens"}
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert rarefy.load_recipe(out / "recipe.yaml").to_dict() == rarefy.load_recipe(SPARSE_INT4).to_dict()
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_the_report_says_what_was_done(run):
    result, out, _ = run
    report = RunReport.from_json(json.loads((out / "report.json").read_text()))
    assert report == result.report
    assert report.num_blocks == 2
    assert len(report.layers) == 2 * 7 + 1
    assert report.calibration.num_samples == 16
    assert report.calibration.num_tokens == 16 * 32
    assert report.calibration.source.endswith("text.txt")
    by_name = {layer.name: layer for layer in report.layers}
    query = by_name["model.layers.0.self_attn.q_proj"]
    assert query.format == "bitmask-int4-v1"
    assert query.error_metric == "output"
    assert 0 < query.error < 1
    assert query.sparsity == pytest.approx(0.5, abs=0.01)
    assert by_name["model.embed_tokens"].format == "dense-int8-v1"
    names = {layer.name for layer in report.untouched}
    assert names == {"model.norm"} | {
        f"model.layers.{i}.{norm}" for i in (0, 1) for norm in ("input_layernorm", "post_attention_layernorm")
    }
    assert all(layer.reason for layer in report.untouched)


def test_the_verdict_compares_before_and_after(run):
    metrics = {metric.name: metric for metric in run[0].report.metrics}
    assert {"disk_bytes", "weight_bytes", "perplexity", "prompt_tokens_per_s", "decode_tokens_per_s"} <= set(metrics)
    assert metrics["disk_bytes"].after.median == (run[1] / "model.safetensors").stat().st_size
    assert metrics["disk_bytes"].after.median < metrics["disk_bytes"].before.median
    perplexity = metrics["perplexity"]
    assert perplexity.before.num_runs == 8
    assert perplexity.paired.num_pairs == 8
    # Judged on the same windows: the change is known better than either of the two values.
    ratio = perplexity.after.median / perplexity.before.median
    assert np.exp(perplexity.paired.mean) == pytest.approx(ratio, rel=1e-6)
    unpaired = np.log(perplexity.before.high / perplexity.before.median)
    assert 0 < perplexity.paired.standard_error < 0.5 * unpaired
    # a random model of 400 tokens knows nothing, before or after
    assert perplexity.after.median == pytest.approx(perplexity.before.median, rel=0.1)
    assert run[0].report.seconds.keys() >= {"load", "compress", "measure before", "measure after"}


def test_the_original_is_timed_in_the_users_environment(tiny_llama_dir, text_file, monkeypatch):
    import transformers

    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("RAREFY_SET_BY_ITSELF", "OMP_WAIT_POLICY")  # as the command line does
    started = []
    original = subprocess.Popen

    def spy(command, **options):
        started.append((command[1:], options["env"].get("OMP_WAIT_POLICY")))
        return original(command, **options)

    monkeypatch.setattr(subprocess, "Popen", spy)
    result = rarefy.compress(tiny_llama_dir, MAGNITUDE, calibration=text_file, **SMALL)
    assert started == [(["-m", "rarefy.measure.worker"], None)]
    hows = {metric.name: metric.how for metric in result.report.metrics}
    assert "the original in a process of its own; before: torch" in hows["decode_tokens_per_s"]
    module = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama_dir)
    result = rarefy.compress(module, MAGNITUDE, calibration=text_file, tokenizer=tokenizer, **SMALL)
    assert len(started) == 1  # there is nothing that another process could load
    hows = {metric.name: metric.how for metric in result.report.metrics}
    assert "in one process; before: torch" in hows["decode_tokens_per_s"]


def test_progress_names_the_phases(run):
    phases = list(dict.fromkeys(phase for phase, *_ in run[2]))
    assert phases == [
        "load",
        "calibration data",
        "measure before",
        "order of blocks",
        "compress",
        "measure after",
        "write",
    ]
    for phase in phases:
        last = [entry for entry in run[2] if entry[0] == phase][-1]
        assert last[1] == last[2]


def test_the_engine_and_torch_give_the_same_logits(run):
    result, out, _ = run
    ids = [5, 9, 30, 77, 5, 120]
    engine = rarefy.Engine(out).logits(ids)
    with torch.no_grad():
        model = result.model()(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(engine - model).max() <= 2e-2 * np.abs(engine).max()


def test_two_processes_write_the_same_bytes(tiny_llama_dir, text_file, tmp_path):
    code = (
        "import sys, rarefy; rarefy.compress(sys.argv[1], 'sparse-50-int4', calibration=sys.argv[2], out=sys.argv[3], "
        "samples=16, sequence_length=32, measure=sys.argv[3].endswith('a'))"
    )
    digests = []
    for name in ("a", "b"):
        command = [sys.executable, "-c", code, str(tiny_llama_dir), str(text_file), str(tmp_path / name)]
        # measuring or not, and the seed of Python's own hashes, must not matter
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": str(ord(name))})
        digests.append(hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest())
        assert (tmp_path / name / "config.json").is_file()
    assert digests[0] == digests[1]
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()


def test_the_seed_matters(tiny_llama_dir, text_file):
    runs = [
        rarefy.compress(tiny_llama_dir, SPARSE, calibration=text_file, seed=seed, measure=False, **SMALL)
        for seed in (0, 0, 1)
    ]
    name = "model.layers.1.mlp.down_proj"
    first, again, other = (run.layers[name].arrays() for run in runs)
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert any(not np.array_equal(first[key], other[key]) for key in first)


def test_the_built_in_text_is_stated(tiny_llama_dir):
    result = rarefy.compress(tiny_llama_dir, SPARSE, measure=False, **SMALL)
    assert "built-in" in result.report.calibration.source
    assert result.path is None


def test_an_encoder_is_judged_by_its_embeddings(tiny_bert_dir, text_file, tmp_path):
    result = rarefy.compress(tiny_bert_dir, SPARSE, calibration=text_file, out=tmp_path / "OUT", **SMALL)
    metrics = {metric.name: metric for metric in result.report.metrics}
    assert 0.9 < metrics["fidelity"].after.median <= 1
    assert metrics["fidelity"].before.median == 1
    assert metrics["fidelity"].paired.mean == pytest.approx(metrics["fidelity"].after.median - 1)
    assert 0 < metrics["fidelity"].paired.standard_error < 0.1
    assert "sequences_per_s" in metrics
    assert (tmp_path / "OUT" / "vocab.txt").exists() == (tiny_bert_dir / "vocab.txt").exists()


def test_a_classifier_is_judged_by_its_encoder(tiny_bert_dir, text_file, tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(tiny_bert_dir, num_labels=3)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "m")
    transformers.AutoTokenizer.from_pretrained(tiny_bert_dir).save_pretrained(tmp_path / "m")
    result = rarefy.compress(tmp_path / "m", SPARSE, calibration=text_file, **SMALL)
    metrics = {metric.name: metric for metric in result.report.metrics}
    assert 0.9 < metrics["fidelity"].after.median <= 1
    assert "embeddings" in metrics["fidelity"].how
    assert {layer.name for layer in result.report.untouched} >= {"classifier", "bert.pooler.dense"}


def test_windows_longer_than_the_model_are_cut(tiny_bert_dir, text_file):
    result = rarefy.compress(tiny_bert_dir, SPARSE, calibration=text_file, samples=4, measure=False)
    assert result.report.calibration.sequence_length == 128
    assert "128" in result.report.calibration.note


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_models_with_few_positions_are_timed_within_them(kind, tiny_llama_dir, text_file, tmp_path):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama_dir)
    common = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "decoder":
        config = transformers.OPTConfig(**common, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32)
        transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "m")
    else:
        config = transformers.BertConfig(**common, intermediate_size=48, max_position_embeddings=48)
        transformers.BertModel(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    result = rarefy.compress(tmp_path / "m", MAGNITUDE, calibration=text_file, **SMALL)
    hows = {metric.name: metric.how for metric in result.report.metrics}
    if kind == "decoder":  # 64 positions, of which 16 are for what is generated
        assert "a prompt of 48 tokens;" in hows["prompt_tokens_per_s"]
    else:
        assert "of 48 tokens;" in hows["sequences_per_s"]


@pytest.mark.parametrize(("build", "shape"), [(tiny.mlp, (16, 12)), (tiny.cnn, (4, 1, 8, 8))])
def test_any_module_with_example_inputs(build, shape, tmp_path):
    model = build().eval()
    generator = torch.Generator().manual_seed(0)
    examples = [torch.randn(shape, generator=generator) for _ in range(12)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = rarefy.compress(model, SPARSE, calibration=examples, out=tmp_path / "OUT")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), "the caller's module must stay as it is"
    metrics = {metric.name: metric for metric in result.report.metrics}
    assert 0.5 < metrics["fidelity"].after.median <= 1
    packed = result.model()
    assert sum(isinstance(m, LayoutHolder) for m in packed.modules()) == len(result.layers)
    assert len(result.layers) == sum(isinstance(m, nn.Linear | nn.Conv2d) for m in model.modules())
    with torch.no_grad():
        cosine = nn.functional.cosine_similarity(packed(examples[0]), model(examples[0])).mean()
    assert cosine > 0.5
    copy = build().eval()
    rarefy.load_into(copy, tmp_path / "OUT")
    with torch.no_grad():
        assert torch.equal(copy(examples[0]), packed(examples[0]))


def test_the_model_of_a_run_is_that_of_the_artifact(tmp_path):
    """Matrices that no step touches are stored in bfloat16."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 12))
    steps = [{"method": "magnitude", "targets": "0", "pattern": {"sparsity": 0.5}}]
    result = rarefy.compress(net, {"steps": steps}, out=tmp_path / "OUT", measure=False)
    rarefy.load_into(net, tmp_path / "OUT")
    x = torch.randn(3, 12)
    with torch.no_grad():
        assert torch.equal(result.model()(x), net(x))


def test_whisper_needs_examples_or_methods_without_data(tmp_path):
    tiny.whisper().save_pretrained(tmp_path / "m")
    with pytest.raises(CalibrationError, match=r"does not read text.*example inputs"):
        rarefy.compress(tmp_path / "m", SPARSE, out=tmp_path / "OUT")
    assert not (tmp_path / "OUT").exists()
    result = rarefy.compress(tmp_path / "m", MAGNITUDE, out=tmp_path / "OUT")
    assert len(result.layers) == 2 * 6 + 2 * 10
    assert "quality was not measured" in " ".join(result.report.warnings)
    generator = torch.Generator().manual_seed(2)
    ids = torch.tensor([[1, 5], [1, 6]])
    examples = [
        {"input_features": torch.randn(2, 8, 40, generator=generator), "decoder_input_ids": ids} for _ in range(4)
    ]
    result = rarefy.compress(tmp_path / "m", SPARSE, calibration=examples)
    assert len(result.layers) == 2 * 6 + 2 * 10
    assert {metric.name for metric in result.report.metrics} >= {"fidelity"}


def test_an_encoder_decoder_calibrates_on_text(tmp_path, tiny_llama_dir, text_file):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama_dir)
    config = transformers.T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    result = rarefy.compress(tmp_path / "m", SPARSE, calibration=text_file, **SMALL)
    assert len(result.report.layers) == 2 * 6 + 2 * 10
    assert all(layer.error_metric == "output" for layer in result.report.layers)


def test_evaluation_text_is_used_for_the_verdict(tiny_llama_dir, text_file, tmp_path):
    (tmp_path / "other.txt").write_text(text_file.read_text()[:3000])
    result = rarefy.compress(tiny_llama_dir, MAGNITUDE, evaluation=tmp_path / "other.txt", **SMALL)
    perplexity = next(metric for metric in result.report.metrics if metric.name == "perplexity")
    assert "other.txt" in perplexity.how
    assert result.report.calibration is None


def test_what_is_written_names_files_without_their_directories(tiny_llama_dir, text_file, tmp_path):
    import transformers

    private = tmp_path / "private-directory"
    (private / "texts").mkdir(parents=True)
    (private / "texts" / "a.txt").write_text(text_file.read_text())
    (private / "judge.txt").write_text(text_file.read_text()[:9000])
    (private / "mine.yaml").write_text(rarefy.load_recipe(SPARSE).to_yaml())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama_dir)
    # A decoder that the engine does not know: the warning about it must not tell either.
    config = transformers.OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, word_embed_proj_dim=32,
    )  # fmt: skip
    transformers.OPTForCausalLM(config).save_pretrained(private / "m")
    tokenizer.save_pretrained(private / "m")
    for name, options in (("A", {}), ("B", {"evaluation": private / "judge.txt"})):
        result = rarefy.compress(
            private / "m", private / "mine.yaml", calibration=private / "texts", out=private / name, **options, **SMALL
        )
        assert result.report.calibration.source == "texts"
        assert "engine does not run this model (config.json" in " ".join(result.report.warnings)
        for file in (private / name).iterdir():
            assert b"private-directory" not in file.read_bytes(), file.name
        how = next(metric.how for metric in result.report.metrics if metric.name == "perplexity")
        assert f"held-out windows of {'judge.txt' if options else 'texts'};" in how
    (private / "short.txt").write_text("too short")
    with pytest.raises(CalibrationError, match="private-directory"):  # an error is for the user alone, and says all
        rarefy.compress(private / "m", SPARSE, calibration=private / "short.txt", **SMALL)


def test_bad_requests_fail_before_any_work(tiny_llama_dir, text_file, tmp_path):
    with pytest.raises(PathError):
        rarefy.compress(tmp_path / "nothing", SPARSE)
    with pytest.raises(RecipeError):
        rarefy.compress(tiny_llama_dir, {"steps": [{"method": "no-such-method"}]})
    with pytest.raises(RecipeError):
        rarefy.compress(tiny_llama_dir, {"steps": [{**SPARSE["steps"][0], "targets": ["nowhere"]}]})
    with pytest.raises(UsageError):
        rarefy.compress(tiny_llama_dir, SPARSE, samples=0)
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(CalibrationError, match="less than one window"):
        rarefy.compress(tiny_llama_dir, SPARSE, calibration=tmp_path / "short.txt")
    (tmp_path / "OUT").mkdir()
    (tmp_path / "OUT" / "mine.txt").write_text("keep")
    with pytest.raises(PathError, match="already exists"):
        rarefy.compress(tiny_llama_dir, SPARSE, calibration=text_file, out=tmp_path / "OUT")
    assert (tmp_path / "OUT" / "mine.txt").read_text() == "keep"


def test_an_interrupted_run_leaves_no_output_but_what_it_has_finished(tiny_llama_dir, text_file, tmp_path):
    def interrupt(phase, done, total, detail):
        if phase == "measure after" and done:
            raise KeyboardInterrupt

    for stop in (interrupt, _at_half):
        with pytest.raises(KeyboardInterrupt):
            rarefy.compress(
                tiny_llama_dir, SPARSE, calibration=text_file, out=tmp_path / "new" / "OUT", progress=stop, **SMALL
            )
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["OUT.partial"]
        shutil.rmtree(tmp_path / "new")


def _at_half(phase, done, total, detail):
    if phase == "compress" and 3 * done > 2 * total:
        raise KeyboardInterrupt


@pytest.mark.slow
def test_minilm_keeps_its_embeddings(minilm_dir):
    result = rarefy.compress(minilm_dir, SPARSE, samples=32, sequence_length=64)
    metrics = {metric.name: metric for metric in result.report.metrics}
    assert metrics["fidelity"].after.median > 0.85
    assert len(result.layers) == 36


@pytest.mark.parametrize("masked", [False, True])
def test_a_plan_for_examples_counts_their_tokens(masked, tiny_llama_dir):
    """Of a model on disk too, whose weights are not read; a mask is looked at, which only its values allow."""
    ids = torch.ones(2, 24, dtype=torch.int64)
    examples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} if masked else {"input_ids": ids}] * 3
    planned = plan(tiny_llama_dir, SPARSE, calibration=examples)
    text = plan(tiny_llama_dir, SPARSE, samples=3, sequence_length=48)
    assert planned.memory_parts["activations between blocks"] == text.memory_parts["activations between blocks"]
    assert "3 x 48 tokens" in planned.basis if masked else "the first example" in planned.basis
