"""What a recipe is in Python: steps, each a method and the layers that it is for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, final

import yaml

from rarefy.calibrate.statistics import Statistic
from rarefy.core.errors import RecipeError
from rarefy.core.grids import IntGrid
from rarefy.core.patterns import NM, Blocks, Lines, Unstructured
from rarefy.core.ranks import Rank
from rarefy.methods import METHODS, LayerMethod
from rarefy.methods.allocation import Allocation, ModelAllocation, Uniform
from rarefy.recipe.allocations import check_allocation, to_file

RestDtype = Literal["bfloat16", "float32"]


@final
@dataclass(frozen=True)
class Step:
    """A method and the layers that it is for.

    Args:
        method: the method with its hyperparameters; one of METHODS, or any object with the same two functions.
        targets: globs on module names; a glob without a dot is also compared with the last part of the name. None:
            every linear, convolutional and recurrent layer inside of the repeated blocks, or every one where there are
            none.
        exclude: globs of layers to leave alone.
        optional: matching no layer is fine (a recipe for several kinds of model).
        where: what error messages call the step, such as ``mine.yaml:7``.
        allocation: how many of the zeros each layer gives; one of ALLOCATIONS, or any object with the same functions.

    Raises:
        RecipeError: the method has no use for the allocation.
    """

    method: LayerMethod
    targets: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    optional: bool = False
    where: str = dataclasses.field(default="recipe", compare=False)
    allocation: Allocation = dataclasses.field(default_factory=Uniform)

    def __post_init__(self) -> None:
        check_allocation(self.allocation, self.method, self.name, self.where)

    def looks_at(self) -> tuple[Statistic, ...]:
        """The statistics of the dense model that its allocation reads."""
        return self.allocation.needs(self.method) if isinstance(self.allocation, ModelAllocation) else ()

    def statistics(self) -> tuple[Statistic, ...]:
        """All that its method or its allocation reads."""
        return tuple(dict.fromkeys((*self.method.needs(), *self.looks_at())))

    @property
    def name(self) -> str:
        """The method's name in recipes and reports."""
        for name, cls in METHODS.items():
            if type(self.method) is cls:
                return name
        return type(self.method).__name__.lower()


@final
@dataclass(frozen=True)
class Recipe:
    """Steps in the order in which they are applied to each layer, and how to store what no step touches.

    Args:
        steps: at least one.
        rest_dtype: of matrices that no step quantizes; vectors are always float32.
        reestimate_batch_norm: estimate the means and variances of batch norms anew, behind the compressed layers.
    """

    steps: tuple[Step, ...]
    rest_dtype: RestDtype = "bfloat16"
    reestimate_batch_norm: bool = False

    def __post_init__(self) -> None:
        if not self.steps:
            raise RecipeError("recipe", "no steps", allowed="at least one step", hint="`rarefy recipes` lists examples")

    def to_dict(self) -> dict[str, Any]:
        """Plain data with every hyperparameter, defaults too; `load_recipe` reads it back."""
        data = {"steps": [_step_dict(step) for step in self.steps], "rest_dtype": self.rest_dtype}
        return data | ({"reestimate_batch_norm": True} if self.reestimate_batch_norm else {})

    def to_yaml(self) -> str:
        """`to_dict` as YAML."""
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        return text


def _step_dict(step: Step) -> dict[str, Any]:
    data: dict[str, Any] = {"method": step.name}
    if step.targets is not None:
        data["targets"] = list(step.targets)
    if step.exclude:
        data["exclude"] = list(step.exclude)
    if step.optional:
        data["optional"] = True
    if dataclasses.is_dataclass(step.method):
        for field in dataclasses.fields(step.method):
            data[field.name] = _plain(getattr(step.method, field.name))
    if not isinstance(step.allocation, Uniform):
        data["allocation"] = to_file(step.allocation)
    return data


def _plain(value: object) -> Any:
    if isinstance(value, Blocks):
        return {"block": list(value.block_shape), "sparsity": value.sparsity}
    if isinstance(value, Rank):
        return {key: given for key, given in dataclasses.asdict(value).items() if given is not None}
    if isinstance(value, Unstructured | NM | Lines | IntGrid):
        return dataclasses.asdict(value)
    return value if isinstance(value, int | float | str | bool | None) else repr(value)
