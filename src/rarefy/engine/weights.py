"""Linear layers and embeddings of a model directory, prepared for the kernels.

T tokens, I inputs, O outputs, E embedding width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast, final

import numpy as np

from rarefy.artifact import Artifact
from rarefy.core.errors import DamagedFileError, LayoutError
from rarefy.kernels import Prepared, matmul_many, prepare
from rarefy.kernels.ops import Float32Array, Int64Array, Ops
from rarefy.kernels.program import Recorder, Register
from rarefy.layouts import AnyLayout, DenseFloat


@final
class Linears:
    """Linear layers that read the same input: one call to the kernels, which quantize the input once.

    Args:
        ops: adds the biases.
        weights: one prepared (O, I) weight per layer.
        biases: one (O,) bias or None per layer.
    """

    __slots__ = ("_ops", "biases", "weights")

    def __init__(self, ops: Ops, weights: Sequence[Prepared], biases: Sequence[Float32Array | None]) -> None:
        self.weights = tuple(weights)
        self._ops = ops
        self.biases = tuple(biases)

    def __call__(self, x_TI: Float32Array) -> list[Float32Array]:
        """Return x @ W^T + bias of every layer, each (T, O)."""
        outputs = matmul_many(x_TI, self.weights)
        for y_TO, bias in zip(outputs, self.biases, strict=True):
            if bias is not None:
                self._ops.add_bias(y_TO, bias)
        return outputs

    def record(self, program: Recorder, x: Register) -> list[Register]:
        """Record the call; return the registers of the outputs."""
        return program.products(x, self.weights, self.biases)


@final
class Embedding:
    """A look-up table; its rows are decoded to float32 as they are read.

    Args:
        layout: (V, E).
    """

    __slots__ = ("_layout",)

    def __init__(self, layout: AnyLayout) -> None:
        self._layout = layout

    def rows(self, indices_T: Int64Array) -> Float32Array:
        """Return one new (T, E) array with a row per index; the caller has checked that every index is in range."""
        return np.ascontiguousarray(self._layout.rows(indices_T))


@final
class Weights:
    """Reads the layers of one model and keeps count of their bytes.

    Args:
        artifact: the opened directory.
        ops: the small operations of the engine.
        prefix: what stands before every name, for example "bert.".
    """

    def __init__(self, artifact: Artifact, ops: Ops, prefix: str = "") -> None:
        self.ops = ops
        self.nbytes = 0
        self._artifact = artifact
        self._prefix = prefix

    def has(self, name: str) -> bool:
        """Whether there is a layer with a weight of this name."""
        name = self._prefix + name
        return self._is_packed(name) or f"{name}.weight" in self._artifact.files

    def vector(self, name: str, size: int) -> Float32Array:
        """Return a tensor of one axis.

        Raises:
            DamagedFileError: it is missing, of another size, or not finite.
        """
        vector = np.ascontiguousarray(self._artifact.tensor(self._prefix + name), dtype=np.float32)
        if vector.shape != (size,):
            raise self._wrong(name, f"shape {vector.shape}", f"({size},), by config.json")
        if not np.isfinite(vector).all():
            raise self._wrong(name, "NaN or infinity", "finite numbers")
        self.nbytes += vector.nbytes
        return vector

    def linears(self, layers: Sequence[tuple[str, int]], num_inputs: int, *, bias: bool) -> Linears:
        """Prepare linear layers that read the same input.

        Args:
            layers: name and number of outputs of each.
            num_inputs: I.
            bias: whether they must have biases.

        Raises:
            DamagedFileError: a weight is missing, damaged or of another shape.
        """
        weights = [prepare(self._layout(name, (size, num_inputs))) for name, size in layers]
        # compression may have given a layer a bias
        given = [bias or f"{self._prefix}{name}.bias" in self._artifact.files for name, _ in layers]
        biases = [
            self.vector(f"{name}.bias", size) if there else None
            for (name, size), there in zip(layers, given, strict=True)
        ]
        self.nbytes += sum(weight.nbytes for weight in weights)
        return Linears(self.ops, weights, biases)

    def embedding(self, name: str, shape: tuple[int, int]) -> Embedding:
        """Read a look-up table.

        Raises:
            DamagedFileError: it is missing, damaged, or of another shape.
        """
        layout = self._layout(name, shape)
        self.nbytes += layout.nbytes
        return Embedding(layout)

    def tied_head(self, name: str, shape: tuple[int, int]) -> Linears:
        """Prepare the look-up table `name` as the output layer that shares its weight; counted once in `nbytes`."""
        self.nbytes -= self._layout(name, shape).nbytes
        return self.linears([(name, shape[0])], shape[1], bias=False)

    def _is_packed(self, name: str) -> bool:
        return name in self._artifact.specs or name in self._artifact.tied

    def _layout(self, name: str, shape: tuple[int, int]) -> AnyLayout:
        full_name = self._prefix + name
        layout = self._artifact.layer(full_name) if self._is_packed(full_name) else self._dense_layout(name)
        if layout.shape != shape:
            raise self._wrong(name, f"shape {layout.shape}", f"{shape}, by config.json")
        return layout

    def _dense_layout(self, name: str) -> DenseFloat:
        tensor = f"{self._prefix}{name}.weight"
        # bfloat16 stays as it is stored; float16 and float64 have no kernels and become float32
        is_bf16 = self._artifact.entry(tensor).dtype == "BF16"
        values = self._artifact.stored(tensor) if is_bf16 else self._artifact.tensor(tensor)
        if values.ndim != 2:
            raise self._wrong(name, f"shape {values.shape}", "two axes")
        try:
            return DenseFloat.from_arrays(
                "dense-bf16-v1" if is_bf16 else "dense-f32-v1", {"shape": list(values.shape)}, {"values": values}
            )
        except LayoutError as error:
            raise self._wrong(name, error.found, cast(str, error.allowed)) from error

    def _wrong(self, name: str, found: str, allowed: str) -> DamagedFileError:
        return DamagedFileError(f"{self._artifact.path} {self._prefix}{name}", found, allowed=allowed)
