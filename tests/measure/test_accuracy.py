from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rarefy.core.errors import NonFiniteError, UnsupportedModelError, UsageError
from rarefy.measure.accuracy import array_accuracy, text_accuracy
from rarefy.measure.data import Labelled


class LengthForSequenceClassification(nn.Module):
    """Says 1 for texts of more than three characters."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(id2label={0: "short", 1: "long"})

    def forward(self, lengths: torch.Tensor) -> Any:
        return SimpleNamespace(logits=torch.stack([torch.full_like(lengths, 3.5), lengths], 1))


def tokenizer(texts: list[str], **options: Any) -> dict[str, torch.Tensor]:
    assert options["truncation"]
    return {"lengths": torch.tensor([float(len(text)) for text in texts])}


def test_accuracy_of_texts_by_hand() -> None:
    examples = [Labelled("ab", "0"), Labelled("abcdef", "long"), Labelled("a", "1"), Labelled("abcd", " 1 ")]
    measured = text_accuracy(LengthForSequenceClassification(), tokenizer, examples, batch_size=3)
    assert measured.value.median == 0.75
    error = (0.75 * 0.25 / 4) ** 0.5
    assert (measured.value.low, measured.value.high) == pytest.approx((0.75 - error, 0.75 + error))
    assert "4 examples" in measured.how


def test_bad_requests() -> None:
    model = LengthForSequenceClassification()
    with pytest.raises(UsageError, match="label '2'; allowed: 0 or 'short', 1 or 'long'"):
        text_accuracy(model, tokenizer, [Labelled("a", "2")])
    with pytest.raises(UsageError, match="no examples"):
        text_accuracy(model, tokenizer, [])
    with pytest.raises(UnsupportedModelError, match="Linear: it has no classification head"):
        text_accuracy(nn.Linear(2, 2), tokenizer, [Labelled("a", "1")])


def test_accuracy_of_arrays() -> None:
    inputs = np.eye(3, dtype=np.float32)[[0, 1, 2, 2, 1]]
    measured = array_accuracy(nn.Identity(), inputs, np.array([0, 1, 2, 0, 1]), batch_size=2)
    assert measured.value.median == 0.8
    with pytest.raises(UsageError, match="5 inputs and 4 labels"):
        array_accuracy(nn.Identity(), inputs, np.zeros(4))
    with pytest.raises(UsageError, match="0 inputs"):
        array_accuracy(nn.Identity(), inputs[:0], np.zeros(0))
    with pytest.raises(UsageError, match=r"shape \(3,\)"):
        array_accuracy(lambda x: x[:, 0], inputs[:3], np.zeros(3))
    with pytest.raises(NonFiniteError):
        array_accuracy(lambda x: x * torch.nan, inputs, np.zeros(5))
