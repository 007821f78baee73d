"""Which type the forward passes of calibration compute in, and casting a model to it for a while."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import transformers
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from rarefy.core.errors import UnsupportedModelError
from rarefy.kernels.cpu import CpuFlags

ComputeDtype = Literal["auto", "float32", "bfloat16"]


def choose_dtype(requested: ComputeDtype, model: nn.Module, cpu: CpuFlags) -> torch.dtype:
    """The type of the forward passes.

    Args:
        requested: a type, or "auto": bfloat16 where the CPU multiplies it in hardware, for models of transformers'
            classes without statistics or constants of floating-point numbers (those of batch norm, for one) among
            what they store. Others may have more that bfloat16 breaks, so that "auto" leaves them in float32; as it
            does those whose experts are too narrow for torch's product of them in bfloat16.
        model: the model.
        cpu: what the CPU can do. Flags decide and not a timing, so that one machine always gives the same bytes.
    """
    if requested != "auto":
        return torch.bfloat16 if requested == "bfloat16" else torch.float32
    fast = cpu.avx512_bf16 or cpu.amx_bf16
    known = isinstance(model, transformers.PreTrainedModel) and not _stores_constants(model) and _experts_fit(model)
    return torch.bfloat16 if fast and known else torch.float32


def _stores_constants(model: nn.Module) -> bool:
    return any(
        value.is_floating_point() and not isinstance(value, nn.Parameter)
        for value in model.state_dict(keep_vars=True).values()
        if isinstance(value, torch.Tensor)
    )


def _experts_fit(model: nn.Module) -> bool:
    """Whether rows of experts are whole pieces of 16 bytes in bfloat16: torch's `grouped_mm` refuses any others."""
    return not any(
        parameter.ndim == 3 and any(size % 8 for size in parameter.shape[1:])
        for module in model.modules()
        if getattr(getattr(module, "config", None), "_experts_implementation", None) == "grouped_mm"
        for parameter in module.parameters(recurse=False)
    )


@contextmanager
def explained(dtype: torch.dtype, model: nn.Module) -> Iterator[None]:
    """Say what to do where a model's forward pass is not for bfloat16.

    Some make numbers of their own in float32, which the others do not meet; some have widths that torch does not take.

    Raises:
        UnsupportedModelError: instead of torch's error about types or strides.
    """
    try:
        yield
    except RuntimeError as error:
        message = str(error).partition("\n")[0]
        if dtype == torch.float32 or not any(
            word in message for word in ("dtype", "scalar type", "BFloat16", "strides should")
        ):
            raise
        raise UnsupportedModelError(
            type(model).__name__,
            f"its forward pass fails in bfloat16 ({message})",
            hint="compute in float32: --compute-dtype float32, or compute_dtype='float32' in Python",
        ) from error


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

    Buffers stay as they are: rotary frequencies in bfloat16 would put tokens at wrong positions. So do the parameters
    of batch norms, which torch wants in the type of their statistics.

    Args:
        modules: whose parameters; ones on the meta device are left alone.
        dtype: the type.
        restore: put the original values back at the end; without, they are dropped at once to save memory.
        recurse: whether the parameters of the modules inside count.
    """
    originals: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}
    owners = (owner for module in modules for owner in (module.modules() if recurse else (module,)))
    for owner in owners:
        for parameter in () if isinstance(owner, _NormBase) else owner.parameters(recurse=False):
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
