"""The full method in an Engine of PyTorch-Ignite.

The step is the plain loop's, and an event ends the epoch. 40% of the training labels are
wrong.

    python examples/with_ignite.py
    ...
    epoch 40  progressive 0.810  deterministic 0.098  adversarial -0.046
    test accuracy: pre-trained 60.82%, student 63.38%

A checkpoint handler takes `{"model": model, "criterion": criterion, "optimizer":
optimizer}`. Attach it after the event that ends the epoch.
"""

from __future__ import annotations

import torch
from _loops import BATCH_SIZE, EPOCHS, SGD, new_model, pretrained_model, report, train_set
from ignite.engine import Engine, Events
from ignite.metrics import RunningAverage
from torch.utils.data import DataLoader

from aikd_losses import AIKDLoss, FrozenTeacher, IndexedDataset


def main() -> None:
    torch.manual_seed(0)
    pretrained = pretrained_model()
    teacher, model = FrozenTeacher(pretrained), new_model()
    loader = DataLoader(IndexedDataset(train_set()), BATCH_SIZE, shuffle=True)
    criterion = AIKDLoss(num_samples=len(loader.dataset), num_classes=10, num_epochs=EPOCHS)
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)

    def step(engine, batch):
        x, y, index = batch
        tensors = dict(student_logits=model(x), teacher_logits=teacher(x), index=index)
        loss, terms = criterion(**tensors, target=y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        criterion.update(**tensors)
        return terms

    trainer = Engine(step)
    for name in criterion.terms:
        RunningAverage(output_transform=lambda terms, name=name: terms[name]).attach(trainer, name)

    @trainer.on(Events.EPOCH_COMPLETED)
    def end_of_epoch(engine):
        criterion.advance_epoch()
        schedule.step()

    @trainer.on(Events.EPOCH_COMPLETED(every=10))
    def log(engine):
        values = "  ".join(f"{name} {value:.3f}" for name, value in engine.state.metrics.items())
        print(f"epoch {engine.state.epoch:2d}  {values}")

    trainer.run(loader, max_epochs=EPOCHS)
    report(pretrained, model)


if __name__ == "__main__":
    main()
