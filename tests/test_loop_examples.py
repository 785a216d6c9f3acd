"""The short examples: the loops run and agree, dense outputs are learnt, and what headers say stands in the README too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset

from aikd_losses import AIKDLoss, FrozenTeacher, IndexedDataset

EXAMPLES = Path(__file__).parent.parent / "examples"
LOOPS = ["with_ignite.py", "with_accelerate.py", "with_lightning.py", "with_transformers.py"]
TASKS = {  # settings of a shorter run; between what a model without knowledge is, and the models with some
    "language_model.py": (dict(PLAIN_EPOCHS=3, STUDENT_EPOCHS=4), (15, 30), lambda of_none: (2, of_none / 1.7)),  # bits
    "segmentation.py": (dict(EPOCHS=25, TEST=200), (0, 100 / 11), lambda of_none: (2 * of_none, 100)),  # eleven classes
}
LINES = {"quickstart.py": 60} | dict.fromkeys([*LOOPS, *TASKS], 120)
PAGE = EXAMPLES.parent / "docs" / "examples.md"

# Everything is imported once, and each example runs in a fork, as the script that it is.
DRIVER = """
import multiprocessing, os, sys
import accelerate, ignite, lightning, transformers
from torch.distributed.launcher import LaunchConfig, elastic_launch

sys.path.insert(0, sys.argv[1])
import _loops

def run(name):
    print(f"== {name}", flush=True)
    path = os.path.join(sys.path[0], name)
    with open(path) as file:
        source = file.read()
    if name == "quickstart.py":  # with half of its images: the student is better there too
        source = source.replace("2000", "1000").replace("800", "400")
    exec(compile(source, path, "exec"), {"__file__": path, "__name__": "__main__"})
    sys.stdout.flush()

def torchrun():
    config = LaunchConfig(1, 1, 2, run_id="0", rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork")
    elastic_launch(config, run)("with_accelerate.py")

_loops.EPOCHS = 10
for target, *arguments in [*((run, name) for name in sys.argv[2:]), (torchrun,)]:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0, arguments
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What each of the loops prints, in the order of their runs."""
    if missing := [name for name in ("accelerate", "ignite", "lightning", "transformers") if not find_spec(name)]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, "-c", DRIVER, str(EXAMPLES), "quickstart.py", *LOOPS]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(folder.iterdir()) == []  # nothing is left behind
    _, *parts = re.split(r"^== ", done.stdout, flags=re.MULTILINE)
    return parts, done.stderr


def accuracies(part):
    (found,) = re.findall(r"^test accuracy: pre-trained (\d+\.\d+)%, student (\d+\.\d+)%$", part, re.MULTILINE)
    return tuple(map(float, found))


@pytest.mark.slow
def test_the_quickstarts_student_is_better_than_the_model_that_was_trained_plainly(printed):
    """40% of the labels are wrong there: what the method is for. One seed; README.md has more."""
    plain, student = accuracies(printed[0][0])
    assert 50 < plain + 1 < student < 100  # chance is 10


@pytest.mark.slow
def test_the_loops_of_all_frameworks_train_the_same_student(printed):
    """But for the Trainer's, a BERT. Two stopped half way and resumed, one on two processes too, of which one speaks."""
    (_, *parts), errors = printed
    assert errors == ""
    assert [part.split()[0] for part in parts] == [*LOOPS, "with_accelerate.py", "with_accelerate.py"]
    *single, bert, rank, other = parts
    both = rank + other
    assert 50 < min(accuracies(bert)) < max(accuracies(bert)) < 100  # another network; chance is 10
    assert "processes: 1\n" in single[1]
    assert "processes: 2\n" in both
    (plain, student), *others = [accuracies(part) for part in [*single, both]]
    for found in others:
        assert found[0] == plain  # the same network, in the same plain loop
        assert found[1] == pytest.approx(student, abs=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_dense_outputs_are_learnt(name, monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    module = __import__(name.removesuffix(".py"))
    settings, of_none, of_some = TASKS[name]
    for setting, value in settings.items():
        monkeypatch.setattr(module, setting, value)
    module.main()
    said = capsys.readouterr()
    assert said.err == ""
    assert list(tmp_path.iterdir()) == []
    *_, last = said.out.splitlines()
    assert last.startswith("test ")
    nothing, plain, student = map(float, re.findall(r"\d+\.\d+", last))
    assert of_none[0] < nothing < of_none[1]
    low, high = of_some(nothing)
    assert low < min(plain, student) <= max(plain, student) < high


@pytest.mark.parametrize("name", LINES)
def test_an_example_is_short_and_its_header_says_what_the_readme_and_the_page_say(name):
    """How it is run, and what it printed; the page shows the file itself, and the lines of its header."""
    text = (EXAMPLES / name).read_text()
    assert len(text.splitlines()) < LINES[name]
    header = text.split('"""')[1]
    assert f"\n    python examples/{name}" in header
    (printed,) = re.findall(r"^    test .*(pre-trained .*)$", text, re.MULTILINE)
    numbers = re.findall(r"\d+\.\d+", printed)
    (shown,) = (tab for tab in re.split(r'^=== "', PAGE.read_text(), flags=re.MULTILINE) if f"examples/{name}" in tab)
    command, *lines = re.search(r"```console\n(.*?)\n    ```", shown, re.DOTALL)[1].split("\n    ")
    assert command.strip() == f"$ python examples/{name}"
    output = re.findall(r"^    ((?:test|validation|epoch|processes).*)$", header, re.MULTILINE)
    assert lines[-1] == output[-1]
    assert set(output) <= set(lines)
    assert f'    ```{{ .python }}\n    --8<-- "examples/{name}"\n    ```' in shown
    row = next(line for line in (EXAMPLES / "README.md").read_text().splitlines() if f"[{name}]({name})" in line)
    assert re.findall(r"\d+\.\d\d", row) == numbers
    imported = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)) - sys.stdlib_module_names
    if name not in LOOPS:  # nothing but torch, the library and, for the images, what the examples share
        assert imported - ({"_data"} if name == "segmentation.py" else set()) == {"torch", "aikd_losses"}


def test_the_page_has_the_words_that_its_readers_search_for():
    said = " ".join(PAGE.read_text().split())
    for words in ("Hugging Face Trainer", "Lightning", "label noise", "noisy labels", "gradient accumulation", "mixup"):
        assert words in said


# ------------------------------------------------------------------------------------------------ Lightning's checkpoints

NOISE = ("does not have many workers", "treespec", "Checkpoint directory")


class Resumable(DataLoader):
    """Goes on after the batch at which it was saved, as Lightning asks of a loader; torch's own starts anew."""

    served, resumed_at = 0, 0

    def __iter__(self):
        skipped, self.resumed_at = self.resumed_at, 0
        for self.served, batch in enumerate(super().__iter__(), start=1):
            if self.served > skipped:
                yield batch

    def state_dict(self):
        return {"served": self.served % len(self)}

    def load_state_dict(self, state):
        self.resumed_at = state["served"]


def lightning_run(folder, *callbacks, epochs=3, resume=None, loader=DataLoader, **trainer):
    """The example's module, three steps an epoch; what it was like in each step, and the cross-entropy of each validation."""
    lightning = pytest.importorskip("lightning")
    from _loops import new_model, test_set, train_set
    from with_lightning import Student

    class Watch(lightning.Callback):
        def __init__(self):
            self.steps, self.losses = [], []

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            torch.manual_seed(trainer.global_step)  # as if the random state had been restored
            term = module.criterion.terms["progressive"]
            self.steps.append((trainer.current_epoch, int(module.criterion.epoch), int(term.epoch), float(term.alpha)))

        def on_validation_end(self, trainer, module):
            if not trainer.sanity_checking:
                x, y = zip(*validation, strict=True)
                self.losses.append(float(F.cross_entropy(module.model(torch.stack(x)), torch.stack(y))))

    torch.manual_seed(0)
    validation = Subset(test_set(), range(50))
    watch, student = Watch(), Student(new_model(), 60)
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, default_root_dir=folder, callbacks=[watch, *callbacks], **off, **trainer
    )
    images = loader(IndexedDataset(Subset(train_set(), range(60))), 20)
    trainer.fit(student, images, DataLoader(validation, 50), ckpt_path=resume)
    return student, watch, trainer


def alike(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


@pytest.mark.slow
@pytest.mark.filterwarnings(*(f"ignore:.*{noise}" for noise in NOISE))
def test_lightning_stops_early_and_keeps_the_best_by_the_validation_loss(tmp_path):
    """With the defaults of both callbacks. The loss is cross-entropy, and from what was kept training goes on."""
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")

    def run(**settings):
        saver = callbacks.ModelCheckpoint(tmp_path, monitor="val/loss")
        return saver, *lightning_run(tmp_path, callbacks.EarlyStopping("val/loss"), saver, epochs=40, **settings)

    saver, student, watch, trainer = run()
    best = watch.losses.index(min(watch.losses))
    assert 0 < best < len(watch.losses) - 1
    assert len(watch.losses) == best + 1 + 3 < 40  # its patience
    assert float(saver.best_model_score) == pytest.approx(watch.losses[best], rel=1e-5)
    assert Path(saver.best_model_path).name == f"epoch={best}-step={3 * best + 3}.ckpt"
    assert int(student.criterion.epoch) == trainer.current_epoch == best + 4
    _, resumed, again, _ = run(resume=saver.best_model_path)
    assert again.steps == watch.steps[3 * best + 3 :]
    assert again.losses == watch.losses[best + 1 :]
    assert alike(resumed, student)


@pytest.mark.slow
@pytest.mark.filterwarnings(*(f"ignore:.*{noise}" for noise in (*NOISE, "ended before the epoch ended")))
@pytest.mark.parametrize(
    ("loader", "steps", "saver", "trainer"),
    [
        (DataLoader, (3, 6, 9), {}, {}),
        (DataLoader, (6,), {}, {"check_val_every_n_epoch": 2}),  # before the hook of the epoch's end
        (DataLoader, (3, 6, 9), {"every_n_train_steps": 3}, {}),  # before it, too
        (DataLoader, (2, 4, 6, 8), {"every_n_train_steps": 2}, {}),
        (Resumable, (2, 4, 6, 8), {"every_n_train_steps": 2}, {}),
    ],
    ids=["at an epoch's end", "after a validation", "on an epoch's last step", "inside", "inside, resumable loader"],
)
def test_lightning_resumes_in_the_right_epoch(loader, steps, saver, trainer, tmp_path):
    """And ends as if it had not stopped; but inside an epoch torch's own loader starts anew, for what is left of the steps."""
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")

    def run(**resume):
        where = callbacks.ModelCheckpoint(
            tmp_path, filename="{step}", auto_insert_metric_name=False, save_top_k=-1, **saver
        )
        return lightning_run(tmp_path, where, loader=loader, **trainer, **resume)

    student, watch, _ = run()
    assert watch.steps == [(i // 3, i // 3, i // 3, pytest.approx(0.8 * (i // 3 + 1) / 40)) for i in range(9)]
    assert {path.stem for path in tmp_path.iterdir()} == {str(step) for step in steps}
    for step in steps:
        resumed, again, _ = run(resume=tmp_path / f"{step}.ckpt")
        assert again.steps == watch.steps[step:]
        assert int(resumed.criterion.epoch) == 3
        assert alike(resumed, student) == (loader is Resumable or step % 3 == 0)


# ------------------------------------------------------------------------------------------- the Trainer of Transformers

PIXELS = torch.randn(16, 7, 112, generator=torch.Generator().manual_seed(0))
IMAGES = [{"inputs_embeds": x, "labels": torch.tensor(i % 10)} for i, x in enumerate(PIXELS)]


def bert(seed, **settings):
    pytest.importorskip("transformers")
    from transformers import BertForSequenceClassification
    from with_transformers import BERT

    torch.manual_seed(seed)
    model = BertForSequenceClassification(type(BERT)(**BERT.to_dict() | settings))
    model.classifier.weight.data *= 10  # or the logits are all but equal
    return model


def trainer_run(folder, model, criterion, resume=None, **settings):
    """The example's Trainer; of every step its epoch and the criterion's, and the gradient with which it steps."""
    from transformers import PrinterCallback, TrainerCallback, TrainingArguments
    from with_transformers import SETTINGS, DistillationTrainer

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            epochs.append((int(state.epoch), int(criterion.epoch)))
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])

    epochs, gradients = [], []
    arguments = TrainingArguments(folder, **SETTINGS | {"save_strategy": "no", "num_train_epochs": 3} | settings)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = DistillationTrainer(
        model,
        arguments,
        teacher=FrozenTeacher(bert(1)),
        criterion=criterion,
        train_dataset=IndexedDataset(IMAGES),
        optimizers=(sgd, torch.optim.lr_scheduler.ConstantLR(sgd, 1.0)),
        callbacks=[Watch()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, epochs, gradients


NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "parts"), [(16, 1), (8, 2), (5, 4)])
def test_gradients_accumulated_by_the_trainer_are_those_of_the_whole_batch(size, parts, tmp_path):
    """Which a plain loop takes, with means; the discriminator has moved after the first step."""
    model, teacher = bert(0, **NO_DROPOUT), FrozenTeacher(bert(1))
    criterion, ours = (AIKDLoss(16, 10, 3, penalty=None, reduction=reduction) for reduction in ("mean", "sum"))
    ours.load_state_dict(criterion.state_dict())
    x, y = (torch.stack([image[name] for image in IMAGES]) for name in ("inputs_embeds", "labels"))
    sgd, expected = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(3):
        logits = model(inputs_embeds=x).logits
        tensors = dict(student_logits=logits, teacher_logits=teacher(inputs_embeds=x).logits, index=torch.arange(16))
        sgd.zero_grad()
        criterion(**tensors, target=y)[0].backward()
        expected.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        sgd.step()
        criterion.update(**tensors)
        criterion.advance_epoch()

    settings = dict(per_device_train_batch_size=size, gradient_accumulation_steps=parts, per_device_eval_batch_size=7)
    trainer, _, gradients = trainer_run(tmp_path, bert(0, **NO_DROPOUT), ours, **settings)
    assert len(gradients) == 3
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(ours.state_dict(), criterion.state_dict(), rtol=1e-3, atol=1e-3)
    with torch.no_grad():  # an evaluation, whose items have no ids
        tensors |= dict(student_logits=model(inputs_embeds=x).logits, index=None, target=y)
        assert trainer.evaluate(IMAGES)["eval_loss"] == pytest.approx(float(criterion(**tensors)[0]), rel=1e-4)


@pytest.mark.slow
def test_ids_that_the_trainer_dropped_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"^A training batch has no `index`. Set remove_unused_columns=False"):
        trainer_run(tmp_path, bert(0), AIKDLoss(16, 10, 3, reduction="sum"), remove_unused_columns=True)


@pytest.mark.slow
def test_the_trainer_resumes_from_any_step_as_if_it_had_not_stopped(tmp_path):
    """Two steps an epoch, so from inside an epoch and from its last step, with the random state of dropout and penalty."""

    def run(**settings):
        model, criterion = bert(0), AIKDLoss(16, 10, 3, reduction="sum")
        sizes = dict(per_device_train_batch_size=4, save_strategy="steps", save_steps=1, save_total_limit=None)
        return model, criterion, *trainer_run(tmp_path, model, criterion, **sizes, **settings)[1:]

    model, criterion, epochs, _ = run()
    assert epochs == [(i // 2, i // 2) for i in range(6)]
    for step in range(1, 6):
        resumed, restored, again, _ = run(resume=str(tmp_path / f"checkpoint-{step}"))
        assert again == epochs[step:]
        assert alike(resumed, model)
        assert alike(restored, criterion)
