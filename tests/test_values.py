"""Values against the compositions that people use today, and at the edges of the number formats."""

from __future__ import annotations

import copy
import math

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

from aikd_losses import (
    AdversarialDistributionLoss,
    AdversarialObjective,
    CachedTargets,
    DeterministicKD,
    GradientPenalty,
    LinearRamp,
    MLPDiscriminator,
    ProgressiveKD,
)
from aikd_losses.discriminators import SpectralLinear
from aikd_losses.functional import deterministic_kd, progressive_kd

DIVERGENCES = ["forward_kl", "reverse_kl", "js"]
OBJECTIVES = list(reference.STUDENT)
INF = math.inf


def assert_close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------------- the usual compositions


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_forward_kl_is_the_usual_kd_composition(temperature):
    s, t = torch.randn(2, 16, 10, dtype=torch.float64)
    usual = (
        F.kl_div(F.log_softmax(s / temperature, -1), F.softmax(t / temperature, -1), reduction="batchmean")
        * temperature**2
    )
    assert_close(DeterministicKD(temperature=temperature)(s, t), usual)


def test_reverse_kl_and_js_are_those_of_torch():
    s, t = torch.randn(2, 16, 10, dtype=torch.float64)
    p, q = t.softmax(-1), s.softmax(-1)
    middle = (0.3 * p + 0.7 * q).log()
    js = 0.3 * F.kl_div(middle, p, reduction="batchmean") + 0.7 * F.kl_div(middle, q, reduction="batchmean")
    reverse = F.kl_div(p.log(), q, reduction="batchmean")
    assert_close(DeterministicKD(temperature=1.0, divergence="reverse_kl")(s, t), reverse)
    assert_close(DeterministicKD(temperature=1.0, divergence="js", beta=0.3)(s, t), js)


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
            assert_close(our_loss, their_loss)
        loss.advance_epoch()
    assert_close(ours.weight, theirs.weight)


def test_progressive_with_probability_targets_is_cross_entropy_of_torch():
    s, y = torch.randn(8, 5, dtype=torch.float64), torch.rand(8, 5, dtype=torch.float64).softmax(-1)
    loss = ProgressiveKD(CachedTargets(8, 5))
    assert_close(loss(s, y, index=None), F.cross_entropy(s, y))


def usual_losses(d_t, d_s):
    """As other code writes them: (discriminator, student)."""
    ones, zeros = torch.ones_like(d_t), torch.zeros_like(d_t)
    bce, mse = F.binary_cross_entropy_with_logits, F.mse_loss
    return {
        "non_saturating": (bce(d_t, ones) + bce(d_s, zeros), bce(d_s, ones)),
        "least_squares": (0.5 * mse(d_t, ones) + 0.5 * mse(d_s, zeros), 0.5 * mse(d_s, ones)),
        "hinge": (F.relu(1 - d_t).mean() + F.relu(1 + d_s).mean(), -d_s.mean()),
        "wasserstein": (d_s.mean() - d_t.mean(), -d_s.mean()),
        "relativistic": (bce(d_t - d_s, ones), bce(d_s - d_t, ones)),
    }


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_usual_adversarial_losses(name):
    s, t = torch.randn(2, 12, 5, dtype=torch.float64)
    discriminator = MLPDiscriminator(5).double()
    loss = AdversarialDistributionLoss(discriminator, objective=name)
    of_discriminator, of_student = usual_losses(discriminator(t.softmax(-1)), discriminator(s.softmax(-1)))[name]
    assert_close(loss(s, t), of_student)
    assert_close(loss.discriminator_loss(s, t), of_discriminator)


def test_the_usual_wasserstein_loss_with_gradient_penalty_and_its_gradient():
    s, t = torch.randn(2, 12, 5, dtype=torch.float64)
    ours, theirs = (MLPDiscriminator(5).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    torch.manual_seed(3)
    loss = AdversarialDistributionLoss(ours, objective="wasserstein", penalty=GradientPenalty(10.0))
    value = loss.discriminator_loss(s, t)
    torch.manual_seed(3)
    u = torch.rand(12, dtype=torch.float64)[:, None]
    between = (u * t.softmax(-1) + (1 - u) * s.softmax(-1)).requires_grad_()
    (slope,) = torch.autograd.grad(theirs(between).sum(), between, create_graph=True)
    usual = theirs(s.softmax(-1)).mean() - theirs(t.softmax(-1)).mean() + 10 * ((slope.norm(dim=1) - 1) ** 2).mean()
    assert_close(value, usual)
    value.backward()
    usual.backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(a.grad, torch.zeros_like(a) if b.grad is None else b.grad)


def test_an_objective_of_ones_own_is_played_as_it_is_given():
    ours = AdversarialObjective(
        discriminator=lambda teacher, student: 3 * student - teacher, student=lambda student, teacher: 5 * student
    )
    layer = nn.Linear(4, 1, bias=False)
    loss = AdversarialDistributionLoss(
        nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), layer), objective=ours, inputs="logits"
    )
    s, t = torch.randn(2, 6, 4)
    found, found_other = loss(s, t), loss.discriminator_loss(s, t)
    s, t = (F.layer_norm(x, (4,)) for x in (s, t))
    torch.testing.assert_close(found, 5 * (s @ layer.weight.T).mean())
    expected = (3 * (s @ layer.weight.T) - t @ layer.weight.T).mean()
    torch.testing.assert_close(found_other, expected)


def test_update_is_one_step_of_the_optimizer_on_the_discriminators_loss():
    s, t = torch.randn(2, 12, 5, dtype=torch.float64)
    ours = MLPDiscriminator(5).double()
    theirs = copy.deepcopy(ours)
    loss = AdversarialDistributionLoss(ours, objective="hinge", optimizer=torch.optim.Adam(ours.parameters(), lr=0.01))
    adam = torch.optim.Adam(theirs.parameters(), lr=0.01)
    for _ in range(3):
        value = loss.update(s, t)
        usual = usual_losses(theirs(t.softmax(-1)), theirs(s.softmax(-1)))["hinge"][0]
        adam.zero_grad()
        usual.backward()
        adam.step()
        assert_close(value, usual.detach())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(a, b)


# ---------------------------------------------------------------------------------------------------- masks and -inf


def all_losses(c: int = 5, n: int = 6):
    store = CachedTargets(n, c, dtype=torch.float32)
    store.write(torch.arange(n), torch.randn(n, c).softmax(-1))
    losses = {f"kd {d}": DeterministicKD(divergence=d) for d in DIVERGENCES}
    losses["progressive"] = ProgressiveKD(store, temperature=2.0)
    for inputs in ("probs", "log_probs", "logits"):
        losses[f"adversarial {inputs}"] = AdversarialDistributionLoss(
            MLPDiscriminator(c), objective="relativistic", inputs=inputs
        )
    return losses


LOSSES = list(all_losses())


def call(loss, s, t, y, index, mask=None):
    if isinstance(loss, ProgressiveKD):
        return loss(s, y, index=index, mask=mask)
    return loss(s, t, mask=mask)


@pytest.mark.parametrize("name", LOSSES)
def test_a_mask_is_the_subset_whatever_stands_behind_it(name):
    loss = all_losses()[name]
    s, t, y, index = torch.randn(6, 5), torch.randn(6, 5), torch.randint(5, (6,)), torch.arange(6)
    mask = torch.tensor([True, False, True, True, False, True])
    expected = call(loss, s[mask], t[mask], y[mask], index[mask])
    s[~mask], t[~mask], y[~mask], index[~mask] = torch.nan, INF, -100, 999
    s.requires_grad_()
    value = call(loss, s, t, y, index, mask)
    assert_close(value, expected)
    value.backward()
    assert s.grad.isfinite().all()
    assert (s.grad[~mask] == 0).all()
    assert s.grad[mask].abs().sum() > 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("size", "masked"), [(6, True), (0, True), (0, False)])
def test_nothing_to_count_gives_a_zero_with_a_graph(name, size, masked):
    loss = all_losses()[name]
    s, t = torch.randn(2, size, 5)
    s.requires_grad_()
    mask = torch.zeros(size, dtype=torch.bool) if masked else None
    value = call(loss, s, t, torch.zeros(size, dtype=torch.int64), torch.arange(size), mask)
    assert value == 0
    value.backward()
    assert (s.grad == 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_class_at_minus_infinity_on_both_sides_counts_nothing(divergence):
    loss = DeterministicKD(divergence=divergence, temperature=2.0)
    s, t = torch.randn(2, 6, 5, dtype=torch.float64)
    expected = loss(s[:, :4], t[:, :4])
    s[:, 4] = t[:, 4] = -INF
    s.requires_grad_()
    value = loss(s, t)
    assert_close(value, expected)
    value.backward()
    assert s.grad.isfinite().all()
    assert (s.grad[:, 4] == 0).all()


def test_a_class_at_minus_infinity_counts_nothing_in_progressive_and_adversarial():
    s, t = torch.randn(2, 6, 5)
    s[:, 4] = t[:, 4] = -INF
    progressive = ProgressiveKD(CachedTargets(6, 5, dtype=torch.float32), alpha=0.5)
    progressive.update(s, index=torch.arange(6))
    x = s.clone().requires_grad_()
    value = progressive(x, torch.zeros(6, dtype=torch.int64), index=torch.arange(6))
    short = s[:, :4].log_softmax(-1)
    assert_close(value, -(0.5 * short[:, 0] + 0.5 * (short.exp() * short).sum(-1)).mean())
    value.backward()
    assert x.grad.isfinite().all()
    for inputs in ("probs", "log_probs", "logits"):
        x = s.clone().requires_grad_()
        value = AdversarialDistributionLoss(MLPDiscriminator(5), inputs=inputs)(x, t)
        value.backward()
        assert value.isfinite()
        assert x.grad.isfinite().all()
        assert (x.grad[:, 4] == 0).all()


@pytest.mark.parametrize("tiny", [False, True])
def test_a_class_at_minus_infinity_on_one_side_gives_the_true_value_and_never_a_silent_zero(tiny):
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
    assert -1e-30 < float(loss["js"](s, t)) <= math.log(2)


# -------------------------------------------------------------------------------------------------- extremes, formats


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 1e3])
def test_extreme_logits_give_a_finite_value_and_gradient(name, dtype, temperature):
    loss = all_losses()[name]
    loss.temperature = temperature
    s = torch.tensor([[1e4, -1e4, 0, 1, -1], [-1e4] * 5, [1e4] * 5, [0] * 5, [1, 2, 3, 4, 1e4], [-1e4, 1e4, 1e4, 0, 0]])
    t = s.flip(1)
    s = s.to(dtype).requires_grad_()
    value = call(loss, s, t.to(dtype), torch.arange(6) % 5, torch.arange(6))
    assert value.isfinite()
    value.backward()
    assert s.grad.isfinite().all()
    assert s.grad.dtype == dtype


@pytest.mark.parametrize("penalty", [GradientPenalty(10.0), None])
def test_extreme_logits_leave_the_discriminator_finite(penalty):
    discriminator = MLPDiscriminator(4)
    loss = AdversarialDistributionLoss(
        discriminator, penalty=penalty, optimizer=torch.optim.Adam(discriminator.parameters())
    )
    s = torch.tensor([[1e4, -1e4, 0.0, 1.0]] * 8)
    for _ in range(3):
        assert loss.update(s, s.flip(1)).isfinite()
        assert loss.update(s, s).isfinite()  # equal sides
    assert all(p.isfinite().all() for p in discriminator.parameters())


@pytest.mark.parametrize("name", LOSSES)
def test_float32_is_near_float64(name):
    loss = all_losses(n=64, c=50)[name]
    s, t = 3 * torch.randn(2, 64, 50)
    y, index = torch.randint(50, (64,)), torch.arange(64)
    single = call(loss, s, t, y, index)
    if isinstance(loss, AdversarialDistributionLoss):
        loss.double()
    double = call(loss, s.double(), t.double(), y, index)
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=5e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    s, t = (4 * torch.randn(2, 32, 100)).to(dtype)
    s.requires_grad_()
    value = DeterministicKD()(s, t)
    assert value.dtype == torch.float32
    x = s.detach().float().requires_grad_()
    expected = DeterministicKD()(x, t.float())
    assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(s.grad, x.grad.to(dtype))


@pytest.mark.parametrize(
    "call", [deterministic_kd, lambda s, t: progressive_kd(s, t.softmax(-1), t.softmax(-1), alpha=0.5)]
)
def test_a_teacher_that_ran_in_inference_mode_is_a_teacher(call):
    student = torch.randn(4, 3, requires_grad=True)
    with torch.inference_mode():
        teacher = torch.randn(4, 3)
    (slope,) = torch.autograd.grad(call(student, teacher), student)
    assert torch.equal(slope, torch.autograd.grad(call(student, teacher.clone()), student)[0])


def test_a_spectral_layer_is_a_linear_one_with_its_weight_over_its_largest_singular_value():
    layer = SpectralLinear(4, 3)
    with torch.no_grad():
        layer.weight.mul_(7)
        for _ in range(200):
            layer(torch.zeros(1, 4))  # every training forward is a step of the estimate
    x, left = torch.randn(5, 4), layer.left.clone()
    expected = x @ (layer.weight / torch.linalg.matrix_norm(layer.weight, 2)).T + layer.bias
    assert_close(layer(x), expected)
    layer.eval()
    left.copy_(layer.left)
    assert_close(layer(x), expected)
    with torch.no_grad():
        layer.weight[0] += 1
    layer(x)
    assert torch.equal(layer.left, left)  # which evaluation leaves as it is


def test_a_new_spectral_layer_starts_from_a_good_estimate():
    torch.manual_seed(3)
    for _ in range(5):
        layer = SpectralLinear(4, 3).eval()
        slope = layer(torch.eye(4)) - layer(torch.zeros(1, 4))
        assert torch.linalg.matrix_norm(slope, 2).item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_learned_alpha_at_the_ends_has_its_gradient(alpha):
    s, previous, target = torch.randn(3, 4), torch.randn(3, 4).softmax(-1), torch.tensor([0, 3, 1])
    a = torch.tensor(alpha, requires_grad=True)
    (slope,) = torch.autograd.grad(progressive_kd(s, previous, target, alpha=a), a)
    soft, hard = -(previous * s.log_softmax(-1)).sum(-1).mean(), F.cross_entropy(s, target)
    torch.testing.assert_close(slope, soft - hard)


def test_nan_under_a_mask_stays_out_of_a_learned_alphas_gradient():
    s, previous, mask = torch.randn(3, 4), torch.randn(3, 4).softmax(-1), torch.tensor([True, False, True])
    s[1] = torch.nan
    s.requires_grad_()
    a = torch.tensor(0.5, requires_grad=True)
    slopes = torch.autograd.grad(progressive_kd(s, previous, torch.tensor([0, 3, 1]), alpha=a, mask=mask), (s, a))
    assert all(x.isfinite().all() for x in slopes)
    assert (slopes[0][1] == 0).all()


def test_ignored_labels_are_ignored_by_an_alpha_of_one_too():
    s, previous = torch.randn(3, 4), torch.randn(3, 4).softmax(-1)
    target, mask = torch.tensor([1, -100, 2]), torch.tensor([True, False, True])
    value = progressive_kd(s, previous, target, alpha=1.0, mask=mask)
    torch.testing.assert_close(value, -(previous * s.log_softmax(-1)).sum(-1)[mask].mean())


def test_nan_under_a_mask_stays_out_of_the_discriminators_gradient():
    s, t, d = torch.randn(3, 3), torch.randn(3, 3), nn.Linear(3, 1)
    s[1] = t[1] = torch.nan
    AdversarialDistributionLoss(d).discriminator_loss(s, t, mask=torch.tensor([True, False, True])).backward()
    assert d.weight.grad.isfinite().all()


def test_what_the_discriminator_sees_of_an_excluded_class_is_zero():
    seen = []

    class Look(nn.Linear):
        def forward(self, x):
            seen.append(x.detach())
            return super().forward(x)

    s = torch.tensor([[-torch.inf, 1.0, 0.0]])
    AdversarialDistributionLoss(Look(3, 1), inputs="log_probs")(s, torch.randn(1, 3))
    torch.testing.assert_close(seen[0], torch.cat([torch.zeros(1, 1), s[:, 1:].log_softmax(-1)], -1))


def test_a_half_precision_discriminator_scores_in_float32():
    d = nn.Linear(3, 1).bfloat16()
    loss = AdversarialDistributionLoss(d, objective="wasserstein")
    s = torch.randn(5, 3, requires_grad=True)
    value = loss(s, torch.randn(5, 3))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, -d(s.softmax(-1).bfloat16()).float().mean())


def test_a_condition_has_any_axes_and_what_is_masked_is_zero():
    seen = []

    class Conditional(nn.Linear):
        def forward(self, x, condition):
            seen.append(condition.detach())
            return super().forward(x)

    s, t, condition = torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.randn(2, 5, 7)
    mask = torch.arange(10).view(2, 5) % 3 != 0
    AdversarialDistributionLoss(Conditional(3, 1), class_dim=-1)(s, t, mask=mask, condition=condition)
    torch.testing.assert_close(seen[0], (condition * mask[..., None]).view(10, 7))


def test_an_adversarial_temperature_divides_the_logits():
    s, t, d = torch.randn(5, 3), torch.randn(5, 3), nn.Linear(3, 1)
    loss = AdversarialDistributionLoss(d, objective="wasserstein", temperature=2.0)
    torch.testing.assert_close(loss(s, t), -d((s / 2).softmax(-1)).mean())


@pytest.mark.parametrize("what", ["known", "mask"])
def test_float64_logits_take_alpha_as_it_is_whatever_is_left_out(what):
    s, previous, target = torch.randn(3, 4).double(), torch.randn(3, 4).double().softmax(-1), torch.tensor([0, 3, 1])
    shown = torch.tensor([True, False, True])
    value = progressive_kd(s, previous, target, alpha=0.3, reduction="none", **{what: shown})
    soft, hard = -(previous * s.log_softmax(-1)).sum(-1), F.cross_entropy(s, target, reduction="none")
    expected = torch.where(shown, 0.3 * soft + 0.7 * hard, hard if what == "known" else 0.0)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
