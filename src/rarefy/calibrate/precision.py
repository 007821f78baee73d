"""Which type the forward passes of calibration compute in, and casting a model to it for a while."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from rarefy.kernels.cpu import CpuFlags

ComputeDtype = Literal["auto", "float32", "bfloat16"]


def choose_dtype(requested: ComputeDtype, *, is_transformer: bool, cpu: CpuFlags) -> torch.dtype:
    """The type of the forward passes.

    Args:
        requested: a type, or "auto": bfloat16 for transformers where the CPU multiplies it in hardware.
        is_transformer: whether the model is one of transformers' classes. Others may hold statistics or constants that
            bfloat16 breaks, so "auto" leaves them in float32.
        cpu: what the CPU can do. Flags decide and not a timing, so that one machine always gives the same bytes.
    """
    if requested != "auto":
        return torch.bfloat16 if requested == "bfloat16" else torch.float32
    fast = cpu.avx512_bf16 or cpu.amx_bf16
    return torch.bfloat16 if fast and is_transformer else torch.float32


def modules_outside(model: nn.Module, blocks: Collection[str]) -> list[nn.Module]:
    """The modules that hold a parameter themselves which belongs to none of the blocks."""
    inside = {id(parameter) for name in blocks for parameter in model.get_submodule(name).parameters()}
    return [
        module
        for module in model.modules()
        if any(id(parameter) not in inside for parameter in module.parameters(recurse=False))
    ]


@contextmanager
def cast_parameters(
    modules: Iterable[nn.Module], dtype: torch.dtype, *, restore: bool, recurse: bool = True
) -> Iterator[None]:
    """Hold the floating-point parameters of modules in another type.

    Buffers stay as they are: rotary frequencies in bfloat16 would put tokens at wrong positions.

    Args:
        modules: whose parameters; ones on the meta device are left alone.
        dtype: the type.
        restore: put the original values back at the end; without, they are dropped at once to save memory.
        recurse: whether the parameters of the modules inside count.
    """
    originals: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}
    for module in modules:
        for parameter in module.parameters(recurse=recurse):
            if parameter.is_meta or not parameter.is_floating_point() or parameter.dtype == dtype:
                continue
            if restore:
                originals.setdefault(id(parameter), (parameter, parameter.data))
            parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in originals.values():
            parameter.data = data
