r"""The mathematics of the terms as pure functions of tensors; the modules add settings and state.

Notation: $s$ and $t$ are the student's and the teacher's logits, $q_T = \mathrm{softmax}(s/T)$ and
$p_T = \mathrm{softmax}(t/T)$; sums run over classes, values are in nats. Everything is computed in float32 at least,
and float64 for float64 logits, whatever autocast says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, _soft_targets

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
    student, teacher = _visible(student_logits, axis, mask), _visible(teacher_logits.detach(), axis, mask)
    if divergence == "forward_kl" and _soft_targets.usable():
        value = _soft_targets.kl_divergence(student, teacher, temperature)
        return reduce_positions(value, mask, reduction)

    student = _soft_targets.wide(student)
    teacher = teacher.to(student.dtype)
    log_q = torch.log_softmax(student / temperature, -1)
    log_p = torch.log_softmax(teacher / temperature, -1)
    if divergence == "forward_kl":
        value = _soft_targets.kl_of_logs(log_p, log_q)
    elif divergence == "reverse_kl":
        value = _soft_targets.kl_of_logs(log_q, log_p)
    else:
        log_m = _log(beta * log_p.exp() + (1 - beta) * log_q.exp())
        value = beta * _soft_targets.kl_of_logs(log_p, log_m) + (1 - beta) * _soft_targets.kl_of_logs(log_q, log_m)
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
    student = _visible(student_logits, axis, mask)
    previous = previous.detach().movedim(axis, -1).to(_soft_targets.wide_type(student))
    a = alpha.to(previous.dtype) if isinstance(alpha, Tensor) else alpha
    if known is not None:
        a = a * known
    alpha_is_learned = isinstance(alpha, Tensor) and alpha.requires_grad
    if not alpha_is_learned:
        previous = _where_shared(previous, a)

    analytic = _soft_targets.usable(alpha, target)
    if target is not None and temperature == 1.0 and analytic:
        return reduce_positions(
            _soft_targets.cross_entropy(student, _blend(previous, target, a, axis, mask), 1.0), mask, reduction
        )
    if analytic:
        soft = _soft_targets.cross_entropy(student, previous, temperature)
    else:
        soft = temperature**2 * _soft_cross_entropy(
            previous, torch.log_softmax(_soft_targets.wide(student) / temperature, -1)
        )
    value = a * soft
    if target is not None:
        hard = _cross_entropy(target, torch.log_softmax(_soft_targets.wide(student), -1), axis, mask)
        value = value + (1 - a) * (hard if alpha_is_learned else _where_shared(hard.unsqueeze(-1), 1 - a).squeeze(-1))
    return reduce_positions(value, mask, reduction)


def _where_shared(x: Tensor, share: float | Tensor) -> Tensor:
    """The rows `x` that have a share in the loss, 0 for those that have none: 0 * inf would be NaN."""
    if isinstance(share, Tensor):
        return torch.where((share > 0).unsqueeze(-1), x, 0.0)
    return x if share > 0 else torch.zeros_like(x)


def _blend(previous: Tensor, target: Tensor, a: float | Tensor, axis: int, mask: Tensor | None) -> Tensor:
    r"""$(1-a)\,y + a\,\text{previous}$, without a one-hot of class indices."""
    share = (a if isinstance(a, Tensor) else previous.new_tensor(a)).expand(previous.shape[:-1]).unsqueeze(-1)
    if target.is_floating_point():
        return torch.lerp(target.movedim(axis, -1).to(previous.dtype), previous, share)
    if mask is not None:
        target = target.masked_fill(~mask, 0)  # an ignored label, -100 say, is no class
    return (previous * share).scatter_add_(-1, target.unsqueeze(-1), 1 - share)


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
    return _soft_targets.wide(_visible(logits, axis, mask))


def _visible(logits: Tensor, axis: int, mask: Tensor | None) -> Tensor:
    x = logits if axis == logits.ndim - 1 else logits.movedim(axis, -1)  # each node of the graph costs a microsecond
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)


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
