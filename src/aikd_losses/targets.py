"""Target stores: what the student predicted for every training sample, to be matched an epoch later."""

from __future__ import annotations

import os
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from . import _checks
from ._table import Table


@runtime_checkable
class TargetStore(Protocol):
    """What `ProgressiveKD` needs of a store: three methods. Ours are `CachedTargets` and `EMATargets`.

    A store that is an `nn.Module` moves with the loss and is in its `state_dict()`; one that is not has to be saved
    by its owner. Its buffers, if it has any, are broadcast by DDP: keep its rows out of them.
    """

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """For ids `(N,)`: probabilities `(N, C)` in float32, and a bool `(N,)`, whether the row was ever written."""

    def write(self, index: Tensor, probs: Tensor) -> None:
        """Remember `probs` `(N, C)` for the ids `index` `(N,)`; of equal ids the last one wins."""

    def advance_epoch(self) -> None:
        """An epoch has ended: exchange rows with the other ranks, say."""


class CachedTargets(Table):
    r"""Keeps the newest prediction of every training sample: read in the next epoch, the previous epoch's.

    Args:
        num_samples: size of the training set; ids are `0 <= index < num_samples`.
        num_classes: C, at least 2.
        dtype: storage type: `torch.float16` (default), `bfloat16`, `float32` or `float64`. `read` gives float32.
        device: where the rows stay, whatever `to()` says (on the CPU, a copy a step for training on a GPU). None
            (default): the current default device, and they follow the loss's `to()`.
        top_k: keep only the k largest probabilities of a row (1 <= k <= C) and spread the mass that is left evenly
            over the other classes, so that a row still sums to 1. Bytes a sample: k * (2 + index) instead of 2 * C.
        path: a file that holds the rows, mapped into memory: created, or reopened with what it holds. Always on the
            CPU; the processes of one machine share it.
        process_group: the ranks that train on different samples (default: all, once there is a group).

    State: `rows`, `known` (and `classes` with `top_k`), in `state_dict()` though neither parameters nor buffers;
    written by `write`, exchanged between ranks by `advance_epoch`. A copy of a store in a file is a store in memory.

    Raises: `ValueError`, `TypeError`, `IndexError` for arguments out of range, on construction and in every method;
    nothing is changed then. `OSError` for a file that the system refuses. `RuntimeError`, from all but loading a
    checkpoint, for a file whose process ended (killed or not) between a `write` and `advance_epoch`.

    >>> store = CachedTargets(num_samples=4, num_classes=3)
    >>> store.write(torch.tensor([2]), torch.tensor([[0.5, 0.25, 0.25]]))
    >>> probs, known = store.read(torch.tensor([2, 0]))
    >>> probs.tolist(), known.tolist()
    ([[0.5, 0.25, 0.25], [0.0, 0.0, 0.0]], [True, False])

    Reference: Kim et al., *Self-Knowledge Distillation with Progressive Refinement of Targets* (PS-KD), 2021,
    https://arxiv.org/abs/2006.12000, whose targets are the previous epoch's predictions.
    """


class EMATargets(Table):
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
        super().__init__(num_samples, num_classes, dtype=dtype, device=device, path=path, process_group=process_group)
        self.decay = decay

    def _encode(self, new: Tensor, at: Tensor) -> Tensor:
        row = self.rows.index_select(0, at).to(torch.promote_types(self.dtype, torch.float32))
        known = rearrange(self.known.index_select(0, at), "n -> n 1")
        return torch.where(known, self.decay * row + (1 - self.decay) * new, new)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, decay={self.decay}"
