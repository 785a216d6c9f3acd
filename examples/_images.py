"""What the examples of training loops share: 1,000 embedded images with 40% wrong labels, the network, the pre-trained model.

The 4,000 test images keep their labels. Learning rate, weight decay and epochs are those of quickstart.py.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

FILES = Path(__file__).parent / "data" / "fashion-mnist-mini"
EPOCHS = 40
WRONG_LABELS = dict(temperature=4.0, weights={"progressive": 0.5})  # settings where many are; otherwise leave them out
BATCH_SIZE = 100
SGD = dict(lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)


def load(part: str, size: int) -> tuple[Tensor, Tensor]:
    x, y = (
        gzip.decompress((FILES / f"{part}-{kind}-ubyte.gz").read_bytes()) for kind in ("images-idx3", "labels-idx1")
    )
    x, y = (torch.frombuffer(bytearray(raw), dtype=torch.uint8) for raw in (x[16:], y[8:]))
    return (x.view(-1, 784)[:size] - 73.0) / 90.0, y[:size].long()  # mean and standard deviation of the pixels


def train_set() -> TensorDataset:
    """The same wrong labels in every process, whatever the global generator's state."""
    x, y = load("train", 1000)
    g = torch.Generator().manual_seed(0)
    wrong = torch.randperm(len(x), generator=g)[:400]
    y[wrong] = (y[wrong] + torch.randint(1, 10, (400,), generator=g)) % 10
    return TensorDataset(x, y)


def test_set() -> TensorDataset:
    return TensorDataset(*load("t10k", 4000))


def new_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def pretrained_model() -> nn.Sequential:
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
