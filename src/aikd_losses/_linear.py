"""KD of language-model heads from hidden states, whose logits never exist whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._soft_targets import Part, Term, as_tensor, number, sums_and_slope, wide_type

LINEAR_BLOCK = 2**21  # logits of either side that exist at a time: 8 MB in float32

Head = tuple[Tensor, Tensor, Tensor | None]  # hidden states (rows, D), weight (C, D), bias (C,)


class LinearKD(torch.autograd.Function):
    """T**2 KL(softmax(teacher / T) || softmax(student / T)) with the gradients made block by block with the value."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Head,
        mask: Tensor | None,
        temperature: float,
        reduction: str,
        wanted: bool,
    ) -> Tensor:
        ctx.settings = teacher, mask, temperature, reduction
        value, ctx.slopes = _all_blocks((hidden, weight, bias), ctx.settings, wanted)
        if wanted:
            ctx.save_for_backward(hidden, weight, bias)
        return as_tensor(value, wide_type(hidden))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "`linear_deterministic_kd` has no second derivative (create_graph=True). Use `deterministic_kd` on the logits."
            )
        # The first backward pass takes what the forward pass made; another one finds nothing and computes it anew.
        slopes, ctx.slopes = ctx.slopes, None
        hidden, weight, bias = ctx.saved_tensors
        if slopes is None:
            slopes = _all_blocks((hidden, weight, bias), ctx.settings, True)[1]
        scaled = [
            None if s is None else s.mul_(grad).to(x.dtype) for s, x in zip(slopes, (hidden, weight, bias), strict=True)
        ]
        return *scaled, None, None, None, None, None


def _all_blocks(
    student: Head, settings: tuple[Head, Tensor | None, float, str], wanted: bool
) -> tuple[float | Tensor, list[Tensor | None] | None]:
    hidden, weight, bias = student
    teacher, mask, temperature, reduction = settings
    count: float | Tensor = 1.0
    if reduction == "mean":
        count = float(max(1, len(hidden))) if mask is None else number(mask.sum().clamp_min(1).float())
    slopes = [torch.zeros_like(x, dtype=wide_type(x)) if wanted and x is not None else None for x in student]
    value: float | Tensor = 0.0
    step = max(1, LINEAR_BLOCK // len(weight))
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            counts = None if mask is None else mask[rows]
            h = _visible(hidden[rows], counts)
            logits = _linear(h, weight, bias)
            part = Part(_linear(_visible(teacher[0][rows], counts), *teacher[1:]), temperature, is_logits=True)
            (summed,), slope = sums_and_slope(Term(logits, (part,), counts, "sum"), wanted)
            value = value + summed
            if slope is not None and slopes[0] is not None and slopes[1] is not None:
                slopes[0][rows] = slope @ weight.to(slope.dtype)
                slopes[1].addmm_(slope.to(slopes[1].dtype).t(), h.to(slopes[1].dtype))
                if slopes[2] is not None:
                    slopes[2] += slope.sum(0)
    for x in slopes:
        if x is not None:
            x.div_(count)
    return value / count, slopes if wanted else None


def _visible(hidden: Tensor, counts: Tensor | None) -> Tensor:
    return hidden if counts is None else hidden.masked_fill(~counts.unsqueeze(-1), 0.0)


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
