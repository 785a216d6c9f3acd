"""What is state, who changes it and when, and that nothing of it is lost."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from aikd_losses import (
    AdversarialDistributionLoss,
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
)

N, C, BATCH = 16, 4, 8
X, Y = torch.randn(N, 6, generator=torch.Generator().manual_seed(0)), torch.arange(N) % C


def network():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, C))


def pretrained():
    torch.manual_seed(8)
    return FrozenTeacher(nn.Linear(6, C))


def build(num_epochs=6, targets=None):
    torch.manual_seed(9)
    return AIKDLoss(N, C, num_epochs, discriminator=MLPDiscriminator(C, hidden=(8,)), targets=targets)


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "fused adam": lambda p: torch.optim.Adam(p, lr=0.05, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.5),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.05, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
    "tensors": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.05)),
}


def adversarial(optimizer="adam", hidden=(8,), **settings):
    discriminator = MLPDiscriminator(C, hidden=hidden)
    return AdversarialDistributionLoss(
        discriminator, optimizer=OPTIMIZERS[optimizer](discriminator.parameters()), **settings
    )


def train(model, optimizer, criterion, epochs, update="after", teacher=None):
    """`epochs` of a whole loop, each with randomness of its own; `update` says where `criterion.update` stands."""
    teacher = teacher or pretrained()
    gradients = []
    for epoch in epochs:
        torch.manual_seed(100 + epoch)
        for index in torch.randperm(N).split(BATCH):
            s, t = model(X[index]), teacher(X[index])
            given = dict(student_logits=s, teacher_logits=t, index=index)
            loss, _ = criterion(**given, target=Y[index])
            optimizer.zero_grad()
            if update == "before":
                criterion.update(**given)
            loss.backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
            if update == "between":
                criterion.update(**given)
            optimizer.step()
            if update == "after":
                criterion.update(**given)
        criterion.advance_epoch()
    return gradients


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


# ------------------------------------------------------------------------------------------------ hidden from wrappers


def test_store_discriminator_and_teacher_are_found_by_no_wrapper():
    class Everything(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.criterion, self.teacher = network(), build(), pretrained()

    everything = Everything()
    discriminator = everything.criterion.terms["adversarial"].discriminator
    assert len(list(everything.parameters())) == len(list(everything.model.parameters()))
    assert len(list(everything.buffers())) == len(list(everything.model.buffers()))
    assert discriminator not in list(everything.modules())
    assert everything.teacher.model not in list(everything.modules())
    assert list(everything.criterion.parameters()) == list(everything.criterion.buffers()) == []
    assert list(everything.teacher.state_dict()) == []


def test_what_is_saved_are_facts_and_not_what_follows_from_them():
    state = build().state_dict()
    assert {
        "epoch",
        "terms.progressive.epoch",
        "terms.progressive.targets.rows",
        "terms.progressive.targets.known",
        "terms.adversarial.discriminator.layers.0.weight",
        "terms.adversarial.optimizer.state.layers.0.weight.exp_avg",
        "terms.adversarial.optimizer.param_groups.0.lr",
    } <= set(state)
    assert state["epoch"].dtype == state["terms.progressive.epoch"].dtype == torch.int64
    assert not [name for name in state if re.search("alpha|weights|fused|amsgrad|foreach", name)]
    assert all(isinstance(value, torch.Tensor) for value in state.values())


def shapes(state):
    return {name: (x.shape, x.dtype) for name, x in state.items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_names_shapes_and_types_of_a_checkpoint_depend_on_the_settings_alone(optimizer):
    loss = adversarial(optimizer)
    loss.discriminator.layers[0].weight.requires_grad_(False)  # which gets no state
    before = loss.state_dict()
    torch.optim.lr_scheduler.OneCycleLR(loss.optimizer, 0.1, 10, cycle_momentum=False)  # puts numbers of its own there
    for _ in range(3):
        loss.update(*torch.randn(2, 8, C))
    assert shapes(loss.state_dict()) == shapes(before)
    first = [name for name in before if name.startswith("optimizer.state.layers.0.weight.")]
    moments = {"sgd": 0, "momentum": 1, "amsgrad": 4, "adagrad": 2}.get(optimizer, 3)
    assert len(first) == 1 + moments
    assert not loss.state_dict()["optimizer.state.layers.0.weight.started"] or optimizer == "adagrad"
    assert loss.state_dict()["optimizer.state.layers.2.weight.started"] == (optimizer != "sgd")


@pytest.mark.parametrize("cast", ["double", "bfloat16", "half"])
def test_a_cast_reaches_the_discriminator_and_its_optimizer_and_never_store_alpha_or_epoch(cast):
    criterion = build()
    train(network(), sgd(network()), criterion, range(2))
    progressive, loss = criterion.terms["progressive"], criterion.terms["adversarial"]
    rows, alpha = progressive.targets.rows.clone(), progressive.alpha.clone()
    getattr(criterion, cast)()
    dtype = next(loss.discriminator.parameters()).dtype
    assert dtype == getattr(torch, {"double": "float64", "half": "float16"}.get(cast, cast))
    state = list(loss.optimizer.state.values())
    assert len(state) == len(list(loss.discriminator.parameters()))
    assert all(moments["exp_avg"].dtype == dtype for moments in state)
    assert all(p in loss.optimizer.state for p in loss.discriminator.parameters())
    assert same(progressive.targets.rows, rows)
    assert same(progressive.alpha, alpha)
    assert progressive.alpha.dtype == torch.float64
    assert progressive.epoch.dtype == criterion.epoch.dtype == torch.int64
    if cast == "double":
        train(network(), sgd(network()), criterion, range(2, 3))


def test_a_checkpoint_loaded_before_the_move_moves_with_the_discriminator():
    criterion = build()
    train(network(), sgd(network()), criterion, range(1))
    fresh = build()
    fresh.load_state_dict(criterion.state_dict())
    fresh.to("meta")
    loss = fresh.terms["adversarial"]
    assert all(moments["exp_avg"].is_meta for moments in loss.optimizer.state.values())
    assert all(p.is_meta for p in loss.discriminator.parameters())
    assert fresh.terms["progressive"].targets.rows.is_meta
    assert fresh.terms["progressive"].alpha.is_meta
    assert fresh.epoch.is_meta
    held = {id(p) for group in loss.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in loss.discriminator.parameters()} == {id(p) for p in loss.optimizer.state}


def test_train_and_eval_reach_the_discriminator():
    criterion = build()
    discriminator = criterion.terms["adversarial"].discriminator
    criterion.eval()
    assert not discriminator.training
    criterion.train()
    assert discriminator.training


# -------------------------------------------------------------------------------------------------------------- resume


def by_torch(saved, fresh, path):
    torch.save(saved.state_dict(), path)
    fresh.load_state_dict(torch.load(path, weights_only=True))


def by_safetensors(saved, fresh, path):
    safetensors.torch.save_file(saved.state_dict(), path)
    fresh.load_state_dict(safetensors.torch.load_file(path))


def by_dcp(saved, fresh, path):
    dcp.save(saved.state_dict(), checkpoint_id=path)
    state = fresh.state_dict()
    dcp.load(state, checkpoint_id=path)  # in place
    fresh.load_state_dict(state)


def by_dcp_as_stateful(saved, fresh, path):
    dcp.save({"criterion": saved}, checkpoint_id=path)
    dcp.load({"criterion": fresh}, checkpoint_id=path)


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")  # a single process
@pytest.mark.parametrize(
    ("targets", "used"), [(None, 1), (lambda: EMATargets(N, C), 0), (lambda: CachedTargets(N, C, top_k=2), 1)]
)
@pytest.mark.parametrize("travel", [by_torch, by_safetensors, by_dcp, by_dcp_as_stateful])
def test_resumed_training_is_uninterrupted_training_bit_for_bit(travel, targets, used, tmp_path):
    def start():
        model = network()
        return model, sgd(model), build(targets=targets and targets())

    straight, first, second = start(), start(), start()
    train(*straight, range(5))
    train(*first, range(2))
    train(*second, range(used))
    for i in range(2):
        second[i].load_state_dict(copy.deepcopy(first[i].state_dict()))
    travel(first[2], second[2], tmp_path / "checkpoint")
    train(*second, range(2, 5))

    for a, b in zip(straight, second, strict=True):
        assert same(a.state_dict(), b.state_dict())
    ours, theirs = (c.terms["adversarial"].optimizer.state_dict() for c in (straight[2], second[2]))
    assert same(ours, theirs)
    assert same(straight[2].terms["progressive"].alpha, second[2].terms["progressive"].alpha)


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
@pytest.mark.parametrize("travel", [by_torch, by_dcp])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("steps", "used"), [(0, 2), (3, 0), (3, 2)])
def test_every_optimizer_goes_on_where_it_was(travel, optimizer, steps, used, tmp_path):
    straight, second = adversarial(optimizer), adversarial(optimizer)
    second.load_state_dict(copy.deepcopy(straight.state_dict()))
    pairs = torch.randn(6, 2, 8, C)
    for pair in pairs[:steps]:
        straight.update(*pair)
    for pair in pairs[:used]:
        second.update(*-pair)
    travel(straight, second, tmp_path / "checkpoint")
    for pair in pairs[steps:]:
        straight.update(*pair)
        second.update(*pair)
    assert same(straight.state_dict(), second.state_dict())
    assert same(straight.optimizer.state_dict(), second.optimizer.state_dict())


def test_numbers_of_an_optimizer_are_saved_and_its_switches_are_not():
    saved, own = adversarial(), adversarial("fused adam")
    saved.optimizer.param_groups[0].update(
        lr=np.float64(0.01), betas=(np.float32(0.5), 0.75), weight_decay=np.int64(3), foreach=True
    )
    assert saved.state_dict()["optimizer.param_groups.0.betas"].tolist() == [0.5, 0.75]
    own.load_state_dict(saved.state_dict())
    (group,) = own.optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.01, (0.5, 0.75), 3)
    assert [type(x) for x in (group["lr"], *group["betas"])] == [float, float, float]
    assert (group["fused"], group["foreach"]) == (True, None)
    saved.optimizer.param_groups[0]["weight_decay"] = 0.5  # where an int is
    own.load_state_dict(saved.state_dict())
    assert group["weight_decay"] == 0.5
    tensors = adversarial("tensors")
    rate = tensors.optimizer.param_groups[0]["lr"]
    tensors.load_state_dict({**tensors.state_dict(), "optimizer.param_groups.0.lr": torch.tensor(0.5).double()})
    assert rate == 0.5  # in place, where a captured step would look


def test_schedules_are_worked_out_anew_so_that_a_longer_run_resumes_right():
    short, long = build(num_epochs=4), build(num_epochs=10)
    train(network(), sgd(network()), short, range(3))
    long.load_state_dict(short.state_dict())
    assert float(long.terms["progressive"].alpha) == pytest.approx(0.8 * 4 / 10)


def test_a_checkpoint_that_does_not_fit_the_discriminator_is_refused_by_the_names_of_its_tensors():
    full = adversarial().state_dict()
    plain = {key: x for key, x in full.items() if not key.startswith("optimizer")}
    with torch.device("meta"):
        empty = AdversarialDistributionLoss(MLPDiscriminator(C, hidden=(8,)))
    for loss, name in ((empty, "discriminator"), (nn.ModuleDict({"a": empty}), "a.discriminator")):
        with pytest.raises(RuntimeError) as error:
            loss.load_state_dict({name.removesuffix("discriminator") + key: x for key, x in plain.items()})
        assert f"`{name}.layers.0.weight` in the checkpoint is torch.float32" in str(error.value)
        assert "without values (meta)" in str(error.value)
    with pytest.raises(
        RuntimeError, match=r"`discriminator.layers.0.weight` in the checkpoint is torch.float32 of shape"
    ):
        AdversarialDistributionLoss(MLPDiscriminator(C, hidden=(9,))).load_state_dict(plain)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "discriminator.label".'):
        adversarial().load_state_dict({**full, "discriminator.label": torch.zeros(1)})
    loss, without = adversarial(), {key: x for key, x in full.items() if key != "discriminator.layers.0.weight"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "discriminator.layers.0.weight".'):
        loss.load_state_dict(without)
    assert loss.load_state_dict(without, strict=False).missing_keys == ["discriminator.layers.0.weight"]
    assert torch.equal(loss.discriminator.layers[2].weight, full["discriminator.layers.2.weight"])
    assert empty.load_state_dict({key: x.to("meta") for key, x in plain.items()})  # nothing to be lost


def put(x, value):
    x = x.clone()
    x.view(-1)[-1] = value
    return x


MOMENT, SQUARES, STEP = (f"optimizer.state.layers.2.weight.{name}" for name in ("exp_avg", "exp_avg_sq", "step"))
RATE, BETAS = "optimizer.param_groups.0.lr", "optimizer.param_groups.0.betas"
NOT_NEGATIVE = "must be finite and not negative; got -"


@pytest.mark.parametrize("optimizer", ["adam", "fused adam"])
@pytest.mark.parametrize(
    ("key", "wrong", "message"),
    [
        (
            MOMENT,
            lambda x: x[..., :3],
            r"is torch.float32 of shape \(1, 3\); here it is torch.float32 of shape \(1, 8\)",
        ),
        (MOMENT, lambda x: x[..., :1].expand(4, 8), r"is torch.float32 of shape \(4, 8\); here"),
        (SQUARES, lambda x: x.double(), r"is torch.float64 of shape \(1, 8\); here it is torch.float32"),
        (STEP, lambda x: x.expand(3), r"is torch.float32 of shape \(3,\); here it is torch.float32 of shape \(\)"),
        (MOMENT, lambda x: x.to_sparse(), "is torch.float32 of shape .1, 8. and torch.sparse_coo; here"),
        (MOMENT, lambda x: x.to("meta"), "is torch.float32 of shape .1, 8. without values .meta.; here"),
        (RATE, float, "is float; here it is torch.float64"),
        (RATE, lambda x: x.float(), r"is torch.float32 of shape \(\); here it is torch.float64"),
        (RATE, lambda x: put(x, torch.nan), "must be finite and .* got nan to nan"),
        (RATE, lambda x: put(x, torch.inf), "must be finite and .* got inf to inf"),
        (RATE, lambda x: put(x, -0.1), NOT_NEGATIVE),
        (BETAS, lambda x: put(x, -0.5), r"must be finite and not negative; got -0.5 to 0.9"),
        (MOMENT, lambda x: put(x, torch.nan), "must be finite; got nan"),
        (SQUARES, lambda x: put(x, -1e-9), NOT_NEGATIVE),
        (STEP, lambda x: put(x, -1), NOT_NEGATIVE),
        ("discriminator.layers.2.bias", lambda x: x.expand(2), r"is torch.float32 of shape \(2,\)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(optimizer, key, wrong, message):
    saved, loss = adversarial(), adversarial(optimizer)
    for each in (saved, loss):
        each.update(*torch.randn(2, 8, C))
    before, groups = copy.deepcopy(loss.state_dict()), copy.deepcopy(loss.optimizer.state_dict())
    state = {**saved.state_dict(), key: wrong(saved.state_dict()[key])}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=f"`{key}` in the checkpoint {message}"):
            loss.load_state_dict(state, strict=strict)
    stack = LossStack({"before": ProgressiveKD(CachedTargets(N, C)), "a": loss})
    fine = LossStack({"before": ProgressiveKD(CachedTargets(N, C)), "a": saved})
    fine.epoch.fill_(3)
    with pytest.raises(RuntimeError, match=message):
        stack.load_state_dict({**fine.state_dict(), f"terms.a.{key}": state[key]})
    assert int(stack.epoch) == 0
    assert same(loss.state_dict(), before)
    assert same(loss.optimizer.state_dict(), groups)


def test_an_optimizers_state_is_loaded_whole_or_not_at_all():
    loss, saved = adversarial(), adversarial()
    saved.update(*torch.randn(2, 8, C))
    full = saved.state_dict()
    without = {key: x for key, x in full.items() if key != MOMENT}
    criterion, before = nn.ModuleDict({"a": loss}), copy.deepcopy(loss.optimizer.state_dict())
    renamed = {f"a.{key}": x for key, x in without.items()}
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "a.{MOMENT}"\.'):
        criterion.load_state_dict(renamed)
    assert criterion.load_state_dict(renamed, strict=False).missing_keys == [f"a.{MOMENT}"]
    assert same(loss.optimizer.state_dict(), before)
    assert same(loss.discriminator.state_dict(), saved.discriminator.state_dict())  # of which there was all
    none = AdversarialDistributionLoss(MLPDiscriminator(C, hidden=(8,)))
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "optimizer.state.layers.0.weight.'):
        none.load_state_dict(full)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "optimizer.state.layers.0.weight.'):
        loss.load_state_dict(none.state_dict())


@pytest.mark.parametrize("filtered", [False, True])
def test_a_state_of_smaller_parameters_does_not_reach_the_fused_step(filtered):
    """Which writes past the end of what is too small, and does not always survive it."""
    code = f"""
import torch
from aikd_losses import AdversarialDistributionLoss, MLPDiscriminator
def build(width):
    discriminator = MLPDiscriminator({C}, hidden=(width, width))
    adam = torch.optim.Adam(discriminator.parameters(), fused=True)
    return AdversarialDistributionLoss(discriminator, optimizer=adam)
narrow, wide = build(8), build(256)
narrow.update(*torch.randn(2, 8, {C}))
state = narrow.state_dict()
if {filtered}:
    state = {{key: x for key, x in state.items() if key.startswith("optimizer")}}
try:
    wide.load_state_dict(state, strict=not {filtered})
except RuntimeError as error:
    print("optimizer.state.layers.0.weight.exp_avg` in the checkpoint is" in str(error))
for _ in range(5):
    wide.update(*torch.randn(2, 8, {C}))
print(all(moments["exp_avg"].shape == p.shape for p, moments in wide.optimizer.state.items()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, ["True", "True"]), done.stderr


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_criterion_is_whole_and_independent(copied):
    criterion = build()
    train(network(), sgd(network()), criterion, range(2))
    before = copy.deepcopy(criterion.state_dict())
    clone = copied(criterion)
    assert same(clone.state_dict(), before)
    model, other = network(), network()
    train(other, sgd(other), clone, range(2, 4))
    assert same(criterion.state_dict(), before)
    train(model, sgd(model), criterion, range(2, 4))
    assert same(clone.state_dict(), criterion.state_dict())
    assert same(model.state_dict(), other.state_dict())


# ------------------------------------------------------------------------------------- update, wherever it stands


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(8), spectral_norm(nn.Linear(8, 8))], ids=["batch norm", "spectral norm"]
)
def test_update_before_or_after_backward_and_step_is_the_same_bit_for_bit(layer):
    runs = {}
    for where in ("before", "between", "after"):
        torch.manual_seed(9)
        discriminator = nn.Sequential(nn.Linear(C, 8), copy.deepcopy(layer), nn.ReLU(), nn.Linear(8, 1))
        model, criterion = network(), AIKDLoss(N, C, 6, discriminator=discriminator)
        gradients = train(model, sgd(model), criterion, range(3), update=where)
        runs[where] = (gradients, model.state_dict(), criterion.state_dict())
    assert same(runs["before"], runs["after"])
    assert same(runs["between"], runs["after"])


@pytest.mark.parametrize("inside", [False, True])
def test_update_inside_autocast_is_the_same_step(inside):
    torch.manual_seed(3)
    loss = AIKDLoss(N, C, 2).terms["adversarial"]
    s, t = torch.randn(2, 8, C)
    twin = copy.deepcopy(loss)
    torch.manual_seed(4)
    loss.update(s, t)
    torch.manual_seed(4)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        twin.update(s, t)
    assert same(dict(loss.discriminator.named_parameters()), dict(twin.discriminator.named_parameters()))


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.label, self.score = nn.Embedding(C, 3), nn.Linear(C + 3, 1)

    def forward(self, x, condition):
        return self.score(torch.cat([x, self.label(condition)], -1))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "discriminator", [MLPDiscriminator(C), Conditional(), nn.Sequential(nn.BatchNorm1d(C), nn.Linear(C, 1))]
)
def test_without_a_graph_the_discriminator_is_trained_all_the_same(mode, discriminator):
    discriminator = copy.deepcopy(discriminator)
    loss = AdversarialDistributionLoss(
        discriminator, penalty=GradientPenalty(), optimizer=torch.optim.Adam(discriminator.parameters())
    )
    twin = copy.deepcopy(loss)
    given = dict(zip(("student_logits", "teacher_logits"), torch.randn(2, 8, C), strict=True))
    given |= {"mask": torch.arange(8) > 1}
    given |= {"condition": torch.arange(8) % C} if isinstance(discriminator, Conditional) else {}

    def step(loss, **given):
        torch.manual_seed(1)
        values = loss.discriminator_loss(**given), loss(**given), loss.update(**given)
        return [value.detach() for value in values], values[0].requires_grad

    expected, _ = step(twin, **given)
    with mode():
        found, with_a_graph = step(loss, **{name: x.clone() for name, x in given.items()})
    assert not with_a_graph
    assert same(found, expected)
    assert same(loss.state_dict(), twin.state_dict())


# --------------------------------------------------------------------------------------------- who moves the discriminator


@pytest.mark.parametrize("objective", ["non_saturating", "least_squares", "hinge", "wasserstein", "relativistic"])
def test_the_students_loss_leaves_neither_gradient_nor_buffer_on_the_discriminator(objective):
    discriminator = nn.Sequential(nn.Linear(C, 8), nn.BatchNorm1d(8), spectral_norm(nn.Linear(8, 1)))
    loss = AdversarialDistributionLoss(discriminator, objective=objective, penalty=GradientPenalty(10.0))
    buffers = copy.deepcopy(dict(discriminator.named_buffers()))
    s, t = torch.randn(8, C, requires_grad=True), torch.randn(8, C, requires_grad=True)
    loss(s, t).backward()
    assert all(p.grad is None for p in discriminator.parameters())
    assert all(p.requires_grad for p in discriminator.parameters())
    assert same(buffers, dict(discriminator.named_buffers()))
    assert s.grad.abs().sum() > 0
    assert t.grad is None
    loss.discriminator_loss(s.detach().requires_grad_(), t).backward()
    assert same(buffers, dict(discriminator.named_buffers()))
    assert t.grad is None


def test_what_a_mask_hides_of_the_teacher_is_not_shown_by_a_paired_objective():
    loss = AdversarialDistributionLoss(MLPDiscriminator(C), objective="relativistic")
    s, t, mask = torch.randn(8, C, requires_grad=True), torch.randn(8, C), torch.arange(8) < 6
    t[7] = torch.nan
    value = loss(s, t, mask=mask)
    torch.testing.assert_close(value, loss(s[:6], t[:6]))
    value.backward()
    assert s.grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_students_gradient_is_that_of_the_loss_times_what_comes_from_above(reduction):
    loss = first_logit(reduction=reduction)  # of which the student minimises minus the first logit
    s = torch.randn(8, C, requires_grad=True)
    (3.0 * loss(s, torch.randn(8, C)).sum()).backward()
    expected = torch.zeros(8, C)
    expected[:, 0] = -3.0 / (8 if reduction == "mean" else 1)
    torch.testing.assert_close(s.grad, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_students_second_derivative_is_the_closed_form_whatever_update_does_before_it(reduction):
    loss = first_logit(reduction=reduction, objective="non_saturating")  # softplus(-z) of the first logit z
    s, v = torch.randn(8, C, requires_grad=True), torch.randn(8, C)
    (slope,) = torch.autograd.grad(loss(s, torch.randn(8, C)), s, create_graph=True)
    loss.update(*torch.randn(2, 8, C))
    (curved,) = torch.autograd.grad((slope * v).sum(), s)
    q = torch.sigmoid(s.detach()[:, 0])
    expected = torch.zeros(8, C)
    expected[:, 0] = q * (1 - q) * v[:, 0] / (8 if reduction == "mean" else 1)
    torch.testing.assert_close(curved, expected)


def test_update_moves_parameters_and_buffers_and_leaves_no_gradient():
    discriminator = nn.Sequential(nn.Linear(C, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    discriminator.register_parameter("spare", nn.Parameter(torch.zeros(1)))
    loss = AdversarialDistributionLoss(discriminator, optimizer=torch.optim.SGD(discriminator.parameters(), lr=0.1))
    discriminator.spare.grad = torch.ones(1)  # somebody else's
    before = copy.deepcopy(discriminator.state_dict())
    s = torch.randn(8, C, requires_grad=True)
    value = loss.update(s, torch.randn(8, C))
    after = discriminator.state_dict()
    assert not any(same(before[k], after[k]) for k in ("0.weight", "1.running_mean", "2.weight"))
    assert same(before["spare"], after["spare"])
    assert all(p.grad is None for p in discriminator.parameters())
    assert s.grad is None
    assert not value.requires_grad


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    ],
    ids=["sgd", "adamw"],
)
def test_a_students_optimizer_that_wrongly_holds_the_discriminator_moves_nothing_of_it(optimizer):
    def run(wrongly):
        model, criterion = network(), build()
        held = list(criterion.terms["adversarial"].discriminator.parameters()) if wrongly else []
        train(model, optimizer([*model.parameters(), *held]), criterion, range(3))
        return model.state_dict(), criterion.state_dict()

    assert same(run(wrongly=True), run(wrongly=False))


def test_rows_with_nan_or_inf_are_not_shown_to_the_discriminator():
    s, t = torch.randn(8, C), torch.randn(8, C)
    clean = adversarial()
    spoilt = copy.deepcopy(clean)
    kept = torch.tensor([0, 1, 3, 4, 6])
    s[2, 0], t[5, 1], s[7] = torch.nan, torch.inf, -torch.inf
    expected = clean.update(s[kept], t[kept])
    torch.testing.assert_close(spoilt.update(s, t), expected)
    for a, b in zip(spoilt.discriminator.parameters(), clean.discriminator.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def first_logit(**settings):
    """A discriminator whose score is the first logit, so that what it is shown decides."""
    discriminator = nn.Linear(C, 1)
    with torch.no_grad():
        discriminator.weight.copy_(torch.eye(C)[:1])
        discriminator.bias.zero_()
    sgd = torch.optim.SGD(discriminator.parameters(), lr=0.5)
    settings = {"objective": "wasserstein", **settings}
    return AdversarialDistributionLoss(discriminator, inputs="logits", optimizer=sgd, **settings)


def test_a_stack_has_the_health_of_its_terms_by_their_names():
    criterion = build()
    train(network(), sgd(network()), criterion, range(1))
    own = criterion.terms["adversarial"].diagnostics()
    assert criterion.diagnostics() == {f"adversarial/{name}": value for name, value in own.items()}
    assert own


def test_a_discriminator_may_be_conditional():
    discriminator = Conditional()
    loss = AdversarialDistributionLoss(
        discriminator, objective="non_saturating", optimizer=torch.optim.SGD(discriminator.parameters(), lr=0.1)
    )
    s, t, y = torch.randn(8, C), torch.randn(8, C), torch.arange(8) % C
    mask = torch.arange(8) < 6
    masked = y.masked_fill(~mask, -100)  # which no embedding has
    expected = F.softplus(-discriminator(s.softmax(-1), y))[:6].mean()
    torch.testing.assert_close(loss(s, t, mask=mask, condition=masked), expected)
    torch.testing.assert_close(loss.student_loss(s, t, mask=mask, condition=masked), expected)
    each = AdversarialDistributionLoss(discriminator, reduction="none")
    torch.testing.assert_close(each(s, t, condition=y), F.softplus(-discriminator(s.softmax(-1), y)).flatten())
    loss.penalty = lambda score, teacher, student: 3 * score(teacher)
    of_teacher, of_student = discriminator(t.softmax(-1), y)[:6], discriminator(s.softmax(-1), y)[:6]
    expected = (F.softplus(-of_teacher) + F.softplus(of_student) + 3 * of_teacher).mean()
    s[6], t[7] = torch.nan, torch.nan  # where the mask hides it
    torch.testing.assert_close(loss.discriminator_loss(s, t, mask=mask, condition=masked), expected)
    before = discriminator.label.weight.clone()
    torch.testing.assert_close(loss.update(s, t, mask=mask, condition=masked), expected.detach())
    assert not same(before, discriminator.label.weight)


# ------------------------------------------------------------------------------------------------------- epochs, warnings


def progressive(**settings):
    return ProgressiveKD(CachedTargets(N, C), alpha=LinearRamp(0.8, 4), **settings)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: AIKDLoss(N + 2, C, 4),
            r"`terms.progressive.targets.rows` in the checkpoint is torch.float16 of shape",
        ),
        (lambda: AIKDLoss(N, C, 4, targets=CachedTargets(N, C, dtype=torch.float32)), r"is torch.float32 of shape"),
        (
            lambda: AIKDLoss(N, C, 4, targets=CachedTargets(N, C, top_k=C)),
            r"targets.classes` is in the checkpoint, and",
        ),
        (
            lambda: AIKDLoss(N, C, 4, discriminator=MLPDiscriminator(C, hidden=(5, 5))),
            r"`terms.adversarial.discriminator.layers.0.weight` in the checkpoint is torch.float32 of shape \(5, ",
        ),
    ],
    ids=["samples", "storage type", "top_k", "discriminator"],
)
def test_of_a_criterions_checkpoint_that_does_not_fit_nothing_is_loaded(other, message):
    criterion, saved = AIKDLoss(N, C, 4), other()
    saved.update(student_logits=torch.randn(4, C), teacher_logits=torch.randn(4, C), index=torch.arange(4))
    saved.advance_epoch()
    model = nn.ModuleDict({"criterion": criterion})
    before = copy.deepcopy(criterion.state_dict())
    for load in (
        lambda: criterion.load_state_dict(saved.state_dict()),
        lambda: model.load_state_dict({f"criterion.{k}": v for k, v in saved.state_dict().items()}, strict=False),
    ):
        with pytest.raises(RuntimeError, match=message.replace("`terms", "`(criterion.)?terms")):
            load()
        assert same(criterion.state_dict(), before)


def test_alpha_follows_the_epoch_and_a_number_says_which():
    loss = progressive()
    seen = [float(loss.alpha)]
    for epoch in (None, 1, None, 2, 3, 3):  # 1 and 3 are there already
        loss.update(torch.randn(1, C), index=torch.tensor([0]))
        loss.advance_epoch(epoch)
        seen.append(float(loss.alpha))
    assert seen == pytest.approx([0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8])
    assert int(loss.epoch) == 3


def test_alpha_out_of_range_in_a_later_epoch_changes_nothing():
    loss = ProgressiveKD(CachedTargets(N, C), alpha=lambda epoch: 0.6 * (epoch + 1))
    loss.update(torch.randn(1, C), index=torch.tensor([0]))
    with pytest.raises(ValueError, match=r"`alpha\(1\)` must be in the interval \[0, 1\]; got 1.2"):
        loss.advance_epoch()
    assert int(loss.epoch) == 0
    assert float(loss.alpha) == pytest.approx(0.6)


def test_an_epoch_without_an_update_is_warned_of():
    loss = progressive()
    said = re.escape(
        "`advance_epoch` was called, but nothing was written since the last time: call `update(student_logits, index=index)` "
        "in every training step."
    )
    with pytest.warns(UserWarning, match=f"^{said}$"):
        loss.advance_epoch()
    loss.update(torch.randn(2, C), index=torch.tensor([1, 2]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss.advance_epoch()
        loss.advance_epoch(2)  # there already
    with pytest.warns(UserWarning, match=f"^{said}$"):
        loss.advance_epoch()


def test_updates_without_an_epoch_are_warned_of_once():
    loss = progressive()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(8):
            loss.update(torch.randn(N, C), index=torch.arange(N))
            assert len(caught) == (step >= 4)  # four epochs of rows may go by
    assert caught[0].category is UserWarning
    assert str(caught[0].message) == (
        "`update` has seen 80 rows of a store of 16 since the last `advance_epoch`. Call `advance_epoch()` after each epoch: "
        "alpha waits for it, and so do other ranks."
    )


def test_without_ids_and_for_blended_inputs_nothing_is_written():
    loss = progressive()
    loss.update(torch.randn(2, C), index=None)
    loss.update(torch.randn(2, C), index=torch.tensor([0, 1]), partner_index=torch.tensor([1, 0]))
    assert not loss.targets.known.any()


# ------------------------------------------------------------------------------------------------------------- teachers


@pytest.mark.parametrize("copied", [True, False])
def test_a_frozen_teacher_does_not_wake(copied):
    model = network()
    teacher = FrozenTeacher(model, copy=copied)
    whole = nn.ModuleDict({"student": nn.Linear(6, C), "teacher": teacher})
    before = copy.deepcopy(teacher.model.state_dict())
    for wake in (whole.train, lambda: model.train() if not copied else None):
        wake()
        x = torch.randn(8, 6, requires_grad=True)
        assert not teacher(x).requires_grad
        assert not teacher.model.training
    assert same(before, dict(teacher.model.state_dict()))  # batch norm's statistics among it
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert all(p.requires_grad for p in model.parameters()) == copied
    assert len(list(whole.parameters())) == 2
    assert [name for name in whole.state_dict() if name.startswith("teacher")] == []


def test_a_frozen_teacher_is_moved():
    teacher = FrozenTeacher(network())
    assert teacher.double()(torch.randn(3, 6).double()).dtype == torch.float64
    assert teacher.to("meta").model[0].weight.is_meta
    assert list(teacher.state_dict()) == []


def test_an_ema_of_the_weights_as_a_progressive_teacher():
    """The recipe of the guide: torch's AveragedModel predicts, DeterministicKD matches it."""
    model = network()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True).eval()
    distill, optimizer = DeterministicKD(temperature=1.0), sgd(model)
    by_hand = None
    for step in range(6):
        index = torch.arange(N)[step % 2 :: 2]
        logits = model(X[index])
        with torch.no_grad():
            average_logits = average(X[index])
        loss = 0.5 * F.cross_entropy(logits, Y[index]) + 0.5 * distill(logits, average_logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        weight = model[0].weight.detach().clone()
        by_hand = weight if by_hand is None else 0.5 * by_hand + 0.5 * weight
    torch.testing.assert_close(average.module[0].weight, by_hand)
    assert not average.module[1].training
    assert all(p.grad is None for p in average.parameters())
    fresh = AveragedModel(network(), multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True).eval()
    fresh.load_state_dict(average.state_dict())
    assert same(fresh(X), average(X))


def test_a_frozen_teacher_is_a_copy_unless_told_otherwise_and_takes_keywords():
    class Scaled(nn.Linear):
        def forward(self, x, scale=1.0):
            return scale * super().forward(x)

    model = Scaled(2, 3)
    teacher = FrozenTeacher(model)
    assert teacher.model is not model
    assert all(p.requires_grad for p in model.parameters())
    assert model.training
    x = torch.randn(4, 2)
    torch.testing.assert_close(teacher(x, scale=2.0), 2.0 * teacher(x))
    assert teacher.eval().train().training
