"""What the examples learn from: images as bytes, their labels, a split, wrong labels, augmentation."""

from __future__ import annotations

import gzip
import logging
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

MINI = Path(__file__).parent / "data" / "fashion-mnist-mini"  # embedded: 4,000 images to train on, 4,000 to test
HUB = {  # name on the Hugging Face hub, columns of image and label
    "fashion-mnist": ("zalando-datasets/fashion_mnist", "image", "label"),
    "cifar10": ("uoft-cs/cifar10", "img", "label"),
    "cifar100": ("uoft-cs/cifar100", "img", "fine_label"),
}


def stop(message: str) -> NoReturn:
    """One line that says what to do, and exit status 2."""
    print(f"cifar_train.py: {message}", file=sys.stderr)
    sys.exit(2)


def read(dataset: str, folder: Path | None = None) -> tuple[Tensor, ...]:
    """Training images (N, channels, height, width) as bytes, their labels, test images, their labels."""
    if folder is not None and not folder.is_dir():
        stop(f"--data-dir {folder} is no folder.")
    if dataset == "fashion-mnist-mini":
        return read_idx(MINI)
    if folder is not None and list(folder.glob("*-ubyte*")):
        return read_idx(folder)
    return read_hub(dataset, folder)


def read_idx(folder: Path) -> tuple[Tensor, ...]:
    """The four files of MNIST's format, gzipped or not."""

    def content(stem: str, header: int) -> Tensor:
        for path in (folder / f"{stem}-ubyte.gz", folder / f"{stem}-ubyte"):
            if path.exists():
                raw = path.read_bytes()
                raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
                return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=header)
        stop(f"--data-dir {folder} has no {stem}-ubyte.gz; pass the folder of the four IDX files of Fashion-MNIST.")

    parts = []
    for part in ("train", "t10k"):
        parts += [content(f"{part}-images-idx3", 16).view(-1, 1, 28, 28), content(f"{part}-labels-idx1", 8).long()]
    return tuple(parts)


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
    try:
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
            parts += [pixels, torch.tensor(rows[label])]
        return tuple(parts)
    except Exception as error:  # whatever the hub, the network or the files make of it
        stop(f"{dataset} cannot be had ({type(error).__name__}: {str(error).splitlines()[0][:100]}). {instead}")


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
    num_classes = int(labels.max()) + 1
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
