"""A pytest plugin for `make mutants`: says which functions the processes of a test call, and leaves none of those behind."""

from __future__ import annotations

import ctypes
import os
import signal
import tempfile
from multiprocessing import util
from pathlib import Path

import pytest
from mutmut.state import state

CALLED = tempfile.TemporaryDirectory()


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item._nodeid = item.nodeid  # mutmut 3.8 reads what pytest 9.2 no longer has
