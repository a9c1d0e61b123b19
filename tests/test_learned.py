"""A scheme as the distribution of a search: its fit, its draws and its state."""

import itertools

import pytest
import torch
from torch import nn

from optgen.models.diffusion import Denoiser, PerceptronDenoiser
from optgen.models.flow import realnvp
from optgen.models.vae import GaussianVAE
from optgen.optim import SGD, Adam
from optgen.schemes.denoising import DenoisingDiffusion
from optgen.schemes.elbo import BetaVAE
from optgen.schemes.likelihood import MaximumLikelihood
from optgen.search import Elites, Learned, Search
from optgen.testing import generator


class Bits(nn.Module):
    "Independent bits, in float64."

    def __init__(self, shares):
        super().__init__()
        self.logits = nn.Parameter(shares.double().logit())

    def log_prob(self, x):
        "Return the log-probability of bits."
        p = self.logits.sigmoid()
        return (x * p.log() + (1 - x) * (1 - p).log()).sum(1)

    def sample(self, n):
        "Draw bits."
        return (
            torch.rand(n, len(self.logits), dtype=torch.float64) < self.logits.sigmoid()
        ).double()


def bits(shares, steps=600, **options):
    "Return bits whose fit is long enough to end."
    model = Bits(torch.tensor(shares))
    scheme = MaximumLikelihood(model, "binary", SGD(model.parameters(), lr=2.0))
    return Learned(scheme, steps=steps, **options)


def found_shares(learned):
    "Return the shares of ones."
    return learned.scheme.model.logits.detach().sigmoid()


@pytest.mark.parametrize("seed", [1, 2])
def test_a_long_fit_is_weighted_maximum_likelihood(seed):
    rng = generator(seed)
    x = torch.randint(2, (50, 3), generator=rng).double()
    weights = torch.rand(50, generator=rng, dtype=torch.float64)
    weights[::4] = 0
    weights /= weights.sum()
    learned = bits([0.2, 0.5, 0.7])
    learned.fit(x, weights)
    assert torch.allclose(found_shares(learned), weights @ x, atol=1e-6)


def test_with_a_rate_it_mixes_in_the_present_distribution():
    rng = generator(3)
    x = torch.randint(2, (20_000, 3), generator=rng).double()
    weights = torch.rand(len(x), generator=rng, dtype=torch.float64)
    weights /= weights.sum()
    shares = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    learned = bits(shares.tolist(), batch_size=10**6, steps=200)
    learned.fit(x, weights, 0.25)
    standard_error = 0.75 * (shares * (1 - shares) / len(x)).sqrt()
    error = found_shares(learned) - (0.75 * shares + 0.25 * weights @ x)
    assert (error.abs() < 4 * standard_error + 1e-6).all()


def test_the_batches_of_a_fit_have_weights_of_mean_one_and_no_point_without(monkeypatch):
    learned, seen = bits([0.5] * 4, steps=7, batch_size=5), []
    monkeypatch.setattr(learned.scheme, "step", seen.append)
    x = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=torch.float64)
    weights = torch.arange(16.0, dtype=torch.float64) * (torch.arange(16) % 2)
    learned.fit(x, weights / weights.sum())
    assert [len(batch.x) for batch in seen] == [5] * 7
    rows = torch.cat([batch.x for batch in seen])
    number = (rows @ torch.tensor([8.0, 4, 2, 1]).double()).long()
    assert (number % 2 == 1).all() and len(number.unique()) == 8
    expected = weights[number] * 8 / weights.sum()
    assert torch.allclose(torch.cat([batch.weights for batch in seen]).double(), expected)
    assert all(len(batch.x.unique(dim=0)) == 5 for batch in seen)


def flow():
    "Return a flow of two numbers."
    model = realnvp(2, 3, (8,))
    return Learned(MaximumLikelihood(model, "continuous", Adam(model.parameters(), lr=1e-3)), 3)


def vae():
    "Return a VAE of two numbers, with noise in its draws."
    scheme = BetaVAE(GaussianVAE(2, 8, 8, 2, out="linear"))
    return Learned(scheme, 3, draw=lambda n: scheme.sample(n) + 0.1 * torch.randn(n, 2))


def diffusion():
    "Return a diffusion model of two numbers."
    model = Denoiser(PerceptronDenoiser(2, 8), (2,), "v", 1.0)
    return Learned(DenoisingDiffusion(model, pixels=False), 3)


def make(kind, seed, **options):
    "Return a search whose weights and draws are of a seed."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Search(kind(), Elites(0.3), 30, seed=seed, **options)


def norms(x):
    "Return the norms of points."
    return x.norm(dim=1)


@pytest.mark.parametrize("rate", [1.0, 0.6])
@pytest.mark.parametrize("kind", [flow, vae, diffusion])
def test_a_search_goes_on_bit_for_bit_and_leaves_the_generator(kind, rate, tmp_path):
    before = torch.random.get_rng_state()
    whole, first, second = (make(kind, seed, rate=rate) for seed in (1, 1, 2))
    whole.run(norms, 180)
    first.run(norms, 90)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt"))
    first.run(norms, 180)
    second.run(norms, 180)
    for search in (first, second):
        assert torch.equal(whole.history, search.history)
        assert torch.equal(whole.ask(), search.ask())
    assert torch.equal(before, torch.random.get_rng_state())
    assert whole.ask().shape == (30, 2)


def test_a_state_of_another_scheme_is_refused_whole():
    search, other = make(flow, 1), make(diffusion, 2)
    asked = search.ask().clone()
    search = make(flow, 1)
    state = search.state_dict()
    state["distribution"] = other.state_dict()["distribution"]
    with pytest.raises(ValueError, match="scheme"):
        search.load_state_dict(state)
    assert torch.equal(search.ask(), asked)


def test_a_learned_flow_has_a_density_and_a_vae_has_none():
    learned = make(flow, 1).distribution
    x = torch.randn(5, 2, generator=generator(1))
    with torch.no_grad():
        expected = learned.scheme.model.log_prob(x)
    assert torch.allclose(learned.log_prob(x), expected)
    with pytest.raises(TypeError, match="no exact density"):
        make(vae, 1).distribution.log_prob(x)


def test_a_conditional_scheme_and_a_broken_state_are_refused():
    model = Denoiser(PerceptronDenoiser(2, 8, classes=3), (2,), "v", 1.0)
    with pytest.raises(ValueError, match="conditioned on classes"):
        Learned(DenoisingDiffusion(model, conditional=True, pixels=False))
    learned = make(flow, 1).distribution
    state = learned.state_dict()
    del state["fits"]
    with pytest.raises(ValueError, match="lacks the fits"):
        learned.load_state_dict(state)
    x = torch.randn(3, 2, dtype=torch.float64, generator=generator(2))
    assert torch.allclose(learned.log_prob(x), learned.log_prob(x.float()))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="has no sample"):
        Learned(object())
    with pytest.raises(ValueError, match="steps"):
        bits([0.5], steps=0)
    with pytest.raises(ValueError, match="batch_size"):
        bits([0.5], batch_size=0)


def test_each_fit_draws_its_rows_anew(monkeypatch):
    learned, seen = bits([0.5] * 4, steps=1, batch_size=6), []
    monkeypatch.setattr(learned.scheme, "step", lambda batch: seen.append(batch.x))
    x = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=torch.float64)
    for _ in range(2):
        learned.fit(x, torch.full((16,), 1 / 16, dtype=torch.float64))
    assert not torch.equal(*seen) and learned.fits == 2
    again, learned.fits = seen[0], 0
    learned.fit(x, torch.full((16,), 1 / 16, dtype=torch.float64))
    assert torch.equal(again, seen[2])
