"""A model in memory or streaming, with what belongs to it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import torch
import transformers
from torch import nn

from rarefy.core.errors import DamagedFileError, NonFiniteError
from rarefy.models.store import WeightStore
from rarefy.models.structure import Structure, discover

SourceKind = Literal["directory", "gguf", "module"]


@final
@dataclass
class LoadedModel:
    """A model, its tokenizer, and where its weights are.

    Args:
        model: the module; where `store` is set, its parameters are on the meta device until `materialize`.
        tokenizer: the fast tokenizer, or None.
        source: the path or name as the user gave it.
        kind: what the source is.
        architecture: class name of the model.
        config: the configuration as plain data, {} for a plain module.
        path: the directory or file that holds the weights; empty for a module.
        companions: tokenizer and other small files to copy beside the weights, by relative path.
        store: where weights stream from; None when they are all in memory.
        notes: plain sentences about the loading that a user should read.
    """

    model: nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase | None
    source: str
    kind: SourceKind
    architecture: str
    config: dict[str, Any]
    path: Path = Path()
    companions: dict[str, bytes] = field(default_factory=dict)
    store: WeightStore | None = None
    notes: tuple[str, ...] = ()
    _store_names: dict[str, str] = field(default_factory=dict)

    @property
    def streams(self) -> bool:
        """Whether weights are read when asked for, and not held."""
        return self.store is not None

    def structure(self, *, count_zeros: bool = False) -> Structure:
        """Blocks and layers, with the types and bytes of the weights as they are stored."""
        return discover(self.model, count_zeros=count_zeros, read=self.read, stored=self._stored)

    def num_parameters(self) -> int:
        """How many parameters the model has, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def stored_bytes(self) -> int:
        """Bytes of all parameters and persistent buffers as the source stores them."""
        if self.store is not None:
            return sum(self.store.stored_bytes(name) for name in set(self._store_names.values()))
        unique = {id(tensor): tensor for tensor in self.model.state_dict(keep_vars=True).values()}
        return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())

    def stored_bytes_of(self, name: str) -> int:
        """Bytes of one parameter as the source stores it."""
        stored = self._stored(name)
        if stored is not None:
            return stored[1]
        tensor = _tensor_of(self.model, name)
        return tensor.numel() * tensor.element_size()

    def read(self, name: str) -> torch.Tensor:
        """The values of a parameter or persistent buffer, floating-point ones as float32.

        Raises:
            NonFiniteError: a value is NaN, or one of a parameter infinite.
            DamagedFileError: the file does not hold what it declares.
        """
        if self.store is None:
            held = _tensor_of(self.model, name).detach()
            tensor = held.to(torch.float32) if held.is_floating_point() else held
        else:
            tensor = self.store.read(self._store_names[name])
            expected = _tensor_of(self.model, name).shape
            if tensor.shape != expected:
                raise DamagedFileError(
                    self.source, f"tensor {name} has shape {tuple(tensor.shape)}", allowed=str(tuple(expected))
                )
        # a mask that is added to scores is a buffer of zeros and minus infinities
        check_finite(name, tensor[~tensor.isinf()] if _is_buffer(self.model, name) else tensor)
        return tensor

    def materialize(
        self, prefix: str, *, without: frozenset[str] = frozenset(), dtype: torch.dtype = torch.float32
    ) -> None:
        """Give the parameters and persistent buffers of a submodule their values. Nothing to do where they are held.

        Args:
            prefix: module name; "" for the whole model.
            without: module names below which nothing is read.
            dtype: of the parameters.
        """
        if self.store is None:
            return
        done: dict[int, nn.Parameter] = {}
        for name, module in self.model.get_submodule(prefix).named_modules(prefix=prefix):
            if any(name == skipped or name.startswith(f"{skipped}.") for skipped in without):
                continue
            for key, parameter in list(module._parameters.items()):
                if parameter is None or not parameter.is_meta:
                    continue
                if id(parameter) not in done:
                    values = self.read(f"{name}.{key}" if name else key)
                    if values.is_floating_point():
                        values = values.to(dtype)
                    done[id(parameter)] = nn.Parameter(values, requires_grad=False)
                module._parameters[key] = done[id(parameter)]
            for key, buffer in list(module._buffers.items()):
                full = f"{name}.{key}" if name else key
                if buffer is not None and full in self._store_names:
                    module._buffers[key] = self.read(full).to(buffer.dtype)

    def release(self, prefix: str) -> None:
        """Drop the values of a submodule's parameters again. Nothing to do where they do not stream."""
        if self.store is None:
            return
        released: dict[int, nn.Parameter] = {}  # what was tied stays tied
        for module in self.model.get_submodule(prefix).modules():
            for key, parameter in list(module._parameters.items()):
                if parameter is not None and not parameter.is_meta:
                    if id(parameter) not in released:
                        released[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=False)
                    module._parameters[key] = released[id(parameter)]

    def attach(self, store: WeightStore, names: dict[str, str]) -> None:
        """Let the parameters come from a store.

        Args:
            store: the store.
            names: for every parameter and persistent buffer its name in the store.
        """
        self.store, self._store_names = store, names

    def _stored(self, name: str) -> tuple[str, int] | None:
        if self.store is None or name not in self._store_names:
            return None
        stored = self._store_names[name]
        return self.store.stored_dtype(stored), self.store.stored_bytes(stored)


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        NonFiniteError: naming the tensor and how many values are bad.
    """
    # A sum is one pass without a temporary; it can only be finite if every value is (an overflow is looked into).
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum())):
        num_bad = int(tensor.numel() - torch.isfinite(tensor).sum())
        if num_bad:
            raise NonFiniteError(
                f"tensor {name}",
                f"{num_bad} of {tensor.numel()} values are NaN or infinite",
                hint="the model is damaged: compare it with its source",
            )


def _is_buffer(model: nn.Module, name: str) -> bool:
    module_name, _, key = name.rpartition(".")
    return key in model.get_submodule(module_name)._buffers


def _tensor_of(model: nn.Module, name: str) -> torch.Tensor:
    module_name, _, key = name.rpartition(".")
    tensor = getattr(model.get_submodule(module_name), key)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def copied(module: nn.Module) -> nn.Module:
    """A copy, also of what torch does not copy: weights that a hook computes at every call (`nn.utils.weight_norm`)."""
    values = [value for part in module.modules() for value in vars(part).values() if isinstance(value, torch.Tensor)]
    return copy.deepcopy(module, {id(value): value.detach().clone() for value in values if not value.is_leaf})
