"""Perplexity of a language model on running text, as the compression literature measures it.

The text is tokenized whole and cut into windows. Within a window every token but the first is predicted from those
before it. With stride == window (the default of the literature) windows do not overlap; with a smaller stride a window
starts `stride` tokens after the one before, and only the tokens that no earlier window scored count: each has at least
window - stride tokens of context. A last, partial window is left out.

Legend of shape suffixes: T tokens of a window, V vocabulary entries.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from rarefy.core.errors import NonFiniteError, UsageError
from rarefy.core.results import NATS, Spread
from rarefy.engine import Engine
from rarefy.measure.measurement import Measurement

TokenIds = npt.NDArray[np.int64]
# The negative log-likelihood (nats) of tokens 1..T-1 of a window, each given all tokens before it.
Scorer = Callable[[TokenIds], npt.NDArray[np.float64]]


def perplexity(
    scorer: Scorer,
    token_ids: Sequence[int] | TokenIds,
    *,
    window: int = 512,
    stride: int | None = None,
    max_windows: int | None = None,
    note: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Measure exp(mean negative log-likelihood per token).

    Args:
        scorer: gives the negative log-likelihoods of a window; see `module_scorer` and `engine_scorer`.
        token_ids: the whole text.
        window: tokens per window, at least 2.
        stride: tokens between the starts of windows, at most `window`; None means `window`.
        max_windows: only the first so many windows; None for all.
        note: words for the description: model, dtype, tokenizer.
        progress: called with (windows done, windows in all).

    Returns:
        The perplexity; the spread is one standard error of the mean over windows, taken to the exponent. Without
        overlap the mean of each window comes with it, so that two models can be compared window by window.

    Raises:
        UsageError: the text is shorter than one window; a window or stride is impossible.
        NonFiniteError: a likelihood is NaN or infinite.

    References:
        Frantar and Alistarh, SparseGPT, arXiv:2301.00774 (windows without overlap, whole text tokenized).
    """
    stride = window if stride is None else stride
    if window < 2:
        raise UsageError("window", str(window), allowed="at least 2 tokens")
    if not 1 <= stride <= window:
        raise UsageError("stride", str(stride), allowed=f"1 to {window}, the window")
    if max_windows is not None and max_windows < 1:
        raise UsageError("max-windows", str(max_windows), allowed="at least 1")
    ids = np.asarray(token_ids, dtype=np.int64)
    if ids.size < window:
        raise UsageError(
            "data", f"{ids.size} tokens", allowed=f"at least one window of {window}", hint="use a smaller window"
        )
    starts = range(0, ids.size - window + 1, stride)
    available = len(starts)
    starts = starts[:max_windows]
    sums, counts = [], []
    for done, start in enumerate(starts):
        nll = scorer(ids[start : start + window])
        if nll.shape != (window - 1,):
            raise UsageError("scorer", f"shape {nll.shape}", allowed=f"({window - 1},)")
        if start > 0 and stride < window:
            # Earlier windows scored the tokens up to start + window - stride; the rest are new.
            nll = nll[window - 1 - stride :]
        if not np.isfinite(nll).all():
            raise NonFiniteError(
                f"window {done}", "a likelihood is NaN or infinite", hint="the model's weights may be damaged"
            )
        sums.append(float(nll.sum()))
        counts.append(nll.size)
        if progress is not None:
            progress(done + 1, len(starts))
    mean = math.fsum(sums) / sum(counts)
    low, high = mean, mean
    means = np.array(sums) / np.array(counts)
    if len(sums) > 1:
        error = float(means.std(ddof=1)) / math.sqrt(len(sums))
        low, high = mean - error, mean + error
    overlap = "without overlap" if stride == window else f"with stride {stride}"
    how = (
        f"{sum(counts)} tokens predicted in {len(sums)} of {available} windows of {window} tokens {overlap}; text of "
        f"{ids.size} tokens, tokenized whole; spread: one standard error over windows"
    )
    value = Spread(median=_exp(mean), low=_exp(low), high=_exp(high), num_runs=len(sums))
    examples = tuple(map(float, means)) if len(set(counts)) == 1 else ()
    return Measurement("perplexity", "", False, value, f"{note}; {how}" if note else how, examples, NATS)


def module_scorer(model: nn.Module) -> Scorer:
    """Score with a transformers causal language model; likelihoods are computed in float32 from its logits."""

    def score(ids_T: TokenIds) -> npt.NDArray[np.float64]:
        with torch.inference_mode():
            logits: Any = model(input_ids=torch.from_numpy(ids_T)[None], use_cache=False).logits
            nll = nn.functional.cross_entropy(logits[0, :-1].float(), torch.from_numpy(ids_T)[1:], reduction="none")
        return nll.double().numpy()

    return score


def engine_scorer(engine: Engine) -> Scorer:
    """Score with the torch-free engine."""

    def score(ids_T: TokenIds) -> npt.NDArray[np.float64]:
        return negative_log_likelihood(engine.logits(ids_T.tolist()), ids_T)

    return score


def negative_log_likelihood(logits_TV: npt.NDArray[np.float32], ids_T: TokenIds) -> npt.NDArray[np.float64]:
    """Return -log softmax(logits_t)[ids_{t+1}] for t = 0..T-2, in float64, one row at a time."""
    result = np.empty(len(ids_T) - 1)
    for t in range(len(ids_T) - 1):
        row = logits_TV[t].astype(np.float64)
        peak = row.max()
        result[t] = peak + np.log(np.exp(row - peak).sum()) - row[ids_T[t + 1]]
    return result


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
