"""Does it work? Methods x data x seeds in one harness, every method tuned by the same small grid, paired over seeds.

    make study                                        # MNIST-1D, 1,000 points, as tuned in results/accuracy/tuned.json
    python benchmarks/accuracy.py --data mnist1d-1000-20 --net cnn --tune       # tune anew, then run
    python benchmarks/accuracy.py --table             # what is there, as tables and pictures

A task is a data set with a size and a share of wrong labels (percent), and a network: `mnist1d-1000-20`, `cnn`. Each run is one
line of `results/accuracy/<task>.jsonl`; what is there is not run again, so a study that was stopped goes on where it was.

The rules. Training sets and their wrong labels are drawn anew for every seed; tuning has seeds of its own. Every method gets
the same number of steps (cross-entropy also twice that), the same grid of learning rates and weight decays, lower weight decays
while the lowest is its best, then a few values of the one setting that is its own; what is best in accuracy on 2,000 validation
samples, whose labels are as wrong as the training set's, is run on the seeds of the study. The pre-trained model of a seed is a
cross-entropy run on its training set. The test set (10,000 samples, true labels) chooses nothing. Scaled values are those after
dividing the logits by the temperature that suits the validation samples with their true labels.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
import tasks
import torch
from cifar_train import learning_rate
from machine import RESULTS, machine
from methods import EVERY, FULL, METHODS, Method
from report import Found, plot, table, tables, whole_page
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scores import best_temperature, logits_of, metrics, percent_right
from tasks import Data, Task, draw, network
from torch import Tensor, nn

FOLDER = RESULTS / "accuracy"
LEARNING_RATES = (0.03, 0.1)
WEIGHT_DECAYS = (5e-3, 2e-2, 6e-2)
LOWER = (2e-3, 5e-4)  # one after the other, for a method whose best so far is the lowest
TUNING_SEEDS = (1000, 1001)
BATCH = 100


def steps_of(task: Task) -> int:
    """Ten epochs at least: what was predicted in the last one is no use to a method that sees few of them."""
    size = task.parts[1]
    return max(600 if size <= 2_000 else 1_200, 10 * size // BATCH)


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
        needed = EVERY[self.method]().needs_teacher
        teacher = self.teacher if needed else self.teacher is not None
        return json.dumps([self.method, self.seed, self.lr, self.weight_decay, self.own, teacher])


def run(r: Run) -> dict[str, Any]:
    torch.set_num_threads(1)
    data = draw(r.task, r.seed)
    method = EVERY[r.method](**({} if r.own is None else {"own": r.own}))
    if method.needs_teacher:
        assert r.teacher is not None
        teacher = network(r.task, 0)
        teacher.load_state_dict(pretrained(r.task, r.seed, *r.teacher))
        method.teacher = teacher.eval().requires_grad_(False)
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


def best(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The setting with the best validation accuracy, mean over the tuning seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(json.dumps([line["lr"], line["weight_decay"], line["own"]]), []).append(line)
    top = max(groups.values(), key=lambda group: statistics.fmean(line["validation"] for line in group))[0]
    return {name: top[name] for name in ("lr", "weight_decay", "own")}


def tune(task: Task, names: list[str], results: Results, jobs: int, console: Console) -> dict[str, dict[str, Any]]:
    """Cross-entropy first: it gives the teacher. Then the grid, lower weight decays where its lowest is best, and the method's
    own setting at the best of these."""

    def tried(settings: dict[str, list[tuple[float, float, float | None]]], teacher: Any) -> dict[str, Any]:
        """The lines of every method's settings."""
        runs = [
            Run(task, name, seed, *s, teacher) for name, of in settings.items() for s in of for seed in TUNING_SEEDS
        ]
        lines = run_all(runs, results, jobs, console, f"{task.name} tuning")
        return {name: [line for line in lines if line["method"] == name] for name in settings}

    def on_grid(names: list[str], teacher: Any) -> dict[str, Any]:
        lines: dict[str, Any] = {name: [] for name in names}
        for decays in (WEIGHT_DECAYS, *((lower,) for lower in LOWER)):
            grid = [(lr, decay, None) for lr, decay in itertools.product(LEARNING_RATES, decays)]
            for name, more in tried(dict.fromkeys(names, grid), teacher).items():
                lines[name] += more
            names = [name for name in names if best(lines[name])["weight_decay"] == min(decays)]
        return lines

    tuned = {"ce": best(on_grid(["ce"], None)["ce"])}
    teacher = tuned["ce"]["lr"], tuned["ce"]["weight_decay"]
    lines = on_grid([name for name in names if name != "ce"], teacher)
    at = {name: best(of) for name, of in lines.items()}
    own = {name: [(s["lr"], s["weight_decay"], value) for value in METHODS[name]().grid] for name, s in at.items()}
    return tuned | {name: best(lines[name] + more) for name, more in tried(own, teacher).items()}


def as_tuned(task: Task, name: str, seed: int, tuned: dict[str, Any]) -> Run:
    at, ce = tuned[name], tuned["ce"]
    return Run(task, name, seed, at["lr"], at["weight_decay"], at["own"], (ce["lr"], ce["weight_decay"]))


def dropped_in(tuned: dict[str, Any]) -> dict[str, Any]:
    """The full method in cross-entropy's place, at cross-entropy's learning rate and weight decay."""
    return dict.fromkeys(("ce", "full"), tuned["ce"])


def study(
    task: Task, names: list[str], seeds: int, tuned: dict[str, Any], results: Results, jobs: int, console: Console
) -> None:
    runs = [as_tuned(task, name, seed, tuned) for seed in range(seeds) for name in names]
    if "full" in names:
        runs += [as_tuned(task, "full", seed, dropped_in(tuned)) for seed in range(seeds)]
    run_all(list({r.key(): r for r in runs}.values()), results, jobs, console, task.name)


def of_study(results: Results, tuned: dict[str, Any]) -> Found:
    """Of each method the runs at its tuned setting on the seeds of the study."""
    seeds = sorted({line["seed"] for line in results.done.values()} - set(TUNING_SEEDS))
    found: Found = {}
    for name, seed in itertools.product(tuned, seeds):
        line = results.done.get(as_tuned(results.task, name, seed, tuned).key())
        if line:
            found.setdefault(name, {})[seed] = line
    return found


def setting_of_full(results: Results, tuned: dict[str, Any]) -> str | None:
    """The one of the full method's settings that the validation samples choose, as they choose a rival's own setting; None in
    a folder where the study is repeated at settings that were tuned elsewhere."""
    validation = {}
    for name in (name for name in FULL if name in tuned):
        keys = [as_tuned(results.task, name, seed, tuned).key() for seed in TUNING_SEEDS]
        if all(key in results.done for key in keys):
            validation[name] = statistics.fmean(results.done[key]["validation"] for key in keys)
    return max(validation, key=lambda name: validation[name], default=None)


def with_columns(results: Results, tuned: dict[str, Any]) -> Found:
    """Also the full method dropped in, and at the setting that was chosen, where these were run."""
    found = of_study(results, tuned)
    if "full" in found:
        columns = {
            "drop-in": of_study(results, dropped_in(tuned)).get("full"),
            "full tuned": found.get(setting_of_full(results, tuned) or ""),
        }
        found |= {name: lines for name, lines in columns.items() if lines}
    return found


def studied(every: dict[str, Any], folder: Path) -> dict[Task, Found]:
    """What was run on the seeds of the study, of every task."""
    found = {}
    of_tasks = [(Task(*name.rsplit("-", 1)), tuned) for name, tuned in every.items()]
    for task, tuned in sorted(of_tasks, key=lambda pair: (pair[0].parts[:2], pair[0].net, pair[0].parts[2])):
        of_task = with_columns(Results(task, folder), tuned)
        if len(of_task.get("ce", {})) > 1:
            found[task] = of_task
    return found


def write_pages(every: dict[str, Any]) -> None:
    found = studied(every, FOLDER)
    for task, of_task in found.items():
        plot(task, of_task)
    (report.DOCS / "accuracy-tables.md").write_text(tables(found))
    page = report.DOCS / "accuracy.md"
    page.write_text(whole_page(page.read_text(), found))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="mnist1d-1000-0,mnist1d-1000-20,mnist1d-1000-40", help="source-size-percent,...")
    p.add_argument("--net", default="cnn,mlp", help="comma-separated: cnn, mlp, resnet18")
    p.add_argument(
        "--methods",
        help="comma-separated (default: those that are tuned for the task; with --tune or without any, all)",
    )
    p.add_argument("--data-dir", type=Path, help="folder of the IDX or parquet files of an image data set")
    p.add_argument(
        "--results", type=Path, default=FOLDER, help="folder of the lines of the runs; another one repeats the study"
    )
    p.add_argument("--seeds", type=int, default=10)
    p.add_argument("--jobs", type=int, default=os.cpu_count())
    p.add_argument("--tune", action="store_true", help="tune anew what has no setting yet")
    p.add_argument("--table", action="store_true", help="show what is there and run nothing")
    args = p.parse_args()
    asked = args.methods.split(",") if args.methods else None
    for name in asked or ():
        if name not in METHODS:
            p.error(f"--methods must be some of {', '.join(METHODS)}; got {name!r}.")
    console = Console(width=170)
    settings = args.results / "tuned.json"
    known = settings if settings.exists() else FOLDER / "tuned.json"
    every: dict[str, Any] = json.loads(known.read_text()) if known.exists() else {}
    for data, net in itertools.product(args.data.split(","), args.net.split(",")):
        task = Task(data, net)
        results = Results(task, args.results)
        tasks.pool(task.parts[0], args.data_dir)
        names = asked or ([] if args.tune else list(every.get(task.name, {}))) or list(METHODS)
        untuned = [name for name in names if name not in every.get(task.name, {})]
        if untuned and not args.table:
            if not args.tune:
                p.error(f"{task.name} has no settings for {', '.join(untuned)} in {settings}: add --tune.")
            every[task.name] = every.get(task.name, {}) | tune(task, untuned, results, args.jobs, console)
            settings.parent.mkdir(parents=True, exist_ok=True)
            settings.write_text(json.dumps(every, indent=1) + "\n")
        if not args.table:
            study(task, names, args.seeds, every[task.name], results, args.jobs, console)
        console.print(table(task, with_columns(results, every.get(task.name, {}))))
    if args.results == FOLDER:
        write_pages(every)


if __name__ == "__main__":
    main()
