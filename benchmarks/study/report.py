"""What came out of `accuracy.py`, for the terminal."""

from __future__ import annotations

import math
import statistics
from typing import Any

from rich.table import Table

Found = dict[str, dict[int, dict[str, Any]]]  # the runs of each method, by seed
COLUMNS = {
    "accuracy, %": ("accuracy", ".2f"), "NLL": ("nll", ".3f"), "scaled": ("nll_scaled", ".3f"),
    "ECE, %": ("ece", ".1f"), "Brier": ("brier", ".3f"), "AURC": ("aurc", ".4f"),
}  # fmt: skip


def spread(values: list[float], form: str) -> str:
    """Mean and standard error; one value has none."""
    mean = f"{statistics.fmean(values):{form}}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):{form.strip('+')}}"


def gains(found: Found, name: str, key: str) -> list[float]:
    """What a method has over cross-entropy, seed by seed where both were run."""
    both = found[name].keys() & found["ce"].keys()
    return [found[name][seed][key] - found["ce"][seed][key] for seed in sorted(both)]


def table(title: str, found: Found) -> Table:
    """The best accuracy first."""
    shown = Table(title=f"{title}, seeds: {len(found['ce'])}; mean ± standard error; minus ce, paired")
    for column in ("method", "lr", "wd", "own", *COLUMNS, "minus ce: accuracy", "scaled NLL"):
        shown.add_column(column, justify="left" if column == "method" else "right")
    for name, lines in sorted(found.items(), key=lambda item: -statistics.fmean(of(item[1], "accuracy"))):
        setting = next(iter(lines.values()))
        cells = [
            spread(of(lines, key), form) if key == "accuracy" else f"{statistics.fmean(of(lines, key)):{form}}"
            for key, form in COLUMNS.values()
        ]
        cells += [spread(gains(found, name, key), form) for key, form in (("accuracy", "+.2f"), ("nll_scaled", "+.3f"))]
        shown.add_row(name, f"{setting['lr']:g}", f"{setting['weight_decay']:g}", str(setting["own"] or ""), *cells)
    return shown


def of(lines: dict[int, dict[str, Any]], key: str) -> list[float]:
    return [line[key] for line in lines.values()]
