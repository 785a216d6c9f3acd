"""Discriminators: from what one side predicts for a sample to a score, higher = "teacher"."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from einops import rearrange
from torch import Tensor, nn

from . import _checks


class MLPDiscriminator(nn.Module):
    r"""A small multi-layer perceptron from a row `(N, C)` to a raw score `(N,)`, for `AdversarialDistributionLoss`.

    Linear layers with LeakyReLU(0.2) between them. No batch norm: it would make a sample's score depend on which others
    are shown, and the gradient penalty is defined a sample at a time.

    Args:
        num_classes: C, at least 2.
        hidden: width of each hidden layer, each at least 1 (default (64, 64); () is a linear discriminator).

    State: weights and biases.

    Raises: `ValueError` or `TypeError` for settings out of range.

    >>> MLPDiscriminator(num_classes=10)(torch.rand(4, 10)).shape
    torch.Size([4])
    """

    def __init__(self, num_classes: int, *, hidden: Sequence[int] = (64, 64)) -> None:
        super().__init__()
        self.num_classes = _checks.integer("num_classes", num_classes, 2)
        self.hidden = tuple(_checks.integer("hidden", width, 1) for width in hidden)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise((self.num_classes, *self.hidden, 1)):
            layers += [nn.Linear(fan_in, fan_out), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Scores `(N,)` of the rows `(N, C)`."""
        _checks.shaped("x", x, (len(x), self.num_classes), "must have the shape (N, C) = ")
        scores: Tensor = self.layers(x)
        return rearrange(scores, "n 1 -> n")

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return _checks.settings(self, "num_classes", "hidden")
