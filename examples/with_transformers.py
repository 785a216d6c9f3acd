"""AI-KD in the Trainer of Transformers: `compute_loss` of a small subclass, and a callback that ends the epoch.

    python examples/with_transformers.py

The data set's items are dicts, to which `IndexedDataset` adds "index". Items of the evaluation have none.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from _images import BATCH_SIZE, EPOCHS, SGD, new_model, pretrained_model, report, test_set, train_set
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from aikd_losses import AIKDLoss, FrozenTeacher, IndexedDataset


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
    def __init__(self, criterion: AIKDLoss) -> None:
        self.criterion = criterion

    def on_epoch_end(self, args, state, control, **kwargs):
        self.criterion.advance_epoch(round(state.epoch))

    def on_save(self, args, state, control, **kwargs):  # after on_epoch_end; the Trainer saves the model alone
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        torch.save(self.criterion.state_dict(), folder / "criterion.pt")


def dicts(dataset) -> list[dict[str, Tensor]]:
    return [{"pixels": x, "labels": y} for x, y in dataset]


def main() -> None:
    torch.manual_seed(0)
    pretrained, student = pretrained_model(), new_model()
    training = IndexedDataset(dicts(train_set()))
    optimizer = torch.optim.SGD(student.parameters(), **SGD)
    steps = EPOCHS * len(training) // BATCH_SIZE  # the Trainer's schedule goes by steps
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            model=Classifier(student),
            teacher=FrozenTeacher(Classifier(pretrained)),
            criterion=AIKDLoss(num_samples=len(training), num_classes=10, num_epochs=EPOCHS, temperature=4.0),
            args=TrainingArguments(
                folder,
                num_train_epochs=EPOCHS,
                per_device_train_batch_size=BATCH_SIZE,
                per_device_eval_batch_size=1000,
                max_grad_norm=0.0,
                label_names=["labels"],
                remove_unused_columns=False,
                eval_strategy="epoch",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=training,
            eval_dataset=dicts(test_set()),
            optimizers=(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)),
            compute_metrics=lambda seen: {"accuracy": float((seen.predictions.argmax(-1) == seen.label_ids).mean())},
        )
        trainer.train()
    report(pretrained, student)


if __name__ == "__main__":
    main()
