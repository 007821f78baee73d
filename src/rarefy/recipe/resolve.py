"""Which steps apply to which layers of a model; everything that can be wrong is found here, before any work."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol, final

from rarefy.calibrate.row_counts import RowCounts
from rarefy.core.errors import PatternError, RecipeError
from rarefy.core.grids import IntGrid
from rarefy.core.patterns import NM, Blocks, Lines
from rarefy.methods import BiasCorrection, LayerMethod
from rarefy.methods.allocation import LayerShape, ModelAllocation, Uniform, patterns_of
from rarefy.methods.grid_search import describe
from rarefy.recipe.allocations import rule_of
from rarefy.recipe.model import Recipe, Step
from rarefy.recipe.schema import did_you_mean

UNTARGETED = "no step of the recipe targets it"
_SHOWN = 12
# What a step without targets is for. Embeddings and depthwise convolutions have to be asked for: of the one a method
# sees no inputs unless a head shares it, and of the other every weight counts and all together are few.
_BY_DEFAULT = ("linear", "conv", "recurrent")


class LayerRef(Protocol):
    """What a recipe must know of a layer; see models.structure.LayerRef."""

    @property
    def name(self) -> str:
        """Module name."""
        ...

    @property
    def kind(self) -> str:
        """E.g. "linear" or "embedding"."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: (O, I), (V, D) or (O, I, *taps)."""
        ...

    @property
    def module(self) -> str:
        """Module name; that of the layer unless the module has several."""
        ...

    @property
    def matrix(self) -> tuple[int, int] | None:
        """(O, I) of the weight as methods see it; None if the layer is not compressible."""
        ...

    @property
    def block(self) -> str | None:
        """The repeated block that it is in."""
        ...

    @property
    def compressible(self) -> bool:
        """Whether a method can be applied to it."""
        ...

    @property
    def reason(self) -> str | None:
        """Why not, if not."""
        ...

    @property
    def tied_to(self) -> str | None:
        """The layer that owns the same weight, if that is another one."""
        ...


class Structure(Protocol):
    """What a recipe must know of a model; see models.structure.Structure."""

    @property
    def blocks(self) -> Sequence[object]:
        """The repeated blocks."""
        ...

    @property
    def layers(self) -> Sequence[LayerRef]:
        """All layers, in the order of the module tree."""
        ...


@final
@dataclass(frozen=True)
class LayerPlan:
    """What is to be done to one layer.

    Args:
        layer: name of the layer; of a tied pair, the one that owns the weight.
        shape: (O, I).
        steps: the methods in order, each with its name.
        places: for each of them the place of its step in the recipe.
    """

    layer: str
    shape: tuple[int, int]
    steps: tuple[tuple[str, LayerMethod], ...]
    places: tuple[int, ...]


def resolve(recipe: Recipe, structure: Structure) -> tuple[LayerPlan, ...]:
    """Find the layers of every step.

    A tied pair is one layer: naming either of the two targets it once.

    Returns:
        A plan for every layer that some step targets, in the order of the model. Amounts that follow from shapes are
        in it; those that take a look at the dense model are still the mean (see `with_amounts`).

    Raises:
        RecipeError: with the step's line: a glob that matches nothing, a layer that cannot be compressed, a method that
            does not fit an embedding, two different grids for one layer, or an N:M group wider than a layer.
    """
    places_of: dict[str, list[int]] = {}
    for place, step in enumerate(recipe.steps):
        for layer in _targets(step, structure):
            earlier = places_of.setdefault(layer.name, [])
            _check_fit(step, layer, structure, [recipe.steps[other] for other in earlier])
            earlier.append(place)
    found = []
    for layer in structure.layers:
        places = tuple(places_of.get(layer.name, ()))
        if places:
            assert layer.matrix is not None
            steps = tuple((recipe.steps[place].name, recipe.steps[place].method) for place in places)
            found.append(LayerPlan(layer.name, layer.matrix, steps, places))
    if not found:
        raise RecipeError(recipe.steps[0].where, "every step is optional and none matches a layer of this model")
    plans = tuple(found)
    for place, step in enumerate(recipe.steps):
        if not isinstance(step.allocation, ModelAllocation | Uniform):
            shapes = shapes_of(place, plans, structure)
            amounts = step.allocation.amounts(sparsity_of(step), shapes)
            plans = with_amounts(plans, place, step, shapes, amounts)
    return plans


def shapes_of(place: int, plans: Sequence[LayerPlan], structure: Structure) -> list[LayerShape]:
    """The layers of the step at a place of the recipe."""
    shapes = {layer.name: layer.shape for layer in structure.layers}
    return [LayerShape(plan.layer, shapes[plan.layer], plan.shape) for plan in plans if place in plan.places]


def sparsity_of(step: Step) -> float:
    """The fraction of zeros that a step with a pattern is to give."""
    sparsity: float = step.method.pattern.sparsity  # type: ignore[attr-defined]
    return sparsity


def with_amounts(
    plans: Sequence[LayerPlan], place: int, step: Step, layers: Sequence[LayerShape], amounts: Mapping[str, float]
) -> tuple[LayerPlan, ...]:
    """The plans with an own pattern for every layer of a step.

    Args:
        plans: of all layers.
        place: of the step in the recipe.
        step: the step; its pattern says what all its layers are to give together.
        layers: of the step.
        amounts: from its allocation.
    """
    patterns = patterns_of(step.method.pattern, layers, amounts)  # type: ignore[attr-defined]
    changed = []
    for plan in plans:
        steps = list(plan.steps)
        if place in plan.places:
            own: LayerMethod = dataclasses.replace(step.method, pattern=patterns[plan.layer])  # type: ignore[type-var]
            steps[plan.places.index(place)] = (step.name, own)
        changed.append(dataclasses.replace(plan, steps=tuple(steps)))
    return tuple(changed)


def notes(recipe: Recipe, structure: Structure) -> tuple[str, ...]:
    """What a report should say of the optional steps that match nothing in this model."""
    return tuple(
        f"step {index} ({step.name}, targets {', '.join(step.targets or ('by default',))}) is optional and has no layer"
        for index, step in enumerate(recipe.steps, start=1)
        if step.optional and not _targets(step, structure)
    )


def left_alone(recipe: Recipe, structure: Structure) -> dict[str, str]:
    """For layers that no step targets, because steps without targets leave out what they do not fit: the reason."""
    targeted = {layer.name for step in recipe.steps for layer in _targets(step, structure)}
    found: dict[str, str] = {}
    for step in recipe.steps:
        for layer in structure.layers:
            by_default = step.targets is None and layer.kind in _BY_DEFAULT and layer.compressible
            inside = layer.block is not None or not structure.blocks
            if by_default and inside and layer.name not in targeted and layer.tied_to is None:
                why = _why_left_out(step, layer)
                if why is not None:
                    found.setdefault(layer.name, f"{step.name} does not fit it: {why}")
    return found


def amounts_in_words(recipe: Recipe, plans: Sequence[LayerPlan], *, final: bool) -> tuple[str, ...]:
    """What a plan or report should say of the steps whose layers give amounts of their own.

    Args:
        recipe: the recipe.
        plans: of the layers.
        final: the dense model has been looked at.
    """
    found = []
    for place, step in enumerate(recipe.steps):
        methods = [plan.steps[plan.places.index(place)][1] for plan in plans if place in plan.places]
        if isinstance(step.allocation, Uniform) or not methods:
            continue
        words = f"step {place + 1} ({step.name}), allocation {rule_of(step.allocation)}: "
        if isinstance(step.allocation, ModelAllocation) and not final:
            words += "a look at the dense model will say how many zeros each layer gives; its bytes here are the mean's"
        else:
            shares = [method.pattern.sparsity for method in methods]  # type: ignore[attr-defined]
            words += f"{min(shares):.1%} to {max(shares):.1%} zeros in a layer"
        found.append(words)
    return tuple(found)


def _targets(step: Step, structure: Structure) -> list[LayerRef]:
    """The layers that a step is for, owners in place of tied layers, each once, in the order of the model."""
    owners = {layer.name: layer.tied_to or layer.name for layer in structure.layers}
    excluded = {owners[layer.name] for layer in structure.layers if any(_matches(layer, g) for g in step.exclude)}
    if step.targets is None:
        inside = [layer for layer in structure.layers if layer.block is not None or not structure.blocks]
        kind_fits = [layer for layer in inside if layer.kind in _BY_DEFAULT and layer.tied_to is None]
        fits = [layer for layer in kind_fits if layer.compressible and _why_left_out(step, layer) is None]
        chosen = {layer.name for layer in fits or kind_fits}
    else:
        chosen = set()
        for glob in step.targets:
            matched = [layer.name for layer in structure.layers if _matches(layer, glob)]
            if not matched and not step.optional:
                raise _nothing_matches(step, glob, structure)
            chosen.update(owners[name] for name in matched)
    candidates = [layer for layer in structure.layers if layer.name in chosen and layer.name not in excluded]
    found = [layer for layer in candidates if layer.compressible]
    if not found and not step.optional:
        raise _nothing_left(step, candidates)
    return found


def _matches(layer: LayerRef, glob: str) -> bool:
    """Whether a glob means a layer: by its name, that of its module, or the last part of either.

    The groups of a convolution are one module, which is packed as a whole: a group alone cannot be meant.
    """
    names = {layer.module} if layer.kind == "conv" else {layer.name, layer.module}
    return any(
        fnmatchcase(name, glob) or ("." not in glob and fnmatchcase(name.rpartition(".")[2], glob)) for name in names
    )


def _nothing_matches(step: Step, glob: str, structure: Structure) -> RecipeError:
    names = [layer.name for layer in structure.layers if layer.compressible or layer.tied_to is not None]
    return RecipeError(
        step.where,
        f"the target {glob!r} matches no layer",
        allowed=_listed(names),
        hint=did_you_mean(glob, [*names, *_last_parts(names)]) or "`rarefy inspect MODEL` lists the layers",
    )


def _nothing_left(step: Step, candidates: Sequence[LayerRef]) -> RecipeError:
    if candidates:
        first = candidates[0]
        name = f"{first.name}: " if first.name else ""  # the whole model has none
        return RecipeError(step.where, f"no layer of its targets can be compressed; {name}{first.reason}")
    found = (
        "this model has no linear, convolutional or recurrent layers"
        if step.targets is None
        else "its targets are all excluded"
    )
    return RecipeError(step.where, found, hint="`rarefy inspect MODEL` lists the layers")


def _last_parts(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _listed(names: Sequence[str]) -> str:
    """The names a glob could say: last parts, since a block repeats them."""
    parts = _last_parts(names)
    more = len(parts) - _SHOWN
    return ", ".join(parts[:_SHOWN]) + (f" and {more} more" if more > 0 else "") if parts else "(no layer)"


def _without(misfit: Callable[[LayerRef], object], step: Step, structure: Structure) -> str:
    """What to leave out of a step so that it fits."""
    targets = _targets(step, structure)
    names = [layer.name for layer in targets if misfit(layer) is not None]
    if len(names) == len(targets) > 1:
        return "it fits none of the step's targets; `rarefy inspect MODEL` lists the layers"
    quoted = ", ".join(f'"{name}"' for name in names[:_SHOWN])
    return f"exclude: [{quoted}{', ...' if len(names) > _SHOWN else ''}]"


def _check_fit(step: Step, layer: LayerRef, structure: Structure, earlier: Sequence[Step]) -> None:
    tied = [other for other in structure.layers if layer.name in (other.name, other.tied_to)]
    values = getattr(step.method, "values", None)
    is_looked_up = any(other.kind == "embedding" for other in tied)
    if is_looked_up and all(other.kind == "embedding" for other in tied) and set(step.method.needs()) - {RowCounts()}:
        raise RecipeError(
            step.where,
            f"{step.name} targets the embedding {layer.name}, which has no inputs to take statistics of",
            allowed="methods that need no data, such as magnitude, svd and rtn; frequency-svd",
            hint=f'exclude: ["{layer.name}"], and a step with another method for it',
        )
    if not is_looked_up and RowCounts() in step.method.needs():
        raise RecipeError(
            step.where,
            f"{step.name} targets {layer.name}, which looks no rows up",
            allowed="embeddings",
            hint="svd-llm",
        )
    if (error := _pattern_misfit(step, layer)) is not None:
        hint = _without(lambda other: _pattern_misfit(step, other), step, structure) + ", or choose a smaller group"
        raise RecipeError(step.where, f"{error.where}: {error.found}", allowed=error.allowed, hint=hint)
    if (misfit := _misfit(step, layer)) is not None:
        found = f"{step.name} does not fit layer {layer.name}: {misfit}"
        raise RecipeError(step.where, found, hint=_without(lambda other: _misfit(step, other), step, structure))
    if any(isinstance(other.method, BiasCorrection) for other in earlier):
        raise RecipeError(
            step.where,
            f"{step.name} comes after bias-correction on layer {layer.name}",
            hint="what a later step takes from the outputs is not made up for: put bias-correction last",
        )
    _check_factors(step, layer, earlier)
    grids = [grid for other in earlier if isinstance(grid := getattr(other.method, "values", None), IntGrid)]
    if isinstance(values, IntGrid) and grids and grids[-1] != values:
        raise RecipeError(
            step.where,
            f"layer {layer.name} is already put on {describe(grids[-1])}; this step asks for {describe(values)}",
            hint="a grid stays a grid: exclude the layer in one of the two steps",
        )


def _check_factors(step: Step, layer: LayerRef, earlier: Sequence[Step]) -> None:
    """Refuse what no layout of factors holds: a second pair, zeros in a pair, and values of other than 8 bits in it."""
    pattern, values, rank = (getattr(step.method, name, None) for name in ("pattern", "values", "rank"))
    only_factors = has_factors = is_cheap = False
    for other in earlier:
        if getattr(other.method, "rank", None) is not None:
            has_factors = True
            only_factors = not is_cheap and getattr(other.method, "remainder", "keep") == "drop"
        is_cheap |= getattr(other.method, "pattern", None) is not None or isinstance(_values(other), IntGrid)
    if has_factors and rank is not None:
        raise RecipeError(
            step.where,
            f"layer {layer.name} has factors already",
            hint="a layer has one pair: exclude the layer in one of the two steps",
        )
    hint = "let the earlier step keep what its factors do not hold (remainder: keep), or exclude the layer"
    if only_factors and pattern is not None:
        raise RecipeError(step.where, f"nothing is left of layer {layer.name} but factors, stored whole", hint=hint)
    has_taps = any(hasattr(other.method, "most_ranks") for other in earlier)
    if only_factors and isinstance(values, IntGrid) and has_taps:
        found = f"nothing is left of layer {layer.name} but factors of taps, which are stored in bfloat16"
        raise RecipeError(step.where, found, hint=hint)
    if only_factors and isinstance(values, IntGrid) and values.num_bits != 8:
        found = f"nothing is left of layer {layer.name} but factors; this step asks for {describe(values)}"
        raise RecipeError(step.where, found, allowed="8 bits", hint=hint)


def _misfit(step: Step, layer: LayerRef) -> str | None:
    """Why a method for one kind of layer does not fit this one; None if it does, or is for all kinds."""
    misfit = getattr(step.method, "misfit", None)
    reason: str | None = None if misfit is None else misfit(layer.kind, layer.shape)
    return _depthwise_misfit(step) if reason is None and layer.kind == "depthwise" else reason


def _depthwise_misfit(step: Step) -> str | None:
    """Why a step does not fit a layer whose channels each meet inputs of their own, which statistics are taken of."""
    pattern = getattr(step.method, "pattern", None)
    if not step.method.needs():
        return None
    if getattr(step.method, "rank", None) is not None:
        return "each of its channels meets inputs of its own, which leaves factors nothing to share"
    if isinstance(pattern, Lines) and pattern.axis == "columns":
        return "each of its rows has inputs of its own, so that no column is an input; rows fit it"
    if isinstance(pattern, Blocks) and pattern.block_shape[0] > 1:
        return "each of its rows has inputs of its own; blocks of one row fit it"
    return None


def _pattern_misfit(step: Step, layer: LayerRef) -> PatternError | None:
    """What is wrong with the pattern of a step on a layer; None if it fits, or the step has none."""
    pattern = getattr(step.method, "pattern", None)
    if isinstance(pattern, NM) and layer.matrix is not None:
        try:
            pattern.check_fits(layer.matrix[1], layer.name)
        except PatternError as error:
            return error
    return None


def _why_left_out(step: Step, layer: LayerRef) -> str | None:
    """Why a step that names no targets is not for a layer of a kind that it is for by default; None if it is."""
    error = _pattern_misfit(step, layer)
    return _misfit(step, layer) if error is None else error.found


def _values(step: Step) -> object:
    return getattr(step.method, "values", None)
