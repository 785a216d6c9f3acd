"""The reference example: both phases, stopped and resumed, its data, its numbers, and what it refuses."""

from __future__ import annotations

import functools
import gzip
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "cifar_train.py"
SMALL = ["--train-size", "256", "--validation-size", "100", "--epochs", "3", "--batch-size", "64", "--lr", "0.1",
         "--label-noise", "0"]  # fmt: skip


def load_script(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


example = load_script(SCRIPT)


def run(out, *argv):
    example.main([*SMALL, "--out", str(out), *map(str, argv)])
    return records(out)


def records(out):
    """Settings, epochs and the result of a run, without what it took in time."""
    head, *epochs, result = (json.loads(line) for line in (out / "log.jsonl").read_text().splitlines())
    for record in [*epochs, *result["result"].values()]:
        del record["seconds"]
    return head, epochs, result["result"]


def checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def refused(argv, capsys):
    """What the example says, in one line, when it cannot go on."""
    with pytest.raises(SystemExit) as stopped:
        example.main(argv)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("cifar_train.py: ")
    assert message.count("\n") == 1
    return message


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of the full method."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    return out, run(out)


# --------------------------------------------------------------------------------------------------------- both phases


def test_both_phases_log_every_epoch_and_the_result(whole):
    _, (head, epochs, result) = whole
    assert head["settings"]["terms"] == ["progressive", "deterministic", "adversarial"]
    assert head["machine"]["torch"] == torch.__version__
    assert [(r["phase"], r["epoch"]) for r in epochs] == [(p, e) for p in ("pre-trained", "student") for e in range(3)]
    for record in epochs:
        names = ["cross_entropy"] if record["phase"] == "pre-trained" else head["settings"]["terms"]
        assert list(record["terms"]) == names
        assert 0 < record["accuracy"] < 100
        assert 0 < record["ece"] < 100
    assert epochs[2]["accuracy"] > epochs[0]["accuracy"] > 10  # ten classes: it learns
    for name, last in (("pre-trained", epochs[2]), ("student", epochs[5])):
        assert {key: result[name][key] for key in ("accuracy", "nll", "ece")} == {
            key: last[key] for key in ("accuracy", "nll", "ece")
        }
        assert result[name]["nll_scaled"] <= result[name]["nll"] + 0.01


def test_the_temperature_is_fitted_to_the_validation_images_and_applied_to_the_test_images(whole):
    out, (_, _, result) = whole
    args = example.parse([*SMALL, "--out", str(out)])
    data, saved = example.load(args), checkpoint(out)
    for name, weights in (("pre-trained", saved["teacher"]), ("student", saved["model"])):
        model = example.mlp(1, 28, 10)
        model.load_state_dict(weights)
        held, logits = (example.predict(model, part[0], data, args) for part in (data.validation, data.test))
        temperature = result[name]["temperature"]
        assert temperature == example.fit_temperature(held, data.validation[1]) != 1.0
        nll = nn.functional.cross_entropy(logits / temperature, data.test[1])
        assert result[name]["nll_scaled"] == pytest.approx(nll.item())


def test_a_png_and_a_checkpoint_are_left(whole):
    out, _ = whole
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "curves.png", "log.jsonl"]
    saved = checkpoint(out)
    assert (saved["phase"], saved["epoch"]) == (2, 3)
    assert saved["criterion"]["terms.progressive.targets.known"].all()  # 256 images, 4 batches of 64


def test_the_table_fits_a_terminal_and_shows_both_models(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out, (_, _, result) = whole
    run(out, "--resume")  # all is done: nothing but the report
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    (accuracy,) = (line for line in lines if "accuracy, %" in line)
    plain, student = result["pre-trained"]["accuracy"], result["student"]["accuracy"]
    cells = [cell.strip() for cell in accuracy.strip("│").split("│")]
    assert cells == ["accuracy, %", f"{plain:.2f}", f"{student:.2f}", f"{student - plain:+.2f}"]


@pytest.mark.parametrize("saves", [0, 1, 3, 4, 5])
def test_a_run_stopped_in_any_epoch_and_resumed_is_the_whole_one_bit_for_bit(
    saves, whole, tmp_path, monkeypatch, capsys
):
    """Stopped by Ctrl-C at the end of an epoch, before it is saved: that epoch alone is lost."""
    save, left = example.Run.save, itertools.count(saves, -1)

    def interrupted(*args):
        if next(left) == 0:
            raise KeyboardInterrupt
        save(*args)

    monkeypatch.setattr(example.Run, "save", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path)
    assert stopped.value.code == 130
    assert "Go on with --resume." in capsys.readouterr().out
    monkeypatch.setattr(example.Run, "save", save)
    torch.randn(7)  # what the generator's state is does not matter
    resumed = run(tmp_path, *(["--resume"] if saves else []))
    out, expected = whole
    assert resumed == expected
    torch.testing.assert_close(without_times(checkpoint(tmp_path)), without_times(checkpoint(out)), rtol=0, atol=0)


def without_times(saved):
    """Tensors of the criterion's optimizer are in one uint8 tensor of a zip file, which has no times either."""
    return {key: saved[key] for key in ("phase", "epoch", "teacher", "model", "criterion")} | {
        "momentum": saved["optimizer"]["state"]
    }


@pytest.mark.slow
def test_ctrl_c_loses_at_most_the_running_epoch(tmp_path):
    command = [sys.executable, str(SCRIPT), *SMALL, "--epochs", "40", "--lr", "0.02", "--out", str(tmp_path)]
    heard = functools.partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # what a shell starts in the background is deaf
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, text=True, preexec_fn=heard, **pipes) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "checkpoint.pt").exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    saved = checkpoint(tmp_path)
    assert f"Interrupted; saved: epoch {saved['epoch']} of the pre-trained model. Go on with --resume." in said
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=120, check=True)
    assert f" {saved['epoch'] + 1}/40" in done.stdout
    assert len(records(tmp_path)[1]) == 80


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--targets-file"]], ids=["in-memory", "in-a-file"])
def test_a_run_killed_at_random_moments_ends_with_the_numbers_of_the_whole_one(flags, whole, tmp_path):
    """SIGKILL once there is something to lose: in both phases, in the middle of epochs, of writing a checkpoint, whenever."""
    random = np.random.default_rng(len(flags))
    command = [sys.executable, str(SCRIPT), *SMALL, "--out", str(tmp_path), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    kills = []
    for saves in (1, 4):  # epochs that are in the log when the killing begins: one of phase 1, one of phase 2
        resume = ["--resume"] if (tmp_path / "checkpoint.pt").exists() else []
        with subprocess.Popen([*command, *resume], env=environment, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and not has_epochs(tmp_path, saves):
                time.sleep(0.002)
            time.sleep(random.uniform(0, 0.05))
            process.kill()
        kills.append(process.returncode)
    assert -signal.SIGKILL in kills
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    out, expected = whole
    assert records(tmp_path) == expected
    torch.testing.assert_close(without_times(checkpoint(tmp_path)), without_times(checkpoint(out)), rtol=0, atol=0)


def has_epochs(out, count):
    log = out / "log.jsonl"
    return log.exists() and len(log.read_text().splitlines()) > count


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """The network has no batch norm and the global batches are the same, so that rounding alone is different."""
    argv = [*SMALL, "--terms", "progressive,deterministic"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = tmp_path / "two"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*torchrun, str(SCRIPT), *argv, "--out", str(two)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("plain cross-entropy") == 1  # the first process alone speaks
    example.main([*argv, "--out", str(tmp_path / "one")])
    head, epochs, _ = records(two)
    assert head["machine"]["processes"] == 2
    for ours, theirs in zip(records(tmp_path / "one")[1], epochs, strict=True):
        assert theirs["nll"] == pytest.approx(ours["nll"], abs=1e-3)
        assert abs(theirs["accuracy"] - ours["accuracy"]) < 0.5
        if ours["phase"] == "pre-trained":  # each rank reports its half of the batch
            assert theirs["terms"]["cross_entropy"] == pytest.approx(ours["terms"]["cross_entropy"], rel=0.2)
    known = [checkpoint(tmp_path / name)["criterion"]["terms.progressive.targets.known"] for name in ("one", "two")]
    assert known[0].all()
    assert known[1].all()
    rows = [
        checkpoint(tmp_path / name)["criterion"]["terms.progressive.targets.rows"].float() for name in ("one", "two")
    ]
    torch.testing.assert_close(*rows, atol=0.01, rtol=0)


# --------------------------------------------------------------------------------------------------------------- terms


@pytest.mark.parametrize(
    ("terms", "weights"),
    [
        ("none", {"cross_entropy": 1.0}),
        ("deterministic", {"cross_entropy": 0.5, "deterministic": 0.5}),
        ("progressive", {"progressive": 1.0}),
        ("adversarial", {"cross_entropy": 1.0, "adversarial": 1.0}),
        ("progressive,deterministic", {"progressive": 0.5, "deterministic": 0.5}),
        ("progressive,adversarial", {"progressive": 1.0, "adversarial": 1.0}),
        ("deterministic,adversarial", {"cross_entropy": 0.5, "deterministic": 0.5, "adversarial": 1.0}),
        ("adversarial,deterministic,progressive", {"progressive": 0.5, "deterministic": 0.5, "adversarial": 1.0}),
    ],
)
def test_any_subset_of_the_terms_is_one_flag_away(terms, weights, tmp_path):
    args = example.parse(["--terms", terms])
    criterion = example.build_criterion(args, 10, 3)
    assert criterion.weights == weights
    _, epochs, _ = run(tmp_path, "--terms", terms, "--epochs", 1)
    assert set(epochs[-1]["terms"]) == set(weights)


@pytest.mark.parametrize(("terms", "share"), [("progressive,deterministic,adversarial", 0.5), ("progressive", 1.0)])
def test_the_labels_keep_their_weight_where_that_is_asked_for(terms, share):
    args = example.parse(["--terms", terms, "--label-weight", "kept", "--epochs", "4"])
    weight = example.build_criterion(args, 10, 3).weights["progressive"]
    assert [weight(epoch) for epoch in range(4)] == pytest.approx([share, share / 0.6, share / 0.4, share / 0.2])
    assert example.parse(["--dataset", "cifar10"]).label_weight == "kept"


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # dynamo's own look at the logits
def test_the_losses_and_the_network_compile(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    _, epochs, _ = run(tmp_path, "--compile")
    for compiled, eager in zip(epochs, whole[1][1], strict=True):
        assert compiled["nll"] == pytest.approx(eager["nll"], abs=2e-3)


# ---------------------------------------------------------------------------------------------------------------- data


@pytest.fixture
def idx_folder(tmp_path):
    """Files as those of the full Fashion-MNIST, a few images of noise: one gzipped, the others not."""
    folder = tmp_path / "idx"
    folder.mkdir()
    random = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = b"".join(n.to_bytes(4, "big") for n in (0x803, count, 28, 28))
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = b"".join(n.to_bytes(4, "big") for n in (0x801, count))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))
    return folder


def test_the_full_fashion_mnist_is_read_from_idx_files(idx_folder, tmp_path):
    argv = ["--dataset", "fashion-mnist", "--data-dir", str(idx_folder), "--validation-size", "20"]
    args = example.parse([*argv, "--batch-size", "20"])
    data = example.load(args)
    images = np.frombuffer((idx_folder / "t10k-images-idx3-ubyte").read_bytes()[16:], np.uint8).reshape(20, 1, 28, 28)
    assert np.array_equal(data.test[0].numpy(), images)
    assert data.test[1].tolist() == [i % 10 for i in range(20)]
    assert [len(labels) for _, labels in (data.train, data.validation)] == [40, 20]


@pytest.mark.parametrize("model", ["resnet18", "cnn", "mlp"])
def test_every_network_trains_with_augmentation(model, idx_folder, tmp_path):
    run(
        tmp_path / "out", "--dataset", "fashion-mnist", "--data-dir", idx_folder, "--model", model, "--epochs", 1,
        "--train-size", 20, "--validation-size", 20, "--batch-size", 10, "--augment",
    )  # fmt: skip


def test_the_resnet_is_of_the_known_size():
    """11.17 million parameters: the usual figure for ResNet-18 with CIFAR's stem and ten classes."""
    network = example.resnet18(3, 32, 10)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(11.17e6, rel=1e-3)
    assert len([m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]) == 17
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(("name", "image", "label"), [("cifar10", "img", "label"), ("cifar100", "img", "fine_label")])
def test_cifar_is_read_from_parquet_files(name, image, label, tmp_path):
    import datasets

    random = np.random.default_rng(0)
    pixels = {}
    for part, count in (("train", 40), ("test", 10)):
        pixels[part] = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        features = datasets.Features({image: datasets.Image(), label: datasets.Value("int64")})
        columns = {image: list(pixels[part]), label: [i % 10 for i in range(count)]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(
            str(tmp_path / f"{part}-00000-of-00001.parquet")
        )
    argv = ["--dataset", name, "--data-dir", str(tmp_path), "--validation-size", "10", "--batch-size", "10"]
    data = example.load(example.parse(argv))
    assert np.array_equal(data.test[0].numpy(), pixels["test"].transpose(0, 3, 1, 2))
    assert data.test[1].tolist() == list(range(10))
    example.main([*argv, "--model", "cnn", "--epochs", "1", "--out", str(tmp_path / "out")])


def test_the_embedded_images_are_small_balanced_and_licensed():
    folder = example.MINI
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4e6
    assert "MIT License" in (folder / "LICENSE").read_text()
    images, labels, test_images, test_labels = example.load_idx(folder)
    assert labels.bincount().tolist() == test_labels.bincount().tolist() == [400] * 10
    assert images.shape == test_images.shape == (4000, 1, 28, 28)
    every = torch.cat([images, test_images]).flatten(1)
    assert len(every.unique(dim=0)) == len(every)  # no image twice, none in both parts


def test_wrong_labels_are_wrong_and_in_the_training_set_alone():
    clean, noisy = (example.load(example.parse(["--label-noise", share])) for share in ("0", "0.4"))
    for part in ("validation", "test"):
        assert torch.equal(getattr(clean, part)[1], getattr(noisy, part)[1])
        assert torch.equal(getattr(clean, part)[0], getattr(noisy, part)[0])
    assert torch.equal(clean.train[0], noisy.train[0])
    wrong = clean.train[1] != noisy.train[1]
    assert int(wrong.sum()) == 800
    assert noisy.train[1][wrong].bincount(minlength=10).min() > 40  # 80 each, were they perfectly spread
    held, trained = clean.validation[0].flatten(1), clean.train[0].flatten(1)
    assert len(torch.cat([held, trained]).unique(dim=0)) == len(held) + len(trained)


def test_augmentation_shifts_by_up_to_four_pixels_and_flips():
    torch.manual_seed(0)
    data = example.load(example.parse(["--label-noise", "0"]))
    images = data.train[0][:40]
    seen = set()
    augmented = example.prepare(images, data, augment=True)
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    for image, result in zip(padded, augmented, strict=True):
        candidates = {
            (top, left, flip): crop.flip(-1) if flip else crop
            for top, left, flip in itertools.product(range(9), range(9), (False, True))
            for crop in [image[:, top : top + 28, left : left + 28]]
        }
        found = [
            which
            for which, crop in candidates.items()
            if torch.equal(example.prepare(crop[None], data, augment=False)[0], result)
        ]
        assert found
        seen.update(found)
    assert len(seen) > 20
    assert {flip for *_, flip in seen} == {False, True}


# ------------------------------------------------------------------------------------------------------------- numbers


def test_calibration_error_is_the_naive_loop():
    logits, target = 3 * torch.randn(200, 5), torch.randint(5, (200,))
    bins = [[] for _ in range(15)]
    for row, label in zip(logits.softmax(-1).tolist(), target.tolist(), strict=True):
        bins[min(int(max(row) * 15), 14)].append((max(row), row.index(max(row)) == label))
    gaps = [abs(sum(c for c, _ in b) - sum(right for _, right in b)) for b in bins if b]
    measured = example.measure(logits, target)
    assert measured["ece"] == pytest.approx(100 * sum(gaps) / 200, abs=1e-3)
    assert measured["accuracy"] == pytest.approx(100 * (logits.argmax(-1) == target).double().mean().item())
    assert measured["nll"] == pytest.approx(-logits.log_softmax(-1)[range(200), target].mean().item())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_fitted_temperature_undoes_a_scale(temperature):
    logits = torch.randn(20_000, 4)
    target = torch.distributions.Categorical(logits=logits).sample()
    assert example.fit_temperature(temperature * logits, target) == pytest.approx(temperature, rel=0.1)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero():
    values = [example.learning_rate(progress / 100, 0.1) for progress in range(101)]
    assert values[0] == 0.0
    assert values[-1] == pytest.approx(0.0)
    assert max(values) == pytest.approx(0.1, rel=0.01)
    assert values.index(max(values)) == 5


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--terms", "kd"], "--terms must be some of progressive, deterministic, adversarial, or none; got 'kd'."),
        (["--epochs", "0"], "--epochs must be above 0; got 0."),
        (["--batch-size", "-1"], "--batch-size must be above 0; got -1."),
        (["--lr", "nan"], "--lr must be above 0; got nan."),
        (["--weight-decay", "-1"], "--weight-decay must not be negative; got -1.0."),
        (["--label-noise", "1.5"], "--label-noise must be between 0 and 1; got 1.5."),
        (["--alpha", "-0.1"], "--alpha must be between 0 and 1; got -0.1."),
        (["--alpha", "1", "--label-weight", "kept"], "--alpha must be below 1 for --label-weight kept; got 1.0."),
        (["--train-size", "4000"], "must share the 4000 training images; got 1000 and 4000."),
        (["--validation-size", "0"], "--validation-size (at least 1)"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other."),
        (["--data-dir", "nowhere"], "--data-dir nowhere is no folder."),
    ],
)
def test_a_setting_out_of_range_is_one_line(argv, sentence, tmp_path, capsys):
    assert sentence in refused(["--out", str(tmp_path), *argv], capsys)


def test_a_checkpoint_is_neither_overwritten_nor_mixed_up(whole, capsys):
    out, _ = whole
    before = (out / "checkpoint.pt").read_bytes()
    again = [*SMALL, "--out", str(out)]
    assert "Pass --resume to go on from it, --overwrite to start anew, or another --out." in refused(again, capsys)
    message = refused([*again, "--resume", "--lr", "0.3"], capsys)
    assert "--lr was 0.1, now it is 0.3." in message
    assert (out / "checkpoint.pt").read_bytes() == before


def test_resuming_needs_a_checkpoint_and_overwriting_starts_anew(tmp_path, capsys):
    assert "checkpoint.pt, which is not there." in refused(["--out", str(tmp_path), "--resume"], capsys)
    first = run(tmp_path, "--epochs", 1)
    assert run(tmp_path, "--epochs", 1, "--overwrite", "--terms", "none")[1][-1]["terms"].keys() == {"cross_entropy"}
    assert run(tmp_path, "--epochs", 1, "--overwrite") == first


def test_training_that_diverges_is_one_line(tmp_path, capsys):
    message = refused([*SMALL, "--lr", "1e9", "--out", str(tmp_path)], capsys)
    assert "training diverged in epoch 1 of the pre-trained. Pass a smaller --lr (now 1000000000.0)." in message
    assert not (tmp_path / "checkpoint.pt").exists()


def test_data_that_cannot_be_had_is_one_line_that_says_what_to_pass(tmp_path, capsys, monkeypatch):
    import datasets

    def offline(*args, **settings):
        raise ConnectionError("Couldn't reach the hub\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    for name, instead in (("cifar100", "uoft-cs/cifar100"), ("fashion-mnist", "or its four IDX files")):
        message = refused(["--dataset", name, "--out", str(tmp_path)], capsys)
        assert f"{name} cannot be had (ConnectionError: Couldn't reach the hub). Pass --data-dir" in message
        assert instead in message
        assert "or leave --dataset out for the embedded images" in message
    message = refused(["--dataset", "cifar10", "--data-dir", str(tmp_path), "--out", str(tmp_path)], capsys)
    assert (
        "holds no train*.parquet and test*.parquet. Pass --data-dir with the parquet files of uoft-cs/cifar10"
        in message
    )


def test_an_incomplete_folder_of_idx_files_is_one_line(idx_folder, tmp_path, capsys):
    (idx_folder / "t10k-labels-idx1-ubyte.gz").unlink()
    argv = ["--dataset", "fashion-mnist", "--data-dir", str(idx_folder), "--out", str(tmp_path / "out")]
    assert "has no t10k-labels-idx1-ubyte.gz; pass the folder of the four IDX files" in refused(argv, capsys)


def test_a_missing_gpu_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU is to be had. Pass --device cpu." in refused(["--device", "cuda", "--out", str(tmp_path)], capsys)


# ---------------------------------------------------------------------------------------------------------- over seeds


def test_the_summary_over_seeds_is_that_of_its_runs(tmp_path, monkeypatch, capsys):
    seeds = load_script(ROOT / "benchmarks" / "example_seeds.py")
    run_one, written = seeds.run, tmp_path / "results.json"
    kept = ["--label-weights", "kept"]
    monkeypatch.setattr(seeds, "run", lambda script, argv: run_one(script, [*SMALL, *argv]))
    monkeypatch.setattr(sys, "argv", ["seeds", "--seeds", "3", "--weight-decays", "1e-3", *kept, "--out", str(written)])
    seeds.main()
    runs = json.loads(written.read_text())["runs"]
    assert [(r["label_weight"], r["weight_decay"], r["seed"]) for r in runs] == [
        ("kept", 0.001, seed) for seed in range(3)
    ]
    gains = np.array([r["student"]["accuracy"] - r["pre-trained"]["accuracy"] for r in runs])
    nll = np.array([r["student"]["nll_scaled"] - r["pre-trained"]["nll_scaled"] for r in runs])
    table = capsys.readouterr().out
    assert f"{gains.mean():+.2f} ± {gains.std(ddof=1) / 3**0.5:.2f}" in table
    assert f"{nll.mean():+.3f} ± {nll.std(ddof=1) / 3**0.5:.3f}" in table
    assert f"{(gains > 0).sum()}, {(nll < 0).sum()} of 3" in table
