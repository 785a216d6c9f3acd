"""What only a GPU can show: no step waits for it, its graphs and compilers give the same, and what it asserts by itself."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from laws import DIVERGENCES
from speed import captured
from torch import nn
from torch.testing import assert_close

from aikd_losses import (
    AdversarialDistributionLoss,
    AIKDLoss,
    CachedTargets,
    DeterministicKD,
    EMATargets,
    MLPDiscriminator,
    ProgressiveKD,
    ZeroCenteredPenalty,
)
from aikd_losses.functional import deterministic_kd, linear_deterministic_kd

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU, N, C, SIZE = "cuda", 32, 10, 100


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def batch() -> dict[str, torch.Tensor]:
    student = torch.randn(N, C, device=GPU, requires_grad=True)
    teacher = torch.randn(N, C, device=GPU)
    y, index = torch.randint(C, (N,), device=GPU), torch.randperm(SIZE, device=GPU)[:N]
    return dict(student_logits=student, teacher_logits=teacher, target=y, index=index)


def step(criterion: AIKDLoss, given: dict[str, torch.Tensor]) -> None:
    total, _ = criterion(**given)
    total.backward()
    criterion.update(**given)


def epoch(criterion: AIKDLoss, steps: int = 3) -> None:
    for _ in range(steps):
        step(criterion, batch())
    criterion.advance_epoch()


@contextmanager
def waiting_is(mode: str) -> Iterator[None]:
    """What happens where the CPU waits for the GPU: "error" or "warn"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


STORES = {
    "cached": lambda **where: CachedTargets(SIZE, C, **where),
    "top_k": lambda **where: CachedTargets(SIZE, C, top_k=2, **where),
    "ema": lambda **where: EMATargets(SIZE, C, **where),
}
HOWS = {
    "plain": lambda: {},
    "masked": lambda: {"mask": torch.rand(N, device=GPU) < 0.5},
    "mixup": lambda: {"partner_index": torch.randperm(SIZE, device=GPU)[:N], "mix_lambda": 0.3},
    "cutmix": lambda: {"partner_index": torch.randperm(SIZE, device=GPU)[:N], "mix_lambda": torch.rand(N, device=GPU)},
}


def test_reading_a_value_is_noticed():
    x = torch.ones(3, device=GPU)
    with waiting_is("error"), pytest.raises(RuntimeError, match="synchroniz"):
        x.sum().item()


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("store", STORES)
def test_no_step_waits_for_the_gpu(store, how):
    criterion = AIKDLoss(SIZE, C, 3, targets=STORES[store]()).to(GPU)
    given = batch() | HOWS[how]()
    step(criterion, given)  # the first one makes what is made once
    with waiting_is("error"):
        for _ in range(3):
            step(criterion, given)


@pytest.mark.parametrize(("ids", "copies"), [(GPU, 6), ("cpu", 4)])
def test_with_a_store_on_the_cpu_a_step_waits_for_its_rows_alone(ids, copies):
    """Rows and flags, there and back; and the ids, if they are not there."""
    criterion = AIKDLoss(SIZE, C, 3, targets=CachedTargets(SIZE, C, device="cpu")).to(GPU)
    given = batch()
    given["index"] = given["index"].to(ids)
    step(criterion, given)
    with waiting_is("warn"), warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        step(criterion, given)
    assert len([w for w in waits if "synchroniz" in str(w.message)]) == copies, [str(w.message) for w in waits]


@pytest.mark.parametrize("how", ["plain", "masked"])
def test_forward_and_backward_in_a_cuda_graph_are_those_outside_of_it(how):
    criterion = AIKDLoss(SIZE, C, 3).to(GPU)
    given = batch() | HOWS[how]()
    criterion.update(**given)

    def call():
        total, values = criterion(**given)
        slopes = torch.autograd.grad(total, given["student_logits"])
        return total.detach(), values, slopes  # and no graph, which would outlive its capture

    graph, result = captured(call)
    for _ in range(3):
        with torch.no_grad():
            for name, x in (batch() | HOWS[how]()).items():
                given[name].copy_(x)
        criterion.update(**given)
        criterion.advance_epoch()  # alpha, rows and discriminator are read where they lie
        graph.replay()
        assert_close(result, call())


def test_the_discriminators_step_in_a_cuda_graph_is_that_outside_of_it():
    """As docs/gpu.md says: with an optimizer that is `capturable`."""
    first = MLPDiscriminator(C).to(GPU)
    terms = []
    for discriminator in (first, copy.deepcopy(first)):
        adam = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.9), capturable=True)
        settings = dict(objective="wasserstein", penalty=ZeroCenteredPenalty(1.0), optimizer=adam)
        terms.append(AdversarialDistributionLoss(discriminator, **settings))
    s, t = torch.randn(2, N, C, device=GPU)
    graph, loss = captured(lambda: terms[0].update(s, t))
    for _ in range(3):
        terms[1].update(s, t)  # as the warm-up did; capturing runs nothing
    for _ in range(5):
        s.copy_(torch.randn(N, C, device=GPU))
        graph.replay()
        assert_close(loss, terms[1].update(s, t))
    for p, q in zip(*(term.discriminator.parameters() for term in terms), strict=True):
        assert_close(p, q)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_what_triton_makes_of_a_divergence_is_exact_to_five_digits(name):
    """Between near and far distributions, at low and high temperature; and its gradient."""
    torch.compiler.reset()
    t = 3 * torch.randn(64, 1000, device=GPU)
    compiled = torch.compile(deterministic_kd, fullgraph=True)
    for far, temperature, offset in product((1e-3, 1.0), (1.0, 100.0), (0.0, 100.0)):
        s = (t + far * torch.randn_like(t) + offset).requires_grad_()
        wide = s.detach().double().requires_grad_()
        settings = dict(temperature=temperature, divergence=name)
        value, exact = compiled(s, t, **settings), deterministic_kd(wide, t.double(), **settings)
        assert_close(value.double(), exact, rtol=1e-5, atol=0)
        slope, right = torch.autograd.grad(value, s)[0].double(), torch.autograd.grad(exact, wide)[0]
        assert (slope - right).norm() <= 1e-5 * right.norm()


def test_the_method_is_compiled_once_for_all_epochs_and_stays_the_same():
    torch.compiler.reset()
    criterion = AIKDLoss(SIZE, C, 4).to(GPU)
    compiled = torch.compile(criterion, fullgraph=True)
    given = batch()
    for _ in range(3):
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = compiled(**given)
        expected = criterion(**given)
        assert_close(found, expected)
        slopes = [torch.autograd.grad(total, given["student_logits"])[0] for total, _ in (found, expected)]
        assert_close(*slopes)
        criterion.update(**given)
        criterion.advance_epoch()


def test_linear_heads_compute_in_float32_also_where_half_precision_is_allowed():
    h, w, other = (torch.randn(size, 64, device=GPU, dtype=torch.bfloat16) for size in (300, 500, 500))
    h, w = h.requires_grad_(), w.requires_grad_()
    with torch.autocast(GPU, torch.bfloat16):
        value = linear_deterministic_kd(h, w, h, other)
    wide = [x.detach().double().requires_grad_() for x in (h, w)]
    exact = deterministic_kd(wide[0] @ wide[1].T, wide[0].detach() @ other.double().T)
    assert_close(value.double(), exact, rtol=1e-5, atol=0)
    for found, right in zip(torch.autograd.grad(value, (h, w)), torch.autograd.grad(exact, wide), strict=True):
        assert (found.double() - right).norm() <= 1e-2 * right.norm()  # as bfloat16 rounds it


def test_a_step_of_float16_that_overflows_is_left_out_and_training_goes_on():
    model, x = nn.Linear(6, C, device=GPU), torch.randn(N, 6, device=GPU)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(GPU, init_scale=2.0**30)
    criterion, given, losses = AIKDLoss(10 * SIZE, C, 3).to(GPU), batch(), []
    start = copy.deepcopy(model.state_dict())
    for i in range(40):
        with torch.autocast(GPU, torch.float16):
            given["student_logits"] = model(x)
        total, values = criterion(**given)
        sgd.zero_grad()
        scaler.scale(total).backward()
        scaler.step(sgd)
        scaler.update()
        criterion.update(**given)
        losses.append(values["progressive"])  # the adversarial term moves with its discriminator
        if i == 0:
            assert_close(model.state_dict(), start, rtol=0, atol=0)  # it was left out
    assert scaler.get_scale() < 2.0**30
    assert losses[-1] < losses[0]
    tensors = [*model.parameters(), *(v for v in criterion.state_dict().values() if v.is_floating_point())]
    assert all(x.isfinite().all() for x in tensors)


def test_under_autocast_the_losses_are_those_of_the_same_logits_in_float32():
    criterion, given = AIKDLoss(SIZE, C, 3).to(GPU), batch()
    criterion.update(**given)
    low = given | {name: given[name].detach().bfloat16() for name in ("student_logits", "teacher_logits")}
    with torch.autocast(GPU, torch.bfloat16):
        total, values = criterion(**low)
    assert total.dtype == torch.float32
    assert_close(
        (total, values), criterion(**{name: x.float() if x.is_floating_point() else x for name, x in low.items()})
    )


OUT_OF_RANGE = """
import torch
from aikd_losses import CachedTargets, ProgressiveKD
loss = ProgressiveKD(CachedTargets(100, 10)).to("cuda")
s, index = torch.randn(4, 10, device="cuda"), torch.tensor([0, 1, 2, {index}], device="cuda")
{call}
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("index", [100, -1])
@pytest.mark.parametrize("call", ["loss(s, index=index)", "loss.update(s, index=index)"])
def test_ids_out_of_range_stop_the_process(call, index):
    """Nobody looks at them, as that would wait; the GPU's own assertion does. Nothing runs in its process afterwards."""
    script = OUT_OF_RANGE.format(call=call, index=index)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "device-side assert" in done.stderr


def test_of_equal_ids_in_one_batch_the_last_wins_each_time():
    n = 10_000
    probs, index = torch.randn(n, C, device=GPU).softmax(-1), torch.randint(SIZE, (n,), device=GPU)
    last = {int(i): row for i, row in zip(index.tolist(), probs, strict=True)}
    for _ in range(20):
        store = CachedTargets(SIZE, C, dtype=torch.float32, device=GPU)
        store.write(index, probs)
        found, known = store.read(torch.arange(SIZE, device=GPU))
        assert known.all()
        assert_close(found, torch.stack([last[i] for i in range(SIZE)]), rtol=0, atol=0)


def test_the_same_seed_gives_the_same_discriminator_and_the_same_store_twice():
    def trained() -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        criterion = AIKDLoss(SIZE, C, 3).to(GPU)
        for _ in range(5):
            epoch(criterion)
        return criterion.state_dict()

    assert_close(trained(), trained(), rtol=0, atol=0)


def test_memory_does_not_grow():
    criterion, held = AIKDLoss(SIZE, C, 3).to(GPU), []
    for epochs in (5, 45):
        for _ in range(epochs):
            epoch(criterion, steps=4)
        held.append(torch.cuda.memory_allocated())
    assert held[0] == held[1]


def test_a_large_loss_keeps_one_copy_of_its_logits():
    """In float32; and beyond that takes what is needed for some rows at a time."""
    s, t = torch.randn(2, 4096, 50_257, device=GPU)
    copy_bytes, loss = 4 * s.numel(), DeterministicKD()
    s.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = loss(s, t)
    assert torch.cuda.memory_allocated() - before < 1.1 * copy_bytes
    value.backward()
    assert torch.cuda.max_memory_allocated() - before < 1.8 * copy_bytes


def test_criteria_move_to_the_gpu_and_back_with_what_they_carry():
    criterion = AIKDLoss(SIZE, C, 3, targets=CachedTargets(SIZE, C)).to(GPU)
    given = batch()
    step(criterion, given)
    state = {name: x.clone() for name, x in criterion.state_dict().items()}
    step(criterion.cpu(), {name: x.detach().cpu().requires_grad_(x.requires_grad) for name, x in given.items()})
    criterion.load_state_dict(state)
    assert_close({name: x.cpu() for name, x in state.items()}, {n: x.cpu() for n, x in criterion.state_dict().items()})
    step(criterion.to(GPU), given)
    assert ProgressiveKD(criterion.terms["progressive"].targets).targets.rows.is_cuda
