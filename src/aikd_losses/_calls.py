"""What a term of a stack is, and which tensors its methods are handed."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .progressive import ProgressiveKD

NOT_OF_LOGITS = (nn.KLDivLoss, nn.NLLLoss, nn.BCELoss, nn.PoissonNLLLoss, nn.GaussianNLLLoss)


@dataclass(frozen=True)
class Call:
    """What a method of a term is handed: parameter -> name of the tensor, and which of them it cannot do without."""

    term: str
    parameters: tuple[str, ...]
    names: dict[str, str]
    required: frozenset[str]

    @classmethod
    def of(cls, name: str, term: nn.Module, method: str, renamed: Mapping[str, str | None]) -> Call:
        names, required = {}, set()
        parameters = inspect.signature(getattr(term, method)).parameters
        for parameter, how in parameters.items():
            if how.kind not in (how.POSITIONAL_OR_KEYWORD, how.KEYWORD_ONLY):
                raise TypeError(
                    f"Term {name!r} must name its tensors in `{method}`, each to be passed by keyword; got `{how}`."
                )
            needed = how.default is how.empty
            tensor = renamed.get(parameter, "student_logits" if parameter == "input" else parameter)
            if tensor is None and needed:
                raise ValueError(f"`inputs[{name!r}]` must not withhold `{parameter}`, which the term requires.")
            if tensor is None:
                continue
            names[parameter] = tensor
            # Left out by mistake, `target` would silently make ProgressiveKD its other form.
            if needed or (parameter == "target" and isinstance(term, ProgressiveKD)):
                required.add(parameter)
        return cls(name, tuple(parameters), names, frozenset(required))

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
