"""The laws, for every kind of loss; and what the terms promise together, compiled, and with discriminators of any sort."""

from __future__ import annotations

import pytest
import torch
from laws import CASES, DTYPES, KINDS, LAYOUTS, ROWS, C, batch, is_the_usual_composition
from torch import nn
from torch.testing import assert_close

from aikd_losses import (
    AdversarialDistributionLoss,
    AIKDLoss,
    CachedTargets,
    EMATargets,
    LinearRamp,
    LossStack,
    MLPDiscriminator,
    ProgressiveKD,
)


@pytest.mark.parametrize(("law", "kind"), CASES)
def test_law(law, kind):
    law(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_contract(kind, dtype, layout):
    """Every layout with every type; every reduction with each of them."""
    of = KINDS[kind].reductions
    reduction = of[(DTYPES.index(dtype) + list(LAYOUTS).index(layout)) % len(of)]
    is_the_usual_composition(KINDS[kind], reduction, dtype, layout)


@pytest.mark.parametrize("store", [CachedTargets, EMATargets])
def test_the_method_compiles_once_for_all_epochs(store):
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    criterion = AIKDLoss(ROWS, C, 4, targets=store(ROWS, C), weights={"deterministic": LinearRamp(0.5, 4)})
    compiled = torch.compile(criterion, fullgraph=True, backend=backend)
    x, totals = batch(), []
    for _ in range(4):
        given = dict(student_logits=x.student.requires_grad_(), teacher_logits=x.teacher, index=x.index)
        total, values = compiled(**given, target=x.target)
        assert_close((total, values), criterion(**given, target=x.target))
        total.backward()
        criterion.update(**given)
        criterion.advance_epoch()
        totals.append(total.item())
    assert len(set(totals)) == 4  # the schedules did move
    assert len(graphs) == 1


def test_a_stack_with_torchs_own_loss_and_mixup_compiles_whatever_its_lambda():
    torch.compiler.reset()
    stack = LossStack({"ce": nn.CrossEntropyLoss(label_smoothing=0.1), "p": ProgressiveKD(CachedTargets(ROWS, C))})
    compiled, x = torch.compile(stack, fullgraph=True, backend="eager"), batch()
    stack.update(student_logits=x.teacher, index=x.index)
    for share in (0.7, 0.4, 0.1):
        given = dict(student_logits=x.student, target=x.target, index=x.index)
        given |= dict(partner_index=x.index.flip(0), mix_lambda=share)
        assert_close(compiled(**given), stack(**given))


def test_a_store_whose_methods_are_the_users_own_is_read_and_written_by_them():
    class Counting(CachedTargets):
        calls = ()

        def read(self, index):
            self.calls += ("read",)
            return super().read(index)

        def write(self, index, probs, *, keep=None):
            self.calls += ("write",)
            super().write(index, probs, keep=keep)

    x, loss = batch(), ProgressiveKD(Counting(ROWS, C))
    loss.update(x.student, index=x.index)
    loss(x.student, x.target, index=x.index)
    assert loss.targets.calls == ("write", "read")


def test_under_a_transform_no_gradient_reaches_the_discriminator_either():
    loss = AdversarialDistributionLoss(MLPDiscriminator(3))
    assert not torch.func.vmap(loss)(torch.randn(2, 4, 3), torch.randn(2, 4, 3)).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_discriminator_whose_rows_see_each_other_has_the_right_gradient(reduction):
    """Batch norm, under a mask too."""
    layers = [nn.Linear(5, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 1)]
    discriminator = nn.Sequential(*layers)
    s, mask, weight = torch.randn(6, 5, requires_grad=True), torch.arange(6) % 3 != 1, torch.rand(6)
    shown = s.masked_fill(~mask.unsqueeze(-1), 0.0).softmax(-1)
    values = nn.functional.softplus(-discriminator(shown).squeeze(-1)) * mask
    total = {"mean": values.sum() / mask.sum(), "sum": values.sum(), "none": (weight * values).sum()}[reduction]
    found = AdversarialDistributionLoss(discriminator, reduction=reduction)(s, torch.randn(6, 5), mask=mask)
    slope = torch.autograd.grad((weight * found).sum() if reduction == "none" else found, s)
    assert_close(slope, torch.autograd.grad(total, s))


def test_weights_of_a_discriminator_may_lie_in_memory_in_any_order():
    class Columns(nn.Module):
        def __init__(self, first):
            super().__init__()
            self.first = nn.Parameter(first)

        def forward(self, x):
            return torch.tanh(x @ self.first).sum(-1)

    columns = torch.randn(3, 5).t()
    losses = []
    for first in (columns.clone(), columns.contiguous()):  # a clone keeps the order
        discriminator = Columns(first)
        loss = AdversarialDistributionLoss(discriminator, optimizer=torch.optim.SGD(discriminator.parameters(), lr=0.1))
        s, t = batch().student, batch().teacher
        values = [loss.update(s, t) for _ in range(3)]
        losses.append((values, discriminator.first.detach(), loss.diagnostics()))
    assert not losses[0][1].is_contiguous()
    assert_close(losses[0], losses[1])
