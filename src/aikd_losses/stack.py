"""Terms with their weights: one call, one update, one epoch."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from . import _checks, schedules
from ._divergences import wide
from .progressive import ProgressiveKD
from .schedules import Schedule, Scheduled

NOT_OF_LOGITS = (nn.KLDivLoss, nn.NLLLoss, nn.BCELoss, nn.PoissonNLLLoss, nn.GaussianNLLLoss)
STANDARD = ("student_logits", "teacher_logits", "target", "index", "mask")


@dataclass(frozen=True)
class _Call:
    """What a method of a term is handed: parameter -> name of the tensor, and which of them it cannot do without."""

    term: str
    names: dict[str, str]
    required: list[str]
    axes: dict[str, int]  # of torch's cross-entropy: where other terms have the classes of its tensor

    def shown(self) -> str:
        """The names of the tensors that are needed, and in brackets those that may be left out."""
        needed = [self.names[parameter] for parameter in self.required]
        taken = [name for parameter, name in self.names.items() if parameter not in self.required]
        return ", ".join(needed) + (f" [{', '.join(taken)}]" if taken else "")

    def pick(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """What is given; `index=None` is, and says that there are no ids."""
        given = [name for name, x in tensors.items() if x is not None]
        picked = {p: tensors[x] for p, x in self.names.items() if x in given or (p == "index" and x in tensors)}
        for parameter in self.required:
            if parameter not in picked:
                raise TypeError(
                    f"Term {self.term!r} needs `{self.names[parameter]}`; got {', '.join(given) or 'nothing'}. Pass it by "
                    "name, or use the `inputs` of the stack to rename or withhold it."
                )
        for other, dim in self.axes.items():
            axes = getattr(picked["input"], "ndim", 0)
            if axes > 1 and dim % axes != 1:
                raise ValueError(
                    f"Term {self.term!r} takes axis 1 for the classes, term {other!r} axis {dim}. Give the first rows (N, C), "
                    f"by names of their own: inputs={{{self.term!r}: {{'input': 'rows', 'target': 'row_target'}}}}."
                )
        return picked


class LossStack(Scheduled):
    r"""A weighted sum of terms that are handed the tensors they name.

    $$L = \sum_k w_k(\text{epoch})\, L_k$$

    Args:
        terms: `{name: module}`. A term is an `nn.Module` whose `forward` names its tensors and gives a scalar; its
            `update` and `advance_epoch`, where it has them, are called by the stack's. Torch's own losses are terms too:
            their `input` is `student_logits`. Terms that share a store each write it. Public, as an `nn.ModuleDict`.
        weights: `{name: number or callable from the epoch to one}`, not negative; 1 for those left out. Public. At weight 0
            a term adds nothing to the total and its gradient, also where its value is not finite.
        inputs: `{term: {parameter: name of the tensor, or None}}`: renames or withholds what a term is given, in
            `forward` and `update`.

    Call: `stack(**tensors) -> (total, values)`; `values` are the terms' own, unweighted and detached. `update` takes the
    same tensors. Every name that a term's `forward` or `update` uses is accepted, and `student_logits`,
    `teacher_logits`, `target`, `index` and `mask` always; None counts as not given, except for `index`. `ProgressiveKD`
    needs a `target` here, unless `inputs` withholds it.

    State: the epoch (int64) and the terms' own; weights follow from the epoch. `update` asks the terms one after the other:
    where one refuses its tensors, those before it have taken theirs.

    Raises: `TypeError` for what is no term (functions, stacks, forwards with `*args` or `**kwargs`, torch losses that do not
    take logits), and for a tensor that is missing or that nobody uses; `ValueError` for the rest.

    >>> stack = LossStack(
    ...     {"cross_entropy": torch.nn.CrossEntropyLoss(), "deterministic": DeterministicKD(temperature=1.0)},
    ...     weights={"deterministic": 0.5},
    ... )
    >>> s, t = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> total, values = stack(student_logits=s, teacher_logits=t, target=torch.tensor([1]))
    >>> total, values
    (tensor(1.5443), {'cross_entropy': tensor(1.3133), 'deterministic': tensor(0.4621)})
    """

    terms: nn.ModuleDict

    def __init__(
        self,
        terms: Mapping[str, nn.Module],
        *,
        weights: Mapping[str, Schedule] | None = None,
        inputs: Mapping[str, Mapping[str, str | None]] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(terms, Mapping | nn.ModuleDict) or len(terms) == 0:
            raise TypeError(f"`terms` must be a mapping {{name: module}}, not empty; got {_checks.shown(terms)}.")
        for name, term in terms.items():
            _check_term(name, term)
        for setting, given in (("weights", weights), ("inputs", inputs)):
            if not isinstance(given or {}, Mapping) or any(name not in terms for name in given or {}):
                raise ValueError(
                    f"`{setting}` must be a mapping from terms, {', '.join(terms)}; got {_checks.shown(given)}."
                )
        self.weights: dict[str, Schedule] = {name: (weights or {}).get(name, 1.0) for name in terms}
        self.inputs = {name: dict(renamed) for name, renamed in (inputs or {}).items()}
        self.terms = nn.ModuleDict(dict(terms.items()))
        self._calls = _calls_of(terms, self.inputs)
        self._names = set(STANDARD).union(*(x.names.values() for calls in self._calls.values() for x in calls.values()))
        self._start()

    def _at(self, epoch: int) -> list[float]:
        return [schedules.evaluate(f"weights[{name!r}]", w, epoch, math.inf) for name, w in self.weights.items()]

    def _enter(self, epoch: int, now: Tensor) -> None:
        super()._enter(epoch, now)
        self._on = [name for name, weight in zip(self.weights, now.float().tolist(), strict=True) if weight != 0]

    def forward(self, **tensors: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and each term's own value, unweighted and detached."""
        self._refuse_unknown(tensors)
        picked = {name: call.pick(tensors) for name, call in self._calls["forward"].items()}
        values = {name: self.terms[name](**given) for name, given in picked.items()}
        for name, value in values.items():
            if not isinstance(value, Tensor) or value.ndim:
                raise ValueError(
                    f"Term {name!r} must give a scalar (reduction='mean' or 'sum'); got {_checks.shown(value)}."
                )
        parts = [
            x if name in self._on else _nothing(x, [picked[name], *self.terms[name].parameters()])
            for name, x in values.items()
        ]
        home = [*(x.device for x in parts if not x.is_cpu), torch.device("cpu")][0]  # a constant may be elsewhere
        of_terms = torch.stack([x.to(home) for x in wide(*parts)])
        return (self._now.to(of_terms) * of_terms).sum(), {name: value.detach() for name, value in values.items()}

    if TYPE_CHECKING:
        __call__ = forward

    def update(self, **tensors: Any) -> None:
        """Hand the tensors on to the terms that have an `update`; takes the same ones as the call."""
        self._refuse_unknown(tensors)
        for name, call in self._calls["update"].items():
            cast(Any, self.terms[name]).update(**call.pick(tensors))

    def diagnostics(self) -> dict[str, Tensor]:
        """The `diagnostics()` of the terms that have them, as `{"adversarial/accuracy": ...}`, to be logged."""
        said = {name: cast(Any, term).diagnostics() for name, term in self.terms.items() if _has(term, "diagnostics")}
        return {f"{name}/{what}": value for name, of_term in said.items() for what, value in of_term.items()}

    def advance_epoch(self, epoch: int | None = None) -> None:
        """After each epoch (or, with a number, before that one): hand it on to the terms, a shared store once; take the next
        weights. A term that is at that number already does not change."""
        to, weights = self._next(epoch)  # which may be refused, as may an alpha
        for term in self.terms.values():
            if isinstance(term, ProgressiveKD):
                term._next(epoch)
        advanced: set[int] = set()
        for term in self.terms.values():
            if isinstance(term, ProgressiveKD):
                term._advance(epoch, advanced)
            elif _has(term, "advance_epoch"):
                advance = cast(Any, term).advance_epoch
                advance(*([epoch] if inspect.signature(advance).parameters else []))
        self._enter(to, weights)

    def _refuse_unknown(self, tensors: Mapping[str, Any]) -> None:
        if unknown := [name for name in tensors if name not in self._names]:
            # A name that is nearly right mostly leaves its term without its tensor: name that first.
            for call in self._calls["forward"].values():
                call.pick(tensors)
            raise TypeError(
                f"No term uses `{unknown[0]}`; the terms {', '.join(self.terms)} use {', '.join(sorted(self._names))}."
            )

    def extra_repr(self) -> str:
        lines = [f"epoch={schedules.value(self.epoch)}"]
        for i, (name, schedule) in enumerate(self.weights.items()):
            lines.append(f"{name}: weight {schedules.shown(schedule, self._now[i])}")
            lines += [f"  {method}({calls[name].shown()})" for method, calls in self._calls.items() if name in calls]
        return "\n".join(lines + ([f"inputs={self.inputs}"] if self.inputs else []))


def _nothing(value: Tensor, given: Any) -> Tensor:
    """0, with a graph to what the term would have reached: not 0 * its value, which is NaN where the value is not finite."""
    if isinstance(given, (Mapping, list, tuple)):
        parts = given.values() if isinstance(given, Mapping) else given
        return sum((_nothing(value, part) for part in parts), torch.zeros((), device=value.device))
    if not isinstance(given, Tensor) or not given.requires_grad:
        return torch.zeros((), device=value.device)
    local = given.to_local() if hasattr(given, "to_local") else given  # of a sharded parameter
    return local.expand(0, *local.shape).sum()


def _calls_of(terms: Mapping[str, nn.Module], inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, _Call]]:
    """Of the terms that have the method: {method: {term: call}}."""
    for name, renamed in inputs.items():
        known = {**_parameters(terms[name], "forward"), **_parameters(terms[name], "update")}
        for parameter, tensor in renamed.items():
            if parameter not in known or not isinstance(tensor, str | None):
                raise ValueError(
                    f"`inputs[{name!r}]` must give parameters of the term, {', '.join(known)}, the name of a tensor or None; "
                    f"got {_checks.shown(parameter)}: {_checks.shown(tensor)}."
                )
    calls = {
        method: {name: _call(name, x, method, inputs.get(name, {})) for name, x in terms.items() if _has(x, method)}
        for method in ("forward", "update")
    }
    for name in [name for name, x in terms.items() if type(x) is nn.CrossEntropyLoss]:
        for other, call in calls["forward"].items():
            dim, same = getattr(terms[other], "class_dim", None), calls["forward"][name].names["input"]
            if isinstance(dim, int) and call.names.get("student_logits") == same:
                calls["forward"][name].axes[other] = dim
    return calls


def _call(name: str, term: nn.Module, method: str, renamed: Mapping[str, str | None]) -> _Call:
    call = _Call(name, {}, [], {})
    for parameter, how in _parameters(term, method).items():
        if how.kind not in (how.POSITIONAL_OR_KEYWORD, how.KEYWORD_ONLY):
            raise TypeError(f"Term {name!r} must name each tensor of `{method}`, to be passed by keyword; got `{how}`.")
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
    return inspect.signature(getattr(term, method)).parameters if _has(term, method) else {}


def _has(term: nn.Module, method: str) -> bool:
    return callable(getattr(term, method, None))


def _check_term(name: str, term: object) -> None:
    if not isinstance(term, nn.Module):
        raise TypeError(
            f"Term {name!r} must be an instance of nn.Module (wrap a function in one); got {_checks.shown(term)}."
        )
    if isinstance(term, LossStack):
        raise TypeError(f"Term {name!r} is a stack: pass its terms, {{**stack.terms, ...}}, and its weights.")
    known = type(term).__module__.startswith(("torch.", "aikd_losses."))  # the user's may reduce what is given to them
    if known and getattr(term, "reduction", None) == "none":
        raise ValueError(f"Term {name!r} must give a scalar: build it with reduction='mean' or 'sum'.")
    if isinstance(term, NOT_OF_LOGITS):
        instead = "use nn.CrossEntropyLoss, or DeterministicKD"
        raise TypeError(f"Term {name!r} is a {type(term).__name__}, which takes no logits: {instead}.")
