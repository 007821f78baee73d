"""The main job: load, resolve the recipe, walk the blocks, pack, measure, write. Plain calls, top to bottom."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy.typing as npt
import torch
import transformers
from torch import nn

from rarefy.allocate import allocate
from rarefy.artifact import STORED_DTYPES, check_output, write_artifact
from rarefy.calibrate.attention import fast_attention
from rarefy.calibrate.batch_norm import has_batch_norm, reestimate_batch_norm
from rarefy.calibrate.calls import Call
from rarefy.calibrate.data import Examples, fitting_length, gather
from rarefy.calibrate.gradients import Gradients, dense_gradients
from rarefy.calibrate.in_a_row import in_a_row
from rarefy.calibrate.inputs import example_calls
from rarefy.calibrate.losses import Loss
from rarefy.calibrate.precision import ComputeDtype, choose_dtype, explained
from rarefy.calibrate.rows import count_rows, count_tokens
from rarefy.calibrate.samples import samples_of
from rarefy.calibrate.statistics import GradientStatistic
from rarefy.checkpoint import (
    Checkpoint,
    can_resume,
    identity_of,
    open_checkpoint,
    partial_path,
    removed_if_hopeless,
)
from rarefy.core.errors import RecipeError, UnsupportedModelError, UsageError
from rarefy.core.results import Metric, RunReport
from rarefy.kernels import detect_cpu
from rarefy.layouts import AnyLayout
from rarefy.methods.allocation import ModelAllocation
from rarefy.models.load import load_model
from rarefy.models.loaded import LoadedModel, copied
from rarefy.models.structure import Structure
from rarefy.nn import find_weight, replace_linear
from rarefy.nn.biases import set_biases
from rarefy.plan import Plan, make_plan
from rarefy.recipe import Recipe, amounts_in_words, load_recipe, resolve
from rarefy.run_record import Clock, Facts, computation, documents
from rarefy.solve import Progress, Task, solve_model
from rarefy.verdict import Baseline, judge, measure_before


@final
@dataclass
class RunResult:
    """What a run gives back.

    Args:
        report: everything there is to say about it.
        layers: the packed layers by module name.
        tied: alias -> layer that shares its layout.
        path: the directory that was written, or None.
    """

    report: RunReport
    layers: dict[str, AnyLayout]
    tied: dict[str, str]
    path: Path | None
    _loaded: LoadedModel
    _biases: Mapping[str, torch.Tensor]
    _batch_norm: Mapping[str, torch.Tensor]
    _half: bool

    def model(self) -> nn.Module:
        """The compressed model in torch, ready to be called; computed with rarefy's kernels. A new one at each call.

        It gives what the artifact gives, whose other matrices are stored in the recipe's `rest_dtype`.
        """
        model = _packed_model(self._loaded, self.layers, self.tied, self._biases, half=self._half)
        for name, value in self._batch_norm.items():
            model.get_buffer(name).copy_(value)
        return model


def compress(
    source: str | os.PathLike[str] | nn.Module | LoadedModel,
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    *,
    calibration: str | os.PathLike[str] | Examples | None = None,
    labels: Iterable[Any] | None = None,
    loss: Loss | None = None,
    out: str | os.PathLike[str] | None = None,
    samples: int = 128,
    sequence_length: int = 512,
    seed: int = 0,
    evaluation: str | os.PathLike[str] | None = None,
    tokenizer: transformers.PreTrainedTokenizerBase | None = None,
    compute_dtype: ComputeDtype = "auto",
    announce: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
    measure: bool = True,
    force: bool = False,
) -> RunResult:
    """Compress a model.

    A run that is interrupted leaves the blocks that it has finished in `OUT.partial`, and the same call goes on after
    them; that takes a source and methods that can be recognised, which a module and methods of the caller cannot.

    Args:
        source: a Hugging Face directory, hub id or GGUF file; a module, of which a copy is compressed; or what
            `load_model` gave, to be used as it is.
        recipe: a recipe, its name or file, or its content.
        calibration: text (a file or directory) for language models; for any other module an iterable of example inputs,
            one batch each: a tensor, a tuple of arguments, or a dict of named ones. None: a built-in text.
        labels: of examples, for methods that take gradients: for each batch a tensor with a class or a number for every
            example in it. None: text has its own; elsewhere they are drawn from the model's prediction.
        loss: what those methods differentiate, a function of the model's output and the labels of a sample (or None) to
            a scalar; None: the negative log-likelihood (`rarefy.calibrate.losses`).
        out: the directory to write; None writes nothing.
        samples: windows of text, or examples, to calibrate with.
        sequence_length: tokens of a window.
        seed: of every random choice.
        evaluation: text to judge quality by; None: windows of the calibration text that calibration leaves out.
        tokenizer: for a module that takes text.
        compute_dtype: of the calibration's forward passes; "auto": bfloat16 where the CPU multiplies it in hardware.
        announce: given the plan before the work starts.
        progress: told how far each phase is.
        tell: told in one line of an interrupted run that was found, and of blocks that are not in a row.
        measure: whether to measure quality, size and speed before and after.
        force: replace `out` if it is a model directory, and start anew.

    Returns:
        The report, the packed layers and the path; `.model()` gives the compressed torch model.

    Raises:
        UsageError: a wrong path, recipe, option or calibration text (see its subclasses), before the work starts.
        DamagedFileError: a file of the model is damaged.
        NonFiniteError: a weight or activation is NaN or infinite.
        OutputError: the result could not be written; nothing is left behind.

    Notes:
        The same source, recipe, data, seed and machine give the same bytes of weights.
    """
    clock = Clock(progress)
    if samples < 1 or sequence_length < 2:
        raise UsageError("samples, sequence length", f"{samples}, {sequence_length}", allowed="at least 1, at least 2")
    parsed = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if out is not None:
        check_output(out, force=force, inputs=(source, recipe, calibration, evaluation))
        partial_path(out)
    with clock.phase("load"):
        loaded = _load(source)
        loaded.tokenizer = tokenizer or loaded.tokenizer
        structure = loaded.structure()
        layers = resolve(parsed, structure)
        _check_batch_norm(parsed, loaded)
        if out is not None or measure:
            _check_storable(loaded)
    dtype = choose_dtype(compute_dtype, loaded.model, detect_cpu())
    if calibration is not None and not isinstance(calibration, str | os.PathLike):
        calibration = list(itertools.islice(calibration, samples))
    if announce is not None:
        announce(_plan_of(loaded, structure, parsed, calibration, samples, sequence_length, dtype))
    with clock.phase("calibration data"):
        methods = [method for layer in layers for _, method in layer.steps]
        needs_data = (
            parsed.reestimate_batch_norm
            or any(method.needs() for method in methods)
            or any(step.looks_at() for step in parsed.steps)
        )
        data = gather(loaded, calibration, evaluation, samples, sequence_length, seed, needs_data, measure, labels)
    checkpoint: Checkpoint | None = None
    if out is not None and can_resume(loaded, parsed) and loss is None:
        own = [Call((each,), {}) for each in data.labels if each is not None]
        identity = identity_of(loaded, parsed, [*data.calls, *own], computation(dtype))
        checkpoint = open_checkpoint(partial_path(out), identity, force=force, tell=tell or (lambda _: None))
    baseline: Baseline | None = None
    if measure:
        with clock.phase("measure before"), explained(dtype, loaded.model), removed_if_hopeless(checkpoint):
            baseline = measure_before(loaded, data.held_out, data.windows_NL, source=data.source, dtype=dtype)
    steps_of = {layer.layer: [parsed.steps[place] for place in layer.places] for layer in layers}
    wanted = {name: [each for step in steps for each in step.statistics()] for name, steps in steps_of.items()}
    gradients: Gradients | None = None
    if any(isinstance(each, GradientStatistic) for own in wanted.values() for each in own):
        with (
            clock.phase("gradients"),
            fast_attention(),
            removed_if_hopeless(checkpoint),
            explained(dtype, loaded.model),
        ):
            gradients = dense_gradients(
                loaded,
                structure,
                wanted,
                data,
                dtype=dtype,
                loss=loss,
                seed=seed,
                directory=_beside(out),
                progress=progress,
            )
    reads = {each for own in wanted.values() for each in own} | {each for method in methods for each in method.needs()}
    if not structure.in_one_pass and not all(isinstance(each, GradientStatistic) for each in reads):
        with (
            clock.phase("order of blocks"),
            fast_attention(),
            removed_if_hopeless(checkpoint),
            explained(dtype, loaded.model),
        ):
            blocks = {block.name: block.stack for block in structure.blocks}
            first = samples_of(data.calls[:1], [None])[0].call
            structure = replace(structure, tangled=not in_a_row(loaded, blocks, first, dtype))
        if structure.tangled and tell is not None:
            tell("The model's blocks do not follow one another: statistics are those of the dense model, in one pass.")
    if any(isinstance(step.allocation, ModelAllocation) for step in parsed.steps):
        with clock.phase("allocate"), fast_attention(), removed_if_hopeless(checkpoint), explained(dtype, loaded.model):
            layers = allocate(
                loaded,
                structure,
                parsed,
                layers,
                data.calls,
                dtype=dtype,
                gradients=gradients,
                checkpoint=checkpoint,
                progress=progress,
            )
    tasks = [Task(layer.layer, layer.steps) for layer in layers]
    with clock.phase("compress"), fast_attention(), removed_if_hopeless(checkpoint), explained(dtype, loaded.model):
        solved = solve_model(
            loaded,
            structure,
            tasks,
            data.calls,
            dtype=dtype,
            float_format="bf16" if parsed.rest_dtype == "bfloat16" else "f32",
            progress=progress,
            checkpoint=checkpoint,
            gradients=gradients,
        )
        del gradients  # and its scratch file
    tied = {layer.name: layer.tied_to for layer in structure.layers if layer.tied_to in solved.layouts}
    half = parsed.rest_dtype == "bfloat16"
    tensors = _rest(loaded, solved.layouts, structure, solved.biases, half=half)
    tensors |= {name: bias_O.numpy() for name, bias_O in solved.biases.items()}
    batch_norm: dict[str, torch.Tensor] = {}
    if parsed.reestimate_batch_norm:
        with clock.phase("batch norm"):
            packed = _packed_model(loaded, solved.layouts, tied, solved.biases, half=half)
            batch_norm = reestimate_batch_norm(packed, data.calls)
            del packed
        tensors |= {name: value.numpy() for name, value in batch_norm.items()}
    amounts = amounts_in_words(parsed, layers, final=True)
    facts = Facts(loaded, structure, parsed, seed, data, dtype, solved, amounts)

    def write(path: Path, extra: Mapping[str, bytes]) -> None:
        write_artifact(
            path,
            config=loaded.config or {"architectures": [loaded.architecture]},
            layers=solved.layouts,
            tied=tied,
            tensors=tensors,
            extra_files={**loaded.companions, **extra},
            force=force,
        )

    metrics: tuple[Metric, ...] = ()
    warnings: tuple[str, ...] = ()
    if baseline is not None:
        with clock.phase("measure after"), _scratch(out) as scratch:
            write(scratch / "artifact", {})
            metrics, warnings = judge(
                loaded,
                baseline,
                scratch / "artifact",
                solved.layouts,
                tied,
                solved.biases,
                tick=clock.detail("measure after"),
            )
    report = facts.report(metrics, warnings, clock.seconds)
    path: Path | None = None
    if out is not None:
        with clock.phase("write"):
            path = Path(out)
            write(path, documents(report, parsed))
        if checkpoint is not None:
            checkpoint.remove()
    return RunResult(report, solved.layouts, tied, path, loaded, solved.biases, batch_norm, half)


def _packed_model(
    loaded: LoadedModel,
    layouts: Mapping[str, AnyLayout],
    tied: Mapping[str, str],
    biases: Mapping[str, torch.Tensor],
    *,
    half: bool,
) -> nn.Module:
    """A new module with the packed layers in their places, and all else as `_rest` has it stored."""
    loaded.materialize("")
    model = copied(loaded.model).eval()
    loaded.release("")
    packed = {find_weight(model, layer).parameter_name for layer in (*layouts, *tied)}
    if half:
        for name, tensor in model.state_dict().items():
            if name not in packed and _stored_half(tensor):
                tensor.copy_(tensor.to(torch.bfloat16))
    replace_linear(model, layouts, tied)
    set_biases(model, biases)
    return model


def _stored_half(tensor: torch.Tensor) -> bool:
    """Whether `rest_dtype: bfloat16` is for a tensor: matrices, and what has more axes."""
    return tensor.is_floating_point() and tensor.ndim >= 2


def _load(source: str | os.PathLike[str] | nn.Module | LoadedModel) -> LoadedModel:
    if isinstance(source, LoadedModel):
        return source
    return load_model(copied(source) if isinstance(source, nn.Module) else source, stream=True)


def plan(
    source: str | os.PathLike[str] | nn.Module,
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    *,
    calibration: str | os.PathLike[str] | Examples | None = None,
    samples: int = 128,
    sequence_length: int = 512,
    compute_dtype: ComputeDtype = "auto",
) -> Plan:
    """Say what `compress` would do with the same arguments, without reading a weight.

    Of example inputs the first is run, which shows how many rows layers meet; where the weights are on disk, its shape.

    Raises:
        UsageError: a wrong path, recipe or option (see its subclasses).
        DamagedFileError: a file of the model is damaged.
    """
    parsed = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    loaded = load_model(source, stream=True)
    _check_batch_norm(parsed, loaded)
    dtype = choose_dtype(compute_dtype, loaded.model, detect_cpu())
    return _plan_of(loaded, loaded.structure(), parsed, calibration, samples, sequence_length, dtype)


def _check_batch_norm(recipe: Recipe, loaded: LoadedModel) -> None:
    if recipe.reestimate_batch_norm and not has_batch_norm(loaded.model):
        raise RecipeError("reestimate_batch_norm", f"{loaded.architecture} has no batch norm", allowed="false")


def _check_storable(loaded: LoadedModel) -> None:
    """Refuse a tensor that the artifact has no type for before the work, and not when it is to be written."""
    for name, tensor in loaded.model.state_dict(keep_vars=True).items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if not tensor.is_floating_point() and dtype not in STORED_DTYPES:
            raise UnsupportedModelError(
                f"tensor {name}",
                f"dtype {dtype}, which an artifact cannot store",
                hint="if the model computes it anew, register it with persistent=False",
            )


def _plan_of(
    loaded: LoadedModel,
    structure: Structure,
    recipe: Recipe,
    calibration: str | os.PathLike[str] | Examples | None,
    samples: int,
    sequence_length: int,
    dtype: torch.dtype,
) -> Plan:
    length, _ = fitting_length(loaded, sequence_length)
    num_rows: Mapping[str, int] | None = None
    if calibration is not None and not isinstance(calibration, str | os.PathLike):
        calls = example_calls(calibration, samples)
        num_rows = count_rows(loaded.model, calls)
        num_tokens = count_tokens(calls) if num_rows is None else None
        if num_tokens is not None:
            samples, length = len(calls), round(num_tokens / len(calls))
    half = dtype == torch.bfloat16
    return make_plan(recipe, structure, num_samples=samples, sequence_length=length, bfloat16=half, num_rows=num_rows)


def _rest(
    loaded: LoadedModel,
    layouts: Mapping[str, AnyLayout],
    structure: Structure,
    biases: Mapping[str, torch.Tensor],
    *,
    half: bool,
) -> dict[str, npt.NDArray[Any]]:
    """Every tensor that no layout holds: matrices in bfloat16 (if half), vectors in float32, integers as they are."""
    tied = (layer.name for layer in structure.layers if layer.tied_to is not None)
    packed = {find_weight(loaded.model, layer).parameter_name for layer in (*layouts, *tied)}
    rest: dict[str, npt.NDArray[Any]] = {}
    held = loaded.model.state_dict(keep_vars=True)
    corrected = {id(held[name]) for name in biases if name in held}
    for name, parameter in held.items():
        if name in packed or id(parameter) in corrected:  # of a module with several names as well
            continue
        tensor = loaded.read(name)
        if half and _stored_half(tensor):
            rest[name] = tensor.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
        else:
            rest[name] = tensor.contiguous().numpy()
    return rest


@contextlib.contextmanager
def _scratch(out: str | os.PathLike[str] | None) -> Iterator[Path]:
    """A directory for the result while it is measured: beside `out`, where there is room for it."""
    with tempfile.TemporaryDirectory(prefix=".rarefy-", dir=_beside(out)) as scratch:
        yield Path(scratch)


def _beside(out: str | os.PathLike[str] | None) -> Path | None:
    """The directory that is there already on the way to `out`; None where nothing is to be written."""
    parent = None if out is None else Path(os.path.realpath(out)).parent
    while parent is not None and not parent.is_dir():
        parent = parent.parent
    return parent
