"""Factors of convolutions: exact at full rank, found again where they are there, and convolutions that do the same."""

import copy
import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

import rarefy
from rarefy.calibrate.statistics import Gram
from rarefy.core.errors import PatternError
from rarefy.core.grids import to_bf16_bits
from rarefy.core.patterns import Unstructured
from rarefy.core.ranks import Rank
from rarefy.core.solution import Solution
from rarefy.core.tap_factors import TapFactors
from rarefy.layouts import DenseFloat, LowRank, Tapwise, pack
from rarefy.methods import SVD, Magnitude, Spatial, Tucker
from rarefy.models import load_model
from rarefy.nn import PackedConv, replace_linear
from rarefy.nn.holder import LayoutHolder
from rarefy.nn.patches import Geometry
from rarefy.plan import make_plan
from rarefy.plan.cost import Rates
from rarefy.recipe import load_recipe

FULL = Rank(energy=1.0)


def start(kernel: np.ndarray) -> Solution:
    """A kernel (O, C, Y, X) as the solver sees it: taps first, channels last."""
    matrix = np.ascontiguousarray(kernel.transpose(0, 2, 3, 1), np.float32).reshape(len(kernel), -1)
    return Solution.dense(matrix, kernel.shape[2:])


def factors(solution: Solution) -> TapFactors:
    assert isinstance(solution.factors, TapFactors)
    return solution.factors


@pytest.mark.parametrize("method", [Tucker(FULL), Tucker(FULL, num_steps=0), Spatial(FULL)], ids=repr)
@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (4, 7, 3, 2), (3, 1, 5, 5), (1, 4, 2, 4)])
def test_full_rank_is_exact(method, shape):
    kernel = start(np.random.default_rng(0).standard_normal(shape))
    value = method.compress(kernel, {}, layer="x").value_OI
    assert np.abs(value - kernel.weight_OI).max() <= 1e-5 * np.abs(kernel.weight_OI).max()


def test_tucker_finds_a_kernel_of_low_rank():
    rng = np.random.default_rng(1)
    left, core, right = rng.standard_normal((12, 3)), rng.standard_normal((3, 2, 3, 3)), rng.standard_normal((2, 9))
    kernel = start(np.einsum("oa,arhw,rc->ochw", left, core, right))
    for method in (Tucker(Rank(count=3)), Tucker(Rank(energy=1 - 1e-9))):
        found = method.compress(kernel, {}, layer="x")
        assert np.abs(found.value_OI - kernel.weight_OI).max() <= 1e-5 * np.abs(kernel.weight_OI).max()
    assert [part.shape for part in factors(found).parts] == [(12, 3), (3, 18), (2, 9)]


def test_spatial_finds_separable_filters():
    rng = np.random.default_rng(2)
    kernel = start(np.einsum("kxc,oky->ocyx", rng.standard_normal((4, 3, 6)), rng.standard_normal((8, 4, 3))))
    found = Spatial(Rank(count=4)).compress(kernel, {}, layer="x")
    assert np.abs(found.value_OI - kernel.weight_OI).max() <= 1e-5 * np.abs(kernel.weight_OI).max()
    assert [part.shape for part in factors(found).parts] == [(8, 12), (4, 18)]


def test_alternation_only_improves_and_is_near_the_optimum_of_a_general_solver():
    rng = np.random.default_rng(3)
    kernel = start(rng.standard_normal((5, 4, 2, 2)))
    target = kernel.weight_OI.reshape(5, 4, 4)  # outputs, taps, channels
    errors = []
    for num_steps in (0, 1, 2, 8, 40):
        value = Tucker(Rank(count=2), num_steps=num_steps).compress(kernel, {}, layer="x").value_OI
        errors.append(np.square(value - kernel.weight_OI, dtype=np.float64).sum())
    assert all(later <= before * (1 + 1e-6) for before, later in pairwise(errors))
    assert errors[-1] < 0.999 * errors[0]

    def lost(flat):
        left, core, right = flat[:10].reshape(5, 2), flat[10:26].reshape(2, 4, 2), flat[26:].reshape(2, 4)
        return np.square(np.einsum("oa,asr,rc->osc", left, core, right) - target).sum()

    best = min(minimize(lost, rng.standard_normal(34), options={"maxiter": 2000}).fun for _ in range(6))
    assert errors[-1] <= 1.03 * best


def test_spatial_is_the_best_of_its_rank():
    """Eckart and Young on the kernel as a matrix of vertical by horizontal filters."""
    kernel = np.random.default_rng(4).standard_normal((6, 3, 3, 5))
    singular = np.linalg.svd(kernel.transpose(0, 2, 3, 1).reshape(18, 15), compute_uv=False)
    found = Spatial(Rank(count=4)).compress(start(kernel), {}, layer="x")
    assert np.square(found.value_OI - found.original_OI).sum() == pytest.approx(np.square(singular[4:]).sum(), rel=1e-5)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("method", [Tucker, Spatial])
def test_ranks_keep_to_the_budget(method, ratio):
    shape = (32, 16, 3, 3)
    kernel = start(np.random.default_rng(5).standard_normal(shape))
    by_ratio = factors(method(Rank(ratio=ratio)).compress(kernel, {}, layer="x"))
    num_numbers = sum(part.size for part in by_ratio.parts)
    assert 0.75 * ratio <= num_numbers / np.prod(shape) <= ratio
    by_bytes = factors(method(Rank(num_bytes=2 * int(ratio * np.prod(shape)))).compress(kernel, {}, layer="x"))
    assert [part.shape for part in by_bytes.parts] == [part.shape for part in by_ratio.parts]
    most = method(Rank(ratio=ratio)).most_ranks(shape)
    assert (most.num_runs, most.inner_rank) == (by_ratio.num_runs, by_ratio.rank)
    assert most.outer_rank == (None if method is Spatial else by_ratio.left_OA.shape[1])


@pytest.mark.parametrize("method", [Tucker, Spatial])
def test_what_is_no_kernel_is_refused(method):
    weight = np.ones((4, 18), np.float32)
    for taps in ((), (1,), (1, 1)):
        with pytest.raises(PatternError, match=r"layer a\.b: no kernel of several taps"):
            method(Rank(count=1)).compress(Solution.dense(weight, taps), {}, layer="a.b")


def test_factors_hold_what_zeros_lost_and_zeros_what_factors_lost():
    kernel = start(np.random.default_rng(6).standard_normal((16, 8, 3, 3)))
    zeros = Magnitude(Unstructured(0.6))
    for method in (Tucker(Rank(ratio=0.2)), Spatial(Rank(ratio=0.2))):
        alone = method.compress(kernel, {}, layer="x")
        pruned = zeros.compress(kernel, {}, layer="x")
        first = method.compress(pruned, {}, layer="x")
        kept = type(method)(method.rank, remainder="keep").compress(kernel, {}, layer="x")
        second = zeros.compress(kept, {}, layer="x")
        errors = [np.square(each.value_OI - kernel.weight_OI).sum() for each in (alone, pruned, first, second)]
        assert max(errors[2:]) < min(errors[:2])
        assert {pack(first).format, pack(second).format} == {"sum-v1"}
        with pytest.raises(PatternError, match="an earlier step made factors of it"):
            SVD(Rank(count=1)).compress(first, {}, layer="x")


@pytest.mark.parametrize("method", [Tucker, Spatial])
def test_fitting_outputs_is_the_least_squares_of_the_left_factor(method):
    rng = np.random.default_rng(8)
    kernel = start(rng.standard_normal((16, 8, 3, 3)))
    inputs = rng.standard_normal((500, 72)) @ rng.standard_normal((72, 72)) * rng.exponential(1, 72)
    gram = torch.from_numpy(inputs.T @ inputs / 500).float()
    by_weights = method(Rank(ratio=0.3)).compress(kernel, {}, layer="x")
    by_outputs = method(Rank(ratio=0.3), fit="outputs").compress(kernel, {Gram(): gram}, layer="x")
    right, same = (factors(each).parts[1:] for each in (by_weights, by_outputs))
    assert all(np.array_equal(one, two) for one, two in zip(right, same, strict=True))
    eye = np.eye(factors(by_weights).left_OA.shape[1], dtype=np.float32)
    rest = dataclasses.replace(factors(by_weights), left_OA=eye)
    best = np.linalg.lstsq(
        inputs @ rest.product_OI.T.astype(np.float64), inputs @ kernel.weight_OI.T.astype(np.float64), rcond=None
    )[0].T

    def lost(value):
        return np.square(inputs @ (value - kernel.weight_OI).T.astype(np.float64)).sum()

    least = lost(best @ rest.product_OI)
    assert least * (1 - 1e-6) <= lost(by_outputs.value_OI) <= 1.02 * least < 0.8 * lost(by_weights.value_OI)
    blind = method(Rank(ratio=0.3), fit="outputs").compress(kernel, {Gram(): torch.zeros(72, 72)}, layer="x")
    assert np.array_equal(blind.value_OI, by_weights.value_OI)


def layout_of(made: TapFactors) -> Tapwise:
    parts = [DenseFloat(to_bf16_bits(part)) for part in made.parts]
    return Tapwise(parts[0] if made.core_AM is None else LowRank(parts[0], parts[1]), parts[-1], made.num_runs)


CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
GEOMETRIES = [
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 5), (2, 1), (0, 2), (1, 1)),
    ((3, 3), (1, 2), "valid", (2, 1)),
    ((2, 4), (1, 1), "same", (1, 2)),
    ((1, 3), (3, 1), (0, 1), (1, 1)),
    ((5,), (2,), (2,), (1,)),
    ((2, 1, 3), (1, 2, 1), (1, 0, 1), (1, 1, 2)),
]


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=repr)
@pytest.mark.parametrize("core", [True, False])
def test_convolutions_of_the_factors_are_the_convolution_of_the_kernel(geometry, mode, core, monkeypatch):
    kernel, stride, padding, dilation = geometry
    if len(kernel) == 1 and not core:
        pytest.skip("the taps of one axis have no spatial factors")
    torch.manual_seed(0)
    conv = CONVS[len(kernel)](6, 20, kernel, stride, padding, dilation, 1, True, mode)
    runs = int(np.prod(kernel)) if core else int(np.prod(kernel[:-1]))
    inner, width = 4, 6 * int(np.prod(kernel)) // runs
    rng = np.random.default_rng(7)

    def part(*shape: int) -> np.ndarray:
        return (rng.integers(-8, 9, shape) / 8).astype(np.float32)  # bfloat16 holds them

    # Small whole numbers, so that bfloat16 holds what comes out of the first convolution too.
    right = rng.integers(-1, 2, (inner, width)).astype(np.float32)
    made = TapFactors(part(20, 5 if core else runs * inner), part(5, runs * inner) if core else None, right, runs)
    layout = layout_of(made)
    core_AM = None if made.core_AM is None else np.abs(made.core_AM)
    largest = layout_of(TapFactors(np.abs(made.left_OA), core_AM, np.abs(right), runs))
    model = nn.Sequential(copy.deepcopy(conv))
    replace_linear(model, {"0": layout})
    dense, absolute = copy.deepcopy(conv).double(), copy.deepcopy(conv).double()
    for module, stored in ((dense, layout), (absolute, largest)):
        weight = torch.from_numpy(stored.to_dense()).reshape(20, *kernel, 6).movedim(-1, 1)
        module.weight.data = weight.double().contiguous()
    monkeypatch.setattr(LayoutHolder, "dequantized_weight", lambda _: pytest.fail("it was dequantized"))
    products = []
    original = Geometry.pieces
    monkeypatch.setattr(Geometry, "pieces", lambda self, *args: products.append(self.kernel) or original(self, *args))
    assert isinstance(model[0], PackedConv)
    x = torch.randint(-2, 3, (2, 6, *(9,) * len(kernel))).float()
    with torch.no_grad():
        got, expected, most = model(x), dense(x.double()), absolute(x.double().abs())
    assert got.shape == expected.shape
    # What meets the left factor behind a core is rounded to bfloat16, by at most 2^-9 of itself.
    assert bool(((got - expected).abs() <= (1e-5 + core * 2.0**-9) * (most + conv.bias.abs().max())).all())
    assert len(products) == 2  # two convolutions, each with a part of the taps
    assert [int(np.prod(axes)) for axes in products] == [int(np.prod(kernel)) // runs, runs]


@pytest.mark.parametrize("method", ["tucker", "spatial"])
@pytest.mark.parametrize(
    "rank", [{"ratio": 0.3}, {"num_bytes": 900}, {"count": 3}, {"energy": 0.6}, {"energy": 1.0}], ids=str
)
def test_a_plan_knows_the_bytes(method, rank):
    """With energy at most; where the dense kernel takes fewer bytes it is stored."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 20, 3), nn.Conv2d(20, 32, (3, 2), groups=2), nn.Conv2d(32, 4, 1))
    recipe = {"steps": [{"method": method, "rank": rank}]}
    plan = make_plan(load_recipe(recipe), load_model(model).structure(), rates=Rates(1e9, 1e9))
    run = rarefy.compress(model, recipe, measure=False)
    assert [layer.name for layer in plan.layers] == ["0", "1.group0", "1.group1"]
    for layer in plan.layers:
        layout = run.layers[layer.name]
        assert layer.exact == ("energy" not in rank)
        if layer.exact:
            assert (layer.format, layer.packed_bytes) == (layout.format, layout.nbytes)
        else:
            assert layer.packed_bytes >= layout.nbytes
    formats = {layout.format for layout in run.layers.values()}
    assert formats == {"dense-bf16-v1" if rank == {"energy": 1.0} else "tapwise-bf16-v1"}
