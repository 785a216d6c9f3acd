"""Match one's own predictions of the previous epoch."""

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import _checks, functional, schedules
from ._divergences import wide
from ._table import Table
from .schedules import Schedule, Scheduled
from .targets import TargetStore

EPOCHS_BEFORE_WARNING = 4  # rows that may go by between two advance_epoch, in epochs
# Why nothing was written:
NEVER = "call `update(student_logits, index=index)` in every training step"
NO_IDS = "`update` had no ids, index=None (the Trainer of transformers drops theirs: remove_unused_columns=False)"
BLENDED = "`update` had blended inputs alone, by their `partner_index`"


class ProgressiveKD(Scheduled):
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
        temperature: T, from 1e-9 to 1e9 (default 1).
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
        if isinstance(targets, type) or not isinstance(targets, TargetStore):
            raise TypeError(
                f"`targets` must be an object with read, write and advance_epoch; got {_checks.shown(targets)}."
            )
        self.targets = targets
        self.alpha_schedule = alpha
        self.temperature = _checks.temperature(temperature)
        self.reduction = _checks.reduction(reduction)
        self.class_dim = _checks.class_dim(class_dim)
        self._start()
        self._rows_seen = 0  # since the last advance_epoch
        self._skipped = NEVER

    def _at(self, epoch: int) -> float:
        return schedules.evaluate("alpha", self.alpha_schedule, epoch, 1.0)

    def _fill(self, saved: Mapping[str, Tensor]) -> None:
        super()._fill(saved)
        self._rows_seen = 1  # perhaps: what was written before it was saved nobody knows

    @property
    def alpha(self) -> Tensor:
        return self._now

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
        axis = self._check(student_logits, mask, index=index, partner_index=partner_index)
        rows = student_logits.detach().movedim(axis, -1)
        previous, known = self._read(index, rows, mask)
        if partner_index is not None:
            if index is None:
                raise ValueError("`partner_index` blends the rows of `index`, which must be given too; got index=None.")
            partners, partner_known = self._read(partner_index, rows, mask)
            share = _checks.share("mix_lambda", mix_lambda, (len(index),), previous)
            share = share.reshape(-1, *[1] * (previous.ndim - 1))
            previous, known = share * previous + (1 - share) * partners, known & partner_known
        return functional.progressive_kd(
            student_logits,
            previous.movedim(-1, axis),
            target,
            alpha=self.alpha,
            known=known,
            temperature=self.temperature,
            mask=mask,
            reduction=self.reduction,
            class_dim=axis,
        )

    if TYPE_CHECKING:
        __call__ = forward

    @torch.no_grad()
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
        if not self.training:
            raise RuntimeError(
                "`update` must not be called in eval mode: it would learn from evaluation. Call `.train()`."
            )
        axis = self._check(student_logits, mask, index=index, partner_index=partner_index)
        if index is None or partner_index is not None:
            self._skipped = NO_IDS if index is None else BLENDED
            return
        (logits,) = wide(functional.visible(student_logits.detach(), axis, mask).flatten(0, -2))
        probs, keep = torch.softmax(logits / self.temperature, -1), functional.finite_rows(logits)
        keep = keep if mask is None else keep & mask.flatten()
        at = index.flatten()
        if isinstance(self.targets, Table):
            if self.targets.inherited and self.epoch == 0:
                warnings.warn(
                    f"{self.targets.path!r} held rows already, and no checkpoint was loaded: in epoch 0 they are the targets, "
                    "whichever run they are of. Give each run and fold a `path` of its own.",
                    stacklevel=3,
                )
            self.targets.inherited = False
            self.targets.write(at, probs, keep=keep)  # which drops rows without waiting for a GPU
        else:
            self.targets.write(at[keep.to(at.device)], probs[keep])
        before, size = self._rows_seen, getattr(self.targets, "num_samples", math.inf)
        self._rows_seen += len(at) if mask is None else 1  # how many a mask leaves, nobody waits to know
        if before <= EPOCHS_BEFORE_WARNING * size < self._rows_seen:
            warnings.warn(
                f"`update` has seen {self._rows_seen} rows of a store of {size} since the last `advance_epoch`. Call "
                "`advance_epoch()` after each epoch: alpha waits for it, and so do other ranks.",
                stacklevel=3,
            )

    def advance_epoch(self, epoch: int | None = None) -> None:
        """After each epoch: take the next alpha and let the store exchange its rows between ranks.

        With a number, the epoch that is about to start: does nothing if it is there already. Warns if nothing was
        written since the last call.
        """
        self._advance(epoch, set())

    def _advance(self, epoch: int | None, advanced: set[int]) -> None:
        """`advance_epoch`, but a store in `advanced` is left alone: terms may share one."""
        to, alpha = self._next(epoch)
        if to == int(self.epoch):
            return
        if self._rows_seen == 0:
            warnings.warn(f"Nothing was written since the last `advance_epoch`: {self._skipped}.", stacklevel=3)
        if id(self.targets) not in advanced:
            self.targets.advance_epoch()
            advanced.add(id(self.targets))
        self._enter(to, alpha)
        self._rows_seen, self._skipped = 0, NEVER

    def _check(self, student_logits: Tensor, mask: Tensor | None, **ids: Tensor | None) -> int:
        """The class axis, of tensors that fit each other and the store."""
        axis = _checks.logits(student_logits, self.class_dim, mask)
        classes = getattr(self.targets, "num_classes", student_logits.shape[axis])
        if student_logits.shape[axis] != classes:
            found = tuple(student_logits.shape)
            raise ValueError(
                f"`student_logits` must have the store's {classes} classes on axis {axis}; got shape {found}."
            )
        shape, size = _checks.positions(student_logits, axis), getattr(self.targets, "num_samples", None)
        for name, index in ids.items():
            if index is not None:
                _checks.sample_index(name, index, shape, size, mask)
        return axis

    def _read(self, index: Tensor | None, rows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stored rows in place of those of the logits, and whether they are known; for None, none is."""
        *shape, classes = rows.shape
        if index is None:
            return torch.zeros_like(rows), rows.new_zeros(shape, dtype=torch.bool)
        # What stands at masked positions may be no id.
        at = index if mask is None else index.masked_fill(~mask.to(index.device), 0)
        probs, known = self.targets.read(at.flatten())
        for what, x, wanted in (("rows", probs, (at.numel(), classes)), ("flags", known, (at.numel(),))):
            _checks.shaped("targets.read", x, wanted, f"must return {what} of shape ")
        return probs.to(rows.device).reshape(rows.shape), known.to(rows.device).reshape(shape)

    def extra_repr(self) -> str:
        settings = f"epoch={schedules.value(self.epoch)}, alpha={schedules.shown(self.alpha_schedule, self.alpha)}, "
        settings += _checks.settings(self, "temperature", "reduction", "class_dim")
        # A store that is a module shows itself below.
        return settings if isinstance(self.targets, nn.Module) else f"{settings}\ntargets={type(self.targets).__name__}"
