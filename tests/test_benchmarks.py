"""The benchmark of speed runs, and what it counts is what is there."""

from __future__ import annotations

import itertools
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
        speed, "rows", lambda device, say: [speed.together((8, 5), 1.0, 0.5, device), speed.with_store(device)]
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
    for row in itertools.islice(speed.rows(torch.device("cpu")), 3):
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
    """Every kernel is a launch on a GPU; the usual composition of KD has 17, the three terms together 47, a step with PS-KD's
    store 145, an adversarial one 127."""
    cpu, shape = torch.device("cpu"), (128, 100)
    kd = next(row for row in speed.rows(cpu) if row.shape == shape)
    stacks = [speed.together(shape, temperature, None, cpu) for temperature in (4.0, 1.0)]
    counts = {}
    for row in (kd, *stacks, speed.with_store(cpu), speed.adversarial(cpu)):
        s = torch.randn(shape).requires_grad_()
        speed.finish(row.ours(s))  # the first step of a store finds rows without history
        s.grad = None
        counts[row.name] = speed.kernels(row.ours, s)
    assert counts["KD, T=4"] <= 12
    assert counts["all three, T=4"] <= 22
    assert counts["all three, T=1"] <= 15
    assert counts["progressive, store"] <= 23
    assert counts["adversarial step"] <= 50


def test_a_whole_step_says_what_it_costs_and_every_bound_is_judged():
    for row in (speed.adversarial(torch.device("cpu")), speed.by_hand(torch.device("cpu"))):
        result = speed.measure(row, torch.device("cpu"), 0.001)
        assert result["ours"]["kernels"] > 0
    row.bound, row.kernels, row.peak, row.error = 1.0, 5, 2.0, 1e-3
    result = {"ratio": 1.1, "ours": {"kernels": 5, "peak": 3.0}, "error": 1e-4}
    assert speed.verdict(row, result) == "1 missed, kernels 5 met, peak 2 missed, error 0.001 met"


@pytest.mark.parametrize("classes", [5, 40])
def test_the_bare_arithmetic_is_that_of_the_usual_composition(classes):
    s, t = torch.randn(8, classes, requires_grad=True), torch.randn(8, classes)
    found, expected = (
        (value.detach(), torch.autograd.grad(3 * value, s)[0])
        for value in (speed.Bare.apply(s, t, 4.0), speed.kd(s, t, 4.0))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_floor_is_timed_against_the_usual_composition():
    row = next(speed.rows(torch.device("cpu")))
    result = speed.measure(row, torch.device("cpu"), 0.01)
    assert list(result["floors"]) == ["nothing", "arithmetic"]
    assert 0 < result["floors"]["nothing"]["ratio"] < result["floors"]["arithmetic"]["ratio"]


def test_both_sides_of_aikd_by_hand_are_the_same():
    row, s = speed.by_hand(torch.device("cpu")), torch.randn(128, 10)
    torch.testing.assert_close(row.ours(s), row.usual(s))


def test_the_error_of_a_gradient_is_relative_to_the_exact_one():
    s = torch.tensor([[3.0, 4.0]], requires_grad=True)
    assert speed.gradient_error(lambda x: (1.1 * x * x).sum(), lambda x: (x * x).sum(), s) == pytest.approx(0.1)


def test_another_package_is_timed_where_it_is_there_and_skipped_with_a_line_where_not(monkeypatch):
    def absent(temperature):
        raise ImportError("first line\nno such package")

    monkeypatch.setattr(speed, "PEERS", {"here": lambda temperature: lambda s, t: s.sum() * 0, "absent": absent})
    lines = []
    row = next(speed.rows(torch.device("cpu"), lines.append))
    assert lines == ["skipped absent: no such package"]
    result = speed.measure(row, torch.device("cpu"), 0.001)
    assert list(result["peers"]) == ["here"]
    low, high = result["peers"]["here"]["quartiles"]
    assert low <= result["peers"]["here"]["ratio"] <= high
