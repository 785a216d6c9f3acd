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
    s, t, y = given["student_logits"].requires_grad_(), given["teacher_logits"], given["target"]
    terms = {"ce": nn.CrossEntropyLoss(), "kd": DeterministicKD(), "margin": nn.MultiMarginLoss()}
    total, values = LossStack(terms, weights={"kd": 0.25, "margin": 2.0})(**given)
    ce, kd, margin = F.cross_entropy(s, y), DeterministicKD()(s, t), F.multi_margin_loss(s, y)
    torch.testing.assert_close(values, {"ce": ce.detach(), "kd": kd.detach(), "margin": margin.detach()})
    torch.testing.assert_close(total, ce + 0.25 * kd + 2.0 * margin)
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
    wide = {name: given[name].double() for name in ("student_logits", "teacher_logits")}
    total, values = LossStack({"kd": DeterministicKD()}, weights={"kd": 0.1})(**wide)
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
    stack.advance_epoch(1)  # where it is
    assert store.advances == 1
    assert [int(term.epoch) for term in stack.terms.values()] == [1, 1]


def test_a_term_may_advance_without_being_told_the_epoch(given):
    class Plain(Feature):
        def advance_epoch(self):
            self.epochs.append("on")

    stack = LossStack({"plain": Plain(), "told": Feature()})
    stack.advance_epoch()
    stack.advance_epoch(2)
    assert [term.epochs for term in stack.terms.values()] == [["on", "on"], [None, 2]]


def test_a_stack_is_extended_through_its_public_parts(given):
    method = AIKDLoss(N, C, 4)
    stack = LossStack({**method.terms, "feature": Feature()}, weights={**method.weights, "feature": 0.1})
    given["student_feature"] = torch.ones(5)
    total, _ = stack(**given)
    expected, _ = method(**{k: v for k, v in given.items() if k != "student_feature"})
    torch.testing.assert_close(total, expected + 0.1 * 10)
    stack.update(**given)
    assert stack.terms["feature"].updates == [given["student_feature"]]


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
    expected = 0.5 * progressive + 0.5 * deterministic + adversarial
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("epoch", [0, 1, 7, 20])
def test_a_row_without_history_is_cross_entropy_at_the_terms_weight_in_every_epoch(given, epoch):
    """Whatever alpha is by then, also beside rows that have a history."""
    method = AIKDLoss(N, C, num_epochs=8, weights={"deterministic": 0.0, "adversarial": 0.0})
    s, y = given["student_logits"].requires_grad_(), given["target"]
    method.terms["progressive"].update(torch.randn(N, C), index=given["index"], mask=torch.arange(N) < 2)
    method.advance_epoch(epoch)
    (gradient,) = torch.autograd.grad(method(**given)[0], s)
    (expected,) = torch.autograd.grad(0.5 * F.cross_entropy(s, y), s)
    torch.testing.assert_close(gradient[2:], expected[2:])
    assert not torch.allclose(gradient[:2], expected[:2])


def test_the_same_predictions_give_the_same_validation_loss_in_every_epoch(given):
    method = AIKDLoss(N, C, num_epochs=4)
    totals = []
    for _ in range(5):
        totals.append(method(**given | {"index": None})[0].item())
        method.terms["progressive"].update(torch.randn(N, C), index=given["index"])
        method.advance_epoch()
    assert totals == [totals[0]] * 5
    discriminator = method.terms["adversarial"].discriminator
    s, t, y = given["student_logits"], given["teacher_logits"], given["target"]
    kl = 4 * F.kl_div((s / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="batchmean")
    assert totals[0] == pytest.approx(
        (0.5 * F.cross_entropy(s, y) + 0.5 * kl - discriminator(s.softmax(-1)).mean()).item(), rel=1e-5
    )


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
        with pytest.raises(IndexError, match="out of range"):
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


class Batched(Dataset):
    """Hands out whole batches, and loses a sample of one that has sample 1."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise AssertionError("one at a time")

    def __getitems__(self, indices):
        return [(i * 10,) for i in indices if i != 1]


def test_a_batch_fetch_of_the_data_set_is_used():
    assert IndexedDataset(Batched()).__getitems__([3, -4]) == [(30, 3), (0, 0)]
    with pytest.raises(ValueError, match="zip"):
        IndexedDataset(Batched()).__getitems__([3, 1])


def test_the_settings_of_the_method_reach_its_parts():
    store = EMATargets(16, 3)
    penalty = ZeroCenteredPenalty(2.0)
    loss = AIKDLoss(
        16, 3, 4, targets=store, penalty=penalty, learning_rate=0.02, class_dim=-1, alpha=lambda epoch: epoch / 4
    )
    terms = loss.terms
    assert terms["progressive"].targets is store
    terms["progressive"].update(torch.ones(2, 3), index=torch.arange(2))
    loss.advance_epoch(3)
    assert terms["progressive"].alpha == 0.75
    assert terms["adversarial"].penalty is penalty
    assert [term.class_dim for term in terms.values()] == [-1, -1, -1]
    (group,) = terms["adversarial"].optimizer.param_groups
    assert (group["lr"], group["betas"]) == (0.02, (0.5, 0.9))
    assert AIKDLoss(16, 3, 4).terms["adversarial"].optimizer.param_groups[0]["lr"] == 1e-3
