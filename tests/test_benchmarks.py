"""The benchmarks compare like with like, what they count is what is there, and pages show what was measured."""

from __future__ import annotations

import json
import math
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from test_examples import load_script

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
speed, gpu_train = (load_script(BENCHMARKS / f"{name}.py") for name in ("speed", "gpu_train"))
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
    with pytest.raises(SystemExit, match="0"):
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


@pytest.mark.parametrize("device", speed.PAGES)
def test_the_page_shows_what_was_measured(device):
    page, results = speed.PAGES[device].read_text(), speed.RESULTS / f"speed-{device}.json"
    if results.exists():
        assert speed.fill_page(page, results) == page
    else:
        assert f"<!-- speed-{device} -->\nNot measured yet." in page


def test_a_row_on_a_gpu_says_launches_and_how_near_it_is_to_its_bytes():
    facts = {"device": "card", "threads": 1, "python": "3", "torch": "2", "installed": {}, "bandwidth": 3e12}
    side = {"kernels": 12, "kept": 1.0, "peak": 1.25, "operators": {}}
    row = {"name": "KD", "shape": [8, 5], "ratio": 0.5, "quartiles": [0.4, 0.6], "seconds": [1e-3, 2e-3], "peers": {}}
    row |= {"bounds": {"bandwidth": 1.2, "memory": 0.4}, "bandwidth": [1.3, 2.6], "ours": side}
    row["usual"] = side | {"peak": 5.0, "kernels": 20}
    assert "a copy moves 3.00 TB/s" in speed.page_table({"machine": facts, "rows": [row]})
    line = "| KD | 8x5 | 2 | 1 | 0.50 (0.40-0.60) | 20, 12 | 5.0, 1.2 | 1.30 |"
    assert speed.page_table({"machine": facts, "rows": [row]}).endswith(line)
    assert speed.verdict(row) == "bandwidth 1.2 MISSED, memory 0.4 met"


def test_rows_of_the_same_machine_are_kept_and_those_of_another_are_not(tmp_path):
    facts = {"device": "card", "torch": "2", "python": "3", "aikd_losses": "0", "bandwidth": 3e12}
    path = _saved(tmp_path, {"machine": facts, "rows": [{"name": "KD"}]})
    now = facts | {"bandwidth": 2e12}
    assert speed.resumed(path, now) == [{"name": "KD"}]
    assert now["bandwidth"] == 3e12  # as that of the rows
    assert speed.resumed(path, facts | {"device": "another"}) == []
    assert speed.resumed(tmp_path / "none.json", facts) == []


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


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """Of training that takes no time: best at learning rate 0.4 and weight decay 0.001, diverging from 0.8 on."""
    jobs = gpu_train.Jobs(gpu_train.SMALL, gpu_train.REHEARSED, tmp_path / "out.jsonl", tmp_path / "teachers")
    trained = []

    def train(run, progress):
        if run.args.lr >= 0.8:
            raise SystemExit(2)
        trained.append((run.args.seed, run.args.label_noise, run.state["phase"], *run.args.terms))
        return torch.nn.Linear(1, 1)

    def numbers(run, model):
        lr, decay = (math.log2(x / best) for x, best in ((run.args.lr, 0.4), (run.args.weight_decay, 1e-3)))
        accuracy = 90 - lr**2 - decay**2 + len(run.args.terms) + 2 * run.args.seed
        return {"accuracy": accuracy, "validation_accuracy": accuracy, "nll_scaled": 1.0, "images_per_second": 5.0}

    monkeypatch.setattr(gpu_train, "train", train)
    monkeypatch.setattr(gpu_train, "numbers", numbers)
    jobs.train_calls = trained
    return jobs


def test_the_setting_that_is_found_is_inside_of_what_was_tried(jobs):
    assert jobs.searched(0.0) == (0.4, 0.001)
    tried = {(line["lr"], line["weight_decay"]) for line in jobs.lines}
    assert {(0.2, 0.001), (0.8, 0.001), (0.4, 0.0005), (0.4, 0.002)} < tried


def test_a_run_that_is_cut_off_goes_on_where_it_was_and_trains_nothing_twice(jobs):
    jobs.all(2)
    whole, calls = jobs.out.read_text(), list(jobs.train_calls)
    assert len(set(calls[-8:])) == 8  # of the last seed: four methods with each kind of labels
    _, *lines = whole.splitlines()
    jobs.train_calls.clear()
    jobs.lines = [json.loads(line) for line in lines[:-3]]
    jobs.all(2)
    assert jobs.train_calls == calls[-3:]
    jobs.lines = [json.loads(line) for line in lines[:-3]]
    for teacher in jobs.teachers.iterdir():  # on another machine
        teacher.unlink()
    jobs.train_calls.clear()
    jobs.all(2)
    assert jobs.train_calls == [calls[-4], *calls[-3:]]
    jobs.lines, jobs.ends = [json.loads(line) for line in lines[:-3]], 0.0
    with pytest.raises(gpu_train.OutOfTimeError):
        jobs.all(2)
    assert len(jobs.lines) == len(lines) - 3


def test_the_table_of_training_has_means_standard_errors_and_paired_differences(jobs):
    jobs.all(3)
    jobs.out.write_text(re.sub(r'"seconds": [^,]+', '"seconds": 7.0', jobs.out.read_text()))
    table = gpu_train.table(jobs.out.read_text())
    # seeds 0, 1, 2 have 90, 92, 94: 92 +- 2 / sqrt(3); three terms are always 3 above
    assert "| clean | cross-entropy | 3 | 92.00 +- 1.15 |  | 1.000 +- 0.000 | 7 | 5 |" in table
    assert "| 40% wrong | full method | 3 | 95.00 +- 1.15 | +3.00 +- 0.00 | 1.000 +- 0.000 | 7 | 5 |" in table
    assert "Clean labels: learning rate 0.4, weight decay 0.001, of" in table


def test_the_page_shows_what_was_trained():
    page, results = gpu_train.PAGE.read_text(), gpu_train.RESULTS / "gpu-train.jsonl"
    if results.exists():
        assert gpu_train.fill_page(page, results.read_text()) == page
    else:
        assert "<!-- gpu-train -->\nNot measured yet." in page
