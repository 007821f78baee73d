"""Every format has a sample, and what a sample repeats is what it says."""

import numpy as np
import pytest

from rarefy.layouts import FORMATS
from rarefy.measure.kernel_samples import PERIOD, samples_of


@pytest.mark.parametrize("layout_format", sorted(FORMATS))
@pytest.mark.parametrize("shape", [(1, 1), (3, 65), (PERIOD, 64), (2 * PERIOD + 7, 130)])
def test_rows_repeat_those_of_the_small_weight(layout_format: str, shape: tuple[int, int]) -> None:
    samples = samples_of(layout_format)
    assert samples, "a format that `rarefy bench --kernels` cannot time: describe it in kernel_samples.py"
    assert len({sample.name for sample in samples}) == len(samples)
    for sample in samples:
        layout, small = sample.make(shape)
        assert (layout.format, layout.shape) == (layout_format, shape)
        assert sample.period == (496 if layout_format.startswith("block") else PERIOD)
        assert small.shape == (min(sample.period, shape[0]), shape[1])
        np.testing.assert_array_equal(layout.to_dense(), small.to_dense()[np.arange(shape[0]) % sample.period])


@pytest.mark.parametrize("layout_format", sorted(FORMATS))
def test_values_and_zeros_are_random(layout_format: str) -> None:
    for sample in samples_of(layout_format):
        dense = sample.make((PERIOD, 2048))[1].to_dense()
        kept = sample.parameters.get("keep", 1) / sample.parameters.get("group", 1)
        density = sample.density if layout_format.startswith(("bitmask", "block")) else kept
        # What is stored is 0 by chance in one of so many cases; where the word is not here, in 1 of 16 at most.
        words = {"ternary": 3, "int2": 4, "int3": 8}
        chance = next((1 / cases for word, cases in words.items() if word in layout_format), 1 / 32)
        expected = density * (1 - chance)
        assert expected * 0.95 < np.count_nonzero(dense) / dense.size < expected * 1.05
        assert len(np.unique(dense, axis=0)) == sample.period
        assert np.array_equal(dense, sample.make((PERIOD, 2048))[1].to_dense()), "the same seed, the same weight"
        assert not np.array_equal(dense, sample.make((PERIOD, 2048), seed=1)[1].to_dense())


def test_an_unknown_format_has_no_sample() -> None:
    assert samples_of("origami-int4-v1") == ()
    assert samples_of("dense-complex-v1") == ()
