"""Does it work? Methods x tasks in one harness, every method at its own optimum, paired over seeds.

    python benchmarks/study/accuracy.py                             # all tasks, search and study; goes on where it was
    python benchmarks/study/accuracy.py --task mnist1d-4000-40-mlp --minutes 50
    python benchmarks/study/accuracy.py --repeat mnist1d-4000-40-mlp    # what `make study` runs: the ten seeds once more,
                                                                        # by the settings that were found, beside what was found

A task is a data set with a size and a share of wrong labels (percent), and a network: `mnist1d-1000-40-cnn`. A run is a line of
`benchmarks/results/study/<task>.jsonl`; what is there is not run again.

The rules. Training sets, validation sets and their wrong labels are drawn anew for every seed; the search has seeds of its own.
Learning rate and weight decay are searched on one grid for all methods of a task, with steps of a factor of 3. As long as any
method's best is at the edge of the grid, it is made larger there, for all; so every method has as many trials, and its optimum
is inside. Then half a step up and down in either, and, at the best of these, two further values of the one setting that is the
method's own. Best is accuracy on 4,000 validation samples, whose labels are as wrong as the training set's, over the seeds of
the search. The settings found are run on ten seeds that no search saw. The pre-trained model of a seed is a cross-entropy run
at its own optimum on the grid and the whole budget. The test set (true labels) chooses nothing. Scaled values are those after
dividing the logits by the temperature that suits the validation samples with their true labels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tasks
from methods import METHODS
from report import page, table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tasks import TASKS
from train import Run, results

sys.path.append(str(Path(__file__).parents[1]))
from machine import RESULTS, machine

FOLDER, AGAIN = RESULTS / "study", Path("runs") / "study"
PAGE = Path(__file__).parents[2] / "docs" / "accuracy.md"
SEEDS, SEARCH_SEEDS = tuple(range(10)), (1000, 1001)
LEARNING_RATES, WEIGHT_DECAYS = (0.03, 0.1, 0.3), (6e-4, 2e-3, 6e-3)  # where the grid begins
NO_DECAY = 2e-5  # as good as none: the grid ends there
FINER = 3**0.5  # between two values of the grid
ABREAST = 18  # runs side by side
Line = dict[str, Any]
Batch = tuple[str, list[Run], tuple[float, float] | None, bool]  # what a worker does


class OutOfTimeError(Exception):
    """What is asked for is not done, and may not begin any more."""


def done_by(batch: Batch) -> list[Line]:
    return results(*batch)


class Study:
    """The lines of a task, in memory and in its file; what is asked for is looked up there, or run."""

    def __init__(self, name: str, folder: Path, jobs: int, ends: float, console: Console) -> None:
        self.name, self.path = name, folder / f"{name}.jsonl"
        self.jobs, self.ends, self.console = jobs, ends, console
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.done: dict[tuple[Any, ...], Line] = {}
        self.teacher: tuple[float, float] | None = None  # learning rate and weight decay of the pre-trained models
        self.grid = [list(LEARNING_RATES), list(WEIGHT_DECAYS)]  # as large as it has become
        self.take(map(json.loads, lines))

    def run(self, runs: Iterable[Run], test: bool = False) -> None:
        """Those that are missing, a method at a time side by side."""
        runs = list(runs)
        missing = [run for run in runs if key(vars(run)) not in self.done]
        by_method = itertools.groupby(sorted(missing, key=of_method), of_method)
        batches: list[Batch] = []
        for _, of in by_method:
            alike = list(of)
            batches += [(self.name, alike[i : i + ABREAST], self.teacher, test) for i in range(0, len(alike), ABREAST)]
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with (
            Progress(*columns, console=self.console, transient=True) as progress,
            multiprocessing.get_context("fork").Pool(self.jobs) as workers,
        ):
            task = progress.add_task(self.name, total=len(missing))
            waiting = [workers.apply_async(done_by, (batch,)) for batch in batches[: self.jobs]]
            rest = batches[self.jobs :]
            while waiting:
                lines = waiting.pop(0).get()
                self.keep(lines)
                progress.advance(task, len(lines))
                if rest and time.time() < self.ends:
                    waiting.append(workers.apply_async(done_by, (rest.pop(0),)))
            if rest:
                raise OutOfTimeError

    def keep(self, lines: list[Line]) -> None:
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            if new:
                file.write(json.dumps({"machine": machine()}) + "\n")
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        self.take(lines)

    def take(self, lines: Iterable[Line]) -> None:
        for line in lines:
            if "method" in line:
                self.done[key(line)] = line
            elif "teacher" in line:
                self.teacher = tuple(line["teacher"])
            elif "grid" in line:
                self.grid = line["grid"]

    def searched(self, names: Sequence[str]) -> dict[str, Line]:
        """The best setting of each method; cross-entropy's gives the pre-trained models."""
        if self.teacher is None:
            at = self.on_the_grid(["cross-entropy"])["cross-entropy"]
            self.keep([{"teacher": [at["lr"], at["weight_decay"]]}])
        coarse = self.on_the_grid(names)
        self.run(
            Run(name, seed, nice(at["lr"] * a, 2), nice(at["weight_decay"] * b, 2))
            for name, at in coarse.items()
            for a, b in ((FINER, 1), (1 / FINER, 1), (1, FINER), (1, 1 / FINER))
            for seed in SEARCH_SEEDS
        )
        fine = {name: self.best(name, own=False) for name in names}
        self.run(
            Run(name, seed, at["lr"], at["weight_decay"], own)
            for name, at in fine.items()
            for own in METHODS[name]().grid
            for seed in SEARCH_SEEDS
        )
        return {name: self.best(name) for name in names}

    def on_the_grid(self, names: Sequence[str]) -> dict[str, Line]:
        """The best of each, with the setting of its own that it comes with, inside of a grid that all share."""
        while True:
            rates, decays = self.grid
            self.run(Run(*of) for of in itertools.product(names, SEARCH_SEEDS, rates, decays))
            found = {name: self.best(name, rates, decays, own=False) for name in names}
            bigger = [
                larger(rates, {at["lr"] for at in found.values()}),
                larger(decays, {at["weight_decay"] for at in found.values()}, NO_DECAY),
            ]
            if self.grid == bigger:
                return found
            self.keep([{"grid": bigger}])

    def ranked(self, name: str, own: bool = True) -> list[Line]:
        """The settings that were tried, the best first, with their mean accuracy on the validation samples of the search."""
        groups: dict[tuple[Any, ...], list[Line]] = {}
        for line in self.done.values():
            if line["method"] == name and line["seed"] in SEARCH_SEEDS and (own or line["own"] is None):
                groups.setdefault((line["lr"], line["weight_decay"], line["own"]), []).append(line)
        means = [
            dict(lr=lr, weight_decay=decay, own=value, validation=statistics.fmean(x["validation"] for x in of))
            for (lr, decay, value), of in groups.items()
            if len(of) == len(SEARCH_SEEDS)
        ]
        return sorted(means, key=lambda x: -x["validation"])

    def best(self, name: str, rates: Sequence[float] = (), decays: Sequence[float] = (), own: bool = True) -> Line:
        """Of all, or on a grid."""
        ranked = self.ranked(name, own)
        return next(x for x in ranked if not rates or (x["lr"] in rates and x["weight_decay"] in decays))

    def final(self, found: dict[str, Line], seeds: Sequence[int]) -> None:
        runs = [Run(name, seed, x["lr"], x["weight_decay"], x["own"]) for name, x in found.items() for seed in seeds]
        self.run(runs, test=True)


def key(line: Line) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("method", "seed", "lr", "weight_decay", "own"))


def of_method(run: Run) -> tuple[str, float]:
    return run.method, run.own or 0.0


def larger(grid: list[float], best: set[float], least: float = 0.0) -> list[float]:
    """The grid, with one more value at an edge where somebody's best is."""
    first = [nice(grid[0] / 3)] if grid[0] in best and grid[0] > least else []
    last = [nice(grid[-1] * 3)] if grid[-1] in best else []
    return [*first, *grid, *last]


def nice(x: float, digits: int = 1) -> float:
    return float(f"{x:.{digits}g}")


def filled(text: str) -> str:
    """The page, with what was found between its marks."""
    begin, end = "<!-- study -->\n", "\n<!-- /study -->"
    before, rest = text.split(begin)
    studies = [Study(name, FOLDER, 1, 0.0, Console()) for name in TASKS]
    return before + begin + page(studies, len(SEEDS)) + end + rest.split(end)[1]


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--task", default=",".join(TASKS), help="comma-separated (default: all)")
    p.add_argument("--methods", default=",".join(METHODS), help="comma-separated (default: all)")
    p.add_argument("--repeat", help="a task whose settings were found: its seeds once more, into runs/study")
    p.add_argument("--seeds", type=int, default=len(SEEDS))
    p.add_argument("--data-dir", type=Path, help="folder of the four IDX files of Fashion-MNIST")
    p.add_argument("--jobs", type=int, default=os.cpu_count())
    p.add_argument("--minutes", type=float, default=1e9, help="begin nothing later")
    p.add_argument("--results", type=Path, default=FOLDER)
    p.add_argument("--page", action="store_true", help="write docs/accuracy.md from the results, and run nothing")
    args = p.parse_args(argv)
    if args.page:
        PAGE.write_text(filled(PAGE.read_text()))
        return
    names, of = args.methods.split(","), (args.repeat or args.task).split(",")
    for what, given, known in (("--methods", names, METHODS), ("--task", of, TASKS)):
        for name in given:
            if name not in known:
                p.error(f"{what} must be some of {', '.join(known)}; got {name!r}.")
    names = list(dict.fromkeys(["cross-entropy", *names]))  # what the others are compared with
    if not 1 <= args.seeds <= len(SEEDS):
        p.error(f"--seeds must be between 1 and {len(SEEDS)}; got {args.seeds}.")
    console, ends = Console(width=150), time.time() + 60 * args.minutes
    for name in of:
        tasks.pool(TASKS[name].source, args.data_dir)
        study = Study(name, args.results, args.jobs, ends, console)
        try:
            if args.repeat:
                found = {method: study.best(method) for method in names if study.ranked(method)}
                console.print(table(study, "as found"))
                again = Study(name, AGAIN, args.jobs, ends, console)
                study, again.teacher = again, study.teacher
            else:
                found = study.searched(names)
            study.final(found, SEEDS[: args.seeds])
        except OutOfTimeError:
            console.print(f"{name}: out of time; call again to go on.")
        console.print(table(study, "once more" if args.repeat else "as found"))


if __name__ == "__main__":
    main()
