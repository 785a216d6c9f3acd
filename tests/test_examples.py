"""The reference example: both phases, stopped and resumed, its data, its numbers, and what it refuses."""

from __future__ import annotations

import functools
import gzip
import importlib.util
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.launcher import LaunchConfig, elastic_launch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "cifar_train.py"
sys.path.insert(0, str(SCRIPT.parent))
import _data as data_of  # noqa: E402
import _networks as networks  # noqa: E402
import _report as reporting  # noqa: E402
import cifar_train as example  # noqa: E402

SMALL = ["--train-size", "256", "--validation-size", "100", "--epochs", "3", "--batch-size", "64", "--lr", "0.1",
         "--label-noise", "0"]  # fmt: skip
FORK = multiprocessing.get_context("fork")


def load_script(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


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


def weights(out):
    """What a checkpoint holds but for seconds."""
    saved = checkpoint(out)
    return {key: saved[key] for key in ("phase", "epoch", "teacher", "model", "criterion", "optimizer")}


def loaded(*argv):
    return data_of.load(example.parse(list(map(str, argv))))


def refused(argv, capsys):
    """What the example says, in one line, when it cannot go on."""
    with pytest.raises(SystemExit) as stopped:
        example.main(list(map(str, argv)))
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


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    """Which takes longer than such a short training; `whole` has drawn one."""
    monkeypatch.setattr(reporting, "plot", lambda *args: None)


# --------------------------------------------------------------------------------------------------------- both phases


def test_both_phases_log_every_epoch_and_the_result(whole):
    _, (head, epochs, result) = whole
    terms = ["progressive", "deterministic", "adversarial"]
    assert head["settings"]["terms"] == terms
    assert head["machine"]["torch"] == torch.__version__
    assert [(r["phase"], r["epoch"]) for r in epochs] == [(p, e) for p in ("pre-trained", "student") for e in range(3)]
    for record in epochs:
        assert list(record["terms"]) == (["cross_entropy"] if record["phase"] == "pre-trained" else terms)
        assert ("adversarial/accuracy" in record["diagnostics"]) == (record["phase"] == "student")
        assert 0 < record["accuracy"] < 100
        assert 0 < record["ece"] < 100
    assert epochs[2]["accuracy"] > epochs[0]["accuracy"] > 10  # ten classes: it learns
    for name, last in (("pre-trained", epochs[2]), ("student", epochs[5])):
        assert {key: result[name][key] for key in ("accuracy", "nll", "ece")}.items() <= last.items()
        assert result[name]["nll_scaled"] <= result[name]["nll"] + 0.01


def test_the_temperature_is_fitted_to_the_validation_images_and_applied_to_the_test_images(whole):
    out, (_, _, result) = whole
    data, saved = loaded(*SMALL), checkpoint(out)
    for name, trained in (("pre-trained", saved["teacher"]), ("student", saved["model"])):
        model = networks.mlp(1, 28, 10)
        model.load_state_dict(trained)
        temperature = result[name]["temperature"]
        assert temperature == reporting.fit_temperature(*reporting.predict(model, data, data.validation)) != 1.0
        logits, target = reporting.predict(model, data, data.test)
        nll = nn.functional.cross_entropy(logits / temperature, target)
        assert result[name]["nll_scaled"] == pytest.approx(nll.item())


def test_a_run_leaves_a_picture_a_log_and_a_checkpoint_and_its_table_fits_a_terminal(whole, capsys, monkeypatch):
    out, (_, _, result) = whole
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "curves.png", "log.jsonl"]
    saved = checkpoint(out)
    assert (saved["phase"], saved["epoch"]) == (2, 3)
    assert saved["criterion"]["terms.progressive.targets.known"].all()  # 256 images, 4 batches of 64
    monkeypatch.setenv("COLUMNS", "80")
    run(out, "--resume")  # all is done: nothing but the report
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    (accuracy,) = (line for line in lines if "accuracy, %" in line)
    plain, student = result["pre-trained"]["accuracy"], result["student"]["accuracy"]
    cells = [cell.strip() for cell in accuracy.strip("│").split("│")]
    assert cells == ["accuracy, %", f"{plain:.2f}", f"{student:.2f}", f"{student - plain:+.2f}"]


@pytest.mark.parametrize(
    ("name", "writes"), [("checkpoint.pt", 0), ("checkpoint.pt", 2), ("checkpoint.pt", 3), ("log.jsonl", 4)]
)
def test_a_run_stopped_while_it_writes_and_resumed_is_the_whole_one_bit_for_bit(
    name, writes, whole, tmp_path, monkeypatch, capsys
):
    """Ctrl-C before the new file takes the old one's place: in either phase, with nothing saved of it or something."""
    replace, left = os.replace, itertools.count(writes, -1)

    def interrupted(new, old):
        if Path(old).name == name and next(left) == 0:
            raise KeyboardInterrupt
        replace(new, old)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path)
    assert stopped.value.code == 130
    epoch = {0: 0, 2: 2, 3: 0, 4: 2}[writes]
    saved = f"epoch {epoch} of the {'pre-trained' if writes < 3 else 'student'} model"
    assert f"Interrupted; saved: {saved}. Go on with --resume." in capsys.readouterr().out
    monkeypatch.setattr(os, "replace", replace)
    torch.randn(7)  # what the generator's state is does not matter
    out, expected = whole
    assert run(tmp_path, *(["--resume"] if writes else [])) == expected
    torch.testing.assert_close(weights(tmp_path), weights(out), rtol=0, atol=0)


@pytest.mark.slow
def test_a_process_stopped_at_random_moments_ends_with_the_numbers_of_the_whole_run(whole, tmp_path):
    """By Ctrl-C in the first phase, by SIGKILL in the second: in an epoch, in writing a checkpoint, whenever."""
    random = np.random.default_rng()
    out, expected = whole
    for how, code, epochs, resume in ((signal.SIGINT, 130, 1, []), (signal.SIGKILL, -9, 4, ["--resume"])):
        process = FORK.Process(target=hearing, args=(tmp_path, *resume))
        process.start()
        while process.is_alive() and not has_epochs(tmp_path, epochs):
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.03))
        os.kill(process.pid, how)
        process.join(60)
        assert process.exitcode == code
    assert run(tmp_path, "--resume") == expected
    torch.testing.assert_close(weights(tmp_path), weights(out), rtol=0, atol=0)


def hearing(*args):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background is deaf
    run(*args)


def has_epochs(out, count):
    log = out / "log.jsonl"
    return log.exists() and len(log.read_text().splitlines()) > count


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, capfd):
    """The network has no batch norm and the global batches are the same, so that rounding alone is different."""
    argv, outs = [*SMALL, "--terms", "progressive,deterministic"], [tmp_path / "one", tmp_path / "two"]
    process = FORK.Process(target=torchrun, args=([*argv, "--out", str(outs[1])],))
    process.start()
    process.join(200)
    assert process.exitcode == 0
    assert capfd.readouterr().out.count("plain cross-entropy") == 1  # the first process alone speaks
    example.main([*argv, "--out", str(outs[0])])
    (_, ours, _), (head, theirs, _) = map(records, outs)
    assert head["machine"]["processes"] == 2
    for one, two in zip(ours, theirs, strict=True):
        assert two["nll"] == pytest.approx(one["nll"], abs=1e-3)
        assert abs(two["accuracy"] - one["accuracy"]) < 0.5
        if one["phase"] == "pre-trained":  # each rank reports its half of the batch
            assert two["terms"]["cross_entropy"] == pytest.approx(one["terms"]["cross_entropy"], rel=0.2)
    stores = [checkpoint(out)["criterion"] for out in outs]
    assert all(store["terms.progressive.targets.known"].all() for store in stores)
    torch.testing.assert_close(
        *(store["terms.progressive.targets.rows"].float() for store in stores), atol=0.01, rtol=0
    )


def torchrun(argv):
    """What the command does, but that its processes need not import everything anew."""
    config = LaunchConfig(1, 1, 2, run_id="0", rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork")
    elastic_launch(config, example.main)(argv)


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
    assert example.build_criterion(example.parse(["--terms", terms]), 10, 3).weights == weights
    _, epochs, _ = run(tmp_path, "--terms", terms, "--epochs", 1)
    assert set(epochs[-1]["terms"]) == set(weights)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # dynamo's own look at the logits
def test_the_losses_and_the_network_compile(tmp_path, monkeypatch):
    compiled, backend = [], functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(type(module).__name__) or backend(module))
    outs = [run(tmp_path / name, "--epochs", 1, *flags)[1] for name, flags in (("no", []), ("yes", ["--compile"]))]
    assert compiled == ["Sequential", "LossStack", "Sequential", "AIKDLoss", "FrozenTeacher"]
    for ours, eager in zip(*outs, strict=True):
        assert ours["nll"] == pytest.approx(eager["nll"], abs=2e-3)


# ---------------------------------------------------------------------------------------------------------------- data


@pytest.fixture
def idx_folder(tmp_path):
    """Files as those of the full Fashion-MNIST, a few images of noise: one gzipped, the others not."""
    folder = tmp_path / "idx"
    folder.mkdir()
    random = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 10)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = b"".join(n.to_bytes(4, "big") for n in (0x803, count, 28, 28))
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = b"".join(n.to_bytes(4, "big") for n in (0x801, count))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))
    return folder


@pytest.mark.parametrize("model", ["resnet18", "cnn", "mlp"])
def test_every_network_trains_on_idx_files_with_augmentation(model, idx_folder, tmp_path):
    argv = ["--dataset", "fashion-mnist", "--data-dir", idx_folder, "--train-size", 16, "--validation-size", 10,
            "--batch-size", 8]  # fmt: skip
    data = loaded(*argv)
    images = np.frombuffer((idx_folder / "t10k-images-idx3-ubyte").read_bytes()[16:], np.uint8).reshape(10, 1, 28, 28)
    assert np.array_equal(data.test[0].numpy(), images)
    assert data.test[1].tolist() == list(range(10))
    assert [len(labels) for _, labels in (data.train, data.validation)] == [16, 10]
    head, _, _ = run(tmp_path / "out", *argv, "--model", model, "--epochs", 1, "--augment")
    assert head["settings"]["augment"]


def test_the_resnet_is_of_the_known_size():
    """11.17 million parameters: the usual figure for ResNet-18 with CIFAR's stem and ten classes."""
    network = networks.resnet18(3, 32, 10)
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
        path = tmp_path / f"{part}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
    argv = ["--dataset", name, "--data-dir", str(tmp_path), "--validation-size", "10", "--batch-size", "10"]
    data = loaded(*argv)
    assert np.array_equal(data.test[0].numpy(), pixels["test"].transpose(0, 3, 1, 2))
    assert data.test[1].tolist() == list(range(10))
    example.main([*argv, "--model", "cnn", "--epochs", "1", "--out", str(tmp_path / "out")])


def test_the_embedded_images_are_small_balanced_and_licensed():
    folder = data_of.MINI
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4e6
    assert "MIT License" in (folder / "LICENSE").read_text()
    images, labels, test_images, test_labels = data_of.read("fashion-mnist-mini")
    assert labels.bincount().tolist() == test_labels.bincount().tolist() == [400] * 10
    assert images.shape == test_images.shape == (4000, 1, 28, 28)
    every = torch.cat([images, test_images]).flatten(1)
    assert len(every.unique(dim=0)) == len(every)  # no image twice, none in both parts


def test_wrong_labels_are_wrong_and_in_the_training_set_alone():
    clean, noisy = (loaded("--label-noise", share) for share in (0, 0.4))
    for part in ("validation", "test"):
        assert all(map(torch.equal, getattr(clean, part), getattr(noisy, part)))
    assert torch.equal(clean.train[0], noisy.train[0])
    wrong = clean.train[1] != noisy.train[1]
    assert int(wrong.sum()) == 800
    assert noisy.train[1][wrong].bincount(minlength=10).min() > 40  # 80 each, were they perfectly spread
    held, trained = clean.validation[0].flatten(1), clean.train[0].flatten(1)
    assert len(torch.cat([held, trained]).unique(dim=0)) == len(held) + len(trained)


def test_augmentation_shifts_by_up_to_four_pixels_and_flips():
    data = loaded("--label-noise", 0)
    images = data.train[0][:40]
    augmented = data.prepare(images, augment=True)
    seen = set()
    for image, result in zip(nn.functional.pad(images, (4, 4, 4, 4)), augmented, strict=True):
        places = list(itertools.product(range(9), range(9), (False, True)))
        crops = torch.stack([image[:, top : top + 28, left : left + 28] for top, left, _ in places])
        crops = torch.stack([crop.flip(-1) if flip else crop for crop, (*_, flip) in zip(crops, places, strict=True)])
        same = (data.prepare(crops) == result).flatten(1).all(1)
        assert same.any()
        seen.update(place for place, hit in zip(places, same.tolist(), strict=True) if hit)
    assert len(seen) > 20
    assert {flip for *_, flip in seen} == {False, True}


# ------------------------------------------------------------------------------------------------------------- numbers


def test_calibration_error_is_the_naive_loop():
    logits, target = 3 * torch.randn(200, 5), torch.randint(5, (200,))
    bins = [[] for _ in range(15)]
    for row, label in zip(logits.softmax(-1).tolist(), target.tolist(), strict=True):
        bins[min(int(max(row) * 15), 14)].append((max(row), row.index(max(row)) == label))
    gaps = [abs(sum(c for c, _ in b) - sum(right for _, right in b)) for b in bins if b]
    measured = reporting.measure(logits, target)
    assert measured["ece"] == pytest.approx(100 * sum(gaps) / 200, abs=1e-3)
    assert measured["accuracy"] == pytest.approx(100 * (logits.argmax(-1) == target).double().mean().item())
    assert measured["nll"] == pytest.approx(-logits.log_softmax(-1)[range(200), target].mean().item())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_fitted_temperature_undoes_a_scale(temperature):
    logits = torch.randn(20_000, 4)
    target = torch.distributions.Categorical(logits=logits).sample()
    assert reporting.fit_temperature(temperature * logits, target) == pytest.approx(temperature, rel=0.1)


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
        ("--terms kd", "--terms must be some of progressive, deterministic, adversarial, or none; got 'kd'."),
        ("--epochs 0", "--epochs must be above 0; got 0."),
        ("--batch-size -1", "--batch-size must be above 0; got -1."),
        ("--lr nan", "--lr must be above 0; got nan."),
        ("--weight-decay -1", "--weight-decay must be between 0 and 1; got -1.0."),
        ("--label-noise 1.5", "--label-noise must be between 0 and 1; got 1.5."),
        ("--alpha -0.1", "--alpha must be between 0 and 1; got -0.1."),
        ("--train-size 4000", "must share the 4000 training images; got 1000 and 4000."),
        ("--validation-size 0", "--validation-size (at least 1)"),
        ("--resume", "checkpoint.pt to be there, and no --overwrite."),
        ("--data-dir nowhere", "--data-dir nowhere is no folder."),
        ("--device cuda", "--device cuda: no GPU is to be had. Pass --device cpu."),
        ("--lr 1e9", "training diverged in epoch 1 of the pre-trained model. Pass a smaller --lr (now 1000000000.0)."),
    ],
)
def test_what_cannot_be_is_one_line(argv, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sentence in refused(["--out", tmp_path, *argv.split()], capsys)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_checkpoint_is_neither_overwritten_nor_mixed_up(tmp_path, capsys):
    first, again = run(tmp_path, "--epochs", 1), [*SMALL, "--epochs", 1, "--out", tmp_path]
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert "Pass --resume to go on from it, --overwrite to start anew, or another --out." in refused(again, capsys)
    assert "--lr was 0.1, now it is 0.3." in refused([*again, "--resume", "--lr", "0.3"], capsys)
    assert "to be there, and no --overwrite." in refused([*again, "--resume", "--overwrite"], capsys)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert run(tmp_path, "--epochs", 1, "--overwrite", "--terms", "none")[1][-1]["terms"].keys() == {"cross_entropy"}
    assert run(tmp_path, "--epochs", 1, "--overwrite") == first


def test_data_that_cannot_be_had_is_one_line_that_says_what_to_pass(idx_folder, tmp_path, capsys, monkeypatch):
    import datasets

    def offline(*args, **settings):
        raise ConnectionError("Couldn't reach the hub\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    for name, instead in (("cifar100", "uoft-cs/cifar100"), ("fashion-mnist", "or its four IDX files")):
        message = refused(["--dataset", name, "--out", tmp_path], capsys)
        assert f"{name} cannot be had (ConnectionError: Couldn't reach the hub). Pass --data-dir" in message
        assert instead in message
        assert "or leave --dataset out for the embedded images" in message
    message = refused(["--dataset", "cifar10", "--data-dir", tmp_path, "--out", tmp_path], capsys)
    assert (
        "holds no train*.parquet and test*.parquet. Pass --data-dir with the parquet files of uoft-cs/cifar10"
        in message
    )
    (idx_folder / "t10k-labels-idx1-ubyte.gz").unlink()
    message = refused(["--dataset", "fashion-mnist", "--data-dir", idx_folder, "--out", tmp_path], capsys)
    assert "has no t10k-labels-idx1-ubyte.gz; pass the folder of the four IDX files" in message


# ---------------------------------------------------------------------------------------------------------- over seeds


def test_the_summary_over_seeds_is_that_of_its_runs(tmp_path, monkeypatch, capsys):
    seeds = load_script(ROOT / "benchmarks" / "example_seeds.py")
    run_one, written = seeds.run, tmp_path / "results.json"
    monkeypatch.setattr(seeds, "run", lambda argv: run_one([*SMALL, "--epochs", "1", *argv]))
    monkeypatch.setattr(sys, "argv", ["seeds", "--seeds", "3", "--weight-decays", "5e-4", "--out", str(written)])
    seeds.main()
    runs = json.loads(written.read_text())["runs"]
    assert [(r["weight_decay"], r["seed"]) for r in runs] == [(0.0005, seed) for seed in range(3)]
    plain, student = ([r[name] for r in runs] for name in ("pre-trained", "student"))

    def mean(values, form):
        return f"{np.mean(values):{form}} ± {np.std(values, ddof=1) / 3**0.5:{form.strip('+')}}"

    def differences(key):
        return np.array([s[key] - p[key] for p, s in zip(plain, student, strict=True)])

    held, test = (mean([p[key] for p in plain], ".2f") for key in ("validation_accuracy", "accuracy"))
    points, nll = differences("accuracy"), differences("nll_scaled")
    *head, row = capsys.readouterr().out.splitlines()[:3]
    assert head == ["| weight decay | plain: validation, test accuracy % | student minus plain, points (NLL scaled) |",
                    "|---|---|---|"]  # fmt: skip
    assert row == f"| 0.0005 (the example) | {held}, {test} | {mean(points, '+.2f')} ({mean(nll, '+.3f')}) |"
