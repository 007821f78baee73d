"""Which layers of a decoder see only a sliding window of the last tokens."""

from __future__ import annotations

from collections.abc import Sequence

from rarefy.engine.config import Config


def layer_windows(config: Config, window: int, default: Sequence[bool]) -> tuple[int, ...]:
    """Return the window of every layer, 0 where it sees all tokens.

    Args:
        config: its `layer_types`, if present, names the kind of every layer.
        window: tokens that a sliding layer sees, itself included; 0 if the model has no window.
        default: whether each layer slides, for a configuration without `layer_types`.

    Raises:
        UnsupportedModelError: a kind of layer that the engine does not implement.
    """
    kinds = config.values.get("layer_types")
    if kinds is None:
        return tuple(window if slides else 0 for slides in default)
    allowed = {"full_attention": 0, "sliding_attention": window}
    if not isinstance(kinds, list) or len(kinds) != len(default) or any(kind not in allowed for kind in kinds):
        raise config.unsupported("layer_types", kinds, f"{len(default)} entries out of {', '.join(allowed)}")
    if "sliding_attention" in kinds and not window:
        raise config.unsupported("sliding_window", None, "a number, since layer_types has sliding_attention")
    return tuple(allowed[kind] for kind in kinds)
