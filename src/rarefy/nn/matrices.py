"""What is asked of a kind of layer: its weights as matrices, the rows that they meet, and a packed layer in its place.

Everything that compresses and packs works on matrices (O, I). A linear layer's weight is one; that of a convolution is
one once its taps lie side by side; a recurrent layer has several. A kind says how, in one file: `linear.py`,
`embedding.py`, `conv.py`, `recurrent.py`.

Legend of shape suffixes: O outputs, I inputs, T rows of inputs.
"""

from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Protocol, final

import torch
from torch import Tensor, nn

from rarefy.artifact import LayoutSpec
from rarefy.nn.holder import LayoutHolder

LayerKind = Literal["linear", "embedding", "conv", "depthwise", "norm", "recurrent", "attention", "other"]


@final
@dataclass(frozen=True)
class Matrix:
    """A parameter of a module, or some of its rows, seen as a matrix (O, I).

    Args:
        name: what follows the module's name in that of the layer; "" for the only matrix of a module.
        parameter: name of the parameter in its module, of shape (O, I) or (O, I, *taps).
        shape: (O, I). Of a convolution I is all taps, each with all channels: the channel is what changes first.
        first_row: which row of the parameter is the first of the matrix.
        transposed: the parameter is (I, O).
        num_row_groups: so many parts of its rows, of equal size, meet inputs of their own.
        bias: name of the vector that is added to the outputs, there or not; None: there can be none.
        taps: of a convolution the size of its kernel along each axis; () where the columns are no taps of channels.
    """

    name: str
    parameter: str
    shape: tuple[int, int]
    first_row: int = 0
    transposed: bool = False
    num_row_groups: int = 1
    taps: tuple[int, ...] = ()
    bias: str | None = "bias"

    def of(self, parameter: Tensor) -> Tensor:
        """The matrix, which shares the parameter's memory where it can."""
        return self._part(parameter).reshape(self.shape)

    def write(self, parameter: Tensor, matrix_OI: Tensor) -> None:
        """Put the matrix where it belongs in the parameter."""
        part = self._part(parameter)
        part.copy_(matrix_OI.reshape(part.shape))

    def _part(self, parameter: Tensor) -> Tensor:
        rows = parameter.T if self.transposed else parameter
        return taps_first(rows[self.first_row : self.first_row + self.shape[0]])


def taps_first(weight: Tensor) -> Tensor:
    """(O, I, *taps) as (O, *taps, I); what has no taps stays as it is."""
    return weight if weight.ndim == 2 else weight.movedim(1, -1)


@final
@dataclass(frozen=True)
class Packed:
    """What is known of a packed matrix before its arrays are: its format, and the holder whose arrays it shares."""

    spec: LayoutSpec
    source: LayoutHolder | None


class Kind(Protocol):
    """A kind of layer. One object each, in `replace.KINDS`."""

    def covers(self, module: nn.Module) -> bool:
        """Whether the module is of this kind, compressible or not."""
        ...

    def label(self, module: nn.Module) -> LayerKind:
        """What reports and recipes call it."""
        ...

    def why_not(self, module: nn.Module) -> str | None:
        """Why no packed layer can stand in for the module; None if one can."""
        ...

    def matrices(self, module: nn.Module) -> tuple[Matrix, ...]:
        """Its weights as matrices."""
        ...

    def rows_key(self, module: nn.Module) -> Hashable:
        """Modules with the same key that are given the same tensor meet the same rows; None: never."""
        ...

    def rows(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Collection[str]
    ) -> Iterator[tuple[str, int, Tensor]]:
        """The rows that each of the named matrices meets in a call, in pieces of bounded size.

        Yields:
            Name of the matrix, number of the row group, and rows x_TI in the dtype of the call's input; of an embedding
            the indices (T, 1), which only statistics of indices take.
        """
        ...

    def pack(
        self, module: nn.Module, packed: Mapping[str, Packed], device: torch.device | str
    ) -> tuple[nn.Module, dict[str, LayoutHolder]]:
        """The layer that stands in for `module`, with empty arrays, and the holder of each packed matrix by its name.

        A matrix that is not in `packed` stays the parameter that it is.
        """
        ...


@final
@dataclass(frozen=True)
class Weight:
    """A matrix at its place in a model.

    Args:
        module_name: of the module that holds it.
        module: that module.
        kind: of the module.
        matrix: which of its matrices.
    """

    module_name: str
    module: nn.Module
    kind: Kind
    matrix: Matrix

    @property
    def layer(self) -> str:
        """Name of the layer: that of the module, and of the matrix where the module has several."""
        return ".".join(part for part in (self.module_name, self.matrix.name) if part)

    @property
    def parameter_name(self) -> str:
        """Full name of the parameter."""
        return f"{self.module_name}.{self.matrix.parameter}" if self.module_name else self.matrix.parameter

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter."""
        return self.module.get_parameter(self.matrix.parameter)

    def read(self) -> Tensor:
        """The matrix as it is now."""
        return self.matrix.of(self.parameter.detach())

    def write(self, matrix_OI: Tensor) -> None:
        """Change the matrix in place."""
        self.matrix.write(self.parameter.data, matrix_OI)

    def share(self) -> float:
        """How much of its parameter the matrix is."""
        return prod(self.matrix.shape) / max(1, self.parameter.numel())


def missing_parameter(module: nn.Module, name: str) -> str | None:
    """Why the module's weight is no parameter that could be exchanged; None if it is one."""
    if module._parameters.get(name) is None:
        return f"its {name} is computed by a hook or a parametrization (weight_norm, spectral_norm) at every call"
    return None


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a layer is called with: a tensor, or a PackedSequence."""
    return args[0] if args else next(iter(kwargs.values()))
