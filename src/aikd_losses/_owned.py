"""A discriminator and the optimizer that trains it: they move together and travel in one checkpoint.

The optimizer travels as tensors that exist from the start, so that names, shapes and types depend on the settings alone:

    optimizer.state.<parameter>.started   whether it was ever stepped: no state is not the same as one of zeros
    optimizer.state.<parameter>.<name>    what the optimizer keeps of it
    optimizer.param_groups.<i>.<name>     a group's numbers, float64; switches (fused, amsgrad, ...) stay this object's own
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ._carrier import Carrier


class Owner(Carrier):
    """Carries a `discriminator` and the `optimizer` that holds exactly its parameters, if there is one."""

    _carried: ClassVar[tuple[str, ...]] = ("discriminator",)
    _saved = ("discriminator",)
    discriminator: nn.Module

    def __init__(self, discriminator: nn.Module, optimizer: Optimizer | None) -> None:
        super().__init__()
        if not isinstance(discriminator, nn.Module):
            raise TypeError(f"`discriminator` must be an nn.Module (an instance); got {discriminator!r}.")
        if optimizer is not None:
            _check(optimizer, discriminator)
        self.discriminator, self.optimizer = discriminator, optimizer

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = list(self.discriminator.parameters())
        super()._apply(fn, recurse)
        if self.optimizer is not None:
            state = self.optimizer.state_dict()
            now = dict(zip(before, self.discriminator.parameters(), strict=True))
            for group in self.optimizer.param_groups:
                group["params"] = [now[p] for p in group["params"]]  # a move can make new ones of the old
            self.optimizer.load_state_dict(state)  # which moves it to its parameters
        return self

    def _saved_tensors(self) -> dict[str, Tensor]:
        if self.optimizer is None:
            return {}
        # What the optimizer will keep of each parameter, a step of a copy finds out.
        twin, copies = copy.deepcopy((self.optimizer, list(self.discriminator.parameters())))
        for p in copies:
            p.grad = torch.zeros_like(p)
        twin.step()
        found: dict[str, Tensor] = {}
        for (name, own), p in zip(self.discriminator.named_parameters(), copies, strict=True):
            state = self.optimizer.state.get(own)
            found[f"optimizer.state.{name}.started"] = torch.tensor(bool(state), device="cpu")
            for key, x in (state or twin.state[p]).items():
                if isinstance(x, Tensor):
                    found[f"optimizer.state.{name}.{key}"] = x.detach()
        for i, group in enumerate(self.optimizer.param_groups):
            for key in _numbers(self.optimizer):
                x = torch.as_tensor(group[key], dtype=torch.float64, device="cpu")
                found[f"optimizer.param_groups.{i}.{key}"] = x
        return found

    def _fill(self, saved: Mapping[str, Tensor]) -> None:
        if self.optimizer is None:
            return
        for name, p in self.discriminator.named_parameters():
            prefix = f"optimizer.state.{name}."
            state = {key.removeprefix(prefix): x.detach().clone() for key, x in saved.items() if key.startswith(prefix)}
            self.optimizer.state.pop(p, None)
            if state.pop("started"):
                self.optimizer.state[p] = state
        for i, group in enumerate(self.optimizer.param_groups):
            for key in _numbers(self.optimizer):
                x = saved[f"optimizer.param_groups.{i}.{key}"]
                if isinstance(group[key], Tensor):
                    group[key].copy_(x)  # in place, where a captured step looks
                else:
                    group[key] = tuple(x.tolist()) if x.ndim else x.item()
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # which moves it to its parameters


def _numbers(optimizer: Optimizer) -> list[str]:
    """Those of its settings that are a number, several, or a tensor. What a schedule adds to a group is none of them."""
    several = {key: x if isinstance(x, tuple | list) else (x,) for key, x in optimizer.defaults.items()}
    return [key for key, values in several.items() if all(map(_is_number, values))]


def _is_number(x: object) -> bool:
    return isinstance(x, Real | Tensor) and not isinstance(x, bool)


def _check(optimizer: object, discriminator: nn.Module) -> None:
    if not isinstance(optimizer, Optimizer) or isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        raise TypeError(
            "`optimizer` must be a torch optimizer, not a framework's wrapper around one; got "
            f"{type(optimizer).__name__}."
        )
    held = {p for group in optimizer.param_groups for p in group["params"]}
    own = set(discriminator.parameters())
    if held != own:
        raise ValueError(
            f"`optimizer` must hold exactly the discriminator's {len(own)} parameters; {len(held & own)} of them and "
            f"{len(held - own)} others are in it. Build it from `discriminator.parameters()`."
        )
