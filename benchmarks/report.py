"""What came out of `accuracy.py`: tables for the terminal and the documentation, and pictures."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from methods import OURS
from rich.table import Table
from tasks import Task

PAGE = Path(__file__).parent.parent / "docs" / "accuracy.md"
PICTURES = Path(__file__).parent.parent / "docs" / "images"
Found = dict[str, dict[int, dict[str, Any]]]  # the runs of each method, by seed


def mean_error(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def table(task: Task, found: Found, tuned: dict[str, Any]) -> Table:
    plain = found.get("ce", {})
    shown = Table(title=f"{task.name}: {len(plain)} seeds, mean ± standard error; differences to ce, paired")
    columns: list[tuple[str, str, Callable[[float], str]]] = [
        ("accuracy, %", "accuracy", "{:.2f}".format), ("NLL", "nll", "{:.3f}".format),
        ("NLL, scaled", "nll_scaled", "{:.3f}".format), ("ECE, %", "ece", "{:.1f}".format),
        ("Brier", "brier", "{:.3f}".format), ("AURC", "aurc", "{:.4f}".format),
    ]  # fmt: skip
    for column in ("method", "lr", "wd", "own", *(c[0] for c in columns), "d accuracy", "d NLL, scaled"):
        shown.add_column(column, justify="left" if column == "method" else "right")
    for name, lines in sorted(
        found.items(), key=lambda item: -mean_error([r["accuracy"] for r in item[1].values()])[0]
    ):
        cells = []
        for _, key, form in columns:
            mean, error = mean_error([r[key] for r in lines.values()])
            cells.append(f"{form(mean)} ± {form(error)}" if key == "accuracy" else form(mean))
        for key, form in (("accuracy", "{:+.2f} ± {:.2f}"), ("nll_scaled", "{:+.3f} ± {:.3f}")):
            both = [seed for seed in lines if seed in plain]
            cells.append(form.format(*mean_error([lines[s][key] - plain[s][key] for s in both])) if both else "-")
        setting = tuned[name]
        shown.add_row(name, f"{setting['lr']:g}", f"{setting['weight_decay']:g}", str(setting["own"] or ""), *cells)
    return shown


def markdown(found: Found) -> str:
    plain = found.get("ce", {})
    rows = [
        "| method | accuracy, % | minus ce | NLL, scaled | minus ce | ECE, % | scaled | Brier | AURC |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def shown(lines: dict[int, dict[str, Any]], key: str, form: str) -> tuple[str, str]:
        mean, error = mean_error([line[key] for line in lines.values()])
        paired = mean_error([lines[s][key] - plain[s][key] for s in lines if s in plain])
        own = f"{mean:{form}} ± {error:{form}}"
        return own, "" if lines is plain else f"{paired[0]:+{form}} ± {paired[1]:{form}}"

    for name, lines in sorted(
        found.items(), key=lambda item: -mean_error([r["accuracy"] for r in item[1].values()])[0]
    ):
        others = [
            mean_error([line[key] for line in lines.values()])[0] for key in ("ece", "ece_scaled", "brier", "aurc")
        ]
        cells = [*shown(lines, "accuracy", ".2f"), *shown(lines, "nll_scaled", ".3f")]
        cells += [f"{others[0]:.1f}", f"{others[1]:.1f}", f"{others[2]:.3f}", f"{others[3]:.4f}"]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def page(text: str, task: Task, table: str) -> str:
    """The text with the task's table between its marks."""
    start, end = f"<!-- {task.name} -->\n", "\n<!-- end -->"
    if start not in text:
        return text
    before, _, rest = text.partition(start)
    return before + start + table + end + rest.partition(end)[2]


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
        key: {
            name: mean_error([lines[s][key] - plain[s][key] for s in lines if s in plain])
            for name, lines in found.items()
            if name != "ce"
        }
        for key in ("accuracy", "nll_scaled")
    }
    names = sorted(gains["accuracy"], key=lambda name: gains["accuracy"][name][0])
    size = dict(figsize=(13, 0.3 * len(names) + 1.5), width_ratios=(3, 3, 2))
    with picture(f"accuracy-{task.name}", 1, 3, **size) as (figure, axes):
        labels = ("accuracy, points", "NLL after temperature scaling, nats")
        for axis, key, label in zip(axes, gains, labels, strict=False):
            for i, name in enumerate(names):
                mean, error = gains[key][name]
                color = "tab:blue" if name in OURS else "tab:gray"
                axis.errorbar(mean, i, xerr=error, fmt="o", color=color, markersize=5, capsize=2)
            axis.axvline(0, color="black", linewidth=0.8)
            axis.set(xlabel=f"{label}, minus cross-entropy's", yticks=range(len(names)))
        axes[0].set_yticklabels(names)
        axes[1].set_yticklabels([])
        for name, lines in found.items():
            curves = [line["discriminator_accuracy"] for line in lines.values() if "discriminator_accuracy" in line]
            if curves:
                axes[2].plot(torch.tensor(curves).mean(0), label=name)
        axes[2].set(xlabel="epoch", ylabel="discriminator right", ylim=(0.3, 1.0))
        if axes[2].lines:
            axes[2].legend(fontsize=8)
        for axis in axes:
            axis.grid(alpha=0.3)
        figure.suptitle(f"{task.name}: mean and standard error of {len(plain)} paired seeds (blue: of this library)")
    return PICTURES / f"accuracy-{task.name}.svg"
