"""What this machine is and can do: the facts behind `rarefy doctor`."""

import time
from dataclasses import dataclass
from statistics import median
from typing import Any, final

import numpy as np

from rarefy.kernels.cpu import available_cpus, cpu_model, last_level_cache_bytes
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
        num_bytes: size of the buffer that the passes go through.
        num_streams: places far apart that each thread read side by side in the fastest pass.
        prefetch_bytes: how far ahead it prefetched in each, 0 for not at all.
        how: "native" or "numpy".
    """

    bytes_per_s: float
    low: float
    high: float
    num_threads: int
    num_bytes: int
    num_streams: int
    prefetch_bytes: int
    how: str


@final
class BandwidthProbe:
    """A buffer several times the last-level cache, to be read between other measurements.

    One reading is the best of short passes with several numbers of streams and prefetch distances, so that it is what
    the machine gives at that moment and not what one way of reading happens to reach. Without the extension numpy
    sums the buffer, on one thread.
    """

    def __init__(self, num_bytes: int | None = None) -> None:
        """Allocate the buffer.

        Args:
            num_bytes: its size; default: eight times the last-level cache, between 256 MiB and 1 GiB.
        """
        if num_bytes is None:
            num_bytes = min(max(8 * last_level_cache_bytes(), 256 << 20), 1 << 30)
        self.num_bytes = num_bytes
        module = native()
        self._native = None if module is None else module.BandwidthProbe(num_bytes)
        self._words = np.ones(num_bytes // 8, np.int64) if module is None else None

    def read(self) -> tuple[float, int, int]:
        """Read once, with the threads of the pool: bytes/s, streams and prefetch distance of the fastest pass."""
        if self._native is not None:
            rate, num_streams, prefetch_bytes = self._native.read_best(max(self.num_bytes // 4, 1 << 20))
            return float(rate), int(num_streams), int(prefetch_bytes)
        assert self._words is not None
        start = time.perf_counter()
        self._words.sum()
        return self._words.nbytes / (time.perf_counter() - start), 1, 0

    def measure(self, *, repeats: int) -> Bandwidth:
        """Read `repeats` times, after one reading that does not count."""
        self.read()
        readings = [self.read() for _ in range(repeats)]
        rates = [rate for rate, _, _ in readings]
        best = max(readings)
        how = "numpy" if self._native is None else "native"
        return Bandwidth(
            median(rates), min(rates), max(rates), get_num_threads(), self.num_bytes, best[1], best[2], how
        )


def measure_bandwidth(*, num_bytes: int | None = None, repeats: int = 15) -> Bandwidth:
    """The most that a product of one row can reach on this machine; see `BandwidthProbe`."""
    return BandwidthProbe(num_bytes).measure(repeats=repeats)


def measure_fork_join() -> float | None:
    """Median seconds of a job in which every thread takes part and does nothing; None without the extension."""
    module = native()
    return None if module is None else float(module.measure_fork_join())


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
