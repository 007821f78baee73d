"""What every method does to a small sentence encoder: MiniLM-L6 on STS-B, with no training.

Each recipe compresses the linear layers of the six blocks, calibrated with sentences of train.csv. Printed for each, as
one JSON line: Spearman's correlation on test.csv (mean pooling, cosine) with the weights as stored, in float32; bits a
weight; seconds. The measured column of docs/methods.md comes from here.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import rarefy
from rarefy.measure.data import read_pairs
from rarefy.measure.similarity import module_embed, similarity
from rarefy.models import load_model

HALF = {"sparsity": 0.5}
LOW = {"ratio": 0.5}
INT4 = {"num_bits": 4, "group_size": 64}
COLUMNS, MLP_OUT = {"axis": "columns", "sparsity": 0.25}, "encoder.layer.?.output.dense"
WORDS = "embeddings.word_embeddings"
# rank and zeros that take 8.00 bits a weight together, as the factors of half of the parameters do
BESIDE, REST = {"ratio": 0.125}, {"sparsity": 0.6875}


def _one(method: str, **fields: Any) -> list[dict[str, Any]]:
    return [{"method": method, **fields}]


RECIPES: dict[str, list[dict[str, Any]]] = {
    **{f"{name}-50": _one(name, pattern=HALF) for name in ("random", "magnitude", "wanda", "ria", "dsnot", "lasso")},
    **{f"{name}-50": _one(name, pattern=HALF) for name in ("sparsegpt", "alps")},
    # the inputs of the second product of each MLP, which are outputs of a GELU
    "apoz-columns-25": _one("apoz", pattern=COLUMNS, threshold=0.1, targets=MLP_OUT),
    "magnitude-columns-25": _one("magnitude", pattern=COLUMNS, targets=MLP_OUT),
    "random-columns-25": _one("random", pattern=COLUMNS, targets=MLP_OUT),
    **{
        f"{name}-70 {rule}": _one(name, pattern={"sparsity": 0.7}, allocation=rule)
        for name in ("magnitude", "wanda", "alps")
        for rule in ("uniform", "erk", "owl", "global")
        if (name, rule) != ("alps", "global")
    },
    "wanda-50 + rescale": _one("wanda", pattern=HALF) + _one("rescale"),
    "wanda-50 + refit": _one("wanda", pattern=HALF) + _one("refit"),
    **{f"{name}-half": _one(name, rank=LOW) for name in ("svd", "svt", "asvd", "svd-llm", "drone", "scaled-gd")},
    **{f"{name}-embedding-half": _one(name, rank=LOW, targets=WORDS) for name in ("svd", "frequency-svd")},
    "svd-llm + sparsegpt": _one("svd-llm", rank=BESIDE, remainder="keep") + _one("sparsegpt", pattern=REST),
    "svd-llm + alps": _one("svd-llm", rank=BESIDE, remainder="keep") + _one("alps", pattern=REST),
    "sparsegpt + svd-llm": _one("sparsegpt", pattern=REST) + _one("svd-llm", rank=BESIDE),
    "oats": _one("oats", rank=BESIDE, pattern=REST),
    "oats + refit": _one("oats", rank=BESIDE, pattern=REST) + _one("refit"),
    "robust-pca": _one("robust-pca", rank=BESIDE, pattern=REST),
    "rtn-int4": _one("rtn", values=INT4),
    "gptq-int4": _one("gptq", values=INT4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="all-MiniLM-L6-v2 as a Hugging Face directory")
    parser.add_argument("--data", type=Path, required=True, help="directory with STS-B's train.csv and test.csv")
    parser.add_argument("--sentences", type=int, default=128, help="of calibration")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("recipes", nargs="*", help=f"of {', '.join(RECIPES)}; default: all")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pairs = read_pairs(options.data / "test.csv")
    loaded = load_model(options.model)
    sentences = _sentences(options.data / "train.csv", options.sentences)
    examples = [dict(loaded.tokenizer([text], return_tensors="pt")) for text in sentences]
    dense = similarity(module_embed(loaded.model, loaded.tokenizer), pairs).value.median
    print(json.dumps({"recipe": "dense", "spearman": round(dense, 4)}), flush=True)
    for name in options.recipes or RECIPES:
        start = time.perf_counter()
        run = rarefy.compress(
            loaded.model, {"steps": RECIPES[name]}, calibration=examples, samples=len(examples), measure=False
        )
        seconds = time.perf_counter() - start
        weights = {layer: loaded.model.get_submodule(layer).weight.data for layer in run.layers}
        for layer, layout in run.layers.items():
            loaded.model.get_submodule(layer).weight.data = torch.from_numpy(layout.to_dense())
        value = similarity(module_embed(loaded.model, loaded.tokenizer), pairs).value.median
        for layer, weight in weights.items():
            loaded.model.get_submodule(layer).weight.data = weight
        bits = 8 * sum(layout.nbytes for layout in run.layers.values()) / sum(w.numel() for w in weights.values())
        result = {"recipe": name, "spearman": round(value, 4), "lost": round(dense - value, 4)}
        print(json.dumps(result | {"bits": round(bits, 2), "seconds": round(seconds, 1)}), flush=True)


def _sentences(path: Path, number: int) -> list[str]:
    """The first sentences of pairs spread over the file."""
    pairs = read_pairs(path)
    return [pair.first for pair in pairs[:: max(1, len(pairs) // number)][:number]]


if __name__ == "__main__":
    main()
