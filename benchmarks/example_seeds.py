"""The example, repeated: does the student beat its pre-trained model, over seeds and over weight decays?

    python benchmarks/example_seeds.py                     # what `make example-seeds` runs: 5 seeds, 6 weight decays
    python benchmarks/example_seeds.py --seeds 3 --weight-decays 5e-4

Every run is `examples/cifar_train.py` at its defaults but for the seed and the weight decay; a seed draws the split, the wrong
labels, the initial weights and the order of the samples. Both models of a run share the setting, so differences are paired.
Prints the table of docs/study.md, and in how many seeds the student was better; writes every run's result, with machine and
versions, to `benchmarks/results/example_seeds.json`. `--page` writes the table into docs/study.md, and runs nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import RESULTS, filled, machine, spread, write
from rich.console import Console
from rich.progress import track

sys.path.append(str(Path(__file__).parent.parent / "examples"))
import cifar_train

PAGE = Path(__file__).parent.parent / "docs" / "study.md"


def run(argv: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Settings and machine, and the records of the epochs and the result."""
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        cifar_train.main([*argv, "--out", out])
        head, *records = (json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines())
    return head, records


def by_decay(runs: list[dict[str, Any]]) -> dict[float, list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Plain model and student of each seed, by weight decay."""
    pairs: dict[float, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for r in runs:
        pairs.setdefault(r["weight_decay"], []).append((r["pre-trained"], r["student"]))
    return pairs


def table(runs: list[dict[str, Any]]) -> str:
    heads = "| weight decay | plain: validation, test accuracy % | student minus plain, points (NLL scaled) |"
    lines = [heads, "|---|---|---|"]
    for decay, pairs in by_decay(runs).items():
        accuracy = [student["accuracy"] - plain["accuracy"] for plain, student in pairs]
        nll = [student["nll_scaled"] - plain["nll_scaled"] for plain, student in pairs]
        held, test = (spread([plain[key] for plain, _ in pairs], ".2f") for key in ("validation_accuracy", "accuracy"))
        mark = " (the example)" if decay == cifar_train.parse([]).weight_decay else ""
        lines.append(f"| {decay:g}{mark} | {held}, {test} | {spread(accuracy, '+.2f')} ({spread(nll, '+.3f')}) |")
    return "\n".join(lines)


def fill_page(page: str) -> str:
    return filled(page, "example", table(json.loads((RESULTS / "example_seeds.json").read_text())["runs"]))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=5, help="at least 2 (default 5)")
    p.add_argument("--weight-decays", default="5e-4,2e-3,5e-3,1e-2,2e-2,4e-2")
    p.add_argument("--out", type=Path, default=RESULTS / "example_seeds.json")
    p.add_argument("--page", action="store_true", help="write docs/study.md from the results, run nothing")
    args = p.parse_args()
    if args.page:
        PAGE.write_text(fill_page(PAGE.read_text()))
        return
    if args.seeds < 2:
        p.error("--seeds must be at least 2: a spread needs them")
    decays = [float(decay) for decay in args.weight_decays.split(",")]

    runs: list[dict[str, Any]] = []
    head: dict[str, Any] = {}
    grid = list(itertools.product(decays, range(args.seeds)))
    for decay, seed in track(grid, description="runs", console=Console(stderr=True)):
        head, records = run(["--weight-decay", str(decay), "--seed", str(seed)])
        result = records.pop()["result"]
        for name in result:
            (last,) = [r for r in records if r["phase"] == name and r["epoch"] == head["settings"]["epochs"] - 1]
            result[name]["validation_accuracy"] = last["validation_accuracy"]
        runs.append({"weight_decay": decay, "seed": seed} | result)

    settings = {name: value for name, value in head["settings"].items() if name not in runs[0]}
    write(args.out, {"settings": settings, "machine": head["machine"] | machine()}, "runs", runs)

    print(table(runs))
    wins = []
    for decay, pairs in by_decay(runs).items():
        accurate = sum(student["accuracy"] > plain["accuracy"] for plain, student in pairs)
        likely = sum(student["nll_scaled"] < plain["nll_scaled"] for plain, student in pairs)
        wins.append(f"{decay:g}: {accurate}, {likely} of {len(pairs)}")
    seconds = statistics.fmean(r[name]["seconds"] for r in runs for name in ("pre-trained", "student"))
    print(f"\nSeeds in which the student is better in accuracy, in NLL: {'; '.join(wins)}.")
    print(f"Training takes {seconds:.1f} s a phase. Every run: {args.out}")


if __name__ == "__main__":
    main()
