from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rarefy.artifact import write_artifact
from rarefy.core.errors import DamagedFileError, PathError, UsageError
from rarefy.layouts import Layout
from rarefy.nn import CompressedLinear, load_into

LayoutFor = Callable[[str, np.ndarray], Layout]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(4 * 36, 32)
        self.out = nn.Linear(32, 10)
        self.tied = nn.Linear(10, 32)
        self.also = nn.Linear(10, 32)
        self.also.weight = self.tied.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.also(self.out(self.hidden(self.bn(self.conv(x)).relu().flatten(1)).relu()))
        return y


def make(seed: int) -> Net:
    torch.manual_seed(seed)
    net = Net().eval()
    net.bn.running_mean = torch.randn(4)
    net.bn.num_batches_tracked.fill_(seed)
    return net


def write(path: Path, net: Net, layout_for: LayoutFor, *, drop: str = "", extra: str = "") -> None:
    layers = {
        "hidden": layout_for("nm-bf16-v1", net.hidden.weight.detach().numpy()),
        "out": layout_for("dense-f32-v1", net.out.weight.detach().numpy()),
    }
    for name, layout in layers.items():
        net.get_submodule(name).weight.data = torch.from_numpy(layout.to_dense()).clone()
    stored = {k: v.numpy() for k, v in net.state_dict().items() if k not in ("hidden.weight", "out.weight", drop)}
    del stored["also.weight"]
    if extra:
        stored[extra] = np.zeros(3, np.float32)
    write_artifact(path, config={}, layers=layers, tied={}, tensors=stored, extra_files={}, force=True)


def test_a_plain_module_comes_back(tmp_path: Path, layout_for: LayoutFor) -> None:
    net = make(1)
    write(tmp_path / "out", net, layout_for)
    other = make(2)
    load_into(other, tmp_path / "out")
    assert isinstance(other.hidden, CompressedLinear)
    assert other.also.weight is other.tied.weight
    assert int(other.bn.num_batches_tracked) == 1
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        # the hidden layer rounds its inputs to bfloat16
        torch.testing.assert_close(other(x), net(x), rtol=0, atol=2.0**-7 * float(net(x).abs().max()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "bn.running_mean"}, "'bn.running_mean' of the module is missing"),
        ({"drop": "hidden.bias"}, "'hidden.bias' of the module is missing"),
        ({"extra": "stray"}, "'stray' is not in the Net"),
        ({"drop": "conv.bias", "extra": "conv.bias"}, r"shape \(3,\); allowed: \(4,\)"),
    ],
)
def test_damage_is_found_before_anything_changes(
    tmp_path: Path, layout_for: LayoutFor, change: dict[str, str], message: str
) -> None:
    write(tmp_path / "out", make(1), layout_for, **change)
    other = make(2)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(DamagedFileError, match=message):
        load_into(other, tmp_path / "out")
    after = other.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_wrong_places(tmp_path: Path, layout_for: LayoutFor) -> None:
    with pytest.raises(PathError):
        load_into(make(1), tmp_path / "nowhere")
    write(tmp_path / "out", make(1), layout_for)
    with pytest.raises((UsageError, DamagedFileError)):
        load_into(nn.Linear(2, 2), tmp_path / "out")
