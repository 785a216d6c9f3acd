"""The analytic gradient: the same numbers as the plain composition in float64, with less kept, for small rows and large."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

from aikd_losses import CachedTargets, DeterministicKD, LossStack, ProgressiveKD, _soft_targets
from aikd_losses.functional import deterministic_kd, progressive_kd


def usual(s, t, temperature):
    log_q, p = F.log_softmax(s / temperature, -1), F.softmax(t / temperature, -1)
    return F.kl_div(log_q, p, reduction="batchmean") * temperature**2


def published(s, previous, target, alpha, temperature):
    soft = -(previous * F.log_softmax(s / temperature, -1)).sum(-1).mean()
    return (1 - alpha) * F.cross_entropy(s, target) + alpha * temperature**2 * soft


@pytest.fixture(params=["whole", "blocks"])
def way(request, monkeypatch):
    """All rows at once, or in blocks of 20 elements."""
    if request.param == "blocks":
        monkeypatch.setattr(_soft_targets, "BLOCK", 20)
    return request.param


def with_gradient(loss, s):
    s = s.detach().requires_grad_()
    value = loss(s)
    return value.detach(), *torch.autograd.grad(value, s)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 100.0])
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_float32_is_float64_within_a_millionth(way, temperature, scale):
    """Also at high temperatures, where the usual composition in float32 loses three digits."""
    g = torch.Generator().manual_seed(1)
    s, t = scale * torch.randn(128, 10, generator=g), scale * torch.randn(128, 10, generator=g)
    expected, slope = with_gradient(lambda x: usual(x, t.double(), temperature), s.double())
    value, found = with_gradient(lambda x: deterministic_kd(x, t, temperature=temperature), s)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    assert (found - slope).abs().max() <= 1e-5 * slope.abs().max()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("offset", [0.0, 2.0**12])
def test_it_is_where_logits_are_large_or_far_from_zero_too(temperature, offset):
    """More than `SHORT` elements, whose logarithm of p is made from its largest value."""
    g = torch.Generator().manual_seed(1)
    s, t = (torch.randn(64, 400, generator=g) + x for x in (-offset, offset))
    assert s.numel() > _soft_targets.SHORT
    expected, slope = with_gradient(lambda x: usual(x, t.double(), temperature), s.double())
    value, found = with_gradient(lambda x: deterministic_kd(x, t, temperature=temperature), s)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    assert (found - slope).abs().max() <= 1e-5 * slope.abs().max()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("soft", [False, True])
def test_progressive_is_the_published_rule(way, temperature, soft):
    s, target = torch.randn(7, 5).double(), torch.arange(7) % 5
    previous = 0.97 * torch.randn(7, 5).double().softmax(-1)  # as rounding leaves it: the sum is not quite 1
    target = torch.randn(7, 5).double().softmax(-1) if soft else target
    expected = with_gradient(lambda x: published(x, previous, target, 0.3, temperature), s)
    found = with_gradient(lambda x: progressive_kd(x, previous, target, alpha=0.3, temperature=temperature), s)
    torch.testing.assert_close(found, expected)
    alone = with_gradient(lambda x: progressive_kd(x, previous, alpha=0.3, temperature=temperature), s)
    without = with_gradient(
        lambda x: published(x, previous, target, 0.3, temperature) - 0.7 * F.cross_entropy(x, target), s
    )
    torch.testing.assert_close(alone, without)


def test_a_row_without_history_has_no_gradient_from_it(way):
    s, previous, known = (
        torch.randn(5, 4),
        torch.randn(5, 4).softmax(-1),
        torch.tensor([True, False, True, True, False]),
    )
    _, slope = with_gradient(lambda x: progressive_kd(x, previous, alpha=0.5, known=known, temperature=2.0), s)
    expected = 2.0 * 0.5 * ((s / 2).softmax(-1) - previous) / 5
    torch.testing.assert_close(slope, expected * known[:, None])


def test_a_teacher_of_another_precision_is_widened_and_not_the_student_narrowed(way):
    s, t = torch.randn(5, 4).double(), torch.randn(5, 4)
    expected = with_gradient(lambda x: deterministic_kd(x, t.double()), s)
    torch.testing.assert_close(with_gradient(lambda x: deterministic_kd(x, t), s), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("student", "teacher"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float32")]
)
def test_the_value_of_narrow_logits_is_float32_whatever_the_others_are(student, teacher):
    s, t = torch.randn(5, 4).to(getattr(torch, student)), torch.randn(5, 4).to(getattr(torch, teacher))
    value = deterministic_kd(s, t)
    torch.testing.assert_close(value, deterministic_kd(s.float(), t.float()))
    assert value.dtype == torch.float32


@pytest.mark.parametrize("classes", [5, 40])
@pytest.mark.parametrize("form", ["direct", "near", "careful"])
def test_every_form_of_the_sum_is_the_same(form, classes, monkeypatch):
    """Rows with the classes first and last; a CPU chooses by the value, other devices compute the careful form."""
    s, t, previous = torch.randn(6, classes).double(), torch.randn(6, classes).double(), torch.rand(6, classes).double()
    expected = with_gradient(lambda x: usual(x, t, 2.0), s)
    published_value = with_gradient(lambda x: published(x, previous, torch.arange(6) % 5, 0.3, 2.0), s)
    if form == "direct":
        monkeypatch.setattr(_soft_targets, "NEAR", 0.0)
    if form == "near":
        monkeypatch.setattr(_soft_targets, "DIRECT", 0.0)
    if form == "careful":
        work = _soft_targets._work
        monkeypatch.setattr(_soft_targets, "_work", lambda *args, careful: work(*args, careful=True))
    torch.testing.assert_close(with_gradient(lambda x: deterministic_kd(x, t, temperature=2.0), s), expected)
    torch.testing.assert_close(
        with_gradient(lambda x: progressive_kd(x, previous, torch.arange(6) % 5, alpha=0.3, temperature=2.0), s),
        published_value,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gradient_of_half_precision_logits_is_that_of_float32_rounded_once(way, dtype):
    s, t = torch.randn(64, 200).to(dtype), torch.randn(64, 200).to(dtype)
    expected, slope = with_gradient(lambda x: usual(x, t.double(), 4.0), s.double())
    value, found = with_gradient(lambda x: deterministic_kd(x, t), s)
    assert value.dtype == torch.float32
    assert found.dtype == dtype
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    assert (found.double() - slope).abs().max() <= torch.finfo(dtype).eps * slope.abs().max()


def test_second_derivatives_are_right(way):
    s, t = torch.randn(3, 4).double().requires_grad_(), torch.randn(3, 4).double()
    target = torch.tensor([0, 3, 1])
    for loss in (
        lambda x: deterministic_kd(x, t, temperature=2.0, reduction="none"),
        lambda x: progressive_kd(x, t.softmax(-1), alpha=0.4, temperature=2.0, reduction="none"),
        lambda x: progressive_kd(x, t.softmax(-1), target, alpha=0.4, reduction="none"),
    ):
        assert torch.autograd.gradcheck(loss, s)
        assert torch.autograd.gradgradcheck(loss, s)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_comes_down_from_above_multiplies_the_gradient_and_its_gradient(reduction):
    s, t = torch.randn(3, 4).double().requires_grad_(), torch.randn(3, 4).double()
    above = torch.tensor([0.5, 2.0, -3.0]).double() if reduction == "none" else torch.tensor(3.0).double()
    value = deterministic_kd(s, t, temperature=2.0, reduction=reduction)
    rows = 4 * (t / 2).softmax(-1) * ((t / 2).log_softmax(-1) - (s / 2).log_softmax(-1))
    expected = rows.sum(-1) if reduction == "none" else rows.sum(-1).mean()
    slopes = [torch.autograd.grad(x, s, above, create_graph=True)[0] for x in (value, expected)]
    torch.testing.assert_close(*slopes)
    torch.testing.assert_close(*[torch.autograd.grad(x.square().sum(), s)[0] for x in slopes])


def test_functional_transforms_see_the_same_loss():
    s, t = torch.randn(6, 2, 4), torch.randn(6, 2, 4)
    rows = [with_gradient(lambda x, t=t: deterministic_kd(x, t), s) for s, t in zip(s, t, strict=True)]
    slopes, values = torch.func.vmap(torch.func.grad_and_value(deterministic_kd))(s, t)
    torch.testing.assert_close(values, torch.stack([value for value, _ in rows]))
    torch.testing.assert_close(slopes, torch.stack([slope for _, slope in rows]), atol=1e-6, rtol=1e-5)


def test_under_a_transform_a_label_out_of_range_is_said_in_a_sentence():
    previous, labels = torch.full((4, 3), 1 / 3), torch.tensor([2, 0, 3, 1])
    with pytest.raises(IndexError, match=r"`target` must be"):
        torch.func.grad(lambda x: progressive_kd(x, previous, labels, alpha=0.5))(torch.randn(4, 3))


def test_under_a_transform_a_stack_is_the_same():
    stack = LossStack({"label": nn.CrossEntropyLoss(), "kd": DeterministicKD(temperature=2.0)})
    s, t, y = torch.randn(4, 3), torch.randn(4, 3), torch.arange(4) % 3

    def total(x):
        return stack(student_logits=x, teacher_logits=t, target=y)[0]

    torch.testing.assert_close(torch.func.grad(total)(s), with_gradient(total, s)[1])


def test_a_soft_target_that_is_learned_gets_its_gradient_in_a_stack_too():
    store = CachedTargets(4, 3, dtype=torch.float32)
    store.write(torch.arange(4), torch.randn(4, 3).softmax(-1))
    s, target = torch.randn(4, 3), torch.randn(4, 3).softmax(-1).requires_grad_()
    stack = LossStack({"ps": ProgressiveKD(store, alpha=0.3), "kd": DeterministicKD()})
    total, _ = stack(student_logits=s, teacher_logits=torch.randn(4, 3), target=target, index=torch.arange(4))
    (found,) = torch.autograd.grad(total, target)
    torch.testing.assert_close(found, -0.7 * s.log_softmax(-1) / 4)


def test_an_error_of_the_kernels_that_is_not_the_labels_fault_is_handed_on(monkeypatch):
    def fails(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(_soft_targets._SoftTargets, "apply", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        progressive_kd(torch.randn(4, 3), torch.randn(4, 3).softmax(-1), torch.arange(4) % 3, alpha=0.5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_history_and_labels_there_is_nothing_to_learn(reduction):
    s = torch.randn(4, 3, requires_grad=True)
    value = progressive_kd(s, torch.full((4, 3), 1 / 3), alpha=0.0, reduction=reduction)
    assert value.tolist() == (0.0 if reduction == "mean" else [0.0] * 4)
    value.sum().backward()
    assert not s.grad.any()


@pytest.mark.parametrize("kind", ["labels", "probabilities", "none"])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0, "each"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_transform_sees_what_the_loops_give(kind, alpha, masked):
    """In a dense layout, `(2, C, 3)`: a row of logits a position."""
    s, previous = torch.randn(2, 4, 3), torch.randn(2, 4, 3).softmax(1)
    known = torch.tensor([[True, False, True], [True, True, False]])
    mask = torch.tensor([[True, True, True], [False, True, False]])
    target = {"labels": torch.randint(4, (2, 3)), "probabilities": torch.randn(2, 4, 3).softmax(1), "none": None}[kind]
    shares = torch.tensor([[0.0, 0.3, 1.0], [0.7, 0.5, 0.2]])
    values = []
    for i, j in mask.nonzero().tolist() if masked else torch.ones(2, 3).nonzero().tolist():
        y = None if target is None else target[i, j].item() if kind == "labels" else target[i, :, j].tolist()
        row = previous[i, :, j].tolist() if known[i, j] else None
        a = shares[i, j].item() if alpha == "each" else alpha
        values.append(reference.progressive(s[i, :, j].tolist(), row, y, a, 2.0))
    if kind == "labels" and masked:
        target = target.masked_fill(~mask, -100)
    given = {"known": known, "alpha": shares if alpha == "each" else alpha, "temperature": 2.0, "class_dim": 1}
    given |= {"mask": mask} if masked else {}
    slope, value = torch.func.grad_and_value(lambda x: progressive_kd(x, previous, target, **given))(s)
    assert value.item() == pytest.approx(sum(values) / len(values), rel=1e-5)
    torch.testing.assert_close(slope, with_gradient(lambda x: progressive_kd(x, previous, target, **given), s)[1])


def test_no_gradient_reaches_previous_predictions_or_the_teacher():
    s, fixed = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4).requires_grad_()
    (progressive_kd(s, fixed.softmax(-1), alpha=0.3) + deterministic_kd(s, 2 * fixed)).backward()
    assert s.grad is not None
    assert fixed.grad is None


@pytest.mark.parametrize("learned", ["alpha", "target"])
def test_a_gradient_for_alpha_or_a_soft_target_is_not_lost(learned):
    s, previous = torch.randn(3, 4), torch.randn(3, 4).softmax(-1)
    alpha = torch.tensor(0.3, requires_grad=learned == "alpha")
    target = torch.randn(3, 4).softmax(-1).requires_grad_(learned == "target")
    value = progressive_kd(s, previous, target, alpha=alpha)
    log_q = s.log_softmax(-1)
    expected = {"alpha": ((target - previous) * log_q).sum(-1).mean(), "target": -0.7 * log_q / 3}[learned]
    (found,) = torch.autograd.grad(value, alpha if learned == "alpha" else target)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("excluded", [(True, True), (True, False), (False, True)])
def test_a_class_at_minus_infinity_in_one_row_is_right_and_spoils_no_other(way, excluded):
    s, t = torch.randn(4, 5).double(), torch.randn(4, 5).double()
    where = torch.zeros(4, 5, dtype=torch.bool)
    where[1, 2] = True
    s, t = (x.masked_fill(where, -math.inf) if out else x for x, out in zip((s, t), excluded, strict=True))
    x = s.clone().requires_grad_()
    values = deterministic_kd(x, t, temperature=2.0, reduction="none")
    others = torch.tensor([0, 2, 3])
    torch.testing.assert_close(
        values[others], deterministic_kd(s[others], t[others], temperature=2.0, reduction="none")
    )
    q, p = (s[1] / 2).softmax(-1).tolist(), (t[1] / 2).softmax(-1).tolist()
    terms = [0.0 if b == 0 else math.inf if a == 0 else b * math.log(b / a) for a, b in zip(q, p, strict=True)]
    assert float(values[1].detach()) == pytest.approx(4 * sum(terms))
    values.sum().backward()
    torch.testing.assert_close(x.grad, 2 * ((s / 2).softmax(-1) - (t / 2).softmax(-1)))


@pytest.mark.parametrize("gap", [85.0, 105.0, 1e4])
def test_classes_that_the_teacher_all_but_excludes_still_count(gap):
    """Its p is 0 in float32, q is not, and there are many."""
    s, t = torch.full((1, 50_000), -20.0), torch.full((1, 50_000), -gap)
    s[0, 0] = t[0, 0] = 0.0
    expected, slope = with_gradient(lambda x: usual(x, t.double(), 1.0), s.double())
    value, found = with_gradient(lambda x: deterministic_kd(x, t, temperature=1.0), s)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.double()[:, 1:], slope[:, 1:], rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(
        found.double(), slope, rtol=0, atol=1e-5
    )  # as near to 1 as log_softmax adds up many small


@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize("form", ["number", "tensor", "a tensor each"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_part_without_a_share_counts_nothing_even_if_it_is_infinite(temperature, form, transformed):
    def with_gradient_so(loss, s):
        return torch.func.grad_and_value(loss)(s)[::-1] if transformed else with_gradient(loss, s)

    s, p = torch.tensor([[1.0, 0.0, -math.inf]]), torch.tensor([[0.4, 0.4, 0.2]])
    alike = {"number": float, "tensor": torch.tensor, "a tensor each": lambda a: torch.tensor([a])}[form]
    value, slope = with_gradient_so(
        lambda x: progressive_kd(x, p, torch.tensor([0]), alpha=alike(0.0), temperature=temperature), s
    )
    torch.testing.assert_close(value, F.cross_entropy(s, torch.tensor([0])))
    assert slope.isfinite().all()
    p = torch.tensor([[0.4, 0.6, 0.0]])
    loss = {"alpha": alike(1.0), "temperature": temperature}
    value, slope = with_gradient_so(lambda x: progressive_kd(x, p, torch.tensor([2]), **loss), s)
    torch.testing.assert_close(value, progressive_kd(s, p, **loss))
    assert slope.isfinite().all()


def test_one_tensor_of_the_size_of_the_logits_is_kept(way):
    """Whatever a stack merges; what the usual composition keeps is measured the same way."""
    s, t = torch.randn(100, 50, requires_grad=True), torch.randn(100, 50)
    previous, target, copy = t.softmax(-1), torch.zeros(100, dtype=torch.int64), s.numel() * 4
    store = CachedTargets(100, 50, dtype=torch.float32)
    store.write(torch.arange(100), previous)
    stack = LossStack({"p": ProgressiveKD(store), "d": DeterministicKD()})
    given = {"teacher_logits": t, "target": target, "index": torch.arange(100)}
    assert held(lambda: deterministic_kd(s, t)) <= copy + 1000
    assert held(lambda: progressive_kd(s, previous, target, alpha=0.5)) <= copy + 1000
    assert held(lambda: stack(student_logits=s, **given)[0]) <= 2 * copy + 1000  # and the rows that were read
    assert held(lambda: usual(s, t, 4.0)) >= 2 * copy


def held(loss):
    """Bytes that are in use after the forward pass and were not before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        value = loss()
    del value
    return sum(event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]")


def test_nothing_is_kept_where_no_gradient_is_wanted(way):
    s, t = torch.randn(100, 50, requires_grad=True), torch.randn(100, 50)
    with torch.no_grad():
        assert held(lambda: deterministic_kd(s, t)) <= 1000
    assert held(lambda: deterministic_kd(s.detach(), t)) <= 1000


def test_a_stack_merges_what_it_may_and_the_sum_is_that_of_the_terms(way):
    s, t, y = torch.randn(9, 6).double().requires_grad_(), torch.randn(9, 6).double(), torch.arange(9) % 6
    index, mask = torch.arange(9), torch.arange(9) < 7
    store = CachedTargets(9, 6, dtype=torch.float64)
    store.write(index[:5], torch.randn(5, 6).double().softmax(-1))  # the others have no history
    for settings in ({}, {"temperature": 3.0}, {"temperature": 3.0, "reduction": "sum"}):
        terms = {
            "p": ProgressiveKD(store, alpha=0.3, **settings),
            "d": DeterministicKD(**{"temperature": 3.0, **settings}),
        }
        stack = LossStack(terms, weights={"p": 0.25, "d": 2.0})
        given = {"student_logits": s, "teacher_logits": t, "target": y, "index": index, "mask": mask}
        assert len(stack._merged({name: call.pick(given) for name, call in stack._calls["forward"].items()})) == 2
        total, values = stack(**given)
        apart = {"p": terms["p"](s, y, index=index, mask=mask), "d": terms["d"](s, t, mask=mask)}
        expected = 0.25 * apart["p"] + 2.0 * apart["d"]
        torch.testing.assert_close(values, {name: value.detach() for name, value in apart.items()})
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(torch.autograd.grad(3.0 * total, s), torch.autograd.grad(3.0 * expected, s))


def test_a_term_with_a_hook_or_another_mask_is_called_by_itself():
    s, t = torch.randn(4, 5), torch.randn(4, 5)
    seen = []
    stack = LossStack(
        {"a": DeterministicKD(), "b": DeterministicKD(), "c": DeterministicKD()}, inputs={"c": {"mask": None}}
    )
    stack.terms["a"].register_forward_hook(lambda *args: seen.append(1))
    mask = torch.tensor([True, True, False, False])
    _, values = stack(student_logits=s, teacher_logits=t, mask=mask)
    assert seen == [1]
    torch.testing.assert_close(values["a"], deterministic_kd(s[:2], t[:2]))
    torch.testing.assert_close(values["b"], deterministic_kd(s[:2], t[:2]))
    torch.testing.assert_close(values["c"], deterministic_kd(s, t))


def test_a_tensor_changed_in_place_before_the_backward_pass_is_an_error(way):
    s, t = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    value = deterministic_kd(s * 1.0, t)
    t.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("masked", [False, True])
def test_a_gradient_may_be_taken_twice(way, masked):
    s, t, rows, y = (
        torch.randn(4, 5, requires_grad=True),
        torch.randn(4, 5),
        torch.rand(4, 5),
        torch.tensor([0, 1, 2, 3]),
    )
    mask, known = (torch.tensor([True, True, False, True]) for _ in range(2)) if masked else (None, None)
    for value in (deterministic_kd(s, t, mask=mask), progressive_kd(s, rows, y, alpha=0.3, known=known, mask=mask)):
        s.grad = None
        value.backward(retain_graph=True)
        first = s.grad.clone()
        value.backward()
        torch.testing.assert_close(s.grad, 2 * first)
        with pytest.raises(RuntimeError, match="second time"):
            value.backward()


def test_a_loss_that_is_kept_keeps_nothing_of_its_step(way):
    """As with torch's own losses, what was saved goes with the backward pass."""
    s, y = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])
    store = CachedTargets(4, 5)
    store.write(torch.arange(4), torch.rand(4, 5).softmax(-1))
    stack = LossStack({"kd": DeterministicKD(), "progressive": ProgressiveKD(store, alpha=0.5)})
    logits, t, mask = s * 1.0, torch.randn(4, 5), torch.tensor([True, False, True, True])
    total, _ = stack(student_logits=logits, teacher_logits=t, target=y, index=torch.arange(4), mask=mask)
    gone = [weakref.ref(x) for x in (logits, t, mask)]
    total.backward()
    del logits, t, mask
    gc.collect()
    assert [ref() for ref in gone] == [None, None, None]
    assert total.grad_fn is not None


def test_a_stack_reads_a_store_once_and_a_write_of_the_users_own_is_called():
    class Counting(CachedTargets):
        reads = writes = 0

        def read(self, index):
            self.reads += 1
            return super().read(index)

        def write(self, index, probs, *, keep=None):
            self.writes += 1
            super().write(index, probs, keep=keep)

    store = Counting(4, 5)
    stack = LossStack({"p": ProgressiveKD(store)}, weights={"p": 0.25})
    given = {"student_logits": torch.randn(4, 5), "target": torch.arange(4), "index": torch.arange(4)}
    stack.update(**given)
    total, values = stack(**given)
    assert (store.reads, store.writes) == (1, 1)
    torch.testing.assert_close(total, 0.25 * values["p"])


MANY = {"kd 4": 4.0, "kd 1": 1.0, "kd 1 again": 1.0, "kd 10": 10.0}  # temperatures


@pytest.mark.parametrize("rows", [1, 6, 7])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blocks_that_share_their_memory_do_not_disturb_each_other(rows, masked, temperature, dtype, monkeypatch):
    """Two rows a block, many terms, all in one pass; expected is their sum as published, in float64."""
    classes = 40
    monkeypatch.setattr(_soft_targets, "BLOCK", 2 * classes)
    s, y, index = torch.randn(rows, classes).to(dtype), torch.arange(rows) % classes, torch.arange(rows)
    teachers = {name: torch.randn(rows, classes).to(dtype) for name in MANY}
    store = CachedTargets(rows, classes, dtype=torch.float64)
    store.write(index, torch.randn(rows, classes).softmax(-1))
    mask = torch.arange(rows) % 3 != 1 if masked else torch.ones(rows, dtype=torch.bool)
    stack = LossStack(
        {
            "p": ProgressiveKD(store, alpha=0.3, temperature=temperature),
            **{name: DeterministicKD(temperature=t) for name, t in MANY.items()},
        },
        weights={"p": 0.5, "kd 4": 0.7},
        inputs={name: {"teacher_logits": name} for name in MANY},
    )

    def ours(x):
        given = {"student_logits": x, "target": y, "index": index, **teachers}
        return stack(**given, mask=mask)[0] if masked else stack(**given)[0]

    def expected(x):
        x, previous = x[mask], store.read(index)[0].double()[mask]
        total = 0.5 * published(x, previous, y[mask], 0.3, temperature)
        for name, t in MANY.items():
            total = total + stack.weights[name] * usual(x, teachers[name].double()[mask], t)
        return total

    wanted = with_gradient(expected, s.double())
    found = with_gradient(ours, s)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]  # rows are read in float32
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        found[1].double(), wanted[1], rtol=tolerance, atol=tolerance * float(wanted[1].abs().max())
    )


def test_results_may_be_changed_in_place():
    s, t = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    stack = LossStack({"a": DeterministicKD(temperature=1.0), "b": DeterministicKD()})
    total, values = stack(student_logits=s, teacher_logits=t)
    expected = torch.autograd.grad(total, s, retain_graph=True)[0] / 4
    values["a"].mul_(2)
    total /= 4
    torch.testing.assert_close(torch.autograd.grad(total, s)[0], expected)
    for logits, other, dim in ((s, t, None), (s.view(2, 2, 5), t.view(2, 2, 5), -1)):
        rows = deterministic_kd(logits, other, reduction="none", class_dim=dim)
        rows *= 2.0
        torch.testing.assert_close(rows, 2 * deterministic_kd(logits, other, reduction="none", class_dim=dim))


def test_a_label_without_a_share_must_be_one_all_the_same():
    s = torch.randn(2, 3)
    with pytest.raises(IndexError, match=r"`target` must be in 0\.\.2"):
        progressive_kd(s, s.softmax(-1), torch.tensor([0, -100]), alpha=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_share_a_row_has_the_precision_of_the_logits(dtype):
    s, previous = torch.randn(4, 3, dtype=dtype), torch.randn(4, 3, dtype=dtype).softmax(-1)
    alpha, known = torch.tensor([0.1, 0.3, 0.7, 0.9], dtype=torch.float64), torch.tensor([True, False, True, True])
    target, log_q = torch.arange(4) % 3, s.log_softmax(-1)
    soft = -(previous * log_q).sum(-1)
    plain = F.cross_entropy(s, target, reduction="none")
    found = progressive_kd(s.clone().requires_grad_(), previous, target, alpha=alpha, reduction="none")
    torch.testing.assert_close(found.detach(), ((1 - alpha) * plain + alpha * soft).to(dtype))
    found = progressive_kd(s, previous, target, alpha=0.3, known=known, reduction="none")
    share = 0.3 * known.to(dtype)
    torch.testing.assert_close(found, (1 - share) * plain + share * soft)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js"])
def test_the_function_hands_all_its_settings_on(divergence):
    s, t, mask = torch.randn(5, 4), torch.randn(5, 4), torch.arange(5) % 2 == 0
    rows = [
        reference.deterministic(divergence, s[i].tolist(), t[i].tolist(), 2.0, beta=0.3)
        for i in mask.nonzero().flatten()
    ]
    t[1] = torch.nan  # where the mask hides it
    given = {"temperature": 2.0, "divergence": divergence, "beta": 0.3, "mask": mask, "reduction": "sum"}
    assert deterministic_kd(s, t, **given, class_dim=1).item() == pytest.approx(sum(rows), rel=1e-4)
    with pytest.raises(ValueError, match="`mask` must have the shape"):
        deterministic_kd(s, t, **{**given, "mask": mask[:4]})


def test_a_label_out_of_range_and_a_mask_that_does_not_fit_are_refused_for_a_learned_alpha_too():
    s, previous, y = torch.randn(3, 4), torch.randn(3, 4).softmax(-1), torch.tensor([0, 4, 1])
    alpha, mask = torch.tensor(0.5, requires_grad=True), torch.tensor([True, False, True])
    with pytest.raises(
        IndexError, match=r"`target` must be in 0..3 \(the number of classes is 4\); got values in 0..4"
    ):
        progressive_kd(s, previous, y, alpha=alpha)
    value = progressive_kd(s, previous, y, alpha=alpha, mask=mask)
    torch.testing.assert_close(value, progressive_kd(s[mask], previous[mask], y[mask], alpha=alpha))
    with pytest.raises(ValueError, match="`mask` must have the shape"):
        progressive_kd(s, previous, alpha=alpha, mask=mask[:2])


@pytest.mark.parametrize("kind", ["kd", "labels", "probabilities", "none"])
@pytest.mark.parametrize("alpha", ["one", "each"])
def test_the_gradient_that_is_differentiated_once_more_is_the_gradient_and_so_is_its_own(way, kind, alpha):
    """Both against the composition of torch's functions."""
    s, t, y = torch.randn(5, 4).double().requires_grad_(), torch.randn(5, 4).double(), torch.arange(5) % 4
    a = torch.rand(5).double() if alpha == "each" else torch.tensor(0.3).double()
    target = {"labels": y, "probabilities": torch.randn(5, 4).double().softmax(-1)}.get(kind)
    row = t.softmax(-1)

    def cross_entropy(p, temperature):
        return -(p * (s / temperature).log_softmax(-1)).sum(-1)

    if kind == "kd":
        ours, theirs = deterministic_kd(s, t, temperature=3.0), usual(s, t, 3.0)
    else:
        ours = progressive_kd(s, row, target, alpha=a, temperature=3.0)
        theirs = a * 9 * cross_entropy(row, 3.0)
        if target is not None:
            theirs = theirs + (1 - a) * cross_entropy(F.one_hot(y, 4) if kind == "labels" else target, 1.0)
        theirs = theirs.mean()
    (slope,) = torch.autograd.grad(ours, s, create_graph=True)
    (expected,) = torch.autograd.grad(theirs, s, create_graph=True)
    torch.testing.assert_close(slope, expected)
    along = torch.randn(5, 4).double()
    (curvature,) = torch.autograd.grad((slope * along).sum(), s)
    torch.testing.assert_close(curvature, torch.autograd.grad((expected * along).sum(), s)[0])


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 3.0])
def test_a_factor_multiplies_the_value_and_the_gradient(factor):
    s, t = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    expected = factor * 4.0 * ((s / 4).softmax(-1) - (t / 4).softmax(-1)).detach() / 5
    torch.testing.assert_close(torch.autograd.grad(factor * deterministic_kd(s, t), s)[0], expected)
    total, values = LossStack({"kd": DeterministicKD()}, weights={"kd": factor})(student_logits=s, teacher_logits=t)
    torch.testing.assert_close(total, factor * reference.kl_rows(s, t, 4.0).mean())
    torch.testing.assert_close(values["kd"], reference.kl_rows(s, t, 4.0).mean().detach())
    torch.testing.assert_close(torch.autograd.grad(total, s)[0], expected)


def test_a_second_derivative_of_sequences_goes_a_position_at_a_time():
    s, t = torch.randn(2, 3, 4).double().requires_grad_(), torch.randn(2, 3, 4).double()

    def loss(x):
        return deterministic_kd(x, t, reduction="none", class_dim=-1)

    assert torch.autograd.gradgradcheck(loss, s)


@pytest.mark.parametrize("hidden", ["known", "mask"])
def test_a_second_derivative_leaves_out_what_has_no_share(hidden):
    s, target = torch.randn(3, 4).double().requires_grad_(), torch.tensor([0, 3, 1])
    shown = torch.tensor([True, False, True])
    previous = torch.randn(3, 4).double().softmax(-1) * shown[:, None]

    def loss(x):
        return progressive_kd(x, previous, target, alpha=0.4, temperature=2.0, reduction="none", **{hidden: shown})

    assert torch.autograd.gradgradcheck(loss, s)


def test_a_label_out_of_range_is_found_in_sequences_too():
    s, previous = torch.randn(2, 9, 3), torch.randn(2, 9, 3).softmax(-1)
    with pytest.raises(IndexError, match=r"`target` must be in 0\.\.2 "):
        progressive_kd(s, previous, torch.full((2, 9), 5), alpha=0.5, class_dim=-1)


@pytest.mark.parametrize("classes", [31, 32, 40])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_labels_have_their_own_temperature_in_blocks_too(classes, temperature, monkeypatch):
    monkeypatch.setattr(_soft_targets, "BLOCK", 2 * classes)  # two rows at a time, and one
    s, previous, target = (
        torch.randn(7, classes, requires_grad=True),
        torch.randn(7, classes).softmax(-1),
        torch.arange(7),
    )
    value = progressive_kd(s, previous, target, alpha=0.3, temperature=temperature)
    soft = -(previous * (s / temperature).log_softmax(-1)).sum(-1).mean()
    expected = 0.7 * F.cross_entropy(s, target) + 0.3 * temperature**2 * soft
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, s)[0], torch.autograd.grad(expected, s)[0])
