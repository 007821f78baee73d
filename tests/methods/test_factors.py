"""Factors with other steps: rounded, beside zeros, as a correction; and how they are stored and planned."""

import numpy as np
import pytest
from tests.methods.conftest import INT8
from tests.recipe.conftest import Layer, Model

from rarefy.core.errors import LayoutError, NonFiniteError, PatternError, RecipeError
from rarefy.core.grids import IntGrid, fit_minmax
from rarefy.core.patterns import NM, Blocks, Unstructured
from rarefy.core.ranks import Rank
from rarefy.core.solution import Factors, Solution
from rarefy.layouts import LowRank, Sum, pack, unpack
from rarefy.methods import GPTQ, RTN, SVD, SVDLLM, LayerMethod, Magnitude, SparseGPT, Wanda
from rarefy.plan import Rates, make_plan
from rarefy.recipe import Recipe, Step, load_recipe, resolve
from rarefy.testing.method import make_problem

RATES = Rates(float32_flops=100e9, bfloat16_flops=400e9)
INT4 = IntGrid(4, 32, False)
CHAINS: list[tuple[list[LayerMethod], str]] = [
    ([SVD(Rank(ratio=0.4))], "lowrank-bf16-v1"),
    ([SVD(Rank(ratio=0.4)), RTN(INT8)], "lowrank-int8-v1"),
    ([SVDLLM(Rank(count=9)), GPTQ(IntGrid(8, 32, False))], "lowrank-int8-v1"),
    ([SVD(Rank(ratio=0.1), remainder="keep")], "dense-bf16-v1"),
    ([SVD(Rank(ratio=0.1), remainder="keep"), Wanda(Unstructured(0.75))], "sum-v1"),
    ([SVDLLM(Rank(ratio=0.1), remainder="keep"), SparseGPT(NM(2, 8), INT4)], "sum-v1"),
    ([SVD(Rank(num_bytes=800), remainder="keep"), GPTQ(INT4)], "sum-v1"),
    ([RTN(INT4), SVDLLM(Rank(count=3))], "sum-v1"),
    ([Magnitude(Blocks((8, 16), 0.75)), SVD(Rank(count=3))], "sum-v1"),
    ([Magnitude(Unstructured(0.2)), SVD(Rank(ratio=0.9))], "dense-bf16-v1"),
    ([SVD(Rank(ratio=0.95))], "lowrank-bf16-v1"),
    ([SVD(Rank(count=48))], "dense-bf16-v1"),
]


def run(chain: list[LayerMethod], rows: int = 48, width: int = 96) -> tuple[np.ndarray, dict, Solution]:
    weight_OI, stats = make_problem(rows, width, tuple(s for method in chain for s in method.needs()), seed=1)
    solution = Solution.dense(weight_OI)
    for method in chain:
        solution = method.compress(solution, stats, layer="x")
    return weight_OI, stats, solution


def loss(weight_OI: np.ndarray, value_OI: np.ndarray, stats: dict) -> float:
    (gram,) = (value.double().numpy() for value in stats.values() if value.ndim == 2)
    difference_OI = (weight_OI - value_OI).astype(np.float64)
    return float(np.einsum("oi,ij,oj->", difference_OI, gram, difference_OI))


@pytest.mark.parametrize(("chain", "format"), CHAINS, ids=repr)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_planned_is_what_is_stored(chain: list[LayerMethod], format: str, dtype: str) -> None:
    _, _, solution = run(chain)
    float_format = "bf16" if dtype == "bfloat16" else "f32"
    layout = pack(solution, float_format=float_format)
    model = Model((), (Layer("linear", "linear", (48, 96), num_bytes=4 * 48 * 96),))
    recipe = Recipe(tuple(Step(method) for method in chain), rest_dtype=dtype)  # type: ignore[arg-type]
    (planned,) = make_plan(recipe, model, rates=RATES).layers
    assert planned.exact
    assert (planned.format, planned.packed_bytes) == (layout.format, layout.nbytes)
    if dtype == "bfloat16":
        assert layout.format == format
    size_OI = np.abs(solution.weight_OI)
    if solution.factors is not None:
        size_OI = size_OI + np.abs(solution.factors.left_OK) @ np.abs(solution.factors.right_KI)
    assert (np.abs(layout.to_dense() - solution.value_OI) <= 2**-7 * size_OI).all()
    again = unpack(layout)
    again.check()
    assert np.array_equal(again.value_OI, layout.to_dense())
    if isinstance(layout, LowRank | Sum):
        assert pack(again, float_format=float_format).meta() == layout.meta()
        assert again.only_factors == solution.only_factors


def test_a_rank_by_energy_is_planned_at_most() -> None:
    weight_OI, _, solution = run([SVD(Rank(energy=0.3))])
    model = Model((), (Layer("linear", "linear", weight_OI.shape, num_bytes=4 * weight_OI.size),))
    (planned,) = make_plan(Recipe((Step(SVD(Rank(energy=0.3))),)), model, rates=RATES).layers
    assert not planned.exact
    assert pack(solution).nbytes < planned.packed_bytes


def test_factors_correct_what_an_earlier_step_lost() -> None:
    for first in (SparseGPT(Unstructured(0.5)), GPTQ(IntGrid(2, 32, False))):
        weight_OI, stats, before = run([first])
        after = SVDLLM(Rank(count=8)).compress(before, stats, layer="x")
        assert after.weight_OI is before.weight_OI
        assert after.grid is before.grid
        plain = SVD(Rank(count=8)).compress(before, {}, layer="x")
        losses = [loss(weight_OI, solution.value_OI, stats) for solution in (before, plain, after)]
        assert losses[2] < 0.75 * losses[0]
        assert losses[2] < losses[1]


def test_zeros_beside_factors_lose_less_than_either_alone() -> None:
    weight_OI, stats, both = run([SVDLLM(Rank(ratio=0.25), remainder="keep"), SparseGPT(Unstructured(0.75))])
    _, _, factors = run([SVDLLM(Rank(ratio=0.25))])
    assert loss(weight_OI, both.value_OI, stats) < 0.6 * loss(weight_OI, factors.value_OI, stats)
    assert both.sparsity == factors.sparsity == 0


def test_rounding_the_left_factor_looks_at_what_the_right_one_gives() -> None:
    grid = IntGrid(8, None, False)
    weight_OI, stats, _ = run([SVDLLM(Rank(count=20))])
    # few bits would show it best, but layouts store 8: so the ranges are spoilt by two large rows
    weight_OI[:2] *= 40
    losses = []
    for method in (RTN(grid), GPTQ(grid)):
        solution = SVDLLM(Rank(count=20)).compress(Solution.dense(weight_OI), stats, layer="x")
        rounded = method.compress(solution, stats, layer="x")
        assert rounded.value_grid == grid
        losses.append(loss(solution.value_OI, rounded.value_OI, stats))
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (Magnitude(Unstructured(0.5)), "nothing but factors"),
        (RTN(INT4), "factors in 4 bits; allowed: 8"),
        (SVD(Rank(count=1)), "an earlier step made factors"),
    ],
    ids=["zeros", "4 bits", "second pair"],
)
def test_what_no_layout_stores_is_refused_before_any_work(second: LayerMethod, words: str) -> None:
    first = SVD(Rank(count=2))
    with pytest.raises(PatternError, match=f"layer x: .*{words}"):
        run([first, second])
    model = Model((), (Layer("linear", "linear", (48, 96)),))
    with pytest.raises(RecipeError, match="factors"):
        resolve(Recipe((Step(first), Step(second))), model)
    if not isinstance(second, SVD):  # with the rest kept, the second step has something to work on
        keeps = SVD(Rank(count=2), remainder="keep")
        assert len(resolve(Recipe((Step(keeps), Step(second))), model)) == 1
        run([keeps, second])


def test_factors_that_are_damaged_are_named() -> None:
    left, right = np.ones((4, 2), np.float32), np.full((2, 6), np.nan, np.float32)
    with pytest.raises(NonFiniteError, match="layer x: a factor"):
        RTN(INT8).compress(Solution.low_rank(Factors(left, right)), {}, layer="x")
    with pytest.raises(NonFiniteError):
        pack(Solution.low_rank(Factors(left, right)))
    with pytest.raises(LayoutError, match=r"\(O, K\) and \(K, I\)"):
        Factors(right, left[:3])
    with pytest.raises(LayoutError, match="the same for both"):
        Factors(left, right, left_grid=fit_minmax(left, INT8))
    with pytest.raises(LayoutError, match="factors of a matrix"):
        Solution(np.ones((4, 5), np.float32), None, None, None, Factors(left, right))


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        ("{ratio: 1.5}", "ratio is 1.5; allowed: a number > 0 and <= 1"),
        ("{ratio: 0.5, count: 3}", "exactly one of ratio, energy, count, num_bytes"),
        ("{ratios: 0.5}", "did you mean 'ratio'"),
        ("0.5", "allowed: {ratio: R}, {energy: E}, {count: K} or {num_bytes: B}"),
    ],
)
def test_a_wrong_rank_in_a_recipe_is_explained(rank: str, words: str, tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"steps:\n  - method: svd\n    rank: {rank}\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert words in str(error.value)
    assert "mine.yaml:3" in str(error.value)


def test_a_recipe_with_factors_survives_the_file() -> None:
    recipe = Recipe((Step(SVDLLM(Rank(energy=0.9), remainder="keep")), Step(Wanda(Unstructured(0.5)))))
    assert load_recipe(recipe.to_dict()).to_dict() == recipe.to_dict()
    assert recipe.to_dict()["steps"][0]["rank"] == {"energy": 0.9}
