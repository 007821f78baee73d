"""Put compressed layers in the place of a torch model's own ones."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from rarefy.artifact import LayoutSpec
from rarefy.core.errors import UnsupportedModelError, UsageError
from rarefy.layouts import Layout
from rarefy.nn.embedding import CompressedEmbedding
from rarefy.nn.holder import LayoutHolder
from rarefy.nn.linear import CompressedLinear


def why_not_replaceable(module: nn.Module) -> str | None:
    """Say why no compressed layer can stand in for `module`, or None if one can.

    Only layers whose forward pass is known exactly are replaced: `nn.Linear`, `nn.Embedding`, and embeddings that do
    nothing but multiply the looked-up rows by a constant (Gemma, BART).
    """
    if type(module) is nn.Linear:
        return None
    if not isinstance(module, nn.Embedding):
        return f"{type(module).__name__} is neither nn.Linear nor nn.Embedding"
    if module.max_norm is not None:
        return "the embedding rescales its rows in place (max_norm)"
    if type(module) is nn.Embedding or _embedding_scale(module) is not None:
        return None
    return f"{type(module).__name__} is an embedding with a forward pass of its own"


def replace_linear(model: nn.Module, layers: Mapping[str, Layout], tied: Mapping[str, str] | None = None) -> None:
    """Replace linear and embedding layers by compressed ones over `layers`, in place.

    Args:
        model: the model; its other parameters stay as they are.
        layers: module name -> layout of its weight.
        tied: name of a module that shares its weight -> the name in `layers` whose layout it reads.

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
        specs: module name -> format and metadata.
        tied: module name -> name in `specs` whose arrays it shares.
        device: where the new buffers are allocated.

    Raises:
        UsageError: a name is not in the model, or a shape differs.
        UnsupportedModelError: a module is of a kind that cannot be replaced.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in (*specs, *tied):
        if name not in modules:
            raise UsageError(f"layer {name}", f"the {type(model).__name__} has no such module")
        reason = why_not_replaceable(modules[name])
        if reason is not None:
            raise UnsupportedModelError(f"layer {name}", reason)
        if name in tied and (name in specs or tied[name] not in specs):
            raise UsageError(f"layer {name}", f"tied to {tied[name]!r}", allowed="the name of another compressed layer")
        spec = specs[tied.get(name, name)]
        expected = _weight_shape(modules[name])
        if tuple(spec.meta["shape"]) != expected:
            raise UsageError(f"layer {name}", f"layout of shape {tuple(spec.meta['shape'])}", allowed=str(expected))
    _forget_tied_parameters(model, {*specs, *tied})
    holders: dict[str, LayoutHolder] = {}
    replaced: dict[int, LayoutHolder] = {}  # one module under several names stays one module
    for name in (*specs, *tied):
        old = modules[name]
        if id(old) not in replaced:
            source = holders[tied[name]] if name in tied else None
            replaced[id(old)] = _stand_in(old, specs[tied.get(name, name)], source, device)
        holders[name] = replaced[id(old)]
        parent_name, _, child = name.rpartition(".")
        setattr(modules[parent_name], child, holders[name])
    return holders


def _stand_in(
    old: nn.Module, spec: LayoutSpec, source: LayoutHolder | None, device: torch.device | str
) -> LayoutHolder:
    new: LayoutHolder
    if isinstance(old, nn.Embedding):
        scale = _embedding_scale(old)
        new = CompressedEmbedding(spec.format_name, spec.meta, scale=scale, source=source, device=device)
    else:
        assert isinstance(old, nn.Linear)
        linear = CompressedLinear(spec.format_name, spec.meta, source=source, device=device)
        linear.bias = old.bias
        new = linear
    assert isinstance(old.weight, Tensor)
    new.set_compute_dtype(old.weight.dtype)
    new.train(old.training)
    return new


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return tuple(weight.shape)


def _embedding_scale(module: nn.Embedding) -> float | None:
    """The constant that an embedding multiplies its rows by, or None if it does not or does more than that."""
    if type(module) is nn.Embedding:
        return None
    parameters = {name for name, _ in module.named_parameters()}
    if parameters != {"weight"} or next(module.children(), None) is not None:
        return None
    # transformers keeps the number beside a buffer, which has no value while the model is on the meta device.
    for attribute in ("scalar_embed_scale", "embed_scale"):
        scale = getattr(module, attribute, None)
        if isinstance(scale, Tensor) and scale.device.type != "meta" and scale.numel() == 1:
            return float(scale)
        if isinstance(scale, int | float):
            return float(scale)
    return None


def _forget_tied_parameters(model: nn.Module, replaced: Iterable[str]) -> None:
    """Remove the replaced layers' weights from transformers' tables of tied parameters, which must name parameters.

    A transformers model ties `lm_head.weight` to `embed_tokens.weight` by name, at loading and whenever `tie_weights()`
    is called. A compressed layer has no parameter of that name; its tie is `LayoutHolder.tied_to`.
    """
    gone = {f"{name}.weight" for name in replaced}
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
