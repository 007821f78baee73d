"""The conformance suite of storage layouts."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from rarefy.core.errors import LayoutError
from rarefy.layouts import Layout

_Array = npt.NDArray[Any]
_NO_META_VALUES: tuple[object, ...] = (1.5, "8", {}, [[1]])


def check_layout(layout: Layout) -> None:
    """Check that a layout keeps the promises of the Layout protocol, and that it survives hostile input.

    Call it with several layouts of a class: usual sizes, sizes that fill no byte, empty ones.

    Args:
        layout: a valid layout.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    meta = _check_meta(layout)
    arrays = _check_arrays(layout, meta)
    _check_dense(layout, arrays)
    _check_round_trip(layout, meta, arrays)
    _check_rows(layout)
    _check_hostile_meta(layout, meta, arrays)
    _check_hostile_arrays(layout, meta, arrays)


def _check_meta(layout: Layout) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads(json.dumps(layout.meta()))
    _require(meta == layout.meta(), "meta() is not plain JSON")
    _require("format" not in meta, "meta() repeats the format")
    _require(meta.get("shape") == list(layout.shape), 'meta()["shape"] is not the shape')
    _require(len(layout.shape) == 2 and all(type(size) is int for size in layout.shape), "shape is not two ints")
    return meta


def _check_arrays(layout: Layout, meta: Mapping[str, Any]) -> dict[str, _Array]:
    arrays: dict[str, _Array] = layout.arrays()
    spec = type(layout).array_spec(layout.format, meta)
    _require(set(arrays) == set(spec), "arrays() and array_spec() name different arrays")
    for name, (dtype, shape) in spec.items():
        _require("." not in name, f"the name of array {name} has a dot")
        _require(
            (arrays[name].dtype, arrays[name].shape) == (dtype, shape), f"array {name} is not as array_spec() says"
        )
        _require(arrays[name].flags.c_contiguous, f"array {name} is not C-contiguous")
    _require(layout.nbytes == sum(array.nbytes for array in arrays.values()), "nbytes is not the size of the arrays")
    return arrays


def _check_dense(layout: Layout, arrays: Mapping[str, _Array]) -> None:
    before = {name: array.tobytes() for name, array in arrays.items()}
    dense = layout.to_dense()
    _require(dense.dtype == np.float32 and dense.shape == layout.shape, "to_dense() is not float32 (O, I)")
    _require(bool(np.all(np.isfinite(dense))), "to_dense() is not finite")
    _require(dense.flags.writeable, "to_dense() is read-only")
    dense[...] = np.nan
    after = {name: array.tobytes() for name, array in arrays.items()}
    _require(before == after, "to_dense() gives access to the stored arrays")


def _check_round_trip(layout: Layout, meta: Mapping[str, Any], arrays: Mapping[str, _Array]) -> None:
    stored = {
        name: np.frombuffer(array.tobytes(), dtype=array.dtype).reshape(array.shape) for name, array in arrays.items()
    }
    again = type(layout).from_arrays(layout.format, meta, stored)
    _require(
        again.format == layout.format and again.meta() == layout.meta(), "from_arrays() gives another format or meta"
    )
    _require(
        all(np.array_equal(array, arrays[name]) for name, array in again.arrays().items()),
        "from_arrays() changes an array",
    )
    _require(np.array_equal(again.to_dense(), layout.to_dense()), "from_arrays() gives other values")


def _check_rows(layout: Layout) -> None:
    if layout.shape[0] == 0:
        return
    indices = np.array([[layout.shape[0] - 1, 0], [0, layout.shape[0] // 2]])
    _require(np.array_equal(layout.rows(indices), layout.to_dense()[indices]), "rows() differs from to_dense()")


def _check_hostile_meta(layout: Layout, meta: Mapping[str, Any], arrays: Mapping[str, _Array]) -> None:
    _refuses(layout, "no-such-format-v0", meta, arrays, "an unknown format")
    _refuses(layout, layout.format, {**meta, "surprise": 1}, arrays, "an unknown metadata field")
    for key in meta:
        rest = {name: other for name, other in meta.items() if name != key}
        _refuses(layout, layout.format, rest, arrays, f"metadata without {key}")
        for bad in _NO_META_VALUES:
            _refuses(layout, layout.format, {**meta, key: bad}, arrays, f"{key} = {bad!r}")
    rows, width = layout.shape
    for shape in ([rows, -1], [rows], [rows, width, 1], [rows, float(width)], [rows + 1, width], [True, width]):
        _refuses(layout, layout.format, {**meta, "shape": shape}, arrays, f"shape = {shape}")


def _check_hostile_arrays(layout: Layout, meta: Mapping[str, Any], arrays: Mapping[str, _Array]) -> None:
    extra = {**arrays, "surprise": np.zeros(1, dtype=np.uint8)}
    _refuses(layout, layout.format, meta, extra, "an unknown array")
    for name, array in arrays.items():
        rest = {other: value for other, value in arrays.items() if other != name}
        _refuses(layout, layout.format, meta, rest, f"no array {name}")
        wrong: dict[str, Any] = {
            "of another dtype": array.astype(np.int64),
            "with one dimension more": array[None],
            "with one row more": np.concatenate([array, np.zeros((1, *array.shape[1:]), dtype=array.dtype)]),
            "that is a list": array.tolist(),
        }
        for what, value in wrong.items():
            _refuses(layout, layout.format, meta, {**arrays, name: value}, f"array {name} {what}")


def _refuses(layout: Layout, format: str, meta: Mapping[str, Any], arrays: Mapping[str, Any], what: str) -> None:
    try:
        type(layout).from_arrays(format, meta, arrays)
    except LayoutError:
        return
    except Exception as error:
        raise AssertionError(f"{layout.format}: {what} raises {type(error).__name__}, not LayoutError") from error
    raise AssertionError(f"{layout.format}: {what} is accepted")


def _require(condition: bool, promise: str) -> None:
    if not condition:
        raise AssertionError(f"broken promise: {promise}")
