r"""The divergences of two softmax distributions and cross-entropy, a value a row, in plain torch.

With $p = \mathrm{softmax}(t/T)$, $q = \mathrm{softmax}(s/T)$, $d = \log q - \log p$ and $\varphi(d) = e^d - 1 - d$:

$$\mathrm{KL}(p \,\|\, q) = \sum p\,\varphi(d), \qquad \mathrm{KL}(q \,\|\, p) = \sum q\,\varphi(-d)$$
$$\mathrm{JS} = \beta\,\mathrm{KL}(p \,\|\, m) + (1-\beta)\,\mathrm{KL}(q \,\|\, m), \qquad m = \beta p + (1-\beta) q$$

As p and q sum to 1, these are the usual $\sum p\,(\log p - \log q)$. But no term is negative, so that nothing cancels where
the two sides are near each other, as they are where T is large.

Classes are on the last axis. float32 at least. All can be compiled, transformed and differentiated again.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def divergence_rows(s: Tensor, t: Tensor, *, name: str, temperature: float, beta: float) -> Tensor:
    """$T^2 D(p, q)$ by its name."""
    log_p, log_q, d = logs(s, t, temperature)
    p, q = log_p.exp(), log_q.exp()
    if name == "forward_kl":
        return temperature**2 * kl(log_p, q, d)
    if name == "reverse_kl":
        return temperature**2 * kl(log_q, p, -d)
    m = beta * p + (1 - beta) * q
    # log m - log p = log(beta + (1 - beta) e^d) and log m - log q, each from the side on which nothing overflows.
    above, below = torch.where(d > 0, d, 0.0), torch.where(d > 0, 0.0, d)
    shared = torch.log1p(beta * torch.expm1(-above)) + torch.log1p((1 - beta) * torch.expm1(below))
    return temperature**2 * (beta * kl(log_p, m, shared + above) + (1 - beta) * kl(log_q, m, shared - below))


def logs(s: Tensor, t: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    r"""$\log p$, $\log q$ and their difference $d$.

    Where the sides are near, d is not the difference of two logarithms, each rounded on its own, but comes from that of the
    logits, $u = (s-t)/T$, less its mean under p: $d = u - \log(1 + \sum p\,\varphi(u))$.
    """
    s, t = wide(s, t)
    log_p, log_q = torch.log_softmax(t / temperature, -1), torch.log_softmax(s / temperature, -1)
    p = log_p.exp()
    excluded = (s == -math.inf) & (t == -math.inf)
    u = ((s - t) / temperature).masked_fill(excluded, 0.0)
    u = u - (p * u).sum(-1, keepdim=True)
    near = u.detach().abs().amax(-1, keepdim=True) < 1  # False for NaN
    u = torch.where(near, u, 0.0)
    d = torch.where(near, u - torch.log1p((p * _phi(u)).sum(-1, keepdim=True)), log_q - log_p)
    return log_p, log_q, d.masked_fill(excluded, 0.0)


def kl(log_a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    r"""$\sum a\,\varphi(d) = \sum b - a - a\,d$ with $d = \log b - \log a$. A class with a = 0 counts b, the limit; one with
    a > 0 = b counts inf, also where a is so small that float32 rounds it to 0 (0 * inf would be NaN)."""
    a = log_a.exp().clamp_min(torch.finfo(log_a.dtype).tiny)
    excluded = log_a == -math.inf
    d = d.masked_fill(excluded, 0.0)
    terms = torch.where(d < 1, a * _phi(d.clamp_max(1.0)), b - a - a * d)
    return torch.where(excluded, b, terms).sum(-1)


def _phi(d: Tensor) -> Tensor:
    """$e^d - 1 - d$; by its series where that would cancel."""
    series = d * d / 2 * (1 + d / 3 * (1 + d / 4 * (1 + d / 5 * (1 + d / 6 * (1 + d / 7)))))
    return torch.where(d.abs() < 0.1, series, torch.expm1(d) - d)


def cross_entropy(target: Tensor, s: Tensor, temperature: float = 1.0) -> Tensor:
    r"""$T^2\,\mathrm{CE}(p, q) = -T^2 \sum p \log q$, of probabilities p or of a label, with $0 \log 0 = 0$."""
    (s,) = wide(s)
    log_q = torch.log_softmax(s / temperature, -1)
    if target.is_floating_point():
        target = target.to(log_q.dtype)
        return -(temperature**2) * (target * log_q.masked_fill(target == 0, 0.0)).sum(-1)
    return -(temperature**2) * log_q.gather(-1, target.unsqueeze(-1)).squeeze(-1)


def wide(*tensors: Tensor) -> list[Tensor]:
    """float32 at least, all of one type."""
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in tensors]


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """What is computed here needs the precision; not every device has autocast."""
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()
