"""The patches of an image (or signal, or volume) that the kernel of a convolution meets, as rows of a matrix.

Channels lie last while patches are taken: what a row of taps sees is then one run of memory, and a piece of the matrix
of patches is filled by plain copies at the speed of the cache.

Legend of shape suffixes: B batch, C channels, S spatial axes, P places of the output, K taps, T rows, I inputs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rarefy.kernels import Taps, copy_strided

# Numbers of a piece of the matrix of patches, 4 MB: enough rows for a product at full speed, and few enough to be still
# in a cache when they are multiplied. Of 2**17 to 2**21, 2**20 was the fastest or next to it for ResNet's shapes.
PIECE_NUMBERS = 1 << 20

ConvModule = nn.Conv1d | nn.Conv2d | nn.Conv3d


@final
@dataclass(frozen=True)
class Geometry:
    """Where the taps of a convolution fall.

    Args:
        kernel: taps along each spatial axis.
        stride: of the output's places.
        dilation: of the taps.
        padding: for each spatial axis how much is put before and behind it.
        padding_mode: what is put there: "zeros", "reflect", "replicate" or "circular".
        groups: so many parts of the channels, each with outputs of its own.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    padding_mode: str
    groups: int

    @classmethod
    def of(cls, module: ConvModule) -> "Geometry":
        """That of a torch module."""
        kernel, dilation = tuple(module.kernel_size), tuple(module.dilation)
        padding: list[tuple[int, int]] = []
        for axis, taps in enumerate(kernel):
            if module.padding == "same":
                total = dilation[axis] * (taps - 1)
                padding.append((total // 2, total - total // 2))
            elif module.padding == "valid":
                padding.append((0, 0))
            else:
                assert not isinstance(module.padding, str)
                padding.append((module.padding[axis], module.padding[axis]))
        return cls(kernel, tuple(module.stride), dilation, tuple(padding), module.padding_mode, module.groups)

    def split(self, num_runs: int) -> "tuple[Geometry, Geometry] | None":
        """Two convolutions that do what this one does with factors of its taps; None if its axes do not divide so.

        Args:
            num_runs: taps of the leading axes, which the second convolution has; the first has those of the others.
        """
        axes = len(self.kernel)
        for cut in range(1, axes + 1):
            if prod(self.kernel[:cut]) == num_runs:
                return self._only(range(cut, axes)), self._only(range(cut))
        return None

    def _only(self, axes: range) -> "Geometry":
        """The part of it along some axes."""
        chosen = [axis in axes for axis in range(len(self.kernel))]
        kernel, stride, dilation = (
            tuple(size if mine else 1 for size, mine in zip(sizes, chosen, strict=True))
            for sizes in (self.kernel, self.stride, self.dilation)
        )
        padding = tuple(pair if mine else (0, 0) for pair, mine in zip(self.padding, chosen, strict=True))
        return Geometry(kernel, stride, dilation, padding, self.padding_mode, self.groups)

    def padded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x (B, C, *S) with its channels last and its padding around it: (B, *S', C), contiguous.

        It is x itself where that lies so already and needs no padding.
        """
        if not any(size for pair in self.padding for size in pair):
            return contiguous(x.movedim(1, -1).to(dtype))
        if self.padding_mode != "zeros":
            return contiguous(self.pad(x).movedim(1, -1).to(dtype))
        sizes = [size + sum(pair) for size, pair in zip(x.shape[2:], self.padding, strict=True)]
        inside = tuple(slice(pair[0], pair[0] + size) for size, pair in zip(x.shape[2:], self.padding, strict=True))
        if _in_float32(x) and dtype == torch.float32:  # torch would start threads
            bare = np.zeros((x.shape[0], *sizes, x.shape[1]), np.float32)
            bare[(slice(None), *inside)] = contiguous(x.detach().movedim(1, -1)).numpy()
            return torch.from_numpy(bare)
        around = torch.zeros(x.shape[0], *sizes, x.shape[1], dtype=dtype, device=x.device)
        around[(slice(None), *inside)] = x.movedim(1, -1)
        return around

    def output_size(self, padded: Tensor) -> tuple[int, ...]:
        """Places of the output along each spatial axis; negative or 0 where the kernel does not fit."""
        return self._places(padded.shape[1:-1])

    @cached_property
    def direct_taps(self) -> Taps:
        """What `rarefy.kernels.convolve_direct` wants; paddings that are not zeros are around the input already."""
        pads = self.padding_mode == "zeros"
        before = tuple(pair[0] if pads else 0 for pair in self.padding)
        return Taps(self.kernel, self.stride, self.dilation, before)

    def size_of_output(self, size: Sequence[int]) -> tuple[int, ...]:
        """The same for the spatial axes of an input that is not padded yet."""
        return self._places([inside + sum(pair) for inside, pair in zip(size, self.padding, strict=True)])

    def _places(self, padded_size: Sequence[int]) -> tuple[int, ...]:
        return tuple(
            (size - dilation * (taps - 1) - 1) // stride + 1
            for size, taps, dilation, stride in zip(padded_size, self.kernel, self.dilation, self.stride, strict=True)
        )

    def pad(self, x: Tensor) -> Tensor:
        """x (B, C, *S) with its padding around it, as `padding_mode` says."""
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return nn.functional.pad(x, self._pads(), mode=mode)

    def pieces(
        self, padded: Tensor, group: int = 0, room: Callable[..., npt.NDArray[np.float32]] | None = None
    ) -> Iterator[Tensor]:
        """The rows of one group of channels, in the order of the output's places, in pieces of bounded size.

        Args:
            padded: what `padded` gave.
            group: number of the group.
            room: gives memory of a name and a shape; default: new one.

        Yields:
            (T, I) with I = taps times channels of the group, the channel changing first. Valid until the next one: the
            pieces share one buffer, or they are parts of the input where a patch is one pixel.
        """
        num_channels = padded.shape[-1] // self.groups
        patches = self._patches(padded, group * num_channels, num_channels)
        width = prod(self.kernel) * num_channels
        places = patches.shape[1 : 1 + len(self.kernel)]
        if self._is_pointwise():
            yield patches.reshape(-1, width)
            return
        num_images = max(1, PIECE_NUMBERS // max(1, prod(places) * width))
        num_lines = max(1, PIECE_NUMBERS // max(1, prod(places[1:]) * width))
        largest = min(num_images, patches.shape[0]) * min(num_lines, places[0]) * prod(places[1:])
        if room is not None and _in_float32(padded):
            buffer = torch.from_numpy(room("patches", largest, width))
        else:
            buffer = torch.empty(largest, width, dtype=padded.dtype, device=padded.device)
        for images in torch.split(patches, num_images):
            for part in torch.split(images, num_lines, dim=1):
                rows_TI = buffer[: prod(part.shape[: 1 + len(places)])]
                if _in_float32(rows_TI):
                    copy_strided(part.detach().numpy(), rows_TI.numpy())
                else:
                    rows_TI.view(part.shape).copy_(part)
                yield rows_TI

    def taps(self, padded: Tensor) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where rows find their pixels in `padded`, as (pixels, C): each row its first one, and each tap from there."""
        steps = [prod(padded.shape[axis + 1 : -1]) for axis in range(padded.ndim - 1)]
        sizes = (padded.shape[0], *self.output_size(padded))
        strides = (steps[0], *(step * stride for step, stride in zip(steps[1:], self.stride, strict=True)))
        dilations = [step * dilation for step, dilation in zip(steps[1:], self.dilation, strict=True)]
        return _places(sizes, strides), _places(self.kernel, dilations)

    def _patches(self, padded: Tensor, first_channel: int, num_channels: int) -> Tensor:
        """(B, *P, *K, C) over the memory of `padded`."""
        batch_stride, *strides, channel_stride = padded.stride()
        return padded.as_strided(
            (padded.shape[0], *self.output_size(padded), *self.kernel, num_channels),
            (
                batch_stride,
                *(step * stride for step, stride in zip(strides, self.stride, strict=True)),
                *(step * dilation for step, dilation in zip(strides, self.dilation, strict=True)),
                channel_stride,
            ),
            padded.storage_offset() + first_channel * channel_stride,
        )

    def _is_pointwise(self) -> bool:
        """Whether the matrix of patches is the input as it lies there."""
        return self.groups == 1 and prod(self.kernel) == 1 and all(step == 1 for step in self.stride)

    def _pads(self) -> list[int]:
        """As `torch.nn.functional.pad` wants them: the last axis first."""
        return [size for pair in reversed(self.padding) for size in pair]

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Torch's own convolution of x (B, C, *S) with a dense weight (O, C / groups, *K)."""
        symmetric = all(before == behind for before, behind in self.padding) and self.padding_mode == "zeros"
        if not symmetric:
            x = self.pad(x)
        function = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(self.kernel) - 1]
        padding = [pair[0] if symmetric else 0 for pair in self.padding]
        y: Tensor = function(x, weight, bias, list(self.stride), padding, list(self.dilation), self.groups)
        return y


def contiguous(x: Tensor) -> Tensor:
    """x.contiguous() without torch's threads, which take the processors from ours for longer than the copy."""
    if x.is_contiguous() or not _in_float32(x) or x.requires_grad:
        return x.contiguous()
    copied = np.empty(x.shape, np.float32)
    copy_strided(x.numpy(), copied)
    return torch.from_numpy(copied)


def _in_float32(x: Tensor) -> bool:
    """Whether numpy can see its numbers as float32; those of the meta device are nowhere."""
    return x.dtype == torch.float32 and not x.is_meta


def _places(sizes: Sequence[int], steps: Sequence[int]) -> npt.NDArray[np.int64]:
    """The sum of index times step for every index, the last one changing first."""
    places = np.zeros(1, np.int64)
    for size, step in zip(sizes, steps, strict=True):
        places = np.add.outer(places, step * np.arange(size, dtype=np.int64)).reshape(-1)
    return places
