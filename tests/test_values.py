"""Values step for step as published, in float32 as precise as in decimals, and at the edges of the number formats."""

from __future__ import annotations

import copy
import math

import pytest
import reference
import torch
import torch.nn.functional as F
from laws import DIVERGENCES, usual_losses
from seeds import generator
from torch import nn
from torch.testing import assert_close

from aikd_losses import (
    AdversarialDistributionLoss,
    AdversarialObjective,
    CachedTargets,
    DeterministicKD,
    LinearRamp,
    MLPDiscriminator,
    ProgressiveKD,
)
from aikd_losses.functional import deterministic_kd, progressive_kd

INF = math.inf

# ------------------------------------------------------------------------------------------------------ the precision


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("way", ["eager", "with gradient", "compiled", "transformed"])
def test_a_divergence_of_float32_logits_is_exact_to_five_digits_and_never_negative(divergence, way):
    """At every temperature, between near distributions, far ones, and both in one batch."""
    temperatures = (1.0, 5.0, 20.0, 100.0, 1000.0)
    g = generator(1)
    t, noise = 3 * torch.randn(32, 10, generator=g), torch.randn(32, 10, generator=g)

    def every(s, t, reduction="none"):
        given = {"divergence": divergence, "reduction": reduction}
        return torch.stack([deterministic_kd(s, t, temperature=each, **given) for each in temperatures])

    torch.compiler.reset()
    values = {
        "eager": every,
        "with gradient": lambda s, t: every(s.requires_grad_(), t).detach(),
        "compiled": torch.compile(every, fullgraph=True, backend="eager"),
        "transformed": lambda s, t: torch.func.jacrev(lambda x: (every(x, t),) * 2, has_aux=True)(s)[1],
    }[way]
    near = torch.arange(32)[:, None] % 2 == 0
    cases = [t + 1e-3 * noise, 3 * noise, torch.where(near, t + 1e-3 * noise, 3 * noise)]
    for s in [*cases, t + 1e-3 * noise + 100, 3 * noise - 100]:  # an offset says nothing
        pairs = list(zip(s.tolist(), t.tolist(), strict=True))
        for temperature, rows, value in zip(temperatures, values(s, t), every(s, t, "mean"), strict=True):
            expected = [reference.deterministic(divergence, *pair, temperature) for pair in pairs]
            mean = sum(expected) / len(expected)
            assert (rows >= 0).all()
            assert rows.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5 * mean)
            assert [rows.mean().item(), value.item()] == pytest.approx([mean, mean], rel=1e-5)


# ------------------------------------------------------------------------------------------------------ as published


def test_ps_kd_as_published_step_for_step_over_several_epochs():
    """target = (1-a) one-hot + a * previous softmax, a = alpha * (epoch+1)/E, soft cross-entropy; both train a network."""
    num_epochs, end, n, c = 5, 0.8, 24, 4
    x, y = torch.randn(n, 6, dtype=torch.float64), torch.randint(c, (n,))
    theirs = nn.Linear(6, c).double()
    ours = copy.deepcopy(theirs)
    loss = ProgressiveKD(CachedTargets(n, c, dtype=torch.float64), alpha=LinearRamp(end, num_epochs))
    their_optimizer, our_optimizer = (torch.optim.SGD(m.parameters(), lr=0.5, momentum=0.9) for m in (theirs, ours))
    memory = torch.zeros(n, c, dtype=torch.float64)
    for epoch in range(num_epochs):
        # without history, in epoch 0, there is nothing to blend
        a = end * (epoch + 1) / num_epochs if epoch else 0.0
        for index in torch.randperm(n).split(8):
            logits = theirs(x[index])
            target = (1 - a) * torch.eye(c, dtype=torch.float64)[y[index]] + a * memory[index]
            their_loss = -(target * F.log_softmax(logits, -1)).sum(-1).mean()
            memory[index] = logits.detach().softmax(-1)
            their_optimizer.zero_grad()
            their_loss.backward()
            their_optimizer.step()

            logits = ours(x[index])
            our_loss = loss(logits, y[index], index=index)
            our_optimizer.zero_grad()
            our_loss.backward()
            our_optimizer.step()
            loss.update(logits, index=index)
            assert_close(our_loss, their_loss, rtol=1e-6, atol=1e-6)
        loss.advance_epoch()
    assert_close(ours.weight, theirs.weight, rtol=1e-6, atol=1e-6)


def test_an_objective_of_ones_own_is_played_as_it_is_given():
    ours = AdversarialObjective(
        discriminator=lambda teacher, student: 3 * student - teacher, student=lambda student, teacher: 5 * student
    )
    layer = nn.Linear(4, 1, bias=False)
    norm = nn.LayerNorm(4, elementwise_affine=False)
    loss = AdversarialDistributionLoss(nn.Sequential(norm, layer), objective=ours, inputs="logits")
    s, t = torch.randn(2, 6, 4)
    of_student, of_teacher = (F.layer_norm(x, (4,)) @ layer.weight.T for x in (s, t))
    assert_close(loss(s, t), 5 * of_student.mean())
    assert_close(loss.discriminator_loss(s, t), (3 * of_student - of_teacher).mean())


def test_update_is_one_step_of_the_optimizer_on_the_discriminators_loss():
    s, t = torch.randn(2, 12, 5, dtype=torch.float64)
    ours = MLPDiscriminator(5).double()
    theirs = copy.deepcopy(ours)
    loss = AdversarialDistributionLoss(ours, objective="hinge", optimizer=torch.optim.Adam(ours.parameters(), lr=0.01))
    adam = torch.optim.Adam(theirs.parameters(), lr=0.01)
    for _ in range(3):
        value = loss.update(s, t)
        usual = usual_losses(theirs(t.softmax(-1)), theirs(s.softmax(-1)))["hinge"][0].mean()
        adam.zero_grad()
        usual.backward()
        adam.step()
        assert_close(value, usual.detach())
    assert_close(list(ours.parameters()), list(theirs.parameters()))


# ---------------------------------------------------------------------------------------------------- masks and -inf


@pytest.mark.parametrize("tiny", [False, True])
def test_a_class_excluded_on_one_side_gives_the_true_value_and_never_a_silent_zero(tiny):
    s, t = torch.zeros(1, 3), torch.zeros(1, 3)
    s[0, 0] = -INF
    if tiny:
        t[0, 0] = -200.0  # its probability is not 0, though float32 says so
    loss = {d: DeterministicKD(divergence=d, temperature=1.0) for d in DIVERGENCES}
    assert loss["forward_kl"](s, t) == INF
    assert loss["reverse_kl"](t, s) == INF
    # where the expectation is over the side without the class, it counts 0
    expected = math.log(3 / 2) if not tiny else 0.0
    assert float(loss["reverse_kl"](s, t)) == pytest.approx(expected, abs=1e-6)
    assert float(loss["forward_kl"](t, s)) == pytest.approx(expected, abs=1e-6)
    js = reference.deterministic("js", s[0].tolist(), t[0].tolist(), 1.0)
    assert float(loss["js"](s, t)) == pytest.approx(js, abs=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("form", ["number", "tensor", "a tensor each"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_part_without_a_share_counts_nothing_even_if_it_is_infinite(temperature, form, compiled):
    def with_gradient(loss, s):
        if compiled:  # by the plain form
            return torch.func.grad_and_value(loss)(s)[::-1]
        value = loss(s.requires_grad_())
        return value.detach(), torch.autograd.grad(value, s)[0]

    s, p = torch.tensor([[1.0, 0.0, -INF]]), torch.tensor([[0.4, 0.4, 0.2]])
    alike = {"number": float, "tensor": torch.tensor, "a tensor each": lambda a: torch.tensor([a])}[form]
    given = {"alpha": alike(0.0), "temperature": temperature}
    value, slope = with_gradient(lambda x: progressive_kd(x, p, torch.tensor([0]), **given), s.clone())
    assert_close(value, F.cross_entropy(s, torch.tensor([0])))
    assert slope.isfinite().all()
    value, slope = with_gradient(lambda x: progressive_kd(x, p, **given), s.clone())
    assert value == 0
    assert not slope.any()
    p, given["alpha"] = torch.tensor([[0.4, 0.6, 0.0]]), alike(1.0)
    value, slope = with_gradient(lambda x: progressive_kd(x, p, torch.tensor([2]), **given), s.clone())
    assert_close(value, progressive_kd(s, p, **given))
    assert slope.isfinite().all()


def test_the_discriminator_sees_zero_for_an_excluded_class_and_for_a_condition_that_is_masked():
    class Look(nn.Linear):
        def forward(self, x, condition):
            self.seen = x.detach(), condition.detach()
            return super().forward(x)

    s, t, condition = torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.randn(2, 5, 7)  # which has any axes
    s[0, 1, 0], mask, look = -INF, torch.arange(10).view(2, 5) % 3 != 0, Look(3, 1)
    loss = AdversarialDistributionLoss(look, inputs="log_probs", class_dim=-1)
    loss(s, t, mask=mask, condition=condition)
    expected = s.masked_fill(~mask[..., None], 0.0).log_softmax(-1).masked_fill(s == -INF, 0.0)
    assert_close(look.seen, (expected.view(10, 3), (condition * mask[..., None]).view(10, 7)))


# ---------------------------------------------------------------------------------------------- types and shares


def test_a_half_precision_discriminator_scores_in_float32():
    d = nn.Linear(3, 1).bfloat16()
    s = torch.randn(5, 3, requires_grad=True)
    value = AdversarialDistributionLoss(d, objective="wasserstein")(s, torch.randn(5, 3))
    assert value.dtype == torch.float32
    assert_close(value, -d(s.softmax(-1).bfloat16()).float().mean())


@pytest.mark.parametrize("student", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_teacher_of_another_precision_is_widened_and_not_the_student_narrowed(student):
    s, t = torch.randn(5, 4).to(student).requires_grad_(), torch.randn(5, 4).bfloat16()
    found, expected = deterministic_kd(s, t), deterministic_kd(s, t.to(torch.promote_types(student, torch.float32)))
    assert found.dtype == torch.promote_types(student, torch.float32)
    assert_close(found, expected, rtol=1e-6, atol=0)
    assert_close(torch.autograd.grad(found, s), torch.autograd.grad(expected, s))


def test_no_gradient_reaches_previous_predictions():
    s, fixed = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4).requires_grad_()
    progressive_kd(s, fixed.softmax(-1), alpha=0.3).backward()
    assert s.grad is not None
    assert fixed.grad is None


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_alpha_and_a_soft_target_that_are_learned_have_their_gradients(alpha, masked):
    """Also at the ends, and with NaN where a mask hides it."""
    s, previous, y = torch.randn(3, 4), torch.randn(3, 4).softmax(-1), torch.randn(3, 4).softmax(-1).requires_grad_()
    mask = torch.tensor([True, not masked, True])
    a, log_q = torch.tensor(alpha, requires_grad=True), s[mask].log_softmax(-1)
    s = s.masked_fill(~mask[:, None], torch.nan).requires_grad_()
    value = progressive_kd(s, previous, y, alpha=a, mask=mask if masked else None)
    of_alpha, of_target, slope = torch.autograd.grad(value, (a, y, s))
    assert_close(of_alpha, ((y - previous)[mask] * log_q).sum(-1).mean())
    assert_close(of_target[mask], -(1 - alpha) * log_q / len(log_q))
    assert slope.isfinite().all()
    assert not slope[~mask].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hidden", ["known", "mask"])
def test_a_share_has_the_precision_of_the_logits_whatever_is_left_out(dtype, hidden):
    s, previous, target = (
        torch.randn(3, 4, dtype=dtype),
        torch.randn(3, 4, dtype=dtype).softmax(-1),
        torch.tensor([0, 3, 1]),
    )
    shown, alpha = torch.tensor([True, False, True]), torch.tensor([0.1, 0.3, 0.7], dtype=torch.float64)
    soft, hard = -(previous * s.log_softmax(-1)).sum(-1), F.cross_entropy(s, target, reduction="none")
    for share in (0.3, alpha):
        value = progressive_kd(s, previous, target, alpha=share, reduction="none", **{hidden: shown})
        expected = torch.where(shown, share * soft + (1 - share) * hard, hard if hidden == "known" else 0.0).to(dtype)
        assert_close(value, expected, rtol=1e-13 if dtype == torch.float64 else 1e-6, atol=0)


@pytest.mark.parametrize("alpha", [0.5, 1.0, torch.tensor(0.5, requires_grad=True)], ids=["half", "whole", "learned"])
@pytest.mark.parametrize("class_dim", [None, -1])
@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.cpu("labels are looked at there alone")
def test_a_label_must_be_one_where_it_counts_whatever_its_share(alpha, class_dim, transformed):
    s, y = torch.randn(3, 4), torch.tensor([0, -100, 1])
    mask = y != -100
    if class_dim is not None:
        s, y, mask = s[None], y[None], mask[None]

    def loss(x, **given):
        return progressive_kd(x, s.softmax(-1), y, alpha=alpha, class_dim=class_dim, **given)

    with pytest.raises(IndexError, match=r"`target` must be in 0\.\.3 "):
        torch.func.grad(loss)(s) if transformed else loss(s)
    clean = progressive_kd(s[mask], s[mask].softmax(-1), y[mask], alpha=alpha)
    assert_close(loss(s, mask=mask), clean)


def test_labels_that_are_learned_have_their_gradient_where_they_are_0_too():
    s = torch.randn(2, 4)
    s[:, 3] = -torch.inf  # a class that neither side has counts nothing, and not 0 * inf
    y = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0]], requires_grad=True)
    value = progressive_kd(s, y.detach(), y, alpha=0.0)
    assert_close(value, F.cross_entropy(s[:, :3], y[:, :3]))
    (found,) = torch.autograd.grad(value, y)
    assert_close(found[:, :3], -s.log_softmax(-1)[:, :3] / 2)
    assert not found[:, 3].any()
