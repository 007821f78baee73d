"""Statistics of batch norm against means and variances that numpy computes."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import rarefy
from rarefy.calibrate.batch_norm import has_batch_norm, reestimate_batch_norm
from rarefy.calibrate.calls import Call
from rarefy.core.errors import CalibrationError, NonFiniteError, RecipeError, UsageError


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    convs = [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)]
    return nn.Sequential(*convs, nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 3)).eval()


@pytest.fixture
def batches() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [3 * torch.randn(size, 2, 6, 6) + 1 for size in (8, 8, 5)]


def test_the_statistics_are_those_of_all_batches(net, batches):
    before = copy.deepcopy(net.state_dict())
    found = reestimate_batch_norm(net, [Call((x,), {}) for x in batches])
    assert sorted(found) == ["1.running_mean", "1.running_var", "4.running_mean", "4.running_var"]
    with torch.no_grad():
        first = [net[0](x).double().numpy() for x in batches]
        normal = []  # each batch by its own moments, as in training
        for y in first:
            mean, var = y.mean(axis=(0, 2, 3), keepdims=True), y.var(axis=(0, 2, 3), keepdims=True)
            normal.append(torch.from_numpy((y - mean) / np.sqrt(var + 1e-5)).float())
        second = [net[3](torch.relu(y)).double().numpy() for y in normal]
    for name, values in (("1", first), ("4", second)):
        channels = np.concatenate([y.swapaxes(0, 1).reshape(y.shape[1], -1) for y in values], axis=1)
        np.testing.assert_allclose(found[f"{name}.running_mean"], channels.mean(axis=1), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[f"{name}.running_var"], channels.var(axis=1, ddof=1), rtol=1e-4)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not any(module.training for module in net.modules())


def test_what_cannot_be_estimated(net, batches):
    flat = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    with pytest.raises(CalibrationError, match="batches of several examples"):
        reestimate_batch_norm(flat, [Call((torch.ones(1, 4),), {})])
    with pytest.raises(NonFiniteError, match="layer 1"):
        reestimate_batch_norm(flat, [Call((torch.full((3, 4), torch.inf),), {})])
    assert not has_batch_norm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)))


STEPS = {"steps": [{"method": "magnitude", "targets": "*", "pattern": {"sparsity": 0.8}}], "rest_dtype": "float32"}


def test_a_recipe_asks_for_it_and_the_artifact_has_it(net, batches, tmp_path):
    run = rarefy.compress(
        net, {**STEPS, "reestimate_batch_norm": True}, calibration=batches, measure=False, out=tmp_path / "out"
    )
    model = run.model()
    pruned = copy.deepcopy(model)
    for name in ("1", "4"):
        pruned.get_submodule(name).load_state_dict(net.get_submodule(name).state_dict())
    calls = [Call((x,), {}) for x in batches[:2]]  # the last one is kept for the verdict
    expected = reestimate_batch_norm(pruned, calls)
    assert not torch.allclose(expected["1.running_var"], net[1].running_var)
    artifact = rarefy.read_artifact(tmp_path / "out")
    for name, value in expected.items():
        torch.testing.assert_close(model.get_buffer(name), value)
        torch.testing.assert_close(torch.from_numpy(artifact.tensor(name).copy()), value)
    # without being asked nothing changes
    plain = rarefy.compress(net, STEPS, calibration=batches, measure=False).model()
    assert torch.equal(plain[1].running_mean, net[1].running_mean)


def test_it_is_refused_before_the_work(net):
    recipe = {**STEPS, "reestimate_batch_norm": True}
    with pytest.raises(RecipeError, match="has no batch norm"):
        rarefy.compress(nn.Sequential(nn.Linear(4, 3)), recipe, calibration=[torch.ones(3, 4)], measure=False)
    with pytest.raises(RecipeError, match="has no batch norm"):
        rarefy.run.plan(nn.Sequential(nn.Linear(4, 3)), recipe)
    with pytest.raises(UsageError, match="does not read text"):
        rarefy.compress(net, recipe, measure=False)
