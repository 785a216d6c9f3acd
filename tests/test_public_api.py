"""Names, signatures, and what importing costs."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import aikd_losses
from aikd_losses import (
    AdversarialDistributionLoss,
    AdversarialObjective,
    AIKDLoss,
    CachedTargets,
    DeterministicKD,
    EMATargets,
    FrozenTeacher,
    LossStack,
    MLPDiscriminator,
    ProgressiveKD,
)

SOURCE = Path(aikd_losses.__file__).parent

SIGNATURES = {
    "DeterministicKD": "*, temperature, divergence='forward_kl', beta=0.5, reduction='mean', class_dim=None",
    "DeterministicKD.forward": "self, student_logits, teacher_logits, *, mask=None",
    "ProgressiveKD": "targets, *, alpha, temperature=1.0, reduction='mean', class_dim=None",
    "ProgressiveKD.forward": "self, student_logits, target=None, *, index, mask=None",
    "ProgressiveKD.update": "self, student_logits, *, index, mask=None",
    "ProgressiveKD.advance_epoch": "self, epoch=None",
    "LinearRamp": "end, num_epochs",
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


def test_the_repr_of_every_module_shows_its_settings():
    discriminator = MLPDiscriminator(3)
    adam = torch.optim.Adam(discriminator.parameters())
    shown = {
        DeterministicKD(divergence="js", beta=0.3): "temperature=4.0, divergence='js', beta=0.3, reduction='mean'",
        ProgressiveKD(CachedTargets(5, 3, top_k=2)): "CachedTargets(5, 3, dtype=torch.float16, top_k=2",
        EMATargets(5, 3, decay=0.7): "decay=0.7",
        AdversarialDistributionLoss(discriminator, objective="hinge", optimizer=adam): (
            "discriminator=MLPDiscriminator, objective='hinge', inputs='probs', temperature=1.0, penalty=None, optimizer=Adam"
        ),
        DeterministicKD(beta=0.3): "temperature=4.0, divergence='forward_kl', reduction='mean'",
        FrozenTeacher(nn.Linear(2, 3)): "FrozenTeacher(Linear, save=False)",
        FrozenTeacher(nn.Linear(2, 3), save=True): "FrozenTeacher(Linear, save=True)",
        LossStack({"kd": DeterministicKD()}, weights={"kd": 0.3}): "weights={'kd': 0.3}",
        AIKDLoss(5, 3, 7): "alpha=LinearRamp(end=0.8, num_epochs=7)",
    }
    for module, text in shown.items():
        assert text in repr(module)


def test_the_repr_of_a_stack_and_of_an_objective_of_ones_own_says_no_more_than_there_is():
    kd = DeterministicKD()
    assert LossStack({"kd": kd}).extra_repr() == "weights={'kd': 1.0}"
    inputs = {"kd": {"teacher_logits": "other"}}
    assert LossStack({"kd": kd}, inputs=inputs).extra_repr() == f"weights={{'kd': 1.0}}, inputs={inputs}"
    own = AdversarialObjective(max, min)
    assert AdversarialDistributionLoss(MLPDiscriminator(3), objective=own).extra_repr() == (
        f"discriminator=MLPDiscriminator, objective={own!r}, inputs='probs', temperature=1.0, penalty=None, optimizer=None, "
        "reduction='mean', class_dim=None"
    )


def test_the_repr_of_a_store_says_where_it_is(tmp_path):
    path = str(tmp_path / "targets.bin")
    for store, text in (
        (CachedTargets(5, 3), "CachedTargets(5, 3, dtype=torch.float16, device=cpu)"),
        (CachedTargets(5, 3, top_k=2), "CachedTargets(5, 3, dtype=torch.float16, top_k=2, device=cpu)"),
        (CachedTargets(5, 3, path=path), f"CachedTargets(5, 3, dtype=torch.float16, path={path!r})"),
        (EMATargets(5, 3, device="meta"), "EMATargets(5, 3, dtype=torch.float16, device=meta, decay=0.9)"),
    ):
        assert repr(store) == text
