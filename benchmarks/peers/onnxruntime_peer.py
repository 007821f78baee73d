"""ONNX Runtime: one model whose nodes multiply the same input with every copy of the weight."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from peers.problem import GROUP_SIZE, Contestant, Problem


def contestants(problem: Problem) -> Iterator[Contestant]:
    size = problem.num_outputs * problem.num_inputs
    shape = {"K": problem.num_inputs, "N": problem.num_outputs, "block_size": GROUP_SIZE}
    num_groups = problem.num_inputs // GROUP_SIZE

    def group_scales(copy: int) -> np.ndarray:
        return problem.group_scales(copy).reshape(-1)

    def blocks(copy: int) -> np.ndarray:
        return problem.nibbles(problem.level(copy) + 8).reshape(problem.num_outputs, num_groups, GROUP_SIZE // 2)

    def bytes_in_blocks(copy: int) -> np.ndarray:
        codes = (problem.level(copy) + np.int16(128)).astype(np.uint8)
        return codes.reshape(problem.num_outputs, num_groups, GROUP_SIZE)

    nbits = {"op_type": "MatMulNBits", "domain": "com.microsoft", "accuracy_level": 4, **shape}
    make: list[tuple[str, str, int, dict[str, Any], list[Callable[[int], np.ndarray]]]] = [
        ("float32", "MatMul", 4 * size, {"op_type": "MatMul"}, [lambda k: np.ascontiguousarray(problem.weight(k).T)]),
        ("int8", "DynamicQuantizeMatMul", size, {"op_type": "DynamicQuantizeMatMul", "domain": "com.microsoft"},
         [lambda k: np.ascontiguousarray(problem.level(k).T), problem.scale]),
        ("int8 blocks", "MatMulNBits, 8 bits, accuracy level 4", size + 4 * size // GROUP_SIZE,
         {"bits": 8, **nbits}, [bytes_in_blocks, group_scales]),
        ("int4", "MatMulNBits, accuracy level 4", size // 2 + 4 * size // GROUP_SIZE,
         {"bits": 4, **nbits}, [blocks, group_scales]),
    ]  # fmt: skip
    for values, note, weight_bytes, node, inputs in make:
        count = problem.num_copies(weight_bytes)
        session = _session(problem, node, inputs, count)

        def run(session: ort.InferenceSession = session) -> list[np.ndarray]:
            return session.run(None, {"x": problem.x_TI})

        yield Contestant("ONNX Runtime", values, note, weight_bytes, count, run, list)


def _session(
    problem: Problem, node: dict[str, Any], inputs: list[Callable[[int], np.ndarray]], count: int
) -> ort.InferenceSession:
    nodes, initializers, results = [], [], []
    for copy in range(count):
        names = [f"w{copy}_{index}" for index in range(len(inputs))]
        initializers += [numpy_helper.from_array(make(copy), name) for make, name in zip(inputs, names, strict=True)]
        nodes.append(helper.make_node(inputs=["x", *names], outputs=[f"y{copy}"], **node))
        results.append(
            helper.make_tensor_value_info(f"y{copy}", TensorProto.FLOAT, [problem.num_rows, problem.num_outputs])
        )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [problem.num_rows, problem.num_inputs])
    graph = helper.make_graph(nodes, "products", [x], results, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = problem.num_threads
    # Its threads spin within a call as usual, but not after it, where another contestant runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
