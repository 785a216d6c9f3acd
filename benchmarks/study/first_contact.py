"""First contact: nothing is tuned. Learning rate 0.05, four weight decays, a rate that decays or does not, two networks, clean
labels and 30% wrong ones, on 1,000 samples of MNIST-1D, 40 epochs: is the student worse than plain cross-entropy? Where the
MLP was worse, 120 epochs too. And cross-entropy with the falling weight that PS-KD gives to labels: what does that do alone?

    python benchmarks/study/first_contact.py    # what benchmarks/results/first_contact.json has not yet; and docs/study.md

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

PAGE = Path(__file__).parents[2] / "docs" / "study.md"
OUT = RESULTS / "first_contact.json"
LEARNING_RATE, WEIGHT_DECAYS = 0.05, (0.0, 5e-4, 5e-3, 2e-2)
METHODS = (
    "cross-entropy", "falling weight", "PS-KD", "deterministic", "full", "full at T = 1", "full handing over",
)  # fmt: skip
SHORT = 40  # epochs
PLACES = [  # network, percent of wrong labels, whether the rate is constant, epochs
    *itertools.product(("cnn", "mlp"), (0, 30), (False, True), (SHORT,)),
    *itertools.product(("mlp",), (0, 30), (False,), (120,)),
]
Place = tuple[str, int, bool, int]


def accuracies(
    net: str, noise: int, constant: bool, epochs: int, method: str, seeds: Sequence[int]
) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    task = Task("mnist1d", 1_000, noise, net, epochs, constant=constant)
    runs = [Run(method, seed, LEARNING_RATE, decay) for decay in WEIGHT_DECAYS for seed in seeds]
    teachers = pretrained(task, tuple(replace(run, method="cross-entropy") for run in runs))
    model, data = trained(task, runs, [run.seed + APART for run in runs], teachers), draw(task, [0])
    logits = logits_of(model, data.test_x.expand(len(runs), *data.test_x.shape))
    place = dict(net=net, noise=noise, constant=constant, epochs=epochs, method=method)
    return [
        place | dict(weight_decay=run.weight_decay, seed=run.seed, accuracy=round(percent_right(x, data.test_y), 3))
        for run, x in zip(runs, logits, strict=True)
    ]


def of(arguments: tuple[Any, ...]) -> list[dict[str, Any]]:
    return accuracies(*arguments)


def place_of(line: dict[str, Any]) -> Place:
    return line["net"], line["noise"], line["constant"], line["epochs"]


def named(net: str, noise: int, constant: bool, epochs: int) -> str:
    labels, rate = f"{noise}% wrong" if noise else "clean", "constant" if constant else "cosine"
    return f"{net}, {labels}, {rate}" + f", {epochs} epochs" * (epochs != SHORT)


def table(lines: list[dict[str, Any]]) -> str:
    """A line a setting; in bold what is worse than cross-entropy by more than a standard error."""
    said = [f"| setting, weight decay | {' | '.join(METHODS)} |", "|---" + "|--:" * len(METHODS) + "|"]
    others = METHODS[1:]
    lost: dict[str, list[bool]] = {method: [] for method in others}  # in each setting; first those that people use
    settings = sorted(itertools.product(PLACES, WEIGHT_DECAYS), key=lambda x: not customary(*x))
    for place, decay in settings:
        here = [x for x in lines if (place_of(x), x["weight_decay"]) == (place, decay)]
        by = {m: {x["seed"]: x["accuracy"] for x in here if x["method"] == m} for m in METHODS}
        plain = by["cross-entropy"]
        cells = [f"{named(*place)}, {decay:g}", f"{statistics.fmean(plain.values()):.1f}"]
        for method in others:
            above = [by[method][seed] - plain[seed] for seed in plain]
            lost[method].append(statistics.fmean(above) < -error(above))
            cells.append(f"**{spread(above, '+.1f')}**" if lost[method][-1] else spread(above, "+.1f"))
        said.append(f"| {' | '.join(cells)} |")
    first, seeds = sum(customary(*x) for x in settings), len({x["seed"] for x in lines})

    def counts(among: int) -> str:
        return "; ".join(f"{method} {sum(of[:among])}" for method, of in lost.items())

    worse = f"Worse by more than a standard error ({seeds} seeds), in how many of the first {first} settings: "
    return "\n".join([*said, "", f"{worse}{counts(first)}. In all {len(settings)}: {counts(len(settings))}."])


def customary(place: Place, decay: float) -> bool:
    """Settings that somebody would take who tunes nothing; the others look for the reason."""
    return place[-1] == SHORT and decay <= 5e-3


def fill_page(text: str) -> str:
    return filled(text, "first-contact", table(json.loads(OUT.read_text())["runs"]))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=4)
    p.add_argument("--jobs", type=int, default=os.cpu_count())
    args = p.parse_args()
    tasks.pool("mnist1d")
    lines = json.loads(OUT.read_text())["runs"] if OUT.exists() else []
    done = {(*place_of(x), x["method"]) for x in lines}
    every = itertools.product(PLACES, METHODS)
    asked = [(*place, method, range(args.seeds)) for place, method in every if (*place, method) not in done]
    with multiprocessing.get_context("fork").Pool(args.jobs) as workers:
        found = list(track(workers.imap(of, asked), total=len(asked), description="first contact"))
    lines += itertools.chain(*found)
    lines.sort(key=lambda x: (PLACES.index(place_of(x)), METHODS.index(x["method"])))
    write(OUT, {"machine": machine()}, "runs", lines)
    print(table(lines))
    PAGE.write_text(fill_page(PAGE.read_text()))


if __name__ == "__main__":
    main()
