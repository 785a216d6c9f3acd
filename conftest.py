"""The device that tests run on; every code block of the documentation and of the docstrings of src/ is a test."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

if find_spec("sybil"):  # without it no page is collected
    from pages import pytest_collect_file  # noqa: F401


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", help="torch's default device in all tests; those about the CPU are skipped"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.device != "cpu":
        torch.set_default_device(config.option.device)


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("cpu")
    if marker and item.config.option.device != "cpu":
        pytest.skip(f"about the CPU: {marker.args[0]}")


@pytest.fixture
def new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def names_of_docstrings() -> dict[str, Any]:
    """What the set-up of the reference makes, the page that shows the docstrings."""
    page = (Path(__file__).parent / "docs" / "reference.md").read_text()
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    return names


@pytest.fixture(autouse=True)
def _run_docstrings(doctest_namespace: dict[str, Any], names_of_docstrings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    doctest_namespace.update(names_of_docstrings)
