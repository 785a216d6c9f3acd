"""What came out of `accuracy.py`: tables for the terminal and the documentation, and pictures."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from methods import FULL, METHODS, NOT_OURS, RIVALS
from rich.table import Table
from tasks import Task

DOCS = Path(__file__).parent.parent / "docs"
PICTURES = DOCS / "images"
TABLES_HEAD = """# Accuracy: every table

Mean ± standard error over the seeds; differences to cross-entropy ("ce") are paired over seeds. "Time" is the CPU time of a
training over cross-entropy's, where it was noted, without the pre-trained model's. How all of it was measured, and what it
means: [accuracy](accuracy.md). Written by `python benchmarks/accuracy.py --table` from the lines in
[`benchmarks/results/accuracy/`](../benchmarks/results/accuracy)."""
SUMMARY = ("drop-in", "full", "full tuned", *FULL[1:])
DIGITS = {"accuracy": 2, "nll_scaled": 3}
Found = dict[str, dict[int, dict[str, Any]]]  # the runs of each method, by seed


def mean_error(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def table(task: Task, found: Found) -> Table:
    shown = Table(
        title=f"{task.name}: {len(found.get('ce', {}))} seeds, mean ± standard error; differences to ce, paired"
    )
    columns: list[tuple[str, str, Callable[[float], str]]] = [
        ("accuracy, %", "accuracy", "{:.2f}".format), ("NLL", "nll", "{:.3f}".format),
        ("NLL, scaled", "nll_scaled", "{:.3f}".format), ("ECE, %", "ece", "{:.1f}".format),
        ("Brier", "brier", "{:.3f}".format), ("AURC", "aurc", "{:.4f}".format),
    ]  # fmt: skip
    for column in ("method", "lr", "wd", "own", *(c[0] for c in columns), "d accuracy", "d NLL, scaled"):
        shown.add_column(column, justify="left" if column == "method" else "right")
    for name, lines in by_accuracy(found):
        cells = []
        for _, key, form in columns:
            mean, error = mean_error([r[key] for r in lines.values()])
            cells.append(f"{form(mean)} ± {form(error)}" if key == "accuracy" else form(mean))
        for key, form in (("accuracy", "{:+.2f} ± {:.2f}"), ("nll_scaled", "{:+.3f} ± {:.3f}")):
            cells.append(form.format(*gain(found, name, "ce", key)) if found.get("ce") else "-")
        setting = next(iter(lines.values()))
        shown.add_row(name, f"{setting['lr']:g}", f"{setting['weight_decay']:g}", str(setting["own"] or ""), *cells)
    return shown


def by_accuracy(found: Found) -> list[tuple[str, dict[int, dict[str, Any]]]]:
    return sorted(found.items(), key=lambda item: -mean_error([r["accuracy"] for r in item[1].values()])[0])


def in_markdown(heads: Sequence[str], rows: list[list[str]]) -> str:
    first, *others = ["| " + " | ".join(row) + " |" for row in (heads, *rows)]
    return "\n".join([first, "|---" * len(heads) + "|", *others])


def markdown(found: Found) -> str:
    heads = (
        "method", "accuracy, %", "minus ce", "NLL, scaled", "minus ce", "ECE, %", "scaled", "Brier", "AURC", "time",
    )  # fmt: skip
    rows = []

    def shown(name: str, key: str, form: str) -> tuple[str, str]:
        mean, error = mean_error([line[key] for line in found[name].values()])
        own = f"{mean:{form}} ± {error:{form}}"
        return own, "" if name == "ce" else "{:+{form}} ± {:{form}}".format(*gain(found, name, "ce", key), form=form)

    for name, lines in by_accuracy(found):
        others = [
            mean_error([line[key] for line in lines.values()])[0] for key in ("ece", "ece_scaled", "brier", "aurc")
        ]
        cells = [*shown(name, "accuracy", ".2f"), *shown(name, "nll_scaled", ".3f")]
        cells += [f"{others[0]:.1f}", f"{others[1]:.1f}", f"{others[2]:.3f}", f"{others[3]:.4f}"]
        cells.append(cost(found, name))
        rows.append([name, *cells])
    return in_markdown(heads, rows)


def gain(found: Found, name: str, other: str, key: str) -> tuple[float, float]:
    """Mean and standard error of the difference over the seeds that both have."""
    both = found[name].keys() & found[other].keys()
    return mean_error([found[name][s][key] - found[other][s][key] for s in sorted(both)])


def cost(found: Found, name: str) -> str:
    """CPU time of the training over cross-entropy's, median over seeds, without what the pre-trained model took."""
    ratios = [
        line["seconds"] / found["ce"][seed]["seconds"]
        for seed, line in found[name].items()
        if "seconds" in line and "seconds" in found["ce"].get(seed, {})
    ]
    return f"{statistics.median(ratios):.1f}" if ratios else "-"


def best_rival(found: Found, key: str) -> str:
    """The best of what is not this library's combination of terms, by what it reached on the test set itself: hindsight that
    only a rival is given."""
    sign = -1 if key == "accuracy" else 1
    rivals = [name for name in found if name in RIVALS]
    return min(rivals, key=lambda name: sign * mean_error([line[key] for line in found[name].values()])[0])


def summary(every: dict[Task, Found], columns: tuple[str, ...], cells: Callable[[Found], list[str]]) -> str:
    """A row a task."""
    return in_markdown(("task", *columns, *SUMMARY), [[task.name, *cells(found)] for task, found in every.items()])


def at_a_glance(every: dict[Task, Found]) -> str:
    """On how many tasks a method was better and worse than cross-entropy, by more than a standard error."""
    rows = []
    for name in (*SUMMARY, *(name for name in METHODS if name not in ("ce", *SUMMARY))):
        gained = [gain(found, name, "ce", "accuracy") for found in every.values() if name in found]
        if gained:
            means = [mean for mean, _ in gained]
            better, worse = sum(mean > error for mean, error in gained), sum(mean < -error for mean, error in gained)
            counts = len(gained), better, len(gained) - better - worse, worse
            range_ = (f"{value:+.2f}" for value in (min(means), statistics.median(means), max(means)))
            rows.append([name, *map(str, counts), *range_])
    return in_markdown(("method", "tasks", "better", "level", "worse", "lowest", "median", "highest"), rows)


def over_cross_entropy(every: dict[Task, Found]) -> str:
    """What is gained in accuracy, and how much of its own training labels cross-entropy got right."""

    def cells(found: Found) -> list[str]:
        level, fitted = (mean_error([line[key] for line in found["ce"].values()])[0] for key in ("accuracy", "fitted"))
        return [f"{level:.2f}", f"{fitted:.0f}", *gains(found, "ce", "accuracy")]

    return summary(every, ("cross-entropy", "its own labels"), cells)


def over_best_rival(every: dict[Task, Found], key: str) -> str:
    def cells(found: Found) -> list[str]:
        rival = best_rival(found, key)
        level = mean_error([line[key] for line in found[rival].values()])[0]
        return [f"{rival}, {level:.{DIGITS[key]}f}", *gains(found, rival, key)]

    return summary(every, ("the best rival",), cells)


def gains(found: Found, other: str, key: str) -> list[str]:
    form = "{{:+.{0}f}} ± {{:.{0}f}}".format(DIGITS[key])
    return [form.format(*gain(found, name, other, key)) if name in found else "-" for name in SUMMARY]


def whole_page(text: str, every: dict[Task, Found]) -> str:
    """The page with its tables written anew."""
    text = between(text, "at a glance", at_a_glance(every))
    text = between(text, "over cross-entropy", over_cross_entropy(every))
    text = between(text, "over the best rival", over_best_rival(every, "accuracy"))
    return between(text, "over the best rival, scaled NLL", over_best_rival(every, "nll_scaled"))


def tables(every: dict[Task, Found]) -> str:
    parts = [TABLES_HEAD]
    for task, found in every.items():
        parts += [f"## {task.name}", f"![What each method gains](images/accuracy-{task.name}.svg)", markdown(found)]
    return "\n\n".join(parts) + "\n"


def between(text: str, mark: str, body: str) -> str:
    """The text with `body` between its marks."""
    start, end = f"<!-- {mark} -->\n", "<!-- end -->"
    before, found, rest = text.partition(start)
    _, ended, after = rest.partition(end)
    assert found, f"no mark {mark!r}"
    assert ended, f"the mark {mark!r} has no end"
    return before + start + body + "\n" + end + after


@contextlib.contextmanager
def picture(name: str, *grid: int, **settings: Any) -> Iterator[tuple[Any, Any]]:
    """Figure and axes, saved as `<name>.svg`: the same picture is the same, small file."""
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(*grid, layout="constrained", **settings)
        yield figure, axes
        PICTURES.mkdir(parents=True, exist_ok=True)
        figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


def plot(task: Task, found: Found) -> Path | None:
    """What each method gains over cross-entropy, and how often the discriminator was right."""
    plain = found.get("ce", {})
    if not plain or len(found) < 2:
        return None
    gains = {
        key: {name: gain(found, name, "ce", key) for name in found if name != "ce"}
        for key in ("accuracy", "nll_scaled")
    }
    names = sorted(gains["accuracy"], key=lambda name: gains["accuracy"][name][0])
    size = dict(figsize=(13, 0.3 * len(names) + 1.5), width_ratios=(3, 3, 2))
    with picture(f"accuracy-{task.name}", 1, 3, **size) as (figure, axes):
        labels = ("accuracy, points", "NLL after temperature scaling, nats")
        for axis, key, label in zip(axes, gains, labels, strict=False):
            for i, name in enumerate(names):
                mean, error = gains[key][name]
                color = "tab:gray" if name in NOT_OURS else "tab:blue"
                axis.errorbar(mean, i, xerr=error, fmt="o", color=color, markersize=5, capsize=2)
            axis.axvline(0, color="black", linewidth=0.8)
            axis.set(xlabel=f"{label}, minus cross-entropy's", yticks=range(len(names)))
        axes[0].set_yticklabels(names)
        axes[1].set_yticklabels([])
        # "drop-in" and "full tuned" would show runs of these once more
        for name in (name for name in METHODS if name in found):
            lines = found[name].values()
            curves = [line["discriminator_accuracy"] for line in lines if "discriminator_accuracy" in line]
            if curves:
                axes[2].plot(torch.tensor(curves).mean(0), label=name)
        axes[2].set(xlabel="epoch", ylabel="discriminator right", ylim=(0.3, 1.0))
        if axes[2].lines:
            axes[2].legend(fontsize=8)
        for axis in axes:
            axis.grid(alpha=0.3)
        figure.suptitle(f"{task.name}: mean and standard error of {len(plain)} paired seeds (blue: of this library)")
    return PICTURES / f"accuracy-{task.name}.svg"
