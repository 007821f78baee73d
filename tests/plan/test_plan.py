"""Predicted bytes are the bytes that `pack` makes; the rest of the plan is complete and plausible."""

import itertools
import json
from collections.abc import Callable

import numpy as np
import pytest
from tests.recipe.conftest import Layer, Model, decoder

from rarefy import run
from rarefy.calibrate.data import gather
from rarefy.calibrate.gradients import collect_gradients
from rarefy.calibrate.scratch import Scratch
from rarefy.core.grids import IntGrid
from rarefy.core.patterns import NM, Blocks, Pattern, Unstructured
from rarefy.core.solution import Solution
from rarefy.layouts import pack
from rarefy.methods import GPTQ, OBERT, RTN, LayerMethod, Magnitude, SparseGPT, Taylor, Wanda
from rarefy.models import load_model
from rarefy.plan import Plan, Rates, cost, make_plan
from rarefy.recipe import Recipe, Step, load_recipe, shipped_names
from rarefy.testing.method import make_problem

RATES = Rates(float32_flops=100e9, bfloat16_flops=400e9)
PATTERNS: list[Pattern | None] = [
    None, Unstructured(0.5), Unstructured(0.333), Unstructured(0.0), Unstructured(1.0), NM(2, 4), NM(3, 7),
    Blocks((4, 16), 0.5), Blocks((3, 5), 0.4),
]  # fmt: skip
GRIDS = [None, IntGrid(4, 32, False), IntGrid(4, None, True), IntGrid(8, 64, True)]


def one_layer(rows: int, width: int) -> Model:
    return Model((), (Layer("linear", "linear", (rows, width), num_bytes=4 * rows * width),))


def chains(pattern: Pattern | None, grid: IntGrid | None) -> list[tuple[LayerMethod, ...]]:
    prune: list[LayerMethod] = []
    if pattern is not None:
        prune = [Magnitude(pattern), Wanda(pattern), SparseGPT(pattern, block_size=24)]
    round_: list[LayerMethod] = [] if grid is None else [RTN(grid), GPTQ(grid)]
    if prune and round_:
        joint = [(SparseGPT(pattern, grid),)] if pattern is not None else []
        return [(one, two) for one in prune for two in round_] + [(round_[0], prune[0])] + joint
    return [(method,) for method in prune or round_]


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_predicted_bytes_are_exact(pattern: Pattern | None, grid: IntGrid | None) -> None:
    for rows, width in ((7, 75), (16, 64)):
        for chain, dtype in itertools.product(chains(pattern, grid), ("bfloat16", "float32")):
            recipe = Recipe(tuple(Step(method) for method in chain), rest_dtype=dtype)  # type: ignore[arg-type]
            (planned,) = make_plan(recipe, one_layer(rows, width), rates=RATES).layers
            needs = tuple(statistic for method in chain for statistic in method.needs())
            weight_OI, stats = make_problem(rows, width, needs)
            solution = Solution.dense(weight_OI)
            for method in chain:
                solution = method.compress(solution, stats, layer="linear")
            layout = pack(solution, float_format="bf16" if dtype == "bfloat16" else "f32")
            if isinstance(pattern, Blocks) and not pattern.is_even((rows, width)):
                assert layout.nbytes <= planned.packed_bytes
                assert not planned.exact
                continue
            assert (planned.format, planned.packed_bytes) == (layout.format, layout.nbytes)
            assert planned.exact


@pytest.mark.parametrize(("one", "two"), list(itertools.product([p for p in PATTERNS if p], repeat=2)), ids=repr)
def test_two_patterns_on_one_layer_never_take_more_than_planned(one: Pattern, two: Pattern) -> None:
    recipe = Recipe((Step(Magnitude(one)), Step(Wanda(two))))
    (planned,) = make_plan(recipe, one_layer(8, 84), rates=RATES).layers
    weight_OI, stats = make_problem(8, 84, Wanda(two).needs())
    solution = Magnitude(one).compress(Solution.dense(weight_OI), {}, layer="x")
    layout = pack(Wanda(two).compress(solution, stats, layer="x"))
    assert layout.nbytes <= planned.packed_bytes
    assert not planned.exact
    assert np.count_nonzero(layout.to_dense()) <= 8 * 84


@pytest.mark.parametrize("name", shipped_names())
def test_a_plan_accounts_for_every_layer_and_byte(name: str) -> None:
    model = decoder(num_blocks=3)
    plan = make_plan(load_recipe(name), model, rates=RATES)
    named = {layer.name for layer in plan.layers} | {row.name for row in plan.untouched}
    tied = {"lm_head"} if "model.embed_tokens" in {layer.name for layer in plan.layers} else set()
    assert named == {layer.name for layer in model.layers} - tied
    assert all(row.reason for row in plan.untouched)
    assert plan.input_bytes == sum(layer.num_bytes for layer in model.layers)
    packed = sum(layer.packed_bytes for layer in plan.layers)
    norms = 3 * 64 * 4
    embedding = 0 if tied else 2 * 6400
    header = plan.disk_bytes - packed - norms - embedding
    assert 0 < header < 8000
    assert plan.memory_bytes == sum(plan.memory_parts.values()) > 0
    assert plan.seconds == pytest.approx(sum(plan.seconds_parts.values()))
    assert "100 GFLOP/s float32" in plan.basis
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_biases_are_counted_once() -> None:
    layer = Layer("linear", "linear", (10, 64), num_bytes=4 * (640 + 10))
    plan = make_plan(Recipe((Step(RTN(IntGrid(8, None, True))),)), Model((), (layer,)), rates=RATES)
    assert plan.layers[0].input_bytes == 4 * 640
    assert plan.disk_bytes - plan.layers[0].packed_bytes - 4 * 10 < 1000


def test_the_table_joins_layers_that_differ_only_in_their_block() -> None:
    plan = make_plan(load_recipe("sparse-50-int4"), decoder(num_blocks=12), rates=RATES)
    header, *rows = plan.table()
    assert header[0] == "layers"
    by_name = {row[0]: row for row in rows}
    assert set(by_name) == {
        "model.embed_tokens",
        "model.layers.*.self_attn.q_proj",
        "model.layers.*.self_attn.k_proj",
        "model.layers.*.mlp.up_proj",
        "model.layers.*.mlp.down_proj",
    }
    row = by_name["model.layers.*.mlp.down_proj"]
    assert row[1:5] == ("12", "64 x 96", "sparsegpt", "bitmask-int4-v1")
    assert int(row[6]) == 12 * plan.layers[-1].packed_bytes


def test_time_and_memory_follow_the_work() -> None:
    small = make_plan(load_recipe("sparse-50"), decoder(num_blocks=2), num_samples=8, rates=RATES)
    large = make_plan(load_recipe("sparse-50"), decoder(num_blocks=2), num_samples=64, rates=RATES)
    deep = make_plan(load_recipe("sparse-50"), decoder(num_blocks=8), num_samples=8, rates=RATES)
    assert small.seconds < large.seconds
    assert small.seconds < deep.seconds
    assert small.memory_parts["activations between blocks"] * 8 == large.memory_parts["activations between blocks"]
    assert small.memory_parts["one block"] == deep.memory_parts["one block"]
    no_data = make_plan(load_recipe("int8"), decoder(), rates=RATES)
    assert no_data.seconds_parts["forward passes"] == no_data.seconds_parts["statistics"] == 0


@pytest.mark.parametrize(
    ("walls", "processors", "seconds"),
    [
        # Another process took the machine for most of the probes, and shared it in the others.
        ([9.0] * 5 + [2.0] + [9.0] * 6, [1.6] * 5 + [1.5] + [1.7] * 6, 1.5),
        # Two threads on a quarter of a processor: no load that goes away.
        ([20.0] * 12, [1.0] * 12, 5.0),
    ],
)
def test_rates_are_those_of_a_quiet_machine(
    monkeypatch: pytest.MonkeyPatch, walls: list[float], processors: list[float], seconds: float
) -> None:
    monkeypatch.setattr(cost.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(cost, "time", FakeTime(walls * 2, [2 * each for each in processors * 2]))
    rates = cost.measure_rates()
    assert rates.float32_flops == rates.bfloat16_flops == pytest.approx(2 * 512 * 576 * 1536 / seconds)


class FakeTime:
    """A clock that advances by what is given between two readings of it."""

    def __init__(self, walls: list[float], processors: list[float]) -> None:
        self.perf_counter = self._clock(walls)
        self.process_time = self._clock(processors)

    def sleep(self, seconds: float) -> None:
        assert seconds < 0.1

    @staticmethod
    def _clock(steps: list[float]) -> Callable[[], float]:
        readings = iter([reading for step in steps for reading in (0.0, step)])
        return lambda: next(readings)


def test_the_estimate_says_that_it_is_for_a_quiet_machine() -> None:
    assert "on a quiet machine" in make_plan(load_recipe("int8"), decoder(), rates=RATES).basis


def test_work_follows_the_rows_that_layers_meet() -> None:
    recipe = Recipe((Step(SparseGPT(Unstructured(0.5))),))
    tokens = make_plan(recipe, one_layer(64, 64), num_samples=4, sequence_length=8, rates=RATES)
    counted = make_plan(recipe, one_layer(64, 64), num_samples=4, rates=RATES, num_rows={"linear": 4 * 8})
    images = make_plan(recipe, one_layer(64, 64), num_samples=4, rates=RATES, num_rows={"linear": 4 * 8 * 100})
    assert counted.seconds_parts == tokens.seconds_parts
    assert images.seconds_parts["statistics"] == pytest.approx(100 * tokens.seconds_parts["statistics"])
    assert images.memory_parts["activations between blocks"] > tokens.memory_parts["activations between blocks"]


def test_rates_are_measured_when_none_are_given() -> None:
    plan = make_plan(load_recipe("int8"), decoder())
    assert "GFLOP/s" in plan.basis


def test_gradients_take_a_block_and_passes_of_their_own() -> None:
    half = Unstructured(0.5)
    plain = make_plan(Recipe((Step(Magnitude(half)),)), decoder(), rates=RATES)
    assert "gradients" not in plain.memory_parts
    assert "gradients" not in plain.seconds_parts
    assert plain.scratch_bytes == 0
    plans = {
        (name, num_blocks): make_plan(Recipe((Step(method),)), decoder(num_blocks=num_blocks), rates=RATES)
        for name, method in (("taylor", Taylor(half)), ("obert", OBERT(half)))
        for num_blocks in (2, 8)
    }
    first, second, deep = plans["taylor", 2], plans["obert", 2], plans["obert", 8]
    assert first.seconds_parts["gradients"] == second.seconds_parts["gradients"] > 0
    assert first.seconds_parts["forward passes"] == 0
    assert deep.seconds_parts["gradients"] > 2 * second.seconds_parts["gradients"]
    weights = sum(row.shape[0] * row.shape[1] for row in first.layers)
    rows = sum(row.shape[0] for row in first.layers)
    # of every weight of one block a sum of one number, or of its share of a triangle of F and the gradients that wait
    more = second.memory_parts["gradients"] - first.memory_parts["gradients"]
    assert more == 4 * ((17 / 2 + 8 - 1) * weights + rows) / 2
    assert deep.memory_parts["gradients"] == second.memory_parts["gradients"]
    # on disk there is what all samples give each block, and the means
    assert first.scratch_bytes == 2 * 128 * 512 * 64 * 2 + 4 * weights
    assert second.scratch_bytes - first.scratch_bytes == 4 * ((17 / 2 - 1) * weights + rows)
    both = make_plan(Recipe((Step(Wanda(half)), Step(Taylor(half)))), decoder(), rates=RATES)
    assert both.seconds_parts["forward passes"] > 0
    (note,) = make_plan(Recipe((Step(Taylor(half)),)), one_layer(16, 64), rates=RATES).notes
    assert "all of it is in memory" in note
    assert not any("in memory" in note for note in first.notes)


def test_scratch_space_is_what_a_run_takes(tiny_llama_dir, text_file, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Files are measured when they are closed; lines of the cache are filled up."""
    taken: list[int] = []
    close = Scratch.close
    monkeypatch.setattr(Scratch, "close", lambda self: (taken.append(self.num_bytes), close(self)))
    options = {"calibration": text_file, "samples": 6, "sequence_length": 32, "compute_dtype": "float32"}
    steps = {"steps": [{"method": "obert", "pattern": {"sparsity": 0.5}}]}
    plan = run.plan(tiny_llama_dir, steps, **options)
    loaded = load_model(tiny_llama_dir)
    data = gather(loaded, text_file, None, 6, 32, 0, True, False)
    layers = [layer.name for layer in loaded.structure().layers if layer.compressible and layer.block]
    blocks = [block.name for block in loaded.structure().blocks]
    wanted = dict.fromkeys(layers, OBERT(Unstructured(0.5)).needs())
    gradients = collect_gradients(loaded, blocks, data.calls, data.labels, wanted)  # type: ignore[arg-type]
    gradients._scratch.close()
    assert sum(taken) == pytest.approx(plan.scratch_bytes, rel=0.01)
