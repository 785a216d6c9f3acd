r"""A loss whose gradient is made together with its value.

The gradient of $T^2\,\mathrm{KL}(p \,\|\, q)$ with respect to the student's logits is $T\,(q - p)$: at hand in the forward
pass, where autograd would keep several tensors of the size of the logits to work it out later. So that one tensor is kept, and
whatever is needed to make it exists for a block of rows at a time.

Where a gradient is transformed, batched or differentiated again, and under `torch.compile`, the plain form is asked instead.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from ._divergences import kl, log_softmaxes, mixture, wide

BLOCK = 2**17  # elements that a CPU works on at a time: 0.5 MB in float32, which its cache holds
DEVICE_BLOCK = 2**22  # elements that other devices do: little beside logits that are large
NEAR = 0.01  # nats, below which a sum in float32 may have lost more than a hundred-thousandth

Slopes = tuple[Tensor, ...] | None  # gradients, if they are wanted
Plain = Callable[..., Tensor]  # tensors -> a value, or one a row
WithGradient = Callable[..., tuple[Tensor, Slopes]]  # (wanted, *tensors) -> the same, and its gradients
How = tuple[Plain, WithGradient, int, bool]  # and how many tensors are learned, and whether gradients are wanted


def with_its_gradient(plain: Plain, with_gradient: WithGradient, learned: int, *tensors: Tensor) -> Tensor:
    """`plain(*tensors)`: a value, or one a row. No gradient reaches but the first `learned` tensors."""
    if torch.compiler.is_compiling() or any(_is_dual(x) for x in tensors):
        return plain(*tensors)
    # Autograd cannot save what was made in inference mode.
    tensors = tuple(x.clone() if x.is_inference() else x for x in tensors)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors[:learned])
    value: Tensor = _WithGradient.apply((plain, with_gradient, learned, wanted), *tensors)[0]  # type: ignore[no-untyped-call]
    return value


def _is_dual(x: Tensor) -> bool:
    """Whether forward mode differentiates with respect to it. (Under `vmap` nobody can tell; its rule asks the plain form.)"""
    try:
        return unpack_dual(x).tangent is not None
    except RuntimeError:
        return False


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(how: How, *tensors: Tensor) -> tuple[Tensor, Slopes]:
        _, with_gradient, _, wanted = how
        return with_gradient(wanted, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Slopes]) -> None:
        (ctx.plain, ctx.with_gradient, ctx.learned, _), *tensors = inputs
        ctx.shape, ctx.slopes = output[0].shape, output[1]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # refuses those that were changed in place, too
        slopes, ctx.slopes = ctx.slopes, None
        if torch.is_grad_enabled():  # to be differentiated once more
            slopes = _plain_slopes(ctx, grad)
        else:
            if slopes is None:  # the first backward pass took them
                _, slopes = ctx.with_gradient(True, *tensors)
            slopes = tuple([_times(slope, grad) for slope in slopes])
        return None, *slopes, *[None] * (len(tensors) - ctx.learned)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        slopes = _plain_slopes(ctx, ctx.saved_tensors[0].new_ones(ctx.shape))
        moved = [slope * t for slope, t in zip(slopes, tangents[1:], strict=False) if t is not None]
        return sum(x.flatten(len(ctx.shape)).sum(-1) for x in moved), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], how: How, *tensors: Tensor
    ) -> tuple[tuple[Tensor, None], tuple[int, None]]:
        return (torch.vmap(how[0], in_dims[1:])(*tensors), None), (0, None)


# torch asks for it in each call, and would work it out anew.
_WithGradient.forward.__signature__ = inspect.signature(_WithGradient.forward)  # type: ignore[attr-defined]


def _plain_slopes(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the first tensors by the plain form, themselves with a graph."""
    first, others = ctx.saved_tensors[: ctx.learned], ctx.saved_tensors[ctx.learned :]
    value, slopes, *_ = torch.func.vjp(lambda *x: ctx.plain(*x, *others), *first)
    found: tuple[Tensor, ...] = slopes(grad.to(value.dtype))
    return found


def _times(slope: Tensor, grad: Tensor) -> Tensor:
    """slope * grad in the memory of the slope, or in that of its own where there is a batch of grads, which refuses that."""
    grad = grad.unsqueeze(-1) if grad.ndim else grad
    try:
        return slope if grad.is_cpu and grad.ndim == 0 and float(grad) == 1.0 else slope.mul_(grad)
    except RuntimeError:
        return slope * grad


def in_blocks(
    wanted: bool, student: Tensor, teacher: Tensor, *, name: str, temperature: float, beta: float, reduction: str
) -> tuple[Tensor, Slopes]:
    r"""$T^2 D(p, q)$ of the rows (N, C), reduced, and its gradient."""
    rows, classes = student.shape
    step = max(1, (BLOCK if student.is_cpu else DEVICE_BLOCK) // classes)
    scale = 1 / max(1, rows) if reduction == "mean" else 1.0
    block = partial(rows_with_gradient, name, beta, temperature, reduction == "none", scale)
    if rows <= step:
        s, t = wide(student, teacher)
        values, slope = block(s, t, None)
        return reduced(values, reduction), (slope,) if wanted else None
    # Made before the blocks: torch.cat would hold it twice.
    slopes = wide(student[:0], teacher[:0])[0].new_empty((rows if wanted else 0, classes))
    found = []
    for start in range(0, rows, step):
        at = slice(start, start + step)
        s, t = wide(student[at], teacher[at])
        found.append(block(s, t, slopes[at] if wanted else None)[0])
    return reduced(torch.cat(found), reduction), (slopes,) if wanted else None


def rows_with_gradient(
    name: str, beta: float, temperature: float, each: bool, scale: float, s: Tensor, t: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    r"""$T^2 D(p, q)$ a row, and `scale` times its gradient, put into `out`. Five digits are right of the sum of the rows or, if
    asked for, of `each`. The gradient with respect to s is T times

    | forward KL | reverse KL | JS |
    |---|---|---|
    | $q - p$ | $q\,(\log q - \log p - \mathrm{KL}(q \,\|\, p))$ | $(1-\beta)\,q\,(\log q - \log m - \mathrm{KL}(q \,\|\, m))$ |
    """
    if name == "forward_kl" and s.is_cpu:  # which sees for free whether float32 was enough; a GPU would have to wait
        log_q, log_p = torch.log_softmax(s * (1 / temperature), -1), torch.log_softmax(t * (1 / temperature), -1)
        p = log_p.exp()
        d, difference = log_p.sub_(log_q), log_q.exp_().sub_(p)
        values = torch.addcmul(difference, p, d, out=d).sum(-1)
        if len(s) and NEAR < float(values.min() if each else values.mean()) < math.inf:
            return values.mul_(temperature**2), torch.mul(difference, temperature * scale, out=out)
    log_p, log_q, d = log_softmaxes(t, s, temperature)
    p, q = log_p.exp(), log_q.exp()
    if name == "forward_kl":
        values, slope = kl(p, q, d), q - p
    else:
        b, from_p, from_q = (p, d, -d) if name == "reverse_kl" else mixture(log_p, log_q, d, beta)
        values = of_q = kl(q, b, from_q)
        slope = -q * (from_q.masked_fill(q == 0, 0.0) + of_q.unsqueeze(-1))
        if name == "js":
            values, slope = beta * kl(p, b, from_p) + (1 - beta) * of_q, (1 - beta) * slope
    return (temperature**2 * values).to(s.dtype), torch.mul(slope, temperature * scale, out=out).to(s.dtype)


def reduced(values: Tensor, reduction: str, mask: Tensor | None = None) -> Tensor:
    """Of values, one a position: what is masked counts 0, and the mean of none is 0 with a graph."""
    values = values if mask is None else values.masked_fill(~mask, 0.0)
    if reduction == "mean":
        return values.sum() / (max(1, values.numel()) if mask is None else mask.sum().clamp_min(1))
    return values if reduction == "none" else values.sum()
