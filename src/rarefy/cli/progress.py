"""Progress on stderr: bars with the time left on a terminal, now and then a line everywhere else."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rarefy.cli.console import note, stderr_console
from rarefy.report.units import format_seconds, printable

_SECONDS_BETWEEN_LINES = 15.0


class ProgressDisplay:
    """Shows one bar for each phase of a run; use it as a context manager.

    Args:
        enabled: False shows nothing at all.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        console = stderr_console()
        self._enabled = enabled
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console,
            disable=not (enabled and console.is_terminal),
            # Otherwise rich would send what we write to stdout to its own console, which is stderr.
            redirect_stdout=False,
        )
        self._plain = enabled and not console.is_terminal
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._unfinished: dict[str, tuple[int, int]] = {}
        self._last_line = 0.0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._finish_phases()
        self._bars.stop()

    def __call__(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """Show that `done` of `total` steps of a phase are done; a new phase gets a new bar."""
        if phase not in self._tasks:
            self._finish_phases()
            self._tasks[phase] = self._bars.add_task(phase.capitalize(), total=total, count="", detail="")
            self._started[phase] = self._last_line = time.monotonic()
        self._unfinished.pop(phase, None)
        if done < total:
            self._unfinished[phase] = (done, total)
        shown = printable(detail) if done < total else ""
        count = f"{done}/{total}" if total > 1 else ""
        self._bars.update(self._tasks[phase], completed=done, total=total, count=count, detail=shown)
        if self._plain:
            self._line(phase, done, total)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the bars off the terminal while something else is printed."""
        self._bars.stop()
        yield
        self._bars.start()

    def _finish_phases(self) -> None:
        """Fill the bars of phases that ended with less work than they had announced."""
        for phase, (done, total) in list(self._unfinished.items()):
            if done > 0:
                self(phase, total, total)

    def _line(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last_line < _SECONDS_BETWEEN_LINES and done < total:
            return
        self._last_line = now
        elapsed = now - self._started[phase]
        left = f", about {format_seconds(elapsed / done * (total - done))} left" if 0 < done < total else ""
        count = f"{done}/{total}, " if total > 1 else ""
        note(f"{phase}: {count}{format_seconds(elapsed)}{left}")
