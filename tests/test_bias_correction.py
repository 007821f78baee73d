"""Bias correction: no output is shifted on calibration data, and the biases reach every way of running the result."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import rarefy
from rarefy.artifact import read_artifact
from rarefy.calibrate.statistics import Mean
from rarefy.core.errors import DamagedFileError, RecipeError
from rarefy.core.patterns import Unstructured
from rarefy.core.solution import Solution
from rarefy.methods import BiasCorrection, Magnitude
from rarefy.models import load_model
from rarefy.nn.loading import load_into

CORRECT = {"method": "bias-correction", "targets": "*"}
ZEROS = {"method": "magnitude", "pattern": {"sparsity": 0.6}, "targets": "*"}
SMALL = {"samples": 16, "sequence_length": 32}


class Net(nn.Module):
    """A convolution, one in groups, a depthwise one, a linear layer: with biases or without."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 24, 3, padding=1, bias=bias)
        self.grouped = nn.Conv2d(24, 32, 3, groups=2, bias=bias)
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32, bias=bias)
        self.linear = nn.Linear(32 * 36, 10, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(torch.relu(self.grouped(torch.relu(self.conv(x)))))
        return self.linear(torch.relu(x).flatten(1))


def network(bias: bool) -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    return Net(bias).eval(), [torch.rand(4, 8, 10, 10) for _ in range(3)]


def seen(model: nn.Module, batches: list[torch.Tensor]) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Input and output of every layer in every batch."""
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name, _ in model.named_children()}
    handles = [
        module.register_forward_hook(lambda _, args, y, name=name: found[name].append((args[0], y)))
        for name, module in model.named_children()
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("bias", [True, False])
def test_no_output_is_shifted_on_the_calibration_data(bias):
    dense, batches = network(bias)
    calls = seen(dense, batches[:-1])  # the last one is kept for the verdict
    shifts = []
    for steps in ([ZEROS], [ZEROS, CORRECT]):
        loaded = load_model(copy.deepcopy(dense))
        rarefy.compress(loaded, {"steps": steps}, calibration=batches, measure=False)
        worst = 0.0
        for name, layer in loaded.model.named_children():
            with torch.no_grad():
                lost = torch.cat([layer(x) - y for x, y in calls[name]])
            axes = [axis for axis in range(lost.ndim) if axis != 1]
            worst = max(worst, float(lost.double().mean(axes).abs().max()))
        shifts.append(worst)
    assert shifts[0] > 1e-2
    assert shifts[1] <= 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_a_directory_gives_the_biases_back(bias, tmp_path):
    dense, batches = network(bias)
    run = rarefy.compress(dense, {"steps": [ZEROS, CORRECT]}, calibration=batches, out=tmp_path / "OUT")
    names = {"conv.bias", "grouped.bias", "depthwise.bias", "linear.bias"}
    assert names <= set(read_artifact(tmp_path / "OUT").names())
    assert not any("bias-correction" in warning for warning in run.report.warnings)
    fresh, _ = network(bias)
    load_into(fresh, tmp_path / "OUT")
    model = run.model()
    for name in names:
        assert torch.equal(fresh.get_parameter(name), model.get_parameter(name))
        assert not bias or not torch.equal(fresh.get_parameter(name), dense.get_parameter(name))
    with torch.no_grad():
        assert torch.equal(fresh(batches[0]), model(batches[0]))


def test_a_superfluous_bias_is_still_refused(tmp_path):
    """Of a layer that is not compressed nothing is known but its class."""
    dense, batches = network(True)
    rarefy.compress(dense, {"steps": [{**ZEROS, "targets": "conv"}]}, calibration=batches, out=tmp_path / "OUT")
    with pytest.raises(DamagedFileError, match=r"tensor 'depthwise\.bias' is not in the Net"):
        load_into(network(False)[0], tmp_path / "OUT")


def test_both_runtimes_add_the_biases_of_a_language_model(tiny_llama_dir, text_file, tmp_path):
    steps = [{**ZEROS, "targets": ["*_proj", "lm_head"]}, {**CORRECT, "targets": ["*_proj", "lm_head"]}]
    run = rarefy.compress(
        tiny_llama_dir, {"steps": steps}, calibration=text_file, out=tmp_path / "OUT", measure=False, **SMALL
    )
    stored = [name for name in read_artifact(tmp_path / "OUT").names() if name.endswith(".bias")]
    assert len(stored) == 14  # seven layers in each of two blocks; none of the tied pair
    left = [layer.name for layer in run.report.layers if "bias-correction" not in layer.steps]
    assert left == ["model.embed_tokens"]
    assert any("bias-correction left model.embed_tokens as it was" in warning for warning in run.report.warnings)
    ids = [5, 9, 30, 77, 5, 120]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "OUT")
    with torch.no_grad():
        expected = run.model()(torch.tensor([ids])).logits[0].numpy()
        found = loaded(torch.tensor([ids])).logits[0].numpy()
        for name in stored:
            assert bool(loaded.get_parameter(name).any())
            loaded.get_parameter(name).zero_()
        without = loaded(torch.tensor([ids])).logits[0].numpy()
    engine = rarefy.Engine(tmp_path / "OUT").logits(ids)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(engine - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(without - expected).max() > 1e-3 * np.abs(expected).max()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "OUT")
    again.save_pretrained(tmp_path / "AGAIN")
    with torch.no_grad():
        third = AutoModelForCausalLM.from_pretrained(tmp_path / "AGAIN")(torch.tensor([ids])).logits[0].numpy()
    assert np.array_equal(third, found)


def test_an_interrupted_run_gives_the_same_bytes(check_interrupted_run):
    check_interrupted_run({"steps": [{**ZEROS, "targets": "*_proj"}, {**CORRECT, "targets": "*_proj"}]}, **SMALL)


def test_recurrent_layers_have_all_their_biases_or_none(tmp_path):
    for bias in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.GRU(12, 16, bias=bias, batch_first=True)).eval()
        run = rarefy.compress(
            model,
            {"steps": [ZEROS, CORRECT]},
            calibration=[torch.rand(2, 5, 12)],
            out=tmp_path / str(bias),
            measure=False,
        )
        left = [layer.name for layer in run.report.layers if "bias-correction" not in layer.steps]
        assert left == ([] if bias else ["0.weight_ih_l0", "0.weight_hh_l0"])
        assert len([w for w in run.report.warnings if "bias-correction left" in w]) == len(left)
        fresh = nn.Sequential(nn.GRU(12, 16, bias=bias, batch_first=True)).eval()
        load_into(fresh, tmp_path / str(bias))
        with torch.no_grad():
            assert torch.equal(fresh(torch.ones(1, 3, 12))[0], run.model()(torch.ones(1, 3, 12))[0])


def test_it_comes_last():
    model, batches = network(True)
    with pytest.raises(RecipeError, match="magnitude comes after bias-correction on layer conv"):
        rarefy.compress(model, {"steps": [CORRECT, ZEROS]}, calibration=batches, measure=False)


def test_the_shift_is_what_the_earlier_steps_lost():
    rng = np.random.default_rng(0)
    start = Solution.dense(rng.standard_normal((5, 9)).astype(np.float32))
    pruned = Magnitude(Unstructured(0.5)).compress(start, {}, layer="x")
    mean = torch.from_numpy(rng.standard_normal(9).astype(np.float32))
    found = BiasCorrection().compress(pruned, {Mean(): mean}, layer="x")
    assert np.allclose(found.bias_O, (start.weight_OI - pruned.weight_OI) @ mean.numpy(), atol=1e-6)
    assert found.weight_OI is pruned.weight_OI
    assert not BiasCorrection().compress(start, {Mean(): mean}, layer="x").bias_O.any()
