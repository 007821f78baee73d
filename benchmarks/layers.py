"""Convolutions and recurrent layers: torch in float32 beside rarefy's packed ones, interleaved, each result checked.

    python benchmarks/layers.py [--threads N] [--rounds N] [--few-outputs | --recurrent UNITS ...]

Prints a table of milliseconds (median of the rounds) and how many times faster than torch each is. Channels last is the
memory format of inputs and outputs that saves the packed layers a transposition on both sides; torch gets the same.
With --few-outputs: depthwise convolutions and small groups instead. With --recurrent: LSTM and GRU of so many units and
inputs, 64 steps of 1, 8 and 32 sequences, beside torch's dynamic quantization to int8 too.
"""

import argparse
import copy
import time
import warnings
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

Pack = Callable[[np.ndarray], AnyLayout]


def integers(num_bits: int, zeros: float = 0.0) -> Pack:
    """Layouts of codes with a scale for 64; the smallest weights become zero."""
    spec = IntGrid(num_bits, 64, True)

    def make(weight: np.ndarray) -> AnyLayout:
        grid = fit_minmax(weight, spec)
        value = dequantize(quantize(weight, grid), grid)
        if zeros == 0:
            return pack(Solution(value, None, None, grid))
        mask = np.abs(weight) > np.quantile(np.abs(weight), zeros)
        return pack(Solution(np.where(mask, value, np.float32(0)), mask, Unstructured(zeros), grid))

    return make


def bfloat16(weight: np.ndarray) -> AnyLayout:
    return pack(Solution.dense(weight))


LAYOUTS: dict[str, Pack] = {"int8": integers(8), "50 % zeros int8": integers(8, 0.5), "bf16": bfloat16}
RECURRENT: dict[str, Pack] = {
    "int8": integers(8),
    "int4": integers(4),
    "bf16": bfloat16,
    "80 % zeros int8": integers(8, 0.8),
}
PEER = "torch int8"


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


def recurrent_cases(units: list[int]) -> list[Case]:
    return [
        Case(f"{kind.__name__} {size}, 64 steps, batch {batch}", kind(size, size), torch.randn(64, batch, size))
        for size in units
        for kind in (nn.LSTM, nn.GRU)
        for batch in (1, 8, 32)
    ]


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


def contestants(case: Case, layouts: Mapping[str, Pack]) -> list[Contestant]:
    plain = case.module.eval()
    found = [Contestant("torch", plain, case.x)]
    if layouts is RECURRENT:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch moves it to another package
            quantize_dynamic = torch.ao.quantization.quantize_dynamic
            peer = quantize_dynamic(nn.Sequential(copy.deepcopy(plain)), {type(plain)}, dtype=torch.qint8)
        found.append(Contestant(PEER, peer[0], case.x))
    for name, layout_of in layouts.items():
        model = nn.Sequential(copy.deepcopy(plain))
        matrices = {weight.layer: weight.read().contiguous().numpy() for weight in all_weights(model)}
        replace_linear(model, {layer: layout_of(matrix) for layer, matrix in matrices.items()})
        if name in ("int8", "bf16"):  # others are other functions
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
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--few-outputs", action="store_true", help="depthwise convolutions and small groups")
    instead.add_argument("--recurrent", type=int, nargs="+", metavar="UNITS", help="recurrent layers of these sizes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{arguments.threads} threads; ms, and times faster than torch float32 (median of {arguments.rounds} rounds)")
    layouts = RECURRENT if arguments.recurrent else LAYOUTS
    names = [PEER, *layouts] if arguments.recurrent else list(layouts)
    print(f"{'':30} {'torch':>8} " + " ".join(f"{name:>16}" for name in names))
    if arguments.recurrent:
        chosen = recurrent_cases(arguments.recurrent)
    else:
        chosen = cases_of_few_outputs() if arguments.few_outputs else cases()
    for case in chosen:
        timings = interleave(contestants(case, layouts), rounds=arguments.rounds, warmup=2)
        cells = [
            f"{1e3 * timings.seconds(name, 'call').median:8.3f} {timings.ratio(name, 'torch', 'call').median:6.2f}x"
            for name in names
        ]
        print(f"{case.name:30} {1e3 * timings.seconds('torch', 'call').median:8.3f} " + "  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
