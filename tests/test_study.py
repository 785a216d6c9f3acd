"""The study of accuracy: its metrics, its methods, what it searches, and that it goes on where it was stopped."""

from __future__ import annotations

import re
import sys

import _report
import accuracy
import pytest
import report
import scores
import tasks
import torch
from methods import METHODS

TASK = accuracy.Task("mnist1d-200-20", "mlp")


@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(500, 40, generator=g), torch.randint(10, (500,), generator=g)
    monkeypatch.setattr(tasks, "pool", lambda source, folder=None: (x, y, x[:100], y[:100]))
    monkeypatch.setattr(accuracy, "steps_of", lambda task: 4)
    monkeypatch.setattr(tasks, "CACHE", tmp_path / "cache")
    accuracy.pretrained.cache_clear()


def test_metrics_are_their_definitions():
    logits, target = 3 * torch.randn(200, 5), torch.randint(5, (200,))
    found = scores.metrics(logits, target, 2.0)
    probs = logits.double().softmax(-1).tolist()
    rows = [(max(p), p.index(max(p)) != y, p, y) for p, y in zip(probs, target.tolist(), strict=True)]
    assert found["accuracy"] == pytest.approx(100 * (1 - sum(wrong for _, wrong, *_ in rows) / 200))
    wrongs = [wrong for _, wrong, *_ in sorted(rows, key=lambda row: -row[0])]  # the surest first
    assert found["aurc"] == pytest.approx(sum(sum(wrongs[:n]) / n for n in range(1, 201)) / 200)
    brier = [sum((p - (c == label)) ** 2 for c, p in enumerate(row)) for *_, row, label in rows]
    assert found["brier"] == pytest.approx(sum(brier) / 200, rel=1e-5)
    bins = [[sure - (not wrong) for sure, wrong, *_ in rows if b / 15 <= sure < (b + 1) / 15] for b in range(15)]
    assert found["ece"] == pytest.approx(100 * sum(abs(sum(gaps)) for gaps in bins) / 200, rel=1e-5)
    assert found["nll"] == pytest.approx(-logits.log_softmax(-1)[range(200), target].mean().item())
    assert found["nll_scaled"] == pytest.approx(torch.nn.functional.cross_entropy(logits / 2, target).item())
    of_examples = _report.measure(logits, target)
    assert of_examples == pytest.approx({name: found[name] for name in ("accuracy", "nll", "ece")}, rel=1e-5)


@pytest.mark.parametrize("fit", [scores.best_temperature, _report.fit_temperature])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_best_temperature_undoes_a_scale(temperature, fit):
    target = torch.distributions.Categorical(logits=(logits := torch.randn(20_000, 4))).sample()
    assert fit(temperature * logits, target) == pytest.approx(temperature, rel=0.1)


def test_labels_are_as_wrong_as_the_task_says_and_the_true_ones_are_kept_apart():
    data = tasks.draw(TASK, 0)
    assert len(data.y) == 200
    assert (data.validation_y != data.validation_true).float().mean() == 0.2
    x, y, *_ = tasks.pool("mnist1d")
    true = torch.stack([y[(x == row).all(-1)][0] for row in data.x])
    assert (data.y != true).float().mean() == 0.2
    assert not (data.x.unsqueeze(1) == data.validation_x).all(-1).any()  # nothing is in both


def test_images_are_read_by_the_examples_reader_and_scaled():
    x, y, test_x, test_y = tasks.images("fashion-mnist-mini", None)
    assert x.shape[1:] == test_x.shape[1:] == (1, 28, 28)
    assert [len(x), len(test_x)] == [len(y), len(test_y)]
    assert x.mean() == pytest.approx(0, abs=1e-3)
    assert x.std() == pytest.approx(1, abs=1e-3)
    with pytest.raises(SystemExit, match="--data-dir"):
        tasks.images("fashion-mnist", None)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_says_how_it_did(name):
    def nll(own):
        line = accuracy.run(accuracy.Run(TASK, name, 0, 0.1, 1e-3, own, (0.1, 1e-3)))
        assert 0 <= line["accuracy"] <= 100
        return line["nll"]

    assert nll(None) == nll(None) > 0
    for own in METHODS[name]().grid[:1]:
        assert nll(own) != nll(None)  # the setting does something


def test_stopping_early_ends_with_the_best_epochs_weights(monkeypatch):
    """The validation accuracy of the run is the best of its epochs, which a run that is never stopped passes through too."""
    monkeypatch.setattr(accuracy, "steps_of", lambda task: 40)
    seen: list[float] = []
    data = tasks.draw(TASK, 1)

    class Watched(METHODS["ce"]):
        def after_epoch(self):
            logits = accuracy.logits_of(self.model, data.validation_x)
            seen.append(100 * float((logits.argmax(-1) == data.validation_y).float().mean()))

    accuracy.train(TASK, data, Watched(), 500_000, 0.3, 0.0)
    stopped = METHODS["ce stopped early"]()
    model = accuracy.train(TASK, data, stopped, 500_000, 0.3, 0.0)
    held = accuracy.logits_of(model, data.validation_x)
    assert len(seen) == 20
    assert seen[-1] < max(seen)
    assert 100 * float((held.argmax(-1) == data.validation_y).float().mean()) == max(seen)
    assert stopped.report() == {"stopped": 1 + seen.index(max(seen)), "epochs": 20}


def test_a_study_goes_on_where_it_was_stopped(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(accuracy, "LEARNING_RATES", (0.03, 0.1, 0.3))
    monkeypatch.setattr(accuracy, "WEIGHT_DECAYS", (1e-3,))

    def lines(*more):
        argv = ["--data", TASK.data, "--net", TASK.net, "--methods", "mixup", "--seeds", "2", "--jobs", "1"]
        monkeypatch.setattr(sys, "argv", ["accuracy", *argv, "--results", str(tmp_path), *more])
        accuracy.main()
        return sorted(re.sub('"seconds": [0-9.]+', "", line) for line in path.read_text().splitlines())

    path = tmp_path / f"{TASK.name}.jsonl"
    untuned = lines()
    assert len(untuned) == 1 + 2 * 2  # the machine; two methods on two seeds
    printed = " ".join(capsys.readouterr().out.split())
    assert "NOT SEARCHED, so no verdict: learning rate 0.05 and weight decay 0.005" in printed
    tuned = lines("--tune")
    assert len(tuned) == len(untuned) + 3 * 2 + (3 + 3) * 2 + 2 * 2  # the grid, mixup's also its own; the study
    printed = " ".join(capsys.readouterr().out.split())
    assert "NOT SEARCHED" not in printed
    assert "AT THE EDGE of the grid, so perhaps not at its best: weight decay of ce, mixup." in printed
    path.write_text("\n".join(path.read_text().splitlines()[:-3]) + "\n")  # stopped three runs earlier
    assert lines("--tune") == tuned


def test_the_search_is_the_same_for_every_method_and_what_ends_at_an_edge_is_named(monkeypatch):
    """Fake runs: cross-entropy likes the middle of the grid, the others its ends, in the mean of the seeds."""
    rates, decays = accuracy.LEARNING_RATES, accuracy.WEIGHT_DECAYS
    likes = {"ce": (0.1, 6e-3), "label smoothing": (rates[-1], 2e-2), "mixup": (0.3, decays[0])}
    runs_of: dict[str, list] = {name: [] for name in likes}

    def fake(runs, *_):
        lines = []
        for r in runs:
            runs_of[r.method].append(r)
            of_seed = {1000: 90, 1001: 10}[r.seed]  # the best of one seed, and not in the mean
            lines.append(vars(r) | {"validation": 60 if (r.lr, r.weight_decay) == likes[r.method] else of_seed})
        return lines

    monkeypatch.setattr(accuracy, "run_all", fake)
    tuned = accuracy.tune(TASK, list(likes), None, 1, None)
    assert {name: (at["lr"], at["weight_decay"]) for name, at in tuned.items()} == likes
    grid = len(rates) * len(decays)
    assert [len(runs) for runs in runs_of.values()] == [2 * grid, 2 * (grid + 3), 2 * (grid + 3)]
    assert {r.teacher for r in runs_of["ce"]} == {None}
    assert {r.teacher for r in runs_of["mixup"]} == {likes["ce"]}
    own = [r for r in runs_of["mixup"] if r.own is not None]
    assert {(r.lr, r.weight_decay) for r in own} == {likes["mixup"]}
    start = "AT THE EDGE of the grid, so perhaps not at its best: "
    edges = ["learning rate of label smoothing.", "weight decay of mixup."]
    assert accuracy.doubts(list(likes), tuned) == [start + edge for edge in edges]


def test_a_run_is_another_one_with_another_pretrained_model_only_if_it_has_one():
    def key(method, teacher):
        return accuracy.Run(TASK, method, 0, 0.1, 0.02, None, teacher).key()

    for method in ("ce", "mixup", "progressive"):
        assert key(method, (0.1, 0.02)) == key(method, (0.03, 0.005))
    for method in ("deterministic", "full", "full handing over"):
        assert key(method, (0.1, 0.02)) != key(method, (0.03, 0.005))
    assert key("ce", None) != key("ce", (0.1, 0.02))  # the pre-trained model itself starts elsewhere


def test_a_gain_is_paired_over_the_seeds_that_both_have():
    found = {
        "ce": {0: {"accuracy": 50.0}, 1: {"accuracy": 60.0}, 2: {"accuracy": 9.0}},
        "mixup": {0: {"accuracy": 51.0}, 1: {"accuracy": 63.0}, 3: {"accuracy": 99.0}},
    }
    gained = report.gains(found, "mixup", "accuracy")
    assert gained == [1.0, 3.0]
    assert report.spread(gained, "+.2f") == "+2.00 ± 1.00"  # deviation sqrt(2), over the root of two seeds
    assert report.spread([1.0], "+.2f") == "+1.00"


def test_many_samples_are_seen_ten_times(monkeypatch):
    monkeypatch.undo()
    for size, steps in ((1_000, 600), (2_000, 600), (4_000, 1_200), (58_000, 5_800)):
        assert accuracy.steps_of(accuracy.Task(f"mnist1d-{size}-0", "mlp")) == steps
