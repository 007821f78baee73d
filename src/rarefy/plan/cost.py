"""What work costs on this machine. Shape suffixes: O out, I in, T tokens."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch

from rarefy.calibrate.statistics import GradientStatistic, Statistic
from rarefy.methods import (
    ALPS,
    ASVD,
    DRONE,
    GPTQ,
    OATS,
    OBERT,
    SVD,
    SVDLLM,
    SVT,
    FrequencySVD,
    Lasso,
    LayerMethod,
    Refit,
    RobustPCA,
    ScaledGD,
    SparseGPT,
    Spatial,
    Tucker,
)
from rarefy.recipe import LayerPlan

# One column of the sweep: a dozen small torch calls.
_SECONDS_PER_COLUMN = 25e-6
# Elementwise passes over the weights of a method without a sweep.
_SECONDS_PER_WEIGHT = 30e-9
# One such pass, in the middle of an iteration.
_SECONDS_PER_PASS = 1.5e-9
# Iterations until no zero moves any more, on SmolLM2-135M.
_ALPS_STEPS = 35
_NUM_PROBES = 12
_PAUSE_SECONDS = 0.01
# Wall time beyond so many times the processor's time is no passing load: there are fewer processors than threads.
_MOST_LOST = 4.0


@final
@dataclass(frozen=True)
class Rates:
    """How fast this machine multiplies matrices.

    Args:
        float32_flops: per second.
        bfloat16_flops: per second.
    """

    float32_flops: float
    bfloat16_flops: float


def measure_rates() -> Rates:
    """Time a product of (512, 576) by (576, 1536) in both types; takes about a third of a second.

    The rates are those of a quiet machine: the best of several probes of a few milliseconds each, with pauses between
    them, and of each the time that the processor spent on it, without that which it gave to others meanwhile.
    """
    return Rates(_flops(torch.float32), _flops(torch.bfloat16))


def _flops(dtype: torch.dtype) -> float:
    x_TI, weight_IO = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
    # Made once: fresh memory for every result would be timed too, and takes as long as the product.
    y_TO = torch.mm(x_TI, weight_IO)
    wall, processor = [], []
    for _ in range(_NUM_PROBES):
        start, start_processor = time.perf_counter(), time.process_time()
        torch.mm(x_TI, weight_IO, out=y_TO)
        processor.append((time.process_time() - start_processor) / torch.get_num_threads())
        wall.append(time.perf_counter() - start)
        time.sleep(_PAUSE_SECONDS)
    return 2 * 512 * 576 * 1536 / max(min(processor), min(wall) / _MOST_LOST)


def solve_seconds(layer: LayerPlan, rates: Rates) -> float:
    """Time of a layer's methods."""
    return sum(_method_seconds(method, *layer.shape, rates) for _, method in layer.steps)


def _method_seconds(method: LayerMethod, rows: int, width: int, rates: Rates) -> float:
    product = 2 * rows * width * width / rates.float32_flops
    # Cholesky and a triangular inverse in float64, which runs at half the speed; shared by layers with the same inputs
    sweep = product / 2 + width * _SECONDS_PER_COLUMN + 2 * width**3 / rates.float32_flops
    search = 11 * rows * width * 4e-9
    match method:
        case SparseGPT():
            rounding = 0.0 if method.values is None else search + (sweep if method.refit_steps else 0.0)
            return sweep + (method.refit_steps + 1) * product + rounding
        case GPTQ():
            return sweep + search
        case ALPS():
            # each iteration is a product, and twelve passes over the weights; every third inverts a matrix
            inverse = 2 * width**3 / rates.float32_flops
            passes = 12 * rows * width * _SECONDS_PER_PASS
            return _ALPS_STEPS * (product + passes + inverse / 3) + method.refit_steps * product
        case Lasso():
            return (method.num_steps + method.refit_steps) * (product + 8 * rows * width * _SECONDS_PER_PASS)
        case OBERT():
            # every weight of a block in turn, once to score and once to drop, over the columns that are left
            return 20 * rows * width * method.block_size * _SECONDS_PER_PASS
        case Refit():
            return method.num_steps * product
        case SVD() | SVT() | ASVD() | SVDLLM() | DRONE() | FrequencySVD() | Spatial() | Tucker():
            return _decomposition_seconds(rows, width, rates) + 2 * product
        case ScaledGD():
            rank = method.rank.most((rows, width))
            step = 2 * rank * width * (width + 2 * rows) / rates.float32_flops
            return _decomposition_seconds(rows, width, rates) + 2 * product + method.num_steps * step
        case OATS():
            step = 4 * rows * width * (method.rank.most((rows, width)) / rates.float32_flops + 2 * _SECONDS_PER_PASS)
            return method.num_steps * step + 2 * _decomposition_seconds(rows, width, rates)
        case RobustPCA():
            return method.max_steps * 2 * _decomposition_seconds(rows, width, rates)
        case _:
            return rows * width * _SECONDS_PER_WEIGHT + (sweep if method.needs() and not _is_cheap(method) else 0.0)


def _decomposition_seconds(rows: int, width: int, rates: Rates) -> float:
    """Time of the eigenvectors of the smaller side, in float64."""
    return 20 * min(rows, width) ** 3 / rates.float32_flops


def _is_cheap(method: LayerMethod) -> bool:
    """Whether a method needs one number per input at most, or gradients, so that it solves no system of H."""
    return _are_vectors(method.needs())


def _are_vectors(statistics: Sequence[Statistic]) -> bool:
    return all(
        isinstance(statistic, GradientStatistic) or statistic.finish(statistic.init(2)).ndim < 2
        for statistic in statistics
    )


def num_walks(statistics: Sequence[Statistic]) -> int:
    """How often an allocation walks through the dense model for these; vectors are kept for a second look."""
    of_inputs = [statistic for statistic in statistics if not isinstance(statistic, GradientStatistic)]
    return 0 if not of_inputs else 1 if _are_vectors(of_inputs) else 2


def gram_seconds(width: int, num_tokens: int, flops: float) -> float:
    """Time of X X^T for one layer's inputs at a rate; half of it, by symmetry."""
    return width * width * num_tokens / flops
