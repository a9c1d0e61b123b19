"""Searches by weighted likelihood, beside loops, replicated data, enumeration and closed forms."""

import io
import itertools
import math

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from optgen.search import CmaEs
from optgen.search.distributions import (
    Boltzmann,
    Categorical,
    Elites,
    Gaussian,
    Mixture,
    RankWeights,
    Search,
    draw_normal,
)
from optgen.testing import assert_mean, generator, randn


def weighted(n, seed):
    """Return integer counts and the weights that they are, (n,) each."""
    counts = torch.randint(0, 5, (n,), generator=generator(seed))
    return counts, counts.double() / counts.sum()


def mixture(dim=2, components=3, seed=1):
    """Return a mixture with shares and covariances of its own."""
    found = Mixture(2 * randn(components, dim, seed=seed), floor=0.0)
    roots = randn(components, dim, dim, seed=seed + 1)
    found.covs = roots @ roots.mT + 0.3 * torch.eye(dim).double()
    found.shares = torch.arange(1, components + 1).double() / sum(range(components + 1))
    return found


MODELS = {
    "gaussian": lambda: Gaussian(torch.tensor([0.5, -1.0]).double(), 1.5),
    "diagonal": lambda: Gaussian(torch.tensor([0.5, -1.0]).double(), 1.5, diagonal=True),
    "mixture": mixture,
    "categorical": lambda: Categorical(torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.4, 0.0]]).double()),
}


def points_of(kind, n=60, seed=5):
    """Return points that a model of this kind may have drawn."""
    return MODELS[kind]().sample(n, generator(seed))


@pytest.mark.parametrize("rate", [0.3, 1.0])
@pytest.mark.parametrize("kind", MODELS)
def test_integer_weights_are_copies_of_the_points(kind, rate):
    x, (counts, weights) = points_of(kind), weighted(60, 3)
    copies = x.repeat_interleave(counts, 0)
    one, two = MODELS[kind](), MODELS[kind]()
    one.fit(x, weights, rate)
    two.fit(copies, torch.full((len(copies),), 1 / len(copies)).double(), rate)
    for name in one.names:
        assert torch.allclose(getattr(one, name), getattr(two, name), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", MODELS)
def test_densities_are_those_of_torch(kind):
    model, x = MODELS[kind](), points_of(kind)
    if kind == "categorical":
        expected = sum(model.probs[i].log()[x[:, i]] for i in range(2))
    elif kind == "mixture":
        parts = [
            MultivariateNormal(m, C).log_prob(x).exp() for m, C in zip(model.means, model.covs)
        ]
        expected = sum(w * p for w, p in zip(model.shares, parts)).log()
    else:
        expected = MultivariateNormal(model.mean, model.cov).log_prob(x)
    assert torch.allclose(model.log_prob(x), expected, rtol=1e-10)


@pytest.mark.parametrize("kind", MODELS)
def test_draws_have_the_moments_of_the_density(kind):
    model = MODELS[kind]()
    x = model.sample(40_000, generator(2))
    if kind == "categorical":
        for site, value in itertools.product(range(2), range(3)):
            share = (x[:, site] == value).double()
            assert_mean(share, model.probs[site, value])
        return
    means, covs = (
        (model.means, model.covs) if kind == "mixture" else (model.mean[None], model.cov[None])
    )
    shares = model.shares if kind == "mixture" else torch.ones(1).double()
    mean = shares @ means
    second = torch.einsum("k,kij->ij", shares, covs + means[:, :, None] * means[:, None])
    assert_mean(x, mean)
    assert_mean((x[:, :, None] * x[:, None]).flatten(1), second.flatten())


def test_fits_are_weighted_moments_and_shares():
    x, (_, w) = points_of("gaussian"), weighted(60, 4)
    full, diagonal = (MODELS[k]() for k in ("gaussian", "diagonal"))
    for model in (full, diagonal):
        model.fit(x, w)
    mean = [sum(w[i] * x[i, a] for i in range(60)).item() for a in range(2)]
    for a, b in itertools.product(range(2), range(2)):
        cov = sum(w[i] * (x[i, a] - mean[a]) * (x[i, b] - mean[b]) for i in range(60)).item()
        assert abs(full.cov[a, b] - cov) < 1e-13 and abs(full.mean[a] - mean[a]) < 1e-13
        assert abs(diagonal.cov[a, b] - (cov if a == b else 0)) < 1e-13
    sites = points_of("categorical")
    model = MODELS["categorical"]()
    model.floor = 0.3
    before = model.probs.clone()
    model.fit(sites, w, 0.25)
    for site, value in itertools.product(range(2), range(3)):
        share = sum(w[i].item() for i in range(60) if sites[i, site] == value)
        expected = 0.7 * (0.75 * before[site, value].item() + 0.25 * share) + 0.1
        assert abs(model.probs[site, value] - expected) < 1e-13


@pytest.mark.parametrize("rate", [0.2, 0.9])
def test_a_gaussian_goes_a_part_of_the_way(rate):
    x, (_, w) = points_of("gaussian"), weighted(60, 4)
    old, new = MODELS["gaussian"](), MODELS["gaussian"]()
    new.fit(x, w, rate)
    mean, cov = new.mean.clone().requires_grad_(), new.cov.clone().requires_grad_()
    p = MultivariateNormal(mean, cov)
    kept = -kl_divergence(MultivariateNormal(old.mean, old.cov), p)
    target = (1 - rate) * kept + rate * (w * p.log_prob(x)).sum()
    assert all(g.abs().max() < 1e-11 for g in torch.autograd.grad(target, (mean, cov)))


def test_about_the_old_mean_it_is_the_step_of_cma_without_paths():
    # Eq. (natural-step): the same points and weights, the covariance about the old mean.
    x, w = points_of("gaussian", 8), torch.tensor(CmaEs([0.0, 0.0], 1.0, 8).constants.weights)
    w = w.double().clamp(min=0)
    old, new = MODELS["gaussian"](), MODELS["gaussian"]()
    new.fit(x, w, 1.0)
    y = x - old.mean
    moved = new.mean - old.mean
    about_old = (w[:, None] * y).T @ y
    assert torch.allclose(new.cov + moved.outer(moved), about_old)


def test_a_mixture_climbs_to_a_stationary_point():
    x = torch.cat([randn(60, 2, seed=4), 0.5 * randn(40, 2, seed=5) + 4])
    _, w = weighted(100, 6)
    model, likelihoods = mixture(components=2), []
    for _ in range(300):
        likelihoods.append((w * model.log_prob(x)).sum().item())
        model.fit(x, w)
    assert all(b > a - 1e-12 for a, b in itertools.pairwise(likelihoods))
    logits = model.shares.log().requires_grad_()
    model.shares = logits.softmax(0)
    tensors = [logits, model.means.requires_grad_(), model.covs.requires_grad_()]
    for g in torch.autograd.grad((w * model.log_prob(x)).sum(), tensors):
        assert g.abs().max() < 1e-9


def test_a_step_of_a_mixture_is_that_of_a_loop():
    x, (_, w) = points_of("mixture", 20), weighted(20, 7)
    old, new, rate = mixture(), mixture(), 0.4
    new.fit(x, w, rate)
    for k in range(3):
        s, first, second = 0.6 * old.shares[k], 0.6 * old.shares[k] * old.means[k], 0.0
        second = 0.6 * old.shares[k] * (old.covs[k] + old.means[k].outer(old.means[k]))
        for i in range(20):
            parts = [
                old.shares[j] * MultivariateNormal(old.means[j], old.covs[j]).log_prob(x[i]).exp()
                for j in range(3)
            ]
            mass = rate * w[i] * parts[k] / sum(parts)
            s, first = s + mass, first + mass * x[i]
            second = second + mass * x[i].outer(x[i])
        mean = first / s
        assert torch.allclose(new.shares[k], s) and torch.allclose(new.means[k], mean)
        assert torch.allclose(new.covs[k], second / s - mean.outer(mean))


def test_a_component_without_points_keeps_its_place():
    model = mixture()
    model.means[2] = 1e3
    place, cov = model.means[2].clone(), model.covs[2].clone()
    x = points_of("gaussian")
    model.fit(x, torch.full((60,), 1 / 60).double())
    assert torch.equal(model.means[2], place) and torch.equal(model.covs[2], cov)
    assert model.log_prob(x).isfinite().all() and abs(model.shares.sum() - 1) < 1e-12


@pytest.mark.parametrize("sites", [8])
@pytest.mark.parametrize("values", [2, 3])
def test_the_expected_weight_never_falls_by_enumeration(sites, values):
    sites = sites if values == 2 else 5
    x = torch.tensor(list(itertools.product(range(values), repeat=sites)))
    for seed in range(10):
        g = generator(seed)
        W = torch.rand(len(x), generator=g, dtype=torch.float64) ** 4
        probs = torch.rand(sites, values, generator=g, dtype=torch.float64) + 0.05
        model, found = Categorical(probs / probs.sum(1, keepdim=True)), []
        for _ in range(50):
            joint = W * model.log_prob(x).exp()
            assert abs(model.log_prob(x).exp().sum() - 1) < 1e-12
            found.append(joint.sum().item())
            model.fit(x, joint / joint.sum())
        assert all(b >= a - 1e-14 for a, b in itertools.pairwise(found)) and found[-1] > found[0]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_the_way_on_a_slope(share):
    normal = torch.distributions.Normal(0.0, 1.0)
    t = normal.icdf(torch.tensor(1 - share, dtype=torch.float64))
    i = normal.log_prob(t).exp() / share
    factor = (1 + t * i - i * i).sqrt()
    way = (i / (1 - factor)).item()
    assert abs(way - {0.1: 2.98, 0.25: 2.500, 0.5: 2.01}[share]) < 0.01
    search = Search(Gaussian([0.0], 3.0), Elites(share), 40_000, seed=2)
    for _ in range(6):
        before = search.distribution.cov.item()
        search.step(lambda x: -x[:, 0])
        assert abs((search.distribution.cov.item() / before) ** 0.5 / factor - 1) < 0.03
    search.run(lambda x: -x[:, 0], 40_000 * 50)
    assert abs(search.distribution.mean.item() / 3 / way - 1) < 0.03


def test_weights_are_those_of_their_formulas():
    values = torch.tensor([-3.0, 0.5, 0.5, 2.0, 9.0, 10.0, 11.0]).double()
    raw = [max(0.0, math.log(4) - math.log(i)) for i in range(1, 8)]
    assert torch.allclose(RankWeights()(values), torch.tensor(raw).double() / sum(raw))
    raw = [max(0.0, math.log(4.5) - math.log(i)) for i in range(1, 9)]
    assert torch.allclose(RankWeights()(randn(8)), torch.tensor(raw).double() / sum(raw))
    for share, count in ((0.01, 1), (2 / 7, 2), (0.3, 3), (1, 7)):
        assert Elites(share)(values).tolist() == [1 / count] * count + [0.0] * (7 - count)
    e = [math.exp(-v / 4) for v in values.tolist()]
    assert torch.allclose(Boltzmann(4.0)(values), torch.tensor(e).double() / sum(e))
    assert torch.allclose(Boltzmann(1.0)(values * 1e4 - 1e7), Elites(0.01)(values))


@pytest.mark.parametrize("weights", [RankWeights(), Elites(0.9), Boltzmann(1.0)])
def test_failed_evaluations_have_no_weight(weights):
    search = Search(Gaussian([0.0, 0.0]), weights, 12, seed=1)
    x = search.ask()
    values = randn(12, seed=2)
    failed = torch.arange(12) % 2 == 0
    search.tell(x, torch.where(failed, values.new_tensor(math.nan), values))
    other = Search(Gaussian([0.0, 0.0]), weights, 12, seed=1)
    other.ask()
    moved = torch.where(failed[:, None], 5.0 + x, x)  # where a failure lies does not count
    other.tell(moved, torch.where(failed, values.new_tensor(math.nan), values))
    assert torch.equal(search.distribution.mean, other.distribution.mean)
    assert search.distribution.mean.isfinite().all()


def test_a_vanished_variance_still_draws():
    cov = torch.tensor([[1.0, 1.0], [1.0, 1.0]]).double()
    x = draw_normal(torch.zeros(2).double(), cov, randn(100, 2, seed=1))
    assert (x[:, 0] - x[:, 1]).abs().max() < 1e-7 and x.isfinite().all()


@pytest.mark.parametrize("kind", MODELS)
def test_a_state_goes_on_bit_for_bit(kind):
    def objective(x):
        return (x.double() - 1).square().sum(1)

    def make(seed):
        return Search(MODELS[kind](), Elites(0.5), 40, rate=0.7, seed=seed)

    whole, first, second = make(1), make(1), make(2)
    whole.run(objective, 800)
    first.run(objective, 360)
    x = first.ask()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    second.tell(x, objective(x))
    second.run(objective, 800)
    assert torch.equal(whole.history, second.history) and torch.equal(whole.ask(), second.ask())
    with pytest.raises(ValueError, match="shape"):
        Search(Gaussian(torch.zeros(7)), Elites(0.5), 40).load_state_dict(first.state_dict())


def test_searches_find_minima():
    target = randn(6, seed=3)
    found = Search(Gaussian(torch.zeros(6).double(), 3.0)).run(
        lambda x: (x - target).square().sum(1), 10_000
    )
    assert (found.x - target).abs().max() < 1e-4
    word = torch.randint(0, 5, (15,), generator=generator(1))
    found = Search(Categorical.uniform(15, 5)).run(lambda x: (x != word).sum(1), 5000)
    assert torch.equal(found.x, word)
    bounds = (torch.tensor([0.5, -1.0]), torch.tensor([2.0, 1.0]))
    search = Search(Gaussian([1.0, 0.0], 0.5), bounds=bounds, seed=1)
    found = search.run(lambda x: x.square().sum(1), 6000)
    assert found.x[0] >= 0.5 and found.value < 0.2501


def test_several_steps_are_several_fits():
    x = points_of("mixture", 30)
    search, model = Search(mixture(), RankWeights(), 30, steps=4), mixture()
    search.tell(x, randn(30, seed=1))
    order = randn(30, seed=1).argsort()
    for _ in range(4):
        model.fit(x[order], RankWeights()(torch.zeros(30).double()))
    assert torch.equal(search.distribution.means, model.means)


def test_mistakes_are_refused():
    for words, call in (
        ("sigma must be", lambda: Gaussian([0.0], 0.0)),
        ("means must be", lambda: Mixture(torch.zeros(3))),
        ("probs must be", lambda: Categorical(-torch.ones(2, 2))),
        ("sum to 1", lambda: Categorical(torch.ones(2, 2))),
        ("components must be", lambda: Mixture.around([0.0], 1.0, 0)),
        ("values must be", lambda: Categorical.uniform(3, 1)),
        ("share must be", lambda: Elites(1.1)),
        ("temperature must be", lambda: Boltzmann(0.0)),
        ("rate must be", lambda: Search(Gaussian([0.0]), rate=0.0)),
        ("rate must be 1", lambda: Search(Gaussian([0.0]), rate=0.5, steps=2)),
        ("population_size must be", lambda: Search(Gaussian([0.0]), population_size=3)),
    ):
        with pytest.raises(ValueError, match=words):
            call()
