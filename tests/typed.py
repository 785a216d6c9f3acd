"""What an editor is told, read by `make types` and never run: the types of calls, and mistakes that show before anything runs.

A line that mypy has to find fault with says so, with the kind of fault; where it finds none there, that is an error.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from typing_extensions import assert_type

    import aikd_losses as al

    s, t = torch.randn(4, 3), torch.randn(4, 3)
    y, i = torch.zeros(4, dtype=torch.int64), torch.arange(4)

    kd = al.DeterministicKD(temperature=2.0)
    assert_type(kd(s, t), Tensor)
    assert_type(kd(s, teacher_logits=t, mask=y == 0), Tensor)
    kd(s)  # type: ignore[call-arg]
    kd(s, teacher=t)  # type: ignore[call-arg]
    al.DeterministicKD(2.0)  # type: ignore[call-arg]
    al.DeterministicKD(temperature="2")  # type: ignore[arg-type]

    progressive = al.ProgressiveKD(al.EMATargets(4, 3, decay=0.5), alpha=lambda epoch: 0.1 * epoch)
    assert_type(progressive(s, y, index=i), Tensor)
    progressive(s, y)  # type: ignore[call-arg]
    progressive(s, y, i)  # type: ignore[call-arg]
    progressive.update(s, index=None)
    al.ProgressiveKD(nn.Linear(2, 3))  # type: ignore[arg-type]
    al.ProgressiveKD(al.CachedTargets(4, 3), alpha=al.LinearRamp(0.8, num_epochs=3))
    store: al.TargetStore = al.CachedTargets(4, 3, top_k=2)

    discriminator = al.MLPDiscriminator(3)
    adam = torch.optim.Adam(discriminator.parameters())
    adversarial = al.AdversarialDistributionLoss(discriminator, objective="hinge", optimizer=adam)
    assert_type(adversarial(s, t, condition=y), Tensor)
    assert_type(adversarial.update(s, t), Tensor)
    adversarial.update(s)  # type: ignore[call-arg]

    criterion = al.AIKDLoss(num_samples=4, num_classes=3, num_epochs=2, temperature=2.0)
    assert_type(criterion(student_logits=s, teacher_logits=t, target=y, index=i), tuple[Tensor, dict[str, Tensor]])
    criterion(s, t, y, i)  # type: ignore[call-arg]
    criterion(student_logits=s, teacher_logits=t, target=y)  # type: ignore[call-arg]
    criterion(student_logits=s, teacher=t, target=y, index=i)  # type: ignore[call-arg]
    criterion.update(student_logits=s, teacher_logits=t, target=y, index=i)
    criterion.advance_epoch()
    criterion(student_logits=s, teacher_logits=t, target=y, index=i).backward()  # type: ignore[attr-defined]
    al.AIKDLoss(4, 3)  # type: ignore[call-arg]
    al.AIKDLoss(4, 3, 2, lr=0.1)  # type: ignore[call-arg]

    stack = al.LossStack({"ce": nn.CrossEntropyLoss(), "kd": kd}, weights={"kd": al.LinearRamp(0.5, 4), "ce": 0.5})
    assert_type(stack(student_logits=s, teacher_logits=t, target=y), tuple[Tensor, dict[str, Tensor]])
    stack.update(student_logits=s)
    al.LossStack([kd])  # type: ignore[arg-type]
    al.LossStack({"kd": kd}, weights=[1.0])  # type: ignore[arg-type]

    report = al.check_setup(criterion, model=nn.Linear(2, 3), student_logits=s)
    assert_type(report.ok, bool)
    assert_type(report.terms[0].ratio, float | None)
    al.check_setup(criterion, optimizer=nn.Linear(2, 3))  # type: ignore[arg-type]
    al.check_setup(criterion, s)  # type: ignore[call-arg, arg-type]
    al.IndexedDataset([1, 2])
