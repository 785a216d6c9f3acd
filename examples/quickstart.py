"""The full method in a plain PyTorch loop, with noisy labels.

First a network is trained with cross-entropy and frozen, then a fresh one learns from it.
2,000 training images, 40% of their labels wrong; 4,000 test images with true labels.

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
    files = (FILES / f"{part}-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1"))
    x, y = (bytearray(gzip.decompress(file.read_bytes())) for file in files)
    x, y = (torch.frombuffer(raw, dtype=torch.uint8) for raw in (x[16:], y[8:]))
    return (x.view(-1, 784)[:size] - 73.0) / 90.0, y[:size].long()  # mean, deviation


def train(teacher=None):
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    criterion = AIKDLoss(len(x), num_classes=10, num_epochs=EPOCHS)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(x)).split(125):  # the ids of these samples
            logits = model(x[index])
            if teacher is None:
                loss = F.cross_entropy(logits, y[index])
            else:
                both = dict(student_logits=logits, teacher_logits=teacher(x[index]))
                loss, _ = criterion(**both, target=y[index], index=index)
                criterion.update(**both, index=index)
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
