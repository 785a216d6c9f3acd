"""Terms together: LossStack and AIKDLoss, sample ids, schedules."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, random_split

from aikd_losses import (
    AIKDLoss,
    CachedTargets,
    DeterministicKD,
    EMATargets,
    IndexedDataset,
    LinearRamp,
    LossStack,
    ProgressiveKD,
    ZeroCenteredPenalty,
)

N, C = 6, 3


@pytest.fixture
def given():
    return {
        "student_logits": torch.randn(N, C),
        "teacher_logits": torch.randn(N, C),
        "target": torch.arange(N) % C,
        "index": torch.arange(N),
    }


def test_alpha_may_be_a_function_of_the_epoch(given):
    criterion = AIKDLoss(N, C, 4, alpha=lambda epoch: 0.1 * epoch)
    for expected in (0.0, 0.1, 0.2):
        assert float(criterion.terms["progressive"].alpha) == pytest.approx(expected)
        criterion.update(**given)
        criterion.advance_epoch()


class Feature(nn.Module):
    """A user's own term, with a name of its own for a tensor and an optional one."""

    def __init__(self):
        super().__init__()
        self.updates, self.epochs = [], []

    def forward(self, student_feature, scale=2.0):
        return (student_feature * scale).sum()

    def update(self, student_feature):
        self.updates.append(student_feature)

    def advance_epoch(self, epoch=None):
        self.epochs.append(epoch)


def test_the_total_is_the_weighted_sum_and_terms_are_unweighted_and_detached(given):
    given["student_logits"].requires_grad_()
    stack = LossStack({"ce": nn.CrossEntropyLoss(), "kd": DeterministicKD()}, weights={"kd": 0.25})
    total, values = stack(**given)
    ce = nn.functional.cross_entropy(given["student_logits"], given["target"])
    kd = DeterministicKD()(given["student_logits"], given["teacher_logits"])
    torch.testing.assert_close(values, {"ce": ce.detach(), "kd": kd.detach()})
    torch.testing.assert_close(total, ce + 0.25 * kd)
    assert total.requires_grad
    assert not any(value.requires_grad for value in values.values())


def test_weights_follow_the_epoch_and_come_back_with_a_checkpoint(given):
    def build():
        return LossStack(
            {"kd": DeterministicKD(), "feature": Feature()}, weights={"kd": LinearRamp(1.0, 4), "feature": 0.0}
        )

    stack = build()
    given["student_feature"] = torch.ones(2)
    totals = []
    for epoch in (None, None, 2, 3):  # the third says where it is
        total, values = stack(**given)
        totals.append(float(total / values["kd"]))
        stack.advance_epoch(epoch)
    assert totals == pytest.approx([0.25, 0.5, 0.75, 0.75])
    fresh = build()
    fresh.load_state_dict(stack.state_dict())
    total, values = fresh(**given)
    assert float(total / values["kd"]) == pytest.approx(1.0)
    assert stack.terms["feature"].epochs == [None, None, 2, 3]


def test_float64_stays_float64_and_weights_are_exact(given):
    given["student_logits"], given["teacher_logits"] = (
        given["student_logits"].double(),
        given["teacher_logits"].double(),
    )
    stack = LossStack({"kd": DeterministicKD()}, weights={"kd": 0.1})
    total, values = stack(**given)
    assert total.dtype == torch.float64
    assert float(total) == 0.1 * float(values["kd"])


def test_inputs_rename_and_withhold_in_forward_and_update(given):
    stack = LossStack(
        {
            "a": DeterministicKD(temperature=1.0),
            "b": DeterministicKD(temperature=1.0),
            "progressive": ProgressiveKD(CachedTargets(N, C, dtype=torch.float32), alpha=1.0),
        },
        inputs={
            "b": {"teacher_logits": "other_logits", "mask": None},
            "progressive": {"student_logits": "other_logits", "target": None},
        },
    )
    other, mask = torch.randn(N, C), torch.arange(N) < 2
    stack.update(**given, other_logits=other, mask=mask)
    assert stack.terms["progressive"].targets.known.tolist() == mask.tolist()
    _, values = stack(**given, other_logits=other, mask=mask)
    kd = DeterministicKD(temperature=1.0)
    s, t = given["student_logits"], given["teacher_logits"]
    torch.testing.assert_close(values["a"], kd(s[:2], t[:2]))
    torch.testing.assert_close(values["b"], kd(s, other))
    entropy = torch.distributions.Categorical(logits=other[:2]).entropy().mean()
    torch.testing.assert_close(values["progressive"], entropy)


def test_terms_that_are_worked_out_together_and_others_are_what_they_are_alone(given):
    store = CachedTargets(N, C, dtype=torch.float32)
    store.write(torch.arange(N), torch.randn(N, C).softmax(-1))
    terms = {
        "js": DeterministicKD(divergence="js"),
        "kd": DeterministicKD(temperature=2.0),
        "reverse": DeterministicKD(divergence="reverse_kl"),
        "wide": DeterministicKD(temperature=3.0),
        "progressive": ProgressiveKD(store, alpha=0.7),
        "masked": DeterministicKD(temperature=1.0),
        "other": DeterministicKD(temperature=1.0),
    }
    renamed = {
        **{name: {"mask": None} for name in ("js", "kd", "reverse", "progressive", "other")},
        "wide": {"mask": None, "teacher_logits": "wide_logits"},
        "other": {"mask": None, "student_logits": "other_logits"},
    }
    weights = {name: 0.5 + i for i, name in enumerate(terms)}
    s, t, y, index = given.values()
    mask, partner = torch.arange(N) < 4, torch.arange(N).flip(0)
    extra = {"wide_logits": torch.randn(N, C).double(), "other_logits": torch.randn(N, C)}
    values = {
        "js": terms["js"](s, t),
        "kd": terms["kd"](s, t),
        "reverse": terms["reverse"](s, t),
        "wide": terms["wide"](s, extra["wide_logits"]),
        "progressive": terms["progressive"](s, y, index=index, partner_index=partner, mix_lambda=0.3),
        "masked": terms["masked"](s, t, mask=mask),
        "other": terms["other"](extra["other_logits"], t),
    }
    total, found = LossStack(terms, weights=weights, inputs=renamed)(
        **given, **extra, mask=mask, partner_index=partner, mix_lambda=0.3
    )
    assert list(found) == list(terms)
    for name, value in values.items():
        torch.testing.assert_close(found[name], value, msg=name)
    expected = sum(weights[name] * value for name, value in values.items())
    torch.testing.assert_close(total, expected, check_dtype=False)


def test_a_stack_of_torchs_own_losses_alone_is_their_sum(given):
    s, y = given["student_logits"], given["target"]
    total, _ = LossStack({"ce": nn.CrossEntropyLoss(), "margin": nn.MultiMarginLoss()}, weights={"margin": 2.0})(
        **given
    )
    expected = nn.functional.cross_entropy(s, y) + 2.0 * nn.functional.multi_margin_loss(s, y)
    torch.testing.assert_close(total, expected)


def test_without_ids_nothing_has_history_and_nothing_is_written(given):
    store = CachedTargets(N, C)
    store.write(torch.arange(N), torch.full((N, C), 1 / C))
    before = store.rows.clone()
    stack = LossStack({"progressive": ProgressiveKD(store)})
    _, values = stack(**{**given, "index": None})
    expected = nn.functional.cross_entropy(given["student_logits"], given["target"])
    torch.testing.assert_close(values["progressive"], expected)
    stack.update(**{**given, "index": None})
    assert torch.equal(store.rows, before)


def test_the_epoch_and_the_weights_are_numbers_whatever_the_default_device():
    with torch.device("meta"):
        stack = LossStack({"progressive": ProgressiveKD(CachedTargets(N, C, device="cpu")), "kd": DeterministicKD()})
        stack.update(student_logits=torch.randn(N, C, device="cpu"), index=torch.arange(N, device="cpu"))
        stack.advance_epoch()
    assert int(stack.epoch) == int(stack.terms["progressive"].epoch) == 1
    assert float(stack.terms["progressive"].alpha) == 0.5


def test_a_shared_store_advances_once(given):
    class Counting(CachedTargets):
        advances = 0

        def advance_epoch(self):
            self.advances += 1
            super().advance_epoch()

    store = Counting(N, C)
    stack = LossStack({"a": ProgressiveKD(store), "b": ProgressiveKD(store, temperature=2.0)})
    stack.update(**given)
    stack.advance_epoch()
    assert store.advances == 1
    assert [int(term.epoch) for term in stack.terms.values()] == [1, 1]
    stack.advance_epoch(1)
    assert store.advances == 1


def test_a_term_may_advance_without_being_told_the_epoch(given):
    class Plain(Feature):
        def advance_epoch(self):
            self.epochs.append("on")

    stack = LossStack({"progressive": ProgressiveKD(CachedTargets(N, C)), "plain": Plain(), "told": Feature()})
    stack.update(**given, student_feature=torch.ones(1))
    stack.advance_epoch()
    assert stack.terms["plain"].epochs == ["on"]
    assert stack.terms["told"].epochs == [None]


def test_a_stack_is_extended_through_its_public_parts(given):
    method = AIKDLoss(N, C, 4)
    stack = LossStack({**method.terms, "feature": Feature()}, weights={**method.weights, "feature": 0.1})
    given["student_feature"] = torch.ones(5)
    total, _ = stack(**given)
    expected, _ = method(**{k: v for k, v in given.items() if k != "student_feature"})
    torch.testing.assert_close(total, expected + 0.1 * 10)
    stack.update(**given)
    assert len(stack.terms["feature"].updates) == 1


def test_the_method_is_its_three_terms_with_the_stated_defaults(given):
    method = AIKDLoss(N, C, num_epochs=4)
    method.update(**{k: v for k, v in given.items() if k != "target"})
    method.advance_epoch()
    total, values = method(**given)
    s, t, y = given["student_logits"], given["teacher_logits"], given["target"]
    alpha, temperature = 0.8 * 2 / 4, 2.0
    row = s.softmax(-1).half().float()
    blended = (1 - alpha) * torch.eye(C)[y] + alpha * row
    progressive = -(blended * s.log_softmax(-1)).sum(-1).mean()
    p, q = (t / temperature).softmax(-1), (s / temperature).softmax(-1)
    deterministic = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    adversarial = -method.terms["adversarial"].discriminator(s.softmax(-1)).mean()
    torch.testing.assert_close(values["progressive"], progressive, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values["deterministic"], deterministic)
    torch.testing.assert_close(values["adversarial"], adversarial.detach())
    torch.testing.assert_close(
        total,
        0.5 / (1 - alpha) * progressive + 0.5 * deterministic + adversarial,
        rtol=1e-4,
        atol=1e-5,
        check_dtype=False,
    )


@pytest.mark.parametrize("epoch", [1, 7, 20])
def test_the_labels_keep_their_weight_whatever_alpha(given, epoch):
    """The gradient of a student whose previous predictions are its present ones is that of the labels and the teacher alone."""
    method = AIKDLoss(
        N, C, num_epochs=8, weights={"adversarial": 0.0}, targets=CachedTargets(N, C, dtype=torch.float64)
    )
    s, t, y, index = (given[name] for name in ("student_logits", "teacher_logits", "target", "index"))
    s = s.detach().double().requires_grad_()
    method.update(student_logits=s, teacher_logits=t, index=index)
    method.advance_epoch(epoch)
    total, _ = method(student_logits=s, teacher_logits=t, target=y, index=index)
    labels_and_teacher = 0.5 * F.cross_entropy(s, y) + 0.5 * DeterministicKD(temperature=2.0)(s, t)
    (gradient,), (expected,) = (torch.autograd.grad(loss, s) for loss in (total, labels_and_teacher))
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("num_epochs", [1, 4])
def test_in_the_first_epoch_labels_and_teacher_have_a_half_each(given, num_epochs):
    """However steep alpha's ramp is: nothing is known that could take a share."""
    method = AIKDLoss(N, C, num_epochs, weights={"adversarial": 0.0})
    s, t, y = (given[name] for name in ("student_logits", "teacher_logits", "target"))
    expected = 0.5 * F.cross_entropy(s, y) + 0.5 * DeterministicKD(temperature=2.0)(s, t)
    torch.testing.assert_close(method(**given)[0], expected)


@pytest.mark.parametrize("alpha", [1.0, lambda epoch: 1.0 if epoch == 3 else 0.5])
def test_an_alpha_that_leaves_the_labels_nothing_is_refused_at_once(alpha):
    with pytest.raises(ValueError, match=r"`LabelWeight` needs an alpha below 1; it is 1 in epoch 3\."):
        AIKDLoss(N, C, num_epochs=4, alpha=alpha)
    with pytest.raises(ValueError, match="it is 1 in epoch 1"):
        AIKDLoss(N, C, num_epochs=1, alpha=1.0)  # where the last advance_epoch leads
    AIKDLoss(N, C, num_epochs=4, alpha=alpha, weights={"progressive": 1.0})  # no labels, and meant so


class Labelled(nn.Module):
    """A discriminator with a condition."""

    def __init__(self):
        super().__init__()
        self.score, self.label = nn.Linear(C, 1), nn.Embedding(C, 1)

    def forward(self, x, condition):
        return self.score(x) + self.label(condition)


def test_the_method_hands_on_whatever_its_terms_take(given):
    method = AIKDLoss(N, C, num_epochs=4, discriminator=Labelled(), penalty=None)
    method.terms["progressive"].targets.write(given["index"], torch.randn(N, C).softmax(-1))
    given |= {"mask": torch.arange(N) < 4, "condition": given["target"]}
    for blended in ({}, {"partner_index": given["index"].flip(0), "mix_lambda": 0.3}):
        s, t, y, index, mask, condition = given.values()
        expected = {
            "progressive": method.terms["progressive"](s, y, index=index, mask=mask, **blended),
            "deterministic": method.terms["deterministic"](s, t, mask=mask),
            "adversarial": method.terms["adversarial"](s, t, mask=mask, condition=condition).detach(),
        }
        total, values = method(**given, **blended)
        torch.testing.assert_close(values, expected)
        weights = {"progressive": 0.5, "deterministic": 0.5, "adversarial": 1.0}
        expected_total = sum(weights[name] * value for name, value in expected.items())
        torch.testing.assert_close(total, expected_total, check_dtype=False)


def test_the_loop_of_the_design_learns():
    """A separable problem: the student fits it, and its loss falls, with all three terms at work."""
    torch.manual_seed(1)
    x = torch.randn(64, 5)
    y = x[:, :C].argmax(-1)
    train_set = IndexedDataset(TensorDataset(x, y))
    teacher, student = nn.Linear(5, C), nn.Linear(5, C)
    with torch.no_grad():
        teacher.weight.copy_(4 * torch.eye(C, 5))
        teacher.bias.zero_()  # right everywhere
    criterion = AIKDLoss(num_samples=len(train_set), num_classes=C, num_epochs=15)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.3, momentum=0.9)
    for _ in range(15):
        for inputs, target, index in DataLoader(train_set, batch_size=16, shuffle=True):
            with torch.no_grad():
                teacher_logits = teacher(inputs)
            student_logits = student(inputs)
            loss, _ = criterion(
                student_logits=student_logits, teacher_logits=teacher_logits, target=target, index=index
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            criterion.update(student_logits=student_logits, teacher_logits=teacher_logits, index=index)
        criterion.advance_epoch()
    assert (student(x).argmax(-1) == y).float().mean() > 0.9
    assert criterion.terms["progressive"].targets.known.all()


# ---------------------------------------------------------------------------------------------------------- sample ids

Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    ("item", "indexed"),
    [
        ({"x": 1}, {"x": 1, "index": 2}),
        ((1, "b"), (1, "b", 2)),
        (Pair(1, 2), (1, 2, 2)),
        ([1], [1, 2]),
        ("alone", ("alone", 2)),
        (7, (7, 2)),
    ],
)
def test_an_item_gets_its_position(item, indexed):
    data = IndexedDataset([None, None, item])
    assert data[2] == data[-1] == data.__getitems__([2])[0] == indexed
    assert len(data) == 3


def test_a_position_outside_is_an_index_error():
    data = IndexedDataset([1, 2])
    for index in (2, -3):
        with pytest.raises(IndexError, match=r"`index` must be in 0..1; got -?\d"):
            data[index]
    assert [i for _, i in data] == [0, 1]  # which ends the old way of iterating


def test_every_loader_hands_out_the_ids_as_int64():
    pairs = TensorDataset(torch.arange(10), torch.arange(10))
    split, _ = random_split(pairs, [6, 4])
    for data in (IndexedDataset(pairs), IndexedDataset(split), Subset(IndexedDataset(pairs), [3, 1])):
        batches = list(DataLoader(data, batch_size=4))
        assert batches[0][-1].dtype == torch.int64
    ids = torch.cat([batch[-1] for batch in DataLoader(IndexedDataset(split), batch_size=4, shuffle=True)])
    assert sorted(ids.tolist()) == list(range(6))  # split first, then index: 0..len-1


def test_a_hugging_face_data_set_is_fetched_a_batch_at_a_time():
    import datasets

    table = datasets.Dataset.from_dict({"x": [1.0, 2.0, 3.0], "y": [0, 1, 2]})
    batch = next(iter(DataLoader(IndexedDataset(table), batch_size=3, sampler=[2, 0, 1])))
    assert batch["index"].tolist() == [2, 0, 1]
    assert batch["x"].tolist() == [3.0, 1.0, 2.0]


def test_a_batch_fetch_of_the_data_set_is_used():
    class Batched(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            raise AssertionError("one at a time")

        def __getitems__(self, indices):
            return [(i * 10,) for i in indices]

    assert IndexedDataset(Batched()).__getitems__([3, -4]) == [(30, 3), (0, 0)]

    class Lossy(Batched):
        def __getitems__(self, indices):
            return super().__getitems__(indices)[1:]

    with pytest.raises(ValueError, match="zip"):
        IndexedDataset(Lossy()).__getitems__([3, 1])


def test_the_settings_of_the_method_reach_its_parts():
    store = EMATargets(16, 3)
    penalty = ZeroCenteredPenalty(2.0)
    loss = AIKDLoss(16, 3, 4, targets=store, penalty=penalty, learning_rate=0.02, class_dim=-1)
    terms = loss.terms
    assert terms["progressive"].targets is store
    assert terms["adversarial"].penalty is penalty
    assert [term.class_dim for term in terms.values()] == [-1, -1, -1]
    (group,) = terms["adversarial"].optimizer.param_groups
    assert (group["lr"], group["betas"]) == (0.02, (0.5, 0.9))
    assert AIKDLoss(16, 3, 4).terms["adversarial"].optimizer.param_groups[0]["lr"] == 1e-3


def test_a_stack_refuses_an_epoch_before_the_first():
    stack = LossStack({"ce": nn.CrossEntropyLoss()})
    stack.advance_epoch()
    with pytest.raises(ValueError, match="`epoch` must be at least 0; got -1"):
        stack.advance_epoch(-1)
    with pytest.raises(RuntimeError, match="`epoch` must be at least 0; got -1"):
        stack.load_state_dict({"epoch": torch.tensor(-1)})
    assert stack.epoch == 1


def test_a_weight_of_zero_switches_a_term_off_that_is_infinite():
    student, teacher = torch.zeros(2, 3), torch.zeros(2, 3)
    student[0, 0] = -torch.inf  # where the teacher has a third of its mass
    target = torch.ones(2, dtype=torch.int64)
    terms = {"ce": nn.CrossEntropyLoss(), "kd": DeterministicKD(), "other": DeterministicKD(temperature=1.0)}
    stack = LossStack(terms, weights={"kd": 0.0, "other": 0.0})
    total, values = stack(student_logits=student, teacher_logits=teacher, target=target)
    torch.testing.assert_close(total, nn.functional.cross_entropy(student, target))
    assert values["kd"] == torch.inf
