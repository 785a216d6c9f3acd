"""The short examples, run as a person would run them: each in a process of its own, from another folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
LINES = {"quickstart.py": 60} | {path.name: 120 for path in EXAMPLES.glob("with_*.py")}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [[name] for name in sorted(LINES)] + [[*TORCHRUN, "with_accelerate.py"]],
    ids=lambda command: "-".join(command[-1:] + ["two-processes"] * (len(command) > 1)),
)
def test_the_student_is_better_than_the_model_that_was_trained_plainly(command, tmp_path):
    """40% of the labels are wrong there: what the method is for. One seed; README.md has more."""
    *launcher, name = command
    done = run([*launcher, str(EXAMPLES / name)], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    *_, last = done.stdout.splitlines()
    plain, student = map(
        float, re.fullmatch(r"test accuracy: pre-trained (\d+\.\d+)%, student (\d+\.\d+)%", last).groups()
    )
    assert 50 < plain < student < 100  # chance is 10
    assert done.stdout.count("test accuracy") == 1  # of several processes one speaks
    if name == "with_accelerate.py":
        assert f"processes: {2 if launcher else 1}\n" in done.stdout
    if not launcher:
        assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


@pytest.mark.parametrize("name", sorted(LINES))
def test_an_example_is_short_and_says_how_it_is_run(name):
    text = (EXAMPLES / name).read_text()
    assert len(text.splitlines()) < LINES[name]
    assert f"\n    python examples/{name}\n" in text
    (printed,) = re.findall(r"^    (test accuracy: .*)$", text, re.MULTILINE)
    plain, student = re.findall(r"(\d+\.\d+)%", printed)
    row = next(line for line in (EXAMPLES / "README.md").read_text().splitlines() if f"[{name}]({name})" in line)
    assert f"{plain}%, {student}%" in row  # the same number in both places


def test_the_quickstart_needs_nothing_but_torch_and_the_library():
    text = (EXAMPLES / "quickstart.py").read_text()
    imported = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
    assert imported - sys.stdlib_module_names == {"torch", "aikd_losses"}
