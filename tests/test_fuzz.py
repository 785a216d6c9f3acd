"""Strange arguments at every public call: each gives the right answer or one of our own sentences, and an error changes
nothing."""

from __future__ import annotations

import contextlib
import copy
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
from torch.nn import functional as F

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
    check_setup,
)
from aikd_losses.functional import deterministic_kd, linear_deterministic_kd, progressive_kd

N, C, D = 4, 3, 2
DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.complex64),
    *(torch.bool, torch.uint8, torch.int32, torch.int64),
]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class Subclass(Tensor):
    pass


def in_inference_mode(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def every_second(x: Tensor) -> Tensor:
    wider = x.new_empty((*x.shape[:-1], 2 * x.shape[-1])) if x.ndim else x.new_empty(())
    return wider[..., ::2].copy_(x) if x.ndim else x


LAYOUTS = {  # the same values
    "as it is": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1) if x.ndim else x,
    "every second": every_second,
    "within another": lambda x: torch.cat([x.flatten(), x.flatten()])[x.numel() :].view(x.shape),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x,
    "negative bit": lambda x: torch._neg_view(-x) if x.dtype != torch.bool else x,
    "inference": in_inference_mode,
    "subclass": lambda x: x.as_subclass(Subclass),
    "with a graph": lambda x: x.clone().requires_grad_() * 1 if x.is_floating_point() else x,
}
CHANGES = {  # others of the same kind, and what is none
    **LAYOUTS,
    "expanded": lambda x: x[:1].expand_as(x) if x.ndim else x,
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr() if x.ndim == 2 else x.to_sparse(),
    "mkldnn": lambda x: x.detach().to_mkldnn() if x.dtype == torch.float32 else x,
    "nested": lambda x: torch.nested.as_nested_tensor(list(x)) if x.ndim > 1 else x,
    "conjugate": lambda x: x.to(torch.complex64).conj(),
    "none of it": lambda x: x[:0],
    "without classes": lambda x: x[..., :0],
    "one class": lambda x: x[..., :1],
    "one number": lambda x: x.flatten()[:1].sum(),
    "flat": lambda x: x.flatten(),
    "one axis more": lambda x: x.unsqueeze(-1),
    "one in front": lambda x: x[None],
    "turned": lambda x: x.transpose(0, -1) if x.ndim else x,
    "a list": lambda x: x.tolist(),
    "numpy": lambda x: x.detach().numpy(),
    **{str(dtype): lambda x, dtype=dtype: x.to(dtype) for dtype in DTYPES},
    **{f"filled with {v}": lambda x, v=v: torch.full_like(x, v) for v in (0, 1, -1, 7, -100, 2**40, -(2**63))},
    **{
        f"with {v}": lambda x, v=v: x.clone().flatten().index_fill(0, torch.tensor([0]), v).view(x.shape)
        for v in (math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-40)
    },
    "all": lambda x: torch.full_like(x, -math.inf),
}
ODD = [  # in place of anything
    *(None, True, False, 0, 1, -1, 2**70, 10**400, 0.5, -0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf, 1j),
    *(Fraction(1, 2), np.float32(0.5), np.int64(1), np.float64("nan"), np.array([1.0, 2.0]), np.array(1)),
    *("x", "mean", "cpu", "cuda:x", b"x", [], [1.0], (), {}, {"a": 1}, {1: 2}, {"kd": {"mask": 3}}, object()),
    *(Tensor, torch.float32, torch.int8, torch.device("meta"), slice(None), range(2)),
    *(
        torch.tensor(0.5),
        torch.tensor(1),
        torch.tensor([]),
        torch.tensor(True),
        torch.tensor(1j),
        torch.ones(2, 2, 2, 2),
    ),
    iter([1]),
]


class Sees(nn.Module):
    """A discriminator of one's own, with a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(C, 1)

    def forward(self, x, condition=None):
        return (
            self.score(x) if condition is None else self.score(x) + condition.reshape(len(x), -1).float().sum(-1, True)
        )


def adam(discriminator):
    return torch.optim.Adam(discriminator.parameters(), lr=1e-3)


def adversarial(discriminator=None, **arguments):
    discriminator = MLPDiscriminator(C, hidden=(4,)) if discriminator is None else discriminator
    return AdversarialDistributionLoss(discriminator, optimizer=adam(discriminator), **arguments)


def progressive(store=None, **arguments):
    loss = ProgressiveKD(CachedTargets(N, C) if store is None else store, **arguments)
    loss.update(torch.randn(N, C), index=torch.arange(N))
    return loss


class World:
    """Tensors that fit, and objects with some history, made when they are asked for."""

    def __init__(self) -> None:
        self.objects: list[nn.Module] = []
        s, t = torch.randn(N, C), torch.randn(N, C)
        self.logits = dict(student_logits=s, teacher_logits=t)
        self.mask = torch.tensor([True, True, False, True])
        self.i, self.y, self.p = torch.arange(N), torch.arange(N) % C, t.softmax(-1)
        self.ids = dict(index=self.i, mask=self.mask)
        self.of_progressive = dict(student_logits=s, **self.ids, partner_index=self.i.flip(0))

    def keep(self, x):
        self.objects.append(x)
        return x

    def state(self):
        state = {}
        for i, x in enumerate(self.objects):
            state |= {f"{i}.{name}": value for name, value in x.state_dict().items()}
            stores = [y for y in [x, getattr(x, "targets", None)] if isinstance(y, CachedTargets | EMATargets)]
            state |= {f"{i}.writes": y._last_write for y in stores}
        return copy.deepcopy(state)


def conditional():
    return adversarial(Sees(), objective="relativistic", inputs="log_probs")


METHOD = dict(num_samples=N, num_classes=C, num_epochs=2)
CALLS = {  # name: the world -> (a function, arguments that fit)
    "deterministic_kd": lambda w: (
        deterministic_kd,
        dict(
            **w.logits, mask=w.mask, temperature=2.0, divergence="forward_kl", beta=0.5, reduction="mean", class_dim=1
        ),
    ),
    "deterministic_kd js": lambda w: (deterministic_kd, dict(**w.logits, mask=w.mask, divergence="js", beta=0.5)),
    "deterministic_kd reverse_kl": lambda w: (deterministic_kd, dict(**w.logits, divergence="reverse_kl")),
    "progressive_kd": lambda w: (
        progressive_kd,
        dict(
            **dict(student_logits=w.logits["student_logits"], previous=w.p, target=w.y, alpha=torch.rand(N)),
            **dict(known=w.mask.flip(0), temperature=2.0, mask=w.mask, reduction="none", class_dim=-1),
        ),
    ),
    "progressive_kd soft": lambda w: (
        progressive_kd,
        dict(student_logits=w.logits["student_logits"], previous=w.p, target=w.p.flip(0), alpha=0.5),
    ),
    "linear_deterministic_kd": lambda w: (
        linear_deterministic_kd,
        dict(
            **dict(student_hidden=torch.randn(N, D), student_weight=torch.randn(C, D), student_bias=torch.randn(C)),
            **dict(teacher_hidden=torch.randn(N, D), teacher_weight=torch.randn(C, D), teacher_bias=torch.randn(C)),
            **dict(temperature=2.0, mask=w.mask, reduction="mean"),
        ),
    ),
    "DeterministicKD": lambda w: (
        DeterministicKD,
        dict(temperature=2.0, divergence="js", beta=0.5, reduction="sum", class_dim=None),
    ),
    "DeterministicKD()": lambda w: (DeterministicKD(), dict(**w.logits, mask=w.mask)),
    "ProgressiveKD": lambda w: (
        ProgressiveKD,
        dict(targets=CachedTargets(N, C), alpha=0.5, temperature=2.0, reduction="mean", class_dim=1),
    ),
    "ProgressiveKD()": lambda w: (
        w.keep(progressive()),
        dict(**w.of_progressive, target=w.y, mix_lambda=torch.rand(N)),
    ),
    "ProgressiveKD() without blend": lambda w: (
        w.keep(progressive(EMATargets(N, C))),
        dict(student_logits=w.logits["student_logits"], target=w.p, **w.ids),
    ),
    "ProgressiveKD.update": lambda w: (
        w.keep(progressive()).update,
        dict(student_logits=w.logits["student_logits"], **w.ids),
    ),
    "ProgressiveKD.update blended": lambda w: (w.keep(progressive()).update, w.of_progressive),
    "ProgressiveKD.advance_epoch": lambda w: (w.keep(progressive()).advance_epoch, dict(epoch=3)),
    # A path or device that the system refuses is its own error: of those here none is.
    "CachedTargets": lambda w: (
        CachedTargets,
        dict(num_samples=N, num_classes=C, dtype=torch.float32, device="cpu", top_k=2, path=None, process_group=None),
    ),
    "EMATargets": lambda w: (EMATargets, dict(num_samples=N, num_classes=C, decay=0.5, dtype=torch.float64)),
    "CachedTargets.read": lambda w: (w.keep(CachedTargets(N, C, top_k=2)).read, dict(index=w.i)),
    "CachedTargets.write": lambda w: (
        w.keep(CachedTargets(N, C, top_k=2)).write,
        dict(index=w.i, probs=w.p, keep=w.mask),
    ),
    "EMATargets.write": lambda w: (w.keep(EMATargets(N, C)).write, dict(index=w.i, probs=w.p)),
    "AdversarialDistributionLoss": lambda w: (
        AdversarialDistributionLoss,
        dict(
            **dict(discriminator=MLPDiscriminator(C), objective="hinge", inputs="logits", temperature=2.0),
            **dict(penalty=None, optimizer=None, reduction="mean", class_dim=1, process_group=None),
        ),
    ),
    **{
        f"AdversarialDistributionLoss.{method} {i}": lambda w, method=method, build=build: (
            getattr(w.keep(build()), method),
            dict(**w.logits, mask=w.mask, **({"condition": w.y} if build is conditional else {})),
        )
        for method in ("forward", "discriminator_loss", "update")
        for i, build in enumerate(
            (
                conditional,
                lambda: adversarial(penalty=GradientPenalty(), inputs="logits", reduction="none"),
                lambda: adversarial(MLPDiscriminator(C, spectral_norm=True), penalty=ZeroCenteredPenalty()),
            )
        )
    },
    "a condition for nobody": lambda w: (w.keep(adversarial()).update, dict(**w.logits, condition=None)),
    "AdversarialObjective": lambda w: (AdversarialObjective, dict(discriminator=len, student=len, paired=True)),
    "GradientPenalty": lambda w: (GradientPenalty, dict(weight=10.0)),
    "ZeroCenteredPenalty": lambda w: (ZeroCenteredPenalty, dict(gamma=10.0)),
    "MLPDiscriminator": lambda w: (
        MLPDiscriminator,
        dict(num_classes=C, hidden=(4,), spectral_norm=False, negative_slope=0.1),
    ),
    "MLPDiscriminator()": lambda w: (
        torch.no_grad()(MLPDiscriminator(C)),
        dict(x=w.p),
    ),  # no layer trains on inference tensors
    "MLPDiscriminator() spectral": lambda w: (
        torch.no_grad()(w.keep(MLPDiscriminator(C, spectral_norm=True))),
        dict(x=w.p),
    ),
    "FrozenTeacher": lambda w: (FrozenTeacher, dict(model=nn.Linear(2, 2), copy=True, save=False)),
    "LossStack": lambda w: (
        LossStack,
        dict(terms={"kd": DeterministicKD()}, weights={"kd": 0.5}, inputs={"kd": {"mask": None}}),
    ),
    "LossStack weights": lambda w: (
        lambda weight: LossStack({"kd": DeterministicKD()}, weights={"kd": weight}),
        dict(weight=0.5),
    ),
    "LossStack inputs": lambda w: (
        lambda inputs: LossStack({"kd": DeterministicKD()}, inputs={"kd": inputs}),
        dict(inputs={"mask": None}),
    ),
    "LossStack()": lambda w: (
        w.keep(LossStack({"kd": DeterministicKD(), "b": progressive()}, weights={"kd": 0.5})),
        dict(**w.logits, **w.ids, target=w.y),
    ),
    "LossStack.update": lambda w: (
        w.keep(LossStack({"p": progressive(), "a": adversarial()})).update,
        dict(**w.logits, **w.ids, target=w.y),
    ),
    "LossStack.advance_epoch": lambda w: (
        w.keep(LossStack({"p": progressive(), "a": adversarial()})).advance_epoch,
        dict(epoch=None),
    ),
    "AIKDLoss": lambda w: (
        AIKDLoss,
        dict(
            **METHOD,
            **dict(temperature=2.0, alpha=0.5, weights={"adversarial": 0.5}, targets=None, discriminator=None),
            **dict(objective="hinge", penalty=None, learning_rate=1e-3, class_dim=1),
        ),
    ),
    "AIKDLoss()": lambda w: (
        w.keep(AIKDLoss(**METHOD)),
        dict(**w.logits, **w.ids, target=w.y, partner_index=None, mix_lambda=None, condition=None),
    ),
    "AIKDLoss.update": lambda w: (
        w.keep(AIKDLoss(**METHOD)).update,
        dict(**w.logits, **w.ids, partner_index=None, condition=None),
    ),
    "AIKDLoss.advance_epoch": lambda w: (w.keep(AIKDLoss(**METHOD)).advance_epoch, dict(epoch=1)),
    "check_setup": lambda w: (
        partial(check_setup, w.keep(AIKDLoss(**METHOD))),
        dict(**w.logits, **w.ids, target=w.y, partner_index=None, condition=None, optimizer=None),
    ),
    "check_setup soft": lambda w: (
        partial(check_setup, w.keep(LossStack({"ce": nn.CrossEntropyLoss(), "p": progressive()}))),
        dict(**w.logits, **w.ids, target=w.p),
    ),
    "IndexedDataset": lambda w: (IndexedDataset, dict(dataset=[1, 2])),
    "IndexedDataset[]": lambda w: ((lambda index: IndexedDataset([1, 2])[index]), dict(index=1)),
    "IndexedDataset of many": lambda w: (
        (lambda index: IndexedDataset([1, 2]).__getitems__([0, index])),
        dict(index=1),
    ),
    "LabelWeight": lambda w: (LabelWeight, dict(weight=0.5, alpha=0.5)),
    "LabelWeight()": lambda w: (LabelWeight(0.5, LinearRamp(0.5, 3)), dict(epoch=3)),
    "LinearRamp": lambda w: (LinearRamp, dict(end=0.5, num_epochs=3)),
    "LinearRamp()": lambda w: (LinearRamp(0.5, 3), dict(epoch=3)),
    **{
        f"{type(x).__name__}.load_state_dict {len(x.state_dict())}": lambda w, x=x: (
            (lambda **state: w.keep(copy.deepcopy(x)).load_state_dict(state)),
            dict(x.state_dict()),
        )
        for x in (CachedTargets(N, C, top_k=2), EMATargets(N, C), progressive(), adversarial())
    },
}
OWN = (ValueError, TypeError, IndexError, RuntimeError)
SENTENCE = re.compile(
    r"`[a-z_]+(\(\d+\)|\[.*\]|\.[a-z]+)*`.* (must|is|needs|are|blends|has|does) |Term '|No term uses|Error\(s\) in loading"
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
    return not isinstance(x, float) or abs(x) < 1e30


@st.composite
def arguments(draw, fitting):
    """Those that fit, one to three of them changed or replaced."""
    given = dict(fitting)
    for name in draw(st.lists(st.sampled_from(sorted(given)), min_size=1, max_size=3, unique=True)):
        x = given[name]
        if isinstance(x, Tensor) and draw(st.integers(0, 5)):
            how = draw(st.sampled_from(sorted(CHANGES)))
            with contextlib.suppress(RuntimeError, TypeError, IndexError, ValueError):  # there is no such tensor
                given[name] = CHANGES[how](x)
        else:
            given[name] = draw(st.sampled_from(ODD))
    return given


def check(world, function, given, call):
    before = world.state()
    kept = {name: x.detach().clone() if isinstance(x, Tensor) and not x.is_nested else x for name, x in given.items()}
    result = error = None
    try:
        result = function(**given)
    except OWN as caught:
        error = caught
    if error is not None:
        assert SENTENCE.search(str(error)), f"not ours: {error!r}"
        # A module's load_state_dict goes on with the next part, torch's way: what a store does is in test_messages.py.
        if "load_state_dict" not in call:
            after = world.state()
            assert all(same(value, after[name]) for name, value in before.items())
    elif all(finite(x) for x in given.values()):
        assert all(x.is_meta or not torch.isnan(x).any() for x in tensors_in(result))
    assert not any(x.requires_grad for y in world.objects for x in tensors_in(dict(y.state_dict())))
    for name, x in kept.items():
        assert same(x, given[name]), f"{name} was changed"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", CALLS)
@settings(max_examples=15)
@given(data=st.data())
def test_a_strange_argument_gives_a_number_or_a_sentence_and_an_error_changes_nothing(
    call, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # a path may be asked for
    world = World()
    function, fitting = CALLS[call](world)
    check(world, function, data.draw(arguments(fitting), label="arguments"), call)


# --------------------------------------------------------------------------------- values, against torch's own in float64


@st.composite
def batches(draw):
    """Logits of two sides, class axis and mask; any type, any layout, also without a single position."""
    axes = draw(
        st.lists(st.sampled_from([0, 1, 2, 3, 40]), min_size=1, max_size=4).filter(lambda x: math.prod(x) <= 200)
    )
    at = draw(st.integers(0, len(axes)))
    shape = (*axes[:at], draw(st.sampled_from([2, 3, 33])), *axes[at:])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    size = draw(st.sampled_from([0.0, 1e-4, 1.0, 30.0, 1e4]))

    def tensor(x, dtypes):
        x = x.to(draw(st.sampled_from(dtypes)))
        return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](x)

    same = [draw(st.sampled_from(FLOATS))] if draw(st.booleans()) else FLOATS
    student, teacher = (tensor(size * torch.randn(shape, generator=generator), same).detach() for _ in range(2))
    if draw(st.booleans()) and student.numel():  # an excluded class
        student, teacher = (x.clone().index_fill_(at, torch.tensor([1]), -math.inf) for x in (student, teacher))
    if draw(st.booleans()):  # one and the same for all rows
        student = student.narrow(0, 0, min(1, shape[0])).expand(shape) if at else student
    mask = draw(st.sampled_from([None, 0.0, 0.5, 1.0]))
    if mask is not None:
        mask = tensor(torch.rand((*axes,), generator=generator) < mask, [torch.bool])
    return student, teacher, draw(st.sampled_from([at, at - len(shape)])), mask


def widened(x: Tensor, dim: int) -> Tensor:
    """A copy of its own in float64, class axis last."""
    return x.detach().clone().as_subclass(Tensor).double().movedim(dim, -1).contiguous()


def reduced(values: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    counts = torch.ones_like(values) if mask is None else mask.double()
    values = torch.where(counts > 0, values, 0.0)
    return {"none": values, "sum": values.sum(), "mean": values.sum() / counts.sum().clamp_min(1)}[reduction]


def log_softmax(x: Tensor) -> Tensor:
    return torch.log_softmax(x, -1).clamp_min(-1e30)  # an excluded class: 0 times that is 0


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def cross_entropy(p: Tensor, log_q: Tensor) -> Tensor:
    return -torch.where(p == 0, 0.0, p * log_q).sum(-1)


def agrees(student: Tensor, dim: int, value, expected, size: float) -> None:
    """`value(student)` and its gradient are those of `expected(the same in float64)`; nothing else changes."""
    before = student.clone()
    leaf = LAYOUTS["as it is"](student.clone() if student.is_inference() else student.detach()).requires_grad_()
    plain = widened(student, dim).requires_grad_()
    got, wanted = value(leaf), expected(plain)
    assert got.dtype == torch.float64 or (got.dtype == torch.float32 and student.dtype != torch.float64)
    assert torch.equal(student, before)
    # float32 rounds logits / T, of which a softmax takes the exponential.
    size = size * (
        1 + 10 * widened(student, dim).nan_to_num(0.0, 0.0, 0.0).abs().sum().item() / max(1, student.numel())
    )
    tolerance = dict(rtol=1e-5, atol=1e-6 * size)
    torch.testing.assert_close(got.double().as_subclass(Tensor), wanted, **tolerance)
    slope = torch.ones_like(wanted)
    (own,), (reference,) = torch.autograd.grad(got, leaf, slope.to(got)), torch.autograd.grad(wanted, plain, slope)
    assert own.dtype == student.dtype
    rounding = max(1e-5, torch.finfo(student.dtype).eps)
    torch.testing.assert_close(widened(own, dim), reference, rtol=rounding, atol=1e-6 * size)


temperatures = st.sampled_from([0.1, 1.0, 4, 100.0])
reductions = st.sampled_from(["mean", "sum", "none"])


@given(
    batches(),
    temperatures,
    st.sampled_from(["forward_kl", "reverse_kl", "js"]),
    st.sampled_from([0.1, 0.5]),
    reductions,
)
def test_a_divergence_is_that_of_float64_whatever_the_shape_type_and_layout(batch, temperature, name, beta, reduction):
    student, teacher, dim, mask = batch
    log_p = log_softmax(widened(teacher, dim) / temperature)

    def expected(s):
        log_q = log_softmax(s / temperature)
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        values = {
            "forward_kl": lambda: kl(log_p, log_q),
            "reverse_kl": lambda: kl(log_q, log_p),
            "js": lambda: beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m),
        }
        return reduced(temperature**2 * values[name](), mask, reduction)

    settings = dict(temperature=temperature, divergence=name, beta=beta, reduction=reduction, class_dim=dim)
    for value in (
        lambda s: deterministic_kd(s, teacher, mask=mask, **settings),
        lambda s: DeterministicKD(**settings)(s, teacher, mask=mask),
    ):
        agrees(student, dim, value, expected, temperature**2 * max(1, student.numel()))


@given(batches(), temperatures, st.sampled_from([0.0, 0.3, 1.0, "a row", "a number"]), st.data(), reductions)
def test_progressive_is_that_of_float64_whatever_the_shape_type_and_layout(batch, temperature, alpha, data, reduction):
    student, teacher, dim, mask = batch
    previous = teacher.detach().float().softmax(dim)
    positions = widened(student, dim).shape[:-1]
    if isinstance(alpha, str):
        alpha = torch.rand(positions) if alpha == "a row" else torch.tensor(0.3)
    known = data.draw(st.sampled_from([None, torch.rand(positions) < 0.5]))
    kind = data.draw(st.sampled_from([None, "labels", "probabilities"]))
    log_y = {
        None: None,
        "labels": torch.randint(2, positions) * 2 % student.shape[dim],
        "probabilities": previous.flip(dim),
    }
    target = log_y[kind]

    def expected(s):
        a = torch.as_tensor(alpha, dtype=torch.float64).expand(positions) * (1 if known is None else known)
        soft = cross_entropy(widened(previous, dim), torch.log_softmax(s / temperature, -1))
        value = torch.where(a > 0, a * temperature**2 * soft, 0.0)
        if target is not None:
            y = F.one_hot(target, s.shape[-1]).double() if kind == "labels" else widened(target, dim)
            value = value + torch.where(a < 1, (1 - a) * cross_entropy(y, torch.log_softmax(s, -1)), 0.0)
        return reduced(value, mask, reduction)

    settings = dict(alpha=alpha, known=known, temperature=temperature, mask=mask, reduction=reduction, class_dim=dim)
    size = temperature**2 * max(1, student.numel())
    agrees(student, dim, lambda s: progressive_kd(s, previous, target, **settings), expected, size)


@given(batches(), st.sampled_from([None, 1, 2]), st.sampled_from([torch.float16, torch.float64]))
def test_a_store_reads_what_was_written_whatever_the_type_and_layout(batch, top_k, dtype):
    rows = batch[0].detach().movedim(batch[2], -1).reshape(-1, batch[0].shape[batch[2]]).softmax(-1)
    store = CachedTargets(max(1, len(rows)), rows.shape[1], top_k=top_k, dtype=dtype)
    index = torch.arange(2 * len(rows)).flip(0)[::2].div(2, rounding_mode="floor")
    before = rows.clone()
    store.write(index, rows)
    got, known = store.read(index)
    assert known.all()
    assert torch.equal(rows, before)
    kept = rows.double() if top_k is None else rows.double().topk(top_k, -1)[0]
    found = got.double() if top_k is None else got.double().topk(top_k, -1)[0]
    torch.testing.assert_close(found.as_subclass(Tensor), kept.as_subclass(Tensor), rtol=2e-2, atol=1e-2)
