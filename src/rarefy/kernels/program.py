"""A pass through a decoder, recorded once as a list of steps and then run in one call of the extension.

Between two small operations Python takes longer than they do: for one token as long as a fifth of the weights' reading.

Shapes: T tokens; E, D, P and the cache as in `rarefy.kernels.ops`, whose arithmetic the steps have. A register holds
(T, width) floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NewType, TypeAlias, final

from rarefy.kernels.extension import native
from rarefy.kernels.ops import Float32Array, Ops
from rarefy.kernels.products import Prepared, matmul_many

if TYPE_CHECKING:
    from rarefy import _native

Register = NewType("Register", int)


@final
@dataclass(frozen=True, slots=True)
class _Product:
    x: Register
    weights: tuple[Prepared, ...]
    biases: tuple[Float32Array | None, ...]
    outputs: tuple[Register, ...]

    @property
    def uses(self) -> tuple[Register, ...]:
        return (self.x, *self.outputs)


@final
@dataclass(frozen=True, slots=True)
class _Norm:
    x: Register
    total: Register | None
    weight_E: Float32Array
    eps: float
    y: Register

    @property
    def uses(self) -> tuple[Register, ...]:
        return (self.x, self.y) if self.total is None else (self.x, self.total, self.y)


@final
@dataclass(frozen=True, slots=True)
class _Rope:
    q: Register
    k: Register
    v: Register
    layer: int
    rotation: int

    @property
    def uses(self) -> tuple[Register, ...]:
        return (self.q, self.k, self.v)


@final
@dataclass(frozen=True, slots=True)
class _Attention:
    q: Register
    layer: int
    window: int
    scale: float
    y: Register

    @property
    def uses(self) -> tuple[Register, ...]:
        return (self.q, self.y)


@final
@dataclass(frozen=True, slots=True)
class _Gate:
    gate: Register
    up: Register
    activation: int

    @property
    def uses(self) -> tuple[Register, ...]:
        return (self.gate, self.up)


_Step: TypeAlias = _Product | _Norm | _Rope | _Attention | _Gate


@final
class Recorder:
    """Takes down the steps of a pass, each in the terms of `Ops`; `finish` makes the program.

    Args:
        width: of the register that a run is given.
    """

    def __init__(self, width: int) -> None:
        self.start: Final = Register(0)
        self.widths = [width]
        self.steps: list[_Step] = []

    def products(
        self, x: Register, weights: Sequence[Prepared], biases: Sequence[Float32Array | None]
    ) -> list[Register]:
        """Record x @ W^T + bias for weights that read the same x."""
        outputs = [self._new(weight.shape[0]) for weight in weights]
        self.steps.append(_Product(x, tuple(weights), tuple(biases), tuple(outputs)))
        return outputs

    def rms_norm(self, x: Register, weight_E: Float32Array, eps: float) -> Register:
        """Record `Ops.rms_norm`, in pieces as wide as the weight."""
        self.steps.append(_Norm(x, None, weight_E, eps, y := self._new(self.widths[x])))
        return y

    def add_rms_norm(self, total: Register, x: Register, weight_E: Float32Array, eps: float) -> Register:
        """Record `Ops.add_rms_norm`."""
        self.steps.append(_Norm(x, total, weight_E, eps, y := self._new(self.widths[x])))
        return y

    def rope_store(self, q: Register, k: Register, v: Register, *, layer: int, rotation: int = 0) -> None:
        """Record `Ops.rope_store` into the cache of a layer, with one of the rotations that a run is given."""
        self.steps.append(_Rope(q, k, v, layer, rotation))

    def attention(self, q: Register, *, layer: int, window: int, scale: float) -> Register:
        """Record `Ops.attention` over the cache of a layer."""
        self.steps.append(_Attention(q, layer, window, scale, y := self._new(self.widths[q])))
        return y

    def gate(self, gate: Register, up: Register, activation: int) -> None:
        """Record `Ops.gate`."""
        self.steps.append(_Gate(gate, up, activation))

    def finish(self, ops: Ops, output: Register) -> Program:
        """Return the program that gives `output` out."""
        return Program(ops, tuple(self.steps), tuple(self.widths), output)

    def _new(self, width: int) -> Register:
        self.widths.append(width)
        return Register(len(self.widths) - 1)


@final
class Program:
    """Steps that were recorded; several threads may run them at once.

    Args:
        ops: the small operations; where they or a weight are numpy's, the steps run one by one from here.
        steps: in their order.
        widths: of the registers.
        output: the register that a run gives out.
    """

    def __init__(self, ops: Ops, steps: tuple[_Step, ...], widths: tuple[int, ...], output: Register) -> None:
        self._ops = ops
        self._steps = steps
        self._output = output
        last = {register: index for index, step in enumerate(steps) for register in step.uses}
        self._dead: list[list[Register]] = [[] for _ in steps]
        for register, index in last.items():
            if register not in (0, output):
                self._dead[index].append(register)
        self._native = self._compiled(widths)

    def run(
        self,
        x_TE: Float32Array,
        rotations: Sequence[tuple[Float32Array, Float32Array]],
        keys: Sequence[Float32Array],
        values: Sequence[Float32Array],
        start: int,
    ) -> Float32Array:
        """Run the steps for T tokens at positions start..start+T-1.

        Args:
            x_TE: the first register, which the steps may change.
            rotations: cosines and sines, (P, D / 2) each.
            keys: the key cache of each layer.
            values: the value cache of each layer.
            start: tokens in the cache.
        """
        if self._native is not None:
            cosines, sines = zip(*rotations, strict=True)
            return self._native.run(x_TE, cosines, sines, keys, values, start)
        held: dict[Register, Float32Array] = {Register(0): x_TE}
        for step, dead in zip(self._steps, self._dead, strict=True):
            match step:
                case _Product(x, weights, biases, outputs):
                    for y, y_TO, bias_O in zip(outputs, matmul_many(held[x], weights), biases, strict=True):
                        held[y] = y_TO
                        if bias_O is not None:
                            self._ops.add_bias(y_TO, bias_O)
                case _Norm(x, total, weight_E, eps, y) if total is not None:
                    held[y] = self._ops.add_rms_norm(held[total], held[x], weight_E, eps)
                case _Norm(x, _, weight_E, eps, y):
                    pieces = held[x].reshape(-1, len(weight_E))
                    held[y] = self._ops.rms_norm(pieces, weight_E, eps).reshape(held[x].shape)
                case _Rope(q, k, v, layer, rotation):
                    cos, sin = rotations[rotation]
                    self._ops.rope_store(held[q], held[k], held[v], cos, sin, keys[layer], values[layer], start)
                case _Attention(q, layer, window, scale, y):
                    held[y] = self._ops.attention(held[q], keys[layer], values[layer], start, window, scale)
                case _Gate(gate, up, activation):
                    self._ops.gate(held[gate], held[up], activation)
            for register in dead:
                del held[register]
        return held[self._output]

    def _compiled(self, widths: Sequence[int]) -> _native.Program | None:
        """The program of the extension; None where ops or weights are numpy's."""
        products = [step for step in self._steps if isinstance(step, _Product)]
        if self._ops.isa == "numpy" or any(w.weights is None for product in products for w in product.weights):
            return None
        module = native()
        assert module is not None
        slot, slot_widths = self._slots(widths)
        program: _native.Program = module.Program(self._ops.isa, slot_widths, slot[self._output])
        for step in self._steps:
            match step:
                case _Product(x, weights, biases, outputs):
                    handles = [weight.weights for weight in weights]
                    program.product(slot[x], handles, biases, [slot[y] for y in outputs])
                case _Norm(x, total, weight_E, eps, y):
                    program.rms_norm(slot[x], -1 if total is None else slot[total], weight_E, eps, slot[y])
                case _Rope(q, k, v, layer, rotation):
                    program.rope_store(slot[q], slot[k], slot[v], layer, rotation)
                case _Attention(q, layer, window, scale, y):
                    program.attention(slot[q], layer, window, scale, slot[y])
                case _Gate(gate, up, activation):
                    program.gate(slot[gate], slot[up], activation)
        return program

    def _slots(self, widths: Sequence[int]) -> tuple[dict[Register, int], list[int]]:
        """A slot of memory for each register, and their widths: registers that never live together share one."""
        slot: dict[Register, int] = {Register(0): 0, self._output: 1}
        slot_widths = [widths[0], widths[self._output]]
        free: dict[int, list[int]] = {}
        for step, dead in zip(self._steps, self._dead, strict=True):
            for register in step.uses:
                if register in slot:
                    continue
                width = widths[register]
                if free.get(width):
                    slot[register] = free[width].pop()
                else:
                    slot[register] = len(slot_widths)
                    slot_widths.append(width)
            for register in dead:
                free.setdefault(widths[register], []).append(slot[register])
        return slot, slot_widths
