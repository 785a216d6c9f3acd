"""The study of accuracy: its metrics, its methods, and that it goes on where it was stopped."""

from __future__ import annotations

import json
import re
import sys

import accuracy
import pytest
import report
import scores
import sensitivity
import tasks
import torch
from methods import METHODS, VARIANTS, VARIED
from rich.console import Console

TASK = accuracy.Task("mnist1d-200-20", "mlp")


@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(500, 40, generator=g), torch.randint(10, (500,), generator=g)
    monkeypatch.setattr(tasks, "pool", lambda source, folder=None: (x, y, x[:100], y[:100]))
    monkeypatch.setattr(accuracy, "steps_of", lambda task: 4)
    monkeypatch.setattr(tasks, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(accuracy, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(report, "PICTURES", tmp_path / "pictures")
    accuracy.pretrained.cache_clear()


def test_metrics_are_their_definitions():
    logits, target = torch.randn(40, 3), torch.arange(40) % 3
    found = scores.metrics(logits, target, 2.0)
    rows = (logits.double().softmax(-1)).tolist()
    order = sorted(range(40), key=lambda i: -max(rows[i]))
    labels = target.tolist()
    wrong = [rows[i].index(max(rows[i])) != labels[i] for i in range(40)]
    assert found["accuracy"] == pytest.approx(100 * (1 - sum(wrong) / 40))
    risks = [sum(wrong[i] for i in order[: n + 1]) / (n + 1) for n in range(40)]
    assert found["aurc"] == pytest.approx(sum(risks) / 40)
    brier = [sum((p - (c == labels[i])) ** 2 for c, p in enumerate(rows[i])) for i in range(40)]
    assert found["brier"] == pytest.approx(float(sum(brier) / 40), rel=1e-5)
    gap = 0.0
    for b in range(15):
        inside = [i for i in range(40) if b / 15 <= max(rows[i]) < (b + 1) / 15]
        gap += abs(sum(max(rows[i]) - (not wrong[i]) for i in inside)) / 40
    assert found["ece"] == pytest.approx(100 * gap, rel=1e-5)
    assert found["nll_scaled"] == pytest.approx(torch.nn.functional.cross_entropy(logits / 2, target).item())


def test_the_best_temperature_undoes_a_scale():
    target = torch.distributions.Categorical(logits=(logits := torch.randn(20_000, 4))).sample()
    assert scores.best_temperature(3 * logits, target) == pytest.approx(3.0, rel=0.1)


def test_labels_are_as_wrong_as_the_task_says_and_the_true_ones_are_kept_apart():
    data = tasks.draw(TASK, 0)
    assert len(data.y) == 200
    assert (data.validation_y != data.validation_true).float().mean() == 0.2
    x, y, *_ = tasks.pool("mnist1d")
    true = torch.stack([y[(x == row).all(-1)][0] for row in data.x])
    assert (data.y != true).float().mean() == 0.2
    assert not (data.x.unsqueeze(1) == data.validation_x).all(-1).any()  # nothing is in both


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_says_how_it_did(name):
    own = METHODS[name]().grid[:1]
    results = [accuracy.run(accuracy.Run(TASK, name, 0, 0.1, 1e-3, o, (0.1, 1e-3))) for o in (None, *own)]
    for line in results:
        assert 0 <= line["accuracy"] <= 100
        assert line["nll"] > 0
    if own:
        assert results[0]["nll"] != results[1]["nll"]  # the setting does something
    again = accuracy.run(accuracy.Run(TASK, name, 0, 0.1, 1e-3, None, (0.1, 1e-3)))
    assert again | {"seconds": 0} == results[0] | {"seconds": 0}


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


def test_a_study_goes_on_where_it_was_stopped(monkeypatch):
    console = Console(quiet=True)
    names = ["ce", "label smoothing"]
    results = accuracy.Results(TASK, accuracy.FOLDER)
    tuned = accuracy.tune(TASK, names, results, 1, console)
    assert set(tuned) == set(names)
    accuracy.study(TASK, names, 2, tuned, results, 1, console)
    lines = results.path.read_text().splitlines()
    found = accuracy.of_study(results, tuned)
    assert {name: sorted(by_seed) for name, by_seed in found.items()} == {name: [0, 1] for name in names}
    assert report.table(TASK, found).row_count == 2
    assert report.plot(TASK, found).read_text().count("label smoothing") == 1
    results.path.write_text("\n".join(lines[:-3]) + "\n")  # stopped three runs earlier
    again = accuracy.Results(TASK, accuracy.FOLDER)
    accuracy.study(TASK, names, 2, accuracy.tune(TASK, names, again, 1, console), again, 1, console)

    def untimed(text):
        return sorted(re.sub('"seconds": [0-9.]+', "", line) for line in text)

    assert untimed(again.path.read_text().splitlines()) == untimed(lines)


def test_a_varied_setting_is_the_only_difference(monkeypatch):
    """A variant whose value is the default's is the default, to the last bit, and others are something else (not all of them
    in eight steps: a large penalty shows late)."""
    monkeypatch.setattr(accuracy, "steps_of", lambda task: 8)
    teacher = (0.1, 1e-3)
    default = accuracy.run(accuracy.Run(TASK, "full", 0, 0.1, 1e-3, None, teacher))["nll"]
    for setting, values in VARIED.items():
        same = [
            accuracy.run(accuracy.Run(TASK, f"full, {setting} {value}", 0, 0.1, 1e-3, None, teacher))["nll"] == default
            for value in values
        ]
        assert any(same), setting
        assert not all(same), setting


def test_sensitivity_is_drawn_from_the_runs(monkeypatch):
    tuned = {name: dict(lr=0.1, weight_decay=1e-3, own=None) for name in ("ce", "full")}
    accuracy.FOLDER.mkdir()
    (accuracy.FOLDER / "tuned.json").write_text(json.dumps({TASK.name: tuned}))
    monkeypatch.setattr(sensitivity, "FOLDER", accuracy.FOLDER)
    argv = ["sensitivity", "--data", TASK.data, "--net", TASK.net, "--seeds", "2", "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    sensitivity.main()
    assert len(accuracy.Results(TASK, accuracy.FOLDER).done) == 2 * (1 + len(VARIANTS))
    drawn = (report.PICTURES / f"sensitivity-{TASK.name}.svg").read_text()
    assert all(setting in drawn for setting in VARIED)


def test_the_best_setting_is_that_of_the_best_mean():
    def line(lr, seed, validation):
        return {"lr": lr, "weight_decay": 0.0, "own": None, "seed": seed, "validation": validation}

    lines = [line(0.1, 0, 90.0), line(0.1, 1, 50.0), line(0.2, 0, 75.0), line(0.2, 1, 74.0)]
    assert accuracy.best(lines)["lr"] == 0.2


def test_lower_weight_decays_are_tried_while_the_lowest_is_best(monkeypatch):
    """Fake runs: cross-entropy is best at 0.02, label smoothing the better the lower, mixup at 0.002."""
    likes = {"ce": 0.02, "label smoothing": 0.0, "mixup": 0.002}
    tried: dict[str, set[tuple[float, float]]] = {name: set() for name in likes}
    own, teachers = set(), set()

    def fake(runs, *_):
        for r in runs:
            (own if r.own else tried[r.method]).add((r.lr, r.weight_decay))
            teachers.add((r.method == "ce", r.teacher))
        return [vars(r) | {"validation": 50 - abs(r.weight_decay - likes[r.method])} for r in runs]

    monkeypatch.setattr(accuracy, "run_all", fake)
    tuned = accuracy.tune(TASK, list(likes), None, 1, None)
    assert {name: tuned[name]["weight_decay"] for name in likes} == {
        "ce": 0.02,
        "label smoothing": 0.0005,
        "mixup": 0.002,
    }
    assert all(tuned[name]["lr"] == 0.03 for name in likes)  # as good as 0.1, and the first
    grid = {(lr, decay) for lr in (0.03, 0.1) for decay in (0.005, 0.02, 0.06)}
    lower = {(lr, decay) for lr in (0.03, 0.1) for decay in (0.002, 0.0005)}
    assert tried == {"ce": grid, "label smoothing": grid | lower, "mixup": grid | lower}
    assert own == {(0.03, 0.0005), (0.03, 0.002)}  # the setting that is a method's own, at the best of these
    assert teachers == {(True, None), (False, (0.03, 0.02))}


def test_a_run_is_another_one_with_another_pretrained_model_only_if_it_has_one():
    def key(method, teacher):
        return accuracy.Run(TASK, method, 0, 0.1, 0.02, None, teacher).key()

    for method in ("ce", "mixup"):
        assert key(method, (0.1, 0.02)) == key(method, (0.03, 0.005))
    for method in ("deterministic", "full", "full, alpha, last value 0.8"):
        assert key(method, (0.1, 0.02)) != key(method, (0.03, 0.005))
    assert key("ce", None) != key("ce", (0.1, 0.02))  # the pre-trained model itself starts elsewhere


def test_the_pages_show_what_the_results_say(monkeypatch):
    """The tables of the documentation, worked out anew from the lines of the runs."""
    monkeypatch.undo()
    found = accuracy.studied(json.loads((accuracy.FOLDER / "tuned.json").read_text()), accuracy.FOLDER)
    assert found
    assert (report.DOCS / "accuracy-tables.md").read_text() == report.tables(found)
    text = (report.DOCS / "accuracy.md").read_text()
    assert report.whole_page(text, found) == text
    assert all((report.PICTURES / f"accuracy-{task.name}.svg").exists() for task in found)


def test_what_stands_around_a_table_stays():
    for old in ("", "old\n", "old\ntable\n"):
        text = f"before\n<!-- summary -->\n{old}<!-- end -->\nafter\n"
        assert report.between(text, "summary", "new") == "before\n<!-- summary -->\nnew\n<!-- end -->\nafter\n"
    with pytest.raises(AssertionError, match="has no end"):
        report.between("<!-- summary -->\nold", "summary", "new")


def test_a_gain_is_paired_over_the_seeds_that_both_have():
    found = {
        "ce": {0: {"accuracy": 50.0}, 1: {"accuracy": 60.0}, 2: {"accuracy": 9.0}},
        "mixup": {0: {"accuracy": 51.0}, 1: {"accuracy": 63.0}},
        "dlb": {0: {"accuracy": 70.0}, 1: {"accuracy": 10.0}},
    }
    mean, error = report.gain(found, "mixup", "ce", "accuracy")
    assert (mean, error) == (2.0, 1.0)  # differences 1 and 3: deviation sqrt(2), over the root of two seeds
    assert report.best_rival(found, "accuracy") == "mixup"


def test_the_tables_of_the_page_name_the_best_rival_of_each_measure():
    def lines(*pairs):
        return {seed: {"accuracy": a, "nll_scaled": n, "fitted": 80.0 + seed} for seed, (a, n) in enumerate(pairs)}

    found = {
        "ce": lines((50.0, 1.0), (60.0, 2.0)),
        "mixup": lines((52.0, 1.5), (62.0, 2.5)),
        "full": lines((51.0, 0.5), (63.0, 1.5)),
        "full halves": lines((50.0, 1.0), (64.0, 2.0)),
    }
    every = {TASK: found}
    assert report.at_a_glance(
        every | {accuracy.Task("mnist1d-200-0", "mlp"): {"ce": found["ce"], "full": found["ce"]}}
    ) == (
        "| method | tasks | better | level | worse | lowest | median | highest |\n"
        "|---|---|---|---|---|---|---|---|\n"
        "| full | 2 | 1 | 1 | 0 | +0.00 | +1.00 | +2.00 |\n"
        "| full halves | 1 | 0 | 1 | 0 | +2.00 | +2.00 | +2.00 |\n"
        "| mixup | 1 | 1 | 0 | 0 | +2.00 | +2.00 | +2.00 |"
    )
    row = report.over_cross_entropy(every).splitlines()[-1]
    assert row == "| mnist1d-200-20-mlp | 55.00 | 80 | - | +2.00 ± 1.00 | - | +2.00 ± 2.00 | - | - |"
    row = report.over_best_rival(every, "accuracy").splitlines()[-1]
    assert row == "| mnist1d-200-20-mlp | mixup, 57.00 | - | +0.00 ± 1.00 | - | +0.00 ± 2.00 | - | - |"
    row = report.over_best_rival(every, "nll_scaled").splitlines()[-1]
    assert row == "| mnist1d-200-20-mlp | ce, 1.500 | - | -0.500 ± 0.000 | - | +0.000 ± 0.000 | - | - |"


def test_the_setting_of_the_full_method_is_chosen_by_validation_samples():
    at = {"lr": 0.1, "weight_decay": 0.02, "own": None}

    def line(method, seed, validation, test, lr=0.1, teacher=(0.1, 0.02)):
        setting = at | {"lr": lr}
        return {
            "method": method,
            "seed": seed,
            "validation": validation,
            "accuracy": test,
            "teacher": teacher,
        } | setting

    results = accuracy.Results(TASK, accuracy.FOLDER)
    for seed in accuracy.TUNING_SEEDS:
        results.add(line("full", seed, 70.0, 50.0))
        results.add(line("full halves", seed, 60.0, 90.0))
        results.add(line("full halves", seed, 80.0, 90.0, lr=0.03))  # not the setting that was tuned
        results.add(line("full halves", seed, 80.0, 90.0, teacher=(0.1, 0.06)))  # another pre-trained model
    results.add(line("full halves", 0, 99.0, 90.0))  # a seed of the study
    assert accuracy.setting_of_full(results, {"ce": at, "full": at, "full halves": at}) == "full"
    assert accuracy.setting_of_full(results, {"ce": at, "full": at, "full halves": at | {"lr": 0.03}}) == "full halves"
    assert (
        accuracy.setting_of_full(results, {"ce": at, "full": at, "full halves T4": at}) == "full"
    )  # T4: tuned elsewhere


def test_the_full_method_is_also_dropped_in_at_cross_entropys_setting():
    tuned = {name: {"lr": lr, "weight_decay": 0.02, "own": None} for name, lr in (("ce", 0.1), ("full", 0.03))}
    results, console = accuracy.Results(TASK, accuracy.FOLDER), Console(quiet=True)
    of_tuning = [accuracy.as_tuned(TASK, "full", seed, tuned) for seed in accuracy.TUNING_SEEDS]
    accuracy.run_all(of_tuning, results, 1, console, "")
    accuracy.study(TASK, list(tuned), 2, tuned, results, 1, console)
    found = accuracy.studied({TASK.name: tuned}, accuracy.FOLDER)[TASK]
    for name, method, lr in (("ce", "ce", 0.1), ("full", "full", 0.03), ("drop-in", "full", 0.1)):
        assert {(seed, line["method"], line["lr"]) for seed, line in found[name].items()} == {
            (0, method, lr),
            (1, method, lr),
        }
    same = accuracy.Results(TASK, accuracy.FOLDER / "same")
    accuracy.study(TASK, list(tuned), 2, tuned | {"full": tuned["ce"]}, same, 1, console)
    assert [line["method"] for line in same.lines if line["seed"] == 0] == ["ce", "full"]  # and not twice
    repeated = accuracy.with_columns(same, tuned | {"full": tuned["ce"]})
    assert set(repeated) == {"ce", "full", "drop-in"}  # where nothing was tuned, no setting was chosen
    without = accuracy.studied({TASK.name: {"ce": tuned["ce"]}}, accuracy.FOLDER)[TASK]
    assert set(without) == {"ce"}
    results.path.write_text("".join(f"{json.dumps(line)}\n" for line in results.lines if line["lr"] == 0.03))
    stopped = accuracy.with_columns(accuracy.Results(TASK, accuracy.FOLDER), tuned)
    assert set(stopped) == {"full", "full tuned"}  # before any was dropped in


def test_many_samples_are_seen_ten_times(monkeypatch):
    monkeypatch.undo()
    steps = {
        size: accuracy.steps_of(accuracy.Task(f"mnist1d-{size}-0", "mlp")) for size in (1_000, 2_000, 4_000, 58_000)
    }
    assert steps == {1_000: 600, 2_000: 600, 4_000: 1_200, 58_000: 5_800}
