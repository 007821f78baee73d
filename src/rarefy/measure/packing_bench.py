"""`rarefy bench --kernels --packing`: what a user waits for besides products, on one thread.

Three steps: `pack`, from a solution in float32 to a layout; `check`, everything that a loader verifies of stored
arrays; `repack`, from the layout to what the kernels read.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, cast

import numpy as np

from rarefy.core.errors import LayoutError
from rarefy.core.grids import from_bf16_bits
from rarefy.kernels import get_num_threads, prepare, set_num_threads
from rarefy.layouts import FORMATS, Binary, Layout, LookupTable, LowRank, Sum, Tapwise, Ternary, pack, unpack
from rarefy.layouts.packing import AnyLayout
from rarefy.measure.kernel_bench import check_shapes, find_samples

STEPS = ("pack", "check", "repack")


def bench_packing(
    *,
    layouts: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    rounds: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Time the steps on one thread, each `rounds` times after one that does not count.

    Args:
        layouts: formats; none: every one for which a compiled kernel is chosen on this machine.
        shapes: (O, I) of the weights.
        rounds: timed rounds.
        progress: called with (layouts done, layouts in all).

    Returns:
        One row per layout and shape: layout, note (of its sample), parameters, shape, threads, isa, num_rounds and, for
        each step, weights_per_s of the median round (entries of the matrix, zeros too; None for `pack` of low-rank
        pairs and sums, which methods make out of parts) with its _low and _high. Where there is a `pack`, its bytes
        were compared.

    Raises:
        UsageError: an unknown layout, or a shape out of range.
        LayoutError: packing what a layout holds gives other bytes.
    """
    chosen = find_samples(layouts)
    check_shapes(shapes)
    before = get_num_threads()
    found: list[dict[str, Any]] = []
    try:
        set_num_threads(1)
        for shape in shapes:
            for sample in chosen:
                if progress is not None:
                    progress(len(found), len(chosen) * len(shapes))
                layout = cast(AnyLayout, sample.make(shape)[0])
                row = {
                    "layout": layout.format,
                    "note": sample.note,
                    "parameters": dict(sample.parameters),
                    "shape": list(shape),
                    "threads": 1,
                    "isa": prepare(layout).isa,
                    "num_rounds": rounds,
                }
                for step, work in zip(STEPS, _steps(layout), strict=True):
                    row |= _rates(step, None if work is None else _times(work, rounds), shape[0] * shape[1])
                found.append(row)
    finally:
        set_num_threads(before)
    return found


def _steps(layout: AnyLayout) -> tuple[Callable[[], object] | None, Callable[[], object], Callable[[], object]]:
    cls, meta, arrays = FORMATS[layout.format], layout.meta(), layout.arrays()
    packer = _packer(layout)
    if packer is not None:
        made = packer()
        same = made.format == layout.format and made.meta() == meta
        if not same or any(not np.array_equal(array, arrays[name]) for name, array in made.arrays().items()):
            raise LayoutError(layout.format, "packing what it holds gives other bytes")
    return packer, lambda: cls.from_arrays(layout.format, meta, arrays), lambda: prepare(layout)


def _packer(layout: AnyLayout) -> Callable[[], Layout] | None:
    match layout:
        case LowRank() | Tapwise() | Sum():
            return None
        case Ternary() | Binary():
            weight_OI = layout.to_dense()
            return lambda: type(layout).from_dense(weight_OI, layout.group_size)
        case LookupTable():
            scale_OG = None if layout.scales is None else from_bf16_bits(layout.scales)
            code_OI, table_K = layout.codes_OI(), layout.table_K
            return lambda: LookupTable.from_codes(code_OI, table_K, scale_OG=scale_OG, group_size=layout.group_size)
        case _:
            solution = unpack(layout)
            return lambda: pack(solution, float_format="f32" if layout.format == "dense-f32-v1" else "bf16")


def _times(work: Callable[[], object], rounds: int) -> list[float]:
    times = []
    for _ in range(rounds + 1):
        start = time.thread_time()  # of the processor: what else the machine does matters less
        work()
        times.append(time.thread_time() - start)
    return times[1:]


def _rates(step: str, times: Sequence[float] | None, num_weights: int) -> Mapping[str, float | None]:
    name = f"{step}_weights_per_s"
    if times is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {
        name: num_weights / median(times),
        f"{name}_low": num_weights / max(times),
        f"{name}_high": num_weights / min(times),
    }
