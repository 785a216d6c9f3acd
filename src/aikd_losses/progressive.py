"""Match one's own predictions of the previous epoch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from . import _checks, _soft_targets, functional, schedules
from ._carrier import Carrier
from ._soft_targets import Term
from .schedules import Schedule
from .targets import TargetStore, _Table

EPOCHS_BEFORE_WARNING = 4  # rows that may go by between two advance_epoch, in epochs


class ProgressiveKD(Carrier):
    r"""Pulls the student's predictions towards those it made for the same samples an epoch ago.

    With $s$ = `student_logits`, $y$ = `target`, $r$ = the row that `targets` holds for `index`, $T$ = `temperature`
    and $a$ = `alpha`:

    $$L = (1-a)\,\mathrm{CE}(s, y) + a\,T^2\,\mathrm{CE}(s/T, r)$$

    and without `target` the second summand alone. With `target` it **takes the place of** cross-entropy; without, it is
    added to a criterion you have. At T = 1 the first form is the cross-entropy against the blended target
    $(1-a)\,y + a\,r$. A sample without history has $a = 0$.

    Args:
        targets: a `TargetStore`: `CachedTargets`, `EMATargets` or one of your own. Public as `.targets`.
        alpha: share of the soft target, a number in 0..1 or a callable from the epoch (counted from 0) to one, such as
            `LinearRamp(0.8, num_epochs)` (default 0.5).
        temperature: T > 0 (default 1).
        reduction, class_dim: as in `DeterministicKD`.

    Shape: `student_logits`: `(N, C)`, `(N, C, *)` or `(N, *, C)`; `target`: class indices (int64) of that shape without
    the class axis, or probabilities of that shape; `index`: int64, that shape without the class axis, an id a
    position; `mask`: bool, the same. `index=None` (validation): nothing has history. For mixup and cutmix give
    `partner_index`, the ids of the samples blended in, and `mix_lambda`, the share of the samples of `index` (a number,
    or a tensor `(N,)`): the rows are blended as the inputs were. Returns a scalar or, with `"none"`, a value a position.

    State: the epoch (int64) and, if it is an `nn.Module`, the store are in `state_dict()`; `alpha`, a 0-d tensor,
    follows from the epoch. `update` writes the store, `advance_epoch` the epoch; `forward` changes nothing.

    Raises: `ValueError`, `TypeError` or `IndexError` for settings and tensors out of range or of the wrong kind or shape.
    An `index` or `target` out of range is found on the CPU alone; on other devices by PyTorch's device-side assertion.

    >>> loss = ProgressiveKD(CachedTargets(num_samples=8, num_classes=2), alpha=0.5)
    >>> logits, y, index = torch.tensor([[2.0, 0.0]]), torch.tensor([1]), torch.tensor([5])
    >>> loss(logits, y, index=index)                       # no history yet: plain cross-entropy
    tensor(2.1269)
    >>> loss.update(logits, index=index); loss.advance_epoch()
    >>> loss(logits, y, index=index)                       # half of it is now its own prediction
    tensor(1.2461)

    Reference: Kim et al., *Self-Knowledge Distillation with Progressive Refinement of Targets* (PS-KD), 2021,
    https://arxiv.org/abs/2006.12000; as a term of AI-KD: https://arxiv.org/abs/2211.10938.
    """

    _carried: ClassVar[tuple[str, ...]] = ("alpha", "epoch")
    _saved = ("epoch",)
    alpha: Tensor
    epoch: Tensor

    def __init__(
        self,
        targets: TargetStore,
        *,
        alpha: Schedule = 0.5,
        temperature: float = 1.0,
        reduction: str = "mean",
        class_dim: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(targets, type) or not all(
            callable(getattr(targets, name, None)) for name in ("read", "write", "advance_epoch")
        ):
            raise TypeError(
                "`targets` must be a target store, an object with the methods read(index), write(index, probs) and "
                f"advance_epoch(); got {targets!r}."
            )
        self.targets = targets
        self.alpha_schedule = schedules.check("alpha", alpha, 1.0)
        self.temperature = _checks.temperature(temperature)
        self.reduction = _checks.reduction(reduction)
        self.class_dim = _checks.class_dim(class_dim)
        self.epoch = torch.zeros((), dtype=torch.int64, device="cpu")
        self.alpha = torch.zeros((), dtype=torch.float64, device="cpu")
        self._rows_seen = 0  # since the last advance_epoch
        self._warned = False
        self._after_load()

    def _check_load(self, saved: Mapping[str, Tensor]) -> None:
        self._planned_epoch(int(saved["epoch"]))

    def _after_load(self) -> None:
        self.alpha.fill_(schedules.evaluate("alpha", self.alpha_schedule, int(self.epoch), 1.0))

    def forward(
        self,
        student_logits: Tensor,
        target: Tensor | None = None,
        *,
        index: Tensor | None,
        mask: Tensor | None = None,
        partner_index: Tensor | None = None,
        mix_lambda: float | Tensor = 1.0,
    ) -> Tensor:
        """$(1-a)$ CE + $a T^2$ CE against the row, or without `target` the second summand alone."""
        usable = _soft_targets.usable()
        arguments = self._looked_up(student_logits, target, index, mask, partner_index, mix_lambda, usable)
        return functional.progressive(student_logits, *arguments)

    def _soft_term(
        self,
        student_logits: Tensor,
        target: Tensor | None = None,
        *,
        index: Tensor | None,
        mask: Tensor | None = None,
        partner_index: Tensor | None = None,
        mix_lambda: float | Tensor = 1.0,
    ) -> Term | None:
        """`forward` as soft targets that a stack may merge with others, or None."""
        if isinstance(target, Tensor) and target.requires_grad:
            return None
        arguments = self._looked_up(student_logits, target, index, mask, partner_index, mix_lambda, True)
        return functional.progressive_term(student_logits, *arguments)

    def _looked_up(
        self,
        student_logits: Tensor,
        target: Tensor | None,
        index: Tensor | None,
        mask: Tensor | None,
        partner_index: Tensor | None,
        mix_lambda: float | Tensor,
        usable: bool,
    ) -> tuple[Any, ...]:
        """The previous predictions, and whatever else the loss depends on; where soft targets are `usable`, numbers for
        what is known to be one."""
        axis = self._check(student_logits, mask)
        if target is not None and not (
            axis == student_logits.ndim - 1 == 1 and _checks.plain_ids(target, student_logits)
        ):
            _checks.class_target(target, student_logits, axis)
        known: Tensor | None
        if index is None:
            if partner_index is not None:
                raise ValueError("`partner_index` blends the rows of `index`, which must be given too; got index=None.")
            previous, known = self._nothing(student_logits, axis)
        elif partner_index is None:
            previous, known = self._read("index", index, student_logits, axis, mask, usable)
        else:
            previous, known = self._read_blended(student_logits, axis, index, mask, partner_index, mix_lambda, usable)
        if axis != previous.ndim - 1:
            previous = previous.movedim(-1, axis)
        alpha = _soft_targets.number(self.alpha) if usable else self.alpha
        return previous, target, alpha, known, self.temperature, mask, self.reduction, axis

    if TYPE_CHECKING:
        __call__ = forward

    def update(
        self,
        student_logits: Tensor,
        *,
        index: Tensor | None,
        mask: Tensor | None = None,
        partner_index: Tensor | None = None,
    ) -> None:
        """Remember softmax(student_logits / T) for the samples of `index`, to be read in the next epoch.

        Anywhere after the forward call of the same step. Nothing is written for `index=None`, for blended inputs (those
        with a `partner_index`), for masked positions and for rows with NaN or +inf. RuntimeError in eval mode.
        """
        self._planned_update(student_logits, index=index, mask=mask, partner_index=partner_index)()

    def _planned_update(
        self,
        student_logits: Tensor,
        *,
        index: Tensor | None,
        mask: Tensor | None = None,
        partner_index: Tensor | None = None,
    ) -> Callable[[], None]:
        """Everything that can be refused, refused; what is returned does the rest."""
        if not self.training:
            raise RuntimeError(
                "`update` must not be called in eval mode: it would remember predictions of evaluation. Call "
                "`.train()` on the loss, or pass `index=None`."
            )
        axis = self._check(student_logits, mask)
        if index is not None:
            self._check_index("index", index, student_logits, axis, mask)
        if index is None or partner_index is not None:
            return _nothing_to_do
        if isinstance(self.targets, _Table):
            self.targets.check_whole()
            _checks.has_values("student_logits", student_logits, self.targets.known.device)
        return partial(self._remember, student_logits.detach(), axis, index, mask)

    def _check_update(self, *args: Any, **kwargs: Any) -> None:
        self._planned_update(*args, **kwargs)

    @torch.no_grad()
    def _remember(self, student_logits: Tensor, axis: int, index: Tensor, mask: Tensor | None) -> None:
        logits = functional.rows(student_logits, axis, mask)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        probs = torch.softmax(logits, -1)
        probs = probs if probs.ndim == 2 else probs.flatten(0, -2)
        at, keep = _ids(index, mask), None if mask is None else mask.flatten()
        if not (_checks.values_are_free(probs) and math.isfinite(float(probs.sum()))):
            finite = torch.isfinite(probs.sum(-1))  # what has no softmax is NaN
            keep = finite if keep is None else keep & finite
        targets = self.targets
        if not isinstance(targets, _Table):
            targets.write(*((at, probs) if keep is None else (at[keep.to(at.device)], probs[keep])))
        elif type(targets).write is _Table.write:
            targets._put(at, probs, keep)  # these are distributions
        else:
            targets.write(at, probs, keep=keep)
        # How many a mask leaves is not known without waiting for the device.
        self._count(len(at) if mask is None else 1)

    def _count(self, rows: int) -> None:
        self._rows_seen += rows
        size = getattr(self.targets, "num_samples", None)
        if size is not None and self._rows_seen > EPOCHS_BEFORE_WARNING * size and not self._warned:
            self._warned = True
            warnings.warn(
                f"`update` has seen {self._rows_seen} rows of a store of {size} since the last `advance_epoch`. Call "
                "`advance_epoch()` after each epoch: alpha waits for it, and so do other ranks.",
                UserWarning,
                stacklevel=5,
            )

    def advance_epoch(self, epoch: int | None = None) -> None:
        """After each epoch: take the next alpha and let the store exchange its rows between ranks.

        With a number, the epoch that is about to start: does nothing if it is there already. Warns if nothing was
        written since the last call.
        """
        self._advance(epoch, set())

    def _planned_epoch(self, epoch: int | None) -> tuple[int, float]:
        """The epoch that `advance_epoch(epoch)` leads to, and its alpha, or the reason why it is refused."""
        to = int(self.epoch) + 1 if epoch is None else _checks.integer("epoch", epoch, 0)
        return to, schedules.evaluate("alpha", self.alpha_schedule, to, 1.0)

    def _advance(self, epoch: int | None, advanced: set[int]) -> None:
        """`advance_epoch`, but a store in `advanced` is left alone: terms may share one."""
        to, alpha = self._planned_epoch(epoch)
        if epoch is not None and to == int(self.epoch):
            return
        if self._rows_seen == 0:
            warnings.warn(
                "`advance_epoch` was called, but nothing was written since the last time: call "
                "`update(student_logits, index=index)` in every training step.",
                UserWarning,
                stacklevel=3,
            )
        if id(self.targets) not in advanced:
            self.targets.advance_epoch()
            advanced.add(id(self.targets))
        self.epoch.fill_(to)
        self.alpha.fill_(alpha)
        self._rows_seen = 0

    def _check(self, student_logits: Tensor, mask: Tensor | None) -> int:
        if mask is None and self.class_dim is None and _checks.plain(student_logits):
            axis = 1
        else:
            axis = _checks.logits(student_logits, self.class_dim)
            _checks.mask(mask, student_logits, axis)
        classes = getattr(self.targets, "num_classes", student_logits.shape[axis])
        if student_logits.shape[axis] != classes:
            raise ValueError(
                f"`student_logits` must have the {classes} classes of the target store on axis {axis}; got shape "
                f"{tuple(student_logits.shape)}."
            )
        return axis

    def _check_index(self, name: str, index: Tensor, student_logits: Tensor, axis: int, mask: Tensor | None) -> None:
        shape = _checks.positions(student_logits, axis)
        home = self.targets.known.device if isinstance(self.targets, _Table) else None
        _checks.sample_index(name, index, shape, getattr(self.targets, "num_samples", None), mask, home)

    def _nothing(self, student_logits: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        shape = _checks.positions(student_logits, axis)
        previous = student_logits.new_zeros((*shape, student_logits.shape[axis]))
        return previous, torch.zeros(shape, dtype=torch.bool, device=student_logits.device)

    def _read(
        self, name: str, index: Tensor, student_logits: Tensor, axis: int, mask: Tensor | None, usable: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The stored rows, class axis last, and whether they are known (None: all), where the logits are."""
        shape = _checks.positions(student_logits, axis)
        store = self.targets
        if isinstance(store, _Table) and type(store).read is _Table.read:  # whatever a subclass may do when it writes
            home = store.known.device
            if not (
                axis == len(shape) == 1 and home == student_logits.device and _checks.plain_ids(index, student_logits)
            ):
                _checks.sample_index(name, index, shape, None, home=home)
            try:
                probs, known = self._read_ours(_ids(index, mask), usable)
            except IndexError as error:  # an id out of range, which reading finds by itself; this says so in a sentence
                self._check_index(name, index, student_logits, axis, mask)
                raise AssertionError(f"`{name}` is in range") from error  # pragma: no cover
        else:
            self._check_index(name, index, student_logits, axis, mask)
            probs, known = self._read_others(index, mask, student_logits.shape[axis])
        device = student_logits.device
        if probs.device != device:  # a store elsewhere: its rows travel once
            probs, known = probs.to(device), None if known is None else known.to(device)
        if len(shape) == 1:
            return probs, known
        return probs.unflatten(0, shape), None if known is None else known.unflatten(0, shape)

    def _read_ours(self, at: Tensor, usable: bool = True) -> tuple[Tensor, Tensor | None]:
        store: Any = self.targets
        if at.device != store.known.device:
            at = at.to(store.known.device)
        all_known = usable and store.complete  # a compiled step, which cannot look, serves all epochs
        return store._probs(at), None if all_known else store.known.index_select(0, at)

    def _read_others(self, index: Tensor, mask: Tensor | None, num_classes: int) -> tuple[Tensor, Tensor]:
        """From a store of the user's own, which is not asked for what is masked."""
        at, shown = index.flatten(), None
        if mask is not None:
            shown = mask.flatten().to(at.device).nonzero().squeeze(-1)
            at = at[shown]
        probs, known = self.targets.read(at)
        wanted = (len(at), num_classes)
        if tuple(probs.shape) != wanted or tuple(known.shape) != wanted[:1]:
            raise ValueError(
                f"`targets.read` must return rows of shape {wanted} and flags of shape {wanted[:1]}; got "
                f"{tuple(probs.shape)} and {tuple(known.shape)}."
            )
        if shown is None:
            return probs, known
        shown = shown.to(probs.device)
        probs = probs.new_zeros(index.numel(), num_classes).index_copy_(0, shown, probs)
        return probs, known.new_zeros(index.numel()).index_copy_(0, shown.to(known.device), known)

    def _read_blended(
        self,
        student_logits: Tensor,
        axis: int,
        index: Tensor,
        mask: Tensor | None,
        partner_index: Tensor,
        mix_lambda: float | Tensor,
        usable: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """$\\lambda$ row + (1 - $\\lambda$) partner's row, known where both are."""
        first, first_known = self._read("index", index, student_logits, axis, mask, usable)
        second, second_known = self._read("partner_index", partner_index, student_logits, axis, mask, usable)
        _checks.mix_lambda(mix_lambda, (len(index),), first)
        if isinstance(mix_lambda, Tensor):
            share: float | Tensor = mix_lambda.to(first).reshape(-1, *[1] * (first.ndim - 1))
        else:
            share = float(mix_lambda)
        known = None if first_known is None or second_known is None else first_known & second_known  # both or neither
        return share * first + (1 - share) * second, known

    def extra_repr(self) -> str:
        settings = (
            f"epoch={'?' if self.epoch.is_meta else int(self.epoch)}, "
            f"alpha={schedules.shown(self.alpha_schedule, self.alpha)}, temperature={self.temperature}, "
            f"reduction={self.reduction!r}, class_dim={self.class_dim}"
        )
        # A store that is a module shows itself below.
        return settings if isinstance(self.targets, nn.Module) else f"{settings}\ntargets={type(self.targets).__name__}"


def _ids(index: Tensor, mask: Tensor | None) -> Tensor:
    """Flat ids; what stands at masked positions may be none, and becomes 0."""
    return index.flatten() if mask is None else index.to(mask.device).masked_fill(~mask, 0).flatten()


def _nothing_to_do() -> None:
    pass
