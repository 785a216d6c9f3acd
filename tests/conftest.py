from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

collect_ignore = ["mutation.py"]  # a plugin, which needs mutmut

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
    torch.default_generator.manual_seed(0)  # of the CPU alone: torch.manual_seed takes milliseconds
    torch.set_num_threads(1)
