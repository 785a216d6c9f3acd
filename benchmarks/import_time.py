"""What `import aikd_losses` costs beyond torch and einops.

    python benchmarks/import_time.py            (or: make import-time)

A copy of the package is compiled to bytecode first, as pip does when it installs. Processes alternate: one imports torch and
einops alone, the next one the library too, timed by Python itself (`-X importtime`).
"""

from __future__ import annotations

import argparse
import compileall
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import RESULTS, machine, write

import aikd_losses

TORCH = "import torch, einops"


def installed(folder: Path) -> Path:
    """A copy of the package under `folder` with its bytecode beside it."""
    package = folder / "aikd_losses"
    shutil.copytree(Path(aikd_losses.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(package, quiet=1)
    return folder


def run(code: str, path: Path) -> tuple[float, str]:
    """Seconds of a fresh interpreter, and what `-X importtime` says."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-X", "importtime", "-c", code],
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=True,
    )
    return time.perf_counter() - began, done.stderr


def cumulative(report: str, module: str) -> float:
    """Milliseconds of a module and of what it was the first to import."""
    (line,) = (line for line in report.splitlines() if line.endswith(f" | {module}"))
    return int(line.split("|")[1]) / 1000


def beyond_torch(path: Path) -> float:
    """Milliseconds that the library adds in one process where torch and einops are there already."""
    return cumulative(run(f"{TORCH}; import aikd_losses", path)[1], "aikd_losses")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "import_time.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, rows = installed(Path(folder)), []
        beyond_torch(path)  # what the system reads from the disk once
        for _ in range(args.runs):
            without, report = run(TORCH, path)
            with_library, other = run(f"{TORCH}; import aikd_losses", path)
            rows.append({
                "torch_and_einops": cumulative(report, "torch") + cumulative(report, "einops"),
                "aikd_losses": cumulative(other, "aikd_losses"),
                "process": 1000 * without, "process_with_aikd_losses": 1000 * with_library,
            })  # fmt: skip
    for name in rows[0]:
        values = [row[name] for row in rows]
        print(f"{name:26} min {min(values):8.1f} ms, median {statistics.median(values):8.1f} ms, {len(rows)} runs")
    write(
        args.out, {"machine": machine(), "unit": "ms"}, "rows", [{k: round(v, 1) for k, v in r.items()} for r in rows]
    )


if __name__ == "__main__":
    main()
