"""Which steps apply to which layers."""

from dataclasses import replace

import pytest
from tests.recipe.conftest import Layer, Model, decoder

from rarefy.core.errors import RecipeError
from rarefy.core.grids import IntGrid
from rarefy.core.patterns import NM, Unstructured
from rarefy.core.ranks import Rank
from rarefy.methods import GPTQ, RTN, SVD, SVDLLM, FrequencySVD, LayerMethod, Magnitude, SparseGPT, Spatial, Tucker
from rarefy.recipe import Recipe, Step, load_recipe, notes, resolve, shipped_names

HALF = Magnitude(Unstructured(0.5))
INT8 = RTN(IntGrid(8, None, True))
INT4 = GPTQ(IntGrid(4, 32, False))


def planned(recipe: Recipe, model: Model) -> dict[str, list[str]]:
    return {plan.layer: [name for name, _ in plan.steps] for plan in resolve(recipe, model)}


def targets(model: Model, *globs: str, exclude: tuple[str, ...] = ()) -> list[str]:
    return list(planned(Recipe((Step(INT8, globs, exclude),)), model))


def test_without_targets_every_linear_layer_of_the_blocks(model: Model) -> None:
    expected = [layer.name for layer in model.layers if layer.kind == "linear" and layer.block]
    assert list(planned(Recipe((Step(HALF),)), model)) == expected
    assert len(expected) == 8


def test_without_blocks_every_linear_layer() -> None:
    mlp = Model(
        (), (Layer("0", "linear", (8, 64)), Layer("1", "other", (), None, False, "ReLU"), Layer("2", "linear", (8, 8)))
    )
    assert list(planned(Recipe((Step(HALF),)), mlp)) == ["0", "2"]


@pytest.mark.parametrize(
    ("glob", "number"),
    [
        ("q_proj", 2),
        ("*.mlp.*", 4),
        ("*_proj", 8),
        ("model.layers.1.*", 4),
        ("model.layers.0.mlp.up_proj", 1),
        ("*", 9),
    ],
)
def test_globs(model: Model, glob: str, number: int) -> None:
    assert len(targets(model, glob)) == number


def test_exclude_and_order(model: Model) -> None:
    assert targets(model, "down_proj", "q_proj", exclude=("model.layers.0.*",)) == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    ]


def test_steps_follow_one_another(model: Model) -> None:
    recipe = Recipe((Step(HALF, ("q_proj",)), Step(INT4), Step(INT8, ("embed_tokens",))))
    found = planned(recipe, model)
    assert found["model.layers.0.self_attn.q_proj"] == ["magnitude", "gptq"]
    assert found["model.layers.0.mlp.up_proj"] == ["gptq"]
    assert found["model.embed_tokens"] == ["rtn"]


@pytest.mark.parametrize("globs", [("embed_tokens",), ("lm_head",), ("lm_head", "embed_tokens")])
def test_naming_either_of_a_tied_pair_targets_it_once(model: Model, globs: tuple[str, ...]) -> None:
    assert targets(model, *globs) == ["model.embed_tokens"]
    assert "model.embed_tokens" not in targets(model, "*", exclude=("lm_head",))


def test_an_untied_head_is_a_layer_of_its_own() -> None:
    untied = decoder(tied=False)
    assert targets(untied, "lm_head") == ["lm_head"]
    assert planned(Recipe((Step(HALF, ("lm_head",)),)), untied) == {"lm_head": ["magnitude"]}


@pytest.mark.parametrize("method", [HALF, SparseGPT(NM(2, 4)), INT4, FrequencySVD(Rank(ratio=0.5))])
def test_an_embedding_that_is_tied_to_a_head_takes_every_method(model: Model, method: LayerMethod) -> None:
    assert len(planned(Recipe((Step(method, ("lm_head",)),)), model)["model.embed_tokens"]) == 1


@pytest.mark.parametrize("method", [HALF, INT8, SVD(Rank(ratio=0.5)), FrequencySVD(Rank(ratio=0.5))])
def test_an_embedding_without_a_head_takes_methods_that_need_no_inputs(method: LayerMethod) -> None:
    assert len(planned(Recipe((Step(method, ("embed_tokens",)),)), decoder(tied=False))["model.embed_tokens"]) == 1


@pytest.mark.parametrize("method", [SparseGPT(NM(2, 4)), INT4, SVDLLM(Rank(ratio=0.5))])
@pytest.mark.parametrize("glob", ["embed_tokens", "*"])
def test_an_embedding_without_a_head_has_no_inputs(method: LayerMethod, glob: str) -> None:
    with pytest.raises(RecipeError, match=r"m\.yaml:3: \S+ targets the embedding model\.embed_tokens.*allowed: .*svd"):
        resolve(Recipe((Step(method, (glob,), where="m.yaml:3"),)), decoder(tied=False))


CONVOLUTIONS = Model(
    (),
    (
        Layer("conv", "conv", (8, 64, 3, 3)),
        Layer("signal", "conv", (8, 64, 5)),
        Layer("pointwise", "conv", (8, 64, 1, 1)),
        Layer("depthwise", "depthwise", (64, 1, 3, 3)),
        Layer("head", "linear", (10, 64)),
    ),
)


def test_factors_of_kernels_are_for_layers_that_have_one() -> None:
    """Without targets they take what fits; where a layer is named, the reason why it does not fit is said."""
    half = Rank(ratio=0.5)
    assert list(planned(Recipe((Step(Tucker(half)),)), CONVOLUTIONS)) == ["conv", "signal"]
    assert list(planned(Recipe((Step(Spatial(half)),)), CONVOLUTIONS)) == ["conv"]
    for method, name, reason in (
        (Tucker(half), "pointwise", "its kernel has one tap"),
        (Tucker(half), "depthwise", "a depthwise convolution has one channel for each kernel"),
        (Tucker(half), "head", "it is no convolution"),
        (Spatial(half), "signal", "its taps lie along one axis at most"),
    ):
        with pytest.raises(RecipeError, match=rf"m\.yaml:3: \w+ does not fit layer {name}: {reason}"):
            resolve(Recipe((Step(method, (name,), where="m.yaml:3"),)), CONVOLUTIONS)
    linear = Model((), CONVOLUTIONS.layers[-1:])
    with pytest.raises(RecipeError, match="tucker does not fit layer head: it is no convolution"):
        resolve(Recipe((Step(Tucker(half)),)), linear)


def test_factors_of_kernels_are_not_rounded() -> None:
    steps = (Step(Tucker(Rank(ratio=0.5)), ("conv",)), Step(INT8, ("conv",)))
    with pytest.raises(RecipeError, match="factors of taps, which are stored in bfloat16"):
        resolve(Recipe(steps), CONVOLUTIONS)
    kept = Step(Tucker(Rank(ratio=0.5), remainder="keep"), ("conv",))
    assert planned(Recipe((kept, steps[1])), CONVOLUTIONS) == {"conv": ["tucker", "rtn"]}


def test_counts_of_rows_are_for_embeddings(model: Model) -> None:
    with pytest.raises(RecipeError, match=r"frequency-svd targets model\.layers\.0\..*q_proj, which looks no rows up"):
        resolve(Recipe((Step(FrequencySVD(Rank(ratio=0.5)), ("q_proj",)),)), model)


def test_a_target_that_matches_nothing_lists_what_there_is(model: Model) -> None:
    with pytest.raises(
        RecipeError, match=r"m\.yaml:7: the target 'qproj' .*allowed: embed_tokens, q_proj, .*'q_proj'\?"
    ):
        resolve(Recipe((Step(HALF, ("q_proj", "qproj"), where="m.yaml:7"),)), model)


def test_a_target_that_only_matches_what_cannot_be_compressed_says_why(model: Model) -> None:
    with pytest.raises(RecipeError, match=r"no layer of its targets can be compressed; model\.layers\.0\.norm: a norm"):
        resolve(Recipe((Step(INT8, ("norm",)),)), model)


def test_a_layer_that_is_the_whole_model_has_no_name_to_give() -> None:
    alone = Model((), (Layer("", "linear", (8, 8), compressible=False, reason="it is the whole model"),))
    with pytest.raises(RecipeError, match=r"no layer of its targets can be compressed; it is the whole model"):
        resolve(Recipe((Step(INT8),)), alone)


def test_everything_excluded(model: Model) -> None:
    with pytest.raises(RecipeError, match="all excluded"):
        resolve(Recipe((Step(HALF, ("q_proj",), ("*",)),)), model)


def test_optional_steps_may_match_nothing_and_are_noted(model: Model) -> None:
    recipe = Recipe((Step(HALF), Step(INT8, ("word_embeddings", "wte"), optional=True)))
    assert len(resolve(recipe, model)) == 8
    assert notes(recipe, model) == ("step 2 (rtn, targets word_embeddings, wte) is optional and has no layer",)
    assert notes(Recipe((Step(HALF),)), model) == ()
    with pytest.raises(RecipeError, match="every step is optional"):
        resolve(Recipe((Step(INT8, ("wte",), optional=True),)), model)


def test_two_grids_on_one_layer(model: Model) -> None:
    same = Recipe((Step(INT4), Step(GPTQ(IntGrid(4, 32, False), percent_damp=0.1))))
    assert len(resolve(same, model)) == 8
    two = Recipe((Step(INT8), Step(INT4, ("up_proj",), where="m.yaml:9")))
    with pytest.raises(RecipeError, match=r"m\.yaml:9: .*int8 per channel symmetric; this .* int4 group 32 asymmetric"):
        resolve(two, model)


def test_a_group_wider_than_a_layer() -> None:
    small = Model((), (Layer("small", "linear", (8, 16)),))
    with pytest.raises(RecipeError, match=r"layer small: input axis 16 is smaller than the group of 32"):
        resolve(Recipe((Step(Magnitude(NM(16, 32))),)), small)


def test_a_layer_outside_of_the_blocks_that_would_fit_changes_nothing() -> None:
    layers = (Layer("stem", "conv", (8, 3, 7, 7)), Layer("blocks.0.up", "linear", (8, 48), "blocks.0"))
    with pytest.raises(RecipeError, match=r"up: input axis 48 is smaller than the group of 64"):
        resolve(Recipe((Step(SparseGPT(NM(32, 64))),)), Model(("blocks.0",), layers))


def test_what_fits_none_of_the_layers_names_none_of_them(model: Model) -> None:
    with pytest.raises(RecipeError, match=r"it is no convolution; hint: it fits none of the step's targets"):
        resolve(Recipe((Step(Tucker(Rank(ratio=0.5))),)), model)
    queries = [layer for layer in model.layers if layer.name.endswith("q_proj")]
    narrow = Model(model.blocks, tuple(replace(x, shape=(64, 48)) if x in queries else x for x in model.layers))
    names = '"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"'
    with pytest.raises(RecipeError, match=rf"hint: exclude: \[{names}\], or choose a smaller group"):
        resolve(Recipe((Step(Magnitude(NM(16, 64)), ("*",)),)), narrow)


@pytest.mark.parametrize("name", shipped_names())
@pytest.mark.parametrize("tied", [True, False])
def test_every_shipped_recipe_fits_decoders_and_encoders(name: str, tied: bool) -> None:
    recipe = load_recipe(name)
    assert len(resolve(recipe, decoder(tied=tied))) >= 8
    encoder = Model(
        ("encoder.layer.0",),
        (
            Layer("embeddings.word_embeddings", "embedding", (100, 64)),
            Layer("encoder.layer.0.attention.query", "linear", (64, 64), "encoder.layer.0"),
            Layer("pooler.dense", "linear", (64, 64)),
        ),
    )
    assert "encoder.layer.0.attention.query" in planned(recipe, encoder)
