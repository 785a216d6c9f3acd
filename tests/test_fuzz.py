"""Strange arguments at every public call: each gives the right answer or one of our own sentences, and an error changes
nothing."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import re
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

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
    LinearRamp,
    LossStack,
    MLPDiscriminator,
    ProgressiveKD,
    ZeroCenteredPenalty,
    check_setup,
)
from aikd_losses.functional import deterministic_kd, linear_deterministic_kd, progressive_kd

N, C, D = 4, 3, 2
DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.complex64),
    *(torch.bool, torch.uint8, torch.int32, torch.int64),
]


class Subclass(Tensor):
    pass


LAYOUTS = {  # the same values
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1) if x.ndim else x,
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2] if x.ndim else x,
    "within another": lambda x: torch.cat([x.flatten(), x.flatten()])[x.numel() :].view(x.shape),
    "negative bit": lambda x: torch._neg_view(-x) if x.dtype != torch.bool else x,
    "inference": torch.inference_mode()(torch.clone),
    "subclass": lambda x: x.as_subclass(Subclass),
    "with a graph": lambda x: x.clone().requires_grad_() * 1 if x.is_floating_point() else x,
}
CHANGES = {  # others of the same kind, and what is none
    **LAYOUTS,
    "expanded": lambda x: x[:1].expand_as(x) if x.ndim else x,
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "mkldnn": lambda x: x.detach().to_mkldnn(),
    "nested": lambda x: torch.nested.as_nested_tensor(list(x)) if x.ndim > 1 else x,
    "conjugate": lambda x: x.to(torch.complex64).conj(),
    "none of it": lambda x: x[:0],
    "without classes": lambda x: x[..., :0],
    "one class": lambda x: x[..., :1],
    "one number": lambda x: x.flatten()[:1].sum(),
    "flat": torch.flatten,
    "one axis more": lambda x: x.unsqueeze(-1),
    "one in front": lambda x: x[None],
    "turned": lambda x: x.transpose(0, -1),
    "a list": Tensor.tolist,
    "numpy": lambda x: x.detach().numpy(),
    **{str(dtype): lambda x, dtype=dtype: x.to(dtype) for dtype in DTYPES},
    **{f"filled with {v}": lambda x, v=v: torch.full_like(x, v) for v in (0, 1, -1, -100, 2**40, -(2**63), -math.inf)},
    **{
        f"with {v}": lambda x, v=v: x.clone().flatten().index_fill(0, torch.tensor([0]), v).view(x.shape)
        for v in (math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-40)
    },
}
ODD = [  # in place of anything
    *(None, True, False, 0, 1, -1, 2**70, 10**400, 0.5, -0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf, 1j),
    *(Fraction(1, 2), np.float32(0.5), np.int64(1), np.float64("nan"), np.array(1)),
    *("x", "mean", "cpu", "cuda:x", b"x", [], [1.0], (), {}, {"a": 1}, {1: 2}, {"kd": {"mask": 3}}, object()),
    *(Tensor, torch.float32, torch.int8, torch.device("meta"), slice(None), range(2), iter([1])),
    *map(torch.tensor, (0.5, 1, [], True, 1j, [[[[1.0, 1.0]]]])),
]


class Sees(nn.Linear):
    """A discriminator of one's own, with a condition."""

    def forward(self, x, condition=None):
        shift = 0 if condition is None else condition.reshape(len(x), -1).float().sum(-1, True)
        return super().forward(x) + shift


def adversarial(discriminator=None, **arguments):
    discriminator = discriminator or MLPDiscriminator(C, hidden=(4,))
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    return AdversarialDistributionLoss(discriminator, optimizer=optimizer, **arguments)


def progressive(store=CachedTargets, **arguments):
    loss = ProgressiveKD(store(N, C), **arguments)
    loss.update(torch.randn(N, C), index=torch.arange(N))
    return loss


class World:
    """Tensors that fit, by the names of the parameters that take them, and objects with some history."""

    def __init__(self) -> None:
        self.objects: list[nn.Module] = []
        s, t, mask = torch.randn(N, C), torch.randn(N, C), torch.tensor([True, True, False, True])
        y, index, p = torch.arange(N) % C, torch.arange(N), t.softmax(-1)
        self.step = dict(student_logits=s, teacher_logits=t, target=y, index=index, mask=mask)
        self.given = self.step | dict(partner_index=index.flip(0), mix_lambda=torch.rand(N), condition=y)
        self.given |= dict(previous=p, probs=p, known=mask.flip(0), alpha=0.5, epoch=1, weight=10.0, gamma=10.0)
        self.heads = torch.randn(N, D), torch.randn(C, D), torch.randn(N, D), torch.randn(C, D)
        self.given |= dict(num_samples=N, num_classes=C, num_epochs=3, end=0.5, decay=0.5, dataset=[1, 2])
        self.given |= dict(targets=CachedTargets(N, C), discriminator=MLPDiscriminator(C), model=nn.Linear(2, 2))
        self.given |= dict(terms={"kd": DeterministicKD()}, weights=None, dtype=torch.float32)

    def keep(self, x):
        self.objects.append(x)
        return x

    def state(self):
        return copy.deepcopy({f"{i}.{n}": x for i, y in enumerate(self.objects) for n, x in y.state_dict().items()})

    def fitting(self, function, changed):
        """Arguments for every parameter: those that fit, or what it is when left out."""
        found = {}
        for name, how in inspect.signature(function).parameters.items():
            if how.kind == how.VAR_KEYWORD:
                found |= self.step
            elif how.default is how.empty or name in self.given:
                found[name] = self.given.get(name)
            else:
                found[name] = how.default
        return {name: x for name, x in (found | changed).items() if x is not ...}


def conditional():
    return adversarial(Sees(C, 1), objective="relativistic", inputs="log_probs")


def penalized(penalty=GradientPenalty(), **settings):  # noqa: B008
    return adversarial(penalty=penalty, **settings)


NO_CONDITION, UNBLENDED = dict(condition=None), dict(partner_index=None, mix_lambda=1.0)
CLASSES = (DeterministicKD, ProgressiveKD, CachedTargets, EMATargets, MLPDiscriminator, LinearRamp, IndexedDataset)
CLASSES += (GradientPenalty, ZeroCenteredPenalty, LossStack, AdversarialDistributionLoss)
CALLS = {  # name: the world -> (a function, arguments that are not those of the world)
    **{f.__name__: lambda w, f=f: (f, {}) for f in (deterministic_kd, progressive_kd, *CLASSES)},
    "deterministic_kd js": lambda w: (deterministic_kd, dict(divergence="js")),
    "progressive_kd soft": lambda w: (progressive_kd, dict(target=w.given["probs"].flip(0), reduction="none")),
    "progressive_kd each": lambda w: (progressive_kd, dict(alpha=torch.rand(N), temperature=2.0, class_dim=-1)),
    "linear_deterministic_kd": lambda w: (
        lambda temperature, mask, reduction: linear_deterministic_kd(
            *w.heads, temperature=temperature, mask=mask, reduction=reduction
        ),
        dict(temperature=2.0, reduction="mean"),
    ),
    "DeterministicKD()": lambda w: (DeterministicKD().forward, {}),
    "ProgressiveKD()": lambda w: (w.keep(progressive()).forward, {}),
    "ProgressiveKD() of an EMA": lambda w: (w.keep(progressive(EMATargets)).forward, UNBLENDED),
    "ProgressiveKD.update": lambda w: (w.keep(progressive()).update, dict(partner_index=None)),
    "ProgressiveKD.update blended": lambda w: (w.keep(progressive()).update, {}),
    "ProgressiveKD.advance_epoch": lambda w: (w.keep(progressive()).advance_epoch, {}),
    # A path or device that the system refuses is its own error: of those here none is.
    "CachedTargets of two": lambda w: (CachedTargets, dict(top_k=2, device="cpu")),
    "CachedTargets.read": lambda w: (w.keep(CachedTargets(N, C, top_k=2)).read, {}),
    "CachedTargets.write": lambda w: (w.keep(CachedTargets(N, C, top_k=2)).write, dict(keep=...)),
    "EMATargets.write": lambda w: (w.keep(EMATargets(N, C)).write, dict(keep=...)),
    **{
        f"AdversarialDistributionLoss.{method} {i}": lambda w, method=method, build=build, given=given: (
            (getattr(w.keep(build()), method), given)
        )
        for method in ("forward", "discriminator_loss", "update")
        for i, (build, given) in enumerate(
            (
                (conditional, {}),
                (partial(penalized, inputs="logits", reduction="none"), NO_CONDITION),
                (partial(penalized, ZeroCenteredPenalty()), NO_CONDITION),
            )
        )
    },
    "AdversarialObjective": lambda w: (AdversarialObjective, dict(discriminator=len, student=len)),
    "FrozenTeacher": lambda w: (FrozenTeacher, dict(copy=...)),
    "LossStack()": lambda w: (w.keep(LossStack({"kd": DeterministicKD(), "b": progressive()})).forward, {}),
    "LossStack.update": lambda w: (w.keep(LossStack({"p": progressive()})).update, {}),
    "LossStack.advance_epoch": lambda w: (
        w.keep(LossStack({"p": progressive(), "a": adversarial()})).advance_epoch,
        {},
    ),
    "AIKDLoss": lambda w: (AIKDLoss, dict(objective="hinge", learning_rate=...)),
    "AIKDLoss()": lambda w: (w.keep(AIKDLoss(N, C, 2)).forward, dict(partner_index=None, condition=None)),
    "AIKDLoss.update": lambda w: (AIKDLoss(N, C, 2).update, NO_CONDITION),
    "AIKDLoss.advance_epoch": lambda w: (w.keep(AIKDLoss(N, C, 2)).advance_epoch, {}),
    "check_setup": lambda w: (partial(check_setup, w.keep(AIKDLoss(N, C, 2))), dict(model=None)),
    "check_setup soft": lambda w: (
        partial(check_setup, w.keep(LossStack({"ce": nn.CrossEntropyLoss(), "p": progressive()}))),
        dict(model=None, target=w.given["probs"], teacher_logits=...),
    ),
    "LinearRamp()": lambda w: (LinearRamp(0.5, 3), {}),
}
OWN = (ValueError, TypeError, IndexError, RuntimeError)
SENTENCE = re.compile(
    r"`[a-z_]+(\(\d+\)|\[.*\]|\.[a-z]+)*`.* (must|is|needs|are|blends|has|does) |Term '|No term uses|Error\(s\) in loading"
    # torch's and Python's own, which say what is wrong
    r"|Device|device|meta tensor|not implemented for"
)


def looked_into(x) -> bool:
    """Whether there are values to compare."""
    return isinstance(x, Tensor) and not x.is_meta and not x.is_nested and x.layout == torch.strided


def same(a, b) -> bool:
    if not looked_into(a) or (a.is_floating_point() and a.element_size() == 1):
        return True
    a, b = (x.detach().resolve_neg().resolve_conj() for x in (a, b))
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def tensors_in(x):
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict | list | tuple):
        for y in x.values() if isinstance(x, dict) else x:
            yield from tensors_in(y)


def finite(x) -> bool:
    if looked_into(x):
        return x.element_size() == 1 or bool((x.detach().abs() < 1e30).all())  # products of larger ones overflow
    return isinstance(x, bool) or not isinstance(x, int | float) or 1e-18 < abs(x) < 1e18  # whose squares are float32


@st.composite
def changed(draw, fitting):
    """Arguments that fit, one to three of them changed or replaced, and whether their values are the same."""
    found, equal = dict(fitting), True
    for name in draw(st.lists(st.sampled_from(sorted(found)), min_size=1, max_size=3, unique=True)):
        x = found[name]
        if isinstance(x, Tensor) and draw(st.integers(0, 5)):
            how = draw(st.sampled_from(sorted(CHANGES)))
            with contextlib.suppress(RuntimeError, TypeError, IndexError, ValueError):  # there is no such tensor
                found[name] = CHANGES[how](x)
                equal = equal and how in LAYOUTS
        else:
            found[name], equal = draw(st.sampled_from(ODD)), False
    return found, equal


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", CALLS)
@settings(max_examples=15)
@given(data=st.data())
def test_a_strange_argument_gives_the_right_answer_or_a_sentence_and_an_error_changes_nothing(
    call, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # a path may be asked for
    world = World()
    function, other = CALLS[call](world)
    fitting = world.fitting(function, other)
    arguments, equal = data.draw(changed(fitting), label="arguments")
    kept = {n: x.detach().clone() if isinstance(x, Tensor) and not x.is_nested else x for n, x in arguments.items()}
    pure = not re.search("update|write|advance", call)
    torch.default_generator.manual_seed(0)
    expected = list(tensors_in(function(**fitting))) if pure and equal else []
    before = world.state()
    result = error = None
    torch.default_generator.manual_seed(0)
    try:
        result = function(**arguments)
    except OWN as caught:
        error = caught
    for found, right in zip(tensors_in(result), expected, strict=False):
        assert_close(found.detach().as_subclass(Tensor), right.detach())
    if error is not None:
        # What is said of settings is in test_messages.py, or left to Python.
        assert inspect.isclass(function) or SENTENCE.search(str(error)), f"not ours: {error!r}"
        assert all(same(value, before[name]) for name, value in world.state().items())
    elif all(map(finite, arguments.values())):
        assert all(x.is_meta or not torch.isnan(x).any() for x in tensors_in(result))
    assert not any(x.requires_grad for y in world.objects for x in tensors_in(dict(y.state_dict())))
    for name, x in kept.items():
        assert same(x, arguments[name]), f"{name} was changed"
