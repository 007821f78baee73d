"""An embedding table whose weight is a packed layout with rows at known places.

Legend of shape suffixes: N indices (all axes together), O vocabulary entries, I embedding width.
"""

from collections.abc import Mapping
from typing import Any, Self, final, get_args

import torch
from torch import Tensor

from rarefy.core.errors import LayoutError
from rarefy.layouts import FORMATS, Layout, RowLayout
from rarefy.nn.holder import LayoutHolder


@final
class CompressedEmbedding(LayoutHolder):
    """Rows of a packed table, widened to the compute dtype only where they are looked up.

    Args:
        format_name: a dense format or one of codes and tables (a lookup needs rows at known offsets).
        meta: the layout's metadata; its shape is (O, I).
        scale: factor on the looked-up rows (Gemma multiplies by the square root of the width), or None.
        source: the module whose arrays this table shares.
        device: where to allocate the buffers.

    Raises:
        LayoutError: the format has no rows at known offsets.
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
        if FORMATS[format_name] not in get_args(RowLayout):
            raise LayoutError(
                "embedding",
                f"format {format_name!r}",
                allowed="a format that stores whole rows, such as dense-int8-v1",
                hint="a lookup needs whole rows",
            )
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
        layout = self.layout
        assert isinstance(layout, RowLayout)
        rows = torch.from_numpy(layout.rows(index_N.numpy())).reshape(*x.shape, self.embedding_dim)
        rows = rows.to(self._compute_dtype)
        if self.scale is None:
            return rows
        return rows * torch.tensor(self.scale, dtype=rows.dtype)
