"""First contact: nothing is tuned. Learning rate 0.05, four weight decays, a rate that decays or does not, two networks, clean
labels and 30% wrong ones, on 1,000 samples of MNIST-1D, 40 epochs: is the student worse than plain cross-entropy?

    python benchmarks/study/first_contact.py            # writes benchmarks/results/first_contact.json and docs/accuracy.md

The pre-trained model is cross-entropy in the same setting. Differences from cross-entropy are in points of accuracy on the test
set, paired by seed, with their standard error.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tasks
import torch
from rich.progress import track
from scores import logits_of, percent_right
from tasks import Task, draw
from train import APART, Run, pretrained, trained

sys.path.append(str(Path(__file__).parents[1]))
from machine import RESULTS, error, filled, machine, spread, write

PAGE = Path(__file__).parents[2] / "docs" / "accuracy.md"
OUT = RESULTS / "first_contact.json"
LEARNING_RATE, WEIGHT_DECAYS = 0.05, (0.0, 5e-4, 5e-3, 2e-2)
METHODS = {  # as the page calls them: method, and the setting of its own
    **{name: (name, None) for name in ("cross-entropy", "PS-KD", "deterministic", "full")},
    "full, alpha to .5": ("full", 0.5),
    "handing over": ("full handing over", None),
}
PLACES = list(itertools.product(("cnn", "mlp"), (0, 30), (False, True)))


def accuracies(net: str, noise: int, constant: bool, shown: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    method, own = METHODS[shown]
    torch.set_num_threads(1)
    task = Task("mnist1d", 1_000, noise, net, 40, constant=constant)
    runs = [Run(method, seed, LEARNING_RATE, decay, own) for decay in WEIGHT_DECAYS for seed in seeds]
    teachers = pretrained(task, tuple(replace(run, method="cross-entropy", own=None) for run in runs))
    model, data = trained(task, runs, [run.seed + APART for run in runs], teachers), draw(task, [0])
    logits = logits_of(model, data.test_x.expand(len(runs), *data.test_x.shape))
    place = dict(net=net, noise=noise, constant=constant, method=shown)
    return [
        place | dict(weight_decay=run.weight_decay, seed=run.seed, accuracy=round(percent_right(x, data.test_y), 3))
        for run, x in zip(runs, logits, strict=True)
    ]


def of(arguments: tuple[Any, ...]) -> list[dict[str, Any]]:
    return accuracies(*arguments)


def table(lines: list[dict[str, Any]]) -> str:
    """A line a setting; in bold what is worse than cross-entropy by more than a standard error."""
    heads = ["setting", "weight decay", *METHODS]
    said = [f"| {' | '.join(heads)} |", "|---|--:" + "|--:" * len(METHODS) + "|"]
    others = list(METHODS)[1:]
    worse = dict.fromkeys(others, 0)
    for (net, noise, constant), decay in itertools.product(PLACES, WEIGHT_DECAYS):
        place = (net, noise, constant, decay)
        here = [x for x in lines if (x["net"], x["noise"], x["constant"], x["weight_decay"]) == place]
        by = {m: {x["seed"]: x["accuracy"] for x in here if x["method"] == m} for m in METHODS}
        plain = by["cross-entropy"]
        cells = [
            f"{net}, {f'{noise}% wrong' if noise else 'clean'}, {'constant' if constant else 'cosine'}",
            f"{decay:g}",
        ]
        cells.append(f"{statistics.fmean(plain.values()):.1f}")
        for method in others:
            above = [by[method][seed] - plain[seed] for seed in plain]
            lost = statistics.fmean(above) < -error(above)
            worse[method] += lost
            cells.append(f"**{spread(above, '+.1f')}**" if lost else spread(above, "+.1f"))
        said.append(f"| {' | '.join(cells)} |")
    count = "; ".join(f"{method}: {n}" for method, n in worse.items())
    settings, seeds = len(PLACES) * len(WEIGHT_DECAYS), len({x["seed"] for x in lines})
    return "\n".join(
        [
            *said,
            "",
            f"Settings, of {settings}, in which a method is worse by more than a standard error ({seeds} seeds): {count}.",
        ]
    )


def fill_page(text: str) -> str:
    return filled(text, "first-contact", table(json.loads(OUT.read_text())["runs"]))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=4)
    p.add_argument("--jobs", type=int, default=os.cpu_count())
    args = p.parse_args()
    tasks.pool("mnist1d")
    asked = [(*place, method, range(args.seeds)) for place in PLACES for method in METHODS]
    with multiprocessing.get_context("fork").Pool(args.jobs) as workers:
        found = list(track(workers.imap(of, asked), total=len(asked), description="first contact"))
    lines = list(itertools.chain(*found))
    write(OUT, {"machine": machine()}, "runs", lines)
    print(table(lines))
    PAGE.write_text(fill_page(PAGE.read_text()))


if __name__ == "__main__":
    main()
