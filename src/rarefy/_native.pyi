"""The compiled kernels. Internal: use `rarefy.kernels`, which chooses among them and runs numpy where they are missing.

Every function checks shapes, dtypes and bounds and raises ValueError or TypeError; none holds the GIL while it works.
"""

from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]

def cpu_flags() -> dict[str, bool]: ...
def set_num_threads(num_threads: int) -> None: ...
def num_threads() -> int: ...
def lend_team(run: int, max_threads: int) -> None:
    """Addresses of GOMP_parallel and omp_get_max_threads."""

def measure_fork_join() -> float: ...
def waiting_bytes() -> int: ...

@final
class BandwidthProbe:
    def __init__(self, num_bytes: int) -> None: ...
    @property
    def num_bytes(self) -> int: ...
    def read(self, num_bytes: int, num_streams: int, prefetch_bytes: int) -> float: ...
    def read_best(self, num_bytes: int) -> tuple[float, int, int]: ...

def copy_strided(source: Float32Array, target: Float32Array) -> None: ...
def fisher_add_bf16(x: Sequence[NDArray[np.uint16]], total: Float32Array) -> None: ...
def fisher_add_float(x: Sequence[Float32Array], total: Float32Array) -> None: ...
def fisher_invert(block: Float32Array, scale: float, damp: float, inverse: Float32Array) -> None: ...
def fisher_costs(weight: Float32Array, inverse: Float32Array, free: NDArray[np.bool_], cost: Float32Array) -> None: ...
def fisher_drop(drop: NDArray[np.bool_], weight: Float32Array, inverse: Float32Array) -> None: ...
def kernel_list() -> list[tuple[str, str, str]]: ...

@final
class Weights:
    @property
    def nbytes(self) -> int: ...
    @property
    def read_nbytes(self) -> int: ...
    @property
    def isa(self) -> str | None:
        """None where it is made of others."""
    @property
    def is_integer(self) -> bool: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    def multiply(self, x: object) -> Float32Array | None:
        """x @ W^T; None where x is not an array (..., I) of float32 in C order."""

def prepare(
    format: str,
    isa: str,
    num_outputs: int,
    num_inputs: int,
    integers: Mapping[str, int],
    arrays: Mapping[str, NDArray[np.generic]],
) -> Weights: ...
def chain(inner: Weights, outer: Weights, num_runs: int) -> Weights: ...
def add(first: Weights, second: Weights) -> Weights: ...
def multiply(x: object, weights: Sequence[object]) -> list[Float32Array] | None:
    """`Weights.multiply` of each in one fork-join; None too where a weight is none."""

def matmul(x: Float32Array, weights: Sequence[Weights], outputs: Sequence[Float32Array]) -> None: ...
def matmul_taps(
    pixels: Float32Array,
    row_starts: NDArray[np.int64],
    tap_offsets: NDArray[np.int64],
    weights: Weights,
    output: Float32Array,
) -> None: ...
def convolve(
    x: Float32Array,
    weights: Sequence[Weights],
    bias: Float32Array | None,
    groups: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    before: Sequence[int],
    out: Sequence[int],
    channels_last: bool,
    by_patches: bool,
) -> Float32Array | None:
    """None where a strip of patches would need more memory than a thread should keep."""

def run_recurrent(
    isa: str,
    mode: int,
    x: Float32Array,
    input_bias: Float32Array | None,
    hidden_bias: Float32Array | None,
    meet_hidden: Weights,
    project: Weights | None,
    hidden: Float32Array,
    cell: Float32Array | None,
    lengths: NDArray[np.int64] | None,
    reverse: bool,
) -> tuple[Float32Array, Float32Array, Float32Array | None]: ...

@final
class Ops:
    """The methods of `rarefy.kernels.ops.Ops`."""

    def __init__(self, isa: str) -> None: ...
    @property
    def isa(self) -> str: ...
    def rms_norm(self, x_TE: Float32Array, weight_E: Float32Array, eps: float, /) -> Float32Array: ...
    def add_rms_norm(
        self, sum_TE: Float32Array, x_TE: Float32Array, weight_E: Float32Array, eps: float, /
    ) -> Float32Array: ...
    def add_layer_norm(
        self,
        x_TE: Float32Array,
        residual_TE: Float32Array,
        weight_E: Float32Array,
        bias_E: Float32Array,
        eps: float,
        /,
    ) -> Float32Array: ...
    def layer_norm(
        self, x_TE: Float32Array, weight_E: Float32Array, bias_E: Float32Array, eps: float, /
    ) -> Float32Array: ...
    def add_bias(self, x_TF: Float32Array, bias_F: Float32Array, /) -> None: ...
    def activate(self, x_TF: Float32Array, activation: int, /) -> None: ...
    def gate(self, gate_TF: Float32Array, up_TF: Float32Array, activation: int, /) -> None: ...
    def rope_store(
        self,
        q_TQ: Float32Array,
        k_TC: Float32Array,
        v_TC: Float32Array,
        cos_PD: Float32Array,
        sin_PD: Float32Array,
        k_cache: Float32Array,
        v_cache: Float32Array,
        start: int,
        /,
    ) -> None: ...
    def attention(
        self,
        q_TQ: Float32Array,
        k_cache: Float32Array,
        v_cache: Float32Array,
        start: int,
        window: int,
        scale: float,
        /,
    ) -> Float32Array: ...
    def attention_rows(
        self,
        q_TQ: Float32Array,
        k_KPD: Float32Array,
        v_KPD: Float32Array,
        start: int,
        window: int,
        scale: float,
        shift: int,
        /,
    ) -> Float32Array: ...
    def attention_segments(
        self,
        q_TE: Float32Array,
        k_TE: Float32Array,
        v_TE: Float32Array,
        offsets_S: NDArray[np.int64],
        num_heads: int,
        scale: float,
        /,
    ) -> Float32Array: ...

@final
class Program:
    """Steps over slots of memory; see `rarefy.kernels.program`."""

    def __init__(self, isa: str, widths: Sequence[int], output: int) -> None: ...
    def product(
        self, x: int, weights: Sequence[Weights | None], biases: Sequence[Float32Array | None], y: Sequence[int]
    ) -> None: ...
    def rms_norm(self, x: int, sum: int, weight: Float32Array, eps: float, y: int) -> None:
        """`sum` -1: nothing is added."""

    def rope_store(self, q: int, k: int, v: int, layer: int, rotation: int) -> None: ...
    def attention(self, q: int, layer: int, window: int, scale: float, y: int) -> None: ...
    def gate(self, gate: int, up: int, activation: int) -> None: ...
    def run(
        self,
        x: Float32Array,
        cos: Sequence[Float32Array],
        sin: Sequence[Float32Array],
        keys: Sequence[Float32Array],
        values: Sequence[Float32Array],
        start: int,
    ) -> Float32Array: ...
