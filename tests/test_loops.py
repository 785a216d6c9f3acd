"""The loops that users have: mixed precision, accumulation, clipping, odd samplers, a sample gone bad."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, Subset, TensorDataset, WeightedRandomSampler

from aikd_losses import (
    AdversarialDistributionLoss,
    AIKDLoss,
    CachedTargets,
    DeterministicKD,
    EMATargets,
    IndexedDataset,
    LossStack,
    MLPDiscriminator,
    ProgressiveKD,
)

N, C = 24, 3
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % C


@pytest.fixture
def parts():
    """Network, the teacher's logits and the full method."""
    torch.manual_seed(0)
    network, teacher = nn.Linear(4, C), nn.Linear(4, C)
    return network, teacher(X).detach(), AIKDLoss(N, C, 4, objective="non_saturating", penalty=None)


def is_finite(criterion):
    return all(x.isfinite().all() for x in criterion.state_dict().values() if x.is_floating_point())


def tensors_of(logits, teacher_logits, index):
    return dict(student_logits=logits, teacher_logits=teacher_logits[index], target=Y[index], index=index)


# ---------------------------------------------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_step_that_the_scaler_skips_poisons_nothing(dtype, parts):
    network, teacher_logits, criterion = parts
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=10_000)
    skipped = []
    for step in range(12):
        index = torch.arange(N)[step % 2 :: 2]
        before = network.weight.detach().clone()
        with torch.autocast("cpu", dtype):
            logits = network(X[index] * 30)
            loss, _ = criterion(**tensors_of(logits, teacher_logits, index))
        assert loss.dtype == torch.float32
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update(scaler.get_scale() / 2.0**12)
        criterion.update(**tensors_of(logits, teacher_logits, index))
        skipped.append(torch.equal(network.weight, before))
        assert is_finite(criterion)
        if step % 2:
            criterion.advance_epoch()
        torch.testing.assert_close(  # the newest prediction, skipped or not
            criterion.terms["progressive"].targets.read(index)[0],
            logits.detach().float().softmax(-1),
            atol=1e-3,
            rtol=0,
        )
    assert skipped[0]
    assert not skipped[-1]
    assert criterion.terms["progressive"].targets.known.all()


def test_a_sample_that_overflows_in_half_precision_is_left_out_of_store_and_discriminator(parts):
    """65,504 is the end of float16: the network's output for the first sample is inf there."""
    _, teacher_logits, criterion = parts
    other = copy.deepcopy(criterion)
    index = torch.arange(8)
    logits = torch.randn(8, C).half()
    logits[0] = torch.tensor([7e4, 1.0, 2.0])
    assert logits[0, 0].isinf()
    criterion.update(**tensors_of(logits, teacher_logits, index))
    other.update(**tensors_of(logits[1:], teacher_logits, index[1:]))
    assert criterion.terms["progressive"].targets.known.nonzero().flatten().tolist() == list(range(1, 8))
    for (name, ours), theirs in zip(criterion.state_dict().items(), other.state_dict().values(), strict=True):
        if "optimizer" not in name:
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5, msg=name)


# ------------------------------------------------------------------------------------- accumulation, clipping, zeroing


def summed():
    torch.manual_seed(1)
    discriminator = MLPDiscriminator(C, hidden=(8,))
    adam = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    terms = {
        "progressive": ProgressiveKD(CachedTargets(N, C, dtype=torch.float64), alpha=0.6, reduction="sum"),
        "deterministic": DeterministicKD(temperature=2.0, reduction="sum"),
        "adversarial": AdversarialDistributionLoss(discriminator, optimizer=adam, reduction="sum"),
    }
    return LossStack(terms).double()


@pytest.mark.parametrize("micro", [1, 5, N])
def test_accumulated_micro_batches_are_one_big_batch(micro):
    """Sums over micro-batches, divided by the size of the whole; the discriminator steps once, on all of them."""
    torch.manual_seed(0)
    network, teacher_logits = nn.Linear(4, C).double(), torch.randn(N, C, dtype=torch.float64)
    big, small = summed(), summed()
    for step in range(3):
        gradients = []
        for criterion, size in ((big, N), (small, micro)):
            network.zero_grad()
            predicted = []
            for index in torch.randperm(N, generator=torch.Generator().manual_seed(step)).split(size):
                logits = network(X[index].double())
                loss, _ = criterion(**tensors_of(logits, teacher_logits, index))
                (loss / N).backward()
                predicted.append((logits.detach(), index))
            logits, index = (torch.cat(x) for x in zip(*predicted, strict=True))
            criterion.update(**tensors_of(logits, teacher_logits, index))
            criterion.advance_epoch()
            gradients.append(network.weight.grad.clone())
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    for (name, ours), theirs in zip(small.state_dict().items(), big.state_dict().values(), strict=True):
        if "optimizer" not in name:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=name)


def test_clipping_and_the_way_of_zeroing_reach_the_network_alone(parts):
    start, teacher_logits, fresh = parts
    ends = []
    for set_to_none in (True, False):
        network, criterion = copy.deepcopy(start), copy.deepcopy(fresh)
        both = nn.ModuleList([network, criterion])  # a framework that holds them in one module
        optimizer = torch.optim.AdamW(both.parameters(), lr=0.1, weight_decay=0.1)
        for index in torch.arange(N).split(8):
            logits = network(X[index])
            loss, _ = criterion(**tensors_of(logits, teacher_logits, index))
            optimizer.zero_grad(set_to_none=set_to_none)
            loss.backward()
            nn.utils.clip_grad_norm_(both.parameters(), 1e-2)
            norm = torch.stack([p.grad.norm() for p in network.parameters()]).norm()
            assert norm <= 1e-2 + 1e-6
            optimizer.step()
            criterion.update(**tensors_of(logits, teacher_logits, index))
            discriminator = criterion.terms["adversarial"].discriminator
            assert all(p.grad is None for p in discriminator.parameters())
        ends.append({**network.state_dict(), **criterion.state_dict()})
    for name, value in ends[0].items():
        if "optimizer" not in name:
            assert torch.equal(value, ends[1][name]), name


# ------------------------------------------------------------------------------------------------------------ samplers


def drawn(kind):
    data = IndexedDataset(TensorDataset(X, Y))
    torch.manual_seed(3)
    if kind == "with replacement":
        return DataLoader(data, 8, sampler=RandomSampler(data, replacement=True, num_samples=40))
    if kind == "weighted":
        return DataLoader(data, 8, sampler=WeightedRandomSampler([1.0] * 3 + [0.1] * (N - 3), 40))
    if kind == "the last batch dropped":
        return DataLoader(data, 7, shuffle=True, drop_last=True)
    if kind == "a subset":
        return DataLoader(IndexedDataset(Subset(TensorDataset(X, Y), range(20, 5, -1))), 4, shuffle=True)
    return DataLoader(data, 5, shuffle=True)


KINDS = ["with replacement", "weighted", "the last batch dropped", "a subset", "cut short"]


@pytest.mark.parametrize("store", [CachedTargets, lambda n, c: CachedTargets(n, c, top_k=1)], ids=["cached", "top_k"])
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_drawn_each_row_is_the_last_prediction_of_its_sample(kind, store):
    """Predictions say in which draw they were made; a dict remembers the same."""
    loader = drawn(kind)
    targets = store(len(loader.dataset), C)
    progressive = ProgressiveKD(targets, alpha=0.5)
    last, draws, repeated = {}, 0, False
    for _ in range(2):
        for step, (_, y, index) in enumerate(loader):
            if kind == "cut short" and step == 2:
                break
            logits = torch.full((len(index), C), -100.0)
            for row, i in enumerate(index.tolist()):
                logits[row, draws % C] = 100.0
                last[i] = draws % C
                draws += 1
            repeated |= len(index.unique()) < len(index)
            assert progressive(logits, y, index=index).isfinite()
            progressive.update(logits, index=index)
        progressive.advance_epoch()
        probs, known = targets.read(torch.arange(len(loader.dataset)))
        assert {i: int(probs[i].argmax()) for i in known.nonzero().flatten().tolist()} == last
    assert repeated == (kind in ("with replacement", "weighted"))
    assert targets.known.all() == (kind in ("with replacement", "the last batch dropped", "a subset")) or repeated


# --------------------------------------------------------------------------------------------------------- bad samples


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "build",
    [CachedTargets, EMATargets, lambda n, c: CachedTargets(n, c, top_k=2)],
    ids=["cached", "ema", "top_k"],
)
def test_a_sample_gone_bad_reaches_no_other_row(build, bad):
    """Nor its own: that stays as it was."""
    good, hit = ProgressiveKD(build(N, C)), ProgressiveKD(build(N, C))
    logits, later = torch.randn(2, N, C)
    spoiled = later.clone()
    spoiled[5, 1] = bad
    others = torch.arange(N) != 5
    for loss, second in ((good, later), (hit, spoiled)):
        loss.update(logits, index=torch.arange(N))
        loss.update(second, index=torch.arange(N))
    rows, spared = (loss.targets.read(torch.arange(N))[0] for loss in (good, hit))
    assert torch.equal(spared[others], rows[others])
    first = ProgressiveKD(build(N, C))
    first.update(logits, index=torch.arange(N))
    assert torch.equal(spared[5], first.targets.read(torch.tensor([5]))[0][0])
    value = hit(spoiled, Y, index=torch.arange(N), mask=others)
    assert torch.equal(value, hit(later, Y, index=torch.arange(N), mask=others))


# ---------------------------------------------------------------------------------------------------------- diagnostics


def of_first_class(scale):
    """A discriminator whose score is the probability of class 0, times what is learnt."""

    class Score(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(scale))

        def forward(self, x):
            return self.scale * x[:, 0]

    return Score()


def test_the_discriminators_health_is_how_often_it_is_right_and_how_steep_its_step_is():
    discriminator = of_first_class(2.0)
    sgd = torch.optim.SGD(discriminator.parameters(), lr=0.0)
    loss = AdversarialDistributionLoss(discriminator, objective="wasserstein", optimizer=sgd)
    assert loss.diagnostics() == {}
    of_teacher = torch.tensor([0.7, 0.2, 0.5, 0.8, 0.9, 0.9])
    of_student = torch.tensor([0.6, 0.4, 0.5, 0.3, 0.1, 0.1])  # a win of the teacher's, a defeat, a tie, a win
    teacher, student = (torch.stack([p, 1 - p], -1).log() for p in (of_teacher, of_student))
    student[5, 1] = math.nan  # counts nowhere
    mask = torch.tensor([True, True, True, True, False, True])
    value = loss.update(student, teacher, mask=mask)
    found = loss.diagnostics()
    assert found["discriminator_loss"] is value
    assert found["accuracy"].item() == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert found["gradient_norm"].item() == pytest.approx(float((of_teacher - of_student)[:4].mean()), rel=1e-5)
    assert not any(x.requires_grad or x.ndim for x in found.values())
    loss.update(student, teacher, mask=torch.zeros(6, dtype=torch.bool))
    assert loss.diagnostics()["accuracy"].isnan()  # of no rows


def test_an_optimizer_that_works_on_the_gradients_in_place_does_not_change_their_norm():
    norms = []
    for momentum in (0.0, 0.9):
        torch.manual_seed(0)
        discriminator = MLPDiscriminator(C)
        settings = dict(momentum=momentum, nesterov=momentum > 0, foreach=True)
        sgd = torch.optim.SGD(discriminator.parameters(), lr=0.0, **settings)
        loss = AdversarialDistributionLoss(discriminator, optimizer=sgd)
        for _ in range(3):  # no steps, as the learning rate is 0
            loss.update(*torch.randn(2, 8, C, generator=torch.Generator().manual_seed(1)))
            norms.append(loss.diagnostics()["gradient_norm"].item())
    assert norms == pytest.approx([norms[0]] * 6, rel=1e-6)
    assert norms[0] > 0


def test_a_discriminator_that_explodes_or_collapses_is_seen_in_the_log():
    logs = {}
    for scale in (1e38, 0.0, math.nan):
        discriminator = of_first_class(scale)
        sgd = torch.optim.SGD(discriminator.parameters(), lr=0.0)
        adversarial = AdversarialDistributionLoss(discriminator, objective="least_squares", optimizer=sgd)
        stack = LossStack({"label": nn.CrossEntropyLoss(), "fool": adversarial})
        assert stack.diagnostics() == {}
        stack.update(**tensors_of(torch.randn(4, C), torch.randn(N, C), torch.arange(4)))
        logs[scale] = stack.diagnostics()
        assert list(logs[scale]) == ["fool/discriminator_loss", "fool/accuracy", "fool/gradient_norm"]
    assert logs[1e38]["fool/gradient_norm"] > 1e30
    assert all(value.isnan() for name, value in list(logs.items())[2][1].items() if name != "fool/discriminator_loss")
    assert logs[0.0]["fool/accuracy"].item() == 0.5  # all scores are ties
