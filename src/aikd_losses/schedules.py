"""Settings that change from epoch to epoch: a number, or a callable from the epoch (counted from 0) to one."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from . import _checks
from ._carrier import Carrier

Schedule = float | Callable[[int], float]


@dataclass(frozen=True)
class LinearRamp:
    r"""Goes linearly from `start` to `end`, a step an epoch, the first in epoch 0, the last in the last epoch; stays there.

    $$\text{epoch} \mapsto \text{start} + (\text{end} - \text{start})\,\frac{\text{epoch}+1}{\text{num\_epochs}}$$

    Args:
        end: the last value, finite and not negative.
        num_epochs: how many epochs the ramp takes, at least 1.
        start: what it would be in the epoch before the first (default 0), finite and not negative.

    >>> [LinearRamp(0.8, num_epochs=4)(epoch) for epoch in (0, 1, 3, 9)]
    [0.2, 0.4, 0.8, 0.8]

    Reference: from 0, the rule for alpha in Kim et al., PS-KD, 2021, https://arxiv.org/abs/2006.12000.
    """

    end: float
    num_epochs: int
    start: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        _checks.number("end", self.end, 0.0, math.inf)
        _checks.integer("num_epochs", self.num_epochs, 1)
        _checks.number("start", self.start, 0.0, math.inf)

    def __call__(self, epoch: int) -> float:
        _checks.integer("epoch", epoch, 0)
        if epoch + 1 >= self.num_epochs:
            return self.end
        return self.start + (self.end - self.start) * (epoch + 1) / self.num_epochs


class Scheduled(Carrier):
    """Keeps the epoch, which is saved, and what its settings are in it, which follows."""

    _carried: ClassVar[tuple[str, ...]] = ("epoch", "_now")
    _saved = ("epoch",)
    epoch: Tensor  # int64
    _now: Tensor  # float64

    def _start(self) -> None:
        self.epoch = torch.zeros((), dtype=torch.int64, device="cpu")
        self._now = self._next(0)[1]
        self._enter(0, self._now)

    def _at(self, epoch: int) -> float | list[float]:
        """The settings of an epoch."""
        raise NotImplementedError  # pragma: no cover (each has its own)

    def _next(self, epoch: int | None) -> tuple[int, Tensor]:
        """That epoch, or the one after this one, and the settings of it; either may be refused."""
        to = int(self.epoch) + 1 if epoch is None else _checks.integer("epoch", epoch, 0)
        return to, torch.tensor(self._at(to), dtype=torch.float64, device="cpu")

    def _enter(self, epoch: int, now: Tensor) -> None:
        self.epoch.fill_(epoch)
        self._now.copy_(now)

    def _check_load(self, saved: Mapping[str, Tensor]) -> None:
        self._next(int(saved["epoch"]))

    def _fill(self, saved: Mapping[str, Tensor]) -> None:
        self._enter(*self._next(int(saved["epoch"])))


def shown(schedule: Schedule, now: Tensor) -> str:
    """For a `repr`: the value of this epoch and, where it changes, by what."""
    return f"{value(now)} by {called(schedule)}" if callable(schedule) else value(now)


def value(now: Tensor) -> str:
    return "?" if now.is_meta else f"{float(now):.6g}"


def called(function: object) -> str:
    """For a `repr`: a function by its name, not its address; anything else as it shows itself."""
    return getattr(function, "__qualname__", None) or repr(function)


def evaluate(name: str, schedule: Schedule, epoch: int, high: float) -> float:
    value = schedule(epoch) if callable(schedule) else schedule
    return _checks.number(f"{name}({epoch})" if callable(schedule) else name, value, 0.0, high)
