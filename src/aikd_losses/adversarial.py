"""Fool a discriminator that tells the pre-trained model's predictive distribution from the student's."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from . import _checks, functional
from ._divergences import no_autocast, wide
from ._fused import reduced
from ._owned import Owner, lost_eps
from .objectives import OBJECTIVES, AdversarialObjective, Penalty, objective_of
from .schedules import called

Condition = tuple[Tensor, ...]  # nothing, or a row a position


class AdversarialDistributionLoss(Owner):
    r"""Pulls the distribution of the student's predictions towards that of the teacher's, by way of a discriminator.

    With $x_s$ and $x_t$ what `inputs` says of the student's and the teacher's logits at `temperature`, and $D$ the
    discriminator, whose higher scores say "teacher":

    | `objective` | discriminator minimises the mean of | student minimises the mean of |
    |---|---|---|
    | `"non_saturating"` | softplus(-D(x_t)) + softplus(D(x_s)) | softplus(-D(x_s)) |
    | `"least_squares"` | (D(x_t) - 1)²/2 + D(x_s)²/2 | (D(x_s) - 1)²/2 |
    | `"hinge"` | relu(1 - D(x_t)) + relu(1 + D(x_s)) | -D(x_s) |
    | `"wasserstein"` | D(x_s) - D(x_t) | -D(x_s) |
    | `"relativistic"` | softplus(D(x_s) - D(x_t)) | softplus(D(x_t) - D(x_s)) |

    Calling the module gives the student's loss. The discriminator is trained by `update`, one step a call, if it owns
    an `optimizer`; without one, by your own step on `discriminator_loss`.

    Args:
        discriminator: any `nn.Module` from `(N, C)` to `(N,)` or `(N, 1)` raw scores; with `condition` it is called as
            `discriminator(x, condition)`. It may be shown any number of rows in any order. Public.
        objective: one of the above (default `"non_saturating"`) or an `AdversarialObjective`.
        inputs: what the discriminator sees: `"probs"` (default), `"log_probs"`, or `"logits"` divided by T, which unlike
            the others differ between models that predict the same.
        temperature: T, from 1e-9 to 1e9 (default 1). The value is a score and no divergence: there is no factor T**2.
        penalty: None (default), `GradientPenalty(weight)`, `ZeroCenteredPenalty(gamma)`, or a callable
            `(score, teacher_rows, student_rows) -> (N,)`; added to the discriminator's loss.
        optimizer: a torch optimizer that holds exactly the discriminator's parameters. Public.
        reduction, class_dim: as in `DeterministicKD`; `update` always steps on the mean.
        process_group: the ranks that train on different rows (default: all, once there is a group).

    Shape: `student_logits`, `teacher_logits`: `(N, C)`, `(N, C, *)` or `(N, *, C)`, equal; `mask`: bool, that without
    the class axis; `condition`: that without the class axis, and any further axes. Each position is shown to the
    discriminator as a row. Returns a scalar or, with `"none"`, a value a position.

    State: the discriminator and its optimizer (`optimizer_*`) are in `state_dict()`, but not in `parameters()`, `buffers()`
    or `modules()`, where a student's optimizer or a wrapper would find them. `update` alone changes them. Under
    `torch.distributed` the first `update` takes rank 0's discriminator, and every `update` the gradient of all ranks' rows.

    Raises: `ValueError`, `TypeError` or `IndexError` for settings and tensors out of range or of the wrong kind or shape;
    `RuntimeError` for an `update` in eval mode or without an `optimizer`.

    >>> discriminator = MLPDiscriminator(num_classes=3)
    >>> adam = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    >>> loss = AdversarialDistributionLoss(discriminator, penalty=GradientPenalty(10.0), optimizer=adam)
    >>> student_logits, teacher_logits = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3)
    >>> value = loss(student_logits, teacher_logits)                   # to be added to the student's loss
    >>> of_discriminator = loss.update(student_logits, teacher_logits)
    >>> value.shape, of_discriminator.requires_grad
    (torch.Size([]), False)

    Reference: the adversarial term of AI-KD: Kim et al., 2024, https://arxiv.org/abs/2211.10938. Objectives: Goodfellow
    et al., 2014, https://arxiv.org/abs/1406.2661; Mao et al. (least squares), 2017, https://arxiv.org/abs/1611.04076;
    Lim and Ye (hinge), 2017, https://arxiv.org/abs/1705.02894; Arjovsky et al. (Wasserstein), 2017,
    https://arxiv.org/abs/1701.07875; Jolicoeur-Martineau (relativistic), 2018, https://arxiv.org/abs/1807.00734.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        *,
        objective: str | AdversarialObjective = "non_saturating",
        inputs: str = "probs",
        temperature: float = 1.0,
        penalty: Penalty | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        reduction: str = "mean",
        class_dim: int | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(discriminator, optimizer, process_group)
        if not isinstance(objective, AdversarialObjective):
            _checks.choice("objective", objective, OBJECTIVES)
        self.objective = objective
        self.inputs = _checks.choice("inputs", inputs, ("probs", "log_probs", "logits"))
        self.temperature = _checks.temperature(temperature)
        self.penalty = penalty
        self.reduction = _checks.reduction(reduction)
        self.class_dim = _checks.class_dim(class_dim)
        self._last_step: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        mask: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """The student's loss: how far the discriminator is from taking the student for the teacher."""
        s, t, given, shape = self._rows(student_logits, teacher_logits, mask, condition)
        held = [*self.discriminator.named_parameters(), *self.discriminator.named_buffers()]
        frozen = {name: x.detach().clone() for name, x in held}  # which no step before the backward pass changes
        objective, score = objective_of(self.objective), partial(self._score, frozen, given)
        with no_autocast(s):
            of_teacher = score(self._seen(t)) if objective.paired else None
            values = objective.student(score(self._seen(s)), of_teacher)
            _checks.shaped("objective.student", values, (len(s),), "must return a value a row, shape ")
        return reduced(values.view(shape), self.reduction, mask)

    student_loss = forward
    """What calling the module gives. No gradient reaches the discriminator."""

    if TYPE_CHECKING:
        __call__ = forward

    def discriminator_loss(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        mask: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """What the discriminator minimises, penalty included. No gradient reaches the logits; buffers stay as they are."""
        s, t, given, shape = self._rows(student_logits, teacher_logits, mask, condition)
        with torch.inference_mode(False), no_autocast(s):
            buffers = {name: x.clone() for name, x in self.discriminator.named_buffers()}
            values, _ = self._values(buffers, s, t, given)
        return reduced(values.view(shape), self.reduction, mask)

    def update(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        mask: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """One step of the discriminator; returns its loss before the step, detached.

        Anywhere after the forward call of the same step, before the student's `backward()` too. Rows without a softmax on
        either side (NaN, +inf) are left out.
        """
        if not self.training:
            raise RuntimeError(
                "`update` must not be called in eval mode: it would learn from evaluation. Call `.train()`."
            )
        if self.optimizer is None or not any(p.requires_grad for p in self.discriminator.parameters()):
            raise RuntimeError(
                "`update` needs a discriminator that can be trained and its `optimizer`, given on construction: "
                "torch.optim.Adam(discriminator.parameters()). Without one, step on `discriminator_loss` yourself."
            )
        if lost_eps(self.optimizer):
            raise RuntimeError(
                "`update` needs an `eps` that is not 0 in the type of the parameters. Keep them in float32."
            )
        s, t, given, _ = self._rows(student_logits, teacher_logits, mask, condition)
        if self._ranks.active() and not self._same_on_all_ranks:
            self._ranks.broadcast_from_first([*self.discriminator.parameters(), *self.discriminator.buffers()])
            self._same_on_all_ranks = True
        with torch.inference_mode(False), torch.enable_grad(), no_autocast(s):
            counts = functional.finite_rows(s) & functional.finite_rows(t)
            counts = counts if mask is None else counts & mask.flatten()
            s, t = (x.detach().masked_fill(~counts.unsqueeze(-1), 0.0) for x in (s, t))
            values, lead = self._values({}, s, t, given)
            loss, norm = self._step(reduced(values, "sum", counts), counts.sum())
        self._last_step = loss, norm, lead.detach(), counts
        return loss

    @torch.no_grad()
    def diagnostics(self) -> dict[str, Tensor]:
        """The discriminator's health in the last `update`, to be logged; empty before the first one.

        `discriminator_loss`: what `update` returned. `accuracy`: how often the teacher's row of a sample got the higher
        score (ties count half; of this rank's rows; NaN where there are none). .4 to .8 was seen where it helps; near 1 the
        student gains little, near 0 the discriminator learns the wrong way round. `gradient_norm`: of the step; not finite,
        or growing without bound, in a discriminator that has exploded.
        """
        if self._last_step is None:
            return {}
        loss, norm, lead, counts = self._last_step
        wins = torch.where(lead.isnan(), lead, 0.5 * (torch.sign(lead) + 1))
        accuracy = wins.masked_fill(~counts, 0.0).sum() / counts.sum()
        return {"discriminator_loss": loss, "accuracy": accuracy, "gradient_norm": norm}

    def _seen(self, rows: Tensor) -> Tensor:
        """What the discriminator is shown of logits, in its precision."""
        x = rows / self.temperature
        if self.inputs == "probs":
            x = torch.softmax(x, -1)
        else:
            x = torch.log_softmax(x, -1) if self.inputs == "log_probs" else x
            x = x.masked_fill(x == -math.inf, 0.0)  # an excluded class says nothing
        return x.to([*self.discriminator.parameters(), x][0].dtype)

    def _score(self, state: dict[str, Tensor], given: Condition, x: Tensor) -> Tensor:
        """Scores `(rows,)`, float32 at least, by a discriminator whose tensors are those in `state`, where given."""
        scores: Tensor = functional_call(self.discriminator, state, (x, *given))
        if scores.shape not in ((len(x),), (len(x), 1)):
            raise ValueError(
                f"`discriminator` must return a score a row, shape ({len(x)},) or ({len(x)}, 1) for rows of shape "
                f"{tuple(x.shape)}; got {tuple(scores.shape)}."
            )
        return wide(scores.flatten())[0]

    def _values(self, state: dict[str, Tensor], s: Tensor, t: Tensor, given: Condition) -> tuple[Tensor, Tensor]:
        """What the discriminator minimises, a value a row, and by how much the teacher's row scores more."""
        both = torch.cat([self._seen(x.detach()) for x in (t, s)])  # scored in one call
        twice = tuple(torch.cat([x, x]) for x in given)
        of_teacher, of_student = self._score(state, twice, both).chunk(2)
        values = objective_of(self.objective).discriminator(of_teacher, of_student)
        _checks.shaped("objective.discriminator", values, (len(s),), "must return a value a row, shape ")
        if self.penalty is not None:
            once = tuple(x.chunk(2)[0] for x in twice)  # no tensors of inference mode, as `given` may be
            penalty = self.penalty(partial(self._score, state, once), *both.chunk(2))
            values = values + _checks.shaped("penalty", penalty, (len(s),), "must return a value a row, shape ")
        return values, of_teacher - of_student

    def _rows(
        self, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None, condition: Tensor | None
    ) -> tuple[Tensor, Tensor, Condition, tuple[int, ...]]:
        """The logits of either side and the condition, a row a position, 0 where masked; and the shape of the positions."""
        axis = _checks.logits(student_logits, self.class_dim, mask, teacher_logits=teacher_logits)
        home = [*self.discriminator.parameters(), student_logits][0]
        _checks.same_device("discriminator", home, "student_logits", student_logits)
        both = (functional.visible(x, axis, mask).flatten(0, -2) for x in (student_logits, teacher_logits.detach()))
        s, t = (wide(x)[0] for x in both)
        shape = _checks.positions(student_logits, axis)
        if condition is None:
            return s, t, (), shape
        _checks.same_device("condition", _checks.tensor("condition", condition), "student_logits", student_logits)
        if condition.shape[: len(shape)] != shape:
            raise ValueError(
                f"`condition` must have a row a position, shape {shape} and any further axes; got {tuple(condition.shape)}."
            )
        condition = condition.flatten(0, len(shape) - 1)
        if mask is not None:
            condition = condition.masked_fill(~mask.reshape(-1, *[1] * (condition.ndim - 1)), 0)
        return s, t, (condition,), shape

    def extra_repr(self) -> str:
        objective = repr(self.objective) if isinstance(self.objective, str) else "AdversarialObjective"
        return (
            f"objective={objective}, {_checks.settings(self, 'inputs', 'temperature', 'reduction', 'class_dim')}\n"
            f"discriminator={type(self.discriminator).__name__}({self.discriminator.extra_repr()})\n"
            f"penalty={called(self.penalty)}, optimizer={None if self.optimizer is None else type(self.optimizer).__name__}"
        )
