"""Make `fashion-mnist-mini`: the first images of each class of Fashion-MNIST, in the format of the original.

    python examples/data/make_fashion_mnist_mini.py SOURCE

SOURCE holds the four original IDX files (`*-ubyte.gz`), as Debian's package `dataset-fashion-mnist` installs them or as
https://github.com/zalandoresearch/fashion-mnist serves them. The images keep their order. Needs only Python.
"""

import gzip
import struct
import sys
from pathlib import Path

PARTS = {"train": 400, "t10k": 400}  # images a class
HERE = Path(__file__).parent / "fashion-mnist-mini"


def write(path: Path, content: bytes) -> None:
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed:  # the same bytes each time
        packed.write(content)


def main(source: Path) -> None:
    for part, per_class in PARTS.items():
        images = gzip.decompress((source / f"{part}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((source / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
        rows, columns = struct.unpack(">2I", images[8:16])
        seen = [0] * 10
        chosen = []
        for i, label in enumerate(labels):
            if seen[label] < per_class:
                seen[label] += 1
                chosen.append(i)
        size = rows * columns
        pixels = b"".join(images[16 + i * size : 16 + (i + 1) * size] for i in chosen)
        write(HERE / f"{part}-images-idx3-ubyte.gz", struct.pack(">4I", 0x803, len(chosen), rows, columns) + pixels)
        write(
            HERE / f"{part}-labels-idx1-ubyte.gz",
            struct.pack(">2I", 0x801, len(chosen)) + bytes(labels[i] for i in chosen),
        )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} SOURCE")
    main(Path(sys.argv[1]))
