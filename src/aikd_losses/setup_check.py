"""Look at one step of training, and say what is set up wrong: the rules, the report, and what the rules look at."""

import copy
import math
import textwrap
from collections.abc import Callable, Iterator
from types import SimpleNamespace as Facts
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import _checks
from ._owned import lost_eps
from ._table import Table
from .adversarial import AdversarialDistributionLoss
from .progressive import ProgressiveKD
from .stack import LossStack
from .teacher import FrozenTeacher


def distributions(rows: Tensor) -> bool:
    return bool((rows >= 0).all() and ((rows.sum(-1) - 1).abs() < 5e-3).all())


# (severity, what x is, test of x): the sentence, in which {it} is what the test gives. The worst first.
RULES: dict[tuple[str, str, Callable[[Any], object]], str] = {
    ("error", "call", lambda x: x.refusal): "its call fails: {it}",
    ("error", "term", lambda x: not math.isfinite(x.value + (x.gradient or 0))): """its value or its gradient is not
        finite. Look for NaN and inf in the logits, and for a class at -inf on one side only.""",
    ("error", "discriminator", lambda x: not math.isfinite(x.gradient_norm)): """its discriminator's gradient is not
        finite. Start again with a lower learning rate.""",
    ("error", "discriminator", lambda x: x.lost_eps): "`eps` is 0 in the type of its weights. Keep them in float32.",
    ("error", "scores", lambda x: int((~(x.rows < math.inf)).any(-1).sum())): """NaN or +inf in {it} of {x.count} rows,
        which `update` leaves out. Look for a model that has diverged or overflowed.""",
    ("error", "scores", lambda x: distributions(x.rows)): "it looks like probabilities. Pass logits, or `probs.log()`.",
    ("error", "scores", lambda x: not (x.teacher or x.graph)): "it has no graph. Leave out `no_grad()` and `detach()`.",
    ("error", "target", lambda x: not distributions(x.rows)): "its rows do not sum to 1. Pass a softmax, or labels.",
    ("error", "teacher", lambda x: x.awake): "{it} of its modules are in train mode. Use `FrozenTeacher`, or `eval()`.",
    ("error", "teacher", lambda x: len(x.shared)): "it shares {it} parameters with the student. Use `FrozenTeacher`.",
    ("error", "optimizer", lambda x: len(x.foreign)): "it holds {it} parameters of a discriminator. Leave them out.",
    ("warning", "term", lambda x: x.weight and x.value and x.gradient == 0): """no gradient reaches `student_logits`.
        Look for a `detach()` in the term.""",
    ("warning", "term", lambda x: 10 < (x.ratio or 0) < math.inf): """its gradient is {x.ratio:.3g} times that of
        cross-entropy: it drowns the labels, unless they are fitted. Lower its weight, or look for reduction='sum'.""",
    ("warning", "term", lambda x: 0 < (x.ratio or 0) < 1e-3): """its gradient is {x.ratio:.3g} times cross-entropy's: it
        does next to nothing. Look again an epoch later (a discriminator has to learn), then raise its weight.""",
    ("warning", "store", lambda x: not x.known): "nothing is remembered yet. Call `update` in every training step.",
    ("warning", "store", lambda x: x.epoch and 0 < x.known < 0.9 * x.size): """{x.known} of {x.size} rows are known in
        epoch {x.epoch}. Is `num_samples` the size of the training set, and `index` a sample's id, not its place in a batch?""",
    ("warning", "store", lambda x: x.seen > x.size): "`update` saw {x.seen} rows of {x.size}: call `advance_epoch()`.",
    ("warning", "discriminator", lambda x: x.untrained): "its discriminator is untrained. Call `update` in every step.",
    ("warning", "discriminator", lambda x: x.accuracy > 0.98): """its discriminator is right in {x.accuracy:.1%} of the
        rows. Lower its learning rate, or give it a penalty. (In the first steps it can be chance.)""",
    ("warning", "discriminator", lambda x: x.accuracy < 0.1): """its discriminator is right in {x.accuracy:.1%} of the
        rows. A higher score must mean the teacher. (In the first steps it can be chance.)""",
    ("warning", "scores", lambda x: x.teacher and torch.equal(x.rows, x.student)): """it equals `student_logits`: there
        is nothing to match. Pass the pre-trained model's. (A student that starts as a copy soon moves away.)""",
    ("warning", "mask", lambda x: x.size and not x.count): "it leaves out every position. True = counts.",
    ("warning", "mask", lambda x: x.ignored): """{it} of the {x.count} positions that count have target -100, no class.
        Is it inverted, or missing? Pass `mask=target != -100`. (Without labels a teacher can still be matched.)""",
    ("warning", "index", lambda x: len(x.ids) - len(x.ids.unique())): """{it} ids repeat others: the last is remembered.
        Each position needs its own, as `IndexedDataset` gives it. (Sampling with replacement does this too.)""",
    ("warning", "optimizer", lambda x: len(x.missing)): "it lacks {it} trainable parameters of the model or the terms.",
    ("note", "scores", lambda x: x.teacher and x.graph): "it has a graph, which costs memory. Use `FrozenTeacher`.",
    ("note", "scores", lambda x: x.teacher and x.entropy < 0.01): "it repeats the labels. Train it for fewer epochs.",
}
Seen = Iterator[tuple[str, str, Any]]  # what x is, where, and x


class Finding(NamedTuple):
    severity: str  # "error": training goes wrong; "warning": it probably does; "note"
    where: str  # a term, a tensor or an argument
    message: str


class TermReport(NamedTuple):
    name: str
    weight: float
    value: float | None = None  # None: it could not be computed
    gradient: float | None = None  # its norm, of the weighted term
    ratio: float | None = None  # to plain cross-entropy's


class SetupReport(NamedTuple):
    """What `check_setup` found. `terms`: `name`, `weight`, `value`, `gradient` (its norm, weighted) and `ratio` (to
    cross-entropy's). `findings`, the worst first: `severity` ("error", "warning", "note"), `where`, `message`. `ok`: neither an
    error nor a warning."""

    terms: tuple[TermReport, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return all(finding.severity == "note" for finding in self.findings)

    def __repr__(self) -> str:
        rows: list[tuple[str, ...]] = [("term", "weight", "value", "gradient", "ratio")]
        rows += [(name, *("-" if x is None else f"{x:.3g}" for x in numbers)) for name, *numbers in self.terms]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        lines += ["" if self.findings else "\nNothing wrong was found."]
        for severity, where, message in self.findings:
            lines += textwrap.wrap(f"{severity.upper()} {where}: {message}", 100, subsequent_indent="  ")
        return "\n".join(lines)


def check_setup(
    criterion: nn.Module,
    *,
    model: nn.Module | None = None,
    teacher: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    **tensors: Any,
) -> SetupReport:
    r"""Finds the usual mistakes in the set-up of a criterion, from the tensors of one training step; changes nothing.

    Call it by hand after some steps, and again after an epoch: it computes every term anew and waits for the device. The table
    compares gradients with respect to `student_logits`: the norm of a weighted term's over that of plain cross-entropy's. A
    ratio far above 1 drowns the labels, one near 0 does nothing. The adversarial term's grows with its discriminator.

    Args:
        criterion: a `LossStack`, an `AIKDLoss`, or a single term of any kind that a `LossStack` takes.
        model, teacher, optimizer: the student, the pre-trained model, the student's optimizer: looked at, not called.
        tensors: what `criterion` is called with, by name.

    What a term raises is a finding, but a GPU that looks up an id or a label out of range ends the process, here as in
    training. What a term of your own changes in its `forward`, other than its buffers, is not undone. Raises `TypeError` for
    arguments of the wrong kind, and for a tensor that no term uses.

    >>> s = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.5]], requires_grad=True)
    >>> report = check_setup(DeterministicKD(), student_logits=s, teacher_logits=s.detach().softmax(-1))
    >>> report.ok, [(finding.severity, finding.where) for finding in report.findings]
    (False, [('error', 'teacher_logits')])
    """
    for given, kind in ((model, nn.Module), (teacher, nn.Module), (optimizer, torch.optim.Optimizer)):
        if given is not None and not isinstance(given, kind):
            raise TypeError(
                f"`model`, `teacher`, `optimizer` must be Modules and an Optimizer; got {_checks.shown(given)}."
            )
    stack: Any = getattr(criterion, "_orig_mod", criterion)  # torch.compile's; there is no public name
    if not isinstance(stack, LossStack):
        name, stack = type(stack).__name__, copy.copy(stack)
        if getattr(stack, "reduction", None) == "none":
            stack.reduction = "mean"
        added = isinstance(stack, ProgressiveKD) and tensors.get("target") is None  # to a criterion that has the target
        stack = LossStack({name: stack}, inputs={name: {"target": None}} if added else None)
    stack._refuse_unknown(tensors)
    cuda = {x.device for x in tensors.values() if isinstance(x, Tensor) and x.is_cuda}
    with torch.random.fork_rng(devices=cuda), torch.inference_mode(False):  # with gradients
        labels, scores = _on_cpu(stack, tensors)
        seen = [*_terms(stack, tensors, labels, scores), *_states(stack, model, teacher, optimizer)]
        seen += _batch(stack, tensors, labels, scores) if scores else []
    findings = []
    for (severity, about, test), sentence in RULES.items():
        for what, where, x in seen:
            if it := what == about and test(x):
                findings.append(Finding(severity, where, " ".join(sentence.split()).format(it=it, x=x)))
    return SetupReport(tuple(x for _, _, x in seen if isinstance(x, TermReport)), tuple(findings))


def _on_cpu(stack: Any, tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the positions that count: labels and ids, `(N,)`; scores and probabilities, `(N, C)`."""
    dims = [term.class_dim for term in stack.terms.values() if isinstance(getattr(term, "class_dim", ""), int | None)]
    try:
        logits, mask = tensors["student_logits"], tensors.get("mask")
        axis = _checks.logits(logits, dims[0] if dims else 1, mask)
        counts = torch.ones(_checks.positions(logits, axis), dtype=torch.bool) if mask is None else mask.cpu()
        given = {name: x.detach() for name, x in tensors.items() if isinstance(x, Tensor)}
        labels = {name: x for name, x in given.items() if x.dtype == torch.int64 and x.shape == counts.shape}
        scores = {name: x for name, x in given.items() if x.is_floating_point() and x.shape == logits.shape}
        rows = {name: x.movedim(axis, -1).cpu()[counts].double() for name, x in scores.items()}
        return {name: x.cpu()[counts] for name, x in labels.items()}, rows
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError):  # of which the terms' own calls speak
        return {}, {}


def _cross_entropy(scores: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Against class probabilities, or labels, of which those that are no class are left out."""
    if target.ndim == 1:
        target = target.masked_fill((target < 0) | (target >= scores.shape[-1]), -100)
    return nn.functional.cross_entropy(scores, target, reduction=reduction)


def _measure(value: Tensor, leaf: Tensor) -> tuple[float, float]:
    """A value, of several their mean, and the norm of its gradient: 0 where none reaches the leaf."""
    (slope,) = torch.autograd.grad(value.mean() + 0 * leaf.sum(), leaf)
    return float(value.detach().double().mean()), float(slope.double().norm())


def _terms(stack: Any, tensors: dict[str, Any], labels: dict[str, Any], scores: dict[str, Any]) -> Seen:
    """Each term, called with copies of its buffers, and plain cross-entropy, a sum where the terms are sums."""
    reductions = [getattr(term, "reduction", None) for term in stack.terms.values()]
    reduction = "sum" if "sum" in reductions and "mean" not in reductions else "mean"
    leaf, plain, target = torch.zeros(()).requires_grad_(), None, labels.get("target", scores.get("target"))
    if scores:
        leaf = tensors["student_logits"].detach().clone().float().requires_grad_()  # half precision would underflow
        tensors = {**tensors, "student_logits": leaf}
    if scores and target is not None and (target.ndim == 1 or distributions(target)):
        rows = scores["student_logits"].clone().requires_grad_()
        plain = TermReport("cross-entropy alone", 1.0, *_measure(_cross_entropy(rows, target, reduction), rows), 1.0)
    for weight, (name, call) in zip(stack._now.tolist(), stack._calls["forward"].items(), strict=True):
        buffers = {key: x.clone() for key, x in stack.terms[name].named_buffers()}
        try:
            value, slope = _measure(functional_call(stack.terms[name], buffers, (), call.pick(tensors)), leaf)
        except Exception as reason:  # whatever a term raises is what was asked for
            yield "call", name, Facts(refusal=str(reason) or type(reason).__name__)
            yield "", "", TermReport(name, weight)
            continue
        gradient = weight * slope if scores and "student_logits" in call.names.values() else None
        ratio = gradient / plain.gradient if gradient is not None and plain and plain.gradient else None
        yield "term", name, TermReport(name, weight, value, gradient, ratio)
    if plain:
        yield "", "", plain


def _batch(stack: Any, tensors: dict[str, Any], labels: dict[str, Any], scores: dict[str, Any]) -> Seen:
    calls, terms, target = stack._calls["forward"].values(), stack.terms.values(), labels.get("target")
    if "target" in scores and any(isinstance(term, ProgressiveKD | nn.CrossEntropyLoss) for term in terms):
        yield "target", "target", Facts(rows=scores["target"])  # to other terms it may be of several labels
    if "index" in labels:
        yield "index", "index", Facts(ids=labels["index"])
    student, masked = scores["student_logits"], any("mask" in call.names for call in calls)
    ignored = (target == -100).sum() if masked and target is not None else 0
    yield "mask", "mask", Facts(size=tensors["student_logits"].numel(), count=len(student), ignored=ignored)
    teachers = [call.names.get("teacher_logits") for call in calls]
    for name, rows in scores.items():
        if len(student) and name in ("student_logits", *teachers):
            x = Facts(rows=rows, count=len(rows), student=student, teacher=name in teachers)
            x.graph = tensors[name].requires_grad
            x.entropy = math.inf if target is None else _cross_entropy(rows, target)
            yield "scores", name, x


def _states(stack: Any, model: Any, teacher: Any, optimizer: Any) -> Seen:
    for name, term in stack.terms.items():
        if isinstance(term, ProgressiveKD) and isinstance(term.targets, Table):
            known, size = term.targets.known.sum(), term.targets.num_samples
            yield "store", name, Facts(known=known, size=size, epoch=term.epoch, seen=term._rows_seen)
        if isinstance(term, AdversarialDistributionLoss):
            adam, last = term.optimizer, term.diagnostics()
            x = Facts(untrained=adam and not (last or adam.state), lost_eps=adam and lost_eps(adam))
            x.accuracy, x.gradient_norm = last.get("accuracy", 0.5), last.get("gradient_norm", 0.0)
            yield "discriminator", name, x
    inner = teacher.model if isinstance(teacher, FrozenTeacher) else teacher
    held = {p for group in optimizer.param_groups for p in group["params"]} if optimizer else set()
    if inner is not None:
        awake = sum(module.training for module in inner.modules())
        yield "teacher", "teacher", Facts(awake=awake, shared=_parameters(inner) & (_parameters(model) | held))
    if optimizer is not None:
        adversaries = [x.discriminator for x in stack.terms.values() if isinstance(x, AdversarialDistributionLoss)]
        own = [x for x in stack.terms.values() if not isinstance(x, ProgressiveKD)]  # whose store `update` writes
        missing = {p for p in _parameters(model, *own) - held if p.requires_grad}
        yield "optimizer", "optimizer", Facts(foreign=_parameters(*adversaries) & held, missing=missing)


def _parameters(*modules: Any) -> set[Tensor]:
    return {p for module in modules if module is not None for p in module.parameters()}
