"""What the loops with a framework share: the data, the network, the pre-trained model.

1,000 embedded images, 40% of their labels wrong. The 4,000 test images have true labels.
Learning rate, weight decay and epochs are those of quickstart.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _data import read, spoil
from _networks import mlp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

EPOCHS = 40
BATCH_SIZE = 100
SGD = dict(lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)


def normalised(x: Tensor) -> Tensor:
    return (x.flatten(1) - 73.0) / 90.0  # mean and standard deviation of the pixels


def train_set() -> TensorDataset:
    """The same wrong labels in every process, whatever the global generator's state."""
    x, y, _, _ = read("fashion-mnist-mini")
    return TensorDataset(normalised(x[:1000]), spoil(y[:1000], 0.4, 10, torch.Generator().manual_seed(0)))


def test_set() -> TensorDataset:
    _, _, x, y = read("fashion-mnist-mini")
    return TensorDataset(normalised(x), y)


def new_model() -> nn.Module:
    return mlp(1, 28, 10)


def pretrained_model() -> nn.Module:
    """Phase 1: plain cross-entropy, in a plain loop."""
    model, (x, y) = new_model(), train_set().tensors
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(x)).split(BATCH_SIZE):
            loss = F.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Share of the test images that are classified right."""
    return sum((model(x).argmax(-1) == y).sum().item() for x, y in DataLoader(test_set(), 1000)) / 4000


def report(pretrained: nn.Module, student: nn.Module) -> None:
    print(f"test accuracy: pre-trained {accuracy(pretrained):.2%}, student {accuracy(student):.2%}")
