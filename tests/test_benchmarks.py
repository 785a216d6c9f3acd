"""The benchmark of speed runs, and what it counts is what is there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from test_examples import load_script

speed = load_script(Path(__file__).parent.parent / "benchmarks" / "speed.py")


def test_a_row_is_measured_and_written(tmp_path, monkeypatch, capsys):
    out = tmp_path / "speed.json"
    argv = ["speed", "--rows", "T=1", "--seconds", "0.01", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(
        speed, "rows", lambda device: [speed.together((8, 5), 1.0, 0.5, device), speed.with_store(device)]
    )
    speed.main()
    written = json.loads(out.read_text())
    (row,) = written["rows"]  # the other name has no T=1
    assert row["ratio"] > 0
    assert row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]
    assert written["machine"]["torch"] == torch.__version__
    assert "all three, T=1" in capsys.readouterr().out


def test_both_sides_of_every_row_are_the_same_loss():
    for shape, temperature in (((8, 5), 4.0), ((8, 5), 1.0)):
        row = speed.together(shape, temperature, 1.0, torch.device("cpu"))
        s = torch.randn(shape)
        torch.testing.assert_close(row.ours(s), row.usual(s))
    for row in speed.rows(torch.device("cpu"))[:3]:
        s = torch.randn(row.shape)
        torch.testing.assert_close(row.ours(s), row.usual(s), rtol=1e-4, atol=1e-5)


def test_kernels_and_bytes_are_counted():
    s = torch.randn(4, 5, requires_grad=True)
    assert (
        speed.kernels(lambda x: (x.view(-1) * 2).sum(), s) == 4  # mul, sum; ones_like, mul
    )  # mul, sum; ones_like, (expand), mul; accumulate
    big = torch.randn(400, 500, requires_grad=True)
    held, most = speed.memory(lambda x: x.exp().sum(), big)
    assert held == pytest.approx(1.0, abs=0.01)  # the result of exp
    assert most >= 2.0


def test_kernels_of_a_term_are_bounded():
    """Every kernel is a launch on a GPU; the usual composition of KD has 17, the three terms together 47."""
    counts = {}
    for row in speed.rows(torch.device("cpu")):
        if row.shape == (128, 100):
            counts[row.name] = speed.kernels(row.ours, torch.randn(row.shape).requires_grad_())
    assert counts["KD, T=4"] <= 12
    assert counts["all three, T=4"] <= 31
    assert counts["all three, T=1"] <= 25
