"""Reading recipes: what is right comes through whole, what is wrong is named with its line."""

import json
from contextlib import suppress
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rarefy.core.errors import PathError, RecipeError, UsageError
from rarefy.core.grids import IntGrid
from rarefy.core.patterns import NM, Blocks, Unstructured
from rarefy.methods import GPTQ, METHODS, RTN, SparseGPT, Wanda
from rarefy.methods.__main__ import render
from rarefy.methods.allocation import ALLOCATIONS
from rarefy.recipe import Recipe, Step, load_recipe, shipped_names
from rarefy.recipe.schema import STEP_MODELS, json_schema
from rarefy.recipe.source import parse_yaml

DOCS = Path(__file__).resolve().parents[2] / "docs"

EXAMPLE = """\
# the recipe of the design document
steps:
  - method: sparsegpt
    targets: ["*.mlp.*", "*.self_attn.*"]
    pattern: {keep: 32, group: 64}
    values: {num_bits: 4, group_size: 64}
    percent_damp: 0.02
  - method: rtn
    targets: embed_tokens
    optional: true
    values:
      num_bits: 8
      symmetric: true
rest_dtype: float32
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_becomes_the_methods_it_names(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, EXAMPLE))
    first = SparseGPT(NM(32, 64), IntGrid(4, 64, False), percent_damp=0.02)
    assert recipe == Recipe(
        (
            Step(first, ("*.mlp.*", "*.self_attn.*")),
            Step(RTN(IntGrid(8, None, True)), ("embed_tokens",), optional=True),
        ),
        rest_dtype="float32",
    )
    assert [step.name for step in recipe.steps] == ["sparsegpt", "rtn"]
    assert [step.where.rpartition(":")[2] for step in recipe.steps] == ["3", "8"]


def test_to_yaml_and_to_dict_are_read_back(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, EXAMPLE))
    assert load_recipe(recipe.to_dict()) == recipe
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe
    # a model directory names its own recipe
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(tmp_path) == recipe
    # every hyperparameter is said, defaults too
    assert recipe.to_dict()["steps"][0]["block_size"] == 128
    assert json.loads(json.dumps(recipe.to_dict())) == recipe.to_dict()


@pytest.mark.parametrize(
    "allocation", ["uniform", "erk", "owl", "global", {"rule": "owl", "threshold": 7, "spread": 0.1}, {"rule": "erk"}]
)
def test_allocations_are_read_back(tmp_path: Path, allocation: object) -> None:
    data = {"steps": [{"method": "wanda", "pattern": {"block": [2, 4], "sparsity": 0.5}, "allocation": allocation}]}
    recipe = load_recipe(data)
    rule = allocation if isinstance(allocation, str) else allocation["rule"]  # type: ignore[index]
    assert type(recipe.steps[0].allocation) is ALLOCATIONS[rule]
    assert getattr(recipe.steps[0].allocation, "threshold", 5) == (
        7 if isinstance(allocation, dict) and rule == "owl" else 5
    )
    assert load_recipe(recipe.to_dict()) == recipe
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe
    assert jsonschema.Draft202012Validator(json_schema()).is_valid(data)


def test_an_object_in_python_is_named_by_its_class() -> None:
    recipe = Recipe((Step(GPTQ(IntGrid(4, 64, False))),))
    assert recipe.to_dict()["steps"][0]["method"] == "gptq"


def test_blocks(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "steps:\n  - method: wanda\n    pattern: {block: [16, 64], sparsity: 0.5}\n"))
    assert recipe.steps[0].method == Wanda(Blocks((16, 64), 0.5))
    assert recipe.to_dict()["steps"][0]["pattern"] == {"block": [16, 64], "sparsity": 0.5}
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_recipe_is_valid_and_described(name: str) -> None:
    recipe = load_recipe(name)
    assert load_recipe(recipe.to_dict()) == recipe
    text = (Path(__file__).resolve().parents[2] / "src/rarefy/recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    jsonschema.validate(yaml.safe_load(text), json_schema())


def test_the_recipes_that_the_documentation_names_are_there() -> None:
    assert {
        "default",
        "sparse-50",
        "sparse-50-int4",
        "2-4",
        "2-4-int4",
        "sparse-70",
        "sparsegpt-50",
        "k-of-64",
        "lowrank-sparse",
        "int8",
        "int4",
        "wanda-50",
        "owl-70",
        "obert-global-50",
        "oats",
        "svd-llm",
    } <= set(shipped_names())


WRONG = [
    (
        "steps:\n  - method: sparsgpt\n",
        2,
        "unknown method 'sparsgpt'; allowed: random, magnitude, wanda, ",
        "'sparsegpt'?",
    ),
    ("steps:\n  - pattern: {sparsity: 0.5}\n", 2, "a step without a method", "magnitude, wanda"),
    ("steps:\n  - method: wanda\n", 2, "the key 'pattern' is missing", "method, targets, exclude, optional, pattern"),
    ("steps:\n  - method: wanda\n    patern: {sparsity: 0.5}\n", 3, "unknown key 'patern'", "did you mean 'pattern'?"),
    ("steps:\n  - method: wanda\n    pattern: {sparsity: 1.5}\n", 3, "sparsity is 1.5", ">= 0 and <= 1"),
    ("steps:\n  - method: wanda\n    pattern: {sparsity: .nan}\n", 3, "sparsity is nan", "number"),
    ("steps:\n  - method: wanda\n    pattern: {sparsity: yes}\n", 3, "sparsity is True", "a number"),
    ("steps:\n  - method: wanda\n    pattern:\n      keep: 5\n      group: 4\n", 3, "'keep': 5", "keep <= group"),
    ("steps:\n  - method: wanda\n    pattern:\n      keep: 0\n      group: 4\n", 4, "keep is 0", ">= 1 and <= 64"),
    (
        "steps:\n  - method: wanda\n    pattern: 0.5\n",
        3,
        "pattern is 0.5",
        "{keep: K, group: G}, {block: [R, C], sparsity: S} or {axis: A, sparsity: S}",
    ),
    ("steps:\n  - method: wanda\n    pattern: {block: [16, 64]}\n", 3, "'sparsity' is missing", "block, sparsity"),
    (
        "steps:\n  - method: wanda\n    pattern: {block: 16, sparsity: 0.5}\n",
        3,
        "block is 16",
        "two integers in [1, 4096]",
    ),
    ("steps:\n  - method: wanda\n    pattern: {block: [16], sparsity: 0.5}\n", 3, "block is [16]", "rows and columns"),
    ("steps:\n  - method: wanda\n    pattern: {block: [0, 64], sparsity: 0.5}\n", 3, "item of block is 0", "[1, 4096]"),
    ("steps:\n  - method: wanda\n    pattern: {block: [8, 8], keep: 1}\n", 3, "unknown key 'keep'", "block, sparsity"),
    ("steps:\n  - method: wanda\n    pattern: {}\n", 3, "the key 'sparsity' is missing", "sparsity"),
    ("steps:\n  - method: rtn\n    values: {num_bits: 5}\n", 3, "num_bits is 5", "2, 3, 4 or 8"),
    ("steps:\n  - method: rtn\n    values: {num_bits: '4'}\n", 3, "num_bits is '4'", "4 or 8"),
    ("steps:\n  - method: rtn\n    values: {num_bits: 4, group_size: 48}\n", 3, "group_size is 48", "multiple of 32"),
    ("steps:\n  - method: rtn\n    values: {num_bits: 4, groupsize: 32}\n", 3, "'groupsize'", "'group_size'?"),
    ("steps:\n  - method: rtn\n    values: 4\n", 3, "values is 4", "num_bits, group_size, symmetric"),
    (
        "steps:\n  - method: rtn\n    values: {num_bits: 4}\n    search: best\n",
        4,
        "search is 'best'",
        "minmax or error",
    ),
    ("steps:\n  - method: gptq\n    values: {num_bits: 4}\n    percent_damp: -1\n", 4, "percent_damp is -1", ">= 0"),
    ("steps:\n  - method: gptq\n    values: {num_bits: 4}\n    block_size: 2.5\n", 4, "block_size is 2.5", "integer"),
    ("steps:\n  - method: gptq\n    values: {num_bits: 4}\n    targets: 3\n", 4, "targets is 3", "a list of globs"),
    ("steps:\n  - method: gptq\n    values: {num_bits: 4}\n    targets: []\n", 2, "empty list of targets", "one glob"),
    (
        "steps:\n  - method: wanda\n    pattern: {sparsity: 0.5}\n    allocation: olw\n",
        4,
        "allocation is 'olw'; allowed: uniform, erk, owl, global, or {rule: NAME, ...}",
        "did you mean 'owl'?",
    ),
    (
        "steps:\n  - method: wanda\n    pattern: {sparsity: 0.5}\n    allocation: {rule: olw}\n",
        4,
        "allocation is {'rule': 'olw'}",
        "did you mean 'owl'?",
    ),
    (
        "steps:\n  - method: wanda\n    pattern: {sparsity: 0.5}\n    allocation:\n      rule: owl\n      treshold: 3",
        6,
        "unknown key 'treshold'; allowed: rule, threshold, spread",
        "did you mean 'threshold'?",
    ),
    (
        "steps:\n  - method: wanda\n    pattern: {sparsity: 0.5}\n    allocation: {rule: owl, spread: 2}\n",
        4,
        "spread is 2",
        "a number >= 0 and <= 1",
    ),
    ("steps:\n  - method: wanda\n    pattern: {sparsity: 0.5}\n    allocation: []\n", 4, "allocation is []", "erk"),
    ("steps:\n  - method: wanda\n    pattern: {sparsity: 0.5}\n    allocation: {}\n", 4, "allocation is {}", "erk"),
    ("steps:\n  - method: rtn\n    values: {num_bits: 8}\n    allocation: erk\n", 4, "unknown key 'allocation'", ""),
    (
        "steps:\n  - method: alps\n    pattern: {sparsity: 0.5}\n    allocation: global\n",
        2,
        "allocation global for alps, which does not say what each weight matters",
        "global for random, magnitude, wanda, ria",
    ),
    ("steps: []\n", 1, "steps is []", "at least one step"),
    ("steps: 3\n", 1, "steps is 3", "a list"),
    ("\nsteps:\n  - rtn\n", 3, "is 'rtn'", "a mapping with method"),
    ("rest_dtype: int8\nsteps:\n  - method: rtn\n    values: {num_bits: 8}\n", 1, "rest_dtype is 'int8'", "bfloat16"),
    ("stepz:\n  - method: rtn\n", 1, "unknown key 'stepz'", "did you mean 'steps'?"),
    (
        "steps:\n  - method: rtn\n    targets: *.mlp.*\n",
        3,
        "not valid YAML",
        'put names with a star in quotes: "*.mlp.*"',
    ),
    ("steps:\n  - method: rtn\n    targets: *mlp\n", 3, "begins with *", 'in quotes: "*.mlp.*"'),
    ("steps:\n  - method: rtn\n    method: gptq\n", 3, "the key 'method' a second time", ""),
    ("steps: [\n", 2, "not valid YAML", ""),
    ("steps: !!python/object:os.system {}\n", 1, "begins with *, & or !", ""),
]


@pytest.mark.parametrize(("text", "line", "found", "hint"), WRONG, ids=[wrong[2] for wrong in WRONG])
def test_a_wrong_recipe_is_named_with_its_line(tmp_path: Path, text: str, line: int, found: str, hint: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: ")
    assert found in message
    assert hint in message
    assert caught.value.exit_code == 2


def test_a_mapping_has_a_path_in_place_of_a_line() -> None:
    with pytest.raises(
        RecipeError, match=r"^recipe: steps\[1\]\.values\.num_bits: num_bits is 5; allowed: 2, 3, 4 or 8$"
    ):
        load_recipe(
            {"steps": [{"method": "rtn", "values": {"num_bits": 8}}, {"method": "rtn", "values": {"num_bits": 5}}]}
        )
    with pytest.raises(RecipeError, match="at least one step"):
        load_recipe({"steps": []})
    with pytest.raises(RecipeError, match="no steps"):
        Recipe(())


def test_the_first_of_several_mistakes_is_named(tmp_path: Path) -> None:
    text = "steps:\n  - method: rtn\n    values: {num_bits: 8}\n    serch: error\n  - method: nothing\n"
    with pytest.raises(RecipeError, match=r"r\.yaml:4: unknown key 'serch'"):
        load_recipe(write(tmp_path, text))


@pytest.mark.parametrize(("text", "found"), [("", "an empty file"), ("- 1\n", "a list"), ("words", "a str")])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str, found: str) -> None:
    with pytest.raises(RecipeError, match=found):
        load_recipe(write(tmp_path, text))


def test_bytes_that_are_no_text_and_depth_without_end(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PathError, match="cannot be read as text"):
        load_recipe(path)
    with pytest.raises(RecipeError):
        load_recipe(write(tmp_path, "steps: " + "[" * 5000))
    with pytest.raises(RecipeError, match="characters"):
        load_recipe(write(tmp_path, "#" * 1_000_001))


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(PathError, match=r"sparse50: neither .*allowed: .*sparse-50.*did you mean 'sparse-50'\?"):
        load_recipe("sparse50")


@given(st.text(max_size=60))
def test_no_text_brings_the_reader_down(text: str) -> None:
    try:
        parse_yaml(text, "r.yaml")
    except RecipeError:
        return


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.sampled_from(["rtn", "gptq", "", "*", "owl", "name"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["steps", "method", "values", "pattern", "num_bits", "keep", "rule"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    )
)
def test_no_data_brings_the_checks_down(data: object) -> None:
    allocated = {"method": "wanda", "pattern": {"sparsity": 0.5}, "allocation": data}
    step = {"method": "sparsegpt", "pattern": data, "values": data}
    for candidate in ({"steps": data}, {"steps": [step]}, {"steps": [allocated]}):
        with suppress(UsageError):
            load_recipe(candidate)


def test_the_published_schema_is_current() -> None:
    published = json.loads((DOCS / "recipe.schema.json").read_text(encoding="utf-8"))
    assert published == json.loads(json.dumps(json_schema())), "run: python -m rarefy.recipe > docs/recipe.schema.json"


def test_schema_and_reader_agree() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    good = yaml.safe_load(EXAMPLE)
    assert validator.is_valid(good)
    for text, _, _, _ in WRONG:
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError:
            continue
        # a schema knows neither of keep <= group nor of one key twice nor of lists that may not be empty
        if "keep: 5" in text or text.count("method") > 1 or "targets: []" in text or ".nan" in text:
            continue
        if "allocation: global" in text:  # nor which methods rank weights
            continue
        assert not validator.is_valid(data), text


def test_every_method_has_a_step_with_its_own_fields() -> None:
    assert set(STEP_MODELS) == set(METHODS)
    assert "refit_steps" in STEP_MODELS["sparsegpt"].model_fields
    assert "refit_steps" not in STEP_MODELS["gptq"].model_fields
    recipe = load_recipe({"steps": [{"method": "magnitude", "pattern": {"sparsity": 1}}]})
    assert recipe.steps[0].method.pattern == Unstructured(1)  # type: ignore[attr-defined]


def test_the_documents_tell_of_every_method_and_recipe() -> None:
    measured = json.loads((DOCS / "measured.json").read_text(encoding="utf-8"))
    assert (DOCS / "methods.md").read_text(encoding="utf-8") == render(measured)
    assert measured["effects"].keys() <= METHODS.keys()
    assert measured["allocations"].keys() <= ALLOCATIONS.keys()
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    for name in shipped_names():
        assert f"`{name}`" in text
