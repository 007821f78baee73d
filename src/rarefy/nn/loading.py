"""Fill a plain torch module from an artifact."""

import os

import torch
from torch import nn

from rarefy.artifact import Artifact, read_artifact
from rarefy.core.errors import DamagedFileError
from rarefy.nn.biases import added_biases, set_biases
from rarefy.nn.replace import find_weight, replace_linear


def load_into(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Replace the layers of `module` that the artifact at `path` holds compressed, and load all its other tensors.

    This is the way back for models that are not transformers models: build the module as it was built before
    compression, then load the artifact into it.

    Args:
        module: a module of the class that was compressed; changed in place, on the CPU.
        path: the artifact's directory.

    Raises:
        PathError: there is no artifact.
        DamagedFileError: a tensor is missing, superfluous or of another shape, or the file is corrupt.
        UsageError: a compressed layer is not in the module.

    Notes:
        Floating parameters keep the module's dtype. Everything is checked before the module is changed.
    """
    artifact = read_artifact(path)
    layers = dict(artifact.layers)
    compressed = {find_weight(module, name).parameter_name for name in (*artifact.specs, *artifact.tied)}
    targets = {**dict(module.named_parameters(remove_duplicate=False)), **_persistent_buffers(module)}
    stored = set(artifact.names())
    wanted = targets.keys() - compressed
    # Tied parameters are stored under one of their names.
    identical: dict[int, list[str]] = {}
    for name in wanted:
        identical.setdefault(id(targets[name]), []).append(name)
    source: dict[str, str] = {}
    for names in identical.values():
        present = [name for name in sorted(names) if name in stored]
        if not present:
            raise DamagedFileError(f"{path}", f"tensor {sorted(names)[0]!r} of the module is missing")
        source[present[0]] = present[0]
    added = added_biases(module, artifact.specs, stored)
    superfluous = sorted(stored - wanted - added.keys())
    if superfluous:
        raise DamagedFileError(f"{path}", f"tensor {superfluous[0]!r} is not in the {type(module).__name__}")
    values = {name: _checked(artifact, name, targets[name]) for name in source}
    biases = {name: _checked(artifact, name, torch.empty(size)) for name, size in added.items()}
    replace_linear(module, layers, artifact.tied)
    set_biases(module, biases)
    with torch.no_grad():
        for name, value in values.items():
            targets[name].copy_(value)


def _persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    keys = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers(remove_duplicate=False) if name in keys}


def _checked(artifact: Artifact, name: str, target: torch.Tensor) -> torch.Tensor:
    stored = artifact.tensor(name) if target.is_floating_point() else artifact.stored(name)
    value = torch.from_numpy(stored.copy())
    if value.shape != target.shape:
        raise DamagedFileError(f"tensor {name}", f"shape {tuple(value.shape)}", allowed=str(tuple(target.shape)))
    return value
