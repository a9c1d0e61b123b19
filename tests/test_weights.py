"""Weights of examples: a loss with whole weights is that of copies, in all three schemes."""

import pytest
import torch
from torch import nn

from optgen.controllers import Geco
from optgen.data.batches import as_batch
from optgen.data.images import DataError, WeightedBatch, weighted_mean
from optgen.models.diffusion import Denoiser, PerceptronDenoiser
from optgen.models.flow import realnvp
from optgen.models.vae import VAE
from optgen.optim import SGD
from optgen.schemes.denoising import DenoisingDiffusion
from optgen.schemes.elbo import BetaVAE, NoisyBatch
from optgen.schemes.feedback import FeedbackGAN
from optgen.schemes.levels import Uncertainty
from optgen.schemes.likelihood import MaximumLikelihood
from optgen.testing import generator
from optgen.training.trainer import fit

COPIES = torch.tensor([0, 3, 1, 0, 2, 5, 1])
N, D = len(COPIES), 6


def vae_scheme(**options):
    "Return a VAE of vectors with the estimator of three samples."
    return BetaVAE(VAE(D, 8, 7, 3), 0.7, estimator="iwae", k=3, **options)


def flow_scheme(**options):
    "Return a flow of dequantized vectors."
    flow = realnvp(D, 2, (8,))
    return MaximumLikelihood(flow, "dequantized", **options)


def diffusion_scheme(**options):
    "Return a diffusion of pixels with an uncertainty of its own."
    model = Denoiser(PerceptronDenoiser(D, 16), (D,), "v", 0.5)
    return DenoisingDiffusion(model, "eps", uncertainty=Uncertainty(), **options)


SCHEMES = {"vae": vae_scheme, "flow": flow_scheme, "diffusion": diffusion_scheme}


def pixels(seed, n=N):
    "Return gray levels, (n, D), float64."
    return torch.randint(256, (n, D), generator=generator(seed)).double() / 255


def seeded(name, seed, **options):
    "Return a scheme in float64 whose weights are drawn from a seed."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SCHEMES[name](**options).to(torch.float64)


def copied_rows(batch, copies):
    "Return a batch with each row as often as its number of copies."
    parts = (None if x is None else x.repeat_interleave(copies, 0) for x in batch[:-1])
    return type(batch)(*parts, None)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_weighted_loss_is_that_of_copies(name, seed):
    scheme = seeded(name, seed)
    loss = next(iter(scheme.players.values())).loss
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        noisy = scheme.draw(WeightedBatch(pixels(seed), None, COPIES.double()))
    found, expected = loss(noisy), loss(copied_rows(noisy, COPIES)) * COPIES.sum() / N
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    params = [p for player in scheme.players.values() for p in player.params.values()]
    for a, b in zip(*(torch.autograd.grad(x, params) for x in (found, expected))):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SCHEMES)
def test_equal_weights_are_none_and_micro_batches_change_nothing(name):
    def stepped(weights, micro_batches=1):
        "Return the parameters after two steps."
        scheme = seeded(name, 3)
        scheme.micro_batches = micro_batches
        with torch.random.fork_rng():
            torch.manual_seed(4)
            for k in range(2):
                scheme.step(WeightedBatch(pixels(k), None, weights))
        model = next(iter(scheme.players.values()))
        return torch.cat([p.detach().flatten() for p in model.params.values()])

    plain = stepped(None)
    assert torch.allclose(plain, stepped(torch.ones(N)), rtol=1e-9, atol=1e-11)
    weighted = stepped(COPIES.float())
    assert (plain - weighted).abs().max() > 1e-4
    if name != "vae":  # IWAE's k samples are drawn at once, with other numbers for each part.
        assert torch.allclose(weighted, stepped(COPIES.float(), 3), rtol=1e-6, atol=1e-7)


def test_a_controller_sees_weighted_means():
    def controlled(x, weights):
        "Return the KL weight after a step, with noise that depends on the row alone."
        scheme = seeded("vae", 5)
        scheme.beta = Geco(2.0, rate=0.1, smoothing=0.0, clip=1.0)
        scheme.beta_is_due = True
        scheme.loss(noise_of(x, weights))
        return scheme.beta.value

    def noise_of(x, weights):
        "Return a batch without noise."
        z = torch.zeros(len(x), 3, 3, dtype=torch.float64)
        return NoisyBatch(x, z, z[:, 0, :0], z[:, :0], weights)

    x = pixels(6)
    for scale in (1, 10):
        found = controlled(x, scale * COPIES.double())
        assert torch.allclose(found, controlled(x.repeat_interleave(COPIES, 0), None))
    assert not torch.allclose(found, controlled(x, None))


def test_means_keep_further_dimensions():
    losses, weights = torch.rand(N, 2, 3, generator=generator(7)), torch.rand(N)
    expected = sum(w * row for w, row in zip(weights, losses)) / N
    assert torch.allclose(weighted_mean(losses, weights), expected)


def test_weights_reach_a_run_of_fit():
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(8, 1)
    weights = torch.tensor([0.0, 2.0]).repeat(8)

    class Mean(nn.Module):
        "A Gaussian of unit variance."

        def __init__(self):
            super().__init__()
            self.mean = nn.Parameter(torch.zeros(2))

        def log_prob(self, x):
            "Return the log-density without its constant."
            return -((x - self.mean) ** 2).sum(1) / 2

    model = Mean()
    scheme = MaximumLikelihood(model, "continuous", SGD(model.parameters(), lr=0.5))
    rows = list(zip(x, weights))
    loader = torch.utils.data.DataLoader(rows, batch_size=16, shuffle=True)
    fit(scheme, loader, epochs=30, batch=lambda b: WeightedBatch(b[0], None, b[1]), progress="none")
    assert torch.allclose(model.mean, torch.tensor([1.0, 0.0]), atol=1e-4)
    assert as_batch(WeightedBatch(x, None, weights)).weights is weights


@pytest.mark.parametrize(
    "weights, words",
    [
        (torch.ones(N - 1), r"the weights are .* expected floats with shape \(7,\)"),
        (torch.ones(N, dtype=torch.int64), "expected floats"),
        (torch.ones(N, 1), "expected floats"),
        (torch.full((N,), torch.nan), "expected finite numbers"),
        (-torch.ones(N), "weights are -1 to -1, expected finite numbers, at least 0"),
    ],
)
@pytest.mark.parametrize("name", SCHEMES)
def test_bad_weights_are_named(name, weights, words):
    with pytest.raises(DataError, match=words):
        seeded(name, 1).step(WeightedBatch(pixels(1), None, weights))


def test_a_batch_without_weights_is_still_a_pair():
    x, y = as_batch((pixels(1), torch.zeros(N, dtype=torch.int64)))
    assert x.shape == (N, D) and y.shape == (N,)


def test_schemes_without_weights_refuse_them():
    G, D_net = nn.Linear(3, D), nn.Linear(D, 1)
    G.z_dim = 3
    with pytest.raises(DataError, match="this scheme's loss has none"):
        FeedbackGAN(G, D_net).step(WeightedBatch(pixels(1).float(), None, torch.ones(N)))
