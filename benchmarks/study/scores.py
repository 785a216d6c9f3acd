"""How good predictions are, and how well calibrated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """Of the samples (S, N, ...) of several runs, as in evaluation; the model stays in its mode. Those of a network that
    diverged say that all classes are alike."""
    training = model.training
    model.eval()
    out = torch.cat([model(part) for part in x.split(500, dim=1)], dim=1)
    model.train(training)
    return out.nan_to_num(0, 0, 0)


def percent_right(logits: Tensor, target: Tensor) -> float:
    return 100 * float((logits.argmax(-1) == target).float().mean())


def metrics(logits: Tensor, target: Tensor, scale: float) -> dict[str, float]:
    raw, scaled = logits.softmax(-1), (logits / scale).softmax(-1)
    confidence, guess = raw.max(-1)
    right = (guess == target).double()
    risk = (1 - right[confidence.argsort(descending=True)]).cumsum(0) / torch.arange(1, len(target) + 1)
    return {
        "accuracy": 100 * float(right.mean()),
        "nll": float(F.cross_entropy(logits, target)),
        "nll_scaled": float(F.cross_entropy(logits / scale, target)),
        "ece": calibration_error(confidence, right),
        "ece_scaled": calibration_error(scaled.max(-1).values, right),
        "brier": float((raw - F.one_hot(target, logits.shape[-1])).square().sum(-1).mean()),
        "aurc": float(risk.mean()),
        "temperature": scale,
    }


def calibration_error(confidence: Tensor, right: Tensor, bins: int = 15) -> float:
    """In percent: Guo et al., 2017, https://arxiv.org/abs/1706.04599."""
    which = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, confidence.double() - right)
    return 100 * float(gap.abs().sum() / len(right))


def best_temperature(logits: Tensor, target: Tensor) -> float:
    grid = torch.logspace(-1, 1.5, 126).tolist()
    return min(grid, key=lambda t: float(F.cross_entropy(logits / t, target)))
