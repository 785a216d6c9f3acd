"""Strange arguments at every public call: each gives the right answer or one of our own sentences, and an error changes
nothing."""

from __future__ import annotations

import contextlib
import inspect
import math
import re
from fractions import Fraction
from functools import cached_property, partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seeds import reseed
from test_messages import ENTRIES, OF_LINEAR, C, Conditional, N, World, adversarial, resolved, state, unchanged
from torch import Tensor, nn
from torch.testing import assert_close

from aikd_losses import GradientPenalty, LossStack, ProgressiveKD, ZeroCenteredPenalty, check_setup

DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.complex64),
    *(torch.bool, torch.uint8, torch.int32, torch.int64),
]


class Subclass(Tensor):
    pass


LAYOUTS = {  # the same values
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1) if x.ndim else x,
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2] if x.ndim else x,
    "within another": lambda x: torch.cat([x.flatten(), x.flatten()])[x.numel() :].view(x.shape),
    "negative bit": lambda x: torch._neg_view(-x) if x.dtype != torch.bool else x,
    "inference": torch.inference_mode()(torch.clone),
    "subclass": lambda x: x.as_subclass(Subclass),
    "with a graph": lambda x: x.clone().requires_grad_() * 1 if x.is_floating_point() else x,
}
CHANGES = {  # others of the same kind, and what is none
    **LAYOUTS,
    "expanded": lambda x: x[:1].expand_as(x) if x.ndim else x,
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "mkldnn": lambda x: x.detach().to_mkldnn(),
    "nested": lambda x: torch.nested.as_nested_tensor(list(x)) if x.ndim > 1 else x,
    "conjugate": lambda x: x.to(torch.complex64).conj(),
    "none of it": lambda x: x[:0],
    "without classes": lambda x: x[..., :0],
    "one class": lambda x: x[..., :1],
    "one number": lambda x: x.flatten()[:1].sum(),
    "flat": torch.flatten,
    "one axis more": lambda x: x.unsqueeze(-1),
    "one in front": lambda x: x[None],
    "turned": lambda x: x.transpose(0, -1),
    "a list": Tensor.tolist,
    "numpy": lambda x: x.detach().numpy(force=True),
    **{str(dtype): lambda x, dtype=dtype: x.to(dtype) for dtype in DTYPES},
    **{f"filled with {v}": lambda x, v=v: torch.full_like(x, v) for v in (0, 1, -1, -100, 2**40, -(2**63), -math.inf)},
    **{
        f"with {v}": lambda x, v=v: x.clone().flatten().index_fill(0, torch.tensor([0]), v).view(x.shape)
        for v in (math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-40)
    },
}
IDS = ("index", "partner_index", "target")
ODD = [  # in place of anything
    *(None, True, False, 0, 1, -1, 2**70, 10**400, 0.5, -0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf, 1j),
    *(Fraction(1, 2), np.float32(0.5), np.int64(1), np.float64("nan"), np.array(1)),
    *("x", "mean", "cpu", "cuda:x", b"x", [], [1.0], (), {}, {"a": 1}, {1: 2}, {"kd": {"mask": 3}}, object()),
    *(Tensor, torch.float32, torch.int8, torch.device("meta"), slice(None), range(2), iter([1])),
    *map(torch.tensor, (0.5, 1, [], True, 1j, [[[[1.0, 1.0]]]])),
]


def trained(discriminator, **arguments):
    return adversarial(discriminator, optimizer=torch.optim.Adam(discriminator.parameters()), **arguments)


class Wider(World):
    """With losses of other settings."""

    relativistic = cached_property(lambda w: trained(Conditional(), objective="relativistic", inputs="log_probs"))
    penalized = cached_property(lambda w: trained(w.mlp, penalty=GradientPenalty(), inputs="logits", reduction="none"))
    zero_centered = cached_property(lambda w: trained(w.mlp, penalty=ZeroCenteredPenalty()))
    of_ema = cached_property(lambda w: ProgressiveKD(w.ema))
    with_labels = cached_property(lambda w: LossStack({"ce": nn.CrossEntropyLoss(), "p": ProgressiveKD(w.store)}))
    setup = property(lambda w: partial(check_setup, w.method))
    setup_of_labels = property(lambda w: partial(check_setup, w.with_labels))


METHODS = ("forward", "discriminator_loss", "update")
PROBS = torch.randn(N, C).softmax(-1)
CALLS = {entry: (entry, {}) for entry in ENTRIES if entry != "mlp"}  # whose words are torch's
CALLS["method.update"] = ("method.update", dict(index=None))  # as terms before the one that refuses would write
CALLS |= {
    f"{entry} {i}": (entry, other)
    for i, (entry, other) in enumerate(
        [
            ("functional.deterministic_kd", dict(divergence="js")),
            ("functional.progressive_kd", dict(target=PROBS, reduction="none")),
            ("functional.progressive_kd", dict(alpha=torch.rand(N), temperature=2.0, class_dim=-1)),
            ("CachedTargets", dict(top_k=2, device="cpu")),
            ("progressive", dict(mix_lambda=torch.rand(N))),
            ("of_ema", dict(partner_index=None, mix_lambda=1.0)),
            ("progressive.update", dict(partner_index=None)),
            ("method", dict(partner_index=None, condition=None)),
            *((f"relativistic.{method}", {}) for method in METHODS),
            *((f"penalized.{method}", dict(condition=None)) for method in METHODS),
            *((f"zero_centered.{method}", dict(condition=None)) for method in METHODS[1:]),
            ("setup", {}),
            ("setup_of_labels", dict(target=PROBS, teacher_logits=...)),
        ]
    )
}


def fitting(entry, world, other):
    """Arguments for every parameter: those that fit, or what it is when left out."""
    taken, right, found = resolved(entry, world), world.fitting(), {}
    for name, how in inspect.signature(taken.forward if isinstance(taken, nn.Module) else taken).parameters.items():
        if how.kind == how.VAR_KEYWORD:
            found |= {x: right[x] for x in ("student_logits", "teacher_logits", "target", "index", "mask")}
        elif how.default is how.empty or name in right:
            found[name] = world.right(name)
        else:
            found[name] = how.default
    left_to_python = dict.fromkeys(["keep", "copy", "learning_rate"], ...)
    return {name: x for name, x in (found | left_to_python | other).items() if x is not ...}


OWN = (ValueError, TypeError, IndexError, RuntimeError)
SENTENCE = re.compile(
    r"`[a-z_]+(\(\d+\)|\[.*\]|\.[a-z]+)*`.* (must|is|needs|are|blends|has|does) |Term '|No term uses|Error\(s\) in loading"
    # torch's and Python's own, which say what is wrong
    r"|Device|device|meta tensor|not implemented for"
)


def looked_into(x) -> bool:
    """Whether there are values to compare."""
    return isinstance(x, Tensor) and not x.is_meta and not x.is_nested and x.layout == torch.strided


def same(a, b) -> bool:
    if not looked_into(a) or (a.is_floating_point() and a.element_size() == 1):
        return True
    a, b = (x.detach().resolve_neg().resolve_conj() for x in (a, b))
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def tensors_in(x):
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict | list | tuple):
        for y in x.values() if isinstance(x, dict) else x:
            yield from tensors_in(y)


def finite(x) -> bool:
    if looked_into(x):
        return x.element_size() == 1 or bool((x.detach().abs() < 1e30).all())  # products of larger ones overflow
    return isinstance(x, bool) or not isinstance(x, int | float) or 1e-9 < abs(x) < 1e9


@st.composite
def changed(draw, fitting):
    """Arguments that fit, one to three of them changed or replaced, and whether their values are the same."""
    found, equal = dict(fitting), True
    for name in draw(st.lists(st.sampled_from(sorted(found.keys() - OF_LINEAR)), min_size=1, max_size=3, unique=True)):
        x = found[name]
        if isinstance(x, Tensor) and draw(st.integers(0, 5)):
            no_id = name in IDS and not x.is_cpu  # nobody looks at its values: an assertion of the GPU would end all
            how = draw(st.sampled_from(sorted(x for x in CHANGES if not (no_id and x.startswith("filled with")))))
            with contextlib.suppress(RuntimeError, TypeError, IndexError, ValueError):  # there is no such tensor
                found[name] = CHANGES[how](x)
                equal = equal and how in LAYOUTS
        else:
            found[name], equal = draw(st.sampled_from(ODD)), False
    return found, equal


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", CALLS)
@settings(max_examples=15)
@given(data=st.data())
def test_a_strange_argument_gives_the_right_answer_or_a_sentence_and_an_error_changes_nothing(
    call, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # a path may be asked for
    world, (entry, other) = Wider(), CALLS[call]
    function, fits = resolved(entry, world), fitting(entry, world, other)
    arguments, equal = data.draw(changed(fits), label="arguments")
    kept = {n: x.detach().clone() if isinstance(x, Tensor) and not x.is_nested else x for n, x in arguments.items()}
    pure = not re.search("update|write|advance", call)
    reseed(0)
    expected = list(tensors_in(function(**fits))) if pure and equal else []
    result = error = None
    reseed(0)
    before = state(world.parts())
    try:
        result = function(**arguments)
    except OWN as caught:
        error = caught
    for found, right in zip(tensors_in(result), expected, strict=False):
        assert_close(found.detach().as_subclass(Tensor), right.detach())
    if error is not None:
        # What is said of settings is in test_messages.py, or left to Python.
        assert inspect.isclass(function) or SENTENCE.search(str(error)), f"not ours: {error!r}"
        if inspect.isclass(function):
            torch.set_rng_state(before["random numbers"])  # it may have drawn a discriminator's first weights
        unchanged(before, world.parts())
    elif all(map(finite, arguments.values())):
        assert all(x.is_meta or not torch.isnan(x).any() for x in tensors_in(result))
    assert not any(x.requires_grad for part in world.parts() for x in part.state_dict().values())
    for name, x in kept.items():
        assert same(x, arguments[name]), f"{name} was changed"
