"""A pytest plugin for `make mutants`: what is run for a mutant and how, and what the processes of a test call."""

from __future__ import annotations

import ctypes
import os
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from multiprocessing import util
from pathlib import Path

import pytest
import torch
from _pytest.runner import runtestprotocol
from _pytest.tmpdir import TempPathFactory
from mutmut.runners.harness import PytestRunner
from mutmut.state import state
from mutmut.utils.file_utils import change_cwd

SLOW = 0.3  # seconds; such tests are for what few tests call
CASES = 3  # of a test and its first parameter, for what many tests call
FEW, MANY = 40, 250
CALLED = tempfile.TemporaryDirectory()
torch.manual_seed = torch.default_generator.manual_seed  # the CPU's alone: a third of the time of a test otherwise
_items: dict[str, pytest.Item] = {}  # collected once, for all mutants
_whole_run = PytestRunner.run_tests


def _resume(config: pytest.Config) -> None:
    """What has ended with the run that collected the items, in a process that goes on with them."""
    if config.pluginmanager.hasplugin("capturemanager"):
        config.pluginmanager.unregister(name="capturemanager")
        config._tmp_path_factory = TempPathFactory.from_config(config, _ispytest=True)


def _run_tests(self: PytestRunner, *, mutant_name: str | None, tests: Iterable[str]) -> int:
    """In the process that was forked for a mutant: first what is refused, where that is not much, and one case of every other
    test; 1 once one has failed. Starting pytest anew costs five times as much."""
    if mutant_name is None:
        return _whole_run(self, mutant_name=mutant_name, tests=tests)
    if not _items.keys() >= set(tests):
        return 35  # suspicious
    tests, turns, ordered = list(tests), Counter(), []
    refusals = sum("test_messages" in name for name in tests)
    for name in tests:
        kind = name.partition("-")[0]  # the test and its first parameter: a law, say
        turns[kind] += 1
        turn = turns[kind]
        if "test_messages" in name:
            ordered.append((turn if refusals > FEW else 0, len(ordered), name))
        elif (turn <= CASES or len(tests) <= MANY) and (len(tests) <= FEW or state().duration_by_test[name] <= SLOW):
            ordered.append((turn, len(ordered), name))
    chosen = [_items[name] for *_, name in sorted(ordered)]
    with change_cwd("mutants"):
        for item, following in zip(chosen, [*chosen[1:], None], strict=True):  # fixtures of a module stay within it
            _resume(item.config)
            if any(report.failed for report in runtestprotocol(item, nextitem=following, log=False)):
                return 1
    return 0


PytestRunner.run_tests = _run_tests


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
    _items.update((item.nodeid, item) for item in items)
    for item in items:
        item._nodeid = item.nodeid  # mutmut 3.8 reads what pytest 9.2 no longer has
    if os.environ.get("MUTANT_UNDER_TEST") == "stats":
        for world in {getattr(item.module, "World", None) for item in items} - {None}:
            world.__init__ = _then_forgotten(world.__init__)


def _then_forgotten(build: Callable[..., None]) -> Callable[..., None]:
    """`build`, of what a test needs before it starts: what that calls is not what the test is about."""

    def built(self: object, *settings: object) -> None:
        build(self, *settings)
        state()._stats.clear()

    return built
