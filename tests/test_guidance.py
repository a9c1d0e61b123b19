"""Guidance and restoration of the installed package, against formulas that are written here."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import nn

import optgen
from cli_helpers import run
from optgen.cli.restore import observe_picture, read_picture
from optgen.guidance import (
    DPS,
    Guided,
    Moments,
    NoisyLikelihood,
    NormalizedDPS,
    PseudoInverse,
)
from optgen.guidance.operators import (
    Blur,
    Downsample,
    Linear,
    Mask,
    Observation,
    RandomMeasurements,
    observe,
)
from optgen.guidance.restoration import Restored, latent_search, restore
from optgen.guidance.rules import conjugate_gradients
from optgen.models.diffusion import Denoiser, PerceptronDenoiser, UNet, ancestral, ddim, heun
from optgen.models.mixture import GaussianMixture, fit_mixture
from optgen.models.schedules import LogNormalSchedule, PowerSchedule
from optgen.schemes.denoising import DenoisingDiffusion
from optgen.testing import assert_mean, generator, randn

SHAPE = (2, 6, 8)


def operators():
    "Return operators on images of two channels, by name."
    return {
        "mask": Mask(randn(*SHAPE, seed=1) > 0.3),
        "blur": Blur(SHAPE, 1.2),
        "downsample": Downsample(SHAPE, 2),
        "measurements": RandomMeasurements(SHAPE, 5, generator(2)),
        "own": Linear(lambda x: x.diff(dim=-2) * 3, SHAPE),
    }


@pytest.mark.parametrize("name", operators())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_adjoint_is_the_transpose_of_the_matrix(name, dtype):
    operator = operators()[name]
    x = randn(3, *SHAPE, seed=3).to(dtype)
    columns = [operator.apply(e.view(1, *SHAPE))[0].flatten() for e in torch.eye(96, dtype=dtype)]
    A = torch.stack(columns, 1)
    out = operator.apply(x)
    u = randn(*out.shape, seed=4).to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    assert (out.flatten(1) - x.flatten(1) @ A.T).abs().max() < tolerance
    back = operator.adjoint(u)
    assert back.shape == x.shape and back.dtype == dtype
    assert (back.flatten(1) - u.flatten(1) @ A).abs().max() < tolerance
    assert torch.equal(operator.matrix(x), A) or (operator.matrix(x) - A).abs().max() < tolerance


@pytest.mark.parametrize("std", [0.7, 2.0])
def test_a_blur_is_that_of_scipy(std):
    x = randn(2, *SHAPE, seed=5)
    radius = math.ceil(3 * std)
    theirs = gaussian_filter(
        x.numpy(), (0, 0, std, std), mode="constant", radius=(0, 0, radius, radius)
    )
    assert np.abs(Blur(SHAPE, std).apply(x).numpy() - theirs).max() < 1e-12


def test_operators_keep_what_they_say():
    x = randn(2, *SHAPE, seed=6)
    small = Downsample(SHAPE, 2).apply(x)
    assert torch.allclose(small[1, 0, 2, 3], x[1, 0, 4:6, 6:8].mean())
    mask = randn(*SHAPE, seed=7) > 0
    assert torch.equal(Mask(mask).apply(x), x[:, mask])
    one, two = (RandomMeasurements(SHAPE, 2000, generator(s)).apply(x) for s in (8, 9))
    assert not torch.equal(one, two)
    length = x.flatten(1).square().sum(1)
    assert (one.square().sum(1) / length - 1).abs().max() < 5 * (2 / 2000) ** 0.5


def test_observations_have_their_noise_and_their_likelihood():
    x, operator = randn(400, *SHAPE, seed=10), Downsample(SHAPE, 2)
    seen = observe(x, operator, 0.3, generator(11))
    assert torch.equal(seen.observed, observe(x, operator, 0.3, generator(11)).observed)
    assert_mean(seen.residual(x).square().flatten(), 0.09)
    other = randn(400, *SHAPE, seed=12)
    normal = torch.distributions.Normal
    exact = [
        normal(operator.apply(y), 0.3).log_prob(seen.observed).flatten(1).sum(1) for y in (x, other)
    ]
    assert (seen(x) - seen(other) - exact[0] + exact[1]).abs().max() < 1e-9
    repeated = seen.repeat(3)
    assert torch.equal(repeated.observed.unflatten(0, (3, 400))[2], seen.observed)


# A mixture of two components on the line and one of three in six dimensions.


def line():
    "Return a mixture on the line."
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    means = torch.tensor([[-1.0], [2.0]], dtype=torch.float64)
    return GaussianMixture(
        weights.double(), means.double(), torch.tensor([[[0.5]], [[1.5]]]).double()
    )


def bent(seed=0):
    "Return a mixture of three components of six numbers."
    root = randn(3, 6, 6, seed=seed + 1)
    weights = randn(3, seed=seed + 2).softmax(0)
    return GaussianMixture(weights, randn(3, 6, seed=seed + 3), root @ root.mT / 6)


def line_density(x):
    "Return the density of the mixture on the line, by its definition."
    parts = [(0.3, -1.0, 0.5), (0.7, 2.0, 1.5)]
    return sum(
        w * torch.exp(-((x - m) ** 2) / (2 * v)) / (2 * math.pi * v) ** 0.5 for w, m, v in parts
    )


@pytest.mark.parametrize("sigma", [0.2, 1.0, 6.0])
def test_a_mixture_denoises_and_conditions_as_quadrature_does(sigma):
    x = torch.linspace(-25, 25, 200_001, dtype=torch.float64)
    p, mixture = line_density(x), line()
    for y in (-3.0, 0.4, 5.0):
        posterior = p * torch.exp(-((y - x) ** 2) / (2 * sigma**2))
        mean = (posterior * x).sum() / posterior.sum()
        variance = (posterior * x**2).sum() / posterior.sum() - mean**2
        at, level = torch.tensor([[y]]).double(), torch.tensor([sigma]).double()
        assert abs(mixture.denoise(at, level)[0, 0] - mean) < 1e-7
        evidence = posterior.sum() * (x[1] - x[0]) / (2 * math.pi * sigma**2) ** 0.5
        assert abs(mixture.log_prob(at, level)[0] - evidence.log()) < 1e-7
        scaled = mixture.condition(torch.tensor([[2.0]]).double(), 2 * at[0], 2 * sigma)
        assert abs(scaled.mean[0] - mean) < 1e-7 and abs(scaled.variance[0] - variance) < 1e-6
    assert abs(mixture.mean[0] - (p * x).sum() / p.sum()) < 1e-9


def test_samples_of_mixtures_and_of_batches_of_them():
    mixture = bent()
    drawn = mixture.sample(20_000, generator(13))
    assert_mean(drawn, mixture.mean)
    assert_mean((drawn - mixture.mean) ** 2, mixture.variance)
    A, seen = randn(2, 6, seed=14), randn(5, 2, seed=15)
    batch = mixture.condition(A, seen, 0.4)
    drawn = batch.sample(20_000, generator(16))
    for i, observed in enumerate(seen):
        one = mixture.condition(A, observed, 0.4)
        assert torch.allclose(batch.mean[i], one.mean) and torch.allclose(
            batch.variance[i], one.variance
        )
    assert_mean(drawn, batch.mean)
    assert_mean((drawn - batch.mean) ** 2, batch.variance)
    y, level = randn(5, 6, seed=17), torch.full((5,), 0.8, dtype=torch.float64)
    alone = [
        mixture.condition(A, o, 0.4).denoise(y[i : i + 1], level[:1])[0] for i, o in enumerate(seen)
    ]
    assert (batch.denoise(y, level) - torch.stack(alone)).abs().max() < 1e-12


def test_a_mixture_is_fitted_by_em():
    x = torch.cat([randn(300, 2, seed=18) * 0.3 - 2, randn(100, 2, seed=19) * 0.5 + 2])
    plain = {"prior_count": 0.0, "floor": 0.0}
    found = fit_mixture(x, 2, steps=30, **plain)
    r = found.whiten(x, x.new_zeros(400))[0].softmax(1)  # A fixed point of EM:
    N = r.sum(0)
    assert (found.log_weights.exp() - N / 400).abs().max() < 1e-6
    assert (found.means - r.T @ x / N[:, None]).abs().max() < 1e-6
    for k in range(2):
        gap = x - found.means[k]
        assert (found.covariances[k] - gap.T @ (r[:, k : k + 1] * gap) / N[k]).abs().max() < 1e-6
    shrunk = fit_mixture(x, 1, steps=1, prior_count=200.0, prior_share=0.5, floor=0.1)
    total = torch.cov(x.T, correction=0)
    expected = (400 * total + 200 * 0.5 * total) / 600 + 0.1 * torch.eye(2)
    assert (shrunk.covariances[0] - expected).abs().max() < 1e-6
    weights = torch.tensor([1.0] * 300 + [0.0] * 100)
    only = fit_mixture(x, 1, weights, **plain)
    assert (only.mean - x[:300].mean(0)).abs().max() < 1e-12


def test_conjugate_gradients_solve_and_stay_finite():
    root, b = randn(4, 5, 5, seed=20), randn(4, 5, seed=21)
    M = root @ root.mT + 0.5 * torch.eye(5, dtype=torch.float64)
    M[3] = -M[3]
    found = conjugate_gradients(lambda v: (M @ v[..., None])[..., 0], b, 7)
    assert (found[:3] - torch.linalg.solve(M[:3], b[:3])).abs().max() < 1e-9
    assert torch.equal(found[3], torch.zeros(5).double())
    assert torch.equal(conjugate_gradients(lambda v: v, 0 * b, 3), 0 * b)


def test_conjugate_gradients_stop_for_good():
    "The fourth direction would have a positive curvature again, and a step of length 27."
    rows = [[1.1076, 0.5579, 1.0008], [0.5579, 0.1448, -0.2278], [1.0008, -0.2278, 0.3278]]
    M = torch.tensor(rows, dtype=torch.float64)
    b = torch.tensor([[-1.4442, -1.3835, -0.7987]], dtype=torch.float64)
    one, many = (conjugate_gradients(lambda v: v @ M, b, n) for n in (3, 9))
    assert one.any() and torch.equal(one, many)


def explicit_correction(rule, denoise, seen, y, sigma):
    "Return the correction of one example, from the paper's formula and an explicit Jacobian."
    A = seen.operator.matrix(y)
    own = y.clone().requires_grad_()
    clean = denoise(own[None], y.new_tensor([sigma]))[0]
    J = torch.stack([torch.autograd.grad(c, own, retain_graph=True)[0] for c in clean])
    r, s2 = seen.observed[0] - A @ clean.detach(), seen.noise**2
    if isinstance(rule, NormalizedDPS):
        return rule.step * (1 + sigma**2) * J.T @ A.T @ r / r.norm()
    covariance = {
        DPS: torch.zeros_like(J),
        Moments: sigma**2 * J,
        PseudoInverse: torch.eye(6).double() * sigma**2 * 0.49 / (sigma**2 + 0.49),
    }[type(rule)]
    S = s2 * torch.eye(len(A)).double() + A @ covariance @ A.T
    return sigma**2 * J.T @ A.T @ torch.linalg.solve(S, r)


@pytest.mark.parametrize("seed", [0, 50])
@pytest.mark.parametrize("sigma", [0.1, 1.0, 20.0])
@pytest.mark.parametrize(
    "rule",
    [DPS(), NormalizedDPS(0.6), PseudoInverse(0.7), Moments(3)],
    ids=lambda rule: type(rule).__name__,
)
def test_each_rule_is_its_formula(rule, sigma, seed):
    mixture, matrix = bent(seed), randn(3, 6, seed=seed + 30)
    operator = Linear(lambda x: x @ matrix.to(x).T, (6,))
    seen = observe(randn(2, 6, seed=seed + 31), operator, 0.5, generator(seed))
    y, level = randn(2, 6, seed=seed + 32), torch.full((2,), sigma, dtype=torch.float64)
    with torch.no_grad():
        found = Guided(mixture.denoise, seen, rule)(y, level)
    assert not found.requires_grad
    for i in range(2):
        one = seen._replace(observed=seen.observed[i : i + 1])
        expected = mixture.denoise(y[i : i + 1], level[:1])[0]
        expected = expected + explicit_correction(rule, mixture.denoise, one, y[i], sigma)
        assert (found[i] - expected).abs().max() < 1e-8 * (1 + expected.abs().max())


@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_any_likelihood_guides(weight):
    mixture, y = bent(), randn(3, 6, seed=33)
    level = torch.full((3,), 0.9, dtype=torch.float64)
    own = y.clone().requires_grad_()
    clean = mixture.denoise(own, level)
    (gradient,) = torch.autograd.grad(weight * clean.pow(4).sum(), own)
    found = Guided(mixture.denoise, lambda x: weight * x.pow(4).sum(1))(y, level)
    assert not found.requires_grad
    assert (found - clean - 0.81 * gradient).abs().max() < 1e-10

    def log_class(y, sigma):
        return weight * mixture.whiten(y, sigma)[0].log_softmax(1)[:, 2]

    found = Guided(mixture.denoise, log_class, NoisyLikelihood())(y, level)
    component = GaussianMixture(torch.ones(1), mixture.means[2:], mixture.covariances[2:])
    of_class, of_all = component.denoise(y, level), mixture.denoise(y, level)
    assert (found - (of_all + weight * (of_class - of_all))).abs().max() < 1e-9


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("sampler", [ddim, heun, ancestral])
def test_samplers_draw_from_the_posterior(sampler, seed):
    root = randn(4, 4, seed=seed + 40)
    S, A = root @ root.mT / 4 + 0.1 * torch.eye(4).double(), randn(2, 4, seed=seed + 41)
    prior = GaussianMixture(torch.ones(1), torch.zeros(1, 4).double(), S[None])
    seen = Observation(Linear(lambda x: x @ A.to(x).T, (4,)), randn(1, 2, seed=seed + 42), 0.6)
    gain = S @ A.T @ torch.linalg.inv(A @ S @ A.T + 0.36 * torch.eye(2).double())
    mean, covariance = gain @ seen.observed[0], S - gain @ A @ S
    steps = {heun: 60, ddim: 400, ancestral: 400}[sampler]
    more = {"generator": generator(seed)} if sampler is ancestral else {}
    start = 60 * randn(3000, 4, seed=seed + 43)
    drawn = sampler(
        Guided(prior.denoise, seen, Moments(2)),
        start,
        PowerSchedule(0.002, 60.0).steps(steps),
        **more,
    )
    sd = covariance.diagonal().sqrt()
    assert ((drawn.mean(0) - mean).abs() / sd).max() < 5 / 3000**0.5 + 0.03
    assert (torch.cov(drawn.T) - covariance).norm() / covariance.norm() < 0.08


class Exact(nn.Module):
    "A mixture as the model of a diffusion scheme."

    def __init__(self, mixture, shape):
        super().__init__()
        self.mixture, self.shape, self.target, self.std = mixture, shape, "x0", 1.0
        self.zero = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, y, sigma):
        "Return the denoised images."
        return self.mixture.denoise(y, sigma)

    output = forward


def heun_by_hand(denoise, y, levels):
    "Return the result of Heun's steps, written from Karras et al. (2022), Algorithm 1."
    for a, b in zip(levels, levels[1:]):
        d = (y - denoise(y, a)) / a
        ahead = y + (b - a) * d
        y = y + (b - a) * (d + (ahead - denoise(ahead, b)) / b) / 2 if b > 0 else ahead
    return y


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("chunk", [3, 100])
def test_restore_is_wired_as_the_formulas_say(pixels, chunk):
    shape, mixture = (1, 2, 3), bent(5)
    scheme = DenoisingDiffusion(
        Exact(mixture, shape), pixels=pixels, schedule=LogNormalSchedule(low=0.01, high=30.0)
    )
    operator = RandomMeasurements(shape, 2, generator(1))
    A = operator.weights.double()
    observed, noise = randn(2, 2, seed=50), 0.3
    found = restore(
        scheme,
        observed,
        operator,
        noise,
        4,
        PseudoInverse(0.8),
        steps=7,
        generator=generator(3),
        chunk=chunk,
    )
    missed = observed - torch.stack([x.flatten(1) for x in found.samples]) @ A.T
    assert torch.allclose(found.residuals, missed.square().mean(-1).sqrt() / noise)
    found = found.samples
    # gray level n / 255 of x, and 2 (n + 1/2) / 256 - 1 as the model sees it on average
    scale, center = (255 / 128, 0.5) if pixels else (1.0, 0.0)
    o, s = (observed - center * A.sum(1)) * scale, noise * scale
    rng = generator(3)
    rows = torch.arange(8) % 2
    start = [
        torch.randn(len(part), *shape, generator=rng, dtype=torch.float64)
        for part in rows.split(chunk)
    ]
    levels = PowerSchedule(scheme.schedule.low, scheme.schedule.high).steps(7).tolist()

    def denoise(y, sigma):
        flat = y.flatten(1)
        out = []
        for row, one in zip(rows, flat):
            seen = Observation(Linear(lambda x: x @ A.to(x).T, (6,)), o[row : row + 1], s)
            own = one.clone().requires_grad_()
            clean = mixture.denoise(own[None], own.new_tensor([sigma]))[0]
            J = torch.stack([torch.autograd.grad(c, own, retain_graph=True)[0] for c in clean])
            r2 = sigma**2 * 0.64 / (sigma**2 + 0.64)
            S = s**2 * torch.eye(2).double() + r2 * A @ A.T
            residual = seen.observed[0] - A @ clean.detach()
            out.append(clean.detach() + sigma**2 * J.T @ A.T @ torch.linalg.solve(S, residual))
        return torch.stack(out).view_as(y)

    expected = heun_by_hand(denoise, levels[0] * torch.cat(start), levels)
    expected = (expected / scale + center).clamp(0, 1) if pixels else expected
    assert (found - expected.unflatten(0, (4, 2))).abs().max() < 1e-7


def test_restored_numbers():
    samples = randn(9, 3, 2, seed=60)
    restored = Restored(samples, torch.ones(9, 3))
    assert torch.equal(restored.mean, samples.mean(0))
    assert torch.allclose(restored.std, samples.var(0).sqrt())
    low, high = restored.interval(0.8)  # ranks 1 and 9 of 9: each tail is 1 / 10
    ordered = samples.sort(0).values
    assert torch.allclose(low, ordered[0]) and torch.allclose(high, ordered[-1])
    low, high = restored.interval(0.4)  # ranks 3 and 7
    assert torch.allclose(low, ordered[2]) and torch.allclose(high, ordered[6])
    with pytest.raises(ValueError, match="level of 0.9 needs at least 19 samples, got 9"):
        restored.interval(0.9)


class HalfLost(nn.Module):
    "Decoder that is nan at negative latents."

    z_dim = 1

    def decoder(self, z):
        "Return the images of latents."
        return z.sqrt().expand(-1, 2)


def test_a_lost_restart_is_not_the_best():
    seen = Observation(Linear(lambda x: x, (2,)), torch.ones(3, 2).double(), 0.5)
    found = latent_search(HalfLost(), seen, 0.0, 200, 0.05, restarts=12, generator=generator(1))
    assert (found - 1).abs().max() < 1e-2


class TwoWells(nn.Module):
    "Decoder of one latent whose image is its fourth power, with two equally good latents."

    z_dim = 1

    def decoder(self, z):
        "Return the images of latents."
        return (z**2).expand(-1, 2)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_latent_search_minimizes_its_loss_and_keeps_the_best(weight):
    target = torch.tensor([[1.0, 1.4]]).double()
    seen = Observation(Linear(lambda x: x, (2,)), target, 0.5)
    found = latent_search(TwoWells(), seen, weight, steps=500, lr=0.05, generator=generator(4))
    z = torch.linspace(0.01, 3, 300_001, dtype=torch.float64)
    loss = ((target[0] - z[:, None] ** 2) ** 2).sum(1) / 0.5 + weight / 2 * z**2
    assert (found - z[loss.argmin()] ** 2).abs().max() < 1e-3


def test_restoration_runs_on_meta_and_in_bfloat16():
    model = Denoiser(UNet((1, 8, 8), 4, (1, 2)), (1, 8, 8))
    rules = (DPS(), NormalizedDPS(1.0), PseudoInverse(1.0), Moments(2))
    seen = observe(torch.rand(2, 1, 8, 8), Downsample((1, 8, 8), 2), 0.1, generator(5))
    y, level = torch.randn(2, 1, 8, 8), torch.ones(2)
    for rule in rules:
        with torch.autocast("cpu", torch.bfloat16):
            assert Guided(model, seen, rule)(y, level).isfinite().all()
    far = model.to("meta")
    seen = seen._replace(observed=seen.observed.to("meta"))
    for rule in rules:
        assert Guided(far, seen, rule)(y.to("meta"), level.to("meta")).shape == y.shape


@pytest.mark.cuda
def test_guidance_on_a_gpu():
    model = Denoiser(PerceptronDenoiser(16), (1, 4, 4)).cuda()
    nn.init.normal_(model.net.end.weight, std=0.1)
    seen = observe(torch.rand(2, 1, 4, 4).cuda(), Mask(torch.eye(4)[None] > 0), 0.1)
    y, level = torch.randn(2, 1, 4, 4).cuda(), torch.ones(2).cuda()
    found = Guided(model, seen, Moments(2))(y, level).cpu()
    seen = seen._replace(observed=seen.observed.cpu())
    assert torch.allclose(
        found, Guided(model.cpu(), seen, Moments(2))(y.cpu(), level.cpu()), atol=1e-3
    )


def test_observations_that_do_not_fit_are_refused():
    shape, rows = (1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool)
    rows[:, :2] = True
    plain = DenoisingDiffusion(Denoiser(PerceptronDenoiser(16), shape))
    coupled = DenoisingDiffusion(Denoiser(PerceptronDenoiser(16), shape), coupling=True)
    classes = Denoiser(PerceptronDenoiser(16, classes=3), shape)
    conditional = DenoisingDiffusion(classes, conditional=True)
    good = torch.rand(2, 8)
    for scheme, observed, labels, words in (
        (
            plain,
            torch.rand(2, *shape),
            None,
            r"shape \(B, 8\), got torch.float32 of \(2, 1, 4, 4\)",
        ),
        (plain, torch.rand(8), None, r"shape \(B, 8\)"),
        (plain, torch.rand(2, 1), None, r"shape \(B, 8\)"),
        (plain, torch.ones(2, 8, dtype=torch.uint8), None, "floating-point"),
        (plain, good.where(good > good.min(), torch.nan), None, "not finite"),
        (plain, good, torch.zeros(2).long(), "labels go with a conditional model"),
        (coupled, good, None, "coupling=True"),
        (conditional, good, None, "needs labels"),
        (conditional, good, torch.zeros(3).long(), "labels"),
        (conditional, good, torch.full((2,), 7), "labels"),
    ):
        with pytest.raises(ValueError, match=words):
            restore(scheme, observed, Mask(rows), 0.1, 2, steps=2, labels=labels)
    labels = torch.tensor([0, 2])
    drawn = restore(conditional, good, Mask(rows), 0.1, 3, steps=2, labels=labels, chunk=4)
    assert drawn.samples.shape == (3, 2, *shape)


def test_mixtures_refuse_what_has_no_density():
    with pytest.raises(ValueError, match="no spread.*floor"):
        fit_mixture(torch.ones(10, 2), 2, prior_count=0.0, floor=0.0)
    with pytest.raises(ValueError, match=r"\(4, 6\) and \(2, 1\)"):
        bent().condition(randn(4, 6, seed=1), randn(2, 1, seed=2), 0.1)


def test_bad_arguments_are_refused():
    shape = (1, 4, 4)
    scheme = DenoisingDiffusion(Denoiser(PerceptronDenoiser(16), shape))
    seen, small = torch.rand(2, 1, 2, 2), Downsample(shape, 2)
    for arguments, words in (
        ({"noise": 0.0}, "noise"),
        ({"samples": 0}, "samples"),
        ({"chunk": 0}, "chunk"),
        ({"steps": 0}, "steps"),
        ({"sampler": "euler"}, "sampler"),
    ):
        with pytest.raises(ValueError, match=words):
            restore(scheme, seen, small, **{"noise": 0.1, **arguments})
    with pytest.raises(ValueError, match=r"\(1, 8, 8\), the model of \(1, 4, 4\)"):
        restore(scheme, seen, Downsample((1, 8, 8), 4), 0.1)
    with pytest.raises(TypeError, match="PseudoInverse needs a linear observation, got function"):
        Guided(scheme.model, lambda x: x.sum(), PseudoInverse(1.0))(
            torch.rand(2, *shape), torch.ones(2)
        )
    with pytest.raises(ValueError, match="not linear"):
        Linear(lambda x: x.flatten(1).square(), shape)


@pytest.fixture(scope="module")
def diffusion_run(tmp_path_factory, few_images):
    "Return the folder of a small diffusion run on images of 8 x 8."
    out = tmp_path_factory.mktemp("runs") / "ddpm"
    options = "--image-size 8 --channels 4 --multiples 1,2 --epochs 1 --progress none"
    assert run("train ddpm --data", few_images, options, "--out", out) == 0
    return out


def test_the_command_restores(diffusion_run, few_images, tmp_path, capsys):
    picture = sorted(few_images.glob("*.png"))[0]
    known = np.zeros((8, 8), np.uint8)
    known[:4] = 255
    Image.fromarray(known).save(tmp_path / "mask.png")
    few = "--samples 3 --steps 3 --products 2 --seed 4"
    files = []
    for seed_of, out in (
        (few, "a.npz"),
        (few, "b.npz"),
        (few.replace("seed 4", "seed 5"), "c.npz"),
    ):
        command = ("restore", diffusion_run, picture, "--mask", tmp_path / "mask.png", seed_of)
        assert run(*command, "--out", tmp_path / out) == 0
        files.append(np.load(tmp_path / out))
    a, b, c = (found["samples"] for found in files)
    assert a.shape == (3, 1, 8, 8) and np.array_equal(a, b) and not np.array_equal(a, c)
    assert np.allclose(files[0]["mean"], a.mean(0), atol=1e-6)
    assert np.allclose(files[0]["std"], a.std(0, ddof=1), atol=1e-6)
    upper = read_picture(str(picture), 1).numpy()[:, 0, :4] - a[:, 0, :4]
    expected = (upper**2).mean((1, 2)) ** 0.5 / 0.05
    assert np.allclose(files[0]["residuals"], expected, rtol=1e-4)
    shown = capsys.readouterr().out
    assert ("samples miss the observation" in shown) == bool((expected > 3).any())
    assert run("restore", diffusion_run, picture, "--blur 1 --noise 1e-4", few) == 0
    assert "3 of 3 samples miss the observation" in capsys.readouterr().out
    assert run("restore", diffusion_run, picture, "--blur 1 --degrade", few) == 0
    opened, whole = optgen.load(diffusion_run, device="cpu"), Linear(lambda x: x, (1, 8, 8))
    exact = read_picture(str(picture), 1)
    noise = observe_picture(opened, str(picture), whole, 0.1, True, seed=4) - exact
    start = torch.randn(64, generator=generator(4))
    assert abs(noise.std() / 0.1 - 1) < 5 / 128**0.5
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), start]))[0, 1]) < 0.6
    assert (diffusion_run / "restored.png").exists()


def test_the_command_refuses_in_one_line(diffusion_run, few_images, tiny_run, tmp_path, capsys):
    picture = sorted(few_images.glob("*.png"))[0]
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "black.png")
    (tmp_path / "no.png").write_text("no picture")
    for args, words in (
        ((diffusion_run, picture), "0 of --mask, --blur and --smaller"),
        ((diffusion_run, picture, "--blur 1 --smaller 2"), "2 of --mask, --blur and --smaller"),
        ((diffusion_run, picture, "--smaller 2"), "4 x 4 are expected"),
        ((diffusion_run, picture, "--smaller 3"), "multiples of 3"),
        ((diffusion_run, picture, "--mask", tmp_path / "black.png"), "0 true"),
        ((diffusion_run, picture, "--mask", tmp_path / "no.png"), "no.png"),
        ((diffusion_run, tmp_path / "no.png", "--blur 1"), "no.png"),
        ((diffusion_run, picture, "--blur 1 --out x.txt"), ".png or an .npz"),
        ((diffusion_run, picture, "--blur 1 --class 3"), "class"),
        ((diffusion_run, picture, "--blur 0"), "--blur"),
        ((tiny_run, picture, "--blur 1"), "no denoiser"),
    ):
        capsys.readouterr()
        assert run("restore", *args) == 2
        shown = capsys.readouterr().err.strip().splitlines()[-1]
        assert words in shown, shown
    assert json.loads((diffusion_run / "config.json").read_text())["scheme"] == "ddpm"


@pytest.mark.parametrize(
    "operator",
    [
        Blur((1, 8, 12), 1.3),
        RandomMeasurements((1, 8, 12), 9, generator(1)),
        Linear(lambda x: x.flatten(1) @ torch.ones(96, 3) / 96, (1, 8, 12)),
    ],
    ids=("blur", "sums", "own"),
)
def test_autocast_does_not_round_an_observation(operator):
    x = torch.rand(3, 1, 8, 12, generator=generator(2))
    with torch.autocast("cpu", torch.bfloat16):
        found, back = operator.apply(x), operator.adjoint(operator.apply(x))
        values, vectors = operator.spectrum(x)
    A = operator.matrix(x.double()) if operator.__class__ is not Linear else operator.matrix(x)
    assert torch.allclose(
        found.flatten(1).double(), x.flatten(1).double() @ A.double().T, atol=1e-5
    )
    assert (back.flatten(1) - found.flatten(1) @ A.float()).abs().max() < 1e-4
    assert (vectors * values @ vectors.T - (A @ A.T).float()).abs().max() < 1e-4


def test_the_two_solutions_of_the_pseudo_inverse_agree():
    operator = Blur((1, 6, 7), 0.8)
    mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 42), torch.eye(42)[None])
    seen = observe(torch.rand(2, 1, 6, 7, generator=generator(3)), operator, 0.3, generator(4))
    y, level = torch.rand(2, 1, 6, 7, generator=generator(5)), torch.tensor([0.3, 2.0])
    exact, iterated = (
        Guided(mixture.denoise, seen, PseudoInverse(0.9, 42, most))(y, level) for most in (42, 41)
    )
    assert (exact - iterated).abs().max() < 1e-4 and not torch.equal(exact, iterated)


def test_a_few_pixels_of_a_large_image_need_no_large_matrix():
    mask = torch.zeros(3, 256, 256, dtype=torch.bool)
    mask[:, 3, 5:8] = True
    values, vectors = Mask(mask).spectrum(torch.zeros(1))
    assert torch.allclose(values, torch.ones(9)) and vectors.shape == (9, 9)


@pytest.mark.parametrize("bent", [torch.abs, torch.relu, lambda x: x.amax(-1), lambda x: x + 1])
def test_what_is_not_linear_is_refused(bent):
    with pytest.raises(ValueError, match="not linear"):
        Linear(bent, (1, 4, 4))


def test_one_observation_of_all_images_stays_one():
    seen = Observation(Blur((1, 4, 4), 1.0), torch.rand(1, 1, 4, 4, generator=generator(1)), 0.1)
    x = torch.rand(6, 1, 4, 4, generator=generator(2))
    assert torch.equal(seen.repeat(2)(x), seen(x))
