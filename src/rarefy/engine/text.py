"""Text in and out of a model: the tokenizer's files, chat templates, and streams that never cut a character."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, final

from tokenizers import Tokenizer

from rarefy.core.errors import DamagedFileError, PathError, UsageError

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_TEMPLATE_FILE: Final = "chat_template.jinja"


def read_json_object(path: Path) -> dict[str, Any]:
    """Read an optional JSON file of the model; {} where it does not exist.

    Raises:
        DamagedFileError: it is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedFileError(str(path), str(error), allowed="a JSON object") from error
    if not isinstance(value, dict):
        raise DamagedFileError(str(path), type(value).__name__, allowed="a JSON object")
    return value


def read_tokenizer(directory: Path) -> Tokenizer:
    """Read tokenizer.json; padding and truncation are switched off, since the engine does both itself.

    Raises:
        PathError: there is none.
        DamagedFileError: it cannot be read.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise PathError(
            str(path),
            "no such file",
            hint="the engine reads no other tokenizer; save_pretrained of a fast tokenizer writes it",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise DamagedFileError(str(path), str(error), allowed="a file of the tokenizers library") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@final
class ChatTemplate:
    """The template that turns chat messages into a prompt.

    Args:
        directory: of the model; `chat_template.jinja` wins over `chat_template` in tokenizer_config.json.
    """

    def __init__(self, directory: Path) -> None:
        self._where = directory / _TEMPLATE_FILE
        self._config = read_json_object(directory / "tokenizer_config.json")
        named = self._config.get("chat_template")
        if self._where.is_file():
            self._source: object = self._where.read_text(encoding="utf-8")
        else:
            self._where = directory / "tokenizer_config.json"
            # several templates: a list of {name, template}, "default" being the one for plain chats
            self._source = (
                next((t.get("template") for t in named if isinstance(t, dict) and t.get("name") == "default"), None)
                if isinstance(named, list)
                else named
            )

    @property
    def exists(self) -> bool:
        """Whether the model has a chat template."""
        return self._source is not None

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the prompt that asks for the assistant's next message.

        Args:
            messages: each with "role" and "content".

        Raises:
            UsageError: a message has no role or content, or the template refuses the messages.
            PathError: the model has no chat template, or jinja2 is not installed.
        """
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise UsageError(f"message {index}", repr(message), allowed="a mapping with role and content")
        if not isinstance(self._source, str):
            raise PathError(str(self._where), "no chat template", hint="pass the prompt as text instead of messages")
        try:
            from jinja2 import TemplateError  # noqa: PLC0415 (optional: only chat templates need it)
            from jinja2.ext import loopcontrols  # noqa: PLC0415
            from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415
        except ImportError as error:
            raise PathError(
                "chat template", "jinja2 is not installed", hint="pip install jinja2, or pass the prompt as text"
            ) from error
        # A template is code from a downloaded file: it runs in jinja2's sandbox.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        try:
            return environment.from_string(self._source).render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=True,
                strftime_now=lambda form: datetime.now().strftime(form),
                raise_exception=raise_exception,
                **self._special_tokens(),
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise UsageError(f"chat template {self._where}", str(error), hint="the messages do not fit it") from error

    def _special_tokens(self) -> dict[str, str]:
        tokens = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = self._config.get(name)
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                tokens[name] = content
        return tokens


def decoded_pieces(tokenizer: Tokenizer, tokens: Iterable[int], before: Sequence[int]) -> Iterator[str]:
    """Decode tokens one by one into pieces of text that join to the decoding of all of them.

    A character whose bytes are spread over several tokens appears when its last token has come; special tokens are left
    out. Text that still ends within a character when the tokens end has U+FFFD there, as the tokenizer decodes it.

    Args:
        tokenizer: of the model.
        tokens: the new tokens.
        before: the prompt. Its last token decides whether the first new token keeps a space in front.
    """
    pending = list(before[-1:])
    shown = tokenizer.decode(pending, skip_special_tokens=True)  # text of `pending` that is not to be given out
    if shown.endswith(_REPLACEMENT):
        pending, shown = [], ""
    for token in tokens:
        pending.append(token)
        text = tokenizer.decode(pending, skip_special_tokens=True)
        if text.endswith(_REPLACEMENT) or not text.startswith(shown):
            continue  # within a character
        if len(text) > len(shown):
            yield text[len(shown) :]
            # Keep the last token as context: how a token decodes may depend on whether it is the first one.
            pending = pending[-1:]
            shown = tokenizer.decode(pending, skip_special_tokens=True)
    text = tokenizer.decode(pending, skip_special_tokens=True)
    if len(text) > len(shown):
        yield text[len(shown) :]


def until_stop(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """Give the text out until the first of the stop strings, which is left out.

    Text that may be the beginning of a stop string is held back until it is known.
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [at for at in (held.find(word) for word in stop) if at >= 0]
        if found:
            if min(found):
                yield held[: min(found)]
            return
        keep = max((n for word in stop for n in range(1, len(word)) if held.endswith(word[:n])), default=0)
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if held:
        yield held
