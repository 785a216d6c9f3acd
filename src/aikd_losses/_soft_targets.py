r"""Cross-entropy and KL divergence against soft targets with an analytic gradient, for rows `(..., C)`.

Autograd would keep four to eight tensors of the logits' size; the gradient needs one. With $q = \mathrm{softmax}(s/T)$:

$$\frac{\partial}{\partial s}\,T^2\,\mathrm{KL}(p\,\|\,q) = \frac{\partial}{\partial s}\,T^2\,\mathrm{CE}(p, q) = T\,(q - p)$$

Small rows keep $q - p$ for the backward pass; large ones keep nothing and are computed anew, on a CPU in blocks of rows that
stay in its cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Elements. Below, keeping the gradient is cheaper than computing it twice; above, memory is what counts.
LARGE = 2**20
SMALLEST = -80.0  # log p above which p and p * (e**d - 1) are normal numbers in float32, d being at most 80
BLOCK = 2**16  # what a CPU works on at a time: 0.25 MB in float32

Block = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]  # student, teacher, T -> value a row, q - p


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    r"""$T^2\,\mathrm{KL}(\mathrm{softmax}(t/T)\,\|\,\mathrm{softmax}(s/T))$ a row, of two tensors of logits."""
    if wide_type(student) != wide_type(teacher):
        teacher = teacher.to(wide_type(student))
    value: Tensor = _SoftTargets.apply(student, teacher, temperature, _kl_block)  # type: ignore[no-untyped-call]
    return value


def cross_entropy(student: Tensor, probs: Tensor, temperature: float) -> Tensor:
    r"""$-T^2 \sum p \log \mathrm{softmax}(s/T)$ a row, of logits and probabilities."""
    value: Tensor = _SoftTargets.apply(student, probs, temperature, _cross_entropy_block)  # type: ignore[no-untyped-call]
    return value


def usable(*constants: object) -> bool:
    """Whether the analytic gradient is all that is asked for: none for `constants`, no transform or compiler that has to
    see through it (which then gets the plain composition)."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not any(isinstance(x, Tensor) and x.requires_grad for x in constants)
    )


class _SoftTargets(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float, block: Block) -> Tensor:
        ctx.temperature, ctx.block = temperature, block
        if student.numel() > LARGE:
            ctx.save_for_backward(student, teacher)
            parts = [block(s, t, temperature)[0] for s, t in _blocks(student, teacher)]
            value = torch.cat(parts).view(student.shape[:-1])
        else:
            value, slope = block(student, teacher, temperature)
            ctx.save_for_backward(student, teacher, slope)
        return value if temperature == 1.0 else value.mul_(temperature**2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        student, teacher, *slope = ctx.saved_tensors
        scale = (grad * ctx.temperature).unsqueeze(-1)
        if torch.is_grad_enabled():  # to be differentiated once more
            result = _difference(student, teacher, ctx.temperature, ctx.block) * scale
        elif slope:
            result = slope[0] * scale
        else:
            result = torch.empty_like(student, memory_format=torch.contiguous_format)
            for out, s, t, c in _blocks(result, student, teacher, scale):
                out.copy_(_difference(s, t, ctx.temperature, ctx.block).mul_(c))
        return result.to(student.dtype), None, None, None


def _difference(student: Tensor, teacher: Tensor, temperature: float, block: Block) -> Tensor:
    """$q - p$, differentiable."""
    q = torch.softmax(_scaled(student, temperature), -1)
    if block is _kl_block:
        return q - torch.softmax(_scaled(teacher, temperature), -1)
    p = wide(teacher)
    return q * p.sum(-1, keepdim=True) - p


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of every tensor: some of them on a CPU, elsewhere all at once."""
    first = tensors[0]
    step = max(1, BLOCK // first.shape[-1]) if first.device.type == "cpu" else max(1, first.numel() // first.shape[-1])
    flat = [x.reshape(-1, x.shape[-1]) for x in tensors]
    return zip(*(x.split(step) for x in flat), strict=True)


def _kl_block(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    r"""With $d = \log q - \log p$ the value is $\sum p\,(e^d - 1 - d)$, which is the sum of $-p\,d$ as p and q sum to 1: no
    term is negative, so nothing cancels where T is large, and the rounding of either normaliser drops out."""
    d = torch.log_softmax(_scaled(student, temperature), -1)
    log_p = torch.log_softmax(_scaled(teacher, temperature), -1)
    if student.device.type != "cpu" or (log_p.numel() and not log_p.min().item() >= SMALLEST):  # free on a CPU
        return _careful(d, log_p)
    d.sub_(log_p)
    slope = torch.expm1(d)
    terms = torch.sub(slope, d, out=d)
    p = log_p.exp_()
    slope.mul_(p)
    return terms.mul_(p).sum(-1), slope


def _careful(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    r"""The same for logits that may be -inf or 1e4, as $\sum p\,(\log p - \log q) + \sum (q - p)$: the second sum is 0 but for
    the rounding of the normalisers, which it takes off the first."""
    slope = log_q.exp().sub_(log_p.exp())
    return kl_of_logs(log_p, log_q) + slope.sum(-1), slope


def kl_of_logs(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""$\sum p\,(\log p - \log q)$. A class with p = 0 counts 0, one with p > 0 = q counts inf, also where p is so small
    that float32 rounds it to 0 (hence the smallest normal number: 0 * inf would be NaN)."""
    log_ratio = (log_p - log_q).masked_fill(log_p == -math.inf, 0.0)
    p = log_p.exp().clamp_min(torch.finfo(log_p.dtype).tiny)
    return (p * log_ratio).sum(-1)


def _cross_entropy_block(student: Tensor, probs: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_q = torch.log_softmax(_scaled(student, temperature), -1)
    p = wide(probs)
    terms = p * log_q
    value = terms.sum(-1).neg_()
    if student.device.type != "cpu" or not math.isfinite(value.sum().item()):  # looking is free on a CPU
        value = terms.masked_fill_(p == 0, 0.0).sum(-1).neg_()  # 0 log 0 = 0
    return value, log_q.exp_().mul_(p.sum(-1, keepdim=True)).sub_(p)


def wide_type(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32


def wide(x: Tensor) -> Tensor:
    """float32 at least."""
    return x.to(wide_type(x))


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return wide(logits) if temperature == 1.0 else wide(logits) / temperature
