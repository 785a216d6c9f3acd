"""Properties that hold for every input, checked on inputs that hypothesis makes up."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aikd_losses import (
    AdversarialDistributionLoss,
    CachedTargets,
    DeterministicKD,
    EMATargets,
    GradientPenalty,
    LabelWeight,
    LinearRamp,
    ProgressiveKD,
    ZeroCenteredPenalty,
)

DIVERGENCES = ["forward_kl", "reverse_kl", "js"]
OBJECTIVES = list(reference.STUDENT)
temperatures = st.floats(0.5, 20.0)
betas = st.floats(0.05, 0.95)
divergences = st.sampled_from(DIVERGENCES)


@st.composite
def logits(draw, sides: int = 1, size: float = 5.0) -> Tensor:
    """`sides` batches of logits of one shape, float64."""
    n, c = draw(st.integers(1, 5)), draw(st.integers(2, 6))
    numbers = st.floats(-size, size, allow_subnormal=False)
    values = draw(st.lists(numbers, min_size=sides * n * c, max_size=sides * n * c))
    return torch.tensor(values, dtype=torch.float64).view(sides, n, c)


def filled_store(probs: Tensor, known: Tensor | None = None) -> CachedTargets:
    store = CachedTargets(len(probs), probs.shape[1], dtype=torch.float64)
    store.write(torch.arange(len(probs)), probs, keep=known)
    return store


def gradient(f, x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    f(x).backward()
    return x.grad


class Linear(torch.nn.Module):
    """D(x) = w . x + b, whose gradient is w everywhere."""

    def __init__(self, c: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(c)
        self.w = torch.nn.Parameter(torch.randn(c, generator=g, dtype=torch.float64))
        self.b = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w + self.b


# ---------------------------------------------------------------------------------------------------- deterministic


@given(logits(2), divergences, temperatures, betas)
def test_a_divergence_is_the_naive_loop_and_never_negative(x, name, temperature, beta):
    student, teacher = x
    values = DeterministicKD(temperature=temperature, divergence=name, beta=beta, reduction="none")(student, teacher)
    expected = [
        reference.deterministic(name, s, t, temperature, beta)
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    assert values.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12 * temperature**2)
    assert (values > -1e-13 * temperature**2).all()


@given(logits(), divergences, temperatures, betas)
def test_a_divergence_is_zero_for_equal_inputs_and_for_them_alone(x, name, temperature, beta):
    loss = DeterministicKD(temperature=temperature, divergence=name, beta=beta, reduction="none")
    teacher = x[0]
    other = teacher.clone()
    other[:, 0] += 1.0
    assert loss(teacher, teacher).abs().max() < 1e-14 * temperature**2
    assert (loss(other, teacher) > 1e-12).all()


@given(logits(3), divergences, temperatures)
def test_a_divergence_does_not_see_a_shift_of_a_row(x, name, temperature):
    loss = DeterministicKD(temperature=temperature, divergence=name, reduction="none")
    student, teacher, shifts = x
    moved = loss(student + shifts[:, :1], teacher - 2 * shifts[:, :1])
    torch.testing.assert_close(moved, loss(student, teacher), rtol=1e-8, atol=1e-11)


@given(logits(2), divergences, st.randoms(use_true_random=False))
def test_a_divergence_follows_a_permutation_of_batch_and_classes(x, name, random):
    loss = DeterministicKD(divergence=name, reduction="none")
    student, teacher = x
    rows, classes = (random.sample(range(n), n) for n in student.shape)
    permuted = loss(student[rows][:, classes], teacher[rows][:, classes])
    torch.testing.assert_close(permuted, loss(student, teacher)[rows], rtol=1e-9, atol=1e-12)


@given(logits(2), divergences, temperatures, betas)
def test_the_gradient_is_the_closed_form(x, name, temperature, beta):
    student, teacher = x
    q, p = torch.softmax(student / temperature, -1), torch.softmax(teacher / temperature, -1)

    def expectation_of(f: Tensor) -> Tensor:  # the gradient of sum_c q_c f_c where d/dq of it is f + const
        return q * (f - (q * f).sum(-1, keepdim=True))

    expected = {
        "forward_kl": q - p,
        "reverse_kl": expectation_of((q / p).log()),
        "js": (1 - beta) * expectation_of((q / (beta * p + (1 - beta) * q)).log()),
    }[name]
    loss = DeterministicKD(temperature=temperature, divergence=name, beta=beta)
    grad = gradient(lambda s: loss(s, teacher), student)
    torch.testing.assert_close(grad, temperature * expected / len(student), rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_first_and_second_derivative_agree_with_finite_differences(name):
    student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 4, dtype=torch.float64)
    loss = DeterministicKD(divergence=name)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)
    assert torch.autograd.gradgradcheck(lambda s: loss(s, teacher), student)


@given(logits(2, size=2.0), divergences)
def test_as_the_temperature_grows_the_value_tends_to_the_squared_difference_of_centred_logits(x, name):
    student, teacher = (side - side.mean(-1, keepdim=True) for side in x)
    expected = (student - teacher).square().sum(-1) / (2 * student.shape[-1])
    expected = expected * (0.25 if name == "js" else 1.0)  # beta (1 - beta) at beta = 1/2
    value = DeterministicKD(temperature=1e4, divergence=name, reduction="none")(student, teacher)
    torch.testing.assert_close(value, expected, rtol=5e-3, atol=1e-6)


@given(logits(2), st.integers(1, 4))
def test_a_sum_over_micro_batches_is_the_sum_over_the_batch(x, at):
    student, teacher = x
    total = DeterministicKD(reduction="sum")
    parts = sum(total(s, t) for s, t in zip(student.split(at), teacher.split(at), strict=True))
    torch.testing.assert_close(parts, total(student, teacher))
    torch.testing.assert_close(parts / len(student), DeterministicKD()(student, teacher))


@given(logits(2), divergences, st.lists(st.booleans(), min_size=5, max_size=5))
def test_a_mean_is_the_mean_of_what_is_not_masked(x, name, flags):
    student, teacher = x
    mask = torch.tensor(flags[: len(student)])
    each = DeterministicKD(divergence=name, reduction="none")(student, teacher, mask=mask)
    assert (each[~mask] == 0).all()
    expected = each[mask].sum() / max(int(mask.sum()), 1)
    torch.testing.assert_close(DeterministicKD(divergence=name)(student, teacher, mask=mask), expected)


# ------------------------------------------------------------------------------------------------------ progressive


@given(logits(2), st.floats(0, 1), temperatures, st.lists(st.booleans(), min_size=5, max_size=5), st.booleans())
def test_progressive_is_the_naive_loop(x, alpha, temperature, flags, soft_target):
    student, previous = x[0], x[1].softmax(-1)
    n, c = student.shape
    known = torch.tensor(flags[:n])
    target = previous.flip(1) if soft_target else torch.arange(n) % c
    loss = ProgressiveKD(filled_store(previous, known), alpha=alpha, temperature=temperature, reduction="none")
    for y in (target, None):
        expected = [
            reference.progressive(
                student[i].tolist(),
                previous[i].tolist() if known[i] else None,
                None if y is None else y[i].tolist(),
                alpha,
                temperature,
            )
            for i in range(n)
        ]
        # the store is read in float32
        assert loss(student, y, index=torch.arange(n)).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(logits(2), st.floats(0, 1), temperatures, st.lists(st.booleans(), min_size=5, max_size=5))
def test_the_identity_of_progressive(x, alpha, temperature, flags):
    """f(s, y, i) == (1-a) CE(s, y) + f(s, None, i), where a is 0 without history."""
    student, previous = x[0], x[1].softmax(-1)
    n, c = student.shape
    known, target, index = torch.tensor(flags[:n]), torch.arange(n) % c, torch.arange(n)
    f = ProgressiveKD(filled_store(previous, known), alpha=alpha, temperature=temperature, reduction="none")
    a = alpha * known.double()
    ce = torch.nn.functional.cross_entropy(student, target, reduction="none")
    torch.testing.assert_close(f(student, target, index=index), (1 - a) * ce + f(student, index=index))
    torch.testing.assert_close(f(student, target, index=None), ce)


@given(logits(2), st.floats(0, 1), temperatures)
def test_the_gradient_of_progressive_is_the_closed_form(x, alpha, temperature):
    student, previous = x[0], x[1].softmax(-1).float().double()
    n, c = student.shape
    target = torch.arange(n) % c
    loss = ProgressiveKD(filled_store(previous), alpha=alpha, temperature=temperature)
    grad = gradient(lambda s: loss(s, target, index=torch.arange(n)), student)
    one_hot = torch.eye(c, dtype=torch.float64)[target]
    soft = torch.softmax(student / temperature, -1) * previous.sum(-1, keepdim=True) - previous
    expected = (1 - alpha) * (student.softmax(-1) - one_hot) + alpha * temperature * soft
    torch.testing.assert_close(grad, expected / n, rtol=1e-8, atol=1e-10)


def test_progressive_agrees_with_finite_differences():
    student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    loss = ProgressiveKD(filled_store(torch.randn(3, 4).softmax(-1)), alpha=0.3, temperature=2.0)
    target, index = torch.tensor([0, 3, 1]), torch.arange(3)
    assert torch.autograd.gradcheck(lambda s: loss(s, target, index=index), student)
    assert torch.autograd.gradgradcheck(lambda s: loss(s, target, index=index), student)


@given(logits(3), st.floats(0, 1), st.booleans())
def test_rows_are_blended_as_the_inputs_were(x, share, one_each):
    student, rows = x[0], x[1].softmax(-1)
    n = len(student)
    order = torch.arange(n).flip(0)
    loss = ProgressiveKD(filled_store(rows), alpha=1.0, reduction="none")
    shares = torch.linspace(0, share, n, dtype=torch.float64) if one_each else share
    value = loss(student, index=torch.arange(n), partner_index=order, mix_lambda=shares)
    weight = shares[:, None] if one_each else share
    blended = weight * rows + (1 - weight) * rows[order]
    expected = -(blended * student.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


def test_a_blend_with_a_row_that_is_not_known_has_no_history():
    store = filled_store(torch.full((2, 4), 0.25), torch.tensor([True, False]))
    loss = ProgressiveKD(store, alpha=1.0, reduction="none")
    value = loss(torch.randn(2, 4), index=torch.tensor([0, 0]), partner_index=torch.tensor([1, 0]), mix_lambda=0.5)
    assert value[0] == 0
    assert value[1] > 1


@given(st.floats(0, 1), st.integers(1, 50), st.integers(0, 100))
def test_a_linear_ramp_is_the_published_rule(end, num_epochs, epoch):
    assert LinearRamp(end, num_epochs)(epoch) == pytest.approx(min(end, end * (epoch + 1) / num_epochs), abs=1e-12)
    # From there back to 0, it is what is left; and it ends where it says.
    back = LinearRamp(0.0, num_epochs, start=end)
    assert back(epoch) + LinearRamp(end, num_epochs)(epoch) == pytest.approx(end, abs=1e-12)
    assert back(epoch + num_epochs) == 0.0


@given(st.floats(0, 100), st.floats(0, 0.99), st.integers(1, 100))
def test_labels_keep_the_weight_that_a_label_weight_gives_them(weight, end, epoch):
    alpha = LinearRamp(end, num_epochs=10)
    labels = LabelWeight(weight, alpha)(epoch) * (1 - alpha(epoch))
    assert labels == pytest.approx(weight)
    assert LabelWeight(weight, end)(epoch) == pytest.approx(weight / (1 - end))
    assert LabelWeight(weight, alpha)(0) == weight


# ----------------------------------------------------------------------------------------------------------- stores


@pytest.mark.parametrize(
    ("dtype", "unit"),
    [(torch.float16, 2**-11), (torch.bfloat16, 2**-8), (torch.float32, 2**-24), (torch.float64, 2**-24)],
)
@given(x=logits())
def test_what_is_written_is_what_is_read_within_the_rounding_of_the_type(dtype, unit, x):
    probs = x[0].softmax(-1)
    store = CachedTargets(7, probs.shape[1], dtype=dtype)
    index = torch.tensor([6, 2, 5, 0, 3])[: len(probs)]
    store.write(index, probs)
    read, known = store.read(index)
    assert read.dtype == torch.float32
    assert known.all()
    smallest = {torch.float16: 2**-25}.get(dtype, 0)  # half of its smallest subnormal number
    assert ((read.double() - probs).abs() <= unit * probs + smallest).all()


@given(logits(3), st.floats(0, 1))
def test_an_ema_is_the_recurrence_from_the_first_prediction_on(x, decay):
    store = EMATargets(len(x[0]), x.shape[-1], decay=decay, dtype=torch.float64)
    index = torch.arange(len(x[0]))
    expected = x[0].softmax(-1)
    for t, side in enumerate(x):
        if t > 0:
            expected = decay * expected + (1 - decay) * side.softmax(-1)
        store.write(index, side.softmax(-1))
    torch.testing.assert_close(store.read(index)[0].double(), expected, rtol=1e-6, atol=1e-7)


@given(logits(2))
def test_the_limits_of_an_ema_are_the_newest_and_the_first_prediction(x):
    first, last = x.softmax(-1)
    index = torch.arange(len(first))
    for decay, kept in ((0.0, last), (1.0, first)):
        store = EMATargets(len(first), first.shape[1], decay=decay, dtype=torch.float64)
        store.write(index, first)
        store.write(index, last)
        torch.testing.assert_close(store.read(index)[0].double(), kept, rtol=1e-6, atol=1e-7)


@given(logits(), st.integers(1, 6), st.sampled_from([torch.float16, torch.float32]))
def test_a_top_k_row_keeps_the_largest_and_sums_to_one(x, k, dtype):
    probs = x[0].softmax(-1)
    n, c = probs.shape
    k = min(k, c)
    store = CachedTargets(n, c, top_k=k, dtype=dtype)
    store.write(torch.arange(n), probs)
    read, _ = store.read(torch.arange(n))
    torch.testing.assert_close(read.sum(-1), torch.ones(n), rtol=0, atol=1e-6)
    assert (read >= 0).all()
    if k < c and dtype == torch.float32 and all(len(set(row)) == c for row in probs.tolist()):
        expected = torch.tensor([reference.top_k_row(row, k) for row in probs.tolist()], dtype=torch.float64)
        torch.testing.assert_close(read.double(), expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- adversarial


@given(logits(2), st.sampled_from(OBJECTIVES), st.sampled_from(["probs", "log_probs", "logits"]), temperatures)
def test_both_sides_of_every_objective_are_the_closed_form(x, name, inputs, temperature):
    student, teacher = x
    discriminator = Linear(student.shape[1])
    loss = AdversarialDistributionLoss(
        discriminator, objective=name, inputs=inputs, temperature=temperature, reduction="none"
    )
    see = {
        "probs": lambda row: reference.softmax(row, temperature),
        "log_probs": lambda row: [math.log(p) for p in reference.softmax(row, temperature)],
        "logits": lambda row: [z / temperature for z in row],
    }[inputs]
    w, b = discriminator.w.tolist(), discriminator.b.item()

    def score(row):
        return sum(a * z for a, z in zip(w, see(row), strict=True)) + b

    pairs = [(score(t), score(s)) for t, s in zip(teacher.tolist(), student.tolist(), strict=True)]
    of_student = [reference.STUDENT[name](t, s) for t, s in pairs]
    of_discriminator = [reference.DISCRIMINATOR[name](t, s) for t, s in pairs]
    assert loss(student, teacher).tolist() == pytest.approx(of_student, rel=1e-9, abs=1e-9)
    assert loss.student_loss(student, teacher).tolist() == loss(student, teacher).tolist()
    assert loss.discriminator_loss(student, teacher).tolist() == pytest.approx(of_discriminator, rel=1e-9, abs=1e-9)


@given(logits(2), st.floats(0, 20))
def test_penalties_of_a_linear_discriminator_are_the_closed_form(x, weight):
    student, teacher = x
    discriminator = Linear(student.shape[1])
    norm = discriminator.w.detach().norm().item()

    def discriminator_loss(penalty):
        loss = AdversarialDistributionLoss(discriminator, objective="wasserstein", penalty=penalty, reduction="none")
        return loss.discriminator_loss(student, teacher)

    plain = discriminator_loss(None)
    two_sided = discriminator_loss(GradientPenalty(weight)) - plain
    zero_centred = discriminator_loss(ZeroCenteredPenalty(weight)) - plain
    torch.testing.assert_close(two_sided, torch.full_like(plain, weight * (norm - 1) ** 2))
    torch.testing.assert_close(zero_centred, torch.full_like(plain, weight * norm**2))


def test_a_penalty_looks_between_the_two_sides_with_one_factor_a_sample():
    """D(x) = |x|^2 / 2 has the gradient x: the penalty then shows the interpolates themselves."""
    seen = []

    class Half(torch.nn.Module):
        def forward(self, x):
            seen.append(x.detach())
            return x.square().sum(-1) / 2

    student, teacher = torch.zeros(400, 3), torch.tensor([6.0, 0.0, 0.0]).expand(400, 3)
    loss = AdversarialDistributionLoss(
        Half(), objective="wasserstein", inputs="logits", penalty=GradientPenalty(1.0), reduction="none"
    )
    value = loss.discriminator_loss(student, teacher) - (0 - 18.0)
    between = seen[-1]
    assert (between[:, 1:] == 0).all()  # on the line between them
    u = between[:, 0] / 6
    assert 0 <= u.min() < 0.05
    assert 0.95 < u.max() <= 1
    assert abs(float(u.mean()) - 0.5) < 0.06
    torch.testing.assert_close(value, (6 * u - 1).square(), rtol=1e-4, atol=1e-4)


@given(logits(2), st.sampled_from(OBJECTIVES), temperatures)
def test_the_students_gradient_through_a_linear_discriminator_is_the_closed_form(x, name, temperature):
    student, teacher = x
    discriminator = Linear(student.shape[1])
    loss = AdversarialDistributionLoss(discriminator, objective=name, temperature=temperature)
    grad = gradient(lambda s: loss(s, teacher), student)
    w = discriminator.w.detach()
    p = torch.softmax(student / temperature, -1)
    t, s = (torch.softmax(z / temperature, -1) @ w + discriminator.b.item() for z in (teacher, student))
    slope = {  # of the student's loss in its own score
        "non_saturating": -torch.sigmoid(-s),
        "least_squares": s - 1,
        "hinge": -torch.ones_like(s),
        "wasserstein": -torch.ones_like(s),
        "relativistic": -torch.sigmoid(t - s),
    }[name]
    expected = slope[:, None] * p * (w - (p @ w)[:, None]) / temperature / len(student)
    torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-11)


# ----------------------------------------------------------------------------------------------------------- layout


@given(logits(2), divergences)
def test_a_dense_layout_is_the_flat_one_reshaped(x, name):
    student, teacher = (side.repeat(6, 1) for side in x)
    n, c = x[0].shape
    flat = DeterministicKD(divergence=name, reduction="none")(student, teacher)
    first = [side.view(n, 3, 2, c).permute(0, 3, 1, 2) for side in (student, teacher)]
    last = [side.view(n, 6, c) for side in (student, teacher)]
    for layout, dim, shape in ((first, 1, (n, 3, 2)), (last, -1, (n, 6)), (last, 2, (n, 6))):
        value = DeterministicKD(divergence=name, reduction="none", class_dim=dim)(*layout)
        assert value.shape == shape
        torch.testing.assert_close(value.flatten(), flat)
