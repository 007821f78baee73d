"""Gradients block by block against autograd's own over the whole model, a sample at a time."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rarefy.calibrate import backward, scratch
from rarefy.calibrate.calls import Call
from rarefy.calibrate.gradient_statistics import FisherBlocks, FisherDiagonal, GradientAbsMean, GradientMean
from rarefy.calibrate.gradients import collect_gradients
from rarefy.calibrate.inputs import text_calls
from rarefy.calibrate.losses import negative_log_likelihood
from rarefy.calibrate.replay import Replay
from rarefy.calibrate.samples import samples_of
from rarefy.core.errors import NonFiniteError, OutputError
from rarefy.models import load_model
from rarefy.nn import find_weight

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

import tiny

IDS_NL = torch.randint(3, 99, (5, 10), generator=torch.Generator().manual_seed(1))
STATISTICS = (FisherDiagonal(), GradientAbsMean(), GradientMean(), FisherBlocks(4))


class Chain(nn.Module):
    """Blocks that read several earlier ones and change their inputs in place, between layers of the model's own."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor, other: Tensor | None = None) -> dict[str, Tensor]:
            x.mul_(0.5)
            y = self.inner(x)
            return {"x": 2 * torch.tanh(y if other is None else y + other), "aside": y.detach()}

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(Chain.Block() for _ in range(4))
        self.last = nn.Linear(6, 3)
        self.how = how
        if how == "shared weight":
            self.blocks[2].inner.weight = self.blocks[0].inner.weight
        if how == "weight outside too":
            self.between = nn.Linear(6, 6)
            self.between.weight = self.blocks[1].inner.weight

    def forward(self, x: Tensor) -> Tensor:
        inputs, x = x, self.first(x)
        early = None
        for number, block in enumerate(self.blocks):
            if self.how == "skips one" and number == 1 and bool(inputs.sum() > 0):
                continue
            other = early if number == 3 else None
            if self.how in ("one aside", "another aside"):
                # the same for every block: for all samples, or only where inputs are like those of the first sample
                other = inputs.sum() * torch.ones(6)
                other = other if number < 2 or self.how == "one aside" or bool(inputs.sum() < 0) else 3 * other
            output = block(x, other)
            x = output["x"]
            if number == 0:
                early = 2 * x
            if number == 2:
                x += 1
            if self.how == "weight outside too":
                x = self.between(x)
        if self.how == "twice":
            x = self.blocks[1](x)["x"]
        if self.how == "first twice":
            x = x + self.first(inputs)
        return self.last(x)


class Residual(nn.Module):
    """A stack of convolutional blocks as in ResNets, with a norm whose statistics are fixed."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu_(x + self.norm(self.conv(x)))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.stages = nn.Sequential(*(Residual.Block() for _ in range(3)))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(torch.relu(self.stem(x))).mean((2, 3)))


def of_vectors(model: nn.Module) -> tuple[nn.Module, list[Call], list[Tensor | None]]:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    return model.eval(), [Call((part,), {}) for part in x.split(4)], list(labels.split(4))


def of_images(model: nn.Module) -> tuple[nn.Module, list[Call], list[Tensor | None]]:
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(3))
    return model.eval(), [Call((x,), {})], [torch.tensor([0, 4, 2, 1])]


def of_text(model: nn.Module) -> tuple[nn.Module, list[Call], list[Tensor | None]]:
    calls = text_calls(model, IDS_NL, 2)
    return model, calls, [None] * len(calls)


def of_sound(model: nn.Module) -> tuple[nn.Module, list[Call], list[Tensor | None]]:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(3, 1, 8, 40, generator=generator)
    calls = [Call((), {"input_features": each, "decoder_input_ids": IDS_NL[:1, :6]}) for each in features]
    return model, calls, [None] * 3


def case(name: str) -> tuple[nn.Module, list[Call], list[Tensor | None]]:
    torch.manual_seed(0)
    match name:
        case "residual":
            return of_images(Residual())
        case "torch_encoder":
            x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(3))
            return tiny.torch_encoder().eval(), [Call((part,), {}) for part in x.split(1)], [None] * 3
        case "whisper":
            return of_sound(tiny.whisper())
        case "mlp":
            return tiny.mlp().eval(), [Call((torch.randn(4, 12),), {})], [torch.tensor([0, 4, 2, 1])]
        case _ if hasattr(tiny, name):
            return of_text(getattr(tiny, name)())
        case _:
            return of_vectors(Chain(name))


def layers_of(model: nn.Module) -> list[str]:
    return [layer.name for layer in load_model(model).structure().layers if layer.compressible]


def expected_of(model: nn.Module, calls: list[Call], labels: list[Tensor | None], layers: list[str]):
    """Means over samples, in loops."""
    model = copy.deepcopy(model).requires_grad_()
    weights = {layer: find_weight(model, layer) for layer in layers}
    parameters = list({id(weight.parameter): weight.parameter for weight in weights.values()}.values())
    generator = torch.Generator().manual_seed(0)
    gradients: dict[str, list[Tensor]] = {}
    for sample in samples_of(calls, labels):
        output = model(*sample.call.args, **sample.call.kwargs)
        value = negative_log_likelihood(model, sample.call, output, sample.labels, generator)
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        by_parameter = {id(each): gradient for each, gradient in zip(parameters, found, strict=True)}
        for layer, weight in weights.items():
            gradient = by_parameter[id(weight.parameter)]
            if gradient is not None:
                gradients.setdefault(layer, []).append(weight.matrix.of(gradient))
    means = {}
    for layer, own in gradients.items():
        gradient_NOI = torch.stack(own)
        means[layer] = {
            FisherDiagonal(): gradient_NOI.square().mean(0),
            GradientAbsMean(): gradient_NOI.abs().mean(0),
            GradientMean(): gradient_NOI.mean(0),
        }
    return means


def blocks_of(model: nn.Module) -> list[str]:
    return [block.name for block in load_model(model).structure().blocks]


IN_BLOCKS = ("llama", "qwen2", "gemma3", "gpt2", "bert", "distilbert", "t5", "whisper", "torch_encoder", "residual")
CHAINS = ("plain", "first twice", "one aside", "another aside")
WHOLE = ("albert", "mlp", "shared weight", "weight outside too", "twice", "skips one")


@pytest.mark.parametrize("name", [*IN_BLOCKS, *CHAINS, *WHOLE])
def test_gradients_are_those_of_a_loop_over_samples(name, monkeypatch):
    """Of every weight, also those before, between and after the blocks; and block by block where that is promised."""
    model, calls, labels = case(name)
    layers = layers_of(model)
    done: list[str] = []
    through = backward.GradientPass._backward_through
    monkeypatch.setattr(
        backward.GradientPass, "_backward_through", lambda self, block: (done.append(block), through(self, block))
    )
    before = copy.deepcopy(model.state_dict())
    required = [parameter.requires_grad for parameter in model.parameters()]
    found = collect_gradients(load_model(model), blocks_of(model), calls, labels, dict.fromkeys(layers, STATISTICS))
    assert bool(done) == (name not in WHOLE)
    if done:
        assert sorted(done) == sorted(blocks_of(model))
    expected = expected_of(model, calls, labels, layers)
    assert expected
    for layer in layers:
        own = found.of(layer)
        assert (own is None) == (layer not in expected), layer
        for statistic, value in expected.get(layer, {}).items():
            actual = own[statistic].reshape(value.shape)
            torch.testing.assert_close(actual, value, rtol=2e-4, atol=1e-6 * float(value.abs().max()))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert required == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    ("name", "derived"),
    [("llama", True), ("bert", True), ("t5", True), ("residual", True), ("one aside", True), ("another aside", False)],
)
def test_calls_are_derived_where_they_follow_for_every_sample(name, derived, monkeypatch):
    """Then the model runs up to its first block for every sample, to others for one alone, and through for each."""
    model, calls, labels = case(name)
    runs: list[str | None] = []
    run = Replay._run
    monkeypatch.setattr(
        Replay, "_run", lambda self, sample, until, *rest: (runs.append(until), run(self, sample, until, *rest))[1]
    )
    blocks = blocks_of(model)
    layers = [layer for layer in layers_of(model) if layer.startswith(tuple(f"{block}." for block in blocks))]
    collect_gradients(load_model(model), blocks, calls, labels, dict.fromkeys(layers, STATISTICS))
    num_samples = len(samples_of(calls, labels))
    of_all = (len(blocks) + 1) * num_samples + 1 + len(blocks) * num_samples
    assert len(runs) < of_all if derived else len(runs) >= of_all


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("bert", torch.float32),
        ("bert", torch.bfloat16),
        ("residual", torch.float32),
    ],
)
def test_blocks_give_the_same_bits_as_the_whole_model(name, dtype):
    model, calls, labels = case(name)
    layers = [layer.name for layer in load_model(model).structure().layers if layer.compressible and layer.block]
    wanted = dict.fromkeys(layers, STATISTICS)
    one = collect_gradients(load_model(model), blocks_of(model), calls, labels, wanted, dtype=dtype)
    other = collect_gradients(load_model(model), (), calls, labels, wanted, dtype=dtype)
    for layer in layers:
        for statistic in STATISTICS:
            assert torch.equal(one.of(layer)[statistic], other.of(layer)[statistic]), (layer, statistic)
            assert one.of(layer)[statistic].any()


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_small_budget_passes_a_block_several_times_and_gives_the_same(name):
    model, calls, labels = case(name)
    wanted = dict.fromkeys(layers_of(model), STATISTICS)
    sizes = [
        4 * sum(each.num_floats(find_weight(model, layer).matrix.shape) for each in own)
        for layer, own in wanted.items()
    ]
    ticks: list[tuple[int, int, str]] = []
    one = collect_gradients(load_model(model), blocks_of(model), calls, labels, wanted)
    other = collect_gradients(
        load_model(model),
        blocks_of(model),
        calls,
        labels,
        wanted,
        budget_bytes=max(sizes),
        tick=lambda *now: ticks.append(now),
    )
    for layer in wanted:
        for statistic in STATISTICS:
            torch.testing.assert_close(one.of(layer)[statistic], other.of(layer)[statistic], rtol=1e-4, atol=1e-7)
    assert len(ticks) > len(IDS_NL) * (2 * len(blocks_of(model)) + 1)
    assert ticks[-1][0] == ticks[-1][1]


def test_nothing_runs_below_the_first_wanted_layer(monkeypatch):
    model, calls, labels = case("llama")
    done: list[str] = []
    through = backward.GradientPass._backward_through
    monkeypatch.setattr(
        backward.GradientPass, "_backward_through", lambda self, block: (done.append(block), through(self, block))
    )
    wanted = {"model.layers.1.mlp.up_proj": (GradientMean(),)}
    found = collect_gradients(load_model(model), blocks_of(model), calls, labels, wanted)
    assert done == ["model.layers.2", "model.layers.1"]
    assert found.of("model.layers.1.mlp.up_proj") is not None
    assert found.of("model.layers.0.mlp.up_proj") == {}


def test_one_block_of_a_streaming_model_is_in_memory(tiny_llama_dir, monkeypatch):
    loaded = load_model(tiny_llama_dir, stream=True)
    assert loaded.streams
    blocks = [block.name for block in loaded.structure().blocks]
    held: list[set[str]] = []

    def tick(*_: object) -> None:
        named = loaded.model.named_parameters(remove_duplicate=False)
        present = {name for name, parameter in named if not parameter.is_meta}
        held.append({block for block in blocks if any(name.startswith(block) for name in present)})

    layers = [layer.name for layer in loaded.structure().layers if layer.compressible and layer.block]
    calls = text_calls(loaded.model, IDS_NL, 2)
    wanted = dict.fromkeys(layers, (FisherDiagonal(),))
    found = collect_gradients(loaded, blocks, calls, [None] * len(calls), wanted, tick=tick)
    assert {len(each) for each in held} == {0, 1}
    assert all(parameter.is_meta for parameter in loaded.model.parameters())
    whole = load_model(tiny_llama_dir)
    expected = expected_of(whole.model, calls, [None] * len(calls), layers)
    for layer in layers:
        value = expected[layer][FisherDiagonal()]
        torch.testing.assert_close(found.of(layer)[FisherDiagonal()], value, rtol=2e-4, atol=1e-6 * float(value.max()))


def test_a_full_disk_is_told_before_and_in_the_middle_of_the_work(tmp_path, monkeypatch):
    model, calls, labels = case("llama")
    wanted = dict.fromkeys(layers_of(model), STATISTICS)

    def collect() -> None:
        collect_gradients(load_model(model), blocks_of(model), calls, labels, wanted, directory=tmp_path)

    usage = scratch.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(scratch.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        OutputError, match=r"statistics of gradients take .* GB of scratch space; allowed: 0.0 GB.*block_size"
    ):
        collect()
    wanted = {"model.layers.0.self_attn.k_proj": (GradientMean(),)}
    monkeypatch.setattr(scratch.shutil, "disk_usage", lambda _: usage._replace(free=4 * 16 * 32))
    with pytest.raises(OutputError, match="hidden states take"):
        collect()
    monkeypatch.undo()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scratch.os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"no scratch file could be written there \(No space left on device\)"):
        collect()
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    assert not any("forward" in module.__dict__ for module in model.modules())
    with pytest.raises(OutputError, match="no scratch file"):
        collect_gradients(
            load_model(model), blocks_of(model), calls, labels, wanted, directory=tmp_path / "not" / "there"
        )


def test_an_interrupted_pass_leaves_the_model_as_it_was_and_no_file(tmp_path):
    model, calls, labels = case("llama")
    before = copy.deepcopy(model.state_dict())
    counted = 0

    def tick(*_: object) -> None:
        nonlocal counted
        counted += 1
        assert not list(tmp_path.iterdir())  # scratch files have no names
        if counted == 22:  # on the way back
            raise KeyboardInterrupt

    wanted = dict.fromkeys(layers_of(model), STATISTICS)
    with pytest.raises(KeyboardInterrupt):
        collect_gradients(
            load_model(model),
            blocks_of(model),
            calls,
            labels,
            wanted,
            dtype=torch.bfloat16,
            directory=tmp_path,
            tick=tick,
        )
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_block_with_nan_gradients_is_named():
    class Slope(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.sqrt((x - x.detach()).square())  # the same, with an infinite slope

    model, calls, labels = case("llama")
    model.model.layers[1].mlp.act_fn = nn.Sequential(model.model.layers[1].mlp.act_fn, Slope())
    wanted = dict.fromkeys(["model.layers.1.mlp.gate_proj", "model.layers.2.mlp.gate_proj"], (GradientMean(),))
    with pytest.raises(NonFiniteError, match=r"layer model.layers.1.mlp.gate_proj: its gradients are NaN"):
        collect_gradients(load_model(model), blocks_of(model), calls, labels, wanted)
