"""Tensors and modules that travel with a loss but do not belong to the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

_SAME_SETTINGS = "Build this object with the settings it was saved with."


class Carrier(nn.Module):
    """An `nn.Module` whose `_carried` attributes no wrapper finds, though they move, switch mode and are saved.

    A wrapper takes what `parameters()`, `buffers()` and `modules()` list for part of the model: DDP would broadcast
    rank 0's store over the others' rows, FSDP would shard the discriminator away from under its optimizer, an
    optimizer made from `self.parameters()` would train the teacher. So what is carried is in none of them. It still
    follows `to()`, and what `_saved` names is in `state_dict()`.

    Carried tensors follow `to()` in device alone: a storage type is a decision, not a precision to be cast.
    """

    _carried: ClassVar[tuple[str, ...]] = ()
    _saved: tuple[str, ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._carried:
            object.__setattr__(self, name, value)  # nn.Module would register a module
        else:
            super().__setattr__(name, value)

    def _modules_carried(self) -> list[nn.Module]:
        values = (getattr(self, name) for name in self._carried)
        return [value for value in values if isinstance(value, nn.Module)]

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        for module in self._modules_carried():
            module.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in self._carried:
            value = getattr(self, name)
            if isinstance(value, nn.Module):
                value._apply(fn)
            elif value is not None:
                setattr(self, name, _moved(value, fn))
        return self

    def _check_load(self, saved: Mapping[str, Tensor]) -> None:
        """Refuse, with ValueError or TypeError, what fits in type and shape but not in value."""

    def _before_load(self) -> None:
        """Say, to whom it concerns, that what is here is about to be overwritten."""

    def _after_load(self) -> None:
        """Work out anew what follows from the state just loaded."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._saved:
            value = getattr(self, name)
            if isinstance(value, nn.Module):
                value.state_dict(destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars)
            elif value is not None:
                destination[prefix + name] = value

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        copies, missing, errors = self._fitting(state, prefix)
        for name in self._saved:
            own, key = getattr(self, name), prefix + name
            if isinstance(own, nn.Module):
                inner = {k.removeprefix(f"{key}."): state.pop(k) for k in list(state) if k.startswith(f"{key}.")}
                if not errors:
                    result = own.load_state_dict(inner, strict=False)
                    missing_keys.extend(f"{key}.{k}" for k in result.missing_keys)
                    unexpected_keys.extend(f"{key}.{k}" for k in result.unexpected_keys)
            else:
                state.pop(key, None)
        without_values = any(own.is_meta for own, _ in copies.values())  # on both sides: nothing to load
        # All or nothing: a table without its flags would be silently wrong.
        if not (errors or missing or without_values):
            self._before_load()
            for own, saved in copies.values():
                own.copy_(saved.detach())
            self._after_load()
        missing_keys.extend(missing)
        error_msgs.extend(errors)
        super()._load_from_state_dict(state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _fitting(
        self, state: Mapping[str, Any], prefix: str
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str], list[str]]:
        """What is to be copied from the checkpoint, (own, saved) by name; keys that it lacks; what does not fit, and why."""
        copies, missing, errors = {}, [], []
        for name in self._saved:
            own, key = getattr(self, name), prefix + name
            if isinstance(own, nn.Module):
                errors += _misfits(own, state, key)
            elif own is None:
                if key in state:
                    errors.append(f"`{key}` is in the checkpoint, and this object has none. {_SAME_SETTINGS}")
            elif key not in state:
                missing.append(key)
            elif (misfit := _misfit(own, state[key])) is not None:
                errors.append(f"`{key}` {misfit}")
            else:
                copies[name] = own, state[key]
        if not (errors or missing or any(own.is_meta for own, _ in copies.values())):
            try:
                self._check_load({name: saved for name, (_, saved) in copies.items()})
            except (ValueError, TypeError) as error:
                errors.append(f"{prefix[:-1] or type(self).__name__}: {error}")
        return copies, missing, errors


def _misfit(own: Tensor, saved: object) -> str | None:
    """Why `saved` cannot be loaded into `own`."""
    if not isinstance(saved, Tensor) or saved.layout is not torch.strided or saved.is_nested:
        kind = f"a tensor of layout {saved.layout}" if isinstance(saved, Tensor) else type(saved).__name__
        return f"in the checkpoint must be a dense tensor; it is {kind}."
    if saved.is_meta and not own.is_meta:
        return "in the checkpoint must have values; it is on the meta device."
    if own.is_meta and not saved.is_meta:
        return "is on the meta device and has no memory to load into. Call `.to_empty(device=...)` first."
    if saved.shape != own.shape or saved.dtype != own.dtype:
        return (
            f"in the checkpoint is {saved.dtype} of shape {tuple(saved.shape)}; here it is {own.dtype} of shape "
            f"{tuple(own.shape)}. {_SAME_SETTINGS}"
        )
    return None


def _misfits(module: nn.Module, state: Mapping[str, Any], key: str) -> list[str]:
    """The same for a whole module, whose tensors may be cast."""
    found = []
    for name, own in module.state_dict().items():
        saved = state.get(f"{key}.{name}")
        if isinstance(own, Tensor) and saved is not None:
            cast = saved.to(own.dtype) if isinstance(saved, Tensor) and saved.layout is torch.strided else saved
            if (misfit := _misfit(own, cast)) is not None:
                found.append(f"`{key}.{name}` {misfit}")
    return found


def _moved(value: Tensor, fn: Any) -> Tensor:
    """`value` on the device to which `fn` moves things, with its own dtype."""
    probe = fn(torch.empty(0, dtype=value.dtype, device=value.device))
    if value.is_meta and not probe.is_meta:
        return torch.zeros_like(value, device=probe.device)  # materialised as an empty store
    if probe.device.type == "mps" and value.dtype == torch.float64:  # pragma: no cover (needs an Apple GPU)
        return value.to(probe.device, torch.float32)  # MPS knows no float64
    moved = value.to(probe.device)
    return moved.share_memory_() if probe.device.type == "cpu" and probe.is_shared() else moved
