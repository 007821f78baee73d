"""Stand-ins for small modules: found by what they compute, and out of the way wherever they may not run."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.activations import ACT2FN

from rarefy.kernels.ops import ACTIVATIONS
from rarefy.nn.runtime_ops import Activation, LayerNorm, NativeForward, RmsNorm, Rotary, use_engine_ops

Write = Callable[..., Any]
TinyModel = Callable[[str], Any]


class ScaledNorm(nn.Module):
    """What an RMS norm looks like from outside; `scale` is where the ones below differ from it."""

    def __init__(self, width: int = 48, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def scale(self, x: Tensor) -> Tensor:
        return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * self.scale(x))


class GemmaNorm(ScaledNorm):
    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * (x * self.scale(x))


class SquaredWeight(ScaledNorm):  # the same while the weight is 1
    def forward(self, x: Tensor) -> Tensor:
        return self.weight**2 * (x * self.scale(x))


class Centred(ScaledNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class EpsOutside(ScaledNorm):
    def scale(self, x: Tensor) -> Tensor:
        return 1 / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class L1(ScaledNorm):
    def scale(self, x: Tensor) -> Tensor:
        return 1 / (x.abs().mean(-1, keepdim=True) + self.variance_epsilon)


class LengthNotMean(ScaledNorm):
    def scale(self, x: Tensor) -> Tensor:
        return torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + self.variance_epsilon)


class OtherEps(ScaledNorm):
    def scale(self, x: Tensor) -> Tensor:
        return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-4)


class AcrossTokens(ScaledNorm):
    def scale(self, x: Tensor) -> Tensor:
        return torch.rsqrt(x.pow(2).mean() + self.variance_epsilon)


class Clipped(ScaledNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-3, 3)


class InHalf(ScaledNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.bfloat16).float())


class NeedsMore(ScaledNorm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x) * gate


LOOK_ALIKES = [
    *(SquaredWeight, Centred, EpsOutside, L1, LengthNotMean, OtherEps, AcrossTokens, Clipped, InHalf, NeedsMore)
]


def operation(module: nn.Module) -> Any:
    use_engine_ops(module.eval())
    return module.forward.operation if isinstance(module.forward, NativeForward) else None


def test_rms_norms_are_found() -> None:
    assert operation(ScaledNorm()) == RmsNorm(1e-5, one_plus=False)
    assert operation(GemmaNorm()) == RmsNorm(1e-5, one_plus=True)
    assert operation(nn.LayerNorm(48)) == LayerNorm(1e-5)


@pytest.mark.parametrize("look_alike", LOOK_ALIKES)
def test_what_only_looks_like_an_rms_norm_is_left_alone(look_alike: type[ScaledNorm]) -> None:
    module = look_alike().eval()
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    arguments = (x, x) if look_alike is NeedsMore else (x,)
    with torch.no_grad():
        before = module(*arguments)
        use_engine_ops(module)
        assert torch.equal(module(*arguments), before)
    assert "forward" not in vars(module)


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(48, elementwise_affine=False),
        nn.LayerNorm(48, bias=False),
        nn.LayerNorm((6, 8)),
        nn.Identity(),
        nn.Dropout(0.5),
        nn.Softmax(-1),
        nn.GLU(),
    ],
)
def test_other_modules_are_left_alone(norm: nn.Module) -> None:
    assert operation(norm) is None


def test_a_module_in_training_or_with_a_forward_of_its_own_is_left_alone() -> None:
    norm = ScaledNorm().train()
    use_engine_ops(norm)
    assert "forward" not in vars(norm)
    norm = ScaledNorm().eval()
    norm.forward = own = lambda x: x  # type: ignore[method-assign]
    use_engine_ops(norm)
    assert norm.forward is own


@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_activations_of_transformers(name: str) -> None:
    """Every one that is taken must be what the engine would compute under its name, or the same function."""
    try:
        module = ACT2FN[name].eval()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        pytest.skip(f"transformers cannot make it: {error}")
    same = {"gelu_python": 1, "gelu_fast": 2, "gelu_accurate": 2, "gelu_python_tanh": 2}
    expected = {**ACTIVATIONS, **same}.get(name)
    assert operation(module) == (None if expected is None else Activation(expected))


@pytest.mark.parametrize(
    "module", [nn.ReLU6(), nn.LeakyReLU(), nn.Hardswish(), nn.Softplus(), nn.Mish(), nn.ELU(), nn.Tanh(), nn.Sigmoid()]
)
def test_activations_that_the_engine_has_not(module: nn.Module) -> None:
    assert operation(module) is None


def rotary(family: str, **changes: Any) -> nn.Module:
    classes = {
        "llama": (transformers.LlamaConfig, transformers.models.llama.modeling_llama.LlamaRotaryEmbedding),
        "gemma3": (transformers.Gemma3TextConfig, transformers.models.gemma3.modeling_gemma3.Gemma3RotaryEmbedding),
    }
    config, module = classes[family]
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "head_dim": 12, "max_position_embeddings": 3000}
    made: nn.Module = module(config(**{**sizes, **changes}))
    return made


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "changes", "layer_type"),
    [
        ("llama", {}, None),
        ("llama", {"rope_parameters": LLAMA3}, None),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1000.0}}, None),
        ("gemma3", {}, "sliding_attention"),
        ("gemma3", {}, "full_attention"),
    ],
)
@torch.no_grad()
def test_rotary_tables_have_the_bits_of_the_engine(family: str, changes: Any, layer_type: str | None) -> None:
    module = rotary(family, **changes)
    others = [] if layer_type is None else [layer_type]
    positions = torch.tensor([[0, 5, 1023, 1024, 2999], [1, 1, 2, 3, 4]])
    before = module(torch.zeros(1), positions, *others)
    found = operation(module)
    assert isinstance(found, Rotary)
    cos, sin = found.tables[layer_type].upto(3000)
    for got, table, old in zip(module(torch.zeros(1), positions, *others), (cos, sin), before, strict=True):
        assert np.array_equal(got[..., :6].numpy(), table[positions])
        assert np.array_equal(got[..., 6:].numpy(), table[positions])
        assert float((got - old).abs().max()) < 3e-3
    for beyond in ([[3000]], [[-1]]):
        far = torch.tensor(beyond)
        assert torch.equal(
            module(torch.zeros(1), far, *others)[0], type(module).forward(module, torch.zeros(1), far, *others)[0]
        )


@pytest.mark.parametrize("changed", ["inv_freq", "attention_scaling", "type"])
def test_a_rotary_embedding_with_other_numbers_is_left_alone(changed: str) -> None:
    yarn = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}
    module = rotary("llama", **(yarn if changed == "type" else {}))
    if changed == "inv_freq":
        module.inv_freq[3] *= 1.00001
    elif changed == "attention_scaling":
        module.attention_scaling = 1.0001
    assert operation(module) is None


# --- where the operations may not run -------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path, tiny_model: TinyModel, write_compressed: Write, linear_only: Callable[[str], Any]) -> Any:
    """A Gemma 3 whose embedding is dense and can be trained."""
    write_compressed(tmp_path / "out", tiny_model("gemma3"), linear_only("dense-f32-v1"))
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.fixture
def plain(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same model as it was before there were stand-ins."""
    monkeypatch.setattr("rarefy.nn.transformers_quantizer.use_engine_ops", lambda _: None)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="sdpa")
    assert not any("forward" in vars(module) for module in loaded.modules())
    return loaded


def native(model: nn.Module) -> list[str]:
    return [type(m.forward.operation).__name__ for m in model.modules() if isinstance(m.forward, NativeForward)]


def test_every_small_module_of_a_model_is_found(model: Any) -> None:
    found = native(model)
    assert {name: found.count(name) for name in sorted(set(found))} == {"Activation": 2, "RmsNorm": 13, "Rotary": 1}
    assert model.config._attn_implementation == "rarefy"


def test_gradients_are_those_of_torch(model: Any, plain: Any, token_ids: Tensor) -> None:
    for each in (model, plain):
        each.requires_grad_(True).train()
        each(input_ids=token_ids, labels=token_ids).loss.backward()
    assert any(parameter.grad is not None for parameter in plain.parameters())
    for (name, parameter), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad), name
    logits = [each.eval()(token_ids).logits for each in (model, plain)]
    assert torch.equal(*logits)  # gradients could be asked for


def test_a_loaded_model_needs_no_gradient_until_it_is_asked_for_one(model: Any, plain: Any, token_ids: Tensor) -> None:
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        expected = model(token_ids).logits
    assert torch.equal(model(token_ids).logits, expected)  # with gradients enabled, as a plain call has them
    model.requires_grad_(True)
    assert torch.equal(model(token_ids).logits, plain(token_ids).logits)


def test_training_other_dtypes_and_autocast_run_torch(model: Any, plain: Any, token_ids: Tensor) -> None:
    def check() -> None:
        with torch.no_grad():
            assert torch.equal(model(token_ids).logits, plain(token_ids).logits)

    with torch.no_grad():
        native_logits = model(token_ids).logits
        assert not torch.equal(native_logits, plain(token_ids).logits)  # otherwise the rest shows nothing
    for each in (model, plain):
        each.train()
    check()
    for each in (model, plain):
        each.eval().to(torch.bfloat16)
    check()
    for each in (model, plain):
        each.to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        check()


def test_a_changed_parameter_counts_at_once(model: Any, plain: Any, token_ids: Tensor) -> None:
    for each in (model, plain):
        each.model.layers[0].input_layernorm.weight.data.mul_(-2)
        each.model.norm.weight = nn.Parameter(torch.full_like(each.model.norm.weight, 0.5))
    with torch.no_grad():
        got, expected = (each(token_ids).logits for each in (model, plain))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_state_copies_and_pickles(model: Any, plain: Any, token_ids: Tensor) -> None:
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    with torch.no_grad():
        expected = model(token_ids).logits
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            assert len(native(other)) == len(native(model))
            assert torch.equal(other(token_ids).logits, expected)
            other.model.norm.weight.data.zero_()  # a copy's stand-ins read the copy's parameters
            assert not torch.equal(other(token_ids).logits, expected)
        assert torch.equal(model(token_ids).logits, expected)


def test_hooks_run(model: Any, token_ids: Tensor) -> None:
    seen = []
    model.model.norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    with torch.no_grad():
        model(token_ids)
    assert seen == [(2, 11, 48)]
