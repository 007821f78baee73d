"""Write the golden files of format version 1. They are frozen: run this only to add a format, never to change one.

    python tests/golden/generate.py

layouts/FORMAT.json: metadata, the bytes of each array as hex, and the matrix that they mean.
artifact-v1/: a whole artifact with one layer of each of the first ten formats, a tied alias and three plain tensors.
artifact-v1-codes/: the same with codes of 3 and 2 bits, ternary, binary and the lookup tables.
artifact-v1-blocks/: the same with the block, low-rank and sum formats.
artifact-v1-taps/: the same with factors of taps.
layers-v1/: a layer of each kind, every weight telling its place in the module's parameter.
"""

import json
import sys
from pathlib import Path

import numpy as np

from rarefy.artifact import write_artifact
from rarefy.core.grids import FittedGrid, IntGrid, dequantize, fit_minmax, quantize, to_bf16_bits
from rarefy.core.patterns import NM, Blocks, Unstructured
from rarefy.core.solution import Solution
from rarefy.layouts import (
    FORMATS,
    NF4,
    AnyLayout,
    Binary,
    BitmaskInt,
    DenseFloat,
    DenseInt,
    LookupTable,
    LowRank,
    Sum,
    Tapwise,
    Ternary,
    pack,
)

HERE = Path(__file__).resolve().parent
ROWS, WIDTH = 3, 37  # odd, beyond one group of 32 by five columns, beyond one of N:M by one
RANK = 2

ARTIFACTS = {
    "artifact-v1": [
        f"{packing}-{values}-v1" for packing in ("dense", "bitmask", "nm") for values in ("bf16", "int8", "int4")
    ]
    + ["dense-f32-v1"],
    "artifact-v1-codes": ["dense-bf16-v1"]
    + [f"{packing}-{values}-v1" for packing in ("dense", "bitmask", "nm") for values in ("int3", "int2")]
    + ["ternary-v1", "binary-v1", "lut4-v1", "lut8-v1"],
    "artifact-v1-blocks": [
        "dense-bf16-v1",
        "block-bf16-v1",
        "block-int8-v1",
        "lowrank-bf16-v1",
        "lowrank-int8-v1",
        "sum-v1",
    ],
    "artifact-v1-taps": ["dense-bf16-v1", "tapwise-bf16-v1"],
}


def example(format: str) -> AnyLayout:
    """A small layout of the format; no random generator, whose numbers may change with its version."""
    if format == "sum-v1":
        first, second = example("lowrank-bf16-v1"), example("bitmask-int4-v1")
        assert isinstance(first, LowRank)
        assert isinstance(second, BitmaskInt)
        return Sum(first, second)
    if format.startswith("lowrank-"):
        return low_rank_example(format.split("-")[1])
    if format == "tapwise-bf16-v1":
        left, core, right = (
            DenseFloat(to_bf16_bits(((7 * k + 3 * j) % 9 - 4).astype(np.float32)))
            for k, j in map(np.indices, ((ROWS, 2), (2, 6 * 3), (3, 2)))
        )
        return Tapwise(LowRank(left, core), right, 6)
    o, i = np.indices((ROWS, WIDTH))
    weight = (((17 * o + 29 * i + o * i) % 41 - 20) / 16).astype(np.float32)
    scale = ((3 + np.arange(6).reshape(ROWS, 2)) / 8).astype(np.float32)
    match format:
        case "ternary-v1":
            return Ternary.from_levels((17 * o + 29 * i + o * i) % 3 - 1, scale, 32)
        case "binary-v1":
            return Binary.from_levels(np.where(weight > 0, 1, -1), scale[:, :1], None)
        case "lut4-v1":
            return LookupTable.from_dense(weight, NF4, scaled=True, group_size=32)
        case "lut8-v1":
            table = ((37 * np.arange(256) % 256 - 128) / 64).astype(np.float32)
            return LookupTable.from_dense(weight, table, scaled=False)
    packing, values, _ = format.split("-")
    mask, pattern = {
        "dense": (None, None),
        "bitmask": ((5 * o + 3 * i) % 7 < 3, Unstructured(0.5)),
        "nm": (((i % 4 + o) % 4 < 2) | (i == WIDTH - 1), NM(2, 4)),
        "block": ((o // 2 + i // 5) % 3 != 1, Blocks((2, 5), 0.3)),
    }[packing]
    if mask is not None:
        weight = weight * mask
    fitted = None
    if values.startswith("int"):
        symmetric = format in ("dense-int8-v1", "bitmask-int4-v1", "nm-int4-v1", "dense-int3-v1", "bitmask-int2-v1")
        grid = IntGrid(int(values[3:]), None if format == "nm-int8-v1" else 32, symmetric)
        fitted = fit_minmax(weight, grid)
        weight = dequantize(quantize(weight, fitted), fitted)
    layout = pack(Solution(weight, mask, pattern, fitted), float_format="f32" if values == "f32" else "bf16")
    assert layout.format == format
    return layout


def low_rank_example(values: str) -> LowRank:
    """Factors whose products and sums every arithmetic computes exactly."""
    k, j = np.indices((RANK, WIDTH))
    right = ((7 * k + 3 * j) % 9 - 4).astype(np.float32)
    left = right[:, :ROWS].T * np.float32(0.25)
    factors = []
    for factor in (left, right):
        grid = None
        if values == "int8":
            shape = (factor.shape[0], 1)
            zero_point = (100 + np.arange(shape[0], dtype=np.uint8)).reshape(shape)
            grid = FittedGrid(IntGrid(8, None, False), np.full(shape, 0.25, dtype=np.float32), zero_point)
        layout = pack(Solution(np.ascontiguousarray(factor), None, None, grid))
        assert isinstance(layout, DenseFloat | DenseInt)
        factors.append(layout)
    return LowRank(*factors)


def layer_matrices() -> dict[str, np.ndarray]:
    """The matrix of each layer of layers-v1: a parameter's entry [o, i, y, x] is 1000 o + 100 i + 10 y + x."""
    taps = [(y, x) for y in range(2) for x in range(3)]
    conv = [[1000 * o + 100 * i + 10 * y + x for y, x in taps for i in range(4)] for o in range(3)]
    grouped = [[1000 * o + 100 * i + 10 * y for y in range(3) for i in range(2)] for o in range(6)]
    depthwise = [[1000 * o + 10 * y + x for y, x in taps] for o in range(4)]
    matrices = {
        "linear": [[1000 * o + 100 * i for i in range(4)] for o in range(3)],
        "transposed": [[1000 * o + 100 * i for o in range(4)] for i in range(3)],
        "conv": conv,
        "grouped.group0": grouped[:3],
        "grouped.group1": grouped[3:],
        "depthwise": depthwise,
        **{
            f"rnn.weight_{part}_l0": [[1000 * o + 100 * i for i in range(2)] for o in range(2)] for part in ("ih", "hh")
        },
    }
    return {name: np.array(rows, dtype=np.float32) for name, rows in matrices.items()}


def write_layers(path: Path) -> None:
    write_artifact(
        path,
        config={"model_type": "golden"},
        layers={name: DenseFloat(matrix) for name, matrix in layer_matrices().items()},
        tied={},
        tensors={"conv.bias": np.zeros(3, dtype=np.float32)},
        extra_files={},
    )


def main() -> None:
    layouts = {format: example(format) for format in FORMATS}
    for format, layout in layouts.items():
        path = HERE / "layouts" / f"{format}.json"
        if path.exists():
            sys.stderr.write(f"{path.name} is frozen; delete it first if it was never released\n")
            continue
        content = {
            "format": format,
            "meta": layout.meta(),
            "arrays": {name: array.tobytes().hex() for name, array in layout.arrays().items()},
            "dense": layout.to_dense().tolist(),
        }
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, sort_keys=True) + "\n")
    for name, formats in ARTIFACTS.items():
        if (HERE / name).exists():
            continue
        write_artifact(
            HERE / name,
            config={"model_type": "golden"},
            layers={f"layer.{format}": layouts[format] for format in formats},
            tied={"head": "layer.dense-bf16-v1"},
            tensors={
                "norm.weight": np.array([1.0, -2.5, 0.125], dtype=np.float32),
                "position.weight": np.array([[0x3F80, 0xC020]], dtype=np.uint16),
                "ids": np.arange(4, dtype=np.int64),
            },
            extra_files={},
        )
    if not (HERE / "layers-v1").exists():
        write_layers(HERE / "layers-v1")


if __name__ == "__main__":
    main()
