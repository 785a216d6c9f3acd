"""What every public call requires of its arguments: one check a fact, one sentence an error.

Checks of shape, type and device are free and always run. Checks of *values* (an index in range) would make a GPU
wait for the CPU, so they run on CPU tensors alone (`values_are_free`); elsewhere an index out of range is caught by
PyTorch's own device-side assertion, as it is for `torch.nn.CrossEntropyLoss`.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
DIVERGENCES = ("forward_kl", "reverse_kl", "js")
WITHOUT_CLASSES = " without its class axis"


def number(
    name: str, value: object, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> float:
    """A finite real number in the interval [low, high], each end open on request."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number; got {value!r}.")
    try:
        x = float(value)
    except OverflowError:  # of an integer that no float holds
        x = math.inf
    inside = (x > low if open_low else x >= low) and (x < high if open_high else x <= high)
    if not (inside and -math.inf < x < math.inf):  # torch.compile does not know math.isfinite
        wanted = f"in the interval {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        if high == math.inf:
            wanted = f"a finite number {'above' if open_low else 'not below'} {low:g}"
        raise ValueError(f"`{name}` must be {wanted}; got {value!r}.")
    return x


def integer(name: str, value: object, low: int | None = None, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an integer; got {value!r}.")
    x = int(value)
    if (low is not None and x < low) or (high is not None and x > high):
        wanted = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"`{name}` must be {wanted}; got {x}.")
    if not -(2**63) <= x < 2**63:
        raise ValueError(f"`{name}` must be an integer of 64 bits; got {x}.")
    return x


def boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False; got {value!r}.")
    return value


def choice(name: str, value: object, options: Collection[str]) -> str:
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, options))}; got {value!r}.")
    return value


def reduction(value: object) -> str:
    if isinstance(value, str) and value == "batchmean":
        raise ValueError(
            "`reduction` must be 'mean', not 'batchmean': here the class axis is always summed, so 'mean' is already "
            "the mean over samples (over positions, where there are several a sample)."
        )
    return choice("reduction", value, REDUCTIONS)


def divergence(value: object, beta: object) -> float:
    """The name of a divergence, and the beta of "js"."""
    choice("divergence", value, DIVERGENCES)
    x = number("beta", beta, 0.0, 1.0)
    if value == "js" and x in (0.0, 1.0):
        raise ValueError(
            f"`beta` must be inside (0, 1) for 'js', which is 0 for every pair at the ends; got {x:g}. For the "
            "limits use divergence='forward_kl' (beta towards 0) or 'reverse_kl' (beta towards 1)."
        )
    return x


def temperature(value: object) -> float:
    x = number("temperature", value, 0.0, math.inf, open_low=True)
    if not 1e-18 <= x <= 1e18:
        raise ValueError(
            f"`temperature` must be between 1e-18 and 1e18, for float32 to hold its square; got {value!r}."
        )
    return x


def num_classes(value: object) -> int:
    return integer("num_classes", value, 2)


def class_dim(value: object) -> int | None:
    return None if value is None else integer("class_dim", value)


def device(value: object) -> torch.device:
    try:
        return torch.device(value)  # type: ignore[call-overload, no-any-return]
    except (TypeError, RuntimeError, ValueError):
        raise ValueError(f"`device` must be a torch.device or the name of one, such as 'cpu'; got {value!r}.") from None


def tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        hint = " Pass its `.logits`." if hasattr(value, "logits") else ""  # the output of a model of transformers
        raise TypeError(f"`{name}` must be a torch.Tensor; got {type(value).__name__}.{hint}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else value.layout
        raise TypeError(
            f"`{name}` must be a dense tensor; got {kind}. Pass `{name}.to_dense()`, or padded, with a mask."
        )
    return value


def floating(name: str, value: object, what: str = "") -> Tensor:
    """Of a type that can be computed with, which those of 8 bits cannot."""
    x = tensor(name, value)
    if x.is_floating_point() and x.dtype not in FLOATS:
        raise TypeError(f"`{name}` must be floating point of 16, 32 or 64 bits; got {x.dtype}. Pass `{name}.float()`.")
    if x.dtype not in FLOATS:
        raise TypeError(f"`{name}` must be floating point{what}; got {x.dtype}.")
    return x


def _typed(name: str, value: object, dtype: torch.dtype, what: str, remedy: str) -> Tensor:
    x = tensor(name, value)
    if x.dtype != dtype:
        raise TypeError(f"`{name}` {what}; got {x.dtype}. Pass `{name}.{remedy}()`.")
    return x


def _shaped(name: str, x: Tensor, wanted: tuple[int, ...], of: str = "") -> None:
    """Nothing is ever broadcast."""
    if tuple(x.shape) != wanted:
        raise ValueError(f"`{name}` must have the shape of `student_logits`{of}, {wanted}; got {tuple(x.shape)}.")


def has_values(name: str, x: Tensor, home: torch.device) -> None:
    """Not on the meta device, where the values are wanted elsewhere."""
    if x.is_meta and home.type != "meta":
        raise ValueError(f"`{name}` must have values to be used on {home}; got a tensor on the meta device.")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"`{name}` must be on the device of `{other_name}`, {other.device}; got {value.device}. "
            f"Move it with `.to({str(other.device)!r})`."
        )


def values_are_free(*tensors: Tensor | None) -> bool:
    """Whether looking at values costs no synchronisation and breaks no graph."""
    on_cpu = all(x is None or x.device.type == "cpu" for x in tensors)
    return on_cpu and not torch.compiler.is_compiling()


def logits(value: object, dim: int | None, name: str = "student_logits") -> int:
    """Floating scores with at least two axes; returns the position of the class axis."""
    x = floating(name, value, " (raw scores before softmax)")
    if x.ndim < 2:
        raise ValueError(f"`{name}` must have at least 2 axes, (N, C); got shape {tuple(x.shape)}.")
    if dim is None:
        if x.ndim > 2:
            raise ValueError(
                f"`class_dim` is required for logits of more than 2 axes; got `{name}` of shape {tuple(x.shape)}. "
                "Pass class_dim=1 for (N, C, *) or class_dim=-1 for (N, *, C)."
            )
        dim = 1
    if not -x.ndim <= dim < x.ndim:
        raise IndexError(f"`class_dim` must be an axis of `{name}`, which has {x.ndim}; got {dim}.")
    if x.shape[dim] < 2:
        raise ValueError(
            f"`{name}` must have at least 2 classes on axis {dim}; got shape {tuple(x.shape)}. For one score z a "
            "sample (binary), pass torch.cat([torch.zeros_like(z), z], dim)."
        )
    return dim % x.ndim


def positions(student_logits: Tensor, axis: int) -> tuple[int, ...]:
    """The shape of the logits without the class axis."""
    shape = tuple(student_logits.shape)
    return shape[:axis] + shape[axis + 1 :]


def like_logits(name: str, value: object, student_logits: Tensor) -> None:
    """Floating, of exactly the logits' shape, on their device."""
    x = floating(name, value)
    _shaped(name, x, tuple(student_logits.shape))
    same_device(name, x, "student_logits", student_logits)


def mask(value: object, student_logits: Tensor, axis: int, name: str = "mask") -> None:
    """None, or a bool a position."""
    if value is None:
        return
    x = _typed(name, value, torch.bool, "must be of type bool, True = counts", "bool")
    _shaped(name, x, positions(student_logits, axis), WITHOUT_CLASSES)
    same_device(name, x, "student_logits", student_logits)


def class_target(value: object, student_logits: Tensor, axis: int) -> None:
    """Class indices (int64, a position each) or class probabilities (floating, like the logits)."""
    x, wanted, of = tensor("target", value), positions(student_logits, axis), "target` of class indices"
    if x.is_floating_point():
        like_logits("target", x, student_logits)
        return
    remedy = f" If it is one-hot, pass `target.argmax({axis})`, or `target.float()` for probabilities."
    one_hot = tuple(x.shape) == tuple(student_logits.shape)
    if not one_hot and x.dtype != torch.int64:
        raise TypeError(f"`{of} must be of type int64; got {x.dtype}. Pass `target.long()`.")
    if tuple(x.shape) != wanted:
        raise ValueError(
            f"`{of} must have the shape of `student_logits`{WITHOUT_CLASSES}, {wanted}; got {tuple(x.shape)}."
            + (remedy if one_hot else "")
        )
    same_device("target", x, "student_logits", student_logits)


def labels_in_range(target: Tensor, num_classes: int, counts: Tensor | None) -> None:
    """Class indices within the classes, where looking is free."""
    _in_range("target", target, counts, num_classes, "number of classes", "mask=target != -100 leaves some out")


def sample_index(
    name: str,
    value: object,
    shape: tuple[int, ...] | None,
    size: int | None,
    counts: Tensor | None = None,
    home: torch.device | None = None,
) -> None:
    """Sample ids: int64, of the given shape (any one axis for None), below `size`, to look up at `home`."""
    x = _typed(name, value, torch.int64, "must be of type int64", "long")
    if shape is None and x.ndim != 1:
        raise ValueError(f"`{name}` must have one axis, (N,); got shape {tuple(x.shape)}.")
    if shape is not None:
        _shaped(name, x, shape, WITHOUT_CLASSES)
    if home is not None:
        has_values(name, x, home)
    if size is not None:
        _in_range(name, x, counts, size, "`num_samples`", "ids count from 0 within the training set")


def _in_range(name: str, x: Tensor, counts: Tensor | None, size: int, of_what: str, hint: str) -> None:
    if not values_are_free(x, counts):
        return
    try:
        checked = x if counts is None else x[counts]
        if checked.numel() == 0:
            return
        low, high = (int(bound) for bound in checked.aminmax())
    except RuntimeError:  # under torch.func.vmap nobody may look
        return
    if low < 0 or high >= size:
        raise IndexError(
            f"`{name}` must be in 0..{size - 1} (the {of_what} is {size}); got values in {low}..{high} ({hint})."
        )


def alpha(value: object, student_logits: Tensor, axis: int) -> None:
    """A number in 0..1, or a tensor of them: one in all, or one a position."""
    if not isinstance(value, Tensor):
        number("alpha", value, 0.0, 1.0)
        return
    floating("alpha", value)
    if value.ndim or value.device.type != "cpu":  # a number on the CPU goes everywhere
        same_device("alpha", value, "student_logits", student_logits)
    if value.ndim and tuple(value.shape) != (wanted := positions(student_logits, axis)):
        raise ValueError(f"`alpha` must be a number or of shape {wanted}; got a tensor of shape {tuple(value.shape)}.")
    _share("alpha", value)


def mix_lambda(value: object, shape: tuple[int, ...], rows: Tensor) -> float | Tensor:
    """A number in 0..1, or a tensor of them: one in all, or one a sample; as it multiplies the `rows`."""
    if not isinstance(value, Tensor):
        return number("mix_lambda", value, 0.0, 1.0)
    x = tensor("mix_lambda", value)
    if tuple(x.shape) not in ((), shape):
        raise ValueError(f"`mix_lambda` must be a number or have the shape {shape}; got {tuple(x.shape)}.")
    has_values("mix_lambda", floating("mix_lambda", x), rows.device)
    _share("mix_lambda", x)
    return x.to(rows).reshape(-1, *[1] * (rows.ndim - 1))


def _share(name: str, x: Tensor) -> None:
    """Values in 0..1, where looking is free."""
    if values_are_free(x) and x.numel():
        low, high = (float(bound) for bound in x.detach().aminmax())
        if not 0 <= low <= high <= 1:
            raise ValueError(f"`{name}` must be in the interval [0, 1]; got values in [{low:g}, {high:g}].")


def condition(value: object, shape: tuple[int, ...], student_logits: Tensor) -> Tensor:
    """A row a position, where the logits are: the positions' shape, then any axes."""
    x = tensor("condition", value)
    if x.is_floating_point():
        floating("condition", x)
    same_device("condition", x, "student_logits", student_logits)
    if tuple(x.shape[: len(shape)]) != shape:
        raise ValueError(
            f"`condition` must have a row a position, shape {shape} and any further axes; got {tuple(x.shape)}."
        )
    return x


def distributions(name: str, value: object, shape: tuple[int, int], counts: Tensor | None, home: torch.device) -> None:
    """Rows of probabilities, (N, C), for `home`: checked to be some, where that is free, within what bfloat16 rounds."""
    x = tensor(name, value)
    has_values(name, x, home)
    floating(name, x)
    if tuple(x.shape) != shape:
        raise ValueError(f"`{name}` must have the shape (N, C) = {shape}; got {tuple(x.shape)}.")
    if not values_are_free(x, counts):
        return
    x = x if counts is None else x[counts]
    if x.numel() == 0:
        return
    low, high = x.sum(-1, dtype=torch.promote_types(x.dtype, torch.float32)).aminmax()
    if not (float(x.min()) >= 0 and float(low) >= 0.98 and float(high) <= 1.02):
        raise ValueError(
            f"`{name}` must hold a distribution a row (no negative value, sum 1, nothing NaN). For logits pass "
            "`torch.softmax(logits, -1)`."
        )


def flags(name: str, value: object, index: Tensor, home: torch.device) -> None:
    """None, or a bool an id."""
    if value is None:
        return
    x = tensor(name, value)
    if x.dtype != torch.bool or x.shape != index.shape:
        raise ValueError(
            f"`{name}` must be a bool of the shape of `index`, {tuple(index.shape)}; got {x.dtype} of shape {tuple(x.shape)}."
        )
    has_values(name, x, home)
    same_device(name, x, "index", index)


def rows(name: str, value: object, weight: Tensor) -> None:
    """Rows (N, C) for the first layer `weight` of a network; under autocast of any type."""
    x = tensor(name, value)
    if x.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"`{name}` must have the shape (N, C) with C = {weight.shape[1]}; got {tuple(x.shape)}.")
    if x.dtype != weight.dtype and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
        raise TypeError(f"`{name}` must be of the type of the weights, {weight.dtype}; got {x.dtype}.")
    if x.device != weight.device:
        raise ValueError(f"`{name}` must be on the device of the weights, {weight.device}; got {x.device}.")
