"""Convolutions and recurrent layers: torch in float32 beside rarefy's packed ones, interleaved, each result checked.

    python benchmarks/layers.py [--threads N] [--rounds N] [--few-outputs]

Prints a table of milliseconds (median of the rounds) and how many times faster than torch each is. Channels last is the
memory format of inputs and outputs that saves the packed layers a transposition on both sides; torch gets the same.
With --few-outputs the cases are depthwise convolutions and small groups instead.
"""

import argparse
import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.core.grids import IntGrid, dequantize, fit_minmax, quantize
from rarefy.core.patterns import Unstructured
from rarefy.core.solution import Solution
from rarefy.kernels import set_num_threads
from rarefy.layouts import AnyLayout, pack
from rarefy.measure.latency import interleave
from rarefy.nn import all_weights, replace_linear

GRID = IntGrid(8, 64, True)


def int8(weight: np.ndarray) -> AnyLayout:
    grid = fit_minmax(weight, GRID)
    return pack(Solution(dequantize(quantize(weight, grid), grid), None, None, grid))


def sparse_int8(weight: np.ndarray) -> AnyLayout:
    grid = fit_minmax(weight, GRID)
    mask = np.abs(weight) > np.median(np.abs(weight))
    value = np.where(mask, dequantize(quantize(weight, grid), grid), np.float32(0))
    return pack(Solution(value, mask, Unstructured(0.5), grid))


def bfloat16(weight: np.ndarray) -> AnyLayout:
    return pack(Solution.dense(weight))


LAYOUTS: dict[str, Callable[[np.ndarray], AnyLayout]] = {
    "int8": int8,
    "50 % zeros int8": sparse_int8,
    "bf16": bfloat16,
}


@dataclass(frozen=True)
class Case:
    name: str
    module: nn.Module
    x: Tensor


def cases() -> list[Case]:
    conv, last = nn.Conv2d, torch.channels_last
    return [
        Case("conv 64-64 3x3, 8 x 32x32", conv(64, 64, 3, padding=1), torch.randn(8, 64, 32, 32)),
        Case("  channels last", conv(64, 64, 3, padding=1), torch.randn(8, 64, 32, 32).to(memory_format=last)),
        Case("conv 256-256 3x3, 8 x 14x14", conv(256, 256, 3, padding=1), torch.randn(8, 256, 14, 14)),
        Case("  channels last", conv(256, 256, 3, padding=1), torch.randn(8, 256, 14, 14).to(memory_format=last)),
        Case("  one image", conv(256, 256, 3, padding=1), torch.randn(1, 256, 14, 14)),
        Case("conv 256-1024 1x1, 8 x 14x14", conv(256, 1024, 1), torch.randn(8, 256, 14, 14).to(memory_format=last)),
        Case("conv 128-128 3x3, 32 groups", conv(128, 128, 3, padding=1, groups=32), torch.randn(8, 128, 28, 28)),
        Case("conv 192 depthwise 3x3", conv(192, 192, 3, padding=1, groups=192), torch.randn(8, 192, 28, 28)),
        Case("conv1d 384-384 k3 s2, 3000", nn.Conv1d(384, 384, 3, 2, 1), torch.randn(1, 384, 3000)),
        Case("LSTM 512, 50 steps, batch 1", nn.LSTM(512, 512), torch.randn(50, 1, 512)),
        Case("LSTM 512, 50 steps, batch 16", nn.LSTM(512, 512), torch.randn(50, 16, 512)),
        Case("GRU 512, 50 steps, batch 1", nn.GRU(512, 512), torch.randn(50, 1, 512)),
    ]


def cases_of_few_outputs() -> list[Case]:
    """Of MobileNet, EfficientNet, ConvNeXt, Mamba, Conformer and ResNeXt: 1 and 8 images, each in both formats."""
    found = []
    for batch in (1, 8):
        for kernel, channels, size, stride in (
            (3, 32, 112, 1), (3, 144, 56, 2), (3, 192, 28, 1), (3, 384, 14, 1),
            (3, 960, 7, 1), (5, 672, 14, 1), (7, 96, 56, 1), (7, 384, 14, 1),
        ):  # fmt: skip
            module = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels)
            found.append((f"{batch} x {channels} {kernel}x{kernel} {size}x{size} s{stride}", module, size, batch))
        for width, size in ((4, 56), (8, 28)):
            module = nn.Conv2d(32 * width, 32 * width, 3, padding=1, groups=32)
            found.append((f"{batch} x 32 groups of {width} {size}x{size}", module, size, batch))
    made = []
    for name, module, size, batch in found:
        x = torch.randn(batch, module.in_channels, size, size)
        made += [Case(name, module, x), Case("  channels last", module, x.to(memory_format=torch.channels_last))]
    for batch in (1, 8):
        mamba = nn.Conv1d(1536, 1536, 4, padding=3, groups=1536)
        conformer = nn.Conv1d(256, 256, 31, padding=15, groups=256)
        made.append(Case(f"{batch} x 1536 k4, 512", mamba, torch.randn(batch, 1536, 512)))
        made.append(Case(f"{batch} x 256 k31, 500", conformer, torch.randn(batch, 256, 500)))
    return made


@dataclass(frozen=True)
class Contestant:
    name: str
    module: nn.Module
    x: Tensor

    def run(self) -> Mapping[str, float]:
        with torch.inference_mode():
            start = time.perf_counter()
            self.module(self.x)
            return {"call": time.perf_counter() - start}


def contestants(case: Case) -> list[Contestant]:
    plain = case.module.eval()
    found = [Contestant("torch", plain, case.x)]
    for name, layout_of in LAYOUTS.items():
        model = nn.Sequential(copy.deepcopy(plain))
        matrices = {weight.layer: weight.read().contiguous().numpy() for weight in all_weights(model)}
        replace_linear(model, {layer: layout_of(matrix) for layer, matrix in matrices.items()})
        if name != "50 % zeros int8":  # that one is another function
            check(plain, model[0], case.x)
        found.append(Contestant(name, model[0], case.x))
    return found


def check(plain: nn.Module, packed: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        expected, got = (y[0] if isinstance(y, tuple) else y for y in (plain(x), packed(x)))
    error = float((got - expected).norm() / expected.norm())
    if not error < 0.02:
        raise SystemExit(f"{packed} is off by {error:.3f}: its time means nothing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--few-outputs", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{arguments.threads} threads; ms, and times faster than torch float32 (median of {arguments.rounds} rounds)")
    print(f"{'':30} {'torch':>8} " + " ".join(f"{name:>16}" for name in LAYOUTS))
    for case in cases_of_few_outputs() if arguments.few_outputs else cases():
        timings = interleave(contestants(case), rounds=arguments.rounds, warmup=2)
        cells = [
            f"{1e3 * timings.seconds(name, 'call').median:8.3f} {timings.ratio(name, 'torch', 'call').median:6.2f}x"
            for name in LAYOUTS
        ]
        print(f"{case.name:30} {1e3 * timings.seconds('torch', 'call').median:8.3f} " + "  ".join(cells))


if __name__ == "__main__":
    main()
