"""Biases that compression changed, or that it gave to layers whose modules had none. Shape suffix: O out."""

from collections.abc import Callable, Iterable, Mapping
from typing import final

import torch
from torch import Tensor, nn

from rarefy.nn.matrices import Weight
from rarefy.nn.replace import find_weight


def bias_name(weight: Weight) -> str | None:
    """Full name of the vector that is added to a matrix's outputs, there or not; None if there can be none."""
    key = weight.matrix.bias
    if key is None or (key != "bias" and not _has_bias(weight)):
        return None  # torch's recurrent layers read theirs by name, all or none of them
    return f"{weight.module_name}.{key}" if weight.module_name else key


def added_biases(model: nn.Module, layers: Iterable[str], stored: Iterable[str]) -> dict[str, int]:
    """Which of the stored tensors are biases of layers that the modules of a model have none for, and their lengths.

    Args:
        model: before its layers are replaced.
        layers: that are compressed.
        stored: names of tensors.
    """
    names = set(stored)
    found = {}
    for layer in layers:
        weight = find_weight(model, layer)
        name = bias_name(weight)
        if name in names and name is not None and not _has_bias(weight):
            found[name] = _num_outputs(weight)
    return found


def set_biases(model: nn.Module, biases: Mapping[str, Tensor]) -> None:
    """Give modules these biases by full name, whether they had one or not."""
    for name, bias_O in biases.items():
        module_name, _, key = name.rpartition(".")
        module = model.get_submodule(module_name)
        before = getattr(module, key, None)
        if isinstance(before, nn.Parameter):
            before.data = bias_O.to(before.dtype, copy=True)
            continue
        dtype = next((parameter.dtype for parameter in module.parameters(recurse=False)), torch.float32)
        setattr(module, key, nn.Parameter(bias_O.to(dtype, copy=True), requires_grad=False))


@final
class Corrections:
    """The biases that a run has corrected, in float32.

    Args:
        model: the model; it is not changed before `apply`.
        read: gives a parameter of it by name.
    """

    def __init__(self, model: nn.Module, read: Callable[[str], Tensor]) -> None:
        self.values: dict[str, Tensor] = {}
        self._model = model
        self._read = read
        self._before: dict[str, Tensor | None] = {}

    def hold(self, layer: str) -> None:
        """Keep the bias of a layer as it is now; a module may soon compute in another type."""
        weight = find_weight(self._model, layer)
        name = bias_name(weight)
        if name is not None and name not in self._before:
            self._before[name] = self._read(name).to(torch.float32, copy=True) if _has_bias(weight) else None

    def shift(self, layer: str, shift_O: Tensor) -> bool:
        """Shift the outputs of a layer; False if it can have no bias."""
        weight = find_weight(self._model, layer)
        name = bias_name(weight)
        if name is None:
            return False
        self.hold(layer)
        before_O = self.values.get(name, self._before[name])
        new_O = torch.zeros(_num_outputs(weight)) if before_O is None else before_O.clone()
        first = weight.matrix.first_row
        new_O[first : first + weight.matrix.shape[0]] += shift_O
        self.values[name] = new_O
        return True

    def of(self, layers: Iterable[str]) -> dict[str, Tensor]:
        """Those of some layers, by full name."""
        names = (bias_name(find_weight(self._model, layer)) for layer in layers)
        return {name: self.values[name] for name in names if name is not None and name in self.values}

    def apply(self, layers: Iterable[str]) -> None:
        """Put those of some layers into the model."""
        set_biases(self._model, self.of(layers))

    def withdraw(self, layers: Iterable[str]) -> None:
        """Take those away again that modules had none of."""
        for name in self.of(layers):
            if self._before.get(name) is None:
                module_name, _, key = name.rpartition(".")
                setattr(self._model.get_submodule(module_name), key, None)


def _has_bias(weight: Weight) -> bool:
    return weight.matrix.bias is not None and weight.module._parameters.get(weight.matrix.bias) is not None


def _num_outputs(weight: Weight) -> int:
    """Of the whole module, of which the matrix may be one group."""
    return int(weight.parameter.shape[1 if weight.matrix.transposed else 0])
