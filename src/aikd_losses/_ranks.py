"""The collectives that the terms and stores use. Whoever calls them asks `active` first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from . import _checks

CHUNK_BYTES = 64 * 2**20  # what an exchange receives at a time


class Ranks:
    """The processes that train together: those of `process_group`, or of the default group once there is one."""

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        if process_group is not None and not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
            raise TypeError(
                "`process_group` must be None or a torch.distributed.ProcessGroup that this process belongs to (of a "
                f"DeviceMesh: `mesh.get_group('dp')`); got {_checks.shown(process_group)}."
            )
        self.group = process_group

    def active(self) -> bool:
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1

    def own(self) -> int:
        return dist.get_rank(self.group)

    def __deepcopy__(self, memo: object) -> Ranks:
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
        first = dist.get_global_rank(self.group or dist.group.WORLD, 0)  # type: ignore[arg-type]  # initialised: never None
        for x in tensors:
            sent = self._reachable(x.detach().clone())
            dist.broadcast(sent, src=first, group=self.group)
            x.detach().copy_(sent)

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
        """What all ranks hold in the rows `index` of their `tables`: the index, then the rows of each table; a chunk of a rank
        at a time, in the same order on every rank. What is received at a time is bounded by `CHUNK_BYTES`."""
        sizes = self.gather_number(len(index), index.device)
        row_bytes = 8 + sum(table[0].numel() * table.element_size() for table in tables)
        step = max(1, CHUNK_BYTES // (row_bytes * len(sizes)))
        for start in range(0, max(sizes), step):
            at = index[start : start + step]
            padded = index.new_zeros(min(step, max(sizes) - start))
            padded[: len(at)] = at
            columns = [self.gather(x) for x in (padded, *(table.index_select(0, padded) for table in tables))]
            for rank, size in enumerate(sizes):
                if size > start:
                    yield [column[rank][: size - start] for column in columns]
