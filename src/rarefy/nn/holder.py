"""The buffers of one packed layout inside a torch module, and the layout seen through them.

Legend of shape suffixes: O output channels (or vocabulary entries), I input channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.core.errors import LayoutError
from rarefy.layouts import FORMATS, Layout
from rarefy.nn.weight import PackedWeight

NUMPY_TO_TORCH: dict[np.dtype[Any], torch.dtype] = {
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.uint16): torch.uint16,
    np.dtype(np.float32): torch.float32,
}


class LayoutHolder(nn.Module, ABC):
    """Abstract base of the modules whose weight is a packed layout.

    The arrays of the layout are persistent buffers of this module under the names that the format gives them (`codes`,
    `scales`, ...), so that a state dict holds exactly the bytes that an artifact stores. A tied module owns no arrays:
    it reads those of its `source`.

    Args:
        format_name: a key of `rarefy.layouts.FORMATS`.
        meta: the layout's metadata, as `Layout.meta()` returns it.
        source: the module whose arrays this one shares, or None if it owns them.
        device: where to allocate the buffers; "meta" while a checkpoint is about to fill them.

    Raises:
        LayoutError: the format is unknown or the metadata is not valid for it.
    """

    def __init__(
        self,
        format_name: str,
        meta: Mapping[str, Any],
        *,
        source: "LayoutHolder | None" = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if format_name not in FORMATS:
            raise LayoutError("layout", f"unknown format {format_name!r}", allowed=", ".join(sorted(FORMATS)))
        self.format_name = format_name
        self.meta = dict(meta)
        spec = FORMATS[format_name].array_spec(format_name, self.meta)
        self.array_names = tuple(spec)
        # Wrapped, because nn.Module would register a bare module as a child and store its arrays twice.
        self._source: tuple[LayoutHolder, ...] = () if source is None else (source,)
        self._layout: Layout | None = None
        self._compute_dtype = torch.get_default_dtype()
        if source is None:
            for name, (dtype, shape) in spec.items():
                empty = torch.zeros(tuple(shape), dtype=NUMPY_TO_TORCH[np.dtype(dtype)], device=device)
                self.register_buffer(name, empty)
        rows, columns = self.meta["shape"]
        self.shape: tuple[int, int] = (int(rows), int(columns))
        # That of the parameter which the matrix stands for: a convolution's has an axis for every axis of its kernel.
        self.parameter_shape: tuple[int, ...] = self.shape

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""

    @property
    def tied_to(self) -> "LayoutHolder | None":
        """The module whose arrays this one reads, or None if it owns its arrays."""
        return self._source[0] if self._source else None

    @property
    def layout(self) -> Layout:
        """The layout over this module's buffers without a copy, validated when it is first asked for.

        Raises:
            LayoutError: an array contradicts the format; the buffers are not on the CPU.
        """
        if self._source:
            return self._source[0].layout
        if self._layout is None:
            arrays = {}
            for name in self.array_names:
                buffer = self.get_buffer(name)
                if buffer.device.type != "cpu":
                    raise LayoutError(
                        f"array {name}", f"it is on device {buffer.device}", allowed="cpu", hint="call .to('cpu')"
                    )
                arrays[name] = buffer.detach().contiguous().numpy()
            self._layout = FORMATS[self.format_name].from_arrays(self.format_name, self.meta, arrays)
        return self._layout

    @property
    def weight(self) -> Tensor:
        """The weight as a tensor that is dequantized only where something computes with it; see `PackedWeight`."""
        return PackedWeight(self, self._compute_dtype)

    def dequantized_parameter(self) -> Tensor:
        """Return the dense weight in the shape of the parameter that it stands for, float32, newly allocated."""
        dense_OI = self.dequantized_weight()
        shape = self.parameter_shape
        return dense_OI if len(shape) == 2 else dense_OI.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)

    def dequantized_weight(self) -> Tensor:
        """Return the dense weight, float32 of shape (O, I), newly allocated."""
        return torch.from_numpy(np.ascontiguousarray(self.layout.to_dense(), dtype=np.float32))

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Set the floating dtype that the layer's surroundings compute in."""
        self._compute_dtype = dtype

    def load_layout(self, layout: Layout) -> None:
        """Point the buffers at the arrays of `layout`, which must have this module's format and metadata."""
        for name, array in layout.arrays().items():
            # A read-only array (a memory map of a checkpoint) is copied: torch has no notion of a read-only tensor.
            owned = array if array.flags.writeable and array.flags.c_contiguous else np.array(array, order="C")
            setattr(self, name, torch.from_numpy(owned))

    def forget_caches(self) -> None:
        """Drop whatever was derived from the buffers; called when they change."""
        self._layout = None

    def __setattr__(self, name: str, value: Any) -> None:
        # Loaders (transformers, load_layout) assign new buffers; whatever was derived from the old ones goes.
        super().__setattr__(name, value)
        if isinstance(value, Tensor) and name in self.__dict__.get("array_names", ()):
            self.forget_caches()

    def __getstate__(self) -> dict[str, Any]:
        """State for deepcopy: everything but the caches, which hold native objects."""
        copy = self.__dict__.copy()
        for name in self._cache_names():
            copy[name] = None
        return copy

    def _cache_names(self) -> tuple[str, ...]:
        return ("_layout",)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.to(dtype)`, `.half()`: the arrays are a storage format and keep their dtype; only the compute dtype changes.
        before = {} if self._source else {name: self.get_buffer(name) for name in self.array_names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            if self.get_buffer(name).dtype != old.dtype:
                setattr(self, name, old.to(self.get_buffer(name).device))
        self._compute_dtype = fn(torch.empty(0, dtype=self._compute_dtype)).dtype
        self.forget_caches()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.forget_caches()

    def extra_repr(self) -> str:
        """Shape and format, for `print(model)`."""
        tied = ", tied" if self._source else ""
        return f"{self.shape[0]}x{self.shape[1]}, {self.format_name}{tied}"
