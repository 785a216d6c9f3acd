"""`check_setup`: finds each mistake, finds nothing where there is none, and changes nothing."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from aikd_losses import (
    AdversarialDistributionLoss,
    AIKDLoss,
    CachedTargets,
    DeterministicKD,
    EMATargets,
    FrozenTeacher,
    LinearRamp,
    LossStack,
    MLPDiscriminator,
    ProgressiveKD,
    _setup_state,
    check_setup,
)

N, C = 16, 4


class World:
    """A training run in its second epoch, with nothing wrong."""

    def __init__(self, epochs=1, **settings):
        self.x, self.y, self.index = torch.randn(N, 8), torch.randint(C, (N,)), torch.arange(N)
        self.model, self.pretrained = nn.Linear(8, C), nn.Sequential(nn.Dropout(0.5), nn.Linear(8, C))
        self.teacher = FrozenTeacher(self.pretrained)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.criterion = AIKDLoss(N, C, 4, **settings)
        for _ in range(epochs):
            self.criterion.update(**self.tensors())
            self.criterion.advance_epoch()

    def tensors(self, **changed):
        tensors = dict(student_logits=self.model(self.x), teacher_logits=self.teacher(self.x), target=self.y,
                       index=self.index)  # fmt: skip
        return {**tensors, **changed}

    def report(self, criterion=None, without=(), model=None, teacher=None, optimizer=None, **changed):
        tensors = self.tensors(**changed)
        return check_setup(
            self.criterion if criterion is None else criterion,
            model=model or self.model,
            teacher=teacher or self.teacher,
            optimizer=optimizer or self.optimizer,
            **{name: tensor for name, tensor in tensors.items() if name not in without},
        )


@pytest.fixture
def world():
    return World()


def found(report, severity, where, *texts):
    """Whether there is a finding of this kind, here, that says all of this."""
    return any(
        finding.severity == severity and finding.where == where and all(text in finding.message for text in texts)
        for finding in report.findings
    )


def norm(x):
    return float(torch.linalg.vector_norm(x))


# --------------------------------------------------------------------------------------------------- what it says of health


def test_where_nothing_is_wrong_it_finds_nothing(world):
    report = world.report()
    assert report.findings == ()
    assert report.ok
    assert str(report).endswith("\nNothing wrong was found.")


def test_values_and_gradients_are_those_of_the_closed_forms(world):
    s, t = world.model(world.x).detach().double(), world.teacher(world.x).double()
    q, p = s.softmax(-1), t.softmax(-1)
    first_p = q  # what was remembered, as the model has not moved since; in float16
    alpha = 0.8 * 2 / 4
    kd, progressive = DeterministicKD(temperature=2.0), world.criterion.terms["progressive"]
    stack = LossStack({"kd": kd, "progressive": progressive}, weights={"kd": 0.3})
    stack.epoch.fill_(1)
    report = world.report(stack)
    rows = {row.name: row for row in report.terms}
    truth = one_hot(world.y, C).double()
    plain = norm((q - truth) / N)
    assert rows["cross-entropy alone"].gradient == pytest.approx(plain, rel=1e-5)
    assert rows["cross-entropy alone"].value == pytest.approx(float(-(truth * q.log()).sum(-1).mean()), rel=1e-5)
    p2, q2 = (t / 2).softmax(-1), (s / 2).softmax(-1)
    assert rows["kd"].weight == 0.3
    assert rows["kd"].gradient == pytest.approx(0.3 * norm(2 * (q2 - p2) / N), rel=1e-4)
    assert rows["kd"].ratio == pytest.approx(0.3 * norm(2 * (q2 - p2) / N) / plain, rel=1e-4)
    assert rows["kd"].value == pytest.approx(float(4 * (p2 * (p2 / q2).log()).sum(-1).mean()), rel=1e-4)
    assert rows["progressive"].gradient == pytest.approx(
        norm((q - (1 - alpha) * truth - alpha * first_p) / N), rel=1e-3
    )
    assert p.shape == q.shape


def test_cross_entropy_is_that_of_the_positions_that_count():
    logits = torch.randn(2, 3, C, requires_grad=True)
    target = torch.randint(C, (2, 3))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    kept = logits.detach().double()[mask]
    for labels, reduction, share in (
        (target.masked_fill(~mask, -100), "mean", 3),
        (target, "mean", 3),
        (target, "sum", 1),
        (one_hot(target, C).float(), "mean", 3),
    ):
        kd = DeterministicKD(class_dim=-1, reduction=reduction)
        tensors = dict(student_logits=logits, teacher_logits=torch.randn(2, 3, C), mask=mask)
        row = check_setup(LossStack({"kd": kd, "own": Own(lambda s, target: s.sum())}), **tensors, target=labels).terms[
            -1
        ]
        expected = (kept.softmax(-1) - one_hot(target[mask], C)) / share
        assert row.gradient == pytest.approx(norm(expected), rel=1e-5)
        assert row.value == pytest.approx(
            float(-kept.log_softmax(-1).gather(-1, target[mask][:, None]).sum() / share), rel=1e-5
        )


def test_the_state_of_each_term_is_told(world):
    report = world.report()
    assert report.state["progressive"] == "epoch 1, alpha 0.4, 0 rows written in it, 16 of 16 known"
    assert report.state["adversarial"].startswith("last update: discriminator_loss ")
    assert set(report.state) == {"progressive", "adversarial"}


def test_a_report_is_printed_as_a_table_and_sentences():
    s = torch.tensor([[0.5, 0.0]], requires_grad=True)
    t = torch.tensor([[2.0, 0.0]], requires_grad=True)
    q, p = 1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-2.0))
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    report = check_setup(DeterministicKD(temperature=1.0), student_logits=s, teacher_logits=t, target=torch.tensor([0]))
    rows = [
        ("term", "weight", "value", "gradient", "ratio"),
        ("DeterministicKD", "1", f"{kl:.3g}", f"{math.sqrt(2) * (p - q):.3g}", f"{(p - q) / (1 - q):.3g}"),
        ("cross-entropy alone", "1", f"{-math.log(q):.3g}", f"{math.sqrt(2) * (1 - q):.3g}", "1"),
    ]
    table, text = str(report).split("\n\n")
    assert [
        tuple(line.replace("cross-entropy alone", "cross-entropy_alone").split()) for line in table.splitlines()
    ] == [tuple(cell.replace(" ", "_") for cell in row) for row in rows]
    assert len({len(line) for line in table.splitlines()}) == 1  # columns
    assert text == (
        "NOTE teacher_logits: it carries a graph, which no term uses and which costs memory. Use\n"
        "  `FrozenTeacher` or `no_grad()`."
    )
    assert report.ok  # a note is no fault
    assert repr(report) == str(report)  # for notebooks


def test_the_worst_comes_first(world):
    severities = [
        f.severity for f in world.report(index=world.index // 2, teacher_logits=torch.full((N, C), 0.25)).findings
    ]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)
    assert {"error", "warning"} <= set(severities)


# ------------------------------------------------------------------------------------------------------------- the mistakes


def test_probabilities_for_logits(world):
    probs = world.teacher(world.x).softmax(-1)
    report = world.report(teacher_logits=probs)
    assert found(report, "error", "teacher_logits", "look like probabilities")
    assert not report.ok
    assert found(
        world.report(student_logits=world.model(world.x).softmax(-1)), "error", "student_logits", "probabilities"
    )
    assert not found(world.report(teacher_logits=probs * 2), "error", "teacher_logits")
    below_zero = probs + torch.tensor([2.0, -2.0, 0.0, 0.0])  # each row sums to 1
    assert not found(world.report(teacher_logits=below_zero), "error", "teacher_logits")
    one_row = torch.cat([probs[:1], probs[1:] * 2])
    assert not found(world.report(teacher_logits=one_row), "error", "teacher_logits")


def test_log_probabilities_are_logits_and_only_noted(world):
    report = world.report(teacher_logits=world.teacher(world.x).log_softmax(-1))
    assert [(f.severity, f.where) for f in report.findings] == [("note", "teacher_logits")]
    assert report.ok


def test_probabilities_are_looked_for_along_the_class_axis_and_under_every_name():
    stack = LossStack(
        {"a": DeterministicKD(class_dim=1), "b": DeterministicKD(class_dim=1)},
        inputs={"b": {"teacher_logits": "other_logits"}},
    )
    tensors = dict(student_logits=torch.randn(2, C, 3, requires_grad=True), teacher_logits=torch.randn(2, C, 3))
    report = check_setup(stack, **tensors, other_logits=torch.randn(2, C, 3).softmax(1))
    assert [f.where for f in report.findings] == ["other_logits"]
    assert check_setup(stack, **tensors, other_logits=torch.randn(2, C, 3).softmax(2)).findings == ()


def test_logits_that_are_not_finite(world):
    logits = world.model(world.x).detach()
    logits[3, 1], logits[5, 0] = math.nan, math.inf
    report = world.report(student_logits=logits.requires_grad_())
    assert found(report, "error", "student_logits", "NaN or +inf in 2 of 16 rows")
    assert found(report, "error", "deterministic", "not finite")
    one_sided = world.teacher(world.x).masked_fill(torch.eye(C)[0].bool(), -math.inf)
    excluded = world.model(world.x).detach().masked_fill(torch.eye(C)[1].bool(), -math.inf).requires_grad_()
    assert found(
        world.report(student_logits=excluded, teacher_logits=one_sided), "error", "deterministic", "one side only"
    )


def test_masked_rows_are_not_looked_at():
    logits = torch.randn(N, C)
    logits[0] = math.nan
    mask = torch.arange(N) > 0
    report = check_setup(
        DeterministicKD(), student_logits=logits.requires_grad_(), teacher_logits=torch.randn(N, C), mask=mask
    )
    assert report.findings == ()


def test_a_mask_that_leaves_nothing(world):
    assert found(world.report(mask=torch.zeros(N, dtype=torch.bool)), "warning", "mask", "every position")


def test_a_teacher_that_says_what_the_student_says(world):
    report = world.report(teacher_logits=world.model(world.x).detach())
    assert found(report, "warning", "teacher_logits", "equals `student_logits`")
    assert not found(report, "warning", "deterministic")  # said once


def test_a_student_without_a_graph(world):
    assert found(world.report(student_logits=world.model(world.x).detach()), "error", "student_logits", "no graph")


def test_a_soft_target_that_is_no_distribution(world):
    report = world.report(target=torch.randn(N, C))
    assert found(report, "error", "target", "do not sum to 1")
    assert world.report(target=torch.randn(N, C).softmax(-1)).ok


def test_a_target_of_several_labels_is_none_of_classes():
    tensors = dict(student_logits=torch.randn(N, C, requires_grad=True), target=torch.ones(N, C))
    report = check_setup(nn.BCEWithLogitsLoss(), **tensors)
    assert report.findings == ()
    assert len(report.terms) == 1  # there is no cross-entropy to compare with


def test_ids_that_repeat(world):
    assert found(world.report(index=world.index // 2), "warning", "index", "8 of 16 ids")
    masked = world.report(index=world.index // 2, mask=world.index % 2 == 0)
    assert not found(masked, "warning", "index")


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (dict(index=torch.arange(N) + 1), "`index` must be in 0..15"),
        (dict(partner_index=torch.arange(N) - 1), "`partner_index` must be in 0..15"),
        (dict(target=torch.full((N,), C)), "`target` must be in 0..3"),
        (dict(target=torch.full((N,), -100)), "`target` must be in 0..3"),
        (dict(target=torch.zeros(N, C, dtype=torch.int64)), "without its class axis"),
        (dict(target=torch.zeros(N, dtype=torch.int32)), "must be of type int64"),
        (dict(target=None), "needs `target`"),
        (dict(mask=torch.ones(N, C, dtype=torch.bool)), "without its class axis"),
        (dict(mask=torch.ones(N)), "must be of type bool"),
        (dict(student_logits=torch.randn(C, N)), "must have the 4 classes of the target store"),
        (dict(student_logits=torch.randn(N, C, 2)), "`class_dim` is required"),
        (dict(student_logits=torch.zeros(N, C, dtype=torch.int64)), "must be floating point"),
        (dict(index=[1, 2]), "must be a torch.Tensor; got list"),
    ],
)
def test_what_a_term_refuses_is_a_finding(world, changed, text):
    report = world.report(**changed)
    assert found(report, "error", "progressive", "its call fails: ", text)
    assert report.terms[0].row() == ("progressive", "0.833", "-", "-", "-")


def test_labels_that_a_torch_loss_ignores_are_in_range():
    ce = nn.CrossEntropyLoss(ignore_index=-1)
    logits = torch.randn(N, C, requires_grad=True)
    assert check_setup(ce, student_logits=logits, target=torch.randint(-1, C, (N,))).findings == ()
    assert found(
        check_setup(ce, student_logits=logits, target=torch.full((N,), C)), "error", "CrossEntropyLoss", "in 0..3"
    )
    empty = check_setup(nn.CrossEntropyLoss(reduction="sum"), student_logits=logits[:0], target=torch.zeros(0).long())
    assert empty.terms[0].value == 0
    assert empty.terms[0].ratio is None


def test_a_tensor_that_is_missing_is_told_once_a_term(world):
    report = world.report(without=["teacher_logits"])
    assert [(f.severity, f.where) for f in report.findings] == [("error", "deterministic"), ("error", "adversarial")]


def test_a_tensor_that_nobody_uses(world):
    assert found(world.report(label=world.y), "error", "label", "no term uses it; the terms use condition, index")


def test_terms_that_disagree_about_the_class_axis():
    kd = DeterministicKD(class_dim=-1)
    tensors = dict(student_logits=torch.randn(2, C, C, requires_grad=True), teacher_logits=torch.randn(2, C, C))
    report = check_setup(LossStack({"ce": nn.CrossEntropyLoss(), "kd": kd}), **tensors, target=torch.randint(C, (2, C)))
    assert found(report, "error", "criterion", "(ce: 1, kd: 2)")
    same = LossStack({"a": DeterministicKD(class_dim=2), "kd": kd, "own": Own(lambda s: s.sum())})
    assert check_setup(same, **tensors).findings == ()


@pytest.mark.parametrize(
    "attributes", [{"class_dim": (2, 3)}, {"class_dim": "channels"}, {"reduction": ["mean"]}, {"reduction": None}]
)
def test_a_module_of_ones_own_may_call_anything_class_dim_or_reduction(attributes):
    own = Own(lambda s: s.square().mean())
    vars(own).update(attributes)
    stack = LossStack({"kd": DeterministicKD(), "own": own})
    s, t = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    assert check_setup(stack, student_logits=s, teacher_logits=t).ok


def test_terms_that_reduce_differently():
    stack = LossStack({"a": DeterministicKD(reduction="sum"), "b": DeterministicKD()})
    report = check_setup(stack, student_logits=torch.randn(N, C, requires_grad=True), teacher_logits=torch.randn(N, C))
    assert [(f.severity, f.where) for f in report.findings] == [("warning", "criterion")]
    assert "(a: sum, b: mean)" in report.findings[0].message


class Own(nn.Module):
    """A term from a function of some tensors."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, student_logits, target=None):
        return self.function(student_logits) if target is None else self.function(student_logits, target)


class Hidden(nn.Module):
    """A term that looks at something else than the logits, with a parameter and running statistics."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, hidden):
        return self.norm(hidden).square().mean()


@pytest.mark.parametrize(
    ("term", "weight", "severity", "text"),
    [
        (DeterministicKD(reduction="sum"), 10.0, "warning", "times cross-entropy's: it drowns the labels"),
        (
            DeterministicKD(),
            1e-6,
            "warning",
            "times cross-entropy's: it does next to nothing. Look again an epoch later",
        ),
        (DeterministicKD(), 0.0, "note", "its weight is 0 in this epoch"),
        (Own(lambda s: s.detach().mean()), 1.0, "warning", "no gradient reaches `student_logits`"),
        (
            Own(lambda s: torch.zeros(3, requires_grad=True).sum()),
            1.0,
            "warning",
            "no gradient reaches `student_logits`",
        ),
        (Own(lambda s: 1.0), 1.0, "error", "its call fails: a term must give a tensor; got float"),
        (Own(lambda s: s.sum(-1)), 1.0, "error", "its call fails: a term of a stack must give a scalar"),
        (Own(lambda s: {}["key"]), 1.0, "error", "its call fails: 'key'"),
    ],
)
def test_a_term_that_is_too_large_too_small_or_broken(world, term, weight, severity, text):
    stack = LossStack({"ce": nn.CrossEntropyLoss(), "term": term}, weights={"term": weight})
    given = ["index"] if isinstance(term, DeterministicKD) else ["index", "teacher_logits", "target"]
    tensors = {name: x for name, x in world.tensors().items() if name not in given}
    if isinstance(term, Own):
        stack = LossStack({"term": term})
    report = check_setup(stack, **tensors)
    assert found(report, severity, "term", text)


def test_an_adversarial_term_that_does_nothing_is_to_be_looked_at_once_it_has_learned(world):
    world.criterion._weights[2] = 1e-6
    assert found(world.report(), "warning", "adversarial", "Look again once the discriminator has learned")


def test_a_term_on_other_tensors_has_a_value_and_no_gradient():
    stack = LossStack({"hidden": Hidden()})
    report = check_setup(stack, hidden=torch.randn(5, 3))
    assert report.terms[0].row()[:2] == ("hidden", "1")
    assert report.terms[0].value == pytest.approx(1, abs=1e-3)
    assert report.terms[0].gradient is None
    assert report.findings == ()


# ---------------------------------------------------------------------------------------------------------------- the state


def test_update_that_was_never_called_is_a_warning_at_first_and_an_error_later():
    world = World(epochs=0)
    report = world.report()
    for name in ("progressive", "adversarial"):
        assert found(report, "warning", name, "`update` was not called", "Before the first step that is so")
    with pytest.warns(UserWarning, match="nothing was written"):
        world.criterion.advance_epoch()
    report = world.report()
    for name in ("progressive", "adversarial"):
        assert found(report, "error", name, "`update` was not called")
        assert not found(report, "error", name, "Before the first step")


def test_update_of_the_discriminator_alone_forgotten():
    world = World(epochs=0)
    world.criterion.terms["progressive"].update(world.model(world.x), index=world.index)
    assert found(world.report(), "error", "adversarial", "never trained")


def test_a_resumed_discriminator_was_trained(world):
    resumed = AIKDLoss(N, C, 4)
    resumed.load_state_dict(world.criterion.state_dict())
    assert world.report(resumed).ok
    assert world.report(resumed).state["adversarial"] == "no update yet"


def test_advance_epoch_that_was_never_called():
    world = World(epochs=0)
    for _ in range(2):
        world.criterion.update(**world.tensors())
    assert found(world.report(), "warning", "progressive", "has seen 32 rows of a store of 16", "advance_epoch()")


def test_advance_epoch_of_a_term_alone():
    world = World(epochs=0)
    world.criterion.update(**world.tensors())
    progressive = world.criterion.terms["progressive"]
    progressive.advance_epoch()
    assert found(world.report(), "warning", "progressive", "in epoch 1, the stack in epoch 0")
    assert world.report(progressive, without=["teacher_logits"]).ok  # by itself it is its own master


def test_rows_that_are_never_seen():
    world = World(epochs=0)
    world.criterion.update(**world.tensors(index=world.index % 8))  # places in the batch for ids
    world.criterion.advance_epoch()
    assert found(world.report(), "warning", "progressive", "8 of 16 rows are known in epoch 1")


def test_a_term_of_its_own_without_history_is_only_noted():
    loss = ProgressiveKD(EMATargets(N, C), alpha=LinearRamp(1.0, 1))
    report = check_setup(loss, student_logits=torch.randn(N, C, requires_grad=True), index=torch.arange(N))
    assert found(report, "note", "ProgressiveKD", "no sample of this batch has a history yet")
    assert [f.severity for f in report.findings] == ["warning", "note"]


def test_without_ids_nothing_is_looked_up(world):
    assert world.report(index=None).ok


def test_a_store_of_ones_own_is_left_alone():
    class Rows:
        def read(self, index):
            return torch.full((len(index), C), 1 / C), torch.ones(len(index), dtype=torch.bool)

        def write(self, index, probs):
            raise AssertionError("nothing is written")

        def advance_epoch(self): ...

    tensors = dict(student_logits=torch.randn(N, C, requires_grad=True), target=torch.randint(C, (N,)))
    report = check_setup(ProgressiveKD(Rows()), **tensors, index=torch.arange(N) + 100)
    assert report.findings == ()
    assert report.state == {"ProgressiveKD": "epoch 0, alpha 0.5, 0 rows written in it"}


def test_a_store_that_was_left_on_another_device():
    loss = ProgressiveKD(CachedTargets(N, C))
    elsewhere = torch.empty(N, C, device="meta")
    messages = [f.message for f in _setup_state._of_history("term", loss, elsewhere)]
    assert any("its store is on cpu, the logits are on meta" in message for message in messages)
    pinned = ProgressiveKD(CachedTargets(N, C, device="cpu"))
    assert not any("its store is on" in f.message for f in _setup_state._of_history("term", pinned, elsewhere))


def test_update_that_would_be_refused(world):
    world.criterion.eval()
    for name in ("progressive", "adversarial"):
        assert found(
            world.report(), "warning", name, "its `update` would fail: `update` must not be called in eval mode"
        )
    loss = AdversarialDistributionLoss(MLPDiscriminator(C))
    report = world.report(loss, without=["target", "index"])
    assert found(
        report, "warning", "AdversarialDistributionLoss", "its `update` would fail: `update` needs an `optimizer`"
    )


@pytest.mark.parametrize(
    ("bias", "text"), [(50.0, "tells the two sides apart in 100.0%"), (-50.0, "is right in 0.0% of the rows")]
)
def test_a_discriminator_that_is_always_right_or_always_wrong(world, bias, text):
    discriminator = nn.Linear(C, 1)
    nn.init.zeros_(discriminator.weight)
    discriminator.weight.data[0, 0] = bias
    loss = AdversarialDistributionLoss(
        discriminator, inputs="logits", optimizer=torch.optim.SGD(discriminator.parameters(), lr=0.0)
    )
    tensors = dict(student_logits=torch.randn(N, C, requires_grad=True), teacher_logits=torch.randn(N, C) + 9)
    assert check_setup(loss, **tensors).findings[0].message.startswith("its discriminator was never trained")
    loss.update(**tensors)
    assert found(check_setup(loss, **tensors), "warning", "AdversarialDistributionLoss", text)


def test_a_discriminator_that_has_exploded(world):
    world.criterion.terms["adversarial"].discriminator.layers[0].weight.data.fill_(math.nan)
    world.criterion.update(**world.tensors())
    assert found(world.report(), "error", "adversarial", "its discriminator's gradient is not finite")


# -------------------------------------------------------------------------------------------------------------- the modules


def test_a_teacher_in_train_mode(world):
    assert found(world.report(teacher=world.pretrained), "error", "teacher", "in train mode (3 of its modules)")
    assert world.report(teacher=world.pretrained.eval()).ok
    world.teacher.train()
    assert world.report().ok  # it sleeps on
    world.teacher.model[0].train()
    assert found(world.report(), "error", "teacher", "in train mode (1 of its modules)")


def test_a_teacher_that_is_the_student(world):
    report = world.report(
        teacher=FrozenTeacher(world.model, copy=False), optimizer=torch.optim.SGD(world.model.parameters())
    )
    assert found(report, "error", "teacher", "shares 2 parameters with `model`")


def test_a_model_in_eval_mode(world):
    world.model.eval()
    assert found(world.report(), "warning", "model", "in eval mode, the criterion in train mode")
    world.criterion.eval()
    assert not found(world.report(), "warning", "model")


def test_an_optimizer_that_holds_too_much(world):
    own = world.criterion.terms["adversarial"]
    everything = [*world.model.parameters(), *own.discriminator.parameters(), *world.pretrained.parameters()]
    report = world.report(optimizer=torch.optim.SGD(everything), teacher=world.pretrained.eval())
    assert found(report, "error", "optimizer", "holds 6 parameters of the discriminator of 'adversarial'")
    assert found(report, "error", "optimizer", "holds 2 parameters of the teacher")
    report = world.report(optimizer=own.optimizer)
    assert found(report, "error", "optimizer", "it is the discriminator's of 'adversarial'")
    assert not found(report, "error", "optimizer", "parameters of the discriminator")


def test_an_optimizer_that_lacks_the_model(world):
    half = torch.optim.SGD([world.model.weight])
    assert found(
        world.report(optimizer=half), "warning", "optimizer", "lacks 1 of the 2 trainable parameters of `model`"
    )
    other = torch.optim.SGD(nn.Linear(8, C).parameters())
    assert found(world.report(optimizer=other), "error", "optimizer", "lacks 2 of the 2")
    world.model.bias.requires_grad_(False)
    assert world.report(optimizer=half).ok


def test_an_optimizer_that_lacks_or_holds_the_parameters_of_terms():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.Parameter(torch.full((N, C), 1 / C))

        def read(self, index):
            return self.rows[index].detach(), torch.ones(len(index), dtype=torch.bool)

        def write(self, index, probs): ...
        def advance_epoch(self): ...

    stack = LossStack({"own": Hidden(), "progressive": ProgressiveKD(Rows())})
    tensors = dict(
        student_logits=torch.randn(N, C, requires_grad=True), target=torch.randint(C, (N,)), index=torch.arange(N)
    )
    tensors["hidden"] = torch.randn(5, 3)
    report = check_setup(stack, optimizer=torch.optim.SGD([torch.zeros(1)]), **tensors)
    assert [(f.severity, f.where) for f in report.findings] == [("warning", "own")]
    assert "the optimizer lacks 2 of its 2 parameters" in report.findings[0].message
    report = check_setup(stack, optimizer=torch.optim.SGD(stack.parameters()), **tensors)
    assert [(f.severity, f.where) for f in report.findings] == [("error", "optimizer")]
    assert "holds 1 parameters of the store of 'progressive'" in report.findings[0].message


# ------------------------------------------------------------------------------------------------------ that it only looks


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_nothing_changes(world, context):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(C)

        def forward(self, student_logits):
            return nn.functional.dropout(self.norm(student_logits)).square().mean()

    noisy = Noisy()
    stack = LossStack({**world.criterion.terms, "noisy": noisy})
    stack.update(**world.tensors())
    tensors = world.tensors()

    def facts():
        modules = (stack, world.model, world.teacher.model)
        return copy.deepcopy([
            *(module.state_dict() for module in modules),
            [p.grad for module in (*modules, stack.terms["adversarial"].discriminator) for p in module.parameters()],
            stack.diagnostics(),
            stack.terms["progressive"]._rows_seen,
            torch.get_rng_state(),
            tensors["student_logits"].grad,
            [module.training for module in (stack, noisy, world.model, world.teacher)],
            dict(world.optimizer.state),
        ])  # fmt: skip

    tensors["student_logits"].retain_grad()
    before = facts()
    with context():
        report = check_setup(stack, model=world.model, teacher=world.teacher, optimizer=world.optimizer, **tensors)
    assert all(row.gradient is not None for row in report.terms)
    torch.testing.assert_close(facts(), before, rtol=0, atol=0)
    total, _ = stack(**tensors)
    total.backward()  # the step goes on


def test_a_compiled_criterion_is_looked_at_as_it_is(world):
    compiled = torch.compile(world.criterion, backend="eager")
    assert str(world.report(compiled)) == str(world.report())


def test_a_single_term_may_give_a_value_a_position():
    tensors = dict(student_logits=torch.randn(N, C, requires_grad=True), teacher_logits=torch.randn(N, C))
    one, each = (check_setup(DeterministicKD(reduction=r), **tensors).terms[0] for r in ("mean", "none"))
    assert one.value == pytest.approx(each.value)
    assert one.gradient == pytest.approx(each.gradient)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (dict(criterion=[1]), TypeError, "Term 'list' must be an nn.Module (an instance)"),
        (dict(model=torch.sum), TypeError, "`model` must be a torch Module; got"),
        (dict(teacher=torch.sum), TypeError, "`teacher` must be a torch Module; got"),
        (dict(optimizer=torch.optim.SGD), TypeError, "`optimizer` must be a torch Optimizer; got"),
        (dict(student_logits=torch.empty(2, 3, device="meta")), ValueError, "`student_logits` must have values"),
        (dict(criterion=AIKDLoss(3, 3, 3).to("meta")), ValueError, "`criterion` must have values"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(arguments, kind, message):
    with pytest.raises(kind) as refusal, warnings.catch_warnings():
        check_setup(**{"criterion": DeterministicKD(), **arguments})
    assert str(refusal.value).startswith(message)
