"""Settings that change from epoch to epoch: a number, or a callable from the epoch (counted from 0) to one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from . import _checks

Schedule = float | Callable[[int], float]


@dataclass(frozen=True)
class LinearRamp:
    r"""Rises linearly from `end / num_epochs` in epoch 0 to `end` in the last epoch, and stays there.

    $$\text{epoch} \mapsto \min\left(\text{end}\,\frac{\text{epoch}+1}{\text{num\_epochs}}, \text{end}\right)$$

    Args:
        end: the last value, finite and not negative.
        num_epochs: how many epochs the ramp takes, at least 1.

    >>> [LinearRamp(0.8, num_epochs=4)(epoch) for epoch in (0, 1, 3, 9)]
    [0.2, 0.4, 0.8, 0.8]

    Reference: the rule for alpha in Kim et al., PS-KD, 2021, https://arxiv.org/abs/2006.12000.
    """

    end: float
    num_epochs: int

    def __post_init__(self) -> None:
        _checks.number("end", self.end, 0.0, math.inf)
        _checks.integer("num_epochs", self.num_epochs, 1)

    def __call__(self, epoch: int) -> float:
        _checks.integer("epoch", epoch, 0)
        return self.end * min(epoch + 1, self.num_epochs) / self.num_epochs


def shown(schedule: Schedule, now: Tensor) -> str:
    """For a `repr`: the value of this epoch and, where it changes, by what."""
    value = "?" if now.is_meta else f"{float(now):.6g}"
    return f"{value} by {called(schedule)}" if callable(schedule) else value


def called(function: object) -> str:
    """For a `repr`: a function by its name, not its address; anything else as it shows itself."""
    return getattr(function, "__qualname__", None) or repr(function)


def check(name: str, schedule: Schedule, high: float) -> Schedule:
    """`schedule` itself, if it gives a number in [0, high] for epoch 0."""
    evaluate(name, schedule, 0, high)
    return schedule


def evaluate(name: str, schedule: Schedule, epoch: int, high: float) -> float:
    value = schedule(epoch) if callable(schedule) else schedule
    return _checks.number(f"{name}({epoch})" if callable(schedule) else name, value, 0.0, high)
