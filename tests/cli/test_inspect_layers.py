"""`rarefy inspect` on layers other than linear ones."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

import tiny


def test_convolutions_can_be_compressed(run, tmp_path):
    tiny.whisper().save_pretrained(tmp_path / "m")
    outcome = run("inspect", tmp_path / "m", "--json")
    assert outcome.code == 0
    front = {x["name"]: x for x in json.loads(outcome.out)["layers"]}["model.encoder.conv1"]
    assert (front["kind"], front["compressible"], front["reason"]) == ("conv", True, None)
    assert (front["shape"], front["matrix"]) == ([32, 8, 3], [32, 24])


def test_the_transposed_layers_of_gpt2_can_be_compressed(run, tmp_path):
    tiny.gpt2().save_pretrained(tmp_path / "m")
    outcome = run("inspect", tmp_path / "m")
    assert outcome.code == 0
    (line,) = (line for line in outcome.out.splitlines() if "c_attn" in line)
    assert "32x96" in line
    assert line.rstrip().endswith("ok")
