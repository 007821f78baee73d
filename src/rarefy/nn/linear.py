"""A linear layer whose weight is a packed layout, computed by rarefy's kernels.

Legend of shape suffixes: T tokens (all leading axes together), O outputs, I inputs.
"""

from collections.abc import Mapping
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from rarefy import kernels
from rarefy.core.errors import UsageError
from rarefy.layouts import Layout
from rarefy.nn.holder import LayoutHolder


@final
class CompressedLinear(LayoutHolder):
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
        self._prepared: kernels.Prepared | None
        self._prepared_from: Layout | None
        self._dense: Tensor | None
        super().__init__(format_name, meta, source=source, device=device)
        self.out_features, self.in_features = self.shape
        self._prepared = None
        self._prepared_from = None
        self._dense = None
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

    @property
    def prepared(self) -> kernels.Prepared:
        """The weight in the kernels' own arrangement, made at the first use."""
        # The layout of a tied layer belongs to its source, which may have got another one since.
        layout = self.layout
        if self._prepared is None or self._prepared_from is not layout:
            self._prepared, self._prepared_from = kernels.prepare(layout), layout
        return self._prepared

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
            y = self._product(x)
        if self.bias is None:
            return y
        return y + self.bias.to(y.dtype)

    def _product(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            raise UsageError(
                "CompressedLinear input", f"device {x.device}", allowed="cpu", hint="rarefy's kernels run on the CPU"
            )
        x_TI = x.detach().reshape(-1, self.in_features).to(torch.float32).contiguous()
        y_TO = torch.from_numpy(self.prepared.matmul(x_TI.numpy()))
        return y_TO.reshape(*x.shape[:-1], self.out_features).to(x.dtype)

    def dense_for_gradient(self) -> Tensor:
        """The dequantized weight of the backward pass, float32 (O, I), kept until `eval()`."""
        if self._dense is None:
            self._dense = self.dequantized_weight()
        return self._dense

    def train(self, mode: bool = True) -> Self:
        """Set the mode; leaving training frees the dense copy that backward passes made."""
        if not mode:
            self._dense = None
        return super().train(mode)

    def forget_caches(self) -> None:
        """Drop the layout, the prepared weight and the dense copy."""
        super().forget_caches()
        self._prepared = None
        self._prepared_from = None
        self._dense = None

    def _cache_names(self) -> tuple[str, ...]:
        return (*super()._cache_names(), "_prepared", "_prepared_from", "_dense")


class _StraightThrough(torch.autograd.Function):
    """Forward: the kernel. Backward: grad_x = grad_y W with the dequantized W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: CompressedLinear) -> Tensor:
        ctx.layer = layer
        return layer._product(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        layer: CompressedLinear = ctx.layer
        return (grad_y.to(torch.float32) @ layer.dense_for_gradient()).to(grad_y.dtype), None
