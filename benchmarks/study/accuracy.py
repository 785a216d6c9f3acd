"""Does it work? Methods x data x seeds in one harness, paired over seeds.

    make study                            # two small tasks, one setting for every method: a first impression, no verdict
    make study ARGS="--tune"              # each method's settings are searched first
    make study ARGS="--tune --data mnist1d-4000-0,mnist1d-4000-40 --net cnn,mlp"

A task is a data set with a size and a share of wrong labels (percent), and a network: `mnist1d-1000-40`, `cnn`. Each run
is one line of `<task>.jsonl` in the folder of results; what is there is not run again, so a study that was stopped goes on
where it was.

The rules. Training sets and their wrong labels are drawn anew for every seed; the search has seeds of its own. Every method
gets the same number of steps (cross-entropy also twice that), the same grid of learning rates and weight decays, then a few
values of the one setting that is its own; what is best in accuracy on 2,000 validation samples, whose labels are as wrong
as the training set's, is run on the seeds of the study. A setting at an edge of the grid may not be the method's best, and
is named. The pre-trained model of a seed is a cross-entropy run on its training set. The test set (true labels) chooses
nothing. Scaled values are those after dividing the logits by the temperature that suits the validation samples with their
true labels.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tasks
import torch
from methods import METHODS, Method
from report import Found, table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scores import best_temperature, logits_of, metrics, percent_right
from tasks import Data, Task, draw, network
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))
from machine import machine

Setting = dict[str, Any]  # learning rate, weight decay and the method's own setting
FOLDER = Path("runs") / "study"
LEARNING_RATES = (0.03, 0.1, 0.3, 1.0)
WEIGHT_DECAYS = (7e-4, 2e-3, 6e-3, 2e-2, 6e-2)
NOT_SEARCHED: Setting = {"lr": 0.05, "weight_decay": 5e-3, "own": None}
SHOWN = (
    "ce", "ce twice as long", "ce stopped early", "label smoothing", "mixup", "cs-kd",
    "deterministic", "progressive", "full",
)  # fmt: skip
TUNING_SEEDS = (1000, 1001)
BATCH = 100


def steps_of(task: Task) -> int:
    """Ten epochs at least: what was predicted in the last one is no use to a method that sees few of them."""
    size = task.parts[1]
    return max(600 if size <= 2_000 else 1_200, 10 * size // BATCH)


def learning_rate(progress: float, peak: float) -> float:
    """Up over the first twentieth of training, then down along a cosine."""
    return peak * min(progress / 0.05, 0.5 + 0.5 * math.cos(math.pi * progress))


def train(task: Task, data: Data, method: Method, seed: int, lr: float, weight_decay: float) -> nn.Module:
    model = network(task, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    per_epoch = len(data.y) // BATCH
    epochs = method.length * steps_of(task) // per_epoch
    method.begin(model, data, epochs)
    g = torch.Generator().manual_seed(seed + 1)
    torch.manual_seed(seed + 2)
    for epoch in range(epochs):
        order = torch.randperm(len(data.y), generator=g)
        for step in range(per_epoch):
            progress = (epoch * per_epoch + step + 1) / (epochs * per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, lr)
            loss = method.loss(order[step * BATCH : (step + 1) * BATCH], progress)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            method.after_step()
        method.after_epoch()
    return model


@functools.lru_cache(maxsize=64)
def pretrained(task: Task, seed: int, lr: float, weight_decay: float) -> dict[str, Tensor]:
    """The weights of the seed's cross-entropy run. A student of that seed starts elsewhere (see `run`)."""
    path = tasks.CACHE / f"{task.name}-{seed}-{lr}-{weight_decay}.pt"
    if not path.exists():
        model = train(task, draw(task, seed), METHODS["ce"](), seed, lr, weight_decay)
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_suffix(f".{os.getpid()}")
        torch.save(model.state_dict(), own)
        os.replace(own, path)
    return dict(torch.load(path, weights_only=True))


@dataclass(frozen=True)
class Run:
    task: Task
    method: str
    seed: int
    lr: float
    weight_decay: float
    own: float | None  # the setting that is the method's own; None: as it comes
    teacher: tuple[float, float] | None  # learning rate and weight decay of the pre-trained model

    def key(self) -> str:
        """Two runs with the same key are the same run: to a method that needs no pre-trained model it does not matter which."""
        needed = METHODS[self.method]().needs_teacher
        teacher = self.teacher if needed else self.teacher is not None
        return json.dumps([self.method, self.seed, self.lr, self.weight_decay, self.own, teacher])


def run(r: Run) -> dict[str, Any]:
    torch.set_num_threads(1)
    data = draw(r.task, r.seed)
    method = METHODS[r.method](r.own)
    if method.needs_teacher:
        assert r.teacher is not None
        method.teacher = network(r.task, 0)
        method.teacher.load_state_dict(pretrained(r.task, r.seed, *r.teacher))
    # Every method starts from the same weights, which are not the pre-trained model's own start.
    start = r.seed if r.method == "ce" and r.teacher is None else r.seed + 500_000
    began = time.process_time()
    model = train(r.task, data, method, start, r.lr, r.weight_decay)
    seconds = time.process_time() - began
    held = logits_of(model, data.validation_x)
    scale = best_temperature(held, data.validation_true)
    return {
        "method": r.method, "seed": r.seed, "lr": r.lr, "weight_decay": r.weight_decay, "own": r.own,
        "teacher": r.teacher, "seconds": round(seconds, 3),
        "fitted": percent_right(logits_of(model, data.x), data.y),
        "validation": percent_right(held, data.validation_y),
        **metrics(logits_of(model, data.test_x), data.test_y, scale), **method.report(),
    }  # fmt: skip


def run_of(task: Task, line: dict[str, Any]) -> Run:
    return Run(task, *(line[name] for name in ("method", "seed", "lr", "weight_decay", "own", "teacher")))


class Results:
    """The lines of a task's file; what is there is not run again."""

    def __init__(self, task: Task, folder: Path) -> None:
        self.task, self.path = task, folder / f"{task.name}.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.lines = [json.loads(line) for line in lines]
        self.done = {run_of(task, line).key(): line for line in self.lines if "method" in line}

    def add(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            if not self.lines:
                file.write(json.dumps({"machine": machine()}) + "\n")
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        self.done[run_of(self.task, line).key()] = line


def run_all(runs: list[Run], results: Results, jobs: int, console: Console, what: str) -> list[dict[str, Any]]:
    missing = [r for r in runs if r.key() not in results.done]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with (
        Progress(*columns, console=console, transient=True) as progress,
        multiprocessing.get_context("fork").Pool(jobs) as workers,
    ):
        for line in progress.track(workers.imap_unordered(run, missing), total=len(missing), description=what):
            results.add(line)
    return [results.done[r.key()] for r in runs]


def best(lines: list[dict[str, Any]]) -> Setting:
    """The setting with the best validation accuracy, mean over the tuning seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(json.dumps([line["lr"], line["weight_decay"], line["own"]]), []).append(line)
    top = max(groups.values(), key=lambda group: statistics.fmean(line["validation"] for line in group))[0]
    return {name: top[name] for name in ("lr", "weight_decay", "own")}


def tune(task: Task, names: list[str], results: Results, jobs: int, console: Console) -> dict[str, Setting]:
    """Cross-entropy first: it gives the teacher. Then the grid, and the method's own setting at the best of it."""

    def tried(
        settings: dict[str, list[tuple[float, float, float | None]]], teacher: tuple[float, float] | None
    ) -> dict[str, list[dict[str, Any]]]:
        """The lines of every method's settings."""
        runs = [
            Run(task, name, seed, *s, teacher) for name, of in settings.items() for s in of for seed in TUNING_SEEDS
        ]
        lines = run_all(runs, results, jobs, console, f"{task.name} tuning")
        return {name: [line for line in lines if line["method"] == name] for name in settings}

    grid = [(lr, decay, None) for lr, decay in itertools.product(LEARNING_RATES, WEIGHT_DECAYS)]
    tuned = {"ce": best(tried({"ce": grid}, None)["ce"])}
    teacher = tuned["ce"]["lr"], tuned["ce"]["weight_decay"]
    lines = tried({name: grid for name in names if name != "ce"}, teacher)
    at = {name: best(of) for name, of in lines.items()}
    own = {name: [(s["lr"], s["weight_decay"], value) for value in METHODS[name]().grid] for name, s in at.items()}
    return tuned | {name: best(lines[name] + more) for name, more in tried(own, teacher).items()}


def as_tuned(task: Task, name: str, seed: int, tuned: dict[str, Setting]) -> Run:
    at, ce = (tuned.get(of, NOT_SEARCHED) for of in (name, "ce"))
    return Run(task, name, seed, at["lr"], at["weight_decay"], at["own"], (ce["lr"], ce["weight_decay"]))


def study(
    names: list[str], seeds: int, tuned: dict[str, Setting], results: Results, jobs: int, console: Console
) -> Found:
    runs = [as_tuned(results.task, name, seed, tuned) for seed in range(seeds) for name in names]
    lines = run_all(runs, results, jobs, console, results.task.name)
    return {name: {line["seed"]: line for line in lines if line["method"] == name} for name in names}


def doubts(names: list[str], tuned: dict[str, Setting]) -> list[str]:
    """What keeps the table from being a verdict."""
    found = []
    blind = [name for name in names if name not in tuned]
    if blind:
        lr, decay = NOT_SEARCHED["lr"], NOT_SEARCHED["weight_decay"]
        found.append(
            f"NOT SEARCHED, so no verdict: learning rate {lr:g} and weight decay {decay:g}, whatever suits each, for "
            f"{', '.join(blind) if len(blind) < len(names) else 'every method'}. --tune searches."
        )
    for key, what, grid in (("lr", "learning rate", LEARNING_RATES), ("weight_decay", "weight decay", WEIGHT_DECAYS)):
        at_edge = [name for name in names if name in tuned and tuned[name][key] in (grid[0], grid[-1])]
        if at_edge:
            found.append(f"AT THE EDGE of the grid, so perhaps not at its best: {what} of {', '.join(at_edge)}.")
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--data", default="mnist1d-1000-0,mnist1d-1000-40", help="source-size-percent,... (default %(default)s)"
    )
    p.add_argument("--net", default="cnn", help="comma-separated: cnn, mlp (default cnn)")
    p.add_argument("--methods", default=",".join(SHOWN), help="comma-separated, or all (default %(default)s)")
    p.add_argument("--data-dir", type=Path, help="folder of the IDX files of an image data set")
    p.add_argument("--results", type=Path, default=FOLDER, help=f"folder of the lines of the runs (default {FOLDER})")
    p.add_argument("--seeds", type=int, default=10)
    p.add_argument("--jobs", type=int, default=os.cpu_count())
    p.add_argument("--tune", action="store_true", help="search the settings of what has none yet")
    args = p.parse_args()
    asked = METHODS if args.methods == "all" else args.methods.split(",")
    names = list(dict.fromkeys(["ce", *asked]))  # what the others are compared with is always there
    for name in names:
        if name not in METHODS:
            p.error(f"--methods must be some of {', '.join(METHODS)}; got {name!r}.")
    if args.seeds < 1:
        p.error(f"--seeds must be at least 1; got {args.seeds}.")
    console = Console(width=150)
    settings = args.results / "tuned.json"
    every: dict[str, Any] = json.loads(settings.read_text()) if settings.exists() else {}
    for data, net in itertools.product(args.data.split(","), args.net.split(",")):
        task = Task(data, net)
        results = Results(task, args.results)
        tasks.pool(task.parts[0], args.data_dir)
        tuned = every.setdefault(task.name, {})
        missing = [name for name in names if name not in tuned]
        if args.tune and missing:
            tuned |= tune(task, missing, results, args.jobs, console)
            settings.write_text(json.dumps(every, indent=1) + "\n")
        console.print(table(task.name, study(names, args.seeds, tuned, results, args.jobs, console)))
        for doubt in doubts(names, tuned):
            console.print(doubt, markup=False, highlight=False)


if __name__ == "__main__":
    main()
