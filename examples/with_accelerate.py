"""The full method under Accelerate, on one process or several.

40% of the training labels are wrong.

    python examples/with_accelerate.py
    ...
    processes: 1
    test accuracy: pre-trained 60.82%, student 63.38%

On two processes each has half of every batch, and the student reaches 63.55%:

    torchrun --nproc-per-node 2 examples/with_accelerate.py

The model, its optimizer and the loader are prepared. The criterion is not. It is no part
of the model, and it looks after several processes itself. It is moved to the device, and
registered for checkpoints (`accelerator.save_state`, after `advance_epoch`). The schedule
is not prepared either, as it goes by epochs.
"""

from __future__ import annotations

import torch
from _loops import BATCH_SIZE, EPOCHS, SGD, new_model, pretrained_model, report, train_set
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

from aikd_losses import AIKDLoss, FrozenTeacher, IndexedDataset


def train(accelerator: Accelerator, pretrained: nn.Module) -> nn.Module:
    teacher = FrozenTeacher(pretrained).to(accelerator.device)
    model = new_model()
    loader = DataLoader(IndexedDataset(train_set()), BATCH_SIZE // accelerator.num_processes, shuffle=True)
    criterion = AIKDLoss(num_samples=len(loader.dataset), num_classes=10, num_epochs=EPOCHS)
    criterion.to(accelerator.device)
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(criterion, schedule)

    for epoch in range(EPOCHS):
        for x, y, index in loader:
            tensors = dict(student_logits=model(x), teacher_logits=teacher(x), index=index)
            loss, terms = criterion(**tensors, target=y)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            criterion.update(**tensors)  # averages over the processes
        criterion.advance_epoch()  # they exchange what each remembers
        schedule.step()
        if (epoch + 1) % 10 == 0:
            values = "  ".join(f"{name} {float(value):.3f}" for name, value in terms.items())
            accelerator.print(f"epoch {epoch + 1:2d}  {values}")
    return accelerator.unwrap_model(model)


def main() -> None:
    # `cpu`: without a GPU, torchrun's processes would otherwise each train as if alone.
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_seed(0)
    pretrained = pretrained_model()  # the same in every process
    student = train(accelerator, pretrained)
    if accelerator.is_main_process:
        print(f"processes: {accelerator.num_processes}")
        report(pretrained, student)
    accelerator.free_memory()  # or DDP holds the process group, and gloo may abort
    accelerator.end_training()


if __name__ == "__main__":
    main()
