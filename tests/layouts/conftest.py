"""An independent reader of docs/format.md: plain Python, one bit at a time, no numpy arithmetic, no code of rarefy."""

import struct
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

Matrix = list[list[Fraction]]


def _bfloat16(bits: int) -> Fraction:
    return Fraction(struct.unpack("<f", bytes((0, 0, bits & 255, bits >> 8)))[0])


def _read(format: str, meta: Mapping[str, Any], raw: Mapping[str, bytes]) -> Matrix:
    if not format.startswith(("dense", "bitmask", "nm")):
        return _read_codebook(format, meta, raw)
    packing, values, version = format.split("-")
    assert version == "v1"
    rows, width = meta["shape"]
    matrix = [[Fraction(0)] * width for _ in range(rows)]
    position = 0
    for o in range(rows):
        for i in range(width):
            if packing != "dense" and not raw["mask"][o * ((width + 7) // 8) + i // 8] >> (i % 8) & 1:
                continue
            index = position if packing != "dense" else o * width + i
            position += 1
            if values == "f32":
                matrix[o][i] = Fraction(struct.unpack_from("<f", raw["values"], 4 * index)[0])
                continue
            if values == "bf16":
                matrix[o][i] = _bfloat16(struct.unpack_from("<H", raw["values"], 2 * index)[0])
                continue
            # a dense row begins at a byte of its own, a sparse stream does not
            num_bits = int(values[3:])
            row_bytes = (width * num_bits + 7) // 8
            first_bit = index * num_bits if packing != "dense" else o * row_bytes * 8 + i * num_bits
            code = sum(
                (raw["codes"][bit // 8] >> (bit % 8) & 1) << k
                for k, bit in enumerate(range(first_bit, first_bit + num_bits))
            )
            group = _group(meta, o, i)
            zero = 2 ** (num_bits - 1) if meta["symmetric"] else raw["zero_points"][group]
            matrix[o][i] = _bfloat16(struct.unpack_from("<H", raw["scales"], 2 * group)[0]) * (code - zero)
    return matrix


def _group(meta: Mapping[str, Any], o: int, i: int) -> int:
    width, size = meta["shape"][1], meta["group_size"]
    return o if size is None else o * ((width + size - 1) // size) + i // size


def _read_codebook(format: str, meta: Mapping[str, Any], raw: Mapping[str, bytes]) -> Matrix:
    rows, width = meta["shape"]
    matrix = [[Fraction(0)] * width for _ in range(rows)]
    for o in range(rows):
        for i in range(width):
            if format == "ternary-v1":
                value = Fraction(raw["codes"][o * ((width + 4) // 5) + i // 5] // 3 ** (i % 5) % 3 - 1)
            elif format == "binary-v1":
                value = Fraction(1 if raw["codes"][o * ((width + 7) // 8) + i // 8] >> (i % 8) & 1 else -1)
            elif format == "lut4-v1":
                code = raw["codes"][o * ((width + 1) // 2) + i // 2] >> 4 * (i % 2) & 15
                value = Fraction(struct.unpack_from("<f", raw["table"], 4 * code)[0])
            else:
                assert format == "lut8-v1"
                value = _bfloat16(struct.unpack_from("<H", raw["table"], 2 * raw["codes"][o * width + i])[0])
            if "scales" in raw:
                value *= _bfloat16(struct.unpack_from("<H", raw["scales"], 2 * _group(meta, o, i))[0])
            # a product with a float32 entry of a table is rounded to float32; all others are exact
            matrix[o][i] = Fraction(float(np.float32(float(value))))
    return matrix


@pytest.fixture(scope="session")
def read_by_the_specification() -> Callable[..., np.ndarray]:
    """Format, metadata and raw bytes of each array to float64 (O, I), exactly."""

    def read(format: str, meta: Mapping[str, Any], raw: Mapping[str, bytes]) -> np.ndarray:
        matrix = _read(format, meta, raw)
        return np.array([[float(v) for v in row] for row in matrix], dtype=np.float64).reshape(meta["shape"])

    return read
