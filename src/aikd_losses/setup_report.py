"""All that `check_setup` can find, as a table of rules, and the report that shows it."""

import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


def distributions(rows: Tensor) -> bool:
    return bool((rows >= 0).all() and ((rows.sum(-1) - 1).abs() < 5e-3).all())


NEVER = "`update` was not called. Call `update(...)` in every training step. (Before the first step that is so.)"

# (what x is, severity, test of x): the sentence. {it} is what the test gives, other braces are attributes of x.
RULES: dict[tuple[str, str, Callable[[Any], object]], str] = {
    ("call", "error", lambda x: x.refusal): "its call fails: {it}",
    ("update", "warning", lambda x: x.refusal): "its `update` would fail: {it}",
    ("term", "error", lambda x: not math.isfinite(x.value + (x.gradient or 0))): """its value or its gradient is not
        finite. Look for NaN and inf in the logits, and for a class at -inf on one side only.""",
    ("term", "warning", lambda x: x.cut): "no gradient reaches `student_logits`. Look for a `detach()` in the term.",
    ("term", "warning", lambda x: 10 < (x.ratio or 0) < math.inf): """its gradient is {ratio:.3g} times cross-entropy's:
        it drowns the labels, unless they are fitted already. Lower its weight, or look for reduction='sum'.""",
    ("term", "warning", lambda x: 0 < (x.ratio or 0) < 1e-3): """its gradient is {ratio:.3g} times cross-entropy's: it
        does next to nothing. Look again an epoch later (a discriminator has to learn), then raise its weight.""",
    ("store", "warning", lambda x: not x.known): f"nothing is remembered: {NEVER}",
    ("store", "warning", lambda x: x.epoch and 0 < x.known < 0.9 * x.size): """{known} of {size} rows are known in epoch
        {epoch}. Is `num_samples` the size of the training set, and `index` a sample's id, not its place in the batch?""",
    ("store", "warning", lambda x: x.seen > x.size): """`update` has seen {seen} rows of a store of {size} since the
        last `advance_epoch`, for which alpha waits. Call `advance_epoch()` after each epoch.""",
    ("discriminator", "warning", lambda x: x.untrained): f"its discriminator was never trained: {NEVER}",
    ("discriminator", "warning", lambda x: x.accuracy > 0.98): """its discriminator is right in {accuracy:.1%} of the
        rows: little is left to learn. Lower its learning rate, or give it a penalty. (In the first steps it can be chance.)""",
    ("discriminator", "warning", lambda x: x.accuracy < 0.1): """its discriminator is right in {accuracy:.1%} of the
        rows. A higher score must mean the teacher. (In the first steps it can be chance.)""",
    ("discriminator", "error", lambda x: not math.isfinite(x.gradient_norm)): """its discriminator's gradient is not
        finite. Start again with a lower learning rate.""",
    ("discriminator", "error", lambda x: x.without_eps): """its optimizer's `eps` is 0 in the type of {it} parameters,
        so that a step divides by 0. Keep the discriminator in float32: it may be shown logits of any type.""",
    ("scores", "error", lambda x: int((~(x.rows < math.inf)).any(-1).sum())): """NaN or +inf in {it} of {count} rows:
        the loss is NaN, and `update` leaves those rows out. Look for a model that has diverged or overflowed.""",
    ("scores", "error", lambda x: distributions(x.rows)): """its rows look like probabilities (not negative, sum 1), and
        the terms take raw scores: a softmax of probabilities is nearly uniform. Pass what comes before it, or
        `probs.log()`.""",
    ("scores", "error", lambda x: not (x.teacher or x.graph)): """it has no graph, so that `backward()` reaches no
        model. Compute it outside `no_grad()`, without `detach()`.""",
    ("scores", "warning", lambda x: x.teacher and torch.equal(x.rows, x.student)): """it equals `student_logits`: there
        is nothing to match. Pass the pre-trained model's. (A student that starts as a copy moves away with the first
        steps.)""",
    ("scores", "note", lambda x: x.teacher and x.graph): """it carries a graph, which no term uses and which costs
        memory. Use `FrozenTeacher` or `no_grad()`.""",
    ("scores", "note", lambda x: x.teacher and x.of_labels > 0.99): """it gives the labels of this batch a probability
        of {of_labels:.1%} on average: it repeats them, and has little to add. After fewer epochs or with more weight decay it
        has more.""",
    ("target", "error", lambda x: not distributions(x.rows)): """it is floating and so must hold class probabilities,
        but its rows do not sum to 1. Pass a softmax, or class indices (int64).""",
    ("mask", "warning", lambda x: x.positions and not x.count): "it leaves out every position. True = counts.",
    ("mask", "warning", lambda x: x.ignored): """{it} of the {count} positions that count have target -100, which is no
        class. Is it inverted, or missing? Pass `mask=target != -100`. (Without labels a teacher can still be matched.)""",
    ("index", "warning", lambda x: len(x.ids) - len(x.ids.unique())): """{it} of {count} ids repeat others, and of equal
        ids the last is remembered. Each sample (or position) needs its own, as `IndexedDataset` gives it. (Sampling with
        replacement does this too.)""",
    ("teacher", "error", lambda x: x.awake): """it is in train mode ({it} of its modules), with dropout on and batch
        norm drifting, where it has them. Use `FrozenTeacher(model)`, or call `teacher.eval()` after every `train()`.""",
    ("teacher", "error", lambda x: len(x.parameters & x.student)): """it shares {it} parameters with `model` or its
        optimizer, and so moves with the student. Use `FrozenTeacher(model)`, which keeps a copy.""",
    ("model", "warning", lambda x: x.asleep): "it is in eval mode, the criterion in train mode. Call `model.train()`.",
    ("optimizer", "error", lambda x: len(x.held & x.adversary)): """it holds {it} parameters of a discriminator, which
        the student's loss must not train. Build it from `model.parameters()`.""",
    ("optimizer", "warning", lambda x: len(x.wanted - x.held)): """it lacks {it} of the {count} trainable parameters of
        the model and the criterion's terms, which stay as they are.""",
}


class Finding(NamedTuple):
    """What is wrong, and where: in a term, a tensor or an argument."""

    severity: str  # "error": training goes wrong; "warning": it probably does; "note"
    where: str
    message: str


class TermReport(NamedTuple):
    """A line of the table; None is what could not be computed."""

    name: str
    weight: float
    value: float | None
    gradient: float | None  # its norm, of the weighted term
    ratio: float | None  # to plain cross-entropy's


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
        rows: list[tuple[str, ...]] = [("term", "weight", "value", "gradient", "ratio")]
        rows += [(name, *("-" if x is None else f"{x:.3g}" for x in numbers)) for name, *numbers in self.terms]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        lines += ["", *(f"{name}: {sentence}" for name, sentence in self.state.items())] if self.state else []
        lines += [""] if self.findings else ["", "Nothing wrong was found."]
        for severity, where, message in self.findings:
            line = f"{severity.upper()} {where}: {message}"
            lines += textwrap.wrap(line, 100, subsequent_indent="  ", break_on_hyphens=False)
        return "\n".join(lines)
