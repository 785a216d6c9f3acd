"""The methods that `accuracy.py` compares: what each makes of a batch. Those of the library are built from it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from scores import logits_of, percent_right
from torch import Tensor, nn

from aikd_losses import AIKDLoss, DeterministicKD, LinearRamp, LossStack


class Method:
    """Cross-entropy. The others change what they name."""

    grid: tuple[float, ...] = ()  # values of the setting `own`, beside the one it comes with
    length = 1  # times the budget
    needs_teacher = False
    teacher: nn.Module | None = None

    def __init__(self, own: float | None = None) -> None:
        self.own = own

    def begin(self, model: nn.Module, data: Any, epochs: int) -> None:
        self.model, self.data, self.epochs = model, data, epochs

    def loss(self, index: Tensor, progress: float) -> Tensor:
        return F.cross_entropy(self.model(self.data.x[index]), self.data.y[index])

    def after_step(self) -> None: ...

    def after_epoch(self) -> None: ...

    def report(self) -> dict[str, Any]:
        """What is worth keeping beside the metrics."""
        return {}


class TwiceAsLong(Method):
    """Equal compute: what training a pre-trained model and a student costs."""

    length = 2


class StoppedEarly(Method):
    """The weights of the epoch with the best accuracy on the validation samples, which no other method sees while it trains."""

    def begin(self, model: nn.Module, data: Any, epochs: int) -> None:
        super().begin(model, data, epochs)
        self.validation: list[float] = []

    def after_epoch(self) -> None:
        self.validation.append(percent_right(logits_of(self.model, self.data.validation_x), self.data.validation_y))
        if self.validation[-1] > max(self.validation[:-1], default=-1.0):
            self.weights = copy.deepcopy(self.model.state_dict())
        if len(self.validation) == self.epochs:
            self.model.load_state_dict(self.weights)

    def report(self) -> dict[str, Any]:
        return {"stopped": self.validation.index(max(self.validation)) + 1, "epochs": self.epochs}


class Scheduled(Method):
    """The weight of cross-entropy falls: the relative weight decay that a progressive target brings with it."""

    grid = (0.6, 0.9)

    def loss(self, index: Tensor, progress: float) -> Tensor:
        return (1 - (self.own or 0.8) * progress) * super().loss(index, progress)


class LabelSmoothing(Method):
    """Szegedy et al., 2016, https://arxiv.org/abs/1512.00567."""

    grid = (0.05, 0.2, 0.4)

    def loss(self, index: Tensor, progress: float) -> Tensor:
        return F.cross_entropy(self.model(self.data.x[index]), self.data.y[index], label_smoothing=self.own or 0.1)


class Mixup(Method):
    """Zhang et al., 2018, https://arxiv.org/abs/1710.09412; `own` is both parameters of the beta distribution."""

    grid = (0.1, 0.5, 1.0)

    def loss(self, index: Tensor, progress: float) -> Tensor:
        a = self.own or 0.2
        share = float(torch.distributions.Beta(a, a).sample())
        partner = index[torch.randperm(len(index))]
        logits = self.model(share * self.data.x[index] + (1 - share) * self.data.x[partner])
        first, second = (F.cross_entropy(logits, self.data.y[i]) for i in (index, partner))
        return share * first + (1 - share) * second


class ClassWise(Method):
    """CS-KD: Yun et al., 2020, https://arxiv.org/abs/2003.13964: match one's prediction for another sample of the class."""

    grid = (0.5, 2.0)

    def begin(self, model: nn.Module, data: Any, epochs: int) -> None:
        super().begin(model, data, epochs)
        self.of_class = [(data.y == c).nonzero().squeeze(-1) for c in range(data.num_classes)]
        self.kd = DeterministicKD(temperature=4.0)

    def loss(self, index: Tensor, progress: float) -> Tensor:
        y = self.data.y[index]
        partner = torch.stack([self.of_class[c][torch.randint(len(self.of_class[c]), ())] for c in y.tolist()])
        logits = self.model(self.data.x[index])
        with torch.no_grad():
            other = self.model(self.data.x[partner])
        return F.cross_entropy(logits, y) + (self.own or 1.0) * self.kd(logits, other)


class Ours(Method):
    """AIKDLoss as it comes, or some of its terms; labels, previous predictions and pre-trained model share the weight.

    `own` is the setting of AIKDLoss that `of` makes of it.
    """

    def __init__(
        self,
        own: float | None = None,
        *,
        terms: tuple[str, ...],
        grid: tuple[float, ...] = (),
        of: Callable[[float], dict[str, Any]] = lambda own: {},
    ) -> None:
        super().__init__(own)
        self.terms, self.grid, self.of = terms, grid, of
        self.needs_teacher = terms != ("progressive",)

    def criterion(self, n: int, classes: int) -> LossStack:
        full = AIKDLoss(n, classes, self.epochs, **({} if self.own is None else self.of(self.own)))
        if set(self.terms) == set(full.terms):
            return full
        terms: dict[str, nn.Module] = {name: full.terms[name] for name in self.terms}
        weights = {name: full.weights[name] for name in self.terms}
        labels = "progressive" if "progressive" in terms else "cross_entropy"
        terms.setdefault(labels, nn.CrossEntropyLoss())
        weights[labels] = 0.5 if "deterministic" in terms else 1.0
        return LossStack(terms, weights=weights)

    def begin(self, model: nn.Module, data: Any, epochs: int) -> None:
        super().begin(model, data, epochs)
        self.teacher_logits = None if self.teacher is None else logits_of(self.teacher, data.x)
        self.stack = self.criterion(len(data.y), data.num_classes)
        self.accuracies: list[float] = []

    def loss(self, index: Tensor, progress: float) -> Tensor:
        teacher_logits = None if self.teacher_logits is None else self.teacher_logits[index]
        student_logits = self.model(self.data.x[index])
        self.tensors = dict(student_logits=student_logits, teacher_logits=teacher_logits, index=index)
        return self.stack(**self.tensors, target=self.data.y[index])[0]

    def after_step(self) -> None:
        self.stack.update(**self.tensors)

    def after_epoch(self) -> None:
        self.stack.advance_epoch()
        health = self.stack.diagnostics()
        if health:
            self.accuracies.append(float(health["adversarial/accuracy"]))

    def report(self) -> dict[str, Any]:
        return {"discriminator_accuracy": [round(a, 3) for a in self.accuracies]} if self.accuracies else {}


class HandingOver(Ours):
    """The pre-trained model's share falls from a half to nothing, and one's own predictions take its place."""

    def criterion(self, n: int, classes: int) -> LossStack:
        shares = {
            "progressive": LinearRamp(1.0, self.epochs, start=0.5),
            "deterministic": LinearRamp(0.0, self.epochs, start=0.5),
        }
        return AIKDLoss(n, classes, self.epochs, weights=shares)


def temperature(own: float) -> dict[str, Any]:
    return {"temperature": own}


def alpha(own: float) -> dict[str, Any]:
    return {"alpha": own}


def adversarial(own: float) -> dict[str, Any]:
    return {"weights": {"adversarial": own}}


PRO, DET, ADV = "progressive", "deterministic", "adversarial"
METHODS: dict[str, Callable[..., Method]] = {
    "ce": Method,
    "ce twice as long": TwiceAsLong,
    "ce stopped early": StoppedEarly,
    "ce scheduled": Scheduled,
    "label smoothing": LabelSmoothing,
    "mixup": Mixup,
    "cs-kd": ClassWise,
    "deterministic": functools.partial(Ours, terms=(DET,), of=temperature, grid=(1.0, 4.0)),
    "progressive": functools.partial(Ours, terms=(PRO,), of=alpha, grid=(0.6, 0.9)),
    "adversarial": functools.partial(Ours, terms=(ADV,), of=adversarial, grid=(0.3, 3.0)),
    "det+pro": functools.partial(Ours, terms=(PRO, DET), of=temperature, grid=(1.0, 4.0)),
    "det+adv": functools.partial(Ours, terms=(DET, ADV), of=adversarial, grid=(0.3, 3.0)),
    "pro+adv": functools.partial(Ours, terms=(PRO, ADV), of=adversarial, grid=(0.3, 3.0)),
    "full": functools.partial(Ours, terms=(PRO, DET, ADV)),
    "full handing over": functools.partial(HandingOver, terms=(PRO, DET, ADV)),
}
