r"""The mathematics of the terms as pure functions of tensors; the modules add settings and state.

Notation: $s$ and $t$ are the student's and the teacher's logits, $q_T = \mathrm{softmax}(s/T)$ and
$p_T = \mathrm{softmax}(t/T)$; sums run over classes, values are in nats. Everything is computed in float32 at least,
and float64 for float64 logits, whatever autocast says.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _checks

DIVERGENCES = ("forward_kl", "reverse_kl", "js")

__all__ = ["DIVERGENCES", "deterministic_kd", "finite_rows", "progressive_kd", "reduce_positions"]


def deterministic_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
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
    check_divergence(divergence, beta)
    temperature = _checks.temperature(temperature)
    axis = _checks.logits(student_logits, class_dim)
    _checks.like_logits("teacher_logits", teacher_logits, student_logits)
    _checks.mask(mask, student_logits, axis)
    student = rows(student_logits, axis, mask)
    teacher = rows(teacher_logits.detach(), axis, mask).to(student.dtype)

    log_q = torch.log_softmax(student / temperature, -1)
    log_p = torch.log_softmax(teacher / temperature, -1)
    if divergence == "forward_kl":
        value = _kl(log_p, log_q)
    elif divergence == "reverse_kl":
        value = _kl(log_q, log_p)
    else:
        log_m = _log(beta * log_p.exp() + (1 - beta) * log_q.exp())
        value = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    return reduce_positions(temperature**2 * value, mask, reduction)


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
    axis = _checks.logits(student_logits, class_dim)
    _checks.like_logits("previous", previous, student_logits)
    _checks.alpha(alpha, student_logits, axis)
    _checks.mask(known, student_logits, axis, "known")
    _checks.mask(mask, student_logits, axis)
    if target is not None:
        _checks.class_target(target, student_logits, axis, mask)
    student = rows(student_logits, axis, mask)
    previous = previous.detach().movedim(axis, -1).to(student.dtype)
    a = alpha.to(student.dtype) if isinstance(alpha, Tensor) else alpha
    if known is not None:
        a = a * known.to(student.dtype)
        previous = previous.masked_fill(~known.unsqueeze(-1), 0.0)

    log_q = torch.log_softmax(student, -1)
    log_q_soft = log_q if temperature == 1.0 else torch.log_softmax(student / temperature, -1)
    value = a * temperature**2 * _soft_cross_entropy(previous, log_q_soft)
    if target is not None:
        value = value + (1 - a) * _cross_entropy(target, log_q, axis, mask)
    return reduce_positions(value, mask, reduction)


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
    return values.sum() / max(values.numel(), 1)


def finite_rows(logits: Tensor) -> Tensor:
    """True where a row (last axis) has a softmax: no NaN, no +inf, not all -inf. A class at -inf is merely excluded."""
    return torch.isfinite(torch.logsumexp(logits, -1))


def check_divergence(divergence: str, beta: float) -> None:
    _checks.choice("divergence", divergence, DIVERGENCES)
    beta = _checks.number("beta", beta, 0.0, 1.0)
    if divergence == "js" and beta in (0.0, 1.0):
        raise ValueError(
            f"`beta` must be inside (0, 1) for 'js', which is 0 for every pair at the ends; got {beta:g}. For the "
            "limits use divergence='forward_kl' (beta towards 0) or 'reverse_kl' (beta towards 1)."
        )


def rows(logits: Tensor, axis: int, mask: Tensor | None) -> Tensor:
    """The logits, float32 at least, class axis last; uniform where masked, so that no NaN there reaches a gradient."""
    x = logits.movedim(axis, -1)
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""$\sum p\,(\log p - \log q)$. A class with p = 0 counts 0, one with p > 0 = q counts inf, also where p is so small
    that float32 rounds it to 0 (hence the smallest normal number: 0 * inf would be NaN)."""
    log_ratio = (log_p - log_q).masked_fill(log_p == -math.inf, 0.0)
    p = log_p.exp().clamp_min(torch.finfo(log_p.dtype).tiny)
    return (p * log_ratio).sum(-1)


def _log(p: Tensor) -> Tensor:
    return p.clamp_min(torch.finfo(p.dtype).tiny).log()


def _soft_cross_entropy(p: Tensor, log_q: Tensor) -> Tensor:
    r"""$-\sum p \log q$, with 0 log 0 = 0."""
    return -(p * log_q.masked_fill(p == 0, 0.0)).sum(-1)


def _cross_entropy(target: Tensor, log_q: Tensor, axis: int, mask: Tensor | None) -> Tensor:
    if target.is_floating_point():
        return _soft_cross_entropy(target.movedim(axis, -1).to(log_q.dtype), log_q)
    if mask is not None:
        target = target.masked_fill(~mask, 0)  # an ignored label, -100 say, is no class
    return -log_q.gather(-1, target.unsqueeze(-1)).squeeze(-1)
