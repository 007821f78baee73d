"""ggml, the kernels of llama.cpp, through its C interface: Q8_0 and Q4_0, the latter in its repacked form.

RAREFY_BENCH_GGML names the directory of libggml-base.so and libggml-cpu.so, which `make bench` builds from the sources
in the llama-cpp-python package (for AVX2 alone a second time: ggml has no switch). Without it this contestant is left
out.
"""

import ctypes
import os
from collections.abc import Iterator
from ctypes import CFUNCTYPE, POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np

from peers.problem import Contestant, Problem

_F32, _Q4_0, _Q8_0 = 0, 2, 8
_BLOCK = 32
_BLOCK_BYTES = {_Q4_0: 18, _Q8_0: 34}


_Log = CFUNCTYPE(None, c_int, c_char_p, c_void_p)


class _InitParams(Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


def contestants(problem: Problem) -> Iterator[Contestant]:
    folder = os.environ.get("RAREFY_BENCH_GGML")
    if not folder:
        return
    ggml = _Ggml(Path(folder))
    for values, kind, note in (("int8", _Q8_0, "Q8_0"), ("int4", _Q4_0, "Q4_0, repacked as llama.cpp does")):
        weight_bytes = problem.num_outputs * problem.num_inputs // _BLOCK * _BLOCK_BYTES[kind]
        count = problem.num_copies(weight_bytes)
        product = _Product(ggml, problem, kind, count)
        yield Contestant("ggml", values, note, weight_bytes, count, product.run, lambda outputs: outputs)


class _Ggml:
    """The functions of the library that are used here."""

    def __init__(self, folder: Path) -> None:
        self.base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        pointers = {
            self.base: {
                "ggml_init": [_InitParams],
                "ggml_new_tensor_2d": [c_void_p, c_int, c_int64, c_int64],
                "ggml_mul_mat": [c_void_p, c_void_p, c_void_p],
                "ggml_new_graph_custom": [c_void_p, c_size_t, c_bool],
                "ggml_backend_alloc_ctx_tensors": [c_void_p, c_void_p],
                "ggml_backend_alloc_ctx_tensors_from_buft": [c_void_p, c_void_p],
                "ggml_backend_cpu_buffer_type": [],
            },
            self.cpu: {"ggml_backend_cpu_init": [], "_Z35ggml_backend_cpu_repack_buffer_typev": []},
        }
        for library, functions in pointers.items():
            for name, arguments in functions.items():
                function = getattr(library, name)
                function.argtypes, function.restype = arguments, c_void_p
        self.base.ggml_quantize_chunk.argtypes = [
            *(c_int, POINTER(c_float), c_void_p, c_int64, c_int64, c_int64, POINTER(c_float)),
        ]
        self.base.ggml_quantize_chunk.restype = c_size_t
        for name in ("ggml_backend_tensor_set", "ggml_backend_tensor_get"):
            getattr(self.base, name).argtypes = [c_void_p, c_void_p, c_size_t, c_size_t]
        self._silent = _Log(lambda *_: None)
        self.base.ggml_log_set.argtypes = [_Log, c_void_p]
        self.base.ggml_log_set(self._silent, None)
        self.base.ggml_build_forward_expand.argtypes = [c_void_p, c_void_p]
        self.base.ggml_backend_graph_compute.argtypes = [c_void_p, c_void_p]
        self.cpu.ggml_backend_cpu_set_n_threads.argtypes = [c_void_p, c_int]


class _Product:
    """A graph that multiplies the same input with every copy."""

    def __init__(self, ggml: _Ggml, problem: Problem, kind: int, count: int) -> None:
        base, cpu = ggml.base, ggml.cpu
        self._base, self._problem = base, problem
        self._backend = cpu.ggml_backend_cpu_init()
        cpu.ggml_backend_cpu_set_n_threads(self._backend, problem.num_threads)
        weights = base.ggml_init(_InitParams(1 << 20, None, True))
        tensors = [
            base.ggml_new_tensor_2d(weights, kind, problem.num_inputs, problem.num_outputs) for _ in range(count)
        ]
        repacked = cpu._Z35ggml_backend_cpu_repack_buffer_typev()
        place = repacked if kind == _Q4_0 else base.ggml_backend_cpu_buffer_type()
        if not base.ggml_backend_alloc_ctx_tensors_from_buft(weights, place):
            raise MemoryError
        packed = np.empty(problem.num_outputs * problem.num_inputs // _BLOCK * _BLOCK_BYTES[kind], np.uint8)
        for copy, tensor in enumerate(tensors):
            weight = np.ascontiguousarray(problem.weight(copy))
            written = base.ggml_quantize_chunk(
                kind, weight.ctypes.data_as(POINTER(c_float)), packed.ctypes.data, 0, *weight.shape, None
            )
            assert written == packed.nbytes
            base.ggml_backend_tensor_set(tensor, packed.ctypes.data, 0, packed.nbytes)
        context = base.ggml_init(_InitParams(4 << 20, None, True))
        x = base.ggml_new_tensor_2d(context, _F32, problem.num_inputs, problem.num_rows)
        self._results = [base.ggml_mul_mat(context, tensor, x) for tensor in tensors]
        self._graph = base.ggml_new_graph_custom(context, 2 * count + 16, False)
        for result in self._results:
            base.ggml_build_forward_expand(self._graph, result)
        if not base.ggml_backend_alloc_ctx_tensors(context, self._backend):
            raise MemoryError
        base.ggml_backend_tensor_set(x, problem.x_TI.ctypes.data, 0, problem.x_TI.nbytes)

    def run(self) -> list[np.ndarray]:
        """Compute the graph, and copy the results out, which takes little."""
        if self._base.ggml_backend_graph_compute(self._backend, self._graph) != 0:
            raise RuntimeError("ggml could not compute the graph")
        outputs = []
        for result in self._results:
            y_TO = np.empty((self._problem.num_rows, self._problem.num_outputs), np.float32)
            self._base.ggml_backend_tensor_get(result, y_TO.ctypes.data, 0, y_TO.nbytes)
            outputs.append(y_TO)
        return outputs
