import copy
import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from rarefy.core.errors import LayoutError, UsageError
from rarefy.layouts import FORMATS, Layout, LowRank, Sum, Tapwise
from rarefy.nn import CompressedLinear

Make = Callable[..., CompressedLinear]


@pytest.fixture
def make(layout_for: Callable[[str, np.ndarray], Layout]) -> Make:
    """A layer of 24 outputs and 40 inputs."""

    def build(format_name: str, *, bias: bool = True) -> CompressedLinear:
        rng = np.random.default_rng(0)
        weight = rng.standard_normal((24, 40)).astype(np.float32)
        offset = torch.from_numpy(rng.standard_normal(24).astype(np.float32)) if bias else None
        return CompressedLinear.from_layout(layout_for(format_name, weight), offset)

    return build


def rounds_activations(format_name: str) -> bool:
    return "int" in format_name or format_name in ("ternary-v1", "binary-v1")


def tolerance(layer: CompressedLinear, x: torch.Tensor) -> torch.Tensor:
    """How far the kernel may be from exact arithmetic: float32 summation, and the rounding of activations."""
    weight = torch.from_numpy(layer.layout.to_dense()).double().abs()
    size = x.detach().double().abs() @ weight.T
    if rounds_activations(layer.format_name):
        # A block's activations are rounded to multiples of amax / 127: each is off by at most half of one.
        step = x.detach().double().abs().amax(-1, keepdim=True) / 127
        return 0.5 * step * weight.sum(1) + 1e-5 * size
    if "lut" in layer.format_name:
        # Activations and the entries of a table are each off by at most 2^-9 of themselves.
        return (1.01 * 2.0**-8 + 1e-5) * size
    if "bf16" not in layer.format_name and layer.format_name != "sum-v1":
        return 1e-5 * size
    # An activation is off by at most 2^-8 of itself, and so is an intermediate of factors.
    return (2.01 * 2.0**-8 + 1e-5) * through_factors(layer.layout, x.detach().double().abs())


def through_factors(layout: Layout, x: torch.Tensor) -> torch.Tensor:
    """x through the magnitudes of a layout's factors, where it has any."""
    match layout:
        case Sum():
            return sum((through_factors(part, x) for part in layout.parts), start=torch.zeros(()))
        case LowRank():
            return through_factors(layout.left, through_factors(layout.right, x))
        case Tapwise():
            runs = through_factors(layout.right, x.unflatten(-1, (layout.num_runs, -1)))
            return through_factors(layout.left, runs.flatten(-2))
    return x @ torch.from_numpy(layout.to_dense()).double().abs().T


def test_forward_is_the_product_with_the_layouts_matrix(make: Make, format_name: str) -> None:
    layer = make(format_name)
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(2))
    expected = x.double() @ torch.from_numpy(layer.layout.to_dense()).double().T + layer.bias.detach().double()
    with torch.no_grad():
        got = layer(x)
    assert got.shape == (3, 5, 24)
    assert got.dtype == torch.float32
    assert ((got.double() - expected).abs() <= tolerance(layer, x) + 1e-6).all()


@pytest.mark.parametrize("shape", [(40,), (0, 40), (1, 40), (2, 0, 40), (2, 3, 4, 40)])
def test_leading_axes(make: Make, shape: tuple[int, ...]) -> None:
    layer = make("bitmask-int4-v1")
    with torch.no_grad():
        assert layer(torch.zeros(shape)).shape == (*shape[:-1], 24)


def test_noncontiguous_input_gives_the_same_bits(make: Make) -> None:
    layer = make("dense-int8-v1")
    x = torch.randn(40, 7, generator=torch.Generator().manual_seed(3)).T
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.contiguous()))


def test_arrays_are_shared_not_copied(layout_for: Callable[[str, np.ndarray], Layout]) -> None:
    layout = layout_for("dense-bf16-v1", np.ones((4, 8), np.float32))
    layer = CompressedLinear.from_layout(layout)
    assert layer.get_buffer("values").data_ptr() == layout.arrays()["values"].ctypes.data
    assert np.shares_memory(layer.layout.arrays()["values"], layout.arrays()["values"])


def test_buffers_have_the_names_and_types_that_the_format_declares(make: Make, format_name: str) -> None:
    layer = make(format_name, bias=False)
    spec = FORMATS[format_name].array_spec(format_name, layer.meta)
    state = layer.state_dict()
    assert set(state) == set(spec)
    for name, (dtype, shape) in spec.items():
        assert state[name].numpy().dtype == dtype
        assert tuple(state[name].shape) == tuple(shape)


def test_state_dict_round_trip(make: Make, format_name: str) -> None:
    layer = make(format_name)
    other = CompressedLinear(format_name, layer.meta, bias=True)
    x = torch.randn(2, 40)
    if format_name.startswith("dense-f32"):
        with torch.no_grad():
            other(x)  # the caches of the old state must not survive
    other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_change_the_bias_and_never_the_arrays(make: Make, format_name: str, dtype: torch.dtype) -> None:
    layer = make(format_name)
    before = {name: layer.get_buffer(name).clone() for name in layer.array_names}
    x = torch.randn(2, 40)
    with torch.no_grad():
        expected = layer(x)
        layer.to(dtype)
        got = layer(x.to(dtype))
    for name, array in before.items():
        assert layer.get_buffer(name).dtype == array.dtype
        assert torch.equal(layer.get_buffer(name), array)
    assert got.dtype == dtype
    assert layer.bias.dtype == dtype
    assert layer.weight.dtype == dtype
    coarse = 2.0**-6 if dtype == torch.bfloat16 else 2.0**-9
    assert ((got.float() - expected).abs() <= tolerance(layer, x) + coarse * 50).all()


def test_deepcopy_is_independent(make: Make) -> None:
    layer = make("nm-int8-v1")
    x = torch.randn(2, 40)
    with torch.no_grad():
        expected = layer(x)
        twin = copy.deepcopy(layer)
        layer.get_buffer("codes").zero_()
        layer.forget_caches()
        assert torch.equal(twin(x), expected)
        assert not torch.equal(layer(x), expected)


def test_the_module_survives_torch_save_without_its_native_caches(make: Make) -> None:
    layer = make("bitmask-bf16-v1")
    x = torch.randn(2, 40)
    with torch.no_grad():
        expected = layer(x)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    other = CompressedLinear("bitmask-bf16-v1", layer.meta, bias=True)
    other.load_state_dict(torch.load(stream, weights_only=True))
    with torch.no_grad():
        assert torch.equal(other(x), expected)


def test_forward_is_the_same_with_and_without_gradients(make: Make, format_name: str) -> None:
    layer = make(format_name)
    x = torch.randn(4, 40)
    with torch.no_grad():
        expected = layer(x)
    assert torch.equal(layer(x.clone().requires_grad_()), expected)


def test_gradients_are_those_of_the_dense_layer(make: Make, format_name: str) -> None:
    layer = make(format_name)
    dense = nn.Linear(40, 24)
    dense.weight.data = torch.from_numpy(layer.layout.to_dense()).clone()
    x = torch.randn(4, 40, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    upstream = torch.randn(4, 24)
    layer(x).backward(upstream)
    dense(twin).backward(upstream)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


def test_the_dense_weight_exists_only_while_training(make: Make) -> None:
    layer = make("dense-int4-v1")
    layer(torch.randn(2, 40, requires_grad=True))
    assert layer._dense is None  # a forward pass under autograd alone must not cost the dense memory
    layer(torch.randn(2, 40, requires_grad=True)).sum().backward()
    assert layer._dense is not None
    layer.eval()
    assert layer._dense is None


def test_weight_has_the_right_values_when_something_computes_with_it(make: Make) -> None:
    layer = make("bitmask-int4-v1")
    dense = torch.from_numpy(layer.layout.to_dense())
    assert isinstance(layer.weight, torch.Tensor)
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device.type) == ((24, 40), torch.float32, "cpu")
    x = torch.randn(3, 40)
    assert torch.equal(nn.functional.linear(x, layer.weight, layer.bias), nn.functional.linear(x, dense, layer.bias))
    assert torch.equal(layer.weight * 2, dense * 2)
    assert torch.equal(layer.weight[3], dense[3])
    assert layer.weight.norm().item() == pytest.approx(dense.norm().item())
    assert torch.equal(layer.dequantized_weight(), dense)
    assert "24x40, bitmask-int4-v1" in repr(layer.weight)


def test_reading_what_the_weight_is_does_not_dequantize_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make("dense-int8-v1")
    monkeypatch.setattr(CompressedLinear, "dequantized_weight", lambda self: pytest.fail("it was dequantized"))
    weight = layer.weight
    assert weight.dtype == torch.float32
    assert weight.shape[0] == 24
    assert weight.numel() == 960


def test_the_weight_cannot_be_written_to(make: Make) -> None:
    layer = make("dense-int8-v1")
    with pytest.raises(UsageError, match="would change the weight"):
        layer.weight.zero_()


def test_wrong_inputs_are_refused(make: Make) -> None:
    layer = make("dense-bf16-v1")
    with pytest.raises(UsageError, match=r"\(1, 41\).*allowed: float \(\.\.\., 40\)"):
        layer(torch.zeros(1, 41))
    with pytest.raises(UsageError, match="int64"):
        layer(torch.zeros(1, 40, dtype=torch.int64))
    with pytest.raises(UsageError, match="meta"):
        layer(torch.zeros(1, 40, device="meta"))
    with pytest.raises(UsageError, match="bias"):
        CompressedLinear.from_layout(layer.layout, torch.zeros(23))


def test_damaged_arrays_never_reach_a_kernel(make: Make) -> None:
    layer = make("bitmask-int4-v1")
    layer.get_buffer("mask")[0, 0] ^= 1
    with pytest.raises(LayoutError):
        layer(torch.zeros(1, 40))
    with pytest.raises(LayoutError, match="unknown format 'dense-int5-v1'"):
        CompressedLinear("dense-int5-v1", {"shape": [2, 2]})
