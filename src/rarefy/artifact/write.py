"""Write a model directory: complete, or not at all, and byte for byte the same every time."""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy.typing as npt

from rarefy.artifact.schema import CONFIG, FORMAT_VERSION, INDEX, LAYOUT_DTYPES, QUANT_METHOD, WEIGHTS
from rarefy.artifact.tensor_file import Array, write_bytes, write_tensor_file
from rarefy.core.errors import OutputError, PathError
from rarefy.layouts import AnyLayout

SHARD_BYTES = 5_000_000_000

# numpy's names of what tensors that no layout holds may be; bfloat16 comes as its bits
STORED_DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "uint16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def write_artifact(
    path: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    layers: Mapping[str, AnyLayout],
    tied: Mapping[str, str],
    tensors: Mapping[str, npt.NDArray[Any]],
    extra_files: Mapping[str, bytes],
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a model directory: complete, or not at all.

    Everything goes to a hidden sibling directory first, is flushed to the disk, and takes the place of `path` by a
    rename. An existing output is kept until then. The same content gives the same bytes.

    Args:
        path: the directory to write.
        config: of the model; quantization_config and the compute dtype (float32) are filled in here.
        layers: compressed layers by module name.
        tied: alias to the layer whose weight it shares.
        tensors: all other tensors by name: float32, float16, integers as they are, bfloat16 as uint16 bits.
        extra_files: further files (tokenizer, reports) by relative path.
        force: replace an existing model directory.
        shard_bytes: start a new shard beyond this size.

    Returns:
        The path written.

    Raises:
        PathError: the path is taken (see check_output).
        OutputError: the content is contradictory or the disk refused it (full, read-only); nothing is left behind.
    """
    target = check_output(path, force=force)
    shards = _shards(_collect(target, layers, tied, tensors), shard_bytes)
    texts = {CONFIG: _json_bytes(target, _config(config, layers, tied)), **_check_extra(target, extra_files)}
    if len(shards) > 1:
        texts[INDEX] = _json_bytes(target, _index(shards))
    created = _missing_parents(target)
    staging = target.with_name(f".{target.name}.partial-{os.getpid()}")
    retired = target.with_name(f".{target.name}.old-{os.getpid()}")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        for name, shard in shards.items():
            write_tensor_file(staging / name, shard)
        for name, data in texts.items():
            _write_file(staging / name, data)
        _sync_directory(staging)
        if target.exists():
            target.rename(retired)
        staging.rename(target)
        _sync_directory(target.parent)
    except BaseException as error:
        _roll_back(target, staging, retired, created)
        if isinstance(error, OSError):
            _refuse(target, error)
        raise
    shutil.rmtree(retired, ignore_errors=True)
    return target


def check_output(path: str | os.PathLike[str], *, force: bool, inputs: Iterable[object] = ()) -> Path:
    """Check that an output directory may be written; call it before the work, not after.

    Args:
        path: the output directory.
        force: an existing model directory may be replaced.
        inputs: what the work reads; paths among them that exist must not be replaced.

    Returns:
        The absolute path.

    Raises:
        PathError: it exists (without force), or it is something that force must not delete, or there is no directory
            that it could be in.
    """
    target = Path(os.path.realpath(path))
    parent = next(each for each in target.parents if os.access(each, os.F_OK))
    if not parent.is_dir():
        raise PathError(str(parent), "a file is in the way", hint="choose another output directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PathError(str(parent), "cannot be written to", hint="choose another output directory")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return target
    if not target.is_dir():
        raise PathError(str(target), "a file is in the way", hint="choose another output directory")
    if not force:
        raise PathError(str(target), "already exists", hint="choose another output, or replace it with --force")
    if not (target / CONFIG).is_file():
        raise PathError(
            str(target),
            f"not a model directory (no {CONFIG}); --force will not delete it",
            hint="choose another output",
        )
    for each in inputs:
        if not isinstance(each, str | os.PathLike) or not os.access(each, os.F_OK):
            continue  # the name of a recipe or of a model on the hub, for one
        if target in (read := Path(os.path.realpath(each)), *read.parents):
            raise PathError(
                str(target), f"{os.fspath(each)} is read; --force will not delete it", hint="choose another output"
            )
    return target


def _collect(
    target: Path, layers: Mapping[str, AnyLayout], tied: Mapping[str, str], tensors: Mapping[str, npt.NDArray[Any]]
) -> dict[str, tuple[str, Array]]:
    """All tensors with their dtype names."""
    for alias, name in tied.items():
        if name not in layers or alias in layers:
            raise OutputError(str(target), f"tied {alias!r} to {name!r}", allowed="an alias of a compressed layer")
    result: dict[str, tuple[str, Array]] = {}
    for name, layout in layers.items():
        for key, array in layout.arrays().items():
            result[f"{name}.{key}"] = (LAYOUT_DTYPES[array.dtype.name], array)
    for name, tensor in tensors.items():
        if name in result:
            raise OutputError(str(target), f"tensor {name!r} twice", hint="it belongs to a compressed layer already")
        dtype = STORED_DTYPES.get(tensor.dtype.name)
        if dtype is None:
            raise OutputError(f"{target} {name}", f"dtype {tensor.dtype}", allowed=", ".join(STORED_DTYPES))
        result[name] = (dtype, tensor)
    return result


def _shards(tensors: Mapping[str, tuple[str, Array]], shard_bytes: int) -> dict[str, dict[str, tuple[str, Array]]]:
    groups: list[dict[str, tuple[str, Array]]] = [{}]
    used = 0
    for name in sorted(tensors):
        nbytes = tensors[name][1].nbytes
        if groups[-1] and used + nbytes > shard_bytes:
            groups.append({})
            used = 0
        groups[-1][name] = tensors[name]
        used += nbytes
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _index(shards: Mapping[str, Mapping[str, tuple[str, Array]]]) -> dict[str, Any]:
    total = sum(array.nbytes for shard in shards.values() for _, array in shard.values())
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _config(config: Mapping[str, Any], layers: Mapping[str, AnyLayout], tied: Mapping[str, str]) -> dict[str, Any]:
    result = _with_compute_dtype(config)
    result.pop("quantization_config", None)
    result["dtype"] = "float32"
    if layers:
        result["quantization_config"] = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "layers": {name: {"format": layout.format, **layout.meta()} for name, layout in layers.items()},
            "tied": dict(tied),
        }
    return result


def _with_compute_dtype(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every dtype in a config, nested ones included, becomes float32, the dtype that all loaders compute in."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        if key == "torch_dtype":
            continue
        nested = key.endswith("_config") and isinstance(value, Mapping)
        result[key] = "float32" if key == "dtype" else _with_compute_dtype(value) if nested else value
    return result


def _json_bytes(target: Path, value: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise OutputError(str(target), f"config that is no JSON ({error})") from error


def _check_extra(target: Path, extra_files: Mapping[str, bytes]) -> dict[str, bytes]:
    for name in extra_files:
        path = PurePosixPath(name)
        reserved = str(path) in (CONFIG, INDEX) or path.suffix == ".safetensors"
        if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or reserved:
            raise OutputError(f"{target} {name}", "a file name that is not allowed", allowed="a relative path")
    return dict(extra_files)


def _write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        write_bytes(file, data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _missing_parents(target: Path) -> list[Path]:
    """Parents that writing will create, innermost first."""
    return [parent for parent in target.parents if not parent.exists()]


def _roll_back(target: Path, staging: Path, retired: Path, created: list[Path]) -> None:
    """Put everything back as it was before the write."""
    if retired.exists() and not target.exists():
        retired.rename(target)
    elif not staging.exists():  # the new output is in its place already: only the tidying was interrupted
        shutil.rmtree(retired, ignore_errors=True)
    shutil.rmtree(staging, ignore_errors=True)
    for parent in created:
        if parent.exists() and not any(parent.iterdir()):
            parent.rmdir()


def _refuse(target: Path, error: OSError) -> NoReturn:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = "free some disk space; nothing of it was left behind" if full else "nothing of it was left behind"
    raise OutputError(str(target), f"could not be written ({error.strerror or error})", hint=hint) from error
