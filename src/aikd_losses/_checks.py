"""What every public call requires of its arguments: one check a fact, one sentence an error.

Checks of shape, type and device are free and always run. Checks of *values* (an index in range) would make a GPU
wait for the CPU, so they run on CPU tensors alone (`values_are_free`); elsewhere an index out of range is caught by
PyTorch's own device-side assertion, as it is for `torch.nn.CrossEntropyLoss`.
"""

import math
import sys
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
LARGEST = sys.float_info.max
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
POSITIONS = "must have the shape of `student_logits` without its class axis, "


def shown(value: object) -> str:
    """What was found, for a sentence: of bounded length, and without an error of its own."""
    try:
        text = repr(value)
    except Exception:
        return f"an object of type {type(value).__name__}, which cannot be shown"
    return text if len(text) <= 500 else f"{text[:500]}..."


def settings(thing: object, *names: str) -> str:
    """For a `repr`."""
    return ", ".join(f"{name}={getattr(thing, name)!r}" for name in names)


def number(name: str, value: object, low: float, high: float) -> float:
    """A finite real number in the interval [low, high]."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number; got {shown(value)}.")
    if not low <= value <= min(high, LARGEST):  # type: ignore[operator]
        wanted = f"a finite number not below {low:g}" if high == math.inf else f"in the interval [{low:g}, {high:g}]"
        raise ValueError(f"`{name}` must be {wanted}; got {shown(value)}.")
    return float(value)


def integer(name: str, value: object, low: int = -(2**63), high: int = 2**63 - 1) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an integer; got {shown(value)}.")
    if not low <= int(value) <= high:
        wanted = f"at least {low}" if int(value) < low else f"between {low} and {high}"
        raise ValueError(f"`{name}` must be {wanted}; got {shown(value)}.")
    return int(value)


def choice(name: str, value: T, options: Collection[T]) -> T:
    if not isinstance(value, (str, torch.dtype)) or value not in options:  # no union, for dynamo of torch 2.6
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, options))}; got {shown(value)}.")
    return value


def reduction(value: str) -> str:
    if value == "batchmean":
        raise ValueError(
            "`reduction` must be 'mean', not 'batchmean': classes are summed, 'mean' is that over samples."
        )
    return choice("reduction", value, ("mean", "sum", "none"))


def divergence(value: object, beta: object) -> float:
    """The name of a divergence, and the beta of "js"."""
    choice("divergence", value, ("forward_kl", "reverse_kl", "js"))
    x = number("beta", beta, 0.0, 1.0)
    if value == "js" and x in (0.0, 1.0):
        raise ValueError(
            f"`beta` must be inside (0, 1) for 'js'; got {x:g}. Its limits: 'forward_kl' at 0, 'reverse_kl' at 1."
        )
    return x


def temperature(value: object) -> float:
    if isinstance(value, Tensor):
        raise TypeError(
            "`temperature` must be a number; got a tensor. Pass its `.item()`; to learn it see docs/guide/parts.md."
        )
    return number("temperature", value, 1e-9, 1e9)  # beyond, float64 has too few digits for near distributions


def class_dim(value: object) -> int | None:
    return None if value is None else integer("class_dim", value)


def tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        hint = f" Pass one of its entries, {', '.join(map(repr, value))}." if isinstance(value, Mapping) else ""
        hint = " Pass its `.logits`." if hasattr(value, "logits") else hint  # the output of a model of transformers
        raise TypeError(f"`{name}` must be a torch.Tensor; got {type(value).__name__}.{hint}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else value.layout
        raise TypeError(f"`{name}` must be a dense tensor; got {kind}. Pass `{name}.to_dense()`, or pad and mask it.")
    return value


def floating(name: str, value: object) -> Tensor:
    """Of a type that can be computed with, which those of 8 bits cannot."""
    x = tensor(name, value)
    if x.dtype not in FLOATS:
        hint = f" Pass `{name}.float()`." if x.is_floating_point() else ""
        raise TypeError(f"`{name}` must be floating point of 16, 32 or 64 bits; got {x.dtype}.{hint}")
    return x


def _typed(name: str, value: object, dtype: torch.dtype, wanted: str, remedy: str) -> Tensor:
    x = tensor(name, value)
    if x.dtype != dtype:
        raise TypeError(f"`{name}` {wanted}; got {x.dtype}. Pass `{name}.{remedy}()`.")
    return x


def shaped(name: str, x: Tensor, wanted: tuple[int, ...], what: str, remedy: str = "") -> Tensor:
    """Nothing is ever broadcast."""
    if tuple(x.shape) != wanted:
        raise ValueError(f"`{name}` {what}{wanted}; got {tuple(x.shape)}.{remedy}")
    return x


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"`{name}` must be on the device of `{other_name}`, {other.device}; got {value.device}. "
            f"Move it with `.to({str(other.device)!r})`."
        )


def values_are_free(*tensors: Tensor | None) -> bool:
    """Whether looking at values costs no synchronisation and breaks no graph."""
    return not torch.compiler.is_compiling() and all(x is None or x.device.type == "cpu" for x in tensors)


def logits(value: object, dim: int | None, counts: object = None, **like: object) -> int:
    """Floating scores with at least two axes, the mask and what must be like them; returns the position of the class axis."""
    x, dim = floating("student_logits", value), class_dim(dim)
    if x.ndim < 2:
        raise ValueError(f"`student_logits` must have at least 2 axes, (N, C); got shape {tuple(x.shape)}.")
    if dim is None and x.ndim > 2:
        raise ValueError(
            f"`class_dim` is required for logits of shape {tuple(x.shape)}. Pass 1 for (N, C, *), -1 for (N, *, C)."
        )
    dim = 1 if dim is None else dim
    if not -x.ndim <= dim < x.ndim:
        raise IndexError(f"`class_dim` must be an axis of `student_logits`, which has {x.ndim}; got {dim}.")
    if x.shape[dim] < 2:
        raise ValueError(
            f"`student_logits` must have at least 2 classes on axis {dim}; got shape {tuple(x.shape)}. For one score z a "
            "sample (binary), pass torch.cat([torch.zeros_like(z), z], dim)."
        )
    mask(counts, x, dim)
    for name, other in like.items():
        like_logits(name, other, x)
    return dim % x.ndim


def positions(student_logits: Tensor, axis: int) -> tuple[int, ...]:
    """The shape of the logits without the class axis."""
    return tuple(student_logits.select(axis, 0).shape)


def like_logits(name: str, value: object, student_logits: Tensor) -> None:
    """Floating, of exactly the logits' shape, on their device."""
    x = shaped(name, floating(name, value), tuple(student_logits.shape), "must have the shape of `student_logits`, ")
    same_device(name, x, "student_logits", student_logits)


def mask(value: object, student_logits: Tensor, axis: int, name: str = "mask") -> None:
    """None, or a bool a position."""
    if value is not None:
        x = _typed(name, value, torch.bool, "must be of type bool, True = counts", "bool")
        shaped(name, x, positions(student_logits, axis), POSITIONS)
        same_device(name, x, "student_logits", student_logits)


def class_target(value: object, student_logits: Tensor, axis: int, counts: Tensor | None) -> None:
    """Class indices (int64, a position each) or class probabilities (floating, like the logits); where looking is free,
    within the classes, and distributions."""
    x = tensor("target", value)
    if x.is_floating_point() and x.shape != positions(student_logits, axis):
        like_logits("target", x, student_logits)
        hint = "For labels pass int64 indices; several a position need another loss, BCEWithLogitsLoss."
        distributions("target", x.movedim(axis, -1), counts, hint)
        return
    one_hot = x.shape == student_logits.shape
    remedy = f" If it is one-hot, pass `target.argmax({axis})`, or `target.float()` for probabilities."
    if not one_hot:
        _typed("target", x, torch.int64, "of class indices must be of type int64", "long")
    shaped("target", x, positions(student_logits, axis), f"of class indices {POSITIONS}", remedy if one_hot else "")
    same_device("target", x, "student_logits", student_logits)
    size = student_logits.shape[axis]
    _in_range("target", x, counts, size, "number of classes", "mask=target != -100 leaves some out")


def sample_index(
    name: str, value: object, shape: tuple[int, ...] | None, size: int | None, counts: Tensor | None = None
) -> None:
    """Sample ids: int64, of the given shape (any one axis for None), below `size`."""
    x = _typed(name, value, torch.int64, "must be of type int64", "long")
    if shape is not None:
        shaped(name, x, shape, POSITIONS)
    elif x.ndim != 1:
        raise ValueError(f"`{name}` must have one axis, (N,); got shape {tuple(x.shape)}.")
    if size is not None:
        _in_range(name, x, counts, size, "`num_samples`", "ids count from 0 within the training set")


def _in_range(name: str, x: Tensor, counts: Tensor | None, size: int, of_what: str, hint: str) -> None:
    if not values_are_free(x, counts):
        return
    try:
        low, high = map(int, (x if counts is None else x[counts]).aminmax())
    except RuntimeError:  # there is none; or under torch.func.vmap nobody may look
        return
    if low < 0 or high >= size:
        raise IndexError(
            f"`{name}` must be in 0..{size - 1} (the {of_what} is {size}); got values in {low}..{high} ({hint})."
        )


def share(name: str, value: object, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A number in 0..1, or a tensor of them: one in all, or one each; where `like` is, in its type."""
    if not isinstance(value, Tensor):
        return like.new_full((), number(name, value, 0.0, 1.0))
    x = floating(name, value)
    if tuple(x.shape) not in ((), shape):
        raise ValueError(f"`{name}` must be a number or have the shape {tuple(shape)}; got {tuple(x.shape)}.")
    if values_are_free(x) and x.numel():
        low, high = map(float, x.detach().aminmax())
        if not 0 <= low <= high <= 1:
            raise ValueError(f"`{name}` must be in the interval [0, 1]; got values in [{low:g}, {high:g}].")
    return x.to(like)


def distributions(name: str, rows: Tensor, counts: Tensor | None, hint: str) -> None:
    """Probabilities, classes last: checked to be some, where that is free, within what bfloat16 rounds."""
    if not values_are_free(rows, counts):
        return
    try:
        x = rows if counts is None else rows[counts]
        sums = x.sum(-1, dtype=torch.promote_types(x.dtype, torch.float32))
        sound = bool((x >= 0).all() & ((sums - 1).abs() <= 0.02).all())
    except RuntimeError:  # under torch.func.vmap nobody may look
        return
    if not sound:
        raise ValueError(f"`{name}` must hold a distribution a row (no negative value, sum 1, nothing NaN). {hint}")
