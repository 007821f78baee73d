"""The environment variables that rarefy sets for itself, kept apart from the user's."""

import os

# Names the others, so that a process started from here can be given the environment that the user had.
SET_BY_RAREFY = "RAREFY_SET_BY_ITSELF"


def set_for_ourselves(name: str, value: str) -> None:
    """Set an environment variable unless the user has set it."""
    if name not in os.environ:
        os.environ[name] = value
        os.environ[SET_BY_RAREFY] = " ".join([*os.environ.get(SET_BY_RAREFY, "").split(), name])


def users_environment() -> dict[str, str]:
    """Return the environment without what `set_for_ourselves` put into it."""
    environment = dict(os.environ)
    for name in environment.pop(SET_BY_RAREFY, "").split():
        environment.pop(name, None)
    return environment
