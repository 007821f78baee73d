"""An embedding table whose weight is a packed layout, of which the rows that are asked for are decoded.

Legend of shape suffixes: N indices (all axes together), O vocabulary entries, I embedding width.
"""

from collections.abc import Collection, Hashable, Iterator, Mapping
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from rarefy.layouts import Layout
from rarefy.nn.holder import LayoutHolder
from rarefy.nn.matrices import LayerKind, Matrix, Packed, first_input, missing_parameter


@final
class CompressedEmbedding(LayoutHolder):
    """Rows of a packed table, widened to the compute dtype only where they are looked up.

    Args:
        format_name: a key of `rarefy.layouts.FORMATS`.
        meta: the layout's metadata; its shape is (O, I).
        scale: factor on the looked-up rows (Gemma multiplies by the square root of the width), or None.
        source: the module whose arrays this table shares.
        device: where to allocate the buffers.
    """

    def __init__(
        self,
        format_name: str,
        meta: Mapping[str, Any],
        *,
        scale: float | None = None,
        source: LayoutHolder | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(format_name, meta, source=source, device=device)
        self.num_embeddings, self.embedding_dim = self.shape
        self.scale = scale

    @classmethod
    def from_layout(cls, layout: Layout, scale: float | None = None) -> Self:
        """Build the table over the arrays of `layout` (O, I) without copying them."""
        table = cls(layout.format, layout.meta(), scale=scale, device="meta")
        table.load_layout(layout)
        return table

    def forward(self, x: Tensor) -> Tensor:
        """Return the rows of the indices `x`.

        Args:
            x: integer tensor of any shape.

        Returns:
            Tensor of shape (*x.shape, I) with the compute dtype.

        Raises:
            IndexError: an index is outside [0, O).
        """
        index_N = x.detach().reshape(-1).to("cpu", torch.int64)
        low, high = (int(index_N.min()), int(index_N.max())) if index_N.numel() else (0, 0)
        if index_N.numel() and not 0 <= low <= high < self.num_embeddings:
            raise IndexError(f"embedding: indices in {low}..{high}; allowed: 0..{self.num_embeddings - 1}")
        rows = torch.from_numpy(self.layout.rows(index_N.numpy())).reshape(*x.shape, self.embedding_dim)
        rows = rows.to(self._compute_dtype)
        if self.scale is None:
            return rows
        return rows * torch.tensor(self.scale, dtype=rows.dtype)


@final
class EmbeddingKind:
    """`nn.Embedding`, and embeddings that do nothing but multiply the looked-up rows by a constant (Gemma, BART)."""

    def covers(self, module: nn.Module) -> bool:
        """See Kind."""
        return isinstance(module, nn.Embedding | nn.EmbeddingBag)

    def label(self, _: nn.Module) -> LayerKind:
        """See Kind."""
        return "embedding"

    def why_not(self, module: nn.Module) -> str | None:
        """See Kind."""
        if not isinstance(module, nn.Embedding):
            return f"{type(module).__name__} adds up the rows that it looks up, which has no packed counterpart"
        if module.max_norm is not None:
            return "the embedding rescales its rows in place (max_norm)"
        if type(module) is nn.Embedding or _scale(module) is not None:
            return missing_parameter(module, "weight")
        return f"{type(module).__name__} is an embedding with a forward pass of its own"

    def matrices(self, module: nn.Module) -> tuple[Matrix, ...]:
        """See Kind."""
        rows, columns = module.get_parameter("weight").shape
        return (Matrix("", "weight", (rows, columns), bias=None),)

    def rows_key(self, _: nn.Module) -> Hashable:
        """See Kind."""
        return None

    def rows(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Collection[str]
    ) -> Iterator[tuple[str, int, Tensor]]:
        """The indices, int64 (T, 1): an embedding multiplies with nothing, but how often each row is read is known."""
        del module
        for name in names:
            yield name, 0, first_input(args, kwargs).detach().reshape(-1, 1).to(torch.int64)

    def pack(
        self, module: nn.Module, packed: Mapping[str, Packed], device: torch.device | str
    ) -> tuple[nn.Module, dict[str, LayoutHolder]]:
        """See Kind."""
        assert isinstance(module, nn.Embedding)
        spec = packed[""].spec
        new = CompressedEmbedding(
            spec.format_name, spec.meta, scale=_scale(module), source=packed[""].source, device=device
        )
        return new, {"": new}


def _scale(module: nn.Embedding) -> float | None:
    """The constant that an embedding multiplies its rows by, or None if it does not or does more than that."""
    if type(module) is nn.Embedding:
        return None
    parameters = {name for name, _ in module.named_parameters()}
    if parameters != {"weight"} or next(module.children(), None) is not None:
        return None
    # transformers keeps the number beside a buffer, which has no value while the model is on the meta device.
    for attribute in ("scalar_embed_scale", "embed_scale"):
        scale = getattr(module, attribute, None)
        if isinstance(scale, Tensor) and scale.device.type != "meta" and scale.numel() == 1:
            return float(scale)
        if isinstance(scale, int | float):
            return float(scale)
    return None
