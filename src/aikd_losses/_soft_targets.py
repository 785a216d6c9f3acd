r"""A weighted sum of cross-entropies and KL divergences against fixed targets, in one pass with one analytic gradient.

With $q_T = \mathrm{softmax}(s/T)$ every part is $a\,T^2\,\mathrm{CE}(p, q_T)$, less the entropy of p for a KL divergence, and

$$\frac{\partial}{\partial s} \sum_i a_i\,T_i^2\,\mathrm{CE}(p_i, q_{T_i}) = \sum_i a_i\,T_i\,(q_{T_i} - p_i)$$

so that the parts of one temperature need one softmax, and all of them one saved tensor: the gradient, made in the forward
pass while everything is at hand. A CPU works on blocks of rows that stay in its cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 2**16  # elements that a CPU works on at a time: 0.25 MB in float32
FEW_CLASSES = 32  # below, a CPU is faster with the classes on the first axis
# Where the direct sum of a KL divergence, whose terms cancel, has lost more than a millionth: above this T, and below this
# many nats a row.
DIRECT, NEAR = 8.0, 0.03
SMALLEST = 1e-30  # p from which p * e**d can be trusted

Share = float | Tensor  # a number, a 0-d tensor, or one a row


class Part(NamedTuple):
    """`share` * T**2 * CE(target, softmax(student / T)), or KL for a target of logits."""

    target: Tensor  # class indices (rows,), probabilities or logits (rows, C)
    temperature: float
    share: Share = 1.0
    is_logits: bool = False


class Term(NamedTuple):
    """Parts that are reduced to one value, for logits with the class axis last."""

    student: Tensor
    parts: tuple[Part, ...]
    mask: Tensor | None
    reduction: str


def evaluate(terms: Sequence[Term], weights: Sequence[Share]) -> tuple[Tensor, list[Tensor]]:
    """The weighted sum, and each term's own value, detached. The terms have the same student and the same mask."""
    student, mask = terms[0].student, terms[0].mask
    tensors = [part.target for term in terms for part in term.parts]
    wanted = student.requires_grad and torch.is_grad_enabled()
    values: list[Tensor] = []
    total = _SoftTargets.apply(student, mask, terms, weights, wanted, values, *tensors)  # type: ignore[no-untyped-call]
    return total, values or [total.detach()]


def sums_and_slope(term: Term, wanted: bool) -> tuple[list[Share], Tensor | None]:
    """The sum of each part of a term that is a sum, and their gradient, for whoever takes care of autograd."""
    with torch.no_grad():
        parts, rows = _scaled_parts(term.student, (term.mask, [term], [1.0]), [part.target for part in term.parts])
        sums, slope = _all_rows(rows, parts, wanted)
        return [number(x.sum()) if isinstance(x, Tensor) else x for x in sums], slope


def usable(*constants: object) -> bool:
    """Whether the analytic gradient is all that is asked for: none for `constants`, no transform or compiler that has to
    see through it (which then gets the plain composition)."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not any(isinstance(x, Tensor) and x.requires_grad for x in constants)
    )


def number(x: Share) -> Share:
    """A 0-d tensor as a number, where looking is free."""
    if isinstance(x, Tensor):
        return float(x) if x.ndim == 0 and x.device.type == "cpu" else x
    return float(x)


class _SoftTargets(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        mask: Tensor | None,
        terms: Sequence[Term],
        weights: Sequence[Share],
        wanted: bool,
        values: list[Tensor],
        *tensors: Tensor,
    ) -> Tensor:
        """The total; `values` takes those of the terms."""
        ctx.settings = mask, terms, weights
        parts, rows = _scaled_parts(student, ctx.settings, tensors)
        sums, ctx.slope = _all_rows(rows, parts, wanted)
        found, start = [], 0
        for term in terms:
            found.append(_reduced(sum(sums[start : start + len(term.parts)]), term, student))
            start += len(term.parts)
        dtype = wide_type(student)
        total = sum(weight * value for weight, value in zip(weights, found, strict=True))
        if wanted:
            ctx.save_for_backward(student, *tensors)
        if len(terms) > 1 or not isinstance(weights[0], float) or weights[0] != 1.0:  # else the total is the value
            values.extend(as_tensor(x, dtype) for x in found)
        return as_tensor(total, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The first backward pass takes what the forward pass made; another one finds nothing and computes it anew.
        slope, ctx.slope = ctx.slope, None
        student, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated once more
            parts, rows = _scaled_parts(student, ctx.settings, tensors)
            result = _differentiable(rows, parts).view(student.shape) * (grad.unsqueeze(-1) if grad.ndim else grad)
        else:
            scale = grad.unsqueeze(-1) if grad.ndim else number(grad)
            if slope is None:
                parts, rows = _scaled_parts(student, ctx.settings, tensors)
                slope = _all_rows(rows, parts, True)[1]
            result = slope.view(student.shape)
            if not (isinstance(scale, float) and scale == 1.0):
                result.mul_(scale)
        return result.to(student.dtype), *[None] * (5 + len(tensors))


def as_tensor(x: Share, dtype: torch.dtype) -> Tensor:
    """A weight or alpha on a device is float64, and would make the value so."""
    return x.to(dtype) if isinstance(x, Tensor) else torch.tensor(x, dtype=dtype)


class _Scaled(NamedTuple):
    """A part of some rows with `slope`, the factor of q - p in the gradient: weight * share * T / number of rows."""

    target: Tensor
    temperature: float
    share: Share
    is_logits: bool
    slope: Share
    rowwise: bool  # a value a row is wanted, not their sum


def _scaled_parts(
    student: Tensor, settings: tuple[Tensor | None, Sequence[Term], Sequence[Share]], tensors: Sequence[Tensor]
) -> tuple[list[_Scaled], Tensor]:
    """The parts and the student with one axis of rows; what a mask hides is 0 and has no share."""
    mask, terms, weights = settings
    visible = None if mask is None else mask.reshape(-1, 1)
    found, targets = [], iter(tensors)

    def flat(x: Tensor) -> Tensor:
        x = x.reshape(-1, x.shape[-1])
        return x if visible is None else x.masked_fill(~visible, 0.0)

    for term, weight in zip(terms, weights, strict=True):
        count = _count(term, student)
        for part in term.parts:
            target, share = next(targets), part.share
            if isinstance(share, Tensor) and share.ndim:
                share = share.reshape(-1)
            if visible is not None:
                share = share * visible.squeeze(-1)
            target = flat(target) if target.is_floating_point() else target.reshape(-1, 1)
            if visible is not None and not target.is_floating_point():
                target = target.masked_fill(~visible, 0)  # an ignored label, -100 say, is no class
            slope = weight * share * (part.temperature / count)
            rowwise = term.reduction == "none" or (isinstance(share, Tensor) and share.ndim > 0)
            found.append(_Scaled(target, part.temperature, share, part.is_logits, slope, rowwise))
    return found, flat(student)


def _count(term: Term, student: Tensor) -> Share:
    """What a sum over rows is divided by."""
    if term.reduction != "mean":
        return 1.0
    if term.mask is None:
        return float(max(1, student.numel() // student.shape[-1]))
    return number(term.mask.sum().clamp_min(1).to(wide_type(student)))


def _reduced(value: Share, term: Term, student: Tensor) -> Share:
    if term.reduction == "none":
        shape = student.shape[:-1]
        return value.view(shape) if isinstance(value, Tensor) else student.new_zeros(shape, dtype=wide_type(student))
    return number(value.sum() if isinstance(value, Tensor) else value) / _count(term, student)


def _all_rows(student: Tensor, parts: Sequence[_Scaled], wanted: bool) -> tuple[list[Share], Tensor | None]:
    """Of each part share * T**2 * its value, a sum or one a row, and the gradient, if `wanted`."""
    num_rows, num_classes = student.shape
    step = max(1, BLOCK // num_classes) if student.device.type == "cpu" else max(1, num_rows)
    if num_rows <= step:
        return _block(student, parts, wanted)
    slope = torch.empty(student.shape, dtype=wide_type(student), device=student.device) if wanted else None
    sums: list[list[Share]] = []
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        values, result = _block(student[rows], [_rows_of(x, rows) for x in parts], wanted)
        sums.append(values)
        if slope is not None:
            slope[rows] = result  # type: ignore[assignment]  # wanted
    return [torch.cat(x) if isinstance(x[0], Tensor) and x[0].ndim else sum(x) for x in zip(*sums, strict=True)], slope


def _rows_of(x: _Scaled, rows: slice) -> _Scaled:
    share, slope = (y[rows] if isinstance(y, Tensor) and y.ndim else y for y in (x.share, x.slope))
    return x._replace(target=x.target[rows], share=share, slope=slope)


def _block(student: Tensor, parts: Sequence[_Scaled], wanted: bool) -> tuple[list[Share], Tensor | None]:
    on_cpu, student = student.device.type == "cpu", wide(student)
    values, slope = _work(student, parts, wanted, careful=not on_cpu)
    if on_cpu and not all(math.isfinite(float(x.sum()) if isinstance(x, Tensor) else x) for x in values):
        return _work(student, parts, wanted, careful=True)
    return values, slope


def _work(student: Tensor, parts: Sequence[_Scaled], wanted: bool, careful: bool) -> tuple[list[Share], Tensor | None]:
    """Without care, a class that is excluded (p or q is 0) gives NaN."""
    dim = 0 if student.device.type == "cpu" and student.shape[1] < FEW_CLASSES else 1
    values: list[Share] = [0.0] * len(parts)
    slope = None
    for temperature in dict.fromkeys(x.temperature for x in parts):
        log_q = torch.log_softmax(_tempered(student, temperature, dim), dim)
        against = None  # minus the targets, each times its factor
        for i, x in enumerate(parts):
            if x.temperature != temperature or (isinstance(x.share, float) and x.share == 0.0):
                continue
            if not x.target.is_floating_point():
                values[i] = _shared(log_q.gather(dim, x.target if dim else x.target.t()), x, dim, -1.0)
                continue
            p, terms, difference = (_kl if x.is_logits else _cross_entropy)(student, x, log_q, dim, careful)
            values[i] = _shared(terms, x, dim, 1.0 if x.is_logits else -1.0)
            if not wanted:
                continue
            if difference is not None:
                difference.mul_(_along(x.slope, dim) if isinstance(x.slope, Tensor) else x.slope)
                slope = difference if slope is None else slope.add_(difference)
            else:
                against = _add(against, p, x.slope, dim, owned=x.is_logits)
        if not wanted:
            continue
        for x in parts:
            if x.temperature == temperature and not x.target.is_floating_point():
                at = x.target if dim else x.target.t()
                against = torch.zeros_like(log_q) if against is None else against
                against.scatter_add_(dim, at, _column(x.slope, at, against, dim))
        if against is not None:  # against - q * (sum of against over the classes)
            result = torch.ops.aten._log_softmax_backward_data(against, log_q, dim, log_q.dtype)
            slope = result if slope is None else slope.add_(result)
    if wanted and slope is None:  # no part has a share
        return values, torch.zeros_like(student)
    return values, None if slope is None else slope if dim else slope.t().contiguous()


def _cross_entropy(student: Tensor, x: _Scaled, log_q: Tensor, dim: int, careful: bool) -> tuple[Tensor, Tensor, None]:
    """p, and terms that sum to minus the cross-entropy."""
    p = x.target.to(log_q.dtype)
    p = p if dim else p.t()
    return p, p * (log_q.masked_fill(p == 0, 0.0) if careful else log_q), None  # 0 log 0 = 0


def _kl(
    student: Tensor, x: _Scaled, log_q: Tensor, dim: int, careful: bool
) -> tuple[Tensor, Tensor | float, Tensor | None]:
    """p, terms that sum to KL (or their sum) and, where the difference of the two softmax would be imprecise, q - p."""
    teacher = _tempered(x.target.to(log_q.dtype), x.temperature, dim)
    p = torch.softmax(teacher, dim)
    if careful:
        return p, kl_terms(torch.log_softmax(teacher, dim), log_q), None
    if x.temperature <= DIRECT:
        terms = torch.log_softmax(teacher, dim).sub_(log_q).mul_(p)
        value = float(terms.sum())
        if not value < NEAR * len(student):
            return p, terms if x.rowwise else value, None
    if p.numel() and float(p.min()) < SMALLEST:
        return p, kl_terms(torch.log_softmax(teacher, dim), log_q), None
    return p, *_near(_tempered(student - x.target, x.temperature, dim), p, dim)


def _near(d: Tensor, p: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    r"""KL a row, and q - p, of the difference $d$ of two logits and p. With d less its mean under p, and

    $$r = \sum p\,(e^d - 1 - d), \qquad \mathrm{KL} = \log(1 + r), \qquad q - p = p\,\frac{e^d - 1 - r}{1 + r}$$

    no normaliser is subtracted from another, and no term of r is negative."""
    d = d.sub_((p * d).sum(dim, keepdim=True))
    difference = torch.expm1(d)
    r = torch.sub(difference, d, out=d).mul_(p).sum(dim, keepdim=True)
    return torch.log1p(r), difference.sub_(r).mul_(p).div_(1 + r)


def kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""$p\,(e^d - 1 - d)$ with $d = \log q - \log p$, whose sum is KL as p and q sum to 1: no term is negative, so nothing
    cancels where T is large, and the rounding of either normaliser drops out. A class with p = 0 counts 0 (what q has there is
    the rest of that sum), one with p > 0 = q counts inf, also where p is so small that float32 rounds it to 0."""
    d, q = log_q - log_p, log_q.exp()
    p = log_p.exp().clamp_min(torch.finfo(log_p.dtype).tiny)  # 0 * inf would be NaN
    terms = torch.where(d < 1, p * (torch.expm1(d) - d), q - p - p * d)
    return torch.where(log_p == -math.inf, q, terms)


def _shared(terms: Tensor | float, x: _Scaled, dim: int, sign: float) -> Share:
    """share * T**2 * the sum of the terms, over everything or a row."""
    share, square = x.share, sign * x.temperature**2
    if isinstance(terms, float) or not x.rowwise:
        return square * share * (terms if isinstance(terms, float) else number(terms.sum()))
    rows = terms.sum(dim)
    if isinstance(share, Tensor) and share.ndim:
        rows = torch.where(share > 0, share * rows, 0.0)  # 0 * inf would be NaN
        return rows.mul_(square)
    return rows.mul_(square * share)


def _add(against: Tensor | None, p: Tensor, slope: Share, dim: int, owned: bool) -> Tensor:
    """against - slope * p."""
    if isinstance(slope, float):
        if against is None:
            return p.mul_(-slope) if owned else p * -slope
        return against.add_(p, alpha=-slope)
    factor = -_along(slope, dim)
    return p * factor if against is None else against.addcmul_(p, factor.to(p.dtype))


def _column(slope: Share, at: Tensor, like: Tensor, dim: int) -> Tensor:
    """- slope, one for each label."""
    if isinstance(slope, float):
        return torch.full(at.shape, -slope, dtype=like.dtype, device=like.device)
    return _along(slope, dim).neg().to(like.dtype).expand(at.shape)


def _along(share: Tensor, dim: int) -> Tensor:
    return share.unsqueeze(dim) if share.ndim else share


def _differentiable(student: Tensor, parts: Sequence[_Scaled]) -> Tensor:
    """The gradient, to be differentiated once more."""
    student = wide(student)
    result = torch.zeros_like(student)
    for x in parts:
        q, target = torch.softmax(student / x.temperature, -1), x.target
        if not target.is_floating_point():
            p = torch.zeros_like(student).scatter(1, target, 1.0)
        elif x.is_logits:
            p = torch.softmax(target.to(q.dtype) / x.temperature, -1)
        else:
            p = target.to(q.dtype)
        factor = _along(x.slope, 1) if isinstance(x.slope, Tensor) else x.slope
        result = result + factor * (q * p.sum(-1, keepdim=True) - p)
    return result


def _tempered(logits: Tensor, temperature: float, dim: int) -> Tensor:
    """logits / T, with the classes on the axis `dim`."""
    if dim:
        return logits if temperature == 1.0 else logits * (1.0 / temperature)
    turned = torch.empty(logits.shape[::-1], dtype=logits.dtype)
    return torch.mul(logits.t(), 1.0 / temperature, out=turned)


def wide_type(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32


def wide(x: Tensor) -> Tensor:
    """float32 at least."""
    return x.to(wide_type(x))
