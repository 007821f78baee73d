import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rarefy.artifact import parse_quantization_config, read_artifact, write_artifact
from rarefy.core.errors import DamagedFileError, LayoutError, PathError, UnsupportedModelError


def edit_config(path, change):
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def test_everything_comes_back(artifact_dir, content):
    artifact = read_artifact(artifact_dir)
    assert dict(artifact.tied) == content["tied"]
    assert set(artifact.layers) == set(content["layers"])
    assert len(artifact.layers) == 3
    for name, layout in content["layers"].items():
        read = artifact.layers[name]
        assert (read.format, read.meta()) == (layout.format, layout.meta())
        for key, array in layout.arrays().items():
            assert np.array_equal(read.arrays()[key], array)
    assert np.array_equal(artifact.layer("m.head").to_dense(), content["layers"]["m.embed"].to_dense())
    assert artifact.names() == tuple(sorted(content["tensors"]))
    assert artifact.tensor("m.norm.weight").tolist() == [1, 2, 3]
    assert artifact.tensor("m.position.weight").tolist() == [[0.5, -1.5]]
    assert artifact.tensor("m.half").dtype == np.float32
    assert artifact.stored("m.ids").tolist() == [0, 1, 2]
    assert artifact.tensor("m.empty").shape == (0, 4)
    assert artifact.entry("m.position.weight").dtype == "BF16"


def test_weights_are_mapped_and_not_copied(artifact_dir):
    artifact = read_artifact(artifact_dir)
    array = artifact.tensor("m.norm.weight")
    assert not array.flags.owndata
    assert not array.flags.writeable
    assert not artifact.layer("m.0.q").values.flags.owndata


def test_what_is_not_there(artifact_dir):
    artifact = read_artifact(artifact_dir)
    with pytest.raises(DamagedFileError, match=r"no tensor 'm\.x'"):
        artifact.tensor("m.x")
    with pytest.raises(DamagedFileError, match=r"no compressed layer 'm\.x'"):
        artifact.layer("m.x")
    with pytest.raises(KeyError):
        artifact.layers["m.head"]
    with pytest.raises(UnsupportedModelError, match="I64"):
        artifact.tensor("m.ids")


def test_shards(tmp_path, content):
    path = write_artifact(tmp_path / "out", **content, shard_bytes=60)
    files = sorted(p.name for p in path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    artifact = read_artifact(path)
    assert index["metadata"]["total_size"] == sum(artifact.entry(name).nbytes for name in index["weight_map"])
    for name, layout in content["layers"].items():
        assert np.array_equal(artifact.layer(name).to_dense(), layout.to_dense())
    assert artifact.names() == tuple(sorted(content["tensors"]))


def test_a_plain_model_directory(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    weight = torch.randn(5, 7)
    tensors = {"w": weight.bfloat16(), "h": weight.half(), "f": weight, "d": weight.double()}
    save_torch(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    artifact = read_artifact(tmp_path)
    assert len(artifact.layers) == 0
    assert artifact.config == {"model_type": "llama"}
    for name, tensor in tensors.items():
        assert np.array_equal(artifact.tensor(name), tensor.float().numpy())
        assert artifact.tensor(name).dtype == np.float32


def test_a_real_model(minilm_dir):
    artifact = read_artifact(minilm_dir)
    expected = load_file(minilm_dir / "model.safetensors")
    assert artifact.names() == tuple(sorted(expected))
    assert all(np.array_equal(artifact.stored(name), array) for name, array in expected.items())


def test_paths_that_are_no_model(tmp_path):
    with pytest.raises(PathError, match="no such directory"):
        read_artifact(tmp_path / "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(PathError, match="not a directory"):
        read_artifact(tmp_path / "file")
    with pytest.raises(PathError, match=r"no config\.json"):
        read_artifact(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(PathError, match="only safetensors"):
        read_artifact(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', "\udcff", "[" * 100_000])
def test_config_that_is_no_object(artifact_dir, text):
    (artifact_dir / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(DamagedFileError, match=r"config\.json"):
        read_artifact(artifact_dir)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"quant_method": "gptq"}, UnsupportedModelError, "quant_method 'gptq'; allowed: rarefy"),
        ({"format_version": 2}, UnsupportedModelError, "format_version 2; allowed: 1, the only version"),
        ({"format_version": "1"}, UnsupportedModelError, "format_version '1'"),
        ({"format_version": True}, UnsupportedModelError, "format_version True"),
        ({"import": "os.system"}, DamagedFileError, r"unknown fields \['import'\]"),
        ({"layers": []}, DamagedFileError, "layers"),
        ({"layers": {"a": 1}}, DamagedFileError, "layers"),
        ({"layers": {"a": {"format": "zip"}}}, DamagedFileError, "layer a: format 'zip'; allowed: dense-f32-v1"),
        ({"layers": {"a": {"format": []}}}, DamagedFileError, "layer a"),
        ({"layers": {"a": {"format": "dense-f32-v1"}}}, LayoutError, "layer a"),
        ({"layers": {"a": {"format": "dense-f32-v1", "shape": [1, 2], "x": 1}}}, LayoutError, "metadata fields"),
        (
            {"layers": {"a": {"format": "dense-f32-v1", "shape": [1, 2]}}, "tied": {}},
            DamagedFileError,
            r"no tensor 'a\.values'",
        ),
        ({"tied": []}, DamagedFileError, "tied"),
        ({"tied": {"a": "nothing"}}, DamagedFileError, "tied"),
        ({"tied": {"m.0.q": "m.embed"}}, DamagedFileError, "tied"),
        ({"tied": {"a": ["m.embed"]}}, DamagedFileError, "tied"),
    ],
)
def test_quantization_config_is_checked(artifact_dir, change, error, message):
    edit_config(artifact_dir, lambda config: config["quantization_config"].update(change))
    with pytest.raises(error, match=message) as caught:
        read_artifact(artifact_dir)
    assert str(artifact_dir) in str(caught.value)


@pytest.mark.parametrize("fields", [None, [], "rarefy", 1])
def test_quantization_config_must_be_an_object(artifact_dir, fields):
    with pytest.raises(DamagedFileError):
        parse_quantization_config(fields)
    edit_config(artifact_dir, lambda config: config.update(quantization_config=fields))
    with pytest.raises(DamagedFileError):
        read_artifact(artifact_dir)


def test_metadata_that_contradicts_the_stored_arrays(artifact_dir):
    def change(config):
        config["quantization_config"]["layers"]["m.embed"]["shape"] = [12, 3]

    edit_config(artifact_dir, change)
    with pytest.raises(DamagedFileError, match=r"m\.embed\.values: U16 \(3, 12\); allowed: U16 \(12, 3\)"):
        read_artifact(artifact_dir)


def test_damaged_arrays_name_file_and_layer(artifact_dir, content):
    mask = content["layers"]["m.0.q"].mask.tobytes()
    path = artifact_dir / "model.safetensors"
    data = path.read_bytes()
    assert data.count(mask) == 1
    path.write_bytes(data.replace(mask, b"\xff" + mask[1:]))
    artifact = read_artifact(artifact_dir)
    artifact.layer("m.0.k")
    with pytest.raises(LayoutError, match=r"out layer m\.0\.q: bitmask-bf16-v1 mask"):
        artifact.layer("m.0.q")


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x.bin", "..\\x.safetensors", None, 5, ["x"]],
)
def test_the_index_may_not_leave_the_directory(tmp_path, shard):
    root = tmp_path / "model"
    root.mkdir()
    save_file({"a": np.zeros(1, dtype=np.float32)}, tmp_path / "model.safetensors")
    (root / "config.json").write_text("{}")
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(DamagedFileError, match="without directories"):
        read_artifact(root)


def test_an_index_that_is_wrong(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(DamagedFileError, match="no weight_map"):
        read_artifact(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    with pytest.raises(DamagedFileError, match=r"shard x\.safetensors is missing"):
        read_artifact(tmp_path)
    save_file({"b": np.zeros(1, dtype=np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(DamagedFileError, match="no tensor 'a'"):
        read_artifact(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files(artifact_dir):
    (artifact_dir / "config.json").chmod(0)
    with pytest.raises(PathError, match="Permission denied"):
        read_artifact(artifact_dir)


def read_everything(path):
    artifact = read_artifact(path)
    for name in artifact.layers:
        assert np.all(np.isfinite(artifact.layer(name).to_dense()))
    for name in artifact.names():
        artifact.stored(name)


FILES = ["config.json", "model.safetensors", "model.safetensors.index.json"]


@pytest.fixture
def damaged(tmp_path, content, request):
    """A directory and the file in it that the test damages; with shards where that file is the index."""
    shard_bytes = 100 if request.param.endswith("index.json") else 10**9
    return write_artifact(tmp_path / "out", **content, shard_bytes=shard_bytes), request.param


@pytest.mark.parametrize("damaged", FILES, indirect=True)
def test_every_truncation_is_noticed(damaged):
    root, name = damaged
    data = (root / name).read_bytes()
    for size in range(len(data) - 1):  # the last byte of a JSON file is a newline that nobody misses
        os.truncate(root / name, size)
        with pytest.raises(DamagedFileError, match=name):
            read_everything(root)
        (root / name).write_bytes(data)


@pytest.mark.parametrize("damaged", FILES, indirect=True)
def test_every_bit_flip_is_noticed_or_harmless(damaged):
    """A flip may change a weight or a name; nothing else than a RarefyError may come of it."""
    root, name = damaged
    data = (root / name).read_bytes()
    refused = 0
    with (root / name).open("r+b") as file:
        for position, byte in enumerate(data):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ (1 << bit)]), position)
                try:
                    read_everything(root)
                except (DamagedFileError, UnsupportedModelError):
                    refused += 1
            os.pwrite(file.fileno(), bytes([byte]), position)
    read_everything(root)
    assert refused > len(data)
