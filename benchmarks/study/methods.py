"""The methods that `accuracy.py` compares: what each makes of a batch, for several runs side by side. Those of the library are
built from it.

A loss is the sum over the runs, so that each run has the gradients that it has alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from scores import logits_of
from tasks import BATCH, Data, Linear, augmented
from torch import Tensor, nn

from aikd_losses import AIKDLoss, DeterministicKD, LinearRamp, LossStack

PRO, DET, ADV = "progressive", "deterministic", "adversarial"


class Method:
    """Cross-entropy. The others change what they name."""

    grid: tuple[float, ...] = ()  # values of the setting `own`, beside the one it comes with
    length = 1  # times the budget
    needs_teacher = False

    def __init__(self, own: float | None = None) -> None:
        self.own = own

    def begin(self, model: nn.Module, data: Data, epochs: int, augment: bool, teacher: nn.Module | None) -> None:
        self.model, self.data, self.epochs, self.augment, self.teacher = model, data, epochs, augment, teacher

    def inputs(self, index: Tensor) -> Tensor:
        x = self.data.images(index)
        return augmented(x) if self.augment else x

    def loss(self, index: Tensor) -> Tensor:
        return cross_entropy(self.model(self.inputs(index)), self.data.labels(index))

    def after_step(self) -> None: ...

    def after_epoch(self) -> None: ...


def cross_entropy(logits: Tensor, target: Tensor, **settings: Any) -> Tensor:
    """Summed over the runs, of means over their samples."""
    return len(logits) * F.cross_entropy(logits.flatten(0, 1), target.flatten(), **settings)


class TwiceAsLong(Method):
    """Equal compute: what training a pre-trained model and a student costs."""

    length = 2


class EarlyStopping(Method):
    """Of 20 states along the way, the one that is best on the validation samples, whose labels are as wrong."""

    def begin(self, *args: Any) -> None:
        super().begin(*args)
        self.epoch, self.looks = 0, {math.ceil(self.epochs * i / 20) for i in range(1, 21)}
        self.best = torch.full((len(self.data.y),), -1.0)
        self.kept = {name: x.clone() for name, x in self.model.state_dict().items()}

    def after_epoch(self) -> None:
        self.epoch += 1
        if self.epoch in self.looks:
            guess = logits_of(self.model, self.data.validation_x).argmax(-1)
            right = (guess == self.data.validation_y).float().mean(1)
            better = right > self.best
            self.best[better] = right[better]
            for kept, x in zip(self.kept.values(), self.model.state_dict().values(), strict=True):
                if x.ndim:
                    kept.view(len(better), -1)[better] = x.view(len(better), -1)[better]
        if self.epoch == self.epochs:
            self.model.load_state_dict(self.kept)


class FallingWeight(Method):
    """Cross-entropy times the share that PS-KD leaves the labels: what that schedule does without any previous prediction."""

    def begin(self, *args: Any) -> None:
        super().begin(*args)
        self.share, self.epoch = LinearRamp(0.2, self.epochs, start=1.0), 0

    def loss(self, index: Tensor) -> Tensor:
        return self.share(self.epoch) * super().loss(index)

    def after_epoch(self) -> None:
        self.epoch += 1


class LabelSmoothing(Method):
    """Szegedy et al., 2016, https://arxiv.org/abs/1512.00567."""

    grid = (0.2, 0.4, 0.6)

    def loss(self, index: Tensor) -> Tensor:
        logits = self.model(self.inputs(index))
        return cross_entropy(logits, self.data.labels(index), label_smoothing=self.own or 0.1)


class Mixup(Method):
    """Zhang et al., 2018, https://arxiv.org/abs/1710.09412; `own` is both parameters of the beta distribution."""

    grid = (0.1, 0.5, 1.0)

    def loss(self, index: Tensor) -> Tensor:
        a, order = self.own or 0.2, torch.randperm(index.shape[1])
        share = torch.distributions.Beta(a, a).sample((len(index), 1))  # one a run
        x, y = self.inputs(index), self.data.labels(index)
        of_x = share.view(-1, *[1] * (x.ndim - 1))
        log_q = self.model(of_x * x + (1 - of_x) * x[:, order]).log_softmax(-1)
        first, second = (F.nll_loss(log_q.flatten(0, 1), z.flatten(), reduction="none") for z in (y, y[:, order]))
        return (share * first.view_as(y) + (1 - share) * second.view_as(y)).mean(1).sum()


def another_of_the_class(data: Data) -> Callable[[Tensor], Tensor]:
    """From ids (S, B) to those of random samples with the same label in the same run."""
    by_class = data.y.argsort(dim=1, stable=True)
    counts = F.one_hot(data.y, data.num_classes).sum(1)
    first = counts.cumsum(1) - counts

    def drawn(index: Tensor) -> Tensor:
        y = data.labels(index)
        place = first.gather(1, y) + (torch.rand(index.shape) * counts.gather(1, y)).long()
        return by_class.gather(1, place)

    return drawn


class ClassWise(Method):
    """CS-KD: Yun et al., 2020, https://arxiv.org/abs/2003.13964: match one's prediction for another sample of the class."""

    grid = (0.5, 2.0, 4.0)

    def begin(self, *args: Any) -> None:
        super().begin(*args)
        self.partner, self.kd = another_of_the_class(self.data), DeterministicKD(temperature=4.0, class_dim=-1)

    def loss(self, index: Tensor) -> Tensor:
        logits = self.model(self.inputs(index))
        with torch.no_grad():
            other = self.model(self.inputs(self.partner(index)))
        kd = len(logits) * self.kd(logits, other)
        return cross_entropy(logits, self.data.labels(index)) + (self.own or 1.0) * kd


class Ours(Method):
    """`AIKDLoss`, or some of its terms; labels, previous predictions and pre-trained model share the weight.

    `own` is the setting of AIKDLoss that `own_is` names; `settings` are others.
    """

    def __init__(
        self,
        own: float | None = None,
        *,
        terms: tuple[str, ...] = (PRO, DET, ADV),
        grid: tuple[float, ...] = (),
        own_is: str = "temperature",
        **settings: Any,
    ) -> None:
        super().__init__(own)
        self.terms, self.grid = terms, grid
        self.settings = settings | ({} if own is None else {own_is: own})
        self.needs_teacher = terms != (PRO,)

    def criterion(self, **settings: Any) -> LossStack:
        runs, n = self.data.y.shape
        return AIKDLoss(
            runs * n, self.data.num_classes, self.epochs, class_dim=-1,
            discriminator=Discriminators(runs, BATCH, self.data.num_classes), **settings,
        )  # fmt: skip

    def some_terms(self) -> LossStack:
        full = self.criterion(**self.settings)
        if set(self.terms) == set(full.terms):
            return full
        terms: dict[str, nn.Module] = {name: full.terms[name] for name in self.terms}
        weights = {name: full.weights[name] for name in self.terms}
        labels = PRO if PRO in terms else "cross_entropy"
        terms.setdefault(labels, Flat())
        weights[labels] = 0.5 if DET in terms else 1.0
        return LossStack(terms, weights=weights)

    def begin(self, *args: Any) -> None:
        super().begin(*args)
        self.offset = len(self.data.y[0]) * torch.arange(len(self.data.y))[:, None]
        # Of images that stay as they are the pre-trained model says the same each time.
        self.known = logits_of(self.teacher, self.data.x) if self.teacher is not None and not self.augment else None
        self.stack = self.some_terms()

    def given(self, index: Tensor) -> dict[str, Tensor]:
        x = self.inputs(index)
        given = {"student_logits": self.model(x), "index": index + self.offset}
        if self.known is not None:
            given["teacher_logits"] = self.known[torch.arange(len(index))[:, None], index]
        elif self.teacher is not None:
            with torch.no_grad():
                given["teacher_logits"] = self.teacher(x)
        return given

    def loss(self, index: Tensor) -> Tensor:
        self.tensors = self.given(index)
        return len(index) * self.stack(**self.tensors, target=self.data.labels(index))[0]

    def after_step(self) -> None:
        self.stack.update(**self.tensors)

    def after_epoch(self) -> None:
        self.stack.advance_epoch()


class HandingOver(Ours):
    """The pre-trained model's share falls from a half to nothing, and one's own predictions take its place."""

    def criterion(self, **settings: Any) -> LossStack:
        shares = {PRO: LinearRamp(1.0, self.epochs, start=0.5), DET: LinearRamp(0.0, self.epochs, start=0.5)}
        return super().criterion(weights=shares, **settings)


class WithClassWise(Ours):
    """A stack of one's own: the full method, and CS-KD as one more `DeterministicKD`, whose teacher is another sample."""

    def begin(self, *args: Any) -> None:
        super().begin(*args)
        self.partner = another_of_the_class(self.data)

    def some_terms(self) -> LossStack:
        full = self.criterion(**self.settings)
        return LossStack(
            {**full.terms, "class_wise": DeterministicKD(temperature=4.0, class_dim=-1)},
            weights={**full.weights, "class_wise": 1.0},
            inputs={"class_wise": {"teacher_logits": "partner_logits"}},
        )

    def given(self, index: Tensor) -> dict[str, Tensor]:
        given = super().given(index)
        with torch.no_grad():
            return given | {"partner_logits": self.model(self.inputs(self.partner(index)))}


class Flat(nn.Module):
    """Cross-entropy of all runs together."""

    def forward(self, student_logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(student_logits.flatten(0, 1), target.flatten())


class Discriminators(nn.Module):
    """`MLPDiscriminator` for each run; rows are those of one side or of both, run after run."""

    def __init__(self, runs: int, batch: int, num_classes: int) -> None:
        super().__init__()
        self.shape = (runs, batch, num_classes)
        widths = (num_classes, 64, 64, 1)
        self.layers = nn.ModuleList(Linear(runs, a, b) for a, b in itertools.pairwise(widths))

    def forward(self, rows: Tensor) -> Tensor:
        x = rows.view(-1, *self.shape).transpose(0, 1).flatten(1, 2)  # (runs, sides * batch, classes)
        for i, layer in enumerate(self.layers):
            x = layer(F.leaky_relu(x, 0.2) if i else x)
        return x.view(self.shape[0], -1, self.shape[1]).transpose(0, 1).flatten()


METHODS: dict[str, Callable[..., Method]] = {
    "cross-entropy": Method,
    "twice as long": TwiceAsLong,
    "early stopping": EarlyStopping,
    "label smoothing": LabelSmoothing,
    "mixup": Mixup,
    "CS-KD": ClassWise,
    "deterministic": functools.partial(Ours, terms=(DET,), grid=(0.5, 1.0, 4.0)),
    "PS-KD": functools.partial(Ours, terms=(PRO,), grid=(0.6, 0.9, 1.0), own_is="alpha"),
    "det + PS-KD": functools.partial(Ours, terms=(PRO, DET), grid=(0.5, 1.0, 4.0)),
    "full": Ours,
    "full at T = 1": functools.partial(Ours, temperature=1.0),
    "full handing over": HandingOver,
    "full + CS-KD": WithClassWise,
}
EXPLAINS = {"falling weight": FallingWeight}  # beside the methods, in first_contact.py
