"""What the convolutions of `conv.py` compute: products of the patches of an input with packed weights, and direct sums.

Legend of shape suffixes: B batch, C channels, S spatial axes, P places of the output, T rows of patches, O outputs,
I inputs (taps times channels, the channel changing first).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rarefy.core.errors import UsageError
from rarefy.kernels import (
    Convolution,
    Prepared,
    convolve_direct,
    convolve_patches,
    takes_channels_last,
    takes_direct,
)
from rarefy.nn.patches import Geometry, contiguous
from rarefy.nn.product import require_cpu
from rarefy.nn.scratch import scratch
from rarefy.nn.team import share_threads

# Inputs that are quantized together.
_BLOCK = 64

_Array = npt.NDArray[np.float32]


@final
@dataclass(frozen=True)
class Stage:
    """One of the convolutions that follow each other: where its taps fall, the weight of each group, its outputs."""

    geometry: Geometry
    weights: Sequence[Prepared]
    num_outputs: int


def convolve(x: Tensor, stages: Sequence[Stage], bias: Tensor | None = None) -> Tensor:
    """The convolution of x (B, C, *S), in the memory format of x."""
    require_cpu("convolution input", x)
    y, keeps_format = x.detach(), _is_channels_last(x)
    if len(stages) == 1 and (made := _in_strips(y, stages[0], bias, keeps_format)) is not None:
        return made
    for number, stage in enumerate(stages):
        is_last = stage is stages[-1]
        # What is handed out is new memory; what is only read again here is not.
        where = None if is_last and keeps_format else f"outputs of stage {number}"
        y = _run(y, stage, bias if is_last else None, where)
    if keeps_format:
        return y.to(x.dtype)
    # Of one output or one place both formats are the same memory, which is the scratch still.
    return (y.clone() if y.is_contiguous() else contiguous(y)).to(x.dtype)


def _in_strips(x: Tensor, stage: Stage, bias: Tensor | None, keeps_format: bool) -> Tensor | None:
    """The convolution without a matrix of patches; None where that cannot be, or pixels are better quantized once."""
    geometry = stage.geometry
    if not takes_direct(stage.weights) or _takes_taps(stage.weights[0], x.shape[1], geometry):
        return None
    inside, size, bias_O = _arguments(x, geometry, bias)
    pixels = contiguous(inside.movedim(1, -1) if keeps_format else inside).numpy()
    made = convolve_patches(
        Convolution(pixels, stage.weights, bias_O, geometry.groups, geometry.direct_taps, size, keeps_format)
    )
    if made is None:
        return None
    y = torch.from_numpy(made)
    return (y.movedim(-1, 1) if keeps_format else y).to(x.dtype)


def _arguments(x: Tensor, geometry: Geometry, bias: Tensor | None) -> tuple[Tensor, tuple[int, ...], _Array | None]:
    """What is convolved, padded if not with zeros, the size of the output, and the bias."""
    share_threads()
    size = geometry.size_of_output(x.shape[2:])
    if min(size) < 1:
        raise _too_small(x, geometry)
    inside = x.detach().to(torch.float32)
    if geometry.padding_mode != "zeros":
        inside = geometry.pad(inside)
    return inside, size, None if bias is None else contiguous(bias.detach().float()).numpy()


def convolve_few(
    x: Tensor, bias: Tensor | None = None, *, geometry: Geometry, weights: Sequence[Prepared], num_outputs: int
) -> Tensor:
    """The convolution of x (B, C, *S) with few outputs in each group, in the memory format of x."""
    require_cpu("convolution input", x)
    inside, size, bias_O = _arguments(x, geometry, bias)
    groups, keeps_format = geometry.groups, _is_channels_last(x)
    stays = keeps_format and takes_channels_last(x.shape[1] // groups, num_outputs // groups)
    pixels = contiguous(inside.movedim(1, -1) if stays else inside).numpy()
    y = torch.from_numpy(
        convolve_direct(Convolution(pixels, weights, bias_O, groups, geometry.direct_taps, size, stays))
    )
    if keeps_format:
        y = (y if stays else contiguous(y.movedim(1, -1))).movedim(-1, 1)
    return y.to(x.dtype)


def _run(x: Tensor, stage: Stage, bias: Tensor | None, where: str | None) -> Tensor:
    """One stage of x (B, C, *S) in float32, with its channels last: in scratch of that name, or in new memory."""
    geometry, num_outputs = stage.geometry, stage.num_outputs
    padded = geometry.padded(x, torch.float32)
    size = geometry.output_size(padded)
    if min(size) < 1:
        raise _too_small(x, geometry)
    rows_per_group = num_outputs // geometry.groups
    shape = (x.shape[0] * prod(size), num_outputs)
    # In numpy, because torch would start threads of its own between two products.
    y_TO = np.empty(shape, np.float32) if where is None else scratch(where, *shape)
    bias_O = None if bias is None else bias.detach().float().numpy()
    for group, weight in enumerate(stage.weights):
        own = slice(group * rows_per_group, (group + 1) * rows_per_group)
        _multiply(weight, padded, geometry, group, y_TO[:, own], None if bias_O is None else bias_O[own])
    return torch.from_numpy(y_TO).reshape(x.shape[0], *size, num_outputs).movedim(-1, 1)


def _too_small(x: Tensor, geometry: Geometry) -> UsageError:
    return UsageError("convolution input", f"shape {tuple(x.shape)}", allowed=f"at least the kernel {geometry.kernel}")


def _multiply(
    weight: Prepared, padded: Tensor, geometry: Geometry, group: int, y_TO: _Array, bias_O: _Array | None
) -> None:
    """The rows of one group of channels times its weight, in the order of the output's places, into y."""
    num_channels = padded.shape[-1] // geometry.groups
    if _takes_taps(weight, padded.shape[-1], geometry):
        x_PC = padded.detach().numpy().reshape(-1, padded.shape[-1])
        own = slice(group * num_channels, (group + 1) * num_channels)
        made_TO = _room(y_TO)
        weight.matmul_taps(np.ascontiguousarray(x_PC[:, own]), *geometry.taps(padded), made_TO)
        _put(made_TO, bias_O, y_TO)
        return
    done = 0
    for rows_TI in geometry.pieces(padded, group, scratch):
        piece_TO = y_TO[done : done + len(rows_TI)]
        made_TO = _room(piece_TO)
        weight.matmul_into(rows_TI.detach().numpy(), made_TO)
        _put(made_TO, bias_O, piece_TO)
        done += len(rows_TI)


def _takes_taps(weight: Prepared, num_channels: int, geometry: Geometry) -> bool:
    """Whether rows are put together out of pixels that are quantized once."""
    return num_channels // geometry.groups % _BLOCK == 0 and prod(geometry.kernel) > 1 and weight.takes_taps


def _room(y_TO: _Array) -> _Array:
    """Where a product is written: y itself, or the columns of one group side by side."""
    return y_TO if y_TO.flags.c_contiguous else scratch("product of a group", *y_TO.shape)


def _put(made_TO: _Array, bias_O: _Array | None, y_TO: _Array) -> None:
    if bias_O is not None:
        np.add(made_TO, bias_O, out=y_TO)
    elif made_TO is not y_TO:
        np.copyto(y_TO, made_TO)


def _is_channels_last(x: Tensor) -> bool:
    """Whether the caller chose that memory format; an input without channels or places to tell by did not."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.ndim in formats and not x.is_contiguous() and x.is_contiguous(memory_format=formats[x.ndim])
