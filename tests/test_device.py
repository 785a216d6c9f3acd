"""No step waits for its device: here the meta device stands in for one, as nothing can be read from it.

A `.item()`, a branch on a value, a boolean index or a copy to the host raises on it. Single losses: a law in `laws.py`.
"""

from __future__ import annotations

import pytest
import torch

from aikd_losses import AIKDLoss, CachedTargets, EMATargets, ProgressiveKD
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
    criterion.to(META).terms["adversarial"].optimizer.param_groups[0]["fused"] = False  # which the stand-in has not
    if not masked:
        del tensors["mask"]
    total, values = criterion(**tensors)
    assert {x.is_meta for x in (total, *values.values())} == {True}
    assert {x.dtype for x in (total, *values.values())} == {torch.float32}
    total.backward()
    tensors.pop("target")
    criterion.update(**tensors)


@pytest.mark.parametrize("home", [META, torch.device("cpu")])
def test_an_alpha_is_not_read_from_its_device_and_goes_to_that_of_the_logits(tensors, home):
    s, p = tensors["student_logits"], tensors["teacher_logits"].softmax(-1)
    for alpha in (torch.tensor(0.5, device=home), torch.rand(N, device=home)):
        assert progressive_kd(s, p, tensors["target"], alpha=alpha, mask=tensors["mask"]).is_meta


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
    assert loss(tensors["student_logits"], tensors["target"], index=None, mask=tensors["mask"]).is_meta


def test_rows_of_a_store_elsewhere_travel_to_the_logits(tensors):
    loss = ProgressiveKD(CachedTargets(20, C, device="cpu"))
    value = loss(tensors["student_logits"], tensors["target"], index=torch.arange(N))
    assert value.is_meta
    value.backward()
