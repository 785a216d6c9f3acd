"""Trains several runs side by side: one method, any seeds and settings of the optimizer."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import tasks
import torch
from methods import EXPLAINS, METHODS
from scores import best_temperature, logits_of, metrics, percent_right
from tasks import BATCH, Task, draw, network
from torch import Tensor, nn

APART = 500_000  # a student starts from other weights than the pre-trained model of its seed


@dataclass(frozen=True)
class Run:
    method: str
    seed: int
    lr: float
    weight_decay: float
    own: float | None = None  # the setting that is the method's own; None: as it comes


def learning_rate(progress: float, constant: bool = False) -> float:
    """As a share of its peak: up over the first twentieth of training, then down along a cosine, if it is not constant."""
    return 1.0 if constant else min(progress / 0.05, 0.5 + 0.5 * math.cos(math.pi * progress))


class SGD:
    """With Nesterov's momentum, as torch's, but a learning rate and a weight decay a run: parameters are (S * ..., ...)."""

    def __init__(self, parameters: Iterable[Tensor], lr: Sequence[float], weight_decay: Sequence[float]) -> None:
        self.parameters = list(parameters)
        self.momenta = [torch.zeros_like(p) for p in self.parameters]
        self.lr, self.weight_decay = (torch.tensor(x)[:, None] for x in (lr, weight_decay))

    @torch.no_grad()
    def step(self, share: float) -> None:
        """With that share of the learning rates."""
        for p, momentum in zip(self.parameters, self.momenta, strict=True):
            assert p.grad is not None
            of_runs = [x.view(len(self.lr), -1) for x in (p, p.grad, momentum)]
            weights, slope, velocity = of_runs
            slope.add_(self.weight_decay * weights)
            velocity.mul_(0.9).add_(slope)
            weights.sub_(share * self.lr * (slope + 0.9 * velocity))
            p.grad = None


def trained(
    task: Task, runs: Sequence[Run], starts: Sequence[int], teacher: nn.Module | None, device: str = "cpu"
) -> nn.Module:
    (name, own), *others = {(run.method, run.own) for run in runs}
    assert not others
    method = (METHODS | EXPLAINS)[name](own)
    seeds = [run.seed for run in runs]
    data, model = draw(task, seeds).to(device), network(task, starts).to(device)
    epochs, steps = method.length * task.epochs, task.steps // task.epochs
    generators = [torch.Generator().manual_seed(start + 1) for start in starts]
    torch.manual_seed(starts[0] + 2)
    with torch.device(device):
        optimizer = SGD(model.parameters(), [run.lr for run in runs], [run.weight_decay for run in runs])
        method.begin(model, data, epochs, task.augment, teacher)
        for epoch in range(epochs):
            order = torch.stack([torch.randperm(task.size, generator=g, device="cpu") for g in generators]).to(device)
            for step, index in enumerate(order.split(BATCH, dim=1)[:steps], epoch * steps + 1):
                method.loss(index).backward()
                optimizer.step(learning_rate(step / (epochs * steps), task.constant))
                method.after_step()
            method.after_epoch()
    return model


@functools.lru_cache(maxsize=4)
def pretrained(task: Task, runs: tuple[Run, ...], device: str = "cpu") -> nn.Module:
    """These cross-entropy runs, from weights of their own; kept in files, which workers read."""
    paths = {
        run: tasks.CACHE / f"{task.name}-{task.epochs}-{run.seed}-{run.lr:g}-{run.weight_decay:g}.pt" for run in runs
    }
    missing = [run for run, path in paths.items() if not path.exists()]
    if missing:
        tasks.CACHE.mkdir(parents=True, exist_ok=True)
        state = trained(task, missing, [run.seed for run in missing], None, device).cpu().state_dict()
        for i, run in enumerate(missing):
            own = paths[run].with_suffix(f".{os.getpid()}")
            torch.save({name: x.chunk(len(missing))[i].clone() for name, x in state.items() if x.ndim}, own)
            os.replace(own, paths[run])
    model = network(task, [run.seed for run in runs])
    alone = [torch.load(paths[run], weights_only=True) for run in runs]
    model.load_state_dict(model.state_dict() | {name: torch.cat([of[name] for of in alone]) for name in alone[0]})
    return model.to(device).eval().requires_grad_(False)


def results(
    task: Task, runs: Sequence[Run], teacher: tuple[float, float] | None, test: bool, device: str = "cpu"
) -> list[dict[str, Any]]:
    """A line a run; of a search, which the test set must not know of, accuracy on validation samples alone."""
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True  # grouped convolutions differ much
    seeds = [run.seed for run in runs]
    needs = METHODS[runs[0].method]().needs_teacher
    teachers = (
        pretrained(task, tuple(Run("cross-entropy", seed, *teacher) for seed in seeds), device) if needs else None
    )
    model = trained(task, runs, [seed + APART for seed in seeds], teachers, device)
    data = draw(task, seeds)
    held, lines = logits_of(model, data.validation_x.to(device)).cpu(), []
    tested = logits_of(model, data.test_x.to(device).expand(len(runs), *data.test_x.shape)).cpu() if test else None
    for i, run in enumerate(runs):
        line = vars(run) | {"validation": round(percent_right(held[i], data.validation_y[i]), 3)}
        if tested is not None:
            scale = best_temperature(held[i], data.validation_true[i])
            found = metrics(tested[i], data.test_y, scale)
            line |= {key: round(x, 5) for key, x in found.items()}
        lines.append(line)
    return lines
