"""Zeros in ResNet-20 on CIFAR-10 before any fine-tuning: global magnitude, Taylor, OBD and oBERT beside chance.

Every run prunes the 18 convolutions of the blocks (the first convolution and the classifier stay dense), packs them,
and estimates the statistics of the batch norms anew on the images that also gave the gradients. Printed are a table
and, as the last line, JSON: the accuracy on all test images of the weights as stored; of chance the mean over seeds.
The images have been through JPEG, which costs the dense model about ten points.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar import normalised, resnet20
from torch import Tensor, nn

import rarefy
from rarefy.measure.accuracy import array_accuracy
from rarefy.nn import find_weight

SPARSITIES = (0.5, 0.8, 0.9)
SEEDS = (0, 1)
BATCH = 100


METHODS: dict[str, dict[str, Any]] = {
    "random, uniform": {"method": "random"},
    "random, global": {"method": "random", "allocation": "global"},
    "magnitude, uniform": {"method": "magnitude"},
    "magnitude, global": {"method": "magnitude", "allocation": "global"},
    "taylor, global": {"method": "taylor", "allocation": "global"},
    "obd, global": {"method": "obd", "allocation": "global"},
    "obert, uniform": {"method": "obert"},
    "obert, global": {"method": "obert", "allocation": "global"},
    "obert 48, uniform": {"method": "obert", "block_size": 48},
    "obert 48, global": {"method": "obert", "block_size": 48, "allocation": "global"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="directory with cifar10/ and resnet-cifar10/")
    parser.add_argument("--images", type=int, default=1000, help="of training, for gradients and batch norms")
    parser.add_argument("--labels", choices=("data", "model"), default="data", help="of the gradients")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(METHODS)}; default: all")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = resnet20(options.data)
    train = np.load(options.data / "cifar10" / "train-10k.npz")
    test = np.load(options.data / "cifar10" / "test-2k.npz")
    images = normalised(train["images"][: options.images]).split(BATCH)
    labels = torch.from_numpy(train["labels"][: options.images]).long().split(BATCH)
    tests = normalised(test["images"]), test["labels"]
    dense = array_accuracy(model, *tests).value.median
    results: dict[str, Any] = {"dense": dense, "num_test": len(test["labels"]), "num_images": options.images}
    results |= {"seeds_of_random": SEEDS, "labels": options.labels, "methods": {}}
    print(f"dense: {100 * dense:.1f} %; standard error {_error(dense, len(test['labels'])):.1f}", file=sys.stderr)
    loss = None if options.labels == "data" else _drawn_labels()
    print("| zeros | " + " | ".join(f"{100 * sparsity:.0f} %" for sparsity in SPARSITIES) + " |")
    print("|---|" + "---|" * len(SPARSITIES))
    for name in options.methods or METHODS:
        row = []
        for sparsity in SPARSITIES:
            seeds = SEEDS if name.startswith("random") else (None,)
            found = []
            for seed in seeds:
                step = {**METHODS[name], "pattern": {"sparsity": sparsity}}
                if seed is not None:
                    step["seed"] = seed
                recipe = {"steps": [step], "rest_dtype": "float32", "reestimate_batch_norm": True}
                run = rarefy.compress(
                    model, recipe, calibration=images, labels=labels, loss=loss, samples=len(images), measure=False
                )
                zeros = np.mean(np.concatenate([layout.to_dense().ravel() == 0 for layout in run.layers.values()]))
                assert abs(zeros - sparsity) < 1e-3, (name, sparsity, zeros)
                found.append(array_accuracy(_unpacked(model, run), *tests).value.median)
            row.append(float(np.mean(found)))
        results["methods"][name] = dict(zip(map(str, SPARSITIES), row, strict=True))
        print(f"| {name} | " + " | ".join(f"{100 * value:.1f}" for value in row) + " |", flush=True)
    print(json.dumps(results))


def _unpacked(model: nn.Module, run: Any) -> nn.Module:
    """What was stored, in torch's own modules, which take less time here than the packed ones."""
    plain = copy.deepcopy(model)
    packed = run.model()
    for name, buffer in packed.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            plain.get_buffer(name).copy_(buffer)
    for layer, layout in run.layers.items():
        find_weight(plain, layer).write(torch.from_numpy(layout.to_dense()))
    return plain


def _drawn_labels() -> Any:
    """A loss with labels drawn from the model's own prediction, for the true Fisher matrix."""
    generator = torch.Generator().manual_seed(0)

    def loss(logits: Tensor, _: Tensor | None) -> Tensor:
        chances = torch.softmax(logits.detach(), dim=-1)
        return nn.functional.cross_entropy(logits, torch.multinomial(chances, 1, generator=generator)[:, 0])

    return loss


def _error(share: float, count: int) -> float:
    return 100 * math.sqrt(share * (1 - share) / count)


if __name__ == "__main__":
    main()
