"""What `layer.weight` of a compressed layer is: a tensor that becomes dense only where something computes with it."""

from typing import Any, Protocol, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from rarefy.core.errors import UsageError


class Dequantized(Protocol):
    """A compressed layer, to whoever asks for its weight."""

    parameter_shape: tuple[int, ...]

    def dequantized_parameter(self) -> Tensor:
        """Return the dense weight, float32, newly allocated."""
        ...


@final
class PackedWeight(Tensor):
    """Has the shape, dtype and device of a layer's weight, and no memory; an operation on it dequantizes the layer.

    Model code often asks for `layer.weight.dtype` or `.shape`, which costs nothing here, and seldom for the values,
    which then are right. The dense copy lives as long as the operation.

    Args:
        holder: the compressed layer.
        dtype: the dtype that the layer's surroundings compute in.
    """

    _holder: Dequantized

    @staticmethod
    def __new__(cls, holder: Dequantized, dtype: torch.dtype) -> "PackedWeight":
        """Make the tensor without storage."""
        made = torch.Tensor._make_wrapper_subclass(cls, holder.parameter_shape, dtype=dtype)
        assert isinstance(made, PackedWeight)
        return made

    def __init__(self, holder: Dequantized, dtype: torch.dtype) -> None:  # noqa: ARG002 (read by __new__)
        self._holder = holder
        # transformers initialises every weight that does not say that it is loaded.
        self._is_hf_initialized = True

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Run the operation on the dequantized weight."""
        if func._schema.is_mutable:
            raise UsageError(f"{func}", "it would change the weight of a compressed layer", allowed="reading it")
        dense_args, dense_kwargs = tree_map_only(cls, _dense, (args, kwargs or {}))
        return func(*dense_args, **dense_kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PackedWeight({self._holder}, dtype={self.dtype})"


def _dense(weight: PackedWeight) -> Tensor:
    return weight._holder.dequantized_parameter().to(weight.dtype)
