"""Does it work? Methods x data x seeds in one harness, every method tuned by the same small grid, paired over seeds.

    make study                                        # MNIST-1D with the settings in results/accuracy/tuned.json
    python benchmarks/accuracy.py --data mnist1d-1000-20 --net cnn --tune       # tune anew, then run
    python benchmarks/accuracy.py --table             # what is there, as tables and pictures

A task is a data set with a size and a share of wrong labels (percent), and a network: `mnist1d-1000-20`, `cnn`. Each run is one
line of `results/accuracy/<task>.jsonl`; what is there is not run again, so a study that was stopped goes on where it was.

The rules. Training sets and their wrong labels are drawn anew for every seed; tuning has seeds of its own. Every method gets
the same number of steps (cross-entropy also twice that), the same grid of learning rates and weight decays, then a few values
of the one setting that is its own; what is best in accuracy on 2,000 validation samples, whose labels are as wrong as the
training set's, is run on the seeds of the study. The pre-trained model of a seed is a cross-entropy run on its training set.
The test set (10,000 samples, true labels) chooses nothing. Scaled values are those after dividing the logits by the
temperature that suits the validation samples with their true labels.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from cifar_train import HUB, MINI, learning_rate, load_hub, load_idx, resnet18
from machine import RESULTS, machine
from methods import METHODS, OURS, Method
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

FOLDER = RESULTS / "accuracy"
PAGE = Path(__file__).parent.parent / "docs" / "accuracy.md"
PICTURES = Path(__file__).parent.parent / "docs" / "images"
CACHE = Path("runs") / "study"
LEARNING_RATES = (0.03, 0.1)
WEIGHT_DECAYS = (5e-3, 2e-2, 6e-2)
TUNING_SEEDS = (1000, 1001)
BATCH = 100


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Task:
    data: str
    net: str

    @property
    def name(self) -> str:
        return f"{self.data}-{self.net}"

    @property
    def parts(self) -> tuple[str, int, float]:
        """Source, training samples, share of wrong labels."""
        source, size, noise = self.data.rsplit("-", 2)
        return source, int(size), int(noise) / 100


@dataclass
class Data:
    x: Tensor
    y: Tensor  # as wrong as they are
    validation_x: Tensor
    validation_y: Tensor
    validation_true: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int


@functools.lru_cache(maxsize=2)
def pool(source: str, folder: Path | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What training and validation sets are drawn from, and the test set; kept in a file, which the workers read."""
    path = CACHE / f"{source}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_suffix(f".{os.getpid()}")
        torch.save(generate_mnist1d() if source == "mnist1d" else images(source, folder), own)
        os.replace(own, path)
    return tuple(torch.load(path, weights_only=True))  # type: ignore[return-value]


def images(source: str, folder: Path | None) -> tuple[Tensor, ...]:
    """By the loaders of the example, with the mean and deviation of the training images at 0 and 1."""
    if source == "fashion-mnist-mini":
        x, y, test_x, test_y = load_idx(MINI)
    elif source not in HUB:
        known = ", ".join(("mnist1d", "fashion-mnist-mini", *HUB))
        raise SystemExit(f"accuracy.py: no data set is called {source!r}; there are {known}.")
    elif folder is not None and list(folder.glob("*-ubyte*")):
        x, y, test_x, test_y = load_idx(folder)
    else:
        x, y, test_x, test_y = load_hub(argparse.Namespace(dataset=source, data_dir=folder))
    pixels = x.float()
    std, mean = torch.std_mean(pixels, dim=(0, 2, 3), keepdim=True)
    return (pixels - mean) / std, y, (test_x.float() - mean) / std, test_y


def generate_mnist1d() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Greydanus and Kobak, *Scaling Down Deep Learning with MNIST-1D*, 2024, by its own package."""
    from mnist1d.data import get_dataset_args, make_dataset

    args = get_dataset_args()
    args.num_samples, args.train_split, args.seed = 40_000, 0.75, 0
    made = make_dataset(args)
    x, y, test_x, test_y = (torch.as_tensor(made[key]) for key in ("x", "y", "x_test", "y_test"))
    return x.float(), y.long(), test_x.float(), test_y.long()


def draw(task: Task, seed: int) -> Data:
    source, size, noise = task.parts
    x, y, test_x, test_y = pool(source)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=g)
    held = 2_000 if len(x) > size + 2_000 else len(x) - size
    train, validation = order[:size], order[size : size + held]
    classes = int(y.max()) + 1

    def spoilt(labels: Tensor) -> Tensor:
        wrong = torch.randperm(len(labels), generator=g)[: round(noise * len(labels))]
        labels = labels.clone()
        labels[wrong] = (labels[wrong] + torch.randint(1, classes, (len(wrong),), generator=g)) % classes
        return labels

    return Data(
        x[train], spoilt(y[train]), x[validation], spoilt(y[validation]), y[validation], test_x, test_y, classes
    )


# ------------------------------------------------------------------------------------------------------------ networks


def network(task: Task, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    x, y, *_ = pool(task.parts[0])
    shape, classes = x.shape[1:], int(y.max()) + 1
    if task.net == "resnet18":
        return resnet18(shape[0], shape[-1], classes)
    if task.net == "mlp":
        widths = (shape.numel(), 100, 100)
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], classes))
    if len(shape) == 1:
        layers = [nn.Unflatten(1, (1, -1))]
        for fan_in in (1, 25, 25):
            layers += [nn.Conv1d(fan_in, 25, 5, 2, 2, bias=False), nn.BatchNorm1d(25), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(25, classes))
    layers = []
    for fan_in, fan_out in ((shape[0], 16), (16, 32)):
        layers += [nn.Conv2d(fan_in, fan_out, 3, 2, 1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * math.prod((n + 3) // 4 for n in shape[1:]), classes))


# ------------------------------------------------------------------------------------------------------------- metrics


def metrics(logits: Tensor, target: Tensor, scale: float) -> dict[str, float]:
    raw, scaled = logits.softmax(-1), (logits / scale).softmax(-1)
    confidence, guess = raw.max(-1)
    right = (guess == target).double()
    risk = (1 - right[confidence.argsort(descending=True)]).cumsum(0) / torch.arange(1, len(target) + 1)
    return {
        "accuracy": 100 * float(right.mean()),
        "nll": float(F.cross_entropy(logits, target)),
        "nll_scaled": float(F.cross_entropy(logits / scale, target)),
        "ece": calibration_error(confidence, right),
        "ece_scaled": calibration_error(scaled.max(-1).values, right),
        "brier": float((raw - F.one_hot(target, logits.shape[-1])).square().sum(-1).mean()),
        "aurc": float(risk.mean()),
        "temperature": scale,
    }


def calibration_error(confidence: Tensor, right: Tensor, bins: int = 15) -> float:
    """In percent: Guo et al., 2017, https://arxiv.org/abs/1706.04599."""
    which = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, confidence.double() - right)
    return 100 * float(gap.abs().sum() / len(right))


def best_temperature(logits: Tensor, target: Tensor) -> float:
    grid = torch.logspace(-1, 1.5, 126).tolist()
    return min(grid, key=lambda t: float(F.cross_entropy(logits / t, target)))


# ------------------------------------------------------------------------------------------------------------ training


def steps_of(task: Task) -> int:
    return 600 if task.parts[1] <= 2_000 else 1_200


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    out = torch.cat([model(part) for part in x.split(2_000)])
    model.train()
    return out


def train(task: Task, data: Data, method: Method, seed: int, lr: float, weight_decay: float) -> nn.Module:
    model = network(task, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    per_epoch = len(data.y) // BATCH
    epochs = method.length * steps_of(task) // per_epoch
    method.begin(model, data, epochs)
    g = torch.Generator().manual_seed(seed + 1)
    torch.manual_seed(seed + 2)
    for epoch in range(epochs):
        order = torch.randperm(len(data.y), generator=g)
        for step in range(per_epoch):
            progress = (epoch * per_epoch + step + 1) / (epochs * per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, lr)
            loss = method.loss(order[step * BATCH : (step + 1) * BATCH], progress)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            method.after_step()
        method.after_epoch()
    return model


@functools.lru_cache(maxsize=64)
def pretrained(task: Task, seed: int, lr: float, weight_decay: float) -> dict[str, Tensor]:
    """The weights of the seed's cross-entropy run. A student of that seed starts elsewhere (see `run`)."""
    path = CACHE / f"{task.name}-{seed}-{lr}-{weight_decay}.pt"
    if not path.exists():
        model = train(task, draw(task, seed), METHODS["ce"](), seed, lr, weight_decay)
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_suffix(f".{os.getpid()}")
        torch.save(model.state_dict(), own)
        os.replace(own, path)
    return dict(torch.load(path, weights_only=True))


@dataclass(frozen=True)
class Run:
    task: Task
    method: str
    seed: int
    lr: float
    weight_decay: float
    own: float | None  # the setting that is the method's own; None: as it comes
    teacher: tuple[float, float] | None  # learning rate and weight decay of the pre-trained model

    def key(self) -> str:
        return json.dumps([self.method, self.seed, self.lr, self.weight_decay, self.own, self.teacher])


def run(r: Run) -> dict[str, Any]:
    torch.set_num_threads(1)
    data = draw(r.task, r.seed)
    method = METHODS[r.method](**({} if r.own is None else {"own": r.own}))
    if method.needs_teacher:
        assert r.teacher is not None
        teacher = network(r.task, 0)
        teacher.load_state_dict(pretrained(r.task, r.seed, *r.teacher))
        method.teacher = teacher.eval().requires_grad_(False)
    # Every method starts from the same weights, which are not the pre-trained model's own start.
    start = r.seed if r.method == "ce" and r.teacher is None else r.seed + 500_000
    model = train(r.task, data, method, start, r.lr, r.weight_decay)
    held = logits_of(model, data.validation_x)
    scale = best_temperature(held, data.validation_true)
    return {
        "method": r.method, "seed": r.seed, "lr": r.lr, "weight_decay": r.weight_decay, "own": r.own,
        "teacher": r.teacher, "key": r.key(),
        "validation": 100 * float((held.argmax(-1) == data.validation_y).float().mean()),
        **metrics(logits_of(model, data.test_x), data.test_y, scale), **method.report(),
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- studies


class Results:
    """The lines of a task's file; what is there is not run again."""

    def __init__(self, task: Task) -> None:
        self.path = FOLDER / f"{task.name}.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.lines = [json.loads(line) for line in lines]
        self.done = {line["key"]: line for line in self.lines if "key" in line}

    def add(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            if not self.lines:
                file.write(json.dumps({"machine": machine()}) + "\n")
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        self.done[line["key"]] = line


def run_all(runs: list[Run], results: Results, jobs: int, console: Console, what: str) -> list[dict[str, Any]]:
    missing = [r for r in runs if r.key() not in results.done]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with (
        Progress(*columns, console=console, transient=True) as progress,
        multiprocessing.get_context("fork").Pool(jobs) as workers,
    ):
        for line in progress.track(workers.imap_unordered(run, missing), total=len(missing), description=what):
            results.add(line)
    return [results.done[r.key()] for r in runs]


def best(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The setting with the best validation accuracy, mean over the tuning seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(json.dumps([line["lr"], line["weight_decay"], line["own"]]), []).append(line)
    top = max(groups.values(), key=lambda group: statistics.fmean(line["validation"] for line in group))[0]
    return {name: top[name] for name in ("lr", "weight_decay", "own")}


def tune(task: Task, names: list[str], results: Results, jobs: int, console: Console) -> dict[str, dict[str, Any]]:
    """Cross-entropy first: it gives the teacher. Then the grid, then the method's own setting at the grid's best."""
    tuned: dict[str, dict[str, Any]] = {}
    grid = list(itertools.product(LEARNING_RATES, WEIGHT_DECAYS))

    def of(name: str, settings: Iterator[tuple[float, float, float | None]] | list[Any], teacher: Any) -> list[Run]:
        return [Run(task, name, seed, *s, teacher) for s in settings for seed in TUNING_SEEDS]

    plain = run_all(of("ce", [(*g, None) for g in grid], None), results, jobs, console, f"{task.name} ce")
    tuned["ce"] = best(plain)
    teacher = tuned["ce"]["lr"], tuned["ce"]["weight_decay"]
    others = [name for name in names if name != "ce"]
    first = [r for name in others for r in of(name, [(*g, None) for g in grid], teacher)]
    lines = run_all(first, results, jobs, console, f"{task.name} grid")
    second = []
    for name in others:
        tuned[name] = best([line for line in lines if line["method"] == name])
        at = tuned[name]["lr"], tuned[name]["weight_decay"]
        second += of(name, [(*at, own) for own in METHODS[name].grid], teacher)
    lines += run_all(second, results, jobs, console, f"{task.name} own")
    for name in others:
        tuned[name] = best([line for line in lines if line["method"] == name])
    return tuned


def study(
    task: Task, names: list[str], seeds: int, tuned: dict[str, Any], results: Results, jobs: int, console: Console
) -> None:
    teacher = tuned["ce"]["lr"], tuned["ce"]["weight_decay"]
    runs = [
        Run(task, name, seed, tuned[name]["lr"], tuned[name]["weight_decay"], tuned[name]["own"], teacher)
        for seed in range(seeds) for name in names
    ]  # fmt: skip
    run_all(runs, results, jobs, console, task.name)


def of_study(results: Results, tuned: dict[str, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    """Of each method the runs at its tuned setting on the seeds of the study."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for line in results.done.values():
        setting = tuned.get(line["method"])
        of_seeds = line["seed"] < min(TUNING_SEEDS) and line["teacher"] is not None
        if setting and of_seeds and all(line[name] == setting[name] for name in ("lr", "weight_decay", "own")):
            found.setdefault(line["method"], {})[line["seed"]] = line
    return found


def mean_error(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def table(task: Task, results: Results, tuned: dict[str, Any]) -> Table:
    found = of_study(results, tuned)
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


def markdown(task: Task, results: Results, tuned: dict[str, Any]) -> str:
    found = of_study(results, tuned)
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


def plot(task: Task, results: Results, tuned: dict[str, Any]) -> Path | None:
    """What each method gains over cross-entropy, and how often the discriminator was right."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {
        "svg.hashsalt": task.name,
        "svg.fonttype": "none",
    }  # the same picture is the same, small file
    import matplotlib.pyplot as plt

    found = of_study(results, tuned)
    plain = found.pop("ce", {})
    gains = {
        key: {
            name: mean_error([lines[s][key] - plain[s][key] for s in lines if s in plain])
            for name, lines in found.items()
        }
        for key in ("accuracy", "nll_scaled")
    }
    if not plain or not found:
        return None
    names = sorted(found, key=lambda name: gains["accuracy"][name][0])
    figure, axes = plt.subplots(
        1, 3, figsize=(13, 0.3 * len(names) + 1.5), layout="constrained", width_ratios=(3, 3, 2)
    )
    for axis, key, label in zip(axes, gains, ("accuracy, points", "NLL after temperature scaling, nats"), strict=False):
        for i, name in enumerate(names):
            mean, error = gains[key][name]
            ours = name in OURS
            axis.errorbar(
                mean, i, xerr=error, fmt="o", color="tab:blue" if ours else "tab:gray", markersize=5, capsize=2
            )
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(xlabel=f"{label}, minus cross-entropy's", yticks=range(len(names)))
        axis.grid(alpha=0.3)
    axes[0].set_yticklabels(names)
    axes[1].set_yticklabels([])
    for name in ("full", "pro+adv", "det+adv", "adversarial"):
        curves = [line["discriminator_accuracy"] for line in found.get(name, {}).values()]
        if curves:
            axes[2].plot(torch.tensor(curves).mean(0), label=name)
    axes[2].set(xlabel="epoch", ylabel="discriminator right", ylim=(0.3, 1.0))
    if axes[2].lines:
        axes[2].legend(fontsize=8)
    axes[2].grid(alpha=0.3)
    figure.suptitle(f"{task.name}: mean and standard error of {len(plain)} paired seeds (blue: of this library)")
    path = PICTURES / f"accuracy-{task.name}.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="mnist1d-1000-20", help="comma-separated: source-size-percent")
    p.add_argument("--net", default="cnn", help="comma-separated: cnn, mlp")
    p.add_argument("--methods", default=",".join(METHODS), help="comma-separated (default: all)")
    p.add_argument("--data-dir", type=Path, help="folder of the IDX or parquet files of an image data set")
    p.add_argument("--seeds", type=int, default=10)
    p.add_argument("--jobs", type=int, default=os.cpu_count())
    p.add_argument("--tune", action="store_true", help="tune anew what has no setting yet")
    p.add_argument("--table", action="store_true", help="show what is there and run nothing")
    args = p.parse_args()
    names = args.methods.split(",")
    for name in names:
        if name not in METHODS:
            p.error(f"--methods must be some of {', '.join(METHODS)}; got {name!r}.")
    console = Console(width=170)
    settings = FOLDER / "tuned.json"
    every: dict[str, Any] = json.loads(settings.read_text()) if settings.exists() else {}
    for data, net in itertools.product(args.data.split(","), args.net.split(",")):
        task = Task(data, net)
        results = Results(task)
        pool(task.parts[0], args.data_dir)
        untuned = [name for name in names if name not in every.get(task.name, {})]
        if untuned and not args.table:
            if not args.tune:
                p.error(f"{task.name} has no settings for {', '.join(untuned)} in {settings}: add --tune.")
            every[task.name] = every.get(task.name, {}) | tune(task, untuned, results, args.jobs, console)
            settings.parent.mkdir(parents=True, exist_ok=True)
            settings.write_text(json.dumps(every, indent=1) + "\n")
        if not args.table:
            study(task, names, args.seeds, every[task.name], results, args.jobs, console)
        console.print(table(task, results, every.get(task.name, {})))
        console.print(plot(task, results, every.get(task.name, {})) or "nothing to plot", highlight=False)
        PAGE.write_text(page(PAGE.read_text(), task, markdown(task, results, every.get(task.name, {}))))


if __name__ == "__main__":
    main()
