"""A discriminator and the optimizer that trains it: a step on the rows of all ranks, a move, a checkpoint.

The optimizer travels as tensors that exist from the start, so that names, shapes and types depend on the settings alone:

    optimizer_state.<parameter>.started   whether it was ever stepped: no state is not the same as one of zeros
    optimizer_state.<parameter>.<name>    what the optimizer keeps of it
    optimizer_settings.<i>.<name>         a group's numbers, float64; switches (fused, amsgrad, ...) stay this object's own
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from numbers import Real
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from . import _checks
from ._carrier import Carrier
from ._ranks import Ranks

NOT_NEGATIVE = ("lr", "betas", "eps", "weight_decay", "momentum", "step", "exp_avg_sq")


class _Path:
    """Every attribute of it is it again: `torch.distributed.checkpoint` follows the names in a `state_dict` through objects."""

    def __getattr__(self, name: str) -> _Path:
        if name.startswith("_"):
            raise AttributeError(name)
        return self


class Owner(Carrier):
    """Carries a `discriminator` and the `optimizer` that holds exactly its parameters, if there is one."""

    _carried: ClassVar[tuple[str, ...]] = ("discriminator",)
    _saved = ("discriminator",)
    discriminator: nn.Module
    optimizer_state = optimizer_settings = _Path()

    def __init__(
        self, discriminator: nn.Module, optimizer: Optimizer | None, process_group: dist.ProcessGroup | None
    ) -> None:
        super().__init__()
        check_owned(discriminator, optimizer)
        self.discriminator, self.optimizer = discriminator, optimizer
        self._ranks = Ranks(process_group)
        self._same_on_all_ranks = False

    def _step(self, loss: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Step on the mean of all ranks' rows, however many each has; the mean, and the norm of its gradient."""
        assert self.optimizer is not None  # checked
        trained = [p for p in self.discriminator.parameters() if p.requires_grad]
        alone = not self._ranks.active()
        loss = loss / count.clamp_min(1) if alone else loss  # one division, and not one a parameter
        slopes = torch.autograd.grad(loss, trained, allow_unused=True)
        used = {p: slope for p, slope in zip(trained, slopes, strict=True) if slope is not None}
        loss, *means = loss.detach(), *used.values()
        if not alone:
            count, *sums = self._ranks.sum([count.to(loss), loss, *means])
            loss, *means = (x / count.clamp_min(1).to(x) for x in sums)
        norm = torch.cat([x.reshape(-1) for x in means]).norm() if means else torch.zeros_like(loss)
        self.optimizer.zero_grad()  # leaves out what is not ours
        for p, mean in zip(used, means, strict=True):
            p.grad = mean
        with torch.device("cpu"):  # torch makes some counts on its default device, and waits for those on a GPU
            self.optimizer.step()
        self.optimizer.zero_grad()  # to None: zeros would let another optimizer that holds them decay them
        return loss, norm

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
        rest = {name: x for name, x in vars(self.optimizer).items() if name != "step"}  # which a schedule puts there
        vars(twin).update(rest | vars(twin))  # torch copies few of them
        for p in copies:
            p.grad = torch.zeros_like(p)
        with torch.device("cpu"):  # as in a step
            twin.step()
        found: dict[str, Tensor] = {}
        for (name, own), p in zip(self.discriminator.named_parameters(), copies, strict=True):
            state = self.optimizer.state.get(own)
            kept = {"started": torch.tensor(bool(state), device="cpu"), **(state or twin.state[p])}
            found |= {f"optimizer_state.{name}.{key}": x.detach() for key, x in kept.items() if isinstance(x, Tensor)}
        for i, group in enumerate(self.optimizer.param_groups):
            for key in _numbers(self.optimizer):
                value = torch.as_tensor(group[key], dtype=torch.float64, device="cpu")
                found[f"optimizer_settings.{i}.{key}"] = value
        return found

    def _check_load(self, saved: Mapping[str, Tensor]) -> None:
        for key, x in saved.items():
            name = key.rpartition(".")[2]
            low, wanted = (0.0, "finite and not negative") if name in NOT_NEGATIVE else (-torch.inf, "finite")
            high, wanted = (1.0, "at least 0 and below 1") if name == "betas" else (torch.inf, wanted)
            if not bool((x.isfinite() & (x >= low) & (x < high)).all()):
                raise ValueError(f"`{key}` in the checkpoint must be {wanted}; got {x.min():g} to {x.max():g}.")

    @torch.inference_mode(False)  # in which a tensor that is made could never be changed again
    def _fill(self, saved: Mapping[str, Tensor]) -> None:
        if self.optimizer is None:
            return
        for name, p in self.discriminator.named_parameters():
            prefix = f"optimizer_state.{name}."
            state = {key.removeprefix(prefix): x.detach().clone() for key, x in saved.items() if key.startswith(prefix)}
            self.optimizer.state.pop(p, None)
            if state.pop("started"):
                self.optimizer.state[p] = state
        for i, group in enumerate(self.optimizer.param_groups):
            for key in _numbers(self.optimizer):
                x = saved[f"optimizer_settings.{i}.{key}"]
                if isinstance(group[key], Tensor):
                    group[key].copy_(x)  # in place, where a captured step looks
                else:
                    group[key] = tuple(x.tolist()) if x.ndim else x.item()
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # which moves it to its parameters


def lost_eps(optimizer: Optimizer) -> bool:
    """Whether it is 0 in the type of its parameters: a division by it gives NaN. (What is fused computes in float32.)"""
    groups = [(x.get("eps"), p.dtype) for x in optimizer.param_groups for p in x["params"][:1] if not x.get("fused")]
    return any(isinstance(x, float) and x and not torch.tensor(x, dtype=dtype, device="cpu") for x, dtype in groups)


def _numbers(optimizer: Optimizer) -> list[str]:
    """Those of its settings that are a number, several, or a tensor. What a schedule adds to a group is none of them."""
    several = {key: x if isinstance(x, tuple | list) else (x,) for key, x in optimizer.defaults.items()}
    return [
        key for key, x in several.items() if all(isinstance(y, Real | Tensor) and not isinstance(y, bool) for y in x)
    ]


def check_owned(discriminator: object, optimizer: object) -> None:
    if not isinstance(discriminator, nn.Module):
        raise TypeError(f"`discriminator` must be an nn.Module (an instance); got {_checks.shown(discriminator)}.")
    if optimizer is None:
        return
    if not isinstance(optimizer, Optimizer) or isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        raise TypeError(f"`optimizer` must be a torch optimizer, not a wrapper of one; got {type(optimizer).__name__}.")
    own, held = set(discriminator.parameters()), {p for group in optimizer.param_groups for p in group["params"]}
    if held != own:
        raise ValueError(
            f"`optimizer` must hold exactly the discriminator's {len(own)} parameters; {len(held & own)} of them and "
            f"{len(held - own)} others are in it. Build it from `discriminator.parameters()`."
        )
