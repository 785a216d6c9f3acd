"""The notebook: it runs from top to bottom, and its pictures are committed with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

nbformat, nbclient = (pytest.importorskip(name) for name in ("nbformat", "nbclient"))
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).parent.parent / "examples" / "tour.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell):
    """What a reader sees below a cell, by kind; warnings and errors too."""
    kinds = [output.get("name") or sorted(output.get("data", {"error": ""}))[0] for output in cell.outputs]
    return sorted(set(kinds))


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter's own packages, as they start a kernel
def test_every_cell_runs_and_shows_what_is_committed(notebook, tmp_path, monkeypatch):
    """An error in a cell is one here. The kernel starts elsewhere, so that it imports the package that is installed."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    committed = [shown(cell) for cell in code(notebook)]
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3", resources=where).execute()
    assert [shown(cell) for cell in code(notebook)] == committed
    assert list(tmp_path.iterdir()) == []


def test_it_is_committed_as_it_ran_in_order_small_and_without_the_machine(notebook):
    nbformat.validate(notebook)
    set_up, *others = code(notebook)
    assert [cell.execution_count for cell in (set_up, *others)] == list(range(1, len(others) + 2))
    assert shown(set_up) == []
    for cell in others:
        assert {"image/png"} <= set(shown(cell)) <= {"image/png", "stdout"}
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert NOTEBOOK.stat().st_size < 300_000
    text = re.sub(r'"image/png": ".*"', "", NOTEBOOK.read_text())
    assert re.search(r"/home/|/root/|/tmp/|/work/|site-packages|[A-Z]:\\\\", text) is None
