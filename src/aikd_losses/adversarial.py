"""Fool a discriminator that tells the pre-trained model's predictive distribution from the student's."""

from __future__ import annotations

import ctypes
import io
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from . import _checks, _soft_targets, functional
from ._carrier import Carrier
from ._distributed import Ranks
from .discriminators import MLPDiscriminator
from .objectives import OBJECTIVES, AdversarialObjective, Penalty
from .schedules import called

INPUTS = ("probs", "log_probs", "logits")
FUSED = ("cpu", "cuda", "mps", "xpu")  # where torch's optimizers have a fused step


class AdversarialDistributionLoss(Carrier):
    r"""Pulls the distribution of the student's predictions towards that of the teacher's, by way of a discriminator.

    With $x_s$ and $x_t$ what `inputs` says of the student's and the teacher's logits at `temperature`, and $D$ the
    discriminator, whose higher scores say "teacher":

    | `objective` | discriminator minimises the mean of | student minimises the mean of |
    |---|---|---|
    | `"non_saturating"` | softplus(-D(x_t)) + softplus(D(x_s)) | softplus(-D(x_s)) |
    | `"least_squares"` | (D(x_t) - 1)²/2 + D(x_s)²/2 | (D(x_s) - 1)²/2 |
    | `"hinge"` | relu(1 - D(x_t)) + relu(1 + D(x_s)) | -D(x_s) |
    | `"wasserstein"` | D(x_s) - D(x_t) | -D(x_s) |
    | `"relativistic"` | softplus(D(x_s) - D(x_t)) | softplus(D(x_t) - D(x_s)) |

    Calling the module gives the student's loss. The discriminator is trained by `update`, one step a call, if it owns
    an `optimizer`; without one, by your own step on `discriminator_loss`.

    Args:
        discriminator: any `nn.Module` from `(N, C)` to `(N,)` or `(N, 1)` raw scores; with `condition` it is called as
            `discriminator(x, condition)`. It may be shown any number of rows in any order. Public.
        objective: one of the above (default `"non_saturating"`) or an `AdversarialObjective`.
        inputs: what the discriminator sees: `"probs"` (default), `"log_probs"`, or `"logits"` divided by T, which unlike
            the others differ between models that predict the same.
        temperature: T > 0 (default 1). The value is a score and no divergence: there is no factor T**2.
        penalty: None (default), `GradientPenalty(weight)`, `ZeroCenteredPenalty(gamma)`, or a callable
            `(score, teacher_rows, student_rows) -> (N,)`; added to the discriminator's loss.
        optimizer: a torch optimizer that holds exactly the discriminator's parameters. Public.
        reduction, class_dim: as in `DeterministicKD`; `update` always steps on the mean.
        process_group: the ranks that train on different rows (default: all, once there is a group).

    Shape: `student_logits`, `teacher_logits`: `(N, C)`, `(N, C, *)` or `(N, *, C)`, equal; `mask`: bool, that without
    the class axis; `condition`: that without the class axis, and any further axes. Each position is shown to the
    discriminator as a row. Returns a scalar or, with `"none"`, a value a position.

    State: the discriminator and its optimizer (`optimizer_state`, one uint8 tensor) are in `state_dict()`, though not in
    `parameters()`, `buffers()` or `modules()`: a student's optimizer or a wrapper does not find them. `update` alone
    changes them; it may come before the student's `backward()`. `student_loss` leaves no gradient on the discriminator
    and `discriminator_loss` none on the logits. Under `torch.distributed` the first `update` takes rank 0's
    discriminator, and every `update` the gradient of all ranks' rows.

    Raises: `ValueError`, `TypeError` or `IndexError` for settings and tensors out of range or of the wrong kind or shape;
    `RuntimeError` for a second derivative of the student's loss (create_graph=True), but with `reduction="none"`.

    >>> discriminator = MLPDiscriminator(num_classes=3)
    >>> adam = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    >>> loss = AdversarialDistributionLoss(discriminator, penalty=GradientPenalty(10.0), optimizer=adam)
    >>> student_logits, teacher_logits = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3)
    >>> value = loss(student_logits, teacher_logits)                   # to be added to the student's loss
    >>> of_discriminator = loss.update(student_logits, teacher_logits)
    >>> value.shape, of_discriminator.requires_grad
    (torch.Size([]), False)

    Reference: the adversarial term of AI-KD: Kim et al., 2024, https://arxiv.org/abs/2211.10938. Objectives:
    Goodfellow et al., 2014, https://arxiv.org/abs/1406.2661; Mao et al. (least squares), 2017,
    https://arxiv.org/abs/1611.04076; Lim and Ye (hinge), 2017, https://arxiv.org/abs/1705.02894; Arjovsky et al.
    (Wasserstein), 2017, https://arxiv.org/abs/1701.07875; Jolicoeur-Martineau (relativistic, the paired form), 2018,
    https://arxiv.org/abs/1807.00734.
    """

    _carried: ClassVar[tuple[str, ...]] = ("discriminator",)
    _saved = ("discriminator",)
    discriminator: nn.Module

    def __init__(
        self,
        discriminator: nn.Module,
        *,
        objective: str | AdversarialObjective = "non_saturating",
        inputs: str = "probs",
        temperature: float = 1.0,
        penalty: Penalty | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        reduction: str = "mean",
        class_dim: int | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self._ranks = Ranks(process_group)
        if not isinstance(discriminator, nn.Module):
            raise TypeError(f"`discriminator` must be an nn.Module (an instance); got {discriminator!r}.")
        if not isinstance(objective, AdversarialObjective):
            objective = OBJECTIVES[_checks.choice("objective", objective, OBJECTIVES)]
        if penalty is not None and (isinstance(penalty, type) or not callable(penalty)):
            raise TypeError(
                f"`penalty` must be None, GradientPenalty(...), ZeroCenteredPenalty(...) or callable; got {penalty!r}."
            )
        if optimizer is not None:
            _check_optimizer(optimizer, discriminator)
        self.discriminator = discriminator
        self.objective = objective
        self.inputs = _checks.choice("inputs", inputs, INPUTS)
        self.temperature = _checks.temperature(temperature)
        self.penalty = penalty
        self.optimizer = optimizer
        self.reduction = _checks.reduction(reduction)
        self.class_dim = _checks.class_dim(class_dim)
        self._same_on_all_ranks = False
        self._seen_last: _Step | None = None
        self._spoils_slopes = False  # whether the optimizer works on gradients in place, found out by its first step

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        mask: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """The student's loss: how far the discriminator is from taking the student for the teacher."""
        axis, condition = self._check(student_logits, teacher_logits, mask, condition)
        student = self._rows(student_logits, axis, mask)
        teacher = self._rows(teacher_logits.detach(), axis, mask) if self.objective.paired else None
        with _no_autocast(student.device.type):
            if self.reduction != "none" and _soft_targets.usable():
                return _Fooling.apply(student, teacher, condition, mask, self)  # type: ignore[no-untyped-call,no-any-return]
            values = self._student_values(student, teacher, condition, kept=True)
        shape = _checks.positions(student_logits, axis)
        return functional.reduce_positions(values.unflatten(0, shape), mask, self.reduction)

    def _student_values(
        self, student: Tensor, teacher: Tensor | None, condition: Tensor | None, kept: bool = False
    ) -> Tensor:
        """A value a row, by the discriminator as it is; its buffers stay as they are. A graph that is kept does not reach what
        a later step will change."""
        state = _buffers(self.discriminator)
        if kept:
            state.update({name: x.detach().clone() for name, x in self.discriminator.named_parameters()})
        score = partial(self._score, state, condition)
        return self.objective.student(score(student), None if teacher is None else score(teacher))

    if TYPE_CHECKING:
        __call__ = forward

    def student_loss(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        mask: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """What calling the module gives. No gradient reaches the discriminator."""
        return self.forward(student_logits, teacher_logits, mask=mask, condition=condition)

    def discriminator_loss(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        mask: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """What the discriminator minimises, penalty included. No gradient reaches the logits; buffers stay as they are."""
        axis, condition = self._check(student_logits, teacher_logits, mask, condition)
        buffers = _buffers(self.discriminator)
        both = torch.cat([self._rows(x.detach(), axis, mask) for x in (teacher_logits, student_logits)])
        with _no_autocast(both.device.type):
            values = self._discriminator_values(buffers, both, condition, self._both_scores(buffers, both, condition))
        shape = _checks.positions(student_logits, axis)
        return functional.reduce_positions(values.unflatten(0, shape), mask, self.reduction)

    def update(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        mask: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """One step of the discriminator; returns its loss before the step, detached.

        Anywhere after the forward call of the same step. Rows with NaN or +inf on either side are left out. RuntimeError
        in eval mode and without an `optimizer`.
        """
        return self._planned_update(student_logits, teacher_logits, mask=mask, condition=condition)()

    def _planned_update(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        mask: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Callable[[], Tensor]:
        """Everything that can be refused, refused; what is returned does the rest."""
        if not self.training:
            raise RuntimeError(
                "`update` must not be called in eval mode: it would train the discriminator on evaluation data. Call "
                "`.train()` on the loss."
            )
        if self.optimizer is None:
            raise RuntimeError(
                "`update` needs an `optimizer`, given on construction: torch.optim.Adam(discriminator.parameters()). "
                "Without one, step on `discriminator_loss` yourself."
            )
        if not any(p.requires_grad for group in self.optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                "`update` needs a discriminator that can be trained; every parameter of its optimizer has requires_grad=False."
            )
        axis, condition = self._check(student_logits, teacher_logits, mask, condition)
        return partial(
            self._step, self.optimizer, student_logits.detach(), teacher_logits.detach(), axis, mask, condition
        )

    def _check_update(self, *args: Any, **kwargs: Any) -> None:
        self._planned_update(*args, **kwargs)

    def _step(
        self,
        optimizer: torch.optim.Optimizer,
        student_logits: Tensor,
        teacher_logits: Tensor,
        axis: int,
        mask: Tensor | None,
        condition: Tensor | None,
    ) -> Tensor:
        alone = not self._ranks.active()
        if not (alone or self._same_on_all_ranks):
            self._ranks.broadcast_from_first([*self.discriminator.parameters(), *self.discriminator.buffers()])
            self._same_on_all_ranks = True
        both = torch.cat([functional.rows(x, axis, mask).flatten(0, -2) for x in (teacher_logits, student_logits)])
        counts = None if mask is None else mask.flatten()
        if not (_checks.values_are_free(both) and math.isfinite(float(both.sum()))):
            finite = functional.finite_rows(both).unflatten(0, (2, -1)).all(0)
            counts = finite if counts is None else finite & counts
            both = both.masked_fill(~torch.cat([finite, finite]).unsqueeze(-1), 0.0)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        parameters = [p for p in held if p.requires_grad]
        with torch.enable_grad(), _no_autocast(both.device.type):
            shown = self._seen(both)
            scores = self._both_scores({}, shown, condition)
            values = self._discriminator_values({}, shown, condition, scores)
            loss, weights = _reduced(values, counts, "mean" if alone else "sum")
            slopes = torch.autograd.grad(values, parameters, weights, allow_unused=True)
        _forget_gradients(held)  # leaves out what is not ours
        used = [(p, slope) for p, slope in zip(parameters, slopes, strict=True) if slope is not None]
        if not alone:  # sums and counts over ranks, so that the mean is over all rows, however many each rank has
            count = loss.new_tensor(len(values)) if counts is None else counts.sum().to(loss)
            loss, count, *sums = self._ranks.sum([loss, count, *(slope for _, slope in used)])
            count = count.clamp_min(1)
            loss = loss / count
            used = [(p, slope / count.to(slope)) for (p, _), slope in zip(used, sums, strict=True)]
        for parameter, slope in used:
            parameter.grad = slope
        steep: list[Tensor] | None = [slope for _, slope in used]
        if self._spoils_slopes:
            steep = [torch.linalg.vector_norm(slope) for _, slope in used]
        before = [slope._version for _, slope in used]
        optimizer.step()
        if not self._spoils_slopes and before != [slope._version for _, slope in used]:
            self._spoils_slopes, steep = True, None
        _forget_gradients(held)  # zeros would let another optimizer that holds them decay them
        self._seen_last = _Step(loss, scores[0].detach(), scores[1].detach(), counts, steep)
        return loss

    @torch.no_grad()
    def diagnostics(self) -> dict[str, Tensor]:
        """The discriminator's health in the last `update`, to be logged; empty before the first one.

        `discriminator_loss`: what `update` returned. `accuracy`: how often the teacher's row of a sample got the higher
        score (ties count half; of this rank's rows; NaN where there are none). .4 to .8 was seen where it helps; near 1 the
        student gains little, near 0 the discriminator learns the wrong way round. `gradient_norm`: of the step; not finite or
        growing without bound means that it has exploded; left out once, after the first step of an optimizer that changes
        gradients in place. Worked out when asked for: a step that is not logged costs nothing.
        """
        if self._seen_last is None:
            return {}
        loss, of_teacher, of_student, counts, steep = self._seen_last
        lead = of_teacher - of_student
        wins = torch.where(lead.isnan(), lead, 0.5 * (torch.sign(lead) + 1))
        accuracy = functional.reduce_positions(wins, counts, "mean")
        found = {
            "discriminator_loss": loss,
            "accuracy": accuracy if counts is None else torch.where(counts.any(), accuracy, math.nan),
        }
        if steep is not None:
            norms = [torch.linalg.vector_norm(x.float()) for x in steep] or [torch.zeros_like(loss)]
            found["gradient_norm"] = torch.linalg.vector_norm(torch.stack(norms))
        return found

    def _both_scores(self, state: dict[str, Tensor], both: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """The teacher's and the student's, whose rows stand one side below the other and are shown in one call."""
        scores = self._score(state, None if condition is None else torch.cat([condition, condition]), both)
        of_teacher, of_student = scores.unflatten(0, (2, -1)).unbind()
        return of_teacher, of_student

    def _discriminator_values(
        self, state: dict[str, Tensor], both: Tensor, condition: Tensor | None, scores: tuple[Tensor, Tensor]
    ) -> Tensor:
        """A value a row, penalty included."""
        values = self.objective.discriminator(*scores)
        if self.penalty is not None:
            teacher, student = both.unflatten(0, (2, -1)).unbind()
            values = values + self.penalty(partial(self._score, state, condition), teacher, student)
        return values

    def _score(self, state: dict[str, Tensor], condition: Tensor | None, x: Tensor) -> Tensor:
        """Scores `(rows,)`, by a discriminator whose parameters and buffers are those in `state`, where given."""
        parameter = _first_parameter(self.discriminator, x)
        shown = x.to(parameter.dtype)
        arguments = (shown,) if condition is None else (shown, condition)
        scores: Tensor = (
            functional_call(self.discriminator, state, arguments) if state else self.discriminator(*arguments)
        )
        if scores.shape not in ((len(x),), (len(x), 1)):
            raise ValueError(
                f"`discriminator` must return a score a row, shape ({len(x)},) or ({len(x)}, 1) for rows of shape "
                f"{tuple(x.shape)}; got {tuple(scores.shape)}."
            )
        return scores.flatten().to(x.dtype)

    def _rows(self, logits: Tensor, axis: int, mask: Tensor | None) -> Tensor:
        return self._seen(functional.rows(logits, axis, mask))

    def _seen(self, logits: Tensor) -> Tensor:
        """What the discriminator is shown, `(rows, C)`, of logits with the class axis last; in its precision, float32 at
        least."""
        x = logits if logits.ndim == 2 else logits.flatten(0, -2)
        x = x if self.temperature == 1.0 else x / self.temperature
        x = torch.softmax(x, -1) if self.inputs == "probs" else x
        x = torch.log_softmax(x, -1) if self.inputs == "log_probs" else x
        if self.inputs != "probs":
            x = x.masked_fill(x == -math.inf, 0.0)  # an excluded class says nothing
        precision = _first_parameter(self.discriminator, x).dtype
        return x.to(torch.promote_types(precision, torch.float32))

    def _check(
        self, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None, condition: Tensor | None
    ) -> tuple[int, Tensor | None]:
        """The class axis, and the condition as a row a position, without what a mask hides."""
        axis = functional.check_teacher(student_logits, teacher_logits, mask, self.class_dim)
        home = _first_parameter(self.discriminator, student_logits).device
        if home != student_logits.device:
            raise ValueError(
                f"`student_logits` must be on the device of the discriminator, {home}; got {student_logits.device}. Move "
                f"the loss with `.to({str(student_logits.device)!r})`."
            )
        shape = _checks.positions(student_logits, axis)
        if condition is not None:
            condition = _checks.condition(condition, shape, student_logits)
        if isinstance(self.discriminator, MLPDiscriminator):
            self._check_mlp(self.discriminator.num_classes, student_logits, axis, condition)
        if condition is None:
            return axis, None
        if mask is not None:
            condition = condition.masked_fill(~mask.reshape(*shape, *[1] * (condition.ndim - len(shape))), 0)
        return axis, condition.flatten(0, len(shape) - 1)

    @staticmethod
    def _check_mlp(num_classes: int, student_logits: Tensor, axis: int, condition: Tensor | None) -> None:
        """What its own forward would refuse too late for an `update`."""
        if student_logits.shape[axis] != num_classes:
            raise ValueError(
                f"`student_logits` must have the {num_classes} classes of the discriminator on axis {axis}; got shape "
                f"{tuple(student_logits.shape)}."
            )
        if condition is not None:
            raise TypeError(
                "`condition` needs a discriminator that takes one, `forward(x, condition)`; MLPDiscriminator does not."
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = list(self.discriminator.parameters())
        super()._apply(fn, recurse)
        if self.optimizer is not None:
            state = self.optimizer.state_dict()
            now = dict(zip(map(id, before), self.discriminator.parameters(), strict=True))
            for group in self.optimizer.param_groups:  # a move can make new parameters of the old ones
                group["params"] = [now[id(p)] for p in group["params"]]
            for group in state["param_groups"]:
                if group.get("fused") and not all(p.device.type in FUSED for p in now.values()):
                    group["fused"] = False
            self.optimizer.load_state_dict(state)  # which moves it to its parameters
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.optimizer is not None:
            destination[prefix + "optimizer_state"] = _as_bytes(self.optimizer.state_dict())

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        key = prefix + "optimizer_state"
        missing, error_msgs = args[2], args[4]
        if self.optimizer is not None:
            state_dict = dict(state_dict)
            saved = state_dict.pop(key, None)
            if saved is None:
                missing.append(key)
            else:
                try:
                    self.optimizer.load_state_dict(_from_bytes(saved))
                except Exception as error:  # bytes can be anything
                    error_msgs.append(f"`{key}` does not fit the discriminator's optimizer: {error}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        objective = next((name for name, known in OBJECTIVES.items() if known == self.objective), self.objective)
        count = sum(p.numel() for p in self.discriminator.parameters())
        return (
            f"objective={objective!r}, inputs={self.inputs!r}, temperature={self.temperature}, "
            f"reduction={self.reduction!r}, class_dim={self.class_dim}\n"
            f"discriminator={type(self.discriminator).__name__}({self.discriminator.extra_repr()}), {count:,} parameters\n"
            f"penalty={called(self.penalty)}, optimizer={_optimizer_shown(self.optimizer)}"
        )


class _Step(NamedTuple):
    """What `diagnostics` is worked out from."""

    loss: Tensor
    of_teacher: Tensor
    of_student: Tensor
    counts: Tensor | None
    steep: list[Tensor] | None  # the gradient of each parameter, or its norm; None: lost


class _Fooling(torch.autograd.Function):
    """The student's loss with its gradient made at once: no step of the discriminator that comes before the backward pass
    disturbs it, and nothing of the discriminator is copied or kept."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        condition: Tensor | None,
        mask: Tensor | None,
        loss: AdversarialDistributionLoss,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        counts = None if mask is None else mask.flatten()
        with torch.set_grad_enabled(wanted):
            shown = student.detach().requires_grad_(wanted)
            values = loss._student_values(shown, teacher, condition)
            value, weights = _reduced(values, counts, loss.reduction)
            if wanted and values.requires_grad:
                slopes = torch.autograd.grad(values, shown, weights, allow_unused=True, materialize_grads=True)
                ctx.save_for_backward(*slopes)
            elif wanted:  # a discriminator that looks at nothing
                ctx.save_for_backward(torch.zeros_like(shown))
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "`AdversarialDistributionLoss` has no second derivative for the student (create_graph=True). Take that of the "
                "other terms alone."
            )
        return ctx.saved_tensors[0] * grad, None, None, None, None


def _reduced(values: Tensor, counts: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
    """The mean or sum of the values, one a row, of the rows that count, detached, and its gradient."""
    values = values.detach()
    rows = max(1, values.numel()) if reduction == "mean" else 1
    if counts is None:
        weights = torch.full_like(values, 1 / rows)
    elif reduction == "mean":
        weights = counts.to(values.dtype) / counts.sum().clamp_min(1)
    else:
        weights = counts.to(values.dtype)
    return functional.reduce_positions(values, counts, reduction), weights


def _forget_gradients(parameters: Sequence[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all of them."""
    return {name: x.clone() for name, x in module.named_buffers()} if _has_buffers(module) else {}


def _has_buffers(module: nn.Module) -> bool:
    """Without the chain of generators that `module.buffers()` is: it is asked in every step."""
    modules: list[nn.Module | None] = [module]
    for part in modules:  # which grows
        if part is not None:
            if part._buffers:
                return True
            modules.extend(part._modules.values())
    return False


def _first_parameter(module: nn.Module, default: Tensor) -> Tensor:
    """What `next(module.parameters(), default)` gives, without its chain of generators: it is asked for in every step."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    for child in module._modules.values():
        if child is not None and (found := _first_parameter(child, default)) is not default:
            return found
    return default


def _no_autocast(device_type: str) -> AbstractContextManager[None]:
    """Scores, and above all their gradients, need the precision."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _check_optimizer(optimizer: object, discriminator: nn.Module) -> None:
    inner = getattr(optimizer, "optimizer", None) or getattr(optimizer, "_optimizer", None)
    if isinstance(inner, torch.optim.Optimizer):
        raise TypeError(
            f"`optimizer` must be a torch optimizer, not a framework's wrapper around one; got {type(optimizer).__name__}. "
            "Keep the discriminator's optimizer out of the framework and pass it as it is."
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"`optimizer` must be a torch optimizer; got {optimizer!r}.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "`optimizer` must take a step from gradients alone, not call a closure; got LBFGS. Use Adam or SGD."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = {id(p) for p in discriminator.parameters()}
    if held != own:
        raise ValueError(
            f"`optimizer` must hold exactly the discriminator's {len(own)} parameters; {len(held & own)} of them and "
            f"{len(held - own)} others are in it. Build it from `discriminator.parameters()`."
        )


def _optimizer_shown(optimizer: torch.optim.Optimizer | None) -> str:
    """Its kind and its learning rates, as it stands."""
    if optimizer is None:
        return "None"
    rates = sorted({float(group["lr"]) for group in optimizer.param_groups if "lr" in group})
    return f"{type(optimizer).__name__}({', '.join(f'lr={rate:g}' for rate in rates)})"


def _plain(x: Any) -> Any:
    """With numbers of other libraries (NumPy's, say) as Python's own, which is what `weights_only=True` loads."""
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    if type(x) in (list, tuple):
        return type(x)(_plain(value) for value in x)
    if isinstance(x, bool) or not isinstance(x, Real):
        return x
    return int(x) if isinstance(x, Integral) else float(x)


def _as_bytes(state: dict[str, Any]) -> Tensor:
    buffer = io.BytesIO()
    torch.save(_plain(state), buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _from_bytes(state: object) -> dict[str, Any]:
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.layout is not torch.strided:
        raise ValueError("it must be a dense tensor of type uint8.")
    if state.is_meta:
        raise ValueError("it is on the meta device and has no values.")
    state = state.cpu().contiguous()
    buffer = io.BytesIO(ctypes.string_at(state.data_ptr(), state.numel()))
    return dict(torch.load(buffer, map_location="cpu", weights_only=True))
