import pytest
import torch

from rarefy.core.grids import IntGrid
from rarefy.core.patterns import NM, Blocks, Lines, Unstructured
from rarefy.core.ranks import Rank
from rarefy.methods import (
    ALPS,
    ASVD,
    DRONE,
    GPTQ,
    METHODS,
    OATS,
    OBD,
    OBERT,
    RIA,
    RTN,
    SVD,
    SVDLLM,
    SVT,
    APoZ,
    BiasCorrection,
    DSnoT,
    FrequencySVD,
    Lasso,
    LayerMethod,
    Magnitude,
    Random,
    Refit,
    Rescale,
    RobustPCA,
    ScaledGD,
    SparseGPT,
    Spatial,
    Taylor,
    Tucker,
    Wanda,
)

INT4, INT8 = IntGrid(4, 32, False), IntGrid(8, None, True)

EXAMPLES: dict[str, list[LayerMethod]] = {
    "magnitude": [Magnitude(Unstructured(0.5)), Magnitude(NM(2, 4)), Magnitude(Blocks((4, 8), 0.5), norm="l2")],
    "wanda": [Wanda(Unstructured(0.7)), Wanda(NM(16, 64)), Wanda(Lines("rows", 0.5)), Wanda(Blocks((3, 20), 0.4))],
    "taylor": [Taylor(Unstructured(0.5)), Taylor(NM(2, 4), average="signed"), Taylor(Lines("columns", 0.25))],
    "obd": [OBD(Unstructured(0.7)), OBD(NM(2, 4)), OBD(Blocks((4, 8), 0.5))],
    "obert": [
        OBERT(Unstructured(0.5)),
        OBERT(NM(2, 4), block_size=7),
        OBERT(Blocks((4, 8), 0.5), block_size=1),
        OBERT(Lines("rows", 0.5), block_size=512),
    ],
    "sparsegpt": [
        SparseGPT(Unstructured(0.6), block_size=48),
        SparseGPT(NM(2, 4), order="activation"),
        SparseGPT(NM(3, 7), refit_steps=0),
        SparseGPT(Lines("rows", 0.4), INT8),
        SparseGPT(Lines("columns", 0.4), order="activation"),
        SparseGPT(Unstructured(0.5), INT4),
        SparseGPT(NM(2, 4), IntGrid(2, 32, False)),
        SparseGPT(Blocks((4, 24), 0.5), order="activation"),
        SparseGPT(Blocks((1, 8), 0.5), INT8, refit_steps=0),
        SparseGPT(NM(8, 16), INT4, refit_steps=0, order="activation"),
    ],
    "random": [Random(Unstructured(0.5)), Random(NM(2, 4), seed=3), Random(Blocks((4, 8), 0.5))],
    "ria": [RIA(Unstructured(0.6)), RIA(NM(2, 4), power=1.0)],
    "refit": [Refit(), Refit(num_steps=2, percent_damp=0.1)],
    "dsnot": [DSnoT(Unstructured(0.5)), DSnoT(NM(2, 4)), DSnoT(Unstructured(0.7), start="magnitude", max_swaps=5)],
    "apoz": [APoZ(Lines("columns", 0.3)), APoZ(Lines("columns", 0.5), threshold=0.5)],
    "lasso": [
        Lasso(Lines("columns", 0.5)),
        Lasso(Unstructured(0.6)),
        Lasso(Blocks((4, 8), 0.5), num_steps=10, refit_steps=0),
    ],
    "rescale": [Rescale()],
    "bias-correction": [BiasCorrection()],
    "alps": [ALPS(Unstructured(0.6)), ALPS(NM(3, 7)), ALPS(Blocks((4, 8), 0.5), max_steps=10, refit_steps=0)],
    "svd": [SVD(Rank(ratio=0.4)), SVD(Rank(energy=0.7), remainder="keep")],
    "svt": [SVT(Rank(count=3)), SVT(Rank(count=2), remainder="keep")],
    "asvd": [ASVD(Rank(num_bytes=2000)), ASVD(Rank(count=1), alpha=1.0, remainder="keep")],
    "frequency-svd": [FrequencySVD(Rank(ratio=0.5)), FrequencySVD(Rank(count=2), smoothing=0.1, remainder="keep")],
    "svd-llm": [SVDLLM(Rank(ratio=0.5)), SVDLLM(Rank(ratio=0.2), remainder="keep")],
    "drone": [DRONE(Rank(ratio=0.5)), DRONE(Rank(energy=0.5), remainder="keep")],
    "scaled-gd": [ScaledGD(Rank(ratio=0.4)), ScaledGD(Rank(count=2), num_steps=3, remainder="keep")],
    "tucker": [
        Tucker(Rank(ratio=0.5)),
        Tucker(Rank(count=2), num_steps=0, remainder="keep"),
        Tucker(Rank(energy=0.8)),
        Tucker(Rank(ratio=0.3), fit="outputs"),
    ],
    "spatial": [
        Spatial(Rank(ratio=0.5)),
        Spatial(Rank(num_bytes=900), remainder="keep"),
        Spatial(Rank(ratio=0.3), fit="outputs"),
    ],
    "oats": [OATS(Rank(ratio=0.2), Unstructured(0.7)), OATS(Rank(count=2), NM(2, 8), num_steps=3)],
    "robust-pca": [
        RobustPCA(Rank(count=3), Unstructured(0.7)),
        RobustPCA(Rank(energy=0.5), Blocks((4, 8), 0.5), max_steps=3),
    ],
    "rtn": [
        RTN(INT4),
        RTN(IntGrid(8, None, True), search="error"),
        RTN(IntGrid(4, 64, True)),
        RTN(IntGrid(2, 32, True)),
    ],
    "gptq": [
        GPTQ(INT4),
        GPTQ(INT8, order="given"),
        GPTQ(IntGrid(4, None, True), search="minmax", block_size=1),
        GPTQ(IntGrid(3, 32, False)),
    ],
}
assert set(EXAMPLES) == set(METHODS)


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


def examples() -> list[LayerMethod]:
    return [method for methods in EXAMPLES.values() for method in methods]
