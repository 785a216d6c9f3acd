"""`check_setup`: each term's value and gradient, beside plain cross-entropy's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from . import _checks
from .adversarial import AdversarialDistributionLoss
from .progressive import ProgressiveKD
from .stack import LossStack

DWARFS, VANISHES = 10.0, 1e-3  # a term's gradient over cross-entropy's
IGNORED = -100  # torch's `ignore_index`
LABELLED = (ProgressiveKD, nn.CrossEntropyLoss)  # whose `target` is of classes


@dataclass(frozen=True)
class Finding:
    """What is wrong, and where: in a term, a tensor or an argument."""

    severity: str
    where: str
    message: str


error = partial(Finding, "error")  # training goes wrong
warning = partial(Finding, "warning")  # it probably does
note = partial(Finding, "note")


@dataclass(frozen=True)
class TermReport:
    """A line of the table; None is what could not be computed. The gradient's norm is that of the weighted term."""

    name: str
    weight: float
    value: float | None = None
    gradient: float | None = None
    ratio: float | None = None

    def row(self) -> tuple[str, ...]:
        numbers = (self.weight, self.value, self.gradient, self.ratio)
        return (self.name, *("-" if x is None else f"{x:.3g}" for x in numbers))


def class_axis(stack: LossStack, tensors: Mapping[str, Any]) -> int | None:
    """That of `student_logits`, or None where the terms' own calls say what is wrong with it."""
    terms: Any = stack.terms.values()
    dim = next((term.class_dim for term in terms if isinstance(getattr(term, "class_dim", ""), int | None)), 1)
    try:
        return _checks.logits(tensors.get("student_logits"), dim)
    except (TypeError, ValueError, IndexError):
        return None


def measure(stack: LossStack, tensors: Mapping[str, Any], alone: bool) -> tuple[list[TermReport], list[Finding]]:
    """A line a term, and what is wrong with it; `alone`: one that need not give a scalar."""
    sums = {str(term.reduction) for term in stack.terms.values() if hasattr(term, "reduction")} == {"sum"}
    reference = _cross_entropy(stack, tensors, "sum" if sums else "mean")
    plain = None if reference is None else reference.gradient
    reports, findings = [], []
    for i, (name, term) in enumerate(stack.terms.items()):
        weight = float(stack._weights[i])
        call = stack._calls["forward"][name]
        try:
            picked = call.pick(tensors)
            _in_range(term, picked)
            value, slope = _value_and_slope(term, picked, [p for p in picked if call.names[p] == "student_logits"])
            if value.ndim and not alone:
                raise ValueError("a term of a stack must give a scalar (reduction='mean' or 'sum').")
        except Exception as reason:  # whatever a term raises is what was asked for
            findings.append(error(name, f"its call fails: {reason}"))
            reports.append(TermReport(name, weight))
            continue
        norm = None if slope is None else weight * float(torch.linalg.vector_norm(slope.double()))
        ratio = norm / plain if norm is not None and plain else None
        report = TermReport(name, weight, float(value.double().mean()), norm, ratio)
        same = equal(tensors.get("student_logits"), picked.get("teacher_logits"))
        findings += _of_size(report, term, same)
        reports.append(report)
    return reports if reference is None else [*reports, reference], findings


def _cross_entropy(stack: LossStack, tensors: Mapping[str, Any], reduction: str) -> TermReport | None:
    """Plain cross-entropy over the same positions, to compare with."""
    target, mask, axis = tensors.get("target"), tensors.get("mask"), class_axis(stack, tensors)
    if target is None or axis is None:
        return None
    logits: Tensor = tensors["student_logits"]
    try:
        _checks.class_target(target, logits, axis)
        _checks.mask(mask, logits, axis)
        counts = torch.ones_like(logits.select(axis, 0), dtype=torch.bool) if mask is None else mask
        if not target.is_floating_point():
            counts = counts & (target != IGNORED)
            _checks.labels_in_range(target.cpu(), logits.shape[axis], counts.cpu())
            target = target.masked_fill(~counts, IGNORED)
        elif sum_to_one(target.detach().movedim(axis, -1)[counts]):
            target = target.detach().double().movedim(axis, 1)
        else:
            return None
    except (TypeError, ValueError, IndexError):
        return None  # the terms' own calls say so
    leaf = logits.detach().double().requires_grad_()
    value = cross_entropy(leaf.movedim(axis, 1), target, reduction="none").masked_fill(~counts, 0.0).sum()
    value = value if reduction == "sum" else value / counts.sum().clamp_min(1)
    (slope,) = torch.autograd.grad(value, leaf)
    return TermReport("cross-entropy alone", 1.0, float(value.detach()), float(torch.linalg.vector_norm(slope)), 1.0)


def _in_range(term: nn.Module, picked: Mapping[str, Any]) -> None:
    """Ids and labels, looked at here because a GPU that is given one out of range takes the process down."""
    mask, target = picked.get("mask"), picked.get("target")
    logits: Any = picked.get("student_logits", picked.get("input"))
    if isinstance(term, ProgressiveKD):
        size = getattr(term.targets, "num_samples", None)
        for name in ("index", "partner_index"):
            ids = picked.get(name)
            if isinstance(ids, Tensor):
                _checks.sample_index(name, ids.cpu(), tuple(ids.shape), size, _on_cpu(mask, ids))
    if isinstance(term, LABELLED) and isinstance(target, Tensor) and target.dtype == torch.int64:
        axis = _checks.logits(logits, getattr(term, "class_dim", 1))
        classes = logits.shape[axis]
        labels = target.cpu()
        counts = labels != getattr(term, "ignore_index", labels.amin() - 1 if labels.numel() else 0)
        shown = _on_cpu(mask, labels)
        _checks.labels_in_range(labels, classes, counts if shown is None else counts & shown)


def _on_cpu(mask: object, like: Tensor) -> Tensor | None:
    fits = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == like.shape
    return mask.cpu() if isinstance(mask, Tensor) and fits else None


def _value_and_slope(term: nn.Module, picked: dict[str, Any], student: list[str]) -> tuple[Tensor, Tensor | None]:
    """The term's value and its gradient with respect to `student_logits`, None where it does not take them."""
    leaf = None
    for parameter in student:
        given = picked[parameter]
        if isinstance(given, Tensor) and given.is_floating_point():
            leaf = picked[parameter] = given.detach().clone().requires_grad_()
    buffers = {name: x.clone() for name, x in term.named_buffers()}
    value = functional_call(term, buffers, (), picked) if buffers else term(**picked)
    if not isinstance(value, Tensor):
        raise TypeError(f"a term must give a tensor; got {type(value).__name__}.")
    if leaf is None:
        return value.detach(), None
    slope = None
    if value.requires_grad:
        (slope,) = torch.autograd.grad(value.mean(), leaf, allow_unused=True)
    return value.detach(), torch.zeros_like(leaf) if slope is None else slope


def _of_size(report: TermReport, term: nn.Module, same: bool) -> Iterator[Finding]:
    """`same`: student and teacher say the same, of which there is another finding."""
    name, ratio = report.name, report.ratio
    if not (math.isfinite(report.value or 0) and math.isfinite(report.gradient or 0)):
        yield error(
            name,
            "its value or its gradient is not finite. Look for NaN and inf in the logits, and for a class at -inf on one "
            "side only.",
        )
    elif report.weight == 0:
        yield note(name, "its weight is 0 in this epoch.")
    elif report.gradient == 0 and isinstance(term, ProgressiveKD):
        yield note(name, "no sample of this batch has a history yet, so it is 0. It counts from the second epoch on.")
    elif ratio is not None and ratio > DWARFS:
        yield warning(
            name,
            f"its gradient is {ratio:.3g} times cross-entropy's: it drowns the labels. Lower its weight, or look for "
            "reduction='sum'. (Where the labels are fitted already, cross-entropy's own gradient is small.)",
        )
    elif same:
        return  # of which there is a finding
    elif report.gradient == 0:
        yield warning(name, "no gradient reaches `student_logits`. Look for a `detach()` or `no_grad()` in the term.")
    elif ratio is not None and ratio < VANISHES:
        when = (
            "once the discriminator has learned" if isinstance(term, AdversarialDistributionLoss) else "an epoch later"
        )
        yield warning(
            name,
            f"its gradient is {ratio:.3g} times cross-entropy's: it does next to nothing. Look again {when}, then raise "
            "its weight.",
        )


def sum_to_one(rows: Tensor) -> bool:
    rows = rows.double()
    return bool((rows >= 0).all() and ((rows.sum(-1) - 1).abs() < 5e-3).all())


def equal(a: object, b: object) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    return (a.device, a.dtype) == (b.device, b.dtype) and torch.equal(a, b)
