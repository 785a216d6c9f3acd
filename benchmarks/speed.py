"""What a term costs: time, kernels and memory, as a ratio to the usual composition of torch's own functions.

    python benchmarks/speed.py                # what `make benchmark` runs
    python benchmarks/speed.py --rows KD      # rows whose name contains KD
    python benchmarks/speed.py --device cuda

Forward and backward of each pair are timed in turn in one process; a row shows the median of the ratios of neighbouring runs
with its quartiles. Kernels are the operators that compute something (views and bookkeeping are left out). "Kept" is what is
held between the passes, "peak" what is allocated at the most beyond the inputs (CPU: the allocator's record; CUDA: its
statistics), in copies of the logits in float32. A bound is what we hold ourselves to, in time, kernels, peak or error of the
gradient; a row that misses it says so. KD is timed against other packages too, where they are installed (`PEERS`). Its small
rows have floors, in time to the usual composition: an autograd function that does nothing, and one that does the arithmetic
without a check. On CUDA a row also says what share of the bandwidth of a copy, measured here, its inputs and its gradient get.
Writes `benchmarks/results/speed-<device>.json`.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import RESULTS, machine, write
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from aikd_losses import (
    AdversarialDistributionLoss,
    AIKDLoss,
    CachedTargets,
    DeterministicKD,
    LossStack,
    MLPDiscriminator,
    ProgressiveKD,
)
from aikd_losses.functional import deterministic_kd, linear_deterministic_kd, progressive_kd

NO_KERNELS = {"view", "_unsafe_view", "expand", "unsqueeze", "squeeze", "t", "transpose", "permute", "detach", "alias", "slice",
              "select", "split", "unbind", "as_strided", "_local_scalar_dense", "empty", "empty_like", "promote_types",
              "lift_fresh", "_record_function_enter_new", "_record_function_exit"}  # fmt: skip


Step = Callable[[Tensor], Tensor | None]  # the loss of some logits, or a whole step that needs nothing more


@dataclass
class Row:
    """One comparison of two functions of the logits."""

    name: str
    shape: tuple[int, int]
    ours: Step
    usual: Step
    bound: float | None = None
    dtype: torch.dtype = torch.float32
    copy: int = 0  # elements of the unit of memory, if not those of `shape`
    kernels: int | None = None  # bounds of these
    peak: float | None = None
    error: float | None = None
    exact: Step | None = None  # what the error is of, given float64
    peers: dict[str, Step] = field(default_factory=dict)
    floors: dict[str, Step] = field(default_factory=dict)


class Nothing(torch.autograd.Function):
    """What any autograd function costs."""

    @staticmethod
    def forward(ctx: Any, s: Tensor) -> Tensor:
        ctx.slope = torch.empty_like(s)
        return torch.scalar_tensor(0.0, device=s.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        slope, ctx.slope = ctx.slope, None
        return slope


class Bare(torch.autograd.Function):
    """The arithmetic of `DeterministicKD` where nothing is to be checked, chosen or handed down."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor, temperature: float) -> Tensor:
        s, t = s * (1 / temperature), t * (1 / temperature)
        dim = 0 if s.shape[1] < 32 else 1
        if dim == 0:
            s, t = s.t().contiguous(), t.t().contiguous()
        log_q, p = torch.log_softmax(s, dim), torch.softmax(t, dim)
        terms = torch.log_softmax(t, dim).sub_(log_q)
        scale = temperature / p.shape[1 - dim]
        value = torch.dot(terms.view(-1), p.view(-1)) * (temperature * scale)
        slope = torch._log_softmax_backward_data(p.mul_(-scale), log_q, dim, s.dtype)
        ctx.slope = slope if dim else slope.t().contiguous()
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        slope, ctx.slope = ctx.slope, None
        return slope.mul_(grad), None, None


def kd(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    log_q, p = F.log_softmax(s / temperature, -1), F.softmax(t / temperature, -1)
    return F.kl_div(log_q, p, reduction="batchmean") * temperature**2


def torchdistill(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    from torchdistill.losses.mid_level import KDLoss

    loss = KDLoss("head", "output", "head", "output", temperature=temperature, alpha=0.0)
    return lambda s, t: loss({"head": {"output": s}}, {"head": {"output": t}})


def torchtune(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy to the teacher: KL but for a constant, which the gradient does not see."""
    from torchtune.modules.loss import ForwardKLLoss

    loss = ForwardKLLoss()

    def kd(s: Tensor, t: Tensor) -> Tensor:
        labels = torch.zeros(len(s), dtype=torch.int64, device=s.device)
        return loss(s / temperature, t / temperature, labels) * temperature**2

    return kd


def liger(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    from liger_kernel.transformers import LigerKLDIVLoss

    loss = LigerKLDIVLoss(reduction="batchmean")
    return lambda s, t: loss(F.log_softmax(s / temperature, -1), F.softmax(t / temperature, -1)) * temperature**2


def metric_learning(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    import pytorch_metric_learning  # noqa: F401

    raise ImportError("its losses are of embeddings, none is KD of logits")


PEERS = {
    "torchdistill": torchdistill,
    "torchtune": torchtune,
    "liger-kernel": liger,
    "pytorch-metric-learning": metric_learning,
}


def peers(temperature: float, say: Callable[[str], None]) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Other packages' KD, where they import; a line for each that does not."""
    found = {}
    for name, make in PEERS.items():
        try:
            found[name] = make(temperature)
        except Exception as error:  # whatever another package raises
            say(f"skipped {name}: {str(error).strip().splitlines()[-1].strip() or type(error).__name__}")
    return found


def rows(device: torch.device, say: Callable[[str], None] = lambda line: None) -> Iterator[Row]:
    term, others = DeterministicKD(temperature=4.0), peers(4.0, say)
    for shape, bound in (
        ((128, 10), 0.85),
        ((128, 100), 0.70),
        ((256, 1000), 0.50),
        ((64, 21841), 0.50),
        ((512, 50257), 0.20),
    ):
        t = torch.randn(shape, device=device)
        row = Row("KD, T=4", shape, lambda s, t=t: term(s, t), lambda s, t=t: kd(s, t, 4.0), bound)
        row.peers = {name: lambda s, t=t, loss=loss: loss(s, t) for name, loss in others.items()}
        row.kernels = 12 if shape == (128, 100) else None
        row.peak = 1.5 if shape[1] > 10_000 else None
        if shape[0] == 128:
            row.floors = {"nothing": Nothing.apply, "arithmetic": lambda s, t=t: Bare.apply(s, t, 4.0)}
        yield row
    for shape in ((256, 1000), (64, 21841)):
        t = torch.randn(shape, device=device, dtype=torch.bfloat16)
        yield Row("KD, bfloat16", shape, lambda s, t=t: term(s, t),
                lambda s, t=t: kd(s.float(), t.float(), 4.0), 0.40, torch.bfloat16, error=2e-3,
                exact=lambda s, t=t: kd(s, t.double(), 4.0))  # fmt: skip
    for temperature in (4.0, 1.0):
        for shape, bound in (
            ((128, 100), 0.50 if temperature > 1 else 0.38),
            ((256, 1000), 0.45),
            ((512, 50257), 0.15),
        ):
            yield together(shape, temperature, bound, device)
    for make in (with_store, adversarial, linear_heads, by_hand, resnet_step):
        yield make(device)


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
    store.advance_epoch()
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
        kernels=(22 if temperature > 1 else 15) if shape == (128, 100) else None,
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

    return Row("linear heads, KD", (positions, width), ours, usual, 0.55, copy=positions * classes, peak=1.0)


def adversarial(device: torch.device) -> Row:
    """Both updates of the non-saturating game, with a discriminator of (64, 64), against the usual two passes with Adam."""
    n, c = 128, 100
    t = torch.randn(n, c, device=device)
    first, second = (MLPDiscriminator(c).to(device) for _ in range(2))
    adam = torch.optim.Adam(first.parameters(), lr=1e-3, betas=(0.5, 0.9), fused=True)
    usual_adam = torch.optim.Adam(second.parameters(), lr=1e-3, betas=(0.5, 0.9))
    term = AdversarialDistributionLoss(first, optimizer=adam)
    one, zero = torch.ones(n, device=device), torch.zeros(n, device=device)

    def ours(s: Tensor) -> None:
        term(s, t).backward()
        term.update(s, t)

    def usual(s: Tensor) -> None:
        p, q = F.softmax(t, -1), F.softmax(s, -1)
        F.binary_cross_entropy_with_logits(second(q), one).backward()
        usual_adam.zero_grad()
        loss = F.binary_cross_entropy_with_logits(second(p), one)
        (loss + F.binary_cross_entropy_with_logits(second(q.detach()), zero)).backward()
        usual_adam.step()

    return Row("adversarial step", (n, c), ours, usual, 0.90, kernels=50)


def by_hand(device: torch.device) -> Row:
    """`AIKDLoss`, against its functions called one by one and added up."""
    n, c = 128, 10
    t, y = torch.randn(n, c, device=device), torch.randint(c, (n,), device=device)
    index = torch.arange(n, device=device)
    criterion = AIKDLoss(n, c, num_epochs=10).to(device)
    criterion.update(student_logits=torch.randn(n, c, device=device), teacher_logits=t, index=index)
    criterion.advance_epoch()
    progressive, adversary = criterion.terms["progressive"], criterion.terms["adversarial"]
    alpha = float(progressive.alpha)
    w = 0.5 / (1 - alpha)

    def usual(s: Tensor) -> Tensor:
        rows, known = progressive.targets.read(index)
        soft = progressive_kd(s, rows, y, alpha=alpha, known=known)
        return w * soft + 0.5 * deterministic_kd(s, t, temperature=2.0) + adversary.student_loss(s, t)

    given = {"teacher_logits": t, "target": y, "index": index}
    return Row("AIKDLoss, by hand", (n, c), lambda s: criterion(student_logits=s, **given)[0], usual, 1.10)


class Residual(nn.Module):
    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(fan_out) for _ in range(2))
        self.skip = nn.Conv2d(fan_in, fan_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](self.first(x)).relu()
        return (self.norms[1](self.second(y)) + self.skip(x)).relu()


def resnet_step(device: torch.device) -> Row:
    """A whole training step of a ResNet of three blocks (16, 32, 64) on 64 images of 3x32x32 and 100 classes: every term, with
    the teacher's logits at hand and both updates, against cross-entropy."""
    n, c = 64, 100
    x, y = torch.randn(n, 3, 32, 32, device=device), torch.randint(c, (n,), device=device)
    t, index = torch.randn(n, c, device=device), torch.arange(n, device=device)
    criterion = AIKDLoss(n, c, num_epochs=10).to(device)

    def new() -> tuple[nn.Module, torch.optim.Optimizer]:
        blocks = [Residual(3, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)]
        net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, c)).to(device)
        return net, torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

    (first, sgd), (second, usual_sgd) = new(), new()

    def ours(_: Tensor) -> None:
        s = first(x)
        loss, _ = criterion(student_logits=s, teacher_logits=t, target=y, index=index)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        criterion.update(student_logits=s, teacher_logits=t, index=index)

    def usual(_: Tensor) -> None:
        loss = F.cross_entropy(second(x), y)
        usual_sgd.zero_grad()
        loss.backward()
        usual_sgd.step()

    return Row("ResNet step", (n, c), ours, usual, 1.12)


def finish(value: Tensor | None) -> None:
    if value is not None:
        value.backward()


class Kernels(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in NO_KERNELS
        return func(*args, **(kwargs or {}))


def kernels(loss: Step, s: Tensor) -> int:
    with Kernels() as mode:
        finish(loss(s))
    return mode.count


def gradient_error(loss: Step, exact: Step, s: Tensor) -> float:
    """Of the gradient, relative to that of the other loss in float64."""
    wide = s.detach().double().requires_grad_()
    s.grad = None
    finish(loss(s))
    finish(exact(wide))
    return float((s.grad.double() - wide.grad).norm() / wide.grad.norm())


def memory(loss: Step, s: Tensor, copy: int = 0) -> tuple[float, float]:
    """What is held after the forward pass, and the most at any time, in copies of the logits in float32."""
    unit = 4 * (copy or s.numel())
    if s.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value = loss(s)
        held = torch.cuda.memory_allocated() - before
        finish(value)
        most = torch.cuda.max_memory_allocated() - before
        return held / unit, most / unit
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        value = loss(s)
    held = _highest(record)[0]
    s.grad = None
    del value
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        finish(loss(s))
    return held / unit, _highest(record)[1] / unit


def _highest(record: torch.profiler.profile) -> tuple[int, int]:
    """Bytes held at the end, and the most of them, counted from the start."""
    held = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return held, most


def seconds(loss: Step, s: Tensor) -> float:
    s.grad = None
    if s.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        finish(loss(s))
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    start_s = time.perf_counter()
    finish(loss(s))
    return time.perf_counter() - start_s


def measure(row: Row, device: torch.device, budget: float) -> dict[str, Any]:
    s = torch.randn(row.shape, device=device, dtype=row.dtype).requires_grad_()
    for _ in range(2):  # warm up
        estimate = seconds(row.usual, s) + seconds(row.ours, s)
    runs = max(7, min(500, int(budget / estimate)))
    usual, ours = in_turn(row.usual, row.ours, s, runs)
    ratio, quartiles = ratios(ours, usual)
    # A pair at a time: what a third one leaves in the caches would count for one side and against the other.
    peers = {name: ratios(*in_turn(row.ours, loss, s, runs)) for name, loss in row.peers.items()}
    floors = {name: ratios(*in_turn(loss, row.usual, s, runs)) for name, loss in row.floors.items()}
    result = {
        "name": row.name, "shape": row.shape, "dtype": str(row.dtype), "bound": row.bound, "ratio": ratio,
        "quartiles": quartiles, "runs": len(ours), "usual_seconds": statistics.median(usual),
        "bounds": {"kernels": row.kernels, "peak": row.peak, "error": row.error},
        "peers": {name: dict(zip(("ratio", "quartiles"), found, strict=True)) for name, found in peers.items()},
        "floors": {name: dict(zip(("ratio", "quartiles"), found, strict=True)) for name, found in floors.items()},
    }  # fmt: skip
    if row.error is not None:
        result["error"] = gradient_error(row.ours, row.exact, s)
    if s.is_cuda:
        moved = 3 * s.numel() * s.element_size()  # both logits read, the gradient written
        result["share_of_copy_bandwidth"] = moved / statistics.median(ours) / copy_bandwidth(device)
    for side, loss in (("ours", row.ours), ("usual", row.usual)):
        s.grad = None
        result[side] = {"kernels": kernels(loss, s)}
        s.grad = None
        result[side]["kept"], result[side]["peak"] = memory(loss, s, row.copy)
    return result


def in_turn(first: Step, second: Step, s: Tensor, runs: int) -> tuple[list[float], list[float]]:
    """The seconds of both, timed in turn."""
    pairs = [(seconds(first, s), seconds(second, s)) for _ in range(runs + 1)][1:]  # the first one warms up
    return [a for a, _ in pairs], [b for _, b in pairs]


def ratios(ours: list[float], others: list[float]) -> tuple[float, list[float]]:
    """The median of the ratios of neighbouring runs, and its quartiles."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(ours, others, strict=True)], n=4)
    return middle, [low, high]


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a copy of 1 GB."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    into, times = torch.empty_like(source), []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        into.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * source.numel() / statistics.median(times)


def verdict(row: Row, result: dict[str, Any]) -> str:
    """Each bound of a row, met or missed."""
    found = []
    for name, bound, value in (
        ("", row.bound, result["ratio"]),
        ("kernels ", row.kernels, result["ours"]["kernels"]),
        ("peak ", row.peak, result["ours"]["peak"]),
        ("error ", row.error, result.get("error")),
    ):
        if bound is not None:
            found.append(f"{name}{bound:g} {'met' if value <= bound else 'missed'}")
    return ", ".join(found)


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
    console = Console(width=128)
    table = Table(title=f"ours / usual, forward + backward, {device}, {args.threads} thread(s), median (quartiles)")
    for column in ("row", "shape", "time", "bounds", "usual, ms", "kernels", "kept", "peak"):
        table.add_column(column, justify="right" if column not in ("row", "shape", "bounds") else "left")
    results = []
    for row in rows(device, console.print):
        if args.rows not in row.name:
            continue
        r = measure(row, device, args.seconds)
        results.append(r)
        ours, usual = r["ours"], r["usual"]
        table.add_row(
            row.name, "x".join(map(str, row.shape)), f"{r['ratio']:.2f} ({r['quartiles'][0]:.2f}-{r['quartiles'][1]:.2f})",
            verdict(row, r), f"{1e3 * r['usual_seconds']:.2f}", f"{ours['kernels']}/{usual['kernels']}",
            f"{ours['kept']:.1f}/{usual['kept']:.1f}", f"{ours['peak']:.1f}/{usual['peak']:.1f}",
        )  # fmt: skip
        for name, peer in r["peers"].items():
            low, high = peer["quartiles"]
            table.add_row(f"  against {name}", "", f"{peer['ratio']:.2f} ({low:.2f}-{high:.2f})")
        for name, floor in r["floors"].items():
            low, high = floor["quartiles"]
            table.add_row(f"  floor: {name}", "", f"{floor['ratio']:.2f} ({low:.2f}-{high:.2f})")
    console.print(table)
    if args.out is None and args.rows:
        return
    out = args.out or RESULTS / f"speed-{device.type}.json"
    installed = {name: version(name) for name in PEERS if find_spec(name.replace("-", "_"))}
    write(out, {"machine": machine(device) | {"installed": installed}}, "rows", results)
    console.print(f"{out}", highlight=False)


if __name__ == "__main__":
    main()
