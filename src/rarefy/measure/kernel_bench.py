"""`rarefy bench --kernels`: rarefy's products timed on this machine, against the read bandwidth of its memory.

Shapes: T rows of activations, O outputs, I inputs, P outputs that differ from each other (kernel_samples.py).
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from rarefy.core.errors import NonFiniteError, UsageError
from rarefy.core.results import Spread
from rarefy.kernels import (
    BandwidthProbe,
    Prepared,
    available_cpus,
    describe_cpu,
    get_num_threads,
    last_level_cache_bytes,
    prepare,
    set_num_threads,
)
from rarefy.kernels.reference import (
    BLOCK,
    is_bf16,
    is_integer,
    multiplied_weights,
    quantize_activations,
    round_activations,
)
from rarefy.layouts import FORMATS, Layout, LookupTable, LowRank, Sum, Tapwise
from rarefy.measure.kernel_samples import Sample, samples_of
from rarefy.measure.latency import Timings, interleave

Float32Array = NDArray[np.float32]
_Float64Array = NDArray[np.float64]

SHAPES: Final = ((4096, 4096), (11008, 4096), (2048, 5632))
ROWS: Final = (1, 128)
MAX_ROWS: Final = 4096
MAX_SIZE: Final = 1 << 20
ROUNDS: Final = 9

_CACHE_MULTIPLE: Final = 3
_MAX_COPIES: Final = 4096
_MEMORY_BUDGET_BYTES: Final = 2_000_000_000
_BATCH_SECONDS: Final = 0.006


@final
@dataclass(frozen=True)
class _Product:
    """One row of the result: a contestant for `interleave`, which multiplies with one copy of the weight after another.

    Attributes:
        name: unique.
        copies: the same weight, prepared several times, and where the next batch starts.
        x_TI: activations.
        expected_TO: the right outputs, bit for bit; see `_verified`.
        num_threads: threads of the kernel.
        calls: products in one round.
    """

    name: str
    copies: "_Copies"
    x_TI: Float32Array
    expected_TO: Float32Array
    num_threads: int
    calls: int

    def run(self) -> Mapping[str, float]:
        """Time one batch after an untimed one, each product with another copy, and check every result.

        Each goes away before the next is made: new memory for many rows takes a tenth of the time of their product.
        """
        set_num_threads(self.num_threads)
        if self.calls > 1:
            # Wakes the threads and fetches code and tables that what ran before has displaced; the copies stay cold.
            for weight in self.copies.take(self.calls):
                weight.matmul(self.x_TI)
        seconds, right = 0.0, True
        for weight in self.copies.take(self.calls):
            start = time.perf_counter()
            y_TO = weight.matmul(self.x_TI)
            seconds += time.perf_counter() - start
            right &= np.array_equal(y_TO, self.expected_TO)
            del y_TO
        if not right:
            raise NonFiniteError(self.name, "a timed product is wrong", hint="its time means nothing")
        return {"product": seconds / self.calls}


@final
class _Copies:
    """Copies of one prepared weight that exceed the caches together, handed out in turn."""

    def __init__(self, layout: Layout, first: Prepared, count: int) -> None:
        self.prepared = [first, *(prepare(layout) for _ in range(count - 1))]
        self._next = 0

    def take(self, count: int) -> list[Prepared]:
        """The next `count` copies."""
        taken = [self.prepared[(self._next + i) % len(self.prepared)] for i in range(count)]
        self._next = (self._next + count) % len(self.prepared)
        return taken


@final
@dataclass(frozen=True)
class _Reading:
    """The read bandwidth as a contestant: once in every round for every number of threads."""

    name: str
    probe: BandwidthProbe
    num_threads: int

    def run(self) -> Mapping[str, float]:
        """Seconds per gigabyte."""
        set_num_threads(self.num_threads)
        return {"read": 1e9 / self.probe.read()[0]}


@final
@dataclass(frozen=True)
class _Weight:
    """A sample of one shape with its copies."""

    sample: Sample
    shape: tuple[int, int]
    layout_bytes: int
    small: Layout
    copies: _Copies


def bench_kernels(
    *,
    layouts: Sequence[str] = (),
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rows: Sequence[int] = ROWS,
    threads: Sequence[int] = (),
    rounds: int = ROUNDS,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Time products with cold weights, in interleaved rounds, with the read bandwidth measured in every round.

    Args:
        layouts: formats; default: every one for which a compiled kernel is chosen on this machine.
        shapes: (O, I) of the weights.
        rows: rows of activations.
        threads: numbers of threads; default: 1, and all.
        rounds: timed rounds, after one for warm-up.
        progress: called with (runs done, runs in all).

    Returns:
        One row per product: layout, note (of its sample), parameters, shape, rows, threads, isa, ms (median), ms_low,
        ms_high, num_rounds, bytes (of the packed weight in memory, all of which a product reads), layout_bytes (on
        disk), bandwidth_bytes_per_s (median of the readings with the same threads in the same rounds),
        bandwidth_fraction (bytes / ms over that), num_copies, cache_multiple (bytes of all copies over the last-level
        cache; they are cold where it is well above 1, which only tiny weights fail to reach), checked.

    Raises:
        UsageError: an unknown layout, or a number out of range.
        NonFiniteError: a product is wrong.
    """
    samples = find_samples(layouts)
    num_cpus = available_cpus()
    for where, numbers, limit in (("rows", rows, MAX_ROWS), ("threads", threads, num_cpus), ("rounds", [rounds], 1000)):
        for number in numbers:
            if not 1 <= number <= limit:
                what = ", the CPUs of this process" if where == "threads" else ""
                raise UsageError(f"--{where}", str(number), allowed=f"1 to {limit}{what}")
    check_shapes(shapes)
    before = get_num_threads()
    num_threads = tuple(dict.fromkeys(threads or (1, before)))
    shapes, rows = tuple(dict.fromkeys(shapes)), tuple(dict.fromkeys(rows))
    total = len(samples) * len(shapes) * len(rows) * len(num_threads) * (rounds + 1)
    done = 0
    probe = BandwidthProbe()
    found: list[dict[str, Any]] = []
    try:
        set_num_threads(before)
        for group in _groups(samples, shapes):
            share = len(group) * len(rows) * len(num_threads) * (rounds + 1)
            report = None if progress is None else _part_of(progress, done, share, total)
            found += _time_group(group, rows, num_threads, rounds, probe, report)
            done += share
            set_num_threads(before)
    finally:
        set_num_threads(before)
    return found


def check_shapes(shapes: Sequence[tuple[int, int]]) -> None:
    """Refuse sizes that are out of range, or need too much memory."""
    for shape in shapes:
        if not all(1 <= size <= MAX_SIZE for size in shape):
            raise UsageError("--shape", f"{shape[0]}x{shape[1]}", allowed=f"sizes from 1 to {MAX_SIZE}")
        needed = 12 * shape[0] * shape[1]
        if needed > _MEMORY_BUDGET_BYTES:
            raise UsageError(
                "--shape",
                f"{shape[0]}x{shape[1]} needs up to {needed / 1e9:.1f} GB",
                allowed=f"at most {_MEMORY_BUDGET_BYTES // 12:,} weights",
            )


def find_samples(layouts: Sequence[str]) -> list[Sample]:
    """What to time of these layouts, or of all that a compiled kernel is chosen for."""
    chosen = describe_cpu()["chosen"]
    known = [name for name in FORMATS if samples_of(name)]
    for name in layouts:
        if name not in known:
            raise UsageError("--layout", repr(name), allowed=", ".join(known))
    # Where nothing is compiled, the numpy products are what there is to time.
    compiled = [name for name in known if chosen[name] != "numpy"] or known
    return [sample for name in dict.fromkeys(layouts or compiled) for sample in samples_of(name)]


def _part_of(progress: Callable[[int, int], None], start: int, share: int, total: int) -> Callable[[int, int], None]:
    """Progress of a part of the work that counts its own steps."""
    return lambda done, steps: progress(start + share * done // steps, total)


def _groups(samples: Sequence[Sample], shapes: Sequence[tuple[int, int]]) -> Iterator[list[_Weight]]:
    """The weights that are timed against each other: those of one shape, as far as memory reaches."""
    target_bytes = _CACHE_MULTIPLE * last_level_cache_bytes()
    for shape in shapes:
        group: list[_Weight] = []
        used = 0
        for sample in samples:
            layout, small = sample.make(shape)
            first = prepare(layout)
            count = math.ceil(min(target_bytes, _MEMORY_BUDGET_BYTES / 4) / first.read_nbytes)
            count = min(max(count, 2), _MAX_COPIES)
            if group and used + count * first.nbytes > _MEMORY_BUDGET_BYTES:
                yield group
                group, used = [], 0
            used += count * first.nbytes
            group.append(_Weight(sample, shape, layout.nbytes, small, _Copies(layout, first, count)))
        yield group


def _time_group(
    group: Sequence[_Weight],
    rows: Sequence[int],
    threads: Sequence[int],
    rounds: int,
    probe: BandwidthProbe,
    progress: Callable[[int, int], None] | None,
) -> list[dict[str, Any]]:
    products: list[tuple[_Weight, _Product]] = []
    for weight in group:
        for num_rows in rows:
            rng = np.random.default_rng(num_rows)
            x_TI = rng.standard_normal((num_rows, weight.shape[1]), dtype=np.float32)
            expected_TO = _verified(weight, x_TI)
            for num_threads in threads:
                name = f"{weight.sample.name} {weight.shape} rows {num_rows} threads {num_threads}"
                set_num_threads(num_threads)
                start = time.perf_counter()
                weight.copies.take(1)[0].matmul(x_TI)
                calls = math.ceil(_BATCH_SECONDS / (time.perf_counter() - start))
                calls = max(1, min(calls, len(weight.copies.prepared) - 1))
                products.append((weight, _Product(name, weight.copies, x_TI, expected_TO, num_threads, calls)))
    readings = {count: _Reading(f"read bandwidth, threads {count}", probe, count) for count in threads}
    timings = interleave(
        [*readings.values(), *(product for _, product in products)], rounds=rounds, warmup=1, progress=progress
    )
    return [_row(weight, product, timings, readings[product.num_threads]) for weight, product in products]


def _row(weight: _Weight, product: _Product, timings: Timings, reading: _Reading) -> dict[str, Any]:
    seconds: Spread = timings.seconds(product.name, "product")
    bandwidth = timings.rate(reading.name, "read", 1e9)
    first = weight.copies.prepared[0]
    return {
        "layout": weight.sample.format,
        "note": weight.sample.note,
        "parameters": dict(weight.sample.parameters),
        "shape": list(weight.shape),
        "rows": product.x_TI.shape[0],
        "threads": product.num_threads,
        "isa": first.isa,
        "ms": seconds.median * 1e3,
        "ms_low": seconds.low * 1e3,
        "ms_high": seconds.high * 1e3,
        "num_rounds": seconds.num_runs,
        "bytes": first.read_nbytes,
        "layout_bytes": weight.layout_bytes,
        "bandwidth_bytes_per_s": bandwidth.median,
        "bandwidth_fraction": first.read_nbytes / seconds.median / bandwidth.median,
        "num_copies": len(weight.copies.prepared),
        "cache_multiple": len(weight.copies.prepared) * first.read_nbytes / last_level_cache_bytes(),
        "checked": True,
    }


def _verified(weight: _Weight, x_TI: Float32Array) -> Float32Array:
    """The outputs of the first copy, compared with float64 arithmetic; every other copy must give the same."""
    where = f"{weight.sample.name}, {weight.shape[0]}x{weight.shape[1]}, {x_TI.shape[0]} rows"
    first = weight.copies.prepared[0].matmul(x_TI)
    expected_TP, bound_TP = _expected(weight.small, x_TI, where)
    row_of_O = np.arange(weight.shape[0]) % weight.small.shape[0]
    _require_near(first, expected_TP[:, row_of_O], bound_TP[:, row_of_O], where)
    for other in weight.copies.prepared[1:] if x_TI.shape[0] == 1 else ():
        if not np.array_equal(other.matmul(x_TI), first):
            raise NonFiniteError(weight.sample.name, "two copies of a weight give different products")
    return first


def _expected(layout: Layout, x_TI: Float32Array, where: str) -> tuple[_Float64Array, _Float64Array]:
    """The product in float64, and how far a kernel may be from it.

    The expected product is x_hat @ W^T in float64, where W is what the layout stores and x_hat the activations as the
    reference quantizes them (ADR 0004) or rounds them (ADR 0025), or x itself for other float weights. A kernel's
    float32 sums may differ from it by (n + 4) 2^-24 sum |x_hat w|, to first order, with n additions in a row: one per
    segment of at least 32 columns of exact integers, and for floats 64 in a block and one per block. A low-rank pair
    is two such products, the second of what the first one gave, which is checked by itself; a sum adds once more.
    """
    match layout:
        case LowRank():
            inner_TK = prepare(layout.right).matmul(x_TI)
            _require_near(inner_TK, *_expected(layout.right, x_TI, where), where)
            return _expected(layout.left, inner_TK, where)
        case Tapwise():
            runs = x_TI.reshape(-1, layout.right.shape[1])
            inner = prepare(layout.right).matmul(runs)
            _require_near(inner, *_expected(layout.right, runs, where), where)
            return _expected(layout.left, inner.reshape(len(x_TI), layout.left.shape[1]), where)
        case Sum():
            (first_TO, first_bound_TO), (second_TO, second_bound_TO) = (
                _expected(part, x_TI, where) for part in layout.parts
            )
            bound_TO = first_bound_TO + second_bound_TO
            return first_TO + second_TO, bound_TO + 2.0**-24 * (np.abs(first_TO + second_TO) + bound_TO)
    x_hat_TI: _Float64Array = x_TI.astype(np.float64)
    num_inputs = layout.shape[1]
    if is_integer(layout.format):
        q, scale_TB = quantize_activations(x_TI)
        scale_TI = np.repeat(scale_TB.astype(np.float64), BLOCK, axis=1)
        x_hat_TI = (q.astype(np.float64) * scale_TI)[:, :num_inputs]
        num_additions = math.ceil(num_inputs / 32)
    else:
        columns = 32 if isinstance(layout, LookupTable) else 64  # of the sums that are added up
        num_additions = columns + math.ceil(num_inputs / columns)
        if is_bf16(layout.format):
            x_hat_TI = round_activations(x_TI).astype(np.float64)
    dense_OI = multiplied_weights(layout).astype(np.float64)
    bound_TO = (num_additions + 4) * 2.0**-24 * 1.01 * (np.abs(x_hat_TI) @ np.abs(dense_OI).T)
    return x_hat_TI @ dense_OI.T, bound_TO


def _require_near(y_TO: Float32Array, expected_TO: _Float64Array, bound_TO: _Float64Array, where: str) -> None:
    error_TO = np.abs(y_TO - expected_TO)
    if not np.all(error_TO <= bound_TO):
        worst = float(np.max(error_TO / np.maximum(bound_TO, 1e-300)))
        raise NonFiniteError(
            where, f"the product is {worst:.3g} times as far from the reference as rounding explains, or not a number"
        )
