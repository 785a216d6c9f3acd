"""The full method in a plain PyTorch loop, with noisy labels.

First a network is trained with cross-entropy and frozen. Then a fresh one learns from
it. There are 2,000 training images, and 40% of their labels are wrong. The 4,000 test
images have true labels. It needs torch and aikd_losses alone.

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
SGD = dict(lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)


def read(name, header):
    raw = gzip.decompress((FILES / f"{name}-ubyte.gz").read_bytes())
    return torch.frombuffer(bytearray(raw[header:]), dtype=torch.uint8)


def load(part, size):
    x, y = read(f"{part}-images-idx3", 16), read(f"{part}-labels-idx1", 8)
    x = (x.view(-1, 784)[:size] - 73.0) / 90.0  # mean and standard deviation
    return x, y[:size].long()


def train(teacher=None):
    hidden = nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()
    model = nn.Sequential(*hidden, nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
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
