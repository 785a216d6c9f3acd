"""Discriminators: from what one side predicts for a sample to a score, higher = "teacher"."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from . import _checks


class MLPDiscriminator(nn.Module):
    r"""A small multi-layer perceptron from a row `(N, C)` to a raw score `(N,)`, for `AdversarialDistributionLoss`.

    Linear layers with LeakyReLU between them. No batch norm: it would make a sample's score depend on which others
    are shown, and the gradient penalty is defined a sample at a time.

    Args:
        num_classes: C, at least 2.
        hidden: width of each hidden layer, each at least 1 (default (64, 64); () is a linear discriminator).
        spectral_norm: divide each weight by its largest singular value, as estimated by one step of power iteration a
            training forward; the score is then about 1-Lipschitz (default False).
        negative_slope: of LeakyReLU, 0..1 (default 0.2).

    State: weights, biases and, with `spectral_norm`, a singular vector a layer (a buffer).

    Raises: `ValueError` or `TypeError` for settings out of range.

    >>> MLPDiscriminator(num_classes=10)(torch.rand(4, 10)).shape
    torch.Size([4])

    Reference: spectral normalisation: Miyato et al., *Spectral Normalization for Generative Adversarial Networks*,
    2018, https://arxiv.org/abs/1802.05957.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        hidden: Sequence[int] = (64, 64),
        spectral_norm: bool = False,
        negative_slope: float = 0.2,
    ) -> None:
        super().__init__()
        if isinstance(hidden, (str, int)) or not isinstance(hidden, Sequence):
            raise TypeError(f"`hidden` must be a sequence of widths, such as (64, 64); got {hidden!r}.")
        widths = [_checks.num_classes(num_classes), *(_checks.integer("hidden", width, 1) for width in hidden), 1]
        self.num_classes = widths[0]
        layer = SpectralLinear if _checks.boolean("spectral_norm", spectral_norm) else nn.Linear
        negative_slope = _checks.number("negative_slope", negative_slope, 0.0, 1.0)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [layer(fan_in, fan_out), nn.LeakyReLU(negative_slope)]
        self.layers = nn.Sequential(*layers[:-1])
        self.hidden, self.spectral_norm, self.negative_slope = tuple(widths[1:-1]), spectral_norm, negative_slope

    def forward(self, x: Tensor) -> Tensor:
        """Scores `(N,)` of the rows `(N, C)`."""
        _checks.rows("x", x, cast(nn.Linear, self.layers[0]).weight)
        scores: Tensor = self.layers(x)
        return rearrange(scores, "n 1 -> n")

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, hidden={self.hidden}, spectral_norm={self.spectral_norm}, "
            f"negative_slope={self.negative_slope}"
        )


class SpectralLinear(nn.Linear):
    """A linear layer with its weight divided by its largest singular value.

    `torch.nn.utils.parametrizations.spectral_norm` does the same, but a module that holds it cannot be pickled.
    """

    left: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("left", normalize(torch.ones(out_features), dim=0))
        with torch.no_grad():
            for _ in range(15):  # start from a good estimate
                self._iterate()

    def _iterate(self) -> Tensor:
        """One step of power iteration; returns the right singular vector."""
        right = normalize(self.weight.T @ self.left, dim=0)
        self.left.copy_(normalize(self.weight @ right, dim=0))
        return right

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            right = self._iterate() if self.training else normalize(self.weight.T @ self.left, dim=0)
            left = self.left.clone()  # the buffer may change before the backward pass
        return linear(x, self.weight / (left @ self.weight @ right), self.bias)
