"""Statistics of gradients against finite differences, loops over samples, and inverses that Woodbury gives."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rarefy.calibrate.calls import Call
from rarefy.calibrate.gradient_statistics import (
    FisherBlocks,
    FisherDiagonal,
    GradientAbsMean,
    GradientMean,
    in_triangle,
)
from rarefy.calibrate.gradient_sums import chunks_of
from rarefy.calibrate.gradients import collect_gradients
from rarefy.calibrate.losses import negative_log_likelihood
from rarefy.calibrate.samples import samples_of
from rarefy.core.errors import NonFiniteError, UnsupportedModelError, UsageError
from rarefy.models import load_model
from rarefy.nn import find_weight

NUM_SAMPLES = 6


class Net(nn.Module):
    """A layer of every kind: a grouped and a depthwise convolution, an LSTM, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 6, 3, groups=2, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.linear = nn.Linear(5, 3)
        self.unused = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(torch.tanh(self.grouped(x))).flatten(2).transpose(1, 2)
        return self.linear(self.lstm(y)[0][:, -1])


LAYERS = ("grouped.group0", "grouped.group1", "depthwise", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "linear")


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval().double()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(NUM_SAMPLES, 4, 5, 5).double(), torch.randint(0, 3, (NUM_SAMPLES,))


def collected(net, data, statistics, layers=LAYERS, **options):
    x, labels = data
    calls, batches = [Call((part,), {}) for part in x.split(4)], list(labels.split(4))
    assert len(samples_of(calls, batches)) == len(x)
    wanted = dict.fromkeys(layers, statistics)
    options = {"dtype": x.dtype} | options
    gradients = collect_gradients(load_model(net), (), calls, batches, wanted, **options)
    return {layer: own for layer in layers if (own := gradients.of(layer)) is not None}


def flat(value: Tensor, layer: str) -> Tensor:
    """Without the axis of the channels of a depthwise convolution."""
    return value.flatten(0, 1) if layer == "depthwise" else value


def loss_of(net: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(net(x), labels)


def test_the_mean_gradient_is_that_of_finite_differences(net, data):
    found = collected(net, data, (GradientMean(),))
    step = 1e-5
    rng = np.random.default_rng(0)
    for layer in LAYERS:
        weight = find_weight(net, layer)
        matrix = weight.read().clone()
        value = flat(found[layer][GradientMean()], layer)
        assert value.shape == matrix.shape
        for _ in range(12):
            row, column = rng.integers(matrix.shape[0]), rng.integers(matrix.shape[1])
            ends = []
            for sign in (1, -1):
                moved = matrix.clone()
                moved[row, column] += sign * step
                weight.write(moved)
                with torch.no_grad():
                    ends.append(float(loss_of(net, *data)))
            weight.write(matrix)
            assert float(value[row, column]) == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-7, rel=1e-5)


def gradients_of(net: nn.Module, data: tuple[Tensor, Tensor], layer: str) -> Tensor:
    """The gradient of each sample by autograd's own means, (N, O, I)."""
    weight, found = find_weight(net, layer), []
    for x, label in zip(*data, strict=True):
        (gradient,) = torch.autograd.grad(loss_of(net, x[None], label[None]), weight.parameter)
        found.append(weight.matrix.of(gradient))
    return torch.stack(found)


def test_diagonal_and_sizes_are_those_of_a_loop_over_samples(net, data):
    found = collected(net, data, (FisherDiagonal(), GradientAbsMean()))
    for layer in LAYERS:
        gradient_NOI = gradients_of(net, data, layer)
        for statistic, expected in (
            (FisherDiagonal(), gradient_NOI.square().mean(0)),
            (GradientAbsMean(), gradient_NOI.abs().mean(0)),
        ):
            value = flat(found[layer][statistic], layer)
            torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=1e-9)


def whole(triangle_OGT, size: int):
    """Blocks from their lower triangles."""
    assert triangle_OGT.shape[2] == size * (size + 1) // 2
    blocks = torch.zeros(*triangle_OGT.shape[:2], size, size)
    row, column = in_triangle(size)
    blocks[..., row, column] = blocks[..., column, row] = triangle_OGT
    return blocks


@pytest.mark.parametrize("block_size", [1, 4, 7, 100])
def test_blocks_are_inverted_as_woodbury_does_it(net, data, block_size):
    """The paper's recursion over gradients, in float64, gives the inverse of what is collected plus dampening."""
    damp = 1e-3
    found = collected(net, data, (FisherBlocks(block_size),))
    for layer in ("grouped.group1", "linear", "lstm.weight_hh_l0"):
        gradient_NOI = gradients_of(net, data, layer).numpy()
        rows, width = gradient_NOI.shape[1:]
        if layer == "grouped.group1":  # nine taps with both channels become both channels with their nine taps
            gradient_NOI = gradient_NOI.reshape(-1, rows, 9, 2).swapaxes(2, 3).reshape(-1, rows, width)
        size = min(block_size, width)
        blocks = whole(found[layer][FisherBlocks(block_size)], size).double().numpy()
        assert blocks.shape == (rows, -(-width // size), size, size)
        for row in range(rows):
            for place, start in enumerate(range(0, width, size)):
                part = slice(start, min(start + size, width))
                inverse = np.eye(part.stop - start) / damp
                for gradient in gradient_NOI[:, row, part]:
                    moved = inverse @ gradient
                    inverse -= np.outer(moved, moved) / (NUM_SAMPLES + gradient @ moved)
                block = blocks[row, place]
                inside = block[: part.stop - start, : part.stop - start]
                expected = np.linalg.inv(inside + damp * np.eye(len(inside)))
                np.testing.assert_allclose(inverse, expected, rtol=1e-4, atol=1e-4)
                assert not block[len(inside) :].any()
                assert not block[:, len(inside) :].any()


def test_blocks_of_more_gradients_than_wait_together():
    gradient_NOI = torch.randn(21, 3, 10, generator=torch.Generator().manual_seed(0))
    statistic = FisherBlocks(4)
    states = [statistic.init((3, 10)), statistic.init((3, 10))]
    for number, gradient in enumerate(gradient_NOI):
        statistic.add_gradient(states[number > 12], gradient)
    value = whole(statistic.finish(statistic.merge(*states)), 4)
    expected = torch.einsum("noi,noj->oij", gradient_NOI, gradient_NOI) / 21
    torch.testing.assert_close(value[:, 1], expected[:, 4:8, 4:8])
    torch.testing.assert_close(value[:, 2, :2, :2], expected[:, 8:, 8:])


def test_chunks_are_as_few_as_fit_and_alike_in_size():
    wanted = {str(number): (FisherDiagonal(),) for number in range(7)}
    shapes = {str(number): (1, 25 if number == 6 else 10) for number in range(7)}
    assert [len(chunk) for chunk in chunks_of(wanted, shapes, 4 * 60)] == [4, 3]  # not 6 and 1
    assert [len(chunk) for chunk in chunks_of(wanted, shapes, 4 * 85)] == [7]
    assert [len(chunk) for chunk in chunks_of(wanted, shapes, 4 * 25)] == [2, 2, 2, 1]


def test_the_model_is_as_before(net, data):
    net.linear.weight.requires_grad_(False)
    net.linear.bias.grad = torch.ones(3).double()
    before = copy.deepcopy(net.state_dict())
    collected(net, data, (GradientMean(),))
    assert not net.linear.weight.requires_grad
    assert net.grouped.weight.requires_grad
    assert net.grouped.weight.grad is None
    assert net.linear.bias.grad is not None
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in net.parameters())


def test_a_layer_that_no_gradient_reaches_is_left_out(net, data):
    found = collected(net, data, (GradientMean(),), ("linear", "unused"))
    assert set(found) == {"linear"}


def test_nan_names_the_layer(net, data):
    def loss(output: Tensor, _: Tensor | None) -> Tensor:
        return torch.sqrt((output - output.detach()).square().sum())  # 0 with an infinite slope

    with pytest.raises(NonFiniteError, match=r"layer linear: its gradients are NaN"):
        collected(net, data, (FisherDiagonal(),), ("linear",), loss=loss)
    with pytest.raises(NonFiniteError, match=r"sample 0: its loss is NaN"):
        collected(net, data, (FisherDiagonal(),), ("linear",), loss=lambda output, _: output.sum() * torch.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_give_the_same_as_one_pass(net, data, dtype):
    x, labels = data[0].float(), data[1]
    statistics = (FisherBlocks(4), GradientMean())
    sizes = [sum(each.num_floats(find_weight(net, layer).matrix.shape) for each in statistics) for layer in LAYERS]
    ticks: list[tuple[int, int]] = []
    whole = collected(net.float(), (x, labels), statistics, dtype=dtype)
    chunked = collected(
        net, (x, labels), statistics, dtype=dtype, budget_bytes=4 * max(sizes), tick=lambda *now: ticks.append(now[:2])
    )
    for layer in LAYERS:
        assert all(torch.equal(whole[layer][statistic], chunked[layer][statistic]) for statistic in statistics)
    assert ticks[-1][0] == ticks[-1][1] > NUM_SAMPLES


def test_gradients_are_those_of_the_model_as_it_was(net, data):
    calls, wanted = [Call((data[0],), {})], {"linear": (GradientMean(),)}
    gradients = collect_gradients(load_model(net), (), calls, [data[1]], wanted, dtype=torch.float64)
    expected = gradients_of(net, data, "linear").mean(0).float()
    net.linear.weight.data.zero_()
    for _ in range(2):
        found = gradients.of("linear")
        assert found is not None
        torch.testing.assert_close(found[GradientMean()], expected)
        found[GradientMean()].zero_()  # the caller's own
    assert gradients.of("unused") == {}


def test_blocks_that_do_not_fit_are_refused_with_a_size_that_does(net, data):
    budget = 4 * FisherBlocks(2).num_floats((3, 5))
    with pytest.raises(
        UsageError, match=r"layer linear: its Fisher blocks of 4 columns take \d+ bytes.*block_size: 2 "
    ):
        collected(net, data, (FisherBlocks(4),), ("linear",), budget_bytes=budget)
    assert "linear" in collected(net, data, (FisherBlocks(2),), ("linear",), budget_bytes=budget)


def test_what_a_sample_is():
    ids, mask = torch.arange(12).view(3, 4), torch.ones(3, 4)
    text = samples_of([Call((), {"input_ids": ids, "attention_mask": mask, "use_cache": False})], [None])
    assert [sample.call.kwargs["input_ids"].tolist() for sample in text] == [[row] for row in ids.tolist()]
    assert text[0].call.kwargs["use_cache"] is False
    assert len(samples_of([Call((torch.ones(5, 2),), {})], [None])) == 1
    labelled = samples_of([Call((torch.ones(5, 2), torch.ones(7)), {})], [torch.arange(5)])
    assert len(labelled) == 5
    assert labelled[3].labels.tolist() == [3]
    assert labelled[3].call.args[1].shape == (7,)


class Output(dict):
    """As transformers' outputs: a mapping with attributes."""

    __getattr__ = dict.get


def loss_for(output, labels=None, model=None, seed=0, **kwargs):
    call = Call((), kwargs)
    return negative_log_likelihood(model or nn.Module(), call, output, labels, torch.Generator().manual_seed(seed))


def test_the_loss_of_text_is_that_of_the_next_token():
    LlamaForCausalLM = type("LlamaForCausalLM", (nn.Module,), {})
    logits = torch.randn(1, 5, 7)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    expected = -torch.log_softmax(logits, -1)[0, range(4), [2, 3, 4, 5]].mean()
    torch.testing.assert_close(loss_for(Output(logits=logits), model=LlamaForCausalLM(), input_ids=ids), expected)
    read = torch.tensor([[6, 6, 6]])  # an encoder's tokens, of which there may be more or fewer
    torch.testing.assert_close(loss_for(Output(logits=logits), input_ids=read, decoder_input_ids=ids), expected)


@pytest.mark.parametrize("num_predictions", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_cross_entropy_is_torchs(num_predictions, dtype):
    generator = torch.Generator().manual_seed(num_predictions)
    logits = (5 * torch.randn(num_predictions, 11, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(11, (num_predictions,), generator=generator)
    expected = nn.functional.cross_entropy(logits.float(), labels)
    for factor in (1, 3):
        value = loss_for(logits, labels)
        torch.testing.assert_close(value, expected)
        (found,) = torch.autograd.grad(factor * value, logits)
        (own,) = torch.autograd.grad(factor * expected, logits, retain_graph=True)
        torch.testing.assert_close(found, own)


def test_without_labels_they_are_drawn_from_the_prediction():
    logits = torch.tensor([[0.0, 30.0], [30.0, 0.0]])
    torch.testing.assert_close(loss_for(Output(logits=logits)), torch.tensor(0.0), atol=1e-6, rtol=0)
    fair = torch.zeros(4000, 2, requires_grad=True)
    loss_for(Output(logits=fair)).backward()
    assert abs(float((fair.grad[:, 0] > 0).float().mean()) - 0.5) < 0.05
    # numbers around any other output: the gradient is the noise itself
    embedding = torch.randn(1000, 4, requires_grad=True)
    loss_for((embedding, "more")).backward()
    noise = -embedding.grad * embedding.numel()
    assert abs(float(noise.mean())) < 0.1
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    again = torch.zeros_like(embedding, requires_grad=True)
    loss_for((again,)).backward()
    torch.testing.assert_close(again.grad, embedding.grad, atol=1e-6, rtol=1e-4)


def test_labels_are_classes_or_numbers():
    output = torch.randn(3, 4)
    torch.testing.assert_close(
        loss_for(output, torch.tensor([0, 3, 1])), -torch.log_softmax(output, -1)[range(3), [0, 3, 1]].mean()
    )
    torch.testing.assert_close(loss_for(output, torch.zeros(3, 4)), output.square().mean() / 2)
    torch.testing.assert_close(loss_for(Output(loss=torch.tensor(2.5), logits=output)), torch.tensor(2.5))
    for bad in (torch.tensor([0, 1]), torch.tensor([0, 1, 4]), torch.tensor([0, -1, 2]), torch.zeros(3)):
        with pytest.raises(UsageError, match="labels"):
            loss_for(output, bad)
    with pytest.raises(UnsupportedModelError, match="nothing to make a loss of"):
        loss_for({"ids": torch.tensor([1])})


def test_a_sample_may_have_any_loss(net, data):
    """The gradient of one output by a layer without bias is nothing in the rows of the others."""
    x, labels = data
    one = x[:1], labels[:1]
    found = collected(net, one, (GradientMean(),), ("linear",), loss=lambda output, label: output[0, label[0]])
    value = found["linear"][GradientMean()]
    assert value[int(labels[0])].abs().sum() > 0
    others = [row for row in range(3) if row != int(labels[0])]
    assert not value[others].any()
