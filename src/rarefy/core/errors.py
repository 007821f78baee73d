"""The one tree of errors. A message says where, what was found, what is allowed, and a hint."""

from typing import ClassVar


class RarefyError(Exception):
    """Base of every error that rarefy raises on purpose; the command line prints it without a traceback.

    Args:
        where: the file, recipe line, layer or argument that is wrong.
        found: what was found there.
        allowed: what would have been accepted.
        hint: what to do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, where: str, found: str, *, allowed: str | None = None, hint: str | None = None) -> None:
        self.where = where
        self.found = found
        self.allowed = allowed
        self.hint = hint
        parts = [f"{where}: {found}"]
        if allowed is not None:
            parts.append(f"allowed: {allowed}")
        if hint is not None:
            parts.append(f"hint: {hint}")
        super().__init__("; ".join(parts))

    def __reduce__(self) -> tuple[object, ...]:
        # Exception pickles its args alone, which would lose the keyword fields on the way out of a worker process.
        return (_rebuild, (type(self), self.where, self.found, self.allowed, self.hint))


def _rebuild(cls: type[RarefyError], where: str, found: str, allowed: str | None, hint: str | None) -> RarefyError:
    return cls(where, found, allowed=allowed, hint=hint)


class UsageError(RarefyError):
    """The request itself is wrong: nothing was tried."""

    exit_code: ClassVar[int] = 2


class RecipeError(UsageError):
    """A recipe is malformed or does not fit the model."""


class PathError(UsageError):
    """A path does not exist, is not what it should be, or is in the way."""


class CalibrationError(UsageError):
    """Calibration data is missing, empty or too short."""


class UnsupportedModelError(UsageError):
    """The model is of a kind that this part of rarefy cannot read or run."""


class PatternError(UsageError):
    """A zero pattern or value grid is impossible, or does not fit a layer."""


class DamagedFileError(RarefyError):
    """A file is truncated, corrupt or contradicts itself."""


class LayoutError(DamagedFileError):
    """The arrays or metadata of a storage layout contradict each other."""


class NonFiniteError(RarefyError):
    """A weight, statistic or result is NaN or infinite."""


class OutputError(RarefyError):
    """The result could not be written."""
