import pytest
import torch

from rarefy.core.grids import IntGrid
from rarefy.core.patterns import NM, Blocks, Unstructured
from rarefy.methods import GPTQ, METHODS, RTN, LayerMethod, Magnitude, SparseGPT, Wanda

INT4, INT8 = IntGrid(4, 32, False), IntGrid(8, None, True)

EXAMPLES: dict[str, list[LayerMethod]] = {
    "magnitude": [Magnitude(Unstructured(0.5)), Magnitude(NM(2, 4)), Magnitude(Blocks((4, 8), 0.5))],
    "wanda": [Wanda(Unstructured(0.7)), Wanda(NM(16, 64)), Wanda(Blocks((3, 20), 0.4))],
    "sparsegpt": [
        SparseGPT(Unstructured(0.6), block_size=48),
        SparseGPT(NM(2, 4), order="activation"),
        SparseGPT(NM(3, 7), refit_steps=0),
        SparseGPT(Unstructured(0.5), INT4),
        SparseGPT(NM(2, 4), IntGrid(2, 32, False)),
        SparseGPT(Blocks((4, 24), 0.5), order="activation"),
        SparseGPT(Blocks((1, 8), 0.5), INT8, refit_steps=0),
        SparseGPT(NM(8, 16), INT4, refit_steps=0, order="activation"),
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
