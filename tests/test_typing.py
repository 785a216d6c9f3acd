"""What an editor is told: the types of calls, and mistakes that show before anything runs."""

from __future__ import annotations

import re
import textwrap

import pytest

import aikd_losses

# A comment says what mypy has to say about its line; of the others, nothing.
SNIPPET = """
import torch
from torch import Tensor, nn

from aikd_losses import (
    AdversarialDistributionLoss, AIKDLoss, CachedTargets, DeterministicKD, EMATargets, IndexedDataset, LinearRamp, LossStack,
    MLPDiscriminator, ProgressiveKD, TargetStore, check_setup,
)

s, t = torch.randn(4, 3), torch.randn(4, 3)
y, i = torch.zeros(4, dtype=torch.int64), torch.arange(4)

kd = DeterministicKD(temperature=2.0)
reveal_type(kd(s, t))  # "torch._tensor.Tensor"
reveal_type(kd(s, teacher_logits=t, mask=y == 0))  # "torch._tensor.Tensor"
kd(s)  # Too few arguments
kd(s, teacher=t)  # Unexpected keyword argument "teacher"
DeterministicKD(2.0)  # Too many positional arguments
DeterministicKD(temperature="2")  # expected "float"

progressive = ProgressiveKD(EMATargets(4, 3, decay=0.5), alpha=lambda epoch: 0.1 * epoch)
reveal_type(progressive(s, y, index=i))  # "torch._tensor.Tensor"
progressive(s, y)  # Missing named argument "index"
progressive(s, y, i)  # Too many positional arguments
progressive.update(s, index=None)
ProgressiveKD(nn.Linear(2, 3))  # incompatible type "Linear"; expected "TargetStore"
ProgressiveKD(CachedTargets(4, 3), alpha=LinearRamp(0.8, num_epochs=3))
store: TargetStore = CachedTargets(4, 3, top_k=2)

discriminator = MLPDiscriminator(3)
reveal_type(discriminator(s))  # "torch._tensor.Tensor"
adam = torch.optim.Adam(discriminator.parameters())
adversarial = AdversarialDistributionLoss(discriminator, objective="hinge", optimizer=adam)
reveal_type(adversarial(s, t, condition=y))  # "torch._tensor.Tensor"
reveal_type(adversarial.update(s, t))  # "torch._tensor.Tensor"
adversarial.update(s)  # Missing positional argument "teacher_logits"

criterion = AIKDLoss(num_samples=4, num_classes=3, num_epochs=2, temperature=2.0)
total, values = criterion(student_logits=s, teacher_logits=t, target=y, index=i)
reveal_type(total)  # "torch._tensor.Tensor"
reveal_type(values)  # torch._tensor.Tensor]
criterion(s, t, y, i)  # Too many positional arguments
criterion(student_logits=s, teacher_logits=t, target=y)  # Missing named argument "index"
criterion(student_logits=s, teacher=t, target=y, index=i)  # Unexpected keyword argument "teacher"
criterion.update(student_logits=s, teacher_logits=t, target=y, index=i)
criterion.update(student_logits=s, index=i)  # Missing named argument "teacher_logits"
criterion.advance_epoch()
criterion(student_logits=s, teacher_logits=t, target=y, index=i).backward()  # has no attribute "backward"
AIKDLoss(4, 3)  # Missing positional argument "num_epochs"
AIKDLoss(4, 3, 2, lr=0.1)  # Unexpected keyword argument "lr"

stack = LossStack({"ce": nn.CrossEntropyLoss(), "kd": kd}, weights={"kd": LinearRamp(0.5, 4), "ce": 0.5})
reveal_type(stack(student_logits=s, teacher_logits=t, target=y)[0])  # "torch._tensor.Tensor"
stack.update(student_logits=s)
LossStack([kd])  # incompatible type "list[DeterministicKD]"
LossStack({"kd": kd}, weights=[1.0])  # incompatible type "list[float]"

report = check_setup(criterion, model=nn.Linear(2, 3), student_logits=s)
reveal_type(report.ok)  # bool
reveal_type(report.terms[0].ratio)  # float
check_setup(criterion, optimizer=nn.Linear(2, 3))  # incompatible type "Linear"; expected
check_setup(criterion, s)  # Too many positional arguments
IndexedDataset([1, 2])
"""


@pytest.mark.slow
def test_mypy_says_what_a_user_should_be_told(tmp_path, monkeypatch):
    api = pytest.importorskip("mypy.api")
    code = textwrap.dedent(SNIPPET)
    path = tmp_path / "snippet.py"
    path.write_text(code)
    monkeypatch.setenv("MYPYPATH", str(aikd_losses.__path__[0]).removesuffix("/aikd_losses"))
    options = [
        "--strict",
        "--follow-imports=silent",
        "--config-file=",
        f"--cache-dir={tmp_path}",
        "--python-version=3.10",
    ]
    options += ["--no-color-output", "--no-error-summary", "--hide-error-context"]
    said, problems, _ = api.run([*options, str(path)])
    assert not problems
    heard: dict[int, list[str]] = {}
    for line in said.splitlines():
        found = re.fullmatch(r"\S*snippet\.py:(\d+): (?:error|note): (.*)", line)
        assert found, line
        heard.setdefault(int(found[1]), []).append(found[2])
    wanted = {number: line.partition("  # ")[2] for number, line in enumerate(code.splitlines(), 1) if "  # " in line}
    assert heard.keys() == wanted.keys(), said
    for number, text in wanted.items():
        assert any(text in message for message in heard[number]), (text, heard[number])
