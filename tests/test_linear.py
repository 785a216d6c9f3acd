"""KD of linear heads: the same as with the logits made whole, which are never made. What all losses promise is in `laws.py`."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from laws import batch, divergence
from torch.testing import assert_close

from aikd_losses import linear
from aikd_losses.functional import linear_deterministic_kd

POSITIONS, C = (3, 5), 11


@pytest.fixture(params=["whole", "blocks"], autouse=True)
def way(request, monkeypatch):
    """All positions at once, or four at a time (and a rest of three)."""
    if request.param == "blocks":
        monkeypatch.setattr(linear, "LINEAR_BLOCK", 4 * C)


@pytest.fixture
def tensors():
    return {
        f"{side}_{name}": torch.randn(size).double().requires_grad_(side == "student")
        for side, width in (("student", 4), ("teacher", 6))
        for name, size in (("hidden", (*POSITIONS, width)), ("weight", (C, width)), ("bias", (C,)))
    }


def usual(x, temperature=2.0, mask=None, reduction="mean"):
    """In float64, of the logits made whole."""
    x = {name: y.double() for name, y in x.items()}
    s, t = (
        F.linear(*(x.get(f"{side}_{name}") for name in ("hidden", "weight", "bias"))) for side in ("student", "teacher")
    )
    rows = divergence("forward_kl", batch()._replace(student=s, teacher=t), temperature)
    return getattr(rows if mask is None else rows[mask], reduction)()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("counts", [15, 10, 1, None])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients_are_those_of_the_logits_made_whole(tensors, reduction, counts, bias):
    """Also under a transform, and whatever stands where a mask hides it."""
    if not bias:
        del tensors["student_bias"], tensors["teacher_bias"]
    mask = None if counts is None else torch.arange(15).view(POSITIONS) < counts
    own = {name: x for name, x in tensors.items() if x.requires_grad}
    expected = usual(tensors, 3.0, mask, reduction)
    slopes = torch.autograd.grad(2.0 * expected, list(own.values()))
    given = {"temperature": 3.0, "mask": mask, "reduction": reduction}
    if mask is not None:
        with torch.no_grad():
            for name in ("student_hidden", "teacher_hidden"):
                tensors[name][~mask] = torch.nan
    value = linear_deterministic_kd(**tensors, **given)
    assert_close(value, expected)
    for _ in range(2):  # the first may take what the forward pass made
        assert_close(torch.autograd.grad(2.0 * value, list(own.values()), retain_graph=True), slopes)
    detached = {name: x.detach() for name, x in own.items()}
    found, value = torch.func.grad_and_value(lambda x: linear_deterministic_kd(**{**tensors, **x}, **given))(detached)
    assert_close(value, expected.detach())
    assert_close([2.0 * x for x in found.values()], list(slopes))


@pytest.mark.parametrize(
    "types", [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_hidden_states_and_weights_may_have_different_types(tensors, types):
    given = {n: x.detach().to(types["hidden" not in n]).requires_grad_(x.requires_grad) for n, x in tensors.items()}
    own = [x for x in given.values() if x.requires_grad]
    value, expected = linear_deterministic_kd(**given), usual(given)
    assert_close(value.double(), expected, rtol=1e-4, atol=1e-4)
    for found, x, right in zip(torch.autograd.grad(value, own), own, torch.autograd.grad(expected, own), strict=True):
        assert found.dtype == x.dtype
        assert_close(found, right, rtol=1e-2, atol=1e-4)


def test_half_precision_and_autocast_compute_in_float32(tensors):
    low = {name: x.detach().bfloat16().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        value = linear_deterministic_kd(**low)
    assert value.dtype == torch.float32
    assert_close(value.double(), usual(low), rtol=1e-5, atol=0)
    value.backward()
    assert low["student_weight"].grad.dtype == torch.bfloat16


def test_gradients_of_half_precision_heads_are_summed_in_float32(monkeypatch):
    monkeypatch.setattr(linear, "LINEAR_BLOCK", 11)  # a position at a time
    h, w, other = (torch.randn(size).bfloat16() for size in ((512, 4), (11, 4), (11, 4)))
    (found,) = torch.autograd.grad(linear_deterministic_kd(h, w.requires_grad_(), h, other, reduction="sum"), w)
    exact = dict(student_hidden=h, student_weight=w.detach().double().requires_grad_())
    exact |= dict(teacher_hidden=h, teacher_weight=other)
    (expected,) = torch.autograd.grad(usual(exact, reduction="sum"), exact["student_weight"])
    assert (found.double() - expected).abs().max() <= 2**-8 * expected.abs().max()


@pytest.mark.cpu("its allocations are counted; benchmarks/speed.py counts those of a GPU")
def test_the_logits_never_exist_whole(monkeypatch):
    monkeypatch.setattr(linear, "LINEAR_BLOCK", 2**14)
    h, w = torch.randn(512, 8, requires_grad=True), torch.randn(2000, 8, requires_grad=True)
    other = torch.randn(2000, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        linear_deterministic_kd(h, w, h.detach(), other).backward()
    held = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert most < 0.5 * 512 * 2000 * 4


REFUSED = [
    (
        {"teacher_weight": torch.randn(9, 6), "teacher_bias": None},
        ValueError,
        "`teacher_weight` must have the shape (C, D), C as the student's: (11, 6); got (9, 6).",
    ),
    (
        {"teacher_hidden": torch.randn(3, 4, 6)},
        ValueError,
        "`teacher_hidden` must have the shape (*, D), * as the student's: (3, 5, 6); got (3, 4, 6).",
    ),
    (
        {"student_weight": torch.randn(11, 3)},
        ValueError,
        "`student_weight` must have the shape (C, D), C as the student's: (11, 4); got (11, 3).",
    ),
    ({"student_bias": torch.randn(1)}, ValueError, "`student_bias` must have the shape (C,) = (11,); got (1,)."),
    ({"student_weight": None}, TypeError, "`student_weight` must be a torch.Tensor; got NoneType."),
    (
        {"teacher_weight": None, "teacher_bias": None},
        TypeError,
        "`teacher_weight` must be a torch.Tensor; got NoneType.",
    ),
    ({"teacher_hidden": None}, TypeError, "`teacher_hidden` must be a torch.Tensor; got NoneType."),
    (
        {"teacher_weight": torch.ones(11, 6).int()},
        TypeError,
        "`teacher_weight` must be floating point of 16, 32 or 64 bits; got torch.int32.",
    ),
    (
        {"teacher_hidden": torch.ones(3, 5, 6).long()},
        TypeError,
        "`teacher_hidden` must be floating point of 16, 32 or 64 bits; got torch.int64.",
    ),
    (
        {"student_hidden": torch.ones(3, 5, 4).long()},
        TypeError,
        "`student_hidden` must be floating point of 16, 32 or 64 bits; got torch.int64.",
    ),
    ({"reduction": "none"}, ValueError, "`reduction` must be one of 'mean', 'sum'; got 'none'."),
    ({"temperature": 0.0}, ValueError, "`temperature` must be in the interval [1e-09, 1e+09]; got 0.0."),
    (
        {"mask": torch.ones(3, dtype=torch.bool)},
        ValueError,
        "`mask` must have the shape of `student_logits` without its class axis, (3, 5); got (3,).",
    ),
]


@pytest.mark.parametrize(("change", "error", "sentence"), REFUSED)
def test_what_does_not_fit_is_refused(tensors, change, error, sentence):
    with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        linear_deterministic_kd(**{**tensors, **change})
