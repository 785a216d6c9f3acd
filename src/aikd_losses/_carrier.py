"""Tensors and modules that travel with a loss but do not belong to the model."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class Carrier(nn.Module):
    """An `nn.Module` whose `_carried` attributes no wrapper finds, though they move, switch mode and are saved.

    A wrapper takes what `parameters()`, `buffers()` and `modules()` list for part of the model: DDP would broadcast
    rank 0's store over the others' rows, FSDP would shard the discriminator away from under its optimizer, an
    optimizer made from `self.parameters()` would train the teacher. So what is carried is in none of them. It still
    follows `to()`, tensors in device alone (a storage type is a decision), and what `_saved` names is in `state_dict()`.
    """

    _carried: ClassVar[tuple[str, ...]] = ()
    _saved: tuple[str, ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._carried:
            object.__setattr__(self, name, value)  # nn.Module would register a module
        else:
            super().__setattr__(name, value)

    def _modules_in(self, names: tuple[str, ...]) -> dict[str, nn.Module]:
        return {name: x for name in names if isinstance(x := getattr(self, name), nn.Module)}

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        for module in self._modules_in(self._carried).values():
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

    def _saved_tensors(self) -> dict[str, Tensor]:
        """What is in `state_dict()` beside modules, by name. Loading fills all of it, in place, or nothing."""
        return {name: x for name in self._saved if isinstance(x := getattr(self, name), Tensor)}

    def _check_load(self, saved: Mapping[str, Tensor]) -> None:
        """Refuse, with ValueError or TypeError, what fits in type and shape but not in value."""

    def _fill(self, saved: Mapping[str, Tensor]) -> None:
        """Take what was saved, all of which fits, and work out anew what follows from it."""
        for name, own in self._saved_tensors().items():
            own.copy_(saved[name].detach())

    def _own_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for name, module in self._modules_in(self._saved).items():
            module.state_dict(destination=state, prefix=f"{name}.")
        return {**state, **self._saved_tensors()}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: x for name, x in self._own_state().items()})

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        if isinstance(state_dict, Mapping):  # what is none torch refuses
            self._refuse_misfit(state_dict, "", strict)  # whose strictness is not told below
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._refuse_misfit(state_dict, prefix, False)
        own = self._own_state()
        saved = {name: state_dict[prefix + name] for name in own if prefix + name in state_dict}
        others = {key: x for key, x in state_dict.items() if key.removeprefix(prefix) not in saved}
        super()._load_from_state_dict(others, prefix, *args)
        args[2].extend(prefix + name for name in own if name not in saved)  # the missing keys
        for name, module in self._modules_in(self._saved).items():
            inner = {key.removeprefix(f"{name}."): x for key, x in saved.items() if key.startswith(f"{name}.")}
            module.load_state_dict(inner, strict=False)
        if saved.keys() >= self._saved_tensors().keys():  # a table without its flags would be silently wrong
            self._fill(saved)

    def _refuse_misfit(self, state_dict: Mapping[str, Any], prefix: str, strict: bool) -> None:
        """Of a checkpoint that does not fit this object or one inside it nothing is loaded."""
        misfits, own, theirs = [], dict[str, Any](), []
        for name, module in self.named_modules(None, prefix[:-1], False):
            at, here = name and f"{name}.", dict[str, Any]()
            module._save_to_state_dict(here, at, False)
            own |= here
            if not isinstance(module, Carrier) and not type(module).__module__.startswith(("aikd_losses.", "torch.")):
                theirs.append(at)  # the user's, who may have hooks that rename
            if isinstance(module, Carrier):
                # None: what would be there with other settings, and without which the rest would be taken for what it is not.
                here = {at + key: None for key in module._saved} | here
            wrong = [
                f"`{key}` in the checkpoint is {_kind(state_dict[key])}; here it is {_kind(x)}. Build this object with the "
                "settings it was saved with."
                for key, x in here.items()
                if key in state_dict and not _fits(state_dict[key], x, module)
            ]
            misfits += wrong
            if isinstance(module, Carrier) and not wrong:
                names = module._saved_tensors()
                saved = {key: state_dict[at + key] for key in names if at + key in state_dict}
                try:
                    if len(saved) == len(names):
                        module._check_load(saved)
                except (ValueError, TypeError) as error:
                    misfits.append(f"{name or type(self).__name__}: {error}")
        for what, wanted, found in (("Missing", own, state_dict), ("Unexpected", state_dict, own)):
            keys = ", ".join(f'"{x}"' for x in wanted if x not in found and not x.startswith(tuple(theirs)))
            misfits += [f"{what} key(s) in state_dict: {keys}."] if strict and keys else []
        if misfits:
            whose = f"Error(s) in loading state_dict for {type(self).__name__}:\n\t"
            raise RuntimeError(whose + "\n\t".join(misfits))


def _fits(saved: object, own: object, module: nn.Module) -> bool:
    """Whether it can be loaded. Of the user's modules torch asks for the shape alone, and would find out after ours."""
    if isinstance(module, Carrier):
        return _kind(saved) == _kind(own)
    if type(module)._load_from_state_dict is not nn.Module._load_from_state_dict:  # or the module does
        return True
    return not isinstance(own, Tensor) or is_lazy(own) or getattr(saved, "shape", None) == own.shape


def _kind(x: object) -> str:
    """What of a value must be here as in the checkpoint."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    kind = "" if x.layout is torch.strided else f" and {x.layout}"
    return f"{x.dtype} of shape {tuple(x.shape)}{kind}{' without values (meta)' if x.is_meta else ''}"


def _moved(value: Tensor, fn: Any) -> Tensor:
    """`value` on the device to which `fn` moves things, with its own dtype; without values on meta, zeros."""
    probe = fn(torch.empty(0, device=value.device))
    device = probe.device
    if device.type == "mps" and value.dtype == torch.float64:  # pragma: no cover (needs an Apple GPU)
        value = value.float()  # MPS knows no float64
    moved = torch.zeros_like(value, device=device) if value.is_meta else value.to(device)
    return moved.share_memory_() if device.type == "cpu" and probe.is_shared() else moved
