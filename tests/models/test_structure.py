"""What `discover` finds in models of every kind, against what their authors wrote down in the module tree."""

import pytest
import tiny
import torch
from torch import nn

from rarefy.models import discover


@pytest.mark.parametrize(
    ("build", "stacks", "linear_per_block"),
    [
        (tiny.llama, {"model.layers": 3}, 7),
        (tiny.qwen2, {"model.layers": 2}, 7),
        (tiny.gemma3, {"model.layers": 4}, 7),
        (tiny.bert, {"encoder.layer": 2}, 6),
        (tiny.distilbert, {"transformer.layer": 2}, 6),
        (tiny.albert, {"encoder.albert_layer_groups": 1}, 6),
        (tiny.t5, {"encoder.block": 3, "decoder.block": 2}, None),
        (tiny.whisper, {"model.encoder.layers": 2, "model.decoder.layers": 2}, None),
        (tiny.cnn, {}, None),
        (tiny.mlp, {}, None),
    ],
)
def test_finds_the_repeated_blocks(build, stacks, linear_per_block):
    structure = discover(build())
    found = {}
    for block in structure.blocks:
        found[block.stack] = found.get(block.stack, 0) + 1
    assert found == stacks
    assert [b.name for b in structure.blocks if b.index == 0] == [f"{stack}.0" for stack in stacks]
    if linear_per_block is not None:
        for block in structure.blocks:
            inside = [x for x in structure.layers if x.block == block.name and x.kind == "linear"]
            assert len(inside) == linear_per_block
            assert all(x.compressible for x in inside)


def test_encoder_and_decoder_layers_of_whisper_and_t5_are_counted():
    # encoder: q, k, v, out, fc1, fc2; decoder: twice the attention
    whisper = discover(tiny.whisper())
    inside = [x for x in whisper.layers if x.block and x.kind == "linear"]
    assert len([x for x in inside if ".encoder." in x.name]) == 2 * 6
    assert len([x for x in inside if ".decoder." in x.name]) == 2 * 10
    t5 = discover(tiny.t5())
    inside = [x for x in t5.layers if x.block and x.kind == "linear"]
    assert len([x for x in inside if x.name.startswith("encoder.")]) == 3 * 6
    assert len([x for x in inside if x.name.startswith("decoder.")]) == 2 * 10


def test_tied_head_is_listed_once_with_its_owner():
    structure = discover(tiny.llama())
    head = structure.layer("lm_head")
    assert head.tied_to == "model.embed_tokens"
    assert head.num_bytes == 0
    assert not head.compressible
    assert "model.embed_tokens" in (head.reason or "")
    assert structure.layer("model.embed_tokens").num_bytes == 99 * 32 * 4
    untied = discover(tiny.qwen2()).layer("lm_head")
    assert untied.tied_to is None
    assert untied.compressible


def test_bytes_and_shapes_add_up_to_the_parameters():
    for build in (tiny.llama, tiny.t5, tiny.albert, tiny.whisper, tiny.cnn):
        model = build()
        structure = discover(model)
        assert sum(x.num_bytes for x in structure.layers) == sum(p.numel() for p in model.parameters()) * 4
        for layer in structure.layers:
            module = model.get_submodule(layer.name)
            if getattr(module, "weight", None) is not None:
                assert layer.shape == tuple(module.weight.shape)


def test_every_layer_that_cannot_be_compressed_says_why():
    for build in (tiny.llama, tiny.gpt2, tiny.cnn, tiny.torch_encoder, tiny.whisper):
        for layer in discover(build()).layers:
            assert layer.compressible == (layer.reason is None)
    reasons = {x.name: x.reason for x in discover(tiny.cnn()).layers}
    assert reasons["0"] is None
    assert "normalisation" in reasons["1"]
    assert reasons["4"] is None
    reasons = {x.name: x.reason for x in discover(tiny.torch_encoder()).layers}
    assert "MultiheadAttention" in reasons["layers.0.self_attn.out_proj"]
    assert reasons["layers.0.linear1"] is None
    alone = discover(nn.Conv2d(4, 4, 3)).layers[0]
    assert alone.kind == "conv"
    assert "the whole model" in alone.reason
    for module, reason in (
        (nn.ConvTranspose2d(4, 4, 3), "transposed"),
        (nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)), "ParametrizedConv1d"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "ParametrizedLinear"),
        (nn.EmbeddingBag(4, 4), "adds up"),
    ):
        layers = discover(nn.Sequential(module)).layers
        assert reason in layers[0].reason


def test_a_weight_that_a_hook_computes_is_no_parameter_to_exchange():
    with pytest.warns(FutureWarning, match="weight_norm"):
        old_style = nn.utils.weight_norm(nn.Conv1d(4, 4, 3))
    (layer,) = discover(nn.Sequential(old_style)).layers
    assert not layer.compressible
    assert "computed by a hook" in layer.reason


def test_a_convolution_is_a_matrix_for_each_group_and_a_depthwise_one_a_row_for_each_output():
    model = nn.Sequential(
        nn.Conv2d(6, 8, (3, 2)), nn.Conv1d(8, 12, 5, groups=4), nn.Conv2d(12, 24, 3, groups=12), nn.Conv3d(2, 4, 3)
    )
    layers = {x.name: x for x in discover(model).layers}
    assert list(layers) == ["0", *(f"1.group{i}" for i in range(4)), "2", "3"]
    assert (layers["0"].shape, layers["0"].matrix) == ((8, 6, 3, 2), (8, 36))
    assert (layers["1.group2"].shape, layers["1.group2"].matrix) == ((3, 2, 5), (3, 10))
    assert (layers["2"].kind, layers["2"].matrix) == ("depthwise", (24, 9))
    assert layers["3"].matrix == (4, 54)
    assert all(x.compressible for x in layers.values())
    assert sum(x.num_bytes for x in layers.values()) == 4 * sum(p.numel() for p in model.parameters())


def test_the_weight_of_gpt2s_conv1d_is_the_transposed_matrix():
    layer = discover(tiny.gpt2()).layer("transformer.h.0.attn.c_attn")
    assert (layer.kind, layer.shape, layer.matrix, layer.compressible) == ("linear", (32, 96), (96, 32), True)
    assert len(discover(tiny.gpt2()).blocks) == 2


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x)


def test_blocks_of_convolutions_count_in_a_sequence_and_not_in_a_list():
    """What a list of blocks gives may be kept for later, as in U-shaped networks; a sequence hands it on."""
    sequence = nn.ModuleDict({"stage": nn.Sequential(Residual(), Residual())})
    assert [b.name for b in discover(sequence).blocks] == ["stage.0", "stage.1"]
    kept = nn.ModuleDict({"stage": nn.ModuleList([Residual(), Residual()])})
    assert discover(kept).blocks == ()


def test_a_tied_convolution_is_listed_once_with_its_owner():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv1d(4, 4, 1) for _ in range(3))
            self.b.weight = self.a.weight
            self.d = nn.Linear(4, 4)
            self.c = nn.Conv1d(4, 4, 1, groups=2)

    layers = {x.name: x for x in discover(Twice()).layers}
    assert layers["b"].tied_to == "a"
    assert not layers["b"].compressible
    assert layers["a"].compressible
    assert layers["c.group0"].tied_to is layers["c.group1"].tied_to is None


def test_a_linear_subclass_with_its_own_forward_is_refused():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = discover(nn.Sequential(Doubled(3, 3))).layers[0]
    assert not layer.compressible
    assert "Doubled" in layer.reason


def test_zeros_are_counted_when_asked_for():
    model = tiny.mlp()
    with torch.no_grad():
        model.fc1.weight[:, :5] = 0
    assert discover(model).layer("fc1").num_zeros is None
    counted = discover(model, count_zeros=True)
    assert counted.layer("fc1").num_zeros == 20 * 5
    assert counted.layer("fc2").num_zeros == 0


def test_a_hybrid_list_of_a_few_classes_is_a_stack_and_a_list_of_unlike_parts_is_not():
    class A(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

    class B(A):
        pass

    hybrid = nn.ModuleDict({"layers": nn.ModuleList([A(), B(), A(), B()])})
    assert [b.name for b in discover(hybrid).blocks] == [f"layers.{i}" for i in range(4)]
    unlike = nn.ModuleDict({"parts": nn.ModuleList([A(), B()])})
    assert discover(unlike).blocks == ()
