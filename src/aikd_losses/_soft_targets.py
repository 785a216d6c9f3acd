r"""A weighted sum of cross-entropies and KL divergences against fixed targets, in one pass with one analytic gradient.

With $q_T = \mathrm{softmax}(s/T)$ every part is $a\,T^2\,\mathrm{CE}(p, q_T)$, less the entropy of p for a KL divergence, and

$$\frac{\partial}{\partial s} \sum_i a_i\,T_i^2\,\mathrm{CE}(p_i, q_{T_i}) = \sum_i a_i\,T_i\,(q_{T_i} - p_i)$$

so that the parts of one temperature need one softmax, and all of them one saved tensor: the gradient, made in the forward
pass while everything is at hand. Large logits are worked on in blocks of rows: on a CPU such as stay in its cache; on other
devices as large as memory comfortably holds several times, so that next to the logits they do not count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks

BLOCK = 2**17  # elements that a CPU works on at a time (twice as many it does in one go): 0.5 MB in float32
DEVICE_BLOCK = 2**24  # elements that other devices do: 64 MB
ROOMS = ("scaled", "log_q", "p")  # what a block makes; targets that are no logits ask for one more
FEW_CLASSES = 32  # below, a CPU is faster with the classes on the first axis
SHORT = 2**14  # elements up to which a dot product, which adds them one by one, is precise
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


def evaluate(terms: Sequence[Term], weights: Sequence[Share]) -> tuple[Tensor, list[Share]]:
    """The weighted sum, and each term's own value where that is not the sum. The terms have the same student and mask."""
    student = terms[0].student
    values: list[Share] = []
    task = terms, weights, student.requires_grad and torch.is_grad_enabled(), values
    try:
        total = _SoftTargets.apply(student, task)  # type: ignore[no-untyped-call]
    except RuntimeError:  # the kernels look for labels out of range themselves; this says so in a sentence
        for term in terms:
            for part in term.parts:
                if not part.target.is_floating_point():
                    _checks.labels_in_range(part.target, student.shape[-1], term.mask)
        raise
    return total, values


def sums_and_slope(term: Term, wanted: bool) -> tuple[list[Share], Tensor | None]:
    """The sum of each part of a term that is a sum, and their gradient, for whoever takes care of autograd."""
    with torch.no_grad():
        parts, rows, _ = _scaled_parts(term.student, [term], [1.0])
        sums, slope = _all_rows(rows, parts, wanted)
        return [number(x.sum()) if isinstance(x, Tensor) else x for x in sums], slope


def usable(*constants: object) -> bool:
    """Whether the analytic gradient is all that is asked for: none for `constants`, no transform or compiler that has to
    see through it (which then gets the plain composition)."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return not (constants and any(isinstance(x, Tensor) and x.requires_grad for x in constants))


def number(x: Share) -> Share:
    """A 0-d tensor as a number, where looking is free."""
    return float(x) if not isinstance(x, Tensor) or (x.ndim == 0 and x.is_cpu) else x


class _SoftTargets(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, task: tuple[Sequence[Term], Sequence[Share], bool, list[Share]]) -> Tensor:
        """The total; the terms' own values, where they are something else, are put into the last of the `task`."""
        terms, weights, wanted, values = task
        parts, rows, counts = _scaled_parts(student, terms, weights)
        sums, slope = _all_rows(rows, parts, wanted)
        if wanted:
            tensors: list[Tensor] = []
            ctx.layout, ctx.slope = _without_tensors(terms, weights, tensors), slope
            ctx.save_for_backward(student, *tensors)
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        if len(terms) == 1 and type(weights[0]) is float and weights[0] == 1.0:
            return as_tensor(_reduced(sums, terms[0], counts[0], student), dtype)
        total: Share = 0.0
        for term, weight, count in zip(terms, weights, counts, strict=True):
            value = _reduced(sums[: len(term.parts)], term, count, student)
            sums = sums[len(term.parts) :]
            if type(weight) is not float or weight:  # 0 switches a term off, also one that is infinite
                total = total + weight * value
            values.append(value)
        return as_tensor(total, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        student, *tensors = ctx.saved_tensors  # refuses those that were changed in place, too
        # The first backward pass takes what the forward pass made; another one finds nothing and computes it anew.
        slope, ctx.slope = ctx.slope, None
        if torch.is_grad_enabled():  # to be differentiated once more
            parts, rows, _ = _scaled_parts(student, *_with_tensors(student, ctx.layout, tensors))
            slope = _differentiable(rows, parts).view(student.shape) * (grad.unsqueeze(-1) if grad.ndim else grad)
        else:
            if slope is None:
                parts, rows, _ = _scaled_parts(student, *_with_tensors(student, ctx.layout, tensors))
                slope = _all_rows(rows, parts, True)[1]
            if slope.ndim != student.ndim:
                slope = slope.view(student.shape)
            scale = grad.unsqueeze(-1) if grad.ndim else number(grad)
            if not (type(scale) is float and scale == 1.0):
                slope.mul_(scale)
        return (slope if slope.dtype == student.dtype else slope.to(student.dtype)), None


_SAVED: Any = object()  # stands where a tensor was
Layout = tuple[list[tuple[list[Part], Any, str]], list[Any]]


def _without_tensors(terms: Sequence[Term], weights: Sequence[Share], tensors: list[Tensor]) -> Layout:
    """The terms but for their tensors, which autograd saves: it lets go of them with the last backward pass, however long the
    loss is kept. Those made in inference mode cannot be saved."""

    def out(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.is_inference():
            return x
        tensors.append(x)
        return _SAVED

    return [
        ([Part(out(x[0]), x[1], out(x[2]), x[3]) for x in term.parts], out(term.mask), term.reduction) for term in terms
    ], [out(weight) for weight in weights]


def _with_tensors(student: Tensor, layout: Layout, tensors: Sequence[Tensor]) -> tuple[list[Term], list[Share]]:
    """The same, whole again."""
    saved = iter(tensors)

    def back(x: Any) -> Any:
        return next(saved) if x is _SAVED else x

    terms = [
        Term(student, tuple(Part(back(x[0]), x[1], back(x[2]), x[3]) for x in parts), back(mask), reduction)
        for parts, mask, reduction in layout[0]
    ]
    return terms, [back(weight) for weight in layout[1]]


def as_tensor(x: Share, dtype: torch.dtype) -> Tensor:
    """A weight or alpha on a device is float64, and would make the value so."""
    return x.to(dtype) if isinstance(x, Tensor) else torch.scalar_tensor(x, dtype=dtype)


def as_tensors(values: Sequence[Share], dtype: torch.dtype) -> list[Tensor]:
    """One call for numbers, which is what they mostly are."""
    if set(map(type, values)) != {float}:
        return [as_tensor(x, dtype) for x in values]
    return list(torch.tensor(values, dtype=dtype).unbind())


class _Scaled(NamedTuple):
    """A part of some rows with `slope`, the factor of q - p in the gradient: weight * share * T / number of rows."""

    target: Tensor
    temperature: float
    share: Share
    is_logits: bool
    slope: Share
    rowwise: bool  # a value a row is wanted, not their sum


def _scaled_parts(
    student: Tensor, terms: Sequence[Term], weights: Sequence[Share]
) -> tuple[list[_Scaled], Tensor, list[Share]]:
    """The parts and the student with one axis of rows, and what the sum of each term is divided by; what a mask hides is 0
    and has no share."""
    mask, hidden, shown = terms[0].mask, None, None
    if mask is not None:
        hidden = ~mask.reshape(-1)
        shown = mask.reshape(-1).to(wide_type(student))  # a number times a bool would be float32
    found, counts = [], []
    for term, weight in zip(terms, weights, strict=True):
        count = _count(term, student)
        counts.append(count)
        for target, temperature, share, is_logits in term.parts:
            rowwise = term.reduction == "none"
            if type(share) is not float and share.ndim:  # type: ignore[union-attr]
                share, rowwise = share.reshape(-1), True  # type: ignore[union-attr]
            if shown is not None:
                share, rowwise = share * shown, True
            axes = 1 if is_logits else int(target.is_floating_point())
            if hidden is not None or target.ndim != 1 + axes:
                target = _flat(target, hidden, axes)
            slope = weight * share * (temperature / count)
            found.append(_Scaled(target, temperature, share, is_logits, slope, rowwise))
    if hidden is not None or student.ndim != 2:
        student = _flat(student, hidden, 1)
    return found, student, counts


def _flat(x: Tensor, hidden: Tensor | None, axes: int) -> Tensor:
    """With one axis of rows before the `axes`; 0 in rows that are hidden, where an ignored label, -100 say, is no class."""
    x = x.reshape(-1, *x.shape[x.ndim - axes :])
    return x if hidden is None else x.masked_fill(hidden.unsqueeze(-1) if axes else hidden, 0)


def _count(term: Term, student: Tensor) -> Share:
    """What a sum over rows is divided by."""
    if term.reduction != "mean":
        return 1.0
    if term.mask is None:
        return float(max(1, student.numel() // student.shape[-1]))
    return number(term.mask.sum().clamp_min(1).to(wide_type(student)))


def _reduced(sums: Sequence[Share], term: Term, count: Share, student: Tensor) -> Share:
    """The value of a term from the sums of its parts."""
    value = sums[0] if len(sums) == 1 else sum(sums)
    if type(value) is float and term.reduction != "none":
        return value / count
    if term.reduction == "none":
        shape = student.shape[:-1]
        if not isinstance(value, Tensor):
            return student.new_zeros(shape, dtype=wide_type(student))
        return value if value.shape == shape else value.view(shape).clone()  # a view would forbid changes in place
    return number(value.sum()) / count  # type: ignore[union-attr]


def _all_rows(student: Tensor, parts: Sequence[_Scaled], wanted: bool) -> tuple[list[Share], Tensor | None]:
    """Of each part share * T**2 * its value, a sum or one a row, and the gradient, if `wanted`."""
    num_rows, num_classes = student.shape
    on_cpu = student.is_cpu
    step = max(1, (BLOCK if on_cpu else DEVICE_BLOCK) // num_classes)
    whole = num_rows <= (2 * step if on_cpu else step)
    shared = on_cpu and num_classes >= FEW_CLASSES
    if whole and not (shared and num_rows * num_classes > SHORT):
        return _block(student, parts, wanted, {})
    new = partial(torch.empty, dtype=wide_type(student), device=student.device)
    slope = new(student.shape) if wanted else None
    # What is made takes turns in the same memory, also block by block, so that the peak is that of one block.
    room = {}
    if shared:
        names = ROOMS if all(x.is_logits for x in parts) else (*ROOMS, "against")
        room = {name: new(num_rows if whole else step, num_classes) for name in names}
        if slope is not None:
            room["slope"] = slope
    if whole:
        return _block(student, parts, wanted, room)
    into = [None] * -(-num_rows // step) if slope is None else slope.split(step)
    sums = []
    for rows, its_slope, its_parts in zip(student.split(step), into, _split(parts, step, len(into)), strict=True):
        if len(rows) < step:
            room = {name: x[: len(rows)] for name, x in room.items()}
        if room and its_slope is not None:
            room["slope"] = its_slope
        values, result = _block(rows, its_parts, wanted, room)
        if its_slope is not None and result is not None and result is not its_slope:
            its_slope.copy_(result)
        sums.append(values)
    return [torch.cat(x) if isinstance(x[0], Tensor) and x[0].ndim else sum(x) for x in zip(*sums, strict=True)], slope


def _split(parts: Sequence[_Scaled], step: int, count: int) -> Iterator[list[_Scaled]]:
    """The parts of each block of `step` rows."""
    columns: list[list[Any]] = [
        [y.split(step) if isinstance(y, Tensor) and y.ndim else [y] * count for y in (x.target, x.share, x.slope)]
        for x in parts
    ]
    for i in range(count):
        yield [
            _Scaled(target[i], x.temperature, share[i], x.is_logits, slope[i], x.rowwise)
            for x, (target, share, slope) in zip(parts, columns, strict=True)
        ]


def _block(
    student: Tensor, parts: Sequence[_Scaled], wanted: bool, room: Mapping[str, Tensor]
) -> tuple[list[Share], Tensor | None]:
    """`_work`, once more with care where a CPU sees that it was needed."""
    if not student.is_cpu:
        return _work(student, parts, wanted, room, careful=True)
    values, slope = _work(student, parts, wanted, room, careful=False)
    for x in values:
        if not math.isfinite(x if type(x) is float else x.sum()):  # type: ignore[union-attr]
            return _work(student, parts, wanted, room, careful=True)
    return values, slope


def _work(
    student: Tensor, parts: Sequence[_Scaled], wanted: bool, room: Mapping[str, Tensor], careful: bool
) -> tuple[list[Share], Tensor | None]:
    """Without care, a class that is excluded (p or q is 0) gives NaN. What is made goes into the `room` that there is."""
    dim = 0 if student.shape[1] < FEW_CLASSES and student.is_cpu else 1
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    values: list[Share] = [0.0] * len(parts)
    slope = None
    for temperature in dict.fromkeys([x.temperature for x in parts]):
        log_q = torch._log_softmax(
            _tempered(student, temperature, dim, dtype, room.get("scaled")), dim, False, out=room.get("log_q")
        )
        against = None  # minus the targets, each times its factor
        labels = []
        for i, x in enumerate(parts):
            if x.temperature != temperature or (type(x.share) is float and x.share == 0.0):
                continue
            difference = None
            if x.is_logits:
                # `against` may lie where the p of the first KL was.
                p, value, difference = _kl(student, x, log_q, dim, room, against is None, careful)
                usual = type(value) is float and type(x.share) is float
                values[i] = temperature**2 * x.share * value if usual else _shared(value, x, dim, 1.0)
            elif x.target.is_floating_point():
                p = x.target if x.target.dtype == dtype else x.target.to(dtype)
                p = p if dim else p.t()
                terms = log_q.masked_fill(p == 0, 0.0) if careful else log_q  # 0 log 0 = 0
                values[i] = _shared(_inner(terms, p, x.rowwise, room.get("scaled")), x, dim, -1.0)
            else:
                at = x.target.unsqueeze(dim)
                labels.append((at, x.slope))
                values[i] = _shared(log_q.gather(dim, at), x, dim, -1.0)
                continue
            if not wanted:
                continue
            if difference is not None:
                difference.mul_(_along(x.slope, dim) if isinstance(x.slope, Tensor) else x.slope)
                slope = difference if slope is None else slope.add_(difference)
            else:
                out = p if x.is_logits else room.get("against")
                usual = against is None and type(x.slope) is float
                against = torch.mul(p, -x.slope, out=out) if usual else _add(against, p, x.slope, dim, out)
        if not wanted:
            continue
        for at, factor in labels:
            if against is None:
                against = room["against"].zero_() if "against" in room else torch.zeros_like(log_q)
            against = _scattered(against, dim, at, factor)
        if against is not None:  # against - q * (sum of against over the classes)
            out = room.get("slope" if slope is None else "scaled")
            result = torch._log_softmax_backward_data(against, log_q, dim, dtype, out=out)
            slope = result if slope is None else slope.add_(result)
    if not wanted:
        return values, None
    if slope is None:  # no part has a share
        return values, torch.zeros_like(student, dtype=dtype)
    return values, slope if dim else slope.t().contiguous()


def _inner(a: Tensor, b: Tensor, rowwise: bool, out: Tensor | None) -> Tensor:
    """a * b, whose sum is wanted; where a value a row is not, the sum if that is a kernel less and as precise."""
    if not rowwise and a.numel() <= SHORT and a.is_contiguous() and b.is_contiguous():
        return torch.dot(a.view(-1), b.view(-1))
    return torch.mul(a, b, out=out)


def _kl(
    student: Tensor, x: _Scaled, log_q: Tensor, dim: int, room: Mapping[str, Tensor], first: bool, careful: bool
) -> tuple[Tensor, Tensor | float, Tensor | None]:
    """p, terms that sum to KL (or their sum) and, where the difference of the two softmax would be imprecise, q - p."""
    scaled = room.get("scaled")
    teacher = _tempered(x.target, x.temperature, dim, log_q.dtype, scaled)
    if not dim:
        teacher = teacher.contiguous()
    p = torch._softmax(teacher, dim, False, out=room.get("p") if first else None)
    if careful:
        return p, kl_terms(torch.log_softmax(teacher, dim), log_q), None
    if x.temperature <= DIRECT:
        if scaled is None:
            terms = torch.log_softmax(teacher, dim)
        else:  # the largest p is 1 / sum(exp(teacher - largest)): faster than to sum once more
            terms = torch.sub(teacher, teacher.amax(dim, keepdim=True), out=scaled)
            terms.add_(p.amax(dim, keepdim=True).log_())
        terms = _inner(terms.sub_(log_q), p, x.rowwise, terms)
        value = float(terms.sum() if terms.ndim else terms)
        if not value < NEAR * student.shape[0]:
            return p, terms if x.rowwise else value, None
    if p.numel() and float(p.min()) < SMALLEST:
        teacher = _tempered(x.target, x.temperature, dim, log_q.dtype, None)  # `terms` may lie where it was
        return p, kl_terms(torch.log_softmax(teacher, dim), log_q), None
    return p, *_near(_tempered(wide(student) - x.target, x.temperature, dim, log_q.dtype, None), p, dim)


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
    if isinstance(terms, float):
        return square * share * terms
    if not x.rowwise:
        return square * share * number(terms.sum() if terms.ndim else terms)
    rows = terms.sum(dim)
    if isinstance(share, Tensor) and share.ndim:
        rows = torch.where(share > 0, share * rows, 0.0)  # 0 * inf would be NaN
        return rows.mul_(square)
    return rows.mul_(square * share)


def _add(against: Tensor | None, p: Tensor, slope: Share, dim: int, out: Tensor | None) -> Tensor:
    """against - slope * p; into `out` if it is the first."""
    if isinstance(slope, float):
        return torch.mul(p, -slope, out=out) if against is None else against.add_(p, alpha=-slope)
    factor = -_along(slope, dim)
    return p * factor if against is None else against.addcmul_(p, factor.to(p.dtype))


def _scattered(against: Tensor, dim: int, at: Tensor, slope: Share) -> Tensor:
    """against - slope at the labels, one a row."""
    if type(slope) is float and against.is_cpu:
        return against.scatter_(dim, at, -slope, reduce="add")
    # Not scatter_add_, which has no deterministic form on a GPU.
    factor = _along(slope, dim) if isinstance(slope, Tensor) else slope
    return against.scatter_(dim, at, (against.gather(dim, at) - factor).to(against.dtype))


def _along(share: Tensor, dim: int) -> Tensor:
    return share.unsqueeze(dim) if share.ndim else share


def _differentiable(student: Tensor, parts: Sequence[_Scaled]) -> Tensor:
    """The gradient, to be differentiated once more."""
    student = wide(student)
    result = torch.zeros_like(student)
    for x in parts:
        q, target = torch.softmax(student / x.temperature, -1), x.target
        if not target.is_floating_point():
            p = torch.zeros_like(student).scatter(1, target.unsqueeze(1), 1.0)
        elif x.is_logits:
            p = torch.softmax(target.to(q.dtype) / x.temperature, -1)
        else:
            p = target.to(q.dtype)
        factor = _along(x.slope, 1) if isinstance(x.slope, Tensor) else x.slope
        result = result + factor * (q * p.sum(-1, keepdim=True) - p)
    return result


def _tempered(logits: Tensor, temperature: float, dim: int, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """logits / T in `dtype`, with the classes on the axis `dim`."""
    if logits.dtype != dtype:
        logits = out = logits.to(dtype) if out is None else out.copy_(logits)
    if temperature != 1.0:
        logits = torch.mul(logits, 1.0 / temperature, out=out)
    return logits if dim else logits.t()


def wide_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """float32 at least."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
