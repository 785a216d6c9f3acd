"""The full method, ready made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import _checks
from ._owned import check_owned
from .adversarial import AdversarialDistributionLoss
from .deterministic import DeterministicKD
from .discriminators import MLPDiscriminator
from .objectives import AdversarialObjective, GradientPenalty, Penalty
from .progressive import ProgressiveKD
from .schedules import LinearRamp, Schedule
from .stack import LossStack
from .targets import CachedTargets, TargetStore


class AIKDLoss(LossStack):
    r"""AI-KD: cross-entropy with the deterministic, the progressive and the adversarial term.

    $$L = w_p\,[(1-a)\,\mathrm{CE}(s, y) + a\,\mathrm{CE}(s, r)] + w_d\,T^2\,\mathrm{KL}(p_T \,\|\, q_T) + w_a\,L_\text{adv}$$

    with $r$ the student's own prediction of the previous epoch, $p_T$ and $q_T$ the pre-trained model's and the student's
    distribution at temperature T, and $L_\text{adv}$ the student's side of the adversarial objective. It takes the place of
    cross-entropy. The terms are named "progressive", "deterministic" and "adversarial".

    Args:
        num_samples: size of the training set; ids are `0 <= index < num_samples`.
        num_classes: C, at least 2.
        num_epochs: how many epochs `alpha` takes to ramp up.
        temperature: T of the deterministic term (default 2).
        alpha: the ramp's last value (default 0.8), or a callable from the epoch to alpha.
        weights: any of the three weights, numbers or callables from the epoch, instead of w_p = w_d = 0.5 and w_a = 1. The
            first two sum to 1, the weight of the cross-entropy that they replace, so the learning rate stays right.
            A pre-trained model that hands over to one's own predictions: `weights={"progressive": LinearRamp(1.0, num_epochs,
            start=0.5), "deterministic": LinearRamp(0.0, num_epochs, start=0.5)}`.
        targets: the store (default `CachedTargets(num_samples, num_classes)`, float16).
        discriminator: default `MLPDiscriminator(num_classes)`; it sees softmax probabilities at T = 1.
        objective, penalty: of the adversarial term (default "wasserstein", `GradientPenalty(10.0)`).
        learning_rate: of the discriminator's Adam with betas (0.5, 0.9) (default 1e-3).
        reduction: of the three terms, `"mean"`, or `"sum"` where you divide by a count of your own (default `"mean"`).
        class_dim: the class axis; required for logits of more than two axes.
        process_group: of the adversarial term and the default store; `targets` of your own bring theirs.

    Shape, State: as in the three terms; a call gives `(total, values)`, see `LossStack`. Move it with `to(device)` as you
    do the model.

    Raises: as the three terms and `LossStack`.

    >>> criterion = AIKDLoss(num_samples=100, num_classes=3, num_epochs=10)
    >>> s, t = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3)
    >>> y, index = torch.randint(3, (8,)), torch.arange(8)
    >>> loss, values = criterion(student_logits=s, teacher_logits=t, target=y, index=index)
    >>> loss.backward()
    >>> criterion.update(student_logits=s, teacher_logits=t, index=index)      # every step
    >>> criterion.advance_epoch()                                              # every epoch
    >>> sorted(values)
    ['adversarial', 'deterministic', 'progressive']

    Reference: Kim, Suh, Baek, Kim, Jeong, Cho, Kim, *AI-KD: Adversarial learning and Implicit regularization for
    self-Knowledge Distillation*, Knowledge-Based Systems 293, 2024, https://arxiv.org/abs/2211.10938. The method's three
    terms are the paper's; weights, objective, discriminator and schedules are ours and come from our own measurements.
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        num_epochs: int,
        *,
        temperature: float = 2.0,
        alpha: Schedule = 0.8,
        weights: Mapping[str, Schedule] | None = None,
        targets: TargetStore | None = None,
        discriminator: nn.Module | None = None,
        objective: str | AdversarialObjective = "wasserstein",
        penalty: Penalty | None = GradientPenalty(10.0),  # noqa: B008 (frozen)
        learning_rate: float = 1e-3,
        reduction: str = "mean",
        class_dim: int | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not callable(alpha):
            alpha = LinearRamp(_checks.number("alpha", alpha, 0.0, 1.0), num_epochs)
        discriminator = MLPDiscriminator(num_classes) if discriminator is None else discriminator
        check_owned(discriminator, None)
        optimizer = torch.optim.Adam(discriminator.parameters(), lr=learning_rate, betas=(0.5, 0.9))
        shared: Any = dict(reduction=_checks.choice("reduction", reduction, ("mean", "sum")), class_dim=class_dim)
        store = CachedTargets(num_samples, num_classes, process_group=process_group) if targets is None else targets
        terms = {
            "progressive": ProgressiveKD(store, alpha=alpha, **shared),
            "deterministic": DeterministicKD(temperature=temperature, **shared),
            "adversarial": AdversarialDistributionLoss(
                discriminator,
                objective=objective,
                penalty=penalty,
                optimizer=optimizer,
                process_group=process_group,
                **shared,
            ),
        }
        super().__init__(terms, weights={"progressive": 0.5, "deterministic": 0.5, **(weights or {})})

    if TYPE_CHECKING:  # the tensors of the three terms, spelled out for editors

        def __call__(  # type: ignore[override]
            self,
            *,
            student_logits: Tensor,
            teacher_logits: Tensor,
            target: Tensor,
            index: Tensor | None,
            mask: Tensor | None = None,
            condition: Tensor | None = None,
            partner_index: Tensor | None = None,
            mix_lambda: float | Tensor | None = None,
        ) -> tuple[Tensor, dict[str, Tensor]]: ...
