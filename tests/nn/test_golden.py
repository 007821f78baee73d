"""The frozen artifact with a layer of each kind, loaded into torch's modules."""

from pathlib import Path

import pytest
import torch
from torch import nn

import rarefy
from rarefy.artifact import read_artifact
from rarefy.nn.replace import find_weight

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "layers-v1"


class OneOfEach(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.linear = nn.Linear(4, 3, bias=False)
        self.transposed = Conv1D(3, 4)
        self.transposed.bias = None
        self.conv = nn.Conv2d(4, 3, (2, 3))
        self.grouped = nn.Conv1d(4, 6, 3, groups=2, bias=False)
        self.depthwise = nn.Conv2d(4, 4, (2, 3), groups=4, bias=False)
        self.rnn = nn.RNN(2, 2, bias=False)


def expected(shape: tuple[int, ...]) -> torch.Tensor:
    """A parameter that tells places: entry [o, i, y, x] is 1000 o + 100 i + 10 y + x."""
    total = torch.zeros(shape)
    for axis, (size, factor) in enumerate(zip(shape, (1000, 100, 10, 1), strict=False)):
        total += factor * torch.arange(size).reshape(-1, *(1,) * (len(shape) - axis - 1))
    return total


def test_every_weight_comes_back_to_its_place() -> None:
    model = OneOfEach()
    artifact = read_artifact(GOLDEN)
    for name, layout in artifact.layers.items():
        weight = find_weight(model, name)
        with torch.no_grad():
            weight.write(torch.from_numpy(layout.to_dense()))
        torch.testing.assert_close(weight.read(), torch.from_numpy(layout.to_dense()), rtol=0, atol=0)
    parameters = {name: value for name, value in model.named_parameters() if "bias" not in name}
    assert len(parameters) == 7
    for name, value in parameters.items():
        torch.testing.assert_close(value.detach(), expected(tuple(value.shape)), rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("name", ["conv", "grouped", "depthwise"])
def test_the_packed_layers_show_the_same_weights(name: str) -> None:
    model = OneOfEach()
    rarefy.load_into(model, GOLDEN)
    weight = getattr(model, name).weight
    torch.testing.assert_close(weight * 1.0, expected(tuple(weight.shape)), rtol=0, atol=0)
