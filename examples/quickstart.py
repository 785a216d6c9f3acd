"""AI-KD in a plain loop: train a network, freeze it, train a fresh one that learns from it.

2,000 embedded images, 40% of the labels wrong; the 4,000 test images are clean. Torch and aikd_losses alone.

    python examples/quickstart.py
    test accuracy: pre-trained 66.95%, student 69.33%
"""

import gzip
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from aikd_losses import AIKDLoss, FrozenTeacher

FILES = Path(__file__).parent / "data" / "fashion-mnist-mini"
EPOCHS = 40


def load(part, size):
    x, y = (
        gzip.decompress((FILES / f"{part}-{name}-ubyte.gz").read_bytes()) for name in ("images-idx3", "labels-idx1")
    )
    x, y = (torch.frombuffer(bytearray(raw), dtype=torch.uint8) for raw in (x[16:], y[8:]))
    return (x.view(-1, 784)[:size] - 73.0) / 90.0, y[:size].long()  # mean and standard deviation of the pixels


def train(teacher=None):
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    criterion = AIKDLoss(len(x), num_classes=10, num_epochs=EPOCHS)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(x)).split(125):  # which samples these are: their ids
            logits = model(x[index])
            if teacher is None:
                loss = F.cross_entropy(logits, y[index])
            else:
                tensors = dict(student_logits=logits, teacher_logits=teacher(x[index]), index=index)
                loss, _ = criterion(**tensors, target=y[index])
                criterion.update(**tensors)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        if teacher is not None:
            criterion.advance_epoch()
    return model, (model(test_x).argmax(-1) == test_y).float().mean().item()


torch.manual_seed(0)
(x, y), (test_x, test_y) = load("train", 2000), load("t10k", 4000)
wrong = torch.randperm(len(x))[:800]
y[wrong] = (y[wrong] + torch.randint(1, 10, (800,))) % 10
pretrained, plain = train()
_, student = train(FrozenTeacher(pretrained))
print(f"test accuracy: pre-trained {plain:.2%}, student {student:.2%}")
