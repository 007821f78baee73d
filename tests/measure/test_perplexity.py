import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rarefy.core.errors import NonFiniteError, UsageError
from rarefy.measure.perplexity import module_scorer, negative_log_likelihood, perplexity

# A toy language over {0, 1, 2}: after token a comes token b with probability P[a, b].
P = np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])


def toy_scorer(ids_T: np.ndarray) -> np.ndarray:
    return np.array([-math.log(P[a, b]) for a, b in pairwise(ids_T)])


class ToyModel(nn.Module):
    """The same language as logits, shifted by a constant that a softmax must not see."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        logits = torch.log(torch.tensor(P, dtype=torch.float32))[input_ids] + 3.0
        return type("Output", (), {"logits": logits})()


def test_by_hand_without_overlap() -> None:
    # windows 0 0 1 and 1 2 2; the transitions 0->0, 0->1, 1->2, 2->2; 0 is left over
    measured = perplexity(toy_scorer, [0, 0, 1, 1, 2, 2, 0], window=3)
    expected = (0.5 * 0.25 * 0.1 * 0.4) ** (-1 / 4)
    assert measured.value.median == pytest.approx(expected, rel=1e-12)
    assert measured.value.num_runs == 2
    assert "4 tokens predicted in 2 of 2 windows of 3 tokens without overlap; text of 7 tokens" in measured.how
    assert not measured.higher_is_better


def test_by_hand_with_overlap_counts_each_token_once() -> None:
    text = [0, 0, 1, 1, 2, 2, 0]
    # windows of 4 start at 0 and 2; the second scores only tokens 4 and 5, which the first has not
    measured = perplexity(toy_scorer, text, window=4, stride=2)
    expected = (0.5 * 0.25 * 0.8 * 0.1 * 0.4) ** (-1 / 5)
    assert measured.value.median == pytest.approx(expected, rel=1e-12)
    assert "5 tokens predicted in 2 of 2 windows of 4 tokens with stride 2" in measured.how
    # a stride of one token scores every transition of the text exactly once
    every = perplexity(toy_scorer, text, window=4, stride=1)
    assert every.value.median == pytest.approx(math.exp(toy_scorer(np.array(text)).mean()), rel=1e-12)


def test_tokens_with_overlap_have_enough_context() -> None:
    seen: list[tuple[int, ...]] = []

    def spy(ids_T: np.ndarray) -> np.ndarray:
        seen.append(tuple(ids_T.tolist()))
        return toy_scorer(ids_T)

    perplexity(spy, [0, 1, 2, 0, 1, 2, 0], window=5, stride=2)
    assert seen == [(0, 1, 2, 0, 1), (2, 0, 1, 2, 0)]


def test_max_windows_and_progress() -> None:
    calls: list[tuple[int, int]] = []
    measured = perplexity(toy_scorer, [0, 1] * 10, window=4, max_windows=3, progress=lambda *a: calls.append(a))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert "in 3 of 5 windows" in measured.how


def test_spread_is_the_standard_error_over_windows() -> None:
    measured = perplexity(toy_scorer, [0, 0, 0, 1, 2, 1], window=2)
    means = -np.log([0.5, 0.25, 0.3])
    error = means.std(ddof=1) / math.sqrt(3)
    assert measured.value.low == pytest.approx(math.exp(means.mean() - error))
    assert measured.value.high == pytest.approx(math.exp(means.mean() + error))
    assert measured.examples == pytest.approx(means)
    assert perplexity(toy_scorer, [0, 0, 0, 1, 2, 1], window=4, stride=2).examples == ()  # they count differently
    one = perplexity(toy_scorer, [0, 1], window=2).value
    assert one.low == one.median == one.high == pytest.approx(4.0)


def test_scorers_agree_with_the_distribution() -> None:
    ids = np.array([0, 2, 1, 1, 0, 2])
    np.testing.assert_allclose(module_scorer(ToyModel())(ids), toy_scorer(ids), rtol=1e-5)
    logits = (np.log(P)[ids] + 700.0).astype(np.float32)  # a plain exp would overflow
    np.testing.assert_allclose(negative_log_likelihood(logits, ids), toy_scorer(ids), rtol=1e-4)


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    measured = perplexity(
        lambda ids: negative_log_likelihood(np.zeros((len(ids), 97), np.float32), ids), list(range(90)), window=30
    )
    assert measured.value.median == pytest.approx(97.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window: 1"),
        ({"window": 9}, "8 tokens; allowed: at least one window of 9"),
        ({"window": 4, "stride": 5}, "stride: 5"),
        ({"window": 4, "stride": 0}, "stride: 0"),
        ({"window": 4, "max_windows": 0}, "max-windows: 0"),
    ],
)
def test_impossible_requests(options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        perplexity(toy_scorer, [0] * 8, **options)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_that_gives_nan_is_an_error_not_a_number(bad: float) -> None:
    with pytest.raises(NonFiniteError, match="window 0"):
        perplexity(lambda ids: np.full(len(ids) - 1, bad), [0] * 8, window=4)
