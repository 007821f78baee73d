"""What a model is made of: repeated blocks and layers, found from the module tree and not from a table of names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from rarefy.nn.matrices import LayerKind, Matrix, Weight
from rarefy.nn.replace import kind_of, weights_of, why_not_replaceable

# Kinds whose weights are multiplied with inputs; an embedding's are looked up.
_MULTIPLIED = ("linear", "conv", "depthwise", "recurrent")


@final
@dataclass(frozen=True)
class BlockRef:
    """One repeated block, such as a transformer layer.

    Args:
        name: module name of the block; "" when the whole model is the one block.
        stack: module name of the list that holds it, such as ``model.layers``.
        index: its position in the stack.
    """

    name: str
    stack: str
    index: int


@final
@dataclass(frozen=True)
class LayerRef:
    """One module that holds parameters itself, or one matrix of a module that has several.

    Args:
        name: module name; of a matrix among several followed by its own, such as ``lstm.weight_ih_l0``.
        kind: what it is.
        shape: of its weight; (O, I) for linear layers, (V, D) for embeddings, (O, I, *taps) for convolutions, () where
            it has no ``weight``.
        dtype: of the weight as stored.
        num_bytes: of all its own parameters as stored; 0 where another layer holds them (tied).
        num_zeros: zeros in the weight; None where they were not counted.
        block: name of the repeated block that it is in, or None.
        compressible: whether a layer method can be applied to it.
        reason: why not, if not.
        tied_to: the layer that holds the same weight, if that is another one.
        module: name of the module; that of the layer unless the module has several.
        matrix: (O, I) of the weight seen as a matrix, the form that methods and layouts work on; None if it is none.
    """

    name: str
    kind: LayerKind
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    num_zeros: int | None
    block: str | None
    compressible: bool
    reason: str | None
    tied_to: str | None = None
    module: str = ""
    matrix: tuple[int, int] | None = None


@final
@dataclass(frozen=True)
class Readers:
    """Which layers read a weight: an embedding that is tied to a head is both.

    Args:
        lookup: the embedding that looks its rows up, or None.
        product: the layer that multiplies inputs with it, or None.
    """

    lookup: str | None = None
    product: str | None = None


@final
@dataclass(frozen=True)
class Structure:
    """The blocks and layers of a model, in the order of its module tree.

    Args:
        blocks: the repeated blocks.
        layers: every layer.
        tangled: the model cannot be gone through block by block: a list holds a block at several places, or the model
            calls one twice, or reads outputs of earlier ones.
    """

    blocks: tuple[BlockRef, ...]
    layers: tuple[LayerRef, ...]
    tangled: bool = False

    @property
    def in_one_pass(self) -> bool:
        """Whether a pass over the model takes it as a whole, and not one block after the other."""
        return len(self.blocks) <= 1 or self.tangled

    def layer(self, name: str) -> LayerRef:
        """The layer of that name (KeyError if there is none)."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def readers(self) -> dict[str, Readers]:
        """For every layer that owns a weight, the first of those that look it up and of those that multiply with it."""
        found: dict[str, Readers] = {}
        for layer in self.layers:
            owner = layer.tied_to or layer.name
            before = found.get(owner, Readers())
            if layer.kind == "embedding":
                found[owner] = Readers(before.lookup or layer.name, before.product)
            elif layer.kind in _MULTIPLIED:
                found[owner] = Readers(before.lookup, before.product or layer.name)
        return found


def discover(
    model: nn.Module,
    *,
    count_zeros: bool = False,
    read: Callable[[str], torch.Tensor] | None = None,
    stored: Callable[[str], tuple[str, int] | None] | None = None,
) -> Structure:
    """Find the repeated blocks and every layer of a model.

    Args:
        model: any module; its weights may be on the meta device.
        count_zeros: whether to count the zeros in each weight, which reads all of them.
        read: gives the values of a parameter on the meta device, for counting zeros.
        stored: gives the stored type and bytes of a parameter; by default those of the parameter itself.

    Returns:
        The structure. A model without repeated blocks that hold linear layers has no blocks: a run then treats the
        whole of it as one.
    """
    blocks = tuple(_blocks(model))
    block_names = {block.name for block in blocks}
    owners = _Owners(stored)
    layers: list[LayerRef] = []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=True))
        if not own:
            continue
        weights = weights_of(module, name)
        sizes = owners.stored_sizes(name, own)
        for part in weights or (None,):
            parameter_name = "weight" if part is None else part.matrix.parameter
            weight = own.get(parameter_name)
            tie = owners.tie(name, name if part is None else part.layer, weight, part)
            reason = _reason(model, name, module, tie)
            zeros: int | None = None
            if count_zeros and weight is not None and tie is None:
                full = f"{name}.{parameter_name}" if name else parameter_name
                values = read(full) if read is not None and weight.is_meta else weight.detach()
                values = values if part is None else part.matrix.of(values)
                zeros = int(values.numel() - torch.count_nonzero(values))
            layers.append(
                LayerRef(
                    name=name if part is None else part.layer,
                    kind=_kind(module),
                    shape=_shape(weight, part),
                    dtype=sizes.dtype(parameter_name),
                    num_bytes=sizes.bytes_of(part, weights),
                    num_zeros=zeros,
                    block=_enclosing(name, block_names),
                    compressible=reason is None,
                    reason=reason,
                    tied_to=tie.layer if tie is not None and tie.same_matrix else None,
                    module=name,
                    matrix=None if part is None else part.matrix.shape,
                )
            )
    stacks = [model.get_submodule(name) for name in {block.stack for block in blocks}]
    return Structure(blocks, tuple(layers), any(len(set(x._modules.values())) < len(x._modules) for x in stacks))


@final
@dataclass(frozen=True)
class _Tie:
    """Another layer that holds the same parameter, and whether it sees the same matrix in it."""

    layer: str
    same_matrix: bool


@final
@dataclass(frozen=True)
class _Sizes:
    """Stored type and bytes of a module's own parameters; those that another module holds are left out."""

    stored: Mapping[str, tuple[str, int]]

    def dtype(self, parameter: str) -> str:
        """That of a parameter; where it is another module's, that of the first of its own."""
        first = next(iter(self.stored.values()), ("", 0))
        return self.stored.get(parameter, first)[0]

    def bytes_of(self, part: Weight | None, weights: tuple[Weight, ...]) -> int:
        """Bytes of one matrix and of the vectors that belong to it: a bias is stored with its weight."""
        if part is None:
            return sum(num_bytes for _, num_bytes in self.stored.values())
        total = 0
        for name, (_, num_bytes) in self.stored.items():
            sharing = [each for each in weights if each.matrix.parameter in (name, name.replace("bias", "weight"))]
            sharing = sharing or list(weights[:1])
            if part in sharing:
                total += num_bytes // len(sharing) + (num_bytes % len(sharing) if part == sharing[0] else 0)
        return total


@final
class _Owners:
    """Who was the first to hold each parameter."""

    def __init__(self, stored: Callable[[str], tuple[str, int] | None] | None) -> None:
        self._stored = stored
        self._module: dict[int, str] = {}
        self._matrices: dict[int, list[tuple[str, str, Matrix | None]]] = {}

    def stored_sizes(self, name: str, own: Mapping[str, nn.Parameter]) -> _Sizes:
        """Type and bytes of the parameters that no module before this one holds."""
        sizes: dict[str, tuple[str, int]] = {}
        for parameter_name, parameter in own.items():
            if self._module.setdefault(id(parameter), name) != name:
                continue
            full = f"{name}.{parameter_name}" if name else parameter_name
            found = self._stored(full) if self._stored is not None else None
            dtype = str(parameter.dtype).removeprefix("torch.")
            sizes[parameter_name] = found or (dtype, parameter.numel() * parameter.element_size())
        return _Sizes(sizes)

    def tie(self, module: str, layer: str, weight: nn.Parameter | None, part: Weight | None) -> _Tie | None:
        """The layer before this one that holds the same weight, if there is one."""
        if weight is None:
            return None
        matrix = None if part is None else part.matrix
        place = None if matrix is None else (matrix.shape, matrix.first_row, matrix.transposed)
        before = self._matrices.setdefault(id(weight), [])
        tie = None
        for its_module, name, other in before:
            if its_module == module:
                continue  # another part of the same parameter
            same = other is not None and (other.shape, other.first_row, other.transposed) == place
            tie = _Tie(name, same)
            if same:
                break
        before.append((module, layer, matrix))
        return tie


def _shape(weight: nn.Parameter | None, part: Weight | None) -> tuple[int, ...]:
    """That of the weight, of a group's rows where it has groups."""
    if weight is None:
        return ()
    if part is None or part.matrix.transposed:
        return tuple(weight.shape)
    return (part.matrix.shape[0], *weight.shape[1:])


def _blocks(model: nn.Module) -> Iterator[BlockRef]:
    chosen: list[str] = []
    for stack, module in model.named_modules():
        if any(stack.startswith(f"{outer}.") for outer in chosen) or not _is_stack(module):
            continue
        chosen.append(stack)
        for index, (child_name, child) in enumerate(module.named_children()):
            if _holds(child, _MULTIPLIED):
                yield BlockRef(f"{stack}.{child_name}" if stack else child_name, stack, index)


def _is_stack(module: nn.Module) -> bool:
    """A list whose children repeat one class, each child being more than a single layer.

    Blocks without linear layers (of convolutions) count in an `nn.Sequential` alone, which hands each one's output to
    the next and to nobody else: a network that keeps them for later, as U-shaped ones do, keeps its blocks in lists.
    """
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    children = list(module.children())
    classes = Counter(type(child) for child in children)
    # A hybrid model alternates a few classes of block in one list; a list of unlike parts is not a stack.
    repeats = len(children) > len(classes) or (len(children) == 1 and isinstance(module, nn.ModuleList))
    wanted = _MULTIPLIED if type(module) is nn.Sequential else ("linear",)
    return repeats and all(_holds(child, wanted) for child in children)


def _holds(module: nn.Module, kinds: Collection[str]) -> bool:
    """Whether the module is more than a layer, and has a compressible layer of one of the kinds inside."""
    return not _is_layer(module, kinds) and any(_is_layer(inner, kinds) for inner in module.modules())


def _is_layer(module: nn.Module, kinds: Collection[str]) -> bool:
    kind = kind_of(module)
    return kind is not None and kind.label(module) in kinds and kind.why_not(module) is None


def _enclosing(name: str, block_names: set[str]) -> str | None:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        if prefix in block_names:
            return prefix
    return None


def _kind(module: nn.Module) -> LayerKind:
    kind = kind_of(module)
    if kind is not None:
        return kind.label(module)
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    if "norm" in type(module).__name__.lower():
        return "norm"
    return "other"


def _reason(model: nn.Module, name: str, module: nn.Module, tie: _Tie | None) -> str | None:
    """Why a layer method cannot be applied to the module; None if it can."""
    if tie is not None and tie.same_matrix:
        return f"its weight is that of {tie.layer}: compress that one, and this follows"
    if tie is not None:
        return f"its weight is that of {tie.layer}, which multiplies with it in another arrangement"
    if kind_of(module) is not None:
        if not name:
            return "it is the whole model, and nothing could hold its packed counterpart: put it into a module"
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            return "nn.MultiheadAttention reads its weight without calling it"
        return why_not_replaceable(module)
    match _kind(module):
        case "attention":
            return "nn.MultiheadAttention joins its projections in one parameter that it reads itself"
        case "norm":
            return "a normalisation: a few numbers per channel, nothing to gain"
        case _:
            return f"{type(module).__name__} is no linear layer"
