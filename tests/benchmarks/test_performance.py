"""The benchmark beside other libraries: its check, its own contestant, and what the report says of given results."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Import a module of the folder, which is no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in [name for name in sys.modules if name.partition(".")[0] in {"peers", "performance_report"}]:
        del sys.modules[name]


@pytest.mark.parametrize("num_rows", [1, 20])
def test_rarefys_contestants_are_right_and_wrong_ones_are_noticed(load, monkeypatch, num_rows: int) -> None:
    problem = load("peers.problem").Problem(192, 256, num_rows, 1)
    monkeypatch.setattr(type(problem), "num_copies", lambda *_: 3)
    limit = load("peers.problem").MAX_RELATIVE_ERROR
    found = list(load("peers.rarefy_peer").contestants(problem))
    assert {contestant.values for contestant in found} >= {"float32", "bfloat16", "int8", "int4", "int4 50 % zeros"}
    for contestant in found:
        results = contestant.run()
        assert contestant.worst_error(problem, results) < limit
        assert contestant.worst_error(problem, [results[0], results[1], results[1]]) > 0.5
        assert contestant.worst_error(problem, [results[0], results[1], results[2] * 1.05]) > limit
        assert not contestant.worst_error(problem, [results[0], results[1], results[2] * np.nan]) <= limit
        wrong = replace(contestant, zeros="" if contestant.zeros else "50 %")
        assert wrong.worst_error(problem, results) > 0.5


def test_torchs_contestants_are_right(load, monkeypatch) -> None:
    problem = load("peers.problem").Problem(128, 256, 1, 1)
    monkeypatch.setattr(type(problem), "num_copies", lambda *_: 2)
    for contestant in load("peers.torch_peer").contestants(problem):
        assert contestant.worst_error(problem, contestant.run()) < load("peers.problem").MAX_RELATIVE_ERROR


def test_every_format_holds_the_weights_exactly(load) -> None:
    problem = load("peers.problem").Problem(64, 128, 1, 1)
    peer: ModuleType = load("peers.rarefy_peer")
    for layout_format, _, zeros in peer._KINDS:
        dense = peer._layout(problem, layout_format, 1, zeros).to_dense()
        np.testing.assert_array_equal(dense, problem.weight(1, zeros))
        if zeros:
            share = 0.5 if zeros == "2:4" else float(zeros.rstrip(" %")) / 100
            assert abs(np.mean(dense == 0) - share) < 0.07  # levels may be 0 as well


def results(load) -> dict:
    spread = {"median": 40e9, "low": 39e9, "high": 41e9, "num_runs": 5}

    def row(peer: str, values: str, ms: float, ratio: float) -> dict:
        ours = {"median": ratio, "low": ratio, "high": ratio, "num_runs": 5}
        ratios = {"int4": ours, "int8": ours, "int4 87.5 % zeros": {**ours, "median": 3.0}}
        return {
            "peer": peer, "values": values, "note": "", "facts": None, "bytes": 8_000_000, "num_copies": 2, "ms": ms,
            "ms_low": ms, "ms_high": ms, "bandwidth_fraction": 0.5, "ratios": ratios,
        }  # fmt: skip

    setting = {"part": "peers", "shape": [4096, 4096], "rows": 1, "threads": 1, "isa": "default"}
    layout = {
        "layout": "nm-int4-v1", "note": "2:4", "parameters": {"keep": 2, "group": 4}, "shape": [4096, 4096], "rows": 1,
        "threads": 1, "isa": "avx2", "ms": 0.5, "ms_low": 0.4, "ms_high": 0.6, "bytes": 8_000_000,
        "bandwidth_fraction": 0.4, "bandwidth_bytes_per_s": 40e9,
    }  # fmt: skip
    dense = {**layout, "layout": "dense-int4-v1", "note": "", "parameters": {}, "ms": 0.9}
    return {
        "machine": {
            "cpu": "CPU <X>", "cpus": 2, "flags": ["avx2"], "last_level_cache_bytes": 1 << 25,
            "versions": {"torch": "1"}, "ggml": "",
        },
        "results": [
            {
                "setting": setting,
                "bandwidth": spread,
                "left_out": {"ggml": "not installed"},
                "rows": [
                    row("rarefy", "int4", 0.4, 1.0),
                    row("rarefy", "int8", 0.4, 1.0),
                    row("rarefy", "int4 87.5 % zeros", 0.1, 1.0),
                    row("A", "int4", 0.3, 0.75),
                    row("B", "int8 blocks", 0.8, 2.0),
                ],
            },
            {"setting": {"part": "layouts", "shape": [4096, 4096], "isa": "avx2"}, "rows": [layout, dense]},
        ],
    }  # fmt: skip


def test_the_report_names_losses_and_what_was_left_out(load, tmp_path: Path) -> None:
    load("performance_report").write_report(results(load), tmp_path / "performance.md")
    text = (tmp_path / "performance.md").read_text()
    losses = text.partition("## Where rarefy loses")[2].partition("## ")[0]
    assert "4096 x 4096, one row, one thread: A int4 | 0.75 |" in losses
    assert "B" not in losses.replace("GB", "")
    assert "Left out: ggml (not installed)." in text
    assert "| B | int8 blocks | 0.800 |" in text
    assert "| 2.00 (2.00 to 2.00) |" in text
    assert "| nm-int4-v1 2:4 | 1 | 1 | 0.500 | 0.400 to 0.600 | 16.0 | 40% | 1.80 |" in text
    assert "| dense-int4-v1 | 1 | 1 | 0.900 | 0.400 to 0.600 | 8.9 | 40% |  |" in text
    best = text.partition("in any format")[2].partition("## ")[0]
    assert "| 4096 x 4096, one row, one thread | int4 | 0.400 | A int4 | 0.300 | **0.75** | 0.75 to 0.75 |" in best
    assert "| int4 87.5 % zeros | 0.100 | A int4 | 0.300 | **3.00** |" in best
    # Half of the bandwidth is reached, so that twice the ratio is all that there is.
    assert "**0.75** | 0.75 to 0.75 | 1.50 |" in best
    assert "| 2.00 (2.00 to 2.00) | 4.00 |" in text
    svg = ElementTree.parse(tmp_path / "performance-roofline.svg").getroot()
    assert sum(element.tag.endswith("circle") for element in svg) == 5 + 5  # the points and the legend


def test_a_report_without_a_loss_says_so(load, tmp_path: Path) -> None:
    known = results(load)
    known["results"][0]["rows"].pop(3)
    load("performance_report").write_report(known, tmp_path / "performance.md")
    assert "Nowhere in these tables." in (tmp_path / "performance.md").read_text()
