"""What the losses cost in time and memory, forward and backward, against the usual composition of torch's own functions.

    python benchmarks/speed.py                # what `make benchmark` runs
    python benchmarks/speed.py --rows KD      # rows whose name contains KD; writes nothing
    python benchmarks/speed.py --device cuda  # every row eager and compiled, and those that a CPU is too slow for

Both sides of a row run in turn in one process; `ratio` is the median of ours / usual over neighbouring runs, with quartiles.
Kernels are the operators that compute something (views and bookkeeping are left out), on a GPU what its profiler saw launched.
"Kept" is what is held between the passes, "peak" the most that is allocated beyond the inputs (CPU: the allocator's record;
CUDA: its statistics), in copies of the logits in float32. "Bandwidth" is the time in units of what a GPU needs to move the
fewest bytes: each side read by the forward and the backward pass, a gradient written, at the rate of a large copy. The bounds
are what we hold ourselves to; a row that misses one says so, with its operators if there are too many. KD is also timed against
other packages, where they are installed.

Writes `benchmarks/results/speed-<device>.json` after each row, and from it the tables of docs/speed.md and docs/gpu.md;
`--resume` keeps the rows that are there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import RESULTS, filled, machine, write
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from aikd_losses import (
    AdversarialDistributionLoss,
    AIKDLoss,
    CachedTargets,
    DeterministicKD,
    FrozenTeacher,
    GradientPenalty,
    LossStack,
    MLPDiscriminator,
    ProgressiveKD,
)
from aikd_losses.functional import linear_deterministic_kd

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from _networks import Block, resnet18

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {"cpu": DOCS / "speed.md", "cuda": DOCS / "gpu.md"}
NO_KERNELS = {"view", "_unsafe_view", "expand", "unsqueeze", "squeeze", "t", "transpose", "permute", "detach", "alias", "slice",
              "select", "split", "unbind", "as_strided", "_local_scalar_dense", "empty", "empty_like", "new_empty",
              "promote_types", "lift_fresh", "_record_function_enter_new", "_record_function_exit"}  # fmt: skip

Step = Callable[[Tensor], Tensor | None]  # the loss of some logits, or a whole step that needs nothing more
Pair = Callable[[Tensor, Tensor], Tensor]
Compile = Callable[[Any], Any]  # torch.compile, or nothing


@dataclass
class Row:
    """One comparison of two functions of the logits."""

    name: str
    shape: tuple[int, int]
    ours: Step
    usual: Step
    bounds: dict[str, float] = field(default_factory=dict)  # of time and memory (ratios), kernels, peak, bandwidth
    dtype: torch.dtype = torch.float32
    copy: int = 0  # elements of the unit of memory, if not those of `shape`
    exact: Step | None = None  # what the error of our gradient is of, given float64
    peers: dict[str, Step] = field(default_factory=dict)
    bytes: int = 0  # the fewest that have to be moved, where that is what takes the time
    compiled: bool = False


def kd(s: Tensor, t: Tensor, temperature: float = 4.0) -> Tensor:
    log_q, p = F.log_softmax(s / temperature, -1), F.softmax(t / temperature, -1)
    return F.kl_div(log_q, p, reduction="batchmean") * temperature**2


def torchdistill() -> Pair:
    from torchdistill.losses.mid_level import KDLoss

    loss = KDLoss("head", "output", "head", "output", temperature=4.0, alpha=0.0)
    return lambda s, t: loss({"head": {"output": s}}, {"head": {"output": t}})


def liger() -> Pair:
    from liger_kernel.transformers import LigerKLDIVLoss

    loss = LigerKLDIVLoss(reduction="batchmean")
    return lambda s, t: loss(F.log_softmax(s / 4.0, -1), F.softmax(t / 4.0, -1)) * 16.0


PEERS = {"torchdistill": torchdistill, "liger-kernel": liger}


def peers() -> dict[str, Pair]:
    """Other packages' KD, where they import; a line for each that does not."""
    found = {}
    for name, make in PEERS.items():
        try:
            found[name] = make()
        except Exception as error:  # whatever another package raises
            print(f"skipped {name}: {str(error).strip().splitlines()[-1].strip() or type(error).__name__}")
    return found


def as_it_is(function: Any) -> Any:
    return function


def rows(device: torch.device, faster: Compile = as_it_is, small: int = 1) -> Iterator[Row]:
    """All of them, by functions that went through `faster`; on shapes a `small`th in each axis."""
    size = lambda *shape: tuple(max(2, n // small) for n in shape)  # noqa: E731
    on_cpu, others = device.type == "cpu", peers() if faster is as_it_is else {}
    term = DeterministicKD(temperature=4.0)
    for shape, bounds in (
        ((128, 10), {"time": 1.10, "kernels": 16}),
        ((128, 100), {"time": 1.00, "kernels": 16}),
        ((256, 1000), {"time": 0.55}),
        ((64, 21841), {"time": 0.45, "peak": 1.5}),
        ((512, 50257), {"time": 0.25, "peak": 1.5}),
    ):
        t = torch.randn(size(*shape), device=device)
        theirs = {name: partial(loss, t=t) for name, loss in others.items()}
        yield Row("KD", t.shape, faster(lambda s, t=t: term(s, t)), faster(lambda s, t=t: kd(s, t)),
                  bounds if on_cpu else {}, peers=theirs)  # fmt: skip
    t = torch.randn(size(256, 1000), device=device)
    yield Row(
        "KD, near", t.shape, faster(lambda s, t=t: term(t + 0.1 * s, t)), faster(lambda s, t=t: kd(t + 0.1 * s, t))
    )
    for name in ("reverse_kl", "js"):
        other = DeterministicKD(temperature=4.0, divergence=name)
        usual = faster(lambda s, t=t, name=name: backwards(s, t, name))
        yield Row(f"KD, {name}", t.shape, faster(lambda s, t=t, other=other: other(s, t)), usual)
    for shape in ((256, 1000), (64, 21841), *(() if on_cpu else ((8192, 50257),))):
        t = torch.randn(size(*shape), device=device, dtype=torch.bfloat16)
        large, compiled = shape[0] > 1000, faster is not as_it_is
        yield Row("KD, bfloat16", t.shape, faster(lambda s, t=t: term(s, t)),
                  faster(lambda s, t=t: kd(s.float(), t.float())), {"bandwidth": 1.2} if large and compiled else {},
                  dtype=torch.bfloat16, exact=None if large else partial(kd, t=t.double()),
                  bytes=5 * t.numel() * t.element_size() if large else 0)  # fmt: skip
    yield together(size(128, 100), device, faster, {"kernels": 55} if on_cpu else {})
    yield together(size(64, 21841), device, faster, {})
    yield with_store(size(128, 100), size(50_000)[0], device, faster)
    yield from adversarial(size(128, 100), device, faster)
    for shape in ((128, 100), (256, 1000)):
        yield method(size(*shape), device, faster)
    yield linear_heads(size(*(512, 128, 50_257) if on_cpu else (8192, 1024, 50_257)), device, faster)
    yield from resnet_steps(size(64 if on_cpu else 512)[0], device, faster)


def backwards(s: Tensor, t: Tensor, name: str) -> Tensor:
    """Reverse KL and Jensen-Shannon, as they are usually written, in float32."""
    log_p, log_q = F.log_softmax(t / 4.0, -1), F.log_softmax(s / 4.0, -1)
    to = partial(F.kl_div, reduction="batchmean", log_target=True)
    if name == "reverse_kl":
        return to(log_p, log_q) * 16.0
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (0.5 * to(log_m, log_p) + 0.5 * to(log_m, log_q)) * 16.0


def together(shape: tuple[int, int], device: torch.device, faster: Compile, bounds: dict[str, float]) -> Row:
    """Cross-entropy, KD and the progressive term, half and half, against three separate losses."""
    n, c = shape
    t, y = torch.randn(shape, device=device), torch.randint(c, (n,), device=device)
    previous, index = torch.randn(shape, device=device).softmax(-1), torch.arange(n, device=device)
    store = CachedTargets(n, c, dtype=torch.float32, device=device)
    store.write(index, previous)
    store.advance_epoch()
    terms = {"progressive": ProgressiveKD(store, alpha=0.5, temperature=4.0), "kd": DeterministicKD(temperature=4.0)}
    stack = LossStack(terms, weights={"progressive": 0.5, "kd": 0.5}).to(device)

    def usual(s: Tensor) -> Tensor:
        soft = -(previous.index_select(0, index) * F.log_softmax(s / 4.0, -1)).sum(-1).mean() * 16.0
        return 0.5 * (0.5 * F.cross_entropy(s, y) + 0.5 * soft) + 0.5 * kd(s, t)

    given = {"teacher_logits": t, "target": y, "index": index}
    ours = faster(lambda s: stack(student_logits=s, **given)[0])
    return Row("CE, KD and progressive", shape, ours, faster(usual), bounds)


def with_store(shape: tuple[int, int], size: int, device: torch.device, faster: Compile) -> Row:
    """A progressive step, reading and writing `size` rows, against PS-KD's rule as it was published: one-hot targets from an
    identity matrix, predictions kept on the CPU."""
    n, c = shape
    y, index = torch.randint(c, (n,), device=device), torch.randperm(size, device=device)[:n]
    term = ProgressiveKD(CachedTargets(size, c, dtype=torch.float32, device=device), alpha=0.5).to(device)
    loss_of, kept = faster(term), torch.zeros(size, c)

    def ours(s: Tensor) -> Tensor:
        loss = loss_of(s, y, index=index)
        term.update(s, index=index)
        return loss

    def usual(s: Tensor) -> Tensor:
        target = (0.5 * torch.eye(c)[y.cpu()] + 0.5 * kept[index.cpu()]).to(s.device)
        loss = (-target * F.log_softmax(s, -1)).mean(0).sum()
        for i, row in zip(index.cpu().tolist(), F.softmax(s.detach(), -1).cpu(), strict=True):
            kept[i] = row
        return loss

    return Row("progressive, store", shape, ours, usual)


def adam(discriminator: nn.Module, **settings: Any) -> torch.optim.Adam:
    return torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.9), **settings)


def usual_update(d: nn.Module, optimizer: torch.optim.Optimizer, s: Tensor, t: Tensor) -> None:
    """The discriminator's step of the Wasserstein game with a gradient penalty, as it is usually written."""
    p, q = F.softmax(t, -1), F.softmax(s.detach(), -1)
    u = torch.rand(len(s), 1, device=s.device)
    between = (u * p + (1 - u) * q).requires_grad_()
    (slope,) = torch.autograd.grad(d(between).sum(), between, create_graph=True)
    optimizer.zero_grad()
    (d(q).mean() - d(p).mean() + 10.0 * (slope.norm(dim=-1) - 1).square().mean()).backward()
    optimizer.step()


def adversarial(shape: tuple[int, int], device: torch.device, faster: Compile) -> Iterator[Row]:
    """Both updates of that game with a discriminator of (64, 64), and the discriminator's alone: also, on a GPU, as a graph."""
    t, eager = torch.randn(shape, device=device), faster is as_it_is

    def term(**settings: Any) -> AdversarialDistributionLoss:
        d = MLPDiscriminator(shape[1]).to(device)
        given = dict(objective="wasserstein", penalty=GradientPenalty(10.0), optimizer=adam(d, **settings))
        return AdversarialDistributionLoss(d, **given)

    first, second = term(), MLPDiscriminator(shape[1]).to(device)
    of_second, loss_of = adam(second), faster(first)

    def ours(s: Tensor) -> None:
        loss_of(s, t).backward()
        first.update(s, t)

    def usual(s: Tensor) -> None:
        (-second(F.softmax(s, -1)).mean()).backward()
        usual_update(second, of_second, s, t)

    yield Row("adversarial step", shape, ours, usual, {"kernels": 65} if device.type == "cpu" else {})
    if eager:  # as no compiler reaches `update`
        yield Row("adversarial update", shape, lambda s: void(first.update(s, t)),
                  lambda s: usual_update(second, of_second, s, t))  # fmt: skip
    if eager and device.type == "cuda":
        third, given = term(capturable=True), torch.randn(shape, device=device)
        graphs: list[torch.cuda.CUDAGraph] = []

        def replayed(s: Tensor) -> None:
            if not graphs:
                graphs.append(captured(lambda: third.update(given, t))[0])
            given.copy_(s.detach())
            graphs[0].replay()

        yield Row("adversarial update, CUDA graph", shape, replayed, lambda s: usual_update(second, of_second, s, t))


def void(_: object) -> None:
    """What a step that needs nothing more gives."""


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """As torch's notes on CUDA graphs say: warmed up on another stream, then recorded. What it returns lies where each replay
    puts it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def method(shape: tuple[int, int], device: torch.device, faster: Compile) -> Row:
    """All losses of a step of `AIKDLoss`, its backward pass and all updates, against the same put together by hand."""
    n, c = shape
    t, y, index = (
        torch.randn(shape, device=device),
        torch.randint(c, (n,), device=device),
        torch.arange(n, device=device),
    )
    criterion = AIKDLoss(n, c, num_epochs=10).to(device)
    loss_of, given = faster(criterion), {"teacher_logits": t, "index": index}
    d, kept = MLPDiscriminator(c).to(device), torch.zeros(n, c, device=device)
    of_d = adam(d)

    def loss(s: Tensor, previous: Tensor) -> Tensor:
        q, log_q = F.softmax(s, -1), F.log_softmax(s, -1)
        blend = 0.92 * F.cross_entropy(s, y) - 0.08 * (previous * log_q).sum(-1).mean()
        return 0.5 * blend + 0.5 * kd(s, t, 2.0) - d(q).mean()

    usual_loss = faster(loss)

    def ours(s: Tensor) -> None:
        loss_of(student_logits=s, target=y, **given)[0].backward()
        criterion.update(student_logits=s, **given)

    def usual(s: Tensor) -> None:
        usual_loss(s, kept.index_select(0, index)).backward()
        kept.index_copy_(0, index, F.softmax(s.detach(), -1))
        usual_update(d, of_d, s, t)

    return Row("AIKDLoss, all updates", shape, ours, usual)


def linear_heads(shape: tuple[int, int, int], device: torch.device, faster: Compile) -> Row:
    """KD of two heads from hidden states, positions of a width to classes, against the logits made whole. The logits are the
    unit of memory here; s stands for the hidden states. On a GPU all of it in bfloat16, the logits made whole too. (Compiled,
    ours makes them whole as well.)"""
    positions, width, classes = shape
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    weight, other = (torch.randn(classes, width, device=device, dtype=dtype) / width**0.5 for _ in range(2))
    weight.requires_grad_()
    hidden = torch.randn(positions, width, device=device, dtype=dtype)
    loss = faster(lambda s, w: linear_deterministic_kd(s, w, hidden, other, temperature=4.0))
    usual_loss = faster(lambda s, w: kd((s @ w.t()).float(), (hidden @ other.t()).float()))

    def ours(s: Tensor) -> Tensor:
        weight.grad = None
        return loss(s, weight)

    def usual(s: Tensor) -> Tensor:
        weight.grad = None
        return usual_loss(s, weight)

    bounds = (
        {"time": 0.60, "peak": 1.0}
        if device.type == "cpu"
        else {"time": 1.0, "memory": 0.4}
        if faster is as_it_is
        else {}
    )
    return Row("linear heads, KD", (positions, width), ours, usual, bounds, dtype, copy=positions * classes)


def resnet_steps(n: int, device: torch.device, faster: Compile) -> Iterator[Row]:
    """A whole training step on images of 3x32x32 and 100 classes, with all terms and updates, against cross-entropy: on a CPU
    of three blocks (16, 32, 64), the teacher's logits at hand; on others a ResNet-18 in bfloat16, whose teacher runs in each
    step, in that of cross-entropy too or not."""
    c, on_cpu = 100, device.type == "cpu"
    x, y = torch.randn(n, 3, 32, 32, device=device), torch.randint(c, (n,), device=device)
    given = {"target": y, "index": torch.arange(n, device=device)}

    def new() -> nn.Module:
        if not on_cpu:
            return resnet18(3, 32, c).to(device, memory_format=torch.channels_last)
        blocks = [nn.Conv2d(3, 16, 3, 1, 1), Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
        return nn.Sequential(
            *blocks, nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, c)
        )

    known = torch.randn(n, c, device=device)
    teacher = faster(FrozenTeacher(new())) if not on_cpu else lambda _: known
    x = x if on_cpu else x.to(memory_format=torch.channels_last)

    def step(terms: bool, taught: bool) -> Step:
        net = new()
        criterion = AIKDLoss(n, c, num_epochs=10).to(device) if terms else nn.CrossEntropyLoss()
        network, loss_of, sgd = faster(net), faster(criterion), torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

        def stepped(_: Tensor) -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=not on_cpu):
                t = teacher(x) if taught else None
                s = network(x)
            tensors = {"student_logits": s, "teacher_logits": t, "index": given["index"]}
            loss = loss_of(**tensors, target=y)[0] if terms else loss_of(s, y)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            if terms:
                criterion.update(**tensors)

        return stepped

    if on_cpu:
        yield Row("ResNet step", (n, c), step(True, True), step(False, False), {"time": 1.10})
    else:
        ours = step(True, True)
        yield Row("ResNet-18 step, bfloat16", (n, c), ours, step(False, False))
        yield Row("the same, both with a teacher", (n, c), ours, step(False, True), {"time": 1.05})


def run(loss: Step, s: Tensor) -> None:
    s.grad = None
    value = loss(s)
    if value is not None:
        value.backward()


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def kernels(loss: Step, s: Tensor) -> Counter[str]:
    if s.is_cuda:
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as record:
            run(loss, s)
            torch.cuda.synchronize()
        on_gpu = [event for event in record.events() if event.device_type.name == "CUDA"]
        found = Counter(event.name[:60] for event in on_gpu if not getattr(event, "is_user_annotation", False))
        if not found:
            print("the profiler saw no kernel: launches are unknown here")
        return found
    with Operators() as mode:
        run(loss, s)
    return Counter({name: count for name, count in mode.found.items() if name not in NO_KERNELS})


def bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written."""
    x = torch.empty(2**30, dtype=torch.uint8, device=device)
    y, times = torch.empty_like(x), []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        y.copy_(x)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * x.numel() / statistics.median(times)


def gradient_error(loss: Step, exact: Step, s: Tensor) -> float:
    """Of the gradient, relative to that of the other loss in float64."""
    wide = s.detach().double().requires_grad_()
    run(loss, s)
    run(exact, wide)
    return float((s.grad.double() - wide.grad).norm() / wide.grad.norm())


def memory(loss: Step, s: Tensor, copy: int = 0) -> tuple[float, float]:
    """What is held after the forward pass, and the most at any time, in copies of the logits in float32."""
    unit = 4 * (copy or s.numel())
    s.grad = None
    if s.is_cuda:
        before = torch.cuda.memory_allocated()
        value = loss(s)
        held = torch.cuda.memory_allocated() - before
        del value
        s.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(loss, s)
        return held / unit, (torch.cuda.max_memory_allocated() - before) / unit
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        value = loss(s)
    held = _highest(record)[0]
    del value
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        run(loss, s)
    return held / unit, _highest(record)[1] / unit


def _highest(record: torch.profiler.profile) -> tuple[int, int]:
    """Bytes held at the end, and the most of them, counted from the start."""
    held = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return held, most


def seconds(loss: Step, s: Tensor, ahead: Tensor | None = None) -> float:
    """Of a run; of a GPU that has work `ahead`, what the GPU needs for it, and not how fast it is told."""
    if s.is_cuda:
        if ahead is not None:
            ahead.mul_(1.0)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(loss, s)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start_s = clock()
    run(loss, s)
    return clock() - start_s


def in_turn(ours: Step, other: Step, s: Tensor, runs: int, ahead: Tensor | None = None) -> dict[str, Any]:
    """Both timed in turn: the median of the ratios of neighbouring runs, its quartiles, and both medians."""
    pairs = [(seconds(ours, s, ahead), seconds(other, s, ahead)) for _ in range(runs + 2)][2:]  # the first ones warm up
    low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    first, second = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {"ratio": middle, "quartiles": [low, high], "seconds": [first, second], "runs": runs}


def measure(row: Row, device: torch.device, budget: float, rate: float = 0.0) -> dict[str, Any]:
    s = torch.randn(row.shape, device=device, dtype=row.dtype).requires_grad_()
    for _ in range(2):  # warm up
        estimate = seconds(row.usual, s) + seconds(row.ours, s)
    runs = max(7, min(500, int(budget / estimate)))
    ahead = torch.empty(2**28, device=device) if row.bytes and s.is_cuda else None  # a GB: about a millisecond
    result = {"name": row.name, "shape": row.shape, "bounds": row.bounds}
    result |= in_turn(row.ours, row.usual, s, runs, ahead)
    del ahead
    # A pair at a time: what a third one leaves in the caches would count for one side and against the other.
    result["peers"] = {name: in_turn(row.ours, loss, s, runs) for name, loss in row.peers.items()}
    if row.bytes and rate:
        result["bandwidth"] = [seconds_ / (row.bytes / rate) for seconds_ in result["seconds"]]
    if row.exact is not None:
        result["error"] = gradient_error(row.ours, row.exact, s)
    for side, loss in (("ours", row.ours), ("usual", row.usual)):
        operators = (
            Counter() if row.compiled and device.type == "cpu" else kernels(loss, s)
        )  # a mode stops the compiler
        kept, peak = memory(loss, s, row.copy)
        result[side] = {
            "kernels": operators.total(),
            "kept": kept,
            "peak": peak,
            "operators": dict(operators.most_common(20)),
        }
    return result


def verdict(result: dict[str, Any]) -> str:
    """Each bound of a row, met or missed."""
    found = {"time": result["ratio"], "bandwidth": result.get("bandwidth", [math.nan])[0], **result["ours"]}
    found["memory"] = result["ours"]["peak"] / max(1e-9, result["usual"]["peak"])
    said = (
        f"{name} {bound:g} {'met' if found[name] <= bound else 'MISSED'}" for name, bound in result["bounds"].items()
    )
    return ", ".join(said)


def shown(result: dict[str, Any]) -> str:
    ours, usual = result["ours"], result["usual"]
    lines = [
        f"{result['name']}, {'x'.join(map(str, result['shape']))}: {ratio(result)} of {1e3 * result['seconds'][1]:.2f} ms, "
        f"kernels {ours['kernels']}/{usual['kernels']}, kept {ours['kept']:.1f}/{usual['kept']:.1f}, "
        f"peak {ours['peak']:.1f}/{usual['peak']:.1f}; {verdict(result)}"
    ]
    lines += [f"    against {name}: {ratio(peer)}" for name, peer in result["peers"].items()]
    if "error" in result:
        lines.append(f"    error of the gradient: {result['error']:.1e}")
    if ours["kernels"] > result["bounds"].get("kernels", float("inf")):
        lines.append("    " + ", ".join(f"{count} {name}" for name, count in ours["operators"].items()))
    return "\n".join(lines)


def ratio(timed: dict[str, Any]) -> str:
    return "{:.2f} ({:.2f}-{:.2f})".format(timed["ratio"], *timed["quartiles"])


def page_table(measured: dict[str, Any]) -> str:
    """What docs/speed.md says of a file of results."""
    facts, names = measured["machine"], list(measured["machine"]["installed"])
    versions = "".join(f", {name} {number}" for name, number in facts["installed"].items())
    on_gpu = "bandwidth" in facts
    columns = ["what", "logits", "ms, usual", "ms, ours", "ours / usual"]
    columns += ["launches", "memory", "bandwidth"] if on_gpu else ["memory, usual", "memory, ours"]
    columns += [f"ours / {name}" for name in names]
    versions += f", a copy moves {facts['bandwidth'] / 1e12:.2f} TB/s" if on_gpu else ""
    lines = [
        f"{facts['device']}, threads: {facts['threads']}, Python {facts['python']}, torch {facts['torch']}{versions}.",
        "",
    ]
    lines += [f"| {' | '.join(columns)} |", "|---|---" + "|--:" * (len(columns) - 2) + "|"]
    for row in measured["rows"]:
        ours, usual = (1e3 * x for x in row["seconds"])
        cells = [row["name"], "x".join(map(str, row["shape"])), f"{usual:.3g}", f"{ours:.3g}", ratio(row)]
        kernels, peaks = ([row[side][what] for side in ("usual", "ours")] for what in ("kernels", "peak"))
        cells += ["{}, {}".format(*kernels)] if on_gpu else []
        cells += ["{:.1f}, {:.1f}".format(*peaks)] if on_gpu else [f"{peak:.1f}" for peak in peaks]
        cells += [f"{row['bandwidth'][0]:.2f}" if "bandwidth" in row else ""] if on_gpu else []
        cells += [ratio(row["peers"][name]) if name in row["peers"] else "" for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def fill_page(text: str, results: Path) -> str:
    """The page with the table of a file of results between its marks, `<!-- speed-cpu -->` and `<!-- /speed-cpu -->`."""
    return filled(text, results.stem, page_table(json.loads(results.read_text())))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu")
    p.add_argument("--rows", default="", help="only rows whose name contains this")
    p.add_argument("--seconds", type=float, default=6.0, help="of timing a row (default 6)")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--compile", action="store_true", help="compiled after eager (always on a GPU)")
    p.add_argument(
        "--backend", default="inductor", help="of the compiler; eager or aot_eager to try what it can compile"
    )
    p.add_argument("--small", type=int, default=1, help="every size divided by this: a rehearsal")
    p.add_argument("--resume", action="store_true", help="keep the rows of benchmarks/results/ of the same machine")
    p.add_argument("--page", action="store_true", help="write the page from the results, and run nothing")
    p.add_argument("--out", type=Path, help="default: benchmarks/results/speed-<device>.json, with all rows")
    args = p.parse_args()
    if args.page:
        write_page(torch.device(args.device).type)
        return
    torch.set_num_threads(args.threads)
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", ".*since the last `advance_epoch`")  # here an epoch has no end
    device, kept = torch.device(args.device), RESULTS / f"speed-{torch.device(args.device).type}.json"
    facts = machine(device) | {"installed": {x: version(x) for x in PEERS if find_spec(x.replace("-", "_"))}}
    facts |= {"bandwidth": bandwidth(device)} if device.type == "cuda" else {}
    results = resumed(kept, facts) if args.resume else []
    done = {(row["name"], *row["shape"]) for row in results}
    out = args.out or (None if args.rows else kept)
    passes = [as_it_is]
    if args.compile or device.type == "cuda":
        passes.append(partial(torch.compile, fullgraph=True, dynamic=False, backend=args.backend))
    before, failed = None, []
    for faster in passes:
        for row in rows(device, faster, args.small):
            if row.ours is not before:
                torch.compiler.reset()  # rows share their code, but not their shapes
            before = row.ours
            if faster is not as_it_is:
                row.name, row.compiled = f"{row.name}, compiled", True
                row.bounds = {} if device.type == "cpu" else row.bounds  # which are of eager rows there
            if args.rows not in row.name or (row.name, *row.shape) in done:
                continue
            try:
                results.append(measure(row, device, args.seconds, facts.get("bandwidth", 0.0)))
            except Exception as error:  # of a compiler, say: the other rows are worth having
                failed.append(row.name)
                print(
                    f"{row.name}, {'x'.join(map(str, row.shape))}: FAILED with {type(error).__name__}: {error}",
                    flush=True,
                )
                continue
            print(shown(results[-1]), flush=True)
            if out is not None:
                write(out, {"machine": facts}, "rows", results)
    if out is not None:
        print(out)
    if out == kept and not failed:
        write_page(device.type)
    sys.exit(1 if failed else 0)


def write_page(device: str) -> None:
    page = PAGES[device]
    page.write_text(fill_page(page.read_text(), RESULTS / f"speed-{device}.json"))


def resumed(path: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that were measured, if that was the same machine, and its rate of copying with them."""
    if not path.exists():
        return []
    before = json.loads(path.read_text())
    if any(before["machine"][name] != facts[name] for name in ("device", "python", "torch", "aikd_losses")):
        print(f"{path} is of another machine or version: its rows are measured anew")
        return []
    facts |= {name: before["machine"][name] for name in facts.keys() & {"bandwidth"}}
    return before["rows"]


if __name__ == "__main__":
    main()
