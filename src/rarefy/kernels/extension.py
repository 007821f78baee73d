"""Loads the compiled extension once, or says once that the slow numpy reference runs instead."""

import dataclasses
import functools
import importlib
import os
import warnings
from types import ModuleType
from typing import Final

from rarefy.core.errors import UsageError
from rarefy.kernels.cpu import MAX_THREADS, CpuFlags, default_num_threads, parse_cpuinfo, read_cpuinfo
from rarefy.kernels.tiles import tiles_agree

ISA_VARIABLE: Final = "RAREFY_ISA"
ISAS: Final = ("numpy", "reference", "neon", "avx2", "avx_vnni", "avx512", "avx512_bf16", "amx")
"""Instruction sets from slowest to fastest: numpy needs no extension, `reference` is plain C++, `neon` is ARM's."""


class SlowReferenceWarning(UserWarning):
    """The compiled kernels are missing, so every product runs in numpy."""


@functools.cache
def _import() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("rarefy._native"), ""
    except ImportError as error:
        return None, str(error)


@functools.cache
def native() -> ModuleType | None:
    """The extension module, its thread pool set up; None, with one warning, where it is missing.

    Raises:
        UsageError: RAREFY_NUM_THREADS is invalid.
    """
    module, reason = _import()
    if module is None:
        warnings.warn(
            f"rarefy's compiled kernels are missing ({reason}): the numpy reference runs instead, which is many times "
            "slower; install a C++17 compiler (g++ or clang++) and reinstall rarefy",
            SlowReferenceWarning,
            stacklevel=2,
        )
        return None
    module.set_num_threads(default_num_threads())
    return module


def extension_status() -> tuple[bool, str]:
    """Whether the extension can be imported, and if not why; never warns."""
    module, reason = _import()
    return module is not None, reason


@functools.cache
def detect_cpu() -> CpuFlags:
    """Flags of this machine's CPU: from the extension, else from /proc/cpuinfo, else none.

    Where AMX's products are wrong, with one warning those without AMX.
    """
    module, _ = _import()
    if module is None:
        return parse_cpuinfo(read_cpuinfo())
    flags = CpuFlags(**module.cpu_flags())
    if flags.amx_tile and flags.amx_int8 and flags.amx_bf16 and not tiles_agree(module):
        warnings.warn("AMX gives other products than AVX-512 on this CPU: it is not used", stacklevel=2)
        return dataclasses.replace(flags, amx_tile=False, amx_int8=False, amx_bf16=False)
    return flags


def isa_cap() -> str | None:
    """The fastest instruction set that RAREFY_ISA allows, None where it is not set.

    Raises:
        UsageError: the variable names no instruction set.
    """
    name = os.environ.get(ISA_VARIABLE, "").strip()
    if not name:
        return None
    if name not in ISAS:
        raise UsageError(
            f"environment variable {ISA_VARIABLE}",
            f"{name!r} is not an instruction set",
            allowed=", ".join(ISAS),
            hint="unset it to use the fastest this CPU has",
        )
    return name


def get_num_threads() -> int:
    """Threads that the next product uses (1 where the extension is missing; numpy's BLAS has its own setting)."""
    module = native()
    return 1 if module is None else int(module.num_threads())


def set_num_threads(num_threads: int) -> None:
    """Set the threads of every product from now on, in the whole process.

    Raises:
        UsageError: not between 1 and 256.
    """
    if not 1 <= num_threads <= MAX_THREADS:
        raise UsageError("num_threads", str(num_threads), allowed=f"1 to {MAX_THREADS}")
    module = native()
    if module is not None:
        module.set_num_threads(num_threads)
