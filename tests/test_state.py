"""What is state, who changes it and when, and that nothing of it is lost."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from seeds import generator
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn.utils.parametrizations import spectral_norm
from torch.testing import assert_close

from aikd_losses import (
    AdversarialDistributionLoss,
    AIKDLoss,
    CachedTargets,
    EMATargets,
    FrozenTeacher,
    GradientPenalty,
    LinearRamp,
    LossStack,
    MLPDiscriminator,
    ProgressiveKD,
)

N, C, BATCH = 16, 4, 8
X, Y = torch.randn(N, 6, generator=generator(0)), torch.arange(N) % C
OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "fused adam": partial(torch.optim.Adam, fused=True),
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9, dampening=0.5),
    "amsgrad": partial(torch.optim.AdamW, amsgrad=True),
    "adagrad": partial(torch.optim.Adagrad, initial_accumulator_value=0.1),
    "adafactor": torch.optim.Adafactor,
    "adamax": torch.optim.Adamax,
    "tensors": lambda p, lr: torch.optim.Adam(p, lr=torch.tensor(lr)),
}


def network():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, C))


def pretrained():
    torch.manual_seed(8)
    return FrozenTeacher(nn.Linear(6, C))


def build(num_epochs=6, targets=None):
    torch.manual_seed(9)
    return AIKDLoss(N, C, num_epochs, discriminator=MLPDiscriminator(C, hidden=(8,)), targets=targets)


def owning(discriminator, optimizer="sgd", **settings):
    """A loss with an optimizer of its own."""
    adapted = OPTIMIZERS[optimizer](discriminator.parameters(), lr=0.05)
    return AdversarialDistributionLoss(discriminator, optimizer=adapted, **settings)


def adversarial(optimizer="adam"):
    return owning(MLPDiscriminator(C, hidden=(8,)), optimizer)


def progressive():
    return ProgressiveKD(CachedTargets(N, C), alpha=LinearRamp(0.8, 4))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def train(epochs, criterion, model=None, optimizer=None, update="after"):
    """`epochs` of a whole loop, each with randomness of its own; `update` says where `criterion.update` stands."""
    model, teacher, gradients = model or network(), pretrained(), []
    optimizer = optimizer or sgd(model)
    for epoch in epochs:
        torch.manual_seed(100 + epoch)
        for index in torch.randperm(N).split(BATCH):
            given = dict(student_logits=model(X[index]), teacher_logits=teacher(X[index]), index=index)
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


def trained(epochs, **settings):
    criterion = build(**settings)
    train(range(epochs), criterion)
    return criterion


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


# ------------------------------------------------------------------------------------------------ hidden from wrappers


def test_store_discriminator_and_teacher_are_found_by_no_wrapper_and_follow_its_mode():
    whole = nn.ModuleDict({"model": network(), "criterion": build(), "teacher": pretrained()})
    discriminator = whole["criterion"].terms["adversarial"].discriminator
    for listed in (nn.Module.parameters, nn.Module.buffers):
        assert list(map(id, listed(whole))) == list(map(id, listed(whole["model"])))
    assert not {discriminator, whole["teacher"].model} & set(whole.modules())
    assert list(whole["teacher"].state_dict()) == []
    for mode in (False, True):
        assert whole.train(mode)["criterion"].training == discriminator.training == mode


def test_what_is_saved_are_facts_and_not_what_follows_from_them():
    state = build().state_dict()
    assert {
        "epoch",
        "terms.progressive.epoch",
        "terms.progressive.targets.rows",
        "terms.progressive.targets.known",
        "terms.adversarial.discriminator.layers.0.weight",
        "terms.adversarial.optimizer_state.layers.0.weight.exp_avg",
        "terms.adversarial.optimizer_settings.0.lr",
    } <= set(state)
    assert state["epoch"].dtype == state["terms.progressive.epoch"].dtype == torch.int64
    assert not [name for name in state if re.search("alpha|weights|fused|amsgrad|foreach", name)]
    assert all(isinstance(value, torch.Tensor) for value in state.values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_names_shapes_and_types_of_a_checkpoint_depend_on_the_settings_alone(optimizer):
    loss = adversarial(optimizer)
    loss.discriminator.layers[0].weight.requires_grad_(False)  # which gets no state
    before = {name: (x.shape, x.dtype) for name, x in loss.state_dict().items()}
    torch.optim.lr_scheduler.OneCycleLR(loss.optimizer, 0.1, 10, cycle_momentum=False)  # puts numbers of its own there
    for _ in range(3):
        loss.update(*torch.randn(2, 8, C))
    state = loss.state_dict()
    assert {name: (x.shape, x.dtype) for name, x in state.items()} == before
    first = [name for name in before if name.startswith("optimizer_state.layers.0.weight.")]
    moments = {"sgd": 0, "momentum": 1, "amsgrad": 4, "adagrad": 2}.get(optimizer, 3)
    assert len(first) == 1 + moments
    assert not state["optimizer_state.layers.0.weight.started"] or optimizer == "adagrad"
    assert state["optimizer_state.layers.2.weight.started"] == (optimizer != "sgd")


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16, torch.float16, "meta"], ids=str)
def test_a_move_takes_all_that_was_loaded_and_a_cast_only_the_discriminator_and_its_optimizer(to):
    criterion = build()
    criterion.load_state_dict(trained(2).state_dict())
    loss, term = criterion.terms["adversarial"], criterion.terms["progressive"]

    def facts():
        return [term.targets.rows, term.targets.known, term.alpha, term.epoch, criterion.epoch]

    before = copy.deepcopy(facts())
    assert [x.dtype for x in before[2:]] == [torch.float64, torch.int64, torch.int64]
    criterion.to(to)
    parameters = list(loss.discriminator.parameters())
    held = [p for group in loss.optimizer.param_groups for p in group["params"]]
    assert [*map(id, held)] == [*map(id, parameters)]
    assert {*map(id, held)} == {*map(id, loss.optimizer.state)}
    moved = [*parameters, *(moments["exp_avg"] for moments in loss.optimizer.state.values())]
    if to == "meta":
        assert all(x.is_meta for x in [*moved, *facts()])
        return
    assert {x.dtype for x in moved} == {to}
    assert_close(facts(), before, rtol=0, atol=0)
    if to == torch.float64:
        train(range(2, 3), criterion)


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
        return build(targets=targets and targets()), model, sgd(model)

    straight, first, second = start(), start(), start()
    train(range(5), *straight)
    train(range(2), *first)
    train(range(used), *second)
    for i in (1, 2):
        second[i].load_state_dict(copy.deepcopy(first[i].state_dict()))
    travel(first[0], second[0], tmp_path / "checkpoint")
    train(range(2, 5), *second)

    for a, b in zip(straight, second, strict=True):
        assert same(a.state_dict(), b.state_dict())
    ours, theirs = (c[0].terms["adversarial"].optimizer.state_dict() for c in (straight, second))
    assert same(ours, theirs)
    assert same(straight[0].terms["progressive"].alpha, second[0].terms["progressive"].alpha)


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
    assert saved.state_dict()["optimizer_settings.0.betas"].tolist() == [0.5, 0.75]
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
    tensors.load_state_dict({**tensors.state_dict(), "optimizer_settings.0.lr": torch.tensor(0.5).double()})
    assert rate == 0.5  # in place, where a captured step would look


def test_schedules_are_worked_out_anew_so_that_a_longer_run_resumes_right():
    long = build(num_epochs=10)
    long.load_state_dict(trained(3, num_epochs=4).state_dict())
    assert float(long.terms["progressive"].alpha) == pytest.approx(0.8 * 4 / 10)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_criterion_is_whole_and_independent(copied):
    criterion = trained(2)
    before, clone = copy.deepcopy(criterion.state_dict()), copied(criterion)
    assert same(clone.state_dict(), before)
    gradients = train(range(2, 4), clone)
    assert same(criterion.state_dict(), before)
    assert same(train(range(2, 4), criterion), gradients)
    assert same(clone.state_dict(), criterion.state_dict())


# --------------------------------------------------------------------------------------------- what is refused in loading


def put(x, value):
    x = x.clone()
    x.view(-1)[-1] = value
    return x


MOMENT, SQUARES, STEP = (f"optimizer_state.layers.2.weight.{name}" for name in ("exp_avg", "exp_avg_sq", "step"))
RATE, BETAS, WEIGHT = "optimizer_settings.0.lr", "optimizer_settings.0.betas", "discriminator.layers.0.weight"
NOT_NEGATIVE = "must be finite and not negative; got -"
WRONG = [  # what of a state, what is done to it, and what is said
    (MOMENT, lambda x: x[..., :3], r"is torch.float32 of shape \(1, 3\); here it is torch.float32 of shape \(1, 8\)"),
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
    (BETAS, lambda x: put(x, -0.5), "must be at least 0 and below 1; got -0.5 to 0.9"),
    (BETAS, lambda x: put(x, 1.0), "must be at least 0 and below 1; got 0.9 to 1"),
    (MOMENT, lambda x: put(x, torch.nan), "must be finite; got nan"),
    (SQUARES, lambda x: put(x, -1e-9), NOT_NEGATIVE),
    (STEP, lambda x: put(x, -1), NOT_NEGATIVE),
    (WEIGHT, lambda x: x[:5], r"is torch.float32 of shape \(5, 4\); here it is torch.float32 of shape \(8, 4\)"),
]


@pytest.mark.parametrize("optimizer", ["adam", "fused adam"])  # whose step writes past the end of what is too small
@pytest.mark.parametrize(("key", "wrong", "message"), WRONG)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(optimizer, key, wrong, message):
    saved, loss = adversarial(), adversarial(optimizer)
    for each in (saved, loss):
        each.update(*torch.randn(2, 8, C))
    before, groups = copy.deepcopy(loss.state_dict()), copy.deepcopy(loss.optimizer.state_dict())
    state = {**saved.state_dict(), key: wrong(saved.state_dict()[key])}
    part = {name: x for name, x in state.items() if name[:9] == key[:9]}
    for given, strict in ((state, True), (state, False), (part, False)):
        with pytest.raises(RuntimeError, match=f"`{key}` in the checkpoint {message}"):
            loss.load_state_dict(given, strict=strict)
    stack, fine = (LossStack({"before": ProgressiveKD(CachedTargets(N, C)), "a": each}) for each in (loss, saved))
    fine.epoch.fill_(3)
    with pytest.raises(RuntimeError, match=message):
        stack.load_state_dict({**fine.state_dict(), f"terms.a.{key}": state[key]})
    assert int(stack.epoch) == 0
    assert same(loss.state_dict(), before)
    assert same(loss.optimizer.state_dict(), groups)


def test_of_a_shared_store_that_does_not_fit_once_nothing_is_loaded():
    def build():
        store = CachedTargets(N, C)
        return LossStack({name: ProgressiveKD(store) for name in ("a", "b")})

    saved, stack = build(), build()
    saved.epoch.fill_(3)
    before = copy.deepcopy(stack.state_dict())
    with pytest.raises(RuntimeError, match=r"`terms.b.targets.rows` in the checkpoint is torch.float32 of shape"):
        stack.load_state_dict({**saved.state_dict(), "terms.b.targets.rows": torch.zeros(1, 1)})
    assert same(stack.state_dict(), before)


@pytest.mark.parametrize("lacking", [MOMENT, WEIGHT])
def test_what_a_checkpoint_lacks_is_named_and_an_optimizer_is_loaded_whole_or_not_at_all(lacking):
    saved, loss = adversarial(), adversarial()
    saved.update(*torch.randn(2, 8, C))
    own, full, criterion = copy.deepcopy(loss.state_dict()), saved.state_dict(), nn.ModuleDict({"a": loss})
    state = {f"a.{key}": x for key, x in full.items() if key != lacking}
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "a.{lacking}"\.'):
        criterion.load_state_dict(state)
    assert criterion.load_state_dict(state, strict=False).missing_keys == [f"a.{lacking}"]
    kept = {key for key in own if key == lacking or (lacking == MOMENT and key.startswith("optimizer"))}
    assert same(loss.state_dict(), {key: own[key] if key in kept else full[key] for key in full})


def test_what_only_one_of_checkpoint_and_object_has_is_named():
    loss, none = adversarial(), AdversarialDistributionLoss(MLPDiscriminator(C, hidden=(8,)))
    more = {**loss.state_dict(), "discriminator.label": torch.zeros(1)}
    for into, state, said in (
        (loss, more, r'Unexpected key\(s\) in state_dict: "discriminator.label".'),
        (none, loss.state_dict(), r'Unexpected key\(s\) in state_dict: "optimizer_state.layers.0.weight.'),
        (loss, none.state_dict(), r'Missing key\(s\) in state_dict: "optimizer_state.layers.0.weight.'),
    ):
        with pytest.raises(RuntimeError, match=said):
            into.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("terms.a.targets.known"), r'Missing key\(s\) in state_dict: "terms.a.targets.known".'),
        (lambda state: state.update(more=torch.zeros(1)), r'Unexpected key\(s\) in state_dict: "more".'),
        (
            lambda state: state.update({"terms.own.weight": torch.zeros(2, 2)}),
            rf"`terms.own.weight` in the checkpoint is .* of shape \(2, 2\); here it is .* of shape \({C}, {C}\).",
        ),
    ],
)
def test_what_torch_alone_would_find_too_late_is_found_before_anything_is_loaded(change, message):
    """What is missing, what is more, and what does not fit a term that is the user's, after ours in the checkpoint."""

    def build():
        return LossStack({"a": ProgressiveKD(CachedTargets(N, C)), "own": Squares()})

    saved, stack = build(), build()
    saved.update(student_logits=torch.randn(2, C), index=torch.arange(2))
    saved.advance_epoch()
    state, before = saved.state_dict(), copy.deepcopy(stack.state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=message):
        stack.load_state_dict(state)
    assert same(stack.state_dict(), before)


def test_a_term_that_changes_its_own_keys_is_loaded_as_torch_loads_it():
    class Frozen(nn.Module):
        """Whose network is not saved, and whose scale had another name and shape once."""

        def __init__(self):
            super().__init__()
            self.net, self.scale = nn.Linear(C, C), nn.Parameter(torch.ones(()))
            self.norm = nn.BatchNorm1d(C)  # which loads what it has in a way of its own
            self.register_state_dict_post_hook(self.without_net)
            self.register_load_state_dict_pre_hook(self.from_old)
            self.register_load_state_dict_post_hook(lambda _, keys: keys.missing_keys.clear())

        @staticmethod
        def without_net(module, state, at, metadata):
            for name in [name for name in state if "net." in name]:
                del state[name]

        @staticmethod
        def from_old(module, state, at, *others):
            if f"{at}old" in state:
                state[f"{at}scale"] = state.pop(f"{at}old").view(())

        def forward(self, student_logits):
            return self.net(student_logits).mean() * self.scale

    stack = LossStack({"own": Frozen(), "p": progressive()})
    state = stack.state_dict()
    stack.load_state_dict(state)
    state["terms.own.old"] = 3 * state.pop("terms.own.scale").view(1)
    stack.load_state_dict(state)
    assert stack.terms["own"].scale == 3


@pytest.mark.parametrize("given", [None, 3, "path.pt", [1]])
def test_what_is_no_checkpoint_is_refused_as_torch_does(given):
    with pytest.raises(TypeError, match="state_dict to be dict-like"):
        build().load_state_dict(given)


def test_torch_follows_the_names_of_a_checkpoint():
    """The way of FSDP2, by `get_model_state_dict`, which looks every name up in the module."""

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.criterion = nn.Linear(4, C), build()

    whole, fresh = Whole(), Whole()
    whole.criterion.update(student_logits=torch.randn(2, C), teacher_logits=torch.randn(2, C), index=torch.arange(2))
    state = get_model_state_dict(whole)
    assert state.keys() == whole.state_dict().keys()
    set_model_state_dict(fresh, state)
    assert same(fresh.state_dict(), whole.state_dict())


def test_a_criterion_that_is_made_in_inference_mode_is_loaded_there():
    saved = build().state_dict()
    with torch.inference_mode():
        criterion = build()
        criterion.load_state_dict(saved)
    assert same(criterion.state_dict(), saved)


def test_a_lazy_term_takes_the_shapes_of_the_checkpoint():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.LazyLinear(2)

        def forward(self, student_logits):
            return self.head(student_logits).mean()

    used, fresh = LossStack({"own": Lazy()}), LossStack({"own": Lazy()})
    used(student_logits=torch.randn(2, C))
    fresh.load_state_dict(used.state_dict())
    assert same(fresh.state_dict(), used.state_dict())


class Squares(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(C, C))

    def forward(self, student_logits):
        return (student_logits @ self.weight).square().sum()


def test_a_discriminator_without_memory_loses_no_checkpoint():
    with torch.device("meta"):
        empty = AdversarialDistributionLoss(MLPDiscriminator(C, hidden=(8,)))
    full = AdversarialDistributionLoss(MLPDiscriminator(C, hidden=(8,))).state_dict()
    for loss, name in ((empty, ""), (nn.ModuleDict({"a": empty}), "a.")):
        said = rf"`{name}{WEIGHT}` in the checkpoint is torch.float32 .* here it is .* without values \(meta\)"
        with pytest.raises(RuntimeError, match=said):
            loss.load_state_dict({name + key: x for key, x in full.items()})
    assert empty.load_state_dict({key: x.to("meta") for key, x in full.items()})  # nothing to be lost


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": N + 2}, "progressive.targets.rows` in the checkpoint is torch.float16 of shape"),
        ({"targets": CachedTargets(N, C, dtype=torch.float32)}, "progressive.targets.rows` .* is torch.float32 of"),
        ({"targets": CachedTargets(N, C, top_k=C)}, "progressive.targets.classes` in the checkpoint is torch.uint8 of"),
        ({"discriminator": MLPDiscriminator(C, hidden=(5,))}, rf"adversarial.{WEIGHT}` .* of shape \(5, 4\); here"),
    ],
    ids=["samples", "storage type", "top_k", "discriminator"],
)
def test_of_a_criterions_checkpoint_that_does_not_fit_nothing_is_loaded(settings, message):
    criterion = AIKDLoss(N, C, 4)
    saved = AIKDLoss(**{"num_samples": N, "num_classes": C, "num_epochs": 4, **copy.deepcopy(settings)})
    saved.update(student_logits=torch.randn(4, C), teacher_logits=torch.randn(4, C), index=torch.arange(4))
    saved.advance_epoch()
    before = copy.deepcopy(criterion.state_dict())
    for loaded, prefix in ((criterion, ""), (nn.ModuleDict({"criterion": criterion}), "criterion.")):
        state = {prefix + key: x for key, x in saved.state_dict().items()}
        with pytest.raises(RuntimeError, match=f"`{prefix}terms.{message}"):
            loaded.load_state_dict(state, strict=not prefix)
        assert same(criterion.state_dict(), before)


# ------------------------------------------------------------------------------------- update, wherever it stands


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(8), spectral_norm(nn.Linear(8, 8))], ids=["batch", "spectral"])
def test_update_before_or_after_backward_and_step_is_the_same_bit_for_bit(layer):
    runs = {}
    for where in ("before", "between", "after"):
        torch.manual_seed(9)
        discriminator = nn.Sequential(nn.Linear(C, 8), copy.deepcopy(layer), nn.ReLU(), nn.Linear(8, 1))
        model, criterion = network(), AIKDLoss(N, C, 6, discriminator=discriminator)
        gradients = train(range(3), criterion, model, update=where)
        runs[where] = gradients, model.state_dict(), criterion.state_dict()
    assert same(runs["before"], runs["after"])
    assert same(runs["between"], runs["after"])


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.label, self.score = nn.Embedding(C, 3), nn.Linear(C + 3, 1)

    def forward(self, x, condition):
        return self.score(torch.cat([x, self.label(condition)], -1))


HALF = partial(torch.autocast, "cpu", torch.bfloat16)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, HALF], ids=["no_grad", "inference", "autocast"])
@pytest.mark.parametrize(
    "discriminator", [MLPDiscriminator(C), Conditional(), nn.Sequential(nn.BatchNorm1d(C), nn.Linear(C, 1))]
)
def test_without_a_graph_and_in_half_precision_the_discriminator_is_trained_all_the_same(mode, discriminator):
    loss = owning(copy.deepcopy(discriminator), "adam", penalty=GradientPenalty())
    twin = copy.deepcopy(loss)
    s, t = torch.randn(2, 8, C)
    given = dict(student_logits=s, teacher_logits=t, mask=torch.arange(8) > 1)
    given |= {"condition": torch.arange(8) % C} if isinstance(discriminator, Conditional) else {}

    def step(loss):
        torch.manual_seed(1)
        cloned = {name: x.clone() for name, x in given.items()}
        values = loss.discriminator_loss(**cloned), loss(**cloned), loss.update(**cloned)
        return [value.detach() for value in values], values[0].requires_grad

    expected, _ = step(twin)
    with mode():
        found, with_a_graph = step(loss)
    assert with_a_graph == (mode is HALF)
    assert same(found, expected)
    assert same(loss.state_dict(), twin.state_dict())


@pytest.mark.parametrize("target_store", [CachedTargets, EMATargets])
def test_what_was_loaded_in_inference_mode_can_be_trained_on(target_store):
    def method():
        return AIKDLoss(N, C, 4, targets=target_store(N, C), penalty=None)

    s, t = torch.randn(2, N, C)
    given = dict(student_logits=s, teacher_logits=t, index=torch.arange(N))
    straight, resumed = method(), method()
    straight.update(**given)
    with torch.inference_mode():
        straight.advance_epoch()
        resumed.load_state_dict(straight.state_dict())
    for criterion in (straight, resumed):
        criterion.update(**given)
        criterion.advance_epoch()
    assert same(straight.state_dict(), resumed.state_dict())


def test_a_discriminator_in_float16_is_refused_where_its_eps_is_lost():
    """1e-8 is 0 there, and the first step would divide by it."""
    s, t = torch.randn(2, 8, C)
    for settings, refused in (({}, True), ({"eps": 1e-4}, False), ({"fused": True}, False)):
        discriminator = MLPDiscriminator(C)
        adam = torch.optim.Adam(discriminator.parameters(), **settings)
        loss = AdversarialDistributionLoss(discriminator, optimizer=adam).half()
        if refused:
            before = copy.deepcopy(loss.state_dict())
            with pytest.raises(RuntimeError, match=r"^`update` needs an `eps` that is not 0 in the type"):
                loss.update(s, t)
            assert same(before, loss.state_dict())
        else:
            loss.update(s, t)
            assert all(x.isfinite().all() for x in loss.state_dict().values())


# --------------------------------------------------------------------------------------------- who moves the discriminator


@pytest.mark.parametrize("objective", ["non_saturating", "least_squares", "hinge", "wasserstein", "relativistic"])
def test_the_students_loss_leaves_neither_gradient_nor_buffer_on_the_discriminator(objective):
    discriminator = nn.Sequential(nn.Linear(C, 8), nn.BatchNorm1d(8), spectral_norm(nn.Linear(8, 1)))
    loss = AdversarialDistributionLoss(discriminator, objective=objective, penalty=GradientPenalty(10.0))
    buffers = copy.deepcopy(dict(discriminator.named_buffers()))
    s, t = (x.requires_grad_() for x in torch.randn(2, 8, C))
    loss(s, t).backward()
    assert all(p.grad is None and p.requires_grad for p in discriminator.parameters())
    assert same(buffers, dict(discriminator.named_buffers()))
    assert s.grad.abs().sum() > 0
    s.grad = None
    loss.discriminator_loss(s, t).backward()
    assert same(buffers, dict(discriminator.named_buffers()))
    assert s.grad is t.grad is None


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_students_second_derivative_is_the_closed_form_whatever_update_does_before_it(reduction):
    loss = owning(nn.Linear(C, 1), inputs="logits", objective="non_saturating", reduction=reduction)
    with torch.no_grad():  # the score is the first logit z, and the student's loss softplus(-z)
        loss.discriminator.weight.copy_(torch.eye(C)[:1])
        loss.discriminator.bias.zero_()
    s, v = torch.randn(8, C, requires_grad=True), torch.randn(8, C)
    (slope,) = torch.autograd.grad(loss(s, torch.randn(8, C)), s, create_graph=True)
    loss.update(*torch.randn(2, 8, C))
    (curved,) = torch.autograd.grad((slope * v).sum(), s)
    q = torch.sigmoid(s.detach()[:, 0])
    expected = torch.zeros(8, C)
    expected[:, 0] = q * (1 - q) * v[:, 0] / (8 if reduction == "mean" else 1)
    assert_close(curved, expected)


def test_update_moves_parameters_and_buffers_and_leaves_no_gradient():
    discriminator = nn.Sequential(nn.Linear(C, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    discriminator.register_parameter("spare", nn.Parameter(torch.zeros(1)))
    discriminator.spare.grad = torch.ones(1)  # somebody else's
    before = copy.deepcopy(discriminator.state_dict())
    s = torch.randn(8, C, requires_grad=True)
    assert not owning(discriminator).update(s, torch.randn(8, C)).requires_grad
    after = discriminator.state_dict()
    assert not any(same(before[k], after[k]) for k in ("0.weight", "1.running_mean", "2.weight"))
    assert same(before["spare"], after["spare"])
    assert all(p.grad is None for p in [*discriminator.parameters(), s])


@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, momentum=0.9), torch.optim.AdamW], ids=["sgd", "adamw"])
def test_a_students_optimizer_that_wrongly_holds_the_discriminator_moves_nothing_of_it(optimizer):
    def run(wrongly):
        model, criterion = network(), build()
        held = list(criterion.terms["adversarial"].discriminator.parameters()) if wrongly else []
        train(range(3), criterion, model, optimizer([*model.parameters(), *held], lr=0.1, weight_decay=0.1))
        return model.state_dict(), criterion.state_dict()

    assert same(run(wrongly=True), run(wrongly=False))


def test_rows_with_nan_or_inf_are_not_shown_to_the_discriminator():
    s, t = torch.randn(2, 8, C)
    clean, kept = adversarial(), torch.tensor([0, 1, 3, 4, 6])
    spoilt = copy.deepcopy(clean)
    s[2, 0], t[5, 1], s[7] = torch.nan, torch.inf, -torch.inf
    assert_close(spoilt.update(s, t), clean.update(s[kept], t[kept]))
    ours, theirs = (list(loss.discriminator.parameters()) for loss in (spoilt, clean))
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_discriminator_may_be_conditional():
    d = Conditional()
    s, t, y = torch.randn(8, C), torch.randn(8, C), torch.arange(8) % C
    of_student, of_teacher = (d(x.softmax(-1), y).flatten() for x in (s, t))
    fooled, counts = F.softplus(-of_student), torch.arange(8) < 6
    assert_close(AdversarialDistributionLoss(d, reduction="none")(s, t, condition=y), fooled)
    loss = owning(d, objective="non_saturating", penalty=lambda score, teacher, student: 3 * score(teacher))
    given = dict(mask=counts, condition=y.masked_fill(~counts, -100))  # which no embedding has
    s[6], t[7] = torch.nan, torch.nan  # where the mask hides it
    for call in (loss, loss.student_loss):
        assert_close(call(s, t, **given), fooled[counts].mean())
    expected = (F.softplus(-of_teacher) + F.softplus(of_student) + 3 * of_teacher)[counts].mean()
    assert_close(loss.discriminator_loss(s, t, **given), expected)
    before = d.label.weight.clone()
    assert_close(loss.update(s, t, **given), expected.detach())
    assert not same(before, d.label.weight)


# ------------------------------------------------------------------------------------------------------- epochs, warnings


def test_alpha_follows_the_epoch_and_a_number_says_which():
    loss = progressive()
    seen = [float(loss.alpha)]
    for epoch in (None, 1, None, 2, 3, 3):  # 1 and 3 are there already
        loss.update(torch.randn(1, C), index=torch.tensor([0]))
        loss.advance_epoch(epoch)
        seen.append(float(loss.alpha))
    assert seen == pytest.approx([0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8])
    assert int(loss.epoch) == 3


def test_an_epoch_without_an_update_is_warned_of():
    loss = progressive()
    said = re.escape(
        "Nothing was written since the last `advance_epoch`: call `update(student_logits, index=index)` in every training step."
    )
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"^{said}$"):
            loss.advance_epoch()
        loss.update(torch.randn(2, C), index=torch.tensor([1, 2]))
        loss.advance_epoch()  # any warning is an error here
        loss.advance_epoch(int(loss.epoch))  # there already


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (
            {"index": None},
            "`update` had no ids, index=None (the Trainer of transformers drops theirs: remove_unused_columns=False).",
        ),
        (
            {"index": torch.tensor([0, 1]), "partner_index": torch.tensor([1, 0])},
            "`update` had blended inputs alone, by their `partner_index`.",
        ),
    ],
)
def test_an_epoch_of_updates_that_wrote_nothing_is_told_why(given, reason):
    loss = progressive()
    loss.update(torch.randn(2, C), **given)
    with pytest.warns(UserWarning, match=re.escape(f"Nothing was written since the last `advance_epoch`: {reason}")):
        loss.advance_epoch()


def test_the_first_epoch_that_ends_after_loading_is_not_warned_of():
    """It may have been saved after its last update; the next one is warned of again."""
    loss = progressive()
    loss.update(torch.randn(2, C), index=torch.tensor([1, 2]))
    resumed = progressive()
    resumed.load_state_dict(loss.state_dict())
    resumed.advance_epoch()  # any warning is an error here
    with pytest.warns(UserWarning, match="Nothing was written"):
        resumed.advance_epoch()


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
    stack = LossStack({"progressive": progressive()})
    stack.update(student_logits=torch.randn(2, C), index=None)
    ids = torch.tensor([0, 1])
    stack.update(student_logits=torch.randn(2, C), index=ids, partner_index=ids.flip(0))
    assert not stack.terms["progressive"].targets.known.any()


# ------------------------------------------------------------------------------------------------------------- teachers


@pytest.mark.parametrize("copied", [True, False])
def test_a_frozen_teacher_does_not_wake_and_is_a_copy_unless_told_otherwise(copied):
    model = network()
    teacher = FrozenTeacher(model) if copied else FrozenTeacher(model, copy=False)
    whole = nn.ModuleDict({"student": nn.Linear(6, C), "teacher": teacher})
    assert (teacher.model is not model) == model.training == copied
    assert [p.requires_grad for p in model.parameters()] == [copied] * 6
    before = copy.deepcopy(teacher.model.state_dict())
    for wake in (whole.train, model.train):
        wake()
        x = torch.randn(8, 6, requires_grad=True)
        assert not teacher(x).requires_grad
        assert not teacher.model.training
        assert same(teacher(input=x), teacher(x))
    assert same(before, dict(teacher.model.state_dict()))  # batch norm's statistics among it
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert len(list(whole.parameters())) == 2
    assert list(whole.state_dict()) == ["student.weight", "student.bias"]
    whole.eval().train()
    assert (teacher.training, teacher.model.training) == (True, False)


def test_a_frozen_teacher_has_the_attributes_of_its_model_to_be_read():
    model = network()
    model.config, model._private = {"size": 3}, 1
    teacher = FrozenTeacher(model)
    for other in (teacher, copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert other.config == model.config
    model.reset_parameters = lambda: None
    for missing in ("reset_parameters", "0", "append", "_private", "device"):  # or an initialisation would find them
        with pytest.raises(AttributeError, match=missing):
            getattr(teacher, missing)
    with pytest.raises(AttributeError, match="config"):
        teacher.config = None
    teacher.mine = 1
    teacher.forward = teacher.model.forward  # as Accelerate does
    teacher.compile(backend="eager")
    assert (teacher.mine, teacher.model.config) == (1, {"size": 3})


def test_a_model_that_cannot_be_copied_may_be_frozen_itself():
    model = nn.Linear(6, C)
    model.kept = model(torch.randn(2, 6))  # as a hook may
    with pytest.raises(TypeError, match=r"^`model` must be copyable, or frozen itself: copy=False; copying"):
        FrozenTeacher(model)
    assert model.training
    assert model.weight.requires_grad
    assert not FrozenTeacher(model, copy=False)(torch.randn(2, 6)).requires_grad


def test_a_frozen_teacher_is_moved():
    teacher = FrozenTeacher(network())
    assert teacher.double()(torch.randn(3, 6).double()).dtype == torch.float64
    assert teacher.to("meta").model[0].weight.is_meta


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_and_its_checkpoint_are_the_same_under_any_default_device(optimizer):
    """Some optimizers of torch make their counts on it, and each step would wait for a count on a GPU."""
    with torch.random.fork_rng():
        under = adversarial(optimizer)
    plain = adversarial(optimizer)
    s, t = torch.randn(2, BATCH, C)
    for _ in range(2):
        plain.update(s, t)
        with torch.device("meta"):
            under.update(s, t)
            state = under.state_dict()
    assert same(plain.state_dict(), state)


class WithItsOwn(torch.optim.SGD):
    """It keeps what its step needs outside of what torch copies of an optimizer, as Adafactor does where there is a GPU."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        self.share = 0.5

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = 0.1 * self.share
        return super().step(closure)


def test_an_optimizer_that_keeps_attributes_of_its_own_is_saved():
    discriminator = MLPDiscriminator(C, hidden=(8,))
    loss = AdversarialDistributionLoss(discriminator, optimizer=WithItsOwn(discriminator.parameters()))
    loss.update(*torch.randn(2, BATCH, C))
    loss.load_state_dict(loss.state_dict())
