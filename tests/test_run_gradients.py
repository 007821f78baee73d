"""`rarefy.compress` with methods that take gradients: where labels and losses come from, streaming, combinations."""

import numpy as np
import pytest
import torch
from torch import nn

import rarefy
from rarefy.core.errors import CalibrationError
from rarefy.models import load_model

HALF = {"sparsity": 0.5}


def compressed(source, steps, calibration, **options):
    options = {"samples": 6, "sequence_length": 32, "measure": False, "compute_dtype": "float32"} | options
    return rarefy.compress(source, {"steps": steps, "rest_dtype": "float32"}, calibration=calibration, **options)


def dense(run) -> dict[str, np.ndarray]:
    return {name: layout.to_dense() for name, layout in run.layers.items()}


@pytest.mark.parametrize("method", ["taylor", "obd", "obert"])
def test_a_language_model_streams_through(method, tiny_llama_dir, text_file):
    """From files and from memory come the same zeros, and one threshold gives layers different amounts of them."""
    step = {"method": method, "pattern": HALF, "allocation": "global"}
    one = compressed(tiny_llama_dir, [step], text_file)
    loaded = load_model(tiny_llama_dir)
    other = compressed(loaded.model, [step], text_file, tokenizer=loaded.tokenizer)
    assert len(one.layers) == len(other.layers) == 14
    for name, weight in dense(one).items():
        np.testing.assert_array_equal(weight, other.layers[name].to_dense())
    sparsities = [layer.sparsity for layer in one.report.layers]
    assert np.ptp(sparsities) > 0.05
    zeros = np.concatenate([weight.ravel() == 0 for weight in dense(one).values()])
    assert zeros.mean() == pytest.approx(0.5, abs=1e-3)


def test_an_encoder_has_labels_drawn_and_the_same_for_one_seed(tiny_bert_dir, text_file):
    step = {"method": "obert", "pattern": HALF}
    runs = [dense(compressed(tiny_bert_dir, [step], text_file, seed=seed)) for seed in (0, 0, 1)]
    assert all(np.array_equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(np.array_equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_gradients_and_inputs_in_one_recipe(tiny_llama_dir, text_file):
    """Zeros by gradients, then values on the inputs that solved blocks give."""
    steps = [
        {"method": "obert", "pattern": {"keep": 2, "group": 4}},
        {"method": "gptq", "values": {"num_bits": 4, "group_size": 32}},
    ]
    both = compressed(tiny_llama_dir, steps, text_file)
    first = dense(compressed(tiny_llama_dir, steps[:1], text_file))
    for name, weight in dense(both).items():
        assert not weight[first[name] == 0].any()
        assert "int4" in both.layers[name].format
    assert all(layer.error_metric == "output" for layer in both.report.layers)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.deep = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.lstm = nn.LSTM(32, 16, batch_first=True)
        self.head = nn.Linear(16, 5)
        self.aside = nn.Linear(16, 16)

    def forward(self, x):
        y = torch.relu(self.deep(torch.relu(self.conv(x)))).flatten(2).transpose(1, 2)
        last = self.lstm(y)[0][:, -1]
        self.aside(last)  # has inputs, and the loss does not depend on it
        return self.head(last)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def batches() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(8, 3, 6, 6) for _ in range(4)]


LABELS = [torch.arange(8) % 5 for _ in range(4)]
EVERYWHERE = ["conv", "deep", "lstm", "head"]


def test_labels_reach_the_loss_one_sample_at_a_time(net, batches):
    seen = []

    def loss(output, labels):
        seen.append((tuple(output.shape), labels.tolist()))
        return nn.functional.cross_entropy(output, labels)

    steps = [{"method": "obd", "pattern": HALF, "targets": EVERYWHERE}]
    own = compressed(net, steps, batches, labels=LABELS, loss=loss)
    # the last batch is kept for the verdict
    assert seen == [((1, 5), [label]) for own in LABELS[:3] for label in own.tolist()]
    by_default = dense(compressed(net, steps, batches, labels=LABELS))
    assert {"conv", "deep", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "head"} == set(by_default)
    assert all(np.array_equal(weight, by_default[name]) for name, weight in dense(own).items())
    drawn = dense(compressed(net, steps, batches))
    assert not all(np.array_equal(weight, by_default[name]) for name, weight in drawn.items())


def test_what_goes_is_what_the_loss_misses_least(net, batches):
    """OBD leaves a smaller loss than chance on the data that it has seen."""
    values = {}
    for method in ("obd", "random"):
        steps = [{"method": method, "pattern": {"sparsity": 0.7}, "targets": EVERYWHERE}]
        model = compressed(net, steps, batches, labels=LABELS).model()
        with torch.no_grad():
            shift = torch.cat([model(x) - net(x) for x in batches[:3]])
        values[method] = float(shift.square().mean())
    assert values["obd"] < 0.5 * values["random"]


@pytest.mark.parametrize("allocation", ["uniform", "owl", "global"])
def test_a_layer_that_no_gradient_reaches_is_told(net, batches, allocation):
    run = compressed(net, [{"method": "taylor", "pattern": HALF, "targets": "*", "allocation": allocation}], batches)
    (untouched,) = [layer for layer in run.report.untouched if layer.name == "aside"]
    assert untouched.reason == "no gradient reached it, and its method needs some"


def test_labels_that_do_not_fit(net, batches):
    steps = [{"method": "obd", "pattern": HALF}]
    with pytest.raises(CalibrationError, match=r"labels of batch 1: shape \(7,\)"):
        compressed(net, steps, batches, labels=[LABELS[0], LABELS[1][:7], *LABELS[2:]])
    with pytest.raises(CalibrationError, match="labels of 2 batches"):
        compressed(net, steps, batches, labels=LABELS[:2])
    with pytest.raises(CalibrationError, match="labels without examples"):
        compressed(net, steps, None, labels=LABELS)
