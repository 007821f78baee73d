"""Typed reading of a model's config.json: a value that the engine does not implement is refused, never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from rarefy.core.errors import DamagedFileError, UnsupportedModelError
from rarefy.kernels.ops import ACTIVATIONS


@final
class Config:
    """One JSON object of a configuration, with its place for error messages.

    Args:
        values: the decoded JSON object.
        where: the file, and the key path inside it for a nested object.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        """Return an integer of at least `minimum`; `default` stands in for a missing key or null."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self._wrong(name, value, f"an integer of at least {minimum}")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        """Return a finite number above zero; `default` stands in for a missing key or null."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self._wrong(name, value, "a finite number above 0")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """Return true or false; `default` stands in for a missing key or null."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def activation(self, name: str, default: str) -> int:
        """Return the number of an activation function in `rarefy.kernels.ops.ACTIVATIONS`."""
        value = self._value(name, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise self.unsupported(name, value, ", ".join(ACTIVATIONS))
        return ACTIVATIONS[value]

    def only(self, name: str, *allowed: object) -> None:
        """Refuse the model unless the key is missing, null or one of `allowed`."""
        value = self.values.get(name)
        if value is not None and value not in allowed:
            raise self.unsupported(name, value, ", ".join(map(repr, (None, *allowed))))

    def mapping(self, name: str) -> Config | None:
        """Return a nested object, or None where the key is missing or null."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return Config(value, f"{self.where}: {name}")

    def unsupported(self, name: str, found: object, allowed: str) -> UnsupportedModelError:
        """Return the error for a value that is legal but not implemented in the engine."""
        return UnsupportedModelError(
            f"{self.where}: {name}",
            repr(found),
            allowed=allowed,
            hint="the torch-free engine does not implement this; load the model with transformers instead",
        )

    def _value(self, name: str, default: object) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def _wrong(self, name: str, found: object, allowed: str) -> DamagedFileError:
        return DamagedFileError(f"{self.where}: {name}", "missing" if found is None else repr(found), allowed=allowed)
