"""AI-KD in both phases, in one file: train a network plainly, freeze it, and train a fresh one that learns from it.

    python examples/cifar_train.py                                  # the embedded images, minutes on a CPU
    python examples/cifar_train.py --dataset cifar100 --compile     # ResNet-18 on a GPU
    torchrun --nproc-per-node 4 examples/cifar_train.py --dataset cifar100
    python examples/cifar_train.py --terms progressive --label-weight falling       # PS-KD
    python examples/cifar_train.py --terms deterministic            # born-again network
    python examples/cifar_train.py --terms none                     # plain cross-entropy once more, as a control

Phase 1 is cross-entropy and gives the pre-trained model, phase 2 is the student. Every epoch prints the terms and, on the
test set, accuracy, negative log-likelihood (NLL, nats) and calibration error (ECE, 15 bins). At the end: a table of both
models, `curves.png`, and `log.jsonl` for machines, in `--out`. A checkpoint is written after each epoch; `--resume` goes on
from it, on a CPU bit for bit.

The validation images are held out from the training set and keep their labels. The temperature of the scaled values is
fitted to them; nothing is chosen by the test set.

Measured at the defaults (fashion-mnist-mini, MLP, 2,000 images, 40% wrong labels, weight decay 5e-4; 1 CPU thread, torch
2.13.0, 3 s of training a run; 5 seeds, `make example-seeds`): plain cross-entropy 67.24 +- 0.35%, student 3.82 +- 0.25 points
better in accuracy and 0.092 +- 0.006 nats in NLL after temperature scaling, in 5 seeds of 5. With the weight decay that suits
plain cross-entropy best (0.02) the student is 0.21 +- 0.12 points worse in accuracy, and 0.036 +- 0.002 nats better in NLL. No
other data set or device was measured.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import logging
import math
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import aikd_losses
from aikd_losses import AIKDLoss, CachedTargets, FrozenTeacher, LabelWeight, LinearRamp, LossStack

MINI = Path(__file__).parent / "data" / "fashion-mnist-mini"
TERMS = ("progressive", "deterministic", "adversarial")
TARGETS = "targets.bin"
# Where a run goes unless told otherwise. Only the first line was measured, see the top.
DEFAULTS: dict[str, dict[str, Any]] = {
    "fashion-mnist-mini": dict(
        model="mlp", train_size=2000, validation_size=1000, label_noise=0.4, label_weight="falling", epochs=40, lr=0.02
    ),
    "fashion-mnist": dict(model="cnn", validation_size=5000, epochs=20, lr=0.05, augment=True),
    "cifar10": dict(model="resnet18", validation_size=5000, epochs=100, lr=0.1, augment=True),
    "cifar100": dict(model="resnet18", validation_size=5000, epochs=200, lr=0.1, augment=True),
}
HUB = {  # name on the Hugging Face hub, columns of image and label
    "fashion-mnist": ("zalando-datasets/fashion_mnist", "image", "label"),
    "cifar10": ("uoft-cs/cifar10", "img", "label"),
    "cifar100": ("uoft-cs/cifar100", "img", "fine_label"),
}


def stop(message: str) -> NoReturn:
    """One line that says what to do, and exit status 2."""
    print(f"cifar_train.py: {message}", file=sys.stderr)
    sys.exit(2)


# ----------------------------------------------------------------------------------------------------------- settings


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--dataset", choices=list(DEFAULTS), default="fashion-mnist-mini", help="default: the embedded images"
    )
    p.add_argument(
        "--data-dir", type=Path, help="folder of parquet files (train*, test*) or of IDX files (Fashion-MNIST)"
    )
    p.add_argument("--model", choices=list(MODELS), help="default: mlp (mini), cnn (fashion-mnist), resnet18 (cifar)")
    p.add_argument("--terms", default=",".join(TERMS), help=f"any of {','.join(TERMS)}, or none (default: all)")
    p.add_argument("--train-size", type=int, help="training images (default: all that are left; 2000 for mini)")
    p.add_argument("--validation-size", type=int, help="held out from the training set (default 5000; 1000 for mini)")
    p.add_argument(
        "--label-noise", type=float, help="share of training labels that are wrong (default 0; 0.4 for mini)"
    )
    p.add_argument(
        "--epochs", type=int, help="of each phase (default 40 mini, 20 fashion-mnist, 100 cifar10, 200 cifar100)"
    )
    p.add_argument("--batch-size", type=int, default=128, help="over all processes (default 128)")
    p.add_argument(
        "--lr", type=float, help="of SGD with momentum 0.9 (default 0.02 mini, 0.05 fashion-mnist, 0.1 cifar)"
    )
    p.add_argument("--weight-decay", type=float, default=5e-4, help="default 5e-4")
    p.add_argument("--temperature", type=float, default=2.0, help="of the deterministic term (default 2)")
    p.add_argument("--alpha", type=float, default=0.8, help="last share of the progressive target (default 0.8)")
    p.add_argument(
        "--label-weight",
        choices=["kept", "falling"],
        help="of the labels as alpha grows; falling suits many wrong labels (default kept; falling for mini)",
    )
    p.add_argument("--augment", action=argparse.BooleanOptionalAction, help="crop and flip (default: not for mini)")
    p.add_argument(
        "--targets-file", action="store_true", help="keep the progressive targets in a file in --out, not in memory"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--compile", action="store_true", help="torch.compile the network and the losses")
    p.add_argument("--out", type=Path, default=Path("runs/cifar_train"))
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    p.add_argument("--overwrite", action="store_true", help="start anew where --out holds a checkpoint")
    args = p.parse_args(argv)
    fallback = dict(train_size=None, label_noise=0.0, label_weight="kept", augment=False) | DEFAULTS[args.dataset]
    for name, value in fallback.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.terms = [] if args.terms == "none" else args.terms.split(",")
    for term in args.terms:
        if term not in TERMS:
            stop(f"--terms must be some of {', '.join(TERMS)}, or none; got {term!r}.")
    for name in ("epochs", "batch_size", "lr", "temperature"):
        if not getattr(args, name) > 0:
            stop(f"--{name.replace('_', '-')} must be above 0; got {getattr(args, name)}.")
    for name in ("label_noise", "alpha"):
        if not 0 <= getattr(args, name) <= 1:
            stop(f"--{name.replace('_', '-')} must be between 0 and 1; got {getattr(args, name)}.")
    if args.alpha == 1 and args.label_weight == "kept" and "progressive" in args.terms:
        stop("--alpha must be below 1 for --label-weight kept; got 1.0.")
    if not args.weight_decay >= 0:
        stop(f"--weight-decay must not be negative; got {args.weight_decay}.")
    if args.data_dir is not None and not args.data_dir.is_dir():
        stop(f"--data-dir {args.data_dir} is no folder.")
    if args.resume and args.overwrite:
        stop("--resume and --overwrite exclude each other.")
    return args


# --------------------------------------------------------------------------------------------------------------- data


@dataclass
class Data:
    """Images as bytes (N, channels, height, width), all of them on the device, and their labels."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    num_classes: int
    mean: Tensor
    std: Tensor


def load(args: argparse.Namespace) -> Data:
    if args.dataset == "fashion-mnist-mini":
        images, labels, test_images, test_labels = load_idx(MINI)
    elif args.data_dir is not None and list(args.data_dir.glob("*-ubyte*")):
        images, labels, test_images, test_labels = load_idx(args.data_dir)
    else:
        images, labels, test_images, test_labels = load_hub(args)
    num_classes = int(labels.max()) + 1

    # Fixed by the seed alone: the same split and the same wrong labels for every method.
    g = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(images), generator=g)
    held, rest = order[: args.validation_size], order[args.validation_size :]
    train = rest[: args.train_size]
    if args.validation_size < 1 or len(train) < max(args.batch_size, args.train_size or 1):
        stop(
            f"--validation-size (at least 1) and --train-size (at least a batch of {args.batch_size}) must share the "
            f"{len(images)} training images; got {args.validation_size} and {args.train_size}."
        )
    noisy = labels[train].clone()
    wrong = torch.randperm(len(noisy), generator=g)[: round(args.label_noise * len(noisy))]
    noisy[wrong] = (noisy[wrong] + torch.randint(1, num_classes, (len(wrong),), generator=g)) % num_classes

    def put(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.to(args.device), y.to(args.device)

    pixels = images[train].float().div(255)
    mean, std = (f(pixels, dim=(0, 2, 3), keepdim=True).to(args.device) for f in (torch.mean, torch.std))
    return Data(
        put(images[train], noisy),
        put(images[held], labels[held]),
        put(test_images, test_labels),
        num_classes,
        mean,
        std,
    )


def load_idx(folder: Path) -> tuple[Tensor, ...]:
    """The four files of MNIST's format, gzipped or not."""

    def read(stem: str, header: int) -> Tensor:
        for path in (folder / f"{stem}-ubyte.gz", folder / f"{stem}-ubyte"):
            if path.exists():
                content = path.read_bytes()
                content = gzip.decompress(content) if path.suffix == ".gz" else content
                return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8)
        stop(f"--data-dir {folder} has no {stem}-ubyte.gz; pass the folder of the four IDX files of Fashion-MNIST.")

    parts = []
    for part in ("train", "t10k"):
        parts += [read(f"{part}-images-idx3", 16).view(-1, 1, 28, 28), read(f"{part}-labels-idx1", 8).long()]
    return tuple(parts)


def load_hub(args: argparse.Namespace) -> tuple[Tensor, ...]:
    """Through Hugging Face `datasets`: the hub, or the parquet files in --data-dir."""
    name, image, label = HUB[args.dataset]
    instead = (
        f"Pass --data-dir with the parquet files of {name} (train*.parquet, test*.parquet)"
        + (" or its four IDX files" if args.dataset == "fashion-mnist" else "")
        + ", or leave --dataset out for the embedded images."
    )
    try:
        import datasets
        import numpy as np
    except ImportError as error:
        stop(f"{args.dataset} needs the package {error.name} (pip install 'aikd-losses[examples]'). {instead}")
    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # its retries; the last word is ours
    try:
        if args.data_dir is None:
            sets = datasets.load_dataset(name, download_config=datasets.DownloadConfig(max_retries=0))
        else:
            files = {part: sorted(map(str, args.data_dir.rglob(f"{part}*.parquet"))) for part in ("train", "test")}
            if not all(files.values()):
                stop(f"--data-dir {args.data_dir} holds no train*.parquet and test*.parquet. {instead}")
            sets = datasets.load_dataset("parquet", data_files=files)
        parts = []
        for part in ("train", "test"):
            rows = sets[part].cast_column(image, datasets.Image())
            pixels = torch.from_numpy(np.stack([np.asarray(x) for x in rows[image]]))
            pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
            parts += [pixels, torch.tensor(rows[label])]
        return tuple(parts)
    except Exception as error:  # whatever the hub, the network or the files make of it
        stop(f"{args.dataset} cannot be had ({type(error).__name__}: {str(error).splitlines()[0][:100]}). {instead}")


def prepare(x: Tensor, data: Data, augment: bool) -> Tensor:
    """Bytes to normalised floats; augmented, each image shifted by up to 4 pixels and flipped half the time."""
    if augment:
        n, _, height, width = x.shape
        padded = F.pad(x, (4, 4, 4, 4))
        top, left = torch.randint(9, (2, n, 1), device=x.device)
        row, column = top + torch.arange(height, device=x.device), left + torch.arange(width, device=x.device)
        flipped = torch.rand(n, 1, device=x.device) < 0.5
        column = torch.where(flipped, column.flip(1), column)
        sample = torch.arange(n, device=x.device)[:, None, None]
        x = padded[sample, :, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)
    x = (x.float() / 255 - data.mean) / data.std
    return x.contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------------- models


class Block(nn.Module):
    """Two convolutions, each after batch norm and ReLU."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(fan_in), nn.BatchNorm2d(fan_out)
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(fan_in, fan_out, 1, stride, bias=False) if stride > 1 or fan_in != fan_out else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.conv2(F.relu(self.norm2(self.conv1(y))))


def resnet18(channels: int, size: int, num_classes: int) -> nn.Module:
    """Pre-activation ResNet-18 with CIFAR's stem: He et al., 2016, https://arxiv.org/abs/1603.05027."""
    layers: list[nn.Module] = [nn.Conv2d(channels, 64, 3, 1, 1, bias=False)]
    fan_in = 64
    for width in (64, 128, 256, 512):
        layers += [Block(fan_in, width, 1 if width == 64 else 2), Block(width, width, 1)]
        fan_in = width
    head = [nn.BatchNorm2d(512), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes)]
    return nn.Sequential(*layers, *head)


def cnn(channels: int, size: int, num_classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for fan_in, fan_out in ((channels, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(fan_in, fan_out, 3, 1, 1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * (size // 8) ** 2, num_classes))


def mlp(channels: int, size: int, num_classes: int) -> nn.Module:
    width = 256
    return nn.Sequential(
        nn.Flatten(), nn.Linear(channels * size**2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, num_classes),
    )  # fmt: skip


MODELS = {"resnet18": resnet18, "cnn": cnn, "mlp": mlp}


# ------------------------------------------------------------------------------------------------------------ metrics


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, data: Data, args: argparse.Namespace) -> Tensor:
    model.eval()
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.device.startswith("cuda")):
        return torch.cat([model(prepare(x, data, augment=False)).float() for x in images.split(1000)])


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


# ----------------------------------------------------------------------------------------------------------- training


def build_criterion(args: argparse.Namespace, num_samples: int, num_classes: int) -> LossStack:
    """The full method, or those of its terms that are asked for."""
    in_file = args.targets_file and "progressive" in args.terms
    targets = CachedTargets(num_samples, num_classes, path=args.out / TARGETS if in_file else None)
    alpha = LinearRamp(args.alpha, args.epochs)
    share = 0.5 if "deterministic" in args.terms else 1.0  # of the labels
    progressive = share if args.label_weight == "falling" else LabelWeight(share, alpha)
    full = AIKDLoss(
        num_samples,
        num_classes,
        args.epochs,
        temperature=args.temperature,
        alpha=alpha,
        weights={"progressive": progressive},
        targets=targets,
    )
    if set(args.terms) == set(TERMS):
        return full
    terms: dict[str, nn.Module] = {name: full.terms[name] for name in args.terms}
    weights = {name: full.weights[name] for name in args.terms}
    if "progressive" not in terms:  # which takes the place of cross-entropy
        terms["cross_entropy"], weights["cross_entropy"] = nn.CrossEntropyLoss(), share
    return LossStack(terms, weights=weights)


def learning_rate(progress: float, peak: float) -> float:
    """Up over the first twentieth of training, then down along a cosine."""
    return peak * min(progress / 0.05, 0.5 + 0.5 * math.cos(math.pi * progress))


@dataclass
class Run:
    """What a checkpoint holds: where training is, and everything it needs to go on."""

    args: argparse.Namespace
    data: Data
    rank: int
    world: int
    console: Console
    phase: int = 1
    epoch: int = 0  # epochs of this phase that are done
    teacher_state: dict[str, Tensor] | None = None
    history: list[dict[str, Any]] | None = None

    def settings(self) -> dict[str, Any]:
        free = ("out", "resume", "overwrite", "device", "compile", "data_dir", "targets_file")
        return {name: value for name, value in sorted(vars(self.args).items()) if name not in free}

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, criterion: LossStack) -> None:
        """After an epoch; the file is replaced in one step, so there is always a whole one."""
        if self.rank:
            return
        state = {
            "settings": json.dumps(self.settings()),
            "phase": self.phase,
            "epoch": self.epoch,
            "teacher": self.teacher_state,
            "history": json.dumps(self.history),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "criterion": criterion.state_dict(),
        }
        path = self.args.out / "checkpoint.pt"
        with open(path.with_suffix(".new"), "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it takes the other's place
        os.replace(path.with_suffix(".new"), path)
        self.log()

    def log(self, result: dict[str, Any] | None = None) -> None:
        head = {"settings": self.settings(), "machine": machine(self.args, self.world)}
        lines = [head, *(self.history or []), *([] if result is None else [{"result": result}])]
        new = self.args.out / "log.new"
        new.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(new, self.args.out / "log.jsonl")


def machine(args: argparse.Namespace, world: int) -> dict[str, Any]:
    cuda = args.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "processes": world,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "aikd_losses": aikd_losses.__version__,
    }


def new_model(run: Run) -> nn.Module:
    torch.manual_seed(1000 * run.args.seed + run.phase)
    _, channels, _, size = run.data.train[0].shape
    model = MODELS[run.args.model](channels, size, run.data.num_classes)
    return model.to(run.args.device, memory_format=torch.channels_last)


def train_phase(run: Run, progress: Progress, saved: dict[str, Any] | None) -> nn.Module:
    """All epochs of a phase that are not done yet; returns the trained network."""
    args, data = run.args, run.data
    images, labels = data.train
    num_samples, device = len(images), torch.device(args.device)
    model = new_model(run)
    teacher = None
    if run.phase == 1:
        criterion = LossStack({"cross_entropy": nn.CrossEntropyLoss()})
    else:
        if (
            saved is None and int(os.environ.get("LOCAL_RANK", 0)) == 0
        ):  # of a run that was stopped before its first checkpoint of this phase
            (args.out / TARGETS).unlink(missing_ok=True)
        if run.world > 1:
            dist.barrier()
        criterion = build_criterion(args, num_samples, data.num_classes)
        if {"deterministic", "adversarial"} & set(args.terms):
            teacher = FrozenTeacher(new_model(run))
            assert run.teacher_state is not None
            teacher.model.load_state_dict(run.teacher_state)
    criterion.to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay
    )
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        criterion.load_state_dict(saved["criterion"])

    network = DistributedDataParallel(model) if run.world > 1 else model
    evaluate_loss: Any = criterion
    if args.compile:
        network, evaluate_loss = torch.compile(network), torch.compile(criterion)
        teacher = None if teacher is None else torch.compile(teacher)
    steps = num_samples // args.batch_size
    name = "pre-trained" if run.phase == 1 else "student"
    task = progress.add_task(name, total=args.epochs * steps, completed=run.epoch * steps)

    for epoch in range(run.epoch, args.epochs):
        start = time.perf_counter()
        # Each epoch has randomness of its own, so that a resumed run needs no generator's state.
        order_seed = ((args.seed * 10 + run.phase) * 100_000 + epoch) * 1000
        order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(order_seed)).to(device)
        torch.manual_seed(order_seed + 1 + run.rank)
        network.train()
        sums: dict[str, Tensor] = {}
        for step in range(steps):
            index = order[step * args.batch_size : (step + 1) * args.batch_size][run.rank :: run.world]
            x, y = prepare(images[index], data, args.augment), labels[index]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate((epoch * steps + step + 1) / (args.epochs * steps), args.lr)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                teacher_logits = None if teacher is None else teacher(x)
                student_logits = network(x)
            tensors = dict(student_logits=student_logits, teacher_logits=teacher_logits, index=index)
            loss, values = evaluate_loss(**tensors, target=y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            criterion.update(**tensors)
            for term, value in values.items():  # summed where they are: reading them would wait for the device
                sums[term] = sums.get(term, 0) + value
            progress.advance(task)
        criterion.advance_epoch()
        run.epoch = epoch + 1
        terms = {term: float(value) / steps for term, value in sums.items()}
        if not all(map(math.isfinite, terms.values())):
            stop(f"training diverged in epoch {epoch + 1} of the {name}. Pass a smaller --lr (now {args.lr}).")
        if run.rank == 0:
            seconds = time.perf_counter() - start
            held = measure(predict(model, data.validation[0], data, args), data.validation[1])
            record = {
                "phase": name,
                "epoch": epoch,
                **measure(predict(model, data.test[0], data, args), data.test[1]),
                "validation_accuracy": held["accuracy"],
                "terms": terms,
                "diagnostics": {name: float(value) for name, value in criterion.diagnostics().items()},
                "seconds": seconds,
            }
            run.history = [*(run.history or []), record]
            right = record["diagnostics"].get("adversarial/accuracy")
            values = "  ".join(f"{term} {value:.3f}" for term, value in terms.items())
            run.console.print(
                f"{name:>11} {epoch + 1:3d}/{args.epochs}  accuracy {record['accuracy']:5.2f}%  NLL {record['nll']:.3f}  "
                f"ECE {record['ece']:5.2f}%  {values}  "
                + ("" if right is None else f"discriminator right {right:.0%}  ")
                + f"({seconds:.1f} s)",
                highlight=False,
                soft_wrap=True,
            )
        run.save(model, optimizer, criterion)
    return model


# ------------------------------------------------------------------------------------------------------------- report


def report(run: Run, models: dict[str, nn.Module]) -> None:
    args, data = run.args, run.data
    results: dict[str, dict[str, float]] = {}
    diagrams = {}
    for name, model in models.items():
        held = predict(model, data.validation[0], data, args)
        logits, target = predict(model, data.test[0], data, args), data.test[1]
        temperature = fit_temperature(held, data.validation[1])
        raw, scaled = measure(logits, target), measure(logits / temperature, target)
        seconds = sum(record["seconds"] for record in run.history or [] if record["phase"] == name)
        results[name] = {
            **raw,
            "nll_scaled": scaled["nll"],
            "ece_scaled": scaled["ece"],
            "temperature": temperature,
            "seconds": seconds,
        }
        diagrams[name] = bins(logits, target).cpu()
    run.log(results)
    plot(run, diagrams)

    plain, student = results["pre-trained"], results["student"]
    noise = f", {args.label_noise:.0%} wrong labels" if args.label_noise else ""
    table = Table(title=f"{args.dataset}, {args.model}, {len(data.train[0])} images{noise}, seed {args.seed}")
    table.add_column(f"{len(data.test[0])} test images")
    table.add_column("plain cross-entropy\n(the pre-trained model)", justify="right")
    table.add_column("student\n" + ("\n+ ".join(args.terms) or "cross-entropy"), justify="right")
    table.add_column("difference", justify="right")
    for label, key, form in (
        ("accuracy, %", "accuracy", ".2f"),
        ("NLL, nats", "nll", ".3f"),
        ("NLL, scaled", "nll_scaled", ".3f"),
        ("ECE, %", "ece", ".2f"),
        ("ECE, scaled", "ece_scaled", ".2f"),
        ("scaling temperature", "temperature", ".2f"),
        ("training, s", "seconds", ".1f"),
    ):
        table.add_row(label, f"{plain[key]:{form}}", f"{student[key]:{form}}", f"{student[key] - plain[key]:+{form}}")
    run.console.print(table)
    run.console.print("[dim]scaled: after dividing the logits by the temperature that suits the validation images[/]")
    run.console.print(f"[dim]{args.out / 'curves.png'}, {args.out / 'log.jsonl'}[/]")


def plot(run: Run, diagrams: dict[str, Tensor]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name, color in (("pre-trained", "tab:gray"), ("student", "tab:blue")):
        records = [record for record in run.history or [] if record["phase"] == name]
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
    figure.savefig(run.args.out / "curves.png", dpi=120)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------------------- main


def resume(run: Run) -> dict[str, Any] | None:
    """The checkpoint in --out, if there is one and it is wanted; `run` is set to where it stands."""
    args, path = run.args, run.args.out / "checkpoint.pt"
    if not path.exists():
        return stop(f"--resume needs {path}, which is not there.") if args.resume else None
    if args.overwrite:
        return None
    if not args.resume:
        stop(f"{path} is there already. Pass --resume to go on from it, --overwrite to start anew, or another --out.")
    saved: dict[str, Any] = torch.load(path, map_location=args.device, weights_only=True)
    there, here = json.loads(saved["settings"]), json.loads(json.dumps(run.settings()))
    for name in sorted(there | here):
        if there.get(name) != here.get(name):
            flag = name.replace("_", "-")
            stop(f"--resume needs the settings of {path}: --{flag} was {there.get(name)}, now it is {here.get(name)}.")
    run.phase, run.epoch, run.teacher_state = saved["phase"], saved["epoch"], saved["teacher"]
    run.history = json.loads(saved["history"])
    return saved


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if args.batch_size % world:
        stop(f"--batch-size {args.batch_size} must be a multiple of the {world} processes.")
    if args.device == "cuda" and world > 1:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    if args.device.startswith("cuda"):
        if not torch.cuda.is_available():
            stop("--device cuda: no GPU is to be had. Pass --device cpu.")
        torch.cuda.set_device(args.device if ":" in args.device else 0)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args, load(args), rank, world, Console(quiet=rank > 0))
    saved = resume(run)
    if world > 1:
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")

    columns = TextColumn("{task.description:>11}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    hidden = rank > 0 or not run.console.is_terminal
    try:
        with Progress(*columns, console=run.console, disable=hidden, transient=True) as progress:
            if run.phase == 1:
                run.teacher_state = dict(train_phase(run, progress, saved).state_dict())
                run.phase, run.epoch, saved = 2, 0, None
            student = train_phase(run, progress, saved)
    except KeyboardInterrupt:
        path = args.out / "checkpoint.pt"
        saved = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else dict(phase=1, epoch=0)
        name = "pre-trained model" if saved["phase"] == 1 else "student"
        run.console.print(f"Interrupted; saved: epoch {saved['epoch']} of the {name}. Go on with --resume.")
        sys.exit(130)
    if rank == 0:
        pretrained = new_model(run)
        pretrained.load_state_dict(run.teacher_state or {})
        report(run, {"pre-trained": pretrained, "student": student})
    if world > 1:
        dist.barrier()  # the others wait for the report
        gc.collect()  # DDP holds the process group in a cycle; left to the interpreter's exit, gloo may abort
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
