"""The example, repeated: does the student beat its pre-trained model, over seeds and over weight decays?

    python benchmarks/example_seeds.py                     # what `make example-seeds` runs: 5 seeds, 6 weight decays,
                                                           # both values of --label-weight
    python benchmarks/example_seeds.py --seeds 3 --weight-decays 5e-4

Every run is `examples/cifar_train.py` at its defaults but for the seed, the weight decay and the labels' weight; a seed draws
the split, the wrong labels, the initial weights and the order of the samples. Both models of a run share the setting, so
differences are paired. Prints a table and writes every run's result, with machine and versions, to
`benchmarks/results/example_seeds.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import RESULTS, machine, write
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).parent.parent


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("cifar_train", ROOT / "examples" / "cifar_train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cifar_train"] = module
    spec.loader.exec_module(module)
    return module


def run(example: Any, argv: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Settings and machine, and the records of the epochs and the result."""
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        example.main([*argv, "--out", out])
        head, *records = (json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines())
    return head, records


def spread(values: list[float], form: str) -> str:
    """Mean and standard error."""
    return f"{statistics.fmean(values):{form}} ± {statistics.stdev(values) / math.sqrt(len(values)):{form.strip('+')}}"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=5, help="at least 2 (default 5)")
    p.add_argument("--weight-decays", default="5e-4,2e-3,5e-3,1e-2,2e-2,4e-2")
    p.add_argument("--label-weights", default="falling,kept")
    p.add_argument("--out", type=Path, default=RESULTS / "example_seeds.json")
    args = p.parse_args()
    if args.seeds < 2:
        p.error("--seeds must be at least 2: a spread needs them")
    decays = [float(decay) for decay in args.weight_decays.split(",")]

    example = load_example()
    runs: list[dict[str, Any]] = []
    head: dict[str, Any] = {}
    label_weights = args.label_weights.split(",")
    grid = list(itertools.product(label_weights, decays, range(args.seeds)))
    for label_weight, decay, seed in track(grid, description="runs", console=Console(stderr=True)):
        varied = {"label-weight": label_weight, "weight-decay": decay, "seed": seed}
        head, records = run(example, [word for name, value in varied.items() for word in (f"--{name}", str(value))])
        result = records.pop()["result"]
        for name in result:
            (last,) = [r for r in records if r["phase"] == name and r["epoch"] == head["settings"]["epochs"] - 1]
            result[name]["validation_accuracy"] = last["validation_accuracy"]
        runs.append({name.replace("-", "_"): value for name, value in varied.items()} | result)

    settings = {name: value for name, value in head["settings"].items() if name not in runs[0]}
    write(args.out, {"settings": settings, "machine": head["machine"] | machine()}, "runs", runs)

    table = Table(title=f"student minus plain cross-entropy on the test set, {args.seeds} seeds, mean ± standard error")
    for column in ("labels", "weight decay", "plain, validation", "plain, test", "accuracy", "NLL, scaled", "wins"):
        table.add_column(column, justify="right")
    for label_weight, decay in itertools.product(label_weights, decays):
        of_row = {"label_weight": label_weight, "weight_decay": decay}
        pairs = [(r["pre-trained"], r["student"]) for r in runs if of_row.items() <= r.items()]
        accuracy = [student["accuracy"] - plain["accuracy"] for plain, student in pairs]
        nll = [student["nll_scaled"] - plain["nll_scaled"] for plain, student in pairs]
        wins = [sum(difference > 0 for difference in accuracy), sum(difference < 0 for difference in nll)]
        table.add_row(
            label_weight,
            f"{decay:g}",
            spread([plain["validation_accuracy"] for plain, _ in pairs], ".2f"),
            spread([plain["accuracy"] for plain, _ in pairs], ".2f"),
            spread(accuracy, "+.2f"),
            spread(nll, "+.3f"),
            f"{wins[0]}, {wins[1]} of {len(pairs)}",
        )
    console = Console(width=110)
    console.print(table)
    console.print(f"{args.out}", highlight=False)


if __name__ == "__main__":
    main()
