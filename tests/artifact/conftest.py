from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rarefy.artifact import write_artifact
from rarefy.core.grids import IntGrid, dequantize, fit_minmax, quantize, to_bf16_bits
from rarefy.core.patterns import NM, Unstructured
from rarefy.core.solution import Solution
from rarefy.layouts import AnyLayout, pack


def _layers() -> dict[str, AnyLayout]:
    weight = np.random.default_rng(0).standard_normal((3, 12)).astype(np.float32)
    sparse = weight * (np.abs(weight) > 0.7)
    two_four = weight * np.tile([True, False, True, False], (3, 3))
    fitted = fit_minmax(two_four, IntGrid(4, 32, False))
    on_grid = dequantize(quantize(two_four, fitted), fitted)
    return {
        "m.embed": pack(Solution.dense(weight)),
        "m.0.q": pack(Solution(sparse, sparse != 0, Unstructured(0.5), None)),
        "m.0.k": pack(Solution(on_grid, two_four != 0, NM(2, 4), fitted)),
    }


@pytest.fixture
def content() -> dict[str, Any]:
    """Arguments of write_artifact for a model of three tiny layers."""
    return {
        "config": {"architectures": ["X"], "torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "n": 1}},
        "layers": _layers(),
        "tied": {"m.head": "m.embed"},
        "tensors": {
            "m.norm.weight": np.array([1.0, 2.0, 3.0], dtype=np.float32),
            "m.position.weight": to_bf16_bits(np.array([[0.5, -1.5]], dtype=np.float32)),
            "m.half": np.array([0.25], dtype=np.float16),
            "m.ids": np.arange(3, dtype=np.int64),
            "m.empty": np.zeros((0, 4), dtype=np.float32),
        },
        "extra_files": {"tokenizer.json": b"{}", "1_Pooling/config.json": b"{}\n"},
    }


@pytest.fixture
def artifact_dir(tmp_path: Path, content: dict[str, Any]) -> Path:
    return write_artifact(tmp_path / "out", **content)


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    """All files below a directory with their bytes."""

    def take(root: Path) -> dict[str, bytes]:
        return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}

    return take
