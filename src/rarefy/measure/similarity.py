"""Semantic textual similarity: do the embeddings' cosines rank sentence pairs as people do?

Legend of shape suffixes: N texts, D embedding width, T tokens.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from rarefy.core.errors import NonFiniteError, UsageError
from rarefy.core.results import Spread
from rarefy.measure.data import Pair
from rarefy.measure.measurement import Measurement

Embed = Callable[[Sequence[str]], npt.NDArray[np.float32]]


def similarity(embed: Embed, pairs: Sequence[Pair], *, note: str = "") -> Measurement:
    """Measure Spearman's rank correlation between cosine similarities and scores.

    Args:
        embed: texts -> embeddings of shape (N, D).
        pairs: sentence pairs with scores, at least 3.
        note: words for the description: model, pooling, dtype.

    Returns:
        The correlation in [-1, 1]; the spread is one standard error of Fisher's z (variance 1.06 / (n - 3), Fieller
        1957).

    Raises:
        UsageError: fewer than 4 pairs, or all scores equal.
        NonFiniteError: an embedding is NaN, infinite or zero.
    """
    if len(pairs) < 4:
        raise UsageError("data", f"{len(pairs)} pair(s)", allowed="at least 4")
    if len({pair.score for pair in pairs}) == 1:
        raise UsageError("data", "all scores are equal", hint="a rank correlation needs different scores")
    # A sentence that occurs in several pairs is embedded once.
    texts = list(dict.fromkeys(text for pair in pairs for text in (pair.first, pair.second)))
    embedding_ND = np.asarray(embed(texts), dtype=np.float64)
    norm_N = np.linalg.norm(embedding_ND, axis=1)
    if not np.isfinite(norm_N).all() or not (norm_N > 0).all():
        raise NonFiniteError("embeddings", "one is NaN, infinite or zero", hint="the model's weights may be damaged")
    unit_ND = embedding_ND / norm_N[:, None]
    row = {text: index for index, text in enumerate(texts)}
    cosine = np.array([unit_ND[row[pair.first]] @ unit_ND[row[pair.second]] for pair in pairs])
    rho = spearman(cosine, np.array([pair.score for pair in pairs]))
    z, error = math.atanh(max(min(rho, 1 - 1e-12), -1 + 1e-12)), math.sqrt(1.06 / (len(pairs) - 3))
    value = Spread(median=rho, low=math.tanh(z - error), high=math.tanh(z + error), num_runs=len(pairs))
    how = f"Spearman correlation of cosine similarity with scores over {len(pairs)} pairs; spread: one standard error"
    return Measurement("sts_spearman", "", True, value, f"{note}; {how}" if note else how)


def spearman(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Return Spearman's rank correlation; ties get the mean of their ranks. NaN if one side is constant."""
    ranks_a, ranks_b = _ranks(a), _ranks(b)
    ranks_a -= ranks_a.mean()
    ranks_b -= ranks_b.mean()
    scale = math.sqrt(float(ranks_a @ ranks_a) * float(ranks_b @ ranks_b))
    return float(ranks_a @ ranks_b) / scale if scale else math.nan


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank: npt.NDArray[np.float64] = last - (counts - 1) / 2
    return mean_rank[inverse]


def module_embed(model: nn.Module, tokenizer: Any, *, batch_size: int = 32, max_length: int = 512) -> Embed:
    """Embed with a transformers encoder: the mean of the last hidden states over the tokens that are not padding.

    Args:
        model: a base model without head (`AutoModel`).
        tokenizer: its transformers tokenizer.
        batch_size: texts per forward pass.
        max_length: longer texts are cut to so many tokens.
    """

    def embed(texts: Sequence[str]) -> npt.NDArray[np.float32]:
        parts = []
        # Texts of similar length share a batch, so that little is computed for padding.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for start in range(0, len(order), batch_size):
            batch = [texts[index] for index in order[start : start + batch_size]]
            inputs = tokenizer(batch, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
            with torch.inference_mode():
                hidden = model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None].float()
            parts.append(((hidden * mask).sum(1) / mask.sum(1)).numpy())
        result = np.concatenate(parts)
        return result[np.argsort(order)]

    return embed
