"""The safetensors format, read strictly by mmap and written byte for byte the same every time.

Layout: uint64 little-endian header length N, N bytes of JSON ({name: {"dtype", "shape", "data_offsets": [begin,
end]}}), then the data. Reading trusts nothing: the header's length, its JSON, dtypes, shapes and offsets are checked
against each other and against the file's size; entries may neither overlap nor leave holes; names may not repeat.

References: https://github.com/huggingface/safetensors (README, "Format").
"""

import json
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np
import numpy.typing as npt

from rarefy.core.errors import DamagedFileError, PathError

Array = npt.NDArray[np.generic]

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
ALIGNMENT = 8

# bfloat16 and float8 have no numpy dtype and are given as their bits
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


@final
@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in its file: dtype name, shape, first byte and size counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@final
@dataclass(frozen=True, eq=False)
class TensorFile:
    """An open safetensors file.

    Args:
        path: of the file.
        entries: what it holds.
        data: the mapped file; arrays keep it alive.
    """

    path: Path
    entries: Mapping[str, TensorEntry]
    data: mmap.mmap

    def array(self, name: str) -> Array:
        """A read-only view of a tensor (a copy if the file misaligns it); bfloat16 and float8 as their bits."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        if entry.nbytes == 0:
            return np.empty(entry.shape, dtype=dtype)
        if entry.dtype == "BOOL":  # a byte other than 0 and 1 is no valid numpy bool
            raw = np.frombuffer(self.data, dtype=np.uint8, count=entry.nbytes, offset=entry.offset)
            return np.not_equal(raw, 0, dtype=np.bool_).reshape(entry.shape)
        count = entry.nbytes // dtype.itemsize
        flat = np.frombuffer(self.data, dtype=dtype, count=count, offset=entry.offset)
        return np.require(flat, requirements=["A"]).reshape(entry.shape)


def open_tensor_file(path: Path) -> TensorFile:
    """Map a safetensors file and check its header.

    Raises:
        PathError: the file does not exist or cannot be read.
        DamagedFileError: the file is truncated or its header contradicts itself.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(path, file.read(8), size)
            header = parse_json_object(path, file.read(length))
            entries = _check_header(path, header, data_start=8 + length, size=size)
            return TensorFile(path, entries, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise PathError(
            str(path), error.strerror or str(error), hint="give a directory with a readable model"
        ) from error


def parse_json_object(path: Path, text: bytes) -> dict[str, Any]:
    """Parse a JSON object, refusing repeated keys.

    Raises:
        DamagedFileError: not UTF-8, not JSON, not an object, or a key that repeats.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key that repeats")
        return result

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(str(path), f"invalid JSON ({error})", hint="copy or download the file again") from error
    if not isinstance(value, dict):
        raise DamagedFileError(str(path), f"JSON {type(value).__name__}", allowed="an object")
    return value


def write_tensor_file(path: Path, tensors: Mapping[str, tuple[str, Array]]) -> None:
    """Write a safetensors file, wide dtypes first so that every tensor is aligned; flushed to the disk on return.

    Args:
        path: of the new file.
        tensors: name to dtype name and array; the same content gives the same bytes.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name][1].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    offset = 0
    for name in order:
        dtype, array = tensors[name]
        assert array.dtype == DTYPES[dtype], (name, dtype, array.dtype)
        end = offset + array.nbytes
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("xb") as file:
        write_bytes(file, len(text).to_bytes(8, "little") + text)
        for name in order:
            write_bytes(file, np.ascontiguousarray(tensors[name][1]).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def write_bytes(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all of data; the one place where bytes of an artifact reach the disk."""
    file.write(data)


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        raise _truncated(path, size, "at least 8 bytes")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise DamagedFileError(
            str(path), f"header of {length} bytes", allowed=f"at most {MAX_HEADER_BYTES}", hint="not a safetensors file"
        )
    if 8 + length > size:
        raise _truncated(path, size, f"more than {8 + length} bytes")
    return length


def _truncated(path: Path, size: int, expected: str) -> DamagedFileError:
    return DamagedFileError(
        str(path), f"file of {size} bytes", allowed=expected, hint="it is truncated; copy or download it again"
    )


def _check_header(path: Path, header: dict[str, Any], *, data_start: int, size: int) -> dict[str, TensorEntry]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DamagedFileError(f"{path} __metadata__", f"{metadata!r:.60}", allowed="an object of strings")
    entries = {name: _check_entry(f"{path} {name}", fields, data_start) for name, fields in header.items()}
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != position:
            raise DamagedFileError(
                f"{path} {name}",
                f"data begins at byte {entry.offset - data_start}",
                allowed=f"{position - data_start}, where the one before it ends",
            )
        position += entry.nbytes
    if position > size:
        raise _truncated(path, size, f"{position} bytes")
    if position < size:
        raise DamagedFileError(str(path), f"file of {size} bytes", allowed=f"{position} bytes")
    return entries


def _check_entry(where: str, fields: object, data_start: int) -> TensorEntry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise DamagedFileError(where, f"{fields!r:.80}", allowed="an object with dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise DamagedFileError(where, f"dtype {dtype!r:.20}", allowed=", ".join(DTYPES))
    if not _are_sizes(shape):
        raise DamagedFileError(where, f"shape {shape!r:.60}", allowed="a list of non-negative integers")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise DamagedFileError(where, f"data_offsets {offsets!r:.60}", allowed="[begin, end]")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if nbytes != offsets[1] - offsets[0]:
        raise DamagedFileError(where, f"{offsets[1] - offsets[0]} bytes for {dtype} {shape}", allowed=f"{nbytes} bytes")
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], nbytes)


def _are_sizes(values: object) -> bool:
    # numpy counts in 64 bits, also for an empty array
    ok = isinstance(values, list) and len(values) <= 32
    return ok and all(type(value) is int and 0 <= value < 2**48 for value in values)  # type: ignore[attr-defined]
