"""Properties that hold for every input, checked on inputs that hypothesis makes up, against loops of exact decimals."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from laws import DIVERGENCES, OBJECTIVES
from seeds import generator, reseed
from torch import Tensor
from torch.testing import assert_close

from aikd_losses import (
    AdversarialDistributionLoss,
    AIKDLoss,
    CachedTargets,
    DeterministicKD,
    EMATargets,
    GradientPenalty,
    LinearRamp,
    ProgressiveKD,
    ZeroCenteredPenalty,
)
from aikd_losses.functional import deterministic_kd, progressive_kd

temperatures = st.floats(0.5, 20.0)
divergences = st.sampled_from(DIVERGENCES)
flags = st.lists(st.booleans(), min_size=5, max_size=5).map(torch.tensor)


@st.composite
def logits(draw, sides: int = 1, size: float = 5.0) -> Tensor:
    """`sides` batches of logits of one shape, float64."""
    n, c = draw(st.integers(1, 5)), draw(st.integers(2, 6))
    numbers = st.floats(-size, size, allow_subnormal=False)
    values = draw(st.lists(numbers, min_size=sides * n * c, max_size=sides * n * c))
    return torch.tensor(values, dtype=torch.float64).view(sides, n, c)


class Linear(torch.nn.Module):
    """D(x) = w . x + b, whose gradient is w everywhere."""

    def __init__(self, c: int) -> None:
        super().__init__()
        g = generator(c)
        self.w = torch.nn.Parameter(torch.randn(c, generator=g, dtype=torch.float64))
        self.b = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w + self.b


# ------------------------------------------------------------------------------------------------------ divergences


@given(logits(2), divergences, temperatures, st.floats(0.05, 0.95))
def test_a_divergence_and_its_gradient_are_those_of_the_loops_and_it_is_never_negative(x, name, temperature, beta):
    pairs = list(zip(*x.tolist(), strict=True))
    given = {"temperature": temperature, "divergence": name, "beta": beta}
    values = deterministic_kd(*x, **given, reduction="none")
    expected = [reference.deterministic(name, *pair, temperature, beta) for pair in pairs]
    assert values.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12 * temperature**2)
    assert (values >= 0).all()
    student = x[0].requires_grad_()
    (slope,) = torch.autograd.grad(deterministic_kd(student, x[1], **given), student)
    each = torch.tensor([reference.slope(name, *pair, temperature, beta) for pair in pairs], dtype=torch.float64)
    assert_close(slope, each / len(pairs), rtol=1e-7, atol=1e-11)


@given(logits(2, size=2.0), divergences)
def test_as_the_temperature_grows_the_value_tends_to_the_squared_difference_of_centred_logits(x, name):
    student, teacher = (side - side.mean(-1, keepdim=True) for side in x)
    expected = (student - teacher).square().sum(-1) / (2 * student.shape[-1])
    expected = expected * (0.25 if name == "js" else 1.0)  # beta (1 - beta) at beta = 1/2
    value = DeterministicKD(temperature=1e4, divergence=name, reduction="none")(student, teacher)
    assert_close(value, expected, rtol=5e-3, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ progressive


@given(
    logits(2), st.floats(0, 1), temperatures, flags, st.sampled_from(["labels", "probabilities", None]), st.booleans()
)
def test_progressive_is_the_loop(x, alpha, temperature, known, kind, one_each):
    """With a share for all rows or one for each, from a store or from a function, also under a transform."""
    student, previous = x[0], x[1].softmax(-1)
    n, c = student.shape
    known, shares = known[:n], torch.linspace(0, alpha, n, dtype=torch.float64) if one_each else torch.full((n,), alpha)
    target = {"labels": torch.arange(n) % c, "probabilities": previous.flip(1), None: None}[kind]
    expected = [
        reference.progressive(
            student[i].tolist(),
            previous[i].tolist() if known[i] else None,
            None if target is None else target[i].tolist(),
            shares[i].item(),
            temperature,
        )
        for i in range(n)
    ]
    given = {"alpha": shares if one_each else alpha, "known": known, "temperature": temperature}
    values = progressive_kd(student, previous, target, **given, reduction="none")
    assert values.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    _, value = torch.func.grad_and_value(lambda s: progressive_kd(s, previous, target, **given))(student)
    assert value.item() == pytest.approx(sum(expected) / n, rel=1e-6, abs=1e-6)
    if not one_each:
        store, index = CachedTargets(n, c, dtype=torch.float64), torch.arange(n)
        store.write(index, previous, keep=known)
        loss = ProgressiveKD(store, alpha=alpha, temperature=temperature, reduction="none")
        assert loss(student, target, index=index).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)
        if target is not None:  # plain cross-entropy, where nothing has history
            plain = torch.nn.functional.cross_entropy(student, target, reduction="none")
            assert_close(loss(student, target, index=None), plain)


@given(logits(3), st.floats(0, 1), flags, st.booleans())
def test_rows_are_blended_as_the_inputs_were_and_known_where_both_are(x, share, known, one_each):
    student, rows = x[0], x[1].softmax(-1)
    n, c = student.shape
    order, known, store = torch.arange(n).flip(0), known[:n], CachedTargets(n, c, dtype=torch.float64)
    store.write(torch.arange(n), rows, keep=known)
    shares = torch.linspace(0, share, n, dtype=torch.float64) if one_each else share
    loss = ProgressiveKD(store, alpha=1.0, reduction="none")
    value = loss(student, index=torch.arange(n), partner_index=order, mix_lambda=shares)
    weight = shares[:, None] if one_each else share
    expected = -((weight * rows + (1 - weight) * rows[order]) * student.log_softmax(-1)).sum(-1)
    assert_close(value, expected * (known & known[order]), rtol=1e-6, atol=1e-6)


@given(st.floats(0, 1), st.integers(1, 50), st.integers(0, 100))
def test_a_linear_ramp_is_the_published_rule(end, num_epochs, epoch):
    assert LinearRamp(end, num_epochs)(epoch) == pytest.approx(min(end, end * (epoch + 1) / num_epochs), abs=1e-12)
    # From there back to 0, it is what is left; and it ends where it says.
    back = LinearRamp(0.0, num_epochs, start=end)
    assert back(epoch) + LinearRamp(end, num_epochs)(epoch) == pytest.approx(end, abs=1e-12)
    assert back(epoch + num_epochs) == 0.0


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
@example(torch.randn(3, 2, 3, dtype=torch.float64), 0.0)
@example(torch.randn(3, 2, 3, dtype=torch.float64), 1.0)
def test_an_ema_is_the_recurrence_from_the_first_prediction_on(x, decay):
    store = EMATargets(len(x[0]), x.shape[-1], decay=decay, dtype=torch.float64)
    index = torch.arange(len(x[0]))
    expected = x[0].softmax(-1)
    for t, side in enumerate(x):
        if t > 0:
            expected = decay * expected + (1 - decay) * side.softmax(-1)
        store.write(index, side.softmax(-1))
    assert_close(store.read(index)[0].double(), expected, rtol=1e-6, atol=1e-7)


@given(logits(), st.integers(1, 6), st.sampled_from([torch.float16, torch.float32]))
def test_a_top_k_row_keeps_the_largest_and_sums_to_one(x, k, dtype):
    probs = x[0].softmax(-1)
    n, c = probs.shape
    k = min(k, c)
    store = CachedTargets(n, c, top_k=k, dtype=dtype)
    store.write(torch.arange(n), probs)
    read, _ = store.read(torch.arange(n))
    rounded = 1e-3 if k == c and dtype == torch.float16 else 1e-6  # a row that is kept whole is as its type rounds it
    assert_close(read.sum(-1), torch.ones(n), rtol=0, atol=rounded)
    assert (read >= 0).all()
    if k < c and dtype == torch.float32 and all(len(set(row)) == c for row in probs.tolist()):
        expected = torch.tensor([reference.top_k_row(row, k) for row in probs.tolist()], dtype=torch.float64)
        assert_close(read.double(), expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- adversarial


@given(logits(2), st.sampled_from(OBJECTIVES), st.sampled_from(["probs", "log_probs", "logits"]), temperatures)
def test_both_sides_of_every_objective_are_the_closed_form(x, name, inputs, temperature):
    student, teacher = x
    discriminator = Linear(student.shape[1])
    given = {"objective": name, "inputs": inputs, "temperature": temperature, "reduction": "none"}
    loss = AdversarialDistributionLoss(discriminator, **given)
    see = {
        "probs": lambda row: reference.softmax(row, temperature),
        "log_probs": lambda row: [p.ln() for p in reference.softmax(row, temperature)],
        "logits": lambda row: [z / temperature for z in row],
    }[inputs]
    w, b = discriminator.w.tolist(), discriminator.b.item()
    of_teacher, of_student = (
        [sum(a * float(z) for a, z in zip(w, see(row), strict=True)) + b for row in side.tolist()]
        for side in (teacher, student)
    )
    expected = [reference.STUDENT[name](t, s) for t, s in zip(of_teacher, of_student, strict=True)]
    assert loss(student, teacher).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert loss.student_loss(student, teacher).tolist() == loss(student, teacher).tolist()
    expected = [reference.DISCRIMINATOR[name](t, s) for t, s in zip(of_teacher, of_student, strict=True)]
    assert loss.discriminator_loss(student, teacher).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(logits(2), st.floats(0, 20))
def test_penalties_of_a_linear_discriminator_are_the_closed_form(x, weight):
    discriminator = Linear(x.shape[-1])
    norm = discriminator.w.detach().norm().item()

    def discriminator_loss(penalty):
        loss = AdversarialDistributionLoss(discriminator, objective="wasserstein", penalty=penalty, reduction="none")
        return loss.discriminator_loss(*x)

    plain = discriminator_loss(None)
    two_sided = discriminator_loss(GradientPenalty(weight)) - plain
    zero_centred = discriminator_loss(ZeroCenteredPenalty(weight)) - plain
    assert_close(two_sided, torch.full_like(plain, weight * (norm - 1) ** 2))
    assert_close(zero_centred, torch.full_like(plain, weight * norm**2))


# ------------------------------------------------------------------------------------------------------- micro-batches


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**16))
def test_sums_of_micro_batches_over_their_count_are_the_whole_batch(sizes, seed):
    """Of the full method, in value and gradient, with some rows masked and some without history."""
    reseed(seed)
    n, c = sum(sizes), 3
    s, t = torch.randn(2, n, c)
    y, index, mask = torch.randint(c, (n,)), torch.randperm(n), torch.rand(n) < 0.7
    mask[0] = True
    store = CachedTargets(n, c)
    store.write(index[::2], torch.randn(n, c)[::2].softmax(-1))
    whole, parts = (AIKDLoss(n, c, 2, targets=store, reduction=reduction) for reduction in ("mean", "sum"))
    parts.load_state_dict(whole.state_dict())  # the same discriminator

    def total(criterion, rows):
        given = dict(student_logits=s[rows], teacher_logits=t[rows], target=y[rows], index=index[rows], mask=mask[rows])
        return criterion(**given)[0]

    s.requires_grad_()
    expected = total(whole, torch.arange(n))
    accumulated = sum(total(parts, rows) / mask.sum() for rows in torch.arange(n).split(sizes))
    assert_close(accumulated, expected)
    (found,), (wanted,) = (torch.autograd.grad(x, s) for x in (accumulated, expected))
    assert_close(found, wanted)
    assert found[mask].any(-1).all()
