"""The pictures of the documentation, drawn from the library itself: `make figures` writes docs/images/.

Text and axes are of a grey that reads on white and on black, as the site has both.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aikd_losses import (
    AdversarialDistributionLoss,
    CachedTargets,
    DeterministicKD,
    EMATargets,
    GradientPenalty,
    LinearRamp,
    MLPDiscriminator,
    ProgressiveKD,
)
from aikd_losses.objectives import OBJECTIVES

IMAGES = Path(__file__).parent.parent / "docs" / "images"
GREY, BLUE, ORANGE, GREEN, RED, PURPLE = "#808080", "#3b82c4", "#e0862e", "#3a9e5f", "#d0504f", "#9467bd"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "aikd-losses",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "sans-serif"],
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.labelcolor": GREY,
    "lines.linewidth": 1.8,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), GREY),
}


def deterministic() -> Figure:
    """The three divergences of two classes, the pull on the logit, and what T**2 is for."""
    figure, (value, slope, size) = plt.subplots(1, 3, figsize=(9.6, 3.1), layout="constrained")
    teacher = torch.tensor([[0.1, 0.9]]).log()
    q = torch.linspace(0.005, 0.995, 100)
    for divergence, colour in (("forward_kl", BLUE), ("reverse_kl", ORANGE), ("js", GREEN)):
        z = torch.logit(q).requires_grad_()
        loss = DeterministicKD(temperature=1.0, divergence=divergence, reduction="none")
        losses = loss(torch.stack([torch.zeros_like(z), z], -1), teacher.expand(len(z), 2))
        (pull,) = torch.autograd.grad(losses.sum(), z)
        value.plot(q, losses.detach(), color=colour, label=divergence)
        slope.plot(q, pull, color=colour)
    for axes, title in ((value, "value, nats"), (slope, "gradient with respect to the logit")):
        label(axes, title, "student's probability (teacher: 0.9)")
        axes.axvline(0.9, color=GREY, linewidth=0.8, linestyle=":")
    value.set_ylim(0, 2.5)
    value.legend()

    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(1, 10), 3 * torch.randn(1, 10)
    temperatures = torch.logspace(0, 1.3, 40).tolist()
    norms = []
    for temperature in temperatures:
        s = student.clone().requires_grad_()
        DeterministicKD(temperature=temperature)(s, teacher).backward()
        norms.append(float(s.grad.norm()))
    size.loglog(temperatures, norms, color=BLUE, label="T² KL (the loss)")
    size.loglog(temperatures, [n / t**2 for n, t in zip(norms, temperatures, strict=True)], color=RED, label="KL alone")
    label(size, "size of the gradient, ten classes", "temperature T")
    size.legend()
    return figure


def progressive() -> Figure:
    """What one sample is trained on in each epoch, and what the two stores remember of a noisy sequence."""
    figure, (blend, stores) = plt.subplots(1, 2, figsize=(9.6, 3.1), layout="constrained")
    torch.manual_seed(3)
    epochs = 20
    ramp = LinearRamp(0.8, num_epochs=epochs)
    loss = ProgressiveKD(CachedTargets(1, 3, dtype=torch.float32), alpha=ramp)
    label_logits = 1.2 + torch.randn(epochs)
    index, y = torch.tensor([0]), torch.tensor([0])
    said, wanted = [], []
    for epoch in range(epochs):
        logits = torch.tensor([[float(label_logits[epoch]), 0.5, -0.5]], requires_grad=True)
        loss(logits, y, index=index).backward()
        probs = logits.detach().softmax(-1)
        said.append(float(probs[0, 0]))
        wanted.append(float((probs - logits.grad)[0, 0]))  # the gradient is prediction minus target
        loss.update(logits, index=index)
        loss.advance_epoch()
    blend.plot(
        said, color=BLUE, marker="o", markersize=3, linewidth=0.8, label="the student's probability of the label"
    )
    blend.plot(wanted, color=ORANGE, label="what it is trained on")
    blend.plot([ramp(epoch) for epoch in range(epochs)], color=GREY, linestyle=":", label="alpha")
    label(blend, "the target of one sample", "epoch")
    blend.set_xticks(range(0, epochs, 5))
    blend.set_ylim(0, 1.45)
    blend.legend(loc="upper right")

    noisy = (0.75 + 0.18 * torch.randn(40)).clamp(0.02, 0.98)
    stores.plot(noisy, color=GREY, linestyle="", marker=".", markersize=4, label="predictions")
    for name, store, colour in (
        ("CachedTargets", CachedTargets(1, 2, dtype=torch.float32), BLUE),
        ("EMATargets, decay 0.5", EMATargets(1, 2, decay=0.5, dtype=torch.float32), ORANGE),
        ("EMATargets, decay 0.9", EMATargets(1, 2, decay=0.9, dtype=torch.float32), GREEN),
    ):
        kept = []
        for p in noisy.tolist():
            store.write(index, torch.tensor([[p, 1 - p]]))
            kept.append(float(store.read(index)[0][0, 0]))
        stores.plot(kept, color=colour, linewidth=0.9 if colour == BLUE else 1.8, label=name)
    label(stores, "what is remembered", "epoch")
    stores.set_ylim(0, 1.7)
    stores.legend(loc="upper right", ncols=2)
    return figure


def adversarial() -> Figure:
    """What the student minimises, and a discriminator that was trained on predictions of two models."""
    figure, (objectives, learnt) = plt.subplots(1, 2, figsize=(9.6, 3.3), layout="constrained")
    score = torch.linspace(-3, 3, 61)
    for (name, objective), colour in zip(OBJECTIVES.items(), (BLUE, ORANGE, GREEN, GREEN, PURPLE), strict=True):
        values = objective.student(score, torch.full_like(score, 0.5) if objective.paired else None)
        name = {"hinge": "hinge, wasserstein", "wasserstein": None}.get(name, name)  # the student's side is the same
        objectives.plot(score, values, color=colour, label=name)
    label(objectives, "the student's loss (relativistic: teacher at 0.5)", "score of the student's prediction")
    objectives.legend()

    torch.manual_seed(0)
    teacher, student = (
        torch.distributions.Beta(0.6, 0.4).sample((2000,)),
        torch.distributions.Beta(5, 4).sample((2000,)),
    )
    discriminator = MLPDiscriminator(2)
    adam = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    loss = AdversarialDistributionLoss(
        discriminator, objective="wasserstein", penalty=GradientPenalty(10.0), optimizer=adam
    )
    for _ in range(400):
        batch = torch.randint(2000, (128,))
        loss.update(logits_of(student[batch]), logits_of(teacher[batch]))
    bins = torch.linspace(0, 1, 26).tolist()
    learnt.hist(teacher, bins, density=True, color=ORANGE, alpha=0.5, label="teacher's predictions")
    learnt.hist(student, bins, density=True, color=BLUE, alpha=0.5, label="student's predictions")
    p = torch.linspace(0.005, 0.995, 80)
    with torch.no_grad():
        scores = discriminator(torch.stack([1 - p, p], -1))
    learnt.plot(p, 3 + 6 * (scores - scores.mean()), color=GREEN, label="score (scaled, shifted)")
    label(learnt, "two classes, after 400 steps of the discriminator", "probability of the second class")
    learnt.set_ylim(0, 8.5)
    learnt.legend()
    return figure


def logits_of(p: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.zeros_like(p), torch.logit(p, eps=1e-4)], -1)


def label(axes: Axes, title: str, x: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)


FIGURES: dict[str, Callable[[], Figure]] = {
    "term-deterministic.svg": deterministic,
    "term-progressive.svg": progressive,
    "term-adversarial.svg": adversarial,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=IMAGES)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for name, draw in FIGURES.items():
            figure = draw()
            figure.savefig(out / name, transparent=True, metadata={"Date": None, "Creator": None})
            plt.close(figure)


if __name__ == "__main__":
    main()
