"""Which kernel runs a product: a pure function of the operation, the format, the shape and the CPU's flags."""

import functools
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final, final

from rarefy.core.errors import UsageError
from rarefy.kernels.cpu import CpuFlags
from rarefy.kernels.extension import ISAS, extension_status, native
from rarefy.layouts.sum import PARTS

_AVX2: Final = ("avx2", "fma", "f16c", "bmi2")
_AVX512: Final = (
    *_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512vbmi", "avx512_vbmi2"
)  # fmt: skip
_AVX512_BF16: Final = (*_AVX512, "avx512_bf16")
_NEEDS: Final[dict[str, tuple[str, ...]]] = {
    "numpy": (),
    "reference": (),
    "neon": ("asimddp",),
    "avx2": _AVX2,
    "avx_vnni": (*_AVX2, "avx_vnni"),
    "avx512": _AVX512,
    "avx512_bf16": _AVX512_BF16,
    "amx": (*_AVX512_BF16, "amx_tile", "amx_int8", "amx_bf16"),
}
# formats that run through the kernels of others; a sum needs those of its parts, so all
_RUNS_AS: Final[dict[str, tuple[str, ...]]] = {
    "lowrank-bf16-v1": ("dense-bf16-v1",),
    "lowrank-int8-v1": ("dense-int8-v1",),
    "tapwise-bf16-v1": ("dense-bf16-v1",),
    "sum-v1": tuple(PARTS),
}


@final
@dataclass(frozen=True)
class Kernel:
    """One implementation of `op` for weights in `format`."""

    op: str
    format: str
    isa: str


@functools.cache
def compiled_kernels() -> frozenset[Kernel]:
    """Kernels in the extension, and what runs through them; empty where it is missing."""
    module = native() if extension_status()[0] else None
    rows = set() if module is None else {Kernel(*row) for row in module.kernel_list()}
    for isa in {row.isa for row in rows}:
        for format, others in _RUNS_AS.items():
            if all(Kernel("matmul", other, isa) in rows for other in others):
                rows.add(Kernel("matmul", format, isa))
    return frozenset(rows)


def runnable_isas(cpu: CpuFlags) -> tuple[str, ...]:
    """Instruction sets the CPU can execute, slowest first."""
    return tuple(isa for isa in ISAS if all(getattr(cpu, flag) for flag in _NEEDS[isa]))


def select(
    op: str,
    format: str,
    shape: tuple[int, int],
    cpu: CpuFlags,
    *,
    cap: str | None = None,
    compiled: AbstractSet[Kernel] | None = None,
) -> Kernel:
    """The fastest kernel that the CPU can run.

    Args:
        op: "matmul".
        format: layout format, for example "bitmask-int4-v1".
        shape: (O, I) of the weight. Every kernel of today takes every shape; it is here for those that will not.
        cpu: flags to choose for; need not be those of this machine.
        cap: do not choose a faster instruction set than this one.
        compiled: kernels to choose from beside numpy, which runs everything; default: those of the extension.

    Raises:
        UsageError: the operation, the cap or the shape is unknown or impossible.
    """
    if op != "matmul":
        raise UsageError("kernel operation", repr(op), allowed="matmul")
    if min(shape) < 0:
        raise UsageError("kernel shape", str(shape), allowed="two sizes of at least 0")
    if cap is not None and cap not in ISAS:
        raise UsageError("instruction set", repr(cap), allowed=", ".join(ISAS))
    available = compiled_kernels() if compiled is None else compiled
    allowed = ISAS if cap is None else ISAS[: ISAS.index(cap) + 1]
    for isa in reversed(runnable_isas(cpu)):
        kernel = Kernel(op, format, isa)
        if isa in allowed and (isa == "numpy" or kernel in available):
            return kernel
    raise AssertionError("numpy runs on every CPU")
