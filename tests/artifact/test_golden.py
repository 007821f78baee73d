"""An artifact of format version 1 must be read, and written again to the same bytes, for ever."""

import json
from pathlib import Path

import pytest

from rarefy.artifact import read_artifact, write_artifact
from rarefy.layouts import FORMATS

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
ARTIFACTS = sorted(path.name for path in GOLDEN.glob("artifact-v1*"))


def test_every_format_is_in_an_artifact():
    layers = {layer for name in ARTIFACTS for layer in read_artifact(GOLDEN / name).layers}
    assert layers == {f"layer.{format}" for format in FORMATS}


@pytest.mark.parametrize("name", ARTIFACTS)
def test_artifact(tmp_path, snapshot, name):
    artifact = read_artifact(GOLDEN / name)
    for format in (layer.removeprefix("layer.") for layer in artifact.layers):
        golden = json.loads((GOLDEN / "layouts" / f"{format}.json").read_text())
        assert artifact.layer(f"layer.{format}").to_dense().tolist() == golden["dense"]
    assert artifact.layer("head").to_dense().tolist() == artifact.layer("layer.dense-bf16-v1").to_dense().tolist()
    assert artifact.tensor("norm.weight").tolist() == [1.0, -2.5, 0.125]
    assert artifact.tensor("position.weight").tolist() == [[1.0, -2.5]]
    assert artifact.stored("ids").tolist() == [0, 1, 2, 3]
    write_artifact(
        tmp_path / "out",
        config=artifact.config,
        layers=artifact.layers,
        tied=artifact.tied,
        tensors={name: artifact.stored(name) for name in artifact.names()},
        extra_files={},
    )
    assert snapshot(tmp_path / "out") == snapshot(GOLDEN / name)
