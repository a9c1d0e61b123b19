"""Samples of a posterior: observations, guidance of a denoiser by a likelihood, restoration."""

from .operators import (
    Blur,
    Downsample,
    Linear,
    Mask,
    Observation,
    RandomMeasurements,
    observe,
)
from .restoration import Restored, latent_search, restore
from .rules import (
    DPS,
    Guided,
    Moments,
    NoisyLikelihood,
    NormalizedDPS,
    PseudoInverse,
)

__all__ = [
    "DPS",
    "Blur",
    "Downsample",
    "Guided",
    "Linear",
    "Mask",
    "Moments",
    "NoisyLikelihood",
    "NormalizedDPS",
    "Observation",
    "PseudoInverse",
    "RandomMeasurements",
    "Restored",
    "latent_search",
    "observe",
    "restore",
]
