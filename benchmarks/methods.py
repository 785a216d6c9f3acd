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

from aikd_losses import (
    AdversarialDistributionLoss,
    AIKDLoss,
    CachedTargets,
    DeterministicKD,
    EMATargets,
    GradientPenalty,
    LabelWeight,
    LinearRamp,
    LossStack,
    MLPDiscriminator,
    ProgressiveKD,
)

Settings = Callable[[int, int, int], dict[str, Any]]  # of AIKDLoss, for so many samples, classes and epochs


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

    def report(self) -> dict[str, float]:
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


class LastBatch(Method):
    """DLB: Shen et al., 2022, https://arxiv.org/abs/2203.16172: half of a batch was in the last one, and keeps to what it was
    predicted to be there."""

    grid = (0.5, 2.0)

    def begin(self, model: nn.Module, data: Any, epochs: int) -> None:
        super().begin(model, data, epochs)
        self.last: tuple[Tensor, Tensor] | None = None
        self.kd = DeterministicKD(temperature=3.0)

    def loss(self, index: Tensor, progress: float) -> Tensor:
        half = len(index) // 2
        new = index[:half] if self.last is None else index[half:]
        old = new if self.last is None else self.last[0]
        logits = self.model(self.data.x[torch.cat([old, new])])
        loss = F.cross_entropy(logits, self.data.y[torch.cat([old, new])])
        if self.last is not None:
            loss = loss + (self.own or 1.0) * self.kd(logits[:half], self.last[1])
        self.last = new, logits[half:].detach()
        return loss


class AverageOfWeights(Method):
    """Match a moving average of one's own weights: Tarvainen and Valpola, 2017, https://arxiv.org/abs/1703.01780."""

    grid = (0.95, 0.995)

    def begin(self, model: nn.Module, data: Any, epochs: int) -> None:
        super().begin(model, data, epochs)
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.kd = DeterministicKD(temperature=1.0)

    def loss(self, index: Tensor, progress: float) -> Tensor:
        x = self.data.x[index]
        logits = self.model(x)
        return 0.5 * F.cross_entropy(logits, self.data.y[index]) + 0.5 * self.kd(logits, self.average(x))

    def after_step(self) -> None:
        with torch.no_grad():
            for kept, new in zip(self.average.parameters(), self.model.parameters(), strict=True):
                kept.lerp_(new, 1 - (self.own or 0.98))
            for kept, new in zip(self.average.buffers(), self.model.buffers(), strict=True):
                kept.copy_(new)


class Stack(Method):
    """Terms of the library. The student's logits are computed once; the pre-trained model's once for the whole run."""

    needs_teacher = True

    def criterion(self, n: int, classes: int) -> LossStack:
        raise NotImplementedError

    def begin(self, model: nn.Module, data: Any, epochs: int) -> None:
        super().begin(model, data, epochs)
        assert self.teacher is not None
        with torch.no_grad():
            self.teacher_logits = self.teacher(data.x)
        self.stack = self.criterion(len(data.y), data.num_classes)
        self.accuracies: list[float] = []

    def loss(self, index: Tensor, progress: float) -> Tensor:
        logits = self.model(self.data.x[index])
        self.tensors = dict(
            student_logits=logits, teacher_logits=self.teacher_logits[index], target=self.data.y[index], index=index
        )
        loss, _ = self.stack(**self.tensors)
        return loss

    def after_step(self) -> None:
        self.stack.update(**self.tensors)

    def after_epoch(self) -> None:
        self.stack.advance_epoch()
        health = self.stack.diagnostics()
        if health:
            self.accuracies.append(float(health["adversarial/accuracy"]))

    def report(self) -> dict[str, Any]:
        return {"discriminator_accuracy": [round(a, 3) for a in self.accuracies]} if self.accuracies else {}


def adversarial(classes: int) -> AdversarialDistributionLoss:
    discriminator = MLPDiscriminator(classes)
    adam = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.9), fused=True)
    return AdversarialDistributionLoss(
        discriminator, objective="wasserstein", penalty=GradientPenalty(10.0), optimizer=adam
    )


class Parts(Stack):
    """Some of the three terms, sharing the weight by halves; `own` is the temperature, alpha or weight of one."""

    terms: tuple[str, ...] = ()
    temperature, alpha, weight = 4.0, 0.8, 1.0

    def criterion(self, n: int, classes: int) -> LossStack:
        terms: dict[str, nn.Module] = {}
        weights: dict[str, float] = {}
        share = 0.5 if "deterministic" in self.terms else 1.0
        if "progressive" in self.terms:
            terms["progressive"] = ProgressiveKD(CachedTargets(n, classes), alpha=LinearRamp(self.alpha, self.epochs))
            weights["progressive"] = share
        else:
            terms["cross_entropy"] = nn.CrossEntropyLoss()
            weights["cross_entropy"] = share
        if "deterministic" in self.terms:
            terms["deterministic"] = DeterministicKD(temperature=self.temperature)
            weights["deterministic"] = 0.5
        if "adversarial" in self.terms:
            terms["adversarial"] = adversarial(classes)
            weights["adversarial"] = self.weight
        return LossStack(terms, weights=weights)


def parts(*terms: str, of: str, values: tuple[float, ...]) -> type[Method]:
    def init(self: Parts, own: float | None = None) -> None:
        self.own = own
        if own is not None:
            setattr(self, of, own)

    return type("Parts", (Parts,), {"terms": terms, "grid": values, "__init__": init})


class Full(Stack):
    """AIKDLoss as it comes, but for the settings given. It has no setting of its own that is tuned."""

    def __init__(self, own: float | None = None, settings: Settings = lambda n, classes, epochs: {}) -> None:
        super().__init__(own)
        self.settings = settings

    def criterion(self, n: int, classes: int) -> LossStack:
        return AIKDLoss(n, classes, self.epochs, **self.settings(n, classes, self.epochs))


class Trusted(Full):
    """By halves, with what the pre-trained model is trusted with, 0..1: twice the gap between its accuracy on what it was
    trained on and on held-out samples with the same kind of labels. The weights of its two terms and alpha are multiplied
    by it."""

    def __init__(self, own: float | None = None) -> None:
        super().__init__(own, self.trusting)

    def trusting(self, n: int, classes: int, epochs: int) -> dict[str, Any]:
        trust = self.trust()
        weights = {"progressive": 1 - 0.5 * trust, "deterministic": 0.5 * trust, "adversarial": trust}
        return dict(alpha=0.8 * trust, weights=weights)

    def trust(self) -> float:
        assert self.teacher is not None
        known, held = (
            float((self.teacher(x).argmax(-1) == y).float().mean())
            for x, y in ((self.data.x, self.data.y), (self.data.validation_x, self.data.validation_y))
        )
        return min(max(2 * (known - held), 0.0), 1.0)


def fixed(**settings: Any) -> Settings:
    return lambda n, classes, epochs: settings


def layers(*hidden: int) -> Settings:
    return lambda n, classes, epochs: dict(discriminator=MLPDiscriminator(classes, hidden=hidden))


def shared(share: float) -> Settings:
    """The labels and the pre-trained model share the weight; one's own predictions come beside the labels."""
    return lambda n, classes, epochs: dict(
        weights={"progressive": LabelWeight(1 - share, LinearRamp(0.8, epochs)), "deterministic": share}
    )


def handing_over(share: float) -> Settings:
    """From `share` to nothing."""

    def weights(n: int, classes: int, epochs: int) -> dict[str, Any]:
        return dict(
            weights={
                "progressive": LinearRamp(1.0, epochs, start=1 - share),
                "deterministic": LinearRamp(0.0, epochs, start=share),
            }
        )

    return weights


def averaged(decay: float) -> Settings:
    return lambda n, classes, epochs: dict(targets=EMATargets(n, classes, decay=decay))


HALVES = {"progressive": 0.5, "deterministic": 0.5}

METHODS: dict[str, Callable[..., Method]] = {
    "ce": Method,
    "ce twice as long": TwiceAsLong,
    "ce stopped early": StoppedEarly,
    "ce scheduled": Scheduled,
    "label smoothing": LabelSmoothing,
    "mixup": Mixup,
    "cs-kd": ClassWise,
    "dlb": LastBatch,
    "ema of weights": AverageOfWeights,
    "deterministic": parts("deterministic", of="temperature", values=(1.0, 2.0)),
    "progressive": parts("progressive", of="alpha", values=(0.6, 0.9)),
    "adversarial": parts("adversarial", of="weight", values=(0.3, 3.0)),
    "det+pro": parts("progressive", "deterministic", of="temperature", values=(1.0, 2.0)),
    "det+adv": parts("deterministic", "adversarial", of="weight", values=(0.3, 3.0)),
    "pro+adv": parts("progressive", "adversarial", of="weight", values=(0.3, 3.0)),
    "full": Full,
    "full halves": functools.partial(Full, settings=fixed(weights=HALVES)),
    "full handing over": functools.partial(Full, settings=handing_over(0.5)),
    "full halves T4": functools.partial(Full, settings=fixed(weights=HALVES, temperature=4.0)),
    "full trusted": Trusted,
}  # type: ignore[assignment]
NOT_OURS = tuple(list(METHODS)[: list(METHODS).index("deterministic")])
FULL = ("full", "full halves", "full handing over", "full halves T4")  # its settings
RIVALS = tuple(
    list(METHODS)[: list(METHODS).index("adversarial")]
)  # cross-entropy and single methods, the terms that others published among them


# One setting of AIKDLoss at a time, the others as they come.
VARIED: dict[str, dict[str, Settings]] = {
    "temperature": {f"{t:g}": fixed(temperature=t) for t in (1.0, 2.0, 4.0, 8.0)},
    "alpha, last value": {f"{a:g}": fixed(alpha=a) for a in (0.0, 0.4, 0.6, 0.8, 0.95)},
    "share of the deterministic term": {
        "0": shared(0.0),
        "1/4": shared(0.25),
        "1/2": shared(0.5),
        "3/4": shared(0.75),
        "halves": fixed(weights=HALVES),
        "1/2 to 0": handing_over(0.5),
        "1 to 0": handing_over(1.0),
    },
    "weight of the adversarial term": {
        f"{w:g}": fixed(weights={"adversarial": w}) for w in (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
    },
    "gradient penalty": {f"{w:g}": fixed(penalty=GradientPenalty(w)) for w in (0.1, 1.0, 10.0, 100.0)},
    "discriminator's learning rate": {f"{lr:g}": fixed(learning_rate=lr) for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)},
    "discriminator's layers": {"16": layers(16), "64, 64": layers(64, 64), "256, 256": layers(256, 256)},
    "objective": {
        name: fixed(objective=name)
        for name in ("wasserstein", "non_saturating", "least_squares", "hinge", "relativistic")
    },
    "store: decay of an average": {f"{d:g}": averaged(d) for d in (0.0, 0.3, 0.6, 0.9)},
}
VARIANTS = {
    f"full, {setting} {value}": functools.partial(Full, settings=settings)
    for setting, values in VARIED.items()
    for value, settings in values.items()
}
EVERY = METHODS | VARIANTS
