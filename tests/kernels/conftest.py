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
    def is_integer(self) -> bool:
        return is_integer(self.layout.format)

    @property
    def dense_OI(self) -> np.ndarray:  # noqa: N802 (shape suffix)
        return self.level_OI * self.scale_OI


def is_integer(layout_format: str) -> bool:
    """Whether the kernels round activations for weights of this format."""
    return "int" in layout_format or layout_format in ("ternary-v1", "binary-v1")


def bits_of(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits of float32 values that bfloat16 holds exactly."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    assert not np.any(bits & 0xFFFF)
    return (bits >> 16).astype(np.uint16)


def packed_codes(codes: list[int], num_bits: int) -> list[int]:
    """A run of bits, least significant first, as bytes."""
    run = sum(code << (num_bits * k) for k, code in enumerate(codes))
    return list(run.to_bytes(-(-len(codes) * num_bits // 8), "little"))


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
    scales: tuple[float, ...] = (0.25, 0.5, 1.0, 1.5),
    scaled: bool = True,
    seed: int = 0,
) -> Weight:
    """Make a weight with random codes, and with random mask in the formats that have one."""
    rng = np.random.default_rng([seed, num_outputs, num_inputs])
    shape = (num_outputs, num_inputs)
    if not layout_format.startswith(("dense", "bitmask", "nm")):
        return make_codebook(layout_format, shape, group_size, scales, scaled, rng)
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
    if kind != "dense":
        arrays["mask"] = np.packbits(mask_OI, axis=1, bitorder="little")
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
        rows = [code_OI[o][mask_OI[o]].tolist() for o in range(num_outputs)]
        if kind == "dense":
            packed = [packed_codes(row, num_bits) for row in rows]
            arrays["codes"] = np.array(packed, np.uint8).reshape(num_outputs, -(-num_inputs * num_bits // 8))
        else:
            stream = [code for row in rows for code in row]
            arrays["codes"] = np.array(packed_codes(stream, num_bits), np.uint8)
        meta |= {"group_size": group_size, "symmetric": symmetric}
        level_OI = np.where(mask_OI, code_OI - zero_OG[:, group_of_I], 0).astype(np.float64)
        scale_OI = scale_OG[:, group_of_I].astype(np.float64)
    else:
        floats = rng.standard_normal(shape).astype(np.float32)
        if value == "bf16":
            floats = (floats.view(np.uint32) & 0xFFFF0000).view(np.float32)
        stored = floats[mask_OI] if kind != "dense" else floats
        arrays["values"] = bits_of(stored) if value == "bf16" else stored
        level_OI = np.where(mask_OI, floats, 0).astype(np.float64)
    layout = FORMATS[layout_format].from_arrays(layout_format, meta, arrays)
    assert layout.format == layout_format
    return Weight(layout, level_OI, scale_OI)


def make_codebook(
    layout_format: str,
    shape: tuple[int, int],
    group_size: int | None,
    scales: tuple[float, ...],
    scaled: bool,
    rng: np.random.Generator,
) -> Weight:
    """Make a weight of a format whose values are entries of a small table, times a scale."""
    num_outputs, num_inputs = shape
    num_groups = 1 if group_size is None else -(-num_inputs // group_size)
    scale_OG = rng.choice(np.array(scales, np.float32), (num_outputs, num_groups))
    group_of_I = np.zeros(num_inputs, int) if group_size is None else np.arange(num_inputs) // group_size
    scale_OI = scale_OG[:, group_of_I].astype(np.float64)
    meta: dict[str, object] = {"shape": list(shape), "group_size": group_size}
    arrays = {"scales": bits_of(scale_OG)}
    if layout_format == "ternary-v1":
        code_OI = rng.integers(0, 3, shape)
        padded = np.zeros((num_outputs, -(-num_inputs // 5) * 5), int)
        padded[:, :num_inputs] = code_OI
        packed = padded.reshape(num_outputs, -1, 5) @ np.array([1, 3, 9, 27, 81]) if num_inputs else padded
        arrays["codes"] = packed.astype(np.uint8)
        level_OI = code_OI - 1.0
    elif layout_format == "binary-v1":
        code_OI = rng.integers(0, 2, shape)
        arrays["codes"] = np.packbits(code_OI.astype(bool), axis=1, bitorder="little")
        level_OI = code_OI * 2.0 - 1.0
    else:
        num_bits = int(layout_format[3])
        table = rng.standard_normal(2**num_bits).astype(np.float32)
        if num_bits == 8:
            table = (table.view(np.uint32) & 0xFFFF0000).view(np.float32)
        code_OI = rng.integers(0, 2**num_bits, shape)
        rows = [packed_codes(row, num_bits) for row in code_OI.tolist()]
        arrays["codes"] = np.array(rows, np.uint8).reshape(num_outputs, -(-num_inputs * num_bits // 8))
        arrays["table"] = bits_of(table) if num_bits == 8 else table
        meta["scaled"] = scaled
        level_OI, scale_OI = table[code_OI].astype(np.float64), np.ones(shape)
        if scaled:  # float32(entry * scale) is the value
            level_OI = (table[code_OI] * scale_OG[:, group_of_I]).astype(np.float64)
        else:
            meta["group_size"] = None
            del arrays["scales"]
    layout = FORMATS[layout_format].from_arrays(layout_format, meta, arrays)
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


@pytest.fixture(params=sorted(FORMATS))
def layout_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=sorted(name for name in FORMATS if is_integer(name)))
def int_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=sorted(name for name in FORMATS if not is_integer(name)))
def float_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def num_threads() -> Iterator[Callable[[int], None]]:
    """Sets the threads of the kernels; the old number comes back after the test."""
    before = kernels.get_num_threads()
    yield kernels.set_num_threads
    kernels.set_num_threads(before)
