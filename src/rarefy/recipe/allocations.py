"""How a recipe names an allocation: by its rule, or by a mapping with the rule and its hyperparameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_type_hints

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, create_model

from rarefy.core.errors import RecipeError
from rarefy.core.patterns import NM, Blocks, Lines, Unstructured
from rarefy.methods import METHODS, LayerMethod
from rarefy.methods.allocation import ALLOCATIONS, Allocation, Global, Uniform
from rarefy.methods.base import HasSaliency


def check_allocation(allocation: Allocation, method: LayerMethod, name: str, where: str) -> None:
    """Refuse a rule that a method has no use for.

    Raises:
        RecipeError: the method makes no zeros, or Global is to compare weights that the method does not rank.
    """
    if isinstance(allocation, Uniform):
        return
    makes_zeros = isinstance(getattr(method, "pattern", None), Unstructured | NM | Blocks | Lines)
    if not makes_zeros or not dataclasses.is_dataclass(method):
        raise RecipeError(where, f"an allocation of zeros for {name}, which takes no pattern", allowed="no allocation")
    if isinstance(allocation, Global) and not isinstance(method, HasSaliency):
        known = [other for other, cls in METHODS.items() if hasattr(cls, "saliency")]
        raise RecipeError(
            where,
            f"allocation global for {name}, which does not say what each weight matters",
            allowed=f"global for {', '.join(known)}",
            hint="choose erk or owl, which fit every method that makes zeros",
        )


def rule_of(allocation: Allocation) -> str:
    """The rule's name in recipes and reports."""
    for name, cls in ALLOCATIONS.items():
        if type(allocation) is cls:
            return name
    return type(allocation).__name__.lower()


def to_file(allocation: Allocation) -> str | dict[str, Any]:
    """Plain data for an allocation, with every hyperparameter; `from_file` reads it back."""
    given: dict[str, Any] = dataclasses.asdict(allocation) if dataclasses.is_dataclass(allocation) else {}
    return {"rule": rule_of(allocation), **given} if given else rule_of(allocation)


def from_file(value: str | BaseModel) -> Allocation:
    """The allocation that checked data names."""
    if isinstance(value, str):
        return ALLOCATIONS[value]()
    given = value.model_dump()
    return ALLOCATIONS[given.pop("rule")](**given)


def rule_model(rule: str) -> type[BaseModel] | None:
    """The model of the mapping that names a rule."""
    return _RULE_MODELS.get(rule)


def _rule_model(rule: str, cls: type[Allocation]) -> type[BaseModel]:
    doc = (cls.__doc__ or "").strip().split("\n", 1)[0]
    fields: dict[str, Any] = {"rule": (Literal[rule], Field(description=f"{doc} ({cls.paper})"))}
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        bounds = {key: value for key, value in field.metadata.items() if key in ("ge", "gt", "le")}
        about = {"default": field.default, "description": field.metadata.get("doc"), **bounds}
        fields[field.name] = (hints[field.name], Field(**about))
    model: type[BaseModel] = create_model(
        f"{cls.__name__}Spec",
        __config__=ConfigDict(extra="forbid", strict=True, frozen=True),
        __doc__=doc,
        **fields,
    )
    return model


_RULE_MODELS = {rule: _rule_model(rule, cls) for rule, cls in ALLOCATIONS.items()}


def _tag(value: object) -> str | None:
    rule = value.get("rule") if isinstance(value, Mapping) else getattr(value, "rule", None)
    return "name" if isinstance(value, str) else rule if isinstance(rule, str) else None


# as many models as there are rules: known at run time only
_Specs: Any = Union[
    (
        Annotated[Literal[tuple(ALLOCATIONS)], Tag("name")],
        *(Annotated[model, Tag(rule)] for rule, model in _RULE_MODELS.items()),
    )
]
AllocationSpec: Any = Annotated[_Specs, Discriminator(_tag)]
ALLOWED = f"{', '.join(ALLOCATIONS)}, or {{rule: NAME, ...}}"
