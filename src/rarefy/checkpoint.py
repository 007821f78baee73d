"""What an interrupted run leaves beside its output, so that the same command goes on where it stopped.

`OUT.partial` holds `run.json`, which says what the run is made of, and for every finished block a small artifact with
its packed layers and what the report says about them. A block's inputs are not kept: they come out of the blocks
before it again, which takes far less time than solving them. Each block's directory appears whole or not at all.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from rarefy.artifact import read_artifact, write_artifact
from rarefy.calibrate.calls import Call
from rarefy.core.errors import DamagedFileError, NonFiniteError, PathError, RarefyError, UsageError
from rarefy.core.grids import Float32Array
from rarefy.core.results import LayerResult
from rarefy.layouts import AnyLayout
from rarefy.measure.size import weight_files
from rarefy.methods import METHODS
from rarefy.methods.allocation import ALLOCATIONS
from rarefy.models.loaded import LoadedModel
from rarefy.recipe import Recipe

_RUN = "run.json"
_RESULTS = "results.json"
# of tensors that are no part of a layout
_SOLUTION, _CORRECTED = ".solution", ".corrected"
_AMOUNTS = "amounts.json"
_KIND = {"kind": "rarefy partial run", "version": 1}


@final
@dataclass(frozen=True)
class Finished:
    """The layers of one finished block.

    Args:
        layouts: packed weights by layer.
        results: what the report says about them.
        skipped: layers that were left alone, with the reason.
        weights: those weights that their layouts do not give back exactly, (O, I).
        biases: those that were corrected, by full name.
    """

    layouts: Mapping[str, AnyLayout]
    results: Mapping[str, LayerResult]
    skipped: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, Float32Array] = field(default_factory=dict)
    biases: Mapping[str, Float32Array] = field(default_factory=dict)

    def weight(self, layer: str) -> Float32Array:
        """The weight that the layers after this one were solved with, (O, I)."""
        kept = self.weights.get(layer)
        return self.layouts[layer].to_dense() if kept is None else kept.copy()  # torch takes no read-only arrays


@final
class Checkpoint:
    """The finished blocks of a run, on disk. Made by `open_checkpoint`.

    Args:
        path: the directory; it is created with the first block.
        identity: what the run is made of.
    """

    def __init__(self, path: Path, identity: Mapping[str, str]) -> None:
        self.path = path
        self._identity = dict(identity)
        self._amounts: dict[str, dict[str, float]] = {}

    def num_finished(self) -> int:
        """How many blocks have been finished, by this run or by the one that it continues."""
        return sum(1 for _ in self.path.glob(f"*/{_RESULTS}"))

    def amounts(self) -> dict[str, dict[str, float]]:
        """What `keep_amounts` was given by the run that this one continues; nothing where that is not known."""
        try:
            record = json.loads((self.path / _AMOUNTS).read_text(encoding="utf-8"))
            return {step: {layer: float(share) for layer, share in own.items()} for step, own in record.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def keep_amounts(self, amounts: Mapping[str, Mapping[str, float]]) -> None:
        """Keep what the dense model said, once there is a first block to keep: for steps of the recipe, by layer."""
        self._amounts = {step: dict(own) for step, own in amounts.items()}

    def load(self, unit: str, layers: Sequence[str]) -> Finished | None:
        """Read a finished block; None if there is none, or none that is whole.

        Args:
            unit: name of the block's directory.
            layers: the layers that it must tell of.
        """
        path = self.path / unit
        try:
            artifact = read_artifact(path)
            record = json.loads((path / _RESULTS).read_text(encoding="utf-8"))
            results = {each["name"]: LayerResult.from_json(each) for each in record["results"]}
            skipped = dict(record["skipped"])
            layouts = {name: artifact.layer(name) for name in artifact.specs}
            weights, biases = (
                {name.removesuffix(suffix): artifact.tensor(name) for name in artifact.names() if name.endswith(suffix)}
                for suffix in (_SOLUTION, _CORRECTED)
            )
        except (RarefyError, OSError, ValueError, KeyError, TypeError):
            return None
        if layouts.keys() != results.keys() or {*layouts, *skipped} != set(layers):
            return None
        return Finished(layouts, results, skipped, weights, biases)

    def save(self, unit: str, finished: Finished) -> None:
        """Write a finished block: whole, or not at all.

        Raises:
            OutputError: the disk refused it.
        """
        self._create()
        results = [finished.results[name].to_json() for name in finished.layouts]
        record = json.dumps({"results": results, "skipped": dict(finished.skipped)})
        write_artifact(
            self.path / unit,
            config={},
            layers=finished.layouts,
            tied={},
            tensors={f"{name}{_SOLUTION}": weight for name, weight in finished.weights.items()}
            | {f"{name}{_CORRECTED}": bias for name, bias in finished.biases.items()},
            extra_files={_RESULTS: record.encode()},
            force=True,
        )

    def remove(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _create(self) -> None:
        if self.path.exists():
            return
        # The directory is there with its description or not there: nobody can be in doubt whose it is.
        staging = self.path.with_name(f".{self.path.name}-{os.getpid()}")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        (staging / _RUN).write_text(json.dumps({**_KIND, **self._identity}, indent=2) + "\n", encoding="utf-8")
        (staging / _AMOUNTS).write_text(json.dumps(self._amounts) + "\n", encoding="utf-8")
        staging.rename(self.path)


def partial_path(out: str | os.PathLike[str]) -> Path:
    """Where a run that writes `out` keeps what it has finished.

    Raises:
        PathError: something else is there.
    """
    target = Path(os.path.realpath(out))
    path = target.with_name(f"{target.name}.partial")
    if path.exists() and _described(path) is None:
        raise PathError(
            str(path), "something else is in the way", allowed="the work of an interrupted run", hint="move it away"
        )
    return path


def what_is_left(out: str | os.PathLike[str]) -> str:
    """What an interrupted run has left of its work, in one line for the user; "" if nothing."""
    path = partial_path(out)
    count = Checkpoint(path, {}).num_finished()
    if not count and path.exists():
        return f"interrupted before a block was finished; the same command begins anew (and replaces {path.name})"
    if not count:
        return ""
    return f"interrupted; the same command will go on after {_blocks(count)} (kept in {path.name})"


@contextmanager
def removed_if_hopeless(checkpoint: Checkpoint | None) -> Iterator[None]:
    """Remove the work where the same command would fail again in the same way."""
    try:
        yield
    except (UsageError, NonFiniteError, DamagedFileError):
        if checkpoint is not None:
            checkpoint.remove()
        raise


def open_checkpoint(path: Path, identity: Mapping[str, str], *, force: bool, tell: Callable[[str], None]) -> Checkpoint:
    """Continue what is at a path if it is of the same run, else start anew.

    Args:
        path: from `partial_path`.
        identity: from `identity_of`.
        force: start anew in any case.
        tell: told in one line what was found, if anything was.
    """
    checkpoint = Checkpoint(path, identity)
    found = _described(path)
    if found is None:
        return checkpoint
    changed = [name for name in identity if found.get(name) != identity[name]]
    if force or changed:
        why = "--force was given" if force else f"it had another {' and another '.join(changed)}"
        tell(f"{path.name} holds the work of an interrupted run, but {why}: starting anew")
        checkpoint.remove()
    else:
        tell(f"{path.name} holds the work of an interrupted run: going on after {_blocks(checkpoint.num_finished())}")
    return checkpoint


def identity_of(
    loaded: LoadedModel, recipe: Recipe, calls: Sequence[Call], computation: Mapping[str, Any]
) -> dict[str, str]:
    """What decides the bytes of a run: two runs in which all of it is equal give the same.

    Args:
        loaded: the model; its files are told apart by name, size and time of change.
        recipe: the recipe.
        calls: the calibration batches; they follow from the text, the samples, their length and the seed.
        computation: dtype, versions and machine.
    """
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weight_files(loaded.path)]
    batches = hashlib.sha256()
    for call in calls:
        for path, value in call.leaves().items():
            batches.update(
                repr((path, value.dtype, value.shape) if isinstance(value, Tensor) else (path, value)).encode()
            )
            if isinstance(value, Tensor):
                batches.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return {
        "model": _hash([files, loaded.config]),
        "recipe": _hash(recipe.to_dict()),
        "calibration": batches.hexdigest(),
        "machine or version": _hash(dict(computation)),
    }


def can_resume(loaded: LoadedModel, recipe: Recipe) -> bool:
    """Whether a run can be told from others: its model lies in files, and its methods and rules are rarefy's own."""
    own = {*METHODS.values(), *ALLOCATIONS.values()}
    return loaded.streams and all({type(step.method), type(step.allocation)} <= own for step in recipe.steps)


def _described(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((path / _RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and _KIND.items() <= found.items() else None


def _blocks(count: int) -> str:
    return f"{count} finished {'block' if count == 1 else 'blocks'}"


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
