"""Convolutions of an image as it lies: direct sums over the taps, and products of patches, a strip of places at a time.

Legend of shape suffixes: B batch, C channels, S spatial axes, P places of the output, O outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from rarefy.kernels.extension import native
from rarefy.kernels.products import Prepared

Float32Array = NDArray[np.float32]


@final
@dataclass(frozen=True)
class Taps:
    """Where the taps of a convolution fall, along each spatial axis.

    Attributes:
        kernel: taps.
        stride: of the output's places.
        dilation: of the taps.
        before: zeros in front of the input; behind it there are as many as the output needs.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]


@final
@dataclass(frozen=True)
class Convolution:
    """What is convolved with what.

    Attributes:
        x: (B, C, *S), or (B, *S, C) with channels last; C-contiguous.
        weights: (outputs, taps times channels of a group), of which the channel changes first.
        bias_O: C-contiguous, or None.
        groups: so many parts of the channels, each with outputs of its own.
        taps: where they fall.
        size: P, of the output.
        channels_last: of x and the result.
    """

    x: Float32Array
    weights: Sequence[Prepared]
    bias_O: Float32Array | None
    groups: int
    taps: Taps
    size: tuple[int, ...]
    channels_last: bool = False


def takes_direct(weights: Sequence[Prepared]) -> bool:
    """Whether the functions below will do: the extension multiplies with all of them."""
    return all(weight.weights is not None for weight in weights)


def takes_channels_last(group_channels: int, group_outputs: int) -> bool:
    """Whether `convolve_direct` will do with channels last: 16 outputs are whole groups that see no more channels."""
    return 16 % group_outputs == 0 and group_channels <= group_outputs


def convolve_direct(convolution: Convolution) -> Float32Array:
    """A convolution in float32 with numbers that are decoded a few panels at a time; activations are not rounded.

    Args:
        convolution: its weights are one for all outputs, or one for each group; channels last needs
            `takes_channels_last`.

    Returns:
        (B, O, *P) or (B, *P, O), newly allocated. The same bits for every number of threads and instruction set.
    """
    y: Float32Array = _run(convolution, by_patches=False)
    return y


def convolve_patches(convolution: Convolution) -> Float32Array | None:
    """A convolution by products of its patches, without a matrix of all of them.

    Args:
        convolution: its weights are one for each group.

    Returns:
        (B, O, *P) or (B, *P, O), newly allocated, with the bits of `Prepared.matmul` of the patches; None where
        a strip of them is too large.
    """
    y: Float32Array | None = _run(convolution, by_patches=True)
    return y


def _run(c: Convolution, *, by_patches: bool) -> Any:
    module: Any = native()
    taps, weights = c.taps, [weight.weights for weight in c.weights]
    return module.convolve(
        c.x,
        weights,
        c.bias_O,
        c.groups,
        taps.kernel,
        taps.stride,
        taps.dilation,
        taps.before,
        c.size,
        c.channels_last,
        by_patches,
    )
