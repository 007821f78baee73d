"""Batch norm after compression: the means and variances of what the changed layers give. Shape suffix: C channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rarefy.calibrate.calls import Call, calibration_mode
from rarefy.core.errors import CalibrationError, NonFiniteError


@final
@dataclass
class _Moments:
    """Sums over all values of a channel, in float64."""

    count: int
    total_C: Tensor
    squares_C: Tensor


def has_batch_norm(model: nn.Module) -> bool:
    """Whether there are statistics to estimate."""
    return any(_has_statistics(module) for module in model.modules())


def reestimate_batch_norm(
    model: nn.Module, calls: Sequence[Call], *, tick: Callable[[], None] = lambda: None
) -> dict[str, Tensor]:
    """Estimate the statistics of all batch norms of a model anew.

    One pass over the batches in which every batch norm normalises by the statistics of the batch, as in training, while
    all else is as in evaluation; the mean and the variance of what each was given over all batches are the result.

    Args:
        model: the module, which is as before afterwards.
        calls: its arguments, one entry per batch; of more than one example each.
        tick: called after each batch.

    Returns:
        The values of the buffers `running_mean` and `running_var`, float32, by their full names.

    Raises:
        CalibrationError: a batch has one value per channel only.
        NonFiniteError: what a batch norm was given is NaN or infinite.

    References:
        Wu and Johnson, Rethinking "Batch" in BatchNorm, arXiv:2105.07576, section 3.1 (PreciseBN).
    """
    modules = {name: module for name, module in model.named_modules() if _has_statistics(module)}
    moments: dict[str, _Moments] = {}
    buffers = {name: {key: value.clone() for key, value in module._buffers.items()} for name, module in modules.items()}
    handles = [module.register_forward_pre_hook(_hook(name, moments)) for name, module in modules.items()]
    try:
        with calibration_mode(model):
            for module in modules.values():
                module.train()
            for call in calls:
                try:
                    model(*call.args, **call.kwargs)
                except ValueError as error:
                    if "more than 1 value per channel" not in str(error):
                        raise
                    found = "a batch of one example, which has no variance"
                    raise CalibrationError("batch norm", found, hint="give batches of several examples") from None
                tick()
    finally:
        for handle in handles:
            handle.remove()
        for name, own in buffers.items():
            for key, value in own.items():
                modules[name]._buffers[key] = value
    estimated = {}
    for name, sums in moments.items():
        mean_C = sums.total_C / sums.count
        variance_C = (sums.squares_C / sums.count - mean_C.square()).clamp(min=0) * sums.count / max(1, sums.count - 1)
        if not bool(torch.isfinite(variance_C).all()):
            raise NonFiniteError(
                f"layer {name}", "its inputs are NaN or infinite", hint="the compressed model overflows"
            )
        estimated[f"{name}.running_mean"] = mean_C.float()
        estimated[f"{name}.running_var"] = variance_C.float()
    return estimated


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None


def _hook(name: str, moments: dict[str, _Moments]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().double().transpose(0, 1).flatten(1)
        found = _Moments(x.shape[1], x.sum(1), x.square().sum(1))
        own = moments.setdefault(name, _Moments(0, torch.zeros_like(found.total_C), torch.zeros_like(found.total_C)))
        own.count += found.count
        own.total_C += found.total_C
        own.squares_C += found.squares_C

    return before
