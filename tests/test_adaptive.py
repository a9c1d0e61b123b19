"""Adaptive solvers: against SciPy's, and what is raised without the library."""

import math
import sys

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from optgen.models.adaptive import adaptive_log_prob, dopri5
from optgen.models.diffusion import Denoiser, PerceptronDenoiser


def build_denoiser(seed: int) -> Denoiser:
    """Return a denoiser of points with random weights, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Denoiser(PerceptronDenoiser(3, 16, 2), (3,)).double()
        for p in model.parameters():
            p.data += 0.2 * torch.randn_like(p)
    return model.requires_grad_(False)


def solve(
    model: Denoiser, points: np.ndarray, first: float, last: float, tolerance: float
) -> np.ndarray:
    """Carry all points from one level to another by SciPy's solver, as one system.

    The solver bounds the root mean square of the errors: those of n points may be sqrt(n) times
    the tolerance.
    """

    def slope(sigma: float, flat: np.ndarray) -> np.ndarray:
        here = torch.from_numpy(flat).view(points.shape)
        return ((here - model(here, here.new_full((len(here),), sigma))) / sigma).numpy().ravel()

    options = {"method": "DOP853", "rtol": tolerance, "atol": tolerance}
    return solve_ivp(slope, (first, last), points.ravel(), **options).y[:, -1].reshape(points.shape)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_samples_follow_the_curves_of_another_solver(seed: int) -> None:
    """SciPy's eighth-order solver integrates dy/dsigma = (y - denoised) / sigma itself."""
    model = build_denoiser(seed)
    y = 10 * torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = dopri5(model, y, [10.0, 0.05], rtol=1e-8, atol=1e-8)
    truth = solve(model, y.numpy(), 10.0, 0.05, tolerance=5e-11)
    np.testing.assert_allclose(found.numpy(), truth, atol=1e-6)


def test_likelihood_is_the_change_of_variables() -> None:
    """The log-determinant of the solved map's Jacobian, by finite differences, and the prior."""
    model, std = build_denoiser(3), 1.3
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    low, high, eps = 0.05, 10.0, 1e-4
    found = adaptive_log_prob(model, x, low, high, std, rtol=1e-9, atol=1e-9)

    shifts = eps * np.concatenate([np.zeros((1, 3)), np.eye(3), -np.eye(3)])
    points = x.numpy()[:, None] + shifts  # each point, and moved along each axis
    carried = solve(model, points.reshape(-1, 3), low, high, tolerance=2.5e-12).reshape(
        points.shape
    )
    for (end, *moved), nats in zip(carried, found.tolist()):
        jacobian = (np.stack(moved[:3]) - np.stack(moved[3:])) / (2 * eps)
        var = high**2 + std**2
        prior = -(end**2).sum() / (2 * var) - 1.5 * math.log(2 * math.pi * var)
        assert abs(nats - prior - np.linalg.slogdet(jacobian)[1]) < 1e-5


def test_no_level_lies_beyond_the_ends() -> None:
    """With a wide tolerance the last step would pass them, and the first one be tried there."""
    seen = []

    def shrink(y: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(sigma[0].item())
        return y / (1 + sigma.view(-1, 1) ** 2)

    y = 9 * torch.ones(2, 3, dtype=torch.float64)
    dopri5(shrink, y, [9.0, 0.1], rtol=0.5, atol=0.5)
    assert 0.1 * (1 - 1e-9) <= min(seen) and max(seen) <= 9.0 * (1 + 1e-9)


def test_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchdiffeq the error names the extra."""
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ValueError, match=r"pip install 'optgen\[ode\]'"):
        dopri5(build_denoiser(0), torch.zeros(2, 3, dtype=torch.float64), [2.0, 1.0])
