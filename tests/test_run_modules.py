"""Modules that are unlike transformers: buffers of any type, depthwise convolutions, blocks that are used again."""

import numpy as np
import pytest
import torch
from torch import nn

import rarefy
import rarefy.run
from rarefy.core.errors import RecipeError, UnsupportedModelError
from rarefy.recipe import UNTARGETED

HALF = {"sparsity": 0.5}


class Buffers(nn.Module):
    def __init__(self, kind=torch.bool):
        super().__init__()
        self.linear = nn.Linear(24, 24)
        self.register_buffer("flag", torch.tensor([1, 0, 1]).to(kind))
        self.register_buffer("small", torch.arange(-3, 3, dtype=torch.int8))
        self.register_buffer("mask", torch.full((24, 24), -torch.inf).triu(1))

    def forward(self, x):
        return (self.linear(x) @ (self.mask == 0).float()) * self.flag[0].float()


def test_buffers_of_any_type_come_back(tmp_path):
    """A flag is of booleans, and a mask that is added to scores holds infinities."""
    data = [torch.randn(4, 24) for _ in range(3)]
    result = rarefy.compress(Buffers(), "magnitude-50", calibration=data, out=tmp_path / "OUT")
    copy = Buffers()
    for buffer in copy.buffers():
        buffer.zero_()
    rarefy.load_into(copy, tmp_path / "OUT")
    for name, wanted in Buffers().named_buffers():
        got = copy.get_buffer(name)
        assert got.dtype == wanted.dtype, name
        assert torch.equal(got, wanted), name
    with torch.no_grad():
        assert torch.equal(copy.eval()(data[0]), result.model()(data[0]))


def test_what_an_artifact_cannot_store_is_refused_before_the_work(tmp_path):
    told = []
    with pytest.raises(UnsupportedModelError, match=r"tensor flag: dtype complex64.*persistent=False"):
        rarefy.compress(Buffers(torch.complex64), "magnitude-50", out=tmp_path / "OUT", announce=told.append)
    assert not told
    assert rarefy.compress(Buffers(torch.complex64), "magnitude-50", measure=False).layers
    broken = Buffers()
    broken.mask[0, 0] = torch.nan
    with pytest.raises(rarefy.RarefyError, match="tensor mask: 1 of"):
        rarefy.compress(broken, "magnitude-50", measure=False)


class Depthwise(nn.Module):
    """15 weights in each of 10 channels, two outputs of a channel, and a product of them all."""

    def __init__(self):
        super().__init__()
        self.apart = nn.Conv2d(10, 20, (3, 5), groups=10)
        self.mix = nn.Conv2d(20, 6, 1)

    def forward(self, x):
        return self.mix(torch.relu(self.apart(x))).mean((2, 3))


def depthwise(*steps):
    torch.manual_seed(0)
    data = [torch.randn(4, 10, 8, 8) * torch.arange(1, 11)[:, None, None] for _ in range(3)]
    recipe = {"steps": [{"targets": "apart", **step} for step in steps]}
    result = rarefy.compress(Depthwise(), recipe, calibration=data, measure=False)
    return result, result.layers["apart"].to_dense()


DATA_METHODS = ["wanda", "ria", "taylor", "obd", "obert", "sparsegpt", "alps", "lasso"]


@pytest.mark.parametrize("method", ["magnitude", *DATA_METHODS])
def test_the_channels_of_a_depthwise_convolution_have_together_the_zeros_asked_for(method):
    """The share of one channel alone, 0.45 of 30 weights or 0.3 of 2 rows, is no whole number."""
    _, weight_OI = depthwise({"method": method, "pattern": {"sparsity": 0.45}})
    assert np.count_nonzero(weight_OI == 0) == 135
    result, weight_OI = depthwise({"method": method, "pattern": {"axis": "rows", "sparsity": 0.3}})
    assert np.count_nonzero(~weight_OI.any(axis=1)) == 6
    assert result.layers["apart"].format == "block-bf16-v1"
    # inputs grow from channel to channel, and those of the first channels matter least
    assert not weight_OI[:2].any() or method == "magnitude"


@pytest.mark.parametrize("method", [method for method in DATA_METHODS if method != "lasso"])
def test_nm_and_blocks_of_a_depthwise_convolution(method):
    _, weight_OI = depthwise({"method": method, "pattern": {"keep": 2, "group": 5}})
    assert (weight_OI.reshape(20, 3, 5).astype(bool).sum(axis=2) == 2).all()
    _, weight_OI = depthwise({"method": method, "pattern": {"block": [1, 5], "sparsity": 0.45}})
    assert np.count_nonzero(~weight_OI.reshape(60, 5).any(axis=1)) == 27


def test_a_step_that_reads_nothing_sees_the_whole_depthwise_convolution():
    """Whatever steps come after it: here one that solves each channel for itself."""
    rows = {"method": "magnitude", "pattern": {"axis": "rows", "sparsity": 0.35}}
    zero = ~depthwise(rows)[1].any(axis=1)
    assert zero.sum() == 7
    for after in (
        {"method": "refit"},
        {"method": "sparsegpt", "pattern": HALF},
        {"method": "gptq", "values": {"num_bits": 8}},
    ):
        _, weight_OI = depthwise(rows, after)
        assert (zero <= ~weight_OI.any(axis=1)).all()
    assert np.count_nonzero(depthwise(rows, {"method": "alps", "pattern": HALF})[1] == 0) == 150


@pytest.mark.parametrize(
    ("step", "why"),
    [
        ({"method": "wanda", "pattern": {"axis": "columns", "sparsity": 0.5}}, "no column is an input; rows fit it"),
        ({"method": "apoz", "pattern": {"axis": "columns", "sparsity": 0.5}}, "no column is an input; rows fit it"),
        ({"method": "alps", "pattern": {"block": [2, 5], "sparsity": 0.5}}, "blocks of one row fit it"),
        ({"method": "svd-llm", "rank": {"ratio": 0.5}}, "leaves factors nothing to share"),
        ({"method": "oats", "rank": {"count": 1}, "pattern": HALF}, "leaves factors nothing to share"),
    ],
)
def test_what_does_not_fit_a_depthwise_convolution_is_refused_before_the_work(step, why):
    with pytest.raises(RecipeError, match=rf"does not fit layer apart: .*{why}; hint: exclude: \[\"apart\"\]"):
        depthwise(step)


class Again(nn.Module):
    """A list that has a block at two places."""

    def __init__(self):
        super().__init__()
        block = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Tanh(), nn.Linear(16, 16))
        self.blocks = nn.ModuleList([block, nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), block])

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize(
    "steps",
    [
        [{"method": "sparsegpt", "pattern": HALF}],
        [{"method": "wanda", "pattern": HALF, "allocation": "owl"}],
        [{"method": "wanda", "pattern": HALF}, {"method": "bias-correction"}],
    ],
)
def test_a_block_at_two_places_is_compressed_once(steps, tmp_path):
    torch.manual_seed(0)
    model, data = Again().eval(), [torch.randn(8, 16) for _ in range(4)]
    result = rarefy.compress(model, {"steps": steps}, calibration=data, out=tmp_path / "OUT", measure=False)
    assert list(result.layers) == [f"blocks.{block}.{place}" for block in (0, 1) for place in (0, 2)]
    packed, copy = result.model(), Again().eval()
    assert packed.blocks[0] is packed.blocks[2]
    rarefy.load_into(copy, tmp_path / "OUT")
    with torch.no_grad():
        assert torch.equal(copy(data[0]), packed(data[0]))
        assert nn.functional.cosine_similarity(copy(data[0]), model(data[0])).mean() > 0.8


def test_a_layer_narrower_than_a_group_is_left_alone_and_the_report_says_why(tmp_path):
    """As the first convolution of an image model is, with 27 inputs."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    data = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    result = rarefy.compress(net, "k-of-64", calibration=data, measure=False)
    assert list(result.layers) == ["2", "5"]
    (left,) = result.report.untouched
    assert (left.name, left.reason) == ("0", "alps does not fit it: input axis 27 is smaller than the group of 64")
    planned = rarefy.run.plan(net, "k-of-64", calibration=data)
    assert [(row.name, row.reason) for row in planned.untouched] == [(left.name, left.reason)]
    steps = [{"method": "alps", "targets": "*", "pattern": {"keep": 32, "group": 64}}]
    with pytest.raises(RecipeError, match=r'layer 0: input axis 27 .*exclude: \["0"\], or choose a smaller group'):
        rarefy.compress(net, {"steps": steps}, calibration=data, measure=False)
    steps = [{"method": "alps", "targets": "5", "pattern": {"keep": 32, "group": 64}}]
    result = rarefy.compress(net, {"steps": steps}, calibration=data, measure=False)
    assert {left.reason for left in result.report.untouched} == {UNTARGETED}


class Skips(nn.Module):
    """Later blocks of a list read the outputs of earlier ones."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)) for _ in range(4))

    def forward(self, x):
        outputs = [x]
        for block in self.blocks:
            outputs.append(block(outputs[-1] + outputs[max(0, len(outputs) - 3)]))
        return outputs[-1]


@pytest.mark.parametrize("allocation", ["uniform", "owl"])
def test_statistics_are_right_where_blocks_read_outputs_of_earlier_ones(allocation):
    """Wanda's zeros from the inputs of the dense model, as where a model is no row of blocks."""
    torch.manual_seed(0)
    model, data = Skips().eval(), [torch.randn(32, 16) for _ in range(4)]
    inputs, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            note = lambda _, args, name=name: inputs.setdefault(name, []).append(args[0])  # noqa: E731
            hooks.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        for x in data[:3]:  # the last one is held out
            model(x)
    for hook in hooks:
        hook.remove()
    step = {"method": "wanda", "pattern": HALF, "allocation": allocation}
    told: list[str] = []
    result = rarefy.compress(model, {"steps": [step]}, calibration=data, measure=False, tell=told.append)
    assert any("do not follow one another" in line for line in told)
    for name, layout in result.layers.items():
        weight = model.get_submodule(name).weight.detach()
        score = weight.abs() * torch.cat(inputs[name]).norm(dim=0)
        num_kept = int((layout.to_dense()[0] != 0).sum())
        kept = torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.topk(num_kept, dim=1).indices, True)
        assert torch.equal(kept, torch.from_numpy(layout.to_dense() != 0)), name


def test_a_model_whose_weights_a_hook_computes_is_copied(tmp_path):
    """torch does not copy what is no leaf of a graph, which such a weight is from the beginning."""

    def made():
        with pytest.warns(FutureWarning, match="weight_norm"):
            normed = nn.utils.weight_norm(nn.Linear(24, 24))
        return nn.Sequential(normed, nn.ReLU(), nn.Linear(24, 4))

    model, data = made(), [torch.randn(4, 24) for _ in range(3)]
    result = rarefy.compress(model, "magnitude-50", calibration=data, out=tmp_path / "OUT")
    assert list(result.layers) == ["2"]
    copy = made()
    rarefy.load_into(copy, tmp_path / "OUT")
    with torch.no_grad():
        assert torch.equal(copy(data[0]), result.model()(data[0]))
