"""A packed weight that rows of inputs are multiplied with: what linear, convolutional and recurrent layers share.

Legend of shape suffixes: T rows (all leading axes together), O outputs, I inputs.
"""

from abc import ABC
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from rarefy import kernels
from rarefy.core.errors import UsageError
from rarefy.layouts import Layout
from rarefy.nn.holder import LayoutHolder


class ProductHolder(LayoutHolder, ABC):
    """Abstract base of the modules that multiply with a packed weight.

    The weight is prepared for the kernels once, at the first call.

    Args:
        format_name: a key of `rarefy.layouts.FORMATS`.
        meta: the layout's metadata.
        source: the module whose arrays this layer shares.
        device: where to allocate the buffers.
    """

    def __init__(
        self,
        format_name: str,
        meta: Mapping[str, Any],
        *,
        source: LayoutHolder | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._prepared: kernels.Prepared | None
        self._prepared_from: Layout | None
        self._dense: Tensor | None
        super().__init__(format_name, meta, source=source, device=device)
        self._prepared = None
        self._prepared_from = None
        self._dense = None

    @property
    def prepared(self) -> kernels.Prepared:
        """The weight in the kernels' own arrangement, made at the first use."""
        # The layout of a tied layer belongs to its source, which may have got another one since.
        layout = self.layout
        if self._prepared is None or self._prepared_from is not layout:
            self._prepared, self._prepared_from = kernels.prepare(layout), layout
        return self._prepared

    def product(self, x_TI: Tensor) -> Tensor:
        """x W^T in float32, without a gradient.

        Args:
            x_TI: float32, C-contiguous, on the CPU.

        Returns:
            float32 (T, O), newly allocated.
        """
        return torch.from_numpy(self.prepared.matmul(x_TI.numpy()))

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


def require_cpu(where: str, x: Tensor) -> None:
    """Refuse tensors that the kernels cannot read.

    Raises:
        UsageError: x is not on the CPU.
    """
    if x.device.type != "cpu":
        raise UsageError(where, f"device {x.device}", allowed="cpu", hint="rarefy's kernels run on the CPU")
