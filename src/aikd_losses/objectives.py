"""What the discriminator minimises and what the student minimises, given the discriminator's scores."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import reduce
from torch import Tensor
from torch.nn.functional import softplus

from . import _checks

Score = Callable[[Tensor], Tensor]  # (N, C) -> (N,), higher = "teacher"
Penalty = Callable[[Score, Tensor, Tensor], Tensor]  # (score, teacher's rows, student's rows) -> (N,)


@dataclass(frozen=True)
class AdversarialObjective:
    """A pair of losses on the discriminator's scores, each `(N,)` from scores `(N,)`; higher scores say "teacher".

    Args:
        discriminator: `(teacher_scores, student_scores) -> (N,)`, what the discriminator minimises.
        student: `(student_scores, teacher_scores) -> (N,)`, what the student minimises; `teacher_scores` is None
            unless `paired`, which saves the discriminator a forward pass.
        paired: whether `student` looks at the teacher's scores.

    >>> objective = AdversarialObjective(
    ...     discriminator=lambda teacher, student: student - teacher, student=lambda student, teacher: -student
    ... )
    >>> objective.discriminator(torch.tensor([2.0]), torch.tensor([0.5]))
    tensor([-1.5000])
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    student: Callable[[Tensor, Any], Tensor]
    paired: bool = False


OBJECTIVES = {  # of the scores t of the teacher's rows and s of the student's
    # -log sigmoid(t) - log(1 - sigmoid(s))
    "non_saturating": AdversarialObjective(lambda t, s: softplus(-t) + softplus(s), lambda s, _: softplus(-s)),
    "least_squares": AdversarialObjective(
        lambda t, s: 0.5 * (t - 1).square() + 0.5 * s.square(), lambda s, _: 0.5 * (s - 1).square()
    ),
    "hinge": AdversarialObjective(lambda t, s: (1 - t).relu() + (1 + s).relu(), lambda s, _: -s),
    "wasserstein": AdversarialObjective(lambda t, s: s - t, lambda s, _: -s),
    "relativistic": AdversarialObjective(lambda t, s: softplus(s - t), lambda s, t: softplus(t - s), paired=True),
}


def objective_of(named: str | AdversarialObjective) -> AdversarialObjective:
    """Looked up where it is played: a term holds the name, which can be pickled."""
    return OBJECTIVES[named] if isinstance(named, str) else named


@dataclass(frozen=True)
class GradientPenalty:
    r"""Keeps the discriminator's gradient at norm 1 between the two sides (two-sided, on interpolates):

    $$w\,(\lVert \nabla D(\hat x) \rVert_2 - 1)^2, \qquad \hat x = u\,x_\text{teacher} + (1-u)\,x_\text{student}$$

    with one $u \sim U(0, 1)$ a sample, drawn anew each time from torch's global generator.

    Args:
        weight: w, finite and not negative (default 10).

    >>> steep = lambda x: 3 * x[:, 0]                   # a gradient of norm 3 everywhere
    >>> GradientPenalty(10.0)(steep, torch.zeros(1, 2), torch.ones(1, 2))
    tensor([40.])

    Reference: Gulrajani et al., *Improved Training of Wasserstein GANs*, 2017, https://arxiv.org/abs/1704.00028.
    """

    weight: float = 10.0

    def __post_init__(self) -> None:
        _checks.number("weight", self.weight, 0.0, math.inf)

    def __call__(self, score: Score, teacher: Tensor, student: Tensor) -> Tensor:
        u = torch.rand_like(teacher[:, :1])
        slope = _input_gradient(score, u * teacher + (1 - u) * student)
        norm: Tensor = torch.linalg.vector_norm(slope, dim=-1)
        return self.weight * (norm - 1).square()


@dataclass(frozen=True)
class ZeroCenteredPenalty:
    r"""Flattens the discriminator where the data is (R1 on the teacher's side + R2 on the student's):

    $$\frac{\gamma}{2} \left( \lVert \nabla D(x_\text{teacher}) \rVert_2^2 +
    \lVert \nabla D(x_\text{student}) \rVert_2^2 \right)$$

    Args:
        gamma: finite and not negative (default 1).

    >>> steep = lambda x: 3 * x[:, 0]
    >>> ZeroCenteredPenalty(gamma=1.0)(steep, torch.zeros(1, 2), torch.ones(1, 2))
    tensor([9.])

    Reference: Mescheder, Geiger, Nowozin, *Which Training Methods for GANs do actually Converge?*, 2018,
    https://arxiv.org/abs/1801.04406.
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        _checks.number("gamma", self.gamma, 0.0, math.inf)

    def __call__(self, score: Score, teacher: Tensor, student: Tensor) -> Tensor:
        slopes = torch.stack([_input_gradient(score, x) for x in (teacher, student)])
        return self.gamma / 2 * reduce(slopes.square(), "side n c -> n", "sum")


def _input_gradient(score: Score, x: Tensor) -> Tensor:
    """The gradient of each score with respect to its own row, itself differentiable."""
    if torch.compiler.is_compiling():  # pragma: no cover (the compiler reads it): torch.autograd.grad breaks the graph
        slope: Tensor = torch.func.grad(lambda rows: score(rows).sum())(x)
        return slope  # which in turn refuses batch norm, where nothing is compiled
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(score(x).sum(), x, create_graph=True)
    return slope
