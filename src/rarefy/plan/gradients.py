"""What the passes for gradients will take."""

from collections.abc import Sequence

from rarefy.calibrate.gradient_sums import chunks_of, most_bytes, sum_bytes
from rarefy.calibrate.statistics import GradientStatistic
from rarefy.recipe import LayerPlan, Recipe


def gradient_costs(
    recipe: Recipe, layers: Sequence[LayerPlan], num_weights: int, item_bytes: int, forward_seconds: float
) -> tuple[int, float]:
    """Bytes of memory and seconds of the passes for gradients; 0 where no method needs any.

    Args:
        recipe: the recipe.
        layers: of the recipe.
        num_weights: of the whole model, which is held once.
        item_bytes: of one of them during the passes.
        forward_seconds: of one forward pass over all data.

    Raises:
        UsageError: the blocks of one layer alone are too large.
    """
    wanted: dict[str, list[GradientStatistic]] = {}
    for layer in layers:
        needs = dict.fromkeys(each for place in layer.places for each in recipe.steps[place].statistics())
        own = [statistic for statistic in needs if isinstance(statistic, GradientStatistic)]
        if own:
            wanted[layer.layer] = own
    if not wanted:
        return 0, 0.0
    shapes = {layer.layer: layer.shape for layer in layers}
    chunks = chunks_of(wanted, shapes, most_bytes())
    sizes = [sum(sum_bytes(each, shapes[layer]) for layer in chunk for each in wanted[layer]) for chunk in chunks]
    # A backward pass is a product for the gradients of the inputs, which goes down to the first layer of the chunk, and
    # one for those of the weights, which is for the chunk alone.
    passes = len(chunks) + (len(chunks) + 1) / 2 + 1
    looks = sum(any(isinstance(each, GradientStatistic) for each in step.looks_at()) for step in recipe.steps)
    # an allocation looks twice; what fits at once is collected once for all
    times = 1 + 2 * looks if len(chunks) > 1 else 1
    return item_bytes * num_weights + max(sizes), forward_seconds * passes * times
