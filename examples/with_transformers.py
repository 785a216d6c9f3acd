"""AI-KD in the Trainer of Transformers: `compute_loss` of a small subclass, and a callback that ends the epoch.

    python examples/with_transformers.py
    ...
    epoch 40  eval_loss 0.585  eval_accuracy 0.638
    test accuracy: pre-trained 60.82%, student 63.78%

The data set's items are dicts, to which `IndexedDataset` adds "index". Items of the evaluation have none. Training is
stopped half way and resumed from the Trainer's checkpoint, into which the callback puts the criterion.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from _loops import BATCH_SIZE, EPOCHS, SGD, new_model, pretrained_model, report, test_set, train_set
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, logging

from aikd_losses import AIKDLoss, FrozenTeacher, IndexedDataset

SETTINGS = dict(
    per_device_train_batch_size=BATCH_SIZE, per_device_eval_batch_size=1000, max_grad_norm=0.0, use_cpu=True,
    remove_unused_columns=False, label_names=["labels"],  # or "index" and "labels", no arguments of the model, are removed
    save_strategy="epoch", save_total_limit=1, eval_strategy="steps",
    report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
)  # fmt: skip
logging.set_verbosity_error()


class Classifier(nn.Module):
    """The network with a forward that the Trainer can call; `**kwargs` would tell it that the model divides by itself."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"logits": self.network(pixels)}


class DistillationTrainer(Trainer):
    def __init__(self, *args, teacher, criterion, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.criterion = teacher.to(self.args.device), criterion.to(self.args.device)
        self.add_callback(EndOfEpoch(criterion))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(inputs["pixels"])
        tensors = dict(
            student_logits=outputs["logits"],
            teacher_logits=self.teacher(inputs["pixels"])["logits"],
            index=inputs.get("index"),  # None in the evaluation: nothing has history there
        )
        loss, _ = self.criterion(**tensors, target=inputs["labels"])
        if model.training:
            self.criterion.update(**tensors)
        # A mean over the batch, as the Trainer expects it: `num_items_in_batch` is for sums.
        return (loss, outputs) if return_outputs else loss


class EndOfEpoch(TrainerCallback):
    """The next epoch, and the criterion's part of a checkpoint: the Trainer saves the model alone."""

    def __init__(self, criterion: AIKDLoss) -> None:
        self.criterion = criterion

    def on_epoch_end(self, args, state, control, **kwargs):
        self.criterion.advance_epoch(round(state.epoch))

    def on_save(self, args, state, control, **kwargs):  # with save_strategy="epoch" it comes after on_epoch_end
        if state.is_world_process_zero:
            torch.save(self.criterion.state_dict(), self.path(args, state))

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:  # resumed
            self.criterion.load_state_dict(torch.load(self.path(args, state), weights_only=True))

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        values = "  ".join(f"{name} {metrics[name]:.3f}" for name in ("eval_loss", "eval_accuracy"))
        print(f"epoch {round(state.epoch):2d}  {values}")

    def path(self, args, state) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "criterion.pt"


def dicts(dataset) -> list[dict[str, Tensor]]:
    return [{"pixels": x, "labels": y} for x, y in dataset]


def main() -> None:
    torch.manual_seed(0)
    pretrained = pretrained_model()
    training = IndexedDataset(dicts(train_set()))
    steps = len(training) // BATCH_SIZE
    with tempfile.TemporaryDirectory() as folder:
        for epochs in (EPOCHS // 2, EPOCHS):  # stopped half way, and resumed from the checkpoint
            student = new_model()
            optimizer = torch.optim.SGD(student.parameters(), **SGD)
            trainer = DistillationTrainer(
                model=Classifier(student),
                teacher=FrozenTeacher(Classifier(pretrained)),
                criterion=AIKDLoss(num_samples=len(training), num_classes=10, num_epochs=EPOCHS),
                args=TrainingArguments(folder, num_train_epochs=epochs, eval_steps=10 * steps, **SETTINGS),
                train_dataset=training,
                eval_dataset=dicts(test_set()),
                optimizers=(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * steps)),
                compute_metrics=lambda seen: {"accuracy": (seen.predictions.argmax(-1) == seen.label_ids).mean()},
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train(resume_from_checkpoint=epochs == EPOCHS)
    report(pretrained, student)


if __name__ == "__main__":
    main()
