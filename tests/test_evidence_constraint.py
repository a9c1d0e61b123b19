"""The evidence of controllers that hold a rate, against references written here."""

import math

import pytest
import torch

from optgen.controllers import ControlVAE, Geco
from optgen.evidence import constraint as page
from optgen.multipliers import AugmentedLagrangian, NuPI
from optgen.testing import generator


@pytest.mark.parametrize("window", [1, 3])
def test_the_response_is_overshoot_settling_and_error(window):
    values = [0.0, 1.0, 4.0, 3.5, 2.9, 3.3, 3.05, 2.95, 3.0, 3.01] + 10 * [3.02]
    found = page.measure_response(torch.tensor(values, dtype=torch.float64), 3.0, window, 0.03)
    means = [sum(values[i : i + window]) / window for i in range(len(values) - window + 1)]
    off = [i + window for i, mean in enumerate(means) if abs(mean - 3) > 0.09]
    assert found["settled"] == off[-1]
    assert found["overshoot"] == pytest.approx(max(means) - 3, abs=1e-4)
    assert found["error"] == pytest.approx(0.02, abs=1e-4)
    level = page.measure_response(torch.full((20,), -5.0, dtype=torch.float64), -5.0, window, 0.1)
    assert level == {"overshoot": 0.0, "settled": 0, "error": 0.0}


def test_every_method_has_the_gains_of_the_plan():
    made = {name: make(3.0, 0.02, 0.3) for name, make in page.METHODS.items()}
    kinds = [type(controller) for controller in made.values()]
    assert kinds == [NuPI, NuPI, NuPI, NuPI, ControlVAE, AugmentedLagrangian, Geco]
    gains = {name: (made[name].ki, made[name].kp) for name in ("ascent", "optimistic", "nu-pi")}
    assert gains == {"ascent": (0.02, 0), "optimistic": (0.02, 0.02), "nu-pi": (0.02, 0.3)}
    assert made["nu-pi-smoothed"].smoothing == 0.9 and made["nu-pi"].smoothing == 0
    assert made["control"].kp == pytest.approx(4 * 0.3) and made["control"].ki == 0.02
    assert (made["augmented"].step, made["augmented"].penalty) == (0.02, 0.3)
    assert (made["geco"].rate, made["geco"].smoothing) == (0.02, 0)
    assert all(controller.target == 3 for controller in made.values())


def test_the_grid_is_that_of_the_plan():
    for problem, runs in (("linear", 110), ("mnist", 66)):
        experiment = page.experiment(problem, "")
        assert len(experiment.variants) * len(experiment.seeds) == runs
        methods = [config["method"] for config in experiment.variants.values()]
        assert {m: methods.count(m) for m in methods} == {
            m: 4 if m in page.DAMPED else 2 for m in page.METHODS
        }


def linear_path(seed, steps, lr=0.003, target=3.0, ki=0.02, kp=0.3):
    """Return the rates of the linear VAE under νPI, by its equations and their gradients."""
    s, rng = torch.tensor([8.0, 4.0, 2.0, 0.5, 0.25, 0.1], dtype=torch.float64), generator(seed)
    Q = torch.linalg.qr(torch.randn(6, 6, generator=rng, dtype=torch.float64)).Q
    W = 0.1 * torch.randn(6, 4, generator=rng, dtype=torch.float64)
    V = 0.1 * torch.randn(4, 6, generator=rng, dtype=torch.float64)
    S, log_t, rates = Q @ torch.diag(s) @ Q.T, torch.zeros(4, dtype=torch.float64), []
    beta = before = 0.0
    for _ in range(steps):
        t, E = log_t.exp(), torch.eye(6, dtype=torch.float64) - W @ V
        R = 0.5 * (torch.diagonal(V @ S @ V.T) + t - 1 - log_t).sum().item()
        rates.append(R)
        g = R - target
        beta = max(0.0, beta + ki * g + kp * (g - before))
        before = g
        # The gradients of half of tr(E S E') + sum_j t_j |W_j|^2, and of the rate.
        dW = -E @ S @ V.T + W * t
        dV = -W.T @ E @ S + beta * V @ S
        d_log_t = 0.5 * t * W.square().sum(0) + beta * 0.5 * (t - 1)
        W, V, log_t = W - lr * dW, V - lr * dV, log_t - lr * d_log_t
    return rates


@pytest.mark.parametrize("seed", range(2))
def test_a_run_is_that_of_the_equations(seed):
    config = page.experiment("linear", "").variants["nu-pi_0.02_0.3"] | {"steps": 300}
    found = page.run_constraint(config, seed)
    expected = linear_path(seed, 300)
    rates = [row[0] for row in found["curve"]]
    assert rates == pytest.approx(expected[9::10], abs=1e-4)
    off = [i + 1 for i, R in enumerate(expected) if abs(R - 3) > 0.06]
    assert found["settled"] == off[-1]
    assert found["overshoot"] == pytest.approx(max(expected) - 3, abs=1e-4)


def test_geco_is_measured_by_its_distortion():
    config = page.experiment("linear", "").variants["geco_0.02"] | {"steps": 40}
    found = page.run_constraint(config, 0)
    distortions = [row[2] for row in found["curve"]]
    assert math.isclose(config["distortion"], 6.7507, abs_tol=1e-3)
    assert found["error"] == pytest.approx(distortions[-1] - config["distortion"], abs=0.3)
    assert found["overshoot"] == 0 and min(distortions) > config["distortion"]
