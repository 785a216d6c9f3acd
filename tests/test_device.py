"""No step waits for its device: here the meta device stands in for one, as nothing can be read from it.

A `.item()`, a branch on a value, a boolean index or a copy to the host raises on it.
"""

from __future__ import annotations

import pytest
import torch

from aikd_losses import (
    AdversarialDistributionLoss,
    AIKDLoss,
    CachedTargets,
    DeterministicKD,
    EMATargets,
    GradientPenalty,
    MLPDiscriminator,
    ProgressiveKD,
    ZeroCenteredPenalty,
)
from aikd_losses.functional import progressive_kd

META = torch.device("meta")
N, C = 6, 5


@pytest.fixture
def tensors():
    return {
        "student_logits": torch.randn(N, C, device=META, requires_grad=True),
        "teacher_logits": torch.randn(N, C, device=META),
        "target": torch.zeros(N, dtype=torch.int64, device=META),
        "index": torch.zeros(N, dtype=torch.int64, device=META),
        "mask": torch.ones(N, dtype=torch.bool, device=META),
    }


def test_reading_a_value_on_the_stand_in_raises(tensors):
    with pytest.raises(RuntimeError):
        tensors["target"].max().item()
    with pytest.raises(NotImplementedError):
        tensors["target"].cpu()
    with pytest.raises(NotImplementedError):
        tensors["target"][tensors["mask"]]


@pytest.mark.parametrize("masked", [False, True])
def test_a_whole_step_of_the_method_reads_nothing_from_the_device(tensors, masked):
    criterion = AIKDLoss(num_samples=20, num_classes=C, num_epochs=3)
    assert criterion.terms["adversarial"].optimizer.param_groups[0]["fused"]
    criterion.to(META)
    assert not criterion.terms["adversarial"].optimizer.param_groups[0]["fused"]  # the stand-in has no fused step
    there = AIKDLoss(20, C, 3, discriminator=MLPDiscriminator(C).to(META))
    assert not there.terms["adversarial"].optimizer.param_groups[0]["fused"]
    if not masked:
        del tensors["mask"]
    total, values = criterion(**tensors)
    assert total.is_meta
    assert all(value.is_meta for value in values.values())
    assert {total.dtype, *(value.dtype for value in values.values())} == {torch.float32}
    total.backward()
    tensors.pop("target")
    criterion.update(**tensors)


def test_an_alpha_on_the_device_is_not_read(tensors):
    s, p = tensors["student_logits"], tensors["teacher_logits"].softmax(-1)
    for alpha in (torch.tensor(0.5, device=META), torch.rand(N, device=META)):
        assert progressive_kd(s, p, tensors["target"], alpha=alpha).is_meta
    nothing = progressive_kd(torch.zeros(0, C), torch.zeros(0, C), alpha=torch.zeros(0))
    assert nothing == 0


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js"])
def test_every_divergence_reads_nothing_from_the_device(tensors, divergence):
    loss = DeterministicKD(divergence=divergence)
    loss(tensors["student_logits"], tensors["teacher_logits"], mask=tensors["mask"]).backward()
    assert tensors["student_logits"].grad.shape == (N, C)


@pytest.mark.parametrize(
    "store", [CachedTargets(20, C), CachedTargets(20, C, top_k=2), EMATargets(20, C)], ids=["cached", "top_k", "ema"]
)
def test_every_store_is_read_and_written_without_reading_the_device(tensors, store):
    loss = ProgressiveKD(store).to(META)
    loss(tensors["student_logits"], tensors["target"], index=tensors["index"], mask=tensors["mask"]).backward()
    loss.update(tensors["student_logits"], index=tensors["index"], mask=tensors["mask"])
    store.write(tensors["index"], torch.rand(N, C, device=META))  # the caller vouches for what cannot be looked at
    blended = loss(tensors["student_logits"], index=tensors["index"], partner_index=tensors["index"], mix_lambda=0.3)
    assert blended.is_meta
    here = ProgressiveKD(CachedTargets(20, C, device="cpu"))
    assert here(tensors["student_logits"], tensors["target"], index=torch.arange(N)).is_meta  # rows that travel
    without_ids = loss(tensors["student_logits"], tensors["target"], index=None, mask=tensors["mask"])
    assert without_ids.is_meta


def test_rows_of_a_store_elsewhere_travel_to_the_logits(tensors):
    loss = ProgressiveKD(CachedTargets(20, C, device="cpu"))
    value = loss(tensors["student_logits"], tensors["target"], index=torch.arange(N))
    assert value.is_meta
    value.backward()
    with torch.device("meta"):
        there = ProgressiveKD(CachedTargets(20, C))
    read = there._read_ours(torch.arange(N))  # the other way round: ids travel to the store
    assert read[0].is_meta


def test_a_criterion_on_the_meta_device_loads_one_that_is_there_too():
    with torch.device("meta"):
        one, other = (AIKDLoss(20, C, 3, discriminator=MLPDiscriminator(C)).to("meta") for _ in range(2))
    states = [loss.state_dict() for loss in (one.terms["progressive"], other.terms["progressive"])]
    assert states[0].keys() == states[1].keys()
    one.terms["progressive"].load_state_dict({name: x.to("meta") for name, x in states[1].items()})


@pytest.mark.parametrize("objective", ["non_saturating", "least_squares", "hinge", "wasserstein", "relativistic"])
@pytest.mark.parametrize("penalty", [None, GradientPenalty(10.0), ZeroCenteredPenalty(1.0)])
def test_every_objective_and_penalty_reads_nothing_from_the_device(tensors, objective, penalty):
    discriminator = MLPDiscriminator(C)
    loss = AdversarialDistributionLoss(discriminator, objective=objective, penalty=penalty).to(META)
    logits = tensors["student_logits"], tensors["teacher_logits"]
    loss(*logits, mask=tensors["mask"]).backward()
    assert loss.discriminator_loss(*logits, mask=tensors["mask"]).is_meta


def test_an_alpha_that_is_a_number_goes_everywhere_and_one_a_position_does_not():
    s, p = torch.randn(3, 4, device="meta"), torch.rand(3, 4, device="meta")
    assert progressive_kd(s, p, alpha=torch.tensor(0.5)).is_meta
    with pytest.raises(ValueError, match="`alpha` must be on the device of `student_logits`, meta; got cpu"):
        progressive_kd(s, p, alpha=torch.full((3,), 0.5))
    with pytest.raises(ValueError, match="`alpha` must be on the device of `student_logits`, cpu; got meta"):
        progressive_kd(torch.randn(3, 4), torch.rand(3, 4), alpha=torch.tensor(0.5, device="meta"))
