"""The tasks that `accuracy.py` compares methods on: what is drawn for a seed, and the networks."""

from __future__ import annotations

import functools
import itertools
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

CACHE = Path("runs") / "study" / "cache"
EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True)
class Task:
    data: str
    net: str

    @property
    def name(self) -> str:
        return f"{self.data}-{self.net}"

    @property
    def parts(self) -> tuple[str, int, float]:
        """Source, training samples, share of wrong labels."""
        source, size, noise = self.data.rsplit("-", 2)
        return source, int(size), int(noise) / 100


@dataclass
class Data:
    x: Tensor
    y: Tensor  # as wrong as they are
    validation_x: Tensor
    validation_y: Tensor
    validation_true: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int


@functools.lru_cache(maxsize=2)
def pool(source: str, folder: Path | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What training and validation sets are drawn from, and the test set; kept in a file, which the workers read."""
    path = CACHE / f"{source}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_suffix(f".{os.getpid()}")
        torch.save(generate_mnist1d() if source == "mnist1d" else images(source, folder), own)
        os.replace(own, path)
    return tuple(torch.load(path, weights_only=True))  # type: ignore[return-value]


def images(source: str, folder: Path | None) -> tuple[Tensor, ...]:
    """The embedded images, or a folder of IDX files; with the mean and deviation of the training images at 0 and 1."""
    sys.path.append(str(EXAMPLES))
    from _data import MINI, read_idx  # all that the study takes from the examples

    if source == "fashion-mnist-mini":
        folder = MINI
    if folder is None:
        raise SystemExit(f"accuracy.py: for {source} pass --data-dir, the folder of its four IDX files.")
    x, y, test_x, test_y = read_idx(folder)
    pixels = x.float()
    std, mean = torch.std_mean(pixels, dim=(0, 2, 3), keepdim=True)
    return (pixels - mean) / std, y, (test_x.float() - mean) / std, test_y


def generate_mnist1d() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Greydanus and Kobak, *Scaling Down Deep Learning with MNIST-1D*, 2024, by its own package."""
    from mnist1d.data import get_dataset_args, make_dataset

    args = get_dataset_args()
    args.num_samples, args.train_split, args.seed = 40_000, 0.75, 0
    made = make_dataset(args)
    x, y, test_x, test_y = (torch.as_tensor(made[key]) for key in ("x", "y", "x_test", "y_test"))
    return x.float(), y.long(), test_x.float(), test_y.long()


def draw(task: Task, seed: int) -> Data:
    source, size, noise = task.parts
    x, y, test_x, test_y = pool(source)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=g)
    held = 2_000 if len(x) > size + 2_000 else len(x) - size
    train, validation = order[:size], order[size : size + held]
    classes = int(y.max()) + 1

    def spoilt(labels: Tensor) -> Tensor:
        wrong = torch.randperm(len(labels), generator=g)[: round(noise * len(labels))]
        labels = labels.clone()
        labels[wrong] = (labels[wrong] + torch.randint(1, classes, (len(wrong),), generator=g)) % classes
        return labels

    return Data(
        x[train], spoilt(y[train]), x[validation], spoilt(y[validation]), y[validation], test_x, test_y, classes
    )


def network(task: Task, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    x, y, *_ = pool(task.parts[0])
    shape, classes = x.shape[1:], int(y.max()) + 1
    layers: list[nn.Module]
    if task.net == "mlp":
        widths = (shape.numel(), 100, 100)
        layers = [nn.Flatten()]
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], classes))
    if len(shape) == 1:
        layers = [nn.Unflatten(1, (1, -1))]
        for fan_in in (1, 25, 25):
            layers += [nn.Conv1d(fan_in, 25, 5, 2, 2, bias=False), nn.BatchNorm1d(25), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(25, classes))
    layers = []
    for fan_in, fan_out in ((shape[0], 16), (16, 32)):
        layers += [nn.Conv2d(fan_in, fan_out, 3, 2, 1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * math.prod((n + 3) // 4 for n in shape[1:]), classes))
