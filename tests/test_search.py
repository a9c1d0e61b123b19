"""Searches by values: CMA-ES and random search, beside packages, loops by hand and closed forms."""

import io
import math

import numpy as np
import pytest
import torch

from optgen.search import DiffusionEvolution, Gaussian, Search
from optgen.search.ask_tell import Box, RandomSearch
from optgen.search.cma import CmaEs, Ipop, is_flat, is_stagnant, minimize
from optgen.search.covariances import cma_constants
from optgen.testing import assert_mean, generator, randn


def sphere(x):
    """Return the squared distance to the origin."""
    return x.square().sum(-1)


def ellipsoid(x):
    """Return a quadratic with the curvatures 1, 2, 3 and so on."""
    return (x.double().square() * torch.arange(1, x.shape[-1] + 1)).sum(-1)


def rastrigin(x):
    """Return Rastrigin's function, with a minimum near each point of integers."""
    return (x.square() - 10 * (2 * math.pi * x).cos() + 10).sum(-1)


def ones(dim, dtype=torch.float64):
    """Return a vector of ones."""
    return torch.ones(dim, dtype=dtype)


def same(a, b):
    """Return whether two searches have the same state, bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    pairs = [(a.pop(name, {}), b.pop(name, {})) for name in ("covariance", "run", "settings")]
    covariances = [state.pop("covariance", {}) for state in pairs[1]]
    for left, right in ((a, b), *pairs, covariances):
        assert left.keys() == right.keys()
        for name, value in left.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, right[name]), name
            else:
                assert value == right[name] or value != value, name
    return True


class ByLoops:
    """CMA-ES as the tutorial has it, entry by entry in numpy: the reference."""

    def __init__(self, dim, population_size, sigma, diagonal):
        self.m, self.sigma, self.C = np.ones(dim), sigma, np.eye(dim)
        self.p_s, self.p_c, self.g, self.diagonal = np.zeros(dim), np.zeros(dim), 0, diagonal
        n, lam = dim, population_size
        raw = [math.log((lam + 1) / 2) - math.log(i) for i in range(1, lam + 1)]
        self.mu = lam // 2
        better, worse = raw[: self.mu], raw[self.mu :]
        self.mu_eff = sum(better) ** 2 / sum(w**2 for w in better)
        mu_eff_worse = sum(worse) ** 2 / sum(w**2 for w in worse)
        factor = (n + 2) / 3 if diagonal else 1
        self.c_1 = factor * 2 / ((n + 1.3) ** 2 + self.mu_eff)
        c_mu = 2 * (self.mu_eff - 2 + 1 / self.mu_eff) / ((n + 2) ** 2 + 2 * self.mu_eff / 2)
        self.c_mu = min(1 - self.c_1, factor * c_mu)
        alpha = min(
            1 + self.c_1 / self.c_mu,
            1 + 2 * mu_eff_worse / (self.mu_eff + 2),
            (1 - self.c_1 - self.c_mu) / (n * self.c_mu),
        )
        minus = sum(abs(w) for w in worse)
        self.w = [w / sum(better) if w > 0 else alpha * w / minus for w in raw]
        self.c_s = (self.mu_eff + 2) / (n + self.mu_eff + 5)
        self.d_s = 1 + 2 * max(0, math.sqrt((self.mu_eff - 1) / (n + 1)) - 1) + self.c_s
        self.c_c = (4 + self.mu_eff / n) / (n + 4 + 2 * self.mu_eff / n)

    def tell(self, x, values):
        """Move by the points of a batch."""
        n = len(self.m)
        order = sorted(range(len(values)), key=lambda i: values[i])
        y = [(x[i] - self.m) / self.sigma for i in order]
        root = np.linalg.inv(np.linalg.cholesky(self.C))  # a root: it gives all lengths
        values_, vectors = np.linalg.eigh(self.C)
        inverse_root = sum(np.outer(v, v) / math.sqrt(e) for e, v in zip(values_, vectors.T))
        bar = sum(w * y_i for w, y_i in zip(self.w[: self.mu], y))
        self.m = self.m + self.sigma * bar
        self.g += 1
        root_c = math.sqrt(self.c_s * (2 - self.c_s) * self.mu_eff)
        self.p_s = (1 - self.c_s) * self.p_s + root_c * inverse_root @ bar
        length = math.sqrt(sum(p * p for p in self.p_s))
        chi = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))
        limit = (1.4 + 2 / (n + 1)) * chi
        h = 1 if length / math.sqrt(1 - (1 - self.c_s) ** (2 * self.g)) < limit else 0
        root_c = math.sqrt(self.c_c * (2 - self.c_c) * self.mu_eff)
        self.p_c = (1 - self.c_c) * self.p_c + h * root_c * bar
        new = (1 - self.c_1 - self.c_mu * sum(self.w)) * self.C
        new += self.c_1 * (1 - h) * self.c_c * (2 - self.c_c) * self.C
        new += self.c_1 * np.outer(self.p_c, self.p_c)
        for w, y_i in zip(self.w, y):
            if w < 0:
                w *= n / np.sum((root @ y_i) ** 2)
            new += self.c_mu * w * np.outer(y_i, y_i)
        self.C = np.diag(np.diag(new)) if self.diagonal else new
        self.sigma *= math.exp(self.c_s / self.d_s * (length / chi - 1))


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(("dim", "population_size"), [(1, 4), (2, 6), (5, 8), (5, 31), (12, 11)])
def test_steps_are_those_of_a_loop(dim, population_size, diagonal):
    search = CmaEs(ones(dim), 0.4, population_size, diagonal=diagonal, seed=3)
    loop = ByLoops(dim, population_size, 0.4, diagonal)
    for _ in range(60):
        x = search.ask()
        values = rastrigin(x)
        search.tell(x, values)
        loop.tell(x.numpy(), values.tolist())
        C = search.covariance.as_matrix().numpy()
        assert np.allclose(search.mean.numpy(), loop.m, rtol=1e-9, atol=1e-11)
        assert np.allclose(C, loop.C, rtol=1e-8, atol=1e-10 * C.max())
        assert abs(search.sigma / loop.sigma - 1) < 1e-9


def test_a_very_long_path_stops_the_other_one():
    dim, stopped = 4, 0
    for seed in range(40):
        search, loop = CmaEs(ones(dim), 1e-3, seed=seed), ByLoops(dim, 8, 1e-3, False)
        for _ in range(4 if seed else 40):  # a slope: all steps agree
            x = search.ask()
            before = loop.p_c.copy()
            search.tell(x, x[:, 0])
            loop.tell(x.numpy(), x[:, 0].tolist())
            stopped += np.allclose(loop.p_c, (1 - loop.c_c) * before)
            assert np.allclose(search.path_c.numpy(), loop.p_c, rtol=1e-9)
            assert np.allclose(search.covariance.as_matrix().numpy(), loop.C, rtol=1e-9)
    assert stopped >= 10


@pytest.mark.parametrize(("dim", "tolerance"), [(2, 1e-5), (5, 1e-5), (20, 1e-6)])
def test_parity_with_cmaes_over_300_generations(dim, tolerance):
    cmaes = pytest.importorskip("cmaes")
    ours, theirs = CmaEs(ones(dim), 0.5), cmaes.CMA(mean=np.ones(dim), sigma=0.5)
    for _ in range(300):
        x = ours.ask()
        values = ellipsoid(x)
        ours.tell(x, values)
        theirs._eigen_decomposition()
        theirs.tell(list(zip(x.numpy(), values.tolist())))
        C, std = theirs._C, ours.sigma * math.sqrt(np.trace(theirs._C))
        assert np.abs(ours.mean.numpy() - theirs.mean).max() < tolerance * std
        assert abs(ours.sigma / theirs._sigma - 1) < tolerance
        distance = np.abs(ours.covariance.as_matrix().numpy() - C).max()
        assert distance < tolerance * np.abs(C).max()
    assert ours.best_value < (1e-8 if dim == 20 else 1e-17)


def test_constants_are_those_of_cma_but_for_two():
    cma = pytest.importorskip("cma")
    for dim in (5, 10, 40):
        k = cma_constants(dim, 4 + int(3 * np.log(dim)))
        theirs = cma.CMAEvolutionStrategy([0.0] * dim, 1.0, {"verbose": -9})
        assert np.allclose(k.weights[: k.mu], theirs.sp.weights[: k.mu], rtol=1e-12)
        assert abs(k.c_1 / theirs.sp.c1 - 1) < 1e-12 and abs(k.c_c / theirs.sp.cc - 1) < 1e-12
        quarter = 0.5 / ((dim + 2) ** 2 + k.mu_eff)
        assert abs((k.c_mu + quarter) / theirs.sp.cmu - 1) < 1e-12


@pytest.mark.parametrize("population_size", [10, 20])
def test_progress_on_the_sphere_at_the_best_length(population_size):
    # Arnold 2006: phi* = sigma* kappa - sigma*^2 / (2 mu_eff), kappa the weighted mean of the order
    # statistics; its maximum is mu_eff kappa^2 / 2 at sigma* = mu_eff kappa.
    dim, k = 1000, cma_constants(1000, population_size)
    weights = torch.tensor(k.weights[: k.mu], dtype=torch.float64)
    z = torch.randn(200_000, population_size, generator=generator(1), dtype=torch.float64)
    kappa = (z.sort(1, descending=True).values[:, : k.mu] @ weights).mean().item()
    star = k.mu_eff * kappa
    if population_size == 10:
        assert abs(kappa - 1.1131) < 0.01 and abs(star * kappa / 2 - 1.9623) < 0.03
    start = torch.zeros(dim, dtype=torch.float64)
    start[0] = 1.0
    rng, gains = CmaEs(start, 1.0, population_size, diagonal=True, seed=7).rng, []
    for _ in range(300):
        search = CmaEs(start, star / dim, population_size, diagonal=True)
        search.rng = rng
        search.step(sphere)
        gains.append(dim * (1 - search.mean.norm()))
    mean, error = assert_mean(torch.stack(gains), star * kappa / 2, z=4)
    assert error < 0.05 * mean


def test_ranks_alone_count_bit_for_bit():
    def path(change):
        search, states = CmaEs(ones(4), 0.3, seed=2), []
        for _ in range(80):
            search.step(lambda x: change(ellipsoid(x)))
            states.append(torch.cat([search.mean, search.covariance.as_matrix().flatten()]))
        return torch.stack(states)

    plain = path(lambda f: f)
    for change in (lambda f: f**3, lambda f: f.log(), lambda f: 2.0**60 * f):
        assert torch.equal(path(change), plain)


def test_rotation_and_translation_and_scale():
    turn, shift = torch.linalg.qr(randn(5, 5, seed=1)).Q, randn(5, seed=2)
    one = CmaEs(ones(5), 0.3, seed=2)
    two = CmaEs(8 * turn @ ones(5) + shift, 2.4)
    for _ in range(100):
        x = one.ask()
        values = ellipsoid(x)
        one.tell(x, values)
        two.tell(8 * x @ turn.T + shift, values)
    C = turn @ one.covariance.as_matrix() @ turn.T
    assert (two.mean - 8 * turn @ one.mean - shift).abs().max() < 1e-11
    assert abs(two.sigma / one.sigma / 8 - 1) < 1e-9
    assert (two.covariance.as_matrix() - C).abs().max() < 1e-8 * C.abs().max()
    scaled = CmaEs(8 * ones(5), 2.4, seed=2)
    same_draws = CmaEs(ones(5), 0.3, seed=2)
    for _ in range(50):  # a power of two: bit for bit
        scaled.step(ellipsoid)
        same_draws.step(ellipsoid)
    assert torch.equal(scaled.mean, 8 * same_draws.mean)


def test_random_ranks_keep_the_path_stationary():
    # Under random ranks p_sigma is standard normal: its squared length has the mean n.
    search, squares = CmaEs(torch.zeros(6, dtype=torch.float64), 1.0, seed=1), []
    values = randn(4000, search.population_size, seed=2)
    for i, f in enumerate(values):
        search.tell(search.ask(), f)
        search.covariance.matrix = torch.eye(6, dtype=torch.float64)
        search.covariance.decompose()
        if i > 50 and i % 10 == 0:
            squares.append(search.path_sigma.square().sum())
    assert_mean(torch.stack(squares), 6.0)


@pytest.mark.parametrize("diagonal", [False, True])
def test_failed_evaluations_rank_last(diagonal):
    one, two = (CmaEs(ones(3), 0.5, diagonal=diagonal, seed=1) for _ in range(2))
    for i in range(30):
        x, again = one.ask(), two.ask()
        values = ellipsoid(x)
        worst = values.clone()
        failed = torch.arange(len(x)) % 4 == i % 4
        values[failed], worst[failed] = math.nan, 1e300
        one.tell(x, values)
        two.tell(again, worst)
        assert torch.equal(one.mean, two.mean) and one.sigma == two.sigma
    assert math.isfinite(one.best_value) and one.evaluations == two.evaluations == 30 * len(x)


def test_a_batch_of_failures_is_counted_and_moves_nothing():
    search = CmaEs(ones(3), 0.5)
    search.step(lambda x: torch.full((len(x),), math.nan))
    assert search.evaluations == search.population_size and search.generation == 1
    assert torch.equal(search.mean, ones(3)) and search.sigma == 0.5 and search.best_x is None
    search.step(lambda x: torch.full((len(x),), math.inf))
    assert search.best_value == math.inf and search.mean.isfinite().all()
    search.step(ellipsoid)
    assert math.isfinite(search.best_value) and search.history[-1, 1] == search.best_value


def test_every_evaluation_is_counted():
    points = []

    def objective(x):
        points.append(x.clone())
        x.zero_()  # what is done to its copy changes nothing
        return rastrigin(points[-1])

    found = minimize(objective, ones(3), sigma=1.0, budget=5000, bounds=(-5.0, 5.0))
    x = torch.cat(points)
    assert len(x) == found.evaluations <= 5000 and found.evaluations == found.history[-1, 0]
    assert found.value == rastrigin(x).min() == rastrigin(found.x)
    assert found.search.runs > 1 and found.search.population_size > points[0].shape[0]
    best = torch.stack([rastrigin(p).min() for p in points]).cummin(0).values
    assert torch.equal(found.history[:, 1], best)


def test_one_point_at_a_time_is_the_batch():
    batch = minimize(sphere, ones(4), sigma=0.5, budget=400, seed=3)
    single = minimize(
        lambda x: float(sphere(x)), ones(4), sigma=0.5, budget=400, seed=3, batched=False
    )
    assert torch.equal(batch.x, single.x) and torch.allclose(batch.history, single.history)


MAKERS = {
    "full": lambda seed: CmaEs(ones(4), 0.5, seed=seed),
    "float32": lambda seed: CmaEs(ones(4, torch.float32), 0.5, seed=seed),
    "diagonal": lambda seed: CmaEs(ones(4), 0.5, diagonal=True, seed=seed),
    "bounds": lambda seed: CmaEs(ones(4), 0.5, bounds=(0.5, math.inf), seed=seed),
    "restarts": lambda seed: Ipop(ones(4), 0.5, bounds=(-1.5, 3.0), seed=seed),
    "random": lambda seed: RandomSearch(ones(4), 0.5, 7, seed=seed),
}


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_state_goes_on_bit_for_bit(kind, asked):
    whole, first, second = MAKERS[kind](1), MAKERS[kind](1), MAKERS[kind](9)
    for _ in range(200):
        whole.step(rastrigin)
    second.step(rastrigin)
    for _ in range(77):
        first.step(rastrigin)
    x = first.ask() if asked else None
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    if asked:
        second.tell(x, rastrigin(x))
    for _ in range(123 - asked):
        second.step(rastrigin)
    assert same(second, whole)
    if kind == "restarts":
        assert whole.runs > 1
    frozen = second.state_dict()
    kept = [frozen["evaluations"], frozen["best_x"].clone()]
    second.step(rastrigin)
    assert frozen["evaluations"] == kept[0] and torch.equal(frozen["best_x"], kept[1])


def test_a_state_of_another_search_changes_nothing():
    search = CmaEs(ones(4), 0.5)
    before = search.state_dict()
    state = CmaEs(ones(4), 0.5, 9).state_dict()
    others = {
        "population_size 9, this one has 8": state,
        "dtype": CmaEs(ones(4, torch.float32), 0.5).state_dict(),
        "shape": CmaEs(ones(3), 0.5, 8).state_dict(),
        "other bounds": CmaEs(ones(4), 0.5, bounds=(0.0, 2.0)).state_dict(),
        "the same arguments": CmaEs(ones(4), 0.5, diagonal=True).state_dict(),
        "the state has no mean": Ipop(ones(4), 0.5).state_dict(),
    }
    for words, other in others.items():
        with pytest.raises(ValueError, match=words):
            search.load_state_dict(other)
    after = search.state_dict()
    assert torch.equal(before["rng"], after["rng"]) and torch.equal(before["mean"], after["mean"])


@pytest.mark.parametrize("method", ["to", "state"])
def test_the_device_is_that_of_the_points(method):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    search = CmaEs(ones(6).cuda(), 0.5)
    if method == "to":
        search = CmaEs(ones(6), 0.5).to("cuda")
    assert search.ask().device.type == "cuda"
    found = search.run(ellipsoid_on_device, 3000)
    assert found.x.device.type == "cuda" and found.value < 1e-8
    other = CmaEs(ones(6).cuda(), 0.5)
    other.load_state_dict(search.state_dict())
    assert torch.equal(other.ask(), search.ask())


def ellipsoid_on_device(x):
    """Return the ellipsoid where the points are."""
    return (x.square() * torch.arange(1, x.shape[-1] + 1, device=x.device)).sum(-1)


def test_points_have_the_dtype_of_the_start_and_the_state_is_float64():
    search = CmaEs(ones(3, torch.float32), 0.5)
    x = search.ask()
    assert x.dtype == torch.float32 and search.mean.dtype == torch.float64
    search.tell(x, sphere(x))
    exact = CmaEs(ones(3), 0.5)
    exact.tell(x.double(), sphere(x).double())  # it learns from the rounded points
    assert torch.equal(exact.mean, search.mean)
    assert CmaEs([1, 2, 3], 0.5).ask().dtype == torch.float64
    assert CmaEs(np.ones(2), 0.5).ask().shape == (6, 2)


def test_reflection_is_that_of_mirrors():
    low, high = torch.tensor([-1.0, -math.inf]).double(), torch.tensor([2.0, 3.0]).double()
    box = Box((low, high), torch.zeros(2))
    u = 30 * randn(2000, 2, seed=1)
    x = box.fold(u)
    for before, after in zip(u.tolist(), x.tolist()):
        for i in range(2):
            number = before[i]
            while not low[i] <= number <= high[i]:
                number = 2 * low[i] - number if number < low[i] else 2 * high[i] - number
            assert abs(number - after[i]) < 1e-12
    inside = (low < u) & (u < high)
    assert torch.equal(x[inside], u[inside])


@pytest.mark.parametrize("diagonal", [False, True])
def test_bounds_hold_and_a_minimum_at_them_is_found(diagonal):
    low, high = (
        torch.tensor([-1.0, 0.5, -3.0]).double(),
        torch.tensor([2.0, math.inf, -1.0]).double(),
    )
    start = torch.tensor([0.0, 4.0, -2.0]).double()

    def objective(x):
        assert (low <= x).all() and (x <= high).all()
        return (x - torch.tensor([0.3, -2.0, 5.0])).square().sum(1)

    search = CmaEs(start, 1.0, bounds=(low, high), diagonal=diagonal)
    found = search.run(objective, 4000)
    expected = torch.tensor([0.3, 0.5, -1.0]).double()
    assert (found.x - expected).abs().max() < 1e-4
    assert (search.center() - expected).abs().max() < 1e-3


def test_inside_of_bounds_nothing_changes():
    free, bounded = CmaEs(ones(3), 0.1, seed=4), CmaEs(ones(3), 0.1, bounds=(-9.0, 9.0), seed=4)
    for _ in range(50):
        free.step(ellipsoid)
        bounded.step(ellipsoid)
    assert torch.equal(free.mean, bounded.mean) and free.sigma == bounded.sigma


def test_on_a_constant_in_a_box_the_gaussian_is_at_most_as_wide():
    search = CmaEs(torch.zeros(3).double(), 5.0, bounds=(-1.0, 1.0))
    values = randn(100, search.population_size, seed=3)
    for f in values:
        search.tell(search.ask(), f)
        spread = search.sigma * search.covariance.variances().sqrt()
        assert spread.max() <= 2 * 1.3  # the axes of a generation later


@pytest.mark.parametrize(
    ("words", "make", "objective"),
    [
        ("no longer differ", lambda: CmaEs(ones(3), 0.5), lambda x: torch.zeros(len(x))),
        ("no longer differ", lambda: CmaEs(ones(3), 0.5), sphere),
        (
            "shorter than 1e-12",
            lambda: CmaEs(torch.zeros(3).double(), 0.5),
            lambda x: sphere(x).log(),
        ),
        ("grown by 1e4", lambda: CmaEs(ones(3), 1e-3), lambda x: x[:, 0]),
        (
            "lost in rounding",
            lambda: CmaEs(1e9 * ones(3), 1e-5),
            lambda x: (x - 1e9).abs().sum(1).log(),
        ),
        (
            "condition number",
            lambda: CmaEs(ones(2), 0.5),
            lambda x: x[:, 0] ** 2 + 1e15 * x[:, 1] ** 2,
        ),
    ],
)
def test_a_run_stops_for_its_reason(words, make, objective):
    found = make().run(objective, 30_000)
    assert found.reason is not None and words in found.reason, found
    assert found.evaluations < 30_000


def test_noise_stops_a_run_that_no_longer_falls():
    rng = generator(1)

    def noise(x):
        return torch.rand(len(x), generator=rng)

    found = CmaEs(ones(3), 1.0, population_size=20).run(noise, 60_000)
    assert found.reason is not None


def test_flat_and_stagnant_histories():
    row = (0.0, 1.0, 2.0, 1.0)
    assert is_flat([row] * 40, 3, 7) and not is_flat([row] * 15, 3, 7)
    assert not is_flat([row] * 39 + [(0.0, 1.0, 2.0, 1.1)], 3, 7)
    assert not is_flat([row] * 39 + [(0.0, 1.0, 1.0, math.nan)], 3, 7)
    falling = [(0.0, -float(i), -float(i), 0.0) for i in range(400)]
    flat = [row] * 400
    assert is_stagnant(flat, 3, 7) and not is_stagnant(falling, 3, 7)
    assert is_stagnant(falling + flat, 3, 7) and not is_stagnant(flat[:100], 3, 7)
    half = [(0.0, 1.0, -float(i), 0.0) for i in range(400)]
    assert not is_stagnant(half, 3, 7)


def test_restarts_double_the_population_and_find_the_global_minimum():
    sizes = []

    def objective(x):
        sizes.append(len(x))
        return rastrigin(x)

    found = minimize(objective, 3 * ones(3), sigma=0.5, budget=40_000, bounds=(-5.0, 5.0))
    assert found.value < 1e-8 and found.reason is None
    assert sorted(set(sizes)) == [7 * 2**i for i in range(found.search.runs)]
    single = minimize(rastrigin, 3 * ones(3), sigma=0.1, budget=40_000, restarts=False)
    assert single.value > 1 and single.reason and single.evaluations < 10_000


def test_a_callback_ends_a_search_and_it_goes_on():
    found = minimize(
        sphere, ones(5), sigma=0.5, budget=9999, callback=lambda search: search.best_value < 1e-3
    )
    assert found.value < 1e-3 and found.reason == "stopped by the callback"
    assert found.search.run(sphere, 2000).value < 1e-8


def test_as_many_evaluations_as_cma():
    cma = pytest.importorskip("cma")
    ours, theirs = [], []
    for seed in range(1, 12):
        search = CmaEs(ones(10), 0.5, seed=seed)
        while not search.best_value < 1e-9:
            search.step(ellipsoid)
        ours.append(search.evaluations)
        other = cma.CMAEvolutionStrategy([1.0] * 10, 0.5, {"verbose": -9, "seed": seed})
        while not other.best.f < 1e-9:
            x = other.ask()
            other.tell(x, ellipsoid(torch.tensor(np.array(x))).tolist())
        theirs.append(other.countevals)
    assert abs(np.median(ours) / np.median(theirs) - 1) < 0.12


def test_bad_reports_are_refused():
    search = CmaEs(ones(2), 0.5)
    x = search.ask()
    before = search.state_dict()
    for words, points, values in (
        ("x must be a tensor of 6 points", x[:5], sphere(x[:5])),
        ("the values must be 6 real numbers", x, sphere(x)[:5]),
        ("the values must be 6 real numbers", x, sphere(x)[:, None]),
        ("the values must be 6 real numbers", x, sphere(x) + 0j),
        ("the values must be 6 real numbers", x, "abcdef"),
        ("x must be finite", x * math.inf, sphere(x)),
    ):
        with pytest.raises(ValueError, match=words):
            search.tell(points, values)
    assert same(search, make_with(before))


def make_with(state):
    """Return a search of two numbers with a state."""
    search = CmaEs(ones(2), 0.5)
    search.load_state_dict(state)
    return search


def test_a_batch_is_the_same_until_its_values_are_received():
    search = CmaEs(torch.ones(3), 0.5)
    x = search.ask()
    assert torch.equal(x, search.ask())
    search.tell(x, x.sum(1))
    assert not torch.equal(x, search.ask())


def test_numbers_of_a_list_keep_their_precision():
    found = minimize(lambda x: x.sum(1), [0.1, 0.1], sigma=0.1, budget=60, bounds=(0, 0.1))
    assert found.x.dtype == torch.float64 and found.value < 1e-2
    assert CmaEs([1e300], 1.0).mean.item() == 1e300


@pytest.mark.parametrize("sign", [-1, 1])
def test_points_of_a_short_dtype_stay_inside(sign):
    low, high = sorted((0.7 * sign, 0.9 * sign))  # 0.7 is less in float32
    points = []

    def corner(x):
        points.append(x)
        return sign * x.sum(1)

    minimize(corner, torch.full((2,), 0.8 * sign), sigma=0.1, budget=300, bounds=(low, high))
    x = torch.cat(points).double()
    assert x.min() >= low and x.max() <= high


@pytest.mark.parametrize(
    "kind, name, values",
    [
        (CmaEs, "sigma", (0.5, 0.7)),
        (Ipop, "sigma", (0.5, 0.7)),
        (Ipop, "growth", (2.0, 3.0)),
        (RandomSearch, "sigma", (0.5, 0.7)),
        (DiffusionEvolution, "steps", (10, 20)),
        (DiffusionEvolution, "noise", (1.0, 0.5)),
        (DiffusionEvolution, "corrected", (True, False)),
    ],
)
def test_the_state_of_other_settings_is_refused(kind, name, values):
    common = {"sigma": 0.5} | {"x0": torch.ones(3)}
    one, other = (kind(**(common | {name: value})) for value in values)
    with pytest.raises(ValueError, match=f"{name} {values[0]}"):
        other.load_state_dict(one.state_dict())


def test_the_state_of_another_rate_is_refused():
    one, other = (Search(Gaussian(torch.ones(3)), rate=rate) for rate in (1.0, 0.5))
    with pytest.raises(ValueError, match="rate 1.0"):
        other.load_state_dict(one.state_dict())
