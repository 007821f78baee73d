"""The block-by-block pass on tiny models of every kind, with a method whose result a test can compute by itself."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from rarefy.calibrate import Gram, SquaredNorm
from rarefy.calibrate.calls import Call
from rarefy.calibrate.inputs import example_calls, text_calls
from rarefy.core.errors import NonFiniteError
from rarefy.core.patterns import Unstructured
from rarefy.core.solution import Solution
from rarefy.methods.closeness import relative_error
from rarefy.models import load_model
from rarefy.solve import Task, solve_model

sys.path.insert(0, str(Path(__file__).parent / "models"))

import tiny

IDS_NL = torch.randint(3, 99, (6, 10), generator=torch.Generator().manual_seed(1))
SEEN: dict[str, np.ndarray] = {}


@dataclass(frozen=True)
class Half:
    """Zeros the smaller half of each row by |w| * sqrt(mean x^2), and remembers the Gram matrix it was given."""

    paper: ClassVar[str] = "none"
    data: bool = True

    def needs(self):
        return (Gram(), SquaredNorm()) if self.data else ()

    def compress(self, solution, stats, *, layer):
        weight = solution.weight_OI
        score = np.abs(weight)
        if self.data:
            SEEN[layer] = stats[Gram()].numpy().copy()
            score = score * np.sqrt(stats[SquaredNorm()].numpy())
        keep = weight.shape[1] - weight.shape[1] // 2
        mask = np.zeros(weight.shape, dtype=bool)
        np.put_along_axis(mask, np.argsort(-score, axis=1, kind="stable")[:, :keep], True, axis=1)
        return Solution(weight * mask, mask, Unstructured(0.5), None)


def _tasks(structure, *, data=True, inside_blocks=True):
    return [
        Task(layer.name, (("half", Half(data=data)),))
        for layer in structure.layers
        if layer.kind == "linear" and layer.compressible and (layer.block is not None or not inside_blocks)
    ]


def _solve(model, calls, *, data=True, inside_blocks=True, **options):
    SEEN.clear()
    loaded = model if not isinstance(model, nn.Module) else load_model(model)
    structure = loaded.structure()
    tasks = _tasks(structure, data=data, inside_blocks=inside_blocks)
    return solve_model(loaded, structure, tasks, calls, **options), tasks


def _gram_of_result(model, name, calls):
    """Mean x x^T of a layer's inputs in the finished model: what the layers before it were when it was solved."""
    inputs = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _m, args: inputs.append(args[0].detach().double().reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        for call in calls:
            model(*call.args, **call.kwargs)
    handle.remove()
    x = torch.cat(inputs).numpy()
    return x.T @ x / len(x)


@pytest.mark.parametrize(
    ("build", "first_layers"),
    [
        (tiny.llama, ["model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"]),
        (tiny.qwen2, ["model.layers.1.self_attn.v_proj"]),
        (tiny.gemma3, ["model.layers.3.self_attn.k_proj"]),
        (tiny.bert, ["encoder.layer.1.attention.self.query"]),
        (tiny.distilbert, ["transformer.layer.1.attention.q_lin"]),
        (
            tiny.t5,
            [
                "encoder.block.2.layer.0.SelfAttention.q",
                "decoder.block.0.layer.0.SelfAttention.q",
                "decoder.block.1.layer.0.SelfAttention.q",
            ],
        ),
    ],
)
def test_blocks_are_solved_on_what_the_solved_blocks_before_them_give(build, first_layers):
    """The input of a block's first layer depends on the blocks before it only, so the finished model reproduces it."""
    model = build()
    calls = text_calls(model, IDS_NL, 2)
    solved, tasks = _solve(model, calls)
    assert set(solved.layouts) == {task.layer for task in tasks}
    for name in first_layers:
        expected = _gram_of_result(model, name, calls)
        assert np.abs(SEEN[name] - expected).max() <= 1e-3 * np.abs(expected).max(), name


def test_the_model_in_memory_becomes_the_solution():
    model, original = tiny.llama(), tiny.llama()
    solved, _ = _solve(model, text_calls(model, IDS_NL, 3))
    for name, layout in solved.layouts.items():
        weight = model.get_submodule(name).weight.detach()
        stored = torch.from_numpy(layout.to_dense())
        assert torch.equal(weight.to(torch.bfloat16).float(), stored)
        kept = weight != 0
        assert torch.equal(weight[kept], original.get_submodule(name).weight[kept])
        assert solved.results[name].sparsity == pytest.approx(0.5)
        assert solved.results[name].packed_bytes == layout.nbytes
        assert solved.results[name].dense_bytes == weight.numel() * 4
        assert solved.results[name].steps == ("half",)
    untouched = {n: p for n, p in model.named_parameters() if n.removesuffix(".weight") not in solved.layouts}
    for name, parameter in untouched.items():
        assert torch.equal(parameter, original.get_parameter(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [tiny.llama, tiny.t5, tiny.bert, tiny.albert, tiny.gemma3])
def test_streaming_gives_the_same_bytes_as_holding_the_model(build, dtype, tmp_path):
    build().save_pretrained(tmp_path / "m")
    held, streamed = load_model(tmp_path / "m"), load_model(tmp_path / "m", stream=True)
    assert streamed.streams
    first, _ = _solve(held, text_calls(held.model, IDS_NL, 2), dtype=dtype)
    second, _ = _solve(streamed, text_calls(streamed.model, IDS_NL, 2), dtype=dtype)
    assert first.layouts.keys() == second.layouts.keys()
    assert len(first.layouts) > 5
    for name, layout in first.layouts.items():
        for key, array in layout.arrays().items():
            assert np.array_equal(array, second.layouts[name].arrays()[key])
    assert all(p.is_meta for p in streamed.model.parameters())
    assert all(p.dtype == torch.float32 for p in held.model.parameters())


def test_layers_outside_of_the_blocks_see_the_solved_blocks():
    model = tiny.qwen2()
    calls = text_calls(model, IDS_NL, 2)
    solved, _ = _solve(model, calls, inside_blocks=False)
    assert "lm_head" in solved.layouts
    expected = _gram_of_result(model, "lm_head", calls)
    assert np.abs(SEEN["lm_head"] - expected).max() <= 1e-3 * np.abs(expected).max()
    assert (model.lm_head.weight == 0).float().mean() == 0.5


def test_only_the_head():
    model = tiny.qwen2()
    loaded = load_model(model)
    structure = loaded.structure()
    calls = text_calls(model, IDS_NL, 2)
    SEEN.clear()
    solved = solve_model(loaded, structure, [Task("lm_head", (("half", Half()),))], calls)
    assert list(solved.layouts) == ["lm_head"]
    expected = _gram_of_result(model, "lm_head", calls)
    assert np.abs(SEEN["lm_head"] - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("build", [tiny.mlp, tiny.cnn, tiny.torch_encoder, tiny.albert])
def test_models_without_a_row_of_blocks(build):
    model = build()
    if build is tiny.albert:
        calls = text_calls(model, IDS_NL, 2)
    else:
        shape = {tiny.mlp: (6, 12), tiny.cnn: (3, 1, 8, 8), tiny.torch_encoder: (3, 5, 16)}[build]
        calls = example_calls([torch.randn(shape) for _ in range(3)], 3)
    solved, tasks = _solve(model, calls, inside_blocks=False)
    assert set(solved.layouts) == {task.layer for task in tasks} - set(solved.skipped)
    for name in solved.layouts:
        assert (model.get_submodule(name).weight == 0).float().mean() == pytest.approx(0.5, abs=0.05)


def test_methods_that_need_no_data_run_without_any():
    model = tiny.t5()
    solved, tasks = _solve(model, [], data=False)
    assert set(solved.layouts) == {task.layer for task in tasks}
    assert {result.error_metric for result in solved.results.values()} == {"weight"}


def test_a_layer_that_no_input_reaches_is_skipped_with_a_reason():
    model = tiny.mlp()
    model.unused = nn.Linear(12, 4)
    before = model.unused.weight.detach().clone()
    solved, _ = _solve(model, example_calls([torch.randn(4, 12)], 1), inside_blocks=False)
    assert "no calibration input" in solved.skipped["unused"]
    assert "unused" not in solved.layouts
    assert torch.equal(model.unused.weight, before)


@pytest.mark.parametrize("data", [True, False])
def test_nan_weights_are_named_before_they_do_harm(data):
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj"):
        _solve(model, text_calls(model, IDS_NL, 2), data=data)


def test_relative_error_is_that_of_the_outputs():
    rng = np.random.default_rng(0)
    weight, solution, x = rng.normal(size=(5, 7)), rng.normal(size=(5, 7)), rng.normal(size=(40, 7)) * range(1, 8)
    expected = np.square((weight - solution) @ x.T).sum() / np.square(weight @ x.T).sum()
    gram = torch.from_numpy((x.T @ x / 40).astype(np.float32))
    as_float = [torch.from_numpy(value.astype(np.float32)) for value in (weight, solution)]
    error, metric = relative_error(*as_float, {Gram(): gram})
    assert metric == "output"
    assert error == pytest.approx(expected, rel=1e-5)
    error, metric = relative_error(*as_float, {})
    assert metric == "weight"
    assert error == pytest.approx(np.square(weight - solution).sum() / np.square(weight).sum(), rel=1e-5)
    zeros = torch.zeros(5, 7)
    assert relative_error(zeros, zeros, {Gram(): gram}) == (0.0, "output")


@pytest.mark.parametrize("inside_blocks", [True, False])
@pytest.mark.parametrize("build", [tiny.llama, tiny.qwen2, tiny.t5, tiny.bert, tiny.albert])
def test_progress_counts_every_step_up_to_its_total(build, inside_blocks):
    told = []
    model = build()
    calls = text_calls(model, IDS_NL, 2)
    solved, _ = _solve(model, calls, inside_blocks=inside_blocks, progress=lambda *args: told.append(args))
    assert len(solved.layouts) > 5
    assert {x[0] for x in told} == {"compress"}
    assert [x[1:3] for x in told] == [(done, len(told)) for done in range(1, len(told) + 1)]


@pytest.mark.parametrize(
    ("names", "num_passes"),
    [
        (["model.layers.0.mlp.up_proj"], 1),
        (["model.layers.1.mlp.up_proj"], 2),
        (["model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"], 4),
    ],
)
def test_progress_counts_no_pass_that_no_layer_needs(names, num_passes):
    told = []
    model = tiny.llama()
    loaded = load_model(model)
    calls = text_calls(model, IDS_NL, 2)
    tasks = [Task(name, (("half", Half()),)) for name in names]
    solve_model(loaded, loaded.structure(), tasks, calls, progress=lambda *args: told.append(args))
    total = num_passes * len(calls) + len(names)
    assert [x[1:3] for x in told] == [(done, total) for done in range(1, total + 1)]


def test_progress_ends_where_the_model_never_calls_a_block():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))

        def forward(self, x):
            return self.layers[1](self.layers[0](x))

    told = []
    calls = example_calls([torch.randn(4, 8) for _ in range(5)], 5)
    solved, _ = _solve(Skipping(), calls, progress=lambda *args: told.append(args))
    assert list(solved.skipped) == ["layers.2.0"]
    assert told[-1][1] == told[-1][2]


def test_a_float16_module_is_solved_in_float32_and_stays_float16():
    model = tiny.mlp().half()
    solved, _ = _solve(model, [Call((torch.randn(8, 12).half(),), {})], inside_blocks=False, dtype=torch.float32)
    assert model.fc1.weight.dtype == torch.float16
    assert set(solved.layouts) == {"fc1", "fc2", "fc3"}
