"""Tables in a file that is mapped into memory: a page that says what it holds, then the columns."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from typing import Any

import torch
from torch import Tensor

PAGE = 4096  # the header's size and the columns' alignment
FORMAT = "aikd-losses targets 1"


def map_columns(
    path: str, facts: dict[str, Any], columns: dict[str, tuple[torch.dtype, tuple[int, ...]]]
) -> dict[str, Tensor]:
    """The columns `name: (dtype, shape)` of the file `path`, as tensors that read and write it.

    A file that is not there is created, filled with zeros. One that is there must hold the same `facts` and have the
    size they imply; otherwise it is refused with `ValueError` and left as it is.
    """
    offsets, size = {}, PAGE
    for name, (dtype, shape) in columns.items():
        offsets[name] = size
        size += -(-math.prod(shape) * dtype.itemsize // PAGE) * PAGE
    header = json.dumps({"format": FORMAT, **facts}).encode().ljust(PAGE)
    if not os.path.exists(path):
        _create(path, header, size)
    _refuse_other(path, header, size)
    memory = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
    return {
        name: memory[offsets[name] : offsets[name] + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        for name, (dtype, shape) in columns.items()
    }


def _create(path: str, header: bytes, size: int) -> None:
    """Appears whole or not at all, and once: of several processes that create it, one does and all open that one."""
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), prefix=os.path.basename(path) + ".") as new:
        new.write(header)
        new.truncate(size)
        new.flush()
        with contextlib.suppress(FileExistsError):
            os.link(new.name, path)


def _refuse_other(path: str, header: bytes, size: int) -> None:
    with open(path, "rb") as file:
        found = file.read(PAGE)
    try:
        facts = json.loads(found)
        known = isinstance(facts, dict) and facts.get("format") == FORMAT
    except ValueError:
        known = False
    if not known:
        raise ValueError(f"`path` must be a file of targets; {path!r} is something else. Pass another path.")
    if found != header:
        wanted = json.loads(header)
        differences = ", ".join(f"{k}={facts.get(k)!r}, not {v!r}" for k, v in wanted.items() if facts.get(k) != v)
        raise ValueError(
            f"`path` must hold the store that is asked for; {path!r} has {differences or 'another header'}. Build the "
            "store with the file's settings, or pass another path."
        )
    if os.path.getsize(path) != size:
        raise ValueError(
            f"`path` must be a whole file of {size} bytes; {path!r} has {os.path.getsize(path)}: it was cut off. "
            "Delete it and load the rows from a checkpoint."
        )
