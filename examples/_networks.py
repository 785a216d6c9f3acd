"""The examples' networks: `NETWORKS[name](channels, size, num_classes)` for images of size x size pixels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions, each after batch norm and ReLU."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(fan_in), nn.BatchNorm2d(fan_out)
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(fan_in, fan_out, 1, stride, bias=False) if stride > 1 or fan_in != fan_out else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.conv2(F.relu(self.norm2(self.conv1(y))))


def resnet18(channels: int, size: int, num_classes: int) -> nn.Module:
    """Pre-activation ResNet-18 with CIFAR's stem: He et al., 2016, https://arxiv.org/abs/1603.05027."""
    layers: list[nn.Module] = [nn.Conv2d(channels, 64, 3, 1, 1, bias=False)]
    fan_in = 64
    for width in (64, 128, 256, 512):
        layers += [Block(fan_in, width, 1 if width == 64 else 2), Block(width, width, 1)]
        fan_in = width
    head = [nn.BatchNorm2d(512), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes)]
    return nn.Sequential(*layers, *head)


def cnn(channels: int, size: int, num_classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for fan_in, fan_out in ((channels, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(fan_in, fan_out, 3, 1, 1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * (size // 8) ** 2, num_classes))


def mlp(channels: int, size: int, num_classes: int) -> nn.Module:
    hidden = [nn.Linear(channels * size**2, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(256, num_classes))


NETWORKS = {"resnet18": resnet18, "cnn": cnn, "mlp": mlp}
