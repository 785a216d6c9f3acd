"""Tables in a file that is mapped into memory: a page that says what it holds, then the columns."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import tempfile
import uuid
import weakref
from typing import Any

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # pragma: no cover (Windows): a file that is being written is then always taken for interrupted
    fcntl = None  # type: ignore[assignment]

PAGE = 4096  # the header's size and the columns' alignment
FORMAT = "aikd-losses targets 2"
BOOT = "/proc/sys/kernel/random/boot_id"
WHOLE, WRITING, INTERRUPTED = range(3)  # the state of a file

_held: weakref.WeakSet[Hold] = weakref.WeakSet()


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
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), size)
    return {  # each with a storage of its own, which is what torch.save tells tensors apart by
        name: torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=offsets[name]).view(shape)
        for name, (dtype, shape) in columns.items()
    }


class Hold:
    """Shows the other processes that this one has a file open, as long as it lives; the system takes it back from a process
    that is killed. A file that was being written and that nobody has open any more was interrupted."""

    def __init__(self, path: str, state: Tensor) -> None:
        self.descriptor: int | None = os.open(path, os.O_RDONLY)
        alone = True
        if fcntl is not None:
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                alone = False
        if alone and int(state) == WRITING:
            state.fill_(INTERRUPTED)
        if fcntl is not None:
            fcntl.flock(self.descriptor, fcntl.LOCK_SH)
        _held.add(self)

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    __del__ = close


def _let_go() -> None:
    """A forked child, the worker of a loader say, may outlive its parent and must not speak for it."""
    for held in _held:
        held.close()


if hasattr(os, "register_at_fork"):  # pragma: no branch (Windows does not fork)
    os.register_at_fork(after_in_child=_let_go)


def identity(path: str) -> int:
    """A number (int64) that is the same for processes of one machine that have mapped the same file, and for no others."""
    try:
        with open(BOOT) as file:
            machine = file.read()
    except OSError:  # not Linux
        machine = str(uuid.getnode())
    found = os.stat(path)
    digest = hashlib.sha256(f"{machine} {found.st_dev} {found.st_ino}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


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
