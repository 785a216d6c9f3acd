"""KD of linear heads: the same as with the logits made whole, which are never made."""

from __future__ import annotations

import re

import pytest
import reference
import torch
import torch.nn.functional as F

from aikd_losses import linear
from aikd_losses.functional import linear_deterministic_kd

POSITIONS, C = (3, 5), 11
NO_SECOND = (
    "`linear_deterministic_kd` has no second derivative (create_graph=True). Use `deterministic_kd` on the logits."
)
TEACHER = {"teacher_hidden": (*POSITIONS, 6), "teacher_weight": (C, 6), "teacher_bias": (C,)}


@pytest.fixture(params=["whole", "blocks"], autouse=True)
def way(request, monkeypatch):
    """All positions at once, or four at a time (and a rest of three)."""
    if request.param == "blocks":
        monkeypatch.setattr(linear, "LINEAR_BLOCK", 4 * C)


@pytest.fixture
def tensors():
    sizes = {"hidden": (*POSITIONS, 4), "weight": (C, 4), "bias": (C,)}
    student = {f"student_{name}": torch.randn(size).double().requires_grad_() for name, size in sizes.items()}
    sizes = {"hidden": (*POSITIONS, 6), "weight": (C, 6), "bias": (C,)}
    return student | {f"teacher_{name}": torch.randn(size).double() for name, size in sizes.items()}


def usual(x, temperature, mask, reduction):
    s = F.linear(x["student_hidden"], x["student_weight"], x.get("student_bias")).flatten(0, -2)
    t = F.linear(x["teacher_hidden"], x["teacher_weight"], x.get("teacher_bias")).flatten(0, -2)
    rows = F.kl_div((s / temperature).log_softmax(-1), (t / temperature).softmax(-1), reduction="none").sum(-1)
    rows = rows if mask is None else rows[mask.flatten()]
    return temperature**2 * (rows.mean() if reduction == "mean" else rows.sum())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients_are_those_of_the_logits_made_whole(tensors, reduction, masked, bias):
    if not bias:
        del tensors["student_bias"], tensors["teacher_bias"]
    mask = torch.arange(15).view(POSITIONS) % 4 != 1 if masked else None
    own = [x for x in tensors.values() if x.requires_grad]
    expected = usual(tensors, 3.0, mask, reduction)
    value = linear_deterministic_kd(**tensors, temperature=3.0, mask=mask, reduction=reduction)
    torch.testing.assert_close(value, expected)
    slopes = torch.autograd.grad(2.0 * value, own, retain_graph=True)
    again = torch.autograd.grad(2.0 * value, own)  # the first has taken what the forward pass made
    for found in (slopes, again):
        torch.testing.assert_close(found, torch.autograd.grad(2.0 * expected, own, retain_graph=True))


def test_what_is_masked_may_be_nan(tensors):
    mask = torch.ones(POSITIONS, dtype=torch.bool)
    mask[1, 2] = False
    clean = linear_deterministic_kd(**tensors, mask=mask)
    with torch.no_grad():
        tensors["student_hidden"][1, 2] = torch.nan
        tensors["teacher_hidden"][1, 2] = torch.nan
    value = linear_deterministic_kd(**tensors, mask=mask)
    torch.testing.assert_close(value, clean)
    value.backward()
    assert tensors["student_weight"].grad.isfinite().all()
    assert (tensors["student_hidden"].grad[1, 2] == 0).all()
    nothing = linear_deterministic_kd(**tensors, mask=mask & False)
    assert nothing == 0
    assert nothing.requires_grad


def test_half_precision_and_autocast_compute_in_float32(tensors):
    low = {name: x.detach().bfloat16().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        value = linear_deterministic_kd(**low)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), usual(tensors, 4.0, None, "mean"), rtol=0.05, atol=0.05)
    value.backward()
    assert low["student_weight"].grad.dtype == torch.bfloat16


def test_a_second_derivative_is_refused_and_a_transform_gets_the_plain_composition(tensors):
    weight = tensors["student_weight"]
    value = linear_deterministic_kd(**tensors)
    with pytest.raises(RuntimeError, match=f"^{re.escape(NO_SECOND)}$"):
        torch.autograd.grad(value, weight, create_graph=True)
    (slope,) = torch.autograd.grad(linear_deterministic_kd(**tensors), weight)
    found = torch.func.grad(lambda w: linear_deterministic_kd(**{**tensors, "student_weight": w}))(weight.detach())
    torch.testing.assert_close(found, slope)
    given = {"temperature": 3.0, "mask": torch.arange(15).view(POSITIONS) % 4 != 1, "reduction": "sum"}
    _, value = torch.func.grad_and_value(
        lambda w: linear_deterministic_kd(**{**tensors, "student_weight": w}, **given)
    )(weight.detach())
    torch.testing.assert_close(value, usual(tensors, **given).detach())
    torch.testing.assert_close(linear_deterministic_kd(**tensors), usual(tensors, 4.0, None, "mean"))  # the default


def no_matrix(side, weight, hidden):
    wanted = f"(C, D) with at least 2 classes for `{side}_hidden` of shape (*, D)"
    return f"`{side}_weight` must be {wanted}; got {weight} and {hidden}."


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"student_weight": torch.randn(C, 5)}, ValueError, no_matrix("student", (C, 5), (3, 5, 4))),
        ({"student_weight": torch.randn(C, 4, 4)}, ValueError, no_matrix("student", (C, 4, 4), (3, 5, 4))),
        ({"student_weight": torch.randn(1, 4)}, ValueError, no_matrix("student", (1, 4), (3, 5, 4))),
        ({"teacher_hidden": torch.randn(6)}, ValueError, no_matrix("teacher", (C, 6), (6,))),
        ({"student_bias": torch.randn(3)}, ValueError, "`student_bias` must have the shape (11,); got (3,)."),
        (
            {"teacher_weight": torch.randn(9, 6), "teacher_bias": None},
            ValueError,
            "`teacher_weight` must have the classes of the student, (11,); got (9,).",
        ),
        (
            {"teacher_hidden": torch.randn(3, 4, 6)},
            ValueError,
            "`teacher_hidden` must have the positions of the student, (3, 5); got (3, 4).",
        ),
        (
            {"teacher_hidden": torch.ones(3, 5, 6).long()},
            TypeError,
            "`teacher_hidden` must be floating point; got torch.int64.",
        ),
        ({"student_hidden": None}, TypeError, "`student_hidden` must be a torch.Tensor; got NoneType."),
        ({"student_weight": [1.0]}, TypeError, "`student_weight` must be a torch.Tensor; got list."),
        ({"teacher_bias": 0.0}, TypeError, "`teacher_bias` must be a torch.Tensor; got float."),
        (
            {"student_bias": torch.randn(C, device="meta")},
            ValueError,
            "`student_bias` must be on the device of `student_hidden`, cpu; got meta. Move it with `.to('cpu')`.",
        ),
        (
            {name: torch.randn(size, device="meta") for name, size in TEACHER.items()},
            ValueError,
            "`teacher_hidden` must be on the device of `student_hidden`, cpu; got meta. Move it with `.to('cpu')`.",
        ),
        ({"reduction": "none"}, ValueError, "`reduction` must be one of 'mean', 'sum'; got 'none'."),
        ({"temperature": 0.0}, ValueError, "`temperature` must be a finite number above 0; got 0.0."),
        (
            {"mask": torch.ones(3, dtype=torch.bool)},
            ValueError,
            "`mask` must have the shape of `student_logits` without its class axis, (3, 5); got (3,).",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tensors, change, error, sentence):
    with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        linear_deterministic_kd(**{**tensors, **change})


def test_two_classes_are_enough(tensors):
    of_two = {name: x if "hidden" in name else x[:2] for name, x in tensors.items()}
    torch.testing.assert_close(linear_deterministic_kd(**of_two), usual(of_two, 4.0, None, "mean"))


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


@pytest.mark.parametrize("masked", [False, True])
def test_the_mean_of_one_position_is_its_value(masked):
    h, w, other = torch.randn(3, 4).double(), torch.randn(11, 4).double(), torch.randn(11, 4).double()
    mask = torch.tensor([False, True, False]) if masked else None
    h = h if masked else h[1:2]
    value = linear_deterministic_kd(h, w, h, other, temperature=3.0, mask=mask)
    expected = reference.kl_rows(h @ w.T, h @ other.T, 3.0)[1 if masked else 0]
    torch.testing.assert_close(value, expected)


def test_float32_heads_are_float64_ones_but_for_rounding():
    h, w, other = torch.randn(15, 64), torch.randn(11, 64), torch.randn(11, 64)
    value = linear_deterministic_kd(h, w, h, other)
    expected = reference.kl_rows(h.double() @ w.double().T, h.double() @ other.double().T, 4.0).mean()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)


def test_gradients_of_half_precision_heads_are_summed_in_float32(monkeypatch):
    monkeypatch.setattr(linear, "LINEAR_BLOCK", 11)  # a position at a time
    h, w, other = (torch.randn(size).bfloat16() for size in ((512, 4), (11, 4), (11, 4)))
    (found,) = torch.autograd.grad(linear_deterministic_kd(h, w.requires_grad_(), h, other, reduction="sum"), w)
    s, t = (F.linear(h, x) for x in (w.detach(), other))  # as rounded as the logits are
    q, p = (s.double() / 4).softmax(-1), (t.double() / 4).softmax(-1)
    expected = 4 * (q - p).T @ h.double()
    assert (found.double() - expected).abs().max() <= 2**-8 * expected.abs().max()


@pytest.mark.parametrize(
    "types", [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_hidden_states_and_weights_may_have_different_types(types):
    h, w, b = torch.randn(6, 4).to(types[0]), torch.randn(11, 4).to(types[1]), torch.randn(11).to(types[1])
    w, h, b = w.requires_grad_(), h.requires_grad_(), b.requires_grad_()
    t, other = torch.randn(6, 3).to(types[0]), torch.randn(11, 3).to(types[1])
    value = linear_deterministic_kd(h, w, t, other, student_bias=b)
    expected = reference.kl_rows(h.double() @ w.double().T + b.double(), t.double() @ other.double().T, 4.0).mean()
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-4)
    slopes = torch.autograd.grad(value, (h, w, b))
    for found, x, right in zip(slopes, (h, w, b), torch.autograd.grad(expected, (h, w, b)), strict=True):
        assert found.dtype == x.dtype
        torch.testing.assert_close(found, right, rtol=1e-2, atol=1e-4)
