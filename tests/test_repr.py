"""What modules, stores, schedules and data sets show of themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aikd_losses import (
    AdversarialDistributionLoss,
    AdversarialObjective,
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
    ZeroCenteredPenalty,
)

FULL_METHOD = """\
AIKDLoss(
  epoch=0
  progressive: weight 0.5
    forward(student_logits, target, index [mask, partner_index, mix_lambda])
    update(student_logits, index [mask, partner_index])
  deterministic: weight 0.5
    forward(student_logits, teacher_logits [mask])
  adversarial: weight 1
    forward(student_logits, teacher_logits [mask, condition])
    update(student_logits, teacher_logits [mask, condition])
  (terms): ModuleDict(
    (progressive): ProgressiveKD(
      epoch=0, alpha=0.2 by LinearRamp(end=0.8, num_epochs=4, start=0.0), temperature=1.0, reduction='mean', class_dim=None
      (targets): CachedTargets(num_samples=5, num_classes=3, dtype=torch.float16, device=cpu)
    )
    (deterministic): DeterministicKD(temperature=2.0, divergence='forward_kl', reduction='mean', class_dim=None)
    (adversarial): AdversarialDistributionLoss(
      objective='wasserstein', inputs='probs', temperature=1.0, reduction='mean', class_dim=None
      discriminator=MLPDiscriminator(num_classes=3, hidden=(64, 64))
      penalty=GradientPenalty(weight=10.0), optimizer=Adam
    )
  )
)"""

STACK = """\
LossStack(
  epoch=1
  ce: weight 0.25 by falling
    forward(student_logits, target)
  kd: weight 0.5 by LinearRamp(end=0.5, num_epochs=2, start=0.0)
    forward(student_logits, other [mask])
  history: weight 1
    forward(student_logits, index [mask, partner_index, mix_lambda])
    update(student_logits, index [mask, partner_index])
  inputs={'kd': {'teacher_logits': 'other'}, 'history': {'target': None}}
  (terms): ModuleDict(
    (ce): CrossEntropyLoss()
"""


def halving(epoch):
    return 0.5 ** (epoch + 1)


halving.__qualname__ = "falling"


class Rows:
    """A store that is no module."""

    def read(self, index): ...
    def write(self, index, probs): ...
    def advance_epoch(self): ...


def test_the_full_method_shows_a_table_of_its_terms_and_all_their_settings():
    criterion = AIKDLoss(5, 3, 4)
    assert repr(criterion) == str(criterion) == FULL_METHOD
    # In another module it is indented like any other.
    assert repr(nn.Sequential(criterion)) == "Sequential(\n  (0): " + FULL_METHOD.replace("\n", "\n  ") + "\n)"


def test_the_table_shows_the_weights_of_the_epoch_and_the_tensors_under_the_names_to_pass():
    stack = LossStack(
        {"ce": nn.CrossEntropyLoss(), "kd": DeterministicKD(), "history": ProgressiveKD(CachedTargets(5, 3))},
        weights={"ce": halving, "kd": LinearRamp(0.5, 2)},
        inputs={"kd": {"teacher_logits": "other"}, "history": {"target": None}},
    )
    stack.update(student_logits=torch.zeros(1, 3), index=torch.tensor([0]))
    stack.advance_epoch()
    assert repr(stack).startswith(STACK)


def test_alpha_is_that_of_the_epoch():
    loss = ProgressiveKD(EMATargets(5, 3, decay=0.7), alpha=LinearRamp(0.8, 4))
    loss.update(torch.zeros(1, 3), index=torch.tensor([0]))
    loss.advance_epoch()
    assert loss.extra_repr() == (
        "epoch=1, alpha=0.4 by LinearRamp(end=0.8, num_epochs=4, start=0.0), temperature=1.0, reduction='mean', class_dim=None"
    )


def test_an_adversarial_loss_shows_its_parts_without_addresses():
    discriminator = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    objective = AdversarialObjective(halving, lambda student, teacher: student, paired=True)
    adam = torch.optim.SGD(discriminator.parameters(), lr=1.0)
    loss = AdversarialDistributionLoss(
        discriminator, objective=objective, penalty=halving, optimizer=adam, class_dim=-1
    )
    assert loss.extra_repr().splitlines() == [
        "objective=AdversarialObjective, inputs='probs', temperature=1.0, reduction='mean', class_dim=-1",
        "discriminator=Sequential()",
        "penalty=falling, optimizer=SGD",
    ]
    plain = AdversarialDistributionLoss(discriminator, objective="hinge").extra_repr().splitlines()
    assert plain[0].startswith("objective='hinge', ")
    assert plain[2].startswith("penalty=None")


OF_STORE = "num_samples=5, num_classes=3, dtype=torch.float16"
SHOWN = [
    (
        DeterministicKD(divergence="js", beta=0.3),
        "DeterministicKD(temperature=2.0, divergence='js', beta=0.3, reduction='mean', class_dim=None)",
    ),
    (
        DeterministicKD(beta=0.3, class_dim=1),
        "DeterministicKD(temperature=2.0, divergence='forward_kl', reduction='mean', class_dim=1)",
    ),
    (
        ProgressiveKD(Rows()),
        "ProgressiveKD(\n  epoch=0, alpha=0.5, temperature=1.0, reduction='mean', class_dim=None\n  targets=Rows\n)",
    ),
    (FrozenTeacher(nn.Linear(2, 3)), "FrozenTeacher(Linear)"),
    (LinearRamp(0.8, 4), "LinearRamp(end=0.8, num_epochs=4, start=0.0)"),
    (GradientPenalty(), "GradientPenalty(weight=10.0)"),
    (ZeroCenteredPenalty(0.5), "ZeroCenteredPenalty(gamma=0.5)"),
    (CachedTargets(5, 3), f"CachedTargets({OF_STORE}, device=cpu)"),
    (CachedTargets(5, 3, top_k=2), f"CachedTargets({OF_STORE}, top_k=2, device=cpu)"),
    (EMATargets(5, 3, device="meta"), f"EMATargets({OF_STORE}, device=meta, decay=0.9)"),
]


@pytest.mark.parametrize(("thing", "shown"), SHOWN)
def test_settings_are_shown(thing, shown):
    assert repr(thing) == shown


def test_a_discriminator_shows_its_settings_and_its_layers():
    lines = repr(MLPDiscriminator(3, hidden=(8,))).splitlines()
    assert lines[:2] == ["MLPDiscriminator(", "  num_classes=3, hidden=(8,)"]
    assert "Linear(in_features=3, out_features=8, bias=True)" in lines[3]


def test_a_store_in_a_file_says_where_it_is(tmp_path):
    path = str(tmp_path / "targets.bin")
    assert repr(CachedTargets(5, 3, path=path)) == f"CachedTargets({OF_STORE}, path={path!r})"


def test_what_has_no_values_is_shown_without_them():
    shown = repr(AIKDLoss(5, 3, 4).to("meta"))
    assert "\n  epoch=?\n" in shown
    assert "\n  progressive: weight ?\n" in shown
    assert "epoch=?, alpha=? by LinearRamp(end=0.8, num_epochs=4, start=0.0)" in shown
