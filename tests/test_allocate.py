"""Amounts from a look at the dense model: the walk, the whole road, and a run that is interrupted."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import rarefy
from rarefy.allocate import Dense
from rarefy.artifact import read_artifact
from rarefy.calibrate import Gram, SquaredNorm
from rarefy.calibrate.inputs import example_calls, text_calls
from rarefy.core.errors import NonFiniteError, RecipeError
from rarefy.core.patterns import Unstructured
from rarefy.methods import Magnitude
from rarefy.methods.allocation import OWL
from rarefy.models import load_model
from rarefy.nn import find_weight
from rarefy.recipe import Recipe, Step
from rarefy.run import plan as plan_of

sys.path.insert(0, str(Path(__file__).parent / "models"))

import tiny

IDS_NL = torch.randint(3, 99, (6, 10), generator=torch.Generator().manual_seed(1))
NUM_BLOCKS = 4


def calls_for(build, model):
    if build in (tiny.mlp, tiny.cnn, tiny.torch_encoder):
        shape = {tiny.mlp: (6, 12), tiny.cnn: (3, 1, 8, 8), tiny.torch_encoder: (3, 5, 16)}[build]
        generator = torch.Generator().manual_seed(2)
        return example_calls([torch.randn(shape, generator=generator) for _ in range(3)], 3)
    return text_calls(model, IDS_NL, 2)


def linear_layers(structure):
    return [layer.name for layer in structure.layers if layer.kind in ("linear", "conv") and layer.compressible]


def inputs_of(model, name, calls):
    """The inputs of a linear layer in the model as it is, as rows."""
    inputs = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _m, args: inputs.append(args[0].detach().double().reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        for call in calls:
            model(*call.args, **call.kwargs)
    handle.remove()
    return torch.cat(inputs).numpy()


def dense(loaded, calls, dtype=torch.float32, tick=lambda *_: None):
    structure = loaded.structure()
    return Dense(loaded, structure, linear_layers(structure), calls, dtype, tick)


@pytest.mark.parametrize("statistic", [SquaredNorm(), Gram()], ids=["vectors", "matrices"])
@pytest.mark.parametrize(
    "build", [tiny.llama, tiny.qwen2, tiny.t5, tiny.bert, tiny.albert, tiny.gemma3, tiny.mlp, tiny.torch_encoder]
)
def test_the_walk_sees_the_inputs_of_the_dense_model_and_leaves_it_as_it_is(build, statistic):
    model, original = build(), build()
    calls = calls_for(build, model)
    with dense(load_model(model), calls) as walk:
        looks = [[layer for group in walk.blocks((statistic,)) for layer in group] for _ in range(2)]
    names = [layer.name for layer in looks[0]]
    assert len(names) > 2
    assert [layer.name for layer in looks[1]] == names
    for first, second in zip(*looks, strict=True):
        x_TI = inputs_of(original, first.name, calls)
        expected = x_TI.T @ x_TI / len(x_TI)
        expected = expected if statistic == Gram() else np.diagonal(expected)
        assert np.abs(first.stats[statistic].numpy() - expected).max() <= 1e-4 * np.abs(expected).max(), first.name
        assert torch.equal(first.stats[statistic], second.stats[statistic])
        weight = original.get_submodule(first.name).weight.detach().numpy()
        assert np.array_equal(first.weight_OI, weight)
        assert np.array_equal(second.weight_OI, weight)
    for (name, one), (_, two) in zip(model.named_parameters(), original.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    assert torch.is_grad_enabled()
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_block_at_a_time_in_the_order_of_the_model(tmp_path):
    tiny.qwen2().save_pretrained(tmp_path / "m")
    loaded = load_model(tmp_path / "m", stream=True)
    calls = text_calls(loaded.model, IDS_NL, 2)
    told = []
    with dense(loaded, calls, torch.bfloat16, lambda *now: told.append(now)) as walk:
        for number, group in enumerate(walk.blocks((SquaredNorm(),))):
            own = {layer.name.rpartition(".layers.")[2].partition(".")[0] for layer in group}
            assert len(own) == 1
            in_memory = [n for n, p in loaded.model.named_parameters() if not p.is_meta and ".layers." in n]
            assert in_memory == []
            if group[0].name != "lm_head":
                assert own == {str(number)}
                assert len(group) == 7
    assert number == len(loaded.structure().blocks)  # and the head
    assert all(parameter.is_meta for parameter in loaded.model.parameters())
    assert [done for done, _, _ in told] == list(range(1, told[-1][1] + 1))


@pytest.mark.parametrize(("statistic", "again"), [(SquaredNorm(), False), (Gram(), True)], ids=["vectors", "matrices"])
def test_a_second_look_at_vectors_takes_no_forward_pass(statistic, again):
    model = tiny.llama()
    num_calls = 0

    def count(*_):
        nonlocal num_calls
        num_calls += 1

    model.model.layers[1].mlp.up_proj.register_forward_pre_hook(count)
    with dense(load_model(model), text_calls(model, IDS_NL, 2)) as walk:
        list(walk.blocks((statistic,)))
        once = num_calls
        assert once == 3  # batches: what a block returns comes from the pass that collects
        list(walk.blocks((statistic,)))
        assert num_calls == (2 * once if again else once)
        list(walk.blocks(()))
        assert num_calls == (2 * once if again else once)


def test_a_walk_that_is_left_early_leaves_nothing_behind_and_can_be_repeated():
    model = tiny.llama()
    calls = text_calls(model, IDS_NL, 2)
    with dense(load_model(model), calls) as walk:
        first = next(walk.blocks((SquaredNorm(),)))
    assert torch.is_grad_enabled()
    assert not any("forward" in module.__dict__ for module in model.modules())
    with dense(load_model(model), calls) as walk:
        next(walk.blocks((SquaredNorm(),)))
    with dense(load_model(model), calls) as walk:
        groups = list(walk.blocks((SquaredNorm(),)))
    assert len(groups) >= len(load_model(model).structure().blocks)
    assert torch.equal(groups[0][0].stats[SquaredNorm()], first[0].stats[SquaredNorm()])


def test_layers_that_no_input_reaches_are_left_out_and_get_the_mean():
    model = tiny.mlp()
    model.unused = nn.Linear(12, 4)
    recipe = {
        "steps": [
            {"method": "magnitude", "pattern": {"sparsity": 0.5}, "allocation": {"rule": "owl", "threshold": 1.5}}
        ]
    }
    result = rarefy.compress(model, recipe, calibration=[torch.randn(8, 12)], measure=False)
    found = {layer.name: layer.sparsity for layer in result.report.layers}
    assert found["unused"] == 0.5
    assert len(set(found.values())) == 4
    seen = [layer for layer in result.report.layers if layer.name != "unused"]
    zeros = sum(round(layer.sparsity * layer.shape[0] * layer.shape[1]) for layer in seen)
    assert zeros == (12 * 20 + 20 * 16 + 16 * 5) // 2


class Net(nn.Module):
    """Convolutions, one of them in groups and one depthwise, without a row of blocks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, groups=2, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.depthwise(torch.relu(self.grouped(torch.relu(self.stem(x))))).mean((2, 3)))


IMAGES = [torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(number)) for number in range(3)]


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.95, 1.0])
def test_global_magnitude_zeros_what_is_smallest_in_the_whole_network(sparsity):
    recipe = {
        "steps": [
            {"method": "magnitude", "pattern": {"sparsity": sparsity}, "targets": ["*"], "allocation": "global"},
        ],
        "rest_dtype": "float32",
    }
    net = Net()
    layers = rarefy.compress(net, recipe, measure=False).layers
    weights = {name: find_weight(net, name).read().numpy() for name in layers}
    assert sum(weight.size for weight in weights.values()) == sum(
        p.numel() for n, p in net.named_parameters() if n.endswith("weight")
    )
    sizes = np.sort(np.concatenate([np.abs(weight).ravel() for weight in weights.values()]))
    num_zero = round(sparsity * sizes.size)
    threshold = sizes[num_zero] if num_zero < sizes.size else np.inf
    for name, weight in weights.items():
        assert np.array_equal(layers[name].to_dense() != 0, np.abs(weight) >= threshold), name


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("allocation", ["erk", {"rule": "owl", "threshold": 2.0}, "global"], ids=str)
def test_a_network_of_convolutions_has_the_zeros_asked_for(method, allocation):
    recipe = {"steps": [{"method": method, "pattern": {"sparsity": 0.6}, "allocation": allocation}]}
    report = rarefy.compress(Net(), recipe, calibration=IMAGES, measure=False).report
    sizes = [layer.shape[0] * layer.shape[1] for layer in report.layers]
    zeros = [round(layer.sparsity * size) for layer, size in zip(report.layers, sizes, strict=True)]
    assert len(report.layers) == 4  # the groups are layers; depthwise has to be asked for
    assert sum(zeros) == round(0.6 * sum(sizes))
    assert len({layer.sparsity for layer in report.layers}) > 2
    rule = allocation if isinstance(allocation, str) else "owl"
    least, most = min(layer.sparsity for layer in report.layers), max(layer.sparsity for layer in report.layers)
    words = f"step 1 ({method}), allocation {rule}: {least:.1%} to {most:.1%} zeros in a layer"
    assert words in report.notes
    assert words in json.loads(json.dumps(report.to_json()))["notes"]


@pytest.fixture(scope="module")
def model_dir(tiny_llama_dir, tmp_path_factory):
    """Four blocks, and a head of its own, which is solved after them."""
    path = tmp_path_factory.mktemp("allocate") / "m"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama_dir)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for number, block in enumerate(model.model.layers):
            block.mlp.up_proj.weight[:, : 2 * number] *= 20  # outliers
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def recipe_with(allocation, method="wanda", pattern=None):
    return {"steps": [{"method": method, "pattern": pattern or {"sparsity": 0.5}, "allocation": allocation}]}


@pytest.fixture
def compress(model_dir, text_file, tmp_path):
    def call(recipe, *, out, stop_at=None, source=model_dir, **options):
        phases = []

        def progress(phase, done, total, detail):
            assert done <= total
            phases.append(phase)
            if phase == "compress" and detail == stop_at:
                raise KeyboardInterrupt

        given = {"calibration": text_file, "samples": 16, "sequence_length": 32, "measure": False}
        result = rarefy.compress(source, recipe, out=tmp_path / out, progress=progress, **given | options)
        return result, phases

    return call


def weights_of(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes()


def test_uniform_gives_the_bytes_that_no_allocation_gives(compress, tmp_path):
    plain = {"steps": [{"method": "wanda", "pattern": {"sparsity": 0.37}}]}
    compress(plain, out="plain")
    _, phases = compress(recipe_with("uniform", pattern={"sparsity": 0.37}), out="uniform")
    assert weights_of(tmp_path / "plain") == weights_of(tmp_path / "uniform")
    assert (tmp_path / "plain" / "recipe.yaml").read_bytes() == (tmp_path / "uniform" / "recipe.yaml").read_bytes()
    assert "allocate" not in phases


@pytest.mark.parametrize(
    "pattern",
    [
        {"sparsity": 0.5},
        {"keep": 20, "group": 64},
        {"block": [16, 32], "sparsity": 0.5},
        {"axis": "rows", "sparsity": 0.3},
    ],
    ids=str,
)
def test_the_plan_of_erk_is_what_is_written(compress, model_dir, tmp_path, pattern):
    recipe = recipe_with("erk", "magnitude", pattern)
    plan = plan_of(model_dir, recipe)
    result, phases = compress(recipe, out="OUT")
    assert "allocate" not in phases
    assert [layer.packed_bytes for layer in plan.layers] == [layer.packed_bytes for layer in result.report.layers]
    assert [layer.format for layer in plan.layers] == [layer.format for layer in result.report.layers]
    assert all(layer.exact and not layer.is_mean for layer in plan.layers)
    assert len({layer.sparsity for layer in result.report.layers}) > 2
    assert plan.notes == tuple(text for text in result.report.notes if "allocation erk" in text)
    assert sum(layer.nbytes for layer in map(read_artifact(tmp_path / "OUT").layer, result.layers)) == sum(
        layer.packed_bytes for layer in plan.layers
    )


@pytest.mark.parametrize("rule", ["owl", "global"])
def test_the_plan_of_a_look_at_the_model_is_that_of_the_mean_and_says_so(model_dir, rule):
    plan, uniform = (plan_of(model_dir, recipe_with(name)) for name in (rule, "uniform"))
    assert [layer.packed_bytes for layer in plan.layers] == [layer.packed_bytes for layer in uniform.layers]
    assert all(layer.is_mean and not layer.exact for layer in plan.layers)
    assert all(row[-1].startswith("~ ") for row in plan.table()[1:])
    assert f"allocation {rule}: a look at the dense model will say" in plan.notes[0]
    assert plan.to_json()["layers"][0]["is_mean"] is True
    assert plan.seconds_parts["allocation"] == pytest.approx(plan.seconds_parts["forward passes"] / 2, rel=0.7)
    assert uniform.seconds_parts["allocation"] == 0


@pytest.mark.parametrize("method", ["magnitude", "alps", "dsnot"])
def test_owl_spares_the_blocks_with_outliers_whatever_the_method(compress, method):
    recipe = recipe_with("owl", method)
    result, phases = compress(recipe, out="OUT")
    assert "allocate" in phases
    by_block = [{layer.sparsity for layer in result.report.layers if f".{n}." in layer.name} for n in range(NUM_BLOCKS)]
    means = [float(np.mean(list(each))) for each in by_block]
    assert means[0] > means[1] > means[2] > means[3]
    assert all(max(each) - min(each) < 2e-3 for each in by_block)  # to whole weights
    assert np.mean(means) == pytest.approx(0.5, abs=1e-4)
    assert result.report.calibration is not None


def test_k_of_64_differs_by_layer(compress):
    result, _ = compress(recipe_with("owl", "wanda", {"keep": 20, "group": 64}), out="OUT")
    kept = [round((1 - layer.sparsity) * 64) for layer in result.report.layers if layer.shape[1] == 64]
    assert len(set(kept)) >= 3
    assert np.mean([layer.sparsity for layer in result.report.layers]) == pytest.approx(1 - 20 / 64, abs=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rule", ["owl", "global"])
def test_an_interrupted_run_keeps_its_amounts_and_gives_the_same_bytes(compress, tmp_path, rule, dtype):
    recipe = recipe_with(rule, "sparsegpt")
    _, phases = compress(recipe, out="whole", compute_dtype=dtype)
    assert phases.count("allocate") > 2
    with pytest.raises(KeyboardInterrupt):
        compress(recipe, out="OUT", compute_dtype=dtype, stop_at="model.layers.2.mlp.up_proj")
    amounts = json.loads((tmp_path / "OUT.partial" / "amounts.json").read_text())
    assert len(set(amounts["0"].values())) > 3
    _, phases = compress(recipe, out="OUT", compute_dtype=dtype)
    assert phases.count("allocate") == 2  # begun and ended, and no batch between
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "OUT")
    with pytest.raises(KeyboardInterrupt):
        compress(recipe, out="OUT2", compute_dtype=dtype, stop_at="model.layers.2.mlp.up_proj")
    (tmp_path / "OUT2.partial" / "amounts.json").write_text("[1]")
    _, phases = compress(recipe, out="OUT2", compute_dtype=dtype)
    assert phases.count("allocate") > 2
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "OUT2")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streaming_gives_the_same_bytes_as_holding_the_model(compress, model_dir, tmp_path, dtype):
    recipe = recipe_with("owl")
    compress(recipe, out="streamed", compute_dtype=dtype)
    compress(recipe, out="held", compute_dtype=dtype, source=load_model(model_dir))
    assert weights_of(tmp_path / "streamed") == weights_of(tmp_path / "held")


def test_a_step_after_another_and_targets_of_its_own(compress):
    """Amounts are those of the step's own layers; a step before keeps its zeros."""
    recipe = {
        "steps": [
            {"method": "magnitude", "pattern": {"sparsity": 0.2}, "allocation": "global", "targets": ["*_proj"]},
            {"method": "wanda", "pattern": {"sparsity": 0.6}, "allocation": "owl", "targets": ["*.mlp.*"]},
            {"method": "rtn", "values": {"num_bits": 8}, "targets": ["*_proj"]},
        ]
    }
    report = compress(recipe, out="OUT")[0].report
    mlp = [layer for layer in report.layers if ".mlp." in layer.name]
    others = [layer for layer in report.layers if ".mlp." not in layer.name]
    size = sum(layer.shape[0] * layer.shape[1] for layer in mlp)
    assert round(sum(layer.sparsity * layer.shape[0] * layer.shape[1] for layer in mlp)) == round(0.6 * size)
    assert all(layer.sparsity < 0.4 for layer in others)
    assert {layer.num_bits for layer in report.layers} == {8}


def test_a_damaged_model_is_named_in_the_walk():
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp"):
        rarefy.compress(model, recipe_with("global", "magnitude"), measure=False)


@dataclass(frozen=True)
class FirstOnly:
    """A rule of a user: all zeros in the first layer."""

    paper: ClassVar[str] = "none"

    def amounts(self, sparsity, layers):
        total = sum(layer.size for layer in layers)
        return {layer.name: 0.0 for layer in layers} | {layers[0].name: sparsity * total / layers[0].size}


def test_a_rule_of_the_caller():
    recipe = Recipe((Step(Magnitude(Unstructured(0.25)), allocation=FirstOnly()),))
    report = rarefy.compress(tiny.mlp(), recipe, measure=False).report
    assert [layer.sparsity for layer in report.layers] == pytest.approx([0.25 * 640 / 240, 0, 0])
    assert recipe.to_dict()["steps"][0]["allocation"] == "firstonly"


def test_what_an_allocation_is_not_for():
    with pytest.raises(RecipeError, match="svd, which takes no pattern"):
        Step(rarefy.methods.SVD(rank=rarefy.core.ranks.Rank(count=1)), allocation=OWL())
    with pytest.raises(RecipeError, match="threshold is 0") as caught:
        rarefy.compress(tiny.mlp(), recipe_with({"rule": "owl", "threshold": 0}), measure=False)
    assert caught.value.exit_code == 2
