"""What stands beside every number under `results/`, the machine it was measured on, and how numbers are written and shown."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

import aikd_losses

RESULTS = Path(__file__).parent / "results"


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else cpu(),
        "threads": torch.get_num_threads(), "cpus": os.cpu_count(), "platform": platform.platform(),
        "python": platform.python_version(), "torch": torch.__version__, "aikd_losses": aikd_losses.__version__,
    }  # fmt: skip


def write(path: Path, head: dict[str, Any], rows: str, lines: list[dict[str, Any]]) -> None:
    """One object, the `rows` a line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    body.append(f"{json.dumps(rows)}: [\n    " + ",\n    ".join(json.dumps(line) for line in lines) + "\n  ]")
    path.write_text("{\n  " + ",\n  ".join(body) + "\n}\n")


def filled(page: str, mark: str, table: str) -> str:
    """The page with the table between its marks, `<!-- mark -->` and `<!-- /mark -->`."""
    begin, end = f"<!-- {mark} -->\n", f"\n<!-- /{mark} -->"
    before, rest = page.split(begin)
    return before + begin + table + end + rest.split(end)[1]


def error(values: list[float]) -> float:
    """The standard error of their mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def spread(values: list[float], form: str, sign: str = "±") -> str:
    """Mean and standard error; one value has none."""
    mean = f"{statistics.fmean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} {sign} {error(values):{form.strip('+')}}"
