"""A table in a file that is mapped into memory: a page that says what it holds and who is writing it, then the columns."""

import contextlib
import glob
import hashlib
import json
import math
import mmap
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import IO, Any

import torch

PAGE = 4096  # the header's size and the columns' alignment
MARK = PAGE - 16  # where in the header the mark is: the process that writes the file, as `_process` says it
FORMAT = "aikd-losses targets 3"
BOOT = Path("/proc/sys/kernel/random/boot_id")
MACHINE = BOOT.read_text() if BOOT.exists() else str(uuid.getnode())
LEFT_BEHIND = 3600  # seconds after which nobody is still creating a file
WHOLE = 0, 0  # the mark of a file that nobody is writing


class MappedFile:
    """The columns `name: (dtype, shape)` of the file `path`, as tensors that read and write it, and whether it is whole.

    A file that is not there is created, filled with zeros, if `create`. One that is there and has other `facts` or another size
    is refused with `ValueError` and left as it is. From `begin` to `end` the file names the process that writes it (one, where
    several do: ranks end together); who opens it when that is no process of this machine any more finds it interrupted.
    """

    def __init__(
        self, path: str, facts: dict[str, Any], columns: dict[str, tuple[torch.dtype, tuple[int, ...]]], create: bool
    ) -> None:
        facts = {"format": FORMAT, **facts}
        offsets, size = {}, PAGE
        for name, (dtype, shape) in columns.items():
            offsets[name] = size
            size += -(-math.prod(shape) * dtype.itemsize // PAGE) * PAGE
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
            raise ValueError(f"`path` must be a file; {path!r} is a folder, a pipe or a device.")
        if create and not os.path.exists(path):
            _create(path, json.dumps(facts).encode().ljust(MARK), size)
        with open(path, "r+b") as file:
            _refuse_other(file, facts, size)
            self.identity = _number(*os.fstat(file.fileno())[1:3])  # inode and device
            memory = mmap.mmap(file.fileno(), size)
        self.columns = {  # each with a storage of its own, which is what torch.save tells tensors apart by
            name: torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=offsets[name]).view(shape)
            for name, (dtype, shape) in columns.items()
        }
        self._mark = memoryview(memory)[MARK:PAGE].cast("q")
        pid, number = found = tuple(self._mark)
        lives = found == _process(pid) and (number != 0 or pid == os.getpid())
        self.whole = found == WHOLE  # when it was opened
        self._left = None if self.whole or lives else found

    @property
    def interrupted(self) -> bool:
        return tuple(self._mark) == self._left

    def begin(self) -> None:
        if tuple(self._mark) == WHOLE:
            self._mark[0], self._mark[1] = _process(os.getpid())

    def end(self) -> None:
        self._mark[0], self._mark[1] = WHOLE


def _create(path: str, header: bytes, size: int) -> None:
    """Appears whole or not at all, and once: of several processes that create it, one does and all open that one."""
    folder, name = os.path.split(path)
    prefix = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    for old in glob.glob(os.path.join(glob.escape(folder), f"{prefix}-*.new")):  # of processes that were killed here
        with contextlib.suppress(FileNotFoundError):
            if time.time() - os.stat(old).st_mtime > LEFT_BEHIND:
                os.remove(old)
    new = os.path.join(folder, f"{prefix}-{uuid.uuid4().hex}.new")
    try:
        with open(new, "xb") as file:
            file.write(header)
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):  # pragma: no branch (not on Windows)
                os.posix_fallocate(file.fileno(), 0, size)  # a page of a mapping that finds no room kills the process
        try:
            os.link(new, path)
        except FileExistsError:  # another process was first
            pass
        except OSError:  # no hard links here: of two at once one is replaced
            os.rename(new, path)
    except OSError as error:
        free = f", {shutil.disk_usage(folder).free:,} are free" if os.path.isdir(folder) else ""
        raise OSError(error.errno, f"{error.strerror} (`path` needs {size:,} bytes{free})", path) from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(new)


def _refuse_other(file: IO[bytes], wanted: dict[str, Any], size: int) -> None:
    try:
        found = json.loads(file.read(MARK))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"`path` must be a file of targets ({FORMAT}); {file.name!r} is not. Pass another path.")
    found["bytes"], wanted = os.fstat(file.fileno()).st_size, {**wanted, "bytes": size}
    differing = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if differing:
        differences = ", ".join(f"{key}={found.get(key)!r}, not {wanted.get(key)!r}" for key in differing)
        raise ValueError(
            f"`path` must hold the store that is asked for; {file.name!r} has {differences}. Build the store with the file's "
            "settings, pass another path, or delete it and load a checkpoint."
        )


def _process(pid: int) -> tuple[int, int]:
    """`pid` and a number of its process (pids are used again): 0 for one that is dead, or where none can be told (no /proc)."""
    try:
        state, *facts = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return pid, 0
    return pid, 0 if state == b"Z" else _number(pid, facts[18])  # when it began


def _number(*facts: object) -> int:
    """An int64 that is the same for the same facts on the same machine, and for no others."""
    return int.from_bytes(hashlib.sha256(f"{MACHINE} {facts}".encode()).digest()[:8], "big", signed=True)
