"""The examples of dense outputs, run as a person would: a language model of characters, a segmentation."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ["language_model.py", "segmentation.py"]


def last_numbers(name: str, cwd: Path) -> list[float]:
    """The numbers of the last line: a model without knowledge, the pre-trained one, the student."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / name)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert not list(cwd.iterdir())
    last = done.stdout.splitlines()[-1]
    assert last.startswith("test ")
    return [float(number) for number in re.findall(r"\d+\.\d+", last)]


@pytest.mark.slow
def test_the_language_model_learns_more_than_frequencies_and_the_student_more_than_the_pretrained(tmp_path):
    unigram, pretrained, student = last_numbers("language_model.py", tmp_path)
    assert 15 < unigram < 30  # English: 4 to 5 bits a character
    assert 2 < pretrained < unigram / 2
    assert 2 < student < pretrained


@pytest.mark.slow
def test_the_segmentation_finds_garments_and_the_student_keeps_up_with_the_pretrained(tmp_path):
    background, pretrained, student = last_numbers("segmentation.py", tmp_path)
    assert 0 < background < 100 / 11  # one class of eleven, not all of it right
    assert 3 * background < pretrained < 100
    assert pretrained - 1 < student < 100  # seeds differ by about a point


@pytest.mark.parametrize("name", NAMES)
def test_each_example_is_short_and_needs_nothing_but_torch(name):
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    assert len(source.splitlines()) < 120
    packages = set(re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE)) - {"__future__"}
    assert packages - set(sys.stdlib_module_names) == {"torch", "aikd_losses"}
    assert f"python examples/{name}" in source.split('"""')[1]
