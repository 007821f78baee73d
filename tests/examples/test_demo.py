"""What `make demo` runs, with less calibration: the whole road on a real model, as a user sees it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "demo.py"


@pytest.mark.slow
def test_the_demo_compresses_a_real_model_and_generates_text(smollm2_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo-out"
    command = [sys.executable, DEMO, "--out", out, "--samples", "8"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stderr
    for expected in (
        "Plan",
        "Size on disk",
        "Perplexity",
        "Untouched: 61 layers",
        "report.html",
        "$ rarefy generate",
        "Done in",
    ):
        assert expected in done.stdout
    assert "tokens/s" in done.stderr
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert len(report["layers"]) == 211
    changes = {metric["name"]: metric for metric in report["metrics"]}
    assert changes["disk_bytes"]["after"]["median"] < changes["disk_bytes"]["before"]["median"]
    assert changes["decode_tokens_per_s"]["after"]["low"] > changes["decode_tokens_per_s"]["before"]["high"]
