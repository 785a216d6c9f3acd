"""The fused gradient: the numbers of the plain composition in float64, with less kept, as a whole and in blocks of rows."""

from __future__ import annotations

import math

import pytest
import torch
from laws import ROWS, C, batch, blend, divergence
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from aikd_losses import _fused
from aikd_losses.functional import deterministic_kd, progressive_kd


@pytest.fixture(params=["whole", "blocks"], autouse=True)
def way(request, monkeypatch):
    """All rows at once, or four at a time of 5 classes (and a rest of two)."""
    if request.param == "blocks":
        monkeypatch.setattr(_fused, "BLOCK", 4 * C)


def with_gradient(loss, s):
    s = s.detach().requires_grad_()
    value = loss(s)
    return value.detach(), torch.autograd.grad(value.sum(), s)[0]


def usual(s, t, temperature):
    return divergence("forward_kl", batch()._replace(student=s, teacher=t.double()), temperature)


@pytest.mark.parametrize(
    ("temperature", "scale", "offset", "classes"),
    [
        *[(temperature, scale, 0.0, 10) for temperature in (0.5, 1.0, 4.0, 100.0) for scale in (0.3, 1.0, 3.0)],
        *[(temperature, 1.0, 2.0**12, 400) for temperature in (0.5, 1.0, 4.0)],
        *[(temperature, 1e-3, 0.0, 10) for temperature in (1.0, 20.0)],
    ],
)
def test_float32_is_float64_within_a_millionth(temperature, scale, offset, classes):
    """Also at high temperatures and between near distributions, where the usual one in float32 loses digits; far from zero."""
    s, t = (scale * torch.randn(64, classes) + x for x in (-offset, offset))
    expected, slope = with_gradient(lambda x: usual(x, t, temperature).mean(), s.double())
    value, found = with_gradient(lambda x: deterministic_kd(x, t, temperature=temperature), s)
    assert_close(value.double(), expected, rtol=1e-6, atol=0)
    assert (found - slope).abs().max() <= 1e-5 * slope.abs().max()


def test_of_rows_that_are_asked_for_each_is_right_beside_those_that_matter_more():
    t, gap = torch.randn(60, 10), torch.logspace(-4, 0.5, 60).unsqueeze(-1)
    s = t + gap * torch.randn(60, 10)
    values, expected = deterministic_kd(s, t, reduction="none"), usual(s.double(), t, 2.0)
    assert expected.min() < 1e-6 < 1 < expected.max()
    assert_close(values.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("rows", [1, 8, 11])
def test_blocks_do_not_disturb_each_other(masked, reduction, temperature, rows):
    """A whole number of blocks, a rest, and less than one; rows, shares and labels that are their own."""
    x, known, alpha = batch(torch.float64).of(slice(rows)), torch.arange(rows) % 2 == 0, torch.rand(rows).double()
    soft = x.teacher.softmax(-1)
    previous = 0.97 * soft  # as rounding leaves a row: not quite 1
    counts = torch.arange(rows) % 3 != 1 if masked else torch.ones(rows, dtype=torch.bool)
    given = {"mask": counts if masked else None, "reduction": reduction}

    def reduced(values):
        return values.where(counts, 0.0) if reduction == "none" else getattr(values[counts], reduction)()

    for ours, theirs in (
        (
            lambda s: deterministic_kd(s, x.teacher, temperature=temperature, **given),
            lambda s: usual(s, x.teacher, temperature),
        ),
        (
            lambda s: progressive_kd(s, previous, x.target, alpha=alpha, known=known, temperature=temperature, **given),
            lambda s: blend(s, previous, known, x.target, temperature, alpha),
        ),
        (
            lambda s: progressive_kd(s, previous, soft.flip(0), alpha=0.3, temperature=temperature, **given),
            lambda s: blend(s, previous, known | True, soft.flip(0), temperature),
        ),
    ):
        assert_close(with_gradient(ours, x.student), with_gradient(lambda s, f=theirs: reduced(f(s)), x.student))


@pytest.mark.parametrize("excluded", [(True, True), (True, False), (False, True)])
def test_a_class_at_minus_infinity_in_one_row_is_right_and_spoils_no_other(excluded):
    x = batch(torch.float64)
    where = torch.zeros(ROWS, C, dtype=torch.bool)
    where[1, 2] = True
    s, t = (y.masked_fill(where, -math.inf) if out else y for y, out in zip(x[:2], excluded, strict=True))
    values, slope = with_gradient(lambda s: deterministic_kd(s, t, reduction="none"), s)
    q, p = ([y.item() for y in (side[1] / 2).softmax(-1)] for side in (s, t))
    terms = [0.0 if b == 0 else math.inf if a == 0 else b * math.log(b / a) for a, b in zip(q, p, strict=True)]
    assert float(values[1]) == pytest.approx(4 * sum(terms))
    others = torch.arange(ROWS) != 1
    assert_close(values[others], usual(x.student, x.teacher, 2.0)[others])
    assert_close(slope, 2 * ((s / 2).softmax(-1) - (t / 2).softmax(-1)))


@pytest.mark.parametrize("gap", [85.0, 105.0, 1e4])
def test_classes_that_the_teacher_all_but_excludes_still_count(gap):
    """Its p is 0 in float32, q is not, and there are many."""
    s, t = torch.full((1, 50_000), -20.0), torch.full((1, 50_000), -gap)
    s[0, 0] = t[0, 0] = 0.0
    expected, slope = with_gradient(lambda x: usual(x, t, 1.0).mean(), s.double())
    value, found = with_gradient(lambda x: deterministic_kd(x, t, temperature=1.0), s)
    assert_close(value.double(), expected, rtol=1e-4, atol=0)
    assert_close(found.double()[:, 1:], slope[:, 1:], rtol=1e-4, atol=1e-12)
    assert_close(found.double(), slope, rtol=0, atol=3e-5)  # as near to 1 as log_softmax adds up many small


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gradient_of_half_precision_logits_is_that_of_float32_rounded_once(dtype):
    s, t = torch.randn(64, 200).to(dtype), torch.randn(64, 200).to(dtype)
    expected, slope = with_gradient(lambda x: usual(x, t, 2.0).mean(), s.double())
    value, found = with_gradient(lambda x: deterministic_kd(x, t), s)
    assert (value.dtype, found.dtype) == (torch.float32, dtype)
    assert_close(value.double(), expected, rtol=1e-5, atol=0)
    # Half a unit in the last place: of numbers below the type's smallest normal one, of that.
    unit = torch.finfo(dtype).eps * slope.abs().clamp_min(torch.finfo(dtype).smallest_normal)
    assert ((found.double() - slope).abs() <= 0.52 * unit + 1e-6 * slope.abs().max()).all()


def held(loss):
    """Bytes that are in use after the forward pass and were not before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        value = loss()
    del value
    return sum(event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]")


@pytest.mark.cpu("its allocations are counted; tests/test_cuda.py counts those of a GPU")
def test_one_tensor_of_the_size_of_the_logits_is_kept_and_none_where_no_gradient_is_wanted():
    """What the usual composition keeps is measured the same way."""
    s, t = torch.randn(100, 50, requires_grad=True), torch.randn(100, 50)
    copy = s.numel() * 4
    assert held(lambda: deterministic_kd(s, t)) <= copy + 1000
    assert held(lambda: deterministic_kd(s.detach(), t)) <= 1000
    with torch.no_grad():
        assert held(lambda: deterministic_kd(s, t)) <= 1000
    assert held(lambda: usual(s, t, 4.0).mean()) >= 2 * copy


def test_a_tensor_changed_in_place_before_the_backward_pass_is_an_error():
    s, t = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    value = deterministic_kd(s * 1.0, t)
    t.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
