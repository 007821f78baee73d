"""Whole rows and columns: chosen, stored, planned, said in a recipe; and APoZ, which needs them. O out, I in."""

import numpy as np
import pytest
import torch
from tests.recipe.conftest import Layer, Model

from rarefy.calibrate.statistics import Activity
from rarefy.core.errors import PatternError, RecipeError
from rarefy.core.patterns import Blocks, Lines, Unstructured
from rarefy.core.ranks import Rank
from rarefy.core.solution import Solution
from rarefy.layouts import BlockFloat, pack
from rarefy.methods import ALPS, OATS, APoZ, Lasso, LayerMethod, Magnitude, Random, SparseGPT, Wanda
from rarefy.plan import Rates, make_plan
from rarefy.recipe import Recipe, Step, load_recipe
from rarefy.testing.method import make_problem

KINDS: list[type] = [Magnitude, Random, Wanda, SparseGPT, ALPS, Lasso]


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_lines_are_zero_and_stored_as_such(kind: type, axis: str) -> None:
    method: LayerMethod = kind(Lines(axis, 0.4))
    weight_OI, stats = make_problem(20, 50, method.needs())
    solution = method.compress(Solution.dense(weight_OI), stats, layer="x")
    assert solution.mask_OI is not None
    kept = solution.mask_OI if axis == "rows" else solution.mask_OI.T
    assert (kept.all(axis=1) | ~kept.any(axis=1)).all()
    assert (~kept.any(axis=1)).sum() == 0.4 * len(kept)
    layout = pack(solution)
    assert isinstance(layout, BlockFloat)
    assert layout.block_shape == ((1, 50) if axis == "rows" else (20, 1))
    model = Model((), (Layer("linear", "linear", (20, 50), num_bytes=4000),))
    (planned,) = make_plan(Recipe((Step(method),)), model, rates=Rates(1e11, 4e11)).layers
    assert planned.exact
    assert (planned.format, planned.packed_bytes) == (layout.format, layout.nbytes)


def test_magnitude_drops_the_smallest_lines() -> None:
    weight_OI = np.arange(1, 25, dtype=np.float32).reshape(4, 6)
    rows = Magnitude(Lines("rows", 0.5)).compress(Solution.dense(weight_OI), {}, layer="x")
    np.testing.assert_array_equal(rows.weight_OI, np.where(np.arange(4)[:, None] < 2, 0, weight_OI))
    columns = Magnitude(Lines("columns", 0.5)).compress(Solution.dense(weight_OI), {}, layer="x")
    np.testing.assert_array_equal(columns.weight_OI, np.where(np.arange(6) < 3, 0, weight_OI))
    again = Magnitude(Lines("columns", 0.5)).compress(rows, {}, layer="x")
    assert again.mask_OI is not None
    assert again.mask_OI.sum() == 6
    beside = OATS(Rank(count=1), Lines("rows", 0.5), num_steps=2)
    _, stats = make_problem(4, 6, beside.needs())
    both = beside.compress(Solution.dense(weight_OI), stats, layer="x")
    assert both.pattern == Blocks((1, 6), 0.5)


@pytest.mark.parametrize(("axis", "shape"), [("rows", (8, 5000)), ("rows", (3, 8193)), ("columns", (4608, 6))])
def test_lines_longer_than_a_stored_block_are_stored_as_several(axis: str, shape: tuple[int, int]) -> None:
    """The rows of a convolution of 512 channels and 9 taps have 4608 entries."""
    method = Magnitude(Lines(axis, 0.5))
    weight_OI = make_problem(*shape, ())[0]
    layout = pack(method.compress(Solution.dense(weight_OI), {}, layer="x"))
    assert isinstance(layout, BlockFloat)
    assert max(layout.block_shape) <= 4096
    by_line = layout.to_dense() if axis == "rows" else layout.to_dense().T
    sizes = np.abs(weight_OI.astype(np.float64)).sum(axis=1 if axis == "rows" else 0)
    gone = np.argsort(sizes)[: round(0.5 * len(sizes))]
    assert set(np.flatnonzero(~by_line.any(axis=1))) == set(gone)
    model = Model((), (Layer("linear", "linear", shape, num_bytes=4 * weight_OI.size),))
    (planned,) = make_plan(Recipe((Step(method),)), model, rates=Rates(1e11, 4e11)).layers
    assert (planned.format, planned.packed_bytes) == (layout.format, layout.nbytes)


def test_blocks_too_large_to_be_stored_are_cut_where_they_begin() -> None:
    assert Blocks((1, 6000), 0.5).stored((2, 12000)) == Blocks((1, 3000), 0.5)
    assert Blocks((2, 5003), 0.5).stored((2, 10006)) == Blocks((2, 1), 0.5)  # a prime
    assert Blocks((4096, 2), 0.5).stored((9000, 9)) == Blocks((4096, 2), 0.5)


def test_lines_in_a_recipe(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("steps:\n  - method: wanda\n    pattern: {axis: columns, sparsity: 0.25}\n")
    recipe = load_recipe(path)
    assert recipe.steps[0].method == Wanda(Lines("columns", 0.25))
    assert load_recipe(recipe.to_dict()).to_dict() == recipe.to_dict()
    path.write_text("steps:\n  - method: wanda\n    pattern: {axis: diagonals, sparsity: 0.25}\n")
    with pytest.raises(RecipeError, match=r"mine.yaml:3: axis is 'diagonals'; allowed: rows or columns"):
        load_recipe(path)
    with pytest.raises(PatternError, match="rows or columns"):
        Lines("diagonals", 0.5)


def test_apoz_drops_the_inputs_that_are_zero_most_often() -> None:
    x_TI = torch.tensor([[0.0, 1, 0, 2], [0, 0, 3, 1], [0, 1, 0, 1], [1, 1, 0, 1]])
    statistic = Activity()
    active = statistic.finish(statistic.update(statistic.init(4), x_TI))
    assert active.tolist() == [0.25, 0.75, 0.25, 1.0]
    merged = statistic.merge(*(statistic.update(statistic.init(4), part) for part in x_TI.split(2)))
    assert torch.equal(statistic.finish(merged), active)
    weight_OI = np.ones((3, 4), dtype=np.float32)
    weight_OI[:, 0] = 2  # as seldom active as the third, and larger
    result = APoZ(Lines("columns", 0.25)).compress(Solution.dense(weight_OI), {statistic: active}, layer="x")
    np.testing.assert_array_equal(result.weight_OI.any(axis=0), [True, True, False, True])
    lower = Activity(1.0)
    assert lower.finish(lower.update(lower.init(4), x_TI)).tolist() == [0, 0, 0.25, 0.25]
    for wrong in (Lines("rows", 0.5), Unstructured(0.5)):
        with pytest.raises(PatternError, match="axis: columns"):
            APoZ(wrong)
