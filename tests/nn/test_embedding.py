from collections.abc import Callable

import numpy as np
import pytest
import torch

from rarefy.layouts import FORMATS, Layout
from rarefy.nn import CompressedEmbedding, CompressedLinear

LayoutFor = Callable[[str, np.ndarray], Layout]
Table = Callable[..., CompressedEmbedding]


@pytest.fixture
def table(layout_for: LayoutFor) -> Table:
    """A table of 20 rows of width 36."""

    def build(format_name: str = "dense-int4-v1", scale: float | None = None) -> CompressedEmbedding:
        weight = np.random.default_rng(0).standard_normal((20, 36)).astype(np.float32)
        return CompressedEmbedding.from_layout(layout_for(format_name, weight), scale)

    return build


@pytest.mark.parametrize("format_name", sorted(FORMATS))
def test_rows_are_those_of_the_matrix(table: Table, format_name: str) -> None:
    embedding = table(format_name)
    indices = torch.tensor([[0, 19, 3], [3, 3, 7]])
    assert np.array_equal(embedding(indices).numpy(), embedding.layout.to_dense()[indices.numpy()])
    assert embedding(torch.empty(0, 2, dtype=torch.int64)).shape == (0, 2, 36)
    assert embedding(torch.tensor(5, dtype=torch.int32)).shape == (36,)


def test_scale(table: Table) -> None:
    plain, scaled = table(), table(scale=6.25)
    assert torch.equal(scaled(torch.arange(20)), plain(torch.arange(20)) * 6.25)


@pytest.mark.parametrize("index", [-1, 20])
def test_index_out_of_range(table: Table, index: int) -> None:
    with pytest.raises(IndexError, match=r"allowed: 0\.\.19"):
        table()(torch.tensor([0, index]))


def test_compute_dtype_follows_the_model(table: Table) -> None:
    embedding = table()
    arrays = {name: embedding.get_buffer(name).clone() for name in embedding.array_names}
    embedding.to(torch.bfloat16)
    assert embedding(torch.tensor([1])).dtype == torch.bfloat16
    assert embedding.weight.dtype == torch.bfloat16
    for name, array in arrays.items():
        assert torch.equal(embedding.get_buffer(name), array)


def test_a_tied_head_owns_no_arrays_and_follows_its_source(table: Table, layout_for: LayoutFor) -> None:
    embedding = table("dense-f32-v1")
    head = CompressedLinear(embedding.format_name, embedding.meta, source=embedding)
    assert head.state_dict() == {}
    assert head.tied_to is embedding
    assert list(head.children()) == []
    x = torch.randn(2, 36)
    with torch.no_grad():
        first = head(x)
    reversed_rows = embedding.layout.to_dense()[::-1].copy()
    embedding.load_layout(layout_for("dense-f32-v1", reversed_rows))
    with torch.no_grad():
        torch.testing.assert_close(head(x), first.flip(-1))
