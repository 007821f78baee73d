"""Arguments of any dtype, shape and stride into every bound function: an exception, or a result; never a fault.

A fault ends the interpreter, so that a plain run is a test. RAREFY_FUZZ_SEED and RAREFY_FUZZ_CALLS make it another or
a longer one, which pays with an extension that is built with -DRAREFY_SANITIZE=address,undefined.
"""

import os

import numpy as np
import pytest

native = pytest.importorskip("rarefy._native")

SEED = int(os.environ.get("RAREFY_FUZZ_SEED", "1"))
NUM_CALLS = int(os.environ.get("RAREFY_FUZZ_CALLS", "400"))
REFUSALS = (ValueError, TypeError, RuntimeError, MemoryError, OverflowError)
SIZES = (0, 1, 2, 3, 4, 8, 15, 16, 32, 63, 64, 65, 128)
WILD = (-(2**63), -(2**31), -1, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)
DTYPES = (np.float32, np.float64, np.uint8, np.uint16, np.int32, np.int64, np.float16, np.bool_, np.complex64)


class Draw:
    """Random arguments. Most are what a function asks for, so that the damaged one among them reaches its check."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng([SEED, seed])

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def one_of(self, values):
        return values[int(self.rng.integers(len(values)))]

    def size(self) -> int:
        return int(self.one_of(SIZES))

    def number(self, good: int, high: int | None = None) -> int:
        if self.chance(0.1):
            return int(self.one_of(WILD))
        if self.chance(0.1):
            return int(self.rng.integers(-3, 200))
        return good if high is None else int(self.rng.integers(good, max(good, high) + 1))

    def array(self, *shape: int, dtype=np.float32):
        """An array whose data end where its memory does, or something like one."""
        if self.chance(0.06):
            shape = tuple(self.size() for _ in range(int(self.rng.integers(0, 3))))
        if self.chance(0.03):
            shape = tuple(int(size) for size in self.rng.integers(0, 9, 4))
        if self.chance(0.06):
            dtype = self.one_of(DTYPES)
        values = self.rng.standard_normal(shape) * (1e30 if self.chance(0.1) else 1)
        with np.errstate(all="ignore"):
            array = np.asarray(values).astype(dtype)
        if self.chance(0.04):
            return self.one_of([None, 3, "text", b"bytes", [1.0, 2.0], np.float32(1), object(), array[..., None]])
        if array.ndim and self.chance(0.04):
            array = array[..., ::-1] if self.chance(0.5) else np.asfortranarray(array)
        if self.chance(0.02):
            array.flags.writeable = False
        return array


def cache(draw: Draw):
    heads, dim, blocks = int(draw.rng.integers(1, 4)), 2 * int(draw.rng.integers(1, 20)), int(draw.rng.integers(0, 4))
    group = draw.one_of((1, 2, 5))
    tokens = min(int(draw.rng.integers(0, 40)), blocks * 64)
    return heads, dim, blocks, group, tokens, draw.number(0, blocks * 64 - tokens)


def rope_store(draw: Draw):
    heads, dim, blocks, group, tokens, start = cache(draw)
    end = max(0, min(start, 1000)) + tokens
    return (
        *(draw.array(tokens, heads * group * dim), draw.array(tokens, heads * dim), draw.array(tokens, heads * dim)),
        *(draw.array(end, dim // 2), draw.array(end, dim // 2)),
        *(draw.array(heads, blocks, dim, 64), draw.array(heads, blocks * 64, dim), start),
    )


def attention(draw: Draw):
    heads, dim, blocks, group, tokens, start = cache(draw)
    keys, values = draw.array(heads, blocks, dim, 64), draw.array(heads, blocks * 64, dim)
    return draw.array(tokens, heads * group * dim), keys, values, start, draw.number(0, 70), 0.3


def attention_rows(draw: Draw):
    heads, dim, _, group, tokens, start = cache(draw)
    num_keys = tokens + max(0, min(start, 500))
    window = draw.number(0, 70)
    keys, values = draw.array(heads, num_keys, dim), draw.array(heads, num_keys, dim)
    return draw.array(tokens, heads * group * dim), keys, values, start, window, 0.3, draw.number(0, 63 * (window > 0))


def attention_segments(draw: Draw):
    heads, dim = int(draw.rng.integers(1, 5)), int(draw.rng.integers(1, 30))
    cuts = np.concatenate([[0], np.cumsum(draw.rng.integers(0, 40, int(draw.rng.integers(0, 5))))]).astype(np.int64)
    tokens = int(cuts[-1])
    if draw.chance(0.2):
        cuts[int(draw.rng.integers(len(cuts)))] = draw.number(0, 200)
    q, k, v = (draw.array(tokens, heads * dim) for _ in range(3))
    return q, k, v, cuts if draw.chance(0.9) else draw.array(3, dtype=np.int64), draw.number(heads), 0.3


def rows(*kinds: str):
    """Arguments of the row-wise ops: m(atrix), v(ector), e(psilon), a(ctivation)."""

    def make(draw: Draw):
        height, width = draw.size(), draw.size()
        made = {
            "m": lambda: draw.array(height, width),
            "v": lambda: draw.array(width),
            "e": lambda: 1e-5,
            "a": lambda: draw.number(0, 3),
        }
        return [made[kind]() for kind in kinds]

    return make


OPS = {
    "rms_norm": rows("m", "v", "e"),
    "add_rms_norm": rows("m", "m", "v", "e"),
    "add_layer_norm": rows("m", "m", "v", "v", "e"),
    "layer_norm": rows("m", "v", "v", "e"),
    "add_bias": rows("m", "v"),
    "activate": rows("m", "a"),
    "gate": rows("m", "m", "a"),
    "rope_store": rope_store,
    "attention": attention,
    "attention_rows": attention_rows,
    "attention_segments": attention_segments,
}


def call_often(name: str, make) -> int:
    """How many of the calls were not refused."""
    accepted = 0
    for seed in range(NUM_CALLS):
        function, arguments = make(Draw(seed))
        try:
            function(*arguments)
        except REFUSALS:
            continue
        accepted += 1
    assert accepted > NUM_CALLS // 20, f"almost every call of {name} is refused: this tests nothing"
    return accepted


def test_every_op_is_fuzzed() -> None:
    assert {name for name in dir(native.Ops) if not name.startswith("_")} == {*OPS, "isa"}


@pytest.mark.parametrize("isa", ["reference", "avx2", "avx512"])
@pytest.mark.parametrize("op", sorted(OPS))
def test_ops(op: str, isa: str) -> None:
    try:
        ops = native.Ops(isa)
    except ValueError:
        pytest.skip(f"this machine has no {isa}")
    accepted = call_often(op, lambda draw: (getattr(ops, op), OPS[op](draw)))
    assert accepted < NUM_CALLS, "no argument was damaged"


def test_gram() -> None:
    if not native.gram_available():
        pytest.skip("this machine has no bfloat16 product")

    def make(draw: Draw):
        tokens, width = draw.size(), draw.size()
        return native.add_gram, (draw.array(tokens, width, dtype=np.uint16), draw.array(width, width))

    call_often("add_gram", make)


def test_fisher() -> None:
    def add(draw: Draw):
        rows, count, size = draw.size(), draw.size(), draw.size()
        dtype = np.uint16 if draw.chance(0.5) else np.float32
        function = native.fisher_add_bf16 if dtype == np.uint16 else native.fisher_add_float
        vectors = [draw.array(count * size, dtype=dtype) for _ in range(rows)]
        return function, (vectors, size, draw.array(count, size * (size + 1) // 2))

    def costs(draw: Draw):
        count, size = draw.size(), draw.size()
        mask = draw.array(count, size, dtype=np.bool_)
        vectors, blocks = draw.array(count, size), draw.array(count, size, size)
        return native.fisher_costs, (vectors, blocks, mask, draw.array(count, size))

    def drop(draw: Draw):
        count, size = draw.size(), draw.size()
        mask = draw.array(count, size, dtype=np.bool_)
        return native.fisher_drop, (mask, draw.array(count, size), draw.array(count, size, size))

    def invert(draw: Draw):
        count, size = draw.size(), draw.size()
        block = draw.array(count, size * (size + 1) // 2)
        return native.fisher_invert, (block, 1.0, 0.1, draw.array(count, size, size))

    for name, make in (("add", add), ("costs", costs), ("drop", drop), ("invert", invert)):
        call_often(f"fisher_{name}", make)


def test_products(weight, layout_format) -> None:
    w = weight(layout_format, 19, 70)
    integers = {name: int(value) for name, value in w.layout.meta().items() if isinstance(value, int)}
    if "block_shape" in w.layout.meta():
        integers["block_shape_0"], integers["block_shape_1"] = w.layout.meta()["block_shape"]
    arrays = {name: np.ascontiguousarray(array) for name, array in w.layout.arrays().items()}

    ones = {"values": np.ones((7, 19), np.float32)}
    outer = native.prepare("dense-f32-v1", "reference", 7, 19, {}, ones)

    def make(draw: Draw):
        damaged = {
            name: draw.array(*array.shape, dtype=array.dtype) if draw.chance(0.15) else array
            for name, array in arrays.items()
        }
        numbers = {name: draw.number(value) for name, value in integers.items()}
        height, width = draw.number(19), draw.number(70)

        def prepare_and_multiply() -> None:
            prepared = native.prepare(layout_format, "reference", height, width, numbers, damaged)
            outputs, inputs = prepared.shape
            if outputs > 4096 or inputs > 4096:
                return
            num_rows = draw.one_of((0, 1, 2, 5))
            weights = [prepared] if draw.chance(0.9) else draw.one_of([[None], [], [prepared] * 2, 5, [damaged]])
            native.matmul(draw.array(num_rows, inputs), weights, [draw.array(num_rows, outputs)])
            composed = native.add(prepared, native.add(prepared, prepared))
            if outputs == 19:
                composed = native.chain(composed, outer, draw.number(1))
            native.multiply(draw.array(num_rows, inputs), draw.one_of([weights, [composed], [composed, prepared]]))

        return prepare_and_multiply, ()

    call_often(layout_format, make)


def test_taps(weight) -> None:
    w = weight("dense-int8-v1", 19, 128)
    arrays = {name: np.ascontiguousarray(array) for name, array in w.layout.arrays().items()}
    prepared = native.prepare("dense-int8-v1", "reference", 19, 128, {"symmetric": 1, "group_size": 64}, arrays)

    def make(draw: Draw):
        pixels, rows = int(draw.rng.integers(1, 9)), int(draw.rng.integers(0, 9))
        first = draw.rng.integers(0, pixels, rows)
        taps = draw.rng.integers(0, pixels - int(first.max(initial=0)), 2)
        for places in (first, taps):
            if len(places) and draw.chance(0.1):
                places[int(draw.rng.integers(len(places)))] = draw.number(0, pixels)
        starts = draw.array(rows, dtype=np.int64) if draw.chance(0.05) else first
        by = prepared if draw.chance(0.95) else draw.one_of([None, native.add(prepared, prepared), 3])
        return native.matmul_taps, (draw.array(pixels, 64), starts, taps, by, draw.array(rows, 19))

    call_often("matmul_taps", make)


def test_strided_copies() -> None:
    def make(draw: Draw):
        shape = [draw.size() % 40 for _ in range(int(draw.rng.integers(0, 5)))]
        source = draw.array(*shape)
        if isinstance(source, np.ndarray) and source.ndim and draw.chance(0.7):
            source = np.moveaxis(source, 0, -1)[..., :: draw.one_of((1, 2, -1))]
        size = source.size if isinstance(source, np.ndarray) else 3
        return native.copy_strided, (source, draw.array(size))

    call_often("copy_strided", make)


def test_programs(weight) -> None:
    arrays = {
        name: np.ascontiguousarray(array) for name, array in weight("dense-f32-v1", 16, 8).layout.arrays().items()
    }
    prepared = native.prepare("dense-f32-v1", "reference", 16, 8, {}, arrays)

    def make(draw: Draw):
        heads, blocks, tokens = int(draw.rng.integers(1, 3)), int(draw.rng.integers(1, 3)), int(draw.rng.integers(0, 9))

        # A program has many arguments, of which few may be damaged, or hardly any would run.
        def number(good: int) -> int:
            return draw.number(good) if draw.chance(0.1) else good

        def array(*shape: int):
            return draw.array(*shape) if draw.chance(0.1) else np.ones(shape, np.float32)

        def record_and_run() -> None:
            program = native.Program("reference", [number(8), number(8), 16, 16, 8 * heads], number(1))
            program.rms_norm(number(0), draw.one_of((-1, -1, 0)), array(8), 1e-5, number(1))
            program.product(number(0), [prepared] * 2, [None, array(16)], [number(2), number(3)])
            program.gate(number(2), number(3), number(0))
            program.rms_norm(2, -1, array(draw.one_of((1, 4, 16))), 1e-5, number(3))
            program.rope_store(number(4), number(4), number(4), number(0), number(0))
            program.attention(number(3), number(0), number(0), 0.3, number(2))
            start = draw.number(0, 64 * blocks - tokens)
            rotation = array(max(0, min(start, 1000)) + tokens, 4)
            keys, values = array(heads, blocks, 8, 64), array(heads, blocks * 64, 8)
            program.run(array(tokens, 8), [rotation], [rotation], [keys], [values], start)

        return record_and_run, ()

    call_often("Program", make)


def test_recurrent_layers(weight) -> None:
    def prepared(outputs: int, inputs: int):
        arrays = {
            k: np.ascontiguousarray(v) for k, v in weight("dense-f32-v1", outputs, inputs).layout.arrays().items()
        }
        return native.prepare("dense-f32-v1", "reference", outputs, inputs, {}, arrays)

    gates = {0: 4, 1: 3, 2: 1, 3: 1}

    def make(draw: Draw):
        mode, steps, batch = draw.one_of((0, 0, 1, 2, 3)), int(draw.rng.integers(0, 5)), int(draw.rng.integers(0, 20))
        hidden = int(draw.rng.integers(1, 20))
        outputs = int(draw.rng.integers(1, 20)) if mode == 0 and draw.chance(0.5) else hidden
        by, project = prepared(gates[mode] * hidden, outputs), prepared(outputs, hidden)
        lengths = -np.sort(-draw.rng.integers(0, steps + 1, batch)) if draw.chance(0.5) else None
        if lengths is not None and batch and draw.chance(0.2):
            lengths[int(draw.rng.integers(batch))] = draw.number(0, 6)

        def array(*shape: int, dtype=np.float32):
            return draw.array(*shape, dtype=dtype) if draw.chance(0.2) else np.ones(shape, dtype)

        def bias():
            return None if draw.chance(0.3) else array(gates[mode] * hidden)

        return native.run_recurrent, (
            *("reference", draw.number(mode) if draw.chance(0.1) else mode),
            *(array(steps, batch, gates[mode] * hidden), bias(), bias()),
            *(by if draw.chance(0.95) else draw.one_of([None, project, 3]), project if outputs != hidden else None),
            *(array(batch, outputs), array(batch, hidden) if mode == 0 else None),
            lengths if draw.chance(0.95) else draw.array(batch, dtype=np.int64),
            draw.chance(0.5),
        )

    call_often("run_recurrent", make)


def test_probe() -> None:
    probe = native.BandwidthProbe(1 << 21)

    def make(draw: Draw):
        return probe.read, (draw.number(1 << 20, 1 << 21), draw.number(1, 16), draw.number(0, 1 << 20))

    call_often("read", make)
