r"""A loss whose gradient is made together with its value.

The gradient of a softmax's KL divergence or cross-entropy is $T\,(q - p)$: at hand in the forward pass, where autograd would
keep four tensors of the size of the logits to work it out later. So that one tensor is kept, and whatever is needed to make it
exists for a block of rows at a time.

Where a gradient is transformed, batched or differentiated again, and under `torch.compile`, the plain form is asked instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BLOCK = 2**17  # elements that a CPU works on at a time: 0.5 MB in float32, which its cache holds
DEVICE_BLOCK = 2**24  # elements that other devices do: little beside logits that are large

Plain = Callable[..., Tensor]  # tensors -> a value, or one a row
Slopes = tuple[Tensor, ...] | None  # gradients, if they are wanted
WithGradient = Callable[..., tuple[Tensor, Slopes]]  # (wanted, *tensors) -> the same, and its gradients
How = tuple[
    Plain, WithGradient, int, bool
]  # the last two: how many tensors are learned, and whether gradients are wanted
# (*tensors, scale) -> a value a row, and `scale` times the gradient of each
RowsWithGradient = Callable[..., tuple[Tensor, Tensor]]


def with_its_gradient(plain: Plain, with_gradient: WithGradient, learned: int, *tensors: Tensor) -> Tensor:
    """`plain(*tensors)`: a value, or one a row. No gradient reaches but the first `learned` tensors."""
    if torch.compiler.is_compiling():
        return plain(*tensors)
    # Autograd cannot save what was made in inference mode.
    tensors = tuple(x.clone() if x.is_inference() else x for x in tensors)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors[:learned])
    value: Tensor = _WithGradient.apply((plain, with_gradient, learned, wanted), *tensors)[0]  # type: ignore[no-untyped-call]
    return value


def rowwise_loss(plain: Plain, with_gradient: RowsWithGradient, reduction: str, *tensors: Tensor) -> Tensor:
    """The rows of the tensors, the student's logits (N, C) first, to one value each, and that reduced; "none": as it is."""

    def whole(*tensors: Tensor) -> Tensor:
        return _reduced(plain(*tensors), reduction)

    def in_blocks(wanted: bool, *tensors: Tensor) -> tuple[Tensor, Slopes]:
        student = tensors[0]
        rows, classes = student.shape
        step = max(1, (BLOCK if student.is_cpu else DEVICE_BLOCK) // classes)
        scale = 1 / max(1, rows) if reduction == "mean" else 1.0
        if rows <= step:
            values, slope = with_gradient(*tensors, scale=scale)
            return _reduced(values, reduction), (slope,) if wanted else None
        # Made before the blocks: torch.cat would hold it twice.
        slopes = student.new_empty(
            (rows if wanted else 0, classes), dtype=torch.promote_types(student.dtype, torch.float32)
        )
        found = []
        for start in range(0, rows, step):
            values, slope = with_gradient(*(x[start : start + step] for x in tensors), scale=scale)
            found.append(values)
            if wanted:
                slopes[start : start + step] = slope
        return _reduced(torch.cat(found), reduction), (slopes,) if wanted else None

    return with_its_gradient(whole, in_blocks, 1, *tensors)


def _reduced(values: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return values
    return values.mean() if reduction == "mean" and len(values) else values.sum()


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(how: How, *tensors: Tensor) -> tuple[Tensor, Slopes]:
        _, with_gradient, _, wanted = how
        return with_gradient(wanted, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Slopes]) -> None:
        (ctx.plain, ctx.with_gradient, ctx.learned, _), *tensors = inputs
        ctx.rowwise, ctx.slopes = output[0].ndim == 1, output[1]
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
            grad = grad.unsqueeze(-1) if ctx.rowwise else grad
            slopes = tuple([_times(slope, grad) for slope in slopes])
        return None, *slopes, *[None] * (len(tensors) - ctx.learned)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        ones = torch.ones(ctx.saved_tensors[0].shape[: int(ctx.rowwise)], device=ctx.saved_tensors[0].device)
        slopes = _plain_slopes(ctx, ones)
        moved = [slope * t for slope, t in zip(slopes, tangents[1:], strict=False) if t is not None]
        return sum(x.sum(-1) if ctx.rowwise else x.sum() for x in moved), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], how: How, *tensors: Tensor
    ) -> tuple[tuple[Tensor, None], tuple[int, None]]:
        return (torch.vmap(how[0], in_dims[1:])(*tensors), None), (0, None)


# torch asks for it in each call, and to work it out takes longer than the arithmetic of small logits.
_WithGradient.forward.__signature__ = inspect.signature(_WithGradient.forward)  # type: ignore[attr-defined]


def _plain_slopes(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the first tensors by the plain form, themselves with a graph."""
    first, others = ctx.saved_tensors[: ctx.learned], ctx.saved_tensors[ctx.learned :]
    value, slopes, *_ = torch.func.vjp(lambda *x: ctx.plain(*x, *others), *first)
    found: tuple[Tensor, ...] = slopes(grad.to(value.dtype))
    return found


def _times(slope: Tensor, grad: Tensor) -> Tensor:
    """slope * grad in the memory of the slope, or in that of its own where there is a batch of grads, which refuses that."""
    try:
        return slope if grad.is_cpu and grad.ndim == 0 and float(grad) == 1.0 else slope.mul_(grad)
    except RuntimeError:
        return slope * grad
