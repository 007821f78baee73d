"""Put compressed layers in the place of a torch model's own ones."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from rarefy.artifact import LayoutSpec
from rarefy.core.errors import UnsupportedModelError, UsageError
from rarefy.layouts import Layout
from rarefy.nn.conv import ConvKind
from rarefy.nn.embedding import EmbeddingKind
from rarefy.nn.holder import LayoutHolder
from rarefy.nn.linear import LinearKind
from rarefy.nn.matrices import Kind, Packed, Weight
from rarefy.nn.recurrent import RecurrentKind

KINDS: tuple[Kind, ...] = (LinearKind(), EmbeddingKind(), ConvKind(), RecurrentKind())
"""The one list of kinds of layers: discovery, calibration, solving and loading go through it."""


def kind_of(module: nn.Module) -> Kind | None:
    """The kind that the module is of."""
    return next((kind for kind in KINDS if kind.covers(module)), None)


def why_not_replaceable(module: nn.Module) -> str | None:
    """Say why no compressed layer can stand in for `module`, or None if one can.

    Only layers whose forward pass is known exactly are replaced.
    """
    kind = kind_of(module)
    return f"{type(module).__name__} is no layer that can be packed" if kind is None else kind.why_not(module)


def weights_of(module: nn.Module, name: str = "") -> tuple[Weight, ...]:
    """The matrices of one module, which is called `name` in its model; none if it cannot be replaced."""
    kind = kind_of(module)
    if kind is None or kind.why_not(module) is not None:
        return ()
    return tuple(Weight(name, module, kind, matrix) for matrix in kind.matrices(module))


def all_weights(model: nn.Module) -> Iterator[Weight]:
    """The matrices of every module of a model; those of a module with several names under each."""
    for name, module in model.named_modules(remove_duplicate=False):
        yield from weights_of(module, name)


def find_weight(model: nn.Module, layer: str) -> Weight:
    """The matrix that a layer's name stands for.

    Raises:
        UsageError: there is none of that name.
        UnsupportedModelError: its module is of a kind that cannot be replaced.
    """
    module = None
    for name in (layer, layer.rpartition(".")[0]):
        try:
            module = model.get_submodule(name)
        except AttributeError:
            continue
        found = next((weight for weight in weights_of(module, name) if weight.layer == layer), None)
        if found is not None:
            return found
        if name == layer:
            reason = why_not_replaceable(module) or "it has several weights, each with a name of its own"
            raise UnsupportedModelError(f"layer {layer}", reason)
    raise UsageError(f"layer {layer}", f"the {type(model).__name__} has no such module")


def replace_linear(model: nn.Module, layers: Mapping[str, Layout], tied: Mapping[str, str] | None = None) -> None:
    """Replace layers by compressed ones over `layers`, in place.

    Args:
        model: the model; its other parameters stay as they are.
        layers: name of a layer -> layout of its matrix; the name is that of the module, and of the matrix after a dot
            where the module has several.
        tied: name of a layer that shares its weight -> the name in `layers` whose layout it reads.

    Raises:
        UsageError: a name is not in the model, or a shape differs.
        UnsupportedModelError: a module is of a kind that cannot be replaced.

    Notes:
        Everything is checked before anything is replaced.
    """
    specs = {name: LayoutSpec(layout.format, layout.meta()) for name, layout in layers.items()}
    holders = replace_with_empty(model, specs, tied or {}, device="meta")
    for name, layout in layers.items():
        holders[name].load_layout(layout)


def replace_with_empty(
    model: nn.Module, specs: Mapping[str, LayoutSpec], tied: Mapping[str, str], device: torch.device | str
) -> dict[str, LayoutHolder]:
    """Replace layers by compressed ones whose arrays are yet to be filled; return them by name.

    Args:
        model: the model, possibly on the meta device.
        specs: name of a layer -> format and metadata.
        tied: name of a layer -> name in `specs` whose arrays it shares.
        device: where the new buffers are allocated.

    Raises:
        UsageError: a name is not in the model, or a shape differs.
        UnsupportedModelError: a module is of a kind that cannot be replaced.
    """
    weights = {name: find_weight(model, name) for name in (*specs, *tied)}
    for name, weight in weights.items():
        if name in tied and (name in specs or tied[name] not in specs):
            raise UsageError(f"layer {name}", f"tied to {tied[name]!r}", allowed="the name of another compressed layer")
        shape = tuple(specs[tied.get(name, name)].meta["shape"])
        if shape != weight.matrix.shape:
            raise UsageError(f"layer {name}", f"layout of shape {shape}", allowed=str(weight.matrix.shape))
    _forget_tied_parameters(model, {weight.parameter_name for weight in weights.values()})
    holders: dict[str, LayoutHolder] = {}
    replaced: dict[int, tuple[nn.Module, dict[str, LayoutHolder]]] = {}  # one module stays one under several names
    for module_name, own in _by_module(weights).items():
        old = own[0].module
        if id(old) not in replaced:
            packed = {weight.matrix.name: _packed(weight.layer, specs, tied, holders) for weight in own}
            replaced[id(old)] = own[0].kind.pack(old, packed, device)
            new, made = replaced[id(old)]
            for weight in own:
                made[weight.matrix.name].set_compute_dtype(weight.parameter.dtype)
            _hand_on_attributes(old, new)
            new.train(old.training)
        new, made = replaced[id(old)]
        holders |= {weight.layer: made[weight.matrix.name] for weight in own}
        parent, _, child = module_name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return holders


def _hand_on_attributes(old: nn.Module, new: nn.Module) -> None:
    """Give a layer what its predecessor says of itself: models read the dilation of a convolution, to pad by it."""
    for name, value in vars(old).items():
        if not name.startswith("_") and not hasattr(new, name):
            setattr(new, name, value)


def _by_module(weights: Mapping[str, Weight]) -> dict[str, list[Weight]]:
    """The weights of each module, those of modules that only read others' arrays last, as `weights` has them."""
    found: dict[str, list[Weight]] = {}
    for weight in weights.values():
        found.setdefault(weight.module_name, []).append(weight)
    return found


def _packed(
    layer: str, specs: Mapping[str, LayoutSpec], tied: Mapping[str, str], holders: Mapping[str, LayoutHolder]
) -> Packed:
    if layer not in tied:
        return Packed(specs[layer], None)
    if tied[layer] not in holders:
        raise UnsupportedModelError(f"layer {layer}", f"tied to {tied[layer]}, which shares a module with tied weights")
    return Packed(specs[tied[layer]], holders[tied[layer]])


def _forget_tied_parameters(model: nn.Module, parameters: Iterable[str]) -> None:
    """Remove packed parameters from transformers' tables of tied parameters, which must name parameters.

    A transformers model ties `lm_head.weight` to `embed_tokens.weight` by name, at loading and whenever `tie_weights()`
    is called. A compressed layer has no parameter of that name; its tie is `LayoutHolder.tied_to`.
    """
    gone = set(parameters)
    for prefix, module in model.named_modules(remove_duplicate=False):
        expand = getattr(module, "get_expanded_tied_weights_keys", None)
        if expand is None:
            continue
        dot = f"{prefix}." if prefix else ""
        for attribute, table in (
            ("_tied_weights_keys", expand(all_submodels=False)),
            ("all_tied_weights_keys", getattr(module, "all_tied_weights_keys", {})),
        ):
            kept = {a: b for a, b in table.items() if dot + a not in gone and dot + b not in gone}
            if kept != table:
                setattr(module, attribute, kept)
