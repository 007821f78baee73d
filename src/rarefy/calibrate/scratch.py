"""Tensors that a run puts on disk for a while."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from rarefy.core.errors import OutputError

# Every tensor begins at a multiple of it: a line of the cache, and of every element's size.
_ALIGNMENT = 64
# The file doubles, up to so many bytes at a time.
_MOST_AT_ONCE = 64 << 20


@final
@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in a scratch file."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@final
class Scratch:
    """A file of tensors that has no name: it is gone once it is closed, and with the process however that ends.

    What is read is mapped and not copied, so that it takes memory of its own only where it is looked at, or changed.

    Args:
        directory: where the file lies; None: where temporary files do.

    Raises:
        OutputError: no file can be made there.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = Path(tempfile.gettempdir()) if directory is None else directory
        self._map: mmap.mmap | None = None
        self._end = 0
        with self._refusals():
            self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115 (closed by `close`)

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_bytes(self) -> int:
        """How much is in the file."""
        return self._end

    def check_room(self, num_bytes: int, what: str) -> None:
        """Refuse what will not fit before the work that leads to it.

        Args:
            num_bytes: how much there will be.
            what: it is, for the message.

        Raises:
            OutputError: there is less room on the disk.
        """
        free = shutil.disk_usage(self._directory).free
        if num_bytes > free:
            raise OutputError(
                str(self._directory),
                f"{what} take {num_bytes / 1e9:.1f} GB of scratch space",
                allowed=f"{free / 1e9:.1f} GB, which are free there",
                hint="write to a larger disk (scratch space is beside the output, else in TMPDIR), take fewer samples, "
                "a smaller block_size (obert), or obd",
            )

    def put(self, tensor: Tensor) -> Stored:
        """Write a tensor.

        Raises:
            OutputError: the disk refused it.
        """
        stored = Stored(self._end, tuple(tensor.shape), tensor.dtype)
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        data = memoryview(flat.numpy().data)
        with self._refusals():
            self._grow(stored.offset + len(data))
            written = 0
            while written < len(data):
                written += os.pwrite(self._file.fileno(), data[written:], stored.offset + written)
        self._end = -(-(stored.offset + len(data)) // _ALIGNMENT) * _ALIGNMENT
        return stored

    def get(self, stored: Stored) -> Tensor:
        """The tensor that was put there; writing to it does not change the file."""
        count = torch.Size(stored.shape).numel()
        if not count:
            return torch.empty(stored.shape, dtype=stored.dtype)
        end = stored.offset + count * stored.dtype.itemsize
        if self._map is None or len(self._map) < end:
            self._map = mmap.mmap(self._file.fileno(), os.fstat(self._file.fileno()).st_size, access=mmap.ACCESS_COPY)
        tensor = torch.frombuffer(self._map, dtype=stored.dtype, count=count, offset=stored.offset)
        return tensor.resize_(stored.shape)  # a view would be nothing that autograd lets anybody change in place

    def forget(self) -> None:
        """Let go of the memory behind what was read, once nobody holds it any more."""
        self._map = None

    def close(self) -> None:
        """Remove the file; what was read before stays readable."""
        self.forget()
        self._file.close()

    def _grow(self, end: int) -> None:
        """Take room on the disk in large pieces, which makes writing several times as fast as page after page."""
        size = os.fstat(self._file.fileno()).st_size
        if end > size:
            os.posix_fallocate(self._file.fileno(), size, max(end - size, min(size, _MOST_AT_ONCE)))

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                str(self._directory),
                f"no scratch file could be written there ({error.strerror})",
                hint="it lies beside the output, else in TMPDIR",
            ) from error
