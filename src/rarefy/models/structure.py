"""What a model is made of: repeated blocks and layers, found from the module tree and not from a table of names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import nn

from rarefy.nn.replace import why_not_replaceable

LayerKind = Literal["linear", "embedding", "conv", "norm", "recurrent", "attention", "other"]

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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
    """One module that holds parameters itself.

    Args:
        name: module name.
        kind: what it is.
        shape: of its weight; (O, I) for linear layers, (V, D) for embeddings, () where it has no ``weight``.
        dtype: of the weight as stored.
        num_bytes: of all its own parameters as stored; 0 where another layer holds them (tied).
        num_zeros: zeros in the weight; None where they were not counted.
        block: name of the repeated block that it is in, or None.
        compressible: whether a layer method can be applied to it.
        reason: why not, if not.
        tied_to: the layer that holds the same weight, if that is another one.
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


@final
@dataclass(frozen=True)
class Structure:
    """The blocks and layers of a model, in the order of its module tree."""

    blocks: tuple[BlockRef, ...]
    layers: tuple[LayerRef, ...]

    def layer(self, name: str) -> LayerRef:
        """The layer of that name (KeyError if there is none)."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)


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
    first_owner: dict[int, str] = {}
    layers: list[LayerRef] = []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=True))
        if not own:
            continue
        weight = own.get("weight")
        kind = _kind(module)
        tied_to = None
        num_bytes = 0
        dtype = ""
        for parameter_name, parameter in own.items():
            owner = first_owner.setdefault(id(parameter), name)
            if owner != name:
                if parameter is weight:
                    tied_to = owner
                continue
            full = f"{name}.{parameter_name}" if name else parameter_name
            found = stored(full) if stored is not None else None
            stored_dtype, stored_bytes = found or (
                str(parameter.dtype).removeprefix("torch."),
                parameter.numel() * parameter.element_size(),
            )
            num_bytes += stored_bytes
            if parameter is weight or not dtype:
                dtype = stored_dtype
        zeros: int | None = None
        if count_zeros and weight is not None and tied_to is None:
            full = f"{name}.weight" if name else "weight"
            values = read(full) if read is not None and weight.is_meta else weight.detach()
            zeros = int(values.numel() - torch.count_nonzero(values))
        reason = _reason(model, name, module, kind, tied_to)
        layers.append(
            LayerRef(
                name=name,
                kind=kind,
                shape=tuple(weight.shape) if weight is not None else (),
                dtype=dtype,
                num_bytes=num_bytes,
                num_zeros=zeros,
                block=_enclosing(name, block_names),
                compressible=reason is None,
                reason=reason,
                tied_to=tied_to,
            )
        )
    return Structure(blocks, tuple(layers))


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer that a compressed one can stand in for."""
    return isinstance(module, nn.Linear) and why_not_replaceable(module) is None


def _blocks(model: nn.Module) -> Iterator[BlockRef]:
    chosen: list[str] = []
    for stack, module in model.named_modules():
        if any(stack.startswith(f"{outer}.") for outer in chosen) or not _is_stack(module):
            continue
        chosen.append(stack)
        for index, (child_name, child) in enumerate(module.named_children()):
            if _holds_linear(child):
                yield BlockRef(f"{stack}.{child_name}" if stack else child_name, stack, index)


def _is_stack(module: nn.Module) -> bool:
    """A list whose children repeat one class, each child being more than a single layer."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    children = list(module.children())
    classes = Counter(type(child) for child in children)
    # A hybrid model alternates a few classes of block in one list; a list of unlike parts is not a stack.
    repeats = len(children) > len(classes) or (len(children) == 1 and isinstance(module, nn.ModuleList))
    return repeats and all(_holds_linear(child) for child in children)


def _holds_linear(module: nn.Module) -> bool:
    return not is_linear(module) and any(is_linear(inner) for inner in module.modules())


def _enclosing(name: str, block_names: set[str]) -> str | None:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        if prefix in block_names:
            return prefix
    return None


def _kind(module: nn.Module) -> LayerKind:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(module, _CONVOLUTION):
        return "conv"
    if isinstance(module, _RECURRENT):
        return "recurrent"
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    if "norm" in type(module).__name__.lower():
        return "norm"
    return "other"


def _reason(model: nn.Module, name: str, module: nn.Module, kind: LayerKind, tied_to: str | None) -> str | None:
    """Why a layer method cannot be applied to the module; None if it can."""
    if tied_to is not None:
        return f"its weight is that of {tied_to}: compress that one, and this follows"
    if kind == "linear":
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            return "nn.MultiheadAttention reads its weight without calling it"
    if kind in ("linear", "embedding"):
        return why_not_replaceable(module)
    if type(module).__name__ == "Conv1D":
        return "transformers' Conv1D keeps its weight transposed; no packed counterpart yet"
    texts: dict[LayerKind, str] = {
        "conv": "convolutions have no storage layout with a kernel yet",
        "recurrent": f"{type(module).__name__} has no storage layout with a kernel yet",
        "attention": "nn.MultiheadAttention joins its projections in one parameter that it reads itself",
        "norm": "a normalisation: a few numbers per channel, nothing to gain",
        "other": f"{type(module).__name__} is no linear layer",
    }
    return texts[kind]
