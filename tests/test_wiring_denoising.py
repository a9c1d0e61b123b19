"""Loss, levels, draws and reported numbers of `DenoisingDiffusion` against the papers' formulas.

The references are plain torch in float64, written from the image's side: a denoiser is trained by
E[w |x - x_hat|^2], and every target's error is that of x_hat in another unit.
"""

import itertools
import math

import pytest
import torch
from torch import nn

from optgen.data.images import Batch
from optgen.models.diffusion import Denoiser
from optgen.models.schedules import (
    TARGETS,
    CosineSchedule,
    LinearSchedule,
    LogNormalSchedule,
    PowerSchedule,
    StraightSchedule,
)
from optgen.optim import SGD
from optgen.schemes.denoising import DenoisingDiffusion, evaluate_diffusion
from optgen.schemes.levels import (
    WEIGHTS,
    AdaptiveLevels,
    Uncertainty,
    UniformLevels,
)
from optgen.testing import generator, randn

F64 = torch.float64
SHAPE, CLASSES = (1, 2, 3), 3


class Net(nn.Module):
    """A smooth network of all that a denoiser may pass to it, with dropout."""

    def __init__(self, conditional, dropout=0.5):
        super().__init__()
        self.conditional = conditional
        self.mix = nn.Parameter(0.4 * randn(6, 6, seed=1))
        self.level = nn.Parameter(randn(6, seed=2))
        self.table = nn.Parameter(randn(CLASSES, 6, seed=3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, y, c, labels=None):
        """Return the output for images of unit scale, a quarter of log sigma, and labels."""
        h = y.flatten(1) @ self.mix + c[:, None] * self.level
        if self.conditional:
            h = h + self.table[labels]
        return self.dropout(h.tanh()).view_as(y)


def column(sigma, x):
    """Return noise levels (B,) that multiply images."""
    return sigma.view(-1, *[1] * (x.dim() - 1))


def reference_denoised(net, target, std, y, sigma, *labels):
    """Return x_hat where the network's output F estimates the target from y = x + sigma eps."""
    s = column(sigma, y)
    r = (s**2 + std**2).sqrt()
    F = net(y / r, sigma.log() / 4, *labels)
    if target == "x0":
        return F
    if target == "eps":
        return y - s * F
    if target == "v":  # F = (std eps - sigma x / std) / r
        return std**2 / r**2 * y - s * std / r * F
    return (y - s * F) / (1 + s)  # flow, F = eps - x


def linear_level(t, beta=(0.1, 20.0)):
    """Return sigma(t) of Ho et al. (2020): 1 - alpha_bar over alpha_bar, with a linear rate."""
    alpha_bar = (-(beta[0] * t + (beta[1] - beta[0]) * t**2 / 2)).exp()
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def cosine_level(t):
    """Return sigma(t) of Nichol & Dhariwal (2021), offset 0.008."""
    f = ((t + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    alpha_bar = f / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    return (1 / alpha_bar - 1).sqrt()


def log_normal_level(t):
    """Return sigma(t) of Karras et al. (2022): log sigma is N(-1.2, 1.2^2)."""
    return torch.distributions.Normal(-1.2, 1.2).icdf(t).exp()


def straight_level(t):
    """Return sigma(t) of the straight path (1 - t) x + t eps, divided by 1 - t."""
    return t / (1 - t)


SCHEDULES = {
    "linear": (LinearSchedule, linear_level),
    "cosine": (CosineSchedule, cosine_level),
    "log-normal": (LogNormalSchedule, log_normal_level),
    "straight": (StraightSchedule, straight_level),
}


def time_of(level, sigma):
    """Return the time of a noise level, by bisection."""
    a, b = torch.tensor([1e-12, 1 - 1e-12], dtype=F64)
    for _ in range(200):
        middle = (a + b) / 2
        a, b = (middle, b) if level(middle) < sigma else (a, middle)
    return a


def reference_sigma(name, low, high, u):
    """Return the noise level a share u of the time between those of `low` and `high`."""
    level = SCHEDULES[name][1]
    start, end = (time_of(level, sigma) for sigma in (low, high))
    return level(start + (end - start) * u)


def reference_image_weight(name, sigma, std, log_slope):
    """Return the weight of |x - x_hat|^2 that a name stands for."""
    return {
        "x0": 1 + 0 * sigma,
        "eps": sigma**-2,
        "v": (sigma**2 + std**2) / (std * sigma) ** 2,
        "flow": ((1 + sigma) / sigma) ** 2,
        "min-snr": torch.minimum(sigma**-2, torch.tensor(5.0)),
        "p2": sigma**-2 / (1 + sigma**-2),
        "elbo": log_slope / sigma**2,
        "own": std * sigma.sqrt(),
    }[name]


def own_weight(sigma, std):
    """Return a weight of the user's own."""
    return std * sigma.sqrt()


def full_levels(bins=4, seed=0, **more):
    """Return adaptive levels that have met every bin."""
    levels = AdaptiveLevels(bins, **more)
    for i in range(3):
        u = torch.rand(40, generator=generator(seed + i), dtype=F64)
        levels.square, levels.met = levels.square.to(u), levels.met.to(u)
        levels.update(u, 0.2 + 3 * u**2)
    return levels


def reference_density(levels, u):
    """Return the density of positions: a tenth uniform, the rest by the root of mean squares."""
    root = levels.square.sqrt()
    shares = 0.1 / len(root) + 0.9 * root / root.sum()
    return shares[(u * len(root)).long()] * len(root)


def make_batch(seed, n=12):
    """Return labeled images of gray levels n / 255."""
    rng = generator(seed)
    x = torch.randint(256, (n, *SHAPE), generator=rng).to(F64) / 255
    return Batch(x, torch.randint(CLASSES, (n,), generator=rng))


def make_scheme(
    target="v", std=0.7, conditional=True, schedule="log-normal", dropout=0.0, **settings
):
    """Return a scheme of the smooth network, in float64, on levels from 0.05 to 20."""
    model = Denoiser(Net(conditional, dropout), SHAPE, target, std).to(F64)
    schedule = SCHEDULES[schedule][0](0.05, 20.0)
    if settings.get("uncertainty"):
        settings["uncertainty"] = Uncertainty().to(F64)
        nn.init.normal_(settings["uncertainty"].out.weight, std=0.3)
        nn.init.normal_(settings["uncertainty"].out.bias)
    return DenoisingDiffusion(
        model, schedule=schedule, conditional=conditional, **({"weight": "v"} | settings)
    )


def reference_errors(scheme, batch, weight, schedule):
    """Return the weighted error of each example, from its image, noise, position and label."""
    model = scheme.model
    with torch.enable_grad():
        u = batch.u.detach().clone().requires_grad_()
        sigma = reference_sigma(schedule, 0.05, 20.0, u)
        (slope,) = torch.autograd.grad(sigma.log().sum(), u)
    sigma = sigma.detach()
    labels = [] if batch.labels is None else [batch.labels]
    y = batch.x + column(sigma, batch.x) * batch.eps
    denoised = reference_denoised(model.net, model.target, model.std, y, sigma, *labels)
    w = reference_image_weight(weight, sigma, model.std, slope)
    return w * (batch.x - denoised).square().flatten(1).mean(1)


LOSSES = [  # target, weight, schedule, further settings
    ("eps", "eps", "linear", {}),
    ("v", "v", "log-normal", {"levels": full_levels}),
    ("flow", "flow", "straight", {"levels": full_levels, "uncertainty": True}),
    ("x0", "p2", "cosine", {"conditional": False}),
    ("eps", "min-snr", "cosine", {"uncertainty": True}),
    ("v", "elbo", "linear", {"levels": full_levels}),
    ("flow", "elbo", "cosine", {}),
    ("x0", "elbo", "log-normal", {"conditional": False}),
    ("v", "x0", "straight", {"levels": full_levels}),
    ("eps", "own", "log-normal", {"uncertainty": True, "levels": full_levels}),
]


def test_every_weight_target_and_schedule_is_tried():
    targets, weights, schedules, _ = map(set, zip(*[(*case[:3], "") for case in LOSSES]))
    assert targets == set(TARGETS) and schedules == set(SCHEDULES)
    assert weights == {*WEIGHTS, "elbo", "own"}


@pytest.mark.parametrize("target, weight, schedule, more", LOSSES)
def test_the_loss_is_the_weighted_error_of_the_image(target, weight, schedule, more):
    more = {k: v() if k == "levels" else v for k, v in more.items()}
    given = own_weight if weight == "own" else weight
    scheme = make_scheme(target, schedule=schedule, weight=given, **more)
    batch = scheme.draw(make_batch(5))
    sigma = reference_sigma(schedule, 0.05, 20.0, batch.u)
    torch.testing.assert_close(batch.sigma, sigma, rtol=1e-6, atol=0)
    errors = reference_errors(scheme, batch, weight, schedule)
    torch.testing.assert_close(scheme.errors(batch), errors, rtol=1e-5, atol=0)
    density = 1.0
    if "levels" in more:
        density = reference_density(scheme.levels, batch.u)
        assert density.max() > 1.5 * density.min()
    q = torch.zeros_like(errors)
    if scheme.uncertainty:
        k = torch.arange(16) * math.pi / 12
        angle = batch.sigma.log()[:, None] * k
        waves = torch.cat([angle.cos(), angle.sin()], 1)
        q = waves @ scheme.uncertainty.out.weight[0] + scheme.uncertainty.out.bias
        assert q.std() > 0.1
    expected = ((errors * (-q).exp() + q) / density).mean()
    torch.testing.assert_close(scheme.loss(batch), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_images_are_dequantized_and_centered_and_noise_is_normal(seed):
    scheme, n = make_scheme(), 3000
    x = torch.randint(256, (n, *SHAPE), generator=generator(seed)).to(F64) / 255
    batch = scheme.draw_noise(Batch(x, torch.zeros(n, dtype=torch.int64)), generator(seed))
    share = 128 * (batch.x + 1) - (255 * x).round()  # of the cell of the gray level
    assert share.min() > -1e-9 and share.max() < 1 + 1e-9
    for sample, mean, variance in ((share, 1 / 2, 1 / 12), (batch.eps, 0.0, 1.0)):
        error = (variance / sample.numel()) ** 0.5
        assert abs(sample.mean() - mean) < 5 * error
        assert abs(sample.var() - variance) < 5 * 1.5 * variance * (2 / sample.numel()) ** 0.5
    plain = make_scheme(pixels=False).draw_noise(Batch(x - 3, torch.zeros(n).long()))
    assert torch.equal(plain.x, x - 3)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("adaptive", [False, True])
def test_every_stratum_of_the_levels_has_one_draw(adaptive, seed):
    levels, n = full_levels(5, seed) if adaptive else UniformLevels(), 60
    u, density = levels.draw(n, torch.zeros((), dtype=F64), generator(seed))
    v = u
    if adaptive:  # the distribution function, linear in each bin
        root = levels.square.sqrt()
        shares = 0.1 / 5 + 0.9 * root / root.sum()
        j = (5 * u).long()
        v = shares.cumsum(0)[j] - shares[j] + shares[j] * (5 * u - j)
        torch.testing.assert_close(density, 5 * shares[j])
    assert torch.equal((v * n).long().sort().values, torch.arange(n))
    assert not torch.equal(u, u.sort().values)


class ReferenceLevels:
    """Nichol & Dhariwal's statistics, bin by bin, in plain numbers."""

    def __init__(self, bins, decay):
        self.decay, self.square, self.met = decay, [0.0] * bins, [0] * bins

    def update(self, u, loss):
        """Fold the mean square of a batch's losses into its bin: a mean at first, then decaying."""
        bins = len(self.square)
        for j in range(bins):
            squares = [e**2 for p, e in zip(u, loss) if int(p * bins) == j and math.isfinite(e)]
            if squares:
                self.met[j] += 1
                step = max(1 / self.met[j], 1 - self.decay)
                mean = sum(squares) / len(squares)
                self.square[j] += step * (mean - self.square[j])


@pytest.mark.parametrize("with_uncertainty", [False, True])
def test_levels_adapt_to_the_losses_of_every_step(with_uncertainty):
    levels, reference = AdaptiveLevels(4, decay=0.6), ReferenceLevels(4, 0.6)
    more = {"uncertainty": True} if with_uncertainty else {}
    scheme = make_scheme("eps", weight="eps", schedule="cosine", levels=levels, **more)
    drawn, draw = [], scheme.draw

    def recording_draw(batch):
        """Draw the noise and keep it."""
        drawn.append(draw(batch))
        return drawn[-1]

    scheme.draw = recording_draw
    for t in range(7):
        weights = [p.detach().clone() for p in scheme.model.parameters()]
        q = scheme.uncertainty
        scale = [p.detach().clone() for p in q.parameters()] if q else []
        scheme.step(make_batch(t, n=5))
        now = [p.detach().clone() for p in scheme.model.parameters()]
        later = [p.detach().clone() for p in q.parameters()] if q else []
        with torch.no_grad():
            for module, old in ((scheme.model, weights), (q, scale)):
                for p, x in zip(module.parameters() if module else (), old):
                    p.copy_(x)
            errors = reference_errors(scheme, drawn[-1], "eps", "cosine")
            if q:
                errors = errors * (-q(drawn[-1].sigma)).exp()
            for module, new in ((scheme.model, now), (q, later)):
                for p, x in zip(module.parameters() if module else (), new):
                    p.copy_(x)
        reference.update(drawn[-1].u.tolist(), errors.tolist())
        assert levels.met.tolist() == reference.met
        assert levels.square.tolist() == pytest.approx(reference.square, rel=1e-5)
    assert min(reference.met) > 2 and torch.equal(drawn[0].density, torch.ones(5, dtype=F64))
    assert drawn[-1].density.max() > 1.2 * drawn[-1].density.min()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("conditional", [False, True])
def test_pairs_are_optimal_within_the_classes_of_a_conditional_model(conditional, seed):
    schemes = [make_scheme(conditional=conditional, coupling=pair) for pair in (False, True)]
    batch = make_batch(seed, 6)
    free, paired = (scheme.draw_noise(batch, generator(seed)) for scheme in schemes)
    assert torch.equal(free.x, paired.x)
    orders = [list(order) for order in itertools.permutations(range(6))]
    if conditional:
        orders = [order for order in orders if torch.equal(batch.y[order], batch.y)]
        assert torch.equal(paired.labels, batch.y)
    best = min(orders, key=lambda order: (free.x - free.eps[order]).square().sum().item())
    assert torch.equal(paired.eps, free.eps[best])


def reference_sample(denoise, sampler, noise, levels, rng):
    """Return images by the sampler's equation, one level after another."""
    y = levels[0] * noise
    for a, b in itertools.pairwise(levels):
        slope = (y - denoise(y, y.new_full((len(y),), a))) / a
        if sampler == "ancestral":  # the posterior of y at level b given x_hat and y at level a
            mean = y - (1 - b**2 / a**2) * a * slope
            variance = b**2 * (a**2 - b**2) / a**2
            y = mean
            if b:
                y = y + variance**0.5 * torch.randn(y.shape, generator=rng, dtype=F64)
        elif sampler == "heun" and b:
            ahead = y + (b - a) * slope
            other = (ahead - denoise(ahead, y.new_full((len(y),), b))) / b
            y = y + (b - a) * (slope + other) / 2
        else:
            y = y + (b - a) * slope
    return y


def power_levels(low, high, n, rho=7.0):
    """Return the levels of Karras et al. (2022), Eq. (5), and then 0."""
    ends = high ** (1 / rho), low ** (1 / rho)
    shares = [i / (n - 1) for i in range(n)] if n > 1 else [0.0]
    return [(ends[0] + share * (ends[1] - ends[0])) ** rho for share in shares] + [0.0]


@pytest.mark.parametrize("own_schedule", [False, True])
@pytest.mark.parametrize("target", ["v", "eps"])
@pytest.mark.parametrize("sampler", ["heun", "ddim", "ancestral"])
def test_samples_follow_the_equation_of_the_sampler(sampler, target, own_schedule):
    scheme = make_scheme(target, dropout=0.5, schedule="cosine", pixels=False)
    labels, rng = torch.tensor([2, 0, 1, 2]), generator(3)
    schedule = PowerSchedule(0.3, 5.0, 4.0) if own_schedule else None
    levels = power_levels(0.3, 5.0, 5, 4.0) if own_schedule else power_levels(0.05, 20.0, 5)
    noise = torch.randn(4, *SHAPE, generator=rng, dtype=F64)
    net = make_scheme(target).model.net  # the same weights, no dropout

    def denoise(y, sigma):
        """Return the denoised images of these labels."""
        return reference_denoised(net, target, 0.7, y, sigma, labels)

    with torch.no_grad():
        expected = reference_sample(denoise, sampler, noise, levels, rng)
    drawn = {"labels": labels, "generator": generator(3), "schedule": schedule}
    torch.testing.assert_close(scheme.sample(4, sampler, 5, **drawn), expected)
    assert scheme.model.net.dropout.training
    scheme.pixels = True
    gray = scheme.sample(4, sampler, 5, **drawn | {"generator": generator(3)})
    n = [min(max(math.floor(128 * (x + 1)), 0), 255) for x in expected.flatten().tolist()]
    assert gray.flatten().mul(255).tolist() == pytest.approx(n)


def zero_model(std):
    """Return the denoiser of the Gaussian N(0, std^2): that of target v and output 0."""
    model = Denoiser(Net(False), SHAPE, "v", std).to(F64)
    for p in model.parameters():
        nn.init.zeros_(p)
    return model


def gaussian_nll(x, variance):
    """Return the nats of each example under independent Gaussians."""
    normal = torch.distributions.Normal(torch.zeros((), dtype=F64), variance**0.5)
    return -normal.log_prob(x).flatten(1).sum(1)


@pytest.mark.parametrize("pixels", [False, True])
def test_likelihoods_of_a_gaussian_are_reported_with_their_errors(pixels):
    std, low, high, seed = 0.7, 0.05, 20.0, 4
    scheme = DenoisingDiffusion(
        zero_model(std), schedule=CosineSchedule(low, high), pixels=pixels, levels=full_levels()
    )
    batches = [make_batch(seed, 40)] if pixels else [make_batch(seed, 25), make_batch(7, 15)]
    found = scheme.evaluate(batches, seed=seed, ode_steps=60)
    x = torch.cat([batch.x for batch in batches])
    cells = 0.0
    if pixels:  # the density of the cell of a gray level; a cell has the width 1/128
        x = (255 * x + torch.rand(x.shape, generator=generator(seed), dtype=F64)) / 128 - 1
        cells = 6 * math.log(128)
    nats = cells + gaussian_nll(x, std**2 + low**2)
    mean, error = nats.mean().item(), nats.std().item() / 40**0.5
    assert found["n"] == 40
    assert found["nll"] == pytest.approx(mean, rel=1e-3)
    assert found["nll_se"] == pytest.approx(error, rel=1e-2)
    assert found["nll_bits_per_dim"] == pytest.approx(mean / (6 * math.log(2)), rel=1e-3)


def reference_bounds(x, std, low, high, k, rng):
    """Return draws of the bound of a Gaussian's denoiser: prior, all levels, and the smallest."""
    normal, shrink = torch.distributions.Normal, lambda sigma: std**2 / (std**2 + sigma**2)
    prior = normal(0.0, (high**2 + std**2) ** 0.5)
    kl = torch.distributions.kl_divergence(normal(x, high), prior).flatten(1).sum(1)
    y = x + low * torch.randn(x.shape, generator=rng, dtype=F64)
    total = kl - normal(shrink(low) * y, low).log_prob(x).flatten(1).sum(1)
    for i in range(k):  # levels log-uniform in equal parts
        u = (i + torch.rand(len(x), generator=rng, dtype=F64)) / k
        sigma = column((math.log(low) + u * math.log(high / low)).exp(), x)
        y = x + sigma * torch.randn(x.shape, generator=rng, dtype=F64)
        snr_errors = ((x - shrink(sigma) * y) / sigma).square().flatten(1).sum(1)
        total = total + math.log(high / low) * snr_errors / k
    return total


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("high", [0.4, 20.0])
def test_the_bound_of_k_levels_is_that_of_the_gaussian(high, k):
    std, low, n = 0.7, 0.05, 4000
    scheme = DenoisingDiffusion(zero_model(std), schedule=CosineSchedule(low, high), pixels=False)
    x = (std * randn(6, *SHAPE, seed=2)).repeat_interleave(n, 0)
    found = scheme.evaluate([Batch(x)], seed=k, k=k)
    spread = reference_bounds(x, std, low, high, k, generator(9)).std().item()
    # The bound is exact for the right denoiser, but for low^4 / std^4 at the smallest level.
    nats = gaussian_nll(x, std**2).mean().item()
    within = reference_bounds(x, std, low, high, k, generator(8)).view(6, n).std(1).mean().item()
    assert abs(found["bound"] - nats) < 5 * within / len(x) ** 0.5 + 1e-3
    assert found["bound_se"] == pytest.approx(spread / len(x) ** 0.5, rel=0.05)
    assert found["bound_bits_per_dim"] == pytest.approx(found["bound"] / 6 / math.log(2))


def test_the_reported_loss_is_at_uniform_levels_without_uncertainty_or_dropout():
    levels = full_levels()
    scheme = make_scheme(
        "eps", weight="eps", schedule="cosine", levels=levels, uncertainty=True, dropout=0.5
    )
    batches, seed = [make_batch(1, 20), make_batch(2, 7)], 3
    found = scheme.evaluate(batches, seed=seed)
    rng, errors = generator(seed), []
    net = make_scheme("eps").model.net
    for batch in batches:
        n, here = len(batch.x), {"generator": rng, "dtype": F64}
        x = (255 * batch.x + torch.rand(batch.x.shape, **here)) / 128 - 1
        eps = torch.randn(x.shape, **here)
        u = (torch.randperm(n, generator=rng) + torch.rand(n, **here)) / n
        sigma = reference_sigma("cosine", 0.05, 20.0, u)
        y = x + column(sigma, x) * eps
        estimate = (y - reference_denoised(net, "eps", 0.7, y, sigma, batch.y)) / column(sigma, x)
        errors.append((eps - estimate).square().flatten(1).mean(1))
    assert found["n"] == 27
    assert found["loss"] == pytest.approx(torch.cat(errors).mean().item(), rel=1e-6)
    assert scheme.evaluate(batches, seed=4)["loss"] != found["loss"]


def test_the_reported_distance_is_that_of_as_many_samples_of_the_same_classes(monkeypatch):
    scheme, calls = make_scheme(), []

    def recorded_sample(n, *args, **settings):
        """Record the settings and return random images."""
        calls.append((n, args, settings))
        return torch.rand(n, *SHAPE, generator=generator(n), dtype=F64) ** 2

    monkeypatch.setattr(scheme, "sample", recorded_sample)
    batches = [make_batch(1, 20), make_batch(2, 13)]
    found = scheme.evaluate(batches, fid_steps=4)
    for (n, args, settings), batch in zip(calls, batches, strict=True):
        assert n == len(batch.x) and not args
        assert settings["steps"] == 4 and torch.equal(settings["labels"], batch.y)
    features = [
        torch.nn.functional.adaptive_avg_pool2d(images, 8).flatten(1)
        for images in (
            torch.cat([batch.x for batch in batches]),
            torch.cat([recorded_sample(n) for n in (20, 13)]),
        )
    ]
    means = [f.mean(0) for f in features]
    covariances = [torch.cov(f.T) for f in features]
    cross = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    distance = (means[0] - means[1]).square().sum() + sum(c.trace() for c in covariances)
    assert found["fid"] == pytest.approx((distance - 2 * cross).item(), rel=1e-4)
    # Equal Gaussians of 33 images: twice the variance of a mean, and of a covariance's root.
    a = torch.linalg.eigvalsh(covariances[0]).clamp(min=1e-300)
    pairs = a[:, None] * a / (a[:, None] + a) * (1 + torch.eye(len(a), dtype=F64))
    assert found["fid_floor"] == pytest.approx(2 / 33 * (a.sum() + pairs.sum() / 2).item())


def test_the_players_descend_by_the_optimizers_that_are_given():
    scheme = make_scheme("eps", weight="eps", schedule="cosine", uncertainty=True)
    model, q = scheme.model, scheme.uncertainty
    optimizers = SGD(model.parameters(), lr=0.1), SGD(q.parameters(), lr=0.01)
    scheme = DenoisingDiffusion(
        model, "eps", scheme.schedule, uncertainty=q, conditional=True, optimizers=optimizers
    )
    drawn = []

    def recording_draw(batch):
        """Draw the noise and keep it."""
        drawn.append(scheme.draw_noise(batch))
        return drawn[-1]

    scheme.draw = recording_draw
    before = {p: p.detach().clone() for p in (*model.parameters(), *q.parameters())}
    with torch.random.fork_rng():
        reported = scheme.step(make_batch(1))
    after = {p: p.detach().clone() for p in before}
    with torch.no_grad():
        for p, x in before.items():
            p.copy_(x)
    errors = reference_errors(scheme, drawn[0], "eps", "cosine")
    log_weight = q(drawn[0].sigma)
    loss = (errors * (-log_weight).exp() + log_weight).mean()
    assert reported["model"].item() == reported["uncertainty"].item()
    assert reported["model"].item() == pytest.approx(loss.item(), rel=1e-6)
    for module, lr in ((model, 0.1), (q, 0.01)):
        params = list(module.parameters())
        for p, g in zip(params, torch.autograd.grad(loss, params, retain_graph=True)):
            torch.testing.assert_close(after[p], before[p] - lr * g, rtol=1e-5, atol=1e-9)


def test_the_defaults_are_those_of_karras_et_al():
    model = Denoiser(Net(True), SHAPE)
    scheme = DenoisingDiffusion(model, uncertainty=Uncertainty(), conditional=True)
    assert scheme.weight == "v" and type(scheme.levels) is UniformLevels
    u = torch.linspace(0, 1, 7, dtype=F64)
    torch.testing.assert_close(scheme.schedule(u), reference_sigma("log-normal", 0.002, 80.0, u))
    rates = {
        name: player.optimizer.param_groups[0]["lr"] for name, player in scheme.players.items()
    }
    assert rates == {"model": 1e-3, "uncertainty": 1e-2}
    assert not scheme.uncertainty(torch.tensor([0.01, 1.0, 50.0])).any()
    assert not scheme.coupling and scheme.pixels
    batch = Batch(make_batch(1).x.float(), make_batch(1).y)
    assert scheme.evaluate([batch]).keys() == {"n", "loss"}
    assert evaluate_diffusion(scheme, [batch]) == scheme.evaluate([batch])
    for kind in (PowerSchedule, *(kind for kind, _ in SCHEDULES.values())):
        ends = kind()(torch.tensor([0.0, 1.0], dtype=F64)).tolist()
        assert ends == pytest.approx([0.002, 80.0])
    assert scheme.evaluate([batch]) == scheme.evaluate([batch], seed=0)
    with pytest.raises(ValueError, match="pixel"):
        DenoisingDiffusion(model, conditional=True).draw(Batch(batch.x + 0.001, batch.y))


def test_a_sampler_and_labels_must_fit_the_scheme():
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="the number of classes is unknown"):
        make_scheme().sample(2)
    with pytest.raises(ValueError, match="labels go with a conditional model"):
        make_scheme(conditional=False).sample(2, labels=labels)
    with pytest.raises(ValueError, match="ddim or heun"):
        make_scheme(coupling=True).sample(2, "ancestral", labels=labels)
    with pytest.raises(ValueError, match="has no labels"):
        make_scheme().loss(make_scheme().draw(Batch(make_batch(0).x)))
