r"""The terms as pure functions of tensors; the modules add settings and state, and have the equations. $p_T$ and $q_T$ are
the softmax of the teacher's and the student's logits over T. Everything is computed in float32 at least, and float64 for
float64 logits, whatever autocast says.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._divergences import cross_entropy, divergence_rows
from ._fused import in_blocks, reduced, with_its_gradient
from .linear import linear_deterministic_kd

__all__ = ["deterministic_kd", "linear_deterministic_kd", "progressive_kd"]


def deterministic_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 2.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    mask: Tensor | None = None,
    reduction: str = "mean",
    class_dim: int | None = None,
) -> Tensor:
    r"""Pull the student's distribution towards the teacher's: $T^2 D(p_T, q_T)$, see `DeterministicKD`.

    >>> student = torch.tensor([[1.0, 0.0]]); teacher = torch.tensor([[0.0, 1.0]])
    >>> deterministic_kd(student, teacher, temperature=1.0)      # (p1 - p0) * 1 = tanh(1/2)
    tensor(0.4621)
    """
    beta = _checks.divergence(divergence, beta)
    temperature, reduction = _checks.temperature(temperature), _checks.reduction(reduction)
    axis = _checks.logits(student_logits, class_dim, mask, teacher_logits=teacher_logits)
    student, teacher = visible(student_logits, axis, mask), visible(teacher_logits.detach(), axis, mask)

    how = "sum" if mask is not None and reduction == "mean" else reduction  # what is masked gives 0
    settings: dict[str, Any] = {"name": divergence, "temperature": temperature, "beta": beta}
    value = with_its_gradient(
        lambda s, t: reduced(divergence_rows(s, t, **settings), how),
        partial(in_blocks, **settings, reduction=how),
        1,
        student.flatten(0, -2),
        teacher.flatten(0, -2),
    )
    if how == "none":
        return value.reshape(student.shape[:-1])
    return value if mask is None or how == reduction else value / mask.sum().clamp_min(1)


def progressive_kd(
    student_logits: Tensor,
    previous: Tensor,
    target: Tensor | None = None,
    *,
    alpha: float | Tensor,
    known: Tensor | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
    class_dim: int | None = None,
) -> Tensor:
    r"""Pull the student's distribution towards its own previous one, see `ProgressiveKD`.

    With `target` $y$: $(1-a)\,\mathrm{CE}(q_1, y) + a\,T^2\,\mathrm{CE}(q_T, \text{previous})$; without: the second
    summand alone. $a$ is `alpha` where `known` (a bool a position; everywhere when None) and 0 elsewhere.

    >>> s = torch.zeros(1, 2)
    >>> progressive_kd(s, torch.tensor([[0.9, 0.1]]), torch.tensor([0]), alpha=0.5)  # log 2
    tensor(0.6931)
    """
    temperature, reduction = _checks.temperature(temperature), _checks.reduction(reduction)
    axis = _checks.logits(student_logits, class_dim, mask, previous=previous)
    _checks.mask(known, student_logits, axis, "known")
    student, previous = visible(student_logits, axis, mask), visible(previous.detach(), axis, mask)
    like = student.new_empty((), dtype=torch.promote_types(student.dtype, torch.float32))
    a = _checks.share("alpha", alpha, student.shape[:-1], like).expand(student.shape[:-1])
    a = a if known is None else a * known
    learned = a.requires_grad  # and has a gradient where it is 0 too
    # What has no share counts nothing; 0 * inf would be NaN.
    previous = previous if learned else previous.masked_fill((a <= 0).unsqueeze(-1), 0.0)
    value = a * cross_entropy(previous, student, temperature)
    if target is not None:
        _checks.class_target(target, student_logits, axis, mask)
        if target.is_floating_point():
            target = visible(target, axis, mask)
        else:
            target = target if mask is None else target.masked_fill(~mask, 0)  # an ignored label, -100 say, is no class
        hard = cross_entropy(target, student)
        value = value + (1 - a) * (hard if learned else hard.masked_fill(a >= 1, 0.0))
    return reduced(value, reduction, mask)


def finite_rows(logits: Tensor) -> Tensor:
    """True where a row (last axis) has a softmax: no NaN, no +inf, not all -inf. A class at -inf is merely excluded."""
    return logits.amax(-1).abs() < math.inf  # False for NaN, which amax hands on


def visible(logits: Tensor, axis: int, mask: Tensor | None) -> Tensor:
    """The logits, class axis last; uniform where masked, so that no NaN there reaches a gradient."""
    x = logits if axis == logits.ndim - 1 else logits.movedim(axis, -1)
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)
