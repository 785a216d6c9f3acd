"""The loops that users have: mixed precision, odd samplers; what they log of the discriminator."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, Subset, TensorDataset, WeightedRandomSampler

from aikd_losses import (
    AdversarialDistributionLoss,
    AIKDLoss,
    CachedTargets,
    IndexedDataset,
    LossStack,
    MLPDiscriminator,
    ProgressiveKD,
)

N, C = 24, 3
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % C


def tensors_of(logits, teacher_logits, index):
    return dict(student_logits=logits, teacher_logits=teacher_logits[index], target=Y[index], index=index)


# ---------------------------------------------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_step_that_the_scaler_skips_poisons_nothing(dtype):
    network, teacher_logits = nn.Linear(4, C), nn.Linear(4, C)(X).detach()
    criterion = AIKDLoss(N, C, 4, objective="non_saturating", penalty=None)
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
        assert all(x.isfinite().all() for x in criterion.state_dict().values() if x.is_floating_point())
        if step % 2:
            criterion.advance_epoch()
        newest, _ = criterion.terms["progressive"].targets.read(index)  # skipped or not
        torch.testing.assert_close(newest, logits.detach().float().softmax(-1), atol=1e-3, rtol=0)
    assert skipped[0]
    assert not skipped[-1]
    assert criterion.terms["progressive"].targets.known.all()


# ------------------------------------------------------------------------------------------------------------ samplers


DATA = TensorDataset(X, Y)
LOADERS = {
    "with replacement": lambda data: DataLoader(data, 8, sampler=RandomSampler(data, replacement=True, num_samples=40)),
    "weighted": lambda data: DataLoader(data, 8, sampler=WeightedRandomSampler([1.0] * 3 + [0.1] * (N - 3), 40)),
    "the last batch dropped": lambda data: DataLoader(data, 7, shuffle=True, drop_last=True),
    "a subset": lambda _: DataLoader(IndexedDataset(Subset(DATA, range(20, 5, -1))), 4, shuffle=True),
    "cut short": lambda data: DataLoader(data, 5, shuffle=True),
}


@pytest.mark.parametrize("store", [CachedTargets, lambda n, c: CachedTargets(n, c, top_k=1)], ids=["cached", "top_k"])
@pytest.mark.parametrize("kind", LOADERS)
def test_whatever_is_drawn_each_row_is_the_last_prediction_of_its_sample(kind, store):
    """Predictions say in which draw they were made; a dict remembers the same."""
    torch.manual_seed(3)
    loader = LOADERS[kind](IndexedDataset(DATA))
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


# ---------------------------------------------------------------------------------------------------------- diagnostics


class OfFirstClass(nn.Module):
    """A discriminator whose score is the probability of class 0, times what is learnt."""

    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x):
        return self.scale * x[:, 0]


OF_TEACHER, OF_STUDENT = torch.tensor([[0.7, 0.2, 0.5, 0.8, 0.9, 0.9], [0.6, 0.4, 0.5, 0.3, 0.1, 0.1]])
SHOWN_T, SHOWN_S = OF_TEACHER[:4].double(), OF_STUDENT[:4].double()  # a win of the teacher's, a defeat, a tie, a win


@pytest.mark.parametrize(
    ("objective", "scale", "accuracy", "norm"),
    [
        ("wasserstein", 2.0, 2.5 / 4, (SHOWN_T - SHOWN_S).mean()),
        ("least_squares", 1e38, 2.5 / 4, 1e38 * (SHOWN_T**2 + SHOWN_S**2).mean()),  # it explodes
        ("least_squares", 0.0, 1 / 2, SHOWN_T.mean()),  # it collapsed: all scores are ties
        ("least_squares", math.nan, math.nan, math.nan),
    ],
)
def test_the_discriminators_health_is_how_often_it_is_right_and_how_steep_its_step_is(objective, scale, accuracy, norm):
    discriminator = OfFirstClass(scale)
    sgd = torch.optim.SGD(discriminator.parameters(), lr=0.0)
    loss = AdversarialDistributionLoss(discriminator, objective=objective, optimizer=sgd)
    stack = LossStack({"label": nn.CrossEntropyLoss(), "fool": loss})
    assert stack.diagnostics() == loss.diagnostics() == {}
    teacher, student = (torch.stack([p, 1 - p], -1).log() for p in (OF_TEACHER, OF_STUDENT))
    student[5, 1] = math.nan  # counts nowhere
    value = loss.update(student, teacher, mask=torch.tensor([True, True, True, True, False, True]))
    found = stack.diagnostics()
    assert found.pop("fool/discriminator_loss") is value
    assert not any(x.requires_grad or x.ndim for x in found.values())
    expected = {"fool/accuracy": accuracy, "fool/gradient_norm": float(norm)}
    assert {name: x.item() for name, x in found.items()} == pytest.approx(expected, rel=1e-5, nan_ok=True)
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
