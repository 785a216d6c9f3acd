"""Names, signatures, and what importing costs."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import aikd_losses

SOURCE = Path(aikd_losses.__file__).parent

SIGNATURES = {
    "DeterministicKD": "*, temperature, divergence='forward_kl', beta=0.5, reduction='mean', class_dim=None",
    "DeterministicKD.forward": "self, student_logits, teacher_logits, *, mask=None",
    "ProgressiveKD": "targets, *, alpha, temperature=1.0, reduction='mean', class_dim=None",
    "ProgressiveKD.forward": "self, student_logits, target=None, *, index, mask=None",
    "ProgressiveKD.update": "self, student_logits, *, index, mask=None",
    "ProgressiveKD.advance_epoch": "self, epoch=None",
    "LinearRamp": "end, num_epochs",
    "LabelWeight": "weight, alpha",
    "CachedTargets": "num_samples, num_classes, *, dtype=torch.float16, device=None, top_k=None, path=None",
    "EMATargets": "num_samples, num_classes, *, decay, dtype=torch.float16, device=None, path=None",
    "CachedTargets.read": "self, index",
    "CachedTargets.write": "self, index, probs",
    "CachedTargets.advance_epoch": "self",
    "TargetStore.read": "self, index",
    "TargetStore.write": "self, index, probs",
    "TargetStore.advance_epoch": "self",
    "AdversarialDistributionLoss": (
        "discriminator, *, objective='non_saturating', inputs='probs', temperature=1.0, penalty=None, optimizer=None, "
        "reduction='mean', class_dim=None"
    ),
    **{
        f"AdversarialDistributionLoss.{name}": "self, student_logits, teacher_logits, *, mask=None, condition=None"
        for name in ("forward", "student_loss", "discriminator_loss", "update")
    },
    "MLPDiscriminator": "num_classes, *, hidden, spectral_norm",
    "FrozenTeacher": "model, *, copy=True",
    "LossStack": "terms, *, weights=None, inputs=None",
    "LossStack.forward": "self, **tensors",
    "LossStack.update": "self, **tensors",
    "LossStack.advance_epoch": "self, epoch=None",
    "AIKDLoss": "num_samples, num_classes, num_epochs, *",
    "IndexedDataset": "dataset",
    "GradientPenalty": "weight",
    "ZeroCenteredPenalty": "gamma",
    "check_setup": "criterion, *, model=None, teacher=None, optimizer=None, **tensors",
}
NAMES = {name.split(".")[0] for name in SIGNATURES} | {"AdversarialObjective", "functional"}


def test_the_public_names_are_those_of_the_design():
    assert set(aikd_losses.__all__) == NAMES
    assert sorted(aikd_losses.__all__) == aikd_losses.__all__


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_fixed(name):
    thing = aikd_losses
    for part in name.split("."):
        thing = getattr(thing, part)
    actual = inspect.signature(thing).parameters
    fixed = [part.strip() for part in SIGNATURES[name].split(",")]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = []
    for part in fixed:
        if part == "*":
            kind = inspect.Parameter.KEYWORD_ONLY
            continue
        parameter, _, default = part.removeprefix("**").partition("=")
        names.append(parameter)
        found = actual[parameter]
        assert found.kind == (inspect.Parameter.VAR_KEYWORD if part.startswith("**") else kind)
        if default:
            assert str(found.default).strip("'") == default.strip("'")
    assert [p for p in actual if p in names] == names  # in this order
    for extra in set(actual) - set(names):  # settings that were added must not be in the way
        assert actual[extra].kind == inspect.Parameter.KEYWORD_ONLY
        assert actual[extra].default is not inspect.Parameter.empty


@pytest.mark.parametrize("name", sorted(NAMES - {"functional"}))
def test_every_public_class_and_method_is_documented(name):
    thing = getattr(aikd_losses, name)
    assert len(thing.__doc__) > 80
    if name != "TargetStore":
        assert ">>>" in thing.__doc__  # and run, as all examples are
    for method, value in vars(thing).items():
        if inspect.isfunction(value) and not method.startswith("_") and method not in ("extra_repr", "train"):
            assert value.__doc__, f"{name}.{method}"


def test_every_public_function_is_documented():
    for name in aikd_losses.functional.__all__:
        thing = getattr(aikd_losses.functional, name)
        assert not inspect.isfunction(thing) or thing.__doc__


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
