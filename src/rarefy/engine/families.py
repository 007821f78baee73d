"""Which model architectures the engine runs, and how each is loaded: one explicit dictionary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias, final

from rarefy.artifact import Artifact
from rarefy.core.errors import UnsupportedModelError
from rarefy.engine.bert import load_bert
from rarefy.engine.cache import KVCache
from rarefy.engine.config import Config
from rarefy.engine.distilbert import load_distilbert
from rarefy.engine.gemma3 import load_gemma3
from rarefy.engine.llama import load_llama, load_mistral
from rarefy.engine.qwen2 import load_qwen2
from rarefy.engine.weights import Weights
from rarefy.kernels.ops import Float32Array, Int64Array, Ops


class Decoder(Protocol):
    """A model that predicts the next token."""

    vocab_size: int
    context_length: int

    def new_cache(self, capacity: int) -> KVCache:
        """Return an empty cache with room for `capacity` tokens."""
        ...

    def forward(self, tokens_T: Int64Array, cache: KVCache) -> Float32Array:
        """Append tokens to the cache and return their hidden states (T, E) after the last norm."""
        ...

    def head(self, hidden_TE: Float32Array) -> Float32Array:
        """Return the logits (T, V) of hidden states that `forward` gave."""
        ...


class Encoder(Protocol):
    """A model that turns texts into vectors."""

    vocab_size: int
    width: int
    max_length: int
    num_token_types: int

    def forward(
        self, tokens_T: Int64Array, positions_T: Int64Array, types_T: Int64Array, offsets: Int64Array
    ) -> Float32Array:
        """Return the hidden states (T, E) of sequences that lie one after the other."""
        ...


@final
@dataclass(frozen=True)
class DecoderFamily:
    """How a decoder is loaded."""

    load: Callable[[Config, Weights], Decoder]


@final
@dataclass(frozen=True)
class EncoderFamily:
    """How an encoder is loaded; `marker` names a layer that every checkpoint of the family has."""

    load: Callable[[Config, Weights], Encoder]
    prefix: str
    marker: str


Family: TypeAlias = DecoderFamily | EncoderFamily

_BERT: Final = EncoderFamily(load_bert, "bert.", "embeddings.word_embeddings")
_DISTILBERT: Final = EncoderFamily(load_distilbert, "distilbert.", "embeddings.word_embeddings")
_TASKS: Final = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")

FAMILIES: Final[dict[str, Family]] = {
    "LlamaForCausalLM": DecoderFamily(load_llama),
    "MistralForCausalLM": DecoderFamily(load_mistral),
    "Qwen2ForCausalLM": DecoderFamily(load_qwen2),
    "Gemma3ForCausalLM": DecoderFamily(load_gemma3),
    "BertModel": _BERT,
    "BertForPreTraining": _BERT,
    "BertForNextSentencePrediction": _BERT,
    **{f"BertFor{task}": _BERT for task in _TASKS},
    "DistilBertModel": _DISTILBERT,
    **{f"DistilBertFor{task}": _DISTILBERT for task in _TASKS},
}
"""`architectures[0]` of config.json -> family."""


@final
@dataclass(frozen=True)
class LoadedModel:
    """A model in memory: either a decoder or an encoder, and the bytes of its weights."""

    decoder: Decoder | None
    encoder: Encoder | None
    nbytes: int


def load_model(artifact: Artifact, ops: Ops) -> LoadedModel:
    """Load the model of an opened directory.

    Raises:
        UnsupportedModelError: an architecture, or a value in its configuration, that the engine does not implement.
        DamagedFileError: a weight is missing or wrong.
    """
    where = str(artifact.path / "config.json")
    architectures = artifact.config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str) or name not in FAMILIES:
        raise UnsupportedModelError(
            f"{where}: architectures",
            "missing" if name is None else repr(name),
            allowed=", ".join(FAMILIES),
            hint="the torch-free engine runs these only; transformers loads the model after `import rarefy`",
        )
    family, config = FAMILIES[name], Config(artifact.config, where)
    weights = Weights(artifact, ops)
    if isinstance(family, DecoderFamily):
        decoder = family.load(config, weights)
        return LoadedModel(decoder, None, weights.nbytes)
    if not weights.has(family.marker):
        weights = Weights(artifact, ops, family.prefix)
    encoder = family.load(config, weights)
    return LoadedModel(None, encoder, weights.nbytes)
