"""Look at one step of training, and say what is set up wrong."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _checks
from .progressive import ProgressiveKD
from .stack import LossStack

if TYPE_CHECKING:
    from ._setup_terms import Finding, TermReport

SEVERITIES = ("error", "warning", "note")
WIDTH = 100  # of the findings, in characters


@dataclass(frozen=True, repr=False)
class SetupReport:
    """What `check_setup` found: shown, a table of the terms, their state, and the findings, the worst first.

    `terms`: `name`, `weight`, `value`, `gradient` (its norm, weighted) and `ratio` (to cross-entropy's) of each term, and of
    plain cross-entropy where there is a `target`. `state`: a sentence a term. `findings`: `severity` ("error", "warning" or
    "note"), `where`, `message`.
    """

    terms: tuple[TermReport, ...]
    state: Mapping[str, str]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there is neither an error nor a warning."""
        return all(finding.severity == "note" for finding in self.findings)

    def __repr__(self) -> str:
        rows = [("term", "weight", "value", "gradient", "ratio"), *(term.row() for term in self.terms)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        lines += ["", *(f"{name}: {sentence}" for name, sentence in self.state.items())] if self.state else []
        lines += [""]
        for finding in self.findings:
            sentence = f"{finding.severity.upper()} {finding.where}: {finding.message}"
            lines += textwrap.wrap(sentence, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        return "\n".join(lines if self.findings else [*lines, "Nothing wrong was found."])


def check_setup(
    criterion: nn.Module,
    *,
    model: nn.Module | None = None,
    teacher: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    **tensors: Any,
) -> SetupReport:
    r"""Finds the usual mistakes in the set-up of a criterion, from the tensors of one training step; changes nothing.

    Call it by hand, after some steps and once more after an epoch. It computes every term anew and waits for the device, so
    it is not for every step. One process of several may call it alone: nothing is exchanged. `model` and `teacher` are looked
    at, not called. Where `diagnostics()` of a criterion gives numbers to be logged, this gives sentences: what is wrong, why
    it matters, what to do.

    The table compares gradients with respect to `student_logits`: the norm of a weighted term's over that of plain
    cross-entropy's on the same batch. A ratio far above 1 drowns the labels, one near 0 does nothing. The adversarial term's
    grows while its discriminator learns: do not judge its weight by the first steps.

    Args:
        criterion: a `LossStack`, an `AIKDLoss`, or a single term of any kind that a `LossStack` takes.
        model: the student. Is it trained, and apart from the teacher?
        teacher: the pre-trained model. Is it in eval mode?
        optimizer: the student's. Does it hold what it should, and nothing else?
        tensors: what `criterion` is called with, by name.

    Returns: a `SetupReport`, to be printed; `.ok` says whether there is neither an error nor a warning.

    State: none. Gradients, the criterion and the random state stay as they are. (What a term of your own changes in its
    `forward`, other than its buffers, is not undone.)

    Raises: `TypeError` for arguments of the wrong kind; `ValueError` for tensors on the meta device. What the terms raise is
    a finding.

    >>> logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.5]], requires_grad=True)
    >>> report = check_setup(DeterministicKD(), student_logits=logits, teacher_logits=logits.detach().softmax(-1))
    >>> report.ok, [(finding.severity, finding.where) for finding in report.findings]
    (False, [('error', 'teacher_logits')])
    """
    # Here, as most programs import the package without ever asking.
    from ._setup_state import of_modules, of_state, state
    from ._setup_tensors import of_tensors
    from ._setup_terms import measure

    _check_kind("model", model, nn.Module)
    _check_kind("teacher", teacher, nn.Module)
    _check_kind("optimizer", optimizer, torch.optim.Optimizer)
    criterion = getattr(criterion, "_orig_mod", criterion)  # that which torch.compile has wrapped
    stack = _as_stack(criterion, tensors)
    alone = stack is not criterion
    for name, tensor in {**tensors, "criterion": stack.epoch}.items():
        if isinstance(tensor, Tensor):
            _checks.has_values(name, tensor, torch.device("cpu"))
    with _untouched(tensors):
        terms, findings = measure(stack, tensors, alone)
        findings += of_tensors(stack, tensors)
        findings += of_state(stack, tensors, {term.name for term in terms if term.value is not None}, alone)
        findings += of_modules(stack, model, teacher, optimizer)
        findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
        return SetupReport(tuple(terms), state(stack), tuple(findings))


def _check_kind(name: str, value: object, kind: type) -> None:
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"`{name}` must be a torch {kind.__name__}; got {value!r}.")


def _as_stack(criterion: nn.Module, tensors: Mapping[str, Any]) -> LossStack:
    """A single term is a stack of one."""
    if isinstance(criterion, LossStack):
        return criterion
    name = type(criterion).__name__
    second_form = isinstance(criterion, ProgressiveKD) and tensors.get("target") is None
    return LossStack({name: criterion}, inputs={name: {"target": None}} if second_form else None)


@contextmanager
def _untouched(tensors: Mapping[str, Any]) -> Iterator[None]:
    """Gradients can be taken in here, wherever the caller is, and random numbers drawn without a trace."""
    cuda = {x.device for x in tensors.values() if isinstance(x, Tensor) and x.is_cuda}
    with torch.random.fork_rng(devices=cuda), torch.inference_mode(False), torch.enable_grad():
        yield
