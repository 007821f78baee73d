"""Run commands in this process, which is fast, or in one of their own where the process itself is tested."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rarefy.cli.app import app


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def run() -> Callable[..., Outcome]:
    """Run a command in this process: run("inspect", path) -> Outcome."""

    def invoke(*arguments: object, text: str | None = None) -> Outcome:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return invoke


@pytest.fixture
def run_process() -> Callable[..., Outcome]:
    """Run a command in a process of its own."""

    def invoke(*arguments: object, env: dict[str, str] | None = None, python: list[str] | None = None) -> Outcome:
        command = [sys.executable, *(python or ["-m", "rarefy"]), *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, **(env or {})}
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return invoke


@pytest.fixture(autouse=True)
def in_temporary_directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command that writes where it should not shows up in this directory and never in the repository."""
    path = tmp_path_factory.mktemp("cwd")
    monkeypatch.chdir(path)
    return path
