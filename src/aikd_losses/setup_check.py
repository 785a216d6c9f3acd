"""Look at one step of training, and say what is set up wrong."""

import math
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from . import _checks
from .adversarial import AdversarialDistributionLoss
from .progressive import ProgressiveKD
from .setup_report import RULES, Finding, SetupReport, TermReport, distributions
from .stack import LossStack
from .targets import CachedTargets, EMATargets
from .teacher import FrozenTeacher

LABELLED = (ProgressiveKD, nn.CrossEntropyLoss)  # whose `target` is of classes
Seen = Iterator[tuple[str, SimpleNamespace]]  # what x is, as RULES call it, and x


def check_setup(
    criterion: nn.Module,
    *,
    model: nn.Module | None = None,
    teacher: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    **tensors: Any,
) -> SetupReport:
    r"""Finds the usual mistakes in the set-up of a criterion, from the tensors of one training step; changes nothing.

    Call it by hand, after some steps and once more after an epoch: it computes every term anew and waits for the device. One
    process of several may call it alone. The table compares gradients with respect to `student_logits`: the norm of a
    weighted term's over that of plain cross-entropy's on the same batch. A ratio far above 1 drowns the labels, one near 0
    does nothing. The adversarial term's grows while its discriminator learns: do not judge its weight by the first steps.

    Args:
        criterion: a `LossStack`, an `AIKDLoss`, or a single term of any kind that a `LossStack` takes.
        model, teacher, optimizer: the student, the pre-trained model, the student's optimizer: looked at, not called.
        tensors: what `criterion` is called with, by name.

    Returns: a `SetupReport`, to be printed; `.ok` says whether there is neither an error nor a warning.

    State: none. (What a term of your own changes in its `forward`, other than its buffers, is not undone.)

    Raises: `TypeError` for arguments of the wrong kind; `ValueError` for tensors on the meta device. What a term raises is a
    finding.

    >>> logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.5]], requires_grad=True)
    >>> report = check_setup(DeterministicKD(), student_logits=logits, teacher_logits=logits.detach().softmax(-1))
    >>> report.ok, [(finding.severity, finding.where) for finding in report.findings]
    (False, [('error', 'teacher_logits')])
    """
    for given, kind in ((model, nn.Module), (teacher, nn.Module), (optimizer, torch.optim.Optimizer)):
        if given is not None and not isinstance(given, kind):
            raise TypeError(
                f"`model`, `teacher` and `optimizer` must be Modules and an Optimizer of torch; got {given!r}."
            )
    cuda = {x.device for x in tensors.values() if isinstance(x, Tensor) and x.is_cuda}
    with torch.random.fork_rng(devices=cuda), torch.inference_mode(False):  # with gradients
        step = _Step(getattr(criterion, "_orig_mod", criterion), tensors)  # torch.compile's; there is no public name
        seen = [*step.of_terms(), *step.of_states(), *step.of_batch(), *step.of_modules(model, teacher, optimizer)]
        findings = [
            Finding(severity, getattr(x, "name", what), " ".join(sentence.split()).format(it=it, **vars(x)))
            for severity in ("error", "warning", "note")
            for what, x in seen
            for (about, how, test), sentence in RULES.items()
            if (about, how) == (what, severity) and (it := test(x))
        ]
    return SetupReport(tuple(step.reports), step.state, tuple(findings))


class _Step:
    """The parts of a training step, as `RULES` wants them."""

    def __init__(self, criterion: Any, given: Mapping[str, Any]) -> None:
        self.alone = not isinstance(criterion, LossStack)
        if self.alone:
            name = type(criterion).__name__
            second_form = isinstance(criterion, ProgressiveKD) and given.get("target") is None
            criterion = LossStack({name: criterion}, inputs={name: {"target": None}} if second_form else None)
        self.stack: Any = criterion
        self.terms: dict[str, Any] = dict(self.stack.terms.items())
        for name, x in {**given, "criterion": self.stack.epoch}.items():
            if isinstance(x, Tensor) and x.is_meta:
                raise ValueError(f"`{name}` must have values, to be looked at; got a tensor on the meta device.")
        self.reports, self.state, self.teachers = list[TermReport](), dict[str, str](), list[Any]()
        self.given, self.tensors, self.rows = given, dict(given), dict[str, Tensor]()
        logits: Any = given.get("student_logits")
        mask: Any = given.get("mask")
        dims = (getattr(term, "class_dim", "") for term in self.terms.values())  # anything, in a user's own module
        try:
            axis = _checks.logits(logits, next((dim for dim in dims if isinstance(dim, int | None)), 1))
            _checks.mask(mask, logits, axis)
        except (TypeError, ValueError, IndexError):  # of which the terms' own calls speak
            return
        self.tensors["student_logits"] = logits.detach().clone().requires_grad_()
        counts = torch.ones(_checks.positions(logits, axis), dtype=torch.bool) if mask is None else mask.cpu()
        self.positions = counts.numel()
        for name, x in given.items():  # what counts, on the CPU: labels and ids, and rows of classes
            if isinstance(x, Tensor) and not x.is_nested and x.layout is torch.strided:
                if x.dtype == torch.int64 and x.shape == counts.shape:
                    self.rows[name] = x.cpu()[counts]
                elif x.is_floating_point() and x.shape == logits.shape:
                    self.rows[name] = x.detach().cpu().movedim(axis, -1)[counts].double()

    def of_terms(self) -> Seen:
        plain = self.cross_entropy()
        for weight, (name, term) in zip(self.stack._weights.tolist(), self.terms.items(), strict=True):
            x = SimpleNamespace(name=name, weight=weight, value=None, gradient=None, ratio=None, cut=False)
            x.refusal = _refusal(self.measure, term, x)
            if plain and plain.gradient and x.gradient is not None:
                x.ratio = x.gradient / plain.gradient
            self.reports.append(TermReport(name, weight, x.value, x.gradient, x.ratio))
            yield "call" if x.refusal else "term", x
            if hasattr(term, "_check_update") and not x.refusal:
                yield "update", SimpleNamespace(name=name, refusal=_refusal(self.check_update, term, name))
        if all(report.value is not None for report in self.reports) and not self.alone:  # which refuses unknown names
            yield "call", SimpleNamespace(name="criterion", refusal=_refusal(_called, self.stack, self.tensors))
        self.reports += [plain] if plain else []

    def cross_entropy(self) -> TermReport | None:
        """Plain cross-entropy over the positions that count, to compare with."""
        logits, target = self.rows.get("student_logits"), self.rows.get("target")
        if logits is None or target is None or (target.is_floating_point() and not distributions(target)):
            return None
        leaf, target = _labelled(logits, target)
        sums = all(getattr(term, "reduction", "sum") == "sum" for term in self.terms.values())
        value = cross_entropy(leaf.requires_grad_(), target, reduction="sum") / (1 if sums else max(1, len(leaf)))
        (slope,) = torch.autograd.grad(value, leaf)
        return TermReport("cross-entropy alone", 1.0, float(value.detach()), float(slope.norm()), 1.0)

    def measure(self, term: Any, x: SimpleNamespace) -> None:
        """A term's value, and its gradient with respect to `student_logits` if it takes them."""
        leaf: Any = self.tensors.get("student_logits")
        picked = self.stack._calls["forward"][x.name].pick(self.tensors)
        _check_range(term, picked)
        value = _called(term, picked)
        if self.rows and any(given is leaf for given in picked.values()):
            slope = torch.autograd.grad(value.mean(), leaf, allow_unused=True)[0] if value.requires_grad else None
            x.cut, x.gradient = slope is None, 0.0 if slope is None else x.weight * float(slope.double().norm())
        x.value = float(value.detach().double().mean())
        self.teachers.append(picked.get("teacher_logits"))

    def check_update(self, term: Any, name: str) -> None:
        term._check_update(**self.stack._calls["update"][name].pick(self.tensors))

    def of_states(self) -> Seen:
        for name, term in self.terms.items():
            if isinstance(term, ProgressiveKD):
                x, store = SimpleNamespace(name=name, epoch=int(term.epoch), seen=term._rows_seen), term.targets
                self.state[name] = f"epoch {x.epoch}, alpha {float(term.alpha):.3g}, {x.seen} rows written in it"
                if isinstance(store, CachedTargets | EMATargets):
                    x.known, x.size = int(store.known.sum()), store.num_samples
                    self.state[name] += f", {x.known} of {x.size} known"
                    yield "store", x
            elif isinstance(term, AdversarialDistributionLoss):
                numbers = {what: float(number) for what, number in term.diagnostics().items()}
                shown = ", ".join(f"{what} {number:.3g}" for what, number in numbers.items())
                self.state[name] = f"last update: {shown}" if shown else "no update yet"
                x = SimpleNamespace(name=name, **{"accuracy": 0.5, "gradient_norm": 0.0, **numbers})
                x.untrained = not (numbers or term.optimizer is None or term.optimizer.state)
                x.without_eps = _without_eps(term.optimizer)
                yield "discriminator", x

    def of_batch(self) -> Seen:
        if not self.rows:
            return
        student, target, index = self.rows["student_logits"], self.rows.get("target"), self.rows.get("index")
        labels, count = target if target is not None and target.ndim == 1 else None, len(student)
        if target is not labels and any(isinstance(term, LABELLED) for term in self.terms.values()):
            yield "target", SimpleNamespace(rows=target)  # to other terms it may be of several labels
        masked = any(hasattr(term, "class_dim") for term in self.terms.values())  # torch's losses look at no mask
        ignored = 0 if labels is None or not masked else int((labels == -100).sum())
        yield "mask", SimpleNamespace(count=count, positions=self.positions, ignored=ignored)
        if index is not None and index.ndim == 1:
            yield "index", SimpleNamespace(count=count, ids=index)
        for name, rows in self.rows.items():
            teacher = any(self.given[name] is given for given in self.teachers)
            if count and rows.ndim == 2 and (teacher or name == "student_logits"):
                x = SimpleNamespace(name=name, rows=rows, count=count, teacher=teacher, student=student)
                x.graph = self.given[name].requires_grad
                x.of_labels = 0.0 if labels is None else math.exp(-cross_entropy(*_labelled(rows, labels)))
                yield "scores", x

    def of_modules(
        self, model: nn.Module | None, teacher: nn.Module | None, optimizer: torch.optim.Optimizer | None
    ) -> Seen:
        terms = self.terms.values()
        inner = teacher.model if isinstance(teacher, FrozenTeacher) else teacher
        held = {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer else set()
        x = SimpleNamespace(parameters=_parameters(inner), student=_parameters(model) | held)
        x.awake = sum(module.training for module in inner.modules()) if inner is not None else 0
        yield "teacher", x
        asleep = model is not None and not model.training and any(term.training for term in terms)
        yield "model", SimpleNamespace(asleep=asleep)
        if optimizer is not None:
            adversaries = (term.discriminator for term in terms if isinstance(term, AdversarialDistributionLoss))
            own = (term for term in terms if not isinstance(term, ProgressiveKD))  # a store's are written by `update`
            wanted = _parameters(model, *own, trainable=True)
            x = SimpleNamespace(held=held, adversary=_parameters(*adversaries), wanted=wanted, count=len(wanted))
            yield "optimizer", x


def _refusal(function: Callable[..., object], *arguments: Any) -> str | None:
    try:
        function(*arguments)
    except Exception as reason:  # whatever a term raises is what was asked for
        return str(reason) or type(reason).__name__
    return None


def _called(module: nn.Module, arguments: Mapping[str, Any]) -> Any:
    """With its buffers left as they are."""
    return functional_call(module, {name: x.clone() for name, x in module.named_buffers()}, (), dict(arguments))


def _check_range(term: nn.Module, given: Mapping[str, Any]) -> None:
    """Of ids and labels, here on the CPU, as a GPU that looks up one out of range takes the process down."""
    cpu = {n: x.cpu() for n in ("index", "partner_index", "target", "mask") if isinstance(x := given.get(n), Tensor)}
    for name, x in cpu.items():
        mask = cpu.get("mask")
        counts = mask if mask is not None and (mask.dtype, mask.shape) == (torch.bool, x.shape) else None
        if isinstance(term, ProgressiveKD) and name in ("index", "partner_index"):
            _checks.sample_index(name, x, tuple(x.shape), getattr(term.targets, "num_samples", None), counts)
        elif isinstance(term, LABELLED) and name == "target" and x.dtype == torch.int64:
            logits = given.get("student_logits", given.get("input"))
            axis = _checks.logits(logits, getattr(term, "class_dim", 1))
            counts = x != term.ignore_index if isinstance(term, nn.CrossEntropyLoss) else counts
            _checks.labels_in_range(x, logits.shape[axis], counts)


def _labelled(rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Without those whose label is no class."""
    if target.is_floating_point():
        return rows, target
    fits = (target >= 0) & (target < rows.shape[-1])
    return rows[fits], target[fits]


def _without_eps(optimizer: torch.optim.Optimizer | None) -> int:
    """How many parameters are of a type that has no number as small as their `eps`; fused steps compute in float32."""
    groups = [g for g in optimizer.param_groups if not g.get("fused")] if optimizer else []
    held = [(p, g["eps"]) for g in groups for p in g["params"] if isinstance(g.get("eps"), float)]
    return sum(not torch.tensor(eps, dtype=p.dtype) for p, eps in held)


def _parameters(*modules: nn.Module | None, trainable: bool = False) -> set[int]:
    every = (p for module in modules if module is not None for p in module.parameters())
    return {id(p) for p in every if p.requires_grad or not trainable}
