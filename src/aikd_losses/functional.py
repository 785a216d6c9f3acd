r"""The mathematics of the terms as pure functions of tensors; the modules add settings and state.

Notation: $s$ and $t$ are the student's and the teacher's logits, $q_T = \mathrm{softmax}(s/T)$ and
$p_T = \mathrm{softmax}(t/T)$; sums run over classes, values are in nats. Everything is computed in float32 at least,
and float64 for float64 logits, whatever autocast says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, _soft_targets
from ._linear import LinearKD

DIVERGENCES = ("forward_kl", "reverse_kl", "js")

__all__ = [
    "DIVERGENCES",
    "deterministic_kd",
    "finite_rows",
    "linear_deterministic_kd",
    "progressive_kd",
    "reduce_positions",
]


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
    beta = check_divergence(divergence, beta)
    class_dim = _checks.class_dim(class_dim)
    temperature = _checks.temperature(temperature)
    _checks.reduction(reduction)
    return deterministic(student_logits, teacher_logits, mask, temperature, divergence, beta, reduction, class_dim)


def deterministic(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None,
    temperature: float,
    divergence: str,
    beta: float,
    reduction: str,
    class_dim: int | None,
) -> Tensor:
    """`deterministic_kd` with settings that were checked already."""
    if divergence == "forward_kl" and _soft_targets.usable():
        term = deterministic_term(student_logits, teacher_logits, mask, temperature, reduction, class_dim)
        return _soft_targets.evaluate([term], [1.0])[0]
    axis = check_teacher(student_logits, teacher_logits, mask, class_dim)
    student = rows(student_logits, axis, mask)
    teacher = _visible(teacher_logits.detach(), axis, mask).to(student.dtype)
    log_q = torch.log_softmax(student / temperature, -1)
    log_p = torch.log_softmax(teacher / temperature, -1)
    if divergence == "forward_kl":
        value = _kl_of_logs(log_p, log_q)
    elif divergence == "reverse_kl":
        value = _kl_of_logs(log_q, log_p)
    else:
        log_m = _log(beta * log_p.exp() + (1 - beta) * log_q.exp())
        value = beta * _kl_of_logs(log_p, log_m) + (1 - beta) * _kl_of_logs(log_q, log_m)
    return reduce_positions(temperature**2 * value, mask, reduction)


def deterministic_term(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None,
    temperature: float,
    reduction: str,
    class_dim: int | None,
) -> _soft_targets.Term:
    """Forward KL as soft targets that can be merged with others, where those are usable."""
    axis, student, teacher = (
        check_teacher(student_logits, teacher_logits, mask, class_dim),
        student_logits,
        teacher_logits,
    )
    if axis != student.ndim - 1:
        student, teacher = _classes_last(student, axis), _classes_last(teacher, axis)
    if teacher.dtype != student.dtype:
        student, teacher = _not_narrower(student, teacher), _not_narrower(teacher, student)
    if teacher.requires_grad:
        teacher = teacher.detach()
    return _soft_targets.Term(student, (_soft_targets.Part(teacher, temperature, is_logits=True),), mask, reduction)


def check_teacher(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None, class_dim: int | None) -> int:
    """The class axis."""
    if class_dim is None and mask is None and _checks.plain(student_logits, teacher_logits):
        return 1
    axis = _checks.logits(student_logits, class_dim)
    _checks.like_logits("teacher_logits", teacher_logits, student_logits)
    _checks.mask(mask, student_logits, axis)
    return axis


def linear_deterministic_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 2.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""`deterministic_kd` of two linear heads, from hidden states: the logits, mostly a language model's largest tensors, never
    exist whole.

    $$T^2\,\mathrm{KL}(p_T \,\|\, q_T), \qquad s = h_s W_s^\top + b_s, \quad t = h_t W_t^\top + b_t$$

    Args:
        student_hidden, teacher_hidden: `(*, D_s)` and `(*, D_t)`, of the same positions.
        student_weight, teacher_weight: `(C, D_s)` and `(C, D_t)`, as in `nn.Linear`; the biases are `(C,)`.
        temperature: T > 0 (default 2).
        mask: bool `(*,)`, True = counts.
        reduction: `"mean"` (default) or `"sum"` over the positions that count.

    Returns a scalar in nats. The gradients of the student's three tensors are made with the value, in blocks of positions;
    a second derivative is a RuntimeError. Under `torch.compile` and `torch.func` the plain composition is used.

    >>> h, w, other = torch.randn(6, 4), torch.randn(10, 4), torch.randn(10, 4)
    >>> value = linear_deterministic_kd(h, w, h, other)
    >>> torch.testing.assert_close(value, deterministic_kd(h @ w.T, h @ other.T))

    Reference: making the gradient of a head's loss chunk by chunk in the forward pass: Hsu et al., *Liger Kernel: Efficient
    Triton Kernels for LLM Training*, 2024, https://arxiv.org/abs/2410.10989.
    """
    temperature = _checks.temperature(temperature)
    _checks.choice("reduction", reduction, ("mean", "sum"))
    _checks.head("student", student_hidden, student_weight, student_bias)
    _checks.head("teacher", teacher_hidden, teacher_weight, teacher_bias)
    for name, mine, other in (
        ("teacher_hidden", teacher_hidden.shape[:-1], student_hidden.shape[:-1]),
        ("teacher_weight", teacher_weight.shape[:1], student_weight.shape[:1]),
    ):
        if mine != other:
            raise ValueError(
                f"`{name}` must have the {'positions' if 'hidden' in name else 'classes'} of the student, {tuple(other)}; got "
                f"{tuple(mine)}."
            )
    _checks.same_device("teacher_hidden", teacher_hidden, "student_hidden", student_hidden)
    _checks.mask(mask, student_hidden, student_hidden.ndim - 1)
    student = student_hidden, student_weight, student_bias
    teacher = teacher_hidden.detach(), teacher_weight.detach(), None if teacher_bias is None else teacher_bias.detach()
    if not _soft_targets.usable():
        logits = (torch.nn.functional.linear(*head) for head in (student, teacher))
        return deterministic_kd(*logits, temperature=temperature, mask=mask, reduction=reduction, class_dim=-1)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in student)
    flat = None if mask is None else mask.flatten()
    rows = student_hidden.reshape(-1, student_hidden.shape[-1])
    of_teacher = teacher[0].reshape(-1, teacher_hidden.shape[-1]), *teacher[1:]
    value: Tensor = LinearKD.apply(  # type: ignore[no-untyped-call]
        rows, student_weight, student_bias, of_teacher, flat, temperature, reduction, wanted
    )
    return value


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
    _checks.reduction(reduction)
    axis = _checks.logits(student_logits, _checks.class_dim(class_dim))
    _checks.like_logits("previous", previous, student_logits)
    _checks.alpha(alpha, student_logits, axis)
    _checks.mask(known, student_logits, axis, "known")
    _checks.mask(mask, student_logits, axis)
    if target is not None:
        _checks.class_target(target, student_logits, axis)
    return progressive(student_logits, previous, target, alpha, known, temperature, mask, reduction, axis)


def progressive(
    student_logits: Tensor,
    previous: Tensor,
    target: Tensor | None,
    alpha: float | Tensor,
    known: Tensor | None,
    temperature: float,
    mask: Tensor | None,
    reduction: str,
    axis: int,
) -> Tensor:
    """`progressive_kd` of what was checked already."""
    if _soft_targets.usable(alpha, target):
        term = progressive_term(student_logits, previous, target, alpha, known, temperature, mask, reduction, axis)
        return _soft_targets.evaluate([term], [1.0])[0]
    if target is not None and not target.is_floating_point():
        _checks.labels_in_range(target, student_logits.shape[axis], mask)
    student = rows(student_logits, axis, mask)
    previous = previous.detach().movedim(axis, -1).to(student.dtype)
    a = alpha.to(previous.dtype) if isinstance(alpha, Tensor) else alpha
    if known is not None:
        a = a * known
    learned = isinstance(alpha, Tensor) and alpha.requires_grad
    if not learned:
        previous = _where_shared(previous, a)
    value = a * temperature**2 * _soft_cross_entropy(previous, torch.log_softmax(student / temperature, -1))
    if target is not None:
        hard = _cross_entropy(target, torch.log_softmax(student, -1), axis, mask)
        value = value + (1 - a) * (hard if learned else _where_shared(hard.unsqueeze(-1), 1 - a).squeeze(-1))
    return reduce_positions(value, mask, reduction)


def progressive_term(
    student_logits: Tensor,
    previous: Tensor,
    target: Tensor | None,
    alpha: float | Tensor,
    known: Tensor | None,
    temperature: float,
    mask: Tensor | None,
    reduction: str,
    axis: int,
) -> _soft_targets.Term:
    """The progressive loss as soft targets that can be merged with others, where those are usable."""
    a = alpha if type(alpha) is float else _soft_targets.number(alpha)
    if isinstance(a, Tensor) and a.ndim:
        a = a.to(_soft_targets.wide_type(student_logits))
    if known is not None and not (_checks.values_are_free(known) and bool(known.all())):
        wide = _soft_targets.wide_type(student_logits)
        a = (a.to(wide) if isinstance(a, Tensor) else a) * known.to(wide)
    if target is not None and not target.is_floating_point() and isinstance(a, float) and a == 1.0:
        _checks.labels_in_range(target, student_logits.shape[axis], mask)  # which have no share and are not looked at
    if previous.requires_grad:
        previous = previous.detach()
    if axis != student_logits.ndim - 1:
        student_logits, previous = _classes_last(student_logits, axis), _classes_last(previous, axis)
        if target is not None and target.is_floating_point():
            target = _classes_last(target, axis)
    parts = [_soft_targets.Part(previous, temperature, a)]
    if target is not None:
        parts.append(_soft_targets.Part(target, 1.0, 1.0 - a))
    return _soft_targets.Term(student_logits, tuple(parts), mask, reduction)


def _where_shared(x: Tensor, share: float | Tensor) -> Tensor:
    """The rows `x` that have a share in the loss, 0 for those that have none: 0 * inf would be NaN."""
    if isinstance(share, Tensor):
        return torch.where((share > 0).unsqueeze(-1), x, 0.0)
    return x if share > 0 else torch.zeros_like(x)


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


def check_divergence(divergence: str, beta: float) -> float:
    _checks.choice("divergence", divergence, DIVERGENCES)
    beta = _checks.number("beta", beta, 0.0, 1.0)
    if divergence == "js" and beta in (0.0, 1.0):
        raise ValueError(
            f"`beta` must be inside (0, 1) for 'js', which is 0 for every pair at the ends; got {beta:g}. For the "
            "limits use divergence='forward_kl' (beta towards 0) or 'reverse_kl' (beta towards 1)."
        )
    return beta


def rows(logits: Tensor, axis: int, mask: Tensor | None) -> Tensor:
    """The logits, float32 at least, class axis last; uniform where masked, so that no NaN there reaches a gradient."""
    if mask is None and axis == logits.ndim - 1 and logits.dtype == torch.float32:
        return logits
    return _soft_targets.wide(_visible(logits, axis, mask))


def _visible(logits: Tensor, axis: int, mask: Tensor | None) -> Tensor:
    x = _classes_last(logits, axis)
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)


def _classes_last(x: Tensor, axis: int) -> Tensor:
    return x if axis == x.ndim - 1 else x.movedim(axis, -1)  # each node of the graph costs a microsecond


def _not_narrower(x: Tensor, other: Tensor) -> Tensor:
    """float64 where one of the two is."""
    return x.double() if other.dtype == torch.float64 and x.dtype != torch.float64 else x


def _kl_of_logs(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""$\sum p\,(\log p - \log q)$, for autograd. A class with p = 0 counts 0, one with p > 0 = q counts inf, also where p
    is so small that float32 rounds it to 0 (hence the smallest normal number: 0 * inf would be NaN)."""
    log_ratio = (log_p - log_q).masked_fill(log_p == -torch.inf, 0.0)
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
