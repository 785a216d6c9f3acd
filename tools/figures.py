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


DIVERGENCES = (("forward_kl", BLUE), ("reverse_kl", ORANGE), ("js", GREEN))


def pulled(divergence: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two classes, a teacher at 0.9: the student's probability, the value, and the gradient with respect to its logit."""
    q = torch.linspace(0.005, 0.995, 100)
    z = torch.logit(q).requires_grad_()
    teacher = torch.tensor([[0.1, 0.9]]).log().expand(len(z), 2)
    loss = DeterministicKD(temperature=1.0, divergence=divergence, reduction="none")
    losses = loss(torch.stack([torch.zeros_like(z), z], -1), teacher)
    (pull,) = torch.autograd.grad(losses.sum(), z)
    return q, losses.detach(), pull


def divergences(axes: Axes, part: int, title: str) -> None:
    for divergence, colour in DIVERGENCES:
        drawn = pulled(divergence)
        axes.plot(drawn[0], drawn[part], color=colour, label=divergence)
    axes.axvline(0.9, color=GREY, linewidth=0.8, linestyle=":", label="the teacher")
    label(axes, title, "student's probability of a class")


def values(axes: Axes) -> None:
    divergences(axes, 1, "value, nats")
    axes.set_ylim(0, 2.5)


def gradients(axes: Axes) -> None:
    divergences(axes, 2, "gradient with respect to the logit")


def temperatures(axes: Axes) -> None:
    """What T**2 is for."""
    student, teacher = 3 * torch.randn(1, 10), 3 * torch.randn(1, 10)
    tried = torch.logspace(0, 1.3, 40).tolist()
    norms = []
    for temperature in tried:
        s = student.clone().requires_grad_()
        DeterministicKD(temperature=temperature)(s, teacher).backward()
        norms.append(float(s.grad.norm()))
    axes.loglog(tried, norms, color=BLUE, label="T² KL (the loss)")
    axes.loglog(tried, [n / t**2 for n, t in zip(norms, tried, strict=True)], color=RED, label="KL alone")
    label(axes, "size of the gradient, ten classes", "temperature T")


def target(axes: Axes) -> None:
    """What one sample is trained on in each epoch."""
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
    axes.plot(said, color=BLUE, marker="o", markersize=3, linewidth=0.8, label="student's probability of its label")
    axes.plot(wanted, color=ORANGE, label="target of the label")
    axes.plot([ramp(epoch) for epoch in range(epochs)], color=GREY, linestyle=":", label="alpha")
    label(axes, "the target of one sample", "epoch")
    axes.set_xticks(range(0, epochs, 5))
    axes.set_ylim(0, 1.02)


def stores(axes: Axes) -> None:
    """What the two stores remember of a noisy sequence."""
    noisy, index = (0.75 + 0.18 * torch.randn(40)).clamp(0.02, 0.98), torch.tensor([0])
    for name, store, colour in (
        ("CachedTargets: the newest", CachedTargets(1, 2, dtype=torch.float32), GREY),
        ("EMATargets, decay 0.5", EMATargets(1, 2, decay=0.5, dtype=torch.float32), ORANGE),
        ("EMATargets, decay 0.9", EMATargets(1, 2, decay=0.9, dtype=torch.float32), BLUE),
    ):
        kept = []
        for p in noisy.tolist():
            store.write(index, torch.tensor([[p, 1 - p]]))
            kept.append(float(store.read(index)[0][0, 0]))
        axes.plot(kept, color=colour, linewidth=0.9 if colour == GREY else 1.8, label=name)
    label(axes, "the remembered probability of one class", "epoch")
    axes.set_ylim(0, 1.02)


def objectives(axes: Axes) -> None:
    """What the student minimises."""
    score = torch.linspace(-3, 3, 61)
    for (name, objective), colour in zip(OBJECTIVES.items(), (BLUE, ORANGE, GREEN, GREEN, PURPLE), strict=True):
        losses = objective.student(score, torch.full_like(score, 0.5) if objective.paired else None)
        name = {"hinge": "hinge, wasserstein", "wasserstein": None}.get(name, name)  # the student's side is the same
        axes.plot(score, losses, color=colour, label=name)
    label(axes, "the student's loss (relativistic: teacher at 0.5)", "score of the student's prediction")


def discriminator(axes: Axes) -> None:
    """One that was trained on the predictions of two models."""
    teacher = torch.distributions.Beta(0.6, 0.4).sample((2000,))
    student = torch.distributions.Beta(5, 4).sample((2000,))
    scorer = MLPDiscriminator(2)
    adam = torch.optim.Adam(scorer.parameters(), lr=1e-3, betas=(0.5, 0.9))
    loss = AdversarialDistributionLoss(scorer, objective="wasserstein", penalty=GradientPenalty(10.0), optimizer=adam)
    for _ in range(400):
        batch = torch.randint(2000, (128,))
        loss.update(logits_of(student[batch]), logits_of(teacher[batch]))
    bins = torch.linspace(0, 1, 26).tolist()
    axes.hist(teacher, bins, density=True, color=ORANGE, alpha=0.5, label="teacher's predictions")
    axes.hist(student, bins, density=True, color=BLUE, alpha=0.5, label="student's predictions")
    p = torch.linspace(0.005, 0.995, 80)
    with torch.no_grad():
        scores = scorer(torch.stack([1 - p, p], -1))
    axes.plot(p, 3 + 6 * (scores - scores.mean()), color=GREEN, label="score (scaled, shifted)")
    label(axes, "two classes, after 400 steps of the discriminator", "probability of the second class")


def logits_of(p: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.zeros_like(p), torch.logit(p, eps=1e-4)], -1)


def label(axes: Axes, title: str, x: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)


FIGURES: dict[str, Callable[[Axes], None]] = {
    "deterministic-values.svg": values,
    "deterministic-gradients.svg": gradients,
    "deterministic-temperatures.svg": temperatures,
    "progressive-target.svg": target,
    "progressive-stores.svg": stores,
    "adversarial-objectives.svg": objectives,
    "adversarial-discriminator.svg": discriminator,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=IMAGES)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for name, draw in FIGURES.items():
            torch.manual_seed(0)
            figure, axes = plt.subplots(figsize=(4.4, 3.6), layout="constrained")
            draw(axes)
            lines = len(axes.get_legend_handles_labels()[0])
            figure.legend(loc="outside lower center", ncols=1 if lines < 4 else 2)
            figure.savefig(out / name, transparent=True, metadata={"Date": None, "Creator": None})
            plt.close(figure)


if __name__ == "__main__":
    main()
