"""`check_setup`: finds each mistake, finds nothing where there is none, and changes nothing."""

from __future__ import annotations

import contextlib
import copy
import math
import re
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
    FrozenTeacher,
    LossStack,
    MLPDiscriminator,
    ProgressiveKD,
    check_setup,
)
from aikd_losses.setup_check import RULES

N, C = 16, 4


class World:
    """A training run in its second epoch, with nothing wrong."""

    def __init__(self, epochs=1):
        self.x, self.y, self.index = torch.randn(N, 8), torch.randint(C, (N,)), torch.arange(N)
        self.model, self.pretrained = nn.Linear(8, C), nn.Sequential(nn.Dropout(0.5), nn.Linear(8, C))
        self.teacher = FrozenTeacher(self.pretrained)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.criterion = AIKDLoss(N, C, 4)
        for _ in range(epochs):
            self.criterion.update(**self.tensors())
            self.criterion.advance_epoch()

    @property
    def s(self):
        return self.model(self.x)

    @property
    def t(self):
        return self.teacher(self.x)

    def tensors(self, **changed):
        return dict(student_logits=self.s, teacher_logits=self.t, target=self.y, index=self.index) | changed

    def report(self, criterion=None, model=None, teacher=None, optimizer=None, without=(), **changed):
        return check_setup(
            self.criterion if criterion is None else criterion,
            model=model or self.model,
            teacher=teacher or self.teacher,
            optimizer=optimizer or self.optimizer,
            **{name: x for name, x in self.tensors(**changed).items() if name not in without},
        )

    def stack(self, term, weight=1.0):
        """Of cross-entropy and a term, without anything else."""
        return LossStack({"ce": nn.CrossEntropyLoss(), "term": term}, weights={"term": weight})

    def of_term(self, term, weight=1.0):
        return check_setup(self.stack(term, weight), student_logits=self.s, teacher_logits=self.t, target=self.y)


class Own(nn.Module):
    """A term from a function of the logits, which calls other things `class_dim` and `reduction`."""

    class_dim, reduction = (2, 3), ["mean"]

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, student_logits, teacher_logits=None):
        return self.function(student_logits)


class Hidden(nn.Module):
    """A term that looks at something else than the logits, with parameters and running statistics."""

    def __init__(self, width=3):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, hidden):
        return nn.functional.dropout(self.norm(hidden)).square().mean()


@pytest.fixture
def world():
    return World()


def norm(x):
    return float(torch.linalg.vector_norm(x))


def changed_row(x, row, value):
    x = x.detach().clone()
    x[row] = value
    return x.requires_grad_()


def trained_by(world, bias):
    """Criterion whose discriminator, once it has made a step, scores teachers above students by about `bias` each."""
    discriminator = nn.Linear(C, 1)
    nn.init.zeros_(discriminator.weight).data[0, 0] = bias
    loss = AdversarialDistributionLoss(
        discriminator, inputs="logits", optimizer=torch.optim.SGD(discriminator.parameters(), lr=0.0)
    )
    tensors = dict(student_logits=world.s, teacher_logits=world.t + torch.tensor([99.0, 0.0, 0.0, 0.0]))
    loss.update(**tensors)
    return check_setup(loss, **tensors)


def half_precision(world, **settings):
    discriminator = MLPDiscriminator(C, hidden=()).half()
    adam = torch.optim.Adam(discriminator.parameters(), **settings)
    loss = AdversarialDistributionLoss(discriminator, optimizer=adam)
    with contextlib.suppress(RuntimeError):  # where `eps` is lost
        loss.update(student_logits=world.s, teacher_logits=world.t)
    return check_setup(loss, student_logits=world.s, teacher_logits=world.t)


def exploded(world):
    world.criterion.terms["adversarial"].discriminator.layers[0].weight.data.fill_(math.nan)
    world.criterion.update(**world.tensors())
    return world.report()


def resumed(world):
    criterion = AIKDLoss(N, C, 4)
    criterion.load_state_dict(world.criterion.state_dict())
    return world.report(criterion)


def after(epochs=0, updates=1, advanced=False, **changed):
    """The report on a run that did not go as it should."""
    world = World(epochs)
    for _ in range(updates):
        world.criterion.update(**world.tensors(**changed))
    if advanced:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing was written
            world.criterion.advance_epoch()
    return world.report()


def holding(world, *modules):
    return world.report(optimizer=torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.1))


def over(steepness):
    """Logits of a teacher that is sure of the labels, the more so the steeper."""
    return lambda w: w.report(teacher_logits=steepness * one_hot(w.y, C).float())


PADDED = torch.arange(N) < 4
# How to come by a finding, and what is printed of it; dots stand for more words.
FINDINGS = [
    (lambda w: w.report(without=["teacher_logits"]), "ERROR deterministic: its call fails: Term 'deterministic' needs..."),
    (lambda w: w.of_term(Own(lambda s: {}["key"])), "ERROR term: its call fails: 'key'"),
    (lambda w: w.of_term(Own(lambda s: next(iter(())))), "ERROR term: its call fails: StopIteration"),
    (lambda w: w.report(teacher_logits=w.t, student_logits=changed_row(w.s, (slice(None), 1), -math.inf)),
     "ERROR deterministic: its value or its gradient is not finite. Look for NaN and inf in the logits, and for a class..."),
    (lambda w: w.of_term(Own(lambda s: s.square().mean().detach())), "WARNING term: no gradient reaches `student_logits`..."),
    (lambda w: w.of_term(Own(lambda s: torch.ones(3, requires_grad=True).sum())), "WARNING term: no gradient reaches..."),
    (lambda w: w.of_term(Own(lambda s: 1e3 * s.logsumexp(-1).sum())), "WARNING term: its gradient is ... it drowns the..."),
    (lambda w: w.report(LossStack({"kd": DeterministicKD(reduction="sum"), "ce": nn.CrossEntropyLoss()}, weights={"kd": 20.0})),
     "WARNING kd: its gradient is ... Lower its weight, or look for reduction='sum'."),
    (lambda w: w.of_term(DeterministicKD(), 1e-6), "WARNING term: its gradient is ... it does next to nothing. Look again..."),
    (lambda w: after(updates=0), "WARNING progressive: nothing is remembered yet. Call `update` in every training step."),
    (lambda w: after(updates=0, advanced=True), "WARNING progressive: nothing is remembered yet..."),
    (lambda w: after(index=torch.arange(N) % 8, advanced=True),
     "WARNING progressive: 8 of 16 rows are known in epoch 1. Is `num_samples` the size of the training set, and..."),
    (lambda w: after(updates=2), "WARNING progressive: `update` saw 32 rows of 16: call `advance_epoch()`."),
    (lambda w: after(updates=0), "WARNING adversarial: its discriminator is untrained. Call `update` in every step."),
    (lambda w: trained_by(w, 50.0), "WARNING Adv... right in 100.0% of the rows. Lower its learning rate, or give..."),
    (lambda w: trained_by(w, -50.0), "WARNING Adv... right in 0.0% of the rows. A higher score must mean the teacher..."),
    (exploded, "ERROR adversarial: its discriminator's gradient is not finite. Start again with a lower learning rate."),
    (half_precision, "ERROR AdversarialDistributionLoss: `eps` is 0 in the type of its weights. Keep them in float32."),
    (lambda w: w.report(student_logits=changed_row(changed_row(w.s, (3, 1), math.nan), (5, 0), math.inf)),
     "ERROR student_logits: NaN or +inf in 2 of 16 rows, which..."),
    (lambda w: w.report(teacher_logits=w.t.softmax(-1)), "ERROR teacher_logits: it looks like probabilities. Pass logits..."),
    (lambda w: w.report(student_logits=w.s.softmax(-1)), "ERROR student_logits: it looks like probabilities. Pass logits..."),
    (lambda w: w.report(student_logits=w.s.detach()), "ERROR student_logits: it has no graph. Leave out `no_grad()` and..."),
    (lambda w: w.report(teacher_logits=w.s.detach()), "WARNING teacher_logits: it equals `student_logits`: there is..."),
    (lambda w: w.report(teacher_logits=w.pretrained(w.x)), "NOTE teacher_logits: it has a graph, which costs memory. Use..."),
    (over(8.0), "NOTE teacher_logits: it repeats the labels. Train it for fewer epochs."),
    (lambda w: w.report(target=torch.randn(N, C)), "ERROR target: its rows do not sum to 1. Pass a softmax, or labels."),
    (lambda w: w.report(mask=PADDED & ~PADDED), "WARNING mask: it leaves out every position. True = counts."),
    (lambda w: w.report(mask=PADDED, target=w.y.masked_fill(PADDED, -100)),
     "WARNING mask: 4 of the 4 positions that count have target -100, no class. Is it inverted, or missing? Pass..."),
    (lambda w: w.report(w.stack(DeterministicKD()), target=w.y.masked_fill(PADDED, -100)),
     "WARNING mask: 4 of the 16 positions that count have target -100..."),
    (lambda w: w.report(index=w.index // 2), "WARNING index: 8 ids repeat others: the last is remembered. Each position..."),
    (lambda w: w.report(teacher=w.pretrained), "ERROR teacher: 3 of its modules are in train mode. Use `FrozenTeacher`..."),
    (lambda w: w.teacher.model[0].train() and w.report(), "ERROR teacher: 1 of its modules are in train mode..."),
    (lambda w: w.report(teacher=FrozenTeacher(w.model, copy=False)), "ERROR teacher: it shares 2 parameters with the..."),
    (lambda w: holding(w, w.model, w.teacher.model), "ERROR teacher: it shares 2 parameters with the student. Use..."),
    (lambda w: holding(w, w.model, w.criterion.terms["adversarial"].discriminator),
     "ERROR optimizer: it holds 6 parameters of a discriminator. Leave them out."),
    (lambda w: w.report(optimizer=torch.optim.SGD([w.model.weight], lr=0.1)),
     "WARNING optimizer: it lacks 1 trainable parameters of the model or the terms."),
    (lambda w: w.report(LossStack({"own": Hidden()}), hidden=torch.randn(5, 3), without=w.tensors()),
     "WARNING optimizer: it lacks 2 trainable parameters..."),
]  # fmt: skip


@pytest.mark.parametrize(("cause", "text"), FINDINGS)
def test_a_mistake_is_found(world, cause, text):
    wanted = re.escape(text).replace(r"\.\.\.", ".*")
    found = [f"{severity.upper()} {where}: {message}" for severity, where, message in cause(world).findings]
    assert any(re.fullmatch(wanted, sentence) for sentence in found), found


def test_every_rule_is_among_them():
    found = [(f.severity, f.message) for cause, _ in FINDINGS for f in cause(World()).findings]
    for (severity, _, _), sentence in RULES.items():
        parts = [re.escape(part) for part in re.split(r"{.*?}", " ".join(sentence.split()))]
        assert any(f[0] == severity and re.fullmatch(".*".join(parts), f[1]) for f in found), sentence


# What is no mistake -> a report without any finding.
GOOD = {
    "all": lambda w: w.report(),
    "validation": lambda w: w.report(index=None),
    "soft targets": lambda w: w.report(target=torch.randn(N, C).softmax(-1)),
    "labels that a torch loss ignores": lambda w: w.report(
        nn.CrossEntropyLoss(), target=w.y.masked_fill(PADDED, -100), without=["teacher_logits", "index"]
    ),
    "several labels": lambda w: w.report(nn.BCEWithLogitsLoss(), target=torch.ones(N, C), without=["teacher_logits", "index"]),
    "a mask the right way round": lambda w: w.report(
        mask=~PADDED, target=w.y.masked_fill(PADDED, -100), index=w.index.masked_fill(PADDED, 5)
    ),
    "NaN where nothing counts": lambda w: w.report(mask=~PADDED, student_logits=changed_row(w.s, 0, math.nan)),
    "log-probabilities": lambda w: w.report(teacher_logits=w.t.log_softmax(-1)),
    "rows that do not sum to 1": lambda w: w.report(teacher_logits=2 * w.t.softmax(-1)),
    "rows with negative scores": lambda w: w.report(teacher_logits=w.t - w.t.mean(-1, keepdim=True) + 1 / C),
    "one row of probabilities": lambda w: w.report(teacher_logits=changed_row(w.t, 0, 1 / C).detach()),
    "a teacher that is nearly sure": over(5.0),  # a probability of 1 / (1 + 3 exp(-5)), which is 0.98
    "a weight of 0": lambda w: w.of_term(DeterministicKD(), weight=0.0),
    "a discriminator that is trained elsewhere": lambda w: check_setup(
        LossStack({"kd": DeterministicKD(), "adversarial": w.criterion.terms["adversarial"]}),
        student_logits=w.s, teacher_logits=w.t,
    ),
    "a term added to a criterion that has the target": lambda w: w.report(
        w.criterion.terms["progressive"], without=["target", "teacher_logits"]
    ),
    "a discriminator that was trained before it was saved": resumed,
    "an eps that half precision holds": lambda w: half_precision(w, eps=1e-4),
    "an eps of a fused step, which is in float32": lambda w: half_precision(w, fused=True),
    "a frozen part": lambda w: w.model.bias.requires_grad_(False) is not None
    and w.report(optimizer=torch.optim.SGD([w.model.weight], lr=0.1)),
    "a teacher that is asleep": lambda w: w.report(teacher=w.pretrained.eval()),
    "a teacher that cannot be woken": lambda w: w.teacher.train() and w.report(),
    "a term of one's own": lambda w: w.of_term(Own(lambda s: s.square().mean())),
    "classes of a teacher": lambda w: check_setup(
        w.stack(Own(lambda s: s.square().mean())), student_logits=w.s, teacher_logits=w.y, target=w.y
    ),
    "evaluation": lambda w: w.model.eval() and w.report(LossStack({"kd": DeterministicKD()}).eval()),
    "other tensors": lambda w: check_setup(LossStack({"hidden": Hidden()}), hidden=torch.randn(5, 3)),
    "classes at -100": lambda w: w.report(student_logits=changed_row(w.s, 0, torch.tensor([-100.0, 0.0, 1.0, 2.0]))),
    "scores for a target": lambda w: w.report(nn.MSELoss(), target=-1e3 + 0 * w.t, without=["teacher_logits", "index"]),
    "no batch": lambda w: check_setup(DeterministicKD(), student_logits=w.s[:0], teacher_logits=w.t[:0], target=w.y[:0]),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_where_nothing_is_wrong_nothing_is_found(world, name):
    report = GOOD[name](world)
    assert report.findings == ()
    assert report.ok
    assert str(report).endswith("\nNothing wrong was found.")


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (dict(index=torch.arange(N) + 1), "`index` must be in 0..15"),
        (dict(target=torch.full((N,), C)), "`target` must be in 0..3"),
        (dict(mask=torch.ones(N)), "must be of type bool"),
        (dict(student_logits=torch.randn(N, C, 2)), "`class_dim` is required"),
        (dict(index=[1, 2]), "must be a torch.Tensor; got list"),
        (dict(target=torch.zeros(N, C).to_sparse()), "must be a dense tensor"),
    ],
)
def test_what_a_term_refuses_is_a_finding(world, changed, text):
    report = world.report(**changed)
    refusals = [f.message for f in report.findings if (f.severity, f.where) == ("error", "progressive")]
    assert len(refusals) == 1
    assert refusals[0].startswith("its call fails: ")
    assert text in refusals[0]
    assert report.terms[0] == ("progressive", 0.5, None, None, None)


def test_a_tensor_that_is_missing_is_told_once_a_term(world):
    report = world.report(without=["teacher_logits"])
    assert [(f.severity, f.where) for f in report.findings] == [("error", "deterministic"), ("error", "adversarial")]


def test_probabilities_are_looked_for_along_the_class_axis_and_under_every_name():
    stack = LossStack(
        {"a": DeterministicKD(class_dim=1), "b": DeterministicKD(class_dim=1)},
        inputs={"b": {"teacher_logits": "other_logits"}},
    )
    tensors = dict(student_logits=torch.randn(2, C, 3, requires_grad=True), teacher_logits=torch.randn(2, C, 3))
    report = check_setup(stack, **tensors, other_logits=torch.randn(2, C, 3).softmax(1))
    assert [f.where for f in report.findings] == ["other_logits"]
    assert check_setup(stack, **tensors, other_logits=torch.randn(2, C, 3).softmax(2)).findings == ()


def test_a_store_of_ones_own_is_left_alone(world):
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.Parameter(torch.full((N, C), 1 / C))  # which `update` writes and no optimizer

        def read(self, index):
            return self.rows[index - 100].detach(), torch.ones(len(index), dtype=torch.bool)

        def write(self, index, probs):
            raise AssertionError("nothing is written")

        def advance_epoch(self): ...

    assert world.report(ProgressiveKD(Rows()), index=torch.arange(N) + 100, without=["teacher_logits"]).findings == ()


# ---------------------------------------------------------------------------------------------------------------- the table


def test_values_and_gradients_are_those_of_the_closed_forms(world):
    s, t = world.s.detach().double(), world.t.double()
    q, truth = s.softmax(-1), one_hot(world.y, C).double()
    alpha = 0.8 * 2 / 4
    terms = {"kd": DeterministicKD(temperature=2.0), "progressive": world.criterion.terms["progressive"]}
    rows = {row.name: row for row in world.report(LossStack(terms, weights={"kd": 0.3})).terms}
    plain, p2, q2 = norm((q - truth) / N), (t / 2).softmax(-1), (s / 2).softmax(-1)
    kd = 0.3 * norm(2 * (q2 - p2) / N)
    value = float(4 * (p2 * (p2 / q2).log()).sum(-1).mean())
    # The model has not moved since q was remembered, in float16.
    blended = norm((q - (1 - alpha) * truth - alpha * q) / N)
    assert rows["kd"] == ("kd", 0.3, *(pytest.approx(x, rel=1e-4) for x in (value, kd, kd / plain)))
    assert rows["progressive"].gradient == pytest.approx(blended, rel=1e-3)
    entropy = float(-(truth * q.log()).sum(-1).mean())
    assert rows["cross-entropy alone"][1:] == (1.0, *(pytest.approx(x, rel=1e-5) for x in (entropy, plain, 1.0)))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["ignored", "hidden", "soft"])
def test_cross_entropy_is_that_of_the_positions_that_count(reduction, kind):
    logits, target = torch.randn(2, 3, C, requires_grad=True), torch.randint(C, (2, 3))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    given = {"ignored": target.masked_fill(~mask, -100), "hidden": target, "soft": one_hot(target, C).float()}[kind]
    kd = DeterministicKD(class_dim=-1, reduction=reduction)
    report = check_setup(kd, student_logits=logits, teacher_logits=torch.randn(2, 3, C), mask=mask, target=given)
    kept, share = logits.detach().double()[mask], 3 if reduction == "mean" else 1
    slope = (kept.softmax(-1) - one_hot(target[mask], C)) / share
    value = -kept.log_softmax(-1).gather(-1, target[mask][:, None]).sum() / share
    assert report.terms[-1][2:] == (pytest.approx(float(value), rel=1e-5), pytest.approx(norm(slope), rel=1e-5), 1.0)


def test_a_value_a_position_counts_as_their_mean(world):
    one, each = (world.report(DeterministicKD(reduction=r), without=["index"]) for r in ("mean", "none"))
    assert one.terms[0] == pytest.approx(each.terms[0])
    assert each.ok


def test_several_labels_have_no_cross_entropy_to_compare_with(world):
    report = GOOD["several labels"](world)
    assert [row.name for row in report.terms] == ["BCEWithLogitsLoss"]


def test_logits_of_inference_have_no_graph_and_are_looked_at(world):
    with torch.inference_mode():
        s = world.s
    report = world.report(DeterministicKD(), student_logits=s, without=["index"])
    assert [(f.severity, f.where) for f in report.findings] == [("error", "student_logits")]


def test_a_report_is_printed_as_a_table_and_sentences():
    s = torch.tensor([[0.5, 0.0]], requires_grad=True)
    t = torch.tensor([[2.0, 0.0]], requires_grad=True)
    q, p = 1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-2.0))
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    stack = LossStack({"kd": DeterministicKD(temperature=1.0), "progressive": ProgressiveKD(CachedTargets(1, 2))})
    tensors = dict(student_logits=s, teacher_logits=t, target=torch.tensor([0]), index=torch.tensor([0]))
    entropy = [f"{-math.log(q):.3g}", f"{math.sqrt(2) * (1 - q):.3g}", "1"]
    report = check_setup(stack, **tensors)
    table, text = str(report).split("\n\n")
    assert [line.split()[-4:] for line in table.splitlines()] == [
        ["weight", "value", "gradient", "ratio"],
        ["1", f"{kl:.3g}", f"{math.sqrt(2) * (p - q):.3g}", f"{(p - q) / (1 - q):.3g}"],
        ["1", *entropy],
        ["1", *entropy],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1  # columns
    assert text == (
        "WARNING progressive: nothing is remembered yet. Call `update` in every training step.\n"
        "NOTE teacher_logits: it has a graph, which costs memory. Use `FrozenTeacher`."
    )
    assert not report.ok
    assert repr(report) == str(report)  # for notebooks
    stack.update(**tensors)
    assert check_setup(stack, **tensors).ok  # a note is no fault


def test_the_worst_comes_first(world):
    report = world.report(teacher_logits=world.pretrained(world.x), teacher=world.pretrained, index=world.index // 2)
    assert [f.severity for f in report.findings] == ["error", "warning", "note"]


# ------------------------------------------------------------------------------------------------------ that it only looks


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_nothing_changes(world, context):
    stack = LossStack({**world.criterion.terms, "noisy": Hidden(C)}, inputs={"noisy": {"hidden": "student_logits"}})
    stack.update(**world.tensors())
    tensors = world.tensors()
    tensors["student_logits"].retain_grad()

    def facts():
        modules = (stack, world.model, world.teacher.model, stack.terms["adversarial"].discriminator)
        return copy.deepcopy([
            *(module.state_dict() for module in modules),
            [p.grad for module in modules for p in module.parameters()],
            [module.training for module in (*modules, stack.terms["noisy"])],
            stack.diagnostics(),
            stack.terms["progressive"]._rows_seen,
            torch.get_rng_state(),
            tensors["student_logits"].grad,
            dict(world.optimizer.state),
        ])  # fmt: skip

    before = facts()
    with context():
        report = check_setup(stack, model=world.model, teacher=world.teacher, optimizer=world.optimizer, **tensors)
    assert all(row.gradient is not None for row in report.terms)
    torch.testing.assert_close(facts(), before, rtol=0, atol=0)
    total, _ = stack(**tensors)
    total.backward()  # the step goes on


def test_a_compiled_criterion_is_looked_at_as_it_is(world):
    compiled = world.report(torch.compile(world.criterion, backend="eager"))
    assert str(compiled) == str(world.report())


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            dict(criterion=[1]),
            TypeError,
            "Term 'list' must be an instance of nn.Module (wrap a function in one)",
        ),
        (dict(criterion=LossStack({"a": Hidden()}), hidden=0, label=0), TypeError, "No term uses `label`; the terms a"),
        (dict(model=torch.sum), TypeError, "`model`, `teacher`, `optimizer` must be "),
        (dict(teacher=torch.sum), TypeError, "`model`, `teacher`, `optimizer` must be "),
        (dict(optimizer=torch.optim.SGD), TypeError, "`model`, `teacher`, `optimizer` must be "),
        (dict(criterion=AIKDLoss(3, 3, 3).to("meta")), NotImplementedError, "Cannot copy out of meta tensor"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(arguments, kind, message):
    with pytest.raises(kind) as refusal:
        check_setup(**{"criterion": DeterministicKD(), **arguments})
    assert str(refusal.value).startswith(message)


def test_gradients_that_half_precision_cannot_hold_are_measured():
    logits, target = torch.randn(2**17, C).half().requires_grad_(), torch.randint(C, (2**17,))
    report = check_setup(nn.CrossEntropyLoss(), student_logits=logits, target=target)
    assert report.ok, report
    assert report.terms[0].ratio == pytest.approx(1.0, rel=1e-2)


def test_what_the_stack_refuses_is_found():
    stack = LossStack({"ce": nn.CrossEntropyLoss(), "kd": DeterministicKD(class_dim=-1)})
    s = torch.randn(2, C, C, requires_grad=True)
    report = check_setup(stack, student_logits=s, teacher_logits=torch.randn(2, C, C), target=torch.zeros(2, C).long())
    (found,) = report.findings
    assert (found.severity, found.where) == ("error", "ce")
    assert found.message.startswith("its call fails: Term 'ce' takes axis 1 for the classes, term 'kd' axis -1.")
