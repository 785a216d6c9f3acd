"""What becomes of the full method when one setting of `AIKDLoss` changes, at the learning rate and weight decay tuned for it.

    python benchmarks/sensitivity.py --data mnist1d-1000-20 --net cnn

Runs are lines of the task's file, as in `accuracy.py`; what is there is not run again. Only the default was tuned: a value that
would do better at another learning rate is shown at the default's.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import report
import tasks
from accuracy import FOLDER, Results, Run, as_tuned, run_all
from methods import VARIED
from report import mean_error, picture
from rich.console import Console
from tasks import Task


def runs_of(task: Task, method: str, seeds: int, tuned: dict[str, dict[str, float]]) -> list[Run]:
    return [as_tuned(task, method, seed, tuned | {method: tuned["full"]}) for seed in range(seeds)]


def plot(task: Task, results: Results, seeds: int, tuned: dict[str, dict[str, float]]) -> Path:
    """Each value minus the default, in accuracy and in scaled NLL, paired."""

    def lines(method: str) -> list[dict[str, float]]:
        return [results.done[r.key()] for r in runs_of(task, method, seeds, tuned)]

    default = lines("full")
    with picture(f"sensitivity-{task.name}", 3, 3, figsize=(12, 9)) as (figure, axes):
        for axis, (setting, values) in zip(axes.flat, VARIED.items(), strict=True):
            other = axis.twinx()
            for on, key, color, shift in (
                (axis, "accuracy", "tab:blue", -0.06),
                (other, "nll_scaled", "tab:orange", 0.06),
            ):
                gains = [
                    mean_error(
                        [new[key] - old[key] for new, old in zip(lines(f"full, {setting} {v}"), default, strict=True)]
                    )
                    for v in values
                ]
                at = [i + shift for i in range(len(values))]
                on.errorbar(
                    at, [m for m, _ in gains], yerr=[e for _, e in gains], fmt="o-", color=color, capsize=2, lw=1
                )
                reach = 1.2 * max(abs(m) + e for m, e in gains) or 1.0
                on.set_ylim(-reach, reach)
                on.tick_params(axis="y", colors=color)
            axis.axhline(0, color="black", linewidth=0.8)
            axis.set_xticks(range(len(values)), [v.replace("_", "\n") for v in values], fontsize=8)
            axis.set_title(setting, fontsize=10)
            axis.grid(alpha=0.3)
        figure.suptitle(
            f"{task.name}, {seeds} paired seeds: minus the default, in accuracy (points, blue, higher is better) "
            "and scaled NLL (nats, orange, lower is better)",
            fontsize=10,
        )
    return report.PICTURES / f"sensitivity-{task.name}.svg"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="mnist1d-1000-20")
    p.add_argument("--net", default="cnn")
    p.add_argument("--data-dir", type=Path)
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--jobs", type=int, default=os.cpu_count())
    args = p.parse_args()
    task = Task(args.data, args.net)
    tasks.pool(task.parts[0], args.data_dir)
    tuned = json.loads((FOLDER / "tuned.json").read_text())[task.name]
    names = ["full", *(f"full, {setting} {value}" for setting, values in VARIED.items() for value in values)]
    results, console = Results(task, FOLDER), Console()
    run_all(
        [r for name in names for r in runs_of(task, name, args.seeds, tuned)], results, args.jobs, console, task.name
    )
    console.print(plot(task, results, args.seeds, tuned), highlight=False)


if __name__ == "__main__":
    main()
