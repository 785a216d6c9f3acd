"""Does it work? Methods x tasks in one harness, every method at its own optimum, paired over seeds.

    python benchmarks/study/accuracy.py                             # all tasks, search and study; goes on where it was
    python benchmarks/study/accuracy.py --task mnist1d-4000-40-mlp --minutes 50
    python benchmarks/study/accuracy.py --repeat mnist1d-4000-40-mlp    # what `make study` runs: the ten seeds once more,
                                                                        # by the settings that were found, beside what was found

A task is a data set with a size and a share of wrong labels (percent), and a network: `mnist1d-1000-40-cnn`. A run is a line of
`benchmarks/results/study/<task>.jsonl`; what is there is not run again.

The rules. Training sets, validation sets and their wrong labels are drawn anew for every seed; the search has seeds of its own.
Each method searches learning rate and weight decay on a grid with steps of a factor of 3: the nine settings around a first
guess (for the others it is cross-entropy's best), then those around the best, until the best is in the middle. So every optimum
is inside of what was tried. Then come the eight half steps around the best, and whole steps further away, so that all methods
get as many trials as the one that needed most. At the best come three further values of the one setting that is the method's
own. Best is accuracy on 4,000 validation samples, whose labels are as wrong as the training set's, over two seeds of the
search; the first three are run on four more, and the best over all six is what was found. The pre-trained models are trained at
cross-entropy's best; where its later trials find a better one, the methods that need a pre-trained model search anew: lines
before the last "teacher" line no longer count for them. What was found is run on ten seeds that no search saw. The pre-trained
model of a seed is a cross-entropy run with the whole budget. The test set (true labels) chooses no setting. Scaled values are
those after dividing the logits by the temperature that suits the validation samples with their true labels.
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
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import tasks
import torch._dynamo  # noqa: F401  # here, or every worker would import it anew: 3 seconds each
from methods import METHODS
from report import budgets, finished, page, pairs, picture_of, table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tasks import TASKS, Task
from train import Run, results

sys.path.append(str(Path(__file__).parents[1]))
from machine import RESULTS, filled, machine

FOLDER, AGAIN = RESULTS / "study", Path("runs") / "study"
PAGE = Path(__file__).parents[2] / "docs" / "study.md"
PICTURE = PAGE.parent / "images" / "gains.svg"
SEEDS, SEARCH_SEEDS, MORE_SEEDS = tuple(range(10)), (1000, 1001), (1002, 1003, 1004, 1005)
FEW = 3  # settings that the search runs on more seeds
LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.9, 3.0, 9.0)
WEIGHT_DECAYS = (2e-5, 6e-5, 2e-4, 6e-4, 2e-3, 6e-3, 2e-2, 6e-2, 0.2)  # the first is as good as none
FIRST_GUESS = (0.1, 2e-3)
ABREAST = 18  # runs side by side
Line = dict[str, Any]
Setting = tuple[float, float]  # learning rate and weight decay
Batch = tuple[Task, list[Run], Setting | None, bool, str]  # what a worker does


class OutOfTimeError(Exception):
    """What is asked for is not done, and may not begin any more."""


class Study:
    """The lines of a task, in memory and in its file; what is asked for is looked up there, or run."""

    def __init__(
        self, task: Task, folder: Path, workers: Executor | None = None, jobs: int = 1, ends: float = 0.0,
        console: Console | None = None, device: str = "cpu",
    ) -> None:  # fmt: skip
        self.task, self.path = task, folder / f"{task.name}.jsonl"
        self.workers, self.jobs, self.ends, self.console, self.device = workers, jobs, ends, console, device
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.done: dict[tuple[Any, ...], Line] = {}
        self.machines: list[Line] = []
        self.teacher: Setting | None = None  # of the pre-trained models; what was run with others no longer counts
        self.take(map(json.loads, lines))

    def run(self, runs: Iterable[Run], test: bool = False) -> None:
        """Those that are missing, a method at a time side by side."""
        runs = list(runs)
        missing = [run for run in runs if key(vars(run)) not in self.done]
        by_method = itertools.groupby(sorted(missing, key=of_method), of_method)
        batches: list[Batch] = []
        for _, of in by_method:
            alike = list(of)
            parts = [alike[i : i + ABREAST] for i in range(0, len(alike), ABREAST)]
            batches += [(self.task, part, self.teacher, test, self.device) for part in parts]
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(self.task.name, total=len(missing))
            waiting: set[Future[list[Line]]] = set()
            while batches or waiting:
                while batches and len(waiting) < self.jobs and time.time() < self.ends:
                    waiting.add(self.workers.submit(results, *batches.pop(0)))
                if not waiting:
                    raise OutOfTimeError
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for lines in (of.result() for of in done):
                    self.keep(lines)
                    progress.advance(task, len(lines))

    def keep(self, lines: list[Line]) -> None:
        here = machine(self.device)
        if self.machines[-1:] != [here]:
            lines = [{"machine": here, "epochs": self.task.epochs}, *lines]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        self.take(lines)

    def take(self, lines: Iterable[Line]) -> None:
        for line in lines:
            if "method" in line:
                self.done[key(line)] = line
            elif "teacher" in line:
                self.teacher = tuple(line["teacher"])
                self.done = {at: x for at, x in self.done.items() if not METHODS[x["method"]]().needs_teacher}
            elif line["epochs"] == self.task.epochs:
                self.machines.append(line["machine"])
            else:
                raise SystemExit(
                    f"accuracy.py: {self.path} has runs of {line['epochs']} epochs, and the task has {self.task.epochs} now: "
                    "move it away, or pass another folder as --results."
                )

    def searched(self, names: Sequence[str]) -> dict[str, Line]:
        """The best of each method; that of cross-entropy, the first, gives the pre-trained models."""
        plain, *others = names
        tried: dict[str, list[Setting]] = {plain: []}
        at = self.centred(tried, {plain: FIRST_GUESS})
        start = at[plain]
        at = self.refined(tried, at)
        self.confirmed(tried)
        while True:
            if not self.teacher_is_best():
                self.keep([{"teacher": setting_of(self.ranked(plain)[0])}])
            tried |= {name: [] for name in others}
            at = self.centred(tried, at | dict.fromkeys(others, start))
            at = self.refined(tried, at)
            while len({len(of) for of in tried.values()}) > 1:  # as many trials for all
                trials = max(map(len, tried.values()))
                for name, of in at.items():
                    more = [setting for setting in around(*of, steps=9) if setting not in tried[name]]
                    tried[name] += more[: trials - len(tried[name])]
                at = self.refined(tried, self.centred(tried, at))
            own = [
                Run(name, seed, *setting_of(self.inside(name, of)[0]), value)
                for name, of in tried.items()
                for value in METHODS[name]().grid
                for seed in SEARCH_SEEDS
            ]
            self.run(own)
            found = self.confirmed(tried)
            if self.teacher_is_best():
                return found

    def centred(self, tried: dict[str, list[Setting]], at: dict[str, Setting]) -> dict[str, Setting]:
        """The best whole step of each method, when all around it was tried."""
        while True:
            for name, (lr, decay) in at.items():
                if at_edge(lr, decay):
                    raise SystemExit(
                        f"accuracy.py: the best of {name} is at an edge, learning rate {lr:g}, weight decay {decay:g}: "
                        "make the grid larger."
                    )
                tried[name] += [setting for setting in around(lr, decay) if setting not in tried[name]]
            self.run(Run(name, seed, *of) for name in at for of in tried[name] for seed in SEARCH_SEEDS)
            before, at = at, {name: setting_of(self.ranked(name, SEARCH_SEEDS, tried[name])[0]) for name in at}
            if at == before:
                return at

    def refined(self, tried: dict[str, list[Setting]], at: dict[str, Setting]) -> dict[str, Setting]:
        """The same with the half steps around it, and with all that was run before."""
        for name, of in at.items():
            known = [setting_of(x) for x in self.ranked(name, SEARCH_SEEDS) if x["own"] is None]
            tried[name] += [x for x in dict.fromkeys([*half_steps(*of), *known]) if x not in tried[name]]
        after = self.centred(tried, at)
        return after if after == at else self.refined(tried, after)

    def teacher_is_best(self) -> bool:
        return setting_of(self.ranked("cross-entropy")[0]) == self.teacher

    def confirmed(self, tried: dict[str, list[Setting]]) -> dict[str, Line]:
        """The best of the first few, over more seeds: with two alone it would be the luckiest."""
        few = {name: self.inside(name, of)[:FEW] for name, of in tried.items()}
        more = [
            Run(name, seed, *setting_of(x), x["own"]) for name, of in few.items() for x in of for seed in MORE_SEEDS
        ]
        self.run(more)
        return {name: self.ranked(name)[0] for name in tried}

    def inside(self, name: str, tried: Sequence[Setting]) -> list[Line]:
        """What has been tried all around, the best first."""

        def all_around(x: Line) -> bool:
            lr, decay = setting_of(x)
            return not on_grid((lr, decay)) or (not at_edge(lr, decay) and set(around(lr, decay)) <= set(tried))

        return [x for x in self.ranked(name, SEARCH_SEEDS) if all_around(x)]

    def ranked(
        self, name: str, seeds: Sequence[int] = SEARCH_SEEDS + MORE_SEEDS, among: Sequence[Setting] = ()
    ) -> list[Line]:
        """What was tried on all these seeds, the best first, with its mean accuracy on the validation samples; or the whole
        steps `among` some, as the method comes."""
        groups: dict[tuple[Any, ...], list[Line]] = {}
        for line in self.done.values():
            setting = setting_of(line)
            wanted = not among or (setting in among and on_grid(setting) and line["own"] is None)
            if line["method"] == name and line["seed"] in seeds and wanted:
                groups.setdefault((*setting, line["own"]), []).append(line)
        means = [
            dict(lr=lr, weight_decay=decay, own=value, validation=statistics.fmean(x["validation"] for x in of))
            for (lr, decay, value), of in groups.items()
            if len(of) == len(seeds)
        ]
        return sorted(means, key=lambda x: -x["validation"])

    def final(self, found: dict[str, Line], seeds: Sequence[int]) -> None:
        runs = [Run(name, seed, x["lr"], x["weight_decay"], x["own"]) for name, x in found.items() for seed in seeds]
        self.run(runs, test=True)


def key(line: Line) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("method", "seed", "lr", "weight_decay", "own"))


def setting_of(line: Line) -> Setting:
    return line["lr"], line["weight_decay"]


def on_grid(setting: Setting) -> bool:
    return setting[0] in LEARNING_RATES and setting[1] in WEIGHT_DECAYS


def of_method(run: Run) -> tuple[str, float]:
    return run.method, run.own or 0.0


def at_edge(lr: float, decay: float) -> bool:
    """Below the least weight decay there is nothing."""
    return lr in (LEARNING_RATES[0], LEARNING_RATES[-1]) or decay == WEIGHT_DECAYS[-1]


def around(lr: float, decay: float, steps: int = 1) -> list[Setting]:
    """The settings of the grid up to so many steps away, the nearest first."""
    i, j = LEARNING_RATES.index(lr), WEIGHT_DECAYS.index(decay)
    away = itertools.product(range(-steps, steps + 1), repeat=2)
    near = sorted(away, key=lambda x: (max(map(abs, x)), sum(map(abs, x))))
    inside = [(i + a, j + b) for a, b in near if 0 <= i + a < len(LEARNING_RATES) and 0 <= j + b < len(WEIGHT_DECAYS)]
    return [(LEARNING_RATES[a], WEIGHT_DECAYS[b]) for a, b in inside]


def half_steps(lr: float, decay: float) -> list[Setting]:
    away = sorted(itertools.product((0, 1, -1), repeat=2), key=lambda x: sum(map(abs, x)))[1:]
    return [(nice(lr * 3 ** (a / 2)), nice(decay * 3 ** (b / 2))) for a, b in away]


def nice(x: float) -> float:
    return float(f"{x:.2g}")


def recorded() -> list[Study]:
    return [Study(task, FOLDER) for task in TASKS.values()]


def too_short() -> list[Study]:
    """Tasks that were begun with fewer epochs: cross-entropy and the same twice as long."""
    paths = sorted((FOLDER / "budget").glob("*/*.jsonl"))
    return [Study(replace(TASKS[path.stem], epochs=int(path.parent.name)), path.parent) for path in paths]


def fill_page(text: str) -> str:
    studies = recorded()
    done = finished(studies, len(SEEDS))
    text = filled(filled(text, "study", page(done)), "pairs", pairs(done))
    return filled(text, "budget", budgets([*studies, *too_short()]))


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--task", default=",".join(TASKS), help="comma-separated (default: all)")
    p.add_argument("--methods", default=",".join(METHODS), help="comma-separated (default: all)")
    p.add_argument("--repeat", help="a task whose settings were found: its seeds once more, into runs/study")
    p.add_argument("--seeds", type=int, default=len(SEEDS))
    p.add_argument("--data-dir", type=Path, help="folder of the four IDX files of Fashion-MNIST")
    p.add_argument("--epochs", type=int, help="in place of the task's own, with --results elsewhere: are they enough?")
    p.add_argument("--device", default="cpu", help="where to train, cuda for example")
    p.add_argument("--jobs", type=int, default=os.cpu_count())
    p.add_argument("--minutes", type=float, default=1e9, help="begin nothing later")
    p.add_argument("--results", type=Path, default=FOLDER)
    p.add_argument("--page", action="store_true", help="write docs/study.md and its picture, run nothing")
    args = p.parse_args(argv)
    if args.page:
        PAGE.write_text(fill_page(PAGE.read_text()))
        if studies := finished(recorded(), len(SEEDS)):
            PICTURE.write_text(picture_of(studies))
        return
    names, of = args.methods.split(","), (args.repeat or args.task).split(",")
    for what, given, known in (("--methods", names, METHODS), ("--task", of, TASKS)):
        for name in given:
            if name not in known:
                p.error(f"{what} must be some of {', '.join(known)}; got {name!r}.")
    names = list(dict.fromkeys(["cross-entropy", *names]))  # what the others are compared with
    if not 1 <= args.seeds <= len(SEEDS):
        p.error(f"--seeds must be between 1 and {len(SEEDS)}; got {args.seeds}.")
    if args.epochs and args.results == FOLDER:
        p.error("--epochs needs --results, another folder than that of the study.")
    console, ends = Console(width=150), time.time() + 60 * args.minutes
    for name in of:
        task = replace(TASKS[name], epochs=args.epochs or TASKS[name].epochs)
        tasks.pool(task.source, args.data_dir)
        start = multiprocessing.get_context("fork" if args.device == "cpu" else "spawn")  # a GPU cannot be forked
        with ProcessPoolExecutor(args.jobs, start) as workers:
            how = workers, args.jobs, ends, console, args.device
            study = Study(task, args.results, *how)
            try:
                if args.repeat:
                    found = {method: study.ranked(method)[0] for method in names if study.ranked(method)}
                    console.print(table(study, "as found"))
                    again = Study(task, AGAIN, *how)
                    if again.teacher != study.teacher:
                        again.keep([{"teacher": study.teacher}])
                    study = again
                else:
                    found = study.searched(names)
                study.final(found, SEEDS[: args.seeds])
            except OutOfTimeError:
                console.print(f"{name}: out of time; call again to go on.")
        console.print(table(study, "once more" if args.repeat else "as found"))


if __name__ == "__main__":
    main()
