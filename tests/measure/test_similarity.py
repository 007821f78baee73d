from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats

from rarefy.core.errors import NonFiniteError, UsageError
from rarefy.measure.data import Pair
from rarefy.measure.similarity import similarity, spearman


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [3, 1000])  # few levels: many ties
def test_spearman_is_scipys(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, levels, 200).astype(float), rng.standard_normal(200)
    b = np.round(b + a / levels, 1)
    assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)


def test_extremes() -> None:
    a = np.array([1.0, 2.0, 5.0, 9.0])
    assert spearman(a, a**3) == pytest.approx(1.0)
    assert spearman(a, -a) == pytest.approx(-1.0)
    assert np.isnan(spearman(a, np.ones(4)))


def angle_embedding(texts: Sequence[str]) -> np.ndarray:
    """Texts are angles in degrees; lengths differ, since a cosine must not see them."""
    angles = np.radians([float(text) for text in texts])
    return (np.stack([np.cos(angles), np.sin(angles)], 1) * (1 + np.arange(len(texts)))[:, None]).astype(np.float32)


def test_similarity_ranks_by_cosine() -> None:
    pairs = [Pair("0", str(angle), 90 - angle) for angle in (5, 20, 40, 60, 85)]
    measured = similarity(angle_embedding, pairs)
    assert measured.value.median == pytest.approx(1.0)
    assert measured.value.low <= measured.value.median <= measured.value.high + 1e-9
    assert "over 5 pairs" in measured.how
    turned = [Pair(pair.first, pair.second, -pair.score) for pair in pairs]
    assert similarity(angle_embedding, turned).value.median == pytest.approx(-1.0)


def test_a_text_in_several_pairs_is_embedded_once() -> None:
    asked: list[str] = []

    def spy(texts: Sequence[str]) -> np.ndarray:
        asked.extend(texts)
        return angle_embedding(texts)

    similarity(spy, [Pair("0", "10", 3), Pair("10", "30", 2), Pair("0", "80", 1), Pair("0", "0", 5)])
    assert sorted(asked) == ["0", "10", "30", "80"]


def test_what_cannot_be_measured() -> None:
    with pytest.raises(UsageError, match="3 pair"):
        similarity(angle_embedding, [Pair("0", "1", float(i)) for i in range(3)])
    with pytest.raises(UsageError, match="all scores are equal"):
        similarity(angle_embedding, [Pair("0", str(i), 1.0) for i in range(5)])
    for bad in (np.nan, 0.0):
        with pytest.raises(NonFiniteError):
            similarity(lambda t, bad=bad: np.full((len(t), 2), bad), [Pair("0", str(i), i) for i in range(5)])
