"""What came out of `accuracy.py`."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods import METHODS
from picture import picture
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1]))
from machine import error, spread

if TYPE_CHECKING:
    from accuracy import Study

Found = dict[str, dict[int, dict[str, Any]]]  # the runs of each method on the seeds of the study, by seed
COLUMNS = {"accuracy, %": ("accuracy", ".2f"), "NLL, scaled": ("nll_scaled", ".3f"), "ECE, %": ("ece", ".1f")}


def found(study: Study) -> Found:
    """At the setting that was found for each; in a study that searched nothing, at the one there is."""
    of: Found = {}
    bests = {name: study.ranked(name)[:1] for name in {line["method"] for line in study.done.values()}}
    for line in study.done.values():
        (best,) = bests[line["method"]] or [line]
        if "accuracy" in line and all(line[name] == best[name] for name in ("lr", "weight_decay", "own")):
            of.setdefault(line["method"], {})[line["seed"]] = line
    return of


def gains(of: Found, name: str, over: str = "cross-entropy") -> list[float]:
    """Points of accuracy that a method has over another, seed by seed where both were run."""
    both = of[name].keys() & of[over].keys()
    return [of[name][seed]["accuracy"] - of[over][seed]["accuracy"] for seed in sorted(both)]


def unfinished(of: Found) -> bool:
    """Whether cross-entropy would have gained more than a standard error by twice the steps."""
    longer = gains(of, "twice as long") if "twice as long" in of else [0.0]
    return len(longer) > 1 and statistics.fmean(longer) > error(longer)


def rows(study: Study) -> Iterator[list[str]]:
    """The best accuracy first."""
    of = found(study)
    for name, lines in sorted(of.items(), key=lambda item: -statistics.fmean(x["accuracy"] for x in item[1].values())):
        first = next(iter(lines.values()))
        own = "" if first["own"] is None else f", {first['own']:g}"
        cells = [spread([x[key] for x in lines.values()], form) for key, form in COLUMNS.values()]
        above = "" if name == "cross-entropy" else spread(gains(of, name), "+.2f")
        three = ", ".join(f"{x['validation']:.1f}" for x in study.ranked(name)[:3])
        found_at = f"{first['lr']:g}, {first['weight_decay']:g}{own}"
        yield [name, found_at, three, cells[0], above, *cells[1:]]


HEADS = ["method", "found", "best three", "accuracy, %", "above cross-entropy", *list(COLUMNS)[1:]]


def table(study: Study, what: str) -> Table:
    shown = Table(title=f"{study.task.name}, {what}; mean ± standard error, differences paired by seed")
    for column in HEADS:
        shown.add_column(column, justify="left" if column == "method" else "right")
    for cells in rows(study):
        shown.add_row(*cells)
    return shown


def finished(studies: Iterable[Study], seeds: int) -> list[Study]:
    """Those that keep the rules: every method on all seeds, enough steps, and pre-trained models at cross-entropy's optimum."""

    def by_the_rules(study: Study) -> bool:
        of = found(study)
        whole = all(len(of.get(name, {})) >= seeds for name in METHODS)
        return whole and not unfinished(of) and study.teacher_is_best()

    return [study for study in studies if by_the_rules(study)]


def page(studies: Iterable[Study]) -> str:
    """What docs/study.md says of each task."""
    said = []
    for study in studies:
        of = [f"| {' | '.join(cells)} |" for cells in (HEADS, ["---", *["--:"] * (len(HEADS) - 1)], *rows(study))]
        machines = sorted({f"{x['device']}, Python {x['python']}, torch {x['torch']}" for x in study.machines})
        trained = f"{study.task.epochs} epochs, {study.task.steps:,} steps; {'; '.join(machines)}."
        said.append("\n".join([f"### {study.task.name}", "", trained, "", *of]))
    return "\n\n".join(said) or "No task is done yet."


PAIRS = (
    ("full + CS-KD", "CS-KD"), ("full + CS-KD", "full"), ("full", "CS-KD"), ("full", "det + PS-KD"), ("full", "full at T = 1"),
    ("full", "full handing over"),
)  # fmt: skip


def pairs(studies: Iterable[Study]) -> str:
    said = [f"| task | {' | '.join(f'{a} minus {b}' for a, b in PAIRS)} |", "|---" + "|--:" * len(PAIRS) + "|"]
    for study in studies:
        of = found(study)
        cells = [spread(gains(of, name, over), "+.2f") for name, over in PAIRS]
        said.append(f"| {study.task.name} | {' | '.join(cells)} |")
    return "\n".join(said)


def budgets(studies: Iterable[Study]) -> str:
    """What twice the steps would give cross-entropy, on each task and number of epochs."""
    said = ["| task | epochs | steps | cross-entropy, % | twice as long |", "|---|--:|--:|--:|--:|"]
    for study in sorted(studies, key=lambda study: (study.task.name, study.task.epochs)):
        of, task = found(study), study.task
        if "twice as long" not in of:
            continue
        plain = spread([x["accuracy"] for x in of["cross-entropy"].values()], ".2f")
        longer = spread(gains(of, "twice as long"), "+.2f")
        more = f"**{longer}**" if unfinished(of) else longer
        said.append(f"| {task.name} | {task.epochs} | {task.steps:,} | {plain} | {more} |")
    return "\n".join(said)


def picture_of(studies: Sequence[Study]) -> str:
    of = {study.task: found(study) for study in studies}

    def above(lines: Found, name: str) -> tuple[float, float]:
        return statistics.fmean(gains(lines, name)), error(gains(lines, name))

    others = [name for name in METHODS if name != "cross-entropy"]
    return picture({name: [(task, *above(lines, name)) for task, lines in of.items()] for name in others})
