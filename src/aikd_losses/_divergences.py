r"""The divergences of two softmax distributions and cross-entropy, a value a row, in plain torch.

With $p = \mathrm{softmax}(t/T)$ and $q = \mathrm{softmax}(s/T)$, the teacher's and the student's side:

$$\mathrm{KL}(p \,\|\, q) = \sum p\,(\log p - \log q), \qquad \mathrm{KL}(q \,\|\, p) = \sum q\,(\log q - \log p)$$
$$\mathrm{JS} = \beta\,\mathrm{KL}(p \,\|\, m) + (1-\beta)\,\mathrm{KL}(q \,\|\, m), \qquad m = \beta p + (1-\beta) q$$

Where the sides are near each other, as they are where T is large, the summands nearly cancel, and float32 has no digit left. So
divergences are computed in float64, on every device that has it. Classes are on the last axis; a value is float32 at least.
All of it can be compiled, transformed and differentiated again.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def divergence_rows(s: Tensor, t: Tensor, *, name: str, temperature: float, beta: float = 0.5) -> Tensor:
    """$T^2 D(p, q)$ by its name."""
    log_p, log_q = log_softmaxes(t, s, temperature)
    if name == "forward_kl":
        value = kl(log_p, log_q)
    elif name == "reverse_kl":
        value = kl(log_q, log_p)
    else:
        log_m = log_mixture(log_p, log_q, beta)
        value = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    return (temperature**2 * value).to(wide(s, t)[0].dtype)


def log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    r"""$\log m$, from the side on which nothing overflows; that of either side where they are equal."""
    d = (log_q - log_p).masked_fill((log_p == -math.inf) & (log_q == -math.inf), 0.0)
    above, below = torch.where(d > 0, d, 0.0), torch.where(d > 0, 0.0, d)
    from_q, from_p = torch.log1p(beta * torch.expm1(-above)), torch.log1p((1 - beta) * torch.expm1(below))
    return torch.where(d > 0, log_q + from_q, log_p + from_p)


def log_softmaxes(t: Tensor, s: Tensor, temperature: float) -> list[Tensor]:
    r"""$\log p$ and $\log q$."""
    # Apple's GPUs have no float64.
    exact = [x.float() if x.device.type == "mps" else x.double() for x in (t, s)]
    return [torch.log_softmax(x / temperature, -1) for x in exact]


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    r"""$\sum a\,(\log a - \log b) = \sum a\,(e^d - 1 - d)$, $d = \log b - \log a$, as a and b sum to 1; no summand is
    negative. A class with a = 0 counts b, the limit; one with a > 0 = b counts inf, also where a is rounded to 0."""
    excluded = log_a == -math.inf
    a, b = log_a.exp().clamp_min(torch.finfo(log_a.dtype).tiny), log_b.exp()
    d = (log_b - log_a).masked_fill(excluded, 0.0)
    small = d.clamp_max(1.0)  # beyond, e^d may overflow
    terms = torch.where(d < 1, a * (torch.expm1(small) - small), b - a - a * d)
    return torch.where(excluded, b, terms).sum(-1)


def cross_entropy(target: Tensor, s: Tensor, temperature: float = 1.0) -> Tensor:
    r"""$T^2\,\mathrm{CE}(p, q) = -T^2 \sum p \log q$, of probabilities p or of a label, with $0 \log 0 = 0$."""
    (s,) = wide(s)
    log_q = torch.log_softmax(s / temperature, -1)
    if target.is_floating_point():
        target = target.to(log_q.dtype)
        return -(temperature**2) * (target * log_q.masked_fill((target == 0) & (log_q == -math.inf), 0.0)).sum(-1)
    return -(temperature**2) * log_q.gather(-1, target.unsqueeze(-1)).squeeze(-1)


def wide(*tensors: Tensor) -> list[Tensor]:
    """float32 at least, all of one type."""
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in tensors]


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """What is computed here needs the precision; the meta device has no autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
