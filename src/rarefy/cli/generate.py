"""`rarefy generate`: text from a decoder, streamed as it comes."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Annotated

import typer

from rarefy.cli.console import note, write_json
from rarefy.cli.options import ArtifactArgument, DebugFlag, JsonFlag, ThreadsOption
from rarefy.core.errors import UsageError
from rarefy.engine import Engine
from rarefy.engine.sampling import Sampling
from rarefy.engine.text import decoded_pieces


def generate(
    model: ArtifactArgument,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The text to continue or to answer; - reads it from stdin.")
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to generate at most.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token each time; higher is more varied.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Sample among the K likeliest tokens.", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Sample among the likeliest tokens of total probability P.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put the prompt through the model's chat template; by default exactly if it has one.",
            show_default=False,
        ),
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Generate text; it goes to stdout as it comes, the speed to stderr.

    Examples:

        rarefy generate OUT "Write one sentence about the sea."

        rarefy generate OUT "Once upon a time" --no-chat --temperature 0.8 --top-p 0.95 --seed 7
    """
    del debug
    started = time.perf_counter()
    engine = Engine(model, num_threads=threads)
    if engine.kind != "decoder":
        raise UsageError(model, f"is an {engine.kind}, which does not generate text", hint="use rarefy embed")
    use_chat = engine.chat_template.exists if chat is None else chat
    if use_chat and not engine.chat_template.exists:
        raise UsageError(model, "has no chat template", hint="use --no-chat")
    text = sys.stdin.read() if prompt == "-" else prompt
    request = [{"role": "user", "content": text}] if use_chat else text
    loaded = time.perf_counter()
    tokens = engine.encode_prompt(request)
    new_tokens = engine.stream_tokens(tokens, max_new_tokens, Sampling(temperature, top_k, top_p), seed=seed)
    arrivals: list[float] = []  # of tokens: pieces are whole characters, and their text may encode to more or fewer
    pieces: list[str] = []
    for piece in decoded_pieces(engine.tokenizer, _timed(new_tokens, arrivals), tokens.tolist()):
        pieces.append(piece)
        if not as_json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    ended = time.perf_counter()
    answer = "".join(pieces)
    num_tokens, first = len(arrivals), arrivals[0] if arrivals else ended
    speed = (num_tokens - 1) / (ended - first) if num_tokens > 1 and ended > first else 0.0
    if as_json:
        write_json(
            {
                "text": answer,
                "num_tokens": num_tokens,
                "load_seconds": loaded - started,
                "first_token_seconds": first - loaded,
                "decode_tokens_per_s": speed,
            }
        )
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    note(
        f"{num_tokens} tokens, {speed:.1f} tokens/s; first token after {first - loaded:.2f} s, "
        f"model loaded in {loaded - started:.2f} s"
    )


def _timed(tokens: Iterable[int], arrivals: list[float]) -> Iterator[int]:
    """The tokens, and when each came."""
    for token in tokens:
        arrivals.append(time.perf_counter())
        yield token
