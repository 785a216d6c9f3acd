"""Target stores: what the student predicted for every training sample, to be matched an epoch later."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from . import _checks, _mapped
from ._carrier import Carrier
from ._distributed import Ranks

MAPPED = ("rows", "classes", "known", "_file")  # what belongs to the file of a store with a `path`


@runtime_checkable
class TargetStore(Protocol):
    """What `ProgressiveKD` needs of a store: three methods. Ours are `CachedTargets` and `EMATargets`.

    A store that is an `nn.Module` moves with the loss and is in its `state_dict()`; one that is not has to be saved
    by its owner. Its buffers, if it has any, are broadcast by DDP: keep its rows out of them.
    """

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """For ids `(N,)`: probabilities `(N, C)` in float32, and a bool `(N,)`, whether the row was ever written."""
        ...

    def write(self, index: Tensor, probs: Tensor) -> None:
        """Remember `probs` `(N, C)` for the ids `index` `(N,)`; of equal ids the last one wins."""
        ...

    def advance_epoch(self) -> None:
        """An epoch has ended: exchange rows with the other ranks, say."""
        ...


class _Table(Carrier):
    """Rows of probabilities by sample id: in memory or in a mapped file, whole or the `top_k` largest classes."""

    _carried: ClassVar[tuple[str, ...]] = ("rows", "classes", "known", "_last_write")
    _saved = ("rows", "classes", "known")
    rows: Tensor  # (num_samples, num_classes or top_k) in the storage type
    classes: Tensor | None  # (num_samples, top_k): which classes those are
    known: Tensor  # (num_samples,): was the row ever written
    _last_write: Tensor  # (num_samples,): the number of the newest write since advance_epoch, -1 for none
    _file: _mapped.MappedFile | None

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        dtype: torch.dtype,
        device: torch.device | str | None,
        top_k: int | None,
        path: str | os.PathLike[str] | None,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__()
        self._ranks = Ranks(process_group)
        self.num_samples = _checks.integer("num_samples", num_samples, 1)
        self.num_classes = _checks.num_classes(num_classes)
        if not isinstance(dtype, torch.dtype) or dtype not in _checks.FLOATS:
            names = ", ".join(str(d) for d in _checks.FLOATS)
            raise ValueError(f"`dtype` must be one of {names}; got {dtype!r}.")
        self.dtype = dtype
        self.top_k = None if top_k is None else _checks.integer("top_k", top_k, 1, num_classes)
        if path is not None and not (isinstance(path, (str, os.PathLike)) and isinstance(os.fspath(path), str)):
            raise TypeError(f"`path` must be a str or os.PathLike; got {path!r}.")
        self.path = None if path is None else os.path.abspath(os.fspath(path))
        self.pinned = device is not None or path is not None
        self._num_written = 0
        self._complete_version: int | None = None  # of `known`, when it was found to be all True
        home = torch.get_default_device() if device is None else _checks.device(device)
        if path is not None:
            if device is not None and home.type != "cpu":
                raise ValueError(f"`device` must be the CPU for a store in a file (`path`); got {home}.")
            home = torch.device("cpu")
        self._allocate(home)

    def _allocate(self, device: torch.device) -> None:
        n, width = self.num_samples, self.top_k or self.num_classes
        columns: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"rows": (self.dtype, (n, width))}
        if self.top_k is not None:
            columns["classes"] = (_index_dtype(self.num_classes), (n, width))
        columns["known"] = (torch.bool, (n,))
        self._file = None
        if self.path is None:
            table = {name: torch.zeros(shape, dtype=d, device=device) for name, (d, shape) in columns.items()}
        else:
            facts = {"num_samples": n, "num_classes": self.num_classes, "dtype": str(self.dtype), "top_k": self.top_k}
            self._file = _mapped.MappedFile(self.path, facts, columns)
            table = self._file.columns
        self.rows, self.classes, self.known = table["rows"], table.get("classes"), table["known"]
        self._last_write = torch.full((n,), -1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the ids `index` `(N,)`: probabilities `(N, C)` in float32, zero where never written, and a bool
        `(N,)`, whether they were; both on the device of `index`."""
        _checks.sample_index("index", index, None, self.num_samples, home=self.known.device)
        at = index.to(self.known.device)
        probs, known = self._probs(at), self.known.index_select(0, at)
        return probs.to(index.device), known.to(index.device)

    @property
    def complete(self) -> bool:
        """Whether every row is known, as far as the last `advance_epoch` saw: then no step has to look."""
        return self._complete_version == self.known._version

    def _probs(self, at: Tensor) -> Tensor:
        self.check_whole()
        kept = self.rows.index_select(0, at).float()
        if self.classes is None:
            return kept
        # The kept probabilities, and what is missing to 1 spread evenly over the other classes.
        total = rearrange(kept.sum(-1), "n -> n 1")
        others = self.num_classes - kept.shape[-1]
        kept = kept / (total.clamp_min(1.0) if others else total.clamp_min(torch.finfo(torch.float32).tiny))
        known = rearrange(self.known.index_select(0, at), "n -> n 1")
        rest = (1.0 - total).clamp_min(0.0) / max(others, 1) * known
        return rest.expand(-1, self.num_classes).scatter(-1, self.classes.index_select(0, at).long(), kept)

    @torch.no_grad()
    def write(self, index: Tensor, probs: Tensor, *, keep: Tensor | None = None) -> None:
        """Remember `probs` `(N, C)` for the ids `index` `(N,)`, where `keep` (bool `(N,)`, default all) is True.

        Of equal ids in one call the last kept one wins, on every device. Raises `ValueError` where a kept row is no
        distribution (checked on the CPU) and then changes nothing; on other devices the caller vouches for it.
        """
        self._check_write(index, probs, keep)
        if keep is not None:
            index = index.masked_fill(~keep.to(index.device), 0)  # a dropped id may be none
        self._put(index, probs, keep)

    def check_whole(self) -> None:
        """RuntimeError where the file was left by a process that was killed while it wrote."""
        if self._file is not None and not torch.compiler.is_compiling() and self._file.interrupted:
            raise RuntimeError(
                f"`path` {self.path!r} was left half written: a process was killed between two `advance_epoch`, so that rows "
                "of two epochs are in it and some may be torn. Load a checkpoint of the store (`load_state_dict`), or delete "
                "the file to start without history."
            )

    def _put(self, index: Tensor, probs: Tensor, keep: Tensor | None) -> None:
        """`write`, of what is known to be distributions."""
        if self._file is not None:
            self.check_whole()
            self._file.begin()
        at, probs = index.to(self.known.device), probs.to(self.known.device)
        keep = None if keep is None else keep.to(at.device)
        # Rows are written in any order, also by the threads of a CPU. So writes are numbered, and the highest number wins:
        # equal ids need no order and dropped rows no branch.
        order = torch.arange(self._num_written, self._num_written + len(at), device=at.device)
        if keep is not None:
            order = order.masked_fill(~keep, -1)
        self._last_write.scatter_reduce_(0, at, order, "amax")
        winner = self._last_write.index_select(0, at) - self._num_written
        self._num_written += len(at)
        written = None
        if keep is not None:
            written = winner >= 0
            winner = winner.clamp_min(0)
        kept, classes = self._encode(probs.index_select(0, winner), at)
        self._store(self.rows, at, kept, written)
        if self.classes is not None and classes is not None:
            self._store(self.classes, at, classes, written)
        if written is None and not self.complete:
            self.known.index_fill_(0, at, True)
        elif written is not None:
            self.known.index_copy_(0, at, self.known.index_select(0, at) | written)

    @staticmethod
    def _store(table: Tensor, at: Tensor, new: Tensor, written: Tensor | None) -> None:
        new = new.to(table.dtype)
        if written is not None:
            new = torch.where(rearrange(written, "n -> n 1"), new, table.index_select(0, at))
        table.index_copy_(0, at, new)

    def _encode(self, new: Tensor, at: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is stored for the probabilities `new` of the ids `at`."""
        if self.top_k is None:
            return new, None
        kept, classes = new.topk(self.top_k, dim=-1)
        return kept, classes

    def _check_write(self, index: Tensor, probs: Tensor, keep: Tensor | None) -> None:
        home = self.known.device
        _checks.sample_index("index", index, None, None, home=home)
        _checks.flags("keep", keep, index, home)
        _checks.sample_index("index", index, None, self.num_samples, keep)
        _checks.distributions("probs", probs, (len(index), self.num_classes), keep, home)

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
        files = self._ranks.gather_numbers(own, self.known.device)
        writes = self._file is None or files.index(own) == self._ranks.own()
        if self._file is None or len(set(files)) > 1:
            tables = [self.rows, self.known] + ([] if self.classes is None else [self.classes])
            fresh = (self._last_write >= 0).nonzero().squeeze(-1)
            for index, columns in self._ranks.gather_rows(fresh, tables):
                for table, rows in zip(tables, columns, strict=True):
                    if writes:
                        table.index_copy_(0, index, rows)
        if any(files):  # somebody has a file
            if self._file is not None and writes:
                self._file.end()
            self._ranks.wait()
            if self._file is not None:
                self._file.release()

    def _forget_writes(self) -> None:
        self._last_write.fill_(-1)
        self._num_written = 0
        gaps = self.known.is_meta or not bool(self.known.all())
        self._complete_version = None if gaps else self.known._version

    def _check_load(self, saved: Mapping[str, Tensor]) -> None:
        classes = saved.get("classes")
        if classes is None:
            return
        if not 0 <= int(classes.min()) <= int(classes.max()) < self.num_classes:
            raise ValueError(f"`classes` in the checkpoint must be in 0..{self.num_classes - 1}.")

    def _before_load(self) -> None:
        if self._file is not None:
            self._file.interrupt()

    def _after_load(self) -> None:
        if self._file is not None:
            self._file.end()
        self._forget_writes()  # what is loaded here is loaded on every rank

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self.pinned:
            return self
        self._complete_version = None  # of a tensor that this may replace
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.check_whole()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def __getstate__(self) -> dict[str, Any]:
        if self.path is None:
            return self.__dict__
        return {key: value for key, value in self.__dict__.items() if key not in MAPPED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._complete_version = None  # of a tensor that was left behind
        if self.path is not None:  # pickled by reference to the file, which is opened here
            last_write = self._last_write
            self._allocate(torch.device("cpu"))
            self._last_write = last_write

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of its own, in memory: two objects that write one file would not be copies."""
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        self.check_whole()
        kept = {key: value for key, value in self.__dict__.items() if key != "_file"}
        clone.__dict__.update(copy.deepcopy(kept, memo), path=None, _file=None, _complete_version=None)
        return clone

    def extra_repr(self) -> str:
        size = f"num_samples={self.num_samples}, num_classes={self.num_classes}, dtype={self.dtype}"
        size += "" if self.top_k is None else f", top_k={self.top_k}"
        return size + (f", device={self.known.device}" if self.path is None else f", path={self.path!r}")


class CachedTargets(_Table):
    r"""Keeps the newest prediction of every training sample: read in the next epoch, the previous epoch's.

    Args:
        num_samples: size of the training set; ids are `0 <= index < num_samples`.
        num_classes: C, at least 2.
        dtype: storage type: `torch.float16` (default), `bfloat16`, `float32` or `float64`. `read` gives float32.
        device: where the rows live. None (default): the current default device, and they follow the loss's `to()`.
            Given: there, whatever `to()` says (a CPU store for GPU training costs a copy each step).
        top_k: keep only the k largest probabilities of a row (1 <= k <= C) and spread the mass that is left evenly
            over the other classes, so that a row still sums to 1. Bytes a sample: k * (2 + index) instead of 2 * C.
        path: keep the rows in this file, mapped into memory: created where there is none, reopened with what it holds
            where there is. Always on the CPU; the processes of one machine share it.
        process_group: the ranks that train on different samples (default: all, once there is a group).

    State: `rows`, `known` (and `classes` with `top_k`), in `state_dict()` though neither parameters nor buffers;
    written by `write`, exchanged between ranks by `advance_epoch`. A file whose process was killed in the middle of an
    epoch is noticed: all but loading a checkpoint is then a `RuntimeError`. A deep copy of a store in a file is a store in
    memory; a pickle refers to the file.

    Raises: `ValueError`, `TypeError`, `IndexError` for arguments out of range, on construction and in every method;
    nothing is changed then.

    >>> store = CachedTargets(num_samples=4, num_classes=3)
    >>> store.write(torch.tensor([2]), torch.tensor([[0.5, 0.25, 0.25]]))
    >>> probs, known = store.read(torch.tensor([2, 0]))
    >>> probs.tolist(), known.tolist()
    ([[0.5, 0.25, 0.25], [0.0, 0.0, 0.0]], [True, False])

    Reference: Kim et al., *Self-Knowledge Distillation with Progressive Refinement of Targets* (PS-KD), 2021,
    https://arxiv.org/abs/2006.12000, whose targets are the previous epoch's predictions.
    """

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
        super().__init__(num_samples, num_classes, dtype, device, top_k, path, process_group)


class EMATargets(_Table):
    r"""Keeps an exponential moving average of every training sample's predictions.

    $$\text{row} \leftarrow d\,\text{row} + (1-d)\,\text{prediction}$$

    with $d$ = `decay`, starting from the first prediction, so that a row is a distribution from its first write on.

    Args:
        decay: share of the old row, 0..1 (default 0.9). 0 keeps the newest prediction, 1 the first one.
        num_samples, num_classes, dtype, device, path, process_group: as in `CachedTargets`. In float16 a step smaller
            than 2**-11 of a value is rounded away: take float32 for a decay above 0.99.

    State and Raises: as in `CachedTargets`.

    >>> store = EMATargets(num_samples=4, num_classes=2, decay=0.75)
    >>> for p in (1.0, 0.0):
    ...     store.write(torch.tensor([3]), torch.tensor([[p, 1 - p]]))
    >>> store.read(torch.tensor([3]))[0].tolist()
    [[0.75, 0.25]]

    Reference: the moving average of a sample's predictions is the temporal ensembling of Laine and Aila, *Temporal
    Ensembling for Semi-Supervised Learning*, 2017, https://arxiv.org/abs/1610.02242; we start from the first
    prediction where they correct the bias of a start from zero.
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        decay: float = 0.9,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        path: str | os.PathLike[str] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        decay = _checks.number("decay", decay, 0.0, 1.0)  # before a file is created
        super().__init__(num_samples, num_classes, dtype, device, None, path, process_group)
        self.decay = decay

    def _encode(self, new: Tensor, at: Tensor) -> tuple[Tensor, Tensor | None]:
        precision = torch.promote_types(self.dtype, torch.float32)
        new, rows = new.to(precision), self.rows.index_select(0, at).to(precision)
        average = self.decay * rows + (1 - self.decay) * new
        return torch.where(rearrange(self.known.index_select(0, at), "n -> n 1"), average, new), None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, decay={self.decay}"


def _index_dtype(num_classes: int) -> torch.dtype:
    for dtype in (torch.uint8, torch.int16):
        if num_classes - 1 <= torch.iinfo(dtype).max:
            return dtype
    return torch.int32
