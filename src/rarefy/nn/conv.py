"""Convolutions whose weight is a packed layout: products of patches with it, a bounded piece of the patches at a time.

One whose weight is factors of its taps is two convolutions, one after the other.

Legend of shape suffixes: B batch, C channels, S spatial axes, P places of the output, T rows of patches, O outputs,
I inputs (taps times channels, the channel changing first).
"""

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, final

import torch
from torch import Tensor, nn

from rarefy.artifact import LayoutSpec
from rarefy.core.errors import UnsupportedModelError, UsageError
from rarefy.layouts import Layout
from rarefy.nn.convolve import Stage, convolve
from rarefy.nn.holder import LayoutHolder
from rarefy.nn.linear import CompressedLinear
from rarefy.nn.matrices import LayerKind, Matrix, Packed, first_input, missing_parameter
from rarefy.nn.patches import ConvModule, Geometry, contiguous
from rarefy.nn.product import ProductHolder
from rarefy.nn.weight import PackedWeight

# Outputs of a panel, the unit of the kernels.
_PANEL = 16
# Weights that stay decoded where the kernels have nothing to gain: 1 MB.
_KEPT_NUMBERS = 1 << 18
_SUPPORTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLUTION = (*_SUPPORTED, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@final
class PackedConv(ProductHolder):
    """A convolution of one, two or three axes, without groups: y = patches(x) W^T + bias, where W is a packed layout.

    The patches are written out a piece at a time, about 4 MB, and multiplied by `rarefy.kernels`. As with torch's own
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
        return _forward(x, self.in_channels, self.geometry, self._stages(), self.dequantized_parameter, self.bias)

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

    Where a group has fewer outputs than a panel of the kernels (16), its product would be mostly padding, and all of
    the weight together is small. It is then decoded at the first call, and torch's own convolution runs, as in
    `PackedDepthwiseConv`.

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
        self._decoded = _Decoded()

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
        if self.out_channels < _PANEL * self.groups:
            layouts = tuple(holder.layout for holder in self._holders())
            weight = self._decoded.weight(layouts, self.dequantized_parameter)
            return _decoded(x, self.in_channels, self.geometry, weight, self.bias)
        weights = tuple(holder.prepared for holder in self._holders())
        stages = (Stage(self.geometry, weights, self.out_channels),)
        return _forward(x, self.in_channels, self.geometry, stages, self.dequantized_parameter, self.bias)

    def _holders(self) -> list[CompressedLinear]:
        holders = [self.get_submodule(_group_name(group)) for group in range(self.geometry.groups)]
        return [holder for holder in holders if isinstance(holder, CompressedLinear)]


@final
class PackedDepthwiseConv(LayoutHolder):
    """A convolution in which each channel has a kernel of its own: one packed matrix (O, taps).

    A product per channel would have a handful of numbers, and all of the weight together a few kilobytes. So it is
    decoded at the first call, and torch's own convolution runs. Activations are not rounded, whatever the format.

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
        self._decoded = _Decoded()

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x; see `PackedConv.forward`."""
        weight = self._decoded.weight((self.layout,), self.dequantized_parameter)
        return _decoded(x, self.in_channels, self.geometry, weight, self.bias)


@final
class _Decoded:
    """The dense weight of a small convolution, made at the first call and again when its layouts are others.

    A copy of the module has none yet.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple[Layout, ...], Tensor] | None = None

    def __reduce__(self) -> "tuple[type[_Decoded], tuple[()]]":
        return _Decoded, ()

    def weight(self, layouts: tuple[Layout, ...], decode: Callable[[], Tensor]) -> Tensor:
        """Of these layouts; as torch's own parameters lie in memory."""
        kept = self._kept
        if kept is not None and all(old is new for old, new in zip(kept[0], layouts, strict=True)):
            return kept[1]
        with torch.inference_mode(False):  # or no later call could have a gradient
            made = decode().contiguous()
            # Where a size is 1 `contiguous` leaves any stride, and torch takes the weight for one with channels last.
            # With one axis that is ten times as fast.
            if made.ndim > 3:
                made = made.flatten().view(made.shape)
        if made.numel() <= _KEPT_NUMBERS:
            self._kept = (layouts, made)
        return made


def _decoded(x: Tensor, num_channels: int, geometry: Geometry, weight: Tensor, bias: Tensor | None) -> Tensor:
    batch = _as_batch(x, num_channels, geometry)
    y = geometry.convolve(batch, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if y.ndim == 3:
        y = contiguous(y)
    return y if batch is x else y[0]


def _forward(
    x: Tensor,
    num_channels: int,
    geometry: Geometry,
    stages: Sequence[Stage],
    dense: Callable[[], Tensor],
    bias: Tensor | None,
) -> Tensor:
    batch = _as_batch(x, num_channels, geometry)
    if torch.is_grad_enabled() and (batch.requires_grad or (bias is not None and bias.requires_grad)):
        y: Tensor = _StraightThrough.apply(batch, geometry, stages, dense)  # type: ignore[no-untyped-call]
        if bias is not None:
            y = y + bias.to(y.dtype).reshape(-1, *(1,) * len(geometry.kernel))
    else:
        y = convolve(batch, stages, bias)
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
        ctx: Any, x: Tensor, geometry: Geometry, stages: Sequence[Stage], dense: Callable[[], Tensor]
    ) -> Tensor:
        ctx.geometry, ctx.dense, ctx.shape = geometry, dense, x.shape
        return convolve(x, stages)

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
