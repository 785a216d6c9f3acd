"""What the losses cost in time and memory, forward and backward, against the usual composition of torch's own functions.

    python benchmarks/speed.py                # what `make benchmark` runs
    python benchmarks/speed.py --rows KD      # rows whose name contains KD; writes nothing
    python benchmarks/speed.py --device cuda

Both sides of a row run in turn in one process; `ratio` is the median of ours / usual over neighbouring runs, with quartiles.
Kernels are the operators that compute something (views and bookkeeping are left out). "Kept" is what is held between the
passes, "peak" the most that is allocated beyond the inputs (CPU: the allocator's record; CUDA: its statistics), in copies of
the logits in float32. The bounds are what we hold ourselves to; a row that misses one says so, with its operators if there are
too many. KD is also timed against other packages, where they are installed.

Writes `benchmarks/results/speed-<device>.json` and from it the tables of docs/speed.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
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
from machine import RESULTS, machine, write
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from aikd_losses import (
    AdversarialDistributionLoss,
    AIKDLoss,
    CachedTargets,
    DeterministicKD,
    GradientPenalty,
    LossStack,
    MLPDiscriminator,
    ProgressiveKD,
)
from aikd_losses.functional import linear_deterministic_kd

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from _networks import Block

PAGE = Path(__file__).parent.parent / "docs" / "speed.md"
NO_KERNELS = {"view", "_unsafe_view", "expand", "unsqueeze", "squeeze", "t", "transpose", "permute", "detach", "alias", "slice",
              "select", "split", "unbind", "as_strided", "_local_scalar_dense", "empty", "empty_like", "new_empty",
              "promote_types", "lift_fresh", "_record_function_enter_new", "_record_function_exit"}  # fmt: skip

Step = Callable[[Tensor], Tensor | None]  # the loss of some logits, or a whole step that needs nothing more
Pair = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Row:
    """One comparison of two functions of the logits."""

    name: str
    shape: tuple[int, int]
    ours: Step
    usual: Step
    bounds: dict[str, float] = field(default_factory=dict)  # of time (the ratio), kernels, peak
    dtype: torch.dtype = torch.float32
    copy: int = 0  # elements of the unit of memory, if not those of `shape`
    exact: Step | None = None  # what the error of our gradient is of, given float64
    peers: dict[str, Step] = field(default_factory=dict)


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


def rows(device: torch.device) -> Iterator[Row]:
    term, others = DeterministicKD(temperature=4.0), peers()
    for shape, bounds in (
        ((128, 10), {"time": 1.10, "kernels": 16}),
        ((128, 100), {"time": 1.00, "kernels": 16}),
        ((256, 1000), {"time": 0.55}),
        ((64, 21841), {"time": 0.45, "peak": 1.5}),
        ((512, 50257), {"time": 0.25, "peak": 1.5}),
    ):
        t = torch.randn(shape, device=device)
        theirs = {name: partial(loss, t=t) for name, loss in others.items()}
        yield Row("KD", shape, partial(term, teacher_logits=t), partial(kd, t=t), bounds, peers=theirs)
    t = torch.randn((256, 1000), device=device)
    yield Row("KD, near", t.shape, lambda s, t=t: term(t + 0.1 * s, t), lambda s, t=t: kd(t + 0.1 * s, t))
    for name in ("reverse_kl", "js"):
        other = DeterministicKD(temperature=4.0, divergence=name)
        yield Row(f"KD, {name}", t.shape, partial(other, teacher_logits=t), partial(backwards, t=t, name=name))
    for shape in ((256, 1000), (64, 21841)):
        t = torch.randn(shape, device=device, dtype=torch.bfloat16)
        ours = partial(term, teacher_logits=t)
        yield Row("KD, bfloat16", shape, ours, lambda s, t=t: kd(s.float(), t.float()), dtype=torch.bfloat16,
                  exact=partial(kd, t=t.double()))  # fmt: skip
    yield together((128, 100), device, {"kernels": 55})
    yield together((64, 21841), device, {})
    for make in (with_store, adversarial, linear_heads, resnet_step):
        yield make(device)


def backwards(s: Tensor, t: Tensor, name: str) -> Tensor:
    """Reverse KL and Jensen-Shannon, as they are usually written, in float32."""
    log_p, log_q = F.log_softmax(t / 4.0, -1), F.log_softmax(s / 4.0, -1)
    to = partial(F.kl_div, reduction="batchmean", log_target=True)
    if name == "reverse_kl":
        return to(log_p, log_q) * 16.0
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (0.5 * to(log_m, log_p) + 0.5 * to(log_m, log_q)) * 16.0


def together(shape: tuple[int, int], device: torch.device, bounds: dict[str, float]) -> Row:
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
    return Row("CE, KD and progressive", shape, lambda s: stack(student_logits=s, **given)[0], usual, bounds)


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
        target = (0.5 * torch.eye(c)[y.cpu()] + 0.5 * kept[index.cpu()]).to(s.device)
        loss = (-target * F.log_softmax(s, -1)).mean(0).sum()
        for i, row in zip(index.cpu().tolist(), F.softmax(s.detach(), -1).cpu(), strict=True):
            kept[i] = row
        return loss

    return Row("progressive, store", (n, c), ours, usual)


def adversarial(device: torch.device) -> Row:
    """Both updates of the Wasserstein game with a gradient penalty and a discriminator of (64, 64), against the usual passes
    with Adam."""
    n, c = 128, 100
    t = torch.randn(n, c, device=device)
    first, second = (MLPDiscriminator(c).to(device) for _ in range(2))
    adam = torch.optim.Adam(first.parameters(), lr=1e-3, betas=(0.5, 0.9))
    usual_adam = torch.optim.Adam(second.parameters(), lr=1e-3, betas=(0.5, 0.9))
    term = AdversarialDistributionLoss(
        first, objective="wasserstein", penalty=GradientPenalty(10.0), optimizer=adam
    ).to(device)

    def ours(s: Tensor) -> None:
        term(s, t).backward()
        term.update(s, t)

    def usual(s: Tensor) -> None:
        p, q = F.softmax(t, -1), F.softmax(s, -1)
        (-second(q).mean()).backward()
        usual_adam.zero_grad()
        q, u = q.detach(), torch.rand(n, 1, device=device)
        between = (u * p + (1 - u) * q).requires_grad_()
        (slope,) = torch.autograd.grad(second(between).sum(), between, create_graph=True)
        (second(q).mean() - second(p).mean() + 10.0 * (slope.norm(dim=-1) - 1).square().mean()).backward()
        usual_adam.step()

    return Row("adversarial step", (n, c), ours, usual, {"kernels": 65})


def linear_heads(device: torch.device) -> Row:
    """KD of two heads from hidden states, 512 positions of 128 to 50,257 classes, against the logits made whole. The logits are
    the unit of memory here; s, which is a hundredth of their size, stands for the hidden states."""
    positions, width, classes = 512, 128, 50_257
    weight, other = (torch.randn(classes, width, device=device) / width**0.5 for _ in range(2))
    weight.requires_grad_()
    hidden = torch.randn(positions, width, device=device)

    def ours(s: Tensor) -> Tensor:
        weight.grad = None
        return linear_deterministic_kd(s, weight, hidden, other, temperature=4.0)

    def usual(s: Tensor) -> Tensor:
        weight.grad = None
        return kd(s @ weight.t(), hidden @ other.t())

    bounds = {"time": 0.60, "peak": 1.0}
    return Row("linear heads, KD", (positions, width), ours, usual, bounds, copy=positions * classes)


def resnet_step(device: torch.device) -> Row:
    """A whole training step of a ResNet of three blocks (16, 32, 64) on 64 images of 3x32x32 and 100 classes: `AIKDLoss`, with
    the teacher's logits at hand and all updates, against cross-entropy."""
    n, c = 64, 100
    x, y = torch.randn(n, 3, 32, 32, device=device), torch.randint(c, (n,), device=device)
    given = {"teacher_logits": torch.randn(n, c, device=device), "target": y, "index": torch.arange(n, device=device)}
    criterion = AIKDLoss(n, c, num_epochs=10).to(device)

    def new() -> tuple[nn.Module, torch.optim.Optimizer]:
        blocks = [nn.Conv2d(3, 16, 3, 1, 1), Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
        net = nn.Sequential(
            *blocks, nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, c)
        ).to(device)
        return net, torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

    (first, sgd), (second, usual_sgd) = new(), new()

    def ours(_: Tensor) -> None:
        s = first(x)
        loss, _ = criterion(student_logits=s, **given)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        criterion.update(student_logits=s, **given)

    def usual(_: Tensor) -> None:
        loss = F.cross_entropy(second(x), y)
        usual_sgd.zero_grad()
        loss.backward()
        usual_sgd.step()

    return Row("ResNet step", (n, c), ours, usual, {"time": 1.10})


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
    with Operators() as mode:
        run(loss, s)
    return Counter({name: count for name, count in mode.found.items() if name not in NO_KERNELS})


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


def seconds(loss: Step, s: Tensor) -> float:
    if s.is_cuda:
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


def in_turn(ours: Step, other: Step, s: Tensor, runs: int) -> dict[str, Any]:
    """Both timed in turn: the median of the ratios of neighbouring runs, its quartiles, and both medians."""
    pairs = [(seconds(ours, s), seconds(other, s)) for _ in range(runs + 2)][2:]  # the first ones warm up
    low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    first, second = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {"ratio": middle, "quartiles": [low, high], "seconds": [first, second], "runs": runs}


def measure(row: Row, device: torch.device, budget: float) -> dict[str, Any]:
    s = torch.randn(row.shape, device=device, dtype=row.dtype).requires_grad_()
    for _ in range(2):  # warm up
        estimate = seconds(row.usual, s) + seconds(row.ours, s)
    runs = max(7, min(500, int(budget / estimate)))
    result = {"name": row.name, "shape": row.shape, "bounds": row.bounds, **in_turn(row.ours, row.usual, s, runs)}
    # A pair at a time: what a third one leaves in the caches would count for one side and against the other.
    result["peers"] = {name: in_turn(row.ours, loss, s, runs) for name, loss in row.peers.items()}
    if row.exact is not None:
        result["error"] = gradient_error(row.ours, row.exact, s)
    for side, loss in (("ours", row.ours), ("usual", row.usual)):
        operators = kernels(loss, s)
        kept, peak = memory(loss, s, row.copy)
        result[side] = {
            "kernels": operators.total(),
            "kept": kept,
            "peak": peak,
            "operators": dict(operators.most_common()),
        }
    return result


def verdict(result: dict[str, Any]) -> str:
    """Each bound of a row, met or missed."""
    found = {"time": result["ratio"], **result["ours"]}
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
    columns = ["what", "logits", "ms, usual", "ms, ours", "ours / usual", "memory, usual", "memory, ours"]
    columns += [f"ours / {name}" for name in names]
    lines = [
        f"{facts['device']}, threads: {facts['threads']}, Python {facts['python']}, torch {facts['torch']}{versions}.",
        "",
    ]
    lines += [f"| {' | '.join(columns)} |", "|---|---" + "|--:" * (len(columns) - 2) + "|"]
    for row in measured["rows"]:
        ours, usual = (1e3 * x for x in row["seconds"])
        cells = [row["name"], "x".join(map(str, row["shape"])), f"{usual:.3g}", f"{ours:.3g}", ratio(row)]
        cells += [f"{row[side]['peak']:.1f}" for side in ("usual", "ours")]
        cells += [ratio(row["peers"][name]) if name in row["peers"] else "" for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def fill_page(text: str, results: Path) -> str:
    """The page with the table of a file of results between its marks, `<!-- speed-cpu -->` and `<!-- /speed-cpu -->`."""
    begin, end = f"<!-- {results.stem} -->\n", f"\n<!-- /{results.stem} -->"
    if begin not in text:
        return text
    before, rest = text.split(begin)
    return before + begin + page_table(json.loads(results.read_text())) + end + rest.split(end)[1]


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
    device, results = torch.device(args.device), []
    for row in rows(device):
        if args.rows in row.name:
            results.append(measure(row, device, args.seconds))
            print(shown(results[-1]), flush=True)
    if args.out is None and args.rows:
        return
    out = args.out or RESULTS / f"speed-{device.type}.json"
    installed = {name: version(name) for name in PEERS if find_spec(name.replace("-", "_"))}
    write(out, {"machine": machine(device) | {"installed": installed}}, "rows", results)
    print(out)
    if args.out is None:
        PAGE.write_text(fill_page(PAGE.read_text(), out))


if __name__ == "__main__":
    main()
