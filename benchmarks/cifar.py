"""ResNet-20 for CIFAR-10 with its weights and images, for the scripts beside this one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions and a shortcut that drops every other pixel and pads channels with zeros (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.missing = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, (B, C, Y, X)."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.missing:
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.missing // 2, self.missing // 2))
        return torch.relu(x + y)


class ResNet20(nn.Module):
    """The network of He et al. for images of 32 by 32 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), *(Block(32, 32, 1) for _ in range(2)))
        self.layer3 = nn.Sequential(Block(32, 64, 2), *(Block(64, 64, 1) for _ in range(2)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10)."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.layer3(self.layer2(self.layer1(y)))
        return self.linear(y.mean((2, 3)))


def resnet20(data: Path) -> ResNet20:
    """The network with its weights, in evaluation mode.

    Args:
        data: the directory that has `resnet-cifar10/`.
    """
    model = ResNet20().eval()
    model.load_state_dict(load_file(data / "resnet-cifar10" / "resnet20.safetensors"), strict=False)
    return model


def normalised(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """Images (B, Y, X, C) as the network takes them, float32 (B, C, Y, X)."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((torch.from_numpy(pixels).float() / 255 - mean) / std).movedim(-1, 1).contiguous()
