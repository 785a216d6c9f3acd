"""The full method in the Hugging Face Trainer, with gradient accumulation.

A small subclass has `compute_loss`, and a callback ends the epoch. A BERT of random
weights reads images, four rows of pixels a token; 40% of the training labels are wrong.

    python examples/with_transformers.py
    test accuracy: pre-trained 61.12%, student 67.42%

`IndexedDataset` adds "index" to the items, which are dicts; those of the evaluation have
none. Training is stopped half way, and resumed from the Trainer's checkpoint.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from _loops import BATCH_SIZE, EPOCHS, test_set, train_set
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments, logging
from transformers.trainer_callback import PrinterCallback

from aikd_losses import AIKDLoss, FrozenTeacher, IndexedDataset

BERT = BertConfig(
    vocab_size=1, hidden_size=112, num_hidden_layers=1, num_attention_heads=4, intermediate_size=112, num_labels=10
)
SETTINGS = dict(
    per_device_train_batch_size=BATCH_SIZE // 2, gradient_accumulation_steps=2, per_device_eval_batch_size=1000,
    learning_rate=1e-3, lr_scheduler_type="constant", weight_decay=0.01, max_grad_norm=0.0, use_cpu=True,
    remove_unused_columns=False,  # or "index", which is no argument of the model, is dropped
    save_strategy="epoch", save_total_limit=1, report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
)  # fmt: skip
logging.set_verbosity_error()
logging.disable_progress_bar()


class DistillationTrainer(Trainer):
    def __init__(self, *args, teacher, criterion, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.criterion = teacher.to(self.args.device), criterion.to(self.args.device)
        self.seen = []  # of the parts of a batch, whose gradients are accumulated
        self.add_callback(EndOfEpoch(criterion))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, index = inputs.pop("labels"), inputs.pop("index", None)
        if model.training and index is None:  # in an evaluation nothing has history
            raise ValueError("A training batch has no `index`. Set remove_unused_columns=False; use IndexedDataset.")
        outputs = model(**inputs)
        tensors = dict(student_logits=outputs.logits, teacher_logits=self.teacher(**inputs).logits, index=index)
        loss, _ = self.criterion(**tensors, target=labels)  # a sum over samples
        if model.training:
            self.seen.append({name: tensor.detach() for name, tensor in tensors.items()})
            if self.accelerator.sync_gradients:  # the last part: the discriminator steps once for all of them
                self.criterion.update(**{name: torch.cat([part[name] for part in self.seen]) for name in tensors})
                self.seen.clear()
        if num_items_in_batch is None:  # a model without `**kwargs`: the Trainer divides by the number of parts
            loss = loss / len(labels)
        else:  # samples of all parts and of all processes, over which gradients are averaged
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = loss * processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


class EndOfEpoch(TrainerCallback):
    """The next epoch, and the criterion in a checkpoint: the Trainer saves the model alone."""

    def __init__(self, criterion: AIKDLoss) -> None:
        self.criterion = criterion

    def on_epoch_end(self, args, state, control, **kwargs):
        self.criterion.advance_epoch(round(state.epoch))

    def on_save(self, args, state, control, **kwargs):  # it comes after on_epoch_end
        if state.is_world_process_zero:
            torch.save(self.criterion.state_dict(), self.path(args, state))

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:  # resumed
            self.criterion.load_state_dict(torch.load(self.path(args, state), weights_only=True))
            self.criterion.advance_epoch(int(state.epoch))  # if saved on a last step

    def path(self, args, state) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "criterion.pt"


def dicts(dataset) -> list[dict[str, Tensor]]:
    return [{"inputs_embeds": x.view(7, 112), "labels": y} for x, y in dataset]


def accuracy(trainer: Trainer) -> float:
    seen = trainer.predict(dicts(test_set()))
    return (seen.predictions.argmax(-1) == seen.label_ids).mean()


def main() -> None:
    torch.manual_seed(0)
    images = dicts(train_set())
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(f"{folder}/plain", num_train_epochs=EPOCHS, **SETTINGS)
        plain = Trainer(BertForSequenceClassification(BERT), arguments, train_dataset=images)
        plain.remove_callback(PrinterCallback)
        plain.train()
        for epochs in (EPOCHS // 2, EPOCHS):  # stopped half way, and resumed from the checkpoint
            trainer = DistillationTrainer(
                BertForSequenceClassification(BERT),
                TrainingArguments(folder, num_train_epochs=epochs, **SETTINGS),
                train_dataset=IndexedDataset(images),
                teacher=FrozenTeacher(plain.model),
                criterion=AIKDLoss(len(images), 10, EPOCHS, reduction="sum"),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train(resume_from_checkpoint=epochs == EPOCHS)
        print(f"test accuracy: pre-trained {accuracy(plain):.2%}, student {accuracy(trainer):.2%}")


if __name__ == "__main__":
    main()
