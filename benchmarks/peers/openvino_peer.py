"""OpenVINO: one model that multiplies the same input with every copy of the weight."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from peers.problem import GROUP_SIZE, Contestant, Missing, Problem

# Activations in 8 bits per group, as rarefy has them; float32 otherwise. It is the fastest of its settings for these.
_DYNAMIC = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(GROUP_SIZE)}


def contestants(problem: Problem) -> Iterator[Contestant | Missing]:
    size = problem.num_outputs * problem.num_inputs
    kept: list[np.ndarray] = []  # a tensor of 4-bit values does not keep the array that it was made from

    def float32(copy: int) -> ov.Node:
        return ops.constant(problem.weight(copy))

    def int8(copy: int, zeros: str = "") -> ov.Node:
        codes = ops.convert(ops.constant(problem.level(copy, zeros)), "f32")
        return ops.multiply(codes, ops.constant(problem.scale(copy)[:, None]))

    def int4(copy: int) -> ov.Node:
        shape = ov.Shape([problem.num_outputs, problem.num_inputs // GROUP_SIZE, GROUP_SIZE])
        kept.append(problem.nibbles(problem.level(copy)).reshape(-1))
        codes = ops.convert(ops.constant(ov.Tensor(kept[-1], shape, ov.Type.i4)), "f16")
        scales = ops.constant(problem.group_scales(copy)[:, :, None].astype(np.float16))
        whole = ops.reshape(
            ops.multiply(codes, scales), np.array([problem.num_outputs, problem.num_inputs]), special_zero=False
        )
        return ops.convert(whole, "f32")

    make: list[tuple[str, str, int, Callable[[int], ov.Node], dict[str, str]]] = [
        ("float32", "", 4 * size, float32, {"INFERENCE_PRECISION_HINT": "f32"}),
        ("bfloat16", "", 2 * size, float32, {"INFERENCE_PRECISION_HINT": "bf16"}),
        ("int8", "activations quantized in groups of 64", size, int8, _DYNAMIC),
        ("int4", "activations quantized in groups of 64", size // 2 + 4 * size // GROUP_SIZE, int4, _DYNAMIC),
        *((f"int8 {zeros} zeros", "sparse weights decompression from 50 % zeros on", size,
           partial(int8, zeros=zeros), {**_DYNAMIC, "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": "0.5"})
          for zeros in ("50 %", "80 %")),
    ]  # fmt: skip
    for values, note, weight_bytes, weight, settings in make:
        count = problem.num_copies(weight_bytes)
        try:
            request, kinds = _request(problem, weight, settings, count)
        except RuntimeError:
            yield Missing(f"OpenVINO {values}", "cannot be compiled for this instruction set")
            continue

        def run(request: ov.InferRequest = request) -> ov.InferRequest:
            request.infer()
            return request

        def outputs(request: ov.InferRequest, count: int = count) -> list[np.ndarray]:
            return [request.get_output_tensor(copy).data for copy in range(count)]

        facts = {"executes": kinds}
        zeros = values.partition(" ")[2].removesuffix(" zeros")
        yield Contestant("OpenVINO", values, note, weight_bytes, count, run, outputs, zeros=zeros, facts=facts)


def _request(
    problem: Problem, weight: Callable[[int], ov.Node], settings: dict[str, str], count: int
) -> tuple[ov.InferRequest, list[str]]:
    x = ops.parameter([problem.num_rows, problem.num_inputs], np.float32)
    products = [ops.result(ops.matmul(x, weight(copy), False, True)) for copy in range(count)]
    common = {"INFERENCE_NUM_THREADS": str(problem.num_threads), "NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.Core().compile_model(ov.Model(products, [x]), "CPU", {**common, **settings})
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(problem.x_TI))
    kinds = {_kind(node.get_rt_info()) for node in compiled.get_runtime_model().get_ordered_ops()}
    return request, sorted(kinds - {""})


def _kind(info: Any) -> str:
    layer, primitive, precision = (
        info[name].astype(str) for name in ("layerType", "primitiveType", "runtimePrecision")
    )
    return f"{primitive} {precision}" if layer in {"FullyConnected", "MatMul"} else ""
