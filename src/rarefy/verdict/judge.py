"""What a run gained and what it cost: the same measurements before and after."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from rarefy.core.errors import UnsupportedModelError
from rarefy.core.results import Metric
from rarefy.engine import Engine
from rarefy.layouts import AnyLayout
from rarefy.measure.measurement import Measurement, compare, exact
from rarefy.measure.size import disk_bytes
from rarefy.measure.worker import Worker
from rarefy.models.loaded import LoadedModel, copied
from rarefy.nn import replace_linear
from rarefy.nn.biases import set_biases
from rarefy.verdict.quality import ENGINE, Baseline, quality
from rarefy.verdict.speed import original, speed


def judge(
    loaded: LoadedModel,
    baseline: Baseline,
    artifact: Path,
    layouts: Mapping[str, AnyLayout],
    tied: Mapping[str, str],
    biases: Mapping[str, torch.Tensor],
    *,
    tick: Callable[[str], None],
) -> tuple[tuple[Metric, ...], tuple[str, ...]]:
    """Measure the compressed model beside the original.

    Args:
        loaded: the model; what it holds has the shapes, if not the weights, of the original.
        baseline: from `measure_before`.
        artifact: the directory with the compressed model.
        layouts: its packed layers.
        tied: alias -> layer that shares its layout.
        biases: that were corrected, by name.
        tick: told what is measured next.

    Returns:
        The metrics, and warnings about what could not be measured.
    """
    with original(loaded, baseline) as before:
        return _judge(loaded, baseline, before, artifact, layouts, tied, biases, tick)


def _judge(
    loaded: LoadedModel,
    baseline: Baseline,
    before: Worker | None,
    artifact: Path,
    layouts: Mapping[str, AnyLayout],
    tied: Mapping[str, str],
    biases: Mapping[str, torch.Tensor],
    tick: Callable[[str], None],
) -> tuple[tuple[Metric, ...], tuple[str, ...]]:
    warnings: list[str] = []
    engine: Engine | None = None
    if baseline.role != "other":
        try:
            engine = Engine(artifact)
        except UnsupportedModelError as error:
            # The report is published; where the artifact lay while it was measured is nobody's business.
            why = str(error).replace(f"{artifact}{os.sep}", "")
            warnings.append(f"rarefy's engine does not run this model ({why}); measured with torch instead")
    packed = None if engine is not None else _packed_model(loaded, layouts, tied, biases)
    metrics = [_size(loaded, artifact), _weight_bytes(loaded, engine, packed, layouts)]
    # First, while the original is being loaded: company does not change its result.
    tick("quality")
    judged = quality(baseline, engine, packed)
    tick("speed")
    metrics.extend(speed(loaded, baseline, before, engine, packed))
    if judged is None:
        warnings.append("quality was not measured: no calibration data was left over to judge it by")
    else:
        metrics.append(judged)
    return tuple(metrics), tuple(warnings)


def _packed_model(
    loaded: LoadedModel,
    layouts: Mapping[str, AnyLayout],
    tied: Mapping[str, str],
    biases: Mapping[str, torch.Tensor],
) -> nn.Module:
    """A copy of the model that computes with the packed layers."""
    loaded.materialize("")
    packed = copied(loaded.model).eval()
    loaded.release("")
    replace_linear(packed, layouts, tied)
    set_biases(packed, biases)
    return packed


def _size(loaded: LoadedModel, artifact: Path) -> Metric:
    after = disk_bytes(artifact)
    if loaded.kind == "module":
        words = "weights of the module in memory"
        before = Measurement("disk_bytes", "bytes", False, exact(loaded.stored_bytes()), words)
    else:
        before = disk_bytes(loaded.path)
    return compare(before, after)


def _weight_bytes(
    loaded: LoadedModel,
    engine: Engine | None,
    packed: nn.Module | None,
    layouts: Mapping[str, AnyLayout],
) -> Metric:
    """Bytes of weights that a running model holds: transformers in float32 before, the runtime after."""
    before = sum(p.numel() for p in loaded.model.parameters()) * 4
    if engine is not None:
        after, words = engine.nbytes, ENGINE
    else:
        assert packed is not None
        after = sum(layout.nbytes for layout in layouts.values())
        after += sum(p.numel() * p.element_size() for p in packed.parameters())
        words = "torch with packed layers"
    how = f"weights in memory; before: float32 in torch; after: {words}"
    return Metric("weight_bytes", "bytes", False, exact(before), exact(after), how)
