from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from seeds import reseed

collect_ignore = ["mutation.py", "pages.py"]  # plugins, which need mutmut and sybil
# What holds on every device; the others are about the CPU (gloo, files, scripts, sentences that name it) or about no device.
ON_ANY_DEVICE = ("contract", "cuda", "fused", "fuzz", "linear", "properties", "stack", "state", "targets", "values")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    stem = collection_path.stem
    others = stem.startswith("test_") and stem.removeprefix("test_") not in ON_ANY_DEVICE
    return True if others and config.option.device != "cpu" else None


settings.register_profile(
    "default",
    deadline=None,
    max_examples=50,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.register_profile(  # a mutant is killed by any example: the smallest one is not looked for
    "mutation",
    settings.get_profile("default"),
    max_examples=20,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    reseed(0)
    torch.set_num_threads(1)
