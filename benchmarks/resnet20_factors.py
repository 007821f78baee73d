"""What methods do to a network of convolutions: ResNet-20 on CIFAR-10, with no training after them.

Each recipe compresses the convolutions of the nine blocks, calibrated with 576 training images. Printed for each, as
one JSON line: accuracy on the first test images, with the packed model; bytes of the packed layers, and of the biases
that bias correction gave them, as a fraction of bfloat16.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar import normalised, resnet20
from torch import Tensor, nn

import rarefy


def _one(method: str, **fields: Any) -> list[dict[str, Any]]:
    return [{"method": method, **fields}]


CORRECT, NORM = _one("bias-correction"), _one("rescale")
RECIPES: dict[str, list[dict[str, Any]]] = {
    **{
        f"{name}-{ratio}": _one(name, rank={"ratio": ratio})
        for name in ("tucker", "spatial", "svd", "svd-llm")
        for ratio in (0.75, 0.5, 0.35)
    },
    **{
        f"{name}-{ratio} on outputs": _one(name, rank={"ratio": ratio}, fit="outputs")
        for name in ("tucker", "spatial")
        for ratio in (0.75, 0.5, 0.35)
    },
    **{
        f"{name}-{percent}{label}": _one(name, pattern={"sparsity": percent / 100}) + more
        for name in ("magnitude", "wanda")
        for percent in (50, 70)
        for label, more in (
            ("", []), (" + bias-correction", CORRECT), (" + rescale", NORM),
            (" + rescale + bias-correction", NORM + CORRECT),
        )
    },
    **{
        f"{name}-0.5 + bias-correction": _one(name, rank={"ratio": 0.5}) + CORRECT for name in ("tucker", "spatial")
    },
    "spatial-0.25 + magnitude-75": _one("spatial", rank={"ratio": 0.25}, remainder="keep")
    + _one("magnitude", pattern={"sparsity": 0.75}),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="directory with resnet-cifar10 and cifar10")
    parser.add_argument("--images", type=int, default=2000, help="of the test")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("recipes", nargs="*", help=f"of {', '.join(RECIPES)}; default: all")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = resnet20(options.data)
    train = np.load(options.data / "cifar10" / "train-10k.npz")["images"][:576]
    test = np.load(options.data / "cifar10" / "test-2k.npz")
    batches = list(normalised(train).split(64))  # the last is kept back
    x, labels = normalised(test["images"][: options.images]), torch.from_numpy(test["labels"][: options.images])
    print(json.dumps({"recipe": "dense", "accuracy": _accuracy(model, x, labels)}), flush=True)
    for name in options.recipes or RECIPES:
        start = time.perf_counter()
        run = rarefy.compress(model, {"steps": RECIPES[name]}, calibration=batches, measure=False)
        seconds = time.perf_counter() - start
        packed = run.model()
        num_weights = sum(layout.shape[0] * layout.shape[1] for layout in run.layers.values())
        num_bytes = sum(layout.nbytes for layout in run.layers.values())
        biases = sum(4 * packed.get_submodule(layer).bias.numel() for layer in run.layers
                     if packed.get_submodule(layer).bias is not None)  # fmt: skip
        result = {"recipe": name, "accuracy": _accuracy(packed, x, labels), "kilobytes": round(num_bytes / 1000, 1)}
        share = round((num_bytes + biases) / (2 * num_weights), 3)
        print(json.dumps(result | {"share_of_bfloat16": share, "seconds": round(seconds, 1)}), flush=True)


def _accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        found = torch.cat([model(batch).argmax(1) for batch in x.split(100)])
    return round(float((found == labels).float().mean()), 4)


if __name__ == "__main__":
    main()
