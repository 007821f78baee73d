"""The kernels' bench: what it reports adds up, and a wrong product is not timed."""

import numpy as np
import pytest

from rarefy import kernels
from rarefy.core.errors import NonFiniteError, UsageError
from rarefy.layouts import FORMATS
from rarefy.measure import kernel_bench
from rarefy.measure.kernel_bench import bench_kernels

# Ternary digits become codes of 2 bits, and a rank of 32 is padded to 64. Half of all codes and their mask become all
# codes at the most, which of 2 bits are no more.
GROWS = {"ternary-v1": 1.5, "bitmask-int4-v1": 35 / 27, "bitmask-int3-v1": 1.2, "nm-int3-v1": 1.2, "sum-v1": 1.5}
# Without lists, 8 of 64 codes of 2 bits and their mask hold codes of 4.
GROWS_WITHOUT_LISTS = {"nm-int4-v1": 1.05, "nm-int2-v1": 1.2}
SMALL = {"shapes": ((1040, 700),), "threads": (1,), "rounds": 2}


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_bench, "last_level_cache_bytes", lambda: 1 << 20)


def test_rows_of_every_format_add_up() -> None:
    before = kernels.get_num_threads()
    calls: list[tuple[int, int]] = []
    rows = bench_kernels(rows=(1, 3), progress=lambda *a: calls.append(a), **SMALL)
    assert kernels.get_num_threads() == before
    assert {row["layout"] for row in rows} == set(FORMATS)
    assert calls[-1] == (len(rows) * 3, len(rows) * 3)
    assert calls == sorted(calls)
    patterns = {(row["parameters"]["keep"], row["parameters"]["group"]) for row in rows if "keep" in row["parameters"]}
    assert patterns == {(2, 4), (8, 64)}
    assert {row["note"] for row in rows if "block" in row["layout"]} == {"50 %", "75 %"}
    for row in rows:
        assert row["checked"] is True
        assert (row["shape"], row["threads"], row["num_rounds"]) == ([1040, 700], 1, 2)
        assert row["isa"] == kernels.describe_cpu()["chosen"][row["layout"]]
        assert 0 < row["ms_low"] <= row["ms"] <= row["ms_high"]
        rate = row["bytes"] / (row["ms"] / 1e3)
        assert row["bandwidth_fraction"] == pytest.approx(rate / row["bandwidth_bytes_per_s"])
        assert row["cache_multiple"] >= 3 or row["num_copies"] == 2
    assert len({row["bandwidth_bytes_per_s"] for row in rows}) == 1, "one group, one number of threads"


@pytest.mark.parametrize("isa", kernels.runnable_isas(kernels.detect_cpu()))
def test_memory_holds_the_bytes_of_the_layout(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if isa == "numpy":
        pytest.skip("it holds the layout itself")
    monkeypatch.setenv("RAREFY_ISA", isa)
    rows = bench_kernels(rows=(1,), **SMALL)
    num_bytes = {row["layout"]: row["bytes"] for row in rows}
    has_lists = isa not in ("reference", "neon")
    for row in rows:
        kind, values = row["layout"].split("-")[:2]
        if isa in ("avx2", "avx_vnni") and kind in ("bitmask", "nm"):
            # Nothing expands there: all codes, of 4 bits at the least, or fewer in lists (docs/adr/0034).
            all_codes = {"int3": "int4", "int2": "int4"}.get(values, values)
            assert row["bytes"] <= 1.01 * num_bytes[f"dense-{all_codes}-v1"]
            continue
        # Lists of few entries replace a mask, and the lists of blocks take as much of few blocks as of many.
        grows = GROWS if has_lists else GROWS | GROWS_WITHOUT_LISTS
        most = grows.get(row["layout"], 1.05 if row["note"] == "75 %" else 1.03)
        least = 0.85 if row["parameters"].get("keep") == 8 and has_lists else 1.0
        assert least < row["bytes"] / row["layout_bytes"] < most, row["layout"]


def test_groups_share_what_memory_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_bench, "_MEMORY_BUDGET_BYTES", 12 * 1040 * 700)
    rows = bench_kernels(rows=(1,), **SMALL)
    assert {row["layout"] for row in rows} == set(FORMATS)
    assert len({row["bandwidth_bytes_per_s"] for row in rows}) > 1, "each group has readings of its own"


@pytest.mark.parametrize("damage", [lambda y: y * 1.001, lambda y: y * np.nan])
def test_a_product_that_is_wrong_from_the_start(monkeypatch: pytest.MonkeyPatch, damage) -> None:
    right = kernels.Prepared.matmul
    monkeypatch.setattr(kernels.Prepared, "matmul", lambda self, x: damage(right(self, x)).astype(np.float32))
    for layout in FORMATS:
        with pytest.raises(NonFiniteError, match="times as far from the reference"):
            bench_kernels(layouts=(layout,), rows=(1,), **SMALL)


def test_a_product_that_becomes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.Prepared.matmul
    verified = kernel_bench._verified

    def then_break(weight, x_TI):
        expected = verified(weight, x_TI)
        monkeypatch.setattr(kernels.Prepared, "matmul", lambda self, x: np.roll(right(self, x), 1))
        return expected

    monkeypatch.setattr(kernel_bench, "_verified", then_break)
    with pytest.raises(NonFiniteError, match="a timed product is wrong"):
        bench_kernels(layouts=("dense-int4-v1",), rows=(1,), **SMALL)


def test_a_copy_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = kernel_bench.prepare
    made = []

    def other_weight_in_the_end(layout):
        made.append(layout)
        other = kernel_bench.samples_of("dense-int4-v1")[0].make(layout.shape, seed=1)[0]
        return prepare(layout if len(made) < 3 else other)

    monkeypatch.setattr(kernel_bench, "prepare", other_weight_in_the_end)
    with pytest.raises(NonFiniteError, match="two copies"):
        bench_kernels(layouts=("dense-int4-v1",), rows=(1,), **SMALL)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"layouts": ("nonsense",)}, "--layout: 'nonsense'; allowed: dense-f32-v1"),
        ({"rows": (0,)}, "--rows: 0; allowed: 1 to 4096"),
        ({"threads": (99_999,)}, "--threads: 99999; allowed: 1 to"),
        ({"shapes": ((0, 5),)}, "--shape: 0x5"),
        ({"shapes": ((1 << 20, 1 << 20),)}, "--shape: 1048576x1048576 needs up to"),
        ({"rounds": 0}, "--rounds: 0"),
    ],
)
def test_wrong_requests(wrong: dict, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        bench_kernels(**{"rows": (1,), **SMALL, **wrong})
    assert str(caught.value).startswith(complaint)
