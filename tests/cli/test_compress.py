"""`rarefy compress` from the outside: what it prints, what it writes, and that a failure leaves nothing behind."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from rarefy.cli.progress import ProgressDisplay
from rarefy.core.results import RunReport

# Small enough for the tiny model: 24 windows of 32 tokens.
SMALL = ("--samples", 24, "--sequence-length", 32)
RECIPE = "steps:\n  - method: sparsegpt\n    pattern: {sparsity: 0.5}\n    values: {num_bits: 4, group_size: 32}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.fixture
def copy_of_llama(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    shutil.copytree(tiny_llama_dir, path)
    return path


@pytest.fixture(scope="module")
def compressed(tiny_llama_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """One full run, measured, in a process of its own as a user has it."""
    folder = tmp_path_factory.mktemp("compressed")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    command = [sys.executable, "-m", "rarefy", "compress", tiny_llama_dir, "-o", "OUT", "--recipe", "recipe.yaml"]
    command += ["--calibration", text_file, "--samples", "24", "--sequence-length", "32"]
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return {"out": folder / "OUT", "stdout": done.stdout, "stderr": done.stderr, "folder": folder}


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_ends_in_the_verdict(compressed: dict) -> None:
    text = compressed["stdout"]
    for expected in ("before", "after", "Size on disk", "Perplexity", "Untouched", "report.html"):
        assert expected in text
    assert max(map(len, text.splitlines())) <= 80
    assert all(character == "\n" or character.isprintable() for character in text)


def test_the_plan_comes_before_the_work(compressed: dict) -> None:
    everything = compressed["stdout"]
    assert "Plan" in everything
    assert everything.index("Plan") < everything.index("before")


def test_progress_goes_to_stderr(compressed: dict) -> None:
    for phase in ("load", "measure before", "compress", "measure after", "write"):
        assert f"\n{phase}: " in "\n" + compressed["stderr"]
    assert "\x1b" not in compressed["stderr"]


def test_the_directory_is_complete(compressed: dict) -> None:
    out: Path = compressed["out"]
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "recipe.yaml",
        "report.json",
        "report.html",
        "README.md",
    ):
        assert (out / name).stat().st_size > 0
    assert leftovers(compressed["folder"]) == ["OUT", "recipe.yaml"]
    report = RunReport.from_json(json.loads((out / "report.json").read_text(encoding="utf-8")))
    assert len(report.layers) == 14
    assert all(layer.sparsity >= 0.5 - 1e-6 for layer in report.layers)
    assert {metric.name for metric in report.metrics} >= {"disk_bytes", "perplexity", "decode_tokens_per_s"}
    assert report.untouched
    assert all(layer.reason for layer in report.untouched)


def test_the_result_can_be_used_at_once(run: Callable, compressed: dict) -> None:
    out = compressed["out"]
    generated = run("generate", out, "The river", "--max-new-tokens", 4)
    assert generated.code == 0
    listed = json.loads(run("inspect", out, "--json").out)
    assert len(listed["layers"]) == 14
    assert all(layer["zeros"] >= 0.5 - 1e-6 for layer in listed["layers"])
    assert "bitmask-int4-v1" in run("inspect", out).out


def test_the_recipe_in_the_directory_repeats_the_run(
    run: Callable, compressed: dict, tiny_llama_dir: Path, text_file: Path
) -> None:
    options = ("--calibration", text_file, *SMALL, "--no-measure")
    done = run("compress", tiny_llama_dir, "-o", "again", "--recipe", compressed["out"] / "recipe.yaml", *options)
    assert done.code == 0, done.err
    digests = [
        hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        for folder in (compressed["out"], Path("again"))
    ]
    assert digests[0] == digests[1]


def test_json_is_the_report(run: Callable, tiny_llama_dir: Path, recipe: Path, text_file: Path) -> None:
    options = ("--recipe", recipe, "--calibration", text_file, *SMALL, "--no-measure", "--json")
    done = run("compress", tiny_llama_dir, "-o", "out", *options)
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert data["out"].endswith("out")
    assert RunReport.from_json(data["report"]).layers


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    run: Callable, tiny_llama_dir: Path, recipe: Path, in_temporary_directory: Path
) -> None:
    done = run("compress", tiny_llama_dir, "-o", "out", "--recipe", recipe, "--dry-run")
    assert done.code == 0, done.err
    assert "bitmask-int4-v1" in done.out
    assert "to compress on a quiet machine" in " ".join(done.out.split())
    assert leftovers(in_temporary_directory) == []
    data = json.loads(run("compress", tiny_llama_dir, "-o", "out", "--recipe", recipe, "--dry-run", "--json").out)
    assert len(data["plan"]["layers"]) == 14


def test_a_dry_run_says_what_a_look_at_the_model_will_settle(
    run: Callable, tiny_llama_dir: Path, in_temporary_directory: Path
) -> None:
    text = "steps:\n  - method: wanda\n    pattern: {sparsity: 0.7}\n    allocation: owl\n"
    (in_temporary_directory / "owl.yaml").write_text(text, encoding="utf-8")
    done = run("compress", tiny_llama_dir, "-o", "out", "--recipe", "owl.yaml", "--dry-run")
    assert done.code == 0, done.err
    assert "~ " in done.out
    assert "a look at the dense model will say how many zeros each layer gives" in " ".join(done.err.split())
    (in_temporary_directory / "owl.yaml").write_text(text.replace("owl", "owi"), encoding="utf-8")
    done = run("compress", tiny_llama_dir, "-o", "out", "--recipe", "owl.yaml", "--dry-run", "--json")
    assert done.code == 2
    assert "owl.yaml:4: allocation is 'owi'" in done.err
    assert json.loads(done.out)["error"]["exit_code"] == 2


def test_an_existing_directory_needs_force(
    run: Callable, tiny_llama_dir: Path, copy_of_llama: Path, recipe: Path, text_file: Path
) -> None:
    before = (copy_of_llama / "model.safetensors").read_bytes()
    options = ("--recipe", recipe, "--calibration", text_file, *SMALL, "--no-measure")
    done = run("compress", tiny_llama_dir, "-o", copy_of_llama, *options)
    assert done.code == 2
    assert "--force" in done.err
    assert (copy_of_llama / "model.safetensors").read_bytes() == before
    done = run("compress", copy_of_llama, "-o", copy_of_llama, *options, "--force")
    assert done.code == 2
    assert "is read; --force will not delete it" in done.err
    assert (copy_of_llama / "model.safetensors").read_bytes() == before
    assert run("compress", tiny_llama_dir, "-o", copy_of_llama, *options, "--force").code == 0
    assert (copy_of_llama / "report.html").exists()


def broken_model(kind: str, model: Path) -> Path:
    """Break a copy of a good model in one way, and return what to name on the command line."""
    weights = model / "model.safetensors"
    if kind == "missing":
        return model / "nowhere"
    if kind == "not a model":
        (model / "config.json").unlink()
    elif kind == "a text file":
        (model / "notes.txt").write_text("hello", encoding="utf-8")
        return model / "notes.txt"
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "empty weights":
        weights.write_bytes(b"")
    elif kind == "no weights":
        weights.unlink()
    elif kind == "unknown architecture":
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        config |= {"model_type": "frobnicator", "architectures": ["FrobnicatorForCausalLM"]}
        (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    elif kind == "damaged config":
        (model / "config.json").write_text('{"model_type": "llama", ', encoding="utf-8")
    elif kind == "nan weights":
        tensors = load_file(weights)
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
        save_file(tensors, weights, metadata={"format": "pt"})
    return model


@pytest.mark.parametrize(
    ("kind", "code", "complaint"),
    [
        ("missing", 2, "nowhere"),
        ("not a model", 2, "config.json"),
        ("a text file", 2, "notes.txt"),
        ("truncated", 1, "model.safetensors"),
        ("empty weights", 1, "model.safetensors"),
        ("no weights", 2, "model"),
        ("unknown architecture", 2, "frobnicator"),
        ("damaged config", 1, "config.json"),
        ("nan weights", 1, "model.layers.1.mlp.up_proj"),
    ],
)
def test_a_bad_model_is_told_and_leaves_nothing_behind(
    run: Callable,
    copy_of_llama: Path,
    recipe: Path,
    text_file: Path,
    in_temporary_directory: Path,
    kind: str,
    code: int,
    complaint: str,
) -> None:
    model = broken_model(kind, copy_of_llama)
    options = ("--recipe", recipe, "--calibration", text_file, *SMALL, "--no-measure")
    done = run("compress", model, "-o", "out", *options)
    assert (done.code, "Traceback" in done.err) == (code, False), done.err
    assert complaint.lower() in done.err.lower()
    assert done.err.splitlines()[-1].startswith("error: ")
    assert "unexpected" not in done.err
    assert leftovers(in_temporary_directory) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no text"),
        ("   \n\n", "no text"),
        ("Only a few words.", "too short|tokens|window"),
        (b"\xff\xfe\x00bad", "UTF-8"),
    ],
    ids=["empty", "blank", "short", "binary"],
)
def test_bad_calibration_data_is_told(
    run: Callable,
    tiny_llama_dir: Path,
    recipe: Path,
    tmp_path: Path,
    in_temporary_directory: Path,
    text: str | bytes,
    complaint: str,
) -> None:
    file = tmp_path / "calibration.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    done = run("compress", tiny_llama_dir, "-o", "out", "--recipe", recipe, "--calibration", file, *SMALL)
    assert done.code == 2
    assert "calibration" in done.err
    assert any(part in done.err for part in complaint.split("|"))
    assert leftovers(in_temporary_directory) == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("steps:\n  - method: sparsegpt\n    patern: {sparsity: 0.5}\n", ["recipe.yaml:3", "patern", "pattern"]),
        ("steps:\n  - method: sparsegtp\n    pattern: {sparsity: 0.5}\n", ["recipe.yaml:2", "sparsegtp", "sparsegpt"]),
        ("steps:\n  - method: magnitude\n    pattern: {sparsity: 1.5}\n", ["recipe.yaml:3", "1.5"]),
        ("steps:\n  - method: magnitude\n    pattern: {keep: 5, group: 4}\n", ["recipe.yaml:3", "keep"]),
        (
            "steps:\n  - method: magnitude\n    pattern: {sparsity: 0.5}\n    targets: ['nothing.*']\n",
            ["recipe.yaml:2", "nothing.*", "q_proj"],
        ),
        ("steps: []\n", ["steps"]),
        ("", ["recipe"]),
        ("steps: [\n", ["recipe.yaml:2"]),
        ("!!python/object/apply:os.system ['touch pwned']\n", ["recipe"]),
    ],
    ids=["key", "method", "sparsity", "n-m", "target", "no-steps", "empty", "syntax", "code"],
)
def test_a_bad_recipe_is_told_with_its_line(
    run: Callable, tiny_llama_dir: Path, tmp_path: Path, in_temporary_directory: Path, content: str, expected: list[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(content, encoding="utf-8")
    done = run("compress", tiny_llama_dir, "-o", "out", "--recipe", file, *SMALL)
    assert done.code == 2, done.err
    assert "Traceback" not in done.err
    for part in expected:
        assert part in done.err
    assert leftovers(in_temporary_directory) == []


def test_a_missing_recipe_lists_what_there_is(run: Callable, tiny_llama_dir: Path) -> None:
    done = run("compress", tiny_llama_dir, "-o", "out", "--recipe", "sparse-51")
    assert done.code == 2
    assert "sparse-50-int4" in done.err


def test_layers_too_small_for_a_pattern_are_named(run: Callable, tiny_llama_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "steps:\n  - method: magnitude\n    targets: ['*_proj']\n    pattern: {keep: 16, group: 64}\n", encoding="utf-8"
    )
    narrow = tmp_path / "narrow"
    shutil.copytree(tiny_llama_dir, narrow)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(tiny_llama_dir, hidden_size=32, intermediate_size=48, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(narrow)
    done = run("compress", narrow, "-o", "out", "--recipe", file, *SMALL, "--no-measure")
    assert done.code == 2
    assert "model.layers.0" in done.err
    assert "64" in done.err
    assert not Path("out").exists()


def test_after_ctrl_c_the_same_command_goes_on(
    run: Callable,
    tiny_llama_dir: Path,
    recipe: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_temporary_directory: Path,
) -> None:
    command = ("compress", tiny_llama_dir, "--recipe", recipe, "--calibration", text_file, *SMALL, "--no-measure")
    assert run(*command, "-o", "whole").code == 0
    with monkeypatch.context() as patch:
        original = ProgressDisplay.__call__

        def interrupt(self: ProgressDisplay, phase: str, done: int, total: int, detail: str = "") -> None:
            original(self, phase, done, total, detail)
            if detail == "model.layers.1.mlp.down_proj":
                raise KeyboardInterrupt

        patch.setattr(ProgressDisplay, "__call__", interrupt)
        done = run(*command, "-o", "out")
    assert done.code == 130
    kept = "interrupted; the same command will go on after 1 finished block (kept in out.partial)"
    assert done.err.splitlines()[-1] == kept
    assert leftovers(in_temporary_directory) == ["out.partial", "whole"]
    done = run(*command, "-o", "out")
    assert done.code == 0, done.err
    assert "out.partial holds the work of an interrupted run: going on after 1 finished block" in done.err.splitlines()
    assert leftovers(in_temporary_directory) == ["out", "whole"]
    one, other = (Path(name, "model.safetensors").read_bytes() for name in ("out", "whole"))
    assert one == other


def test_ctrl_c_leaves_no_output_and_says_what_it_leaves(tiny_llama_dir: Path, text_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rarefy", "compress", tiny_llama_dir, "-o", "OUT", "--calibration", text_file]
    command += ["--samples", 256, "--sequence-length", 64, "--eval-data", text_file]
    # Whoever starts the tests in the background has them ignore the signal, and a child would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    # The plan is on stdout before the work begins.
    first = process.stdout.readline()
    assert first
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    kept = leftovers(tmp_path)
    assert kept in ([], ["OUT.partial"])
    # With or without a block that the next run need not solve again, as fast as this machine is.
    says = ("(kept in OUT.partial)\n", "(and replaces OUT.partial)\n") if kept else "interrupted; nothing was written\n"
    assert err.endswith(says)
