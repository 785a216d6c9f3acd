"""The mathematics once more, by definition, as loops over decimals of 50 digits: what the library's values are compared with.

Nothing here uses torch or the library, and with so many digits nothing needs care. A row is a list of numbers.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Sequence
from decimal import Decimal

decimal.setcontext(decimal.Context(prec=50))

Row = Sequence[float]
Exact = list[Decimal]


def softmax(logits: Row, temperature: float = 1.0) -> Exact:
    weights = [(Decimal(x) / Decimal(temperature)).exp() for x in logits]
    return [w / sum(weights) for w in weights]


def kl(p: Exact, q: Exact) -> Decimal:
    return sum(a * (a / b).ln() for a, b in zip(p, q, strict=True) if a > 0)


def middle(p: Exact, q: Exact, beta: float) -> Exact:
    return [Decimal(beta) * a + (1 - Decimal(beta)) * b for a, b in zip(p, q, strict=True)]


def deterministic(name: str, student: Row, teacher: Row, temperature: float, beta: float = 0.5) -> float:
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    m, share = middle(p, q, beta), Decimal(beta)
    value = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "js": lambda: share * kl(p, m) + (1 - share) * kl(q, m),
    }[name]()
    return float(Decimal(temperature) ** 2 * value)


def slope(name: str, student: Row, teacher: Row, temperature: float, beta: float = 0.5) -> list[float]:
    """The gradient of `deterministic` for the student's logits, in closed form: T (q - p) for forward KL."""
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    if name == "forward_kl":
        return [float(Decimal(temperature) * (b - a)) for a, b in zip(p, q, strict=True)]
    other, share = (p, Decimal(1)) if name == "reverse_kl" else (middle(p, q, beta), 1 - Decimal(beta))
    mean = kl(q, other)
    return [float(Decimal(temperature) * share * b * ((b / c).ln() - mean)) for b, c in zip(q, other, strict=True)]


def cross_entropy(target: int | Row, logits: Row, temperature: float = 1.0) -> float:
    q = softmax(logits, temperature)
    p = [float(c == target) for c in range(len(q))] if isinstance(target, int) else target
    return float(-sum(Decimal(a) * b.ln() for a, b in zip(p, q, strict=True) if a > 0))


def progressive(
    student: Row, previous: Row | None, target: int | Row | None, alpha: float, temperature: float
) -> float:
    a = 0.0 if previous is None else alpha
    hard = 0.0 if target is None else (1 - a) * cross_entropy(target, student)
    soft = 0.0 if previous is None else a * temperature**2 * cross_entropy(previous, student, temperature)
    return hard + soft


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


DISCRIMINATOR = {  # of (teacher's score, student's score)
    "non_saturating": lambda t, s: softplus(-t) + softplus(s),  # -log sigmoid(t) - log(1 - sigmoid(s))
    "least_squares": lambda t, s: (t - 1) ** 2 / 2 + s**2 / 2,
    "hinge": lambda t, s: max(0, 1 - t) + max(0, 1 + s),
    "wasserstein": lambda t, s: s - t,
    "relativistic": lambda t, s: softplus(s - t),
}
STUDENT = {
    "non_saturating": lambda t, s: softplus(-s),
    "least_squares": lambda t, s: (s - 1) ** 2 / 2,
    "hinge": lambda t, s: -s,
    "wasserstein": lambda t, s: -s,
    "relativistic": lambda t, s: softplus(t - s),
}


def top_k_row(probs: Row, k: int) -> list[float]:
    kept = sorted(range(len(probs)), key=lambda c: -probs[c])[:k]
    rest = 1 - sum(probs[c] for c in kept)
    return [probs[c] if c in kept else rest / (len(probs) - k) for c in range(len(probs))]
