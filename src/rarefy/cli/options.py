"""Options and arguments that several commands share."""

from typing import Annotated

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="Write the result as JSON on stdout.")]
DebugFlag = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face directory, a GGUF file, a rarefy directory, or a hub id.",
        show_default=False,
    ),
]
ArtifactArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A rarefy directory, or a Hugging Face directory of a family that the engine knows.",
        show_default=False,
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, metavar="N", help="Threads to use; all cores if not given.", show_default=False),
]
