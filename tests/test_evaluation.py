"""The numbers that a scheme reports, against references written from their definitions."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch.nn.functional import softplus

from optgen.data.images import Batch
from optgen.models.diffusion import Denoiser, UNet
from optgen.models.features import default_features
from optgen.models.gan import MLPDiscriminator, MLPGenerator
from optgen.schemes.assisted import Assisted
from optgen.schemes.couplings import NoCoupling
from optgen.schemes.denoising import DenoisingDiffusion
from optgen.schemes.feedback import FeedbackGAN
from optgen.schemes.likelihood import MaximumLikelihood
from optgen.testing import generator

F64 = torch.float64
SIZES = (7, 3, 6)  # of batches, unequal


def gray(n, shape, seed):
    """Return n images of 256 gray levels, in [0, 1]."""
    return torch.randint(256, (n, *shape), generator=generator(seed)) / 255


def frechet(a, b):
    """Return the squared Fréchet distance of the Gaussians of two sets of features, by SciPy."""
    a, b = (np.asarray(x.detach().double().flatten(1)) for x in (a, b))
    mean = ((a.mean(0) - b.mean(0)) ** 2).sum()
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    return mean + np.trace(cov_a + cov_b - 2 * scipy.linalg.sqrtm(cov_a @ cov_b).real)


def floor_of(features):
    """Return the expected distance of two sets as large as this one, of its Gaussian."""
    values = np.linalg.eigvalsh(np.cov(np.asarray(features.double().flatten(1)).T)).clip(1e-300)
    pairs = np.outer(values, values) / np.add.outer(values, values)
    return 2 / len(features) * (values.sum() + (pairs.sum() + np.diag(pairs).sum()) / 2)


def recorded(monkeypatch, owner, name):
    """Replace a method by one that keeps what it returns; return the list of what it has."""
    kept, method = [], getattr(owner, name)

    def keep(*args, **kwargs):
        """Call the method and keep the result."""
        kept.append(method(*args, **kwargs))
        return kept[-1]

    monkeypatch.setattr(owner, name, keep)
    return kept


class Gaussian(nn.Module):
    """A density of images: every number is normal, with a deviation of a quarter."""

    shape = (1, 3, 3)

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.full(self.shape, 0.4, dtype=F64))

    def log_prob(self, y):
        """Return the log-density of images, (B,)."""
        return torch.distributions.Normal(self.mean, 0.25).log_prob(y).flatten(1).sum(1)

    def sample(self, n, generator=None):
        """Return n images."""
        return self.mean + torch.zeros(n, *self.shape)


@pytest.mark.parametrize("k", [1, 4])
def test_the_likelihood_of_dequantized_images(k, monkeypatch):
    scheme = MaximumLikelihood(Gaussian(), "dequantized", shape=Gaussian.shape)
    noisy = recorded(monkeypatch, scheme, "preprocess")
    batches = [gray(n, Gaussian.shape, n) for n in SIZES]
    found = scheme.evaluate(batches, k=k)
    nats = []
    for x, draws in zip(batches, (noisy[i : i + k] for i in range(0, len(noisy), k)), strict=True):
        levels = (255 * x).round()
        for y in draws:  # a number of the level's bin, of width 1/256
            assert ((256 * y >= levels - 1e-3) & (256 * y < levels + 1 + 1e-3)).all()
        density = torch.distributions.Normal(torch.tensor(0.4, dtype=F64), 0.25)
        log_p = torch.stack([density.log_prob(y).sum((1, 2, 3)) for y in draws])
        nats.append(9 * math.log(256) - log_p)
    nats = torch.cat(nats, 1)
    nll = -(-nats).exp().mean(0).log()
    assert found["n"] == 16
    assert found["loss"] == pytest.approx(nats.mean().item())
    assert found["nll"] == pytest.approx(nll.mean().item())
    assert found["nll_se"] == pytest.approx(nll.std().item() / 4)
    assert found["bits_per_dim"] == pytest.approx(nll.mean().item() / (9 * math.log(2)))


def test_the_losses_and_distance_of_a_gan(monkeypatch):
    shape = (1, 2, 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        G, D = MLPGenerator(3, [8], shape, out="sigmoid"), MLPDiscriminator(shape, [8])
    scheme = FeedbackGAN(G, D, features=lambda x: x.flatten(1))
    noisy = recorded(monkeypatch, scheme, "draw_noise")
    batches = [Batch(gray(n, shape, n)) for n in SIZES]
    found = scheme.evaluate(batches, seed=4)
    x, z = torch.cat([b.x for b in noisy]), torch.cat([b.z for b in noisy])
    assert torch.equal(x, torch.cat([b.x for b in batches]))
    fake = G(z)
    assert found["G"] == pytest.approx(softplus(-D(fake)).mean().item(), rel=1e-5)
    d_loss = softplus(-D(x)).mean() + softplus(D(fake)).mean()
    assert found["D"] == pytest.approx(d_loss.item(), rel=1e-5)
    assert found["fid"] == pytest.approx(frechet(x, fake), rel=1e-4)
    assert found["fid_floor"] == pytest.approx(floor_of(x), rel=1e-4)


def bound(denoiser, x, *args):
    """Return another bound in the place of the model's, (B,)."""
    return 5 + x.flatten(1).mean(1)


def log_prob(denoiser, x, *args):
    """Return another log-density in the place of the model's, (B,)."""
    return 3 - 2 * x.flatten(1).mean(1)


def test_the_likelihoods_and_distance_of_a_diffusion_model(monkeypatch):
    shape = (1, 8, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(shape, 4, (1, 2), attention=False, classes=3)
        scheme = DenoisingDiffusion(Denoiser(unet, shape), conditional=True)
    monkeypatch.setattr("optgen.schemes.denoising.variational_bound", bound)
    monkeypatch.setattr("optgen.schemes.denoising.ode_log_prob", log_prob)
    noisy = recorded(monkeypatch, scheme, "draw_noise")
    drawn = recorded(monkeypatch, scheme, "sample")
    classes, sample = [], scheme.sample

    def sample_of(n, labels, **more):
        """Sample, and keep the classes that were asked for."""
        classes.append(labels)
        return sample(n, labels=labels, **more)

    monkeypatch.setattr(scheme, "sample", sample_of)
    labels = [torch.arange(n) % 3 for n in SIZES]
    batches = [Batch(gray(n, shape, n), y) for n, y in zip(SIZES, labels)]
    found = scheme.evaluate(batches, k=2, ode_steps=2, fid_steps=2)
    x, y = torch.cat([b.x for b in batches]), torch.cat([b.x for b in noisy])
    # The model's images are in [-1, 1]: a bin of a gray level is 1/128 wide, with noise in it.
    assert ((128 * (y + 1) - (255 * x).round() - 0.5).abs() <= 0.51).all()
    for name, nats in (("bound", bound(None, y)), ("nll", -log_prob(None, y))):
        mean = 64 * math.log(128) + nats.mean().item()
        assert found[name] == pytest.approx(mean)
        assert found[f"{name}_se"] == pytest.approx(nats.std().item() / 4, rel=1e-3)
        assert found[f"{name}_bits_per_dim"] == pytest.approx(mean / (64 * math.log(2)))
    assert all(map(torch.equal, classes, labels)) and len(classes) == len(labels)
    features = default_features(x)
    assert found["fid_floor"] == pytest.approx(floor_of(features(x)), rel=1e-3)
    assert found["fid"] == pytest.approx(frechet(features(x), features(torch.cat(drawn))), rel=1e-3)
    assert found["n"] == 16


class Linear(nn.Module):
    """A classifier of four numbers, its logits their first three."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        """Return the logits, (B, 3)."""
        return self.scale * x.flatten(1)[:, :3]


def test_the_error_and_calibration_of_a_classifier():
    scheme = Assisted(Linear(), coupling=NoCoupling(), weight=0.25)
    x = torch.rand(40, 1, 2, 2, generator=generator(0))
    y = torch.randint(-1, 3, (40,), generator=generator(1))  # -1 is unknown
    found = scheme.evaluate([Batch(x[:23], y[:23]), Batch(x[23:], y[23:])])
    known = np.asarray(y >= 0)
    p = np.asarray((3 * x.flatten(1)[:, :3]).double().softmax(1))[known]
    y, n = np.asarray(y)[known], int(known.sum())
    right, confidence = p.argmax(1) == y, p.max(1)
    wrong = int((~right).sum())
    assert 0 < wrong < n < 40
    assert found["n"] == n and found["error"] == pytest.approx(wrong / n)
    assert found["nll"] == pytest.approx(-np.log(p[np.arange(n), y]).mean())
    z = 1.96
    center, spread = wrong + z**2 / 2, z * math.sqrt(wrong * (n - wrong) / n + z**2 / 4)
    assert found["error_low"] == pytest.approx((center - spread) / (n + z**2), rel=1e-4)
    assert found["error_high"] == pytest.approx((center + spread) / (n + z**2), rel=1e-4)
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs(right[bins == b].sum() - confidence[bins == b].sum()) for b in range(15)]
    assert found["ece"] == pytest.approx(sum(gaps) / n)
    assert found["weight"] == 0.25
