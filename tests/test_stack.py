"""Terms together: LossStack and AIKDLoss, sample ids, schedules."""

from __future__ import annotations

import copy
import re
import warnings
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, random_split

from aikd_losses import (
    AdversarialDistributionLoss,
    AIKDLoss,
    CachedTargets,
    DeterministicKD,
    EMATargets,
    IndexedDataset,
    LinearRamp,
    LossStack,
    MLPDiscriminator,
    ProgressiveKD,
    ZeroCenteredPenalty,
)

N, C = 6, 3


@pytest.fixture
def given():
    s, t = torch.randn(2, N, C)
    return {"student_logits": s, "teacher_logits": t, "target": torch.arange(N) % C, "index": torch.arange(N)}


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


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_the_total_is_the_weighted_sum_and_terms_are_unweighted_and_detached(dtype, rtol, given):
    s, t, y = given["student_logits"].to(dtype).requires_grad_(), given["teacher_logits"].to(dtype), given["target"]
    terms = {"ce": nn.CrossEntropyLoss(), "kd": DeterministicKD(), "margin": nn.MultiMarginLoss()}
    total, values = LossStack(terms, weights={"kd": 0.1, "margin": 2.0})(student_logits=s, teacher_logits=t, target=y)
    ce, kd, margin = F.cross_entropy(s, y), DeterministicKD()(s, t), F.multi_margin_loss(s, y)
    assert_close(values, {"ce": ce.detach(), "kd": kd.detach(), "margin": margin.detach()})
    assert_close(total, ce + 0.1 * kd + 2.0 * margin, rtol=rtol, atol=0)
    assert total.requires_grad
    assert not any(value.requires_grad for value in values.values())


def test_weights_follow_the_epoch_and_come_back_with_a_checkpoint(given):
    stack, fresh = (
        LossStack({"kd": DeterministicKD(), "feature": Feature()}, weights={"kd": LinearRamp(1.0, 4), "feature": 0.0})
        for _ in range(2)
    )

    def weight(stack):
        total, values = stack(**given, student_feature=torch.ones(2))
        return float(total / values["kd"])

    weights = []
    for epoch in (None, None, 2, 3):  # the third says where it is
        weights.append(weight(stack))
        stack.advance_epoch(epoch)
    assert weights == pytest.approx([0.25, 0.5, 0.75, 0.75])
    fresh.load_state_dict(stack.state_dict())
    assert weight(fresh) == pytest.approx(1.0)
    assert stack.terms["feature"].epochs == [None, None, 2, 3]


def test_inputs_rename_and_withhold_in_forward_and_update(given):
    kd, progressive = (
        DeterministicKD(temperature=1.0),
        ProgressiveKD(CachedTargets(N, C, dtype=torch.float32), alpha=1.0),
    )
    stack = LossStack(
        {"a": kd, "b": copy.deepcopy(kd), "progressive": progressive},
        inputs={
            "b": {"teacher_logits": "other_logits", "mask": None},
            "progressive": {"student_logits": "other_logits", "target": None},
        },
    )
    other, mask, s, t = torch.randn(N, C), torch.arange(N) < 2, given["student_logits"], given["teacher_logits"]
    stack.update(**given, other_logits=other, mask=mask)
    assert progressive.targets.known.tolist() == mask.tolist()
    _, values = stack(**given, other_logits=other, mask=mask)
    entropy = torch.distributions.Categorical(logits=other[:2]).entropy().mean()
    assert_close(values, {"a": kd(s[:2], t[:2]), "b": kd(s, other), "progressive": entropy})


def test_the_epoch_and_the_weights_are_numbers_whatever_the_default_device():
    with torch.device("meta"):
        stack = LossStack({"progressive": ProgressiveKD(CachedTargets(N, C, device="cpu")), "kd": DeterministicKD()})
        stack.update(student_logits=torch.randn(N, C, device="cpu"), index=torch.arange(N, device="cpu"))
        stack.advance_epoch()
    assert int(stack.epoch) == int(stack.terms["progressive"].epoch) == 1
    assert float(stack.terms["progressive"].alpha) == 0.5


def test_a_shared_store_advances_once_and_a_term_need_not_be_told_the_epoch(given):
    class Counting(CachedTargets):
        advances = 0

        def advance_epoch(self):
            self.advances += 1
            super().advance_epoch()

    class Plain(Feature):
        def advance_epoch(self):
            self.epochs.append("on")

    store, plain, told = Counting(N, C), Plain(), Feature()
    stack = LossStack(
        {"a": ProgressiveKD(store), "plain": plain, "b": ProgressiveKD(store, temperature=2.0), "told": told}
    )
    stack.update(**given, student_feature=torch.ones(1))
    stack.advance_epoch()
    stack.advance_epoch(1)  # where it is
    assert store.advances == 1
    assert [int(stack.terms[name].epoch) for name in ("a", "b")] == [1, 1]
    assert (plain.epochs, told.epochs) == (["on", "on"], [None, 1])


def test_a_stack_is_extended_through_its_public_parts(given):
    method, feature = AIKDLoss(N, C, 4), torch.ones(5)
    stack = LossStack({**method.terms, "feature": Feature()}, weights={**method.weights, "feature": 0.1})
    total, _ = stack(**given, student_feature=feature)
    assert_close(total, method(**given)[0] + 0.1 * 10)
    stack.update(**given, student_feature=feature)
    assert stack.terms["feature"].updates == [feature]


@pytest.mark.parametrize("epoch", [0, 1, 7, 20])
def test_a_row_without_history_is_cross_entropy_at_the_terms_weight_in_every_epoch(given, epoch):
    """Whatever alpha is by then, also beside rows that have a history."""
    method = AIKDLoss(N, C, num_epochs=8, weights={"deterministic": 0.0, "adversarial": 0.0})
    s, y = given["student_logits"].requires_grad_(), given["target"]
    method.terms["progressive"].update(torch.randn(N, C), index=given["index"], mask=torch.arange(N) < 2)
    method.advance_epoch(epoch)
    (gradient,) = torch.autograd.grad(method(**given)[0], s)
    (expected,) = torch.autograd.grad(0.5 * F.cross_entropy(s, y), s)
    assert_close(gradient[2:], expected[2:])
    assert not torch.allclose(gradient[:2], expected[:2])


def test_the_same_predictions_give_the_same_validation_loss_in_every_epoch(given):
    method = AIKDLoss(N, C, num_epochs=4)
    s, t, y, _ = given.values()
    kl = 4 * F.kl_div((s / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="batchmean")
    score = method.terms["adversarial"].discriminator(s.softmax(-1)).mean()
    totals = []
    for _ in range(5):
        totals.append(method(**given | {"index": None})[0].item())
        method.terms["progressive"].update(torch.randn(N, C), index=given["index"])
        method.advance_epoch()
    assert totals == [totals[0]] * 5
    assert totals[0] == pytest.approx((0.5 * F.cross_entropy(s, y) + 0.5 * kl - score).item(), rel=1e-5)


class Labelled(nn.Linear):
    """A discriminator with a condition."""

    def forward(self, x, condition):
        return (1 + condition) * super().forward(x).squeeze(-1)


def test_the_method_hands_on_whatever_its_terms_take(given):
    method = AIKDLoss(N, C, num_epochs=4, discriminator=Labelled(C, 1), penalty=None)
    terms, weights = method.terms, {"progressive": 0.5, "deterministic": 0.5, "adversarial": 1.0}
    terms["progressive"].targets.write(given["index"], torch.randn(N, C).softmax(-1))
    given |= {"mask": torch.arange(N) < 4, "condition": given["target"]}
    s, t, y, index, mask, condition = given.values()
    for blended in ({}, {"partner_index": index.flip(0), "mix_lambda": 0.3}):
        expected = {
            "progressive": terms["progressive"](s, y, index=index, mask=mask, **blended),
            "deterministic": terms["deterministic"](s, t, mask=mask),
            "adversarial": terms["adversarial"](s, t, mask=mask, condition=condition).detach(),
        }
        total, values = method(**given, **blended)
        assert_close(values, expected)
        assert_close(total, sum(weights[name] * value for name, value in expected.items()), check_dtype=False)


def test_the_settings_of_the_method_reach_its_parts():
    settings = dict(targets=EMATargets(16, 3), penalty=ZeroCenteredPenalty(2.0), learning_rate=0.02, class_dim=-1)
    loss = AIKDLoss(16, 3, 4, **settings, alpha=lambda epoch: epoch / 4)
    progressive, _, adversarial = loss.terms.values()
    assert progressive.targets is settings["targets"]
    assert adversarial.penalty is settings["penalty"]
    progressive.update(torch.ones(2, 3), index=torch.arange(2))
    loss.advance_epoch(3)
    assert progressive.alpha == 0.75
    assert [term.class_dim for term in loss.terms.values()] == [-1, -1, -1]
    (group,) = adversarial.optimizer.param_groups
    assert (group["lr"], group["betas"]) == (0.02, (0.5, 0.9))
    assert AIKDLoss(16, 3, 4).terms["adversarial"].optimizer.param_groups[0]["lr"] == 1e-3


# ---------------------------------------------------------------------------------------------------------- sample ids

Pair = namedtuple("Pair", "x y")
ITEMS = [
    ({"x": 1}, {"x": 1, "index": 2}),
    ((1, "b"), (1, "b", 2)),
    ([1], [1, 2]),
    ("alone", ("alone", 2)),
    (7, (7, 2)),
]


@pytest.mark.parametrize(("item", "indexed"), ITEMS)
def test_an_item_gets_its_position_and_none_is_outside(item, indexed):
    data = IndexedDataset([None, None, item])
    assert data[2] == data[-1] == data.__getitems__([2])[0] == indexed
    for index in (3, -4):
        with pytest.raises(IndexError, match="out of range"):
            data[index]
    assert len(data) == len(list(data)) == 3  # which that error ends, as there is no `__iter__`


def test_a_named_tuple_would_lose_its_names():
    with pytest.raises(ValueError, match=r"are named tuples, whose names would be lost. Give `item\._asdict\(\)`"):
        IndexedDataset([Pair(1, 2)])[0]


def test_the_data_set_is_seen_and_set_through_its_index():
    class Digits(Dataset):
        classes, transform = ("zero", "one"), None

        def __len__(self):
            return 2

        def __getitem__(self, i):
            return self.transform(i) if self.transform else i

    digits = Digits()
    for indexed in (IndexedDataset(digits), copy.deepcopy(IndexedDataset(digits))):
        assert indexed.classes == ("zero", "one")
        indexed.transform = lambda i: i + 10
        assert indexed[1] == (11, 1)
        with pytest.raises(AttributeError, match="labels"):
            _ = indexed.labels
    assert digits.transform is not None
    assert next(iter(DataLoader(IndexedDataset(digits), batch_size=2)))[1].tolist() == [0, 1]
    indexed.dataset = [5]
    assert indexed[0] == (5, 0)


def test_a_data_set_of_ones_own_keeps_its_attributes_to_itself():
    class Views(IndexedDataset):
        shown = 1

        def __init__(self, data, views):
            self.early = 0
            super().__init__(data)
            self.views, self._lock = views, None

    data = TensorDataset(torch.arange(4))
    a, b = Views(data, 1), Views(data, 2)
    a.shown = 3
    assert (a.views, a.shown, a.early, a._lock) == (1, 3, 0, None)
    assert (b.views, b.shown) == (2, 1)
    assert not hasattr(data, "views")
    with pytest.raises(TypeError, match=r"^Join data sets first, then index"):
        a + b


@pytest.mark.cpu("loaders draw by a generator of it")
def test_every_loader_hands_out_the_ids_as_int64():
    pairs = TensorDataset(torch.arange(10), torch.arange(10))
    split, _ = random_split(pairs, [6, 4])
    for data in (IndexedDataset(pairs), IndexedDataset(split), Subset(IndexedDataset(pairs), [3, 1])):
        batches = list(DataLoader(data, batch_size=4))
        assert batches[0][-1].dtype == torch.int64
    ids = torch.cat([batch[-1] for batch in DataLoader(IndexedDataset(split), batch_size=4, shuffle=True)])
    assert sorted(ids.tolist()) == list(range(6))  # split first, then index: 0..len-1


def test_a_hugging_face_data_set_is_fetched_a_batch_at_a_time():
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"x": [1.0, 2.0, 3.0], "y": [0, 1, 2]})
    batch = next(iter(DataLoader(IndexedDataset(table), batch_size=3, sampler=[2, 0, 1])))
    assert batch["index"].tolist() == [2, 0, 1]
    assert batch["x"].tolist() == [3.0, 1.0, 2.0]


class Batched(Dataset):
    """Hands out whole batches, and loses a sample of one that has sample 1."""

    def __len__(self):
        return 4

    def __getitems__(self, indices):
        return [(i * 10,) for i in indices if i != 1]

    __getitem__ = None  # not one at a time


def test_a_batch_fetch_of_the_data_set_is_used():
    assert IndexedDataset(Batched()).__getitems__([3, -4]) == [(30, 3), (0, 0)]
    with pytest.raises(ValueError, match="zip"):
        IndexedDataset(Batched()).__getitems__([3, 1])


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, student_logits):
        return self.value


@pytest.mark.parametrize(
    ("values", "weight", "total"),
    [
        ([torch.tensor(3)], 0.5, 1.5),
        ([torch.tensor(6e4).half()] * 2, 1.0, 120_000.0),  # inf in their own type
        ([torch.tensor(1.0).double(), torch.tensor(2.0).half()], 0.1, 0.3),
    ],
)
def test_values_of_any_type_are_summed_in_float32_at_least(values, weight, total):
    terms = {f"{i}": Constant(value) for i, value in enumerate(values)}
    found, _ = LossStack(terms, weights=dict.fromkeys(terms, weight))(student_logits=torch.zeros(1, 2))
    assert found.item() == pytest.approx(total)


def test_a_constant_may_be_on_another_device():
    terms = {
        "constant": Constant(torch.tensor(1.0, device="cpu")),
        "elsewhere": Constant(torch.zeros((), device="meta")),
    }
    assert LossStack(terms)(student_logits=torch.zeros(1, 2))[0].is_meta


def test_an_alpha_that_is_refused_stops_the_stack_before_any_term():
    later = ProgressiveKD(CachedTargets(4, 2), alpha=lambda epoch: 0.5 + epoch)
    stack = LossStack({"first": ProgressiveKD(CachedTargets(4, 2)), "later": later})
    with pytest.raises(ValueError, match=r"`alpha\(1\)` must be in the interval"):
        stack.advance_epoch()
    assert [int(x.epoch) for x in (stack, *stack.terms.values())] == [0, 0, 0]


class Root(nn.Module):
    """A user's term with a parameter of its own; its gradient at 0 is not finite."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, student_logits):
        return (self.scale * student_logits.square()).sqrt().mean()


class BrokenStore:
    def read(self, index):
        return torch.full((len(index), C), torch.nan), torch.ones(len(index), dtype=torch.bool)

    def write(self, index, probs): ...
    def advance_epoch(self): ...


def broken_discriminator():
    discriminator = MLPDiscriminator(C)
    nn.init.constant_(discriminator.layers[0].weight, torch.nan)
    return AdversarialDistributionLoss(discriminator)


POISONS = {  # a term, and what it is given that makes its value or its gradient NaN or infinite
    "reverse KL, teacher excludes a class": (lambda: DeterministicKD(divergence="reverse_kl"), "teacher", -torch.inf),
    "forward KL, student excludes a class": (DeterministicKD, "student", -torch.inf),
    "JS, NaN teacher": (lambda: DeterministicKD(divergence="js"), "teacher", torch.nan),
    "NaN teacher": (DeterministicKD, "teacher", torch.nan),
    "NaN rows": (lambda: ProgressiveKD(BrokenStore()), "teacher", 0.0),
    "broken discriminator": (broken_discriminator, "teacher", 0.0),
    "a term of one's own": (Root, "teacher", 0.0),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("weight", [0.0, lambda epoch: 0.5 * (epoch > 0)], ids=["constant", "schedule"])
@pytest.mark.parametrize("poison", POISONS)
def test_a_term_of_weight_0_adds_nothing_to_value_or_gradient(given, poison, weight, compiled):
    torch.compiler.reset()
    make, side, x = POISONS[poison]
    term, given["target"] = make(), torch.ones(N, dtype=torch.int64)
    given[f"{side}_logits"][:, 0] = x
    s = given["student_logits"].requires_grad_()
    stack = LossStack({"ce": nn.CrossEntropyLoss(), "term": term}, weights={"term": weight})
    call = torch.compile(stack, fullgraph=True, backend="eager") if compiled else stack
    alone = F.cross_entropy(s, given["target"])
    total, _ = call(**given)
    assert_close(total, alone)
    own = list(term.parameters())
    found, *of_term = torch.autograd.grad(total, [s, *own])
    assert_close(found, torch.autograd.grad(alone, s)[0])
    assert all(not slope.any() for slope in of_term)
    if callable(weight):  # and in the next epoch all of it counts
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing was written
            stack.advance_epoch()
        total, _ = call(**given)
        (found,) = torch.autograd.grad(total, s)
        assert not (total.isfinite() and found.isfinite().all())


def test_what_a_term_of_weight_0_is_given_in_a_list_is_reached_too(given):
    """Under DDP a head whose logits nobody's gradient reaches would be waited for; and what has no gradient is left alone."""

    class Deep(nn.Module):
        def forward(self, heads, graph=None):
            return sum(x.square().sum() for x in [*heads["inner"], heads["last"]])

    s, (a, b, c) = given["student_logits"].requires_grad_(), torch.randn(3, N, C, requires_grad=True).unbind()
    stack = LossStack({"ce": nn.CrossEntropyLoss(), "deep": Deep()}, weights={"deep": 0.0})
    adjacency = torch.eye(3).to_sparse()  # which cannot be expanded
    total, _ = stack(student_logits=s, target=given["target"], heads={"inner": [a, (b)], "last": c}, graph=adjacency)
    assert all(not slope.any() for slope in torch.autograd.grad(total, [a, b, c]))


def test_a_weight_that_float32_rounds_to_0_is_0():
    infinite = Constant(torch.tensor(torch.inf))
    stack = LossStack({"one": Constant(torch.tensor(1.0)), "x": infinite}, weights={"x": 1e-50})
    assert stack(student_logits=torch.zeros(1, 2))[0] == 1


def test_terms_that_all_have_weight_0_give_0_with_a_graph(given):
    s = given["student_logits"].requires_grad_()
    total, values = LossStack({"kd": DeterministicKD()}, weights={"kd": 0.0})(**given)
    assert total == 0
    assert values["kd"] > 0
    assert not torch.autograd.grad(total, s)[0].any()


@pytest.mark.parametrize(
    "terms", [{"kd": DeterministicKD(class_dim=-1)}, {"p": ProgressiveKD(CachedTargets(9, C), class_dim=2)}]
)
def test_torchs_cross_entropy_beside_classes_on_another_axis_is_refused(terms):
    """Where a sequence is as long as there are classes, it would be silently wrong."""
    s, y = torch.randn(3, C, C), torch.zeros(3, C, dtype=torch.int64)
    given = dict(student_logits=s, teacher_logits=s.flip(0), target=y, index=torch.arange(9).view(3, C))
    ((name, term),) = copy.deepcopy(terms).items()
    stack = LossStack({"ce": nn.CrossEntropyLoss(), name: term})
    said = f"Term 'ce' takes axis 1 for the classes, term {name!r} axis {term.class_dim}. Give the first "
    remedy = "rows (N, C), by names of their own: inputs={'ce': {'input': 'rows', 'target': 'row_target'}}."
    with pytest.raises(ValueError, match=f"^{re.escape(said + remedy)}$"):
        stack(**given)
    renamed = LossStack(stack.terms, inputs={"ce": {"input": "rows", "target": "row_target"}})
    total, values = renamed(**given, rows=s.flatten(0, 1), row_target=y.flatten())
    assert_close(values["ce"], -s.log_softmax(-1)[..., 0].mean())
    term.class_dim = -1  # which is 1 of rows
    rows = {key: x.flatten(0, 1) for key, x in given.items()}
    assert_close(LossStack({"ce": nn.CrossEntropyLoss(), name: term})(**rows)[0], total)


def test_a_term_of_ones_own_may_reduce_what_is_not_reduced():
    class Focal(nn.CrossEntropyLoss):
        def forward(self, input, target):
            values = super().forward(input, target)
            return (values * (1 - torch.exp(-values))).mean()

    s, y = torch.randn(N, C), torch.zeros(N, dtype=torch.int64)
    expected = -((1 - s.softmax(-1)) * s.log_softmax(-1))[:, 0].mean()
    assert_close(LossStack({"focal": Focal(reduction="none")})(student_logits=s, target=y)[0], expected)


def test_a_cross_entropy_of_ones_own_may_have_any_axis():
    class Own(nn.CrossEntropyLoss):
        def forward(self, student_logits, target):
            return super().forward(student_logits.transpose(1, 2), target)

    s, y = torch.randn(2, 5, C), torch.zeros(2, 5, dtype=torch.int64)
    stack = LossStack({"ce": Own(), "kd": DeterministicKD(class_dim=-1)})
    assert_close(stack(student_logits=s, teacher_logits=s, target=y)[0], -s.log_softmax(-1)[..., 0].mean())
