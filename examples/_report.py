"""What a run of cifar_train.py says: what is run, a line for each epoch, `log.jsonl`, a table, `curves.png`."""

from __future__ import annotations

import json
import os
import platform
import statistics
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from _data import Data
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import aikd_losses

if TYPE_CHECKING:
    from cifar_train import Run

PHASES = {1: "pre-trained", 2: "student"}
SEEDS = Path(__file__).parent.parent / "benchmarks" / "results" / "example_seeds.json"
Record = dict[str, Any]


def announce(run: Run) -> None:
    """Before anything is trained: on what, which network, how long, and what the columns mean."""
    args, data = run.args, run.data
    train, validation, test = (f"{len(labels):,}" for _, labels in (data.train, data.validation, data.test))
    noise = f"{args.label_noise:.0%} of the labels wrong" if args.label_noise else "labels as they are"
    terms, epochs = " + ".join(args.terms) or "cross-entropy", f"{args.epochs} epoch{'s' * (args.epochs > 1)}"
    lines = [
        f"data     {args.dataset}: {train} training images, {noise};",
        f"         {validation} validation and {test} test images, labels as they are",
        f"network  {args.model} on {args.device}, seed {args.seed}, learning rate {args.lr:g}, "
        f"weight decay {args.weight_decay:g}",
        f"phase 1  pre-trained: {epochs} of cross-entropy",
        f"phase 2  student: {epochs} of {terms}",
        "columns  on the test images: accuracy, NLL (negative log-likelihood), ECE",
        "         (calibration error); then the mean of each term of the loss",
    ]
    if "adversarial" in args.terms:
        lines += [
            "         discriminator right: how often it scores the teacher's prediction above",
            "         the student's, in the last step. About 50% to 80% is healthy; in the",
            "         first epochs it may be lower. Near 100% the student learns little",
            "         from it.",
        ]
    run.console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


@torch.no_grad()
def predict(model: nn.Module, data: Data, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of a part's images, and their labels."""
    model.eval()
    images, labels = part
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        return torch.cat([model(data.prepare(x)).float() for x in images.split(1000)]), labels


def bins(logits: Tensor, target: Tensor, count: int = 15) -> Tensor:
    """Of each bin of confidence: the share of samples, their mean confidence, their accuracy; (3, count)."""
    confidence, guess = logits.softmax(-1).max(-1)
    which = (confidence * count).long().clamp(max=count - 1)
    sums = torch.zeros(3, count, device=logits.device)
    for row, value in enumerate((torch.ones_like(confidence), confidence, (guess == target).float())):
        sums[row].index_add_(0, which, value)
    return torch.stack([sums[0] / len(target), sums[1] / sums[0].clamp_min(1), sums[2] / sums[0].clamp_min(1)])


def measure(logits: Tensor, target: Tensor) -> dict[str, float]:
    share, confidence, accuracy = bins(logits, target)
    return {
        "accuracy": 100 * float((logits.argmax(-1) == target).float().mean()),
        "nll": float(F.cross_entropy(logits, target)),
        "ece": 100 * float((share * (confidence - accuracy).abs()).sum()),
    }


def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """The T that minimises the NLL of softmax(logits / T); Guo et al., 2017, https://arxiv.org/abs/1706.04599."""
    grid = torch.logspace(-1, 1.5, 251).tolist()
    return min(grid, key=lambda t: float(F.cross_entropy(logits / t, target)))


def add_epoch(
    run: Run, epoch: int, model: nn.Module, terms: dict[str, float], diagnostics: dict[str, Tensor], seconds: float
) -> None:
    """Measured, put into the history, printed."""
    data = run.data
    record = {
        "phase": PHASES[run.state["phase"]],
        "epoch": epoch,
        **measure(*predict(model, data, data.test)),
        "validation_accuracy": measure(*predict(model, data, data.validation))["accuracy"],
        "terms": terms,
        "diagnostics": {name: float(value) for name, value in diagnostics.items()},
        "seconds": seconds,
    }
    run.state["history"].append(record)
    values = "  ".join(f"{term} {value:.3f}" for term, value in terms.items())
    right = record["diagnostics"].get("adversarial/accuracy")
    run.console.print(
        f"{record['phase']:>11} {epoch + 1:3d}/{run.args.epochs}  test accuracy {record['accuracy']:5.2f}%  "
        f"NLL {record['nll']:.3f}  ECE {record['ece']:5.2f}%  {values}  "
        + ("" if right is None else f"discriminator right {right:.0%}  ")
        + f"({seconds:.1f} s)",
        highlight=False,
        soft_wrap=True,
    )


def progress_bar(run: Run) -> Progress:
    columns = TextColumn("{task.description:>11}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    hidden = run.rank > 0 or not run.console.is_terminal
    return Progress(*columns, console=run.console, disable=hidden, transient=True)


def machine(run: Run) -> Record:
    cuda = run.args.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "processes": run.world,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "aikd_losses": aikd_losses.__version__,
    }


def write_log(run: Run, *result: Record) -> None:
    """Settings and machine, an epoch a line, the result; replaced in one step, as the checkpoint is."""
    lines = [dict(settings=run.state["settings"], machine=machine(run)), *run.state["history"], *result]
    new = run.args.out / "log.new"
    new.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(new, run.args.out / "log.jsonl")


def report(run: Run, models: dict[str, nn.Module]) -> None:
    """Both models as they are, and scaled by the temperature that suits the validation images."""
    args, data, history = run.args, run.data, run.state["history"]
    results: dict[str, Record] = {}
    diagrams = {}
    for name, model in models.items():
        temperature = fit_temperature(*predict(model, data, data.validation))
        logits, target = predict(model, data, data.test)
        scaled = measure(logits / temperature, target)
        records = [record for record in history if record["phase"] == name]
        best = max(records, key=lambda record: record["validation_accuracy"])
        results[name] = {
            **measure(logits, target),
            "best_epoch": best["epoch"] + 1,
            "best_accuracy": best["accuracy"],
            "nll_scaled": scaled["nll"],
            "ece_scaled": scaled["ece"],
            "temperature": temperature,
            "seconds": sum(record["seconds"] for record in records),
        }
        diagrams[name] = bins(logits, target).cpu()
    write_log(run, {"result": results})
    plot(history, diagrams, args.out / "curves.png")

    plain, student = results["pre-trained"], results["student"]
    noise = f", {args.label_noise:.0%} wrong labels" if args.label_noise else ""
    table = Table(title=f"{args.dataset}, {args.model}, {len(data.train[0])} images{noise}, seed {args.seed}")
    table.add_column(f"{len(data.test[0]):,} test images")
    table.add_column("plain cross-entropy\n(pre-trained)", justify="right")
    table.add_column("student\n" + ("\n+ ".join(args.terms) or "cross-entropy"), justify="right")
    table.add_column("difference", justify="right")
    for label, key, form in (
        ("test accuracy, last, %", "accuracy", ".2f"),
        ("test accuracy, best, %", "best_accuracy", ".2f"),
        ("best epoch", "best_epoch", "d"),
        ("NLL, nats", "nll", ".3f"),
        ("NLL, scaled", "nll_scaled", ".3f"),
        ("ECE, %", "ece", ".2f"),
        ("ECE, scaled", "ece_scaled", ".2f"),
        ("scaling temperature", "temperature", ".2f"),
        ("training, s", "seconds", ".1f"),
    ):
        table.add_row(label, f"{plain[key]:{form}}", f"{student[key]:{form}}", f"{student[key] - plain[key]:+{form}}")
    run.console.print(table)
    run.console.print("[dim]last: after the last epoch; best: after the epoch of the highest validation accuracy[/]")
    run.console.print("[dim]scaled: after dividing the logits by the temperature that suits the validation images[/]")
    if tuned := tuned_plain(args):
        run.console.print(tuned, highlight=False)
    run.console.print(f"[dim]{args.out / 'curves.png'}, {args.out / 'log.jsonl'}[/]")


def tuned_plain(args: Namespace, path: Path = SEEDS) -> str:
    """What plain training reaches with the weight decay that is best for it, if that was recorded for this task."""
    if not path.exists():
        return ""
    recorded = json.loads(path.read_text())
    of_the_student = {"alpha", "temperature", "terms"}
    if any(
        getattr(args, name, None) != value for name, value in recorded["settings"].items() if name not in of_the_student
    ):
        return ""

    def mean(decay: float, name: str, key: str) -> float:
        return statistics.fmean(run[name][key] for run in recorded["runs"] if run["weight_decay"] == decay)

    decays = {run["weight_decay"] for run in recorded["runs"]}
    decay = max(decays, key=lambda decay: mean(decay, "pre-trained", "validation_accuracy"))
    seeds = sum(run["weight_decay"] == decay for run in recorded["runs"])
    plain, student = (mean(decay, name, "accuracy") for name in PHASES.values())
    return (
        f"Tune the weight decay first: with {decay:g} plain training reaches {plain:.1f}% on this task, and the full "
        f"method {student:.1f}% (last epoch, means of {seeds} seeds, benchmarks/results/{path.name})."
    )


def plot(history: list[Record], diagrams: dict[str, Tensor], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name, color in (("pre-trained", "tab:gray"), ("student", "tab:blue")):
        records = [record for record in history if record["phase"] == name]
        epochs = [record["epoch"] + 1 for record in records]
        for axis, key in ((axes[0], "accuracy"), (axes[1], "nll")):
            axis.plot(epochs, [record[key] for record in records], color=color, label=name)
        share, confidence, accuracy = diagrams[name]
        filled = share > 0
        axes[2].plot(confidence[filled], accuracy[filled], "o-", color=color, markersize=4, label=name)
    axes[2].plot([0, 1], [0, 1], ":", color="black", linewidth=1)
    for axis, title, x, y in (
        (axes[0], "Test accuracy", "epoch", "%"),
        (axes[1], "Test NLL", "epoch", "nats"),
        (axes[2], "Reliability (test, before scaling)", "confidence", "accuracy"),
    ):
        axis.set(title=title, xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
