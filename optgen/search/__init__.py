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

__all__ = [
    "Boltzmann",
    "Categorical",
    "CmaEs",
    "DiffusionEvolution",
    "Elites",
    "Found",
    "Gaussian",
    "Ipop",
    "Learned",
    "Mixture",
    "RandomSearch",
    "RankWeights",
    "Search",
    "minimize",
]
