"""Packed convolutions against torch's own ones in float64 that hold the unpacked weights."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rarefy.core.errors import LayoutError, UnsupportedModelError, UsageError
from rarefy.kernels import Prepared, prepare
from rarefy.kernels.extension import native
from rarefy.layouts import FORMATS, Layout, Sum
from rarefy.nn import PackedConv, PackedDepthwiseConv, PackedGroupedConv, convolve, patches, replace_linear
from rarefy.nn.holder import LayoutHolder
from rarefy.nn.replace import weights_of

LayoutFor = Callable[..., Layout]
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def as_matrix(weight: Tensor) -> np.ndarray:
    """Each output's taps side by side, each tap with all channels: said in numpy, apart from the code under test."""
    order = (0, *range(2, weight.ndim), 1)
    return np.ascontiguousarray(weight.detach().numpy().transpose(order)).reshape(len(weight), -1)


def as_weight(matrix: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    rows, channels, *taps = shape
    return torch.from_numpy(np.moveaxis(matrix.reshape(rows, *taps, channels), -1, 1).copy())


def packed(layout_for: LayoutFor, conv: nn.Module, format_name: str) -> tuple[nn.Module, nn.Module]:
    """A packed layer made of `conv`, and `conv` itself in float64 with the weights that the packed one stores."""
    model = nn.Sequential(copy.deepcopy(conv))
    matrix = as_matrix(conv.weight)
    names = [weight.layer for weight in weights_of(conv, "0")]
    parts = np.split(matrix, len(names))
    layouts = {name: layout_for(format_name, part) for name, part in zip(names, parts, strict=True)}
    replace_linear(model, layouts)
    stored = np.concatenate([layout.to_dense() for layout in layouts.values()])
    dense = copy.deepcopy(conv)
    dense.weight.data = as_weight(stored, tuple(conv.weight.shape))
    return model[0], dense.double()


def tolerance(dense: nn.Module, x: Tensor, format_name: str) -> Tensor:
    """How far a product of patches may be from exact arithmetic.

    Sums of float32 err by at most the number of terms times the unit roundoff, of which 1e-5 is generous for what fits
    here. bfloat16 layouts also round activations to 8 bits, each by at most 2^-9 of itself (2^-8 with the
    entries of tables, which are rounded so too); with factors also what comes out of one, whose magnitudes are some
    times those of the product.
    Integer ones round to multiples of amax / 127 of a block: each is off by half of one.
    """
    absolute = copy.deepcopy(dense)
    absolute.weight.data = absolute.weight.data.abs()
    if absolute.bias is not None:
        absolute.bias.data = absolute.bias.data.abs()
    has_factors = format_name in ("sum-v1", "lowrank-bf16-v1", "tapwise-bf16-v1")
    roundings = 6 if has_factors else 1 if "bf16" in format_name or "lut" in format_name else 0
    bound = (1e-5 + roundings * 2.0**-8) * absolute(x.double().abs())
    is_rounded = "int" in format_name or format_name in ("ternary-v1", "binary-v1")
    if is_rounded and (dense.groups == 1 or dense.out_channels >= 16 * dense.groups):
        step = 0.5 * x.double().abs().max() / 127
        sums = absolute.weight.sum(dim=tuple(range(1, absolute.weight.ndim)))
        bound = bound + (step * sums).reshape(-1, *(1,) * len(dense.kernel_size))
    return bound.detach()


def check(layer: nn.Module, dense: nn.Module, x: Tensor, format_name: str) -> None:
    with torch.no_grad():
        got, expected = layer(x), dense(x.double())
    assert got.shape == expected.shape
    assert got.dtype == x.dtype
    error = (got.double() - expected).abs()
    assert bool((error <= tolerance(dense, x, format_name) + 1e-12).all()), float(error.max())


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """Any geometry that torch takes, and an input that the kernel fits into."""
    num_axes = draw(st.integers(1, 3))
    axes = range(num_axes)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    in_channels, out_channels = (groups * draw(st.integers(1, 18)) for _ in range(2))
    kernel = tuple(draw(st.integers(1, 3)) for _ in axes)
    dilation = tuple(draw(st.integers(1, 2)) for _ in axes)
    stride = tuple(draw(st.integers(1, 3)) for _ in axes)
    size = tuple(d * (k - 1) + 1 + draw(st.integers(0, 4)) for k, d in zip(kernel, dilation, strict=True))
    padding: str | tuple[int, ...] = tuple(draw(st.integers(0, min(2, s - 1))) for s in size)
    if all(s == 1 for s in stride) and draw(st.booleans()):
        padding = draw(st.sampled_from(["same", "valid"]))
    mode = draw(st.sampled_from(["zeros", "zeros", "replicate", "circular", "reflect"]))
    if padding == "same" and any(d * (k - 1) >= s for d, k, s in zip(dilation, kernel, size, strict=True)):
        mode = "zeros"  # torch pads by less than the size only
    torch.manual_seed(draw(st.integers(0, 99)))
    conv = CONVS[num_axes](
        in_channels, out_channels, kernel, stride, padding, dilation, groups, draw(st.booleans()), mode
    )
    batch = draw(st.integers(1, 3))
    return conv, torch.randn(batch, in_channels, *size)


@settings(max_examples=150, deadline=None)
@given(convolutions(), st.sampled_from(["dense-f32-v1", "dense-int8-v1", "bitmask-bf16-v1"]))
def test_any_geometry_gives_what_torch_gives(
    layout_for: LayoutFor, case: tuple[nn.Module, Tensor], format_name: str
) -> None:
    conv, x = case
    layer, dense = packed(layout_for, conv, format_name)
    check(layer, dense, x, format_name)


# A low-rank pair of integers rounds twice: tests/kernels/test_compositions.py has the bound for it.
@pytest.mark.parametrize("format_name", sorted(set(FORMATS) - {"lowrank-int8-v1"}))
@pytest.mark.parametrize("groups", [1, 2, 16])
def test_every_format_runs(layout_for: LayoutFor, format_name: str, groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 32, 3, padding=1, groups=groups)
    layer, dense = packed(layout_for, conv, format_name)
    assert type(layer) is {1: PackedConv, 2: PackedGroupedConv, 16: PackedDepthwiseConv}[groups]
    check(layer, dense, torch.randn(2, 16, 7, 6), format_name)


@pytest.mark.parametrize("outputs", [64, 16, 8])
@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("last", [False, True])
def test_no_dense_weight_is_ever_made(
    layout_for: LayoutFor, monkeypatch: pytest.MonkeyPatch, groups: int, outputs: int, last: bool
) -> None:
    if native() is None:
        pytest.skip("without the extension groups of few outputs run in torch")
    layer, dense = packed(layout_for, nn.Conv2d(8, outputs, 3, groups=groups), "bitmask-int8-v1")
    monkeypatch.setattr(LayoutHolder, "dequantized_weight", lambda _: pytest.fail("it was dequantized"))
    form = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, 8, 9, 9).to(memory_format=form)
    check(layer, dense, x, "bitmask-int8-v1")
    assert layer(x).is_contiguous(memory_format=form)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_every_geometry_of_depthwise_convolutions_with_channels_last(layout_for: LayoutFor, axes: int) -> None:
    torch.manual_seed(0)
    for channels, kernel, stride, dilation in (
        (1, 3, 1, 1),
        (17, 5, 2, 1),
        (33, 2, 3, 2),
        (16, 7, 1, 1),
        (40, 1, 2, 1),
    ):
        conv = CONVS[axes](channels, channels, kernel, stride, kernel // 2, dilation, channels)
        layer, dense = packed(layout_for, conv, "dense-int8-v1")
        for batch in (1, 3):
            x = torch.randn(batch, channels, *(13, 14, 15)[:axes])
            check(layer, dense, x.movedim(1, -1).contiguous().movedim(-1, 1), "dense-int8-v1")
            check(layer, dense, x, "dense-int8-v1")
        with torch.no_grad():
            assert layer(x[:0]).shape == dense(x[:0].double()).shape


@pytest.mark.parametrize("width", [1024, 1025])
def test_groups_of_few_outputs_and_many_inputs_are_products(layout_for: LayoutFor, width: int) -> None:
    layer, dense = packed(layout_for, nn.Conv1d(2 * width, 4, 1, groups=2), "dense-f32-v1")
    check(layer, dense, torch.randn(1, 2 * width, 5), "dense-f32-v1")


@pytest.mark.parametrize("numbers", [1, 500, 3000, 1 << 20])
def test_patches_come_in_pieces_of_bounded_size(
    layout_for: LayoutFor, monkeypatch: pytest.MonkeyPatch, numbers: int
) -> None:
    """A piece is at least one line of places, and else no larger than asked for; the result does not depend on it."""
    monkeypatch.setattr(patches, "PIECE_NUMBERS", numbers)
    conv = nn.Conv2d(5, 6, 3, stride=2, padding=1)
    layer, dense = packed(layout_for, conv, "dense-f32-v1")
    x = torch.randn(4, 5, 13, 11)
    check(layer, dense, x, "dense-f32-v1")
    geometry = patches.Geometry.of(conv)
    sizes = [rows.shape for rows in geometry.pieces(geometry.padded(x, torch.float32))]
    assert sum(rows for rows, _ in sizes) == 4 * 7 * 6
    assert all(width == 45 and rows * width <= max(numbers, 6 * 45) for rows, width in sizes)
    assert (len(sizes) == 1) == (numbers == 1 << 20)


INTEGERS = [
    "dense-int8-v1",
    "dense-int4-v1",
    "bitmask-int8-v1",
    "block-int8-v1",
    "ternary-v1",
    "lowrank-int8-v1",
]


@pytest.mark.parametrize("format_name", INTEGERS)
@pytest.mark.parametrize("groups", [1, 2])
def test_pixels_that_are_quantized_once_give_the_same_bits(
    layout_for: LayoutFor, monkeypatch: pytest.MonkeyPatch, format_name: str, groups: int
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(64 * groups, 32 * groups, (3, 2), (2, 1), (1, 0), (1, 2), groups)
    x = torch.randn(3, 64 * groups, 41, 40)
    layer, _ = packed(layout_for, conv, format_name)
    holders = [layer] if isinstance(layer, PackedConv) else layer._holders()
    takes_taps = [holder.prepared.takes_taps for holder in holders]
    with torch.no_grad():
        got = layer(x)
        monkeypatch.setattr(Prepared, "takes_taps", False)
        written_out = layer(x)
    assert torch.equal(got, written_out)
    assert all(takes_taps) or native() is None


@pytest.mark.parametrize("format_name", ["dense-int8-v1", "bitmask-bf16-v1", "lowrank-int8-v1", "dense-f32-v1"])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_strips_of_patches_give_the_bits_of_all_patches(
    layout_for: LayoutFor, monkeypatch: pytest.MonkeyPatch, format_name: str, mode: str, last: bool, groups: int
) -> None:
    if native() is None:
        pytest.skip("the extension is not built")
    torch.manual_seed(0)
    for kernel, stride, padding in ((1, 1, 0), (1, 2, 0), ((3, 2), (2, 1), (1, 1))):
        conv = nn.Conv2d(20 * groups, 32 * groups, kernel, stride, padding, 1, groups, True, mode)
        layer, _ = packed(layout_for, conv, format_name)
        x = torch.randn(3, 20 * groups, 23, 19)
        x = x.to(memory_format=torch.channels_last) if last else x
        with torch.no_grad(), monkeypatch.context() as context:
            got = layer(x)
            context.setattr(convolve, "_in_strips", lambda *_: None)
            written_out = layer(x)
        assert torch.equal(got, written_out)
        assert got.stride() == written_out.stride()


def test_a_sum_of_integers_takes_taps_and_one_with_floats_does_not(layout_for: LayoutFor) -> None:
    if native() is None:
        pytest.skip("the extension is not built")
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((20, 128)).astype(np.float32)
    parts = [layout_for(name, matrix) for name in ("dense-int8-v1", "lowrank-int8-v1", "dense-bf16-v1")]
    assert not prepare(Sum(parts[0], parts[2])).takes_taps
    both = prepare(Sum(parts[0], parts[1]))
    assert both.takes_taps
    x_PC, starts, offsets = rng.standard_normal((9, 64)).astype(np.float32), np.array([0, 3, 7]), np.array([0, 1])
    rows_TI = np.stack([x_PC[start + offsets].reshape(-1) for start in starts])
    y_TO = np.full((3, 20), np.nan, np.float32)
    both.matmul_taps(x_PC, starts, offsets, y_TO)
    np.testing.assert_array_equal(y_TO, both.matmul(rows_TI))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_every_output_whose_taps_meet_it(layout_for: LayoutFor, bad: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 64, 7, 6)
    x[0, 5, 3, 2] = bad
    for format_name in ("dense-int8-v1", "block-int8-v1"):
        layer, _ = packed(layout_for, nn.Conv2d(64, 32, 3, padding=1, bias=False), format_name)
        with torch.no_grad():
            is_nan = layer(x)[0].isnan()
        assert bool(is_nan[:, 2:5, 1:4].all())
        assert int(is_nan.sum()) == 32 * 9


def test_a_pointwise_convolution_copies_nothing() -> None:
    geometry = patches.Geometry.of(nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    (rows,) = geometry.pieces(geometry.padded(x, torch.float32))
    assert rows.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("format_name", ["dense-f32-v1"])
def test_the_memory_format_follows_the_input(layout_for: LayoutFor, format_name: str) -> None:
    layer, dense = packed(layout_for, nn.Conv2d(4, 6, 3, padding=1), format_name)
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        assert layer(x).view(2, -1).shape == (2, 150)  # as after torch's own convolution
        y = layer(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), dense(x.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 4, 32])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_outputs_lie_as_torch_lays_them(layout_for: LayoutFor, groups: int, axes: int) -> None:
    conv = CONVS[axes](32, 32, 3, padding=1, groups=groups)
    layer, dense = packed(layout_for, conv, "dense-int8-v1")
    x = torch.randn(2, 32, *(6, 5, 4)[:axes])
    with torch.no_grad():
        assert layer(x).stride() == dense(x.double()).stride() == x.stride()


def test_a_depthwise_weight_follows_its_layout(layout_for: LayoutFor) -> None:
    first, second = (nn.Conv2d(8, 8, 3, groups=8, bias=False) for _ in range(2))
    layer, dense = packed(layout_for, first, "dense-int8-v1")
    other, other_dense = packed(layout_for, second, "dense-int8-v1")
    x = torch.randn(1, 8, 5, 5)
    check(layer, dense, x, "dense-int8-v1")
    twin = copy.deepcopy(layer)
    layer.load_state_dict(other.state_dict())
    check(layer, other_dense, x, "dense-int8-v1")
    check(twin, dense, x, "dense-int8-v1")


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_gradient_after_a_call_in_inference_mode(layout_for: LayoutFor, groups: int) -> None:
    layer, dense = packed(layout_for, nn.Conv2d(8, 8, 3, groups=groups), "dense-f32-v1")
    x = torch.randn(2, 8, 5, 5)
    with torch.inference_mode():
        layer(x)
    x.requires_grad_()
    (got,) = torch.autograd.grad(layer(x).square().sum(), x)
    (expected,) = torch.autograd.grad(dense(x.double()).square().sum(), x)
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-4)


def test_a_result_is_not_overwritten_by_the_next_call(layout_for: LayoutFor) -> None:
    """Scratch is kept from call to call; what is handed out never lies in it."""
    few = (nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 64, 3, groups=16))
    for conv in (nn.Conv2d(64, 32, 3), nn.Conv2d(64, 32, 1), nn.Conv2d(64, 64, 3, groups=2), *few):
        layer, dense = packed(layout_for, conv, "dense-int8-v1")
        for form in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 64, 6, 5).to(memory_format=form)
            with torch.no_grad():
                y = layer(x)
                layer(torch.randn(3, 64, 7, 7).to(memory_format=form))
                expected = dense(x.double())
            error = (y.double() - expected).abs()
            assert bool((error <= tolerance(dense, x, "dense-int8-v1")).all())


@pytest.mark.parametrize(
    ("outputs", "size"), [(32, 3), (32, 1), (1, 6)], ids=["one place", "a kernel of one place", "one output"]
)
def test_results_of_one_place_or_output_are_not_overwritten_either(
    layout_for: LayoutFor, outputs: int, size: int
) -> None:
    # There channels first and channels last are the same memory.
    conv = nn.Conv2d(64, outputs, 1 if size == 1 else 3, padding=0 if size < 4 else 1)
    layer, _ = packed(layout_for, conv, "dense-int8-v1")
    for shape in ((1, 64, size, size), (64, size, size)):
        first, second = torch.randn(shape), torch.randn(shape)
        with torch.no_grad():
            y = layer(first)
            before = y.clone()
            layer(second)
        assert torch.equal(y, before)


def test_an_input_without_a_batch(layout_for: LayoutFor) -> None:
    for groups in (1, 2, 4):
        layer, dense = packed(layout_for, nn.Conv1d(4, 4, 3, groups=groups), "dense-f32-v1")
        check(layer, dense, torch.randn(4, 9), "dense-f32-v1")


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_the_gradient_is_that_of_the_dense_layer(layout_for: LayoutFor, groups: int, mode: str) -> None:
    conv = nn.Conv2d(4, 32, 3, stride=2, padding=1, groups=groups, padding_mode=mode)
    layer, dense = packed(layout_for, conv, "dense-f32-v1")
    x = torch.randn(2, 4, 6, 7)
    gradients = []
    for each, dtype in ((layer, torch.float32), (dense, torch.float64)):
        leaf = x.to(dtype).clone().requires_grad_()
        each(leaf).square().sum().backward()
        gradients.append((leaf.grad.double(), each.bias.grad.double()))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_half_precision_input_comes_back_in_its_type(layout_for: LayoutFor) -> None:
    for groups in (1, 2, 4):
        layer, dense = packed(layout_for, nn.Conv2d(4, 4, 3, groups=groups), "dense-f32-v1")
        x = torch.randn(1, 4, 5, 5).to(torch.bfloat16)
        with torch.no_grad():
            y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), dense(x.double()), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_weight_has_the_shape_and_values_of_the_parameter(layout_for: LayoutFor, groups: int) -> None:
    layer, dense = packed(layout_for, nn.Conv2d(4, 8, (3, 2), groups=groups), "dense-int8-v1")
    assert layer.weight.shape == dense.weight.shape
    assert layer.weight.dtype == torch.float32
    torch.testing.assert_close(layer.weight * 1.0, dense.weight.float(), rtol=0, atol=0)


def test_inputs_that_do_not_fit_are_refused(layout_for: LayoutFor) -> None:
    for groups in (1, 2, 4):
        layer, _ = packed(layout_for, nn.Conv2d(4, 4, 3, groups=groups), "dense-int8-v1")
        for x in (torch.randn(1, 3, 5, 5), torch.randn(4, 5), torch.ones(1, 4, 5, 5, dtype=torch.int64)):
            with pytest.raises(UsageError, match=r"allowed: float \(batch, 4, size, size\)"):
                layer(x)
    layer, _ = packed(layout_for, nn.Conv2d(4, 4, 3), "dense-int8-v1")
    with pytest.raises(UsageError, match="at least the kernel"):
        layer(torch.randn(1, 4, 2, 5))


def test_a_tied_convolution_reads_the_arrays_of_the_other(layout_for: LayoutFor) -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3, dilation=2))
    model[1].weight = model[0].weight
    expected = copy.deepcopy(model)
    layout = layout_for("dense-f32-v1", as_matrix(model[0].weight))
    replace_linear(model, {"0": layout}, {"1": "0"})
    assert set(model.state_dict()) == {"0.values", "0.bias", "1.bias"}
    x = torch.randn(2, 4, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected(x), rtol=1e-5, atol=1e-5)


def test_a_layout_of_another_shape_or_a_group_alone_is_refused(layout_for: LayoutFor) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    half = layout_for("dense-f32-v1", np.ones((2, 18), np.float32))
    with pytest.raises(UsageError, match=r"\(4, 36\)"):
        replace_linear(model, {"0.group0": layout_for("dense-f32-v1", np.ones((4, 36), np.float32))})
    with pytest.raises(UnsupportedModelError, match="each of its 2 groups"):
        replace_linear(model, {"0.group0": half})
    with pytest.raises(UnsupportedModelError, match="several weights"):
        replace_linear(model, {"0": half})
    assert type(model[0]) is nn.Conv2d


def test_copies_and_state_dicts_keep_working(layout_for: LayoutFor) -> None:
    for groups in (1, 2, 4):
        layer, dense = packed(layout_for, nn.Conv2d(4, 4, 3, groups=groups), "dense-int8-v1")
        x = torch.randn(1, 4, 6, 6)
        check(layer, dense, x, "dense-int8-v1")
        other = copy.deepcopy(layer)
        other.load_state_dict({name: torch.zeros_like(value) for name, value in layer.state_dict().items()})
        with torch.no_grad():
            if groups == 4:
                with pytest.raises(LayoutError, match="scale"):
                    other(x)
            assert not torch.equal(layer(x), torch.zeros(1))
        check(layer, dense, x, "dense-int8-v1")
