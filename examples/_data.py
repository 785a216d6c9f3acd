"""What the examples learn from: images as bytes, their labels, a split, wrong labels, augmentation."""

from __future__ import annotations

import gzip
import logging
import math
import struct
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

MINI = Path(__file__).parent / "data" / "fashion-mnist-mini"  # embedded: 4,000 images to train on, 4,000 to test
CLASSES = {"fashion-mnist-mini": 10, "fashion-mnist": 10, "cifar10": 10, "cifar100": 100}
HUB = {  # name on the Hugging Face hub, columns of image and label
    "fashion-mnist": ("zalando-datasets/fashion_mnist", "image", "label"),
    "cifar10": ("uoft-cs/cifar10", "img", "label"),
    "cifar100": ("uoft-cs/cifar100", "img", "fine_label"),
}


MOST = 100_000  # images in an IDX file; a header that says more is not believed


def stop(message: str) -> NoReturn:
    """One line that says what to do, and exit status 2."""
    print(f"cifar_train.py: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def or_stop(what: str, then: str) -> Iterator[None]:
    """Whatever goes wrong inside ends in one line: what cannot be, why, and what to do."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.load says some of it twice
            yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines()]
        first = next((line for line in lines if line and line[-1] != ":"), "")  # torch begins with a heading
        why = first.split(". ")[0].rstrip(".")[:150]
        stop(f"{what} ({type(error).__name__}{': ' * bool(why)}{why}). {then}")


def read(dataset: str, folder: Path | None = None) -> tuple[Tensor, ...]:
    """Training images (N, channels, height, width) as bytes, their labels, test images, their labels."""
    if folder is not None and not folder.is_dir():
        stop(f"--data-dir {folder} is no folder.")
    if dataset == "fashion-mnist-mini":
        return read_idx(MINI)
    if dataset == "fashion-mnist" and folder is not None and list(folder.glob("*-ubyte*")):
        return read_idx(folder)
    return read_hub(dataset, folder)


def read_idx(folder: Path) -> tuple[Tensor, ...]:
    """The four files of MNIST's format, gzipped or not."""
    parts = []
    for part in ("train", "t10k"):
        images = read_idx_file(folder, f"{part}-images-idx3", 0x803, (28, 28))
        labels = read_idx_file(folder, f"{part}-labels-idx1", 0x801, ())
        check(str(folder), part, images, labels, CLASSES["fashion-mnist"])
        parts += [images.unsqueeze(1), labels.long()]
    return tuple(parts)


def read_idx_file(folder: Path, stem: str, magic: int, sides: tuple[int, ...]) -> Tensor:
    """One of them, as bytes; of a file that is not what its header says no more is read than that."""
    path = next((x for x in (folder / f"{stem}-ubyte.gz", folder / f"{stem}-ubyte") if x.exists()), None)
    if path is None:
        stop(f"--data-dir {folder} has no {stem}-ubyte.gz; pass the folder of the four IDX files of Fashion-MNIST.")
    with or_stop(f"{path} cannot be read", "Get this file of Fashion-MNIST anew."):
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(8 + 4 * len(sides))
            if len(header) < 8 + 4 * len(sides):
                raise ValueError(f"it ends after {len(header)} bytes, within its header")
            found, count, *size = struct.unpack(f">{len(header) // 4}I", header)
            if found != magic:
                raise ValueError(f"it begins with {found:#x}, not with {magic:#x}, so it is no such file")
            if tuple(size) != sides or not 1 <= count <= MOST:
                raise ValueError(f"its header says {' x '.join(map(str, (count, *size)))}")
            wanted = count * math.prod(sides)
            content = file.read(wanted + 1)  # one more, to find the end, where gzip's checksum is
        if len(content) != wanted:
            kept = f"only {len(content)}" if len(content) < wanted else "more"
            raise ValueError(f"its header says {wanted} bytes, and there are {kept}")
        return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(count, *sides)


def read_hub(dataset: str, folder: Path | None) -> tuple[Tensor, ...]:
    """Through Hugging Face `datasets`: the hub, or the parquet files of a folder."""
    name, image, label = HUB[dataset]
    instead = (
        f"Pass --data-dir with the parquet files of {name} (train*.parquet, test*.parquet)"
        + (" or its four IDX files" if dataset == "fashion-mnist" else "")
        + ", or leave --dataset out for the embedded images."
    )
    try:
        import datasets
        import numpy as np
    except ImportError as error:
        stop(f"{dataset} needs the package {error.name} (pip install 'aikd-losses[examples]'). {instead}")
    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # its retries; the last word is ours
    with or_stop(f"{dataset} cannot be had", instead):  # whatever the hub, the network or the files make of it
        if folder is None:
            sets = datasets.load_dataset(name, download_config=datasets.DownloadConfig(max_retries=0))
        else:
            files = {part: sorted(map(str, folder.rglob(f"{part}*.parquet"))) for part in ("train", "test")}
            if not all(files.values()):
                stop(f"--data-dir {folder} holds no train*.parquet and test*.parquet. {instead}")
            sets = datasets.load_dataset("parquet", data_files=files)
        parts = []
        for part in ("train", "test"):
            rows = sets[part].cast_column(image, datasets.Image())
            pixels = torch.from_numpy(np.stack([np.asarray(x) for x in rows[image]]))
            pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
            labels = torch.tensor(rows[label])
            check(dataset, part, pixels, labels, CLASSES[dataset])
            parts += [pixels, labels]
        return tuple(parts)


def check(whose: str, part: str, images: Tensor, labels: Tensor, num_classes: int) -> None:
    """A label for each image, and each of them a class."""
    if len(images) != len(labels):
        stop(f"{whose} has {len(images)} images in {part} and {len(labels)} labels. Get both anew.")
    if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        low, high = int(labels.min()), int(labels.max())
        stop(f"{whose} has labels from {low} to {high} in {part}, not from 0 to {num_classes - 1}. Get them anew.")


def spoil(labels: Tensor, share: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """The labels, that share of them wrong."""
    labels = labels.clone()
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    labels[wrong] = (labels[wrong] + torch.randint(1, num_classes, (len(wrong),), generator=generator)) % num_classes
    return labels


@dataclass
class Data:
    """Images as bytes and labels, all of them on the device; the mean and deviation of the training images' channels."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    num_classes: int
    mean: Tensor
    std: Tensor

    def prepare(self, x: Tensor, augment: bool = False) -> Tensor:
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
        x = (x.float() / 255 - self.mean) / self.std
        return x.contiguous(memory_format=torch.channels_last)


def load(args: Namespace) -> Data:
    """What the seed draws: the same split and the same wrong labels for every method."""
    images, labels, test_images, test_labels = read(args.dataset, args.data_dir)
    num_classes = CLASSES[args.dataset]
    g = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(images), generator=g)
    held, train = order[: args.validation_size], order[args.validation_size :][: args.train_size]
    if args.validation_size < 1 or len(train) < max(args.batch_size, args.train_size or 1):
        stop(
            f"--validation-size (at least 1) and --train-size (at least a batch of {args.batch_size}) must share the "
            f"{len(images)} training images; got {args.validation_size} and {args.train_size}."
        )
    noisy = spoil(labels[train], args.label_noise, num_classes, g)
    pixels = images[train].float().div(255)
    mean, std = (f(pixels, dim=(0, 2, 3), keepdim=True).to(args.device) for f in (torch.mean, torch.std))
    parts = (images[train], noisy), (images[held], labels[held]), (test_images, test_labels)
    return Data(*((x.to(args.device), y.to(args.device)) for x, y in parts), num_classes, mean, std)
