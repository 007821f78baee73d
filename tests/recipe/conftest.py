from dataclasses import dataclass
from math import prod

import pytest


@dataclass(frozen=True)
class Layer:
    """A layer of a made-up model: what a recipe must know, and no torch."""

    name: str
    kind: str
    shape: tuple[int, ...]
    block: str | None = None
    compressible: bool = True
    reason: str | None = None
    tied_to: str | None = None
    dtype: str = "float32"
    num_bytes: int = 0

    @property
    def module(self) -> str:
        return self.name

    @property
    def matrix(self) -> tuple[int, int] | None:
        return (self.shape[0], prod(self.shape[1:])) if len(self.shape) >= 2 else None


@dataclass(frozen=True)
class Model:
    blocks: tuple[str, ...]
    layers: tuple[Layer, ...]


def decoder(*, tied: bool = True, num_blocks: int = 2) -> Model:
    layers = [Layer("model.embed_tokens", "embedding", (100, 64), num_bytes=25600)]
    for index in range(num_blocks):
        block = f"model.layers.{index}"
        for name, shape in (
            ("self_attn.q_proj", (64, 64)),
            ("self_attn.k_proj", (32, 64)),
            ("mlp.up_proj", (96, 64)),
            ("mlp.down_proj", (64, 96)),
        ):
            layers.append(Layer(f"{block}.{name}", "linear", shape, block, num_bytes=4 * shape[0] * shape[1]))
        norm = Layer(f"{block}.norm", "norm", (64,), block, False, "a normalisation", num_bytes=256)
        layers.append(norm)
    tie = "model.embed_tokens" if tied else None
    reason = "its weight is that of model.embed_tokens" if tied else None
    layers.append(Layer("lm_head", "linear", (100, 64), None, not tied, reason, tie, num_bytes=0 if tied else 25600))
    return Model(tuple(f"model.layers.{index}" for index in range(num_blocks)), tuple(layers))


@pytest.fixture
def model() -> Model:
    return decoder()
