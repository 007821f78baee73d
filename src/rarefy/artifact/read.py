"""Open a model directory without reading its weights: they are mapped, and checked when asked for."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, final

import numpy as np

from rarefy.artifact.schema import (
    CONFIG,
    INDEX,
    LAYOUT_DTYPES,
    WEIGHTS,
    LayoutSpec,
    in_layer,
    parse_quantization_config,
)
from rarefy.artifact.tensor_file import Array, TensorEntry, TensorFile, open_tensor_file, parse_json_object
from rarefy.core.errors import DamagedFileError, LayoutError, PathError, UnsupportedModelError
from rarefy.core.grids import Float32Array, Uint16Array, from_bf16_bits
from rarefy.layouts import FORMATS, AnyLayout

_MAX_JSON_BYTES = 256_000_000
_FLOAT_DTYPES = ("F32", "BF16", "F16", "F64")


@final
@dataclass(frozen=True, eq=False)
class Artifact:
    """An opened model directory.

    Args:
        path: the directory.
        config: config.json.
        specs: for each compressed layer its format and metadata; empty for a plain model.
        tied: alias to the layer that it shares its weight with, e.g. {"lm_head": "model.embed_tokens"}.
        files: for each tensor the file that holds it.
    """

    path: Path
    config: dict[str, Any]
    specs: Mapping[str, LayoutSpec]
    tied: Mapping[str, str]
    files: Mapping[str, TensorFile]

    @property
    def layers(self) -> Mapping[str, AnyLayout]:
        """The compressed layers by name; each is read and checked when it is asked for."""
        return _Layers(self)

    def layer(self, name: str) -> AnyLayout:
        """Read a compressed layer by its name or alias; its arrays are views of the mapped file.

        Raises:
            DamagedFileError: there is no such layer.
            LayoutError: its arrays are damaged.
        """
        name = self.tied.get(name, name)
        if name not in self.specs:
            raise DamagedFileError(str(self.path), f"no compressed layer {name!r}")
        spec = self.specs[name]
        arrays = {array: self.stored(f"{name}.{array}") for array in spec.arrays()}
        try:
            return FORMATS[spec.format_name].from_arrays(spec.format_name, spec.meta, arrays)
        except LayoutError as error:
            raise in_layer(str(self.path), name, error) from error

    def names(self) -> tuple[str, ...]:
        """Names of the tensors that belong to no compressed layer, sorted."""
        packed = {f"{name}.{array}" for name, spec in self.specs.items() for array in spec.arrays()}
        return tuple(sorted(self.files.keys() - packed))

    def tensor(self, name: str) -> Float32Array:
        """A floating-point tensor as float32 (a view of the mapped file if it is stored so).

        Raises:
            DamagedFileError: there is no such tensor.
            UnsupportedModelError: it holds no floats.
        """
        dtype = self.entry(name).dtype
        if dtype not in _FLOAT_DTYPES:
            raise UnsupportedModelError(f"{self.path} {name}", f"dtype {dtype}", allowed=", ".join(_FLOAT_DTYPES))
        stored = self.stored(name)
        if dtype == "BF16":
            return from_bf16_bits(cast(Uint16Array, stored))
        return stored.astype(np.float32, copy=False)

    def stored(self, name: str) -> Array:
        """A tensor as it is stored; bfloat16 as uint16 bits.

        Raises:
            DamagedFileError: there is no such tensor.
        """
        self.entry(name)
        return self.files[name].array(name)

    def entry(self, name: str) -> TensorEntry:
        """Dtype, shape and size of a tensor, without reading it.

        Raises:
            DamagedFileError: there is no such tensor.
        """
        if name not in self.files:
            raise DamagedFileError(
                str(self.path), f"no tensor {name!r}", hint="a weight is missing from the checkpoint"
            )
        return self.files[name].entries[name]


@final
class _Layers(Mapping[str, AnyLayout]):
    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact

    def __getitem__(self, name: str) -> AnyLayout:
        if name not in self._artifact.specs:
            raise KeyError(name)
        return self._artifact.layer(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._artifact.specs)

    def __len__(self) -> int:
        return len(self._artifact.specs)


def read_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Open an artifact or a plain Hugging Face safetensors directory.

    Args:
        path: directory with config.json and model.safetensors, or shards and their index.

    Returns:
        The artifact; weights are mapped, not read.

    Raises:
        PathError: there is no such model directory.
        DamagedFileError: a file is truncated, corrupt or contradicts another.
        UnsupportedModelError: it was packed by another tool, or by a newer rarefy.
    """
    root = Path(path)
    if not root.is_dir():
        found = "not a directory" if root.exists() else "no such directory"
        raise PathError(str(root), found, hint="give a model directory with config.json and model.safetensors")
    if not (root / CONFIG).is_file():
        raise PathError(str(root), f"no {CONFIG}", hint="not a Hugging Face model directory")
    config = _read_json(root / CONFIG)
    files = _open_files(root)
    specs: dict[str, LayoutSpec] = {}
    tied: dict[str, str] = {}
    if "quantization_config" in config:
        where = f"{root / CONFIG} quantization_config"
        specs, tied = parse_quantization_config(config["quantization_config"], where=where)
    for name, spec in specs.items():
        _check_stored(root, name, spec, files)
    return Artifact(root, config, specs, tied, files)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise DamagedFileError(str(path), f"{size} bytes", allowed=f"at most {_MAX_JSON_BYTES}")
        return parse_json_object(path, path.read_bytes())
    except OSError as error:
        raise PathError(str(path), error.strerror or str(error)) from error


def _open_files(root: Path) -> dict[str, TensorFile]:
    if (root / WEIGHTS).is_file():
        file = open_tensor_file(root / WEIGHTS)
        return dict.fromkeys(file.entries, file)
    if not (root / INDEX).is_file():
        raise PathError(
            str(root),
            f"neither {WEIGHTS} nor {INDEX}",
            hint="only safetensors are read here; pickles (.bin, .pt) never are",
        )
    weight_map = _read_json(root / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise DamagedFileError(str(root / INDEX), "no weight_map", allowed="an object of tensor name to file name")
    shards: dict[str, TensorFile] = {}
    for name, shard in weight_map.items():
        # the index comes from outside: it may name files of this directory only
        if (
            not isinstance(shard, str)
            or not shard.endswith(".safetensors")
            or Path(shard).name != shard
            or "\\" in shard
        ):
            raise DamagedFileError(
                str(root / INDEX), f"shard {shard!r:.80}", allowed="a .safetensors file name without directories"
            )
        if shard not in shards:
            if not (root / shard).is_file():
                raise DamagedFileError(str(root / INDEX), f"shard {shard} is missing", hint="copy or download it again")
            shards[shard] = open_tensor_file(root / shard)
        if name not in shards[shard].entries:
            raise DamagedFileError(str(root / shard), f"no tensor {name!r:.80}", hint=f"{INDEX} says that it is here")
    return {name: shards[shard] for name, shard in weight_map.items()}


def _check_stored(root: Path, name: str, spec: LayoutSpec, files: Mapping[str, TensorFile]) -> None:
    """Compare a layer's metadata with the headers of the files that hold its arrays."""
    for array, (dtype, shape) in spec.arrays().items():
        key = f"{name}.{array}"
        if key not in files:
            raise DamagedFileError(str(root), f"no tensor {key!r}", hint=f"layer {name} in {CONFIG} needs it")
        entry = files[key].entries[key]
        expected = LAYOUT_DTYPES[dtype.name]
        if (entry.dtype, entry.shape) != (expected, shape):
            raise DamagedFileError(
                f"{files[key].path} {key}", f"{entry.dtype} {entry.shape}", allowed=f"{expected} {shape} by {CONFIG}"
            )
