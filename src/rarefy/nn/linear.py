"""A linear layer whose weight is a packed layout, computed by rarefy's kernels.

Legend of shape suffixes: T tokens (all leading axes together), O outputs, I inputs.
"""

from collections.abc import Collection, Hashable, Iterator, Mapping
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from rarefy.core.errors import UsageError
from rarefy.layouts import Layout
from rarefy.nn.holder import LayoutHolder
from rarefy.nn.matrices import LayerKind, Matrix, Packed, first_input, missing_parameter
from rarefy.nn.product import ProductHolder, require_cpu


@final
class CompressedLinear(ProductHolder):
    """y = x W^T + bias, where W is a packed layout.

    The product runs through `rarefy.kernels` on the CPU in float32; other floating dtypes are converted and back. The
    weight is prepared for the kernels once, at the first call. When the input needs a gradient the forward value is the
    same, and the backward pass multiplies with the dequantized weight, which is then kept until `eval()` is called.

    Args:
        format_name: a key of `rarefy.layouts.FORMATS`.
        meta: the layout's metadata.
        bias: whether there is a bias, a float parameter of shape (O,).
        source: the module whose arrays this layer shares (a head tied to an embedding).
        device: where to allocate the buffers and the bias.

    Notes:
        The weight is frozen: gradients flow to the input and to the bias. For integer layouts the kernels round the
        activations to 8 bits; the backward pass treats that rounding as the identity (straight-through).
    """

    def __init__(
        self,
        format_name: str,
        meta: Mapping[str, Any],
        *,
        bias: bool = False,
        source: LayoutHolder | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(format_name, meta, source=source, device=device)
        self.out_features, self.in_features = self.shape
        self.bias = nn.Parameter(torch.zeros(self.out_features, device=device)) if bias else None

    @classmethod
    def from_layout(cls, layout: Layout, bias: Tensor | None = None) -> Self:
        """Build the layer over the arrays of `layout` without copying them.

        Args:
            layout: the weight, shape (O, I).
            bias: float tensor of shape (O,), or None.

        Raises:
            UsageError: the bias has another shape.
        """
        layer = cls(layout.format, layout.meta(), bias=bias is not None, device="meta")
        layer.load_layout(layout)
        if bias is not None:
            if tuple(bias.shape) != (layer.out_features,):
                raise UsageError("bias", f"shape {tuple(bias.shape)}", allowed=f"({layer.out_features},)")
            layer.bias = nn.Parameter(bias.detach().clone())
            layer.set_compute_dtype(bias.dtype)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + bias.

        Args:
            x: floating tensor of shape (..., I) on the CPU.

        Returns:
            Tensor of shape (..., O) with the dtype of x.

        Raises:
            UsageError: x has another width, is not floating, or is not on the CPU.
        """
        if x.shape[-1] != self.in_features or not x.is_floating_point():
            raise UsageError(
                "CompressedLinear input",
                f"{x.dtype} of shape {tuple(x.shape)}",
                allowed=f"float (..., {self.in_features})",
            )
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _StraightThrough.apply(x, self)  # type: ignore[no-untyped-call]
        else:
            y = self._rows_product(x)
        if self.bias is None:
            return y
        return y + self.bias.to(y.dtype)

    def _rows_product(self, x: Tensor) -> Tensor:
        require_cpu("CompressedLinear input", x)
        x_TI = x.detach().reshape(-1, self.in_features).to(torch.float32).contiguous()
        return self.product(x_TI).reshape(*x.shape[:-1], self.out_features).to(x.dtype)


class _StraightThrough(torch.autograd.Function):
    """Forward: the kernel. Backward: grad_x = grad_y W with the dequantized W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: CompressedLinear) -> Tensor:
        ctx.layer = layer
        return layer._rows_product(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        layer: CompressedLinear = ctx.layer
        return (grad_y.to(torch.float32) @ layer.dense_for_gradient()).to(grad_y.dtype), None


@final
class LinearKind:
    """`nn.Linear`, and transformers' `Conv1D` (GPT-2), which keeps the same weight transposed."""

    def covers(self, module: nn.Module) -> bool:
        """See Kind."""
        return isinstance(module, nn.Linear) or _is_transposed(module)

    def label(self, _: nn.Module) -> LayerKind:
        """See Kind."""
        return "linear"

    def why_not(self, module: nn.Module) -> str | None:
        """Only the very class will do: what a subclass computes is not known."""
        if type(module) is nn.Linear or _is_transposed(module):
            return missing_parameter(module, "weight")
        return f"{type(module).__name__} is a linear layer with a forward pass of its own"

    def matrices(self, module: nn.Module) -> tuple[Matrix, ...]:
        """See Kind."""
        rows, columns = module.get_parameter("weight").shape
        transposed = _is_transposed(module)
        return (Matrix("", "weight", (columns, rows) if transposed else (rows, columns), transposed=transposed),)

    def rows_key(self, _: nn.Module) -> Hashable:
        """See Kind."""
        return "linear"

    def rows(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Collection[str]
    ) -> Iterator[tuple[str, int, Tensor]]:
        """See Kind."""
        x = first_input(args, kwargs)
        for name in names:
            yield name, 0, x.reshape(-1, x.shape[-1])

    def pack(
        self, module: nn.Module, packed: Mapping[str, Packed], device: torch.device | str
    ) -> tuple[nn.Module, dict[str, LayoutHolder]]:
        """See Kind."""
        spec = packed[""].spec
        new = CompressedLinear(spec.format_name, spec.meta, source=packed[""].source, device=device)
        new.bias = module._parameters["bias"]
        return new, {"": new}


def _is_transposed(module: nn.Module) -> bool:
    # transformers imports this package while it is being imported itself, so its class goes by its name.
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
