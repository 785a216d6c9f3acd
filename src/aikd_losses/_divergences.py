r"""The divergences of two softmax distributions and cross-entropy, a value a row, in plain torch.

With $p = \mathrm{softmax}(t/T)$ and $q = \mathrm{softmax}(s/T)$, the teacher's and the student's side:

$$\mathrm{KL}(p \,\|\, q) = \sum p\,(\log p - \log q), \qquad \mathrm{KL}(q \,\|\, p) = \sum q\,(\log q - \log p)$$
$$\mathrm{JS} = \beta\,\mathrm{KL}(p \,\|\, m) + (1-\beta)\,\mathrm{KL}(q \,\|\, m), \qquad m = \beta p + (1-\beta) q$$

Where the sides are near each other, as they are where T is large, the summands nearly cancel, and float32 has no digit left. So
all is said in $d = \log q - \log p$ and sums in which nothing is negative. Eagerly that is float64, which needs few kernels.
A compiler fuses many into one, where float64 would be what a GPU waits for (it has 2 to 64 times fewer units of it): there d is
made in float32, precisely. Classes are on the last axis; a value is float32 at least. All of it can be compiled, transformed
and differentiated again.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def divergence_rows(s: Tensor, t: Tensor, *, name: str, temperature: float, beta: float = 0.5) -> Tensor:
    """$T^2 D(p, q)$ by its name."""
    log_p, log_q, d = log_softmaxes(t, s, temperature)
    p, q = log_p.exp(), log_q.exp()
    if name == "forward_kl":
        value = kl(p, q, d)
    elif name == "reverse_kl":
        value = kl(q, p, -d)
    else:
        m, from_p, from_q = mixture(log_p, log_q, d, beta)
        value = beta * kl(p, m, from_p) + (1 - beta) * kl(q, m, from_q)
    return (temperature**2 * value).to(wide(s, t)[0].dtype)


def log_softmaxes(t: Tensor, s: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    r"""$\log p$, $\log q$ and $d = \log q - \log p$, which says nothing for a class that both sides exclude."""
    if not torch.compiler.is_compiling() and t.device.type != "mps":  # Apple's GPUs have no float64
        log_p, log_q = (torch.log_softmax(x.double() / temperature, -1) for x in (t, s))
        return log_p, log_q, log_q - log_p
    t, s = wide(t, s)
    # An offset between the sides says nothing, and would cost s - t its digits; an integer is taken off without rounding.
    s = s - (s.amax(-1, keepdim=True) - t.amax(-1, keepdim=True)).detach().round()
    norms = [(x / temperature).logsumexp(-1, keepdim=True) for x in (t, s)]
    log_p, log_q = t / temperature - norms[0], s / temperature - norms[1]
    # (s - t)/T has all its digits, and the rest is the same for all classes of a row: what makes q sum to 1.
    d = (s - t) / temperature - (norms[1] - norms[0])
    too_much = torch.where(d < 1, log_p.exp() * torch.expm1(d.clamp_max(1.0)), log_q.exp() - log_p.exp())
    return log_p, log_q, d - too_much.sum(-1, keepdim=True).log1p().detach()


def mixture(log_p: Tensor, log_q: Tensor, d: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    r"""m, and what $\log m$ is above $\log p$ and $\log q$; from the side on which nothing overflows."""
    d = d.masked_fill((log_p == -math.inf) & (log_q == -math.inf), 0.0)
    above, below = torch.where(d > 0, d, 0.0), torch.where(d > 0, 0.0, d)
    of_q, of_p = torch.log1p(beta * torch.expm1(-above)), torch.log1p((1 - beta) * torch.expm1(below))
    from_p, from_q = torch.where(d > 0, d + of_q, of_p), torch.where(d > 0, of_q, of_p - d)
    return torch.where(d > 0, log_q + of_q, log_p + of_p).exp(), from_p, from_q


def kl(a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    r"""$\sum a\,(\log a - \log b) = \sum a\,(e^d - 1 - d)$, $d = \log b - \log a$, as a and b sum to 1; no summand is
    negative. An excluded class, $\log a = -\infty$, counts b, the limit; one with b = 0 alone counts inf, also where a is
    rounded to 0."""
    d = d.nan_to_num(nan=1.0, posinf=1.0, neginf=-math.inf)  # of an excluded class, where a = 0
    near = a.clamp_min(torch.finfo(a.dtype).tiny) * _expm1_without(d.clamp_max(1.0))
    return torch.where(d < 1, near, b - a - a * d).sum(-1)  # beyond, e^d may overflow


def _expm1_without(d: Tensor) -> Tensor:
    """$e^d - 1 - d$; in float32 by its series near 0, where a difference has few digits."""
    if d.dtype == torch.float64:
        return torch.expm1(d) - d
    x = d.clamp(-0.1, 0.1)
    series = x * x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5)))
    return torch.where(d.abs() < 0.1, series, torch.expm1(d) - d)


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
