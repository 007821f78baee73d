"""One message and one exit code for every kind of exception."""

import errno
import json
from collections.abc import Callable

import pytest
import typer
from typer.testing import CliRunner

from rarefy.cli.errors import guarded
from rarefy.cli.options import DebugFlag, JsonFlag
from rarefy.core.errors import DamagedFileError, PathError

CASES = [
    (PathError("a/b", "no such file", hint="look"), 2, "error: a/b: no such file; hint: look"),
    (DamagedFileError("x.safetensors", "truncated"), 1, "error: x.safetensors: truncated"),
    (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
    (MemoryError(), 1, "error: out of memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 1, "error: out of memory"),
    (
        OSError(errno.ENOSPC, "No space left on device", "out/model"),
        1,
        "error: no space left on the disk for out/model",
    ),
    (PermissionError(errno.EACCES, "Permission denied", "secret"), 1, "error: secret: Permission denied"),
    (
        ValueError("boom\nsecond line"),
        1,
        "error: unexpected ValueError: boom second line; hint: run again with --debug",
    ),
    (ValueError("x" * 5000), 1, "error: unexpected ValueError: xxx"),
]


def app_that_raises(error: BaseException) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)

    def command(as_json: JsonFlag = False, debug: DebugFlag = False) -> None:
        raise error

    app.command()(guarded(command))
    return app


@pytest.mark.parametrize(("error", "code", "message"), CASES)
def test_every_exception_is_one_line_and_an_exit_code(error: BaseException, code: int, message: str) -> None:
    result = CliRunner().invoke(app_that_raises(error), [])
    assert result.exit_code == code
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert len(result.stderr) < 500
    assert result.stdout == ""


def test_debug_adds_the_traceback() -> None:
    result = CliRunner().invoke(app_that_raises(ValueError("boom")), ["--debug"])
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "app_that_raises" in result.stderr or "command" in result.stderr


def test_json_puts_the_error_on_stdout_too() -> None:
    result = CliRunner().invoke(app_that_raises(PathError("a", "gone")), ["--json"])
    assert json.loads(result.stdout) == {"error": {"message": "a: gone", "type": "PathError", "exit_code": 2}}
    assert "error: a: gone" in result.stderr


def test_a_message_cannot_drive_the_terminal() -> None:
    result = CliRunner().invoke(app_that_raises(PathError("\x1b[2Jevil", "gone")), [])
    assert "\x1b" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["compress", "m", "-o", "out", "--no-such-option"], "no such option"),
        (["compress", "m"], "missing option"),
        (["compress"], "missing argument"),
        (["nonsense"], "no such command"),
        (["generate", "m", "p", "--top-p", "1.5"], "less than or equal to 1"),
        (["generate", "m", "p", "--max-new-tokens", "0"], "greater than or equal to 1"),
        (["evaluate", "m", "--metric", "beauty", "--data", "x"], "beauty"),
        (["bench", "m", "--rounds", "many"], "valid integer"),
    ],
)
def test_bad_use_exits_with_2(run: Callable, arguments: list[str], complaint: str) -> None:
    done = run(*arguments)
    assert done.code == 2
    assert complaint in " ".join(done.err.replace("│", " ").lower().split())
    assert "Traceback" not in done.err
