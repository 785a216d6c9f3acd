"""What takes more than a minute to show: nothing grows, nothing is lost, and a store for ImageNet-1k works at full size.

    make soak                                     # all of it, some 12 minutes on 2 cores; needs 6 GB of disk
    python benchmarks/soak.py --only steps

steps      10,000 steps of the full method (128 x 100, a store of 50,000) in one process: resident memory and the number of
           live tensors do not grow after the first 2,000.
kills      The reference example, killed (SIGKILL) at random moments and resumed, ten times: every epoch's numbers and the last
           checkpoint are those of an uninterrupted run bit for bit.
stores     CachedTargets(1,281,167, 1,000) in a file, whole and with top_k=16. An epoch of batches of 256 is written, the
           process ends, another one opens the file and finds what was written. Times and memory are printed.
exchange   Two processes that have written half of that epoch each, in memory and in one file: all rows are known to both.

A failure is an assertion and a non-zero exit status. Results go to `benchmarks/results/soak.json`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import RESULTS, machine, write
from rich.console import Console
from torch import Tensor

from aikd_losses import AIKDLoss, CachedTargets

ROOT = Path(__file__).parent.parent
IMAGENET = 1_281_167, 1_000
BATCH = 256
STUDENT = 16  # epochs of each phase of the example


def memory() -> dict[str, float]:
    """Of this process, in MB: what is its own, what it has mapped from files, and the peak of both."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"anonymous": "RssAnon", "mapped": "RssFile", "peak": "VmHWM"}
    return {name: round(int(lines[key].split()[0]) / 1024, 1) for name, key in names.items()}


# --------------------------------------------------------------------------------------------------------------- steps


def steps(folder: Path, count: int = 10_000, warm: int = 2_000) -> dict[str, Any]:
    n, c, size = 128, 100, 50_000
    torch.manual_seed(0)
    criterion = AIKDLoss(size, c, num_epochs=count // 390 + 1)
    teacher, y = torch.randn(n, c), torch.randint(c, (n,))
    seen = []
    for step in range(1, count + 1):
        s = torch.randn(n, c, requires_grad=True)
        index = torch.randint(size, (n,))
        tensors = dict(student_logits=s, teacher_logits=teacher, target=y, index=index)
        loss, _ = criterion(**tensors)
        loss.backward()
        criterion.update(**tensors)
        if step % 390 == 0:
            criterion.advance_epoch()
        if step % 1_000 == 0:
            gc.collect()
            alive = sum(isinstance(x, Tensor) for x in gc.get_objects())
            seen.append({"step": step, "tensors": alive, **memory()})
    warmed = [x for x in seen if x["step"] >= warm]
    growth = warmed[-1]["anonymous"] - warmed[0]["anonymous"]
    assert growth < 8, f"{growth} MB more after {count} steps than after {warm}"
    assert warmed[-1]["tensors"] == warmed[0]["tensors"], "live tensors grow"
    return {"steps": count, "growth_mb": round(growth, 1), "tensors": warmed[-1]["tensors"], "at": seen}


# --------------------------------------------------------------------------------------------------------------- kills


def kills(folder: Path, count: int = 10) -> dict[str, Any]:
    script = [sys.executable, str(ROOT / "examples" / "cifar_train.py"), "--train-size", "512",
              "--epochs", str(STUDENT), "--batch-size", "16", "--lr", "0.02"]  # fmt: skip
    whole, out = folder / "whole", folder / "killed"
    subprocess.run([*script, "--out", str(whole)], check=True, stdout=subprocess.DEVNULL)
    command, done = [*script, "--out", str(out)], list[int]()
    for _ in range(count):
        before = epochs(out)
        resume = ["--resume"] if (out / "checkpoint.pt").exists() else []
        with subprocess.Popen([*command, *resume], stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and epochs(out) <= before + 1:  # so that both phases have their share
                time.sleep(0.005)
            time.sleep(random.uniform(0, 0.3))
            process.kill()
        if process.returncode == -signal.SIGKILL:
            done.append(epochs(out))
    subprocess.run([*command, "--resume"], check=True, stdout=subprocess.DEVNULL)
    assert outcome(out) == outcome(whole), "not the numbers of the uninterrupted run"
    assert len(done) > count // 2, f"only {len(done)} kills came before the end"
    assert done[0] < STUDENT < done[-1], f"kills of one phase alone: {done}"
    return {f"killed_after_epochs_of_{2 * STUDENT}": done}


def epochs(out: Path) -> int:
    log = out / "log.jsonl"
    return sum('"epoch"' in line for line in log.read_text().splitlines()) if log.exists() else 0


def outcome(out: Path) -> str:
    """Every number of the log but the seconds, and the checkpoint's tensors, bit for bit."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()[1:]]
    for line in lines:
        for record in [line, *line.get("result", {}).values()]:
            record.pop("seconds", None)
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    tensors = {
        f"{part}.{name}": x.flatten().view(torch.uint8).tolist() for part in ("model", "criterion")
        for name, x in saved[part].items() if x.ndim
    }  # fmt: skip
    return json.dumps([lines, tensors])


# -------------------------------------------------------------------------------------------------------------- stores


def predictions(index: Tensor, classes: int) -> Tensor:
    """A distribution that follows from the id, so that another process knows what was written; cheap to make."""
    probs = torch.full((len(index), classes), 0.25 / (classes - 1))
    return probs.scatter_(1, (index % classes).unsqueeze(1), 0.75)


def order(rank: int = 0, world: int = 1) -> list[Tensor]:
    shuffled = torch.randperm(IMAGENET[0], generator=torch.Generator().manual_seed(1))
    return list(shuffled[rank::world].split(BATCH))


def stores(folder: Path) -> dict[str, Any]:
    found = {}
    for top_k in (None, 16):
        path = folder / f"imagenet-{top_k}"
        results = {}
        for stage in (write_epoch, read_epoch):
            run = [sys.executable, __file__, "--stage", stage.__name__, str(path), str(top_k)]
            done = subprocess.run(run, capture_output=True, text=True, check=True)
            results[stage.__name__] = json.loads(done.stdout.splitlines()[-1])
        results["file_mb"] = round(path.stat().st_size / 2**20, 1)
        found[f"top_k={top_k}"] = results
        path.unlink()
    return found


def opened(path: str, top_k: int | None) -> tuple[CachedTargets, dict[str, Any]]:
    before = memory()
    start = time.perf_counter()
    store = CachedTargets(*IMAGENET, path=path, top_k=top_k)
    seconds = time.perf_counter() - start
    return store, {"open_ms": round(1e3 * seconds, 2), "own_mb": round(memory()["anonymous"] - before["anonymous"], 1)}


def write_epoch(path: str, top_k: int | None) -> dict[str, Any]:
    store, result = opened(path, top_k)
    times = []
    for index in order():
        probs = predictions(index, IMAGENET[1])
        start = time.perf_counter()
        store.read(index)
        store.write(index, probs)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    store.advance_epoch()
    result["advance_epoch_s"] = round(time.perf_counter() - start, 3)
    return result | summary(times) | {"memory_mb": memory()}


def read_epoch(path: str, top_k: int | None) -> dict[str, Any]:
    """In a process of its own: what was written, every row, and the time of a step on a file that is full."""
    store, result = opened(path, top_k)
    times = []
    for index in order():
        expected = predictions(index, IMAGENET[1])
        start = time.perf_counter()
        probs, known = store.read(index)
        store.write(index, probs)
        times.append(time.perf_counter() - start)
        assert known.all()
        assert (probs - expected).abs().max() < 1e-3
    return result | summary(times) | {"memory_mb": memory()}


def summary(times: list[float]) -> dict[str, Any]:
    low, middle, high = (1e3 * float(torch.tensor(times).quantile(q)) for q in (0.25, 0.5, 0.75))
    return {"steps": len(times), "step_ms": round(middle, 2), "step_ms_quartiles": [round(low, 2), round(high, 2)]}


# ------------------------------------------------------------------------------------------------------------ exchange


def exchange(folder: Path) -> dict[str, Any]:
    """Peak memory of a rank is of its whole life; the store in memory alone is 2.4 GiB of it."""
    found = {}
    for kind in ("in memory", "in one file"):
        path = str(folder / "exchanged") if kind == "in one file" else "-"
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
        done = subprocess.run([*run, "--stage", "exchanged", path, "None"], capture_output=True, text=True, check=True)
        found[kind] = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return found


def exchanged(path: str, top_k: int | None) -> dict[str, Any]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    store = CachedTargets(*IMAGENET, path=None if path == "-" else path)
    if path == "-":
        store.rows.fill_(0)  # all its pages are there before the peak is looked at
    dist.barrier()
    for index in order(rank, 2):
        store.write(index, predictions(index, IMAGENET[1]))
    dist.barrier()
    before = memory()["peak"]
    start = time.perf_counter()
    store.advance_epoch()
    result = {"seconds": round(time.perf_counter() - start, 2), "peak_mb_before": before, "peak_mb": memory()["peak"]}
    assert store.known.all()
    for index in order(1 - rank, 2)[::50]:  # what the other rank wrote
        assert (store.read(index)[0] - predictions(index, IMAGENET[1])).abs().max() < 1e-3
    dist.barrier()
    dist.destroy_process_group()
    return result if rank == 0 else {}


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {f.__name__: f for f in (steps, kills, stores, exchange)}
STAGES = {f.__name__: f for f in (write_epoch, read_epoch, exchanged)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", choices=list(PARTS), action="append", help="these parts alone; writes no results")
    p.add_argument("--stage", nargs=3, help=argparse.SUPPRESS)
    p.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    p.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    args = p.parse_args()
    torch.set_num_threads(1)
    if args.stage:
        name, path, top_k = args.stage
        result = STAGES[name](path, None if top_k == "None" else int(top_k))
        if result:
            print(json.dumps(result), flush=True)
        return
    random.seed(args.seed)
    os.environ["OMP_NUM_THREADS"] = "1"
    console = Console()
    results = []
    for name in args.only or PARTS:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=args.out.parent) as folder, console.status(name):
            result = PARTS[name](Path(folder))
        results.append({"part": name, "seconds": round(time.perf_counter() - start, 1), **result})
        console.print(f"[bold]{name}[/] ({results[-1]['seconds']} s)")
        console.print_json(data=result)
    if not args.only:
        write(args.out, {"machine": machine(), "seed": args.seed}, "parts", results)
        console.print(f"{args.out}", highlight=False)


if __name__ == "__main__":
    main()
