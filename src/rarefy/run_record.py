"""What a run tells of itself: the record that reports are made from, and the files about it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

import rarefy
from rarefy.calibrate.data import CalibrationData
from rarefy.core.results import Metric, RunReport, UntouchedLayer
from rarefy.kernels import describe_cpu
from rarefy.measure.memory import peak_memory_bytes
from rarefy.models.loaded import LoadedModel
from rarefy.models.structure import Structure
from rarefy.recipe import UNTARGETED, Recipe, left_alone, notes, resolve
from rarefy.report import render_html, render_model_card
from rarefy.solve import Progress, Solved


@final
@dataclass(frozen=True)
class Facts:
    """What the report is made of, apart from measurements."""

    loaded: LoadedModel
    structure: Structure
    recipe: Recipe
    seed: int
    data: CalibrationData
    dtype: torch.dtype
    solved: Solved
    amounts: tuple[str, ...]

    def report(self, metrics: tuple[Metric, ...], warnings: tuple[str, ...], seconds: Mapping[str, float]) -> RunReport:
        """The report of the run."""
        own = list(self.loaded.notes)
        if self.solved.num_resumed:
            own.append(
                f"an interrupted run had finished {self.solved.num_resumed} of the blocks; the time of compression is "
                "that of the others"
            )
        own += self._uncorrected()
        own += [f"{name} was left alone: {why}" for name, why in self.solved.skipped.items()]
        return RunReport(
            model=_shown_name(self.loaded),
            architecture=self.loaded.architecture,
            num_parameters=self.loaded.num_parameters(),
            num_blocks=len(self.structure.blocks),
            recipe=self.recipe.to_dict(),
            seed=self.seed,
            calibration=self.data.info,
            machine=self._machine(),
            versions=versions(),
            layers=tuple(self.solved.results[x.name] for x in self.structure.layers if x.name in self.solved.results),
            untouched=tuple(self._untouched()),
            metrics=metrics,
            warnings=(*own, *warnings),
            seconds=dict(seconds),
            peak_memory_bytes=peak_memory_bytes(),
            notes=(*notes(self.recipe, self.structure), *self.amounts),
        )

    def _uncorrected(self) -> Iterator[str]:
        for plan in resolve(self.recipe, self.structure):
            done = self.solved.results[plan.layer].steps if plan.layer in self.solved.results else None
            if done is not None and len(done) < len(plan.steps):
                yield f"bias-correction left {plan.layer} as it was: it has no bias, and can be given none"

    def _untouched(self) -> Iterator[UntouchedLayer]:
        unfit = left_alone(self.recipe, self.structure)
        for layer in self.structure.layers:
            if layer.name in self.solved.layouts or layer.tied_to in self.solved.layouts:
                continue
            why = self.solved.skipped.get(layer.name) or layer.reason or unfit.get(layer.name, UNTARGETED)
            yield UntouchedLayer(layer.name, layer.kind, layer.shape, layer.num_bytes, why)

    def _machine(self) -> dict[str, str | int | float]:
        cpu = describe_cpu()
        return {
            "cpu": str(cpu["model"]),
            "cpus": int(cpu["cpus"]),
            "num_threads": int(cpu["num_threads"]),
            "flags": " ".join(cpu["flags"]),
            "system": f"{platform.system()} {platform.machine()}",
            "compute_dtype": str(self.dtype).removeprefix("torch."),
        }


def _shown_name(loaded: LoadedModel) -> str:
    """The model's name for readers: the last part of a path, since the rest is one machine's business."""
    return loaded.source if loaded.kind == "module" else Path(loaded.source).name or loaded.source


def versions() -> dict[str, str]:
    """Of what a result may depend on."""
    packages = ("torch", "transformers", "numpy", "safetensors", "tokenizers")
    return {
        "rarefy": rarefy.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def computation(dtype: torch.dtype) -> dict[str, Any]:
    """What besides the data may move the last bit of a result."""
    cpu = describe_cpu()
    return {
        "dtype": str(dtype),
        "versions": versions(),
        "cpu": [str(cpu["model"]), list(cpu["flags"]), int(cpu["num_threads"]), torch.get_num_threads()],
    }


def documents(report: RunReport, recipe: Recipe) -> dict[str, bytes]:
    """The files about a run that are written beside its weights."""
    return {
        "recipe.yaml": recipe.to_yaml().encode(),
        "report.json": (json.dumps(report.to_json(), indent=2) + "\n").encode(),
        "report.html": render_html(report).encode(),
        "README.md": render_model_card(report).encode(),
    }


@final
class Clock:
    """Seconds of each phase, and the announcement of phases that have no steps of their own."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase."""
        if self._progress is not None and name != "compress":
            self._progress(name, 0, 1, "")
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
        if self._progress is not None and name != "compress":
            self._progress(name, 1, 1, "")

    def detail(self, phase: str) -> Callable[[str], None]:
        """What to call with a word on what a phase is at."""
        return lambda text: self._progress(phase, 0, 1, text) if self._progress is not None else None
