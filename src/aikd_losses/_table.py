"""What the stores are: a table of predictions by sample id, in memory or in a file, that ranks exchange after each epoch."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from . import _checks
from ._carrier import Carrier
from ._file import MappedFile
from ._ranks import Ranks


class Table(Carrier):
    """Rows of probabilities by sample id: in memory or in a mapped file, whole or the `top_k` largest classes."""

    _carried: ClassVar[tuple[str, ...]] = ("rows", "classes", "known", "_last_write")
    _saved = ("rows", "classes", "known")
    rows: Tensor  # (num_samples, num_classes or top_k) in the storage type
    classes: Tensor | None  # (num_samples, top_k): which classes those are
    known: Tensor  # (num_samples,): was the row ever written
    _last_write: Tensor  # (num_samples,): the number of the newest write since advance_epoch, -1 for none
    _file: MappedFile | None

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        top_k: int | None = None,
        path: str | os.PathLike[str] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self._ranks = Ranks(process_group)
        self.num_samples = _checks.integer("num_samples", num_samples, 1)
        self.num_classes = _checks.integer("num_classes", num_classes, 2)
        self.dtype = _checks.choice("dtype", dtype, _checks.FLOATS)
        self.top_k = None if top_k is None else _checks.integer("top_k", top_k, 1, num_classes)
        self.path = None if path is None else os.path.abspath(os.fsdecode(path))
        self.pinned = device is not None or path is not None
        home = torch.empty(0).device if device is None else torch.device(device)
        if path is not None and device is not None and home.type != "cpu":
            raise ValueError(f"`device` must be the CPU for a store in a file (`path`); got {home}.")
        self._allocate(home, create=True)
        self._last_write = torch.full((self.num_samples,), -1, dtype=torch.int64, device=self.known.device)
        self._num_written = 0
        self.inherited = self._file is not None and self._file.whole and bool(self.known.any())  # rows of another run
        if self.inherited:  # whose rows may be too many to look at
            self._check_classes(self.classes, f"the damaged `path` {self.path!r}")

    def _allocate(self, device: torch.device, create: bool) -> None:
        n, width = self.num_samples, self.top_k or self.num_classes
        columns: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"rows": (self.dtype, (n, width))}
        if self.top_k is not None:
            small = [d for d in (torch.uint8, torch.int16, torch.int32) if self.num_classes - 1 <= torch.iinfo(d).max]
            columns["classes"] = (small[0], (n, width))
        columns["known"] = (torch.bool, (n,))
        if self.path is None:
            self._file = None
            table = {name: torch.zeros(shape, dtype=d, device=device) for name, (d, shape) in columns.items()}
        else:
            facts = {"num_samples": n, "num_classes": self.num_classes, "dtype": str(self.dtype), "top_k": self.top_k}
            self._file = MappedFile(self.path, facts, columns, create)
            table = self._file.columns
        self.rows, self.classes, self.known = table["rows"], table.get("classes"), table["known"]

    def check_whole(self) -> None:
        """RuntimeError where the file was left by a process that ended while it wrote."""
        if self._file is not None and not torch.compiler.is_compiling() and self._file.interrupted:
            raise RuntimeError(
                f"`path` {self.path!r} was left half written by a process that ended before `advance_epoch`: rows may be torn. "
                "Load a checkpoint of the store (`load_state_dict`), or delete the file to start without history."
            )

    @torch.no_grad()
    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the ids `index` `(N,)`: probabilities `(N, C)` in float32, zero where never written, and a bool
        `(N,)`, whether they were; both on the device of `index`."""
        _checks.sample_index("index", index, None, self.num_samples)
        self.check_whole()
        at = index.to(self.known.device)
        probs, known = self.rows.index_select(0, at).float(), self.known.index_select(0, at)
        if self.classes is not None:
            # The kept probabilities, and what is missing to 1 spread evenly over the other classes.
            total = rearrange(probs.sum(-1), "n -> n 1")
            others = self.num_classes - probs.shape[-1]
            kept = probs / total.clamp_min(1.0 if others else torch.finfo(torch.float32).tiny)
            rest = (1.0 - total).clamp_min(0.0) / max(others, 1) * rearrange(known, "n -> n 1")
            probs = rest.expand(-1, self.num_classes).scatter(-1, self.classes.index_select(0, at).long(), kept)
        return probs.to(index.device), known.to(index.device)

    @torch.no_grad()
    def write(self, index: Tensor, probs: Tensor, *, keep: Tensor | None = None) -> None:
        """Remember `probs` `(N, C)` for the ids `index` `(N,)`, where `keep` (bool `(N,)`, default all) is True.

        Of equal ids in one call the last kept one wins, on every device. Raises `ValueError` where a kept row is no
        distribution (checked on the CPU) and then changes nothing; on other devices the caller vouches for it.
        """
        home = self.known.device
        _checks.sample_index("index", index, None, self.num_samples, keep)
        _checks.floating("probs", probs)
        _checks.shaped("probs", probs, (len(index), self.num_classes), "must have the shape (N, C) = ")
        _checks.distributions("probs", probs, keep, "For logits pass `torch.softmax(logits, -1)`.")
        self.check_whole()
        if self._file is not None:
            self._file.begin()
        at, probs = index.to(home), probs.to(home)
        # Rows are written in any order, also by the threads of a CPU. So writes are numbered, and the highest number wins:
        # equal ids need no order and dropped rows no branch.
        order = torch.arange(self._num_written, self._num_written + len(at), device=home)
        if keep is not None:
            dropped = ~keep.to(home)  # whose ids may be none
            at, order = at.masked_fill(dropped, 0), order.masked_fill(dropped, -1)
        self._last_write.scatter_reduce_(0, at, order, "amax")
        winner = self._last_write.index_select(0, at) - self._num_written
        self._num_written += len(at)
        written = winner >= 0
        row = self._encode(probs.index_select(0, winner.clamp_min(0)), at)
        values = [row, written] if self.top_k is None else [*row.topk(self.top_k, dim=-1), written]
        for column, value in zip(self._columns(), values, strict=True):
            wins = written if column.ndim == 1 else rearrange(written, "n -> n 1")
            column.index_copy_(0, at, torch.where(wins, value.to(column.dtype), column.index_select(0, at)))

    def _encode(self, new: Tensor, at: Tensor) -> Tensor:
        """What is stored for the probabilities `new` of the ids `at`."""
        return new

    def _columns(self) -> list[Tensor]:
        return [self.rows, self.known] if self.classes is None else [self.rows, self.classes, self.known]

    def advance_epoch(self) -> None:
        """End the epoch: under `torch.distributed`, give every rank what the others wrote in it."""
        self.check_whole()
        if self._ranks.active():
            self._exchange()
        elif self._file is not None:
            self._file.end()
        self._forget_writes()

    def _exchange(self) -> None:
        """Of ranks that map one file the first one writes it, and no rank goes on before that is done: a row that came
        late would overwrite one of the next epoch."""
        own = 0 if self._file is None else self._file.identity
        files = self._ranks.gather_number(own, self.known.device)
        writes = self._file is None or files.index(own) == self._ranks.own()
        if self._file is None or len(set(files)) > 1:
            fresh = (self._last_write >= 0).nonzero().squeeze(-1)
            for index, *values in self._ranks.gather_rows(fresh, self._columns()):
                for column, value in zip(self._columns() if writes else (), values, strict=False):
                    column.index_copy_(0, index, value)
        if self._file is not None and writes:
            self._file.end()
        if any(files):  # somebody has a file
            self._ranks.gather_number(0, self.known.device)

    def _forget_writes(self) -> None:
        self._last_write.fill_(-1)
        self._num_written = 0

    def _check_classes(self, classes: Tensor | None, where: str) -> None:
        if classes is not None and not 0 <= int(classes.min()) <= int(classes.max()) < self.num_classes:
            raise ValueError(f"`classes` in {where} must be in 0..{self.num_classes - 1}.")

    def _check_load(self, saved: Mapping[str, Tensor]) -> None:
        self._check_classes(saved.get("classes"), "the checkpoint")
        parts = saved["rows"].split(1024)  # a sum in float32 makes a copy
        sums = torch.cat([part.sum(-1, dtype=torch.float32) for part in parts])
        least = 0.5 * self.rows.shape[1] / self.num_classes * saved["known"]  # averages in float16 may be that far off
        sound = (sums <= 1.5) & (sums >= least)
        if not (sound.all() and saved["rows"].min() >= 0):
            raise ValueError("`rows` in the checkpoint must be distributions (no negative value, sum 1, nothing NaN).")

    def _fill(self, saved: Mapping[str, Tensor]) -> None:
        if self._file is not None:
            self._file.begin()
        super()._fill(saved)
        if self._file is not None:
            self._file.end()
        self._forget_writes()  # what is loaded here is loaded on every rank
        self.inherited = False

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return self if self.pinned else super()._apply(fn, recurse)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.check_whole()
        return super().state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        mapped = () if self.path is None else ("rows", "classes", "known", "_file")
        return {key: value for key, value in self.__dict__.items() if key not in mapped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.path is not None:  # pickled by reference to the file
            self._allocate(torch.device("cpu"), create=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of its own, in memory: two objects that write one file would not be copies."""
        self.check_whole()
        clone = memo[id(self)] = self.__class__.__new__(self.__class__)
        clone.__dict__.update(copy.deepcopy({**self.__dict__, "path": None, "_file": None, "inherited": False}, memo))
        return clone

    def extra_repr(self) -> str:
        names = ["num_samples", "num_classes", "dtype", *["top_k"] * (self.top_k is not None)]
        where = f"device={self.known.device}" if self.path is None else f"path={self.path!r}"
        return f"{_checks.settings(self, *names)}, {where}"
