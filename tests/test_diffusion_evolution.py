"""Diffusion Evolution, published and corrected: loops by hand and the Gaussian recursion."""

import io
import math

import pytest
import torch

from optgen.search.diffusion_evolution import (
    DiffusionEvolution,
    denoise_by_population,
    evolution_step,
    mixture_log_density,
)
from optgen.search.distributions import Boltzmann, Elites
from optgen.testing import randn


def himmelblau(x):
    """Return Himmelblau's function."""
    a, b = x.T
    return (a * a + b - 11) ** 2 + (a + b * b - 7) ** 2


def recursion(A, c, search):
    """Return mean and covariance of an infinite population: Eqs. (evolution-affine) and on."""
    eye = torch.eye(len(c), dtype=torch.float64)
    m, S = torch.zeros_like(c), eye
    for t in range(search.steps - 1):
        a, b = (math.cos(math.pi / 2 * (1 - i / (search.steps - 1))) ** 2 for i in (t, t + 1))
        s2 = search.noise**2 * (1 - b) / (1 - a) * (1 - a / b)
        inverse = torch.zeros_like(S) if search.corrected else S.inverse()
        precision = A + a / (1 - a) * eye + inverse
        K = math.sqrt(a) / (1 - a) * precision.inverse()
        k = torch.linalg.solve(precision, A @ c + inverse @ m)
        r = math.sqrt(max(0.0, 1 - b - s2) / (1 - a))
        M = r * eye + (math.sqrt(b) - math.sqrt(a) * r) * K
        m, S = M @ m + (math.sqrt(b) - math.sqrt(a) * r) * k, M @ S @ M.T + s2 * eye
    return m, S


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("noise", [0.5, 1.0])
def test_the_moments_are_those_of_the_affine_recursion(corrected, noise):
    A = torch.tensor([[3.0, 1.0], [1.0, 2.0]]).double()
    c = torch.tensor([0.6, -0.4]).double()

    def objective(x):
        return torch.einsum("ni,ij,nj->n", x - c, A, x - c) / 2

    found = []
    for seed in range(12):
        search = DiffusionEvolution(
            torch.zeros(2).double(),
            steps=20,
            population_size=600,
            corrected=corrected,
            noise=noise,
            seed=seed,
        )
        search.run(objective, 20 * 600)
        x = search.ask()
        found.append(torch.cat([x.mean(0), x.T.cov().flatten()]))
    m, S = recursion(A, c, search)
    found, expected = torch.stack(found), torch.cat([m, S.flatten()])
    error = found.std(0) / 12**0.5
    assert ((found.mean(0) - expected).abs() < 5 * error + 0.012).all()
    search.corrected = not corrected
    m, S = recursion(A, c, search)
    other = torch.cat([m, S.flatten()])
    # The other weighting ends elsewhere, by far more than the tolerance.
    assert (found.mean(0) - other).abs().max() > 0.06


def test_the_corrected_recursion_ends_at_the_target_and_the_published_one_does_not():
    A, c = torch.tensor([[4.0]]).double(), torch.ones(1).double()
    search = DiffusionEvolution([0.0], steps=400)
    m, S = recursion(A, c, search)
    assert abs(m - 1) < 2e-3 and abs(S - 0.25) < 5e-3
    search.corrected = False
    m, S = recursion(A, c, search)
    assert abs(m - 0.915) < 2e-3 and abs(S - 0.099) < 2e-3


@pytest.mark.parametrize("corrected", [False, True])
def test_a_step_is_that_of_a_loop(corrected):
    search = DiffusionEvolution(
        torch.tensor([1.0, -1.0]).double(),
        sigma=2.0,
        steps=6,
        weights=Boltzmann(30.0),
        population_size=9,
        corrected=corrected,
        noise=0.8,
    )
    centers, spread = torch.zeros(9, 2).double(), 1.0
    for t in range(5):
        x = search.ask()
        values = himmelblau(x)
        u = (x - torch.tensor([1.0, -1.0])) / 2
        a, b = (math.cos(math.pi / 2 * (1 - i / 5)) ** 2 for i in (t, t + 1))
        s = 0.8 * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
        weights = []
        for i in range(9):
            weight = math.exp(-values[i].item() / 30)
            if corrected:
                squares = [(u[i] - center).square().sum().item() for center in centers]
                weight /= sum(math.exp(-q / (2 * spread**2)) for q in squares)
            weights.append(weight)
        expected = []
        for j in values.argsort().tolist():
            blur = [math.exp(-(u[j] - a**0.5 * p).square().sum().item() / (2 - 2 * a)) for p in u]
            mass = [w * e for w, e in zip(weights, blur)]
            denoised = sum(w * p for w, p in zip(mass, u)) / sum(mass)
            epsilon = (u[j] - a**0.5 * denoised) / math.sqrt(1 - a)
            expected.append(b**0.5 * denoised + math.sqrt(max(0, 1 - b - s * s)) * epsilon)
        search.tell(x, values)
        centers, spread = torch.stack(expected), s
        assert torch.allclose(search.centers, centers, atol=1e-12)
        assert abs(search.spread - s) < 1e-14
    assert search.spread == 0 and torch.equal(search.population, search.centers)


def test_the_denoiser_estimates_the_integral():
    alpha, y = 0.5, torch.linspace(-1, 1, 5).double()[:, None]
    grid = torch.linspace(-5, 5, 5001).double()[:, None]

    def density(x):
        return torch.exp(-8 * (x[:, 0].abs() - 1) ** 2) * (2 + x[:, 0].tanh())

    kernel = torch.exp(-((y - alpha**0.5 * grid.T) ** 2) / (2 * (1 - alpha))) * density(grid)
    exact = kernel @ grid / kernel.sum(1, keepdim=True)
    centers = randn(300, 1, seed=1)
    x = torch.cat([centers + 0.6 * randn(300, 1, seed=s) for s in range(2, 102)])
    log_q = mixture_log_density(x, centers, 0.6)
    corrected = denoise_by_population(y, x, density(x).log() - log_q, alpha)
    published = denoise_by_population(y, x, density(x).log(), alpha)
    assert (corrected - exact).abs().max() < 0.02 < 0.05 < (published - exact).abs().max()


def test_all_the_noise_is_new_at_the_first_step():
    y = randn(5, 2, seed=1)
    centers, s = evolution_step(y, y / 2, 0.0, 0.3, 1.0)
    assert abs(s - math.sqrt(0.7)) < 1e-15 and torch.allclose(centers, 0.3**0.5 * y / 2)
    centers, s = evolution_step(y, y / 2, 0.4, 1.0, 1.0)
    assert s == 0 and torch.equal(centers, y / 2)


def test_basins_have_their_shares_only_with_the_correction():
    minima = torch.tensor([[3.0, 2.0], [-2.8, 3.1], [-3.8, -3.3], [3.6, -1.8]]).double()
    square = torch.linspace(-7, 7, 701).double()
    square = torch.cartesian_prod(square, square)

    def quadrants(x):
        return (x.sign()[:, None] == minima.sign()).all(-1).double()

    exact = (-himmelblau(square) / 10).softmax(0) @ quadrants(square)
    distance = {}
    for corrected in (False, True):
        shares = []
        for seed in range(6):
            options = {"weights": Boltzmann(10.0), "corrected": corrected, "seed": seed}
            search = DiffusionEvolution(
                torch.zeros(2).double(), 3.0, population_size=400, **options
            )
            search.run(himmelblau, 25 * 400)
            shares.append(quadrants(search.ask()).mean(0))
        distance[corrected] = (torch.stack(shares).mean(0) - exact).abs().max()
    assert distance[True] < 0.08 < 0.15 < distance[False]


def test_failed_evaluations_have_no_weight():
    search = DiffusionEvolution(torch.zeros(2).double(), population_size=20, steps=5)
    for _ in range(5):
        x = search.ask()
        values = himmelblau(x)
        values[::3] = math.nan
        search.tell(x, values)
        assert search.population.isfinite().all()
    assert search.stop_reason() == "the noise schedule has ended"
    assert search.evaluations == 100 and math.isfinite(search.best_value)


@pytest.mark.parametrize("corrected", [False, True])
def test_a_state_goes_on_bit_for_bit(corrected):
    def make(seed):
        options = {"population_size": 30, "corrected": corrected, "seed": seed}
        return DiffusionEvolution(torch.zeros(2), 3.0, bounds=(-5.0, 5.0), **options)

    whole, first, second = make(1), make(1), make(2)
    assert whole.run(himmelblau, 10_000).evaluations == 25 * 30
    first.run(himmelblau, 11 * 30)
    x = first.ask()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    second.tell(x, himmelblau(x))
    second.run(himmelblau, 10_000)
    assert torch.equal(whole.history, second.history) and torch.equal(whole.ask(), second.ask())
    assert (whole.ask().abs() <= 5).all()


def test_mistakes_are_refused():
    for words, options in (
        ("sigma must be", {"sigma": 0.0}),
        ("steps must be", {"steps": 1}),
        ("population_size must be", {"population_size": 3}),
        ("noise must be", {"noise": 1.5}),
        ("noise must be above 0 with corrected=True", {"noise": 0.0}),
        ("seed must be", {"seed": 0.5}),
    ):
        with pytest.raises(ValueError, match=words):
            DiffusionEvolution([0.0], **options)
    assert DiffusionEvolution([0.0], noise=0.0, corrected=False, weights=Elites()).alpha(24) == 1
