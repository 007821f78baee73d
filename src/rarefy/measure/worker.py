"""A process of its own for one contestant: it loads a model, runs rounds when told to, and reports its peak memory.

Run as `python -m rarefy.measure.worker`. Requests and answers are JSON, one a line, on stdin and stdout. A process per
contestant keeps the thread pools of different runtimes out of each other's way and makes peak memory a fact of one
model. It gets the environment that the user had: what the command line sets for its own good may slow torch down.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TextIO, final

from rarefy.core.environment import users_environment
from rarefy.core.errors import RarefyError, UsageError
from rarefy.measure.memory import peak_memory_bytes
from rarefy.measure.runners import CastableRunner, Kind, Runner, open_runner


@final
class Worker:
    """The parent's end: a contestant that runs in a process of its own.

    Args:
        name: unique name of the contestant.
        model: what to load.
        runtime: one of `rarefy.measure.runners.RUNTIMES`.
        num_threads: threads to compute with; None for the runtime's own choice.
        wait: until the model is loaded; without, `wait_until_loaded` is to be called before anything else.

    Raises:
        RarefyError: the model cannot be loaded.
    """

    def __init__(
        self, name: str, model: str | Path, runtime: str, *, num_threads: int | None = None, wait: bool = True
    ) -> None:
        self.name = name
        self.model = str(model)
        self.runtime = runtime
        self._work: dict[str, Any] = {}
        environment = users_environment()
        if num_threads is not None:
            environment |= {"OMP_NUM_THREADS": str(num_threads), "RAREFY_NUM_THREADS": str(num_threads)}
        # The parent may have found rarefy through sys.path; the child has to find the same one.
        source = str(Path(__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [source, environment.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rarefy.measure.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        try:
            self._send({"op": "load", "model": self.model, "runtime": runtime, "num_threads": num_threads})
            if wait:
                self.wait_until_loaded()
        except BaseException:
            self.close()
            raise

    def wait_until_loaded(self) -> None:
        """Wait for the model.

        Raises:
            RarefyError: it cannot be loaded.
        """
        loaded = self._receive()
        self.kind: Kind = loaded["kind"]
        self.vocabulary_size = int(loaded["vocabulary_size"])

    def cast(self, dtype: str) -> None:
        """Compute in "float32" or "bfloat16" from now on: the model of a transformers runtime is cast where it is."""
        self._ask({"op": "cast", "dtype": dtype})
        self.runtime = f"transformers-{dtype}"

    def set_decoding(self, prompt: list[int], num_tokens: int) -> None:
        """Make a round: process this prompt, then generate so many tokens."""
        self._work = {"op": "decode", "prompt": prompt, "num_tokens": num_tokens}

    def set_encoding(self, batch: list[list[int]]) -> None:
        """Make a round: encode this batch."""
        self._work = {"op": "encode", "batch": batch}

    def run(self) -> Mapping[str, float]:
        """Do one round; return the seconds of its phases."""
        seconds: dict[str, float] = self._ask(self._work)["seconds"]
        return seconds

    def peak_memory_bytes(self) -> int:
        """Return the most memory that the process has held so far."""
        return int(self._ask({"op": "peak"})["bytes"])

    def close(self) -> None:
        """End the process."""
        # It holds nothing that is worth a farewell, and may be in the middle of a long round.
        self._process.terminate()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                # A request that could not be delivered is still in the buffer.
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self._send(request)
        return self._receive()

    def _send(self, request: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        # A process that has ended cannot be asked, and gives no answer: `_receive` tells.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise RarefyError(self.name, f"its process ended with code {code}", hint="was the machine out of memory?")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            error = UsageError if answer["exit_code"] == UsageError.exit_code else RarefyError
            raise error(self.name, answer["error"])
        return answer


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer requests until there are no more."""
    runner: Runner | None = None
    for line in requests:
        request = json.loads(line)
        try:
            if request["op"] == "load":
                runner = open_runner(request["model"], request["runtime"], num_threads=request["num_threads"])
                answer: dict[str, Any] = {"kind": runner.kind, "vocabulary_size": runner.vocabulary_size}
            elif request["op"] == "cast":
                assert isinstance(runner, CastableRunner)
                runner.cast(request["dtype"])
                answer = {}
            elif request["op"] == "peak":
                answer = {"bytes": peak_memory_bytes()}
            else:
                assert runner is not None
                answer = {"seconds": _round(runner, request)}
        except RarefyError as error:
            answer = {"error": str(error), "exit_code": error.exit_code}
        except Exception as error:
            # The runtimes document no closed set of exceptions, and the parent has to be told of every one.
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}", "exit_code": RarefyError.exit_code}
        print(json.dumps(answer), file=answers, flush=True)


def _round(runner: Runner, request: Mapping[str, Any]) -> Mapping[str, float]:
    if request["op"] == "decode":
        return runner.decode(request["prompt"], request["num_tokens"])
    return runner.encode(request["batch"])


if __name__ == "__main__":
    # Ctrl-C goes to the whole process group; the parent decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Libraries may print; only answers belong on the pipe.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as pipe:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        serve(sys.stdin, pipe)
