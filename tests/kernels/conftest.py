"""Random packed weights, packed here by plain loops, with the numbers they stand for."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from rarefy import kernels
from rarefy.layouts import FORMATS, Layout

ISAS = ("numpy", "reference", "avx2", "avx512")


@dataclass(frozen=True)
class Weight:
    """A layout, and the same weight as integers and scales (or floats in `level_OI`, with scales of 1), in float64."""

    layout: Layout
    level_OI: np.ndarray
    scale_OI: np.ndarray

    @property
    def dense_OI(self) -> np.ndarray:  # noqa: N802 (shape suffix)
        return self.level_OI * self.scale_OI


def bits_of(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits of float32 values that bfloat16 holds exactly."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    assert not np.any(bits & 0xFFFF)
    return (bits >> 16).astype(np.uint16)


def nibbles(codes: list[int]) -> list[int]:
    padded = [*codes, 0] if len(codes) % 2 else codes
    return [padded[i] | padded[i + 1] << 4 for i in range(0, len(padded), 2)]


def make_weight(
    layout_format: str,
    num_outputs: int,
    num_inputs: int,
    *,
    group_size: int | None = 64,
    symmetric: bool = True,
    density: float = 0.5,
    keep: int = 5,
    group: int = 12,
    block_shape: tuple[int, int] = (16, 64),
    scales: tuple[float, ...] = (0.25, 0.5, 1.0, 1.5),
    seed: int = 0,
) -> Weight:
    """Make a weight with random codes, and with random mask in the formats that have one."""
    rng = np.random.default_rng([seed, num_outputs, num_inputs])
    shape = (num_outputs, num_inputs)
    kind, value, _ = layout_format.split("-")
    mask_OI = np.ones(shape, bool)
    meta: dict[str, object] = {"shape": list(shape)}
    arrays: dict[str, np.ndarray] = {}
    if kind == "bitmask":
        mask_OI = rng.random(shape) < density
        meta["num_values"] = int(mask_OI.sum())
    if kind == "nm":
        mask_OI = np.zeros(shape, bool)
        for row in range(num_outputs):
            for start in range(0, num_inputs, group):
                width = min(group, num_inputs - start)
                mask_OI[row, start + rng.permutation(width)[: -(-keep * width // group)]] = True
        meta |= {"keep": keep, "group": group}
    order = [(o, i) for o in range(num_outputs) for i in range(num_inputs)]
    if kind == "block":
        high, wide = block_shape
        stored = rng.random((-(-num_outputs // high), -(-num_inputs // wide))) < density
        mask_OI = np.array([stored[o // high, i // wide] for o, i in order], bool).reshape(shape)
        order.sort(key=lambda place: (place[0] // high, place[1] // wide))  # stable
        meta |= {"block_shape": list(block_shape), "num_values": int(mask_OI.sum())}
        arrays["mask"] = np.packbits(stored, axis=1, bitorder="little")
    elif kind != "dense":
        arrays["mask"] = np.packbits(mask_OI, axis=1, bitorder="little")
    stream_OI = np.array([place for place in order if mask_OI[place]], np.int64).reshape(-1, 2)
    scale_OI = np.ones(shape)
    if "int" in value:
        num_bits = int(value[3:])
        num_groups = 1 if group_size is None else -(-num_inputs // group_size)
        group_of_I = np.zeros(num_inputs, int) if group_size is None else np.arange(num_inputs) // group_size
        scale_OG = rng.choice(np.array(scales, np.float32), (num_outputs, num_groups))
        zero_OG = rng.integers(0, 2**num_bits, (num_outputs, num_groups))
        if symmetric:
            zero_OG[:] = 2 ** (num_bits - 1)
        else:
            arrays["zero_points"] = zero_OG.astype(np.uint8)
        arrays["scales"] = bits_of(scale_OG)
        code_OI = rng.integers(0, 2**num_bits, shape)
        code_OI[rng.random(shape) < 0.05] = 2**num_bits - 1
        if kind == "dense":
            packed = [nibbles(row) if num_bits == 4 else row for row in code_OI.tolist()]
            width = -(-num_inputs // 2) if num_bits == 4 else num_inputs
            arrays["codes"] = np.array(packed, np.uint8).reshape(num_outputs, width)
        else:
            stream = code_OI[tuple(stream_OI.T)].tolist()
            arrays["codes"] = np.array(nibbles(stream) if num_bits == 4 else stream, np.uint8)
        meta |= {"group_size": group_size, "symmetric": symmetric}
        level_OI = np.where(mask_OI, code_OI - zero_OG[:, group_of_I], 0).astype(np.float64)
        scale_OI = scale_OG[:, group_of_I].astype(np.float64)
    else:
        floats = rng.standard_normal(shape).astype(np.float32)
        if value == "bf16":
            floats = (floats.view(np.uint32) & 0xFFFF0000).view(np.float32)
        kept = floats[tuple(stream_OI.T)] if kind != "dense" else floats
        arrays["values"] = bits_of(kept) if value == "bf16" else kept
        level_OI = np.where(mask_OI, floats, 0).astype(np.float64)
    layout = FORMATS[layout_format].from_arrays(layout_format, meta, arrays)
    assert layout.format == layout_format
    return Weight(layout, level_OI, scale_OI)


@pytest.fixture(scope="session")
def weight() -> Callable[..., Weight]:
    return make_weight


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set in turn; those that this machine cannot run are skipped."""
    name = str(request.param)
    if not kernels.extension_status()[0] and name != "numpy":
        pytest.skip("the extension is not built")
    if name not in kernels.runnable_isas(kernels.detect_cpu()):
        pytest.skip(f"this CPU has no {name}")
    return name


# formats with kernels of their own, and not made of others
SIMPLE = sorted(name for name in FORMATS if not name.startswith(("lowrank", "sum")))


@pytest.fixture(params=SIMPLE)
def layout_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[name for name in SIMPLE if "int" in name])
def int_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[name for name in SIMPLE if "int" not in name])
def float_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def num_threads() -> Iterator[Callable[[int], None]]:
    """Sets the threads of the kernels; the old number comes back after the test."""
    before = kernels.get_num_threads()
    yield kernels.set_num_threads
    kernels.set_num_threads(before)
