"""The torch-free runtime: load a model directory, generate text or encode it. It needs numpy, safetensors, tokenizers.

T tokens, V vocabulary, N texts, B batch, L tokens of the longest text, E embedding width.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, cast, final

import numpy as np
from numpy.typing import ArrayLike
from tokenizers import Encoding, Tokenizer

from rarefy.artifact import read_artifact
from rarefy.core.errors import UnsupportedModelError, UsageError
from rarefy.engine.cache import KVCache
from rarefy.engine.embedding import (
    POOLINGS,
    Pooling,
    check_token_types,
    normalized,
    padded_hidden_states,
    pooled_batches,
)
from rarefy.engine.families import Decoder, Encoder, load_model
from rarefy.engine.sampling import Sampling
from rarefy.engine.text import ChatTemplate, decoded_pieces, read_json_object, read_tokenizer, until_stop
from rarefy.kernels import set_num_threads
from rarefy.kernels.ops import Float32Array, Int64Array, load_ops

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or chat messages with "role" and "content"."""

_PROMPT_CHUNK: Final = 512
"""Tokens of a prompt that go through the model at once: enough for full speed, few enough for little memory."""


class TruncationWarning(UserWarning):
    """Texts were longer than the encoder's maximum and were cut."""


@final
class Engine:
    """A model that runs without torch, in float32.

    Reads what rarefy wrote, or any Hugging Face directory with safetensors of a supported family: the decoders Llama
    (SmolLM2), Mistral, Qwen2 and Gemma 3, and the encoders BERT (MiniLM) and DistilBERT.

    Args:
        path: the model directory.
        num_threads: threads of the kernels, in the whole process; default: RAREFY_NUM_THREADS or the CPU's cores.

    Raises:
        PathError: the path is not a model directory.
        UnsupportedModelError: the engine does not implement the architecture or a value of its configuration.
        DamagedFileError: a file is truncated, corrupt or contradicts the configuration.
    """

    def __init__(self, path: str | os.PathLike[str], *, num_threads: int | None = None) -> None:
        if num_threads is not None:
            set_num_threads(num_threads)
        artifact = read_artifact(path)
        self.path: Final = Path(path)
        self.config: Final[dict[str, Any]] = artifact.config
        self._model: Final = load_model(artifact, load_ops())
        self._scoring_cache: KVCache | None = None
        self._session_cache: KVCache | None = None

    def __repr__(self) -> str:
        return f"Engine({str(self.path)!r}, {self.config['architectures'][0]}, {self.nbytes} bytes)"

    @property
    def kind(self) -> Literal["decoder", "encoder"]:
        """Whether the model generates text or encodes it."""
        return "encoder" if self._model.decoder is None else "decoder"

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory; a look-up table that is also the output layer counts once."""
        return self._model.nbytes

    @property
    def context_length(self) -> int:
        """Tokens that the model can see at once."""
        if self._model.decoder is not None:
            return self._model.decoder.context_length
        return self._encoder().max_length

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, without padding and truncation.

        Raises:
            PathError: the directory has no tokenizer.json.
            DamagedFileError: it cannot be read.
        """
        return read_tokenizer(self.path)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template, which may not exist."""
        return ChatTemplate(self.path)

    @cached_property
    def eos_tokens(self) -> frozenset[int]:
        """Tokens that end a text: those of generation_config.json, else of config.json, and the tokenizer's own."""
        found = read_json_object(self.path / "generation_config.json").get("eos_token_id")
        if found is None:
            found = self.config.get("eos_token_id")
        tokens = list(found) if isinstance(found, list) else [found]
        name = read_json_object(self.path / "tokenizer_config.json").get("eos_token")
        content = name.get("content") if isinstance(name, dict) else name
        if isinstance(content, str) and (self.path / "tokenizer.json").is_file():
            tokens.append(self.tokenizer.token_to_id(content))
        return frozenset(token for token in tokens if isinstance(token, int))

    # --- decoders -------------------------------------------------------------------------------------------------

    def logits(self, token_ids: Sequence[int] | Int64Array) -> Float32Array:
        """Score every next token after every token.

        Args:
            token_ids: T token ids, taken as they are.

        Returns:
            Float32 (T, V).

        Raises:
            UsageError: no tokens, invalid ids, or more than the context holds.
        """
        decoder = self._decoder()
        tokens = _checked_tokens(token_ids, decoder.vocab_size, decoder.context_length)
        self._scoring_cache = _emptied(self._scoring_cache, decoder, len(tokens))
        hidden = [decoder.forward(chunk, self._scoring_cache) for chunk in _chunks(tokens)]
        return decoder.head(np.concatenate(hidden))

    def prefill(self, token_ids: Sequence[int] | Int64Array) -> Float32Array:
        """Start a session with a prompt; return the logits (V,) after its last token. `decode_step` goes on."""
        decoder = self._decoder()
        tokens = _checked_tokens(token_ids, decoder.vocab_size, decoder.context_length)
        self._session_cache = _emptied(self._session_cache, decoder, len(tokens))
        return _prefilled(decoder, tokens, self._session_cache)

    def decode_step(self, token_id: int) -> Float32Array:
        """Append one token to the session of `prefill`; return the logits (V,) after it."""
        decoder = self._decoder()
        if self._session_cache is None:
            raise UsageError("decode_step", "no session", hint="call prefill first")
        token = _checked_tokens([token_id], decoder.vocab_size, decoder.context_length)
        return decoder.head(decoder.forward(token, self._session_cache)).reshape(-1)

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> str:
        """Continue a prompt and return the new text; arguments and errors as in `stream`."""
        return "".join(
            self.stream(
                prompt,
                max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
                stop=stop,
            )
        )

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """Continue a prompt, piece by piece; a piece never ends within a character.

        Args:
            prompt: text (the tokenizer adds its special tokens), token ids (taken as they are), or chat messages (the
                model's chat template makes the prompt).
            max_new_tokens: the text ends after so many tokens, or before at one of `eos_tokens` or a stop string.
            temperature: divides the logits; 0 takes the most likely token each time.
            top_k: sample among the k most likely tokens.
            top_p: sample among the fewest tokens whose probabilities reach p.
            repetition_penalty: above 1 makes tokens less likely that were seen before.
            seed: of the samples; None gives another text every time.
            stop: strings that end the text; they are left out.

        Returns:
            Pieces of the new text.

        Raises:
            UsageError: an argument out of its range, an empty prompt, or prompt and text exceed the context.
            PathError: there is no tokenizer, or no chat template for messages.
        """
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
        words = [stop] if isinstance(stop, str) else list(stop)
        if "" in words:
            raise UsageError("stop", "an empty string", allowed="non-empty strings")
        tokens = self.encode_prompt(prompt)
        new_tokens = self.stream_tokens(tokens, max_new_tokens, sampling, seed=seed)
        return until_stop(decoded_pieces(self.tokenizer, new_tokens, tokens.tolist()), words)

    def stream_tokens(
        self,
        token_ids: Sequence[int] | Int64Array,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        seed: int | None = None,
    ) -> Iterator[int]:
        """Continue token ids with token ids; needs no tokenizer.json. Arguments and errors as in `stream`."""
        decoder = self._decoder()
        tokens = _checked_tokens(token_ids, decoder.vocab_size, decoder.context_length)
        if max_new_tokens < 0:
            raise UsageError("max_new_tokens", str(max_new_tokens), allowed="an integer of at least 0")
        if len(tokens) + max_new_tokens > decoder.context_length:
            raise UsageError(
                "context",
                f"{len(tokens)} tokens of prompt and {max_new_tokens} new ones",
                allowed=f"{decoder.context_length} in all, the model's max_position_embeddings",
                hint="shorten the prompt or lower max_new_tokens",
            )
        random = np.random.default_rng(seed)
        return _new_tokens(decoder, tokens, max_new_tokens, sampling or Sampling(), self.eos_tokens, random)

    def encode_prompt(self, prompt: Prompt) -> Int64Array:
        """Return the token ids of a prompt, as `stream` uses them.

        Raises:
            UsageError: the prompt is empty or of another kind.
        """
        if isinstance(prompt, str):
            tokens: Any = self.tokenizer.encode(prompt).ids
        elif len(prompt) and isinstance(prompt[0], Mapping):
            text = self.chat_template.render(cast("Sequence[Mapping[str, Any]]", prompt))
            # the template has written the special tokens already
            tokens = self.tokenizer.encode(text, add_special_tokens=False).ids
        else:
            tokens = prompt
        decoder = self._decoder()
        return _checked_tokens(tokens, decoder.vocab_size, decoder.context_length)

    # --- encoders -------------------------------------------------------------------------------------------------

    @cached_property
    def max_text_length(self) -> int:
        """Tokens of a text that `embed` reads: max_seq_length of sentence_bert_config.json, at most the positions."""
        found = read_json_object(self.path / "sentence_bert_config.json").get("max_seq_length")
        limit = self._encoder().max_length
        return min(found, limit) if isinstance(found, int) and found > 0 else limit

    def embed(
        self, texts: str | Sequence[str], *, pooling: Pooling = "mean", normalize: bool = True, batch_size: int = 32
    ) -> Float32Array:
        """Turn texts into vectors; longer texts are cut at `max_text_length` tokens, with a `TruncationWarning`.

        Args:
            texts: N texts.
            pooling: "mean" over all tokens, as sentence-transformers do, or "cls": the first token.
            normalize: scale every vector to length 1, so that a dot product is the cosine.
            batch_size: texts that go through the model at once.

        Returns:
            Float32 (N, E), in the order of the texts.

        Raises:
            UsageError: an argument out of its range, or a text without any token.
            PathError: there is no tokenizer.
        """
        encoder = self._encoder()
        texts = [texts] if isinstance(texts, str) else list(texts)
        if pooling not in POOLINGS:
            raise UsageError("pooling", repr(pooling), allowed=", ".join(POOLINGS))
        if batch_size < 1:
            raise UsageError("batch_size", str(batch_size), allowed="an integer of at least 1")
        encodings: list[Encoding] = self._text_tokenizer.encode_batch(texts)
        num_cut = sum(bool(encoding.overflowing) for encoding in encodings)
        if num_cut:
            warnings.warn(
                f"{num_cut} of {len(texts)} texts are longer than {self.max_text_length} tokens and were cut",
                TruncationWarning,
                stacklevel=2,
            )
        ids = [_checked_tokens(encoding.ids, encoder.vocab_size, encoder.max_length) for encoding in encodings]
        types = [np.asarray(encoding.type_ids, dtype=np.int64) for encoding in encodings]
        for text_types in types:
            check_token_types(encoder, text_types)
        vectors_NE = np.empty((len(texts), encoder.width), np.float32)
        for batch, vectors_BE in pooled_batches(encoder, list(zip(ids, types, strict=True)), pooling, batch_size):
            vectors_NE[batch] = vectors_BE
        return normalized(vectors_NE) if normalize else vectors_NE

    def hidden_states(
        self, token_ids_BL: ArrayLike, mask_BL: ArrayLike | None = None, token_types_BL: ArrayLike | None = None
    ) -> Float32Array:
        """Return the last hidden states of a padded batch.

        Args:
            token_ids_BL: token ids.
            mask_BL: 1 for tokens, 0 for padding on any side; None if nothing is padding.
            token_types_BL: 0 for the first text of a pair, 1 for the second; None means 0.

        Returns:
            Float32 (B, L, E); rows of padding are 0.

        Raises:
            UsageError: invalid ids or shapes, or longer than the model's positions.
        """
        encoder = self._encoder()
        tokens_BL = np.asarray(token_ids_BL)
        if tokens_BL.ndim != 2 or not np.issubdtype(tokens_BL.dtype, np.integer):
            raise UsageError("token ids", f"{tokens_BL.dtype} of shape {tokens_BL.shape}", allowed="integers (B, L)")
        _check_range(tokens_BL, encoder.vocab_size)
        return padded_hidden_states(encoder, tokens_BL.astype(np.int64), mask_BL, token_types_BL)

    @cached_property
    def _text_tokenizer(self) -> Tokenizer:
        tokenizer = read_tokenizer(self.path)
        tokenizer.enable_truncation(self.max_text_length)
        return tokenizer

    def _decoder(self) -> Decoder:
        if self._model.decoder is None:
            raise UnsupportedModelError(str(self.path), "an encoder", allowed="a decoder", hint="use embed")
        return self._model.decoder

    def _encoder(self) -> Encoder:
        if self._model.encoder is None:
            raise UnsupportedModelError(str(self.path), "a decoder", allowed="an encoder", hint="use generate")
        return self._model.encoder


def _check_range(tokens: Int64Array, vocab_size: int) -> None:
    wrong = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if len(wrong):
        raise UsageError("token ids", str(wrong[0]), allowed=f"0 to {vocab_size - 1}, the model's vocabulary")


def _checked_tokens(token_ids: Sequence[int] | Int64Array, vocab_size: int, limit: int) -> Int64Array:
    tokens = np.asarray(token_ids)
    if tokens.ndim != 1:
        raise UsageError("token ids", f"shape {tokens.shape}", allowed="a list of integers")
    if not len(tokens):
        raise UsageError("prompt", "no tokens", hint="give some text; this tokenizer adds no token of its own to it")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise UsageError("token ids", f"values of type {tokens.dtype}", allowed="integers")
    if len(tokens) > limit:
        raise UsageError(
            "context", f"{len(tokens)} tokens", allowed=f"at most {limit}, the model's max_position_embeddings"
        )
    _check_range(tokens, vocab_size)
    return tokens.astype(np.int64)


def _chunks(tokens: Int64Array) -> Iterator[Int64Array]:
    begin = 0
    while begin < len(tokens):
        # A single token left over goes with the others: attention to one query sums a long context in another order.
        size = _PROMPT_CHUNK + (len(tokens) - begin == _PROMPT_CHUNK + 1)
        yield tokens[begin : begin + size]
        begin += size


def _emptied(cache: KVCache | None, decoder: Decoder, capacity: int) -> KVCache:
    if cache is None:
        return decoder.new_cache(capacity)
    cache.length = 0
    return cache


def _prefilled(decoder: Decoder, tokens: Int64Array, cache: KVCache) -> Float32Array:
    for chunk in _chunks(tokens):
        hidden_TE = decoder.forward(chunk, cache)
    return decoder.head(hidden_TE[-1:]).reshape(-1)


def _new_tokens(
    decoder: Decoder,
    tokens: Int64Array,
    max_new_tokens: int,
    sampling: Sampling,
    eos_tokens: frozenset[int],
    random: np.random.Generator,
) -> Iterator[int]:
    if max_new_tokens == 0:
        return
    seen = tokens.tolist()
    cache = decoder.new_cache(len(seen) + max_new_tokens)
    logits_V = _prefilled(decoder, tokens, cache)
    for num_new in range(1, max_new_tokens + 1):
        token = sampling.choose(logits_V, seen, random)
        if token in eos_tokens:
            return
        yield token
        if num_new < max_new_tokens:
            seen.append(token)
            logits_V = decoder.head(decoder.forward(np.array([token], dtype=np.int64), cache)).reshape(-1)
