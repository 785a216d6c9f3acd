"""Losses with which a network learns from itself: AI-KD for PyTorch, one term at a time or the full method."""

from . import functional
from .adversarial import AdversarialDistributionLoss
from .aikd import AIKDLoss
from .data import IndexedDataset
from .deterministic import DeterministicKD
from .discriminators import MLPDiscriminator
from .objectives import AdversarialObjective, GradientPenalty, ZeroCenteredPenalty
from .progressive import ProgressiveKD
from .schedules import LinearRamp
from .setup_check import check_setup
from .stack import LossStack
from .targets import CachedTargets, EMATargets, TargetStore
from .teacher import FrozenTeacher

__version__ = "0.2.0"

__all__ = [
    "AIKDLoss",
    "AdversarialDistributionLoss",
    "AdversarialObjective",
    "CachedTargets",
    "DeterministicKD",
    "EMATargets",
    "FrozenTeacher",
    "GradientPenalty",
    "IndexedDataset",
    "LinearRamp",
    "LossStack",
    "MLPDiscriminator",
    "ProgressiveKD",
    "TargetStore",
    "ZeroCenteredPenalty",
    "check_setup",
    "functional",
]
