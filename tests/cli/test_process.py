"""What only a real process shows: what is imported, signals, pipes, and an install without the compress extra."""

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

LIGHT_COMMANDS = (["--help"], ["--version"], ["doctor", "--no-bandwidth"], ["recipes", "list"], ["compress", "--help"])
SMALL_KERNELS = [
    *("bench", "--kernels", "--layout", "dense-int4-v1", "--shape", "1024x2048", "--rows", "1", "--threads", "1"),
    *("--rounds", "1", "--json"),
]
HEAVY_MODULES = {"torch", "transformers", "yaml", "scipy", "accelerate", "gguf"}

# Runs a command, then writes the names of all imported modules to stderr as JSON.
SPY = (
    "import atexit, json, sys; "
    "atexit.register(lambda: sys.stderr.write('\\n' + json.dumps(sorted(sys.modules)))); "
    "from rarefy.cli import main; main()"
)
# Runs a command where the packages of the compress extra cannot be imported.
WITHOUT_EXTRA = (
    "import sys; "
    f"[sys.modules.__setitem__(name, None) for name in {sorted(HEAVY_MODULES)!r}]; "
    "from rarefy.cli import main; main()"
)


@pytest.mark.parametrize("arguments", LIGHT_COMMANDS, ids=" ".join)
def test_light_commands_do_not_import_torch(run_process: Callable, arguments: list[str]) -> None:
    done = run_process(*arguments, python=["-c", SPY])
    assert done.code == 0
    imported = set(json.loads(done.err.splitlines()[-1]))
    assert "rarefy.cli.app" in imported
    assert not imported & HEAVY_MODULES


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "model"],
        ["compress", "model", "-o", "out"],
        ["evaluate", "model", "--metric", "sts", "--data", "x.csv"],
        ["bench", "model"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_without_the_extra_heavy_commands_say_what_is_missing(run_process: Callable, arguments: list[str]) -> None:
    done = run_process(*arguments, python=["-c", WITHOUT_EXTRA])
    assert done.code == 2
    assert "needs rarefy[compress]" in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_without_the_extra_light_commands_work(run_process: Callable) -> None:
    for arguments in (["doctor", "--no-bandwidth"], ["recipes", "list"], ["recipes", "show", "sparse-50-int4"]):
        done = run_process(*arguments, python=["-c", WITHOUT_EXTRA])
        assert (done.code, done.err) == (0, "")
    done = run_process(*SMALL_KERNELS, python=["-c", WITHOUT_EXTRA])
    assert done.code == 0, done.err
    assert [row["layout"] for row in json.loads(done.out)] == ["dense-int4-v1"]


def test_a_closed_pipe_ends_the_command_quietly() -> None:
    script = f"'{sys.executable}' -m rarefy doctor --no-bandwidth --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert "Traceback" not in done.stderr
    assert "rror" not in done.stderr


def test_output_in_a_pipe_is_plain_text_of_80_columns(run_process: Callable) -> None:
    done = run_process("doctor", "--no-bandwidth", env={"COLUMNS": "80"})
    assert done.code == 0
    assert all(character == "\n" or character.isprintable() for character in done.out)
    assert max(map(len, done.out.splitlines())) <= 80


def test_an_encoding_without_the_characters_does_not_end_the_command(run_process: Callable) -> None:
    done = run_process("inspect", "höhe→", env={"PYTHONIOENCODING": "ascii"})
    assert done.code == 2
    assert "Traceback" not in done.err


@pytest.mark.parametrize("policy", [None, "ACTIVE", "PASSIVE"])
def test_contestants_of_bench_get_the_users_environment(tiny_llama_dir: object, policy: str | None) -> None:
    """The command's own process waits patiently; torch as a contestant waits as the user's torch would."""
    spy = (
        "import os, sys; import rarefy.measure.worker as worker; original = worker.subprocess.Popen\n"
        "def popen(command, env, **options):\n"
        "    print(os.environ['OMP_WAIT_POLICY'], env.get('OMP_WAIT_POLICY'), sorted(set(os.environ) - set(env)),"
        " file=sys.stderr)\n"
        "    return original(command, env=env, **options)\n"
        "worker.subprocess.Popen = popen\n"
        "from rarefy.cli import main; main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if policy is not None:
        environment["OMP_WAIT_POLICY"] = policy
    command = [sys.executable, "-c", spy, "bench", str(tiny_llama_dir), "--runtime", "engine", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    removed = ["OMP_WAIT_POLICY", "RAREFY_SET_BY_ITSELF"] if policy is None else []
    assert f"{policy or 'PASSIVE'} {policy} {removed}" in done.stderr.splitlines()


def test_slow_kernels_are_announced_in_one_line(run_process: Callable, tiny_llama_dir: object) -> None:
    hide = "import sys; sys.modules['rarefy._native'] = None; from rarefy.cli import main; main()"
    done = run_process("generate", tiny_llama_dir, "the river", "--max-new-tokens", "2", python=["-c", hide])
    assert done.code == 0
    assert len([line for line in done.err.splitlines() if line.startswith("warning: ")]) == 1
