"""AI-KD in a LightningModule with automatic optimization, stopped half way and resumed from Lightning's own checkpoint.

    python examples/with_lightning.py
    ...
    epoch 40  train/adversarial -0.102  train/deterministic 0.085  train/progressive 0.811  val/accuracy 0.636  val/loss 1.191
    test accuracy: pre-trained 60.82%, student 63.60%

`update` goes into `training_step`, before the backward pass that Lightning makes afterwards: the gradients are the same. The
criterion is a submodule, so that its state is in the checkpoint. The teacher is one too, but its weights are not.
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
        self.log_dict({f"train/{name}": value for name, value in terms.items()}, on_step=False, on_epoch=True)
        return loss

    def on_train_start(self):  # after resuming from an epoch's last step no epoch ends: Lightning is in the next one
        self.criterion.advance_epoch(self.current_epoch)

    def on_train_epoch_end(self):
        self.criterion.advance_epoch(self.current_epoch + 1)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self.model(x)  # the test images have no ids: `index=None`, and no `update`
        _, terms = self.criterion(student_logits=logits, teacher_logits=self.teacher(x), target=y, index=None)
        # Cross-entropy. The total has the adversarial term, by which epochs cannot be compared: its discriminator moves.
        self.log_dict({"val/loss": terms["progressive"], "val/accuracy": (logits.argmax(-1) == y).float().mean()})

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
