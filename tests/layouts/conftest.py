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
    kind, _, version = format.rpartition("-")
    assert version == "v1"
    if kind == "sum":
        return _read_sum(meta, raw)
    if kind in ("ternary", "binary", "lut4", "lut8"):
        return _read_codebook(kind, meta, raw)
    packing, values = kind.split("-")
    if packing == "lowrank":
        return _read_low_rank(values, meta, raw)
    if packing == "tapwise":
        return _read_tapwise(meta, raw)
    if packing == "block":
        return _read_blocks(values, meta, raw)
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
            matrix[o][i] = _on_grid(code, num_bits, meta, raw, o, i)
    return matrix


def _group(meta: Mapping[str, Any], o: int, i: int) -> int:
    width, size = meta["shape"][1], meta["group_size"]
    return o if size is None else o * ((width + size - 1) // size) + i // size


def _on_grid(code: int, num_bits: int, meta: Mapping[str, Any], raw: Mapping[str, bytes], o: int, i: int) -> Fraction:
    group = _group(meta, o, i)
    zero = 2 ** (num_bits - 1) if meta["symmetric"] else raw["zero_points"][group]
    return _bfloat16(struct.unpack_from("<H", raw["scales"], 2 * group)[0]) * (code - zero)


def _read_codebook(kind: str, meta: Mapping[str, Any], raw: Mapping[str, bytes]) -> Matrix:
    rows, width = meta["shape"]
    matrix = [[Fraction(0)] * width for _ in range(rows)]
    for o in range(rows):
        for i in range(width):
            if kind == "ternary":
                value = Fraction(raw["codes"][o * ((width + 4) // 5) + i // 5] // 3 ** (i % 5) % 3 - 1)
            elif kind == "binary":
                value = Fraction(1 if raw["codes"][o * ((width + 7) // 8) + i // 8] >> (i % 8) & 1 else -1)
            elif kind == "lut4":
                code = raw["codes"][o * ((width + 1) // 2) + i // 2] >> 4 * (i % 2) & 15
                value = Fraction(struct.unpack_from("<f", raw["table"], 4 * code)[0])
            else:
                value = _bfloat16(struct.unpack_from("<H", raw["table"], 2 * raw["codes"][o * width + i])[0])
            if "scales" in raw:
                value *= _bfloat16(struct.unpack_from("<H", raw["scales"], 2 * _group(meta, o, i))[0])
            # a product with a float32 entry of a table is rounded to float32; all others are exact
            matrix[o][i] = Fraction(float(np.float32(float(value))))
    return matrix


def _read_blocks(values: str, meta: Mapping[str, Any], raw: Mapping[str, bytes]) -> Matrix:
    (rows, width), (high, wide) = meta["shape"], meta["block_shape"]
    matrix = [[Fraction(0)] * width for _ in range(rows)]
    num_across, position = (width + wide - 1) // wide, 0
    for top in range(0, rows, high):
        for left in range(0, width, wide):
            byte = top // high * ((num_across + 7) // 8) + left // wide // 8
            if not raw["mask"][byte] >> (left // wide % 8) & 1:
                continue
            for o in range(top, min(rows, top + high)):
                for i in range(left, min(width, left + wide)):
                    if values == "bf16":
                        matrix[o][i] = _bfloat16(struct.unpack_from("<H", raw["values"], 2 * position)[0])
                    else:
                        matrix[o][i] = _on_grid(raw["codes"][position], 8, meta, raw, o, i)
                    position += 1
    return matrix


def _read_low_rank(values: str, meta: Mapping[str, Any], raw: Mapping[str, bytes]) -> Matrix:
    (rows, width), rank = meta["shape"], meta["rank"]
    factors = []
    for side, shape in (("left", [rows, rank]), ("right", [rank, width])):
        arrays = {name.removeprefix(f"{side}_"): value for name, value in raw.items() if name.startswith(side)}
        factors.append(_read(f"dense-{values}-v1", {**meta, "shape": shape}, arrays))
    left, right = factors
    return [
        [sum((left[o][k] * right[k][i] for k in range(rank)), Fraction(0)) for i in range(width)] for o in range(rows)
    ]


def _read_tapwise(meta: Mapping[str, Any], raw: Mapping[str, bytes]) -> Matrix:
    (rows, width), runs = meta["shape"], meta["num_runs"]
    inner, outer = meta["inner_rank"], meta["outer_rank"]

    def read(name: str, shape: list[int]) -> Matrix:
        return _read("dense-bf16-v1", {"shape": shape}, {"values": raw[f"{name}_values"]})

    left, right = read("left", [rows, runs * inner if outer is None else outer]), read("right", [inner, width // runs])
    if outer is not None:
        core = read("core", [outer, runs * inner])
        left = [
            [sum((left[o][a] * core[a][m] for a in range(outer)), Fraction(0)) for m in range(runs * inner)]
            for o in range(rows)
        ]
    columns = [divmod(i, width // runs) for i in range(width)]
    return [
        [sum((left[o][g * inner + r] * right[r][c] for r in range(inner)), Fraction(0)) for g, c in columns]
        for o in range(rows)
    ]


def _read_sum(meta: Mapping[str, Any], raw: Mapping[str, bytes]) -> Matrix:
    first, second = (
        _read(
            part["format"], {**part, "shape": meta["shape"]}, {k[2:]: v for k, v in raw.items() if k[0] == str(index)}
        )
        for index, part in enumerate(meta["parts"])
    )
    return [[a + b for a, b in zip(one, two, strict=True)] for one, two in zip(first, second, strict=True)]


@pytest.fixture(scope="session")
def read_by_the_specification() -> Callable[..., np.ndarray]:
    """Format, metadata and raw bytes of each array to float64 (O, I), exactly."""

    def read(format: str, meta: Mapping[str, Any], raw: Mapping[str, bytes]) -> np.ndarray:
        matrix = _read(format, meta, raw)
        return np.array([[float(v) for v in row] for row in matrix], dtype=np.float64).reshape(meta["shape"])

    return read
