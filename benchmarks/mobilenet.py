"""A whole MobileNetV2 of random weights, 224x224, in torch and with all convolutions packed, in turns.

python benchmarks/mobilenet.py --threads 2 --channels-last --layers
"""

import argparse
import copy
import time
from collections import defaultdict

import numpy as np
import torch
from layers import LAYOUTS, Pack
from torch import Tensor, nn

from rarefy.kernels import set_num_threads
from rarefy.nn import all_weights, replace_linear

# Channels in and out, how many times wider inside, stride.
BLOCKS = (
    (32, 16, 1, 1), (16, 24, 6, 2), (24, 24, 6, 1), (24, 32, 6, 2), (32, 32, 6, 1), (32, 32, 6, 1),
    (32, 64, 6, 2), (64, 64, 6, 1), (64, 64, 6, 1), (64, 64, 6, 1), (64, 96, 6, 1), (96, 96, 6, 1),
    (96, 96, 6, 1), (96, 160, 6, 2), (160, 160, 6, 1), (160, 160, 6, 1), (160, 320, 6, 1),
)  # fmt: skip


def convolved(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU6()]


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, wider: int, stride: int) -> None:
        super().__init__()
        inside = inputs * wider
        first = convolved(inputs, inside, 1) if wider > 1 else []
        second = convolved(inside, inside, 3, stride, inside)
        self.steps = nn.Sequential(*first, *second, *convolved(inside, outputs, 1)[:2])
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.steps(x) if self.adds else self.steps(x)


def packed(model: nn.Module, pack: Pack) -> nn.Module:
    made = copy.deepcopy(model)
    replace_linear(made, {w.layer: pack(w.read().contiguous().numpy()) for w in all_weights(made)})
    return made


def kind(module: nn.Module) -> str:
    if not isinstance(module, nn.Conv2d):
        return type(module).__name__
    return "depthwise" if module.groups > 1 else "1x1" if module.kernel_size == (1, 1) else "first"


class Watch:
    """The seconds of every call of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.seconds: list[float] = []
        self.began = 0.0
        layer.register_forward_pre_hook(self.begin)
        layer.register_forward_hook(self.end)

    def begin(self, *_: object) -> None:
        self.began = time.perf_counter()

    def end(self, *_: object) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--layers", action="store_true", help="the time of each convolution too, and of each kind")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    set_num_threads(arguments.threads)
    torch.manual_seed(0)
    blocks = (Block(*numbers) for numbers in BLOCKS)
    plain = nn.Sequential(*convolved(3, 32, 3, 2), *blocks, *convolved(320, 1280, 1)).eval()
    x = torch.randn(1, 3, 224, 224)
    if arguments.channels_last:
        plain, x = plain.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    models = {"torch": plain} | {name: packed(plain, LAYOUTS[name]) for name in ("int8", "bf16")}
    kinds = {name: kind(module) for name, module in plain.named_modules() if not list(module.children())}
    watched = kinds if arguments.layers else ()
    parts = {name: {layer: Watch(model.get_submodule(layer)) for layer in watched} for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for number in range(arguments.rounds + 2):
            for name, model in models.items():
                start = time.perf_counter()
                model(x)
                if number >= 2:
                    seconds[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    lasts = "last" if arguments.channels_last else "in front"
    print(f"{arguments.threads} threads, channels {lasts}: ms, and times faster than torch float32")
    print("  ".join(f"{name} {1e3 * taken:.2f} {medians['torch'] / taken:.2f}x" for name, taken in medians.items()))
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for layer in watched:
        taken_us = {name: 1e6 * float(np.median(watches[layer].seconds[2:])) for name, watches in parts.items()}
        for name, taken in taken_us.items():
            sums[kinds[layer]][name] += taken
        if isinstance(conv := plain.get_submodule(layer), nn.Conv2d):
            shape = f"{conv.in_channels}-{conv.out_channels}"
            print(
                f"{layer:10} {kinds[layer]:10} {shape:10} " + " ".join(f"{taken:7.0f}" for taken in taken_us.values())
            )
    for name, taken_us in sums.items():
        print(f"all {name:28} " + " ".join(f"{taken:7.0f}" for taken in taken_us.values()))


if __name__ == "__main__":
    main()
