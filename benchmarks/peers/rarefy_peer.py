"""rarefy itself."""

from collections.abc import Iterator

import numpy as np

from peers.problem import GROUP_SIZE, PATTERNS, Contestant, Problem
from rarefy import kernels
from rarefy.core.grids import to_bf16_bits
from rarefy.layouts import FORMATS, Layout

_KINDS = (
    ("dense-f32-v1", "float32", ""),
    ("dense-bf16-v1", "bfloat16", ""),
    ("dense-int8-v1", "int8", ""),
    ("dense-int4-v1", "int4", ""),
    ("bitmask-int8-v1", "int8", "50 %"),
    ("bitmask-int8-v1", "int8", "80 %"),
    ("bitmask-int4-v1", "int4", "50 %"),
    ("nm-int4-v1", "int4", "2:4"),
    ("nm-int4-v1", "int4", "87.5 %"),
)
"""Format, values and zeros."""


def contestants(problem: Problem) -> Iterator[Contestant]:
    kernels.set_num_threads(problem.num_threads)
    for layout_format, values, zeros in _KINDS:
        first = kernels.prepare(_layout(problem, layout_format, 0, zeros))
        count = problem.num_copies(first.read_nbytes)
        copies = [first, *(kernels.prepare(_layout(problem, layout_format, copy, zeros)) for copy in range(1, count))]

        def run(copies: list[kernels.Prepared] = copies) -> list[np.ndarray]:
            kernels.set_num_threads(problem.num_threads)
            return [copy.matmul(problem.x_TI) for copy in copies]

        note = f"{layout_format}, {first.isa}"
        name = f"{values} {zeros} zeros" if zeros else values
        yield Contestant("rarefy", name, note, first.read_nbytes, count, run, list, zeros=zeros)


def _layout(problem: Problem, layout_format: str, copy: int, zeros: str = "") -> Layout:
    shape = [problem.num_outputs, problem.num_inputs]
    if layout_format == "dense-f32-v1":
        return FORMATS[layout_format].from_arrays(layout_format, {"shape": shape}, {"values": problem.weight(copy)})
    if layout_format == "dense-bf16-v1":
        bits = to_bf16_bits(problem.weight(copy))
        return FORMATS[layout_format].from_arrays(layout_format, {"shape": shape}, {"values": bits})
    four_bits = "int4" in layout_format
    codes_OI = (problem.level(copy) + np.int16(8 if four_bits else 128)).astype(np.uint8)
    group_size = GROUP_SIZE if four_bits else None
    scales = problem.group_scales(copy) if four_bits else problem.scale(copy)[:, None]
    meta: dict[str, object] = {"shape": shape, "group_size": group_size, "symmetric": True}
    arrays = {"scales": to_bf16_bits(scales)}
    if zeros:
        mask_OI = np.roll(problem.mask(zeros), copy, axis=0)
        arrays["mask"] = np.packbits(mask_OI, axis=1, bitorder="little")
        stream = codes_OI[mask_OI]
        if layout_format.startswith("nm"):
            meta["keep"], meta["group"] = PATTERNS[zeros]
        else:
            meta["num_values"] = stream.size
        if four_bits and stream.size % 2:
            stream = np.append(stream, np.uint8(0))
        arrays["codes"] = problem.nibbles(stream[None, :])[0] if four_bits else stream
    else:
        arrays["codes"] = problem.nibbles(codes_OI) if four_bits else codes_OI
    return FORMATS[layout_format].from_arrays(layout_format, meta, arrays)
