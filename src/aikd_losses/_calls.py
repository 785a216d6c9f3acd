"""What a term of a stack is, and which tensors its methods are handed."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .progressive import ProgressiveKD

METHODS = ("forward", "update")
NOT_OF_LOGITS = (nn.KLDivLoss, nn.NLLLoss, nn.BCELoss, nn.PoissonNLLLoss, nn.GaussianNLLLoss)


@dataclass(frozen=True)
class Call:
    """What a method of a term is handed: parameter -> name of the tensor, and which of them it cannot do without."""

    term: str
    names: dict[str, str]
    required: set[str]

    @classmethod
    def of(cls, name: str, term: nn.Module, method: str, renamed: Mapping[str, str | None]) -> Call:
        call = cls(name, {}, set())
        for parameter, how in inspect.signature(getattr(term, method)).parameters.items():
            if how.kind not in (how.POSITIONAL_OR_KEYWORD, how.KEYWORD_ONLY):
                raise TypeError(
                    f"Term {name!r} must name its tensors in `{method}`, each to be passed by keyword; got `{how}`."
                )
            needed = how.default is how.empty
            tensor = renamed.get(parameter, "student_logits" if parameter == "input" else parameter)
            if tensor is not None:
                call.names[parameter] = tensor
            elif needed:
                raise ValueError(f"`inputs[{name!r}]` must not withhold `{parameter}`, which the term requires.")
            # Left out by mistake, `target` would silently make ProgressiveKD its other form.
            if tensor is not None and (needed or (parameter == "target" and isinstance(term, ProgressiveKD))):
                call.required.add(parameter)
        return call

    def shown(self) -> str:
        """The names of the tensors that are needed, and in brackets those that may be left out."""
        needed = [name for parameter, name in self.names.items() if parameter in self.required]
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


def has(term: nn.Module, method: str) -> bool:
    return callable(getattr(term, method, None))


def calls_of(terms: Mapping[str, nn.Module], inputs: Mapping[str, Any]) -> dict[str, dict[str, Call]]:
    """Those of the terms' methods: {method: {term: call}}."""
    for name, renamed in inputs.items():
        methods = [getattr(terms[name], method) for method in METHODS if has(terms[name], method)]
        known = {parameter: None for method in methods for parameter in inspect.signature(method).parameters}
        for parameter, tensor in renamed.items():
            if parameter not in known or not isinstance(tensor, str | None):
                raise ValueError(
                    f"`inputs[{name!r}]` must give parameters of the term, {', '.join(known)}, the name of a tensor or None; "
                    f"got {parameter!r}: {tensor!r}."
                )
    return {
        method: {name: Call.of(name, x, method, inputs.get(name, {})) for name, x in terms.items() if has(x, method)}
        for method in METHODS
    }


def check_term(name: object, term: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"`terms` must have names that are strings; got {name!r}.")
    if isinstance(term, type) or not isinstance(term, nn.Module):
        hint = "" if isinstance(term, type) or not callable(term) else " Call a function in a module's `forward`."
        raise TypeError(f"Term {name!r} must be an nn.Module (an instance); got {term!r}.{hint}")
    if isinstance(term, NOT_OF_LOGITS):
        raise TypeError(
            f"Term {name!r} is a {type(term).__name__}, which does not take logits. Use nn.CrossEntropyLoss, DeterministicKD "
            "or a module of your own."
        )


def check_names(setting: str, given: Mapping[str, Any] | None, terms: Iterable[str]) -> None:
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"`{setting}` must be a mapping {{name: ...}}; got {given!r}.")
    for name in () if given is None else given:
        if name not in terms:
            raise ValueError(f"`{setting}` must name terms, {', '.join(terms)}; got {name!r}.")
