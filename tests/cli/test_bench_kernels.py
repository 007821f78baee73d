"""`rarefy bench --kernels`: what it prints, and what it refuses."""

import json
import re
from collections.abc import Callable

import pytest

from rarefy.layouts import FORMATS

COMMAND = ("bench", "--kernels", "--shape", "1024x2048", "--shape", "64x96", "--rounds", 1, "--threads", 1)


def test_the_table_fits_a_terminal_and_names_every_product(run: Callable) -> None:
    done = run(*COMMAND, "--layout", "bitmask-int4-v1", "--layout", "nm-bf16-v1", "--rows", 1, "--rows", 2)
    assert done.code == 0, done.err
    assert max(len(line) for line in done.out.splitlines()) <= 80
    titles = [line for line in done.out.splitlines() if " x " in line]
    assert [title.split(",")[0] for title in titles] == ["1024 x 2048", "64 x 96"]
    assert all("B/s (1 thr)" in title for title in titles)
    for name in ("bitmask-int4-v1", "nm-bf16-v1 2:4", "nm-bf16-v1 8:64"):
        assert sum(line.startswith(name + " ") for line in done.out.splitlines()) == 4


def test_every_number_of_the_table_is_legible(run: Callable) -> None:
    """Microseconds too, and beside the longest names."""
    names = ("block-int8-v1", "bitmask-bf16-v1", "tapwise-bf16-v1")
    layouts = [word for name in names for word in ("--layout", name)]
    arguments = ("--shape", "1x1", "--shape", "640x1000", "--rows", 1, "--rows", 128, "--rounds", 1)
    done = run("bench", "--kernels", *layouts, *arguments)
    assert done.code == 0, done.err
    assert "…" not in done.out
    for line in done.out.splitlines():
        if line.startswith(names):
            assert re.fullmatch(r"[0-9.]+", line.split("-v1")[1].removeprefix(" 50 %").removeprefix(" 75 %").split()[2])
    assert "which holds them" in done.out


def test_json_is_a_list_of_rows(run: Callable) -> None:
    rows = json.loads(run(*COMMAND, "--layout", "dense-int8-v1", "--rows", 1, "--json").out)
    assert [row["shape"] for row in rows] == [[1024, 2048], [64, 96]]
    fields = {"layout", "shape", "rows", "threads", "isa", "ms", "bytes", "bandwidth_fraction", "checked"}
    assert fields <= set(rows[0])


def test_packing_is_timed(run: Callable) -> None:
    command = ("bench", "--kernels", "--packing", "--shape", "40x200", "--rounds", 2)
    done = run(*command)
    assert done.code == 0, done.err
    assert max(len(line) for line in done.out.splitlines()) <= 80
    rows = json.loads(run(*command, "--json").out)
    assert {row["layout"] for row in rows} == set(FORMATS)
    for row in rows:
        assert f"\n{row['layout']} " in done.out
        for step in ("check", "repack", *(["pack"] if row["pack_weights_per_s"] is not None else [])):
            low, median, high = (row[f"{step}_weights_per_s{end}"] for end in ("_low", "", "_high"))
            assert 0 < low <= median <= high
    assert {row["layout"] for row in rows if row["pack_weights_per_s"] is None} == {
        *("lowrank-bf16-v1", "lowrank-int8-v1", "tapwise-bf16-v1", "sum-v1"),
    }


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--kernels", "--layout", "nonsense"), "--layout: 'nonsense'; allowed: dense-f32-v1"),
        (("--kernels", "--shape", "5"), "--shape: '5'; allowed: OUTxIN"),
        (("--kernels", "--shape", "5x-1"), "--shape: '5x-1'"),
        (("--kernels", "--threads", 99_999), "--threads: 99999; allowed: 1 to"),
        (("--kernels", "--rows", 0), "--rows: 0"),
        (("--packing",), "--packing: given without --kernels"),
        (("--kernels", "--packing", "--threads", 1), "--packing: given together with --rows or --threads"),
        (("--kernels", "--packing", "--shape", "0x5"), "--shape: 0x5"),
        (("--kernels", "model"), "MODEL: given together with --kernels"),
        (("--kernels", "--decode-tokens", 4), "--decode-tokens: given together with --kernels"),
        (("model", "--layout", "dense-int4-v1"), "--layout: given without --kernels"),
        (("model", "--threads", 1, "--threads", 2), "--threads: given more than once"),
        ((), "no model; allowed: one MODEL or more, or --kernels"),
    ],
)
def test_what_is_refused(run: Callable, arguments: tuple, complaint: str) -> None:
    done = run("bench", *arguments)
    assert done.code == 2
    assert complaint in done.err
    assert done.out == ""
