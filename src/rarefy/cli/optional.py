"""The guard around imports of the compress extra, so that a runtime-only install says what is missing."""

from collections.abc import Iterator
from contextlib import contextmanager

from rarefy.core.errors import UsageError

COMPRESS_PACKAGES = frozenset({"torch", "transformers", "accelerate", "gguf", "pydantic", "yaml", "scipy"})


@contextmanager
def compress_extra(command: str) -> Iterator[None]:
    """Turn the missing import of a package of the compress extra into a UsageError.

    Args:
        command: what the user called, for the message.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in COMPRESS_PACKAGES:
            raise
        raise UsageError(
            f"rarefy {command}",
            f"the package {missing} is not installed; this command needs rarefy[compress]",
            hint="pip install 'rarefy[compress]'",
        ) from None
