"""The mathematics once more, as loops over Python floats: what the library's values are compared with.

Nothing here uses torch or the library. A row is a list of floats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Row = Sequence[float]


def softmax(logits: Row, temperature: float = 1.0) -> list[float]:
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    return [w / sum(weights) for w in weights]


def kl(p: Row, q: Row) -> float:
    return sum(a * math.log(a / b) if a > 0 else 0.0 for a, b in zip(p, q, strict=True))


def divergence(name: str, teacher: Row, student: Row, beta: float) -> float:
    if name == "forward_kl":
        return kl(teacher, student)
    if name == "reverse_kl":
        return kl(student, teacher)
    middle = [beta * t + (1 - beta) * s for t, s in zip(teacher, student, strict=True)]
    return beta * kl(teacher, middle) + (1 - beta) * kl(student, middle)


def deterministic(name: str, student: Row, teacher: Row, temperature: float, beta: float = 0.5) -> float:
    return temperature**2 * divergence(name, softmax(teacher, temperature), softmax(student, temperature), beta)


def cross_entropy(target: int | Row, logits: Row, temperature: float = 1.0) -> float:
    q = softmax(logits, temperature)
    p = [float(c == target) for c in range(len(q))] if isinstance(target, int) else target
    return -sum(a * math.log(b) for a, b in zip(p, q, strict=True) if a > 0)


def progressive(
    student: Row, previous: Row | None, target: int | Row | None, alpha: float, temperature: float
) -> float:
    a = 0.0 if previous is None else alpha
    hard = 0.0 if target is None else (1 - a) * cross_entropy(target, student)
    soft = 0.0 if previous is None else a * temperature**2 * cross_entropy(previous, student, temperature)
    return hard + soft


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def log_sigmoid(x: float) -> float:
    return -softplus(-x)


DISCRIMINATOR = {  # of (teacher's score, student's score)
    "non_saturating": lambda t, s: -log_sigmoid(t) - log_sigmoid(-s),  # 1 - sigmoid(s) is sigmoid(-s)
    "least_squares": lambda t, s: (t - 1) ** 2 / 2 + s**2 / 2,
    "hinge": lambda t, s: max(0, 1 - t) + max(0, 1 + s),
    "wasserstein": lambda t, s: s - t,
    "relativistic": lambda t, s: -log_sigmoid(t - s),
}
STUDENT = {
    "non_saturating": lambda t, s: -log_sigmoid(s),
    "least_squares": lambda t, s: (s - 1) ** 2 / 2,
    "hinge": lambda t, s: -s,
    "wasserstein": lambda t, s: -s,
    "relativistic": lambda t, s: -log_sigmoid(s - t),
}


def top_k_row(probs: Row, k: int) -> list[float]:
    kept = sorted(range(len(probs)), key=lambda c: -probs[c])[:k]
    rest = 1 - sum(probs[c] for c in kept)
    return [probs[c] if c in kept else rest / (len(probs) - k) for c in range(len(probs))]


def kl_rows(s, t, temperature):
    """T**2 KL(teacher || student) a row, by torch's own functions: with a gradient."""
    log_q, log_p = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
