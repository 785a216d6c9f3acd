"""`check_setup`: what the terms have learned so far, and who trains what."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._setup_terms import Finding, error, warning
from .adversarial import AdversarialDistributionLoss
from .progressive import ProgressiveKD
from .stack import LossStack
from .targets import _Table
from .teacher import FrozenTeacher

KNOWN = 0.9  # share of a store's rows that the first epoch writes, at least
HEALTHY = 0.1, 0.98  # the discriminator's accuracy


def state(stack: LossStack) -> dict[str, str]:
    """A sentence a term that has a state."""
    found = {}
    for name, term in stack.terms.items():
        if isinstance(term, ProgressiveKD):
            found[name] = (
                f"epoch {int(term.epoch)}, alpha {float(term.alpha):.3g}, {term._rows_seen} rows written in it"
            )
            if isinstance(term.targets, _Table):
                found[name] += f", {int(term.targets.known.sum())} of {term.targets.num_samples} known"
        elif isinstance(term, AdversarialDistributionLoss):
            numbers = ", ".join(f"{what} {float(value):.3g}" for what, value in term.diagnostics().items())
            found[name] = f"last update: {numbers}" if numbers else "no update yet"
    return found


def of_state(stack: LossStack, tensors: Mapping[str, Any], called: set[str], alone: bool) -> Iterator[Finding]:
    terms: Any = stack.terms.items()
    epoch = int(stack.epoch)
    under_way = epoch > 0 or any(isinstance(term, ProgressiveKD) and term._rows_seen for _, term in terms)
    for name, term in terms:
        if isinstance(term, ProgressiveKD):
            if epoch != int(term.epoch) and not alone:
                yield warning(
                    name,
                    f"it is in epoch {int(term.epoch)}, the stack in epoch {epoch}. Call `advance_epoch` on the stack alone.",
                )
            yield from _of_history(name, term, tensors.get("student_logits"))
        elif isinstance(term, AdversarialDistributionLoss):
            yield from _of_discriminator(name, term, under_way)
        if name in called and hasattr(term, "_check_update"):  # refuses what `update` would, and does nothing else
            try:
                term._check_update(**stack._calls["update"][name].pick(tensors))
            except (TypeError, ValueError, IndexError, RuntimeError) as reason:
                yield warning(name, f"its `update` would fail: {reason}")


def _of_history(name: str, term: ProgressiveKD, logits: object) -> Iterator[Finding]:
    store, epoch = term.targets, int(term.epoch)
    if not isinstance(store, _Table):
        return
    size, known = store.num_samples, int(store.known.sum())
    if term._rows_seen > size:
        yield warning(
            name,
            f"`update` has seen {term._rows_seen} rows of a store of {size} since the last `advance_epoch`, for which alpha "
            "waits. Call `advance_epoch()` after each epoch.",
        )
    if known == 0:
        yield _never_updated(name, "nothing is remembered", late=epoch > 0)
    elif epoch and known < KNOWN * size:
        yield warning(
            name,
            f"{known} of {size} rows are known in epoch {epoch}. Is `num_samples` the size of the training set, and is `index` "
            "a sample's id, not its place in the batch?",
        )
    if isinstance(logits, Tensor) and store.known.device != logits.device and not store.pinned:
        yield warning(
            name,
            f"its store is on {store.known.device}, the logits are on {logits.device}: rows travel in every step. Move the "
            f"criterion with `.to({str(logits.device)!r})`.",
        )


def _never_updated(name: str, so: str, late: bool) -> Finding:
    sentence = f"{so}: `update` was not called. Call `update(...)` in every training step."
    return error(name, sentence) if late else warning(name, f"{sentence} (Before the first step that is so.)")


def _of_discriminator(name: str, term: AdversarialDistributionLoss, under_way: bool) -> Iterator[Finding]:
    health = {what: float(value) for what, value in term.diagnostics().items()}
    if not health and term.optimizer is not None and not term.optimizer.state:  # a checkpoint would bring it
        yield _never_updated(name, "its discriminator was never trained", under_way)
    low, high = HEALTHY
    accuracy = health.get("accuracy", math.nan)
    if accuracy > high:
        yield warning(
            name,
            f"its discriminator tells the two sides apart in {accuracy:.1%} of the rows, which leaves the student little to "
            "learn. Lower its learning rate, or give it a penalty. (In the first steps it can be chance.)",
        )
    elif accuracy < low:
        yield warning(
            name,
            f"its discriminator is right in {accuracy:.1%} of the rows: it learns the wrong way round. A higher score must "
            "mean the teacher. (In the first steps it can be chance.)",
        )
    if not math.isfinite(health.get("gradient_norm", 0.0)):
        yield error(name, "its discriminator's gradient is not finite. Start again with a lower learning rate.")


def of_modules(
    stack: LossStack, model: nn.Module | None, teacher: nn.Module | None, optimizer: torch.optim.Optimizer | None
) -> Iterator[Finding]:
    inner = teacher.model if isinstance(teacher, FrozenTeacher) else teacher
    of_teacher, of_model = _parameters(inner), _parameters(model)
    awake = 0 if inner is None else sum(module.training for module in inner.modules())
    if awake:
        yield error(
            "teacher",
            f"it is in train mode ({awake} of its modules), with dropout on and batch norm drifting, where it has them. Use "
            "`FrozenTeacher(model)`, or call `teacher.eval()` after every `train()`.",
        )
    if shared := len(of_teacher.keys() & of_model):
        yield error(
            "teacher",
            f"it shares {shared} parameters with `model`: it moves with the student, or is trained as a part of it. Use "
            "`FrozenTeacher(model)`, which keeps a copy.",
        )
    if model is not None and not model.training and any(term.training for term in stack.terms.values()):
        yield warning("model", "it is in eval mode, the criterion in train mode. Call `model.train()`.")
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if shared := len(of_teacher.keys() & held):
        yield error("optimizer", f"it holds {shared} parameters of the teacher. Build it from `model.parameters()`.")
    wanted = {key for key, p in of_model.items() if p.requires_grad}
    if missing := len(wanted - held):
        yield (error if missing == len(wanted) else warning)(
            "optimizer",
            f"it lacks {missing} of the {len(wanted)} trainable parameters of `model`, which stay as they are.",
        )
    for name, term in stack.terms.items():
        yield from _of_optimizer(name, term, optimizer, held)


def _of_optimizer(name: str, term: Any, optimizer: torch.optim.Optimizer, held: set[int]) -> Iterator[Finding]:
    """What of a term the student's optimizer holds and should not, and the other way round."""
    adversarial = isinstance(term, AdversarialDistributionLoss)
    store = getattr(term, "targets", None)
    rows = _parameters(store if isinstance(store, nn.Module) else None)
    if adversarial and term.optimizer is optimizer:
        yield error("optimizer", f"it is the discriminator's of {name!r}. Pass the student's, which is another one.")
    elif adversarial and (shared := len(held & _parameters(term.discriminator).keys())):
        yield error(
            "optimizer",
            f"it holds {shared} parameters of the discriminator of {name!r}, which the student's loss must not train. Build it "
            "from `model.parameters()`, and give the loss an optimizer of its own.",
        )
    if shared := len(held & rows.keys()):
        yield error(
            "optimizer",
            f"it holds {shared} parameters of the store of {name!r}, which `update` alone writes. Make them plain tensors.",
        )
    own = {key for key, p in _parameters(term).items() if p.requires_grad} - rows.keys()
    if missing := len(own - held):
        yield warning(name, f"the optimizer lacks {missing} of its {len(own)} parameters, which nobody trains.")


def _parameters(module: nn.Module | None) -> dict[int, nn.Parameter]:
    return {} if module is None else {id(p): p for p in module.parameters()}
