"""Times rarefy's products beside those of other libraries and writes docs/performance.md: see benchmarks/README.md.

    python benchmarks/performance.py [--results FILE] [--only PART]... [--rounds N]

Every setting (shape, rows, threads, instruction set) runs in a process of its own, in which the contestants take turns.
Results are kept in FILE as they come, and settings that it has already are not measured again.
"""

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from peers.problem import MAX_RELATIVE_ERROR, Contestant, Missing, Problem
from performance_report import write_report

from rarefy.kernels import BandwidthProbe, available_cpus, describe_cpu, last_level_cache_bytes, set_num_threads
from rarefy.measure.latency import interleave

SHAPES = ((4096, 4096), (11008, 4096), (2048, 5632))
SMALL_SHAPES = ((384, 384), (1536, 384))  # those of MiniLM
PEERS = ("rarefy", "torch", "onnxruntime", "openvino", "ggml")
ONLY_DEFAULT = ("onnxruntime",)  # of the others, ggml has a build of its own for each instruction set
ROWS = (1, 4, 16, 128)  # of the first shape; the first and the last of the others
GGML = "RAREFY_BENCH_GGML"
# OpenVINO makes no products of integers below AVX2_VNNI, so that only the second compares like with like.
_NO_AVX512 = {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "ATEN_CPU_CAPABILITY": "avx2"}
ISAS = {"avx2": {"RAREFY_ISA": "avx2", **_NO_AVX512}, "avx_vnni": {"RAREFY_ISA": "avx_vnni", **_NO_AVX512}}
_FEWEST_PRODUCTS = 500_000_000  # of numbers, in what is timed at once: a millisecond or more
PACKAGES = ("torch", "onnxruntime", "openvino", "numpy", "rarefy")


@dataclass(frozen=True)
class Timed:
    """A contestant in `interleave`: as many untimed passes over its copies as timed ones, the last results checked."""

    contestant: Contestant
    problem: Problem

    @property
    def name(self) -> str:
        return self.contestant.name

    def run(self) -> dict[str, float]:
        time.sleep(0.005)  # threads of the one before that still spin go to sleep
        # Small products come many in a row, as in a model: two of them would time how threads wake.
        in_one_pass = self.contestant.num_copies * self.problem.num_products
        num_passes = math.ceil(_FEWEST_PRODUCTS / in_one_pass)
        for _ in range(num_passes):
            self.contestant.run()
        start = time.perf_counter()
        for _ in range(num_passes):
            results = self.contestant.run()
        seconds = (time.perf_counter() - start) / num_passes
        error = self.contestant.worst_error(self.problem, results)
        if not error <= MAX_RELATIVE_ERROR:
            raise SystemExit(f"{self.name}: relative error {error:.3g}; allowed: {MAX_RELATIVE_ERROR}")
        return {"product": seconds / self.contestant.num_copies}


@dataclass(frozen=True)
class Reading:
    """The memory itself, in every round like a contestant."""

    probe: BandwidthProbe
    num_threads: int
    name: str = "memory"

    def run(self) -> dict[str, float]:
        time.sleep(0.005)
        set_num_threads(self.num_threads)
        return {"product": 1e9 / self.probe.read()[0]}


def measure(setting: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Run one setting in this process."""
    problem = Problem(*setting["shape"], setting["rows"], setting["threads"])
    contestants: list[Contestant] = []
    left_out: dict[str, str] = {}
    for peer in PEERS:
        if setting["isa"] in ISAS and peer in ONLY_DEFAULT:
            left_out[peer] = "cannot be told to leave out AVX-512"
            continue
        try:
            found = list(importlib.import_module(f"peers.{peer}_peer").contestants(problem))
        except (ImportError, OSError, RuntimeError) as error:
            found, left_out[peer] = [], f"{type(error).__name__}: {error}"
        if not found:
            left_out.setdefault(peer, "not installed")
        left_out |= {missing.name: missing.reason for missing in found if isinstance(missing, Missing)}
        contestants += [contestant for contestant in found if isinstance(contestant, Contestant)]
    timed = [Timed(contestant, problem) for contestant in contestants]
    timings = interleave([Reading(BandwidthProbe(), problem.num_threads), *timed], rounds=rounds, warmup=1)
    bandwidth = timings.rate("memory", "product", 1e9)
    rows = []
    for contestant in contestants:
        seconds = timings.seconds(contestant.name, "product")
        rows.append({
            "peer": contestant.peer,
            "values": contestant.values,
            "note": contestant.note,
            "facts": contestant.facts,
            "bytes": contestant.weight_bytes,
            "num_copies": contestant.num_copies,
            "ms": seconds.median * 1e3,
            "ms_low": seconds.low * 1e3,
            "ms_high": seconds.high * 1e3,
            "bandwidth_fraction": contestant.weight_bytes / seconds.median / bandwidth.median,
            # How much longer than each of rarefy's contestants, round by round.
            "ratios": {
                ours.values: timings.ratio(ours.name, contestant.name, "product").to_json()
                for ours in contestants
                if ours.peer == "rarefy"
            },
        })  # fmt: skip
    return {"setting": setting, "bandwidth": bandwidth.to_json(), "rows": rows, "left_out": left_out}


def settings() -> list[dict[str, Any]]:
    """What is measured, in this order."""
    threads = sorted({1, available_cpus()})
    every = [
        {"part": "peers", "shape": shape, "rows": rows, "threads": count, "isa": "default"}
        for shape in (*SHAPES, *SMALL_SHAPES)
        for rows in (ROWS if shape == SHAPES[0] else (1, 128) if shape in SHAPES else (128,))
        for count in threads
    ]
    every += [{"part": "layouts", "shape": shape, "isa": "default"} for shape in SHAPES]
    flags = describe_cpu()["flags"]
    if "avx512f" in flags:
        every += [
            {"part": "peers", "shape": SHAPES[0], "rows": rows, "threads": count, "isa": isa}
            for isa in ISAS
            if isa in flags
            for rows in (1, 128)
            for count in threads
        ]
        every.append({"part": "layouts", "shape": SHAPES[0], "isa": "avx2"})
    return [{**setting, "shape": list(setting["shape"])} for setting in every]


def run_setting(setting: dict[str, Any], rounds: int) -> Any:
    """Run one setting in a process of its own."""
    environment = dict(os.environ)
    isa = setting["isa"]
    if isa in ISAS:
        environment |= {**ISAS[isa], GGML: os.environ.get(f"{GGML}_{isa.upper()}", "")}
    if setting["part"] == "layouts":
        shape = "{}x{}".format(*setting["shape"])
        command = ["-m", "rarefy", "bench", "--kernels", "--shape", shape, "--rounds", str(rounds), "--json"]
    else:
        command = [__file__, "--rounds", str(rounds), "--one", json.dumps(setting)]
    done = subprocess.run([sys.executable, *command], env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{setting}: the process ended with code {done.returncode}")
    result = json.loads(done.stdout)
    return {"setting": setting, "rows": result} if setting["part"] == "layouts" else result


def machine() -> dict[str, Any]:
    """What the report says about the machine and the versions."""
    facts = describe_cpu()
    return {
        "cpu": facts["model"],
        "cpus": facts["cpus"],
        "flags": facts["flags"],
        "last_level_cache_bytes": last_level_cache_bytes(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "ggml": os.environ.get("RAREFY_BENCH_GGML_VERSION", ""),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("performance-results.json"))
    parser.add_argument("--only", action="append", help='measure settings whose JSON contains this, such as "4096"')
    parser.add_argument("--rounds", type=int, default=9)
    default_report = Path(__file__).parent.parent / "docs" / "performance.md"
    report_help = "Markdown file to write; the picture of X.md goes beside it, as X-roofline.svg (default: %(default)s)"
    parser.add_argument("--report", type=Path, default=default_report, help=report_help)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one, arguments.rounds)))
        return
    known = json.loads(arguments.results.read_text()) if arguments.results.exists() else {"results": []}
    for setting in settings():
        text = json.dumps(setting)
        if arguments.only and not all(part in text for part in arguments.only):
            continue
        if any(result["setting"] == setting for result in known["results"]):
            continue
        print(text, file=sys.stderr)
        known["results"].append(run_setting(setting, arguments.rounds))
        known["machine"] = machine()
        arguments.results.write_text(json.dumps(known, indent=1))
    write_report(known, arguments.report)


if __name__ == "__main__":
    main()
