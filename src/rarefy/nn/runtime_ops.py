"""The engine's small operations inside a transformers model, so that both runtimes give the same bits.

Integer layouts round activations to 8 bits. A norm that differs in its last bit between two runtimes tips some of these
roundings over, and over many layers that grows to per cents. So norms, activations and rotary tables of a loaded
artifact run the operations of `rarefy.kernels.ops`, as the engine does. What a module computes is found out by running
it beside the operation, not by its name; a module that is not proven to be equal is left alone.

Only the `forward` of an instance is set aside: its class, parameters, buffers and hooks stay. Where a gradient is
needed, in training, under autocast or a tracer, off the CPU and in other dtypes than float32 the class's own `forward`
runs.

E width, D head width, N numbers of a probe.
"""

import atexit
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, final

import torch
from torch import Tensor, nn

from rarefy.core.errors import RarefyError
from rarefy.engine.config import Config
from rarefy.engine.rope import RotaryTable, rotary_table
from rarefy.kernels.extension import ISA_VARIABLE
from rarefy.kernels.ops import ACTIVATIONS, Ops, load_ops
from rarefy.nn.holder import LayoutHolder

_EPSILON: Final = float(torch.finfo(torch.float32).eps)


def use_engine_ops(model: nn.Module) -> None:
    """Let every module of `model` that computes one of the engine's operations run it; the others stay as they are."""
    with torch.no_grad():
        for module in model.modules():
            operation = _operation_of(module)
            if operation is not None:
                module.forward = NativeForward(module, operation)


def engine_ops() -> Ops:
    """The operations that an engine made now would use: RAREFY_ISA counts at the call, as for the products."""
    return _ops_under(os.environ.get(ISA_VARIABLE))


@functools.cache
def _ops_under(_: str | None) -> Ops:
    return load_ops()


# Native objects have to go before the interpreter does.
atexit.register(_ops_under.cache_clear)


def runs_native(x: Tensor, *parameters: Tensor) -> bool:
    """Whether the compiled operations may compute with `x`: plain float32 on the CPU, and nobody needs a gradient."""
    return (
        type(x) is Tensor
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not (torch.is_grad_enabled() and any(each.requires_grad for each in (x, *parameters)))
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and not torch.compiler.is_compiling()
    )


class Operation(Protocol):
    """What a module's `forward` can be replaced by."""

    def __call__(self, module: nn.Module, x: Tensor, /, *others: Any, **named: Any) -> Any:
        """Return what `module(x, ...)` returns, or None for arguments that the operation does not cover."""
        ...


@final
class NativeForward:
    """The `forward` of one module instance: the operation where it may run, else the `forward` of the class.

    Args:
        module: the instance; its parameters are read at every call.
        operation: computes the same function.
    """

    def __init__(self, module: nn.Module, operation: Operation) -> None:
        self._module = module
        self.operation: Final = operation

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Return what the module returns."""
        module = self._module
        if inputs and not module.training and runs_native(inputs[0], *module.parameters()):
            result = self.operation(module, *inputs, **named)
            if result is not None:
                return result
        return type(module).forward(module, *inputs, **named)


@final
@dataclass(frozen=True)
class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight, or * (1 + weight) as Gemma stores it."""

    eps: float
    one_plus: bool

    def __call__(self, module: nn.Module, x: Tensor, /, *others: Any, **named: Any) -> Tensor | None:
        """See `Operation`."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        if others or named or not _fit(x, weight):
            return None
        factor = weight.detach() + 1.0 if self.one_plus else weight.detach()
        y = engine_ops().rms_norm(_rows(x), factor.contiguous().numpy(), self.eps)
        return torch.from_numpy(y).reshape(x.shape)


@final
@dataclass(frozen=True)
class LayerNorm:
    """nn.LayerNorm over the last axis, with weight and bias."""

    eps: float

    def __call__(self, module: nn.Module, x: Tensor, /, *others: Any, **named: Any) -> Tensor | None:
        """See `Operation`."""
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        assert isinstance(bias, Tensor)
        if others or named or not _fit(x, weight) or not _fit(x, bias):
            return None
        y = engine_ops().layer_norm(
            _rows(x), weight.detach().contiguous().numpy(), bias.detach().contiguous().numpy(), self.eps
        )
        return torch.from_numpy(y).reshape(x.shape)


@final
@dataclass(frozen=True)
class Activation:
    """One of `rarefy.kernels.ops.ACTIVATIONS`, by number."""

    number: int

    def __call__(self, _module: nn.Module, x: Tensor, /, *others: Any, **named: Any) -> Tensor | None:
        """See `Operation`."""
        if others or named:
            return None
        y = x.detach().clone(memory_format=torch.contiguous_format)
        engine_ops().activate(y.view(1, -1).numpy(), self.number)
        return y


@final
@dataclass(frozen=True)
class Rotary:
    """Cosines and sines of positions, from the engine's tables; `tables` has a key per layer type, or None alone."""

    tables: Mapping[str | None, RotaryTable]
    num_positions: int

    def __call__(self, _module: nn.Module, _x: Tensor, /, *others: Any, **named: Any) -> tuple[Tensor, Tensor] | None:
        """See `Operation`."""
        values = {**dict(zip(("position_ids", "layer_type"), others, strict=False)), **named}
        positions, table = values.get("position_ids"), self.tables.get(values.get("layer_type"))
        if table is None or len(values) != len(others) + len(named) or not isinstance(positions, Tensor):
            return None
        if positions.ndim != 2 or not positions.numel() or positions.is_floating_point():
            return None
        low, high = (int(end) for end in positions.aminmax())
        if low < 0 or high >= self.num_positions:
            return None
        index = positions.to("cpu", torch.int64).numpy()
        cos, sin = (torch.from_numpy(part[index]) for part in table.upto(high + 1))
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


def _rows(x: Tensor) -> Any:
    return x.detach().reshape(-1, x.shape[-1]).contiguous().numpy()


def _fit(x: Tensor, weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and x.shape[-1:] == weight.shape


def _operation_of(module: nn.Module) -> Operation | None:
    """Find the operation that a module without children computes, or None."""
    if isinstance(module, LayoutHolder) or next(module.children(), None) is not None:
        return None
    if module.training or "forward" in vars(module):
        return None
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    if type(module) is nn.LayerNorm:
        plain = len(module.normalized_shape) == 1 and parameters.keys() == {"weight", "bias"}
        return LayerNorm(module.eps) if plain else None
    try:
        if parameters.keys() == {"weight"} and not buffers:
            return _rms_norm_of(module, parameters["weight"])
        if not parameters and not buffers:
            return _activation_of(module)
        if not parameters and getattr(module, "config", None) is not None:
            return _rotary_of(module, module.config, buffers)
    except Exception:  # a module that cannot be called with the probe is not one of these operations
        return None
    return None


def _rms_norm_of(module: nn.Module, weight: Tensor) -> RmsNorm | None:
    epsilons = [value for name, value in vars(module).items() if "eps" in name and isinstance(value, float)]
    if weight.ndim != 1 or len(epsilons) != 1:
        return None
    width, eps = weight.numel(), epsilons[0]
    random = torch.Generator().manual_seed(0)
    # Of ordinary size, large, so small that eps decides, and 0; the mean is not 0, so that subtracting it shows.
    sizes = torch.tensor([1.0, 30.0, eps**0.5, 0.0]).repeat_interleave(2)
    x_NE = (torch.randn(8, width, generator=random) + 0.5) * sizes[:, None]
    factor = torch.randn(width, generator=random)
    expected = torch.func.functional_call(module, {"weight": factor}, (x_NE,))
    for one_plus in (False, True):
        used = factor + 1.0 if one_plus else factor
        found = torch.from_numpy(engine_ops().rms_norm(x_NE.numpy(), used.numpy(), eps))
        # A sum of E squares and a handful of roundings; nothing cancels.
        if _same(found, expected, relative=(width / 2 + 16) * _EPSILON, absolute=0.0):
            return RmsNorm(eps, one_plus)
    return None


def _activation_of(module: nn.Module) -> Activation | None:
    tail = torch.logspace(-6, 3, 200)
    x_1N = torch.cat([torch.linspace(-20, 20, 4001), tail, -tail]).reshape(1, -1)
    expected = module(x_1N.clone())
    for number in sorted(set(ACTIVATIONS.values())):
        found = x_1N.clone()
        engine_ops().activate(found.numpy(), number)
        # torch loses the relative precision of a negative tail, where 1 + erf and 1 + tanh cancel.
        if _same(found, expected, relative=8 * _EPSILON, absolute=2e-6):
            return Activation(number)
    return None


def _rotary_of(module: nn.Module, config: Any, buffers: Mapping[str, Tensor]) -> Rotary | None:
    """Build the engine's tables from the same configuration, and compare frequencies, cosines and sines."""
    names = [name for name in buffers if name.endswith("inv_freq") and "original" not in name]
    num_positions = getattr(config, "max_position_embeddings", None)
    if not names or not isinstance(num_positions, int):
        return None
    tables: dict[str | None, RotaryTable] = {}
    positions = torch.tensor([[0, 1, 2, num_positions // 3, num_positions - 1]])
    for name in names:
        layer_type = name.removesuffix("inv_freq").removesuffix("_") or None
        frequencies = buffers[name].to(torch.float32)
        try:
            values = Config(config.to_dict(), "config")
            table = rotary_table(values, 2 * len(frequencies), default_theta=10000.0, layer_type=layer_type)
        except RarefyError:
            return None
        tables[layer_type] = table
        if not _same(torch.from_numpy(table.frequencies), frequencies, relative=1e-6, absolute=0.0):
            return None
        expected = module(torch.zeros(1), positions, *([] if layer_type is None else [layer_type]))
        found = Rotary(tables, num_positions)(module, torch.zeros(1), positions, layer_type=layer_type)
        # An angle is off by the error of its frequency, position times.
        error = positions[..., None] * 1e-6 + 1e-6
        if found is None or not all(
            _same(a, b, relative=0.0, absolute=error) for a, b in zip(found, expected, strict=True)
        ):
            return None
    return Rotary(tables, num_positions)


def _same(found: Tensor, expected: Any, *, relative: float, absolute: float | Tensor) -> bool:
    if not isinstance(expected, Tensor) or expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    return bool(((found - expected).abs() <= relative * expected.abs() + absolute).all())  # False for NaN
