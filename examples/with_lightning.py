"""The full method in a LightningModule, with automatic optimization.

Training is stopped half way, and resumed from Lightning's own checkpoint. 40% of the
training labels are wrong.

    python examples/with_lightning.py
    ...
    test accuracy: pre-trained 60.82%, student 63.60%

`update` goes into `training_step`. Lightning makes the backward pass after it, and the
gradients are the same. The criterion is a submodule, so its state is in the checkpoint.
The teacher is a submodule too, but its weights are not in the checkpoint.
"""

from __future__ import annotations

import logging
import tempfile
import warnings

import lightning as L
import torch
from _loops import BATCH_SIZE, EPOCHS, SGD, new_model, pretrained_model, report, test_set, train_set
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from aikd_losses import AIKDLoss, FrozenTeacher, IndexedDataset

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
for noise in ("does not have many workers", "treespec", "Checkpoint directory", "log interval"):
    warnings.filterwarnings("ignore", message=f".*{noise}")


class Student(L.LightningModule):
    def __init__(self, pretrained: nn.Module, num_samples: int) -> None:
        super().__init__()
        self.model = new_model()
        self.teacher = FrozenTeacher(pretrained)
        self.criterion = AIKDLoss(num_samples=num_samples, num_classes=10, num_epochs=EPOCHS)

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        tensors = dict(student_logits=self.model(x), teacher_logits=self.teacher(x), index=index)
        loss, terms = self.criterion(**tensors, target=y)
        self.criterion.update(**tensors)
        values = {f"train/{name}": value for name, value in terms.items()}
        self.log_dict(values, on_step=False, on_epoch=True)
        return loss

    def on_train_start(self):
        # Resumed from an epoch's last step, Lightning is in the next epoch: none ends.
        self.criterion.advance_epoch(self.current_epoch)

    def on_train_epoch_end(self):
        self.criterion.advance_epoch(self.current_epoch + 1)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self.model(x)  # these images have no ids: `index=None`, no `update`
        tensors = dict(student_logits=logits, teacher_logits=self.teacher(x), index=None)
        _, terms = self.criterion(**tensors, target=y)
        # Without ids the progressive term is cross-entropy. The total loss would not do:
        # its adversarial part changes with the discriminator, from epoch to epoch.
        accuracy = (logits.argmax(-1) == y).float().mean()
        self.log_dict({"val/loss": terms["progressive"], "val/accuracy": accuracy})

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.model.parameters(), **SGD)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


def main() -> None:
    torch.manual_seed(0)
    pretrained = pretrained_model()
    loader = DataLoader(IndexedDataset(train_set()), BATCH_SIZE, shuffle=True)
    validation = DataLoader(test_set(), 1000)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        for epochs in (EPOCHS // 2, EPOCHS):
            # At the end of the training epoch, that is after `advance_epoch`.
            saver = ModelCheckpoint(folder, save_on_train_epoch_end=True)
            trainer = L.Trainer(
                accelerator="cpu",
                max_epochs=epochs,
                check_val_every_n_epoch=10,
                callbacks=[saver],
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            student = Student(pretrained, len(loader.dataset))
            trainer.fit(student, loader, validation, ckpt_path=checkpoint)
            checkpoint = saver.best_model_path
            values = "  ".join(f"{name} {value:.3f}" for name, value in sorted(trainer.callback_metrics.items()))
            print(f"epoch {trainer.current_epoch:2d}  {values}")
    report(pretrained, student.model)


if __name__ == "__main__":
    main()
