r"""The terms as pure functions of tensors; the modules add settings and state. Each is its equation, in `_divergences.py`,
between what is required of the tensors and how a value a position is reduced.

Notation: $s$ and $t$ are the student's and the teacher's logits, $q_T = \mathrm{softmax}(s/T)$ and
$p_T = \mathrm{softmax}(t/T)$; sums run over classes, values are in nats. Everything is computed in float32 at least,
and float64 for float64 logits, whatever autocast says.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import _checks, _divergences
from ._fused import Plain, RowsWithGradient, rowwise_loss
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
    >>> deterministic_kd(student, student, temperature=1.0)
    tensor(0.)
    """
    beta = _checks.divergence(divergence, beta)
    temperature = _checks.temperature(temperature)
    axis = check_teacher(student_logits, teacher_logits, mask, class_dim)
    student, teacher = (visible(x, axis, mask) for x in (student_logits, teacher_logits.detach()))
    plain = partial(_divergences.divergence, name=divergence, temperature=temperature, beta=beta)
    if divergence != "forward_kl":
        return reduce_positions(plain(student, teacher), mask, reduction)
    with_gradient = partial(_divergences.kl_with_gradient, temperature=temperature)
    return _reduced(plain, with_gradient, mask, reduction, student, teacher)


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
    >>> progressive_kd(s, torch.tensor([[0.9, 0.1]]), torch.tensor([0]), alpha=0.5)    # log 2, whatever the target
    tensor(0.6931)
    """
    temperature = _checks.temperature(temperature)
    axis = _checks.logits(student_logits, _checks.class_dim(class_dim))
    _checks.like_logits("previous", previous, student_logits)
    _checks.mask(known, student_logits, axis, "known")
    _checks.mask(mask, student_logits, axis)
    student, previous = visible(student_logits, axis, mask), visible(previous.detach(), axis, mask)
    like = student.new_empty((), dtype=torch.promote_types(student.dtype, torch.float32))
    a = _checks.share("alpha", alpha, student.shape[:-1], like).expand(student.shape[:-1])
    a = a if known is None else a * known
    counts = torch.ones_like(a) if mask is None else mask.to(a.dtype)
    others = [previous, a * counts]
    if target is not None:
        _checks.class_target(target, student_logits, axis)
        if target.is_floating_point():
            target = visible(target, axis, mask)
        else:
            _checks.labels_in_range(target, student_logits.shape[axis], mask)
            target = target if mask is None else target.masked_fill(~mask, 0)  # an ignored label, -100 say, is no class
        others += [target, (1 - a) * counts]
    plain = partial(_divergences.shared_cross_entropy, temperature=temperature)
    if any(x.requires_grad for x in others):  # an alpha or a soft target that is learned
        return reduce_positions(plain(student, *others), mask, reduction)
    with_gradient = partial(_divergences.shared_cross_entropy_with_gradient, temperature=temperature)
    return _reduced(plain, with_gradient, mask, reduction, student, *others)


def _reduced(
    plain: Plain, with_gradient: RowsWithGradient, mask: Tensor | None, reduction: str, student: Tensor, *others: Tensor
) -> Tensor:
    """A value a position, 0 where masked, by whichever form pays, reduced."""
    _checks.reduction(reduction)
    shape = student.shape[:-1]
    flat = [x.reshape(-1, *x.shape[len(shape) :]) for x in (student, *others)]
    if mask is not None and reduction == "mean":
        return rowwise_loss(plain, with_gradient, "sum", *flat) / mask.sum().clamp_min(1)
    value = rowwise_loss(plain, with_gradient, reduction, *flat)
    return value.reshape(shape) if reduction == "none" else value


def reduce_positions(values: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    """`values`, one a position, reduced over the positions that count; with none of them, 0 with a graph."""
    _checks.reduction(reduction)
    if mask is not None:
        values = values.masked_fill(~mask, 0.0)
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if mask is not None:
        return values.sum() / mask.sum().clamp_min(1)
    return values.mean() if values.numel() else values.sum()


def finite_rows(logits: Tensor) -> Tensor:
    """True where a row (last axis) has a softmax: no NaN, no +inf, not all -inf. A class at -inf is merely excluded."""
    return torch.isfinite(logits.amax(-1))  # which hands NaN on


def check_teacher(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None, class_dim: int | None) -> int:
    """The class axis."""
    axis = _checks.logits(student_logits, _checks.class_dim(class_dim))
    _checks.like_logits("teacher_logits", teacher_logits, student_logits)
    _checks.mask(mask, student_logits, axis)
    return axis


def rows(logits: Tensor, axis: int, mask: Tensor | None) -> Tensor:
    """The logits, float32 at least, class axis last; uniform where masked, so that no NaN there reaches a gradient."""
    return _divergences.wide(visible(logits, axis, mask))[0]


def visible(logits: Tensor, axis: int, mask: Tensor | None) -> Tensor:
    """The same, in their own type."""
    x = logits.movedim(axis, -1)
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)
