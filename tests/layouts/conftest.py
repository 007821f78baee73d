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
            if values == "int8":
                code = raw["codes"][index]
            else:
                # a dense row begins at a byte of its own, a sparse stream does not
                nibble = index if packing != "dense" else o * 2 * ((width + 1) // 2) + i
                code = raw["codes"][nibble // 2] >> 4 * (nibble % 2) & 15
            size = meta["group_size"]
            group = o if size is None else o * ((width + size - 1) // size) + i // size
            zero = {"int4": 8, "int8": 128}[values] if meta["symmetric"] else raw["zero_points"][group]
            matrix[o][i] = _bfloat16(struct.unpack_from("<H", raw["scales"], 2 * group)[0]) * (code - zero)
    return matrix


@pytest.fixture(scope="session")
def read_by_the_specification() -> Callable[..., np.ndarray]:
    """Format, metadata and raw bytes of each array to float64 (O, I), exactly."""

    def read(format: str, meta: Mapping[str, Any], raw: Mapping[str, bytes]) -> np.ndarray:
        matrix = _read(format, meta, raw)
        return np.array([[float(v) for v in row] for row in matrix], dtype=np.float64).reshape(meta["shape"])

    return read
