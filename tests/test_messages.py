"""What is refused, in which words, and that a refusal changes nothing.

`WRONG` has the wrong values of each argument, and `ENTRIES` what takes arguments: our functions and classes, and of the
objects of `World` the calls. Every entry is shown every wrong value of each of its arguments, so that one fact is said in one
sentence, whoever finds it. `OTHERS` are calls whose fault is not in one argument alone. Sentences stand as Python prints
them, after their error; "…" stands for what is not ours.
"""

from __future__ import annotations

import builtins
import inspect
import math
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset

import aikd_losses
from aikd_losses import (
    AdversarialDistributionLoss,
    AdversarialObjective,
    AIKDLoss,
    CachedTargets,
    DeterministicKD,
    EMATargets,
    IndexedDataset,
    LinearRamp,
    LossStack,
    MLPDiscriminator,
    ProgressiveKD,
)
from aikd_losses.functional import deterministic_kd, progressive_kd

N, C = 4, 3
NAN, INF = math.nan, math.inf
F8 = torch.float8_e4m3fn
STORED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Conditional(nn.Module):
    """A discriminator that takes a condition."""

    def __init__(self):
        super().__init__()
        self.score = nn.Linear(C, 1)

    def forward(self, x, condition=None):
        return self.score(x)


class World:
    """Tensors that fit, and objects with some history: made when a call first asks for them."""

    def __init__(self) -> None:
        self.s = torch.randn(N, C, requires_grad=True)
        self.t = torch.randn(N, C)
        self.y = torch.arange(N) % C
        self.i = torch.arange(N)
        self.mask = torch.tensor([True, True, False, True])
        self.p = self.t.softmax(-1)
        self.all = dict(student_logits=self.s, teacher_logits=self.t, index=self.i)

    @cached_property
    def method(self):
        method = AIKDLoss(N, C, 4, discriminator=Conditional())
        method.update(**self.all, mask=self.mask)
        method.advance_epoch()
        method.update(**self.all, mask=self.mask)
        return method

    kd = property(lambda self: self.method.terms["deterministic"])
    progressive = property(lambda self: self.method.terms["progressive"])
    adversarial = property(lambda self: self.method.terms["adversarial"])
    stack = cached_property(lambda self: LossStack(self.method.terms))
    store = cached_property(lambda self: self.written(CachedTargets(N, C)))
    ema = cached_property(lambda self: self.written(EMATargets(N, C)))
    top_1 = cached_property(lambda self: self.written(CachedTargets(N, C, top_k=1)))
    ramp = cached_property(lambda self: LinearRamp(0.8, 4))
    mlp = cached_property(lambda self: MLPDiscriminator(C))

    kd_alone = cached_property(lambda self: LossStack({"kd": self.kd}))

    @cached_property
    def of_mlp(self):
        return AdversarialDistributionLoss(self.mlp, optimizer=torch.optim.Adam(self.mlp.parameters()))

    def written(self, store):
        store.write(self.i[:2], self.p[:2])
        return store

    def fitting(self) -> dict[str, Any]:
        """Arguments that nobody refuses."""
        right = dict(student_logits=self.s, teacher_logits=self.t, target=self.y, condition=self.y, mask=self.mask)
        right |= dict(
            index=self.i, partner_index=self.i.flip(0), mix_lambda=0.5, previous=self.p, probs=self.p, x=self.p
        )
        right |= dict(known=self.mask, keep=self.mask, num_samples=N, num_classes=C, num_epochs=4, epoch=2)
        right |= dict(alpha=0.5, end=0.8, weight=1.0, gamma=1.0, terms={"kd": DeterministicKD()}, dataset=[1])
        right |= dict(targets=self.store, discriminator=self.mlp, model=self.mlp, student=len)
        return right

    def right(self, name: str) -> Any:
        return self.fitting().get(name, torch.randn(N, C))  # a part of a linear head

    def parts(self) -> list[nn.Module]:
        return [thing for thing in vars(self).values() if isinstance(thing, nn.Module)]


def state(parts: list[nn.Module]) -> dict[str, Any]:
    """Everything that could change: what is saved, every tensor and number of every module, random numbers."""
    found: dict[str, Any] = {"random numbers": torch.get_rng_state()}
    for i, part in enumerate(parts):
        found |= {f"{i} {name}": x.clone() for name, x in part.state_dict().items()}
        for path, module in part.named_modules():
            for name, x in vars(module).items():
                if isinstance(x, torch.Tensor | int | float | None) and name != "training":
                    found[f"{i} {path}.{name}"] = x.clone() if isinstance(x, torch.Tensor) else x
    return found


def unchanged(before: dict[str, Any], parts: list[nn.Module]) -> None:
    after = state(parts)
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert torch.equal(x, after[name]) if isinstance(x, torch.Tensor) else x == after[name], f"{name} was changed"


def refused(call: Callable[[], Any], parts: list[nn.Module], sentence: str) -> None:
    name, _, sentence = sentence.partition(": ")
    error = getattr(builtins, name)
    before = state(parts)
    with pytest.raises(error, match=f"^{re.escape(sentence).replace('…', '.*')}$") as caught:
        call()
    assert type(caught.value) is error
    unchanged(before, parts)


# ---------------------------------------------------------------------------------------------- an argument that is wrong


class Of(NamedTuple):
    """A wrong value that is made of the right one."""

    right: Callable[[Any], Any]


def module(forward):
    return type("Own", (nn.Module,), {"forward": forward})()


def one_of(*choices, also=()):
    said = ", ".join(map(repr, choices))
    return {f"ValueError: `{{name}}` must be one of {said}; got {{got}}.": ["avg", None, 1, torch.int8, *also]}


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


LONG = Of(lambda x: x.long())
FIRST = Of(lambda x: x[:1])
COLUMN = Of(lambda x: x[:, None])
META = Of(lambda x: x.to("meta"))
OUTPUT = Of(lambda x: SimpleNamespace(logits=x))
ZEROS_LEFT_OUT = Of(lambda x: x.detach().to_sparse())
SGD = torch.optim.SGD([torch.zeros(1)])

# What is said, and for which values. {name} stands for the argument's, {got} for the value as it shows itself.
DENSE = "TypeError: `{name}` must be a dense tensor; got %s. Pass `{name}.to_dense()`, or pad and mask it."
SPARSE, NESTED = DENSE % "torch.sparse_coo", DENSE % "a nested tensor"
TENSOR = {
    "TypeError: `{name}` must be a torch.Tensor; got list.": [Of(lambda x: x.tolist())],
    "TypeError: `{name}` must be a torch.Tensor; got SimpleNamespace. Pass its `.logits`.": [OUTPUT],
    "TypeError: `{name}` must be a torch.Tensor; got dict. Pass one of its entries, 'out', 'aux'.": [
        Of(lambda x: {"out": x, "aux": x})
    ],
    SPARSE: [ZEROS_LEFT_OUT],
    NESTED: [Of(lambda x: torch.nested.as_nested_tensor([x.detach()], layout=torch.jagged))],
}
TYPE_F8 = (
    "TypeError: `{name}` must be floating point of 16, 32 or 64 bits; got torch.float8_e4m3fn. Pass `{name}.float()`."
)
FLOATING = {
    TYPE_F8: [Of(lambda x: x.detach().to(F8))],
    "TypeError: `{name}` must be floating point of 16, 32 or 64 bits; got torch.int64.": [LONG],
}
DEVICE = "ValueError: `{name}` must be on the device of `student_logits`, cpu; got meta. Move it with `.to('cpu')`."
AS_LOGITS = "ValueError: `{name}` must have the shape of `student_logits`, (4, 3); got"
AS_POSITIONS = "ValueError: `{name}` must have the shape of `student_logits` without its class axis, (4,); got"
AN_INSTANCE = "must be an instance of nn.Module (wrap a function in one); got"
HELD = "ValueError: `optimizer` must hold exactly the discriminator's 6 parameters;"
BUILD_IT = "Build it from `discriminator.parameters()`."
NAMED = "must name each tensor of `forward`, to be passed by keyword; got"
GIVEN = (
    "ValueError: `inputs['kd']` must give parameters of the term, student_logits, teacher_logits, mask, the name of a "
    "tensor or None; got"
)
INDICES = "`{name}` of class indices must"
IN_RANGE = "IndexError: `{name}` must be in 0..3 (the `num_samples` is 4); got values in"
LABELS = "IndexError: `{name}` must be in 0..2 (the number of classes is 3); got values in"
UNIT = "ValueError: `{name}` must be in the interval [0, 1]; got"
LIKE_LOGITS = {
    **TENSOR,
    **FLOATING,
    f"{AS_LOGITS} (1, 3).": [FIRST],
    f"{AS_LOGITS} (3, 4).": [Of(lambda x: x.T)],
    DEVICE: [META],
}
MASK = {
    **TENSOR,
    "TypeError: `{name}` must be of type bool, True = counts; got torch.int64. Pass `{name}.bool()`.": [LONG],
    f"{AS_POSITIONS} (4, 1).": [COLUMN],
    DEVICE: [META],
}
IDS = {
    **TENSOR,
    "TypeError: `{name}` must be a torch.Tensor; got int.": [0],
    "TypeError: `{name}` must be of type int64; got torch.int32. Pass `{name}.long()`.": [Of(lambda x: x.int())],
    f"{IN_RANGE} 1..4 (ids count from 0 within the training set).": [Of(lambda x: x + 1)],
    f"{IN_RANGE} -1..2 (ids count from 0 within the training set).": [Of(lambda x: x - 1)],
}
ID_A_POSITION = {**IDS, f"{AS_POSITIONS} (1,).": [FIRST]}
ID_A_ROW = {**IDS, "ValueError: `{name}` must have one axis, (N,); got shape (4, 1).": [COLUMN]}
NUMBER = {"TypeError: `{name}` must be a number; got {got}.": ["4", True, 1j]}
NOT_NEGATIVE = {**NUMBER, "ValueError: `{name}` must be a finite number not below 0; got {got}.": [-0.5, NAN, INF]}
POSITIVE = {
    **NUMBER,
    "ValueError: `{name}` must be in the interval [1e-09, 1e+09]; got {got}.": [0.0, -1, NAN, INF, 10**400, 1e-30],
}
SHARE = {**NUMBER, f"{UNIT} {{got}}.": [1.1, -1, NAN, INF]}
SCHEDULE = {
    **SHARE,
    "ValueError: `{name}(0)` must be in the interval [0, 1]; got 2.0.": [Of(lambda _: lambda epoch: 2.0)],
    "TypeError: `{name}(0)` must be a number; got None.": [Of(lambda _: lambda epoch: None)],
}
INTEGER = {
    "TypeError: `{name}` must be an integer; got {got}.": [4.0, "ten", True, 1j],
    "ValueError: `{name}` must be between … and 9223372036854775807; got {got}.": [2**70],
}
COUNT = {**INTEGER, "ValueError: `{name}` must be at least 1; got {got}.": [0, -3]}
OF_TERMS = {"ValueError: `{name}` must be a mapping from terms, kd; got {got}.": [[1.0], {"KD": 1.0}]}

WRONG = {
    "student_logits": {
        **TENSOR,
        **FLOATING,
        "ValueError: `{name}` must have at least 2 axes, (N, C); got shape (4,).": [Of(lambda x: x[:, 0])],
        "ValueError: `class_dim` is required for logits of shape (4, 3, 1). Pass 1 for (N, C, *), -1 for (N, *, C).": [
            Of(lambda x: x[..., None])
        ],
        "ValueError: `{name}` must have at least 2 classes on axis 1; got shape (4, 1). For one score z a sample (binary), "
        "pass torch.cat([torch.zeros_like(z), z], dim).": [Of(lambda x: x[:, :1])],
    },
    **dict.fromkeys(["teacher_logits", "previous"], LIKE_LOGITS),
    **dict.fromkeys(["mask", "known"], MASK),
    "target": {
        **TENSOR,
        TYPE_F8: [Of(lambda x: torch.full((N, C), 1 / C).to(F8))],
        f"TypeError: {INDICES} be of type int64; got torch.int32. Pass `{{name}}.long()`.": [Of(lambda x: x.int())],
        f"TypeError: {INDICES} be of type int64; got torch.float32. Pass `{{name}}.long()`.": [Of(lambda x: x.float())],
        "ValueError: `{name}` must hold a distribution a row (no negative value, sum 1, nothing NaN). For labels pass "
        "int64 indices; several a position need another loss, BCEWithLogitsLoss.": [
            *(torch.ones(N, C), torch.full((N, C), NAN), torch.tensor([[2.0, -1, 0]]).expand(N, C))
        ],
        f"ValueError: {INDICES} have the shape of `student_logits` without its class axis, (4,); got (1,).": [FIRST],
        f"ValueError: {INDICES} have the shape of `student_logits` without its class axis, (4,); got (4, 3). If it is one-hot, "
        "pass `target.argmax(1)`, or `target.float()` for probabilities.": [Of(lambda x: nn.functional.one_hot(x, C))],
        f"{AS_LOGITS} (1, 3).": [Of(lambda x: torch.full((1, C), 1 / C))],
        f"{LABELS} 1..3 (mask=target != -100 leaves some out).": [Of(lambda x: x + 1)],
        f"{LABELS} -100..2 (mask=target != -100 leaves some out).": [Of(lambda x: x.where(x != 1, -100))],
        DEVICE: [META, Of(lambda x: torch.full((N, C), 1 / C, device="meta"))],
    },
    **dict.fromkeys(["index", "partner_index"], ID_A_POSITION),
    "mix_lambda": {
        **NUMBER,
        SPARSE: [torch.ones(N).to_sparse()],
        "TypeError: `{name}` must be floating point of 16, 32 or 64 bits; got torch.complex64.": [torch.tensor(1j)],
        "ValueError: `{name}` must be a number or have the shape (4,); got (2,).": [torch.ones(2)],
        f"{UNIT} {{got}}.": [1.5],
        f"{UNIT} values in [-1, -1].": [-torch.ones(N)],
    },
    "condition": {
        **TENSOR,
        "TypeError: `{name}` must be a torch.Tensor; got int.": [0],
        "ValueError: `{name}` must have a row a position, shape (4,) and any further axes; got (1,).": [FIRST],
        DEVICE: [META],
    },
    "probs": {
        **TENSOR,
        **FLOATING,
        "ValueError: `{name}` must have the shape (N, C) = (4, 3); got (1, 3).": [FIRST],
        "ValueError: `{name}` must hold a distribution a row (no negative value, sum 1, nothing NaN). For logits pass "
        "`torch.softmax(logits, -1)`.": [Of(torch.log), Of(lambda p: p * 1.1), Of(lambda p: p * NAN)],
    },
    "x": {
        "ValueError: `{name}` must have the shape (N, C) = (3, 3); got (3,).": [Of(lambda x: x[0])],
        "ValueError: `{name}` must have the shape (N, C) = (3, 3); got (3, 4).": [Of(lambda x: x.T)],
    },
    "temperature": {
        **POSITIVE,
        "TypeError: `{name}` must be a number; got a tensor. Pass its `.item()`; to learn it see docs/guide/parts.md.": [
            torch.tensor(2.0)
        ],
    },
    "reduction": {
        **one_of("mean", "sum", "none"),
        "ValueError: `{name}` must be 'mean', not 'batchmean': classes are summed, 'mean' is that over samples.": [
            "batchmean"
        ],
    },
    "class_dim": INTEGER,
    "divergence": one_of("forward_kl", "reverse_kl", "js"),
    **dict.fromkeys(["beta", "decay"], SHARE),
    "alpha": SCHEDULE,
    **dict.fromkeys(["num_samples", "num_epochs"], COUNT),
    "num_classes": {**INTEGER, "ValueError: `{name}` must be at least 2; got {got}.": [1, 0]},
    "top_k": {
        "TypeError: `{name}` must be an integer; got {got}.": [1.5, True],
        "ValueError: `{name}` must be at least 1; got {got}.": [0],
        "ValueError: `{name}` must be between 1 and 3; got {got}.": [4],
    },
    "dtype": one_of(*STORED, also=[F8, "float16", np.array([1, 2])]),
    "path": {"TypeError: expected str, bytes or os.PathLike object, not int": [3]},
    "process_group": {
        "TypeError: `{name}` must be None or a torch.distributed.ProcessGroup that this process belongs to (of a DeviceMesh: "
        "`mesh.get_group('dp')`); got {got}.": ["dp", 3]
    },
    "targets": {
        "TypeError: `{name}` must be an object with read, write and advance_epoch; got {got}.": [CachedTargets, {}]
    },
    "discriminator": {
        "TypeError: `{name}` must be an nn.Module (an instance); got {got}.": [torch.sum, MLPDiscriminator]  # a class
    },
    "objective": one_of("non_saturating", "least_squares", "hinge", "wasserstein", "relativistic"),
    "inputs": one_of("probs", "log_probs", "logits"),
    "optimizer": {
        "TypeError: `{name}` must be a torch optimizer, not a wrapper of one; got str.": ["adam"],
        "TypeError: `{name}` must be a torch optimizer, not a wrapper of one; got SimpleNamespace.": [
            *(SimpleNamespace(optimizer=SGD), SimpleNamespace(_optimizer=SGD))
        ],
        f"{HELD} 0 of them and 1 others are in it. {BUILD_IT}": [SGD],
    },
    **dict.fromkeys(["weight", "gamma", "end", "start"], NOT_NEGATIVE),
    "epoch": {**INTEGER, "ValueError: `{name}` must be at least 0; got {got}.": [-1]},
    "hidden": {
        "ValueError: `{name}` must be at least 1; got 0.": [(8, 0)],
        "TypeError: `{name}` must be an integer; got 1.5.": [(1.5,)],
    },
    "model": {
        f"TypeError: `{{name}}` must be an nn.Module (an instance), not wrapped; got {kind}. Load a state_dict into a model "
        "first; of a wrapper pass `model.module`.": [wrong]
        for kind, wrong in (
            ("builtin_function_or_method", len),
            ("int", 3),
            ("OrderedDict", Of(lambda model: model.state_dict())),
            ("DataParallel", Of(nn.DataParallel)),
        )
    },
    "dataset": {
        f"TypeError: `{{name}}` must be map-style, with __getitem__ and __len__: a stream or a loader has no sample ids; got "
        f"{kind}. Index a data set before it is loaded; for streams see docs/guide/parts.md.": [wrong]
        for kind, wrong in (("set", {1, 2}), ("DataLoader", Of(DataLoader)), ("Stream", Stream()))
    }
    | {
        "TypeError: `{name}` must not be indexed already, nor a part of one that is. Split first, then index.": [
            *(IndexedDataset([1]), Subset(Subset(IndexedDataset([1]), [0]), [0])),
            ConcatDataset([IndexedDataset([1]), [2]]),
        ]
    },
    "terms": {
        "TypeError: `{name}` must be a mapping {name: module}, not empty; got {got}.": [{}, [1.0]],
        f"TypeError: Term 'f' {AN_INSTANCE} {max}.": [{"f": max}],
        f"TypeError: Term 'f' {AN_INSTANCE} <function cross_entropy…": [{"f": nn.functional.cross_entropy}],
        f"TypeError: Term 'x' {AN_INSTANCE} {DeterministicKD}.": [{"x": DeterministicKD}],
        "TypeError: Term 'all' is a stack: pass its terms, {**stack.terms, ...}, and its weights.": [
            Of(lambda terms: {"all": LossStack(terms)})
        ],
        **{
            f"TypeError: Term 'x' is a {loss.__name__}, which takes no logits: use nn.CrossEntropyLoss, or DeterministicKD.": [
                {"x": loss()}
            ]
            for loss in (nn.KLDivLoss, nn.NLLLoss, nn.BCELoss)
        },
        "ValueError: Term 'x' must give a scalar: build it with reduction='mean' or 'sum'.": [
            *({"x": DeterministicKD(reduction="none")}, {"x": nn.CrossEntropyLoss(reduction="none")})
        ],
        f"TypeError: Term 'x' {NAMED} `**tensors`.": [{"x": module(lambda self, **tensors: 0.0)}],
        f"TypeError: Term 'x' {NAMED} `*tensors`.": [{"x": module(lambda self, *tensors: 0.0)}],
    },
}
WRONG_OF = {  # where an argument of one entry is not what it is of others
    ("functional.progressive_kd", "alpha"): {
        **SHARE,
        "TypeError: `{name}` must be floating point of 16, 32 or 64 bits; got torch.int64.": [torch.ones(N).long()],
        "ValueError: `{name}` must be a number or have the shape (4,); got (4, 1).": [torch.ones(N, 1)],
        f"{UNIT} values in [0, 2].": [torch.tensor([0, 0.5, 1, 2])],
    },
    **{
        (entry, "reduction"): one_of("mean", "sum", also=["batchmean", "none"])
        for entry in ("functional.linear_deterministic_kd", "AIKDLoss")
    },
    ("AdversarialObjective", "discriminator"): {},  # a function of scores
    ("LossStack", "weights"): {
        **OF_TERMS,
        "ValueError: `weights['kd']` must be a finite number not below 0; got -1.0.": [{"kd": -1.0}],
        "ValueError: `weights['kd'](0)` must be a finite number not below 0; got inf.": [{"kd": lambda epoch: INF}],
        "TypeError: `weights['kd']` must be a number; got '1'.": [{"kd": "1"}],
    },
    ("AIKDLoss", "weights"): {
        "ValueError: `weights` must be a mapping from terms, progressive, deterministic, adversarial; got …": [
            {"kd": 1.0}
        ],
        "ValueError: `weights['progressive']` must be a finite number not below 0; got -1.0.": [{"progressive": -1.0}],
    },
    ("LossStack", "inputs"): {
        **OF_TERMS,
        f"{GIVEN} 'teacher': 't'.": [{"kd": {"teacher": "t"}}],
        f"{GIVEN} 'mask': 3.": [{"kd": {"mask": 3}}],
        "ValueError: `inputs['kd']` must not withhold `teacher_logits`, which the term requires.": [
            {"kd": {"teacher_logits": None}}
        ],
    },
    ("progressive.update", "partner_index"): {},  # says that nothing is to be written
    **{(f"{store}.{method}", "index"): ID_A_ROW for store in ("store", "ema", "top_1") for method in ("read", "write")},
}
PARTS = ("hidden", "weight", "bias")  # whose wrong values are in test_linear.py
OF_LINEAR = {f"{side}_{part}" for side in ("student", "teacher") for part in PARTS}

OURS = [name for name in aikd_losses.__all__ if name not in ("functional", "check_setup", "TargetStore")]
OURS += [f"functional.{name}" for name in ("deterministic_kd", "linear_deterministic_kd", "progressive_kd")]
ENTRIES = [
    *OURS,
    *("kd", "progressive", "progressive.update", "progressive.advance_epoch"),
    *("adversarial", "adversarial.student_loss", "adversarial.discriminator_loss", "adversarial.update"),
    *("stack", "stack.advance_epoch", "method", "method.update", "method.advance_epoch"),
    *(f"{store}.{method}" for store in ("store", "ema", "top_1") for method in ("read", "write")),
    *("ramp", "mlp"),
]


def resolved(entry: str, world: World) -> Any:
    return attrgetter(entry)(aikd_losses if entry in OURS else world)


def arguments(entry: str, world: World) -> dict[str, bool]:
    """Their names, and whether one is given when it is not the wrong one."""
    taken = resolved(entry, world)
    parameters = inspect.signature(taken.forward if isinstance(taken, nn.Module) else taken).parameters
    if "tensors" in parameters:  # a stack's: what its terms take
        needed = ["student_logits", "teacher_logits", "index"] + ["target"] * (entry in ("stack", "method"))
        return dict.fromkeys(needed, True) | {"mask": False, "condition": False}
    usual = {"target", "partner_index"} if "mix_lambda" in parameters else {"discriminator"}
    return {name: how.default is how.empty or name in usual for name, how in parameters.items()}


def given(entry: str, world: World) -> dict[str, Any]:
    return {name: world.right(name) for name, needed in arguments(entry, world).items() if needed}


def cases() -> Iterator[Any]:
    world = World()
    for entry in ENTRIES:
        for name in arguments(entry, world):
            sentences = WRONG_OF.get((entry, name), WRONG.get(name, {}))
            wrong = [(value, sentence) for sentence, values in sentences.items() for value in values]
            for k, (value, sentence) in enumerate(wrong):
                yield pytest.param(entry, name, value, sentence, id=f"{entry}-{name}-{k}")


@pytest.fixture(scope="module")
def one_world():
    """For all refusals, as they change nothing; others make their own."""
    return World()


@pytest.fixture
def world(one_world):
    yield one_world
    for part in one_world.parts():
        part.train().requires_grad_(True)


@pytest.mark.parametrize(("entry", "name", "wrong", "sentence"), list(cases()))
def test_a_wrong_argument_is_refused_in_the_same_words_by_all_that_take_it(entry, name, wrong, sentence, world):
    call, right = resolved(entry, world), given(entry, world)
    wrong = wrong.right(world.right(name)) if isinstance(wrong, Of) else wrong
    refuses = getattr(call, "__self__", call)
    if entry == "method.update" and name in ("teacher_logits", "condition"):
        right["index"] = None  # the term before the one that refuses has nothing to write
    sentence = sentence.replace("{name}", name).replace("{got}", repr(wrong))
    refused(lambda: call(**right | {name: wrong}), [refuses] if isinstance(refuses, nn.Module) else [], sentence)


def test_every_argument_of_every_entry_has_wrong_values():
    world = World()
    taken = {(entry, name) for entry in ENTRIES for name in arguments(entry, world)}
    without = {name for entry, name in taken if (entry, name) not in WRONG_OF} - set(WRONG)
    left_to_python = {"device", "penalty", "learning_rate", "copy", "paired", "keep", "student"}  # or to torch
    assert without == OF_LINEAR | left_to_python


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_given_beside_a_wrong_argument_is_right(entry):
    world = World()
    resolved(entry, world)(**given(entry, world))


# ----------------------------------------------------------------------- calls with a fault that is not in one argument alone


def scores(*shape):
    """A discriminator whose scores have a shape of our choice."""
    return module(lambda self, x: torch.zeros(shape))


def adversarial(discriminator, **settings):
    return AdversarialDistributionLoss(discriminator, **settings)


ODD_STORE = SimpleNamespace(read=lambda at: (torch.zeros(len(at) - 1, C), at > 0), write=len, advance_epoch=len)


SCORES = "ValueError: `discriminator` must return a score a row, shape"
MEANS = AdversarialObjective(lambda t, s: (s - t).mean(), lambda s, _: -s.mean())
NO_SCALAR = "must give a scalar (reduction='mean' or 'sum'); got"


def needs(term, name, got):
    remedy = "Pass it by name, or use the `inputs` of the stack to rename or withhold it."
    return f"TypeError: Term '{term}' needs `{name}`; got {got}. {remedy}"


OTHERS = {
    **{
        f"ValueError: `beta` must be inside (0, 1) for 'js'; got {beta}. Its limits: 'forward_kl' at 0, 'reverse_kl' at 1.": [
            lambda w, beta=beta: DeterministicKD(divergence="js", beta=beta),
            lambda w, beta=beta: deterministic_kd(w.s, w.t, divergence="js", beta=float(beta)),
        ]
        for beta in (0, 1)
    },
    **{
        f"IndexError: `class_dim` must be an axis of `student_logits`, which has 2; got {axis}.": [
            lambda w, axis=axis: deterministic_kd(w.s, w.t, class_dim=axis),
            lambda w, axis=axis: progressive_kd(w.s, w.p, alpha=0.5, class_dim=axis),
            lambda w, axis=axis: DeterministicKD(class_dim=axis)(w.s, w.t),
            lambda w, axis=axis: ProgressiveKD(w.store, class_dim=axis)(w.s, index=None),
            lambda w, axis=axis: ProgressiveKD(w.store, class_dim=axis).update(w.s, index=w.i),
            lambda w, axis=axis: adversarial(w.mlp, class_dim=axis)(w.s, w.t),
            lambda w, axis=axis: adversarial(w.mlp, class_dim=axis).discriminator_loss(w.s, w.t),
        ]
        for axis in (2, -3)
    },
    "ValueError: `device` must be the CPU for a store in a file (`path`); got meta.": [
        lambda w: CachedTargets(N, C, device="meta", path="nowhere.bin"),
        lambda w: EMATargets(N, C, device="meta", path="nowhere.bin"),
    ],
    f"{HELD} 5 of them and 0 others are in it. {BUILD_IT}": [
        lambda w: adversarial(w.mlp, optimizer=torch.optim.SGD([*w.mlp.parameters()][1:]))
    ],
    'ValueError: The data set\'s items have a key "index" already. Rename it before indexing.': [
        lambda w: IndexedDataset([{"index": 7}])[0]
    ],
    # tensors
    "ValueError: `student_logits` must have the store's 3 classes on axis 1; got shape (4, 5).": [
        lambda w: w.progressive(torch.ones(N, 5), w.y, index=w.i),
        lambda w: w.progressive.update(torch.ones(N, 5), index=w.i),
    ],
    "ValueError: `x` must have the shape (N, C) = (4, 3); got (4, 5).": [lambda w: w.of_mlp(*torch.ones(2, N, 5))],
    "ValueError: `x` must have the shape (N, C) = (8, 3); got (8, 5).": [
        lambda w: w.of_mlp.update(*torch.ones(2, N, 5))
    ],
    "ValueError: `discriminator` must be on the device of `student_logits`, meta; got cpu. Move it with `.to('meta')`.": [
        lambda w: w.adversarial(*torch.ones(2, N, C, device="meta")),
        lambda w: w.adversarial.update(*torch.ones(2, N, C, device="meta")),
    ],
    "ValueError: `mask` must have the shape of `student_logits` without its class axis, (2, 5); got (2, 3).": [
        lambda w: DeterministicKD(class_dim=1)(*torch.ones(2, 2, 3, 5), mask=torch.ones(2, 3, dtype=torch.bool))
    ],
    "TypeError: … missing 1 required keyword-only argument: 'index'": [lambda w: w.progressive(w.s, w.y)],
    "ValueError: `partner_index` blends the rows of `index`, which must be given too; got index=None.": [
        lambda w: w.progressive(w.s, w.y, index=None, partner_index=w.i)
    ],
    "ValueError: `targets.read` must return rows of shape (4, 3); got (3, 3).": [
        lambda w: ProgressiveKD(ODD_STORE)(w.s, w.y, index=w.i)
    ],
    # the discriminator
    f"{SCORES} (4,) or (4, 1) for rows of shape (4, 3); got (4, 2).": [lambda w: adversarial(scores(N, 2))(w.s, w.t)],
    f"{SCORES} (4,) or (4, 1) for rows of shape (4, 3); got ().": [lambda w: adversarial(scores())(w.s, w.t)],
    f"{SCORES} (8,) or (8, 1) for rows of shape (8, 3); got (1, 8).": [
        lambda w: adversarial(scores(1, 2 * N)).discriminator_loss(w.s, w.t)
    ],
    "ValueError: `penalty` must return a value a row, shape (4,); got (4, 1).": [
        lambda w: adversarial(scores(2 * N), penalty=lambda score, t, s: t[:, :1]).discriminator_loss(w.s, w.t)
    ],
    "ValueError: `objective.discriminator` must return a value a row, shape (4,); got ().": [
        lambda w: adversarial(scores(2 * N), objective=MEANS).discriminator_loss(w.s, w.t)
    ],
    "ValueError: `objective.student` must return a value a row, shape (4,); got ().": [
        lambda w: adversarial(scores(N), objective=MEANS)(w.s, w.t)
    ],
    "TypeError: … takes 2 positional arguments but 3 were given": [
        lambda w: w.of_mlp(w.s, w.t, condition=w.y),
        lambda w: w.of_mlp.update(w.s, w.t, condition=w.y),
    ],
    # at the wrong moment
    "RuntimeError: `update` needs a discriminator that can be trained and its `optimizer`, given on construction: "
    "torch.optim.Adam(discriminator.parameters()). Without one, step on `discriminator_loss` yourself.": [
        lambda w: adversarial(w.mlp).update(w.s, w.t),
        lambda w: (w.mlp.requires_grad_(False), w.of_mlp.update(w.s, w.t)),
    ],
    "RuntimeError: `update` must not be called in eval mode: it would learn from evaluation. Call `.train()`.": [
        lambda w: w.progressive.eval().update(w.s, index=w.i),
        lambda w: w.method.eval().update(**w.all),
        lambda w: w.adversarial.eval().update(w.s, w.t),
    ],
    # what a stack is given
    needs("progressive", "target", "student_logits, teacher_logits, index"): [
        *(lambda w: w.stack(**w.all), lambda w: w.method(**w.all), lambda w: w.stack(**w.all, target=None))
    ],
    needs("progressive", "index", "student_logits, teacher_logits"): [
        lambda w: w.method.update(student_logits=w.s, teacher_logits=w.t)
    ],
    needs("kd", "teacher_logits", "student_logits, teacher_logit"): [
        lambda w: w.kd_alone(student_logits=w.s, teacher_logit=w.t)
    ],
    needs("kd", "student_logits", "nothing"): [lambda w: w.kd_alone()],
    needs("own", "teacher_logits", "student_logits"): [
        lambda w: LossStack({"own": w.adversarial}).update(student_logits=w.s)
    ],
    "TypeError: No term uses `masks`; the terms kd use index, mask, student_logits, target, teacher_logits.": [
        lambda w: w.kd_alone(**w.all, masks=w.mask),
        lambda w: w.kd_alone.update(**w.all, masks=w.mask),
    ],
    f"ValueError: Term 'x' {NO_SCALAR} tensor([…": [
        lambda w: LossStack({"x": module(lambda self, student_logits: student_logits[:, 0])})(student_logits=w.s)
    ],
    f"ValueError: Term 'x' {NO_SCALAR} 1.0.": [
        lambda w: LossStack({"x": module(lambda self, student_logits: 1.0)})(student_logits=w.s)
    ],
}


@pytest.mark.parametrize(("sentence", "call"), [(text, call) for text, calls in OTHERS.items() for call in calls])
def test_a_call_that_does_not_fit_is_refused_and_changes_nothing(sentence, call, world):
    _ = world.method, world.store, world.of_mlp, world.stack
    refused(lambda: call(world), world.parts(), sentence)


# ------------------------------------------------------------------------------------------------- what else a refusal leaves


@pytest.mark.parametrize("wrong", [{"top_k": C + 1}, {"dtype": torch.int64}, {"device": "meta"}, {"decay": 2.0}])
def test_a_refused_store_leaves_no_file(wrong, tmp_path):
    kind = EMATargets if "decay" in wrong else CachedTargets
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be"):
        kind(N, C, path=tmp_path / "targets.bin", **wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("epoch", [None, 5])
@pytest.mark.parametrize("wrong", ["weights['b']", "alpha"])
def test_a_schedule_that_goes_wrong_later_stops_the_stack_where_it_is(wrong, epoch):
    to = epoch or 1
    late = {wrong: lambda at: -1.0 if at == to else 0.5}
    world = World()
    first, second = ProgressiveKD(world.top_1), ProgressiveKD(world.ema, alpha=late.get("alpha", 0.5))
    stack = LossStack({"a": first, "b": second}, weights={"b": late.get("weights['b']", 0.5)})
    stack.update(student_logits=world.s, index=world.i)
    refuses = [second] if wrong == "alpha" else [stack, first, second]
    words = {"alpha": "in the interval [0, 1]"}.get(wrong, "a finite number not below 0")
    refused(lambda: stack.advance_epoch(epoch), refuses, f"ValueError: `{wrong}({to})` must be {words}; got -1.0.")
    assert stack.epoch == 0


SAVED = ("terms.own.targets.rows", "terms.own.targets.known", "terms.own.epoch", "epoch")
FOREIGN = [("list", Of(lambda x: [x])), ("… without values (meta)", META), ("… and torch.sparse_coo", ZEROS_LEFT_OUT)]


@pytest.mark.parametrize(
    ("key", "wrong", "sentence"),
    [
        *((key, how, f"`{key}` in the checkpoint is {kind}; here it is …") for key in SAVED for kind, how in FOREIGN),
        ("terms.own.epoch", Of(lambda x: x - 9), "terms.own: `epoch` must be at least 0; got -9."),
        ("terms.own.epoch", Of(lambda x: x + 1), "terms.own: `alpha(1)` must be in the interval [0, 1]; got 2.0."),
        ("epoch", Of(lambda x: x - 9), "LossStack: `epoch` must be at least 0; got -9."),
    ],
)
def test_a_checkpoint_that_cannot_be_loaded_is_refused_and_changes_nothing(key, wrong, sentence):
    stack = LossStack({"own": ProgressiveKD(CachedTargets(N, C, top_k=1), alpha=lambda epoch: 2.0 * epoch)})
    stack.update(student_logits=torch.randn(N, C), index=torch.arange(N))
    saved = {name: x.clone() for name, x in stack.state_dict().items()}
    saved[key] = wrong.right(saved[key])
    stack.update(student_logits=torch.randn(N, C), index=torch.arange(N))
    said = f"RuntimeError: Error(s) in loading state_dict for LossStack:\n\t{sentence}"
    refused(lambda: stack.load_state_dict(saved), [stack], said)


class Rude:
    """Shows itself with an error, or without end."""

    def __init__(self, said):
        self.said = said

    def __repr__(self):
        return self.said()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (Rude(lambda: 1 / 0), "an object of type Rude, which cannot be shown"),
        (Rude(lambda: "x" * 10**6), "x" * 500 + "..."),
        (10**5000, "an object of type int, which cannot be shown"),  # more digits than Python shows
    ],
    ids=["raises", "long", "digits"],
)
def test_what_is_refused_is_shown_in_few_words_whatever_it_says_of_itself(value, said):
    makes = {
        "alpha": lambda x: ProgressiveKD(CachedTargets(N, C), alpha=x),
        "targets": ProgressiveKD,
        "terms": LossStack,
        "discriminator": AdversarialDistributionLoss,
        "epoch": LossStack({"kd": DeterministicKD()}).advance_epoch,
        "num_samples": lambda x: CachedTargets(x, C),
        "divergence": lambda x: DeterministicKD(divergence=x),
        "process_group": lambda x: CachedTargets(N, C, process_group=x),
    }
    for name, make in makes.items():
        with pytest.raises((TypeError, ValueError), match=rf"^`{name}` must be .*; got {re.escape(said)}\.$"):
            make(value)
