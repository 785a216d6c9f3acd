"""What is state, who changes it and when, and that nothing of it is lost."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from aikd_losses import (
    AdversarialDistributionLoss,
    AIKDLoss,
    CachedTargets,
    DeterministicKD,
    EMATargets,
    FrozenTeacher,
    GradientPenalty,
    LinearRamp,
    LossStack,
    MLPDiscriminator,
    ProgressiveKD,
)

N, C, BATCH = 16, 4, 8
X, Y = torch.randn(N, 6, generator=torch.Generator().manual_seed(0)), torch.arange(N) % C


def network():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, C))


def pretrained():
    torch.manual_seed(8)
    return FrozenTeacher(nn.Linear(6, C))


def build(num_epochs=6, targets=None):
    torch.manual_seed(9)
    return AIKDLoss(
        N, C, num_epochs, discriminator=MLPDiscriminator(C, hidden=(8,), spectral_norm=spectral_norm), targets=targets
    )


def adversarial(**settings):
    discriminator = MLPDiscriminator(C, hidden=(8,))
    adam = torch.optim.Adam(discriminator.parameters(), lr=0.05)
    return AdversarialDistributionLoss(discriminator, optimizer=adam, **settings)


def train(model, optimizer, criterion, epochs, update="after", teacher=None):
    """`epochs` of a whole loop, each with randomness of its own; `update` says where `criterion.update` stands."""
    teacher = teacher or pretrained()
    gradients = []
    for epoch in epochs:
        torch.manual_seed(100 + epoch)
        for index in torch.randperm(N).split(BATCH):
            s, t = model(X[index]), teacher(X[index])
            given = dict(student_logits=s, teacher_logits=t, index=index)
            loss, _ = criterion(**given, target=Y[index])
            optimizer.zero_grad()
            if update == "before":
                criterion.update(**given)
            loss.backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
            if update == "between":
                criterion.update(**given)
            optimizer.step()
            if update == "after":
                criterion.update(**given)
        criterion.advance_epoch()
    return gradients


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


# ------------------------------------------------------------------------------------------------ hidden from wrappers


def test_store_discriminator_and_teacher_are_found_by_no_wrapper():
    class Everything(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.criterion, self.teacher = network(), build(), pretrained()

    everything = Everything()
    discriminator = everything.criterion.terms["adversarial"].discriminator
    assert len(list(everything.parameters())) == len(list(everything.model.parameters()))
    assert len(list(everything.buffers())) == len(list(everything.model.buffers()))
    assert discriminator not in list(everything.modules())
    assert everything.teacher.model not in list(everything.modules())
    assert list(everything.criterion.parameters()) == list(everything.criterion.buffers()) == []
    assert list(everything.teacher.state_dict()) == []


def test_what_is_saved_are_facts_and_not_what_follows_from_them():
    state = build().state_dict()
    assert {
        "epoch",
        "terms.progressive.epoch",
        "terms.progressive.targets.rows",
        "terms.progressive.targets.known",
        "terms.adversarial.discriminator.layers.0.weight",
        "terms.adversarial.optimizer_state",
    } <= set(state)
    assert state["epoch"].dtype == state["terms.progressive.epoch"].dtype == torch.int64
    assert state["terms.adversarial.optimizer_state"].dtype == torch.uint8
    assert not [name for name in state if "alpha" in name or "weights" in name]
    assert all(isinstance(value, torch.Tensor) for value in state.values())


@pytest.mark.parametrize("cast", ["double", "bfloat16", "half"])
def test_a_cast_reaches_the_discriminator_and_its_optimizer_and_never_store_alpha_or_epoch(cast):
    criterion = build()
    train(network(), sgd(network()), criterion, range(2))
    progressive, loss = criterion.terms["progressive"], criterion.terms["adversarial"]
    rows, alpha = progressive.targets.rows.clone(), progressive.alpha.clone()
    getattr(criterion, cast)()
    dtype = next(loss.discriminator.parameters()).dtype
    assert dtype == getattr(torch, {"double": "float64", "half": "float16"}.get(cast, cast))
    state = list(loss.optimizer.state.values())
    assert len(state) == len(list(loss.discriminator.parameters()))
    assert all(moments["exp_avg"].dtype == dtype for moments in state)
    assert all(p in loss.optimizer.state for p in loss.discriminator.parameters())
    assert same(progressive.targets.rows, rows)
    assert same(progressive.alpha, alpha)
    assert progressive.alpha.dtype == torch.float64
    assert progressive.epoch.dtype == criterion.epoch.dtype == torch.int64
    if cast == "double":
        train(network(), sgd(network()), criterion, range(2, 3))


def test_a_checkpoint_loaded_before_the_move_moves_with_the_discriminator():
    criterion = build()
    train(network(), sgd(network()), criterion, range(1))
    fresh = build()
    fresh.load_state_dict(criterion.state_dict())
    fresh.to("meta")
    loss = fresh.terms["adversarial"]
    assert all(moments["exp_avg"].is_meta for moments in loss.optimizer.state.values())
    assert all(p.is_meta for p in loss.discriminator.parameters())
    assert fresh.terms["progressive"].targets.rows.is_meta
    assert fresh.terms["progressive"].alpha.is_meta
    assert fresh.epoch.is_meta
    held = {id(p) for group in loss.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in loss.discriminator.parameters()} == {id(p) for p in loss.optimizer.state}


def test_train_and_eval_reach_the_discriminator():
    criterion = build()
    discriminator = criterion.terms["adversarial"].discriminator
    criterion.eval()
    assert not discriminator.training
    criterion.train()
    assert discriminator.training


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("targets", [None, lambda: EMATargets(N, C), lambda: CachedTargets(N, C, top_k=2)])
def test_resumed_training_is_uninterrupted_training_bit_for_bit(targets, tmp_path):
    def start():
        model = network()
        return model, sgd(model), build(targets=targets and targets())

    straight = start()
    train(*straight, range(5))

    first = start()
    train(*first, range(2))
    torch.save([part.state_dict() for part in first], tmp_path / "checkpoint.pt")
    second = start()
    for part, state in zip(second, torch.load(tmp_path / "checkpoint.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*second, range(2, 5))

    for a, b in zip(straight, second, strict=True):
        assert same(a.state_dict(), b.state_dict())
    ours, theirs = (c.terms["adversarial"].optimizer.state_dict() for c in (straight[2], second[2]))
    assert same(ours, theirs)
    assert same(straight[2].terms["progressive"].alpha, second[2].terms["progressive"].alpha)


def test_numbers_of_numpy_in_the_optimizer_are_saved_as_pythons():
    rates = np.geomspace(1e-4, 1e-2, 3)
    criterion = AIKDLoss(8, 3, 2, learning_rate=rates[1])
    optimizer = criterion.terms["adversarial"].optimizer
    optimizer.param_groups[0].update(lr=rates[2], betas=(np.float32(0.5), 0.9), weight_decay=np.int64(0))
    fresh = AIKDLoss(8, 3, 2)
    fresh.load_state_dict(criterion.state_dict())
    (group,) = fresh.terms["adversarial"].optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.01, (0.5, 0.9), 0)
    assert [type(x) for x in (group["lr"], *group["betas"], group["weight_decay"])] == [float, float, float, int]


def test_schedules_are_worked_out_anew_so_that_a_longer_run_resumes_right():
    short, long = build(num_epochs=4), build(num_epochs=10)
    train(network(), sgd(network()), short, range(3))
    long.load_state_dict(short.state_dict())
    assert float(long.terms["progressive"].alpha) == pytest.approx(0.8 * 4 / 10)


def test_a_checkpoint_that_does_not_fit_the_discriminator_is_refused_by_the_names_of_its_tensors():
    full = adversarial().state_dict()
    with torch.device("meta"):
        empty = AdversarialDistributionLoss(MLPDiscriminator(C, hidden=(8,)))
    for loss, name in ((empty, "discriminator"), (nn.ModuleDict({"a": empty}), "a.discriminator")):
        state = {name.removesuffix("discriminator") + key: x for key, x in full.items() if "optimizer" not in key}
        with pytest.raises(RuntimeError) as error:
            loss.load_state_dict(state)
        message = "is on the meta device and has no memory to load into. Call `.to_empty(device=...)` first."
        assert f"`{name}.layers.0.weight` {message}" in str(error.value)
    with pytest.raises(
        RuntimeError, match=r"`discriminator.layers.0.weight` in the checkpoint is torch.float32 of shape"
    ):
        AdversarialDistributionLoss(MLPDiscriminator(C, hidden=(9,))).load_state_dict(
            {key: x for key, x in full.items() if "optimizer" not in key}
        )
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "discriminator.label".'):
        adversarial().load_state_dict({**full, "discriminator.label": torch.zeros(1)})
    loss, without = adversarial(), {key: x for key, x in full.items() if key != "discriminator.layers.0.weight"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "discriminator.layers.0.weight".'):
        loss.load_state_dict(without)
    assert loss.load_state_dict(without, strict=False).missing_keys == ["discriminator.layers.0.weight"]
    assert torch.equal(loss.discriminator.layers[2].weight, full["discriminator.layers.2.weight"])
    to_meta = {key: x.to("meta") for key, x in full.items() if "optimizer" not in key}
    assert empty.load_state_dict(to_meta)  # nothing to be lost


def test_an_optimizers_state_that_is_missing_or_does_not_fit_is_refused_by_its_name():
    criterion = nn.ModuleDict({"a": adversarial()})
    state = criterion.state_dict()
    without = {key: x for key, x in state.items() if "optimizer" not in key}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "a.optimizer_state"\.'):
        criterion.load_state_dict(without)
    assert criterion.load_state_dict(without, strict=False).missing_keys == ["a.optimizer_state"]
    narrow = MLPDiscriminator(C, hidden=())
    other = AdversarialDistributionLoss(narrow, optimizer=torch.optim.Adam(narrow.parameters()))
    with pytest.raises(RuntimeError, match=r"`a.optimizer_state` does not fit the discriminator's optimizer: .*group"):
        criterion.load_state_dict({**state, "a.optimizer_state": other.state_dict()["optimizer_state"]})


class Payload:
    """What runs code when it is unpickled."""

    ran = False

    def __reduce__(self):
        return setattr, (Payload, "ran", True)


def test_an_optimizers_state_in_a_checkpoint_runs_no_code():
    loss = adversarial()
    buffer = io.BytesIO()
    torch.save({"state": Payload(), "param_groups": []}, buffer)
    spoilt = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    with pytest.raises((RuntimeError, pickle.UnpicklingError)):
        loss.load_state_dict({**loss.state_dict(), "optimizer_state": spoilt})
    assert not Payload.ran


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("spectral_norm", [False, True])
def test_a_copy_of_a_criterion_is_whole_and_independent(copied, spectral_norm):
    criterion = build(spectral_norm=spectral_norm)
    train(network(), sgd(network()), criterion, range(2))
    before = copy.deepcopy(criterion.state_dict())
    clone = copied(criterion)
    assert same(clone.state_dict(), before)
    model, other = network(), network()
    train(other, sgd(other), clone, range(2, 4))
    assert same(criterion.state_dict(), before)
    train(model, sgd(model), criterion, range(2, 4))
    assert same(clone.state_dict(), criterion.state_dict())
    assert same(model.state_dict(), other.state_dict())


# ------------------------------------------------------------------------------------- update, wherever it stands


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_update_before_or_after_backward_and_step_is_the_same_bit_for_bit(spectral_norm):
    runs = {}
    for where in ("before", "between", "after"):
        model, criterion = network(), build(spectral_norm=spectral_norm)
        gradients = train(model, sgd(model), criterion, range(3), update=where)
        runs[where] = (gradients, model.state_dict(), criterion.state_dict())
    assert same(runs["before"], runs["after"])
    assert same(runs["between"], runs["after"])


@pytest.mark.parametrize("inside", [False, True])
def test_update_inside_autocast_is_the_same_step(inside):
    torch.manual_seed(3)
    loss = AIKDLoss(N, C, 2).terms["adversarial"]
    s, t = torch.randn(2, 8, C)
    twin = copy.deepcopy(loss)
    torch.manual_seed(4)
    loss.update(s, t)
    torch.manual_seed(4)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        twin.update(s, t)
    assert same(dict(loss.discriminator.named_parameters()), dict(twin.discriminator.named_parameters()))


def test_update_under_no_grad_trains_the_discriminator_all_the_same():
    loss = adversarial()
    before = copy.deepcopy(loss.discriminator.state_dict())
    with torch.no_grad():
        loss.update(*torch.randn(2, 8, C))
    assert not same(before, dict(loss.discriminator.state_dict()))


# --------------------------------------------------------------------------------------------- who moves the discriminator


@pytest.mark.parametrize("objective", ["non_saturating", "least_squares", "hinge", "wasserstein", "relativistic"])
def test_the_students_loss_leaves_neither_gradient_nor_buffer_on_the_discriminator(objective):
    discriminator = nn.Sequential(nn.Linear(C, 8), nn.BatchNorm1d(8), MLPDiscriminator(8, spectral_norm=True))
    loss = AdversarialDistributionLoss(discriminator, objective=objective)
    buffers = copy.deepcopy(dict(discriminator.named_buffers()))
    s, t = torch.randn(8, C, requires_grad=True), torch.randn(8, C, requires_grad=True)
    loss(s, t).backward()
    assert all(p.grad is None for p in discriminator.parameters())
    assert all(p.requires_grad for p in discriminator.parameters())
    assert same(buffers, dict(discriminator.named_buffers()))
    assert s.grad.abs().sum() > 0
    assert t.grad is None
    loss.discriminator_loss(s.detach().requires_grad_(), t).backward()
    assert same(buffers, dict(discriminator.named_buffers()))
    assert t.grad is None


def test_a_discriminators_penalty_leaves_its_buffers_as_they_are():
    discriminator = MLPDiscriminator(C, spectral_norm=True)
    loss = AdversarialDistributionLoss(discriminator, penalty=GradientPenalty(10.0))
    buffers = copy.deepcopy(dict(discriminator.named_buffers()))
    loss.discriminator_loss(*torch.randn(2, 8, C))
    assert buffers
    assert same(buffers, dict(discriminator.named_buffers()))


def test_what_a_mask_hides_of_the_teacher_is_not_shown_by_a_paired_objective():
    loss = AdversarialDistributionLoss(MLPDiscriminator(C), objective="relativistic")
    s, t, mask = torch.randn(8, C, requires_grad=True), torch.randn(8, C), torch.arange(8) < 6
    t[7] = torch.nan
    value = loss(s, t, mask=mask)
    torch.testing.assert_close(value, loss(s[:6], t[:6]))
    value.backward()
    assert s.grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_students_gradient_is_that_of_the_loss_times_what_comes_from_above(reduction):
    loss = first_logit(reduction=reduction)  # of which the student minimises minus the first logit
    s = torch.randn(8, C, requires_grad=True)
    (3.0 * loss(s, torch.randn(8, C)).sum()).backward()
    expected = torch.zeros(8, C)
    expected[:, 0] = -3.0 / (8 if reduction == "mean" else 1)
    torch.testing.assert_close(s.grad, expected)


def test_a_second_derivative_of_the_students_loss_is_refused_in_a_sentence():
    s = torch.randn(8, C, requires_grad=True)
    said = (
        "`AdversarialDistributionLoss` has no second derivative for the student (create_graph=True). Take that of the other "
        "terms alone."
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(said)}$"):
        torch.autograd.grad(first_logit()(s, torch.randn(8, C)), s, create_graph=True)


def test_update_moves_parameters_and_buffers_and_leaves_no_gradient():
    discriminator = nn.Sequential(nn.Linear(C, 8), nn.BatchNorm1d(8), MLPDiscriminator(8, spectral_norm=True))
    loss = AdversarialDistributionLoss(discriminator, optimizer=torch.optim.SGD(discriminator.parameters(), lr=0.1))
    before = copy.deepcopy(discriminator.state_dict())
    s = torch.randn(8, C, requires_grad=True)
    value = loss.update(s, torch.randn(8, C))
    after = discriminator.state_dict()
    assert not any(same(before[k], after[k]) for k in ("0.weight", "1.running_mean", "2.layers.0.left"))
    assert all(p.grad is None for p in discriminator.parameters())
    assert s.grad is None
    assert not value.requires_grad


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    ],
    ids=["sgd", "adamw"],
)
def test_a_students_optimizer_that_wrongly_holds_the_discriminator_moves_nothing_of_it(optimizer):
    def run(wrongly):
        model, criterion = network(), build()
        held = list(criterion.terms["adversarial"].discriminator.parameters()) if wrongly else []
        train(model, optimizer([*model.parameters(), *held]), criterion, range(3))
        return model.state_dict(), criterion.state_dict()

    assert same(run(wrongly=True), run(wrongly=False))


def test_rows_with_nan_or_inf_are_not_shown_to_the_discriminator():
    s, t = torch.randn(8, C), torch.randn(8, C)
    clean = adversarial()
    spoilt = copy.deepcopy(clean)
    kept = torch.tensor([0, 1, 3, 4, 6])
    s[2, 0], t[5, 1], s[7] = torch.nan, torch.inf, -torch.inf
    expected = clean.update(s[kept], t[kept])
    torch.testing.assert_close(spoilt.update(s, t), expected)
    for a, b in zip(spoilt.discriminator.parameters(), clean.discriminator.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def first_logit(**settings):
    """A discriminator whose score is the first logit, so that what it is shown decides."""
    discriminator = nn.Linear(C, 1)
    with torch.no_grad():
        discriminator.weight.copy_(torch.eye(C)[:1])
        discriminator.bias.zero_()
    sgd = torch.optim.SGD(discriminator.parameters(), lr=0.5)
    return AdversarialDistributionLoss(
        discriminator, objective="wasserstein", inputs="logits", optimizer=sgd, **settings
    )


def test_the_health_of_the_discriminator_is_that_of_its_last_step():
    loss = first_logit()
    assert loss.diagnostics() == {}
    s, t = torch.randn(4, C), torch.randn(4, C)
    s[:, 0], t[:, 0] = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 2.0, 1.0])  # won: two and a half
    value = loss.update(s, t)
    seen = loss.diagnostics()
    assert sorted(seen) == ["accuracy", "discriminator_loss", "gradient_norm"]
    assert seen["accuracy"].item() == 2.5 / 4
    assert value.item() == seen["discriminator_loss"].item() == 0.0  # 6/4 - 6/4
    torch.testing.assert_close(seen["gradient_norm"], torch.linalg.vector_norm((s - t).mean(0)))
    assert not any(x.requires_grad for x in seen.values())
    loss = first_logit()
    t[0], mask = torch.nan, torch.tensor([True, True, True, False])  # which leave the second and third row
    assert loss.update(s, t, mask=mask).item() == -0.5
    seen = loss.diagnostics()
    assert seen["accuracy"].item() == 1.5 / 2
    torch.testing.assert_close(seen["gradient_norm"], torch.linalg.vector_norm((s - t)[1:3].mean(0)))


def test_the_health_of_a_discriminator_that_has_exploded_is_not_finite():
    loss = first_logit(penalty=lambda score, teacher, student: score(teacher) * torch.inf)
    loss.update(*torch.randn(2, 4, C))
    assert not loss.diagnostics()["gradient_norm"].isfinite()


def test_a_stack_has_the_health_of_its_terms_by_their_names():
    criterion = build()
    train(network(), sgd(network()), criterion, range(1))
    own = criterion.terms["adversarial"].diagnostics()
    assert criterion.diagnostics() == {f"adversarial/{name}": value for name, value in own.items()}
    assert own


def test_a_discriminator_may_be_conditional():
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.label, self.score = nn.Embedding(C, 3), nn.Linear(C + 3, 1)

        def forward(self, x, condition):
            return self.score(torch.cat([x, self.label(condition)], -1))

    discriminator = Conditional()
    loss = AdversarialDistributionLoss(
        discriminator, objective="non_saturating", optimizer=torch.optim.SGD(discriminator.parameters(), lr=0.1)
    )
    s, t, y = torch.randn(8, C), torch.randn(8, C), torch.arange(8) % C
    mask = torch.arange(8) < 6
    masked = y.masked_fill(~mask, -100)  # which no embedding has
    expected = F.softplus(-discriminator(s.softmax(-1), y))[:6].mean()
    torch.testing.assert_close(loss(s, t, mask=mask, condition=masked), expected)
    torch.testing.assert_close(loss.student_loss(s, t, mask=mask, condition=masked), expected)
    each = AdversarialDistributionLoss(discriminator, reduction="none")
    torch.testing.assert_close(each(s, t, condition=y), F.softplus(-discriminator(s.softmax(-1), y)).flatten())
    loss.penalty = lambda score, teacher, student: 3 * score(teacher)
    of_teacher, of_student = discriminator(t.softmax(-1), y)[:6], discriminator(s.softmax(-1), y)[:6]
    expected = (F.softplus(-of_teacher) + F.softplus(of_student) + 3 * of_teacher).mean()
    s[6], t[7] = torch.nan, torch.nan  # where the mask hides it
    torch.testing.assert_close(loss.discriminator_loss(s, t, mask=mask, condition=masked), expected)
    before = discriminator.label.weight.clone()
    torch.testing.assert_close(loss.update(s, t, mask=mask, condition=masked), expected.detach())
    assert not same(before, discriminator.label.weight)


# ------------------------------------------------------------------------------------------------------- epochs, warnings


def progressive(**settings):
    return ProgressiveKD(CachedTargets(N, C), alpha=LinearRamp(0.8, 4), **settings)


def test_a_checkpoint_that_lacks_the_discriminators_optimizer_or_has_none_to_give_it_to():
    def build(**settings):
        discriminator = MLPDiscriminator(C)
        return AdversarialDistributionLoss(discriminator, **{k: v(discriminator) for k, v in settings.items()})

    owner, other = build(optimizer=lambda d: torch.optim.Adam(d.parameters())), build()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "optimizer_state"'):
        owner.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "optimizer_state"'):
        other.load_state_dict(owner.state_dict())
    other.load_state_dict(build().state_dict())
    with pytest.raises(RuntimeError, match=r"optimizer: it is on the meta device and has no values"):
        owner.load_state_dict({name: x.to("meta") for name, x in owner.state_dict().items()})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: AIKDLoss(N + 2, C, 4),
            r"`terms.progressive.targets.rows` in the checkpoint is torch.float16 of shape",
        ),
        (lambda: AIKDLoss(N, C, 4, targets=CachedTargets(N, C, dtype=torch.float32)), r"is torch.float32 of shape"),
        (
            lambda: AIKDLoss(N, C, 4, targets=CachedTargets(N, C, top_k=C)),
            r"targets.classes` is in the checkpoint, and",
        ),
        (
            lambda: AIKDLoss(N, C, 4, discriminator=MLPDiscriminator(C, hidden=(5, 5))),
            r"`terms.adversarial.discriminator.layers.0.weight` in the checkpoint is torch.float32 of shape \(5, ",
        ),
    ],
    ids=["samples", "storage type", "top_k", "discriminator"],
)
def test_of_a_criterions_checkpoint_that_does_not_fit_nothing_is_loaded(other, message):
    criterion, saved = AIKDLoss(N, C, 4), other()
    saved.update(student_logits=torch.randn(4, C), teacher_logits=torch.randn(4, C), index=torch.arange(4))
    saved.advance_epoch()
    model = nn.ModuleDict({"criterion": criterion})
    before = copy.deepcopy(criterion.state_dict())
    for load in (
        lambda: criterion.load_state_dict(saved.state_dict()),
        lambda: model.load_state_dict({f"criterion.{k}": v for k, v in saved.state_dict().items()}, strict=False),
    ):
        with pytest.raises(RuntimeError, match=message.replace("`terms", "`(criterion.)?terms")):
            load()
        assert same(criterion.state_dict(), before)


def test_alpha_follows_the_epoch_and_a_number_says_which():
    loss = progressive()
    seen = [float(loss.alpha)]
    for epoch in (None, 1, None, 2, 3, 3):  # 1 and 3 are there already
        loss.update(torch.randn(1, C), index=torch.tensor([0]))
        loss.advance_epoch(epoch)
        seen.append(float(loss.alpha))
    assert seen == pytest.approx([0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8])
    assert int(loss.epoch) == 3


def test_alpha_out_of_range_in_a_later_epoch_changes_nothing():
    loss = ProgressiveKD(CachedTargets(N, C), alpha=lambda epoch: 0.6 * (epoch + 1))
    loss.update(torch.randn(1, C), index=torch.tensor([0]))
    with pytest.raises(ValueError, match=r"`alpha\(1\)` must be in the interval \[0, 1\]; got 1.2"):
        loss.advance_epoch()
    assert int(loss.epoch) == 0
    assert float(loss.alpha) == pytest.approx(0.6)


def test_an_epoch_without_an_update_is_warned_of():
    loss = progressive()
    said = re.escape(
        "`advance_epoch` was called, but nothing was written since the last time: call `update(student_logits, index=index)` "
        "in every training step."
    )
    with pytest.warns(UserWarning, match=f"^{said}$"):
        loss.advance_epoch()
    loss.update(torch.randn(2, C), index=torch.tensor([1, 2]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss.advance_epoch()
        loss.advance_epoch(2)  # there already
    with pytest.warns(UserWarning, match=f"^{said}$"):
        loss.advance_epoch()


def test_updates_without_an_epoch_are_warned_of_once():
    loss = progressive()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(8):
            loss.update(torch.randn(N, C), index=torch.arange(N))
            assert len(caught) == (step >= 4)  # four epochs of rows may go by
    assert caught[0].category is UserWarning
    assert str(caught[0].message) == (
        "`update` has seen 80 rows of a store of 16 since the last `advance_epoch`. Call `advance_epoch()` after each epoch: "
        "alpha waits for it, and so do other ranks."
    )


@pytest.mark.parametrize("build", [lambda loss: loss, lambda loss: LossStack({"progressive": loss})])
def test_a_warning_names_the_line_of_its_caller(build):
    loss, given = build(progressive()), {"student_logits": torch.randn(N, C), "index": torch.arange(N)}
    for _ in range(4):
        loss.update(**given)
    with pytest.warns(UserWarning, match="since the last `advance_epoch`") as caught:
        loss.update(**given)
    assert [warning.filename for warning in caught] == [__file__]
    loss = build(progressive())
    with pytest.warns(UserWarning, match="nothing was written") as caught:
        loss.advance_epoch()
    assert [warning.filename for warning in caught] == [__file__]


def test_without_ids_and_for_blended_inputs_nothing_is_written():
    loss = progressive()
    loss.update(torch.randn(2, C), index=None)
    loss.update(torch.randn(2, C), index=torch.tensor([0, 1]), partner_index=torch.tensor([1, 0]))
    assert not loss.targets.known.any()


# ------------------------------------------------------------------------------------------------------------- teachers


@pytest.mark.parametrize("copied", [True, False])
def test_a_frozen_teacher_does_not_wake(copied):
    model = network()
    teacher = FrozenTeacher(model, copy=copied)
    whole = nn.ModuleDict({"student": nn.Linear(6, C), "teacher": teacher})
    before = copy.deepcopy(teacher.model.state_dict())
    for wake in (whole.train, lambda: model.train() if not copied else None):
        wake()
        x = torch.randn(8, 6, requires_grad=True)
        assert not teacher(x).requires_grad
        assert not teacher.model.training
    assert same(before, dict(teacher.model.state_dict()))  # batch norm's statistics among it
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert all(p.requires_grad for p in model.parameters()) == copied
    assert len(list(whole.parameters())) == 2
    assert [name for name in whole.state_dict() if name.startswith("teacher")] == []


def test_a_frozen_teacher_is_moved_and_saved_on_request():
    model = network()
    teacher = FrozenTeacher(model, save=True)
    fresh = FrozenTeacher(nn.Sequential(*[copy.deepcopy(layer) for layer in network()]), save=True)
    with torch.no_grad():
        model[0].weight.zero_()
        fresh.model[0].weight.zero_()
    fresh.load_state_dict(teacher.state_dict())
    x = torch.randn(3, 6)
    assert same(fresh(x), teacher(x))
    assert teacher.double()(x.double()).dtype == torch.float64
    assert teacher.to("meta").model[0].weight.is_meta
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict({})


def test_an_ema_of_the_weights_as_a_progressive_teacher():
    """The recipe of the guide: torch's AveragedModel predicts, DeterministicKD matches it."""
    model = network()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True).eval()
    distill, optimizer = DeterministicKD(temperature=1.0), sgd(model)
    by_hand = None
    for step in range(6):
        index = torch.arange(N)[step % 2 :: 2]
        logits = model(X[index])
        with torch.no_grad():
            average_logits = average(X[index])
        loss = 0.5 * F.cross_entropy(logits, Y[index]) + 0.5 * distill(logits, average_logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        weight = model[0].weight.detach().clone()
        by_hand = weight if by_hand is None else 0.5 * by_hand + 0.5 * weight
    torch.testing.assert_close(average.module[0].weight, by_hand)
    assert not average.module[1].training
    assert all(p.grad is None for p in average.parameters())
    fresh = AveragedModel(network(), multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True).eval()
    fresh.load_state_dict(average.state_dict())
    assert same(fresh(X), average(X))


def test_a_frozen_teacher_is_a_copy_unless_told_otherwise_and_takes_keywords():
    class Scaled(nn.Linear):
        def forward(self, x, scale=1.0):
            return scale * super().forward(x)

    model = Scaled(2, 3)
    teacher = FrozenTeacher(model)
    assert teacher.model is not model
    assert all(p.requires_grad for p in model.parameters())
    assert model.training
    x = torch.randn(4, 2)
    torch.testing.assert_close(teacher(x, scale=2.0), 2.0 * teacher(x))
    assert teacher.eval().train().training
