"""The root command: registers every command and prepares the process."""

import os
import signal
import sys
import warnings
from types import FrameType
from typing import Annotated, NoReturn, TextIO

import typer

from rarefy import __version__
from rarefy.cli import bench, compress, doctor, embed, evaluate, generate, inspect, recipes
from rarefy.cli.console import note
from rarefy.cli.errors import guarded
from rarefy.core.environment import set_for_ourselves

app = typer.Typer(
    name="rarefy",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"rarefy {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Make neural networks sparse, small and measurably faster on the CPU you have.

    The usual order: [bold]inspect[/bold] a model, [bold]compress[/bold] it, use it with [bold]generate[/bold] or
    [bold]embed[/bold].
    """


app.command("inspect")(guarded(inspect.inspect))
app.command("compress")(guarded(compress.compress))
app.command("evaluate")(guarded(evaluate.evaluate))
app.command("bench")(guarded(bench.bench))
app.command("generate")(guarded(generate.generate))
app.command("embed")(guarded(embed.embed))
app.command("doctor")(guarded(doctor.doctor))
app.add_typer(recipes.app, name="recipes")


def main() -> None:
    """Run the command line; the process ends with the exit code of the command."""
    _prepare_process()
    app()


def _prepare_process() -> None:
    # The libraries below us print progress bars and advice of their own, which would tear ours apart.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Read when torch is imported. Threads of OpenMP that spin while they wait make a run up to ten times slower where
    # anything else uses the CPU, rarefy's own kernels included. On a quiet machine spinning makes torch faster, so that
    # what is measured against torch runs in processes with the user's own environment.
    set_for_ourselves("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks must not end the run.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    signal.signal(signal.SIGTERM, _terminate)
    if "--debug" not in sys.argv:
        warnings.showwarning = _show_warning


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    """Leave through the finally blocks, which remove temporary directories."""
    del frame
    raise SystemExit(128 + signum)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print our own warnings in one line; those of other packages are for --debug."""
    del category, lineno, file, line
    if "rarefy" in str(message) or f"{os.sep}rarefy{os.sep}" in filename:
        note(f"warning: {message}")
