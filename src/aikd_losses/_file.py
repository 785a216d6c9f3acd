"""A table in a file that is mapped into memory: a page that says what it holds and who is writing it, then the columns."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import uuid
from pathlib import Path
from typing import Any

import torch

PAGE = 4096  # the header's size and the columns' alignment
MARK = PAGE - 16  # where in the header the mark is: the process that writes the file, as `_process` says it, or zeros
FORMAT = "aikd-losses targets 3"
BOOT = Path("/proc/sys/kernel/random/boot_id")
MACHINE = BOOT.read_text() if BOOT.exists() else str(uuid.getnode())
Columns = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class MappedFile:
    """The columns `name: (dtype, shape)` of the file `path`, as tensors that read and write it, and whether it is whole.

    A file that is not there is created, filled with zeros. One that is there and has other `facts` or another size is
    refused with `ValueError` and left as it is. From `begin` to `end` the file names the process that writes it (one,
    where several do: ranks end together); who opens it when that process is gone finds it interrupted.
    """

    def __init__(self, path: str, facts: dict[str, Any], columns: Columns) -> None:
        header = json.dumps({"format": FORMAT, **facts}, default=str).encode().ljust(MARK)
        offsets, size = {}, PAGE
        for name, (dtype, shape) in columns.items():
            offsets[name] = size
            size += -(-math.prod(shape) * dtype.itemsize // PAGE) * PAGE
        if not os.path.exists(path):
            _create(path, header, size)
        with open(path, "r+b") as file:
            status, found = os.fstat(file.fileno()), file.read(MARK)
            if (found, status.st_size) != (header, size):
                raise ValueError(
                    f"`path` must be a file of {size} bytes that begins with {header.strip()!r}; {path!r} has {status.st_size} "
                    f"and begins with {found[:200].strip()!r}. Build the store with the file's settings, or pass another path."
                )
            memory = mmap.mmap(file.fileno(), size)
        self.columns = {  # each with a storage of its own, which is what torch.save tells tensors apart by
            name: torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=offsets[name]).view(shape)
            for name, (dtype, shape) in columns.items()
        }
        self.identity = _number(status.st_ino, status.st_dev)
        self._mark = torch.frombuffer(memory, dtype=torch.int64, count=2, offset=MARK)
        pid, number = writer = self._mark.tolist()
        lives = writer == _process(pid) and (number != 0 or pid == os.getpid())
        self._left = writer if any(writer) and not lives else None

    def interrupted(self) -> bool:
        return self._mark.tolist() == self._left

    def begin(self) -> None:
        if not self._mark.any():
            self._mark.copy_(torch.tensor(_process(os.getpid()), device="cpu"))

    def end(self) -> None:
        self._mark.zero_()


def _create(path: str, header: bytes, size: int) -> None:
    """Appears whole or not at all, and once: of several processes that create it, one does and all open that one."""
    new = os.path.join(os.path.dirname(path), f"{uuid.uuid4().hex}.new")
    try:
        with open(new, "xb") as file:
            file.write(header)
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):  # pragma: no branch (not on Windows)
                os.posix_fallocate(file.fileno(), 0, size)  # a page of a mapping that finds no room kills the process
        with contextlib.suppress(FileExistsError):  # another process was first
            os.link(new, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(new)


def _process(pid: int) -> list[int]:
    """`pid` and a number of its process (pids are used again): 0 for one that is dead, or where none can be told (no /proc)."""
    try:
        state, *facts = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return [pid, 0]
    return [pid, 0 if state == b"Z" else _number(pid, facts[18])]  # when it began


def _number(*facts: object) -> int:
    """An int64 that is the same for the same facts on the same machine, and for no others."""
    return int.from_bytes(hashlib.sha256(f"{MACHINE} {facts}".encode()).digest()[:8], "big", signed=True)
