"""What every loss promises, each promise an assert with a name, and the kinds of losses that promise it.

`usual` of a kind is what people compose of torch's own functions today, in float64, a value a row of `(ROWS, C)`: it is where
expected values and gradients come from.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from seeds import generator, reseed
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from aikd_losses import (
    AdversarialDistributionLoss,
    AIKDLoss,
    CachedTargets,
    DeterministicKD,
    GradientPenalty,
    LossStack,
    ProgressiveKD,
    ZeroCenteredPenalty,
)
from aikd_losses.functional import deterministic_kd, linear_deterministic_kd, progressive_kd

C, ROWS = 5, 12
DIVERGENCES = ("forward_kl", "reverse_kl", "js")
OBJECTIVES = ("non_saturating", "least_squares", "hinge", "wasserstein", "relativistic")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
LAYOUTS = {  # from (ROWS, C): (class_dim, how)
    "N,C": (None, lambda x: x),
    "N,C,H,W": (1, lambda x: x.view(2, 3, 2, C).permute(0, 3, 1, 2)),
    "B,T,C": (-1, lambda x: x.view(3, 4, C)),
    "every second": (1, lambda x: x.repeat_interleave(2, 1)[:, ::2]),
}


class Batch(NamedTuple):
    student: Tensor
    teacher: Tensor
    target: Tensor
    index: Tensor
    mask: Tensor | None = None

    def of(self, rows: Any) -> Batch:
        return Batch(*(None if x is None else x[rows] for x in self))


def batch(dtype: torch.dtype = torch.float32, layout: str = "N,C", masked: bool = False) -> Batch:
    dim, arrange = LAYOUTS[layout]
    g = generator(1)
    s, t = (arrange(torch.randn(ROWS, C, generator=g, dtype=torch.float64).to(dtype)) for _ in range(2))
    shape = s.select(dim or -1, 0).shape
    target, index = torch.randint(C, shape, generator=g), torch.randperm(ROWS, generator=g).view(shape)
    mask = torch.rand(shape, generator=g) < 0.6
    return Batch(s, t, target, index, mask if masked else None)


def spoiled(x: Batch, dim: int) -> Batch:
    """With what may stand at a masked position: anything."""
    hidden = ~x.mask
    nan, inf = (y.masked_fill(hidden.unsqueeze(dim), bad) for y, bad in ((x.student, math.nan), (x.teacher, math.inf)))
    return Batch(nan, inf, x.target.masked_fill(hidden, -100), x.index.masked_fill(hidden, 999), x.mask)


# ---------------------------------------------------------------------------------------- compositions of torch's own


def divergence(name: str, x: Batch, temperature: float = 3.0, beta: float = 0.3) -> Tensor:
    log_q, log_p = ((y / temperature).log_softmax(-1) for y in (x.student, x.teacher))
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    kl = partial(F.kl_div, reduction="none", log_target=True)  # whose first argument is log q
    if name == "js":
        return temperature**2 * (beta * kl(log_m, log_p) + (1 - beta) * kl(log_m, log_q)).sum(-1)
    return temperature**2 * (kl(log_q, log_p) if name == "forward_kl" else kl(log_p, log_q)).sum(-1)


def blend(s: Tensor, previous: Tensor, known: Tensor, target: Tensor | None, temperature: float, alpha: float = 0.3):
    a = alpha * known.double()
    soft = a * temperature**2 * F.cross_entropy(s / temperature, previous.double(), reduction="none")
    return soft if target is None else (1 - a) * F.cross_entropy(s, target, reduction="none") + soft


def usual_losses(d_t: Tensor, d_s: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """As other code writes them: (discriminator, student)."""
    ones, zeros = torch.ones_like(d_t), torch.zeros_like(d_t)
    bce, mse = (partial(f, reduction="none") for f in (F.binary_cross_entropy_with_logits, F.mse_loss))
    return {
        "non_saturating": (bce(d_t, ones) + bce(d_s, zeros), bce(d_s, ones)),
        "least_squares": (0.5 * mse(d_t, ones) + 0.5 * mse(d_s, zeros), 0.5 * mse(d_s, ones)),
        "hinge": (F.relu(1 - d_t) + F.relu(1 + d_s), -d_s),
        "wasserstein": (d_s - d_t, -d_s),
        "relativistic": (bce(d_t - d_s, ones), bce(d_s - d_t, ones)),
    }


def scores(loss: Any, x: Batch, temperature: float = 1.0) -> dict[str, tuple[Tensor, Tensor]]:
    shown = ((y / temperature).softmax(-1) for y in (x.teacher, x.student))
    return usual_losses(*(loss.discriminator(y).flatten() for y in shown))


def norms(d: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(d(x).sum(), x, create_graph=True)[0].norm(dim=-1)


def penalized(penalty: Any, loss: Any, x: Batch) -> Tensor:
    s, t, d, u = x.student.softmax(-1), x.teacher.softmax(-1), loss.discriminator, torch.rand(ROWS)[:, None]
    if isinstance(penalty, GradientPenalty):
        return scores(loss, x)["hinge"][0] + 10 * (norms(d, u * t + (1 - u) * s) - 1) ** 2
    return scores(loss, x)["hinge"][0] + (0 if penalty is None else 0.5 * (norms(d, s) ** 2 + norms(d, t) ** 2))


# ------------------------------------------------------------------------------------------------- kinds of losses


class Kind(NamedTuple):
    family: str
    build: Callable[..., Any]  # from reduction, class_dim and the like
    call: Callable[[Any, Batch], Tensor]
    usual: Callable[[Any, Batch], Tensor]
    reductions: Sequence[str] = REDUCTIONS


def of_pair(loss: Any, x: Batch) -> Tensor:
    return loss(x.student, x.teacher, mask=x.mask)


def of_tensors(stack: Any, x: Batch) -> Tensor:
    given = dict(student_logits=x.student, teacher_logits=x.teacher, target=x.target, index=x.index, mask=x.mask)
    return stack(**given)[0]


def of_heads(student: Tensor, teacher: Tensor, *, class_dim: int | None = None, **settings: Any) -> Tensor:
    """Heads whose logits are their hidden states."""
    s, t = (x.movedim(class_dim or -1, -1) for x in (student, teacher))
    same = torch.eye(C, dtype=s.dtype, device=s.device)
    return linear_deterministic_kd(s, same, t, same, **settings)


def predicted(x: Batch, dim: int | None = -1) -> Tensor:
    return x.teacher.softmax(dim or -1, dtype=torch.promote_types(x.teacher.dtype, torch.float32))


def deterministic(name: str, build: Callable[..., Any], reductions: Sequence[str] = REDUCTIONS) -> Kind:
    return Kind("deterministic", partial(build, temperature=3.0), of_pair, lambda _, x: divergence(name, x), reductions)


def store(**settings: Any) -> CachedTargets:
    filled = CachedTargets(ROWS, C, **settings)
    filled.write(torch.arange(0, ROWS, 2), torch.randn(ROWS // 2, C).softmax(-1))  # every other row is known
    return filled


def progressive(temperature: float, target: str, **of_store: Any) -> Kind:
    def aimed(x: Batch, dim: int | None = -1) -> Tensor | None:
        return {"labels": x.target, "probabilities": predicted(x, dim), "none": None}[target]

    return Kind(
        "progressive",
        lambda **s: ProgressiveKD(store(**of_store), **{"temperature": temperature, "alpha": 0.3, **s}),
        lambda loss, x: loss(x.student, aimed(x, loss.class_dim), index=x.index, mask=x.mask),
        lambda loss, x: blend(x.student, *loss.targets.read(x.index), aimed(x), temperature),
    )


def of_previous(x: Batch, *, class_dim: int | None = None, **settings: Any) -> Tensor:
    given = dict(known=x.index % 2 == 0, mask=x.mask, class_dim=class_dim, **settings)
    return progressive_kd(x.student, predicted(x, class_dim), x.target, **given)


def adversary(**settings: Any) -> AdversarialDistributionLoss:
    return AdversarialDistributionLoss(nn.Sequential(nn.Linear(C, 8), nn.Tanh(), nn.Linear(8, 1)), **settings)


def adversarial(objective: str) -> Kind:
    build = partial(adversary, objective=objective, temperature=2.0)
    return Kind("adversarial", build, of_pair, lambda loss, x: scores(loss, x, 2.0)[objective][1])


def of_discriminator(penalty: Any) -> Kind:
    build = partial(adversary, objective="hinge", penalty=penalty)
    call = lambda loss, x: loss.discriminator_loss(x.student, x.teacher, mask=x.mask)  # noqa: E731
    return Kind("discriminator", build, call, partial(penalized, penalty))


def stack(**settings: Any) -> LossStack:
    terms = {name: DeterministicKD(temperature=3.0, divergence=name, beta=0.3, **settings) for name in DIVERGENCES[1:]}
    return LossStack(terms, weights={"js": 2.0})


def usual_method(loss: Any, x: Batch) -> Tensor:
    """In epoch 0 of 4, where alpha is 0.8 / 4."""
    soft = blend(x.student, *loss.terms["progressive"].targets.read(x.index), x.target, 1.0, 0.2)
    return 0.5 * soft + 0.5 * divergence("forward_kl", x, 2.0) + scores(loss.terms["adversarial"], x)["wasserstein"][1]


KINDS = {
    **{f"DeterministicKD {d}": deterministic(d, partial(DeterministicKD, divergence=d, beta=0.3)) for d in DIVERGENCES},
    "deterministic_kd": deterministic("js", partial(partial, deterministic_kd, divergence="js", beta=0.3)),
    "linear_deterministic_kd": deterministic("forward_kl", partial(partial, of_heads), ("mean", "sum")),
    "ProgressiveKD": progressive(2.0, "labels"),
    "ProgressiveKD at T=1": progressive(1.0, "labels", top_k=2),
    "ProgressiveKD to probabilities": progressive(1.0, "probabilities"),
    "ProgressiveKD without target": progressive(2.0, "none", dtype=torch.float64),
    "progressive_kd": Kind(
        "progressive",
        partial(partial, of_previous, temperature=2.0, alpha=0.3),
        lambda loss, x: loss(x),
        lambda _, x: blend(x.student, predicted(x), x.index % 2 == 0, x.target, 2.0),
    ),
    **{f"adversarial {o}": adversarial(o) for o in OBJECTIVES},
    "discriminator": of_discriminator(None),
    "discriminator GradientPenalty": of_discriminator(GradientPenalty(10.0)),
    "discriminator ZeroCenteredPenalty": of_discriminator(ZeroCenteredPenalty(1.0)),
    "LossStack": Kind(
        *("stack", stack, of_tensors),
        lambda _, x: divergence("reverse_kl", x) + 2 * divergence("js", x),
        ("mean", "sum"),
    ),
    "AIKDLoss": Kind(
        *("method", lambda **settings: AIKDLoss(ROWS, C, 4, targets=store(), **settings), of_tensors, usual_method),
        ("mean", "sum"),
    ),
}


def made(kind: Kind, wide: bool = False, **settings: Any) -> Any:
    reseed(5)
    loss = kind.build(**settings)
    return loss.double() if wide and isinstance(loss, nn.Module) else loss


def rowwise(kind: Kind, **settings: Any) -> Any:
    """With a value a row, where there is such a form."""
    return made(kind, **({"reduction": "none"} if "none" in kind.reductions else {}), **settings)


def gradient(kind: Kind, loss: Any, x: Batch, of: Callable[..., Tensor] | None = None, above: Any = 1.0):
    """The value, and the gradient of `above` times it for what it is to train."""
    x = x._replace(student=x.student.detach().requires_grad_(kind.family != "discriminator"))
    wanted = [x.student] if x.student.requires_grad else list(loss.discriminator.parameters())
    reseed(6)
    value = (of or kind.call)(loss, x)
    slopes = torch.autograd.grad((above * value).sum(), wanted, allow_unused=True, materialize_grads=True)
    return value.detach(), *slopes


# ------------------------------------------------------------------------------------------------ what they promise


def is_the_usual_composition(kind: Kind, reduction: str, dtype: torch.dtype, layout: str) -> None:
    """In value and gradient, of the positions that count, whatever stands at the others; nothing else changes."""
    dim, settings = LAYOUTS[layout][0], {"reduction": reduction}
    loss, x = made(kind, class_dim=dim, **settings), batch(dtype, layout, True)
    dim, counts, above = dim or -1, x.mask.flatten(), torch.tensor(3.0)
    if reduction == "none":
        above = torch.linspace(-1, 2, ROWS, dtype=torch.float64).view(x.mask.shape)

    def usual(exact: Any, x: Batch) -> Tensor:
        rows = kind.usual(exact, x)
        return rows.where(counts, 0.0).view(above.shape) if above.ndim else getattr(rows[counts], reduction)()

    clean = batch(dtype)._replace(student=batch(dtype).student.double(), teacher=batch(dtype).teacher.double())
    expected = gradient(kind, made(kind, wide=True, class_dim=dim, **settings), clean, usual, above)

    given, state = spoiled(x, dim), loss.state_dict() if isinstance(loss, nn.Module) else {}
    before = copy.deepcopy((*given, *state.values()))
    given.teacher.requires_grad_()
    found = gradient(kind, loss, given, above=above)
    assert_close((*map(Tensor.detach, given), *state.values()), before, rtol=0, atol=0, equal_nan=True)
    reseed(6)
    before_call = torch.get_rng_state()
    kind.call(loss, given)
    assert torch.equal(torch.get_rng_state(), before_call) or kind is KINDS["discriminator GradientPenalty"]
    assert given.teacher.grad is None

    wide = dtype == torch.float64 and kind.family not in ("adversarial", "discriminator")  # which have its precision
    assert found[0].dtype == (torch.float64 if wide else torch.float32)
    assert_close(found[0].double(), expected[0], rtol=1e-5, atol=2e-6)
    if kind.family == "discriminator":
        assert_close([y.double() for y in found[1:]], list(expected[1:]), rtol=1e-4, atol=1e-5)
        return
    own, rounding = found[1].movedim(dim, -1).reshape(ROWS, C), max(1e-5, torch.finfo(dtype).eps)
    assert own.dtype == dtype
    assert (own[~counts] == 0).all()
    assert_close(own.double(), expected[1], rtol=rounding, atol=rounding * float(expected[1].abs().max()))


CASES: list[Any] = []
OF_STUDENT = ("deterministic", "progressive", "adversarial", "stack", "method")
LEFT_OUT_COMPILED = ("DeterministicKD forward_kl", "deterministic_kd", "ProgressiveKD", "LossStack", "AIKDLoss")
LEFT_OUT_COMPILED += tuple(f"adversarial {o}" for o in OBJECTIVES[:-1])  # what is like others, or in `test_contract.py`


def law(*families: str, but: Sequence[str] = ()) -> Callable[[Callable[[Kind], None]], Callable[[Kind], None]]:
    def registered(promise: Callable[[Kind], None]) -> Callable[[Kind], None]:
        for name, kind in KINDS.items():
            if kind.family in families and name not in but:
                CASES.append(pytest.param(promise, kind, id=f"{promise.__name__}-{name}"))
        return promise

    return registered


@law("deterministic")
def equal_sides_are_zero_and_others_are_not(kind: Kind) -> None:
    loss, x = made(kind), batch()
    assert 0 <= kind.call(loss, x._replace(student=x.teacher)) < 1e-12
    assert kind.call(loss, x) > 0.01


@law(*OF_STUDENT, "discriminator")
def a_shift_of_a_row_changes_nothing(kind: Kind) -> None:
    loss, x = made(kind), batch(torch.float64)
    moved = x._replace(student=x.student + torch.arange(ROWS)[:, None], teacher=x.teacher - 5)
    assert_close(gradient(kind, loss, moved), gradient(kind, loss, x), rtol=1e-5, atol=1e-6)


@law(*OF_STUDENT)
def rows_come_in_any_order(kind: Kind) -> None:
    loss, x, order = rowwise(kind), batch(torch.float64), torch.randperm(ROWS)
    value, slope = gradient(kind, loss, x)
    expected = value[order] if value.ndim else value, slope[order]
    assert_close(gradient(kind, loss, x.of(order)), expected, rtol=1e-5, atol=1e-6)


@law("deterministic")
def classes_come_in_any_order(kind: Kind) -> None:
    loss, x, order = made(kind), batch(torch.float64), torch.randperm(C)
    permuted = x._replace(student=x.student[:, order], teacher=x.teacher[:, order])
    assert_close(kind.call(loss, permuted), kind.call(loss, x), rtol=1e-9, atol=0)


@law(*OF_STUDENT, "discriminator")
def nothing_to_count_is_zero_with_a_graph(kind: Kind) -> None:
    x, cases = batch(), ((slice(None), True), (slice(0), True), (slice(0), False))
    for reduction, (rows, masked) in product(kind.reductions, cases):
        given = x.of(rows)._replace(mask=x.index[rows] < 0 if masked else None)
        assert not any(y.any() for y in gradient(kind, made(kind, reduction=reduction), given))


@law("deterministic", "progressive", "adversarial", "stack")
def a_sum_over_micro_batches_is_the_sum_over_the_batch(kind: Kind) -> None:
    loss, x = made(kind, reduction="sum"), batch(torch.float64)
    assert_close(sum(kind.call(loss, x.of(slice(i, i + 5))) for i in range(0, ROWS, 5)), kind.call(loss, x))


@law(*OF_STUDENT, "discriminator")
def autocast_changes_nothing(kind: Kind) -> None:
    loss, x = made(kind), batch()
    autocast = torch.autocast(torch.get_default_device().type, torch.bfloat16)
    assert_close(gradient(kind, loss, x, autocast(kind.call)), gradient(kind, loss, x))


@law(*OF_STUDENT, "discriminator", but=LEFT_OUT_COMPILED)
def it_compiles_whole_and_stays_the_same(kind: Kind) -> None:
    torch.compiler.reset()
    loss, x = made(kind), batch(masked=True)
    compiled = torch.compile(kind.call, fullgraph=True, backend="eager")
    with torch.device(torch.get_default_device()):  # a mode, under which the compiler follows less
        assert_close(gradient(kind, loss, x, compiled), gradient(kind, loss, x))


@law(*OF_STUDENT)
def a_transform_gives_what_a_loop_gives(kind: Kind) -> None:
    loss, x = made(kind), batch(masked=True)
    students, teachers, direction = torch.randn(3, ROWS, C), torch.randn(3, ROWS, C), torch.randn(ROWS, C)

    def value(s: Tensor, t: Tensor) -> Tensor:
        return kind.call(loss, x._replace(student=s, teacher=t))

    each = [gradient(kind, loss, x._replace(student=s, teacher=t)) for s, t in zip(students, teachers, strict=True)]
    expected, slopes = (torch.stack(part) for part in zip(*each, strict=True))
    assert_close(torch.func.vmap(torch.func.grad_and_value(value))(students, teachers), (slopes, expected))
    _, along = torch.func.jvp(lambda s: value(s, teachers[0]), (students[0],), (direction,))
    assert_close(along, (slopes[0] * direction).sum())


@law(*OF_STUDENT)
def batched_gradients_are_those_of_a_loop(kind: Kind) -> None:
    x, loss = batch(masked=True), rowwise(kind)
    value = kind.call(loss, x._replace(student=x.student.requires_grad_()))
    above = torch.randn(3, *value.shape)
    expected = [torch.autograd.grad(value, x.student, one, retain_graph=True)[0] for one in above]
    assert_close(torch.autograd.grad(value, x.student, above, is_grads_batched=True)[0], torch.stack(expected))
    jacobian = partial(torch.autograd.functional.jacobian, lambda s: kind.call(loss, x._replace(student=s)), x.student)
    for strategy in ("reverse-mode", "forward-mode"):
        assert_close(jacobian(vectorize=True, strategy=strategy), jacobian())


@law(*OF_STUDENT)
def samples_may_be_mapped_with_their_labels_and_ids(kind: Kind) -> None:
    x, loss = batch(masked=True), made(kind)
    one = lambda *sample: kind.call(loss, Batch(*(y.unsqueeze(0) for y in sample)))  # noqa: E731
    expected = torch.stack([one(*sample) for sample in zip(*x, strict=True)])
    assert_close(torch.func.vmap(one)(*x), expected)


@law(*OF_STUDENT)
def first_and_second_derivatives_agree_with_finite_differences(kind: Kind) -> None:
    x, loss = batch(torch.float64, masked=True), rowwise(kind, wide=True)
    value = lambda s: kind.call(loss, x._replace(student=s))  # noqa: E731
    assert gradcheck(value, x.student.requires_grad_(), fast_mode=True)
    assert gradgradcheck(value, x.student, fast_mode=True)


@law(*OF_STUDENT)
def forward_and_reverse_mode_come_in_any_order(kind: Kind) -> None:
    """Forward over forward mode, too, and under or around a vmap: the second derivatives of the usual composition."""
    x, loss = batch(torch.float64).of(slice(2)), made(kind, wide=True)
    value, usual = (lambda s, f=f: f(loss, x._replace(student=s)).mean() for f in (kind.call, kind.usual))
    expected = torch.autograd.functional.hessian(usual, x.student)
    forward, reverse = torch.func.jacfwd, torch.func.jacrev
    for outer, inner in product((forward, reverse), repeat=2):
        assert_close(outer(inner(value))(x.student), expected)
    by_rows = torch.func.grad_and_value(value)
    (slope, _), (along, moved) = torch.func.jvp(by_rows, (x.student,), (x.teacher,))
    assert_close(moved, (slope * x.teacher).sum())
    assert_close(along.flatten(), expected.view(2 * C, -1) @ x.teacher.flatten())
    of_two = torch.func.hessian(lambda s: torch.func.vmap(value)(torch.stack([s, s])).sum())
    assert_close(of_two(x.student), 2 * expected)


@law(*OF_STUDENT)
def a_gradient_may_be_taken_twice(kind: Kind) -> None:
    x = batch(masked=True)
    value = kind.call(made(kind), x._replace(student=x.student.requires_grad_()))
    value.backward(retain_graph=True)
    first = x.student.grad.clone()
    value.backward()
    assert_close(x.student.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


@law(*OF_STUDENT)
def a_result_may_be_changed_in_place(kind: Kind) -> None:
    loss, x = rowwise(kind, class_dim=-1), batch(layout="B,T,C")
    expected, slope = gradient(kind, loss, x)
    assert_close(gradient(kind, loss, x, lambda loss, x: kind.call(loss, x).mul_(2)), (2 * expected, 2 * slope))


@law(*OF_STUDENT)
def a_tensor_changed_before_the_backward_pass_is_an_error_or_does_not_matter(kind: Kind) -> None:
    loss, x = made(kind), batch()
    _, slope = gradient(kind, loss, x)
    for name in ("student", "teacher", "target", "index"):
        leaf = x.student.clone().requires_grad_()
        given = Batch(leaf * 1, *(y.clone() for y in x[1:4]))
        value = kind.call(loss, given)
        getattr(given, name).detach().zero_()
        with contextlib.suppress(RuntimeError):
            assert_close(torch.autograd.grad(value, leaf)[0], slope)


@law(*OF_STUDENT)
def a_loss_that_is_kept_keeps_nothing_of_its_step(kind: Kind) -> None:
    """As with torch's own losses, what was saved goes with the backward pass."""
    x = batch(masked=True)
    x = x._replace(student=x.student.requires_grad_() * 1)
    value = kind.call(made(kind), x)
    gone = [weakref.ref(y) for y in x]
    value.backward()
    del x
    gc.collect(1)
    assert [ref() for ref in gone] == [None] * len(gone)
    assert value.grad_fn is not None


@law("deterministic", "progressive", "adversarial", "stack", "method")
def a_teacher_that_ran_in_inference_mode_is_a_teacher(kind: Kind) -> None:
    loss, x = made(kind), batch()
    with torch.inference_mode():
        teacher = x.teacher.clone()
    assert_close(gradient(kind, loss, x._replace(teacher=teacher)), gradient(kind, loss, x), rtol=0, atol=0)


@law("deterministic", "progressive", "adversarial", "discriminator")
def extreme_logits_give_a_finite_value_and_gradient(kind: Kind) -> None:
    extreme = torch.tensor([[1e4, -1e4, 0, 1, -1], [-1e4] * 5, [1e4] * 5, [0] * 5, [-1e4, 1e4, 1e4, 0, 0]])
    for dtype in DTYPES[:3]:
        for temperature in (0.05, 1.0, 1e3):
            x = batch().of(slice(5))._replace(student=extreme.to(dtype), teacher=extreme.flip(1).to(dtype))
            assert all(y.isfinite().all() for y in gradient(kind, made(kind, temperature=temperature), x))


@law(*OF_STUDENT, "discriminator")
def it_reads_nothing_from_its_device(kind: Kind) -> None:
    """The meta device stands in for one: a `.item()`, a branch on a value or a copy to the host raises there."""
    loss, x = made(kind), Batch(*(y.to("meta") for y in batch(masked=True)))
    found = gradient(kind, loss.to("meta") if isinstance(loss, nn.Module) else loss, x)
    assert all(y.is_meta for y in found)


STORED = ("ProgressiveKD", "ProgressiveKD at T=1", "ProgressiveKD to probabilities", "ProgressiveKD without target")


@law("deterministic", "progressive", "adversarial", but=["linear_deterministic_kd", *STORED])
def a_class_excluded_on_both_sides_counts_nothing(kind: Kind) -> None:
    loss, x = made(kind), batch(torch.float64)
    x = x._replace(target=x.target % 4)
    s, t = (y.index_fill(1, torch.tensor([4]), -math.inf) for y in (x.student, x.teacher))
    value, slope = gradient(kind, loss, x._replace(student=s, teacher=t))
    assert value.isfinite()
    assert slope.isfinite().all()
    assert (slope[:, 4] == 0).all()
    if kind.family != "adversarial":
        others = gradient(kind, loss, x._replace(student=x.student[:, :4], teacher=x.teacher[:, :4]))
        assert_close((value, slope[:, :4]), others)
