"""An artifact of format version 1 must be read, and written again to the same bytes, for ever."""

import json
from pathlib import Path

import numpy as np

from rarefy.artifact import read_artifact, write_artifact
from rarefy.layouts import FORMATS

FIRST_FORMATS = {f"{kind}-{values}-v1" for kind in ("dense", "bitmask", "nm") for values in ("bf16", "int8", "int4")}
GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def test_every_format_goes_through_an_artifact(tmp_path):
    layers, dense = {}, {}
    for format, cls in FORMATS.items():
        golden = json.loads((GOLDEN / "layouts" / f"{format}.json").read_text())
        arrays = {
            name: np.frombuffer(bytes.fromhex(golden["arrays"][name]), dtype).reshape(shape)
            for name, (dtype, shape) in cls.array_spec(format, golden["meta"]).items()
        }
        layers[f"layer.{format}"] = cls.from_arrays(format, golden["meta"], arrays)
        dense[f"layer.{format}"] = golden["dense"]
    write_artifact(tmp_path / "out", config={"model_type": "x"}, layers=layers, tied={}, tensors={}, extra_files={})
    artifact = read_artifact(tmp_path / "out")
    assert {name: layer.to_dense().tolist() for name, layer in artifact.layers.items()} == dense


def test_artifact(tmp_path, snapshot):
    artifact = read_artifact(GOLDEN / "artifact-v1")
    formats = {"dense-f32-v1", *FIRST_FORMATS}
    assert set(artifact.layers) == {f"layer.{format}" for format in formats}
    for format in formats:
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
    assert snapshot(tmp_path / "out") == snapshot(GOLDEN / "artifact-v1")
