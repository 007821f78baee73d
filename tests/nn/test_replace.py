import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from rarefy.core.errors import UnsupportedModelError, UsageError
from rarefy.layouts import Layout
from rarefy.nn import CompressedEmbedding, CompressedLinear, replace_linear, why_not_replaceable

LayoutFor = Callable[[str, np.ndarray], Layout]


class Toy(nn.Module):
    """An embedding, a shared layer, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.first = nn.Linear(16, 16)
        self.again = self.first
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.norm(self.again(self.first(self.table(ids)).relu())))
        return y


def compressed(layout_for: LayoutFor, module: nn.Module, format_name: str) -> Layout:
    layout = layout_for(format_name, module.weight.detach().numpy())
    module.weight.data = torch.from_numpy(layout.to_dense()).clone()
    return layout


def test_replaced_layers_compute_what_the_dense_ones_did(layout_for: LayoutFor) -> None:
    torch.manual_seed(0)
    dense = Toy().eval()
    layers = {
        "table": compressed(layout_for, dense.table, "dense-bf16-v1"),
        "first": compressed(layout_for, dense.first, "bitmask-bf16-v1"),
    }
    model = copy.deepcopy(dense)
    bias = model.first.bias
    replace_linear(model, layers, {"head": "table"})
    assert isinstance(model.table, CompressedEmbedding)
    assert isinstance(model.head, CompressedLinear)
    assert model.head.tied_to is model.table
    assert model.first.bias is bias  # the parameter itself: an optimizer may hold it
    ids = torch.arange(20)[None]
    with torch.no_grad():
        # two layers round their inputs to bfloat16
        torch.testing.assert_close(model(ids), dense(ids), rtol=0, atol=2 * 2.0**-8 * float(dense(ids).abs().max()))
    assert not any(name.endswith("head.values") for name in model.state_dict())


def test_a_module_with_two_names_stays_one_module(layout_for: LayoutFor) -> None:
    model = Toy()
    layout = compressed(layout_for, model.first, "dense-int8-v1")
    replace_linear(model, {"first": layout, "again": layout})
    assert model.first is model.again


def test_nothing_is_replaced_when_one_layer_does_not_fit(layout_for: LayoutFor) -> None:
    model = Toy()
    good = compressed(layout_for, model.first, "dense-int8-v1")
    wrong = layout_for("dense-int8-v1", np.ones((3, 16), np.float32))
    cases: list[tuple[dict[str, Layout], dict[str, str], type[Exception], str]] = [
        ({"first": good, "nowhere": good}, {}, UsageError, "no such module"),
        ({"first": good, "head": wrong}, {}, UsageError, r"\(3, 16\); allowed: \(20, 16\)"),
        ({"first": good, "norm": good}, {}, UnsupportedModelError, "LayerNorm"),
        ({"first": good}, {"head": "table"}, UsageError, "tied to 'table'"),
    ]
    for layers, tied, error, message in cases:
        with pytest.raises(error, match=message):
            replace_linear(model, layers, tied)
        assert type(model.first) is nn.Linear


class Shifted(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids + 1)


class Scaled(nn.Embedding):
    embed_scale = 3.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.embed_scale


def test_which_modules_can_be_replaced(layout_for: LayoutFor) -> None:
    assert why_not_replaceable(nn.Linear(2, 2)) is None
    assert why_not_replaceable(nn.Embedding(2, 2)) is None
    assert why_not_replaceable(Scaled(2, 2)) is None
    assert "of its own" in str(why_not_replaceable(Shifted(2, 2)))
    assert "max_norm" in str(why_not_replaceable(nn.Embedding(2, 2, max_norm=1.0)))
    assert why_not_replaceable(nn.Conv2d(2, 2, 1)) is None
    assert "transposed" in str(why_not_replaceable(nn.ConvTranspose2d(2, 2, 1)))
    # Attention calls torch's fused function with this layer's weight, never the layer.
    attention = nn.MultiheadAttention(4, 2)
    assert "NonDynamicallyQuantizableLinear" in str(why_not_replaceable(attention.out_proj))
    model = nn.Sequential(Scaled(20, 16))
    expected = model(torch.arange(20))
    replace_linear(model, {"0": layout_for("dense-f32-v1", model[0].weight.detach().numpy())})
    assert torch.equal(model(torch.arange(20)), expected)
