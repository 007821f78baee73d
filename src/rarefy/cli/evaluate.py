"""`rarefy evaluate`: one quality of one model on one data file."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from rarefy.cli.console import stdout_console, write_json
from rarefy.cli.embed import Pooling
from rarefy.cli.optional import compress_extra
from rarefy.cli.options import DebugFlag, JsonFlag, ModelArgument, ThreadsOption
from rarefy.cli.progress import ProgressDisplay
from rarefy.report.facts import title_of
from rarefy.report.units import format_number, printable


class MetricName(StrEnum):
    """What can be measured."""

    PERPLEXITY = "perplexity"
    STS = "sts"
    ACCURACY = "accuracy"


class Runtime(StrEnum):
    """What computes."""

    AUTO = "auto"
    ENGINE = "engine"
    TRANSFORMERS = "transformers"


class Dtype(StrEnum):
    """The type that the transformers runtime computes in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def evaluate(
    model: ModelArgument,
    metric: Annotated[
        MetricName,
        typer.Option(
            help="Perplexity of a language model, similarity of sentences (Spearman), or accuracy of classes."
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="perplexity: text; sts: .csv, .tsv or .jsonl of sentence1, sentence2, score; accuracy: text, label.",
            show_default=False,
        ),
    ],
    window: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens per window of perplexity.")] = 512,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens between the starts of windows; the window if not given.",
            show_default=False,
        ),
    ] = None,
    max_windows: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first N windows.", show_default=False)
    ] = None,
    pooling: Annotated[Pooling, typer.Option(help="How sts makes one vector of a text.")] = Pooling.MEAN,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Texts per forward pass.")] = 32,
    runtime: Annotated[Runtime, typer.Option(help="auto: the engine for rarefy directories.")] = Runtime.AUTO,
    dtype: Annotated[Dtype, typer.Option(help="What the transformers runtime computes in.")] = Dtype.FLOAT32,
    threads: ThreadsOption = None,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Measure the quality of a model, compressed or not; the output states how.

    Examples:

        rarefy evaluate OUT --metric perplexity --data wiki.test.txt --max-windows 60

        rarefy evaluate OUT --metric sts --data stsb-test.csv --json
    """
    del debug
    with compress_extra("evaluate"):
        from rarefy.measure.evaluate import evaluate as measure
    with ProgressDisplay() as display:
        result = measure(
            model,
            metric.value,
            data,
            window=window,
            stride=stride,
            max_windows=max_windows,
            pooling=pooling.value,
            batch_size=batch_size,
            runtime=runtime.value,
            dtype=dtype.value,
            num_threads=threads,
            progress=lambda done, total: display("evaluate", done, total),
        )
    if as_json:
        write_json(result)
        return
    value, low, high = (format_number(float(result[name])) for name in ("value", "low", "high"))
    console = stdout_console()
    console.print(Text(f"{title_of(result['metric'])}: {value} ({low} to {high})", style="bold"))
    console.print(Text(printable(str(result["how"]))))
