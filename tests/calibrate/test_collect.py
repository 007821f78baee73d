"""The block walk against plain forward hooks on the whole model."""

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from rarefy.calibrate import Gram, SquaredNorm
from rarefy.calibrate.calls import Call, calibration_mode
from rarefy.calibrate.collect import collect_statistics
from rarefy.calibrate.in_a_row import in_a_row
from rarefy.calibrate.inputs import cast_inputs, example_calls, text_calls, without_cache
from rarefy.calibrate.precision import cast_parameters, choose_dtype
from rarefy.calibrate.walk import BlockWalk
from rarefy.core.errors import CalibrationError, NonFiniteError, UnsupportedModelError
from rarefy.kernels.cpu import CpuFlags
from rarefy.models import discover, load_model
from rarefy.nn import find_weight

IDS_NL = torch.randint(3, 99, (5, 12), generator=torch.Generator().manual_seed(1))


def _calls(model, batch_size=2):
    if isinstance(model, nn.Module) and type(model).__name__.startswith("Whisper"):
        generator = torch.Generator().manual_seed(2)
        return [
            Call((), {"input_features": torch.randn(2, 8, 40, generator=generator), "decoder_input_ids": ids})
            for ids in IDS_NL[:4].split(2)
        ]
    return text_calls(model, IDS_NL, batch_size)


def _oracle(model, calls, names):
    """Mean over tokens of x x^T, from hooks on a run of the whole model, in float64."""
    sums, counts = {}, {}

    def hook(name):
        def before(_module, args):
            x = args[0].detach().double().reshape(-1, args[0].shape[-1]).numpy()
            sums[name] = sums.get(name, 0) + x.T @ x
            counts[name] = counts.get(name, 0) + len(x)

        return before

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        for call in calls:
            model(*call.args, **call.kwargs)
    for handle in handles:
        handle.remove()
    return {name: sums[name] / counts[name] for name in sums}


def _block_layers(model):
    structure = discover(model)
    layers = {block.name: [] for block in structure.blocks}
    for layer in structure.layers:
        if layer.block and layer.kind == "linear" and layer.compressible:
            layers[layer.block].append(layer.name)
    return {block.name: block.stack for block in structure.blocks}, layers


def _halve(model, names):
    """A stand-in for compression: a change of the weights that later blocks must see."""
    with torch.no_grad():
        for index, name in enumerate(names):
            model.get_submodule(name).weight.mul_(0.5 + 0.1 * (index % 3))


@pytest.mark.parametrize(
    "build", [tiny.llama, tiny.qwen2, tiny.gemma3, tiny.bert, tiny.distilbert, tiny.t5, tiny.whisper]
)
def test_each_block_sees_the_changed_ones_before_it(build):
    """While block i is collected, the blocks before it are changed and it is not: an oracle run in that very state."""
    model, oracle_model = build(), build()
    blocks, layers = _block_layers(model)
    calls = _calls(model)
    order = []
    with (
        calibration_mode(model),
        without_cache(model),
        without_cache(oracle_model),
        BlockWalk(model, blocks, calls) as walk,
    ):
        while (reached := walk.next_block()) is not None:
            name, block_calls = reached
            order.append(name)
            block = model.get_submodule(name)
            wanted = {layer: (Gram(),) for layer in layers[name]}
            weights = {layer: find_weight(model, layer) for layer in wanted}
            found = collect_statistics(block, block_calls, wanted, weights=weights)
            expected = _oracle(oracle_model, calls, layers[name])
            assert found.keys() == expected.keys()
            for layer, gram in expected.items():
                got = found[layer][Gram()].numpy()
                assert np.abs(got - gram).max() <= 1e-4 * np.abs(gram).max(), layer
            _halve(model, layers[name])
            _halve(oracle_model, layers[name])
            walk.finish([block(*call.args, **call.kwargs) for call in block_calls])
        assert walk.unreached == ()
        # behind the last block, the stored outputs give what the changed model gives
        with torch.no_grad():
            for batch, call in enumerate(calls):
                torch.testing.assert_close(
                    walk.run_rest(batch)[0], oracle_model(*call.args, **call.kwargs)[0], rtol=1e-4, atol=1e-5
                )
    assert set(order) == set(blocks)
    encoders = [i for i, name in enumerate(order) if "encoder" in name]
    decoders = [i for i, name in enumerate(order) if "decoder" in name]
    assert not encoders or not decoders or max(encoders) < min(decoders)


def test_the_walk_leaves_the_model_as_it_was():
    model = tiny.llama()
    blocks, _ = _block_layers(model)
    calls = _calls(model)
    with torch.no_grad():
        before = model(**calls[0].kwargs).logits
    with calibration_mode(model), BlockWalk(model, blocks, calls) as walk:
        walk.next_block()
    assert "forward" not in model.model.layers[0].__dict__
    with torch.no_grad():
        assert torch.equal(model(**calls[0].kwargs).logits, before)


def test_the_model_runs_up_to_a_block_for_one_batch_only():
    """What the other batches are given follows from the first one, so embeddings and masks are not computed again."""
    model = tiny.llama()
    blocks, _ = _block_layers(model)
    calls = _calls(model, batch_size=1)
    embedded = []
    model.model.embed_tokens.register_forward_hook(lambda *_: embedded.append(1))
    with calibration_mode(model), without_cache(model), BlockWalk(model, blocks, calls) as walk:
        while (reached := walk.next_block()) is not None:
            block = model.get_submodule(reached[0])
            walk.finish([block(*call.args, **call.kwargs) for call in reached[1]])
    assert len(embedded) == len(calls) + (len(blocks) - 1)


def test_blocks_that_are_never_called_stay_unreached():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))

        def forward(self, x):
            return self.layers[2](self.layers[0](x))

    model = Partly()
    blocks = {block.name: block.stack for block in discover(model).blocks}
    calls = [Call((torch.ones(2, 4),), {})]
    with calibration_mode(model), BlockWalk(model, blocks, calls) as walk:
        reached = []
        while (step := walk.next_block()) is not None:
            reached.append(step[0])
            walk.finish([model.get_submodule(step[0])(*call.args) for call in step[1]])
        assert reached == ["layers.0", "layers.2"]
        assert walk.unreached == ("layers.1",)


def test_a_block_that_is_called_twice_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))

        def forward(self, x):
            return self.layers[1](self.layers[0](self.layers[0](x)))

    model = Twice()
    blocks = {block.name: block.stack for block in discover(model).blocks}
    with calibration_mode(model), BlockWalk(model, blocks, [Call((torch.ones(2, 4),), {})]) as walk:
        _, calls = walk.next_block()
        with pytest.raises(UnsupportedModelError, match="more than once"):
            walk.finish([model.layers[0](*call.args) for call in calls])


@pytest.mark.parametrize("build", [tiny.albert, tiny.mlp, tiny.cnn, tiny.torch_encoder])
def test_whole_models_are_collected_at_once(build):
    """ALBERT calls one block several times: its statistics are sums over all calls."""
    model = build()
    generator = torch.Generator().manual_seed(0)
    if build is tiny.albert:
        calls = _calls(model)
    else:
        shape = {tiny.mlp: (6, 12), tiny.cnn: (3, 1, 8, 8), tiny.torch_encoder: (3, 5, 16)}[build]
        calls = example_calls([torch.randn(shape, generator=generator) for _ in range(3)], 3)
    names = [x.name for x in discover(model).layers if x.kind == "linear" and x.compressible and "pooler" not in x.name]
    assert names
    model.eval()
    with calibration_mode(model):
        found = collect_statistics(
            model, calls, {n: (Gram(), SquaredNorm()) for n in names}, weights={n: find_weight(model, n) for n in names}
        )
        expected = _oracle(model, calls, names)
    for name in names:
        gram = expected[name]
        assert np.abs(found[name][Gram()].numpy() - gram).max() <= 1e-4 * np.abs(gram).max()
        assert np.abs(found[name][SquaredNorm()].numpy() - gram.diagonal()).max() <= 1e-4 * np.abs(gram).max()


def test_layers_that_share_an_input_share_the_result():
    model = tiny.llama()
    attention = "model.layers.0.self_attn"
    names = [f"{attention}.{x}_proj" for x in "qkvo"]
    with calibration_mode(model), without_cache(model):
        found = collect_statistics(
            model, _calls(model), {n: (Gram(),) for n in names}, weights={n: find_weight(model, n) for n in names}
        )
    q, k, v, o = (found[name][Gram()] for name in names)
    assert q is k is v
    assert o is not q


def test_sharing_ends_when_the_inputs_stop_being_one_tensor():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x, same):
            return self.a(x) + self.b(x if same else 2 * x)

    torch.manual_seed(0)
    model = Fork()
    x = torch.randn(4, 3)
    calls = [Call((x, True), {}), Call((x, False), {})]
    weights = {name: find_weight(model, name) for name in "ab"}
    outputs: list[torch.Tensor] = []
    with torch.no_grad():
        found = collect_statistics(model, calls, {n: (Gram(),) for n in weights}, weights=weights, outputs=outputs)
        assert [output.tolist() for output in outputs] == [model(*call.args).tolist() for call in calls]
    gram = (x.T @ x / 4).numpy()
    np.testing.assert_allclose(found["a"][Gram()], gram, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["b"][Gram()], (gram + 4 * gram) / 2, rtol=1e-5, atol=1e-6)


def test_a_layer_that_sees_nothing_is_left_out():
    model = tiny.mlp()
    unused = find_weight(nn.ModuleDict({"unused": nn.Linear(12, 2)}), "unused")
    calls = example_calls([torch.randn(4, 12)], 1)
    with torch.no_grad():
        found = collect_statistics(
            model,
            calls,
            {"fc1": (Gram(),), "unused": (Gram(),)},
            weights={"fc1": find_weight(model, "fc1"), "unused": unused},
        )
    assert set(found) == {"fc1"}


def test_infinite_activations_name_the_layer():
    model = tiny.mlp()
    with torch.no_grad():
        model.fc1.weight.fill_(3e38)
        with pytest.raises(NonFiniteError, match="layer fc2"):
            collect_statistics(
                model, [Call((torch.ones(2, 12),), {})], {"fc2": (Gram(),)}, weights={"fc2": find_weight(model, "fc2")}
            )


def test_a_cache_is_neither_filled_nor_forgotten():
    model = tiny.llama()
    assert model.config.use_cache
    with without_cache(model):
        assert not model.config.use_cache
        assert model(IDS_NL).past_key_values is None
    assert model.config.use_cache


def test_example_inputs_of_every_form():
    x = torch.ones(2, 3)
    calls = example_calls([x, x.numpy(), (x, x), {"input": x.numpy()}], 10)
    assert [len(call.args) for call in calls] == [1, 1, 2, 0]
    assert torch.equal(calls[3].kwargs["input"], x)
    assert len(example_calls([x] * 5, 3)) == 3
    with pytest.raises(CalibrationError, match="no example"):
        example_calls([], 3)
    with pytest.raises(CalibrationError, match="example 0"):
        example_calls(["text"], 3)


def test_a_model_that_does_not_read_text_says_what_it_takes():
    with pytest.raises(CalibrationError, match="input_features"):
        text_calls(tiny.whisper(), IDS_NL, 2)


def test_floating_inputs_are_cast_and_ids_are_not():
    call = cast_inputs([Call((torch.ones(2),), {"ids": IDS_NL})], torch.bfloat16)[0]
    assert call.args[0].dtype == torch.bfloat16
    assert call.kwargs["ids"].dtype == torch.int64


def test_the_forward_type_follows_the_flags():
    fast, slow = CpuFlags(avx512_bf16=True), CpuFlags(avx2=True, avx512f=True)
    assert choose_dtype("auto", tiny.llama(), fast) is torch.bfloat16
    assert choose_dtype("auto", tiny.llama(), slow) is torch.float32
    assert choose_dtype("auto", tiny.mlp(), fast) is torch.float32
    assert choose_dtype("bfloat16", tiny.mlp(), slow) is torch.bfloat16
    assert choose_dtype("auto", tiny.resnet(), fast) is torch.float32  # its batch norms store statistics


def test_casting_restores_exactly_and_spares_buffers():
    model = tiny.llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with cast_parameters([model], torch.bfloat16, restore=True):
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


class _Net(nn.Module):
    """Blocks in a row, or with something that reads outputs of earlier ones, or with a block that is called twice."""

    def __init__(self, how):
        super().__init__()
        self.down, self.up = (nn.ModuleList(_Block() for _ in range(3)) for _ in range(2))
        self.how = how

    def forward(self, x):
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
        for block in self.up:
            x = block(x + skips.pop() if self.how == "u-net" else x + 2 * skips[-1])
        if self.how == "loop":
            x = self.down[1](x)
        return x + skips[0] if self.how == "at the end" else x


@pytest.mark.parametrize(("how", "expected"), [("row", True), ("u-net", False), ("at the end", False), ("loop", False)])
def test_models_whose_blocks_are_not_in_a_row_are_found_out(how, expected):
    torch.manual_seed(0)
    model = _Net(how).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    blocks = {block.name: block.stack for block in discover(model).blocks}
    assert len(blocks) == 6
    call = Call((torch.randn(5, 4),), {})
    assert in_a_row(load_model(model), blocks, call, torch.float32) == expected
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("build", [tiny.llama, tiny.bert, tiny.t5, tiny.gemma3])
def test_language_models_are_in_a_row(build):
    model = build()
    blocks = {block.name: block.stack for block in discover(model).blocks}
    assert in_a_row(load_model(model), blocks, _calls(model)[0], torch.float32)
