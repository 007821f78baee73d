"""Kernels: products of activations with packed weights, chosen at run time for the CPU."""

from rarefy.kernels.cpu import CpuFlags, available_cpus, last_level_cache_bytes
from rarefy.kernels.direct import (
    Convolution,
    Taps,
    convolve_direct,
    convolve_patches,
    takes_channels_last,
    takes_direct,
)
from rarefy.kernels.dispatch import Kernel, compiled_kernels, runnable_isas, select
from rarefy.kernels.extension import (
    SlowReferenceWarning,
    detect_cpu,
    extension_status,
    get_num_threads,
    set_num_threads,
)
from rarefy.kernels.machine import Bandwidth, BandwidthProbe, describe_cpu, measure_bandwidth, measure_fork_join
from rarefy.kernels.products import Prepared, matmul, matmul_many, prepare
from rarefy.kernels.recurrent import Steps, run_steps
from rarefy.kernels.strided import copy_strided

__all__ = [
    "Bandwidth",
    "BandwidthProbe",
    "Convolution",
    "CpuFlags",
    "Kernel",
    "Prepared",
    "SlowReferenceWarning",
    "Steps",
    "Taps",
    "available_cpus",
    "compiled_kernels",
    "convolve_direct",
    "convolve_patches",
    "copy_strided",
    "describe_cpu",
    "detect_cpu",
    "extension_status",
    "get_num_threads",
    "last_level_cache_bytes",
    "matmul",
    "matmul_many",
    "measure_bandwidth",
    "measure_fork_join",
    "prepare",
    "run_steps",
    "runnable_isas",
    "select",
    "set_num_threads",
    "takes_channels_last",
    "takes_direct",
]
