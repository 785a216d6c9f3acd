"""The benchmark of speed compares like with like, and what it counts is what is there."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from test_examples import load_script

speed = load_script(Path(__file__).parent.parent / "benchmarks" / "speed.py")
CPU = torch.device("cpu")


def small_rows(device, faster, small):
    t = torch.randn(8, 5)
    term = speed.DeterministicKD(temperature=4.0)
    theirs = {"torchdistill": partial(speed.kd, t=t)}
    yield speed.Row(
        "KD", (8, 5), partial(term, teacher_logits=t), partial(speed.kd, t=t), {"time": 1e9, "kernels": 0}, peers=theirs
    )
    yield speed.together((8, 5), device, faster, {})


def test_what_is_measured_is_written_and_shown_on_the_page(tmp_path, monkeypatch, capsys):
    out = tmp_path / "speed-cpu.json"
    monkeypatch.setattr(speed, "rows", small_rows)
    monkeypatch.setattr(sys, "argv", ["speed", "--seconds", "0.01", "--out", str(out)])
    speed.main()
    printed, written = capsys.readouterr().out, json.loads(out.read_text())
    assert "time 1e+09 met, kernels 0 MISSED" in printed
    assert "against torchdistill" in printed
    kd, together = written["rows"]
    assert kd["quartiles"][0] <= kd["ratio"] <= kd["quartiles"][1]
    assert sum(kd["ours"]["operators"].values()) == kd["ours"]["kernels"] > 0
    written["machine"]["installed"] = {"torchdistill": "1.2"}
    page = speed.fill_page("Before\n<!-- speed-cpu -->\nold\n<!-- /speed-cpu -->\nafter", _saved(tmp_path, written))
    assert page.startswith("Before\n<!-- speed-cpu -->\n")
    assert page.endswith("\n<!-- /speed-cpu -->\nafter")
    assert "old" not in page
    assert f"{kd['ratio']:.2f} ({kd['quartiles'][0]:.2f}-{kd['quartiles'][1]:.2f})" in page
    assert together["name"] in page


def _saved(folder, written):
    path = folder / "speed-cpu.json"
    path.write_text(json.dumps(written))
    return path


def test_the_page_shows_what_was_measured():
    page = speed.PAGES["cpu"].read_text()
    assert speed.fill_page(page, speed.RESULTS / "speed-cpu.json") == page


def test_both_sides_of_a_row_are_the_same_loss():
    rows = [row for row in speed.rows(CPU) if row.shape[1] <= 1000 and row.name.startswith(("KD", "CE"))]
    assert len(rows) == 8
    for row in rows:
        s = torch.randn(row.shape, dtype=row.dtype)
        torch.testing.assert_close(row.ours(s), row.usual(s), rtol=1e-4, atol=1e-5)


def test_kernels_and_bytes_are_counted():
    s = torch.randn(4, 5, requires_grad=True)
    counted = speed.kernels(lambda x: (x.view(-1) * 2).sum(), s)
    assert counted.total() == 4, counted  # mul, sum; ones_like, (expand), mul
    big = torch.randn(400, 500, requires_grad=True)
    held, most = speed.memory(lambda x: x.exp().sum(), big)
    assert held == pytest.approx(1.0, abs=0.01)  # the result of exp
    assert most >= 2.0


def test_kernels_are_within_their_bounds():
    """Every kernel is a launch on a GPU."""
    for row in speed.rows(CPU):
        if row.name == "KD" and "kernels" in row.bounds:
            s = torch.randn(row.shape).requires_grad_()
            speed.run(row.ours, s)  # the first step of a store finds rows without history
            assert speed.kernels(row.ours, s).total() <= row.bounds["kernels"], row.name


def test_the_error_of_a_gradient_is_relative_to_the_exact_one():
    s = torch.tensor([[3.0, 4.0]], requires_grad=True)
    assert speed.gradient_error(lambda x: (1.1 * x * x).sum(), lambda x: (x * x).sum(), s) == pytest.approx(0.1)
