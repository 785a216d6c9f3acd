"""The reference example: both phases, stopped and resumed, its data, its numbers, and what it refuses."""

from __future__ import annotations

import functools
import gzip
import importlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import tracemalloc
from pathlib import Path

import _data as data_of
import _networks as networks
import _report as reporting
import cifar_train as example
import example_seeds
import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.launcher import LaunchConfig, elastic_launch

SMALL = ["--train-size", "256", "--validation-size", "100", "--epochs", "3", "--batch-size", "64", "--lr", "0.1",
         "--label-noise", "0"]  # fmt: skip
FORK = multiprocessing.get_context("fork")


def load_script(path: Path):
    return importlib.import_module(path.stem)  # of a folder that pyproject.toml names


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


def goes_on_as_the_whole_run(whole, out, resume=True):
    """To the same numbers and, but for seconds, the same checkpoint, bit for bit."""
    assert run(out, *["--resume"] * resume) == whole[1]
    ours, theirs = map(checkpoint, (out, whole[0]))
    for key in ("phase", "epoch", "teacher", "model", "criterion", "optimizer"):
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)


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
    for label, key in (("test accuracy, last, %", "accuracy"), ("test accuracy, best, %", "best_accuracy")):
        (row,) = (line for line in lines if label in line)
        plain, student = result["pre-trained"][key], result["student"][key]
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells == [label, f"{plain:.2f}", f"{student:.2f}", f"{student - plain:+.2f}"]


def test_the_best_epoch_is_that_of_the_validation_images(whole):
    _, (_, epochs, result) = whole
    for name in ("pre-trained", "student"):
        first, *others = (r for r in epochs if r["phase"] == name)
        best = first
        for record in others:
            best = record if record["validation_accuracy"] > best["validation_accuracy"] else best
        assert (result[name]["best_epoch"], result[name]["best_accuracy"]) == (best["epoch"] + 1, best["accuracy"])


def test_a_run_begins_by_saying_what_it_trains_on_how_long_and_what_its_columns_mean(tmp_path, capsys):
    run(tmp_path, "--epochs", 1, "--label-noise", "0.25")
    said, _, lines = capsys.readouterr().out.partition("pre-trained   1/1")
    for words in ("fashion-mnist-mini: 256 training images, 25% of the labels wrong", "100 validation and 4,000 test",
                  "mlp on cpu, seed 0", "1 epoch of cross-entropy", "1 epoch of progressive + deterministic + adv",
                  "discriminator right: how often"):  # fmt: skip
        assert words in said
    assert "  test accuracy " in lines


def test_what_plain_training_reaches_when_it_is_tuned_is_read_from_the_recorded_runs(tmp_path):
    """Of the weight decay with the best validation accuracy, and only for the task that was recorded."""
    sentence = reporting.tuned_plain(example.parse([]))
    runs = json.loads(reporting.SEEDS.read_text())["runs"]
    held = {}
    for r in runs:
        held.setdefault(r["weight_decay"], []).append(r["pre-trained"]["validation_accuracy"])
    decay = max(held, key=lambda decay: np.mean(held[decay]))
    plain, student = (np.mean([r[name]["accuracy"] for r in runs if r["weight_decay"] == decay])
                      for name in ("pre-trained", "student"))  # fmt: skip
    assert f"with {decay:g} plain training reaches {plain:.1f}% on this task" in sentence
    assert f"the full method {student:.1f}% (last epoch, means of {len(held[decay])} seeds" in sentence
    assert reporting.tuned_plain(example.parse(["--weight-decay", "0.1", "--terms", "none"])) == sentence
    assert reporting.tuned_plain(example.parse(["--epochs", "3"])) == ""
    assert reporting.tuned_plain(example.parse([]), tmp_path / "nowhere.json") == ""


@pytest.mark.parametrize(
    ("name", "writes", "saved"),
    [
        ("checkpoint.pt", 0, "epoch 0 of the pre-trained model"),
        ("checkpoint.pt", 2, "epoch 2 of the pre-trained model"),
        ("checkpoint.pt", 3, "epoch 0 of the student model"),
        ("log.jsonl", 4, "epoch 2 of the student model"),
    ],
)
def test_a_run_stopped_while_it_writes_and_resumed_is_the_whole_one_bit_for_bit(
    name, writes, saved, whole, tmp_path, monkeypatch, capsys
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
    assert f"Interrupted; saved: {saved}. Go on with --resume." in capsys.readouterr().out
    monkeypatch.setattr(os, "replace", replace)
    torch.randn(7)  # what the generator's state is does not matter
    goes_on_as_the_whole_run(whole, tmp_path, resume=writes > 0)


@pytest.mark.slow
def test_a_process_stopped_at_random_moments_ends_with_the_numbers_of_the_whole_run(whole, tmp_path):
    """By Ctrl-C in the first phase, by SIGKILL in the second: in an epoch, in writing a checkpoint, whenever."""
    random, log = np.random.default_rng(), tmp_path / "log.jsonl"
    for how, code, epochs, resume in ((signal.SIGINT, 130, 1, []), (signal.SIGKILL, -9, 4, ["--resume"])):
        process = FORK.Process(target=hearing, args=(tmp_path, *resume))
        process.start()
        while process.is_alive() and not (log.exists() and len(log.read_text().splitlines()) > epochs):
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.03))
        os.kill(process.pid, how)
        process.join(60)
        assert process.exitcode == code
    goes_on_as_the_whole_run(whole, tmp_path)


def hearing(*args):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background is deaf
    run(*args)


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
    one, two = (store["terms.progressive.targets.rows"].float() for store in stores)
    torch.testing.assert_close(two, one, atol=0.01, rtol=0)


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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at the logits
def test_the_losses_and_the_network_compile(tmp_path, monkeypatch):
    compiled, backend = [], functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(type(module).__name__) or backend(module))
    outs = [run(tmp_path / name, "--epochs", 1, *flags)[1] for name, flags in (("no", []), ("yes", ["--compile"]))]
    assert compiled == ["Sequential", "LossStack", "Sequential", "AIKDLoss", "FrozenTeacher"]
    for ours, eager in zip(*outs, strict=True):
        assert ours["nll"] == pytest.approx(eager["nll"], abs=2e-3)


# ---------------------------------------------------------------------------------------------------------------- data


def as_idx_files(folder, part, images, labels):
    """As those of the full Fashion-MNIST: one gzipped, the other not."""
    part = {"train": "train", "test": "t10k"}[part]
    header = b"".join(n.to_bytes(4, "big") for n in (0x803, *images.shape))
    (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    header = b"".join(n.to_bytes(4, "big") for n in (0x801, len(labels)))
    (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + bytes(labels)))


def as_parquet_files(label, folder, part, images, labels):
    import datasets

    features = datasets.Features({"img": datasets.Image(), label: datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"img": list(images), label: labels}, features=features)
    rows.to_parquet(str(folder / f"{part}-00000-of-00001.parquet"))


@pytest.mark.parametrize(
    ("dataset", "size", "write", "model"),
    [
        ("fashion-mnist", (28, 28), as_idx_files, "resnet18"),
        ("fashion-mnist", (28, 28), as_idx_files, "mlp"),
        ("cifar10", (32, 32, 3), functools.partial(as_parquet_files, "label"), "cnn"),
        ("cifar100", (32, 32, 3), functools.partial(as_parquet_files, "fine_label"), "cnn"),
    ],
)
def test_files_are_read_and_every_network_trains_on_them_with_augmentation(dataset, size, write, model, tmp_path):
    for part, count in (("train", 60), ("test", 10)):
        images = np.random.default_rng(0).integers(0, 256, (count, *size), dtype=np.uint8)
        write(tmp_path, part, images, [i % 10 for i in range(count)])
    argv = ["--dataset", dataset, "--data-dir", tmp_path, "--train-size", 16, "--validation-size", 10,
            "--batch-size", 8]  # fmt: skip
    data = loaded(*argv)
    assert data.num_classes == (100 if dataset == "cifar100" else 10)  # whatever labels there are
    assert np.array_equal(data.test[0].numpy(), images.reshape(10, *size[:2], -1).transpose(0, 3, 1, 2))
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


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero():
    values = [example.learning_rate(progress / 100, 0.1) for progress in range(101)]
    assert values[0] == 0.0
    assert values[-1] == pytest.approx(0.0)
    assert max(values) == pytest.approx(0.1, rel=0.01)
    assert values.index(max(values)) == 5


# ------------------------------------------------------------------------------------------------------------ refusals


OFFLINE = "cannot be had (ConnectionError: Couldn't reach the hub). Pass --data-dir with"


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
        (
            "--dataset cifar100",
            f"cifar100 {OFFLINE} the parquet files of uoft-cs/cifar100 … or leave --dataset out for the",
        ),
        (
            "--dataset fashion-mnist",
            f"fashion-mnist {OFFLINE} … or its four IDX files, or leave --dataset out for the emb",
        ),
        (
            "--dataset cifar10 --data-dir empty",
            "holds no train*.parquet and test*.parquet. Pass … files of uoft-cs/cifar10",
        ),
        ("--dataset cifar10 --data-dir idx", "holds no train*.parquet and test*.parquet. Pass"),
        ("--out file", "--out file cannot be written to (FileExistsError: …). Pass another folder."),
        ("--out file/below", "--out file/below cannot be written to (NotADirectoryError: …). Pass another folder."),
        (
            "--dataset fashion-mnist --data-dir idx",
            "has no train-images-idx3-ubyte.gz; pass the folder of the four IDX files",
        ),
    ],
)
def test_what_cannot_be_is_one_line(argv, sentence, tmp_path, capsys, monkeypatch):
    def offline(*args, **settings):
        raise ConnectionError("Couldn't reach the hub\nand a long story")

    monkeypatch.setattr("datasets.load_dataset", offline)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "idx"):
        (tmp_path / folder).mkdir()
    for file in ("file", "idx/t10k-labels-idx1-ubyte"):
        (tmp_path / file).touch()
    assert re.search(re.escape(sentence).replace("…", ".*"), refused(["--out", tmp_path, *argv.split()], capsys))
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


def packed(change):
    """What a gzipped file is when its content is changed."""
    return lambda raw: gzip.compress(change(gzip.decompress(raw)))


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte.gz"
WRONG_FILES = {
    "empty": (IMAGES, lambda raw: b"", "it ends after 0 bytes, within its header"),
    "empty, gzipped": (LABELS, lambda raw: b"", "it ends after 0 bytes, within its header"),
    "cut in its header": (IMAGES, lambda raw: raw[:15], "it ends after 15 bytes, within its header"),
    "cut": (IMAGES, lambda raw: raw[:-1], "its header says 15680 bytes, and there are only 15679"),
    "cut, gzipped": (LABELS, lambda raw: raw[:-9], "EOFError: "),
    "another checksum": (LABELS, lambda raw: raw[:-8] + b"0000" + raw[-4:], "BadGzipFile: CRC check failed"),
    "not gzipped": (LABELS, gzip.decompress, "BadGzipFile: Not a gzipped file"),
    "gzipped, and not named so": (IMAGES, gzip.compress, "it begins with 0x1f8b08"),
    "no IDX": (LABELS, packed(lambda raw: b"class,label\n" * 2), "it begins with 0x636c6173, not with 0x801"),
    "images for labels": (LABELS, packed(lambda raw: b"\0\0\x08\x03" + raw[4:]), "with 0x803, not with 0x801"),
    "labels for images": (IMAGES, lambda raw: b"\0\0\x08\x01" + raw[4:], "it begins with 0x801, not with 0x803"),
    "other sides": (IMAGES, lambda raw: raw[:15] + b"\x1d" + raw[16:], "its header says 20 x 28 x 29"),
    "none": (LABELS, packed(lambda raw: raw[:4] + bytes(4)), "its header says 0)"),
    "too many": (IMAGES, lambda raw: raw[:4] + b"\xff" * 4 + raw[8:], "its header says 4294967295 x 28 x 28"),
    "longer": (IMAGES, lambda raw: raw + b"0", "its header says 15680 bytes, and there are more"),
    "longer, gzipped": (LABELS, packed(lambda raw: raw + b"0"), "its header says 10 bytes, and there are more"),
    "one label less": (LABELS, packed(lambda raw: raw[:7] + b"\x09" + raw[8:-1]), "10 images in t10k and 9 labels"),
    "no class": (LABELS, packed(lambda raw: raw[:-1] + b"\x0a"), "labels from 0 to 10 in t10k, not from 0 to 9"),
}


def contents(folder):
    return {path.name: path.is_file() and path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("name", "change", "sentence"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_file_of_images_or_labels_that_is_wrong_is_one_line(name, change, sentence, tmp_path, capsys):
    argv = with_idx_files(tmp_path)
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    before = contents(tmp_path)
    message = refused(argv, capsys)
    assert sentence in message
    assert re.search(r"\. Get (this file of Fashion-MNIST|both|them) anew\.\n$", message)
    assert contents(tmp_path) == before


def with_idx_files(folder):
    for part, count in (("train", 20), ("test", 10)):
        as_idx_files(folder, part, np.zeros((count, 28, 28), np.uint8), [i % 10 for i in range(count)])
    return ["--dataset", "fashion-mnist", "--data-dir", folder, "--out", folder, "--validation-size", 10,
            "--batch-size", 8, "--epochs", 1, "--model", "mlp"]  # fmt: skip


def test_a_file_that_grows_beyond_what_its_header_says_does_not_fill_the_memory(tmp_path, capsys):
    """64 MB of labels out of 64 kB, where ten were announced."""
    argv = with_idx_files(tmp_path)
    (tmp_path / LABELS).write_bytes(packed(lambda raw: raw + bytes(2**26))((tmp_path / LABELS).read_bytes()))
    tracemalloc.start()
    message = refused(argv, capsys)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "its header says 10 bytes, and there are more" in message
    assert peak < 4e6


def test_labels_of_parquet_files_that_are_no_classes_and_errors_without_a_word_are_one_line(
    tmp_path, capsys, monkeypatch
):
    argv = ["--dataset", "cifar10", "--out", tmp_path / "out"]
    for part, labels in (("train", [0, 1]), ("test", [-1, -1])):  # as where labels are held back
        as_parquet_files("label", tmp_path, part, np.zeros((2, 32, 32, 3), np.uint8), labels)
    message = refused([*argv, "--data-dir", tmp_path], capsys)
    assert "cifar10 has labels from -1 to -1 in test, not from 0 to 9. Get them anew." in message

    def silent(*args, **settings):
        raise TimeoutError

    monkeypatch.setattr("datasets.load_dataset", silent)
    assert "cifar10 cannot be had (TimeoutError). Pass --data-dir" in refused(argv, capsys)


def changed(**new):
    """A checkpoint that holds something else there; `...` for nothing at all."""

    def change(path):
        saved = torch.load(path, weights_only=True)
        saved |= {key: value(saved) if callable(value) else value for key, value in new.items()}
        torch.save({key: value for key, value in saved.items() if value is not ...}, path)

    return change


def replaced(content):
    return lambda path: path.write_bytes(content(path.read_bytes()))


def as_folder(path):
    path.unlink()
    path.mkdir()


def another_network(saved):
    return nn.Linear(3, 2).state_dict()


def momenta_of_another(saved):
    return saved["optimizer"] | {"state": {i: {"momentum_buffer": torch.zeros(3)} for i in saved["optimizer"]["state"]}}


def store_of_another(saved):
    key = "terms.progressive.targets.rows"
    return saved["criterion"] | {key: saved["criterion"][key][:-1]}


WRONG_CHECKPOINTS = {
    "empty": (replaced(lambda raw: b""), "EOFError"),
    "cut": (replaced(lambda raw: raw[: len(raw) // 2]), "RuntimeError: PytorchStreamReader failed reading zip archive"),
    "cut at its end": (replaced(lambda raw: raw[:-1]), "RuntimeError: PytorchStreamReader failed reading zip archive"),
    "something else": (replaced(lambda raw: b"no checkpoint\n"), "UnpicklingError"),
    "a folder": (as_folder, "IsADirectoryError"),
    "a module": (lambda path: torch.save(nn.Linear(2, 2), path), "UnpicklingError: Weights only load failed"),
    "a program": (lambda path: torch.jit.trace(nn.ReLU(), torch.ones(1)).save(path), ""),  # each torch says it in its own words
    "a list": (lambda path: torch.save([1], path), "TypeError"),
    "weights alone": (lambda path: torch.save(nn.Linear(2, 2).state_dict(), path), "KeyError: 'settings'"),
    **{f"no {key}": (changed(**{key: ...}), f"KeyError: '{key}'") for key in ("phase", "epoch", "history", "teacher")},
    **{f"without {key}": (changed(**{key: ...}), f"'{key}'") for key in ("model", "optimizer", "criterion")},
    **{f"epoch {epoch}": (changed(epoch=epoch), f"its phase 2 and epoch {epoch} are not the last of its history")
       for epoch in (-5, 0, 2, 4, 2.5, None, 10**9)},
    **{f"phase {phase}": (changed(phase=phase), f"its phase {phase} and epoch 3 are not the last of its history")
       for phase in (-1, 0, 1, 3)},
    "an empty history": (changed(history=[]), "are not the last of its history"),
    "too much history": (changed(history=lambda saved: saved["history"] * 2), "are not the last of its history"),
    "history of something else": (changed(history=[1.0]), "TypeError"),
    "another model": (changed(model=another_network), "RuntimeError: Missing key(s) in state_dict"),
    "another teacher": (changed(teacher=another_network), "RuntimeError: Missing key(s) in state_dict"),
    "no teacher": (changed(teacher=None), "TypeError"),
    "another store": (changed(criterion=store_of_another), "RuntimeError: `terms.progressive.targets.rows` in the"),
    "another optimizer": (changed(optimizer=lambda saved: {"state": {}, "param_groups": []}), "ValueError: loaded state"),
    "other momenta": (changed(optimizer=momenta_of_another), "ValueError: its optimizer is that of another model"),
    "no momenta": (changed(optimizer=lambda saved: saved["optimizer"] | {"state": {}}), "KeyError: 'momentum_buffer'"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), WRONG_CHECKPOINTS.values(), ids=WRONG_CHECKPOINTS)
def test_a_checkpoint_that_is_broken_is_one_line_and_nothing_is_overwritten(change, sentence, whole, tmp_path, capsys):
    for path in whole[0].iterdir():
        shutil.copy(path, tmp_path)
    change(tmp_path / "checkpoint.pt")
    before = contents(tmp_path)
    message = refused([*SMALL, "--out", tmp_path, "--resume"], capsys)
    assert message.startswith(f"cifar_train.py: {tmp_path / 'checkpoint.pt'} cannot be used (")
    assert sentence in message
    assert message.endswith("). Bring back a copy of it, or pass --overwrite to start anew, or another --out.\n")
    assert contents(tmp_path) == before


def test_a_full_disk_is_one_line_and_what_was_saved_stays(whole, tmp_path, monkeypatch, capsys):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    shutil.copy(whole[0] / "checkpoint.pt", tmp_path)
    message = refused([*SMALL, "--out", tmp_path, "--overwrite"], capsys)
    assert "cannot be written to (OSError: [Errno 28] No space left on device). Make room." in message
    assert (tmp_path / "checkpoint.pt").read_bytes() == (whole[0] / "checkpoint.pt").read_bytes()


# ---------------------------------------------------------------------------------------------------------- over seeds


def test_the_summary_over_seeds_is_that_of_its_runs(tmp_path, monkeypatch, capsys):
    run_one, written = example_seeds.run, tmp_path / "results.json"
    monkeypatch.setattr(example_seeds, "run", lambda argv: run_one([*SMALL, "--epochs", "1", *argv]))
    monkeypatch.setattr(sys, "argv", ["seeds", "--seeds", "3", "--weight-decays", "5e-4", "--out", str(written)])
    example_seeds.main()
    runs = json.loads(written.read_text())["runs"]
    assert [(r["weight_decay"], r["seed"]) for r in runs] == [(0.0005, seed) for seed in range(3)]

    def mean(form, measured):
        values = [measured(r["pre-trained"], r["student"]) for r in runs]
        return f"{np.mean(values):{form}} ± {np.std(values, ddof=1) / 3**0.5:{form.strip('+')}}"

    held, test = (mean(".2f", lambda p, s, key=key: p[key]) for key in ("validation_accuracy", "accuracy"))
    points = mean("+.2f", lambda p, s: s["accuracy"] - p["accuracy"])
    nll = mean("+.3f", lambda p, s: s["nll_scaled"] - p["nll_scaled"])
    *head, row = capsys.readouterr().out.splitlines()[:3]
    assert head == ["| weight decay | plain: validation, test accuracy % | student minus plain, points (NLL scaled) |",
                    "|---|---|---|"]  # fmt: skip
    assert row == f"| 0.0005 (the example) | {held}, {test} | {points} ({nll}) |"


def test_the_page_shows_the_seeds():
    shown = example_seeds.PAGE.read_text()
    assert example_seeds.fill_page(shown) == shown
