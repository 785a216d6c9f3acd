"""A discriminator and the optimizer that trains it: one step over the rows of all ranks, a move, a checkpoint.

The optimizer travels as tensors that exist from the start, so that names, shapes and types depend on the settings alone:

    optimizer.state.<parameter>.started   whether it was ever stepped: no state is not the same as one of zeros
    optimizer.state.<parameter>.<name>    what the optimizer keeps of it
    optimizer.param_groups.<i>.<name>     a group's numbers, float64; switches (fused, amsgrad, ...) stay this object's own
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import LBFGS, Optimizer

from . import functional
from ._carrier import Carrier
from ._ranks import Ranks

FUSED = ("cpu", "cuda", "mps", "xpu")  # where torch's optimizers have a fused step
NO_NUMBERS = ("params", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")  # schedulers put these in
NOT_NEGATIVE = ("lr", "betas", "eps", "weight_decay", "momentum", "alpha", "rho")
OF_SQUARES = ("step", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum", "row_var", "col_var")


class Owner(Carrier):
    """Carries a `discriminator` and the `optimizer` that holds exactly its parameters, if there is one."""

    _check: Callable[..., Any]
    _carried: ClassVar[tuple[str, ...]] = ("discriminator",)
    _saved = ("discriminator",)
    discriminator: nn.Module

    def __init__(
        self, discriminator: nn.Module, optimizer: Optimizer | None, process_group: dist.ProcessGroup | None
    ) -> None:
        super().__init__()
        self._ranks = Ranks(process_group)
        self._same_on_all_ranks = False
        if not isinstance(discriminator, nn.Module):
            raise TypeError(f"`discriminator` must be an nn.Module (an instance); got {discriminator!r}.")
        if optimizer is not None:
            _check(optimizer, discriminator)
        self.discriminator = discriminator
        self.optimizer = optimizer

    def _held(self) -> list[Tensor]:
        return [] if self.optimizer is None else [p for group in self.optimizer.param_groups for p in group["params"]]

    def _check_update(self, *tensors: Tensor, **named: Tensor | None) -> Any:
        """Raises what `update` refuses of the same arguments, and changes nothing; returns what `_check` does."""
        if not self.training:
            raise RuntimeError(
                "`update` must not be called in eval mode: it would train the discriminator on evaluation data. Call "
                "`.train()` on the loss."
            )
        if self.optimizer is None:
            raise RuntimeError(
                "`update` needs an `optimizer`, given on construction: torch.optim.Adam(discriminator.parameters()). "
                "Without one, step on `discriminator_loss` yourself."
            )
        if not any(p.requires_grad for p in self._held()):
            raise RuntimeError(
                "`update` needs a discriminator that can be trained; every parameter of its optimizer has requires_grad=False."
            )
        return self._check(*tensors, **named)

    def _optimizer_shown(self) -> str:
        """Its kind and its learning rates, as it stands."""
        if self.optimizer is None:
            return "None"
        rates = sorted({float(group["lr"]) for group in self.optimizer.param_groups if "lr" in group})
        return f"{type(self.optimizer).__name__}({', '.join(f'lr={rate:g}' for rate in rates)})"

    def _score(self, state: dict[str, Tensor], condition: Tensor | None, x: Tensor) -> Tensor:
        """Scores `(rows,)`, by a discriminator whose parameters and buffers are those in `state`, where given."""
        shown = x.to(next(self.discriminator.parameters(), x).dtype)
        arguments = (shown,) if condition is None else (shown, condition)
        scores: Tensor = functional_call(self.discriminator, state, arguments)
        if scores.shape not in ((len(x),), (len(x), 1)):
            raise ValueError(
                f"`discriminator` must return a score a row, shape ({len(x)},) or ({len(x)}, 1) for rows of shape "
                f"{tuple(x.shape)}; got {tuple(scores.shape)}."
            )
        return scores.flatten().to(x.dtype)

    def _before_step(self) -> None:
        """Take the first rank's discriminator, once."""
        if self._ranks.active() and not self._same_on_all_ranks:
            self._ranks.broadcast_from_first([*self.discriminator.parameters(), *self.discriminator.buffers()])
            self._same_on_all_ranks = True

    def _step(self, values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Step on the mean of the values that count, of all ranks' rows; the mean, and the norm of its gradient."""
        assert self.optimizer is not None  # checked
        alone = not self._ranks.active()
        trained = [p for p in self._held() if p.requires_grad]
        loss = functional.reduce_positions(values, counts, "mean" if alone else "sum")
        found = zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True)
        slopes = {p: slope for p, slope in found if slope is not None}
        loss = loss.detach()
        if not alone:  # however many rows each has
            loss, count, *sums = self._ranks.sum([loss, counts.sum().to(loss), *slopes.values()])
            loss = loss / count.clamp_min(1)
            slopes = {p: x / count.clamp_min(1).to(x) for p, x in zip(slopes, sums, strict=True)}
        norm = nn.utils.get_total_norm(list(slopes.values()))
        self.optimizer.zero_grad()  # leaves out what is not ours
        for parameter, slope in slopes.items():
            parameter.grad = slope
        self.optimizer.step()
        self.optimizer.zero_grad()  # to None: zeros would let another optimizer that holds them decay them
        return loss, norm

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = list(self.discriminator.parameters())
        super()._apply(fn, recurse)
        if self.optimizer is not None:
            now = dict(zip(map(id, before), self.discriminator.parameters(), strict=True))
            fused = all(p.device.type in FUSED for p in now.values())
            state = self.optimizer.state_dict()
            for group, saved in zip(self.optimizer.param_groups, state["param_groups"], strict=True):
                group["params"] = [
                    now[id(p)] for p in group["params"]
                ]  # a move can make new parameters of the old ones
                if saved.get("fused") and not fused:
                    saved["fused"] = False
            self.optimizer.load_state_dict(state)  # which moves it to its parameters
        return self

    def _saved_tensors(self) -> dict[str, Tensor]:
        return {
            f"{part}.{name}": x.detach()
            if isinstance(x, Tensor)
            else torch.tensor(x, dtype=torch.float64, device="cpu")
            for part, values in self._contents().items()
            for name, x in values.items()
        }

    def _check_load(self, saved: Mapping[str, Tensor]) -> None:
        for key, x in saved.items():
            name = key.rpartition(".")[2]
            low = 0.0 if name in NOT_NEGATIVE + OF_SQUARES else -torch.inf
            high = 1.0 if name == "betas" else torch.inf
            if not bool((x.isfinite() & (x >= low) & (x < high)).all()):
                wanted = f"finite and in [{low:g}, {high:g})"
                raise ValueError(f"`{key}` in the checkpoint must be {wanted}; got {x.min():g} to {x.max():g}.")

    def _fill(self, saved: Mapping[str, Tensor]) -> None:
        contents = self._contents()
        for part, values in contents.items():
            for name, own in values.items():
                values[name] = _like(own, saved[f"{part}.{name}"].detach())
        if self.optimizer is not None:
            for i, group in enumerate(self.optimizer.param_groups):
                group.update(contents[f"optimizer.param_groups.{i}"])
            for name, p in self.discriminator.named_parameters():
                self.optimizer.state.pop(p, None)
                if (state := contents[f"optimizer.state.{name}"]).pop("started"):
                    self.optimizer.state[p] = state

    def _contents(self) -> dict[str, dict[str, Any]]:
        """The tensors and numbers of every parameter's state and of every group. What there will be once it was stepped, a step
        of a copy of the optimizer on zeros finds out."""
        contents: dict[str, dict[str, Any]] = {}
        if self.optimizer is None:
            return contents
        stand_ins: dict[int, Any] = {id(p): nn.Parameter(torch.zeros_like(p)) for p in self._held()}
        twin = copy.deepcopy(self.optimizer, dict(stand_ins))  # a memo: these are the copies of those
        for stand_in in stand_ins.values():
            stand_in.grad = torch.zeros_like(stand_in)
        twin.step()
        for name, p in self.discriminator.named_parameters():
            state = self.optimizer.state.get(p)
            kept = {key: x for key, x in (state or twin.state[stand_ins[id(p)]]).items() if x is not None}
            contents[f"optimizer.state.{name}"] = {"started": torch.tensor(bool(state), device="cpu"), **kept}
        for i, (group, later) in enumerate(zip(self.optimizer.param_groups, twin.param_groups, strict=True)):
            numbers = [key for key, x in later.items() if key not in NO_NUMBERS and _is_number(x)]
            contents[f"optimizer.param_groups.{i}"] = {key: group.get(key, 0) for key in numbers}
        return contents


def _is_number(x: object) -> bool:
    """Or several, or a tensor."""
    if isinstance(x, list | tuple):
        return all(map(_is_number, x))
    return isinstance(x, Real | Tensor) and not isinstance(x, bool)


def _like(own: Any, saved: Tensor) -> Any:
    """What was saved, kept as this object keeps its own."""
    if isinstance(own, Tensor):
        return own.copy_(saved)  # in place, as others may hold it
    if isinstance(own, list | tuple):
        return type(own)(map(_like, own, saved))
    number = saved.item()
    return int(number) if isinstance(own, int) and number == int(number) else number


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Scores, and above all their gradients, need the precision."""
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _check(optimizer: object, discriminator: nn.Module) -> None:
    inner = getattr(optimizer, "optimizer", None) or getattr(optimizer, "_optimizer", None)
    if isinstance(inner, Optimizer):
        raise TypeError(
            f"`optimizer` must be a torch optimizer, not a framework's wrapper around one; got {type(optimizer).__name__}. "
            "Keep the discriminator's optimizer out of the framework and pass it as it is."
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"`optimizer` must be a torch optimizer; got {optimizer!r}.")
    if isinstance(optimizer, LBFGS):
        raise TypeError(
            "`optimizer` must take a step from gradients alone, not call a closure; got LBFGS. Use Adam or SGD."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = {id(p) for p in discriminator.parameters()}
    if held != own:
        raise ValueError(
            f"`optimizer` must hold exactly the discriminator's {len(own)} parameters; {len(held & own)} of them and "
            f"{len(held - own)} others are in it. Build it from `discriminator.parameters()`."
        )
