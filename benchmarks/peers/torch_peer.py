"""PyTorch: float32, bfloat16, dynamically quantized int8, and its weight-only int8 and int4 products."""

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch

from peers.problem import GROUP_SIZE, Contestant, Problem


def contestants(problem: Problem) -> Iterator[Contestant]:
    torch.set_num_threads(problem.num_threads)
    warnings.filterwarnings("ignore", message=".*deprecated.*")
    torch.backends.quantized.engine = "onednn"  # the fastest of its engines where it exists
    x = torch.from_numpy(problem.x_TI)
    x_bf16 = x.bfloat16()
    size = problem.num_outputs * problem.num_inputs
    linear = torch.nn.functional.linear

    def weight(copy: int) -> torch.Tensor:
        return torch.from_numpy(problem.weight(copy))

    def per_channel(copy: int) -> torch.ScriptObject:
        scales = torch.from_numpy(problem.scale(copy)).double()
        zeros = torch.zeros(problem.num_outputs, dtype=torch.int64)
        quantized = torch.quantize_per_channel(weight(copy), scales, zeros, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(quantized, None)

    def int8(copy: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(problem.level(copy)), torch.from_numpy(problem.scale(copy)).bfloat16()

    def int4(copy: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.from_numpy(problem.level(copy).astype(np.int32) + 8)
        scales = torch.from_numpy(problem.group_scales(copy).T.copy())
        both = torch.stack([scales, torch.zeros_like(scales)], 2).bfloat16().contiguous()
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), both

    make: list[tuple[str, str, int, Callable, Callable]] = [
        ("float32", "linear", 4 * size, weight, lambda w: linear(x, w)),
        ("bfloat16", "linear, activations in bfloat16", 2 * size, lambda k: weight(k).bfloat16(),
         lambda w: linear(x_bf16, w)),
        ("int8", "dynamic, onednn engine", size, per_channel, lambda w: torch.ops.quantized.linear_dynamic(x, w)),
        ("int8 weight-only", "_weight_int8pack_mm, activations in bfloat16", size, int8,
         lambda w: torch.ops.aten._weight_int8pack_mm(x_bf16, *w)),
        ("int4 weight-only", "_weight_int4pack_mm_for_cpu, activations in bfloat16",
         size // 2 + 4 * size // GROUP_SIZE, int4,
         lambda w: torch.ops.aten._weight_int4pack_mm_for_cpu(x_bf16, w[0], GROUP_SIZE, w[1])),
    ]  # fmt: skip
    for values, note, weight_bytes, prepare, multiply in make:
        count = problem.num_copies(weight_bytes)
        copies = [prepare(copy) for copy in range(count)]

        def run(copies: list = copies, multiply: Callable = multiply) -> list[torch.Tensor]:
            with torch.inference_mode():
                return [multiply(copy) for copy in copies]

        yield Contestant("torch", values, note, weight_bytes, count, run, lambda ys: [y.float().numpy() for y in ys])
