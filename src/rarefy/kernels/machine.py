"""What this machine is and can do: the facts behind `rarefy doctor`."""

import time
from dataclasses import dataclass
from statistics import median
from typing import Any, final

import numpy as np

from rarefy.kernels.cpu import available_cpus, cpu_model
from rarefy.kernels.dispatch import compiled_kernels, select
from rarefy.kernels.extension import ISAS, detect_cpu, extension_status, get_num_threads, isa_cap, native
from rarefy.layouts import FORMATS


@final
@dataclass(frozen=True)
class Bandwidth:
    """Read bandwidth of main memory.

    Attributes:
        bytes_per_s: median over the repeats.
        low: slowest repeat, bytes/s.
        high: fastest repeat, bytes/s.
        num_threads: threads that read together.
        num_bytes: size of the buffer, read once per repeat.
        num_streams: places far apart that each thread reads in turn; the number that is fastest here.
        how: "native" or "numpy".
    """

    bytes_per_s: float
    low: float
    high: float
    num_threads: int
    num_bytes: int
    num_streams: int
    how: str


def measure_bandwidth(
    *, num_bytes: int = 256 << 20, num_streams: tuple[int, ...] = (1, 2, 4, 8), repeats: int = 5
) -> Bandwidth:
    """Read a buffer larger than the caches with every thread of the pool: what a product of one row can reach.

    Args:
        num_bytes: buffer size; should be several times the last-level cache.
        num_streams: numbers of streams per thread to try, each 1 to 16; the best one is the answer.
        repeats: timed passes for each, after one that is not timed.
    """
    num_threads = get_num_threads()
    module = native()
    if module is None:
        buffer = np.ones(num_bytes // 8, np.int64)
        rates = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            buffer.sum()
            rates.append(buffer.nbytes / (time.perf_counter() - start))
        return _bandwidth(rates, num_threads, num_bytes, 1, "numpy")
    results = []
    for streams in num_streams:
        seconds = module.read_seconds(num_bytes, streams, repeats + 1)
        results.append(_bandwidth([num_bytes / s for s in seconds], num_threads, num_bytes, streams, "native"))
    return max(results, key=lambda result: result.bytes_per_s)


def _bandwidth(rates: list[float], num_threads: int, num_bytes: int, num_streams: int, how: str) -> Bandwidth:
    timed = rates[1:]
    return Bandwidth(median(timed), min(timed), max(timed), num_threads, num_bytes, num_streams, how)


def describe_cpu() -> dict[str, Any]:
    """Facts for `rarefy doctor`, JSON-able.

    Returns:
        `model`: name of the CPU; `flags`: instruction sets it has; `cpus`: CPUs this process may use; `num_threads`:
        threads of the kernels; `extension`: whether the compiled kernels are there; `extension_error`: why not, else
        ""; `isa_cap`: what RAREFY_ISA allows, or None; `chosen`: format -> instruction set of its products;
        `compiled`: instruction set -> formats with a kernel for it.

    Raises:
        UsageError: RAREFY_ISA or RAREFY_NUM_THREADS is invalid.
    """
    cpu = detect_cpu()
    present, reason = extension_status()
    cap = isa_cap()
    return {
        "model": cpu_model(),
        "flags": list(cpu.names()),
        "cpus": available_cpus(),
        "num_threads": get_num_threads() if present else 1,
        "extension": present,
        "extension_error": reason,
        "isa_cap": cap,
        "chosen": {name: select("matmul", name, (1, 1), cpu, cap=cap).isa for name in FORMATS},
        "compiled": {
            isa: sorted(k.format for k in compiled_kernels() if k.isa == isa) for isa in ISAS if isa != "numpy"
        },
    }
