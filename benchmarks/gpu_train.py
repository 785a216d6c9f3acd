"""The reference example on a GPU: a ResNet-18 on all of Fashion-MNIST, over seeds, with clean labels and with 40% wrong ones.

    python benchmarks/gpu_train.py --minutes 8        # begins nothing that would not be done by then; call again to go on
    python benchmarks/gpu_train.py --page             # writes the table of docs/gpu.md
    python benchmarks/gpu_train.py --rehearse         # all of it, small, on a CPU; its numbers say nothing

Everything is `examples/cifar_train.py --dataset fashion-mnist --model resnet18 --augment --compile`, in batches of 512 and, as
the example does on a GPU, in bfloat16. First learning rate and weight decay are searched for plain cross-entropy, for clean and
for wrong labels, by short runs of a seed of its own: from a first guess to the best of its neighbours (a half and the double of
either), until none of them is better by accuracy on validation images. So the optimum is inside of what was tried. Every method
then uses that setting, for 30 epochs: cross-entropy, which is also the pre-trained model of the others, PS-KD (progressive
alone), deterministic alone, the full method. Nothing is chosen by the test images.

A job is a line of `benchmarks/results/gpu-train.jsonl`; those that are there are not run again. Images: the four files of
Fashion-MNIST in `--data-dir` (Debian's package `dataset-fashion-mnist` has them).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from machine import RESULTS, filled, machine, spread
from rich.console import Console

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from _data import Data, load
from _report import fit_temperature, measure, predict, progress_bar
from cifar_train import Run, parse, train

DATA = Path(__file__).parent.parent / "examples" / "data" / "fashion-mnist"
PAGE = Path(__file__).parent.parent / "docs" / "gpu.md"
NOISES = (0.0, 0.4)
METHODS = {
    "cross-entropy": None,  # phase 1
    "PS-KD": "progressive",
    "deterministic": "deterministic",
    "full method": "progressive,deterministic,adversarial",
}
SEARCH_SEED = 100
SETTINGS = dict(batch_size=512, epochs=30, search_epochs=10, lr=0.1, weight_decay=5e-4)
REAL = ["--dataset", "fashion-mnist", "--model", "resnet18", "--augment", "--compile"]
SMALL = ["--dataset", "fashion-mnist-mini", "--model", "mlp", "--train-size", "192", "--validation-size", "64"]
REHEARSED = dict(batch_size=64, epochs=2, search_epochs=1, lr=0.1, weight_decay=5e-4)
Line = dict[str, Any]


class Unsaved(Run):
    """A run whose epochs are kept in memory."""

    def save(self, epoch: int, parts: dict[str, Any]) -> None:
        self.state |= dict(epoch=epoch)


class OutOfTimeError(Exception):
    """The next job would end too late."""


@dataclass
class Jobs:
    """What was done, in memory and in a file; what is asked for is looked up there, or run."""

    fixed: list[str]  # options of the example that all jobs share
    settings: dict[str, Any]
    out: Path
    teachers: Path  # their weights, as long as the machine keeps them
    ends: float = math.inf  # when nothing may run any more
    lines: list[Line] = field(default_factory=list)

    def run(self, job: Line, terms: str | None = None) -> Line:
        """Phase 1 or, with `terms`, phase 2 of the example: its numbers, a line of the file."""
        for line in self.lines:
            if all(line.get(name) == x for name, x in job.items()):
                return line
        line = job | self.trained(job, terms)
        print(*(f"{name}={x:.4g}" if isinstance(x, float) else f"{name}={x}" for name, x in line.items()), flush=True)
        self.lines.append(line)
        new = self.out.with_suffix(".new")
        new.write_text("".join(json.dumps(x) + "\n" for x in [{"settings": self.settings}, *self.lines]))
        new.replace(self.out)
        return line

    def trained(self, job: Line, terms: str | None) -> Line:
        """The numbers of one phase."""
        state = dict(settings={}, phase=1 if terms is None else 2, epoch=0, teacher=None, history=[])
        teacher = self.teachers / f"{job['noise']}-{job['seed']}-{job['epochs']}-{job['lr']}-{job['weight_decay']}.pt"
        if terms is not None and not teacher.exists():  # only its numbers are in the file
            self.trained(job | {"method": "cross-entropy"}, None)
            if not teacher.exists():  # it diverged
                return {"diverged": True}
        if time.time() + self.expected(job) > self.ends:
            raise OutOfTimeError
        if terms is not None:
            state["teacher"] = torch.load(teacher, weights_only=True)
        given = {name: job[name] for name in ("epochs", "lr", "weight_decay", "seed")}
        given |= {"label_noise": job["noise"], "batch_size": self.settings["batch_size"], "terms": terms or "none"}
        args = parse([*self.fixed, *(f"--{name.replace('_', '-')}={x}" for name, x in given.items())])
        run = Unsaved(args, images(*self.fixed, noise=job["noise"], seed=job["seed"]), 0, 1, Console(quiet=True), state)
        start = time.time()
        torch.compiler.reset()
        try:
            with progress_bar(run) as progress:
                model = train(run, progress)
        except SystemExit:  # which it says
            return {"diverged": True, "validation_accuracy": 0.0}
        if terms is None:
            self.teachers.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), teacher)
        facts = machine(args.device) | {"seconds": time.time() - start}
        return numbers(run, model) | {name: facts[name] for name in ("seconds", "device", "python", "torch")}

    def expected(self, job: Line) -> float:
        """How long it may take: the longest of its method or, without one, twice that of another."""
        times = [(x["method"], x["seconds"]) for x in self.lines if x["epochs"] == job["epochs"] and "seconds" in x]
        own = [seconds for method, seconds in times if method == job["method"]]
        return max(own) if own else 2 * max([seconds for _, seconds in times], default=0.0)

    def searched(self, noise: float) -> tuple[float, float]:
        """Learning rate and weight decay, better on validation images than a half and the double of either."""
        at = self.settings["lr"], self.settings["weight_decay"]
        while True:
            lr, decay = at
            near = [at, (lr * 2, decay), (lr / 2, decay), (lr, decay * 2), (lr, decay / 2)]
            scores = {}
            for rate, wd in near:
                job = dict(method="search", noise=noise, seed=SEARCH_SEED, epochs=self.settings["search_epochs"])
                scores[rate, wd] = self.run(job | dict(lr=rate, weight_decay=wd))["validation_accuracy"]
            best = max(near, key=lambda x: scores[x])  # of equal ones the first: where we are
            if best == at:
                return at
            at = best

    def all(self, seeds: int) -> None:
        found = {noise: self.searched(noise) for noise in NOISES}
        for seed in range(seeds):
            for noise, (lr, decay) in found.items():
                for method, terms in METHODS.items():
                    job = dict(method=method, noise=noise, seed=seed, epochs=self.settings["epochs"])
                    self.run(job | dict(lr=lr, weight_decay=decay), terms)


@cache
def images(*fixed: str, noise: float, seed: int) -> Data:
    return load(parse([*fixed, f"--label-noise={noise}", f"--seed={seed}"]))


def numbers(run: Run, model: torch.nn.Module) -> Line:
    data, epochs = run.data, [record["seconds"] for record in run.state["history"]]
    temperature = fit_temperature(*predict(model, data, data.validation))
    logits, target = predict(model, data, data.test)
    test = measure(logits, target)
    return {
        "accuracy": test["accuracy"],
        "nll": test["nll"],
        "nll_scaled": measure(logits / temperature, target)["nll"],
        "ece": test["ece"],
        "validation_accuracy": run.state["history"][-1]["validation_accuracy"],
        "images_per_second": len(data.train[0]) / statistics.median(epochs),
    }


def table(text: str) -> str:
    """What docs/gpu.md says of a file of results: mean and standard error over seeds, differences from cross-entropy paired."""
    head, *lines = map(json.loads, text.splitlines())
    settings, finished = head["settings"], [x for x in lines if "torch" in x]
    machines = sorted({f"{x['device']}, Python {x['python']}, torch {x['torch']}" for x in finished})
    of = lambda noise, method: {x["seed"]: x for x in finished if (x["noise"], x["method"]) == (noise, method)}  # noqa: E731
    said = [f"{'; '.join(machines)}. {settings['epochs']} epochs a phase.", ""]
    said.append("| labels | method | seeds | accuracy, % | above cross-entropy | NLL, scaled | s a phase | images/s |")
    said.append("|---|---|--:|--:|--:|--:|--:|--:|")
    for noise in NOISES:
        plain = of(noise, "cross-entropy")
        for method in METHODS:
            runs = {seed: x for seed, x in of(noise, method).items() if seed in plain}
            if not runs:
                continue
            diverged = sum("diverged" in x for x in lines if (x["noise"], x["method"]) == (noise, method))
            above = [x["accuracy"] - plain[seed]["accuracy"] for seed, x in runs.items()]
            times, rates = ([x[name] for x in runs.values()] for name in ("seconds", "images_per_second"))
            seeds = f"{len(runs)}, {diverged} diverged" if diverged else str(len(runs))
            cells = [f"{noise:.0%} wrong" if noise else "clean", method, seeds]
            cells.append(spread([x["accuracy"] for x in runs.values()], ".2f", "+-"))
            cells.append("" if method == "cross-entropy" else spread(above, "+.2f", "+-"))
            cells.append(spread([x["nll_scaled"] for x in runs.values()], ".3f", "+-"))
            cells += [f"{min(times):,.0f}", f"{max(rates):,.0f}"]  # others may have shared the machine
            said.append(f"| {' | '.join(cells)} |")
    return "\n".join([*said, "", *searches(lines)])


def searches(lines: list[Line]) -> list[str]:
    found = []
    for noise in NOISES:
        tried = [x for x in lines if (x["method"], x["noise"]) == ("search", noise)]
        if tried:
            best = max(tried, key=lambda x: x["validation_accuracy"])
            found.append(f"{f'{noise:.0%} wrong' if noise else 'Clean'} labels: learning rate {best['lr']:g}, weight decay "
                         f"{best['weight_decay']:g}, of {len(tried)} settings.")  # fmt: skip
    return found


def fill_page(page: str, results: str) -> str:
    return filled(page, "gpu-train", table(results))


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data-dir", type=Path, default=DATA)
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--minutes", type=float, default=1e9, help="begin no job that would take longer")
    p.add_argument("--out", type=Path, default=RESULTS / "gpu-train.jsonl")
    p.add_argument("--rehearse", action="store_true")
    p.add_argument("--page", action="store_true", help="write docs/gpu.md from the results, and run nothing")
    args = p.parse_args(argv)
    results = RESULTS / "gpu-train.jsonl"
    if args.page:
        PAGE.write_text(fill_page(PAGE.read_text(), results.read_text()))
        return
    if torch.cuda.is_available():  # as the example has it
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as nowhere:
        if args.rehearse:
            jobs = Jobs(SMALL, REHEARSED, args.out, Path(nowhere))
        else:
            fixed, ends = [*REAL, f"--data-dir={args.data_dir}"], time.time() + 60 * args.minutes
            jobs = Jobs(fixed, SETTINGS, args.out, Path("runs/gpu/teachers"), ends)
            jobs.lines = [json.loads(line) for line in results.read_text().splitlines()[1:]] if results.exists() else []
        try:
            jobs.all(args.seeds)
            print("all done")
        except OutOfTimeError:
            print("out of time: copy what was written to benchmarks/results/ and call again to go on")
    if jobs.lines:
        print(table(args.out.read_text()))


if __name__ == "__main__":
    main()
