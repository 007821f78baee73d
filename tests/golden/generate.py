"""Write the golden files of format version 1. They are frozen: run this only to add a format, never to change one.

    python tests/golden/generate.py

layouts/FORMAT.json: metadata, the bytes of each array as hex, and the matrix that they mean.
artifact-v1/: a whole artifact with one layer of each of the first ten formats, a tied alias and three plain tensors.
"""

import json
import sys
from pathlib import Path

import numpy as np

from rarefy.artifact import write_artifact
from rarefy.core.grids import IntGrid, dequantize, fit_minmax, quantize
from rarefy.core.patterns import NM, Unstructured
from rarefy.core.solution import Solution
from rarefy.layouts import FORMATS, NF4, AnyLayout, Binary, LookupTable, Ternary, pack

HERE = Path(__file__).resolve().parent
FIRST_FORMATS = (
    *("dense-f32-v1", "dense-bf16-v1", "dense-int8-v1", "dense-int4-v1"),
    *("bitmask-bf16-v1", "bitmask-int8-v1", "bitmask-int4-v1", "nm-bf16-v1", "nm-int8-v1", "nm-int4-v1"),
)
ROWS, WIDTH = 3, 37  # odd, beyond one group of 32 by five columns, beyond one of N:M by one


def example(format: str) -> AnyLayout:
    """A small layout of the format; no random generator, whose numbers may change with its version."""
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
    if not (HERE / "artifact-v1").exists():
        write_artifact(
            HERE / "artifact-v1",
            config={"model_type": "golden"},
            layers={f"layer.{format}": layouts[format] for format in FIRST_FORMATS},
            tied={"head": "layer.dense-bf16-v1"},
            tensors={
                "norm.weight": np.array([1.0, -2.5, 0.125], dtype=np.float32),
                "position.weight": np.array([[0x3F80, 0xC020]], dtype=np.uint16),
                "ids": np.arange(4, dtype=np.int64),
            },
            extra_files={},
        )


if __name__ == "__main__":
    main()
