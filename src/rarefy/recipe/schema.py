"""The file format of recipes: pydantic models made from the methods' own fields, and errors that say what to do."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self, TypeGuard, Union, get_type_hints

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, create_model, model_validator

from rarefy.core.errors import RarefyError, RecipeError
from rarefy.core.grids import IntGrid
from rarefy.core.patterns import MAX_BLOCK, MAX_GROUP, NM, Blocks, Lines, Unstructured, WantedPattern
from rarefy.core.ranks import MAX_RANK, Rank
from rarefy.methods import METHODS, LayerMethod
from rarefy.methods.allocation import ALLOCATIONS
from rarefy.methods.base import describe_bounds
from rarefy.recipe.allocations import ALLOWED, AllocationSpec, rule_model
from rarefy.recipe.allocations import from_file as allocation_from_file
from rarefy.recipe.model import Recipe, RestDtype, Step
from rarefy.recipe.source import Path, line_of


class _Strict(BaseModel):
    """Unknown keys are errors, and a number in quotes is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class UnstructuredSpec(_Strict):
    """Zeros anywhere."""

    sparsity: float = Field(ge=0, le=1, description="fraction of zeros")


class NMSpec(_Strict):
    """`keep` of every `group` columns along the input axis; a shorter last group keeps its share."""

    keep: int = Field(ge=1, le=MAX_GROUP, description="entries kept in a group")
    group: int = Field(ge=1, le=MAX_GROUP, description="columns of a group")

    @model_validator(mode="after")
    def _keep_fits(self) -> Self:
        if self.keep > self.group:
            raise ValueError("keep <= group")
        return self


BlockSize = Annotated[int, Field(ge=1, le=MAX_BLOCK)]


class BlocksSpec(_Strict):
    """Zeros in whole blocks; those at the lower and right edge of a matrix may be smaller."""

    block: list[BlockSize] = Field(min_length=2, max_length=2, description="rows and columns of a block")
    sparsity: float = Field(ge=0, le=1, description="fraction of blocks that are zero")


class LinesSpec(_Strict):
    """Whole rows (outputs) or columns (inputs) are zero."""

    axis: Literal["rows", "columns"] = Field(description="what is zero as a whole")
    sparsity: float = Field(ge=0, le=1, description="fraction of rows or columns that are zero")


class ValuesSpec(_Strict):
    """The integer grid that weights are rounded to."""

    num_bits: Literal[2, 3, 4, 8] = Field(description="bits of a code")
    group_size: int | None = Field(
        default=None, ge=32, multiple_of=32, description="columns that share a scale; null: a whole row (per channel)"
    )
    symmetric: bool = Field(default=False, description="no zero points: the grid is centred on zero")


class RankSpec(_Strict):
    """The rank of factors, said in exactly one of four ways."""

    ratio: float | None = Field(default=None, gt=0, le=1, description="numbers in both factors, of those in the matrix")
    energy: float | None = Field(default=None, gt=0, le=1, description="of the squared singular values, at least")
    count: int | None = Field(default=None, ge=1, le=MAX_RANK, description="the rank itself")
    num_bytes: int | None = Field(default=None, ge=1, description="of the two factors of a layer, in bfloat16")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("exactly one of ratio, energy, count, num_bytes")
        return self


def _pattern_tag(value: object) -> str:
    keys = value.keys() if isinstance(value, Mapping) else set()
    return (
        "lines"
        if "axis" in keys
        else "blocks"
        if "block" in keys
        else "nm"
        if keys & {"keep", "group"}
        else "unstructured"
    )


PatternSpec = Annotated[
    Union[  # noqa: UP007
        Annotated[UnstructuredSpec, Tag("unstructured")],
        Annotated[NMSpec, Tag("nm")],
        Annotated[BlocksSpec, Tag("blocks")],
        Annotated[LinesSpec, Tag("lines")],
    ],
    Discriminator(_pattern_tag),
]

_FILE_TYPES: dict[object, Any] = {
    WantedPattern: PatternSpec,
    Rank: RankSpec,
    IntGrid: ValuesSpec,
    IntGrid | None: ValuesSpec | None,
}

_STEP_FIELDS: dict[str, Any] = {
    "targets": (
        str | list[str] | None,
        Field(
            default=None,
            description="globs on module names; one without a dot also matches the last part of a name. "
            "Left out: every linear layer inside of the repeated blocks",
        ),
    ),
    "exclude": (str | list[str], Field(default=[], description="globs of layers to leave alone")),
    "optional": (bool, Field(default=False, description="matching no layer is fine")),
}


def _step_model(name: str, method: type[LayerMethod]) -> type[BaseModel]:
    hints = get_type_hints(method)
    fields: dict[str, Any] = {"method": (Literal[name], Field(description=f"{_first_line(method)} ({method.paper})"))}
    fields |= _STEP_FIELDS
    assert _is_dataclass_type(method)
    for field in dataclasses.fields(method):
        kind = _FILE_TYPES.get(hints[field.name], hints[field.name])
        bounds = {key: value for key, value in field.metadata.items() if key in ("ge", "gt", "le")}
        required = field.default is dataclasses.MISSING
        default = ... if required else _to_file(field.default)
        fields[field.name] = (kind, Field(default=default, description=field.metadata.get("doc"), **bounds))
    if WantedPattern in hints.values():
        about = "how many of the zeros each layer gives: a rule, or a mapping with one and what it takes"
        fields["allocation"] = (AllocationSpec, Field(default="uniform", description=about))
    step_name, doc = f"{method.__name__}Step", _first_line(method)
    model: type[BaseModel] = create_model(step_name, __base__=_Strict, __doc__=doc, **fields)
    return model


def _is_dataclass_type(cls: type) -> TypeGuard[Any]:
    return dataclasses.is_dataclass(cls)


def _first_line(method: type) -> str:
    return (method.__doc__ or "").strip().split("\n", 1)[0]


def _to_file(value: object) -> object:
    if isinstance(value, Unstructured | NM | IntGrid):
        return dataclasses.asdict(value)
    return value


STEP_MODELS: dict[str, type[BaseModel]] = {name: _step_model(name, method) for name, method in METHODS.items()}

# a union of as many models as there are methods: known at run time only
_AnyStep: Any = Annotated[Union[tuple(STEP_MODELS.values())], Field(discriminator="method")]  # noqa: UP007

RecipeModel: type[BaseModel] = create_model(
    "Recipe",
    __base__=_Strict,
    __doc__="What to do to which layers of a model; see docs/recipes.md.",
    steps=(list[_AnyStep], Field(min_length=1, description="applied to each layer in this order")),
    rest_dtype=(RestDtype, Field(default="bfloat16", description="of the matrices that no step quantizes")),
    reestimate_batch_norm=(
        bool,
        Field(
            default=False, description="estimate the means and variances of batch norms anew on the calibration data"
        ),
    ),
)


def json_schema() -> dict[str, Any]:
    """The JSON schema of recipe files; docs/recipe.schema.json is this."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RecipeModel.model_json_schema()}


def build(data: object, name: str, lines: Mapping[Path, int]) -> Recipe:
    """Check plain data and make a recipe of it.

    Args:
        data: as YAML or JSON gives it.
        name: what error messages call it.
        lines: line of each path, empty if it was no file.

    Raises:
        RecipeError: with the line, what stands there, and what may stand there.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(name, f"a {type(data).__name__}", allowed="a mapping with `steps`")
    try:
        checked = RecipeModel.model_validate(data)
    except ValidationError as error:
        problems = [_explain(detail, data, name, lines) for detail in error.errors(include_url=False)]
        raise min(problems, key=lambda problem: problem[0])[1] from None
    steps: Iterable[BaseModel] = checked.steps  # type: ignore[attr-defined]
    return Recipe(
        tuple(_step(step, _where(("steps", index), name, lines)) for index, step in enumerate(steps)),
        rest_dtype=checked.rest_dtype,  # type: ignore[attr-defined]
        reestimate_batch_norm=checked.reestimate_batch_norm,  # type: ignore[attr-defined]
    )


def _step(step: Any, where: str) -> Step:
    cls = METHODS[step.method]
    assert _is_dataclass_type(cls)
    try:
        method = cls(**{field.name: _from_file(getattr(step, field.name)) for field in dataclasses.fields(cls)})
    except RarefyError as error:
        raise RecipeError(where, f"{error.where}: {error.found}", allowed=error.allowed, hint=error.hint) from None
    targets = None if step.targets is None else _globs(step.targets)
    if targets == ():
        raise RecipeError(where, "an empty list of targets", allowed="at least one glob, or no `targets` at all")
    allocation = allocation_from_file(getattr(step, "allocation", "uniform"))
    return Step(method, targets, _globs(step.exclude), step.optional, where, allocation)


def _globs(value: str | list[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _from_file(value: object) -> object:
    match value:
        case UnstructuredSpec():
            return Unstructured(value.sparsity)
        case NMSpec():
            return NM(value.keep, value.group)
        case BlocksSpec():
            return Blocks((value.block[0], value.block[1]), value.sparsity)
        case LinesSpec():
            return Lines(value.axis, value.sparsity)
        case RankSpec():
            return Rank(**value.model_dump())
        case ValuesSpec():
            return IntGrid(value.num_bits, value.group_size, value.symmetric)
        case dict():  # a default of a method
            return IntGrid(**value)
        case _:
            return value


def _where(path: Path, name: str, lines: Mapping[Path, int]) -> str:
    line = line_of(path, lines)
    if line is not None:
        return f"{name}:{line}"
    dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    return f"{name}: {dotted}" if dotted else name


def _explain(detail: Any, data: object, name: str, lines: Mapping[Path, int]) -> tuple[tuple[int, int], RecipeError]:
    """Turn pydantic's description of one problem into ours, with a key to sort by: kind, then line.

    A missing key is told last: it is most often one that was misspelt, which is told first.

    Pydantic's location also holds the tags of unions ("sparsegpt"), which are no keys of the file.
    """
    path, here, model = _follow(detail["loc"], data)
    where = _where(path, name, lines)
    rank = (1 if detail["type"] == "missing" else 0, line_of(path, lines) or 0)
    context: Mapping[str, Any] = detail.get("ctx", {})
    last = str(detail["loc"][-1]) if detail["loc"] else ""
    match detail["type"]:
        case "extra_forbidden":
            keys = list(model.model_fields) if model is not None else []
            hint = did_you_mean(last, keys)
            return rank, RecipeError(where, f"unknown key {last!r}", allowed=", ".join(keys), hint=hint)
        case "missing":
            keys = list(model.model_fields) if model is not None else []
            return rank, RecipeError(where, f"the key {last!r} is missing", allowed=", ".join(keys))
        case "union_tag_invalid" | "union_tag_not_found" | "literal_error" if "allocation" in detail["loc"]:
            rule = here.get("rule") if isinstance(here, Mapping) else here
            hint = did_you_mean(str(rule), ALLOCATIONS)
            return rank, RecipeError(where, f"allocation is {here!r}", allowed=ALLOWED, hint=hint)
        case "union_tag_invalid":
            found = str(context.get("tag"))
            path = (*path, "method")
            hint = did_you_mean(found, METHODS)
            return rank, RecipeError(
                _where(path, name, lines), f"unknown method {found!r}", allowed=", ".join(METHODS), hint=hint
            )
        case "union_tag_not_found":
            return rank, RecipeError(where, "a step without a method", allowed=f"method: {', '.join(METHODS)}")
        case "model_type" | "model_attributes_type" | "dict_type":
            return rank, RecipeError(where, f"{_label(path)}{here!r}", allowed=_mapping_allowed(path, model))
        case _:
            return rank, RecipeError(where, f"{_label(path)}{here!r}", allowed=_allowed(detail, model))


def _follow(loc: tuple[str | int, ...], data: Any) -> tuple[Path, Any, type[BaseModel] | None]:
    """Walk along a pydantic location: the path in the file, what stands there, and the innermost model around it."""
    path: list[str | int] = []
    model: type[BaseModel] | None = RecipeModel
    here = data
    for part in loc:
        if isinstance(here, Mapping) and part in here:
            if part == "values" and isinstance(here[part], Mapping):
                model = ValuesSpec
            elif part == "rank" and isinstance(here[part], Mapping):
                model = RankSpec
            path.append(part)
            here = here[part]
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            path.append(part)
            here = here[part]
        elif part in STEP_MODELS and len(path) == 2:
            model = STEP_MODELS[str(part)]
        elif path[-1:] == ["allocation"] and isinstance(part, str) and rule_model(part) is not None:
            model = rule_model(part)
        elif part == "nm":
            model = NMSpec
        elif part == "blocks":
            model = BlocksSpec
        elif part == "lines":
            model = LinesSpec
        elif part == "unstructured":
            model = UnstructuredSpec
    return tuple(path), here, model


def _label(path: Path) -> str:
    names = [part for part in path if isinstance(part, str)]
    if not names:
        return ""
    return f"{names[-1]} is " if isinstance(path[-1], str) else f"an item of {names[-1]} is "


def _mapping_allowed(path: Path, model: type[BaseModel] | None) -> str:
    if path and path[-1] == "pattern":
        return "{sparsity: S}, {keep: K, group: G}, {block: [R, C], sparsity: S} or {axis: A, sparsity: S}"
    if path and path[-1] == "rank":
        return "{ratio: R}, {energy: E}, {count: K} or {num_bytes: B}"
    if path and path[-1] == "values":
        model = ValuesSpec
    elif len(path) == 2:
        return "a mapping with method, and what the method takes"
    return f"a mapping with {', '.join(model.model_fields if model is not None else ())}"


def _globs_at(loc: tuple[str | int, ...]) -> bool:
    return "targets" in loc or "exclude" in loc


def _allowed(detail: Any, model: type[BaseModel] | None) -> str:
    context: Mapping[str, Any] = detail.get("ctx", {})
    if detail["type"] in ("string_type", "list_type") and _globs_at(detail["loc"]):
        return "a glob, or a list of globs"
    if "block" in detail["loc"]:
        return f"two integers in [1, {MAX_BLOCK}]: rows and columns"
    words = {
        "float_type": "a number",
        "int_type": "an integer",
        "int_from_float": "an integer",
        "bool_type": "true or false",
        "string_type": "text",
        "list_type": "a list",
        "finite_number": "a finite number",
        "too_short": "at least one step",
    }
    if detail["type"] == "literal_error":
        return str(context["expected"]).replace("'", "")
    if detail["type"] in words:
        return words[detail["type"]]
    if detail["type"] == "value_error":
        return str(context["error"])
    if detail["type"] == "multiple_of":
        return f"a positive multiple of {context['multiple_of']}, or null"
    field = None if model is None else model.model_fields.get(str(detail["loc"][-1]))
    if field is not None and context.keys() & {"ge", "gt", "le"}:
        bounds = {
            key: getattr(entry, key) for entry in field.metadata for key in ("ge", "gt", "le") if hasattr(entry, key)
        }
        return describe_bounds(int if field.annotation is int else float, bounds)
    return str(detail["msg"]).removeprefix("Input should be ")


def did_you_mean(found: str, known: Iterable[str]) -> str | None:
    """A hint with the closest known word, if one is close."""
    close = difflib.get_close_matches(found, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else None
