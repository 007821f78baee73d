import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from rarefy.artifact import check_output, read_artifact, tensor_file, write, write_artifact
from rarefy.core.errors import OutputError, PathError


def test_the_same_content_gives_the_same_bytes(tmp_path, content, snapshot):
    def digest(path):
        return {name: hashlib.sha256(data).hexdigest() for name, data in snapshot(path).items()}

    first = write_artifact(tmp_path / "a", **content)
    backwards = {**content, "layers": dict(reversed(content["layers"].items()))}
    backwards["tensors"] = dict(reversed(content["tensors"].items()))
    second = write_artifact(tmp_path / "b", **backwards)
    assert digest(first) == digest(second)


def test_config(artifact_dir):
    config = json.loads((artifact_dir / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["text_config"] == {"dtype": "float32", "n": 1}
    assert "torch_dtype" not in config
    quantization = config["quantization_config"]
    assert (quantization["quant_method"], quantization["format_version"]) == ("rarefy", 1)
    assert quantization["tied"] == {"m.head": "m.embed"}
    assert quantization["layers"]["m.embed"] == {"format": "dense-bf16-v1", "shape": [3, 12]}


def test_a_model_without_compressed_layers_is_a_plain_one(tmp_path, content):
    path = write_artifact(tmp_path / "out", **{**content, "layers": {}, "tied": {}})
    assert "quantization_config" not in json.loads((path / "config.json").read_text())
    assert read_artifact(path).names() == tuple(sorted(content["tensors"]))


def test_a_quantization_config_of_the_input_is_replaced(tmp_path, content):
    config = {"quantization_config": {"quant_method": "other"}}
    path = write_artifact(tmp_path / "out", **{**content, "config": config})
    assert len(read_artifact(path).layers) == 3
    assert config == {"quantization_config": {"quant_method": "other"}}


def test_missing_parents_are_made(tmp_path, content):
    path = write_artifact(tmp_path / "a" / "b" / "out", **content)
    assert len(read_artifact(path).layers) == 3


def test_relative_path(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert write_artifact("out", **content) == tmp_path / "out"


def test_an_existing_output_is_kept_without_force(artifact_dir, content, snapshot):
    before = snapshot(artifact_dir)
    with pytest.raises(PathError, match=r"already exists.*--force"):
        write_artifact(artifact_dir, **content)
    assert snapshot(artifact_dir.parent).keys() == {f"out/{name}" for name in before}


def test_force_replaces_all_of_it(artifact_dir, content, snapshot):
    (artifact_dir / "stale").write_text("x")
    opened = read_artifact(artifact_dir)
    write_artifact(artifact_dir, **{**content, "extra_files": {}}, force=True)
    assert sorted(snapshot(artifact_dir.parent)) == ["out/config.json", "out/model.safetensors"]
    assert opened.tensor("m.norm.weight").tolist() == [1, 2, 3]  # who has the old one open still reads it


def test_force_does_not_delete_what_is_no_model(tmp_path, content):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("x")
    with pytest.raises(PathError, match="not a model directory"):
        write_artifact(home, **content, force=True)
    with pytest.raises(PathError, match="a file is in the way"):
        write_artifact(home / "thesis.txt", **content, force=True)
    assert (home / "thesis.txt").read_text() == "x"


def test_an_output_that_could_be_nowhere_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(PathError, match=r"file: a file is in the way"):
        check_output(tmp_path / "file" / "out" / "deep", force=False)
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.F_OK and path.exists())
    with pytest.raises(PathError, match=r"cannot be written to"):
        check_output(tmp_path / "new" / "out", force=False)


def test_force_does_not_delete_what_is_read(artifact_dir, tmp_path, monkeypatch):
    inside, link = artifact_dir / "texts" / "a.txt", tmp_path / "link"
    inside.parent.mkdir()
    inside.write_text("x")
    link.symlink_to(artifact_dir)
    for read in (artifact_dir, link, str(inside)):
        with pytest.raises(PathError, match=r"is read; --force will not delete it"):
            check_output(artifact_dir, force=True, inputs=(None, {"steps": []}, read))
    monkeypatch.chdir(artifact_dir)
    for other in (tmp_path, "default", "org/model"):  # names of what is elsewhere look like paths of what is here
        assert check_output(artifact_dir, force=True, inputs=(other,)) == artifact_dir


def test_an_empty_directory_may_be_filled(tmp_path, content):
    (tmp_path / "out").mkdir()
    assert check_output(tmp_path / "out", force=False) == tmp_path / "out"
    assert len(read_artifact(write_artifact(tmp_path / "out", **content)).layers) == 3


def test_a_link_keeps_pointing_at_the_output(tmp_path, content):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert write_artifact(tmp_path / "link", **content) == tmp_path / "real"
    assert (tmp_path / "link").is_symlink()


class Failing:
    """Lets a number of writes pass, then fails in the middle of one."""

    def __init__(self, passes, error):
        self.passes, self.error = passes, error

    def __call__(self, file, data):
        self.passes -= 1
        if self.passes < 0:
            file.write(bytes(data)[: len(data) // 2])
            raise self.error
        file.write(data)


def attempt(out, content):
    try:
        write_artifact(out, **content, force=True)
    except (OutputError, KeyboardInterrupt, MemoryError) as error:
        return error
    return None


ERRORS = [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("old", [True, False])
def test_a_failure_in_any_write_leaves_everything_as_it_was(tmp_path, content, snapshot, monkeypatch, error, old):
    root = tmp_path / "work"
    root.mkdir()
    out = root / "new" / "out"
    if old:
        write_artifact(out, **content)
        (out / "mark").write_text("old")
    before = snapshot(root)
    for passes in range(100):
        failing = Failing(passes, error)
        monkeypatch.setattr(tensor_file, "write_bytes", failing)
        monkeypatch.setattr(write, "write_bytes", failing)
        caught = attempt(out, content)
        if caught is None:
            break
        assert isinstance(caught, OutputError if isinstance(error, OSError) else type(error))
        assert not isinstance(error, OSError) or "No space left" in str(caught)
        assert snapshot(root) == before
        assert sorted(p.name for p in root.rglob("*") if p.is_dir()) == (["1_Pooling", "new", "out"] if old else [])
    assert passes > 5
    assert len(read_artifact(out).layers) == 3
    assert not (out / "mark").exists()


@pytest.mark.parametrize("failing_rename", [1, 2])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=["io", "ctrl-c"])
def test_a_failing_rename_brings_the_old_output_back(
    artifact_dir, content, snapshot, monkeypatch, failing_rename, error
):
    before = snapshot(artifact_dir.parent)
    calls = 0
    rename = Path.rename

    def fail(self, target):
        nonlocal calls
        calls += 1
        if calls == failing_rename:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        write_artifact(artifact_dir, **{**content, "extra_files": {}}, force=True)
    assert snapshot(artifact_dir.parent) == before


def test_ctrl_c_after_the_rename_leaves_the_new_output_alone(artifact_dir, content, snapshot, monkeypatch):
    sync = write._sync_directory

    def interrupted(path):
        if path == artifact_dir.parent:
            raise KeyboardInterrupt
        sync(path)

    monkeypatch.setattr(write, "_sync_directory", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_artifact(artifact_dir, **{**content, "extra_files": {}}, force=True)
    assert sorted(snapshot(artifact_dir.parent)) == ["out/config.json", "out/model.safetensors"]


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "a/../../x", "", ".", "a\\b", "config.json", "./config.json", "a/b.safetensors", write.INDEX],
)
def test_extra_files_stay_inside_and_replace_nothing(tmp_path, content, name):
    with pytest.raises(OutputError, match="file name"):
        write_artifact(tmp_path / "out", **{**content, "extra_files": {name: b""}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": {"m.embed.values": np.zeros(1, dtype=np.float32)}}, "twice"),
        ({"tensors": {"x": np.zeros(1, dtype=np.complex64)}}, "dtype complex64"),
        ({"tied": {"a": "nothing"}}, "tied"),
        ({"tied": {"m.0.q": "m.embed"}}, "tied"),
        ({"config": {"a": object()}}, "JSON"),
    ],
)
def test_contradictory_content(tmp_path, content, change, message):
    with pytest.raises(OutputError, match=message):
        write_artifact(tmp_path / "out", **{**content, **change})
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path, content):
    (tmp_path / "file").write_text("")
    with pytest.raises(PathError, match="a file is in the way"):
        write_artifact(tmp_path / "file" / "out", **content)
