"""`rarefy.compress` on convolutions, recurrent layers and GPT-2's transposed linear ones, from module to artifact."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import rarefy
from rarefy.artifact import read_artifact
from rarefy.calibrate import Gram
from rarefy.core.errors import RecipeError, UnsupportedModelError
from rarefy.core.patterns import NM, Unstructured
from rarefy.core.solution import Solution
from rarefy.methods import SparseGPT
from rarefy.nn import PackedConv, PackedDepthwiseConv, PackedGroupedConv, PackedRecurrent

sys.path.insert(0, str(Path(__file__).parent / "models"))

import tiny

INT8 = {"method": "rtn", "values": {"num_bits": 8, "group_size": 64}}
SPARSE = {"method": "sparsegpt", "pattern": {"sparsity": 0.5}}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x):
        return torch.relu(x + self.depthwise(self.conv2(torch.relu(self.norm(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.stage = nn.Sequential(Block(16), Block(16))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.stage(self.stem(x)).mean((2, 3)))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 24)
        self.lstm = nn.LSTM(24, 32, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(64, 24, batch_first=True)
        self.head = nn.Linear(24, 7)

    def forward(self, ids):
        return self.head(self.gru(self.lstm(self.table(ids))[0])[0])


def built(make, seed=0):
    torch.manual_seed(seed)
    return make().eval()


def examples(make, count=6):
    generator = torch.Generator().manual_seed(1)
    if make is Tagger:
        return [torch.randint(0, 50, (3, 9), generator=generator) for _ in range(count)]
    return [torch.randn(4, 3, 12, 12, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("make", [Net, Tagger])
@pytest.mark.parametrize("steps", [[INT8], [SPARSE], [SPARSE, INT8]], ids=["int8", "sparse", "sparse-int8"])
def test_a_module_survives_the_whole_road(make, steps, tmp_path):
    """What comes back from the file is what the run computes, and both are close to the model."""
    model, data = built(make), examples(make)
    recipe = {"steps": steps, "rest_dtype": "float32"}
    result = rarefy.compress(model, recipe, calibration=data, out=tmp_path / "OUT", samples=4, measure=make is Tagger)
    compressed = {x.name: x for x in result.report.layers}
    assert all(x.sparsity == pytest.approx(0.5 if SPARSE in steps else 0, abs=0.01) for x in compressed.values())
    if make is Net:
        one = ["conv1", "conv2.group0", "conv2.group1"]
        assert list(compressed) == [f"stage.{block}.{name}" for block in (0, 1) for name in one]
        reasons = {x.name: x.reason for x in result.report.untouched}
        assert set(reasons) == {
            "stem",
            "head",
            *(f"stage.{b}.{name}" for b in (0, 1) for name in ("norm", "depthwise")),
        }
    else:
        ends = [f"l{layer}{end}" for layer in (0, 1) for end in ("", "_reverse")]
        lstm = [f"lstm.weight_{part}_{end}" for end in ends for part in ("ih", "hh")]
        assert list(compressed) == [*lstm, "gru.weight_ih_l0", "gru.weight_hh_l0", "head"]
        assert compressed["gru.weight_ih_l0"].shape == (72, 64)
    packed, loaded = result.model(), built(make, seed=7)
    rarefy.load_into(loaded, tmp_path / "OUT")
    for x in data[-2:]:
        with torch.no_grad():
            before, after, again = model(x), packed(x), loaded(x)
        assert torch.equal(after, again)
        assert nn.functional.cosine_similarity(after.flatten(), before.flatten(), dim=0) > (
            0.8 if SPARSE in steps else 0.99
        )
    artifact = read_artifact(tmp_path / "OUT")
    assert {name: layout.nbytes for name, layout in artifact.layers.items()} == {
        x.name: x.packed_bytes for x in compressed.values()
    }
    assert sum(x.dense_bytes for x in compressed.values()) == 4 * sum(
        int(np.prod(x.shape)) for x in compressed.values()
    )


def test_the_classes_that_stand_in():
    net = rarefy.compress(built(Net), {"steps": [{**INT8, "targets": ["*"]}]}, measure=False).model()
    assert type(net.stem) is PackedConv
    assert type(net.stage[0].conv2) is PackedGroupedConv
    assert type(net.stage[0].depthwise) is PackedDepthwiseConv
    tagger = rarefy.compress(built(Tagger), {"steps": [{**INT8, "targets": ["lstm"]}]}, measure=False).model()
    assert type(tagger.lstm) is PackedRecurrent
    assert type(tagger.gru) is nn.GRU


@pytest.mark.parametrize(
    ("glob", "count"),
    [("lstm", 8), ("weight_hh_l*", 5), ("lstm.weight_ih_l0", 1), ("gru.*", 2), ("conv2", 4), ("stage.1.*", 4)],
)
def test_globs_name_modules_and_their_weights(glob, count):
    make = Net if glob in ("conv2", "stage.1.*") else Tagger
    result = rarefy.compress(built(make), {"steps": [{**INT8, "targets": [glob]}]}, measure=False)
    assert len(result.layers) == count


def test_a_group_alone_is_no_target():
    with pytest.raises(RecipeError, match="matches no layer"):
        rarefy.compress(built(Net), {"steps": [{**INT8, "targets": ["*.group0"]}]}, measure=False)


def test_each_channel_of_a_depthwise_convolution_is_solved_on_its_own_inputs():
    """SparseGPT of the whole layer is SparseGPT of each row with the Gram matrix of the patches that the row meets."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Conv2d(6, 12, 3, groups=6, bias=False))
    data = [torch.randn(4, 6, 9, 9) * torch.rand(6, 1, 1) for _ in range(3)]
    steps = [{**SPARSE, "targets": ["1"]}]
    result = rarefy.compress(model, {"steps": steps, "rest_dtype": "float32"}, calibration=data, measure=False)
    got = result.layers["1"].to_dense()
    patches = torch.cat(
        [nn.Unfold(3)(x).transpose(1, 2).reshape(-1, 6, 9) for x in data[:-1]]
    )  # the last one is held out
    for channel in range(6):
        x_TI = patches[:, channel]
        gram = {Gram(): x_TI.T @ x_TI / len(x_TI)}
        rows = model[1].weight[2 * channel : 2 * channel + 2].detach().reshape(2, 9).numpy()
        method = SparseGPT(pattern=Unstructured(0.5))
        expected = method.compress(Solution.dense(rows.copy()), gram, layer="1").weight_OI
        # the artifact stores floats of a sparse layer in bfloat16
        np.testing.assert_allclose(got[2 * channel : 2 * channel + 2], expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("pattern", [{"keep": 2, "group": 4}, {"sparsity": 0.5}])
def test_weights_that_know_their_inputs_beat_magnitude(pattern):
    """On images whose channels differ in size a method that sees the patches loses less of what the layer gives."""
    model = nn.Sequential(nn.Identity(), nn.Conv2d(8, 16, 3))
    torch.manual_seed(0)
    coarse = [torch.randn(4, 8, 4, 4) * torch.linspace(0.05, 3, 8)[:, None, None] for _ in range(5)]
    data = [
        nn.functional.interpolate(x, size=12, mode="bilinear") for x in coarse
    ]  # neighbours are alike, as in images
    errors = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        steps = [{"method": method, "pattern": pattern, "targets": ["1"]}]
        recipe = {"steps": steps, "rest_dtype": "float32"}
        packed = rarefy.compress(model, recipe, calibration=data[:4], measure=False).model()
        with torch.no_grad():
            errors[method] = float((packed(data[4]) - model(data[4])).square().mean())
    assert errors["sparsegpt"] < 0.8 * errors["wanda"]
    assert errors["wanda"] < errors["magnitude"]


def test_a_pattern_of_a_convolution_runs_along_the_channels_of_a_tap():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Conv2d(8, 4, 3))
    steps = [{"method": "magnitude", "pattern": {"keep": 2, "group": 8}, "targets": ["1"]}]
    packed = rarefy.compress(model, {"steps": steps}, measure=False).model()
    kept = (packed[1].weight * 1.0) != 0
    assert bool((kept.sum(1) == 2).all())  # of the 8 channels under each tap of each output


def test_tied_convolutions_and_recurrent_weights_are_stored_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1)
            self.b.weight = self.a.weight
            self.first, self.second = nn.GRU(8, 8, batch_first=True), nn.GRU(8, 8, batch_first=True)
            self.second.weight_hh_l0 = self.first.weight_hh_l0

        def forward(self, x):
            return self.second(self.first(self.b(self.a(x)).transpose(1, 2))[0])[0]

    model = built(Tied)
    x = torch.randn(2, 8, 6)
    result = rarefy.compress(model, {"steps": [INT8]}, measure=False, out=tmp_path / "OUT")
    assert result.tied == {"b": "a", "second.weight_hh_l0": "first.weight_hh_l0"}
    assert set(result.layers) == {"a", "first.weight_ih_l0", "first.weight_hh_l0", "second.weight_ih_l0"}
    names = set(read_artifact(tmp_path / "OUT").files)
    assert not any(name.startswith(("b.codes", "second.weight_hh_l0", "b.weight")) for name in names)
    loaded = built(Tied, seed=3)
    rarefy.load_into(loaded, tmp_path / "OUT")
    with torch.no_grad():
        assert torch.equal(loaded(x), result.model()(x))
        assert nn.functional.cosine_similarity(loaded(x).flatten(), model(x).flatten(), dim=0) > 0.999


def test_gpt2_from_a_directory(tiny_gpt2_dir, text_file, tmp_path):
    """Its linear layers keep their weights transposed; on disk and in the report they are like any other's."""
    from transformers import AutoModelForCausalLM

    recipe = {"steps": [{**SPARSE, "values": {"num_bits": 8, "group_size": 32}}]}
    result = rarefy.compress(
        tiny_gpt2_dir, recipe, calibration=text_file, out=tmp_path / "OUT", samples=8, sequence_length=32
    )
    layers = {x.name: x for x in result.report.layers}
    assert len(layers) == 2 * 4
    assert layers["transformer.h.0.attn.c_attn"].shape == (96, 32)
    assert all(x.error_metric == "output" and x.error < 0.3 for x in layers.values())
    dense = AutoModelForCausalLM.from_pretrained(tiny_gpt2_dir).eval()
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "OUT").eval()
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        got, own, before = packed(ids).logits, result.model()(ids).logits, dense(ids).logits
    torch.testing.assert_close(got, own, rtol=2e-2, atol=2e-2)  # the rest is stored in bfloat16
    assert nn.functional.cosine_similarity(got.flatten(), before.flatten(), dim=0) > 0.9
    packed.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, got)


@pytest.fixture(scope="module")
def tiny_gpt2_dir(tiny_llama_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "gpt2"
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama_dir)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_the_front_end_of_whisper(tmp_path):
    from transformers import WhisperForConditionalGeneration

    tiny.whisper().save_pretrained(tmp_path / "m")
    generator = torch.Generator().manual_seed(2)
    data = [
        {"input_features": torch.randn(1, 8, 40, generator=generator), "decoder_input_ids": torch.tensor([[1, 5]])}
        for _ in range(4)
    ]
    steps = [{**SPARSE, "targets": ["conv1", "conv2"]}]
    result = rarefy.compress(
        tmp_path / "m", {"steps": steps}, calibration=data, out=tmp_path / "OUT", samples=3, compute_dtype="float32"
    )
    assert {x.name: x.shape for x in result.report.layers} == {
        "model.encoder.conv1": (32, 24),
        "model.encoder.conv2": (32, 96),
    }
    packed = WhisperForConditionalGeneration.from_pretrained(tmp_path / "OUT").eval()
    assert type(packed.model.encoder.conv1) is PackedConv
    dense = WhisperForConditionalGeneration.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        got, before = packed(**data[3]).logits, dense(**data[3]).logits
    assert nn.functional.cosine_similarity(got.flatten(), before.flatten(), dim=0) > 0.98


def test_a_group_wider_than_a_depthwise_kernel_is_refused_before_work_begins():
    steps = [{"method": "magnitude", "pattern": {"keep": 8, "group": 16}, "targets": ["depthwise"]}]
    with pytest.raises(RecipeError, match="input axis 9 is smaller than the group of 16"):
        rarefy.compress(built(Net), {"steps": steps}, measure=False)
    assert NM(8, 16)  # the pattern itself is fine


def test_a_plan_counts_the_positions_of_images():
    torch.manual_seed(0)
    recipe = {"steps": [SPARSE]}
    plans = []
    images = [torch.randn(2, 3, 32, 32) for _ in range(3)]
    rarefy.compress(Net(), recipe, calibration=iter(images), samples=2, measure=False, announce=plans.append)
    few, many = (rarefy.run.plan(Net(), recipe, calibration=[torch.randn(2, 3, size, size)] * 2) for size in (32, 128))
    assert plans[0].memory_parts == few.memory_parts
    assert "first example" in few.basis
    assert many.seconds_parts["statistics"] > 4 * few.seconds_parts["statistics"]


@pytest.mark.parametrize("method", ["sparsegpt", "obert"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_model_of_transformers_with_batch_norms(method, dtype):
    """Their parameters stay in the type of their statistics while the others are in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    data = [{"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)} for _ in range(3)]
    steps = [{"method": method, "pattern": {"sparsity": 0.5}}]
    result = rarefy.compress(tiny.resnet(), {"steps": steps}, calibration=data, measure=False, compute_dtype=dtype)
    assert len(result.layers) >= 4
    assert all(layer.sparsity == pytest.approx(0.5, abs=0.02) for layer in result.report.layers)
    with torch.no_grad():
        assert bool(torch.isfinite(result.model()(**data[0]).logits).all())


class Padded(nn.Module):
    """Pads for its convolutions itself, by what they say of themselves, as models made for TensorFlow do."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(64, 64, 3, dilation=2, groups=groups, padding="valid") for groups in (1, 2, 64)
        )

    def forward(self, x):
        for conv in self.convs:
            reach = conv.dilation[0] * (conv.kernel_size[0] - 1)
            assert conv.padding == "valid"
            assert conv.padding_mode == "zeros"
            assert conv.in_channels // conv.groups == conv.weight.shape[1]
            x = conv(nn.functional.pad(x, (reach // 2, reach - reach // 2) * 2))
        return x


def test_packed_layers_keep_the_attributes_of_those_that_they_replace():
    torch.manual_seed(0)
    model, x = Padded().eval(), torch.randn(2, 64, 6, 5)
    steps = [{**INT8, "targets": "convs.*"}]
    result = rarefy.compress(model, {"steps": steps}, measure=False)
    with torch.no_grad():
        torch.testing.assert_close(result.model()(x), model(x), rtol=0.05, atol=0.02)


class Floats(transformers.PreTrainedModel):
    """Makes numbers of its own in float32, which a layer in bfloat16 does not take."""

    config_class = transformers.BertConfig

    def __init__(self, config) -> None:
        super().__init__(config)
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        return self.layer(torch.ones(x.shape[0], 64) + self.layer(x).float())


def test_a_model_that_fails_in_bfloat16_says_what_to_do(tmp_path):
    model, data = Floats(transformers.BertConfig()), [torch.randn(4, 64)] * 3
    with pytest.raises(UnsupportedModelError, match=r"Floats: .*bfloat16.*--compute-dtype float32"):
        rarefy.compress(model, {"steps": [SPARSE]}, calibration=data, compute_dtype="bfloat16", out=tmp_path / "OUT")
    assert not list(tmp_path.iterdir())
    result = rarefy.compress(model, {"steps": [SPARSE]}, calibration=data, compute_dtype="float32", measure=False)
    assert list(result.layers) == ["layer"]


def test_experts_too_narrow_for_bfloat16_are_calibrated_in_float32():
    """torch's product of experts takes rows of whole 16 bytes, of which 36 and 52 numbers in bfloat16 are none."""
    sizes = {"hidden_size": 36, "intermediate_size": 52, "num_attention_heads": 3, "num_key_value_heads": 1}
    config = transformers.MixtralConfig(vocab_size=99, num_hidden_layers=2, num_local_experts=4, **sizes)
    model, data = transformers.MixtralForCausalLM(config), [torch.arange(1, 17)[None]] * 2
    result = rarefy.compress(model, {"steps": [{**SPARSE, "targets": "q_proj"}]}, calibration=data, measure=False)
    assert len(result.layers) == 2
    with pytest.raises(UnsupportedModelError, match=r"MixtralForCausalLM: .*bfloat16.*--compute-dtype float32"):
        rarefy.compress(model, "sparsegpt-50", calibration=data, compute_dtype="bfloat16", measure=False)
