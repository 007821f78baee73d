"""Packed recurrent layers against torch's own ones in float64 that hold the unpacked weights."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from rarefy.core.errors import UsageError
from rarefy.layouts import Layout
from rarefy.nn import CompressedLinear, PackedRecurrent, replace_linear
from rarefy.nn.holder import LayoutHolder
from rarefy.nn.replace import weights_of

LayoutFor = Callable[..., Layout]


def packed(layout_for: LayoutFor, module: nn.RNNBase, format_name: str, only: str = "") -> tuple[nn.Module, nn.Module]:
    """A packed layer made of `module`, and `module` in float64 with the weights that the packed one stores."""
    model, dense = nn.Sequential(copy.deepcopy(module)), copy.deepcopy(module)
    layouts = {}
    for weight in weights_of(module, "0"):
        if only in weight.layer:
            layouts[weight.layer] = layout_for(format_name, weight.parameter.detach().numpy())
            stored = torch.from_numpy(layouts[weight.layer].to_dense())
            getattr(dense, weight.matrix.parameter).data = stored.clone()
    replace_linear(model, layouts)
    assert isinstance(model[0], PackedRecurrent)
    return model[0], dense.double()


def double(value: Any) -> Any:
    if isinstance(value, PackedSequence):
        return value.to(torch.float64)
    return tuple(double(item) for item in value) if isinstance(value, tuple) else value.double()


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data, value.batch_sizes]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, tuple) else [value]


def check(layer: nn.Module, dense: nn.Module, *args: Any) -> None:
    """Float layouts differ from float64 by rounding alone, which the gates squash: 1e-5 for values below 1 or so."""
    with torch.no_grad():
        got, expected = layer(*args), dense(*map(double, args))
    for a, b in zip(leaves(got), leaves(expected), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)


@st.composite
def layers(draw: st.DrawFn) -> nn.RNNBase:
    kind = draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]))
    options: dict[str, Any] = {
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
    }
    hidden = draw(st.integers(2, 9))
    if kind is nn.LSTM:
        options["proj_size"] = draw(st.integers(0, hidden - 1))
    if kind is nn.RNN:
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    torch.manual_seed(draw(st.integers(0, 99)))
    return kind(draw(st.integers(1, 9)), hidden, **options)


def first_state(module: nn.RNNBase, batch: int) -> Any:
    count = module.num_layers * (2 if module.bidirectional else 1)
    hidden = torch.randn(count, batch, module.proj_size or module.hidden_size)
    return (hidden, torch.randn(count, batch, module.hidden_size)) if isinstance(module, nn.LSTM) else hidden


@settings(max_examples=100, deadline=None)
@given(layers(), st.integers(1, 6), st.integers(1, 4), st.booleans())
def test_any_layer_gives_what_torch_gives(
    layout_for: LayoutFor, module: nn.RNNBase, num_steps: int, batch: int, with_state: bool
) -> None:
    layer, dense = packed(layout_for, module, "dense-f32-v1")
    shape = (batch, num_steps) if module.batch_first else (num_steps, batch)
    x = torch.randn(*shape, module.input_size)
    check(layer, dense, x, *([first_state(module, batch)] if with_state else []))


@settings(max_examples=40, deadline=None)
@given(layers(), st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_steps_in_torch_and_in_the_kernels_agree(layout_for: LayoutFor, module: nn.RNNBase, lengths: list[int]) -> None:
    """Where a gradient may be asked for torch computes the steps."""
    layer, _ = packed(layout_for, module, "dense-f32-v1")
    x = pack_sequence([torch.randn(length, module.input_size) for length in lengths], enforce_sorted=False)
    with_gradient = layer(x)
    with torch.no_grad():
        without = layer(x)
    for a, b in zip(leaves(with_gradient), leaves(without), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(layers(), st.lists(st.integers(1, 6), min_size=1, max_size=5), st.booleans())
def test_sequences_of_different_lengths(
    layout_for: LayoutFor, module: nn.RNNBase, lengths: list[int], with_state: bool
) -> None:
    layer, dense = packed(layout_for, module, "dense-f32-v1")
    x = pack_sequence([torch.randn(length, module.input_size) for length in lengths], enforce_sorted=False)
    check(layer, dense, x, *([first_state(module, len(lengths))] if with_state else []))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_an_input_without_a_batch(layout_for: LayoutFor, kind: type[nn.RNNBase]) -> None:
    module = kind(5, 6, bidirectional=True, batch_first=True)
    layer, dense = packed(layout_for, module, "dense-f32-v1")
    state = first_state(module, 1)
    state = tuple(each[:, 0] for each in state) if isinstance(state, tuple) else state[:, 0]
    check(layer, dense, torch.randn(7, 5))
    check(layer, dense, torch.randn(7, 5), state)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_every_format_runs(layout_for: LayoutFor, format_name: str, kind: type[nn.RNNBase]) -> None:
    """Integer layouts round inputs and states to 8 bits: half a step of 1/127 for each of the 64 terms of a gate.

    With weights uniform in +-1/8 that moves a gate's argument by 64 * 0.125 * 0.5 / 127 = 0.03 at most for states below
    1, and 4 times that for inputs below 4; the gates' slopes are at most 1, and 3 steps carry it on. bfloat16 layouts
    round each by at most 2^-8 of itself, mostly far less, and 64 roundings cancel: five times the 0.004 that they add
    in the mean square.
    """
    torch.manual_seed(0)
    layer, dense = packed(layout_for, kind(64, 64), format_name)
    x = torch.randn(3, 2, 64).clamp(-4, 4)
    with torch.no_grad():
        got, expected = layer(x)[0], dense(x.double())[0]
    rounds = "int" in format_name or format_name in ("ternary-v1", "binary-v1")
    bfloat16 = "bf16" in format_name or "lut" in format_name or format_name == "sum-v1"
    bound = 3 * (0.03 + 0.12) if rounds else 0.02 if bfloat16 else 1e-4
    assert float((got.double() - expected).abs().max()) <= bound
    assert float(nn.functional.cosine_similarity(got.flatten().double(), expected.flatten(), dim=0)) > 0.999


def test_no_dense_weight_is_ever_made(layout_for: LayoutFor, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, dense = packed(layout_for, nn.LSTM(8, 8, bidirectional=True), "dense-f32-v1")
    monkeypatch.setattr(LayoutHolder, "dequantized_weight", lambda _: pytest.fail("it was dequantized"))
    check(layer, dense, torch.randn(4, 2, 8))


def test_a_weight_that_is_not_packed_stays_a_parameter(layout_for: LayoutFor) -> None:
    layer, dense = packed(layout_for, nn.GRU(5, 6, num_layers=2), "dense-f32-v1", only="weight_ih")
    assert {name for name, _ in layer.named_parameters() if "weight" in name} == {"weight_hh_l0", "weight_hh_l1"}
    assert all(isinstance(getattr(layer, f"weight_ih_l{i}"), CompressedLinear) for i in (0, 1))
    check(layer, dense, torch.randn(4, 3, 5))


def test_gradients_reach_the_input_the_biases_and_the_unpacked_weights(layout_for: LayoutFor) -> None:
    layer, dense = packed(layout_for, nn.LSTM(4, 5, num_layers=2), "dense-f32-v1", only="_l0")
    x, found = torch.randn(3, 2, 4), []
    for each, dtype in ((layer, torch.float32), (dense, torch.float64)):
        leaf = x.to(dtype).clone().requires_grad_()
        each(leaf)[0].square().sum().backward()
        gradients = {name: p.grad for name, p in each.named_parameters() if "bias" in name or "_l1" in name}
        found.append([leaf.grad.double(), *(gradients[name].double() for name in sorted(gradients))])
    assert len(found[0]) == 1 + 4 + 2
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_dropout_between_layers_is_for_training_only(layout_for: LayoutFor) -> None:
    layer, dense = packed(layout_for, nn.LSTM(4, 8, num_layers=2, dropout=0.9).eval(), "dense-f32-v1")
    x = torch.randn(5, 2, 4)
    check(layer, dense, x)
    with torch.no_grad():
        quiet = layer(x)[0]
        assert not torch.allclose(layer.train()(x)[0], quiet)


def test_inputs_and_states_that_do_not_fit_are_refused(layout_for: LayoutFor) -> None:
    layer, _ = packed(layout_for, nn.LSTM(4, 5), "dense-int8-v1")
    for x in (torch.randn(3, 2, 5), torch.randn(4), torch.ones(3, 2, 4, dtype=torch.int64)):
        with pytest.raises(UsageError, match=r"allowed: float \(steps, batch, 4\)"):
            layer(x)
    with pytest.raises(UsageError, match="at least one step"):
        layer(torch.randn(0, 2, 4))
    with pytest.raises(UsageError, match=r"cell state.*allowed: \(1, 2, 5\)"):
        layer(torch.randn(3, 2, 4), (torch.zeros(1, 2, 5), torch.zeros(1, 3, 5)))


def test_state_dicts_hold_the_packed_arrays_under_torchs_names(layout_for: LayoutFor) -> None:
    layer, dense = packed(layout_for, nn.GRU(4, 5, batch_first=True), "dense-int8-v1")
    assert {"weight_ih_l0.codes", "weight_hh_l0.scales", "bias_ih_l0"} <= set(layer.state_dict())
    other = copy.deepcopy(layer)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        assert torch.equal(other(x)[0], layer(x)[0])
    layer.flatten_parameters()
    assert np.isfinite(dense(x.double())[0].detach().numpy()).all()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_no_sequence_is_no_work(layout_for: LayoutFor, kind: type[nn.RNNBase], batch_first: bool) -> None:
    """Torch takes an empty batch, but not sequences without a step."""
    module = kind(8, 16, 2, bidirectional=True, batch_first=batch_first)
    layer, dense = packed(layout_for, module, "dense-int8-v1")
    x = torch.randn((0, 3, 8) if batch_first else (3, 0, 8))
    check(layer, dense, x)
    assert [leaf.shape for leaf in leaves(layer(x))] == [leaf.shape for leaf in leaves(dense(x.double()))]
    with pytest.raises(UsageError, match="at least one step"):
        layer(x.transpose(0, 1))
