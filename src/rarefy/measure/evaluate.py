"""`rarefy evaluate`: one quality of one model on one data file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from rarefy.core.errors import UnsupportedModelError, UsageError
from rarefy.engine import Engine
from rarefy.engine.embedding import Pooling
from rarefy.measure.accuracy import text_accuracy
from rarefy.measure.data import read_labelled, read_pairs, read_text
from rarefy.measure.opening import Opened, is_artifact, is_causal_language_model, longest_text, open_with_transformers
from rarefy.measure.perplexity import Scorer, engine_scorer, module_scorer, perplexity
from rarefy.measure.similarity import Embed, module_embed, similarity

METRICS = ("perplexity", "sts", "accuracy")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Progress = Callable[[int, int], None]
Tokenize = Callable[[str], Sequence[int]]


def evaluate(
    model: str | Path,
    metric: str,
    data: str | Path,
    *,
    window: int = 512,
    stride: int | None = None,
    max_windows: int | None = None,
    pooling: str = "mean",
    batch_size: int = 32,
    runtime: str = "auto",
    dtype: str = "float32",
    num_threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a model.

    Args:
        model: artifact, Hugging Face directory or hub id, or GGUF file.
        metric: "perplexity", "sts" or "accuracy".
        data: text for perplexity, sentence pairs for sts, labelled texts for accuracy; see `rarefy.measure.data`.
        window: tokens per window of perplexity.
        stride: tokens between the starts of windows; None for no overlap.
        max_windows: only the first so many windows.
        pooling: "mean" or "cls": how sts makes one vector of a text (the transformers runtime knows "mean").
        batch_size: texts per forward pass.
        runtime: "engine", "transformers", or "auto": the engine for artifacts of families that it reads.
        dtype: what the transformers runtime computes in, "float32" or "bfloat16".
        num_threads: threads to compute with; None for the runtime's own choice.
        progress: called with (done, in all).

    Returns:
        Plain data: metric, value, low, high, num_runs, unit, higher_is_better, how, model.

    Raises:
        UsageError: an unknown metric or option, or data that does not fit.
        RarefyError: the model cannot be loaded.
    """
    for name, value, allowed in (
        ("metric", metric, METRICS),
        ("runtime", runtime, ("auto", "engine", "transformers")),
        ("dtype", dtype, tuple(DTYPES)),
        ("pooling", pooling, ("mean", "cls")),
    ):
        if value not in allowed:
            raise UsageError(name, repr(value), allowed=", ".join(allowed))
    if batch_size < 1:
        raise UsageError("batch-size", str(batch_size), allowed="at least 1")
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    source = _Source(model, runtime, dtype, num_threads)
    if metric == "perplexity":
        text = read_text(data)
        scorer, tokenize, note = source.language_model()
        measured = perplexity(
            scorer, tokenize(text), window=window, stride=stride, max_windows=max_windows, note=note, progress=progress
        )
    elif metric == "sts":
        pairs = read_pairs(data)
        embed, note = source.encoder(pooling, batch_size)
        measured = similarity(embed, pairs, note=note)
    else:
        examples = read_labelled(data)
        classifier, tokenizer, note = source.classifier()
        measured = text_accuracy(
            classifier,
            tokenizer,
            examples,
            batch_size=batch_size,
            max_length=longest_text(classifier, tokenizer),
            note=note,
            progress=progress,
        )
    return {**measured.to_json(), "model": str(model)}


@final
@dataclass(frozen=True)
class _Source:
    """A model by its name, and the runtime that is to run it."""

    model: str | Path
    runtime: str
    dtype: str
    num_threads: int | None

    def language_model(self) -> tuple[Scorer, Tokenize, str]:
        """What scores windows, what tokenizes text, and words for the description."""
        engine = self._engine("decoder")
        if engine is not None:
            return (
                engine_scorer(engine),
                lambda text: engine.tokenizer.encode(text).ids,
                f"{self.model}, engine, float32",
            )
        opened = open_with_transformers(self.model, dtype=DTYPES[self.dtype])
        if not is_causal_language_model(opened.model):
            raise UnsupportedModelError(
                str(self.model), f"a {type(opened.model).__name__}", allowed="a causal language model for perplexity"
            )
        tokenizer = self._tokenizer(opened)
        # The backend's tokenizer does not warn of long texts; both give the same tokens.
        return module_scorer(opened.model), lambda text: tokenizer(text, verbose=False)["input_ids"], self._note()

    def encoder(self, pooling: str, batch_size: int) -> tuple[Embed, str]:
        """What embeds texts, and words for the description."""
        engine = self._engine("encoder")
        if engine is not None:
            chosen: Pooling = "cls" if pooling == "cls" else "mean"
            embed: Embed = partial(engine.embed, pooling=chosen, batch_size=batch_size)
            return embed, f"{self.model}, engine, float32, {pooling} pooling, {_cut(engine.max_text_length)}"
        if pooling != "mean":
            raise UsageError("pooling", repr(pooling), allowed="mean with the transformers runtime")
        opened = open_with_transformers(self.model, dtype=DTYPES[self.dtype])
        base = getattr(opened.model, str(getattr(opened.model, "base_model_prefix", "")), opened.model)
        tokenizer = self._tokenizer(opened)
        length = longest_text(base, tokenizer)
        embed = module_embed(base, tokenizer, batch_size=batch_size, max_length=length)
        return embed, f"{self._note()}, mean pooling, {_cut(length)}"

    def classifier(self) -> tuple[nn.Module, Any, str]:
        """A classification model, its tokenizer, and words for the description."""
        if self.runtime == "engine":
            raise UsageError("runtime", "'engine'", allowed="transformers", hint="the engine runs no classifiers")
        opened = open_with_transformers(self.model, dtype=DTYPES[self.dtype])
        tokenizer = self._tokenizer(opened)
        return opened.model, tokenizer, f"{self._note()}, {_cut(longest_text(opened.model, tokenizer))}"

    def _engine(self, kind: str) -> Engine | None:
        if self.runtime == "transformers" or (self.runtime == "auto" and not is_artifact(self.model)):
            return None
        try:
            engine = Engine(self.model, num_threads=self.num_threads)
        except UnsupportedModelError:
            if self.runtime == "auto":
                return None
            raise
        if engine.kind != kind:
            raise UnsupportedModelError(str(self.model), f"an {engine.kind}", allowed=f"a {kind} for this metric")
        return engine

    def _tokenizer(self, opened: Opened) -> Any:
        if opened.tokenizer is None:
            raise UnsupportedModelError(
                str(self.model), "it has no tokenizer", hint="copy the tokenizer's files beside it"
            )
        return opened.tokenizer

    def _note(self) -> str:
        return f"{self.model}, transformers, {self.dtype}"


def _cut(length: int) -> str:
    return f"texts cut to {length} tokens"
