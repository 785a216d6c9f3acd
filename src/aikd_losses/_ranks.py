"""The collectives that the terms and stores use. Whoever calls them asks `active` first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # what an exchange receives at a time


class Ranks:
    """The processes that train together: those of `process_group`, or of the default group once there is one."""

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
            required = "`process_group` must be None or a torch.distributed.ProcessGroup that this process is in"
            raise TypeError(f"{required} (of a DeviceMesh: `mesh.get_group('dp')`); got {process_group!r}.")
        self.group = process_group

    def active(self) -> bool:
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # a group is a connection, which a copy shares

    def _reachable(self, x: Tensor) -> Tensor:
        """`x` on a device that the group's backend can send from."""
        backend = dist.get_backend(self.group)
        if x.device.type == "cpu" and "nccl" in backend and "gloo" not in backend:  # pragma: no cover (needs NCCL)
            return x.to(torch.device("cuda", torch.cuda.current_device()))
        return x

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Every tensor summed over the ranks, in one flat all-reduce."""
        flat = self._reachable(torch.cat([x.reshape(-1) for x in tensors]))
        dist.all_reduce(flat, group=self.group)
        parts = flat.split([x.numel() for x in tensors])
        return [part.view_as(x).to(x) for part, x in zip(parts, tensors, strict=True)]

    def broadcast_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Every tensor overwritten with that of the group's first rank."""
        for x in tensors:
            x.detach().copy_(self.gather(x.detach()[None])[0][0])

    def gather(self, x: Tensor) -> list[Tensor]:
        """`x`, of one shape on all, from every rank; sent as bytes, which every backend knows."""
        sent = self._reachable(x.reshape(len(x), -1))
        received = [torch.empty_like(sent) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather([y.view(torch.uint8) for y in received], sent.view(torch.uint8), group=self.group)
        return [y.view(x.shape).to(x.device) for y in received]

    def gather_number(self, number: int, device: torch.device) -> list[int]:
        """An int64 of every rank; nobody has it before all have come here."""
        return torch.cat(self.gather(torch.tensor([number], device=device))).tolist()

    def gather_rows(self, index: Tensor, tables: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """What all ranks hold in the rows `index` of their `tables`: the index, then the rows of each table; a chunk of
        a rank at a time, in the same order on every rank. What is received at a time is bounded by `CHUNK_BYTES`."""
        sizes = self.gather_number(len(index), index.device)
        row_bytes = index.element_size() + sum(table[0].numel() * table.element_size() for table in tables)
        step = max(1, CHUNK_BYTES // (row_bytes * len(sizes)))
        padded = F.pad(index, (0, max(sizes) - len(index)))
        for start in range(0, len(padded), step):
            at = padded[start : start + step]
            columns = [self.gather(x) for x in (at, *(table.index_select(0, at) for table in tables))]
            for rank, size in enumerate(sizes):
                yield [column[rank][: max(size - start, 0)] for column in columns]
