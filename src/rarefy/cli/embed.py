"""`rarefy embed`: sentence embeddings from an encoder."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rarefy.cli.console import write_json
from rarefy.cli.options import ArtifactArgument, DebugFlag, JsonFlag, ThreadsOption
from rarefy.core.errors import PathError, UsageError
from rarefy.engine import Engine


class Pooling(StrEnum):
    """How the vectors of the tokens become one."""

    MEAN = "mean"
    CLS = "cls"


def embed(
    model: ArtifactArgument,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts to embed.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", "-f", metavar="FILE", help="Embed every line of a file; - is stdin.", show_default=False
        ),
    ] = None,
    pooling: Annotated[Pooling, typer.Option(help="Mean over the tokens, or the first token.")] = Pooling.MEAN,
    normalize: Annotated[bool, typer.Option("--normalize/--no-normalize", help="Scale to length 1.")] = True,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Texts per batch.")] = 32,
    threads: ThreadsOption = None,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Embed texts: one row of numbers for each text on stdout, or JSON.

    Examples:

        rarefy embed OUT "a cat sat on the mat" "dogs bark" --json

        rarefy embed OUT --file sentences.txt > vectors.txt
    """
    del debug
    rows = [*(texts or []), *(_lines(file) if file is not None else [])]
    if not rows:
        raise UsageError("rarefy embed", "no text given", hint="name texts after MODEL, or --file FILE")
    engine = Engine(model, num_threads=threads)
    if engine.kind != "encoder":
        raise UsageError(model, f"is a {engine.kind}, which gives no embeddings", hint="use rarefy generate")
    vectors_ND = engine.embed(rows, pooling=pooling.value, normalize=normalize, batch_size=batch_size)
    if as_json:
        write_json(
            {
                "dimension": int(vectors_ND.shape[1]),
                "pooling": pooling.value,
                "normalized": normalize,
                "rows": [
                    {"text": text, "embedding": [float(f"{value:.7g}") for value in row]}
                    for text, row in zip(rows, vectors_ND.tolist(), strict=True)
                ],
            }
        )
        return
    for row in vectors_ND.tolist():
        sys.stdout.write(" ".join(f"{value:.7g}" for value in row) + "\n")


def _lines(file: Path) -> list[str]:
    if str(file) == "-":
        return sys.stdin.read().splitlines()
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise PathError(str(file), "no such file") from None
    except UnicodeDecodeError as error:
        raise PathError(str(file), f"not UTF-8 text at byte {error.start}") from None
