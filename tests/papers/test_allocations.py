"""Rules for the amounts of each layer against their papers in plain loops. Shape suffixes: O out, I in."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from rarefy.calibrate.statistics import SquaredNorm, Statistic
from rarefy.core.patterns import NM, Blocks, Lines, Unstructured, WantedPattern
from rarefy.core.solution import Solution
from rarefy.methods import RIA, LayerMethod, Magnitude, Random, SparseGPT, Wanda
from rarefy.methods.allocation import ERK, OWL, DenseLayer, Global, LayerShape, Uniform, patterns_of
from rarefy.testing.method import make_problem

NET = (
    LayerShape("stem", (16, 3, 3, 3), (16, 27)),
    LayerShape("conv", (32, 16, 3, 3), (32, 144)),
    LayerShape("wide", (64, 32, 3, 3), (64, 288)),
    LayerShape("depthwise", (64, 1, 3, 3), (64, 9)),
    LayerShape("head", (10, 64), (10, 64)),
)


@dataclass
class Net:
    """A model whose blocks are given, and how often they were walked through."""

    groups: Sequence[Sequence[DenseLayer]]
    num_walks: int = 0

    def blocks(self, statistics: Sequence[Statistic]) -> Iterator[Sequence[DenseLayer]]:
        self.num_walks += 1
        for layer in (layer for group in self.groups for layer in group):
            assert set(statistics) <= set(layer.stats)
        yield from self.groups

    def shapes(self) -> list[LayerShape]:
        layers = [layer for group in self.groups for layer in group]
        return [LayerShape(each.name, each.weight_OI.shape, each.weight_OI.shape) for each in layers]


def net(
    *blocks: Sequence[tuple[int, int]],
    needs: tuple[Statistic, ...] = (SquaredNorm(),),
    like: float = 0.0,
    seed: int = 0,
) -> Net:
    """Blocks of layers (O, I) whose weights differ in size; `like`: weights are multiples of it, so that many tie."""
    groups, scales = [], np.random.default_rng(seed)
    for number, shapes in enumerate(blocks):
        group = []
        for index, (rows, width) in enumerate(shapes):
            weight_OI, stats = make_problem(rows, width, needs, seed=seed + 10 * number + index)
            weight_OI = (weight_OI * np.exp(scales.normal())).astype(np.float32)
            if like:
                weight_OI = (np.round(weight_OI / like) * like).astype(np.float32)
            group.append(DenseLayer(f"{number}.{index}", weight_OI, stats, 1))
        groups.append(group)
    return Net(groups)


def mean(amounts: Mapping[str, float], layers: Sequence[LayerShape]) -> float:
    return sum(amounts[layer.name] * layer.size for layer in layers) / sum(layer.size for layer in layers)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8, 0.9, 0.98, 1.0])
def test_erk_is_the_epsilon_at_which_capped_densities_have_the_right_sum(sparsity: float) -> None:
    """Found by bisection of epsilon over min(1, epsilon * raw), not by the papers' rounds of full layers."""
    raw, sizes = [], []
    for layer in NET:
        total, product = 0, 1
        for axis in layer.shape:
            total, product = total + axis, product * axis
        raw.append(total / product)
        sizes.append(product)
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        kept = sum(min(1.0, middle * each) * size for each, size in zip(raw, sizes, strict=True))
        low, high = (middle, high) if kept < (1 - sparsity) * sum(sizes) else (low, middle)
    amounts = ERK().amounts(sparsity, NET)
    for layer, each in zip(NET, raw, strict=True):
        assert amounts[layer.name] == pytest.approx(1 - min(1.0, high * each), abs=1e-9)
    assert mean(amounts, NET) == pytest.approx(sparsity, abs=1e-12)


def test_erk_counts_the_taps_of_a_kernel() -> None:
    """RigL: a convolution keeps in proportion to n_in + n_out + w + h, and a linear layer to n_in + n_out."""
    layers = [LayerShape("a", (64, 64, 3, 3), (64, 576)), LayerShape("b", (64, 576), (64, 576))]
    amounts = ERK().amounts(0.9, layers)
    assert (1 - amounts["a"]) / (1 - amounts["b"]) == pytest.approx((64 + 64 + 3 + 3) / (64 + 576))


def test_erk_keeps_small_layers_whole_and_takes_it_from_the_others() -> None:
    amounts = ERK().amounts(0.5, NET)
    assert amounts["depthwise"] == amounts["stem"] == 0
    assert amounts["wide"] > 0.5
    single = ERK().amounts(0.37, NET[:1])
    assert single["stem"] == pytest.approx(0.37)


def outlier_shares(model: Net, threshold: float) -> list[float]:
    """Layerwise outlier distribution, entry by entry."""
    shares = []
    for group in model.groups:
        scores = []
        for layer in group:
            norm_I = layer.stats[SquaredNorm()].double().sqrt().tolist()
            for row in layer.weight_OI.tolist():
                scores += [abs(weight) * norm for weight, norm in zip(row, norm_I, strict=True)]
        average = sum(scores) / len(scores)
        shares.append(sum(score > threshold * average for score in scores) / len(scores))
    return shares


def test_owl_gives_blocks_with_more_outliers_fewer_zeros_in_the_authors_proportion() -> None:
    model = net([(12, 40), (8, 40)], [(12, 40), (8, 40)], [(12, 40), (8, 40)], [(12, 40), (8, 40)])
    shares = outlier_shares(model, 3.0)
    assert len(set(shares)) == 4
    amounts = OWL(threshold=3.0, spread=0.1).measured_amounts(0.6, model.shapes(), Wanda(Unstructured(0.6)), model)
    by_block = [amounts[f"{number}.0"] for number in range(4)]
    assert by_block == [amounts[f"{number}.1"] for number in range(4)]
    # the authors' lines: stretch to [0, 2 lambda], take the mean off, add the density
    low, high = min(shares), max(shares)
    stretched = [(share - low) / (high - low) * 2 * 0.1 for share in shares]
    density = [each - sum(stretched) / 4 + 0.4 for each in stretched]
    assert by_block == pytest.approx([1 - each for each in density], abs=1e-6)
    assert np.argsort(shares).tolist() == np.argsort(by_block)[::-1].tolist()
    assert max(by_block) - min(by_block) == pytest.approx(0.2)


def test_owl_sees_outliers_of_the_inputs() -> None:
    """One input is a hundred times as large in the second block: its weights stand out, and the block keeps more."""
    rng = np.random.default_rng(0)
    groups = []
    for number in range(2):
        norm_I = torch.ones(64)
        norm_I[5] = 1e4 if number else 1.0
        weight_OI = rng.uniform(0.5, 1, size=(16, 64)).astype(np.float32)
        groups.append([DenseLayer(str(number), weight_OI, {SquaredNorm(): norm_I}, 1)])
    model = Net(groups)
    amounts = OWL().measured_amounts(0.5, model.shapes(), Magnitude(Unstructured(0.5)), model)
    assert amounts == pytest.approx({"0": 0.58, "1": 0.42})


@pytest.mark.parametrize("sparsity", [0.0, 0.03, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("spread", [0.0, 0.08, 1.0])
def test_owl_keeps_the_mean_with_blocks_of_any_sizes(sparsity: float, spread: float) -> None:
    model = net([(3, 40)], [(12, 40), (8, 64)], [(30, 40)])
    shapes = model.shapes()
    amounts = OWL(threshold=2.0, spread=spread).measured_amounts(sparsity, shapes, Wanda(Unstructured(0.5)), model)
    assert mean(amounts, shapes) == pytest.approx(sparsity, abs=1e-12)
    assert all(0 <= amount <= 1 for amount in amounts.values())
    assert (len(set(amounts.values())) > 1) == (0 < sparsity < 1 and spread > 0)


def test_owl_of_blocks_alike_and_of_a_single_layer_is_uniform() -> None:
    model = net([(8, 40)])
    assert OWL().measured_amounts(0.3, model.shapes(), Wanda(Unstructured(0.3)), model) == {"0.0": 0.3}
    alike = Net([[replace(model.groups[0][0], name=name)] for name in "abc"])
    amounts = OWL().measured_amounts(0.3, alike.shapes(), Wanda(Unstructured(0.3)), alike)
    assert amounts == {"a": 0.3, "b": 0.3, "c": 0.3}


def masks(method: LayerMethod, model: Net) -> dict[str, np.ndarray]:
    """What the method keeps with the amounts of one threshold."""
    pattern: WantedPattern = method.pattern  # type: ignore[attr-defined]
    amounts = Global().measured_amounts(pattern.sparsity, model.shapes(), method, model)
    patterns = patterns_of(pattern, model.shapes(), amounts)
    kept = {}
    for layer in (layer for group in model.groups for layer in group):
        own = replace(method, pattern=patterns[layer.name])  # type: ignore[type-var]
        result = own.compress(Solution.dense(layer.weight_OI), layer.stats, layer=layer.name)
        assert result.mask_OI is not None
        kept[layer.name] = result.mask_OI
    return kept


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.333, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("like", [0.0, 0.25], ids=["distinct", "with ties"])
def test_one_threshold_zeros_exactly_what_is_below_it_in_the_concatenation(sparsity: float, like: float) -> None:
    model = net([(7, 13), (5, 31)], [(1, 9)], [(16, 24)], like=like)
    kept = masks(Magnitude(Unstructured(sparsity)), model)
    sizes = [(abs(float(w)), name, o, i) for name, o, i, w in entries(model)]
    num_zero = round(sparsity * len(sizes))
    order = sorted(range(len(sizes)), key=lambda place: (sizes[place][0], -place))
    zeros = {sizes[place][1:] for place in order[:num_zero]}
    found = {(name, o, i) for name, mask_OI in kept.items() for o, i in np.argwhere(~mask_OI).tolist()}
    assert found == zeros


def entries(model: Net) -> Iterator[tuple[str, int, int, float]]:
    for layer in (layer for group in model.groups for layer in group):
        for o, row in enumerate(layer.weight_OI):
            for i, weight in enumerate(row):
                yield layer.name, o, i, float(weight)


@pytest.mark.parametrize("method", [RIA, Random, Wanda, SparseGPT])
def test_one_threshold_is_that_of_the_methods_own_saliency(method: type) -> None:
    ranked = method(Unstructured(0.6))
    model = net([(7, 16), (5, 32)], [(16, 24)], needs=ranked.needs())
    amounts = Global().measured_amounts(0.6, model.shapes(), ranked, model)
    scores = {x.name: ranked.saliency(x.weight_OI, x.stats, layer=x.name) for g in model.groups for x in g}
    threshold = np.sort(np.concatenate([score.ravel() for score in scores.values()]))[round(0.6 * 656)]
    for name, score_OI in scores.items():
        assert amounts[name] == pytest.approx((score_OI < threshold).mean(), abs=1e-12)
    assert len(set(amounts.values())) == 3
    assert model.num_walks == 2


@pytest.mark.parametrize("pattern", [Blocks((2, 4), 0.5), Lines("rows", 0.4), Lines("columns", 0.25)], ids=repr)
def test_whole_blocks_and_lines_compete_by_the_mean_of_their_entries(pattern: Blocks | Lines) -> None:
    model = net([(8, 16), (4, 16)], [(12, 16), (8, 16)])
    kept = masks(Magnitude(pattern), model)
    units = []
    for layer in (layer for group in model.groups for layer in group):
        rows, width = layer.weight_OI.shape
        shape = pattern.block_shape if isinstance(pattern, Blocks) else pattern.fit((rows, width)).block_shape
        for o in range(0, rows, shape[0]):
            for i in range(0, width, shape[1]):
                part = np.abs(layer.weight_OI[o : o + shape[0], i : i + shape[1]].astype(np.float64))
                units.append((part.sum() / part.size, part.size, layer.name, o, i))
                assert kept[layer.name][o : o + shape[0], i : i + shape[1]].sum() in (0, part.size)
    zeros = {key for key in ((name, o, i) for _, _, name, o, i in units) if not kept[key[0]][key[1], key[2]]}
    total, expected = 0, set()
    for _, size, name, o, i in sorted(units):
        if total + size / 2 >= pattern.sparsity * 512:
            break
        total += size
        expected.add((name, o, i))
    if isinstance(pattern, Lines) and pattern.axis == "columns":  # of unlike lengths: a shorter one may still fit
        assert expected <= zeros
        assert len(zeros - expected) <= 1
    else:
        assert zeros == expected
    assert abs(sum(mask.size - mask.sum() for mask in kept.values()) - pattern.sparsity * 512) <= 8


@dataclass(frozen=True)
class Signed:
    """Ranks weights by their value, so that saliencies are negative too, and both zeros occur."""

    paper: ClassVar[str] = "none"
    pattern: WantedPattern

    def needs(self) -> tuple[Statistic, ...]:
        return ()

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        raise NotImplementedError

    def saliency(self, weight_OI: np.ndarray, stats: Mapping[Statistic, Tensor], *, layer: str) -> np.ndarray:
        return weight_OI


@given(
    st.lists(
        st.lists(
            st.sampled_from([-3e38, -2.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 1.0000001, 3e38]), min_size=1, max_size=9
        ),
        min_size=1,
        max_size=5,
    ),
    st.floats(0, 1),
)
def test_the_threshold_is_exact_for_any_numbers(layers: list[list[float]], sparsity: float) -> None:
    model = Net([[DenseLayer(str(n), np.array([row], dtype=np.float32), {}, 1)] for n, row in enumerate(layers)])
    amounts = Global().measured_amounts(sparsity, model.shapes(), Signed(Unstructured(sparsity)), model)
    every = [np.float32(value) for row in layers for value in row]
    order = sorted(range(len(every)), key=lambda place: (every[place], -place))[: round(sparsity * len(every))]
    owner = [n for n, row in enumerate(layers) for _ in row]
    for n, row in enumerate(layers):
        assert round(amounts[str(n)] * len(row)) == sum(owner[place] == n for place in order)


def test_uniform_leaves_the_pattern_as_it_is() -> None:
    for pattern in (Unstructured(0.37), NM(3, 7), Blocks((2, 4), 0.3), Lines("rows", 0.21)):
        amounts = Uniform().amounts(pattern.sparsity, NET)
        assert set(patterns_of(pattern, NET, amounts).values()) == {pattern}


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), min_size=1, max_size=8), st.integers(0, 2**32))
def test_zeros_in_all_layers_together_are_those_asked_for(layers: list[tuple[int, float]], seed: int) -> None:
    """Any amounts with the right mean become whole numbers: exact for entries, within half a unit for others."""
    shapes = [LayerShape(str(n), (8, 8 * width), (8, 8 * width)) for n, (width, _) in enumerate(layers)]
    given_amounts = {str(n): amount for n, (_, amount) in enumerate(layers)}
    asked = min(1.0, mean(given_amounts, shapes))
    assume(asked not in given_amounts.values())  # such a layer is rounded by itself
    total = sum(shape.size for shape in shapes)
    entries_only = patterns_of(Unstructured(asked), shapes, given_amounts)
    zeros = {shape.name: round(entries_only[shape.name].sparsity * shape.size) for shape in shapes}
    assert sum(zeros.values()) == round(asked * total)
    for shape in shapes:
        assert abs(zeros[shape.name] - given_amounts[shape.name] * shape.size) <= 1 + 1e-6
    for pattern in (Blocks((4, 8), asked), Lines("rows", asked), Lines("columns", asked)):
        found = patterns_of(pattern, shapes, given_amounts)
        largest = max(32 if isinstance(pattern, Blocks) else 8 * shape.matrix[1] for shape in shapes)
        off = sum(found[shape.name].sparsity * shape.size for shape in shapes) - asked * total
        assert abs(off) <= largest
        assert all(type(each) is type(pattern) for each in found.values())
    keep = np.random.default_rng(seed).integers(1, 64)
    of_64 = patterns_of(NM(int(keep), 64), shapes, dict.fromkeys(given_amounts, 1 - keep / 64))
    assert set(of_64.values()) == {NM(int(keep), 64)}


def test_n_of_m_keeps_its_group_and_at_least_one_entry() -> None:
    shapes = [LayerShape(name, (64, 64), (64, 64)) for name in "abcd"]
    found = patterns_of(NM(16, 64), shapes, {"a": 1.0, "b": 0.8, "c": 0.7, "d": 0.5})
    assert [found[name] for name in "abcd"] == [NM(1, 64), NM(12, 64), NM(19, 64), NM(32, 64)]
    assert sum(pattern.sparsity for pattern in found.values()) / 4 == NM(16, 64).sparsity
    coarse = patterns_of(NM(2, 4), shapes, {"a": 0.55, "b": 0.45, "c": 0.52, "d": 0.48})
    assert set(coarse.values()) == {NM(2, 4)}  # and not 1 and 3 of 4 by turns
