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
from typing import IO, Any

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # pragma: no cover (Windows): a file that is being written then counts as interrupted
    fcntl = None  # type: ignore[assignment]

PAGE = 4096  # the header's size and the columns' alignment
FORMAT = "aikd-losses targets 2"
BOOT = "/proc/sys/kernel/random/boot_id"
WHOLE, WRITING, INTERRUPTED = range(3)  # the state of a file

_locks: weakref.WeakSet[_Lock] = weakref.WeakSet()


class MappedFile:
    """The columns `name: (dtype, shape)` of the file `path`, as tensors that read and write it, and whether it is whole.

    A file that is not there is created, filled with zeros. One that is there must hold the same `facts` and have the size they
    imply; otherwise it is refused with `ValueError` and left as it is.

    Between `begin` and `end` a file is being written, which it says itself, and a lock says that the process lives: the system
    takes that back from one that is killed. So a file that is being written and that nobody has locked was interrupted.
    """

    def __init__(
        self, path: str, facts: dict[str, Any], columns: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> None:
        self.path = path
        columns = {**columns, "state": (torch.uint8, (1,))}
        offsets, size = {}, PAGE
        for name, (dtype, shape) in columns.items():
            offsets[name] = size
            size += -(-math.prod(shape) * dtype.itemsize // PAGE) * PAGE
        header = json.dumps({"format": FORMAT, **facts}).encode().ljust(PAGE)
        if not os.path.exists(path):
            _create(path, header, size)
        with open(path, "r+b") as file:
            _refuse_other(path, file, header, size)
            self.identity = _identity(file.fileno())
            memory = mmap.mmap(file.fileno(), size)
        self.columns = {  # each with a storage of its own, which is what torch.save tells tensors apart by
            name: torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=offsets[name]).view(shape)
            for name, (dtype, shape) in columns.items()
        }
        self._state = self.columns.pop("state")
        self._lock = _Lock()
        self._take()
        if self._lock.alone() and int(self._state) == WRITING:
            self.interrupt()
        self._lock.release()
        # A process that comes to its end leaves no row torn, and a file that it was writing whole.
        weakref.finalize(self, _leave, self._lock, self._state)

    @property
    def interrupted(self) -> bool:
        return int(self._state) == INTERRUPTED

    def begin(self) -> None:
        if self._lock.descriptor is None:
            self._take()
            self._lock.share()  # before it is said, so that nobody takes the file for interrupted
            self._state.fill_(WRITING)

    def end(self) -> None:
        self._state.fill_(WHOLE)
        self.release()

    def release(self) -> None:
        """`end`, where another process has said already that the file is whole."""
        self._lock.release()

    def interrupt(self) -> None:
        """Whoever opens the file is to know, until somebody calls `end`."""
        self._state.fill_(INTERRUPTED)

    def _take(self) -> None:
        """Have a descriptor to lock, which no mapping and no forked process shares, of the very file that is mapped."""
        with contextlib.suppress(FileNotFoundError):
            self._lock.open(self.path)
        if self._lock.descriptor is None or _identity(self._lock.descriptor) != self.identity:
            self._lock.release()
            raise RuntimeError(
                f"`path` {self.path!r} was deleted or replaced after this store had mapped it: what it holds is in no file any "
                "more. Build the store anew, in every process."
            )


class _Lock:
    """What is taken back from a process that is killed. Where files cannot be locked, nobody ever holds one."""

    descriptor: int | None = None

    def __init__(self) -> None:
        _locks.add(self)

    def open(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDWR)  # NFS locks what is open for writing

    def alone(self) -> bool:
        try:
            self._flock("LOCK_EX", "LOCK_NB")
        except BlockingIOError:
            return False
        return True

    def share(self) -> None:
        self._flock("LOCK_SH")

    def _flock(self, *operations: str) -> None:
        if fcntl is None or self.descriptor is None:
            return
        try:
            fcntl.flock(self.descriptor, sum(getattr(fcntl, name) for name in operations))
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            pass

    def release(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def _leave(lock: _Lock, state: Tensor) -> None:
    if lock.descriptor is not None:
        if int(state) == WRITING and lock.alone():
            state.fill_(WHOLE)
        lock.release()


def _let_go() -> None:
    """A forked child, the worker of a loader say, may outlive its parent and must not speak for it."""
    for lock in _locks:
        lock.release()


if hasattr(os, "register_at_fork"):  # pragma: no branch (Windows does not fork)
    os.register_at_fork(after_in_child=_let_go)


def _identity(descriptor: int) -> int:
    """A number (int64) that is the same for processes of one machine that have the same file open, and for no others."""
    try:
        with open(BOOT) as file:
            machine = file.read()
    except OSError:  # not Linux
        machine = str(uuid.getnode())
    found = os.fstat(descriptor)
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


def _refuse_other(path: str, file: IO[bytes], header: bytes, size: int) -> None:
    found = file.read(PAGE)
    try:
        facts = json.loads(found)
        written_as = str(facts.get("format")) if isinstance(facts, dict) else ""
    except ValueError:
        written_as = ""
    if written_as.startswith("aikd-losses targets") and written_as != FORMAT:
        raise ValueError(
            f"`path` must be a file of this version's format, {FORMAT!r}; {path!r} is {written_as!r}. Load the rows from a "
            "checkpoint into another path."
        )
    if written_as != FORMAT:
        raise ValueError(f"`path` must be a file of targets; {path!r} is something else. Pass another path.")
    if found != header:
        wanted = json.loads(header)
        differences = ", ".join(f"{k}={facts.get(k)!r}, not {v!r}" for k, v in wanted.items() if facts.get(k) != v)
        raise ValueError(
            f"`path` must hold the store that is asked for; {path!r} has {differences or 'another header'}. Build the "
            "store with the file's settings, or pass another path."
        )
    if (found_size := os.fstat(file.fileno()).st_size) != size:
        raise ValueError(
            f"`path` must be a whole file of {size} bytes; {path!r} has {found_size}: it was cut off. "
            "Delete it and load the rows from a checkpoint."
        )
