"""The collectives that the terms use, all of them no-ops in a single process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # what one exchange holds at a time, a rank


def active() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _reachable(x: Tensor) -> Tensor:
    """`x` on a device that the process group's backend can send from."""
    backend = dist.get_backend()
    if x.device.type == "cpu" and "nccl" in backend and "gloo" not in backend:
        return x.to(torch.device("cuda", torch.cuda.current_device()))
    return x


def sum_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Every tensor summed over the ranks, in one flat all-reduce."""
    if not active():
        return list(tensors)
    flat = _reachable(torch.cat([x.reshape(-1) for x in tensors]))
    dist.all_reduce(flat)
    parts = flat.split([x.numel() for x in tensors])
    return [part.view_as(x).to(x) for part, x in zip(parts, tensors, strict=True)]


def broadcast_from_first(tensors: Sequence[Tensor]) -> None:
    """Every tensor overwritten with rank 0's."""
    for x in tensors:
        sent = _reachable(x.detach().clone())
        dist.broadcast(sent, src=0)
        x.detach().copy_(sent)


def gather_rows(index: Tensor, tables: Sequence[Tensor]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """What all ranks hold in the rows `index` of their `tables`: (index, rows of each table), a chunk of a rank at a
    time, in the same order on every rank. Memory is bounded by `CHUNK_BYTES` a rank."""
    world = dist.get_world_size()
    count = _reachable(torch.tensor([index.numel()], device=index.device))
    counts = [torch.empty_like(count) for _ in range(world)]
    dist.all_gather(counts, count)
    sizes = [int(c) for c in counts]
    row_bytes = 8 + sum(table[0].numel() * table.element_size() for table in tables)
    step = max(1, CHUNK_BYTES // row_bytes)
    for start in range(0, max(sizes), step):
        length = min(step, max(sizes) - start)
        mine = index[start : start + length]
        columns = [_gather(mine, length)]
        columns += [_gather(table.index_select(0, mine), length) for table in tables]
        for rank, size in enumerate(sizes):
            filled = max(0, min(length, size - start))
            if filled:
                rows = [column[rank][:filled].to(index.device) for column in columns]
                yield rows[0], rows[1:]


def _gather(rows: Tensor, length: int) -> list[Tensor]:
    """`rows` of every rank, each padded to `length`; sent as bytes, which every backend knows."""
    sent = torch.zeros((length, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
    sent[: len(rows)] = rows
    sent = _reachable(sent.reshape(length, -1))
    received = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    dist.all_gather([x.view(torch.uint8) for x in received], sent.view(torch.uint8))
    return [x.reshape(length, *rows.shape[1:]) for x in received]
