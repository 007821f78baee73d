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
        num_streams: places far apart that each thread reads in turn.
        how: "native" or "numpy".
    """

    bytes_per_s: float
    low: float
    high: float
    num_threads: int
    num_bytes: int
    num_streams: int
    how: str


def measure_bandwidth(*, num_bytes: int = 256 << 20, num_streams: int = 8, repeats: int = 5) -> Bandwidth:
    """Read a buffer larger than the caches with every thread of the pool, several streams per thread.

    Args:
        num_bytes: buffer size; should be several times the last-level cache.
        num_streams: streams per thread, 1 to 16.
        repeats: timed passes, after one that is not timed.
    """
    num_threads = get_num_threads()
    module = native()
    rates: list[float] = []
    if module is None:
        num_streams = 1
        buffer = np.ones(num_bytes // 8, np.int64)
        for _ in range(repeats + 1):
            start = time.perf_counter()
            buffer.sum()
            rates.append(buffer.nbytes / (time.perf_counter() - start))
    else:
        rates = [num_bytes / seconds for seconds in module.read_seconds(num_bytes, num_streams, repeats + 1)]
    rates = rates[1:]
    how = "numpy" if module is None else "native"
    return Bandwidth(median(rates), min(rates), max(rates), num_threads, num_bytes, num_streams, how)


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
        "num_threads": get_num_threads(),
        "extension": present,
        "extension_error": reason,
        "isa_cap": cap,
        "chosen": {name: select("matmul", name, (1, 1), cpu, cap=cap).isa for name in FORMATS},
        "compiled": {
            isa: sorted(k.format for k in compiled_kernels() if k.isa == isa) for isa in ISAS if isa != "numpy"
        },
    }
