"""How many bytes a model takes: its weight files on disk, and its tensors in memory."""

import json
from pathlib import Path

import torch
from torch import nn

from rarefy.core.errors import DamagedFileError, PathError
from rarefy.measure.measurement import Measurement, exact

WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin")


def weight_files(path: str | Path) -> tuple[Path, ...]:
    """Return the files that hold the weights of the model at `path`.

    Args:
        path: a model directory, or one weight file. In a directory the files that a loader would take: the shards of an
            index, else `model.safetensors`, else the other safetensors files, else GGUF, else PyTorch files. Copies of
            the same weights in a second format are not counted.

    Raises:
        PathError: there is no such path, or no weight file in the directory.
        DamagedFileError: the index is unreadable or names a file that is not there.
    """
    path = Path(path)
    if path.is_file():
        return (path,)
    if not path.is_dir():
        raise PathError(str(path), "no such file or directory")
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{stem}.index.json"
        if index.is_file() and not (path / stem).is_file():
            return _shards(index)
        if (path / stem).is_file():
            return (path / stem,)
    for suffix in WEIGHT_SUFFIXES:
        files = tuple(sorted(file for file in path.glob(f"*{suffix}") if file.is_file()))
        if files:
            return files
    raise PathError(str(path), "no weight file in it", allowed=", ".join(WEIGHT_SUFFIXES))


def disk_bytes(path: str | Path) -> Measurement:
    """Measure the bytes of the weight files of a model directory or file; see `weight_files`."""
    files = weight_files(path)
    names = files[0].name if len(files) == 1 else f"{len(files)} weight files"
    total = sum(file.stat().st_size for file in files)
    return Measurement("disk_bytes", "bytes", False, exact(total), f"size of {names}")


def directory_bytes(path: str | Path) -> int:
    """Return the bytes of every file under a directory, or of one file."""
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    if not path.is_dir():
        raise PathError(str(path), "no such file or directory")
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def tensor_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers, shared storage counted once."""
    storages: dict[int, int] = {}
    tensors: list[torch.Tensor] = [*module.parameters(), *module.buffers()]
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr() or id(tensor)] = storage.nbytes()
    return sum(storages.values())


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = tuple(sorted(index.parent / name for name in names))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(str(index), f"no readable weight_map ({error!r})") from error
    for file in files:
        if not file.is_file():
            raise DamagedFileError(str(index), f"it names {file.name!r}, which is not there")
    return files
