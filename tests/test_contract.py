"""What every loss promises, in every reduction, format and layout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from aikd_losses import (
    AdversarialDistributionLoss,
    AIKDLoss,
    CachedTargets,
    DeterministicKD,
    EMATargets,
    GradientPenalty,
    LinearRamp,
    LossStack,
    MLPDiscriminator,
    ProgressiveKD,
    ZeroCenteredPenalty,
)

C, ROWS = 5, 12
OBJECTIVES = ["non_saturating", "least_squares", "hinge", "wasserstein", "relativistic"]


def store(**settings: Any) -> CachedTargets:
    filled = CachedTargets(ROWS, C, **settings)
    filled.write(torch.arange(0, ROWS, 2), torch.randn(ROWS // 2, C).softmax(-1))  # every other row is known
    return filled


@dataclass(frozen=True)
class Kind:
    """How a loss is built, given reduction and class_dim, and how it is called."""

    build: Callable[..., torch.nn.Module]
    call: Callable[..., Tensor]


def of_pair(loss, s, t, y, index, mask):
    return loss(s, t, mask=mask)


def discriminator_loss(loss, s, t, y, index, mask):
    return loss.discriminator_loss(s, t, mask=mask)


def with_target(loss, s, t, y, index, mask):
    return loss(s, y, index=index, mask=mask)


def with_probabilities(loss, s, t, y, index, mask):
    return loss(s, t.softmax(loss.class_dim or 1), index=index, mask=mask)


def without_target(loss, s, t, y, index, mask):
    return loss(s, index=index, mask=mask)


KINDS = {
    **{
        f"deterministic {d}": Kind(lambda d=d, **kw: DeterministicKD(divergence=d, **kw), of_pair)
        for d in ("forward_kl", "reverse_kl", "js")
    },
    "progressive": Kind(lambda **kw: ProgressiveKD(store(), temperature=2.0, **kw), with_target),
    "progressive at T=1": Kind(lambda **kw: ProgressiveKD(store(top_k=2), **kw), with_target),
    "progressive, probabilities": Kind(lambda **kw: ProgressiveKD(store(), **kw), with_probabilities),
    "progressive, without target": Kind(lambda **kw: ProgressiveKD(store(), **kw), without_target),
    **{
        f"adversarial {o}": Kind(
            lambda o=o, **kw: AdversarialDistributionLoss(MLPDiscriminator(C), objective=o, **kw), of_pair
        )
        for o in OBJECTIVES
    },
    **{
        f"discriminator {p}": Kind(
            lambda p=p, **kw: AdversarialDistributionLoss(MLPDiscriminator(C), penalty=p, **kw), discriminator_loss
        )
        for p in (None, GradientPenalty(10.0), ZeroCenteredPenalty(1.0))
    },
}
LAYOUTS = {  # from (12, C): (class_dim, how)
    "N,C": (None, lambda x: x),
    "N,C,H,W": (1, lambda x: x.view(2, 3, 2, C).permute(0, 3, 1, 2)),
    "B,T,C": (-1, lambda x: x.view(3, 4, C)),
    "not contiguous": (1, lambda x: x.repeat_interleave(2, 1)[:, ::2]),
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def tensors(dtype=torch.float32, layout="N,C"):
    dim, arrange = LAYOUTS[layout]
    g = torch.Generator().manual_seed(1)
    s, t = (arrange(torch.randn(ROWS, C, generator=g, dtype=torch.float64).to(dtype)) for _ in range(2))
    shape = s.select(1 if dim is None else dim, 0).shape
    y = torch.randint(C, shape, generator=g)
    index = torch.randperm(ROWS, generator=g).view(shape)
    mask = torch.rand(shape, generator=g) < 0.6
    return s, t, y, index, mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_contract(kind, reduction, dtype, layout):
    dim, _ = LAYOUTS[layout]
    loss = KINDS[kind].build(reduction=reduction, class_dim=dim)
    of_discriminator = kind.startswith("discriminator")
    s, t, y, index, mask = tensors(dtype, layout)
    s.requires_grad_()
    t.requires_grad_()
    before = copy.deepcopy((s.detach(), t.detach(), y, index, mask, loss.state_dict()))
    random_before = torch.get_rng_state()

    value = KINDS[kind].call(loss, s, t, y, index, mask)

    # shape and precision
    assert value.shape == (mask.shape if reduction == "none" else ())
    of_scores = kind.split()[0] in ("adversarial", "discriminator")  # these have the discriminator's precision
    assert value.dtype == (torch.float64 if dtype == torch.float64 and not of_scores else torch.float32)
    assert value.isfinite().all()

    # forward is pure
    assert equal(before, (s.detach(), t.detach(), y, index, mask, loss.state_dict()))
    if "Penalty" not in kind:
        assert torch.equal(random_before, torch.get_rng_state())

    # what is masked counts nothing
    if reduction == "none":
        assert (value[~mask] == 0).all()
        assert (value[mask] != 0).any()

    # gradients reach the student alone, where it counts, and not the teacher
    if of_discriminator:
        value.sum().backward()
        assert next(loss.discriminator.parameters()).grad.abs().sum() > 0
        assert s.grad is None
    else:
        value.sum().backward()
        if of_scores:
            assert all(p.grad is None for p in loss.discriminator.parameters())
        assert s.grad.dtype == dtype
        assert s.grad.isfinite().all()
        reached = s.grad.movedim(1 if dim is None else dim, -1).abs().sum(-1) > 0
        assert not reached[~mask].any()
        assert reached[mask].any()
    if "probabilities" not in kind:
        assert t.grad is None


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return bool(torch.equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return all(equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_values_of_the_flat_one(kind, layout):
    torch.manual_seed(5)
    flat = KINDS[kind].build(reduction="none", class_dim=None)
    torch.manual_seed(5)
    dense = KINDS[kind].build(reduction="none", class_dim=LAYOUTS[layout][0])
    arranged = tensors(torch.float64, layout)
    s, t, y, index, _ = tensors(torch.float64)
    torch.manual_seed(6)
    expected = KINDS[kind].call(flat, s, t, y, index, None)
    torch.manual_seed(6)
    value = KINDS[kind].call(dense, *arranged[:4], None)
    torch.testing.assert_close(value.flatten(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_reductions_of_one_loss_agree(kind, reduction):
    s, t, y, index, mask = tensors(torch.float64)
    values = {}
    for name in ("none", reduction):
        torch.manual_seed(5)
        loss = KINDS[kind].build(reduction=name, class_dim=None)
        values[name] = KINDS[kind].call(loss, s, t, y, index, mask)
    total = values["none"].sum()
    torch.testing.assert_close(values[reduction], total if reduction == "sum" else total / mask.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind):
    s, t, y, index, mask = tensors()
    loss = KINDS[kind].build(reduction="mean", class_dim=None)
    torch.manual_seed(2)
    expected = KINDS[kind].call(loss, s, t, y, index, mask)
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        value = KINDS[kind].call(loss, s, t, y, index, mask)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_whole_the_values_and_gradients_are_the_same(kind):
    torch._dynamo.reset()
    loss = KINDS[kind].build(reduction="mean", class_dim=None)
    s, t, y, index, mask = tensors()
    results = []
    for compile_it in (False, True):
        x = s.clone().requires_grad_()
        call = KINDS[kind].call
        if compile_it:
            call = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.manual_seed(2)
        value = call(loss, x, t, y, index, mask)
        wanted = [x] if kind.split()[0] != "discriminator" else [next(loss.discriminator.parameters())]
        results.append((value.detach(), *torch.autograd.grad(value, wanted)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("kept", ["cached", "ema"])
def test_the_method_compiles_once_for_all_epochs(kept):
    torch._dynamo.reset()
    targets = CachedTargets(ROWS, C) if kept == "cached" else EMATargets(ROWS, C)
    criterion = AIKDLoss(ROWS, C, num_epochs=4, targets=targets, weights={"deterministic": LinearRamp(0.5, 4)})
    counter = CompileCounter()
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    totals = []
    for _ in range(4):
        s, t, y, index, _ = tensors()
        given = dict(student_logits=s.requires_grad_(), teacher_logits=t, index=index)
        total, values = compiled(**given, target=y)
        expected, expected_values = criterion(**given, target=y)
        torch.testing.assert_close((total, values), (expected, expected_values))
        total.backward()
        criterion.update(**given)
        criterion.advance_epoch()
        totals.append(total.item())
    assert len(set(totals)) == 4  # the schedules did move
    assert counter.frame_count == 1


def test_mixup_compiles_whatever_its_lambda():
    criterion = AIKDLoss(4, 3, 2)
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    y, i = torch.tensor([0, 1, 2, 0]), torch.arange(4)
    for share in (0.7, 0.4, 0.1):
        given = dict(student_logits=torch.randn(4, 3), teacher_logits=torch.randn(4, 3), target=y, index=i)
        given |= dict(partner_index=i.flip(0), mix_lambda=share)
        torch.testing.assert_close(compiled(**given)[0], criterion(**given)[0])


def test_a_stack_of_torchs_own_losses_compiles():
    torch._dynamo.reset()
    stack = LossStack({"ce": torch.nn.CrossEntropyLoss(label_smoothing=0.1), "kd": DeterministicKD()})
    s, t, y, _, _ = tensors()
    given = dict(student_logits=s, teacher_logits=t, target=y)
    torch.testing.assert_close(torch.compile(stack, fullgraph=True, backend="eager")(**given), stack(**given))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_students_second_derivative_is_that_of_finite_differences(objective):
    smooth = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    loss = AdversarialDistributionLoss(smooth, objective=objective)
    s, t = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randn(4, 3, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, t), s)


def test_under_a_transform_no_gradient_reaches_the_discriminator_either():
    loss = AdversarialDistributionLoss(MLPDiscriminator(3))
    s, t = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    values = torch.func.vmap(loss)(s, t)
    torch.testing.assert_close(values, torch.stack([loss(a, b) for a, b in zip(s, t, strict=True)]))
    assert not values.requires_grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_discriminator_whose_rows_see_each_other_has_the_right_gradient(reduction):
    """Batch norm, under a mask too."""
    layers = [torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8, track_running_stats=False), torch.nn.Linear(8, 1)]
    discriminator = torch.nn.Sequential(*layers)
    loss = AdversarialDistributionLoss(discriminator, reduction=reduction)
    s, mask, weight = torch.randn(6, 5, requires_grad=True), torch.arange(6) % 3 != 1, torch.rand(6)
    shown = s.masked_fill(~mask.unsqueeze(-1), 0.0).softmax(-1)
    values = torch.nn.functional.softplus(-discriminator(shown).squeeze(-1)) * mask
    total = {"mean": values.sum() / mask.sum(), "sum": values.sum(), "none": (weight * values).sum()}[reduction]
    (expected,) = torch.autograd.grad(total, s)
    found = loss(s, torch.randn(6, 5), mask=mask)
    (slope,) = torch.autograd.grad((weight * found).sum() if reduction == "none" else found, s)
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("parameters", [True, False])
def test_a_discriminator_that_looks_at_nothing_gives_no_gradient(parameters):
    class Blind(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(1), requires_grad=parameters)

        def forward(self, x):
            return self.bias.expand(len(x))

    s = torch.randn(4, 3, requires_grad=True)
    AdversarialDistributionLoss(Blind())(s, torch.randn(4, 3)).backward()
    assert torch.equal(s.grad, torch.zeros_like(s))
