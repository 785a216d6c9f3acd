"""Names, signatures, and what importing costs."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import aikd_losses

SOURCE = Path(aikd_losses.__file__).parent
OF_PAIR = "self, student_logits, teacher_logits, *, mask=None"
OF_STORE = "num_samples, num_classes, *, dtype=torch.float16, device=None, path=None, process_group=None"
COMMON = "reduction='mean', class_dim=None"
SIGNATURES = {
    "DeterministicKD": f"*, temperature=2.0, divergence='forward_kl', beta=0.5, {COMMON}",
    "DeterministicKD.forward": OF_PAIR,
    "ProgressiveKD": f"targets, *, alpha=0.5, temperature=1.0, {COMMON}",
    "ProgressiveKD.forward": (
        "self, student_logits, target=None, *, index, mask=None, partner_index=None, mix_lambda=1.0"
    ),
    "ProgressiveKD.update": "self, student_logits, *, index, mask=None, partner_index=None",
    "ProgressiveKD.advance_epoch": "self, epoch=None",
    "LinearRamp": "end, num_epochs, *, start=0.0",
    "CachedTargets": OF_STORE.replace("path", "top_k=None, path"),
    "EMATargets": OF_STORE.replace("dtype", "decay=0.9, dtype"),
    **{f"{store}.read": "self, index" for store in ("CachedTargets", "EMATargets", "TargetStore")},
    **{f"{store}.write": "self, index, probs, *, keep=None" for store in ("CachedTargets", "EMATargets")},
    **{f"{store}.advance_epoch": "self" for store in ("CachedTargets", "EMATargets", "TargetStore")},
    "TargetStore.write": "self, index, probs",
    "AdversarialDistributionLoss": (
        f"discriminator, *, objective='non_saturating', inputs='probs', temperature=1.0, penalty=None, optimizer=None, "
        f"{COMMON}, process_group=None"
    ),
    **{
        f"AdversarialDistributionLoss.{name}": f"{OF_PAIR}, condition=None"
        for name in ("forward", "student_loss", "discriminator_loss", "update")
    },
    "AdversarialObjective": "discriminator, student, paired=False",
    "GradientPenalty": "weight=10.0",
    "ZeroCenteredPenalty": "gamma=1.0",
    "MLPDiscriminator": "num_classes, *, hidden=(64, 64)",
    "FrozenTeacher": "model, *, copy=True",
    "LossStack": "terms, *, weights=None, inputs=None",
    "LossStack.forward": "self, **tensors",
    "LossStack.update": "self, **tensors",
    "LossStack.advance_epoch": "self, epoch=None",
    "AIKDLoss": (
        "num_samples, num_classes, num_epochs, *, temperature=2.0, alpha=0.8, weights=None, targets=None, "
        "discriminator=None, objective='wasserstein', penalty=GradientPenalty(weight=10.0), learning_rate=0.001, "
        f"{COMMON}, process_group=None"
    ),
    "IndexedDataset": "dataset",
    "check_setup": "criterion, *, model=None, teacher=None, optimizer=None, **tensors",
    "functional.deterministic_kd": (
        f"student_logits, teacher_logits, *, temperature=2.0, divergence='forward_kl', beta=0.5, mask=None, {COMMON}"
    ),
    "functional.linear_deterministic_kd": (
        "student_hidden, student_weight, teacher_hidden, teacher_weight, *, student_bias=None, teacher_bias=None, "
        "temperature=2.0, mask=None, reduction='mean'"
    ),
    "functional.progressive_kd": (
        f"student_logits, previous, target=None, *, alpha, known=None, temperature=1.0, mask=None, {COMMON}"
    ),
}
NAMES = sorted({name.split(".")[0] for name in SIGNATURES})


def find(name):
    thing = aikd_losses
    for part in name.split("."):
        thing = getattr(thing, part)
    return thing


def test_the_public_names_are_those_of_the_design():
    assert aikd_losses.__all__ == NAMES
    assert {f"functional.{name}" for name in aikd_losses.functional.__all__} <= SIGNATURES.keys()


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_fixed(name):
    parameters = inspect.signature(find(name)).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert str(inspect.Signature(bare))[1:-1] == SIGNATURES[name]


@pytest.mark.parametrize("name", sorted({*NAMES, *(x for x in SIGNATURES if "functional." in x)} - {"functional"}))
def test_every_public_class_and_method_is_documented(name):
    thing = find(name)
    assert len(thing.__doc__) > 80
    if name != "TargetStore":
        assert ">>>" in thing.__doc__  # and run, as all examples are
    for method, value in vars(thing).items():
        if inspect.isfunction(value) and not method.startswith("_") and method not in ("extra_repr", "train"):
            assert value.__doc__, f"{name}.{method}"


def test_nothing_but_torch_einops_and_the_standard_library_is_imported():
    allowed = set(sys.stdlib_module_names) | {"torch", "einops"}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            assert {name.split(".")[0] for name in names} <= allowed, path


def test_importing_works_without_numpy_and_pulls_in_nothing_else():
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        "import torch; before = set(sys.modules)\n"
        "import aikd_losses\n"
        "print({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names))\n"  # nor more of torch
        "c = aikd_losses.AIKDLoss(4, 3, 2); s = torch.randn(4, 3)\n"
        "c.update(student_logits=s, teacher_logits=s, index=torch.arange(4))\n"
        "aikd_losses.AIKDLoss(4, 3, 2).load_state_dict(c.state_dict())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(ast.literal_eval(done.stdout)) == {"aikd_losses", "einops"}


def test_the_package_is_typed():
    assert (SOURCE / "py.typed").exists()


def test_a_reader_takes_six_hops_from_the_call_to_the_last_operation():
    """Between distributions that are not near each other; comprehensions are not counted."""
    path, deepest, folder = [], [], str(SOURCE)

    def follow(frame, event, _):
        if frame.f_code.co_filename.startswith(folder) and not frame.f_code.co_name.startswith("<"):
            path.append(frame.f_code.co_name) if event == "call" else path.pop() if event == "return" else None
            deepest[:] = max(deepest, path, key=len)

    loss, student, teacher = aikd_losses.DeterministicKD(), torch.randn(8, 10), torch.randn(8, 10)
    sys.setprofile(follow)
    try:
        loss(student, teacher)
    finally:
        sys.setprofile(None)
    assert len(deepest) == 6, deepest
