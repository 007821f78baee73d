import json
from pathlib import Path

import pytest
import torch
from torch import nn

from rarefy.core.errors import DamagedFileError, PathError
from rarefy.measure.memory import peak_memory_bytes
from rarefy.measure.size import directory_bytes, disk_bytes, tensor_bytes, weight_files


def fill(directory: Path, sizes: dict[str, int]) -> Path:
    directory.mkdir()
    for name, size in sizes.items():
        (directory / name).write_bytes(b"x" * size)
    return directory


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"model.safetensors": 7, "pytorch_model.bin": 100, "README.md": 1000}, 7),
        ({"model.gguf": 9, "config.json": 3}, 9),
        ({"pytorch_model.bin": 11}, 11),
        ({"other.safetensors": 5, "model.gguf": 9}, 5),
    ],
)
def test_weights_are_counted_once(tmp_path: Path, sizes: dict[str, int], expected: int) -> None:
    path = fill(tmp_path / "model", sizes)
    measured = disk_bytes(path)
    assert measured.value.median == expected
    assert measured.unit == "bytes"
    assert directory_bytes(path) == sum(sizes.values())


def test_shards(tmp_path: Path) -> None:
    path = fill(tmp_path / "model", {"a-1.safetensors": 3, "a-2.safetensors": 4, "stray.safetensors": 50})
    index = {"weight_map": {"x": "a-1.safetensors", "y": "a-2.safetensors", "z": "a-2.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert disk_bytes(path).value.median == 7
    assert "2 weight files" in disk_bytes(path).how
    (path / "a-2.safetensors").unlink()
    with pytest.raises(DamagedFileError, match=r"'a-2\.safetensors', which is not there"):
        weight_files(path)
    (path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(DamagedFileError, match="weight_map"):
        weight_files(path)


def test_paths(tmp_path: Path) -> None:
    with pytest.raises(PathError, match="no such"):
        disk_bytes(tmp_path / "nowhere")
    with pytest.raises(PathError, match="no weight file"):
        disk_bytes(fill(tmp_path / "empty", {"config.json": 2}))
    with pytest.raises(PathError, match="no such"):
        directory_bytes(tmp_path / "nowhere")
    file = fill(tmp_path / "gguf", {"m.gguf": 5}) / "m.gguf"
    assert disk_bytes(file).value.median == directory_bytes(file) == 5


def test_tensor_bytes_count_shared_storage_once() -> None:
    module = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    assert tensor_bytes(module) == 800
    module[1].weight = module[0].weight
    assert tensor_bytes(module) == 400
    module.register_buffer("codes", torch.zeros(7, dtype=torch.uint8))
    assert tensor_bytes(module) == 407


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory_bytes()
    held = bytearray(64_000_000)
    held[::4096] = b"x" * len(held[::4096])
    assert 1_000_000 < before <= peak_memory_bytes()
    del held
    assert peak_memory_bytes() >= before
