"""Embeddings with zeros and factors, alone and tied to a head: from a recipe to a directory and both runtimes."""

import numpy as np
import pytest
import torch
from tests.models import tiny
from transformers import AutoModel, AutoModelForCausalLM

import rarefy
from rarefy.artifact import read_artifact
from rarefy.calibrate.row_counts import RowCounts
from rarefy.calibrate.statistics import Gram
from rarefy.core.ranks import Rank
from rarefy.core.solution import Solution
from rarefy.methods import SVD, FrequencySVD
from rarefy.models import load_model

SMALL = {"samples": 16, "sequence_length": 32}
IDS = [5, 9, 30, 77, 5, 120]
HALF = {"ratio": 0.5}
# of an embedding that a head shares: methods see the head's inputs, or count the lookups
TIED = {
    "svd": ([{"method": "svd", "rank": HALF}], "lowrank-bf16-v1"),
    "svd-llm": ([{"method": "svd-llm", "rank": HALF}], "lowrank-bf16-v1"),
    "frequency-svd": ([{"method": "frequency-svd", "rank": HALF}], "lowrank-bf16-v1"),
    "magnitude": ([{"method": "magnitude", "pattern": {"sparsity": 0.6}}], "bitmask-bf16-v1"),
    "wanda": ([{"method": "wanda", "pattern": {"keep": 2, "group": 4}}], "nm-bf16-v1"),
    "sparsegpt int4": (
        [{"method": "sparsegpt", "pattern": {"sparsity": 0.7}, "values": {"num_bits": 4, "group_size": 32}}],
        "bitmask-int4-v1",
    ),
    "blocks": ([{"method": "magnitude", "pattern": {"block": [4, 16], "sparsity": 0.5}}], "block-bf16-v1"),
    "counts, then the head's inputs": (
        [
            {"method": "frequency-svd", "rank": {"ratio": 0.3}, "remainder": "keep"},
            {"method": "sparsegpt", "pattern": {"sparsity": 0.8}},
        ],
        "sum-v1",
    ),
    "rounded factors": (
        [{"method": "svd", "rank": HALF}, {"method": "rtn", "values": {"num_bits": 8, "symmetric": True}}],
        "lowrank-int8-v1",
    ),
}


@pytest.mark.parametrize("name", TIED)
def test_a_tied_pair_is_one_layer(name, tiny_llama_dir, text_file, tmp_path):
    steps, format = TIED[name]
    recipe = {"steps": [{**step, "targets": "lm_head"} for step in steps]}
    result = rarefy.compress(
        tiny_llama_dir, recipe, calibration=text_file, out=tmp_path / "OUT", measure=False, **SMALL
    )
    artifact = read_artifact(tmp_path / "OUT")
    assert {layer: spec.format_name for layer, spec in artifact.specs.items()} == {"model.embed_tokens": format}
    assert artifact.tied == {"lm_head": "model.embed_tokens"}
    (layer,) = result.report.layers
    assert layer.packed_bytes < layer.dense_bytes // 2  # of float32, and less than bfloat16 would take
    assert 0 < layer.error < 1
    assert layer.error_metric == (
        "output" if any(step["method"] in ("svd-llm", "sparsegpt") for step in steps) else "weight"
    )
    engine = rarefy.Engine(tmp_path / "OUT").logits(IDS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "OUT")
    assert loaded.lm_head.tied_to is loaded.model.embed_tokens
    with torch.no_grad():
        assert np.abs(engine - loaded(torch.tensor([IDS])).logits[0].numpy()).max() <= 2e-2 * np.abs(engine).max()
        assert (
            np.abs(engine - result.model()(torch.tensor([IDS])).logits[0].numpy()).max() <= 2e-2 * np.abs(engine).max()
        )


@pytest.mark.parametrize("name", ["svd", "frequency-svd", "magnitude", "blocks", "rounded factors"])
def test_an_embedding_alone(name, tiny_bert_dir, text_file, tmp_path):
    steps, format = TIED[name]
    recipe = {"steps": [{**step, "targets": "word_embeddings"} for step in steps]}
    result = rarefy.compress(tiny_bert_dir, recipe, calibration=text_file, out=tmp_path / "OUT", measure=False, **SMALL)
    (layer,) = result.report.layers
    assert (layer.name, layer.format) == ("embeddings.word_embeddings", format)
    loaded = AutoModel.from_pretrained(tmp_path / "OUT")
    table = loaded.embeddings.word_embeddings
    assert np.array_equal(table(torch.tensor(IDS)).numpy(), table.layout.to_dense()[IDS])
    engine = rarefy.Engine(tmp_path / "OUT").hidden_states([IDS])[0]
    # The engine multiplies what is not compressed as it is stored, in bfloat16, and rounds what it meets (ADR 0025).
    for module in loaded.modules():
        if type(module) is torch.nn.Linear:
            module.register_forward_pre_hook(lambda _, arguments: (arguments[0].bfloat16().float(),))
    with torch.no_grad():
        # A sum that differs in its last bit may be rounded to another neighbour, 2^-8 away, and meets small weights.
        torch.testing.assert_close(
            torch.from_numpy(engine), loaded(torch.tensor([IDS])).last_hidden_state[0], atol=2.0**-10, rtol=0
        )


def test_a_tied_pair_is_solved_on_what_the_head_sees_and_how_often_rows_are_read(tiny_llama_dir, text_file):
    seen = {}

    class Spy:
        paper = "none"

        def __init__(self, statistic):
            self.statistic = statistic

        def needs(self):
            return (self.statistic,)

        def compress(self, solution, stats, *, layer):
            seen.update(stats)
            return solution

    loaded = load_model(tiny_llama_dir)
    recipe = rarefy.recipe.Recipe(tuple(rarefy.recipe.Step(Spy(s), ("lm_head",)) for s in (Gram(), RowCounts())))
    rarefy.compress(loaded, recipe, calibration=text_file, measure=False, compute_dtype="float32", **SMALL)
    width, rows = loaded.model.config.hidden_size, loaded.model.config.vocab_size
    assert seen[Gram()].shape == (width, width)
    # a Llama's head sees normalised states: the squares of each have a mean of about 1
    assert float(seen[Gram()].diagonal().mean()) == pytest.approx(1, rel=1e-2)
    assert seen[RowCounts()].numel() <= rows
    assert float(seen[RowCounts()].sum()) == pytest.approx(1)


def test_frequent_rows_come_out_closer():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((60, 24)).astype(np.float32)
    counts = RowCounts()
    lookups = torch.from_numpy(rng.integers(0, 10, (500, 1)))  # the first ten rows and no others
    state = counts.update(counts.init(24), lookups)
    assert np.allclose(counts.finish(state), np.bincount(lookups[:, 0], minlength=10) / 500)
    start = Solution.dense(weight)
    plain = SVD(Rank(count=8)).compress(start, {}, layer="x").value_OI
    stats = {counts: counts.finish(state)}
    weighted = FrequencySVD(Rank(count=8), smoothing=0.01).compress(start, stats, layer="x").value_OI

    def lost(value):
        return np.square((value - weight)[lookups[:, 0]]).sum()

    assert lost(weighted) < 0.2 * lost(plain)
    # with every row as important as the others it is the plain one
    even = FrequencySVD(Rank(count=8)).compress(start, {counts: torch.full((60,), 1 / 60)}, layer="x").value_OI
    assert np.allclose(even, plain, atol=1e-5)


def test_counts_of_two_machines_add_up():
    counts = RowCounts()
    a = counts.update(counts.init(4), torch.tensor([[0], [3]]))
    b = counts.update(counts.init(4), torch.tensor([[1], [7]]))
    for merged in (counts.merge(a, b), counts.merge(b, a)):
        assert counts.finish(merged).tolist() == [0.25, 0.25, 0, 0.25, 0, 0, 0, 0.25]


def test_a_tied_pair_shares_one_threshold_with_the_blocks(tiny_llama_dir, text_file):
    """Wanda's saliency of the pair is that of the head's inputs."""
    recipe = {
        "steps": [
            {
                "method": "wanda",
                "targets": ["*_proj", "lm_head"],
                "pattern": {"sparsity": 0.5},
                "allocation": {"rule": "global"},
            }
        ]
    }
    run = rarefy.compress(tiny_llama_dir, recipe, calibration=text_file, measure=False, **SMALL)
    layers = {layer.name: layer for layer in run.report.layers}
    assert "model.embed_tokens" in layers
    sizes = {name: layer.shape[0] * layer.shape[1] for name, layer in layers.items()}
    zeros = sum(layer.sparsity * sizes[name] for name, layer in layers.items())
    assert zeros == pytest.approx(sum(sizes.values()) / 2, rel=1e-3)
    assert len({round(layer.sparsity, 3) for layer in layers.values()}) > 2


def test_the_readers_of_a_weight():
    for make, expected in (
        (tiny.llama, ("model.embed_tokens", "lm_head")),
        (tiny.qwen2, ("model.embed_tokens", None)),
    ):
        readers = load_model(make()).structure().readers()
        assert (readers["model.embed_tokens"].lookup, readers["model.embed_tokens"].product) == expected
        assert readers["model.layers.0.mlp.up_proj"].product == "model.layers.0.mlp.up_proj"
