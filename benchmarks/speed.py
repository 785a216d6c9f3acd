"""What a term costs: time, kernels and memory, as a ratio to the usual composition of torch's own functions.

    python benchmarks/speed.py                # what `make benchmark` runs
    python benchmarks/speed.py --rows KD      # rows whose name contains KD
    python benchmarks/speed.py --device cuda

Forward and backward of each pair are timed in turn in one process; a row shows the median of the ratios of neighbouring runs
with its quartiles. Kernels are the operators that reach the device (views left out). "Kept" is what is held between the passes,
"peak" what is allocated at the most beyond the inputs (CPU: the allocator's record; CUDA: its statistics), in copies of the
logits in float32. A bound is what we hold ourselves to; a row that misses it says so. Writes
`benchmarks/results/speed-<device>.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import aikd_losses
from aikd_losses import CachedTargets, DeterministicKD, LossStack, ProgressiveKD
from aikd_losses.functional import linear_deterministic_kd

RESULTS = Path(__file__).parent / "results"
VIEWS = {"view", "_unsafe_view", "expand", "unsqueeze", "squeeze", "t", "transpose", "permute", "detach", "alias", "slice",
         "select", "split", "as_strided", "_local_scalar_dense", "empty", "empty_like"}  # fmt: skip


@dataclass
class Row:
    """One comparison: functions of the logits that return a loss."""

    name: str
    shape: tuple[int, int]
    ours: Callable[[Tensor], Tensor]
    usual: Callable[[Tensor], Tensor]
    bound: float | None = None
    dtype: torch.dtype = torch.float32
    copy: int = 0  # elements of the unit of memory, if not those of `shape`


def kd(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    log_q, p = F.log_softmax(s / temperature, -1), F.softmax(t / temperature, -1)
    return F.kl_div(log_q, p, reduction="batchmean") * temperature**2


def rows(device: torch.device) -> list[Row]:
    found, term = [], DeterministicKD(temperature=4.0)
    for shape, bound in (
        ((128, 10), 0.85),
        ((128, 100), 0.70),
        ((256, 1000), 0.50),
        ((64, 21841), 0.50),
        ((512, 50257), 0.20),
    ):
        t = torch.randn(shape, device=device)
        found.append(Row("KD, T=4", shape, lambda s, t=t: term(s, t), lambda s, t=t: kd(s, t, 4.0), bound))
    for shape in ((256, 1000), (64, 21841)):
        t = torch.randn(shape, device=device, dtype=torch.bfloat16)
        found.append(
            Row("KD, bfloat16", shape, lambda s, t=t: term(s, t),
                lambda s, t=t: kd(s.float(), t.float(), 4.0), 0.40, torch.bfloat16)
        )  # fmt: skip
    for temperature in (4.0, 1.0):
        for shape, bound in (
            ((128, 100), 0.50 if temperature > 1 else 0.38),
            ((256, 1000), 0.45),
            ((512, 50257), 0.15),
        ):
            found.append(together(shape, temperature, bound, device))
    found.append(with_store(device))
    found.append(linear_heads(device))
    return found


def together(shape: tuple[int, int], temperature: float, bound: float, device: torch.device) -> Row:
    """Cross-entropy, KD and the progressive term, half and half, against three separate losses."""
    n, c = shape
    t, y, index = (
        torch.randn(shape, device=device),
        torch.randint(c, (n,), device=device),
        torch.arange(n, device=device),
    )
    previous = torch.randn(shape, device=device).softmax(-1)
    store = CachedTargets(n, c, dtype=torch.float32, device=device)
    store.write(index, previous)
    stack = LossStack(
        {
            "progressive": ProgressiveKD(store, alpha=0.5, temperature=temperature),
            "kd": DeterministicKD(temperature=temperature),
        },
        weights={"progressive": 0.5, "kd": 0.5},
    ).to(device)

    def usual(s: Tensor) -> Tensor:
        rows = previous.index_select(0, index)
        soft = -(rows * F.log_softmax(s / temperature, -1)).sum(-1).mean() * temperature**2
        return 0.5 * (0.5 * F.cross_entropy(s, y) + 0.5 * soft) + 0.5 * kd(s, t, temperature)

    return Row(
        f"all three, T={temperature:g}", shape,
        lambda s: stack(student_logits=s, teacher_logits=t, target=y, index=index)[0], usual, bound,
    )  # fmt: skip


def with_store(device: torch.device) -> Row:
    """A progressive step, reading and writing 50,000 rows, against PS-KD's rule as it was published: one-hot targets from an
    identity matrix, predictions kept on the CPU."""
    n, c, size = 128, 100, 50_000
    y, index = torch.randint(c, (n,), device=device), torch.randperm(size, device=device)[:n]
    term = ProgressiveKD(CachedTargets(size, c, dtype=torch.float32, device=device), alpha=0.5).to(device)
    kept = torch.zeros(size, c)

    def ours(s: Tensor) -> Tensor:
        loss = term(s, y, index=index)
        term.update(s, index=index)
        return loss

    def usual(s: Tensor) -> Tensor:
        one_hot = torch.eye(c)[y.cpu()]
        target = (0.5 * one_hot + 0.5 * kept[index.cpu()]).to(s.device)
        loss = (-target * F.log_softmax(s, -1)).mean(0).sum()
        for i, row in zip(index.cpu().tolist(), F.softmax(s.detach(), -1).cpu(), strict=True):
            kept[i] = row
        return loss

    return Row("progressive, store", (n, c), ours, usual, 0.60)


def linear_heads(device: torch.device) -> Row:
    """KD of two heads from hidden states, 512 positions of 128 to 50,257 classes, against the logits made whole. The logits are
    the unit of memory here, so s, which is a hundredth of their size, stands for the hidden states."""
    positions, width, classes = 512, 128, 50_257
    weight, other = (torch.randn(classes, width, device=device) / width**0.5 for _ in range(2))
    weight.requires_grad_()
    hidden = torch.randn(positions, width, device=device)

    def ours(s: Tensor) -> Tensor:
        weight.grad = None
        return linear_deterministic_kd(s, weight, hidden, other)

    def usual(s: Tensor) -> Tensor:
        weight.grad = None
        return kd(s @ weight.t(), hidden @ other.t(), 4.0)

    return Row("linear heads, KD", (positions, width), ours, usual, 0.55, copy=positions * classes)


class Kernels(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def kernels(loss: Callable[[Tensor], Tensor], s: Tensor) -> int:
    with Kernels() as mode:
        loss(s).backward()
    return mode.count


def memory(loss: Callable[[Tensor], Tensor], s: Tensor, copy: int = 0) -> tuple[float, float]:
    """What is held after the forward pass, and the most at any time, in copies of the logits in float32."""
    unit = 4 * (copy or s.numel())
    if s.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value = loss(s)
        held = torch.cuda.memory_allocated() - before
        value.backward()
        most = torch.cuda.max_memory_allocated() - before
        return held / unit, most / unit
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        value = loss(s)
    held = _highest(record)[0]
    s.grad = None
    del value
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        loss(s).backward()
    return held / unit, _highest(record)[1] / unit


def _highest(record: torch.profiler.profile) -> tuple[int, int]:
    """Bytes held at the end, and the most of them, counted from the start."""
    held = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return held, most


def seconds(loss: Callable[[Tensor], Tensor], s: Tensor) -> float:
    s.grad = None
    if s.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        loss(s).backward()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    start_s = time.perf_counter()
    loss(s).backward()
    return time.perf_counter() - start_s


def measure(row: Row, device: torch.device, budget: float) -> dict[str, Any]:
    s = torch.randn(row.shape, device=device, dtype=row.dtype).requires_grad_()
    for _ in range(2):  # warm up
        estimate = seconds(row.usual, s) + seconds(row.ours, s)
    pairs = []
    for _ in range(max(7, min(500, int(budget / estimate)))):
        usual, ours = seconds(row.usual, s), seconds(row.ours, s)
        pairs.append((ours, usual))
    ratios = sorted(ours / usual for ours, usual in pairs)
    low, middle, high = statistics.quantiles(ratios, n=4)
    result = {
        "name": row.name, "shape": row.shape, "dtype": str(row.dtype), "bound": row.bound, "ratio": middle,
        "quartiles": [low, high], "runs": len(pairs), "usual_seconds": statistics.median(usual for _, usual in pairs),
    }  # fmt: skip
    for side, loss in (("ours", row.ours), ("usual", row.usual)):
        s.grad = None
        result[side] = {"kernels": kernels(loss, s)}
        s.grad = None
        result[side]["kept"], result[side]["peak"] = memory(loss, s, row.copy)
    return result


def machine(device: torch.device) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else (names or [platform.machine()])[0],
        "threads": torch.get_num_threads(), "cpus": os.cpu_count(), "platform": platform.platform(),
        "python": platform.python_version(), "torch": torch.__version__, "aikd_losses": aikd_losses.__version__,
    }  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu")
    p.add_argument("--rows", default="", help="only rows whose name contains this")
    p.add_argument("--seconds", type=float, default=6.0, help="of timing a row (default 6)")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", type=Path, help="default: benchmarks/results/speed-<device>.json, with all rows")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    console = Console(width=110)
    table = Table(title=f"ours / usual, forward + backward, {device}, {args.threads} thread(s), median (quartiles)")
    for column in ("row", "shape", "time", "bound", "usual, ms", "kernels", "kept", "peak"):
        table.add_column(column, justify="left" if column in ("row", "shape") else "right", no_wrap=True)
    results = []
    for row in rows(device):
        if args.rows not in row.name:
            continue
        r = measure(row, device, args.seconds)
        results.append(r)
        ours, usual = r["ours"], r["usual"]
        bound = "" if row.bound is None else f"{row.bound:.2f}" + (" met" if r["ratio"] <= row.bound else " missed")
        table.add_row(
            row.name, "x".join(map(str, row.shape)), f"{r['ratio']:.2f} ({r['quartiles'][0]:.2f}-{r['quartiles'][1]:.2f})",
            bound, f"{1e3 * r['usual_seconds']:.2f}", f"{ours['kernels']}/{usual['kernels']}",
            f"{ours['kept']:.1f}/{usual['kept']:.1f}", f"{ours['peak']:.1f}/{usual['peak']:.1f}",
        )  # fmt: skip
    console.print(table)
    if args.out is None and args.rows:
        return
    out = args.out or RESULTS / f"speed-{device.type}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n    ".join(json.dumps(r) for r in results)
    out.write_text(f'{{\n  "machine": {json.dumps(machine(device))},\n  "rows": [\n    {lines}\n  ]\n}}\n')
    console.print(f"{out}", highlight=False)


if __name__ == "__main__":
    main()
