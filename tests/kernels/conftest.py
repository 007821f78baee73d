"""Random packed weights, packed here by plain loops, with the numbers they stand for."""

import copy
import functools
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rarefy import kernels
from rarefy.kernels.extension import ISAS
from rarefy.layouts import FORMATS, Layout


@dataclass(frozen=True)
class Weight:
    """A layout, and what is multiplied: integers, or a table's entries as bfloat16, with scales; or floats in
    `level_OI`, with scales of 1. In float64."""

    layout: Layout
    level_OI: np.ndarray
    scale_OI: np.ndarray

    @property
    def is_integer(self) -> bool:
        return is_integer(self.layout.format)

    @property
    def dense_OI(self) -> np.ndarray:  # noqa: N802 (shape suffix)
        return self.level_OI * self.scale_OI

    @property
    def is_bf16(self) -> bool:
        return "bf16" in self.layout.format or self.layout.format.startswith("lut")

    def met(self, x: np.ndarray) -> np.ndarray:
        """The activations that a float weight meets, in float64: bfloat16 meets bfloat16."""
        return to_eight_bits(x) if self.is_bf16 else x.astype(np.float64)


def to_eight_bits(x: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 numbers of finite normal ones, ties to even, in float64."""
    mantissa, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(np.rint(np.ldexp(mantissa, 8)), exponent - 8)


def is_integer(layout_format: str) -> bool:
    """Whether the kernels quantize activations for weights of this format."""
    return "-int" in layout_format or layout_format in ("ternary-v1", "binary-v1")


def bits_of(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits of float32 values that bfloat16 holds exactly."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    assert not np.any(bits & 0xFFFF)
    return (bits >> 16).astype(np.uint16)


def packed_codes(codes: list[int], num_bits: int) -> list[int]:
    """A run of bits, least significant first, as bytes."""
    digits = [f"{code:0{num_bits}b}" for code in range(2**num_bits)]
    run = int("".join(map(digits.__getitem__, reversed(codes))) or "0", 2)
    return list(run.to_bytes(-(-len(codes) * num_bits // 8), "little"))


@dataclass(frozen=True)
class Spec:
    """What a weight should look like; a maker heeds what its format has."""

    format: str
    num_outputs: int
    num_inputs: int
    group_size: int | None = 64
    symmetric: bool = True
    density: float = 0.5
    keep: int = 5
    group: int = 12
    block_shape: tuple[int, int] = (16, 64)
    scales: tuple[float, ...] = (0.25, 0.5, 1.0, 1.5)
    scaled: bool = True
    seed: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_outputs, self.num_inputs

    @property
    def value(self) -> str:
        """f32, bf16, int4, ...: the second word of the format's name."""
        return self.format.split("-")[1]


def make_masked(spec: Spec, rng: np.random.Generator) -> Weight:
    """Dense, or under a random mask of bits."""
    kind = spec.format.split("-")[0]
    mask_OI = np.ones(spec.shape, bool)
    meta: dict[str, object] = {"shape": list(spec.shape)}
    arrays: dict[str, np.ndarray] = {}
    if kind == "bitmask":
        mask_OI = rng.random(spec.shape) < spec.density
        meta["num_values"] = int(mask_OI.sum())
    if kind == "nm":
        mask_OI = np.zeros(spec.shape, bool)
        for row in range(spec.num_outputs):
            for start in range(0, spec.num_inputs, spec.group):
                width = min(spec.group, spec.num_inputs - start)
                mask_OI[row, start + rng.permutation(width)[: -(-spec.keep * width // spec.group)]] = True
        meta |= {"keep": spec.keep, "group": spec.group}
    if kind != "dense":
        arrays["mask"] = np.packbits(mask_OI, axis=1, bitorder="little")
    if "int" in spec.value:
        num_bits = int(spec.value[3:])
        scale_OI, zero_OI = make_grid(spec, rng, num_bits, meta, arrays)
        code_OI = make_codes(spec, rng, num_bits)
        rows = [code_OI[o][mask_OI[o]].tolist() for o in range(spec.num_outputs)]
        if kind == "dense":
            arrays["codes"] = packed_rows(spec, rows, num_bits)
        else:
            stream = [code for row in rows for code in row]
            arrays["codes"] = np.array(packed_codes(stream, num_bits), np.uint8)
        level_OI = np.where(mask_OI, code_OI - zero_OI, 0)
    else:
        floats = rng.standard_normal(spec.shape).astype(np.float32)
        if spec.value == "bf16":
            floats = (floats.view(np.uint32) & 0xFFFF0000).view(np.float32)
        stored = floats[mask_OI] if kind != "dense" else floats
        arrays["values"] = bits_of(stored) if spec.value == "bf16" else stored
        level_OI, scale_OI = np.where(mask_OI, floats, 0), np.ones(spec.shape)
    return finish(spec, meta, arrays, level_OI, scale_OI)


def make_blocks(spec: Spec, rng: np.random.Generator) -> Weight:
    """Random blocks, stored one after the other."""
    high, wide = spec.block_shape
    stored = rng.random((-(-spec.num_outputs // high), -(-spec.num_inputs // wide))) < spec.density
    mask_OI = np.zeros(spec.shape, bool)
    stream_O, stream_I = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for down, across in np.argwhere(stored) * (high, wide):
        inside = slice(down, down + high), slice(across, across + wide)
        mask_OI[inside] = True
        places_O, places_I = np.indices(mask_OI[inside].shape)
        stream_O.append(down + places_O.reshape(-1))
        stream_I.append(across + places_I.reshape(-1))
    stream = np.concatenate(stream_O), np.concatenate(stream_I)
    meta: dict[str, object] = {
        "shape": list(spec.shape), "block_shape": list(spec.block_shape), "num_values": int(mask_OI.sum())
    }  # fmt: skip
    arrays: dict[str, np.ndarray] = {"mask": np.packbits(stored, axis=1, bitorder="little")}
    if spec.value == "bf16":
        floats = rng.standard_normal(spec.shape).astype(np.float32)
        floats = (floats.view(np.uint32) & 0xFFFF0000).view(np.float32)
        arrays["values"] = bits_of(floats[stream])
        return finish(spec, meta, arrays, np.where(mask_OI, floats, 0), np.ones(spec.shape))
    scale_OI, zero_OI = make_grid(spec, rng, 8, meta, arrays)
    code_OI = make_codes(spec, rng, 8)
    arrays["codes"] = code_OI[stream].astype(np.uint8)
    return finish(spec, meta, arrays, np.where(mask_OI, code_OI - zero_OI, 0), scale_OI)


def make_grid(
    spec: Spec, rng: np.random.Generator, num_bits: int, meta: dict[str, object], arrays: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Adds scales and zero points of a random grid; returns those of every entry, (O, I) each."""
    num_groups = 1 if spec.group_size is None else -(-spec.num_inputs // spec.group_size)
    group_of_I = np.arange(spec.num_inputs) // (spec.group_size or max(spec.num_inputs, 1))
    scale_OG = rng.choice(np.array(spec.scales, np.float32), (spec.num_outputs, num_groups))
    zero_OG = rng.integers(0, 2**num_bits, (spec.num_outputs, num_groups))
    if spec.symmetric:
        zero_OG[:] = 2 ** (num_bits - 1)
    else:
        arrays["zero_points"] = zero_OG.astype(np.uint8)
    arrays["scales"] = bits_of(scale_OG)
    meta |= {"group_size": spec.group_size, "symmetric": spec.symmetric}
    return scale_OG[:, group_of_I].astype(np.float64), zero_OG[:, group_of_I]


def make_codes(spec: Spec, rng: np.random.Generator, num_bits: int) -> np.ndarray:
    """Random codes (O, I), the largest one often."""
    code_OI = rng.integers(0, 2**num_bits, spec.shape)
    code_OI[rng.random(spec.shape) < 0.05] = 2**num_bits - 1
    return code_OI


def finish(
    spec: Spec, meta: dict[str, object], arrays: dict[str, np.ndarray], level_OI: np.ndarray, scale_OI: np.ndarray
) -> Weight:
    layout = FORMATS[spec.format].from_arrays(spec.format, meta, arrays)
    assert layout.format == spec.format
    return Weight(layout, level_OI.astype(np.float64), scale_OI)


def packed_rows(spec: Spec, rows: list[list[int]], num_bits: int) -> np.ndarray:
    """Each row a run of its own."""
    packed = [packed_codes(row, num_bits) for row in rows]
    return np.array(packed, np.uint8).reshape(spec.num_outputs, -(-spec.num_inputs * num_bits // 8))


def make_levels(spec: Spec, rng: np.random.Generator) -> Weight:
    """Ternary or binary."""
    meta: dict[str, object] = {"shape": list(spec.shape)}
    arrays: dict[str, np.ndarray] = {}
    scale_OI, _ = make_grid(replace(spec, symmetric=True), rng, 8, meta, arrays)
    del meta["symmetric"]
    if spec.format == "binary-v1":
        code_OI = rng.integers(0, 2, spec.shape)
        arrays["codes"] = packed_rows(spec, code_OI.tolist(), 1)
        return finish(spec, meta, arrays, code_OI * 2 - 1, scale_OI)
    code_OI = rng.integers(0, 3, spec.shape)
    padded = np.zeros((spec.num_outputs, -(-spec.num_inputs // 5), 5), int)
    padded.reshape(spec.num_outputs, padded.shape[1] * 5)[:, : spec.num_inputs] = code_OI
    arrays["codes"] = (padded @ np.array([1, 3, 9, 27, 81])).astype(np.uint8)
    return finish(spec, meta, arrays, code_OI - 1, scale_OI)


def make_table(spec: Spec, rng: np.random.Generator) -> Weight:
    """A lookup table of 16 or 256 entries."""
    meta: dict[str, object] = {"shape": list(spec.shape)}
    arrays: dict[str, np.ndarray] = {}
    scale_OI, _ = make_grid(replace(spec, symmetric=True), rng, 8, meta, arrays)
    del meta["symmetric"]
    num_bits = int(spec.format[3])
    table = rng.standard_normal(2**num_bits).astype(np.float32)
    if num_bits == 8:
        table = (table.view(np.uint32) & 0xFFFF0000).view(np.float32)
    arrays["table"] = bits_of(table) if num_bits == 8 else table
    code_OI = rng.integers(0, 2**num_bits, spec.shape)
    arrays["codes"] = packed_rows(spec, code_OI.tolist(), num_bits)
    meta["scaled"] = spec.scaled
    if not spec.scaled:
        meta["group_size"] = None
        del arrays["scales"]
        scale_OI = np.ones(spec.shape)
    return finish(spec, meta, arrays, to_eight_bits(table)[code_OI], scale_OI)


# By the first word of the format's name: a new kind of layout adds its maker here.
MAKERS: dict[str, Callable[[Spec, np.random.Generator], Weight]] = {
    "dense": make_masked,
    "bitmask": make_masked,
    "nm": make_masked,
    "ternary": make_levels,
    "binary": make_levels,
    "lut4": make_table,
    "lut8": make_table,
    "block": make_blocks,
}
SIMPLE = sorted(name for name in FORMATS if name.split("-")[0] in MAKERS)
COMPOSED = sorted(set(FORMATS) - set(SIMPLE))  # of others, which have the kernels: test_compositions.py


def make_weight(layout_format: str, num_outputs: int, num_inputs: int, **options: Any) -> Weight:
    """Make a random weight in any format; see Spec for the options. A test may write into what is in its layout."""
    spec = Spec(layout_format, num_outputs, num_inputs, **options)
    made = _kept(spec) if num_outputs * num_inputs <= MOST_KEPT else _made(spec)
    return replace(made, layout=copy.deepcopy(made.layout))


def _made(spec: Spec) -> Weight:
    kind = spec.format.split("-", maxsplit=1)[0]
    weight = MAKERS[kind](spec, np.random.default_rng([spec.seed, *spec.shape]))
    for numbers in (weight.level_OI, weight.scale_OI):
        numbers.flags.writeable = False
    return weight


# Each instruction set wants the same weights, after those of all grids: the loops take longer than the products do.
_kept = functools.lru_cache(maxsize=128)(_made)
MOST_KEPT = 1 << 17  # numbers, of which each takes some 20 bytes


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


@pytest.fixture(params=SIMPLE)
def layout_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[name for name in SIMPLE if is_integer(name)])
def int_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[name for name in SIMPLE if not is_integer(name)])
def float_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(name="to_eight_bits")
def fixture_to_eight_bits() -> Callable[[np.ndarray], np.ndarray]:
    return to_eight_bits


@pytest.fixture
def num_threads() -> Iterator[Callable[[int], None]]:
    """Sets the threads of the kernels; the old number comes back after the test."""
    before = kernels.get_num_threads()
    yield kernels.set_num_threads
    kernels.set_num_threads(before)


@pytest.fixture(scope="session")
def tool() -> Callable[..., str]:
    """Path of a program, beside this Python too; skips where it is missing, and says what package has it."""

    def find(name: str, package: str) -> str:
        found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
        if found is None:
            pytest.skip(f"{name} is missing ({package})")
        return found

    return find


@pytest.fixture(scope="session")
def cxx_compiler() -> str:
    """One for this machine, which cmake will find too."""
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return found
    pytest.skip("no C++ compiler")


@pytest.fixture(scope="session")
def run_program() -> Callable[..., str]:
    """Runs a program that must succeed; returns what it prints."""

    def run(*command: str | Path) -> str:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    return run


@pytest.fixture(scope="session")
def run_cmake(tool: Callable[..., str], run_program: Callable[..., str]) -> Callable[..., str]:
    """Runs cmake, which must succeed; returns what it prints."""
    cmake = tool("cmake", "pip install cmake")
    return lambda *arguments: run_program(cmake, *arguments)
