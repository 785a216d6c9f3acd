"""The tasks that `accuracy.py` compares methods on, for several runs side by side: what is drawn for their seeds, and networks.

Runs side by side are the first axis of everything: images `(S, N, ...)`, labels `(S, N)`, logits `(S, N, C)`. A network for S
runs has S sets of weights that never meet: its layers are grouped, so that each layer is one operation for all of them.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CACHE = Path("runs") / "study" / "cache"
EXAMPLES = Path(__file__).parents[2] / "examples"
BATCH = 100


@dataclass(frozen=True)
class Task:
    source: str  # of the samples
    size: int  # of the training set
    noise: int  # percent of its labels that are wrong
    net: str
    epochs: int
    augment: bool = False
    validation: int = 4_000
    constant: bool = False  # the learning rate

    @property
    def name(self) -> str:
        return f"{self.source}-{self.size}-{self.noise}-{self.net}" + "-constant" * self.constant

    @property
    def steps(self) -> int:
        return self.epochs * (self.size // BATCH)


TASKS = {
    task.name: task
    for task in (
        Task("mnist1d", 4_000, 0, "mlp", 240),
        Task("mnist1d", 4_000, 40, "mlp", 60),
        *(Task("mnist1d", 1_000, noise, "cnn", epochs) for noise, epochs in ((0, 200), (20, 120), (40, 40))),
        *(Task("mnist1d", 4_000, noise, "cnn", epochs) for noise, epochs in ((0, 120), (20, 40), (40, 40))),
        *(Task("fashion-mnist", 2_000, noise, "resnet", 240, augment=True) for noise in (0, 40)),
        *(Task("fashion-mnist", 10_000, noise, "resnet", 80, augment=True) for noise in (0, 40)),
    )
}


@dataclass
class Data:
    """Of several runs; the test set is the same for all."""

    x: Tensor
    y: Tensor  # as wrong as they are
    validation_x: Tensor
    validation_y: Tensor
    validation_true: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int

    def to(self, device: str) -> Data:
        moved = (x.to(device) if isinstance(x, Tensor) else x for x in vars(self).values())
        return Data(*moved)

    def images(self, index: Tensor) -> Tensor:
        """Of ids (S, B)."""
        return self.x[torch.arange(len(self.x))[:, None], index]

    def labels(self, index: Tensor) -> Tensor:
        return self.y.gather(1, index)


@functools.lru_cache(maxsize=2)
def pool(source: str, folder: Path | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What training and validation sets are drawn from, and the test set; kept in a file, which the workers read."""
    path = CACHE / f"{source}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_suffix(f".{os.getpid()}")
        torch.save(generate_mnist1d() if source == "mnist1d" else images(folder), own)
        os.replace(own, path)
    return tuple(torch.load(path, weights_only=True))  # type: ignore[return-value]


def images(folder: Path | None) -> tuple[Tensor, ...]:
    """A folder of IDX files; with the mean and deviation of the training images at 0 and 1."""
    sys.path.append(str(EXAMPLES))
    from _data import read_idx  # all that the study takes from the examples

    if folder is None:
        raise SystemExit("accuracy.py: for fashion-mnist pass --data-dir, the folder of its four IDX files.")
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


def draw(task: Task, seeds: Sequence[int]) -> Data:
    """What a seed draws is the same in any company."""
    x, y, test_x, test_y = pool(task.source)
    classes = int(y.max()) + 1

    def spoilt(labels: Tensor, g: torch.Generator) -> Tensor:
        wrong = torch.randperm(len(labels), generator=g)[: round(task.noise / 100 * len(labels))]
        labels = labels.clone()
        labels[wrong] = (labels[wrong] + torch.randint(1, classes, (len(wrong),), generator=g)) % classes
        return labels

    runs = []
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        train, held = torch.randperm(len(x), generator=g)[: task.size + task.validation].split(
            [task.size, task.validation]
        )
        runs.append((x[train], spoilt(y[train], g), x[held], spoilt(y[held], g), y[held]))
    return Data(*map(torch.stack, zip(*runs, strict=True)), test_x, test_y, classes)


def augmented(x: Tensor) -> Tensor:
    """Images (S, B, 1, height, width), each shifted by up to 2 pixels and flipped half the time."""
    *runs, _, height, width = x.shape
    padded = F.pad(x, (2, 2, 2, 2)).flatten(0, 1)
    n = len(padded)
    top, left = torch.randint(5, (2, n, 1))
    row, column = top + torch.arange(height), left + torch.arange(width)
    column = torch.where(torch.rand(n, 1) < 0.5, column.flip(1), column)
    moved = padded[torch.arange(n)[:, None, None], 0, row[:, :, None], column[:, None, :]]
    return moved.view(*runs, 1, height, width)


class Grouped(nn.Module):
    """S networks in one, on images (S, B, 1, height, width): `layers` works on (B, S * channels, ...), with groups."""

    def __init__(self, runs: int, layers: nn.Module) -> None:
        super().__init__()
        self.runs, self.layers = runs, layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.transpose(0, 1).flatten(1, 2)).unflatten(1, (self.runs, -1)).transpose(0, 1)


class Block(nn.Module):
    """A pre-activation residual block (He et al., 2016, https://arxiv.org/abs/1603.05027) that halves the sides."""

    def __init__(self, runs: int, fan_in: int, fan_out: int) -> None:
        super().__init__()
        of = functools.partial(nn.Conv2d, groups=runs, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(runs * fan_in), nn.BatchNorm2d(runs * fan_out)
        self.conv1 = of(runs * fan_in, runs * fan_out, 3, 2, 1)
        self.conv2 = of(runs * fan_out, runs * fan_out, 3, 1, 1)
        self.shortcut = of(runs * fan_in, runs * fan_out, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        return self.shortcut(y) + self.conv2(F.relu(self.norm2(self.conv1(y))))


class Linear(nn.Module):
    """(S, B, inputs) -> (S, B, outputs), by nn.Linear's own first weights."""

    def __init__(self, runs: int, inputs: int, outputs: int) -> None:
        super().__init__()
        layers = [nn.Linear(inputs, outputs) for _ in range(runs)]
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().T for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach()[None] for layer in layers]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class Conv(nn.Module):
    """(S, B, length, inputs) -> (S, B, length / 2, outputs), normalised over the batch: a convolution of width 5, as one
    product of matrices, which a CPU does faster than groups."""

    def __init__(self, runs: int, inputs: int, outputs: int) -> None:
        super().__init__()
        layers = [nn.Conv1d(inputs, outputs, 5, bias=False) for _ in range(runs)]
        self.weight = nn.Parameter(
            torch.stack([layer.weight.detach().permute(2, 1, 0).flatten(0, 1) for layer in layers])
        )
        self.norm = nn.BatchNorm1d(runs * outputs)

    def forward(self, x: Tensor) -> Tensor:
        _, batch, length, _ = x.shape
        padded = F.pad(x, (0, 0, 2, 2))
        seen = torch.cat([padded[:, :, i : i + length : 2] for i in range(5)], -1).flatten(1, 2)
        out = (seen @ self.weight).transpose(0, 1)  # (B * length / 2, S, outputs)
        return self.norm(out.flatten(1)).view_as(out).transpose(0, 1).unflatten(1, (batch, -1))


class OverLength(nn.Module):
    """The mean."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(2)


def network_of(task: Task, runs: int, features: int, classes: int) -> nn.Module:
    if task.net == "mlp":
        return nn.Sequential(
            Linear(runs, features, 100), nn.ReLU(), Linear(runs, 100, 100), nn.ReLU(), Linear(runs, 100, classes)
        )
    if task.net == "cnn":
        convolutions = [layer for inputs in (1, 25, 25) for layer in (Conv(runs, inputs, 25), nn.ReLU())]
        return nn.Sequential(nn.Unflatten(2, (-1, 1)), *convolutions, OverLength(), Linear(runs, 25, classes))
    stem = nn.Conv2d(runs, runs * 16, 3, 2, 1, groups=runs, bias=False)
    layers = [stem, Block(runs, 16, 24), nn.BatchNorm2d(runs * 24), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(Grouped(runs, nn.Sequential(*layers)), Linear(runs, 24, classes))


def network(task: Task, starts: Sequence[int]) -> nn.Module:
    """With the weights that each start would give alone."""
    x, y, *_ = pool(task.source)
    made = functools.partial(network_of, task, features=x.shape[-1], classes=int(y.max()) + 1)
    alone = []
    for start in starts:
        torch.manual_seed(start)
        alone.append(made(runs=1).state_dict())
    together = made(runs=len(starts))
    joined = {name: torch.cat([of[name] for of in alone]) for name, own in alone[0].items() if own.ndim}
    together.load_state_dict(together.state_dict() | joined)
    return together
