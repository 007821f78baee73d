"""The command line: one file per command, all of them thin.

`rarefy --help`, `doctor`, `recipes`, `generate` and `embed` never import torch: the commands that need the compress
extra import it inside their function, under `optional.compress_extra`.
"""

from rarefy.cli.app import main

__all__ = ["main"]
