"""Searches for the minimum of a function by its values, as distributions that are fitted."""

from .ask_tell import Found, RandomSearch
from .cma import CmaEs, Ipop, minimize
from .diffusion_evolution import DiffusionEvolution
from .distributions import (
    Boltzmann,
    Categorical,
    Elites,
    Gaussian,
    Mixture,
    RankWeights,
    Search,
)
from .learned import Learned
from .tuning import Interval, Trial, best_trial, tune

__all__ = [
    "Boltzmann",
    "Categorical",
    "CmaEs",
    "DiffusionEvolution",
    "Elites",
    "Found",
    "Gaussian",
    "Interval",
    "Ipop",
    "Learned",
    "Mixture",
    "RandomSearch",
    "RankWeights",
    "Search",
    "Trial",
    "best_trial",
    "minimize",
    "tune",
]
