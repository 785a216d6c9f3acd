"""A pytest plugin for `make mutants`: what is run for a mutant and in which order, and what the processes of a test call."""

from __future__ import annotations

import ctypes
import os
import signal
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from multiprocessing import util
from pathlib import Path

import pytest
import torch
from mutmut.state import state

CALLED = tempfile.TemporaryDirectory()
torch.manual_seed = torch.default_generator.manual_seed  # the CPU's alone: a third of the time of a test otherwise


def _report() -> None:
    Path(CALLED.name, str(os.getpid())).write_text("\n".join(state()._stats))


def _in_a_new_process(_: object) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: ends with the process of a mutant that took too long
    if os.environ.get("MUTANT_UNDER_TEST") == "stats":
        util.Finalize(None, _report, exitpriority=0)


util.register_after_fork(state(), _in_a_new_process)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown() -> None:
    for called in Path(CALLED.name).iterdir():
        state()._stats.update(called.read_text().split())
        called.unlink()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = {item for item in items if item.originalname == "test_contract" and zlib.crc32(item.nodeid.encode()) % 5}
    config.hook.pytest_deselected(items=list(left_out))
    turn, turns = {}, Counter()
    for item in items:
        item._nodeid = item.nodeid  # mutmut 3.8 reads what pytest 9.2 no longer has
        turns[item.originalname] += 1
        turn[item] = turns[item.originalname]
    items[:] = sorted(
        (item for item in items if item not in left_out), key=turn.__getitem__
    )  # one case of every test first
    if os.environ.get("MUTANT_UNDER_TEST") == "stats":
        for world in {getattr(item.module, "World", None) for item in items} - {None}:
            world.__init__ = _then_forgotten(world.__init__)


def _then_forgotten(build: Callable[..., None]) -> Callable[..., None]:
    """`build`, of what a test needs before it starts: what that calls is not what the test is about."""

    def built(self: object) -> None:
        build(self)
        state()._stats.clear()

    return built
