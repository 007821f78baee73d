"""Convolutions whose weight is a packed layout: products of patches with it, a bounded piece of the patches at a time.

One whose weight is factors of its taps is two convolutions, one after the other.

Legend of shape suffixes: B batch, C channels, S spatial axes, P places of the output, T rows of patches, O outputs,
I inputs (taps times channels, the channel changing first).
"""

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, final

import torch
from torch import Tensor, nn

from rarefy.artifact import LayoutSpec
from rarefy.core.errors import UnsupportedModelError, UsageError
from rarefy.kernels import Prepared, takes_direct
from rarefy.nn.convolve import Stage, convolve, convolve_few
from rarefy.nn.holder import LayoutHolder
from rarefy.nn.linear import CompressedLinear
from rarefy.nn.matrices import LayerKind, Matrix, Packed, first_input, missing_parameter
from rarefy.nn.patches import ConvModule, Geometry, contiguous
from rarefy.nn.product import ProductHolder
from rarefy.nn.weight import PackedWeight

# Outputs of a panel, the unit of the kernels.
_PANEL = 16
# Of one output: decoding takes time that grows with their square, and with more of them products are as fast.
_MOST_DIRECT_INPUTS = 1024
_SUPPORTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLUTION = (*_SUPPORTED, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@final
class PackedConv(ProductHolder):
    """A convolution of one, two or three axes, without groups: y = patches(x) W^T + bias, where W is a packed layout.

    The patches are written out a strip of places at a time, and multiplied by `rarefy.kernels`. As with torch's own
    convolutions, an input in `torch.channels_last` gives an output in it; that saves a transposition on both sides.

    Args:
        spec: format and metadata; the shape is (O, taps times channels), the channel changing first.
        geometry: where the taps fall; groups must be 1.
        source: the module whose arrays this layer shares.
        device: where to allocate the buffers.

    Notes:
        The weight is frozen. When the input needs a gradient the forward value is the same, and the backward pass
        convolves with the dequantized weight, which is then kept until `eval()` is called.
    """

    def __init__(
        self,
        spec: LayoutSpec,
        geometry: Geometry,
        *,
        source: LayoutHolder | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(spec.format_name, spec.meta, source=source, device=device)
        self.geometry = geometry
        self.out_channels, width = self.shape
        self.in_channels = width // prod(geometry.kernel)
        self.parameter_shape = (self.out_channels, self.in_channels, *geometry.kernel)
        self.kernel_size, self.stride = geometry.kernel, geometry.stride
        self.bias: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x.

        Args:
            x: floating tensor of shape (B, C, *S) or (C, *S) on the CPU.

        Returns:
            Tensor of shape (B, O, *P) or (O, *P) with the dtype of x.

        Raises:
            UsageError: x has another number of axes or channels, is not floating, not on the CPU, or too small.
        """
        run = partial(convolve, stages=self._stages())
        return _forward(x, self.in_channels, self.geometry, run, self.dequantized_parameter, self.bias)

    def _stages(self) -> "tuple[Stage, ...]":
        factors = self.prepared.tap_factors
        parts = None if factors is None else self.geometry.split(int(self.meta["num_runs"]))
        if factors is None or parts is None:
            return (Stage(self.geometry, (self.prepared,), self.out_channels),)
        first = Stage(parts[0], factors[:1], factors[0].shape[0])
        return first, Stage(parts[1], factors[1:], self.out_channels)

    def extra_repr(self) -> str:
        """Shape, format and kernel."""
        return f"{super().extra_repr()}, kernel_size={self.kernel_size}, stride={self.stride}"


@final
class PackedGroupedConv(nn.Module):
    """A convolution with groups: each group's channels meet a packed matrix of their own, `group0`, `group1`, ...

    Where a group has fewer outputs than a panel of the kernels (16), its product would be mostly padding. It is then
    summed over the taps directly, as in `PackedDepthwiseConv`, without rounding activations.

    Args:
        specs: format and metadata of each group's matrix, (O / groups, taps times channels of a group).
        geometry: where the taps fall.
        sources: for each group the module whose arrays it shares, or None.
        device: where to allocate the buffers.
    """

    def __init__(
        self,
        specs: Sequence[LayoutSpec],
        geometry: Geometry,
        *,
        sources: Sequence[LayoutHolder | None],
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.geometry = geometry
        for group, (spec, source) in enumerate(zip(specs, sources, strict=True)):
            layer = CompressedLinear(spec.format_name, spec.meta, source=source, device=device)
            self.add_module(_group_name(group), layer)
        rows, width = (int(size) for size in specs[0].meta["shape"])
        self.out_channels = rows * geometry.groups
        self.in_channels = width // prod(geometry.kernel) * geometry.groups
        self.parameter_shape = (self.out_channels, self.in_channels // geometry.groups, *geometry.kernel)
        self.kernel_size, self.stride, self.groups = geometry.kernel, geometry.stride, geometry.groups
        self.bias: nn.Parameter | None = None

    @property
    def weight(self) -> Tensor:
        """The weight as a tensor that is dequantized only where something computes with it."""
        return PackedWeight(self, self._holders()[0].weight.dtype)

    def dequantized_parameter(self) -> Tensor:
        """Return the dense weight (O, C / groups, *K), float32, newly allocated."""
        dense_OI = torch.cat([holder.dequantized_weight() for holder in self._holders()])
        shape = self.parameter_shape
        return dense_OI.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x; see `PackedConv.forward`."""
        weights = tuple(holder.prepared for holder in self._holders())
        run: Callable[..., Tensor]
        if self.out_channels < _PANEL * self.groups and weights[0].shape[1] <= _MOST_DIRECT_INPUTS:
            run = _direct(self.geometry, weights, self.out_channels, self.dequantized_parameter)
        else:
            run = partial(convolve, stages=(Stage(self.geometry, weights, self.out_channels),))
        return _forward(x, self.in_channels, self.geometry, run, self.dequantized_parameter, self.bias)

    def _holders(self) -> list[CompressedLinear]:
        return [holder for holder in self._modules.values() if isinstance(holder, CompressedLinear)]


@final
class PackedDepthwiseConv(ProductHolder):
    """A convolution in which each channel has a kernel of its own: one packed matrix (O, taps).

    A product per channel would have a handful of numbers. So the taps are summed over the image as it lies, with a
    panel of 16 outputs decoded at a time, or 256 KB of them (`rarefy.kernels.convolve_direct`). Activations
    are not rounded, whatever the format; arithmetic is in float32. An input in `torch.channels_last` gives an output in
    it.

    Args:
        spec: format and metadata; the shape is (O, taps).
        geometry: where the taps fall; as many groups as channels.
        source: the module whose arrays this layer shares.
        device: where to allocate the buffers.
    """

    def __init__(
        self,
        spec: LayoutSpec,
        geometry: Geometry,
        *,
        source: LayoutHolder | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(spec.format_name, spec.meta, source=source, device=device)
        self.geometry = geometry
        self.out_channels, self.in_channels = self.shape[0], geometry.groups
        self.parameter_shape = (self.out_channels, 1, *geometry.kernel)
        self.kernel_size, self.stride, self.groups = geometry.kernel, geometry.stride, geometry.groups
        self.bias: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x; see `PackedConv.forward`."""
        run = _direct(self.geometry, (self.prepared,), self.out_channels, self.dequantized_parameter)
        return _forward(x, self.in_channels, self.geometry, run, self.dequantized_parameter, self.bias)


def _direct(
    geometry: Geometry, weights: Sequence[Prepared], num_outputs: int, dense: Callable[[], Tensor]
) -> Callable[..., Tensor]:
    """The direct convolution of a batch; torch's own with the dense weight where the extension is missing."""
    if takes_direct(weights):
        return partial(convolve_few, geometry=geometry, weights=weights, num_outputs=num_outputs)
    return partial(_reference, geometry=geometry, dense=dense)


def _reference(x: Tensor, bias: Tensor | None = None, *, geometry: Geometry, dense: Callable[[], Tensor]) -> Tensor:
    starts = None if bias is None else bias.detach().float()
    y = geometry.convolve(x.detach().float(), dense(), starts).to(x.dtype)
    return contiguous(y) if y.ndim == 3 else y


def _forward(
    x: Tensor,
    num_channels: int,
    geometry: Geometry,
    run: Callable[..., Tensor],
    dense: Callable[[], Tensor],
    bias: Tensor | None,
) -> Tensor:
    """`run(x, bias)`, with a gradient where one is wanted."""
    batch = _as_batch(x, num_channels, geometry)
    if torch.is_grad_enabled() and (batch.requires_grad or (bias is not None and bias.requires_grad)):
        y: Tensor = _StraightThrough.apply(batch, geometry, run, dense)  # type: ignore[no-untyped-call]
        if bias is not None:
            y = y + bias.to(y.dtype).reshape(-1, *(1,) * len(geometry.kernel))
    else:
        y = run(batch, bias=bias)
    return y if batch is x else y[0]


def _as_batch(x: Tensor, num_channels: int, geometry: Geometry) -> Tensor:
    """x with an axis for the batch, x itself if it has one.

    Raises:
        UsageError: x does not fit the layer.
    """
    num_axes = len(geometry.kernel)
    if (
        x.ndim not in (num_axes + 1, num_axes + 2)
        or x.shape[-num_axes - 1] != num_channels
        or not x.is_floating_point()
    ):
        raise UsageError(
            "convolution input",
            f"{x.dtype} of shape {tuple(x.shape)}",
            allowed=f"float (batch, {num_channels}, {', '.join('size' for _ in range(num_axes))})",
        )
    return x if x.ndim == num_axes + 2 else x[None]


class _StraightThrough(torch.autograd.Function):
    """Forward: the kernel. Backward: the gradient of torch's convolution with the dequantized weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, geometry: Geometry, run: Callable[..., Tensor], dense: Callable[[], Tensor]
    ) -> Tensor:
        ctx.geometry, ctx.dense, ctx.shape = geometry, dense, x.shape
        return run(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None, None]:
        # A convolution is linear: its gradient does not depend on where it is taken.
        with torch.enable_grad():
            x = torch.zeros(ctx.shape, requires_grad=True)
            y = ctx.geometry.convolve(x, ctx.dense())
        (grad_x,) = torch.autograd.grad(y, x, grad_y.to(torch.float32))
        return grad_x.to(grad_y.dtype), None, None, None


@final
class ConvKind:
    """`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`."""

    def covers(self, module: nn.Module) -> bool:
        """See Kind."""
        return isinstance(module, _CONVOLUTION)

    def label(self, module: nn.Module) -> LayerKind:
        """Depthwise ones have few weights and no product to speak of, so they go by a name of their own."""
        return "depthwise" if isinstance(module, _SUPPORTED) and _is_depthwise(module) else "conv"

    def why_not(self, module: nn.Module) -> str | None:
        """Only the very class will do: what a subclass computes is not known."""
        if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            return "transposed convolutions have no packed counterpart"
        if type(module) not in _SUPPORTED:
            return f"{type(module).__name__} is a convolution with a forward pass of its own"
        return missing_parameter(module, "weight")

    def matrices(self, module: nn.Module) -> tuple[Matrix, ...]:
        """One matrix, or one for each group; of a depthwise convolution one with a row for each output."""
        assert isinstance(module, _SUPPORTED)
        shape = module.get_parameter("weight").shape
        rows, width = shape[0], prod(shape[1:])
        if _is_depthwise(module):
            return (Matrix("", "weight", (rows, width), num_row_groups=module.groups),)
        if module.groups == 1:
            return (Matrix("", "weight", (rows, width), taps=tuple(shape[2:])),)
        rows //= module.groups
        return tuple(
            Matrix(_group_name(group), "weight", (rows, width), first_row=group * rows, taps=tuple(shape[2:]))
            for group in range(module.groups)
        )

    def rows_key(self, module: nn.Module) -> Hashable:
        """Convolutions with the same taps see the same patches."""
        assert isinstance(module, _SUPPORTED)
        return Geometry.of(module)

    def rows(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Collection[str]
    ) -> Iterator[tuple[str, int, Tensor]]:
        """See Kind."""
        assert isinstance(module, _SUPPORTED)
        x, geometry = first_input(args, kwargs), Geometry.of(module)
        padded = geometry.padded(_as_batch(x, module.in_channels, geometry), x.dtype)
        is_depthwise = _is_depthwise(module)
        for name in names:
            groups = range(module.groups) if is_depthwise else [_group_number(name)]
            for group in groups:
                for rows_TI in geometry.pieces(padded, group):
                    yield name, group if is_depthwise else 0, rows_TI

    def pack(
        self, module: nn.Module, packed: Mapping[str, Packed], device: torch.device | str
    ) -> tuple[nn.Module, dict[str, LayoutHolder]]:
        """See Kind."""
        assert isinstance(module, _SUPPORTED)
        geometry = Geometry.of(module)
        new: PackedConv | PackedGroupedConv | PackedDepthwiseConv
        holders: dict[str, LayoutHolder]
        if "" in packed:
            whole = PackedDepthwiseConv if _is_depthwise(module) else PackedConv
            new = whole(packed[""].spec, geometry, source=packed[""].source, device=device)
            holders = {"": new}
        else:
            names = [matrix.name for matrix in self.matrices(module)]
            if set(names) != set(packed):
                raise UnsupportedModelError(
                    f"{type(module).__name__}", f"{len(packed)} packed", allowed=f"each of its {module.groups} groups"
                )
            specs, sources = zip(*((packed[name].spec, packed[name].source) for name in names), strict=True)
            new = PackedGroupedConv(specs, geometry, sources=sources, device=device)
            holders = {name: new.get_submodule(name) for name in names}  # type: ignore[misc]
        new.bias = module._parameters["bias"]
        return new, holders


def _is_depthwise(module: ConvModule) -> bool:
    return module.groups > 1 and module.groups == module.in_channels


def _group_name(group: int) -> str:
    return f"group{group}"


def _group_number(name: str) -> int:
    return int(name.removeprefix("group") or 0)
