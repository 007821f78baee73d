"""The one place where an exception becomes a message and an exit code."""

import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import ParamSpec

import typer

from rarefy.cli.console import note, write_json
from rarefy.core.errors import RarefyError

EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

P = ParamSpec("P")


def guarded(function: Callable[P, None]) -> Callable[P, None]:
    """Wrap a command so that every exception ends as one message on stderr and an exit code.

    The command has the parameters `debug`, which adds the traceback, and `as_json`, which adds the error to stdout.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
            sys.stdout.flush()
        except (typer.Exit, typer.Abort):
            raise
        except BrokenPipeError:
            # The reader has gone; Python's own flush at exit must not complain about it again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(EXIT_BROKEN_PIPE) from None
        except (Exception, KeyboardInterrupt) as error:
            message, code = describe(error)
            if kwargs.get("debug"):
                traceback.print_exc()
            if kwargs.get("as_json"):
                write_json({"error": {"message": message, "type": type(error).__name__, "exit_code": code}})
            note(message if isinstance(error, KeyboardInterrupt) else f"error: {message}")
            raise typer.Exit(code) from None

    return wrapper


def describe(error: BaseException) -> tuple[str, int]:
    """Return the message for the user and the exit code: 2 for bad use, 1 for failure, 130 for Ctrl-C."""
    if isinstance(error, RarefyError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted; nothing was written", EXIT_INTERRUPTED
    # torch reports a failed allocation as a RuntimeError of its own.
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "out of memory; hint: fewer --samples or a smaller --sequence-length need less", 1
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        where = f" for {error.filename}" if error.filename else ""
        return f"no space left on the disk{where}; nothing was written", 1
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}", 1
    text = " ".join(str(error).split())
    if len(text) > 300:
        text = text[:299] + "…"
    return f"unexpected {type(error).__name__}: {text}; hint: run again with --debug for the traceback", 1
