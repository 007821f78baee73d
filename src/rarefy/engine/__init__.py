"""The torch-free runtime: one class, `Engine`, and one readable file per model family."""

from rarefy.engine.engine import Engine, Prompt, TruncationWarning
from rarefy.engine.families import FAMILIES
from rarefy.engine.sampling import Sampling

__all__ = ["FAMILIES", "Engine", "Prompt", "Sampling", "TruncationWarning"]
