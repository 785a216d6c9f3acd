"""What is refused, in which words, and that a refusal changes nothing."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from aikd_losses import (
    AdversarialDistributionLoss,
    AdversarialObjective,
    AIKDLoss,
    CachedTargets,
    DeterministicKD,
    EMATargets,
    FrozenTeacher,
    GradientPenalty,
    IndexedDataset,
    LabelWeight,
    LinearRamp,
    LossStack,
    MLPDiscriminator,
    ProgressiveKD,
    ZeroCenteredPenalty,
)
from aikd_losses.functional import deterministic_kd, progressive_kd, reduce_positions

N, C = 4, 3
NAN, INF = math.nan, math.inf
F8 = torch.float8_e4m3fn


class World:
    """Tensors that fit and objects with some history, for a call that has one thing wrong."""

    def __init__(self) -> None:
        self.s = torch.randn(N, C, requires_grad=True)
        self.t = torch.randn(N, C)
        self.y = torch.arange(N) % C
        self.i = torch.arange(N)
        self.mask = torch.tensor([True, True, False, True])
        self.p = self.t.softmax(-1)
        self.dense = torch.randn(2, C, 5)
        self.kd = DeterministicKD()
        self.method = AIKDLoss(N, C, 4)
        self.progressive = self.method.terms["progressive"]
        self.adversarial = self.method.terms["adversarial"]
        self.store = self.progressive.targets
        self.ema = EMATargets(N, C)
        self.small = CachedTargets(N, C, top_k=1)
        self.all = dict(student_logits=self.s, teacher_logits=self.t, index=self.i, mask=self.mask)
        for _ in range(2):
            self.method.update(**self.all)
            self.ema.write(self.i[:2], self.p[:2])
        self.method.advance_epoch()

    def state(self) -> dict[str, torch.Tensor]:
        state = {
            f"{k}.{name}": x for k in ("method", "ema", "small") for name, x in getattr(self, k).state_dict().items()
        }
        for k, table in (("store", self.store), ("ema", self.ema), ("small", self.small)):
            state[f"{k} writes"] = table._last_write
        return {name: x.clone() for name, x in state.items()}


class Wrapper:
    """As Accelerate's and others' optimizers are: a torch optimizer in an attribute."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


class OtherWrapper:
    def __init__(self, optimizer):
        self._optimizer = optimizer


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


class Scores(nn.Module):
    """A discriminator whose scores have a shape of our choice."""

    def __init__(self, *shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return torch.zeros(self.shape)


class Term(nn.Module):
    def __init__(self, value=None):
        super().__init__()
        self.value = value

    def forward(self, student_logits):
        return self.value


class CatchAll(nn.Module):
    def forward(self, student_logits, **tensors):
        return student_logits.sum()


class Positional(nn.Module):
    def forward(self, *tensors):
        return tensors[0].sum()


class OddStore:
    """Returns rows for one sample less than it was asked for."""

    def read(self, index):
        return torch.zeros(len(index) - 1, C), torch.zeros(len(index), dtype=torch.bool)

    def write(self, index, probs):
        pass

    def advance_epoch(self):
        pass


def adversarial(discriminator=None, **settings):
    return AdversarialDistributionLoss(MLPDiscriminator(C) if discriminator is None else discriminator, **settings)


# Each: what is called, with which error, and its sentence.
SETTINGS = [
    # numbers
    (lambda w: DeterministicKD(temperature=0.0), ValueError, "`temperature` must be a finite number above 0; got 0.0."),
    (lambda w: DeterministicKD(temperature=-1), ValueError, "`temperature` must be a finite number above 0; got -1."),
    (lambda w: DeterministicKD(temperature=NAN), ValueError, "`temperature` must be a finite number above 0; got nan."),
    (lambda w: DeterministicKD(temperature=INF), ValueError, "`temperature` must be a finite number above 0; got inf."),
    (lambda w: DeterministicKD(temperature="4"), TypeError, "`temperature` must be a number; got '4'."),
    (lambda w: DeterministicKD(temperature=True), TypeError, "`temperature` must be a number; got True."),
    (
        lambda w: ProgressiveKD(w.store, temperature=0),
        ValueError,
        "`temperature` must be a finite number above 0; got 0.",
    ),
    (lambda w: adversarial(temperature=0), ValueError, "`temperature` must be a finite number above 0; got 0."),
    (lambda w: AIKDLoss(N, C, 4, temperature=-2), ValueError, "`temperature` must be a finite number above 0; got -2."),
    (lambda w: deterministic_kd(w.s, w.t, temperature=0), ValueError, "`temperature` must be a finite number above 0"),
    (
        lambda w: progressive_kd(w.s, w.p, alpha=0.5, temperature=0),
        ValueError,
        "`temperature` must be a finite number above 0",
    ),
    (
        lambda w: DeterministicKD(temperature=10**400),
        ValueError,
        "`temperature` must be a finite number above 0; got 1",
    ),
    *(
        (
            lambda w, t=t: DeterministicKD(temperature=t),
            ValueError,
            f"`temperature` must be between 1e-18 and 1e18, for float32 to hold its square; got {t!r}.",
        )
        for t in (1e-300, 1e21, 1e300)
    ),
    # divergence, beta
    (
        lambda w: DeterministicKD(divergence="kl"),
        ValueError,
        "`divergence` must be one of 'forward_kl', 'reverse_kl', 'js'; got 'kl'.",
    ),
    (lambda w: DeterministicKD(divergence=None), ValueError, "`divergence` must be one of 'forward_kl'"),
    (lambda w: DeterministicKD(beta=1.5), ValueError, "`beta` must be in the interval [0, 1]; got 1.5."),
    (lambda w: DeterministicKD(beta="half"), TypeError, "`beta` must be a number; got 'half'."),
    (
        lambda w: DeterministicKD(divergence="js", beta=0.0),
        ValueError,
        "`beta` must be inside (0, 1) for 'js', which is 0 for every pair at the ends; got 0. For the limits use "
        "divergence='forward_kl' (beta towards 0) or 'reverse_kl' (beta towards 1).",
    ),
    (lambda w: DeterministicKD(divergence="js", beta=1), ValueError, "`beta` must be inside (0, 1) for 'js'"),
    (
        lambda w: deterministic_kd(w.s, w.t, divergence="js", beta=1),
        ValueError,
        "`beta` must be inside (0, 1) for 'js'",
    ),
    # reduction
    (
        lambda w: DeterministicKD(reduction="batchmean"),
        ValueError,
        "`reduction` must be 'mean', not 'batchmean': here the class axis is always summed, so 'mean' is already the mean over "
        "samples (over positions, where there are several a sample).",
    ),
    (
        lambda w: ProgressiveKD(w.store, reduction="batchmean"),
        ValueError,
        "`reduction` must be 'mean', not 'batchmean'",
    ),
    (lambda w: adversarial(reduction="batchmean"), ValueError, "`reduction` must be 'mean', not 'batchmean'"),
    (
        lambda w: DeterministicKD(reduction="avg"),
        ValueError,
        "`reduction` must be one of 'mean', 'sum', 'none'; got 'avg'.",
    ),
    (
        lambda w: DeterministicKD(reduction=None),
        ValueError,
        "`reduction` must be one of 'mean', 'sum', 'none'; got None.",
    ),
    (lambda w: deterministic_kd(w.s, w.t, reduction="batchmean"), ValueError, "`reduction` must be 'mean'"),
    (lambda w: progressive_kd(w.s, w.p, alpha=0.5, reduction="x"), ValueError, "`reduction` must be one of"),
    (lambda w: reduce_positions(w.s.sum(-1), None, "x"), ValueError, "`reduction` must be one of"),
    (lambda w: DeterministicKD(reduction=np.array([1, 2])), ValueError, "`reduction` must be one of"),
    # class_dim
    (lambda w: DeterministicKD(class_dim="last"), TypeError, "`class_dim` must be an integer; got 'last'."),
    (lambda w: ProgressiveKD(w.store, class_dim=1.0), TypeError, "`class_dim` must be an integer; got 1.0."),
    (lambda w: adversarial(class_dim=True), TypeError, "`class_dim` must be an integer; got True."),
    # ProgressiveKD
    (
        lambda w: ProgressiveKD(CachedTargets),
        TypeError,
        "`targets` must be a target store, an object with the methods read(index), write(index, probs) and "
        "advance_epoch(); got <class 'aikd_losses.targets.CachedTargets'>.",
    ),
    (lambda w: ProgressiveKD(torch.zeros(N, C)), TypeError, "`targets` must be a target store"),
    (lambda w: ProgressiveKD(w.store, alpha=1.1), ValueError, "`alpha` must be in the interval [0, 1]; got 1.1."),
    (lambda w: ProgressiveKD(w.store, alpha=-0.1), ValueError, "`alpha` must be in the interval [0, 1]; got -0.1."),
    (lambda w: ProgressiveKD(w.store, alpha="ramp"), TypeError, "`alpha` must be a number; got 'ramp'."),
    (
        lambda w: ProgressiveKD(w.store, alpha=lambda e: 2.0),
        ValueError,
        "`alpha(0)` must be in the interval [0, 1]; got 2.0.",
    ),
    (lambda w: ProgressiveKD(w.store, alpha=lambda e: None), TypeError, "`alpha(0)` must be a number; got None."),
    (lambda w: LinearRamp(-0.5, 4), ValueError, "`end` must be a finite number not below 0; got -0.5."),
    (lambda w: LinearRamp(0.5, 4, start=-1), ValueError, "`start` must be a finite number not below 0; got -1."),
    (lambda w: LinearRamp(0.5, 0), ValueError, "`num_epochs` must be at least 1; got 0."),
    (lambda w: LinearRamp(0.5, 4)(-1), ValueError, "`epoch` must be at least 0; got -1."),
    (lambda w: LinearRamp(0.5, 4)("1"), TypeError, "`epoch` must be an integer; got '1'."),
    (lambda w: LabelWeight(-1, 0.5), ValueError, "`weight` must be a finite number not below 0; got -1."),
    (lambda w: LabelWeight(0.5, 2.0), ValueError, "`alpha` must be in the interval [0, 1]; got 2.0."),
    (lambda w: LabelWeight(0.5, "ramp"), TypeError, "`alpha` must be a number; got 'ramp'."),
    (
        lambda w: LabelWeight(0.5, LinearRamp(1.0, 2))(1),
        ValueError,
        "`LabelWeight` needs an alpha below 1; it is 1 in epoch 1. Without labels, give the progressive term a weight of its "
        "own (of AIKDLoss: `weights={'progressive': 1.0}`).",
    ),
    (lambda w: LinearRamp(0.5, 2.5), TypeError, "`num_epochs` must be an integer; got 2.5."),
    # stores
    (lambda w: CachedTargets(0, C), ValueError, "`num_samples` must be at least 1; got 0."),
    (lambda w: CachedTargets(4.0, C), TypeError, "`num_samples` must be an integer; got 4.0."),
    (lambda w: CachedTargets(N, 1), ValueError, "`num_classes` must be at least 2; got 1."),
    (lambda w: EMATargets(N, "ten"), TypeError, "`num_classes` must be an integer; got 'ten'."),
    (
        lambda w: CachedTargets(N, C, dtype=torch.int8),
        ValueError,
        "`dtype` must be one of torch.float16, torch.bfloat16, torch.float32, torch.float64; got torch.int8.",
    ),
    (lambda w: EMATargets(N, C, dtype="float16"), ValueError, "`dtype` must be one of torch.float16"),
    (lambda w: CachedTargets(N, C, dtype=np.array([1, 2])), ValueError, "`dtype` must be one of"),
    (lambda w: CachedTargets(2**70, C), ValueError, "`num_samples` must be an integer of 64 bits; got"),
    (
        lambda w: CachedTargets(N, C, device="gpu"),
        ValueError,
        "`device` must be a torch.device or the name of one, such as 'cpu'; got 'gpu'.",
    ),
    (lambda w: CachedTargets(N, C, path=3), TypeError, "`path` must be a str or os.PathLike; got 3."),
    (lambda w: CachedTargets(N, C, path=b"x"), TypeError, "`path` must be a str or os.PathLike; got b'x'."),
    (lambda w: CachedTargets(N, C, top_k=0), ValueError, "`top_k` must be between 1 and 3; got 0."),
    (lambda w: CachedTargets(N, C, top_k=4), ValueError, "`top_k` must be between 1 and 3; got 4."),
    (lambda w: CachedTargets(N, C, top_k=1.5), TypeError, "`top_k` must be an integer; got 1.5."),
    (lambda w: EMATargets(N, C, decay=1.01), ValueError, "`decay` must be in the interval [0, 1]; got 1.01."),
    (lambda w: EMATargets(N, C, decay=None), TypeError, "`decay` must be a number; got None."),
    (
        lambda w: CachedTargets(N, C, device="meta", path="nowhere.bin"),
        ValueError,
        "`device` must be the CPU for a store in a file (`path`); got meta.",
    ),
    *(
        (
            build,
            TypeError,
            "`process_group` must be None or a torch.distributed.ProcessGroup that this process belongs to (of a DeviceMesh: "
            "`mesh.get_group('dp')`); got 'dp'.",
        )
        for build in (
            lambda w: CachedTargets(N, C, process_group="dp"),
            lambda w: EMATargets(N, C, process_group="dp"),
            lambda w: adversarial(process_group="dp"),
            lambda w: AIKDLoss(N, C, 4, process_group="dp"),
        )
    ),
    # the adversarial term
    (lambda w: AdversarialDistributionLoss(torch.sum), TypeError, "`discriminator` must be an nn.Module (an instance)"),
    (
        lambda w: AdversarialDistributionLoss(MLPDiscriminator),
        TypeError,
        "`discriminator` must be an nn.Module (an instance)",
    ),
    (
        lambda w: AIKDLoss(N, C, 4, discriminator=torch.sum),
        TypeError,
        "`discriminator` must be an nn.Module (an instance)",
    ),
    (
        lambda w: adversarial(objective="gan"),
        ValueError,
        "`objective` must be one of 'non_saturating', 'least_squares', 'hinge', 'wasserstein', 'relativistic'; got 'gan'.",
    ),
    (
        lambda w: adversarial(inputs="prob"),
        ValueError,
        "`inputs` must be one of 'probs', 'log_probs', 'logits'; got 'prob'.",
    ),
    (
        lambda w: adversarial(penalty=10.0),
        TypeError,
        "`penalty` must be None, GradientPenalty(...), ZeroCenteredPenalty(...) or callable; got 10.0.",
    ),
    (lambda w: adversarial(penalty=GradientPenalty), TypeError, "`penalty` must be None, GradientPenalty(...)"),
    (lambda w: GradientPenalty(-1), ValueError, "`weight` must be a finite number not below 0; got -1."),
    (lambda w: GradientPenalty("10"), TypeError, "`weight` must be a number; got '10'."),
    (lambda w: ZeroCenteredPenalty(NAN), ValueError, "`gamma` must be a finite number not below 0; got nan."),
    (lambda w: AdversarialObjective("a", len), TypeError, "`discriminator` must be a function of scores; got 'a'."),
    (lambda w: AdversarialObjective(len, None), TypeError, "`student` must be a function of scores; got None."),
    (lambda w: AdversarialObjective(len, len, paired=1), TypeError, "`paired` must be True or False; got 1."),
    (
        lambda w: adversarial(optimizer=Wrapper(torch.optim.SGD([w.s], lr=1.0))),
        TypeError,
        "`optimizer` must be a torch optimizer, not a framework's wrapper around one; got Wrapper. Keep the discriminator's "
        "optimizer out of the framework and pass it as it is.",
    ),
    (
        lambda w: adversarial(optimizer=OtherWrapper(torch.optim.SGD([w.s], lr=1.0))),
        TypeError,
        "`optimizer` must be a torch optimizer, not a framework's wrapper around one; got OtherWrapper. Keep the"
        " discriminator's optimizer out of the framework and pass it as it is.",
    ),
    (
        lambda w: adversarial(optimizer=torch.optim.LBFGS([w.s])),
        TypeError,
        "`optimizer` must take a step from gradients alone, not call a closure; got LBFGS. Use Adam or SGD.",
    ),
    (lambda w: adversarial(optimizer="adam"), TypeError, "`optimizer` must be a torch optimizer; got 'adam'."),
    (
        lambda w: adversarial(optimizer=torch.optim.SGD([w.s], lr=1.0)),
        ValueError,
        "`optimizer` must hold exactly the discriminator's 6 parameters; 0 of them and 1 others are in it. Build it from "
        "`discriminator.parameters()`.",
    ),
    (
        lambda w: adversarial(
            w.adversarial.discriminator,
            optimizer=torch.optim.SGD([*w.adversarial.discriminator.parameters()][1:], lr=1.0),
        ),
        ValueError,
        "`optimizer` must hold exactly the discriminator's 6 parameters; 5 of them and 0 others are in it. Build it from "
        "`discriminator.parameters()`.",
    ),
    # discriminators, the teacher, ids
    (lambda w: MLPDiscriminator(1), ValueError, "`num_classes` must be at least 2; got 1."),
    (
        lambda w: MLPDiscriminator(C, hidden=64),
        TypeError,
        "`hidden` must be a sequence of widths, such as (64, 64); got 64.",
    ),
    (lambda w: MLPDiscriminator(C, hidden=(8, 0)), ValueError, "`hidden` must be at least 1; got 0."),
    (lambda w: MLPDiscriminator(C, spectral_norm=1), TypeError, "`spectral_norm` must be True or False; got 1."),
    (
        lambda w: MLPDiscriminator(C, negative_slope=2.0),
        ValueError,
        "`negative_slope` must be in the interval [0, 1]; got 2.0.",
    ),
    (lambda w: FrozenTeacher(lambda x: x), TypeError, "`model` must be an nn.Module (an instance)"),
    (
        lambda w: FrozenTeacher(nn.Linear(2, 3).state_dict()),
        TypeError,
        "`model` must be an nn.Module (an instance); got a OrderedDict; load it into a model.",
    ),
    (
        lambda w: FrozenTeacher(nn.DataParallel(nn.Linear(2, 2))),
        TypeError,
        "`model` must not be wrapped; got DataParallel. Pass `model.module`.",
    ),
    (lambda w: FrozenTeacher(nn.Linear(2, 2), copy=0), TypeError, "`copy` must be True or False; got 0."),
    (lambda w: FrozenTeacher(nn.Linear(2, 2), save="yes"), TypeError, "`save` must be True or False; got 'yes'."),
    (
        lambda w: IndexedDataset(Stream()),
        TypeError,
        "`dataset` must be map-style: a stream has no sample ids. For streams, use an EMA of the weights as the "
        "progressive teacher (docs/guide.md).",
    ),
    (lambda w: IndexedDataset(iter([1])), TypeError, "`dataset` must have __getitem__ and __len__; got list_iterator."),
    (
        lambda w: IndexedDataset(DataLoader([1, 2])),
        TypeError,
        "`dataset` must have __getitem__ and __len__; got DataLoader. Index the data set, then load it.",
    ),
    (lambda w: IndexedDataset({1, 2}), TypeError, "`dataset` must have __getitem__ and __len__; got set."),
    (
        lambda w: IndexedDataset([{"index": 7}])[0],
        ValueError,
        'The data set\'s items have a key "index" already. Rename it before indexing.',
    ),
    (lambda w: IndexedDataset([1, 2])["0"], TypeError, "`index` must be an integer; got '0'."),
    (lambda w: IndexedDataset([1, 2])[0.5], TypeError, "`index` must be an integer; got 0.5."),
    # the full method
    (lambda w: AIKDLoss(N, C, 4, weights=[1.0]), TypeError, "`weights` must be a mapping {name: ...}; got [1.0]."),
    (
        lambda w: AIKDLoss(N, C, 4, discriminator=Scores(N)),
        ValueError,
        "`discriminator` must have parameters, which `update` trains; Scores has none. Put one that is not trained into an "
        "AdversarialDistributionLoss.",
    ),
    (lambda w: AIKDLoss(0, C, 4), ValueError, "`num_samples` must be at least 1; got 0."),
    (lambda w: AIKDLoss(N, 1, 4), ValueError, "`num_classes` must be at least 2; got 1."),
    (lambda w: AIKDLoss(N, C, 0), ValueError, "`num_epochs` must be at least 1; got 0."),
    (lambda w: AIKDLoss(N, C, 4, alpha=2), ValueError, "`alpha` must be in the interval [0, 1]; got 2."),
    (
        lambda w: AIKDLoss(N, C, 4, learning_rate=0),
        ValueError,
        "`learning_rate` must be a finite number above 0; got 0.",
    ),
    (
        lambda w: AIKDLoss(N, C, 4, weights={"kd": 1.0}),
        ValueError,
        "`weights` must name terms, progressive, deterministic, adversarial; got 'kd'.",
    ),
    # stacks
    (lambda w: LossStack({}), TypeError, "`terms` must be a mapping {name: module} with at least one term; got {}."),
    (lambda w: LossStack([w.kd]), TypeError, "`terms` must be a mapping {name: module} with at least one term"),
    (lambda w: LossStack({1: w.kd}), TypeError, "`terms` must have names that are strings; got 1."),
    (lambda w: LossStack({"a.b": w.kd}), ValueError, "`terms` has a name that cannot be one:"),
    (
        lambda w: LossStack({"max": max}),
        TypeError,
        "Term 'max' must be an nn.Module (an instance); got <built-in function max>. Call a function in a module's `forward`.",
    ),
    (
        lambda w: LossStack({"ce": nn.functional.cross_entropy}),
        TypeError,
        "Term 'ce' must be an nn.Module (an instance); got <function cross_entropy",
    ),
    (lambda w: LossStack({"kd": DeterministicKD}), TypeError, "Term 'kd' must be an nn.Module (an instance)"),
    (
        lambda w: LossStack({"all": w.method}),
        TypeError,
        "Term 'all' is a stack: pass its terms, {**stack.terms, ...}, and its weights.",
    ),
    *(
        (
            lambda w, loss=loss: LossStack({"x": loss()}),
            TypeError,
            f"Term 'x' is a {loss.__name__}, which does not take logits. Use nn.CrossEntropyLoss, DeterministicKD or a "
            "module of your own.",
        )
        for loss in (nn.KLDivLoss, nn.NLLLoss, nn.BCELoss)
    ),
    (
        lambda w: LossStack({"x": CatchAll()}),
        TypeError,
        "Term 'x' must name its tensors in `forward`, each to be passed by keyword; got `**tensors`.",
    ),
    (lambda w: LossStack({"x": Positional()}), TypeError, "Term 'x' must name its tensors in `forward`"),
    (lambda w: LossStack({"kd": w.kd}, weights={"KD": 1.0}), ValueError, "`weights` must name terms, kd; got 'KD'."),
    (
        lambda w: LossStack({"kd": w.kd}, weights=[1.0]),
        TypeError,
        "`weights` must be a mapping {name: ...}; got [1.0].",
    ),
    (
        lambda w: LossStack({"kd": w.kd}, weights={"kd": -1.0}),
        ValueError,
        "`weights['kd']` must be a finite number not below 0; got -1.0.",
    ),
    (lambda w: LossStack({"kd": w.kd}, weights={"kd": "1"}), TypeError, "`weights['kd']` must be a number; got '1'."),
    (lambda w: LossStack({"kd": w.kd}, inputs={"ce": {}}), ValueError, "`inputs` must name terms, kd; got 'ce'."),
    (
        lambda w: LossStack({"kd": w.kd}, inputs={"kd": {"teacher": "t"}}),
        ValueError,
        "`inputs['kd']` must name parameters of the term, student_logits, teacher_logits, mask; got 'teacher'.",
    ),
    *(
        (
            lambda w, x=x: LossStack({"kd": w.kd}, inputs={"kd": x}),
            TypeError,
            "`inputs['kd']` must be a mapping {parameter: name of a tensor, or None}; got",
        )
        for x in (3, {"mask": 3})
    ),
    (
        lambda w: LossStack({"kd": w.kd}, inputs={"kd": {"teacher_logits": None}}),
        ValueError,
        "`inputs['kd']` must not withhold `teacher_logits`, which the term requires.",
    ),
]

LOGITS = [  # (wrong logits, settings, error, sentence), for every loss
    ([[1.0, 2.0]], {}, TypeError, "`student_logits` must be a torch.Tensor; got list."),
    (
        torch.ones(N, C, dtype=torch.int64),
        {},
        TypeError,
        "`student_logits` must be floating point (raw scores before softmax); got torch.int64.",
    ),
    (torch.ones(N), {}, ValueError, "`student_logits` must have at least 2 axes, (N, C); got shape (4,)."),
    (
        torch.ones(N, C, 2),
        {},
        ValueError,
        "`class_dim` is required for logits of more than 2 axes; got `student_logits` of shape (4, 3, 2). Pass class_dim=1 "
        "for (N, C, *) or class_dim=-1 for (N, *, C).",
    ),
    (
        torch.ones(N, C),
        {"class_dim": 2},
        IndexError,
        "`class_dim` must be an axis of `student_logits`, which has 2; got 2.",
    ),
    (
        torch.ones(N, C),
        {"class_dim": -3},
        IndexError,
        "`class_dim` must be an axis of `student_logits`, which has 2; got -3.",
    ),
    (
        torch.ones(N, 1),
        {},
        ValueError,
        "`student_logits` must have at least 2 classes on axis 1; got shape (4, 1). For one score z a sample (binary), pass "
        "torch.cat([torch.zeros_like(z), z], dim).",
    ),
]
LOSSES = {
    "deterministic": lambda settings: lambda x: DeterministicKD(**settings)(x, x),
    "deterministic_kd": lambda settings: lambda x: deterministic_kd(x, x, **settings),
    "progressive": lambda settings: lambda x: ProgressiveKD(CachedTargets(N, C), **settings)(x, index=None),
    "progressive.update": lambda settings: (
        lambda x: ProgressiveKD(CachedTargets(N, C), **settings).update(x, index=None)
    ),
    "progressive_kd": lambda settings: lambda x: progressive_kd(x, x, alpha=0.5, **settings),
    "student_loss": lambda settings: lambda x: adversarial(**settings).student_loss(x, x),
    "discriminator_loss": lambda settings: lambda x: adversarial(**settings).discriminator_loss(x, x),
}

SHAPE_OF_MASK = "`mask` must have the shape of `student_logits` without its class axis, (4,); got (4, 1)."
TYPE_OF_MASK = "`mask` must be of type bool, True = counts; got torch.int64. Pass `mask.bool()`."
DEVICE = "must be on the device of `student_logits`, cpu; got meta. Move it with `.to('cpu')`."
NO_ROWS = "`probs` must hold a distribution a row (no negative value, sum 1, nothing NaN). For logits pass"

TENSORS = [
    # the teacher's side
    (
        lambda w: w.kd(SimpleNamespace(logits=w.s), w.t),
        TypeError,
        "`student_logits` must be a torch.Tensor; got SimpleNamespace. Pass its `.logits`.",
    ),
    (lambda w: w.kd(w.s, [1.0]), TypeError, "`teacher_logits` must be a torch.Tensor; got list."),
    (lambda w: w.kd(w.s, w.y), TypeError, "`teacher_logits` must be floating point; got torch.int64."),
    (
        lambda w: w.kd(w.s, w.t[:1]),
        ValueError,
        "`teacher_logits` must have the shape of `student_logits`, (4, 3); got (1, 3).",
    ),
    (
        lambda w: w.kd(w.s, w.t.T),
        ValueError,
        "`teacher_logits` must have the shape of `student_logits`, (4, 3); got (3, 4).",
    ),
    (lambda w: w.kd(w.s, w.t.to("meta")), ValueError, f"`teacher_logits` {DEVICE}"),
    (
        lambda w: w.adversarial(w.s, w.t[:1]),
        ValueError,
        "`teacher_logits` must have the shape of `student_logits`, (4, 3)",
    ),
    (
        lambda w: w.adversarial.discriminator_loss(w.s, w.t[:1]),
        ValueError,
        "`teacher_logits` must have the shape of `student_logits`",
    ),
    (
        lambda w: w.adversarial.update(w.s, w.t[:1]),
        ValueError,
        "`teacher_logits` must have the shape of `student_logits`",
    ),
    (
        lambda w: progressive_kd(w.s, w.p[:1], alpha=0.5),
        ValueError,
        "`previous` must have the shape of `student_logits`, (4, 3); got (1, 3).",
    ),
    # masks
    (lambda w: w.kd(w.s, w.t, mask=w.mask.long()), TypeError, TYPE_OF_MASK),
    (lambda w: w.kd(w.s, w.t, mask=w.mask[:, None]), ValueError, SHAPE_OF_MASK),
    (lambda w: w.kd(w.s, w.t, mask=[True] * N), TypeError, "`mask` must be a torch.Tensor; got list."),
    (lambda w: w.kd(w.s, w.t, mask=w.mask.to("meta")), ValueError, f"`mask` {DEVICE}"),
    (lambda w: w.progressive(w.s, w.y, index=w.i, mask=w.mask.long()), TypeError, TYPE_OF_MASK),
    (lambda w: w.progressive(w.s, w.y, index=w.i, mask=w.mask[:, None]), ValueError, SHAPE_OF_MASK),
    (lambda w: w.progressive.update(w.s, index=w.i, mask=w.mask.long()), TypeError, TYPE_OF_MASK),
    (lambda w: w.adversarial(w.s, w.t, mask=w.mask[:, None]), ValueError, SHAPE_OF_MASK),
    (lambda w: w.adversarial.update(w.s, w.t, mask=w.mask.long()), TypeError, TYPE_OF_MASK),
    (
        lambda w: DeterministicKD(class_dim=1)(w.dense, w.dense, mask=torch.ones(2, 3, dtype=torch.bool)),
        ValueError,
        "`mask` must have the shape of `student_logits` without its class axis, (2, 5); got (2, 3).",
    ),
    (
        lambda w: progressive_kd(w.s, w.p, alpha=0.5, known=w.mask.long()),
        TypeError,
        "`known` must be of type bool, True = counts; got torch.int64. Pass `known.bool()`.",
    ),
    # alpha of the function
    (lambda w: progressive_kd(w.s, w.p, alpha=1.5), ValueError, "`alpha` must be in the interval [0, 1]; got 1.5."),
    (
        lambda w: progressive_kd(w.s, w.p, alpha=torch.ones(N, 1)),
        ValueError,
        "`alpha` must be a number or of shape (4,); got a tensor of shape (4, 1).",
    ),
    (
        lambda w: progressive_kd(w.s, w.p, alpha=torch.tensor([0, 0.5, 1, 2])),
        ValueError,
        "`alpha` must be in the interval [0, 1]; got values in [0, 2].",
    ),
    # targets
    (lambda w: w.progressive(w.s, [0] * N, index=w.i), TypeError, "`target` must be a torch.Tensor; got list."),
    (
        lambda w: w.progressive(w.s, w.y.int(), index=w.i),
        TypeError,
        "`target` of class indices must be of type int64; got torch.int32. Pass `target.long()`.",
    ),
    (
        lambda w: w.progressive(w.s, w.y[:1], index=w.i),
        ValueError,
        "`target` of class indices must have the shape of `student_logits` without its class axis, (4,); got (1,).",
    ),
    (
        lambda w: w.progressive(w.s, nn.functional.one_hot(w.y, C), index=w.i),
        ValueError,
        "`target` of class indices must have the shape of `student_logits` without its class axis, (4,); got (4, 3). If it is "
        "one-hot, pass `target.argmax(1)`, or `target.float()` for probabilities.",
    ),
    (
        lambda w: w.progressive(w.s, w.p[:1], index=w.i),
        ValueError,
        "`target` must have the shape of `student_logits`, (4, 3); got (1, 3).",
    ),
    (
        lambda w: w.progressive(w.s, w.y + 1, index=w.i),
        IndexError,
        "`target` must be in 0..2 (the number of classes is 3); got values in 1..3 (mask=target != -100 leaves some out).",
    ),
    (
        lambda w: w.progressive(w.s, w.y.masked_fill(w.y == 1, -100), index=w.i),
        IndexError,
        "`target` must be in 0..2 (the number of classes is 3); got values in -100..2",
    ),
    (lambda w: w.progressive(w.s, w.y.to("meta"), index=w.i), ValueError, f"`target` {DEVICE}"),
    (lambda w: w.progressive(w.s, w.p.to("meta"), index=w.i), ValueError, f"`target` {DEVICE}"),
    # ids
    (lambda w: w.progressive(w.s, w.y), TypeError, "missing 1 required keyword-only argument: 'index'"),
    (lambda w: w.progressive(w.s, w.y, index=0), TypeError, "`index` must be a torch.Tensor; got int."),
    (
        lambda w: w.progressive(w.s, w.y, index=w.i.int()),
        TypeError,
        "`index` must be of type int64; got torch.int32. Pass `index.long()`.",
    ),
    (
        lambda w: w.progressive(w.s, w.y, index=w.i[:1]),
        ValueError,
        "`index` must have the shape of `student_logits` without its class axis, (4,); got (1,).",
    ),
    (
        lambda w: w.progressive(w.s, w.y, index=w.i + 1),
        IndexError,
        "`index` must be in 0..3 (the `num_samples` is 4); got values in 1..4 (ids count from 0 within the training set).",
    ),
    (lambda w: w.progressive(w.s, w.y, index=w.i - 1), IndexError, "got values in -1..2"),
    (lambda w: w.progressive.update(w.s, index=w.i - 1), IndexError, "got values in -1..2"),
    (lambda w: w.progressive.update(w.s, index=w.i[:1]), ValueError, "`index` must have the shape of `student_logits`"),
    (
        lambda w: w.progressive(w.s, w.y, index=w.i, partner_index=w.i + 1, mix_lambda=0.5),
        IndexError,
        "`partner_index` must be in 0..3 (the `num_samples` is 4); got values in 1..4",
    ),
    (
        lambda w: w.progressive(w.s, w.y, index=w.i + 1, partner_index=w.i, mix_lambda=0.5),
        IndexError,
        "`index` must be in 0..3 (the `num_samples` is 4); got values in 1..4 (ids count from 0 within the training set).",
    ),
    (
        lambda w: w.progressive(w.s, w.y, index=None, partner_index=w.i),
        ValueError,
        "`partner_index` blends the rows of `index`, which must be given too; got index=None.",
    ),
    (
        lambda w: w.progressive(w.s, w.y, index=w.i, partner_index=w.i, mix_lambda=1.5),
        ValueError,
        "`mix_lambda` must be in the interval [0, 1]; got 1.5.",
    ),
    (
        lambda w: w.progressive(w.s, w.y, index=w.i, partner_index=w.i, mix_lambda=torch.ones(2)),
        ValueError,
        "`mix_lambda` must be a number or have the shape (4,); got (2,).",
    ),
    (
        lambda w: w.progressive(w.s, w.y, index=w.i, partner_index=w.i, mix_lambda=-torch.ones(N)),
        ValueError,
        "`mix_lambda` must be in the interval [0, 1]; got values in [-1, -1].",
    ),
    (
        lambda w: w.progressive(torch.randn(N, 5), w.y, index=w.i),
        ValueError,
        "`student_logits` must have the 3 classes of the target store on axis 1; got shape (4, 5).",
    ),
    (
        lambda w: ProgressiveKD(OddStore())(w.s, w.y, index=w.i),
        ValueError,
        "`targets.read` must return rows of shape (4, 3) and flags of shape (4,); got (3, 3) and (4,).",
    ),
    # stores
    *(
        case
        for name in ("store", "ema", "small")
        for case in (
            (
                lambda w, n=name: getattr(w, n).read(w.i + 1),
                IndexError,
                "`index` must be in 0..3 (the `num_samples` is 4)",
            ),
            (
                lambda w, n=name: getattr(w, n).read(w.i[:, None]),
                ValueError,
                "`index` must have one axis, (N,); got shape (4, 1).",
            ),
            (
                lambda w, n=name: getattr(w, n).read(w.i.int()),
                TypeError,
                "`index` must be of type int64; got torch.int32. Pass `index.long()`.",
            ),
            (lambda w, n=name: getattr(w, n).write(w.i + 1, w.p), IndexError, "`index` must be in 0..3"),
            (
                lambda w, n=name: getattr(w, n).write(w.i, w.p[:1]),
                ValueError,
                "`probs` must have the shape (N, C) = (4, 3); got (1, 3).",
            ),
            (
                lambda w, n=name: getattr(w, n).write(w.i, w.y),
                TypeError,
                "`probs` must be floating point; got torch.int64.",
            ),
            (lambda w, n=name: getattr(w, n).write(w.i, w.t), ValueError, NO_ROWS),
            (lambda w, n=name: getattr(w, n).write(w.i, w.p * 1.1), ValueError, NO_ROWS),
            (lambda w, n=name: getattr(w, n).write(w.i, w.p * NAN), ValueError, NO_ROWS),
            (
                lambda w, n=name: getattr(w, n).write(w.i, w.p, keep=w.mask.long()),
                ValueError,
                "`keep` must be a bool of the shape of `index`, (4,); got torch.int64 of shape (4,).",
            ),
        )
    ),
    # the discriminator
    (
        lambda w: adversarial(Scores(N, 2))(w.s, w.t),
        ValueError,
        "`discriminator` must return a score a row, shape (4,) or (4, 1) for rows of shape (4, 3); got (4, 2).",
    ),
    (
        lambda w: adversarial(Scores())(w.s, w.t),
        ValueError,
        "`discriminator` must return a score a row, shape (4,) or (4, 1)",
    ),
    (
        lambda w: adversarial(Scores(1, 2 * N)).discriminator_loss(w.s, w.t),
        ValueError,
        "`discriminator` must return a score a row, shape (8,) or (8, 1) for rows of shape (8, 3); got (1, 8).",
    ),
    (
        lambda w: w.adversarial(w.s, w.t, condition=w.y[:2]),
        ValueError,
        "`condition` must have a row a position, shape (4,) and any further axes; got (2,).",
    ),
    (lambda w: w.adversarial.update(w.s, w.t, condition=0), TypeError, "`condition` must be a torch.Tensor; got int."),
    (
        lambda w: w.adversarial(w.s.to("meta"), w.t.to("meta")),
        ValueError,
        "`student_logits` must be on the device of the discriminator, cpu; got meta. Move the loss with `.to('meta')`.",
    ),
    (
        lambda w: w.adversarial(w.s, w.t, condition=w.y.to("meta")),
        ValueError,
        f"`condition` {DEVICE}",
    ),
    (
        lambda w: w.adversarial(w.s, w.t, condition=w.p.to(F8)),
        TypeError,
        "`condition` must be floating point of 16, 32",
    ),
    (
        lambda w: w.adversarial.update(w.s, w.t, condition=w.y),
        TypeError,
        "`condition` needs a discriminator that takes one, `forward(x, condition)`; MLPDiscriminator does not.",
    ),
    (
        lambda w: w.adversarial.update(torch.randn(N, 5), torch.randn(N, 5)),
        ValueError,
        "`student_logits` must have the 3 classes of the discriminator on axis 1; got shape (4, 5).",
    ),
    (lambda w: MLPDiscriminator(C)([1.0]), TypeError, "`x` must be a torch.Tensor; got list."),
    (lambda w: MLPDiscriminator(C)(w.t[0]), ValueError, "`x` must have the shape (N, C) with C = 3; got (3,)."),
    (
        lambda w: MLPDiscriminator(C)(w.t.double()),
        TypeError,
        "`x` must be of the type of the weights, torch.float32; got torch.float64.",
    ),
    (
        lambda w: MLPDiscriminator(C)(w.t.to("meta")),
        ValueError,
        "`x` must be on the device of the weights, cpu; got meta.",
    ),
    # tensors of which there is no arithmetic, or no values
    (
        lambda w: w.kd(w.s, w.t.to_sparse()),
        TypeError,
        "`teacher_logits` must be a dense tensor; got torch.sparse_coo. Pass `teacher_logits.to_dense()`, or padded, with a "
        "mask.",
    ),
    (lambda w: w.kd(w.s, w.t, mask=w.mask.to_sparse()), TypeError, "`mask` must be a dense tensor"),
    (
        lambda w: w.kd(torch.nested.as_nested_tensor([w.t], layout=torch.jagged), w.t),
        TypeError,
        "`student_logits` must be a dense tensor; got a nested tensor. Pass `student_logits.to_dense()`, or padded, with a "
        "mask.",
    ),
    (lambda w: w.kd(w.t.to(F8), w.t), TypeError, "`student_logits` must be floating point of 16, 32 or 64 bits; got"),
    (lambda w: w.progressive(w.s, w.y, index=w.i.to("meta")), ValueError, "`index` must have values to be used on cpu"),
    (lambda w: w.progressive.update(w.s, index=w.i.to("meta")), ValueError, "`index` must have values"),
    (
        lambda w: w.progressive.update(w.s.to("meta"), index=w.i),
        ValueError,
        "`student_logits` must have values to be used on cpu; got a tensor on the meta device.",
    ),
    (lambda w: w.store.read(w.i.to("meta")), ValueError, "`index` must have values"),
    (lambda w: w.store.write(w.i, w.p.to("meta")), ValueError, "`probs` must have values"),
    (lambda w: w.store.write(w.i, w.p, keep=[True] * N), TypeError, "`keep` must be a torch.Tensor; got list."),
    (lambda w: w.store.write(w.i, w.p, keep=w.mask.to("meta")), ValueError, "`keep` must have values"),
    # numbers in tensors
    (lambda w: progressive_kd(w.s, w.p, alpha=w.y), TypeError, "`alpha` must be floating point; got torch.int64."),
    (lambda w: progressive_kd(w.s, w.p, alpha=torch.ones(N, device="meta")), ValueError, f"`alpha` {DEVICE}"),
    *(
        (
            lambda w, x=x: w.progressive(w.s, w.y, index=w.i, partner_index=w.i, mix_lambda=x),
            error,
            f"`mix_lambda` {sentence}",
        )
        for x, error, sentence in (
            (torch.tensor(1j), TypeError, "must be floating point; got torch.complex64."),
            (torch.ones(N, device="meta"), ValueError, "must have values"),
            (torch.ones(N).to_sparse(), TypeError, "must be a dense tensor"),
        )
    ),
    (lambda w: deterministic_kd(w.s, w.t, class_dim=0.5), TypeError, "`class_dim` must be an integer; got 0.5."),
    (lambda w: progressive_kd(w.s, w.p, alpha=0.5, class_dim=1j), TypeError, "`class_dim` must be an integer; got 1j."),
    (
        lambda w: w.method(student_logits=w.s, teacher_logits=w.t, target=[0] * N, index=w.i),
        TypeError,
        "`target` must be a torch.Tensor; got list.",
    ),
    # calls at the wrong moment
    (lambda w: w.method.advance_epoch(2**70), ValueError, "`epoch` must be an integer of 64 bits; got"),
    (
        lambda w: w.progressive.eval().update(w.s, index=w.i),
        RuntimeError,
        "`update` must not be called in eval mode: it would remember predictions of evaluation. Call `.train()` on the loss, "
        "or pass `index=None`.",
    ),
    (
        lambda w: w.adversarial.eval().update(w.s, w.t),
        RuntimeError,
        "`update` must not be called in eval mode: it would train the discriminator on evaluation data. Call `.train()` on the "
        "loss.",
    ),
    (lambda w: w.method.eval().update(**w.all), RuntimeError, "`update` must not be called in eval mode"),
    (
        lambda w: adversarial().update(w.s, w.t),
        RuntimeError,
        "`update` needs an `optimizer`, given on construction: torch.optim.Adam(discriminator.parameters()). Without one, step "
        "on `discriminator_loss` yourself.",
    ),
    (
        lambda w: (w.adversarial.discriminator.requires_grad_(False), w.method.update(**w.all)),
        RuntimeError,
        "`update` needs a discriminator that can be trained; every parameter of its optimizer has requires_grad=False.",
    ),
    (lambda w: w.progressive.advance_epoch(-1), ValueError, "`epoch` must be at least 0; got -1."),
    (lambda w: w.progressive.advance_epoch(1.5), TypeError, "`epoch` must be an integer; got 1.5."),
    (lambda w: w.method.advance_epoch(-1), ValueError, "`epoch` must be at least 0; got -1."),
    (lambda w: w.method.advance_epoch("2"), TypeError, "`epoch` must be an integer; got '2'."),
    # stacks
    (
        lambda w: w.method(student_logits=w.s, teacher_logits=w.t, index=w.i),
        TypeError,
        "missing 1 required keyword-only argument: 'target'",
    ),
    (
        lambda w: LossStack(w.method.terms)(student_logits=w.s, teacher_logits=w.t, index=w.i),
        TypeError,
        "Term 'progressive' needs `target`; got student_logits, teacher_logits, index. Pass it by name, or use the `inputs` of "
        "the stack to rename or withhold it.",
    ),
    (
        lambda w: LossStack(w.method.terms)(student_logits=w.s, teacher_logits=w.t, target=None, index=w.i),
        TypeError,
        "Term 'progressive' needs `target`",
    ),
    (
        lambda w: LossStack({"kd": w.kd})(student_logits=w.s, teacher_logit=w.t),
        TypeError,
        "Term 'kd' needs `teacher_logits`; got student_logits, teacher_logit. Pass it by name, or use the `inputs` of the "
        "stack to rename or withhold it.",
    ),
    (
        lambda w: LossStack({"kd": w.kd})(student_logits=w.s, teacher_logits=w.t, masks=w.mask),
        TypeError,
        "No term uses `masks`; the terms kd use index, mask, student_logits, target, teacher_logits.",
    ),
    (
        lambda w: LossStack({"a": w.kd, "b": w.kd})(student_logits=w.s, teacher_logits=w.t, masks=w.mask),
        TypeError,
        "No term uses `masks`; the terms a, b use index, mask, student_logits, target, teacher_logits.",
    ),
    (lambda w: LossStack({"kd": w.kd})(), TypeError, "Term 'kd' needs `student_logits`; got nothing. Pass it by name"),
    (lambda w: w.method.update(**w.all, masks=w.mask), TypeError, "masks"),
    (
        lambda w: LossStack(w.method.terms).update(student_logits=w.s, teacher_logits=w.t),
        TypeError,
        "Term 'progressive' needs `index`; got student_logits, teacher_logits. Pass it by name",
    ),
    (
        lambda w: w.method.update(student_logits=w.s, index=w.i),
        TypeError,
        "Term 'adversarial' needs `teacher_logits`; got student_logits, index. Pass it by name",
    ),
    (  # the second of the two terms refuses: the first must not have written
        lambda w: w.method.update(**{**w.all, "student_logits": w.s * 2, "teacher_logits": w.t[:1]}),
        ValueError,
        "`teacher_logits` must have the shape of `student_logits`, (4, 3); got (1, 3).",
    ),
    (
        lambda w: LossStack({"kd": DeterministicKD(reduction="none")})(student_logits=w.s, teacher_logits=w.t),
        ValueError,
        "Term 'kd' must give a scalar tensor (reduction='mean' or 'sum'); got (4,).",
    ),
    (
        lambda w: LossStack({"x": Term(1.0)})(student_logits=w.s),
        ValueError,
        "Term 'x' must give a scalar tensor (reduction='mean' or 'sum'); got float.",
    ),
]


def assert_said(sentence, caught):
    """What ends with a full stop is the whole message, and other text its beginning or, after `got`, a part of it."""
    message = str(caught.value)
    if sentence.endswith("."):
        assert message == sentence
    else:
        assert message.startswith(sentence) or sentence.startswith(("got", "missing", "masks"))


def refused(call, world, error, sentence):
    before = world.state()
    with pytest.raises(error, match=re.escape(sentence)) as caught:
        call(world)
    assert type(caught.value) is error
    assert_said(sentence, caught)
    after = world.state()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), f"{name} was changed"
    assert world.s.grad is None


def ids(cases):
    return [f"{i}-{re.sub('[^a-z_]+', ' ', case[-1])[:40].strip()}" for i, case in enumerate(cases)]


@pytest.mark.parametrize(("call", "error", "sentence"), SETTINGS, ids=ids(SETTINGS))
def test_a_setting_out_of_range_or_of_the_wrong_kind_is_refused(call, error, sentence):
    refused(call, World(), error, sentence)


@pytest.mark.parametrize(("call", "error", "sentence"), TENSORS, ids=ids(TENSORS))
def test_a_tensor_or_call_that_does_not_fit_is_refused_and_changes_nothing(call, error, sentence):
    refused(call, World(), error, sentence)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("x", "settings", "error", "sentence"), LOGITS, ids=ids(LOGITS))
def test_logits_that_are_none_are_refused_by_every_loss(loss, x, settings, error, sentence):
    call = LOSSES[loss](settings)
    with pytest.raises(error, match=re.escape(sentence)) as caught:
        call(x)
    assert_said(sentence, caught)


@pytest.mark.parametrize(
    "build",
    [
        lambda path: CachedTargets(N, C, top_k=C + 1, path=path),
        lambda path: CachedTargets(N, C, dtype=torch.int64, path=path),
        lambda path: CachedTargets(N, C, device="meta", path=path),
        lambda path: EMATargets(N, C, decay=2.0, path=path),
    ],
)
def test_a_refused_store_leaves_no_file(build, tmp_path):
    with pytest.raises(ValueError, match=r"`(top_k|dtype|device|decay)` must be"):
        build(tmp_path / "targets.bin")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("epoch", [None, 5])
@pytest.mark.parametrize("wrong", ["weight", "alpha"])
def test_a_schedule_that_goes_wrong_later_stops_the_whole_stack_where_it_is(wrong, epoch):
    to = epoch or 1

    def late(epoch):
        return -1.0 if epoch == to else 0.5

    world = World()
    first, second = ProgressiveKD(world.small), ProgressiveKD(world.ema, alpha=late if wrong == "alpha" else 0.5)
    stack = LossStack({"a": first, "b": second}, weights={"b": late if wrong == "weight" else 0.5})
    stack.update(student_logits=world.s, index=world.i)
    before = world.state() | {f"stack.{name}": x.clone() for name, x in stack.state_dict().items()}
    name = {"weight": f"`weights['b']({to})`", "alpha": f"`alpha({to})`"}[wrong]
    with pytest.raises(ValueError, match=re.escape(f"{name} must be")):
        stack.advance_epoch(epoch)
    after = world.state() | {f"stack.{name}": x for name, x in stack.state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_what_a_mask_hides_is_not_judged():
    """Padding is often -100, and ids there may be anything."""
    world = World()
    target, index = world.y.masked_fill(~world.mask, -100), world.i.masked_fill(~world.mask, -1)
    value = world.progressive(world.s, target, index=index, mask=world.mask)
    kept = world.mask
    torch.testing.assert_close(value, world.progressive(world.s[kept], world.y[kept], index=world.i[kept]))
    world.progressive.update(2 * world.s, index=index, mask=kept)
    rows, _ = world.store.read(world.i[kept])
    torch.testing.assert_close(rows, (2 * world.s[kept]).softmax(-1), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("key", "wrong", "sentence"),
    [
        *(
            (key, wrong, sentence)
            for key in ("targets.rows", "targets.known", "epoch")
            for wrong, sentence in (
                (lambda x: x.tolist(), f"`{key}` in the checkpoint must be a dense tensor; it is "),
                (
                    lambda x: x.to_sparse(),
                    f"`{key}` in the checkpoint must be a dense tensor; it is a tensor of layout",
                ),
                (lambda x: x.to("meta"), f"`{key}` in the checkpoint must have values; it is on the meta device."),
            )
        ),
        ("targets.classes", lambda x: x + C, "targets: `classes` in the checkpoint must be in 0..2."),
        ("epoch", lambda x: x - 9, "ProgressiveKD: `epoch` must be at least 0; got "),
        ("epoch", lambda x: x + 1, "ProgressiveKD: `alpha(1)` must be in the interval [0, 1]; got 2.0."),
    ],
)
def test_a_checkpoint_that_cannot_be_loaded_is_refused_and_changes_nothing(key, wrong, sentence):
    loss = ProgressiveKD(CachedTargets(N, C, top_k=1), alpha=lambda epoch: 2.0 * epoch)
    loss.update(torch.randn(N, C), index=torch.arange(N))
    before = {name: x.clone() for name, x in loss.state_dict().items()}
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        loss.load_state_dict({**before, key: wrong(before[key])})
    assert all(torch.equal(x, before[name]) for name, x in loss.state_dict().items())


@pytest.mark.parametrize("wrong", [3, torch.zeros(8), torch.zeros(8, dtype=torch.uint8), torch.zeros(8, device="meta")])
def test_bytes_that_are_no_optimizer_are_refused(wrong):
    loss = World().adversarial
    with pytest.raises(RuntimeError, match="`optimizer_state` does not fit the discriminator's optimizer"):
        loss.load_state_dict({**loss.state_dict(), "optimizer_state": wrong})


def test_what_is_loaded_leaves_no_graph_in_a_store():
    store = World().ema
    saved = {name: x.clone() for name, x in store.state_dict().items()}
    store.load_state_dict({**saved, "rows": saved["rows"].requires_grad_()})
    assert not store.rows.requires_grad
