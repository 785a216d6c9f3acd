"""Which tensors the methods of a stack's terms are handed."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .progressive import ProgressiveKD


@dataclass(frozen=True)
class Call:
    """What a method of a term is handed: parameter -> name of the tensor, and which of them it cannot do without."""

    term: str
    names: dict[str, str]
    required: list[str]

    def shown(self) -> str:
        """The names of the tensors that are needed, and in brackets those that may be left out."""
        needed = [self.names[parameter] for parameter in self.required]
        taken = [name for parameter, name in self.names.items() if parameter not in self.required]
        return ", ".join(needed) + (f" [{', '.join(taken)}]" if taken else "")

    def pick(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        picked = {}
        for parameter, name in self.names.items():
            value = tensors.get(name)
            if value is not None:
                picked[parameter] = value
            elif parameter == "index" and name in tensors:
                picked[parameter] = None  # says: no ids here
            elif parameter in self.required:
                given = ", ".join(tensors) or "nothing"
                raise TypeError(
                    f"Term {self.term!r} needs `{name}`; got {given}. Pass it by name, or use the `inputs` of the stack "
                    "to rename or withhold it."
                )
        return picked


def calls_of(terms: Mapping[str, nn.Module], inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Call]]:
    """Of the terms that have the method: {method: {term: call}}."""
    for name, renamed in inputs.items():
        known = {**_parameters(terms[name], "forward"), **_parameters(terms[name], "update")}
        for parameter, tensor in renamed.items():
            if parameter not in known or not isinstance(tensor, str | None):
                raise ValueError(
                    f"`inputs[{name!r}]` must give parameters of the term, {', '.join(known)}, the name of a tensor or None; "
                    f"got {parameter!r}: {tensor!r}."
                )
    return {
        method: {name: _call(name, x, method, inputs.get(name, {})) for name, x in terms.items() if has(x, method)}
        for method in ("forward", "update")
    }


def _call(name: str, term: nn.Module, method: str, renamed: Mapping[str, str | None]) -> Call:
    call = Call(name, {}, [])
    for parameter, how in _parameters(term, method).items():
        if how.kind not in (how.POSITIONAL_OR_KEYWORD, how.KEYWORD_ONLY):
            raise TypeError(
                f"Term {name!r} must name its tensors in `{method}`, each to be passed by keyword; got `{how}`."
            )
        needed = how.default is how.empty
        tensor = renamed.get(parameter, "student_logits" if parameter == "input" else parameter)
        if tensor is None and needed:
            raise ValueError(f"`inputs[{name!r}]` must not withhold `{parameter}`, which the term requires.")
        if tensor is not None:
            call.names[parameter] = tensor
            # Left out by mistake, `target` would silently make ProgressiveKD its other form.
            if needed or (parameter == "target" and isinstance(term, ProgressiveKD)):
                call.required.append(parameter)
    return call


def _parameters(term: nn.Module, method: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(getattr(term, method)).parameters if has(term, method) else {}


def has(term: nn.Module, method: str) -> bool:
    return callable(getattr(term, method, None))
