"""KD of two linear heads from their hidden states: a language model's logits never exist whole."""

from functools import partial

import torch
from torch import Tensor

from . import _checks
from ._divergences import divergence_rows, no_autocast, wide
from ._fused import Slopes, in_blocks, with_its_gradient

LINEAR_BLOCK = 2**21  # logits of either side that exist at a time: 8 MB in float32, and
DEVICE_BLOCK = 2**24  # on other devices, for which a product of few rows is no work


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
        temperature: T, from 1e-9 to 1e9 (default 2).
        mask: bool `(*,)`, True = counts.
        reduction: `"mean"` (default) or `"sum"` over the positions that count.

    Returns a scalar in nats. The logits are made in float32 at least, as half precision would round their differences away. The
    gradients of the student's three tensors are made with the value, in blocks of positions; under `torch.compile` and
    `torch.func`, and to be differentiated once more, the logits are made whole.

    >>> from aikd_losses.functional import deterministic_kd
    >>> h, w, other = torch.randn(6, 4), torch.randn(10, 4), torch.randn(10, 4)
    >>> value = linear_deterministic_kd(h, w, h, other)
    >>> torch.testing.assert_close(value, deterministic_kd(h @ w.T, h @ other.T))

    Reference: making the gradient of a head's loss chunk by chunk in the forward pass: Hsu et al., *Liger Kernel: Efficient
    Triton Kernels for LLM Training*, 2024, https://arxiv.org/abs/2410.10989.
    """
    temperature = _checks.temperature(temperature)
    _checks.choice("reduction", reduction, ("mean", "sum"))
    hidden = _checks.floating("student_hidden", student_hidden)
    _checks.mask(mask, hidden, hidden.ndim - 1)
    counts = hidden.new_ones(hidden.shape[:-1], dtype=torch.bool) if mask is None else mask
    classes = _checks.floating("student_weight", student_weight).shape[:1]
    tensors: list[Tensor] = []
    for side, h, w, b in (
        ("student", student_hidden, student_weight, student_bias),
        ("teacher", teacher_hidden, teacher_weight, teacher_bias),
    ):
        width = _checks.floating(f"{side}_hidden", h).shape[-1:]
        b = h.new_zeros(classes) if b is None else b
        for name, x, wanted, what in (
            ("hidden", h, (*counts.shape, *width), "(*, D), * as the student's: "),
            ("weight", w, (*classes, *width), "(C, D), C as the student's: "),
            ("bias", b, tuple(classes), "(C,) = "),
        ):
            name = f"{side}_{name}"
            _checks.shaped(name, _checks.floating(name, x), wanted, f"must have the shape {what}")
        h = h if mask is None else h.masked_fill(~mask.unsqueeze(-1), 0.0)
        tensors += [h.reshape(-1, *width), w, b]
    with no_autocast(hidden):
        plain, in_blocks = partial(_plain, temperature), partial(_in_blocks, temperature)
        tensors = [*tensors[:3], *(x.detach() for x in tensors[3:]), counts.flatten()]
        total = with_its_gradient(plain, in_blocks, 3, *tensors)
    return total / counts.sum().clamp_min(1) if reduction == "mean" else total


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor, counts: Tensor) -> Tensor:
    return torch.nn.functional.linear(*wide(hidden, weight, bias)).masked_fill(~counts.unsqueeze(-1), 0.0)


def _plain(temperature: float, *tensors: Tensor) -> Tensor:
    """The sum over positions."""
    h, w, b, teacher_h, teacher_w, teacher_b, counts = tensors
    student, teacher = _logits(h, w, b, counts), _logits(teacher_h, teacher_w, teacher_b, counts)
    return divergence_rows(student, teacher, name="forward_kl", temperature=temperature, beta=0.5).sum()


def _in_blocks(temperature: float, wanted: bool, *tensors: Tensor) -> tuple[Tensor, Slopes]:
    """The same, and its gradients: those of the logits go through the head a block at a time."""
    counts = tensors[-1]
    (h, w, b), (teacher_h, teacher_w, teacher_b) = wide(*tensors[:3]), wide(*tensors[3:6])  # once, and not a block
    total, slopes = h.new_zeros(()), [torch.zeros_like(x) for x in (h, w, b)] if wanted else []
    step = max(1, (LINEAR_BLOCK if h.is_cpu else DEVICE_BLOCK) // len(w))
    for start in range(0, len(h), step):
        rows = slice(start, start + step)
        logits = _logits(h[rows], w, b, counts[rows]), _logits(teacher_h[rows], teacher_w, teacher_b, counts[rows])
        value, found = in_blocks(wanted, *logits, name="forward_kl", temperature=temperature, beta=0.5, reduction="sum")
        total += value
        if found is not None:
            slope = found[0].to(w.dtype)
            slopes[0][rows] = slope @ w
            slopes[1].addmm_(slope.t(), h[rows])
            slopes[2].add_(slope.sum(0))
    return total, tuple(slopes) if wanted else None
