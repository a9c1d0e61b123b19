"""Likelihoods, denoisers and networks of diffusion models against closed forms and plain torch."""

import math

import pytest
import torch
import torch.nn.functional as F

from optgen.models.diffusion import Denoiser, PerceptronDenoiser, UNet, ode_log_prob
from optgen.models.schedules import TARGETS
from optgen.testing import generator, randn


def randomized(module, seed=0, scale=0.4):
    """Return a module in float64 with random weights, those that start at 0 too."""
    module = module.double()
    for i, p in enumerate(module.parameters()):
        p.data.copy_(scale * randn(*p.shape, seed=100 * seed + i))
    return module


def gaussian_denoiser(cov):
    """Return the denoiser of N(0, cov): x_hat = cov (cov + sigma^2 I)^-1 y."""
    eye = torch.eye(len(cov), dtype=torch.float64)

    def denoise(y, sigma):
        """Return the posterior mean of the images."""
        M = torch.linalg.solve(cov + sigma[:, None, None] ** 2 * eye, cov.expand(len(y), -1, -1))
        return (y.flatten(1)[:, None] @ M)[:, 0].view_as(y)

    return denoise


@pytest.mark.parametrize("probes", [None, 3])
def test_the_likelihood_along_the_curves_is_the_gaussians(probes):
    A = randn(4, 4, seed=3)
    cov, std = A @ A.T / 4 + 0.2 * torch.eye(4, dtype=torch.float64), 0.9
    x = torch.linalg.cholesky(cov) @ randn(4, 2, seed=1)
    x = x.T.reshape(2, 1, 2, 2)
    normal = torch.distributions.MultivariateNormal(
        torch.zeros(4, dtype=torch.float64), cov + 0.05**2 * torch.eye(4, dtype=torch.float64)
    )
    exact = normal.log_prob(x.flatten(1))
    n = 400 if probes else 1
    settings = {"probes": probes, "generator": generator(5)}
    copies = x.repeat_interleave(n, 0)
    nats = ode_log_prob(gaussian_denoiser(cov), copies, 0.05, 60.0, std, 60, **settings)
    nats = nats.view(2, n)
    # At the highest level the covariance is taken for std^2 I; Heun's error is of second order.
    error = nats.std(1) / n**0.5 if probes else torch.zeros(2)
    assert ((nats.mean(1) - exact).abs() < 5 * error + 0.01).all()
    if probes:  # the estimate's variance falls as one over the probes
        one = ode_log_prob(
            gaussian_denoiser(cov), copies, 0.05, 60.0, std, 60, 1, generator(6)
        ).view(2, n)
        ratio = one.var(1) / nats.var(1)
        assert ((2 < ratio) & (ratio < 4.5)).all()


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_the_likelihood_along_the_curves_is_of_second_order_in_the_step(seed):
    A, x = randn(4, 4, seed=seed), randn(2, 4, seed=seed + 10)
    cov, std, low, high = A @ A.T / 4 + 0.2 * torch.eye(4, dtype=torch.float64), 0.9, 0.05, 60.0
    variances, axes = torch.linalg.eigh(cov)
    # The curves of a Gaussian: each axis grows with its standard deviation.
    growth = ((variances + high**2) / (variances + low**2)).sqrt()
    zero = torch.zeros((), dtype=torch.float64)
    end = torch.distributions.Normal(zero, math.hypot(high, std))
    exact = end.log_prob(growth * (x @ axes)).sum(1) + growth.log().sum()
    errors = []
    for steps in (40, 80):
        nats = ode_log_prob(gaussian_denoiser(cov), x, low, high, std, steps)
        errors.append((nats - exact).abs().max().item())
    assert 3 < errors[0] / errors[1] < 5.5 and errors[1] < 0.01


@pytest.mark.parametrize("probes", [None, 1])
def test_the_likelihood_of_an_isotropic_gaussian_needs_no_average(probes):
    std, x = 0.6, 0.6 * randn(3, 5, seed=2)

    def denoise(y, sigma):
        """Return the posterior mean of N(0, std^2)."""
        return std**2 / (std**2 + sigma[:, None] ** 2) * y

    nats = ode_log_prob(denoise, x, 0.1, 3.0, std, 4, probes)
    zero = torch.zeros((), dtype=torch.float64)
    normal = torch.distributions.Normal(zero, (std**2 + 0.1**2) ** 0.5)
    torch.testing.assert_close(nats, normal.log_prob(x).sum(1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("std", [1.0, 0.4])
@pytest.mark.parametrize("target", TARGETS)
def test_a_denoiser_scales_its_input_and_inverts_its_target(target, std):
    x, eps, seen = randn(3, 1, 2, 2, seed=1), randn(3, 1, 2, 2, seed=2), []
    sigma, labels = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64), torch.tensor([0, 2, 1])
    y = x + sigma.view(-1, 1, 1, 1) * eps
    r = (sigma**2 + std**2).sqrt().view(-1, 1, 1, 1)
    true = {
        "x0": x,
        "eps": eps,
        "v": (std * eps - sigma.view(-1, 1, 1, 1) * x / std) / r,
        "flow": eps - x,
    }[target]

    def net(*given):
        """Keep what the network is given, and return the true target."""
        seen.append(given)
        return true

    model = Denoiser(torch.nn.Identity(), (1, 2, 2), target, std)
    model.net = torch.nn.Module()
    model.net.forward = net
    torch.testing.assert_close(model(y, sigma, labels), x)
    assert model.output(y, sigma, labels) is true
    scaled, level, classes = seen[0]
    torch.testing.assert_close(scaled, y / r)
    torch.testing.assert_close(level, sigma.log() / 4)
    assert classes is labels


def group_norm(x, groups):
    """Return images with mean 0 and variance 1 in each group of channels."""
    grouped = x.unflatten(1, (groups, -1)).flatten(2)
    mean, var = grouped.mean(2, keepdim=True), grouped.var(2, correction=0, keepdim=True)
    return ((grouped - mean) / (var + 1e-5).sqrt()).view_as(x)


def silu(x):
    """Return x sigmoid(x)."""
    return x / (1 + (-x).exp())


def reference_block(block, x, embedding):
    """Return the output of a residual block without dropout."""
    first, second = block.first[2], block.second[2]
    gain, offset = (p.view(1, -1, 1, 1) for p in block.first[0].parameters())
    h = group_norm(x, math.gcd(8, x.shape[1])) * gain + offset
    h = F.conv2d(silu(h), first.weight, first.bias, padding=1)
    scale, shift = (embedding @ block.tune.weight.T + block.tune.bias).chunk(2, 1)
    h = group_norm(h, math.gcd(8, h.shape[1])) * (1 + scale[..., None, None])
    h = F.conv2d(silu(h + shift[..., None, None]), second.weight, second.bias, padding=1)
    if x.shape[1] != h.shape[1]:
        x = F.conv2d(x, block.skip.weight, block.skip.bias)
    return x + h


def reference_attention(attention, x):
    """Return the output of the attention, pixel by pixel."""
    gain, offset = (p.view(1, -1, 1, 1) for p in attention.norm.parameters())
    h = group_norm(x, math.gcd(8, x.shape[1])) * gain + offset
    qkv = F.conv2d(h, attention.qkv.weight, attention.qkv.bias).flatten(2)
    q, k, v = qkv.chunk(3, 1)
    weights = (torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5).softmax(2)
    attended = torch.einsum("bij,bcj->bci", weights, v).view_as(x)
    return x + F.conv2d(attended, attention.out.weight, attention.out.bias)


def reference_embedding(embed, c, labels):
    """Return the embedding of a level and a class."""
    angle = c[:, None] * torch.logspace(0, 2, 16).to(c)
    wave = torch.cat([angle.sin(), angle.cos()], 1)
    if labels is not None:
        wave = wave + embed.classes.weight[labels]
    first, second = embed.net[0], embed.net[2]
    return silu(second(silu(first(wave))))


@pytest.mark.parametrize("labels", [None, torch.tensor([2, 0])])
@pytest.mark.parametrize("attention", [False, True])
def test_the_u_net_is_its_blocks_joined_level_by_level(attention, labels):
    net = UNet((2, 4, 8), 4, (1, 3), 2, attention, dropout=0.3, classes=0 if labels is None else 3)
    net = randomized(net)
    drops = [m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)]
    assert len(drops) == 10 and set(drops) == {0.3}
    x, c = randn(2, 2, 4, 8, seed=7), randn(2, seed=8)
    assert not torch.equal(net(x, c, labels), net(x, c, labels))
    net.eval()
    e = reference_embedding(net.embed, c, labels)
    h = F.conv2d(x, net.start.weight, net.start.bias, padding=1)
    skips = []
    for level, blocks in enumerate(net.down):
        if level:
            h = (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4
        for block in blocks:
            h = reference_block(block, h, e)
            skips.append(h)
    h = reference_block(net.middle[0], h, e)
    if attention:
        h = reference_attention(net.middle[1], h)
    h = reference_block(net.middle[2], h, e)
    for level in (1, 0):
        if not level:
            h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
        for block in net.up[level]:
            h = reference_block(block, torch.cat([h, skips.pop()], 1), e)
    gain, offset = (p.view(1, -1, 1, 1) for p in net.end[0].parameters())
    h = silu(group_norm(h, 4) * gain + offset)
    expected = F.conv2d(h, net.end[2].weight, net.end[2].bias, padding=1)
    torch.testing.assert_close(net(x, c, labels), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("labels", [None, torch.tensor([2, 0])])
def test_the_perceptron_adds_level_and_class_in_every_layer(labels):
    net = randomized(PerceptronDenoiser(6, 8, 2, 0 if labels is None else 3), scale=0.7)
    x, c = randn(2, 1, 2, 3, seed=7), randn(2, seed=8)
    e = reference_embedding(net.embed, c, labels)
    h = x.flatten(1) @ net.start.weight.T + net.start.bias
    for first, second in net.layers:
        h = h + silu((h + e) @ first.weight.T + first.bias) @ second.weight.T + second.bias
    expected = (silu(h) @ net.end.weight.T + net.end.bias).view_as(x)
    torch.testing.assert_close(net(x, c, labels), expected)
