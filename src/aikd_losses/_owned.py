"""A discriminator and the optimizer that trains it: one step over the rows of all ranks, a move, a checkpoint.

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
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from . import functional
from ._carrier import Carrier
from ._ranks import Ranks

FUSED = ("cpu", "cuda", "mps", "xpu")  # where torch's optimizers have a fused step
NOT_NEGATIVE = ("lr", "betas", "eps", "weight_decay", "momentum", "step", "exp_avg_sq")


class Owner(Carrier):
    """Carries a `discriminator` and the `optimizer` that holds exactly its parameters, if there is one."""

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
        self.discriminator, self.optimizer = discriminator, optimizer

    def _held(self) -> list[Tensor]:
        return [] if self.optimizer is None else [p for group in self.optimizer.param_groups for p in group["params"]]

    def _score(self, state: dict[str, Tensor], condition: Tensor | None, x: Tensor) -> Tensor:
        """Scores `(rows,)`, by a discriminator whose parameters and buffers are those in `state`, where given."""
        shown = x.to(next(self.discriminator.parameters(), x).dtype)
        scores: Tensor = functional_call(
            self.discriminator, state, (shown,) if condition is None else (shown, condition)
        )
        if scores.shape not in ((len(x),), (len(x), 1)):
            raise ValueError(
                f"`discriminator` must return a score a row, shape ({len(x)},) or ({len(x)}, 1) for rows of shape "
                f"{tuple(x.shape)}; got {tuple(scores.shape)}."
            )
        return scores.flatten().to(x.dtype)

    def _refuse_to_step(self) -> None:
        """RuntimeError where `update` cannot train the discriminator."""
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

    def _take_first_ranks(self) -> None:
        """The discriminator of the first rank, once."""
        if self._ranks.active() and not self._same_on_all_ranks:
            self._ranks.broadcast_from_first([*self.discriminator.parameters(), *self.discriminator.buffers()])
            self._same_on_all_ranks = True

    def _step(self, values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Step on the mean of the values that count, of all ranks' rows; the mean, and the norm of its gradient."""
        assert self.optimizer is not None  # checked
        trained = [p for p in self._held() if p.requires_grad]
        loss = functional.reduce_positions(values, counts, "sum")
        slopes = torch.autograd.grad(loss, trained, allow_unused=True)
        used = [(p, slope) for p, slope in zip(trained, slopes, strict=True) if slope is not None]
        sums = [loss.detach(), counts.sum().to(loss), *(slope for _, slope in used)]
        loss, count, *sums = self._ranks.sum(sums) if self._ranks.active() else sums  # however many rows each has
        means = [x / count.clamp_min(1).to(x) for x in sums]
        norm = nn.utils.get_total_norm(means)
        self.optimizer.zero_grad()  # leaves out what is not ours
        for (parameter, _), mean in zip(used, means, strict=True):
            parameter.grad = mean
        self.optimizer.step()
        self.optimizer.zero_grad()  # to None: zeros would let another optimizer that holds them decay them
        return loss / count.clamp_min(1), norm

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = list(self.discriminator.parameters())
        super()._apply(fn, recurse)
        if self.optimizer is not None:
            now = dict(zip(map(id, before), self.discriminator.parameters(), strict=True))
            state = self.optimizer.state_dict()
            for group, saved in zip(self.optimizer.param_groups, state["param_groups"], strict=True):
                group["params"] = [now[id(p)] for p in group["params"]]  # a move can make new ones of the old
                if not all(p.device.type in FUSED for p in group["params"]):
                    saved["fused"] = False if saved.get("fused") else saved.get("fused")
            self.optimizer.load_state_dict(state)  # which moves it to its parameters
        return self

    def _saved_tensors(self) -> dict[str, Tensor]:
        if self.optimizer is None:
            return {}
        # What the optimizer will keep of each parameter, a step of its copy on zeros finds out.
        blanks: dict[int, Any] = {id(p): nn.Parameter(torch.zeros_like(p)) for p in self._held()}
        twin = copy.deepcopy(self.optimizer, dict(blanks))  # a memo: these are the copies of those
        for blank in blanks.values():
            blank.grad = torch.zeros_like(blank)
        twin.step()
        found: dict[str, Tensor] = {}
        for name, p in self.discriminator.named_parameters():
            state = self.optimizer.state.get(p, {})
            found[f"optimizer.state.{name}.started"] = torch.tensor(bool(state), device="cpu")
            for key, x in (state or twin.state[blanks[id(p)]]).items():
                if isinstance(x, Tensor):
                    found[f"optimizer.state.{name}.{key}"] = x.detach()
        for i, group in enumerate(self.optimizer.param_groups):
            for key in self._numbers(group):
                x = torch.as_tensor(group[key], dtype=torch.float64, device="cpu")
                found[f"optimizer.param_groups.{i}.{key}"] = x
        return found

    def _numbers(self, group: dict[str, Any]) -> list[str]:
        """The settings of a group that are a number, several, or a tensor; what a schedule adds to it is not its own."""
        assert self.optimizer is not None
        several = {
            key: x if isinstance(x, tuple) else (x,) for key, x in group.items() if key in self.optimizer.defaults
        }
        return [
            key
            for key, values in several.items()
            if all(isinstance(x, Real | Tensor) and not isinstance(x, bool) for x in values)
        ]

    def _check_load(self, saved: Mapping[str, Tensor]) -> None:
        for key, x in saved.items():
            low = 0.0 if key.rpartition(".")[2] in NOT_NEGATIVE else -torch.inf
            if not bool((x.isfinite() & (x >= low)).all()):
                wanted = "finite" if low else "finite and not negative"
                raise ValueError(f"`{key}` in the checkpoint must be {wanted}; got {x.min():g} to {x.max():g}.")

    def _fill(self, saved: Mapping[str, Tensor]) -> None:
        if self.optimizer is None:
            return
        for name, p in self.discriminator.named_parameters():
            prefix = f"optimizer.state.{name}."
            kept = {key.removeprefix(prefix): x.detach().clone() for key, x in saved.items() if key.startswith(prefix)}
            self.optimizer.state.pop(p, None)
            if kept.pop("started"):
                self.optimizer.state[p] = kept
        for i, group in enumerate(self.optimizer.param_groups):
            for key in self._numbers(group):
                x = saved[f"optimizer.param_groups.{i}.{key}"]
                if isinstance(group[key], Tensor):
                    group[key].copy_(x)  # in place, as a captured step may hold it
                else:
                    group[key] = tuple(x.tolist()) if x.ndim else x.item()
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # which moves it to its parameters


def _check(optimizer: object, discriminator: nn.Module) -> None:
    inner = getattr(optimizer, "optimizer", None) or getattr(optimizer, "_optimizer", None)
    wrapper = isinstance(inner, Optimizer)
    if wrapper or not isinstance(optimizer, Optimizer):
        rule = "a torch optimizer, not a framework's wrapper around one" if wrapper else "a torch optimizer"
        raise TypeError(f"`optimizer` must be {rule}; got {type(optimizer).__name__}.")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = {id(p) for p in discriminator.parameters()}
    if held != own:
        raise ValueError(
            f"`optimizer` must hold exactly the discriminator's {len(own)} parameters; {len(held & own)} of them and "
            f"{len(held - own)} others are in it. Build it from `discriminator.parameters()`."
        )
