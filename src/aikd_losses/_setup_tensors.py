"""`check_setup`: the tensors of a step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ._setup_terms import LABELLED, Finding, class_axis, equal, error, note, sum_to_one, warning
from .stack import LossStack


def of_tensors(stack: LossStack, tensors: Mapping[str, Any]) -> Iterator[Finding]:
    for name in tensors:
        if name not in stack._names:
            yield error(name, f"no term uses it; the terms use {', '.join(sorted(stack._names))}.")
    # Of any others the terms' own calls say that they are refused.
    tensors = {name: x for name, x in tensors.items() if isinstance(x, Tensor) and _dense(x)}
    axis = class_axis(stack, tensors)
    if axis is None:
        return
    logits: Tensor = tensors["student_logits"]
    counts = torch.ones_like(logits.select(axis, 0), dtype=torch.bool)
    mask = tensors.get("mask")
    if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == counts.shape:
        counts = mask.to(logits.device)
        if not counts.any():
            yield warning("mask", "it leaves out every position, so that nothing is learned. True = counts.")
    if not logits.requires_grad:
        yield error(
            "student_logits",
            "it has no graph, so that `backward()` reaches no model. Compute it outside `no_grad()`, without `detach()`.",
        )
    yield from _of_teachers(stack, tensors, axis, counts)
    yield from _of_labels(stack, tensors, axis, counts)
    yield from _of_settings(stack, logits.ndim)


def _dense(x: Tensor) -> bool:
    return x.layout is torch.strided and not x.is_nested


def _of_teachers(stack: LossStack, tensors: Mapping[str, Any], axis: int, counts: Tensor) -> Iterator[Finding]:
    """The student's logits and every teacher's, whatever a stack calls them."""
    logits: Tensor = tensors["student_logits"]
    calls = stack._calls["forward"].values()
    teachers = sorted({call.names["teacher_logits"] for call in calls if "teacher_logits" in call.names})
    for name in ("student_logits", *teachers):
        given = tensors.get(name)
        if not isinstance(given, Tensor) or not given.is_floating_point() or given.shape != logits.shape:
            continue
        yield from _of_scores(name, given.detach().movedim(axis, -1)[counts.to(given.device)].double())
        if name == "student_logits":
            continue
        if equal(logits, given):
            yield warning(
                name,
                "it equals `student_logits`: there is nothing to match. Pass the output of the pre-trained model. (A "
                "student that starts as its teacher's copy moves away from it with the first steps.)",
            )
        elif given.requires_grad:
            yield note(
                name,
                "it carries a graph, which no term uses and which costs memory. Use `FrozenTeacher` or `no_grad()`.",
            )


def _of_scores(name: str, rows: Tensor) -> Iterator[Finding]:
    if bad := int((rows.isnan() | (rows == math.inf)).any(-1).sum()):
        yield error(
            name,
            f"NaN or +inf in {bad} of {len(rows)} rows: the loss is NaN, and `update` leaves those rows out. Look for a "
            "model that has diverged or overflowed.",
        )
    elif len(rows) and sum_to_one(rows):
        yield error(
            name,
            "its rows look like probabilities (not negative, sum 1), and the terms take raw scores: a softmax of "
            "probabilities is nearly uniform. Pass what comes before the softmax, or `probs.log()`.",
        )
    elif len(rows) and sum_to_one(rows.exp()):
        yield note(
            name,
            "its rows look like log-probabilities. That is fine where a softmax follows, which takes the shift out again, "
            "but not with inputs='logits', which sees it.",
        )


def _of_labels(stack: LossStack, tensors: Mapping[str, Any], axis: int, counts: Tensor) -> Iterator[Finding]:
    logits: Tensor = tensors["student_logits"]
    target: Any = tensors.get("target")
    index = tensors.get("index")
    soft = isinstance(target, Tensor) and target.is_floating_point() and target.shape == logits.shape
    of_classes = any(isinstance(term, LABELLED) for term in stack.terms.values())  # others can be of several labels
    if soft and of_classes and not sum_to_one(target.detach().movedim(axis, -1)[counts.to(target.device)]):
        yield error(
            "target",
            "it is floating and so must hold class probabilities, but its rows do not sum to 1. Pass a softmax, or class "
            "indices (int64).",
        )
    if isinstance(index, Tensor) and index.dtype == torch.int64 and index.shape == counts.shape:
        ids = index[counts.to(index.device)]
        if again := ids.numel() - ids.unique().numel():
            yield warning(
                "index",
                f"{again} of {ids.numel()} ids repeat others of the batch, and of equal ids the last one is remembered. Each "
                "sample (each position, where there are several a sample) needs an id of its own, as `IndexedDataset` gives "
                "it. (Sampling with replacement does this too.)",
            )


def _of_settings(stack: LossStack, ndim: int) -> Iterator[Finding]:
    """Terms that look at different axes, or reduce differently."""
    axes, reductions = {}, {}
    terms: Any = stack.terms.items()
    for name, term in terms:
        dim, reduction = getattr(term, "class_dim", ""), getattr(term, "reduction", None)
        if dim is None or isinstance(dim, int):  # in a module of the user's own it may be anything
            axes[name] = (1 if dim is None else dim) % ndim
        elif type(term).__module__.startswith("torch.nn."):
            axes[name] = 1  # where torch's losses have it
        if isinstance(reduction, str):
            reductions[name] = reduction
    if len(set(axes.values())) > 1:
        yield error(
            "criterion",
            f"its terms have their classes on different axes ({_listed(axes)}). Set `class_dim`; torch's losses take axis 1.",
        )
    if len(set(reductions.values())) > 1:
        yield warning(
            "criterion",
            f"its terms reduce differently ({_listed(reductions)}), so that their weights depend on the size of the batch.",
        )


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in values.items())
