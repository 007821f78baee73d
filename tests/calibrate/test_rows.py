"""The rows that convolutions meet, against torch's own unfolding, in float64."""

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from rarefy.calibrate import Gram, SquaredNorm
from rarefy.calibrate.calls import Call
from rarefy.calibrate.collect import collect_statistics
from rarefy.calibrate.rows import count_rows, count_tokens
from rarefy.nn import find_weight


def _unfolded(x, conv):
    """(B * places, channels, taps) by torch.nn.Unfold, which knows images and zeros around them only."""
    patches = nn.Unfold(conv.kernel_size, conv.dilation, conv.padding, conv.stride)(x.double())
    rows = patches.transpose(1, 2).reshape(-1, conv.in_channels, conv.kernel_size[0] * conv.kernel_size[1])
    return rows.numpy()


@pytest.mark.parametrize("geometry", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": (0, 3)}])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_statistics_of_a_convolution_are_those_of_its_patches(geometry, groups):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 12, (3, 2), groups=groups, **geometry))
    batches = [torch.randn(3, 6, 9, 8), torch.randn(1, 6, 7, 10)]
    names = ["0"] if groups in (1, 6) else ["0.group0", "0.group1"]
    weights = {name: find_weight(model, name) for name in names}
    wanted = {name: (Gram(), SquaredNorm()) for name in names}
    with torch.no_grad():
        found = collect_statistics(model, [Call((x,), {}) for x in batches], wanted, weights=weights)
    rows = np.concatenate([_unfolded(x, model[0]) for x in batches])
    for group in range(groups):
        part = rows.reshape(len(rows), groups, -1, 6)[:, group]  # (rows, channels of the group, taps)
        x_TI = part.transpose(0, 2, 1).reshape(len(rows), -1)  # the channel changes first
        expected = x_TI.T @ x_TI / len(rows)
        stats = found["0"] if groups in (1, 6) else found[f"0.group{group}"]
        gram, norm = (stats[s].numpy() if groups < 6 else stats[s][group].numpy() for s in (Gram(), SquaredNorm()))
        assert gram.shape == expected.shape
        assert np.abs(gram - expected).max() <= 1e-5 * np.abs(expected).max()
        assert np.abs(norm - expected.diagonal()).max() <= 1e-5 * np.abs(expected).max()


def test_convolutions_share_their_patches_where_their_taps_are_the_same():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv1d(4, 3, 3), nn.Conv1d(4, 5, 3)
            self.c = nn.Conv1d(4, 3, 3, padding=1)

        def forward(self, x):
            return self.a(x).sum() + self.b(x).sum() + self.c(x).sum()

    model = Branches()
    weights = {name: find_weight(model, name) for name in "abc"}
    calls = [Call((torch.randn(2, 4, 9),), {}) for _ in range(2)]
    with torch.no_grad():
        found = collect_statistics(model, calls, {name: (Gram(),) for name in "abc"}, weights=weights)
    assert found["a"][Gram()] is found["b"][Gram()]
    assert found["c"][Gram()] is not found["a"][Gram()]


def test_the_transposed_linear_layer_of_gpt2_sees_its_input():
    model = tiny.gpt2()
    name = "transformer.h.0.mlp.c_fc"
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    calls = [Call((), {"input_ids": torch.arange(10)[None]})]
    with torch.no_grad():
        weights = {name: find_weight(model, name)}
        found = collect_statistics(model, calls, {name: (Gram(),)}, weights=weights)
    handle.remove()
    x_TI = seen[0].reshape(-1, 32).double()
    torch.testing.assert_close(found[name][Gram()].double(), x_TI.T @ x_TI / 10, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2, "batch_first": True}])
@pytest.mark.parametrize("lengths", [None, [5, 2, 3]])
def test_recurrent_weights_meet_inputs_and_the_states_before_each_step(options, lengths):
    """The oracle runs torch's layer sequence by sequence and a prefix at a time: its last state is what comes next."""
    torch.manual_seed(0)
    module = nn.LSTM(3, 4, **options)
    first_of = {"_l0": module, "_l0_reverse": module}
    sequences = [torch.randn(length, 3) for length in lengths or [5, 5, 5]]
    if lengths is None:
        x = torch.stack(sequences, 0 if options.get("batch_first") else 1)
    else:
        x = nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
    model = nn.Sequential(module)
    names = [f"0.weight_{part}{end}" for part in ("ih", "hh") for end in first_of if hasattr(module, f"weight_hh{end}")]
    weights = {name: find_weight(model, name) for name in names}
    calls = [Call((x,), {}) for _ in range(2)]
    with torch.no_grad():
        found = collect_statistics(model, calls, {name: (Gram(),) for name in names}, weights=weights)
    for name in names:
        reverse, rows = name.endswith("_reverse"), []
        for sequence in sequences:
            ordered = sequence.flip(0) if reverse else sequence
            if "weight_ih" in name:
                rows += list(ordered)
                continue
            cell = nn.LSTMCell(3, 4)
            end = "_l0_reverse" if reverse else "_l0"
            cell.load_state_dict({key: getattr(module, key + end) for key in cell.state_dict()})
            state = (torch.zeros(1, 4), torch.zeros(1, 4))
            for step in ordered:
                rows.append(state[0][0])
                state = cell(step[None], state)
        x_TI = torch.stack(rows).detach().double()
        torch.testing.assert_close(found[name][Gram()].double(), x_TI.T @ x_TI / len(x_TI), rtol=1e-4, atol=1e-6)


def test_a_second_layer_meets_what_the_first_hands_on():
    torch.manual_seed(0)
    module = nn.GRU(3, 4, num_layers=2, bidirectional=True)
    first = nn.GRU(3, 4, bidirectional=True)
    first.load_state_dict({key: getattr(module, key) for key in first.state_dict()})
    model, x = nn.Sequential(module), torch.randn(6, 2, 3)
    name = "0.weight_ih_l1_reverse"
    with torch.no_grad():
        calls, weights = [Call((x,), {})], {name: find_weight(model, name)}
        gram = collect_statistics(model, calls, {name: (Gram(),)}, weights=weights)[name][Gram()]
        x_TI = first(x)[0].reshape(-1, 8).double()
    torch.testing.assert_close(gram.double(), x_TI.T @ x_TI / 12, rtol=1e-4, atol=1e-6)


def test_a_projection_meets_the_state_before_it_is_projected():
    torch.manual_seed(0)
    module = nn.LSTM(3, 5, proj_size=2)
    model, x = nn.Sequential(module), torch.randn(1, 4, 3)
    with torch.no_grad():
        weights = {"0.weight_hr_l0": find_weight(model, "0.weight_hr_l0")}
        gram = collect_statistics(model, [Call((x,), {})], {"0.weight_hr_l0": (Gram(),)}, weights=weights)
        i, _, g, o = (x[0] @ module.weight_ih_l0.T + module.bias_ih_l0 + module.bias_hh_l0).chunk(4, dim=1)
        x_TI = (torch.sigmoid(o) * torch.tanh(torch.sigmoid(i) * torch.tanh(g))).double()
    got = gram["0.weight_hr_l0"][Gram()].double()
    torch.testing.assert_close(got, x_TI.T @ x_TI / 4, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_rows_are_counted_by_position_and_for_all_examples(groups):
    model = nn.Sequential(
        nn.Conv2d(6, 12, 3, stride=2, groups=groups), nn.Flatten(), nn.Linear(12 * 4 * 3, 5), nn.LSTM(5, 7)
    )
    counts = count_rows(model, [Call((torch.randn(4, 6, 9, 8),), {}), Call((torch.randn(2, 6, 9, 8),), {})])
    convolution = {"0"} if groups in (1, 6) else {"0.group0", "0.group1"}
    assert {layer: counts[layer] for layer in convolution} == dict.fromkeys(convolution, 6 * 4 * 3)
    assert counts["2"] == 6
    assert {counts[f"3.weight_{side}_l0"] for side in ("ih", "hh")} == {6}
    assert not model[0]._forward_pre_hooks


def test_rows_are_counted_without_weights_in_memory():
    calls = [Call((torch.randn(2, 1, 8, 8),), {}), Call((torch.randn(1, 1, 8, 8),), {})]
    assert count_rows(tiny.cnn().to("meta"), calls) == count_rows(tiny.cnn(), calls)


def test_where_a_model_looks_at_values_tokens_are_counted():
    class Looks(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if bool((x >= 0).all()) else x

    model = Looks(nn.Embedding(10, 4), nn.Linear(4, 4))
    calls = [Call((torch.ones(3, 7, dtype=torch.int64),), {}), Call((torch.ones(1, 5, dtype=torch.int64),), {})]
    assert count_rows(model, calls[:1]) == {"0": 21, "1": 21}
    assert count_rows(model.to("meta"), calls) is None
    assert count_tokens(calls) == 26
    assert count_tokens([Call((), {"input_ids": torch.ones(2, 3, dtype=torch.int32)})]) == 6
    assert count_tokens([Call((torch.randn(2, 3),), {})]) is None
