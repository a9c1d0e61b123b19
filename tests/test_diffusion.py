"""Diffusion models of the installed package: training, draws, likelihoods, dtypes and devices."""

import math

import pytest
import torch
import torch.nn.functional as F

from optgen.data.images import digits
from optgen.models.diffusion import (
    SAMPLERS,
    Denoiser,
    PerceptronDenoiser,
    UNet,
    ode_log_prob,
    variational_bound,
)
from optgen.models.schedules import (
    TARGETS,
    CosineSchedule,
    LogNormalSchedule,
    PowerSchedule,
    expand_like,
    training_target,
)
from optgen.optim import Adam
from optgen.testing import generator, randn
from optgen.training import checkpoint

BUILDERS = {
    "perceptron": lambda target: Denoiser(PerceptronDenoiser(49, 64, 1), (49,), target),
    "unet": lambda target: Denoiser(UNet((1, 8, 8), 8, (1, 2)), (1, 8, 8), target),
}
STEPS = {"perceptron": 150, "unet": 40}
PIXELS = digits("train").images[:2000]
every_network = pytest.mark.parametrize("name", BUILDERS)


def build_denoiser(name, seed=0, target="v"):
    """Return the denoiser of a name with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BUILDERS[name](target)


def sample_batch(name, seed, n=60):
    """Return n digits in [-1, 1]: flat 7 x 7 for the perceptron, 8 x 8 for the U-Net."""
    images = PIXELS[torch.randint(2000, (n,), generator=generator(seed))] / 127.5 - 1
    if name == "perceptron":
        return images[:, :, ::4, ::4].reshape(n, 49)
    return images[:, :, 2:26:3, 2:26:3]


def train(model, name, steps=None, bfloat16=False):
    """Train a denoiser by Adam on the unweighted loss, and return the loss of each step."""
    optimizer = Adam(model.parameters(), lr=3e-3)
    losses = []
    for t in range(steps or STEPS[name]):
        x = sample_batch(name, t).to(next(model.parameters()))
        noise = torch.randn(x.shape, generator=generator(t)).to(x)
        sigma = LogNormalSchedule()(torch.rand(len(x), generator=generator(t + 1000))).to(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            output = model.output(x + expand_like(sigma, x) * noise, sigma)
        loss = ((output - training_target(x, noise, sigma, model.target)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("target", ["eps", "v", "flow"])
@every_network
def test_training_lowers_the_loss_for_every_target(name, target, seed):
    losses = train(build_denoiser(name, seed, target), name)
    assert losses[-8:].mean() < 0.8 * losses[:3].mean()


@pytest.mark.parametrize("target", ["eps", "v", "flow"])
@every_network
def test_every_sampler_draws_and_a_saved_model_gives_the_same_images(name, target, tmp_path):
    model = build_denoiser(name, 1, target)
    train(model, name)
    steps = PowerSchedule().steps(5)
    for sampler in SAMPLERS.values():
        start = steps[0] * torch.randn(3, *model.shape, generator=generator(2))
        draws = sampler(model, start, steps)
        assert draws.shape == (3, *model.shape)
        assert draws.isfinite().all()
    checkpoint.save(tmp_path / "model.pt", model.state_dict())
    loaded = build_denoiser(name, 5, target)
    loaded.load_state_dict(checkpoint.load(tmp_path / "model.pt"))
    y, sigma = sample_batch(name, 1), torch.full((60,), 0.5)
    assert torch.equal(loaded(y, sigma), model(y, sigma))


@every_network
def test_training_in_float32_follows_float64(name):
    single = train(build_denoiser(name), name, 20)
    double = train(build_denoiser(name).double(), name, 20)
    assert torch.allclose(single.double(), double, rtol=2e-3)


@every_network
def test_training_under_bfloat16_autocast(name):
    losses = train(build_denoiser(name), name, bfloat16=True)
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()
    assert losses[-8:].mean() < 0.8 * losses[:3].mean()


@every_network
def test_nothing_reads_values_from_the_device(name):
    model = build_denoiser(name).to("meta")
    y = torch.empty(4, *model.shape, device="meta")
    sigma = CosineSchedule()(torch.rand(4, device="meta"))
    for target in TARGETS:
        model.target = target
        error = model.output(y, sigma) - training_target(y, y, sigma, target)
        (error**2).mean().backward()
    for sampler in SAMPLERS.values():
        assert sampler(model, y, PowerSchedule().steps(3)).is_meta
    assert variational_bound(model, y, n_levels=2).is_meta
    assert ode_log_prob(model, y, steps=1, probes=1).is_meta


def test_training_lowers_the_variational_bound():
    model = build_denoiser("perceptron")
    x = sample_batch("perceptron", 9) + 0.02 * torch.randn(60, 49, generator=generator(3))
    before = variational_bound(model, x, 0.01, n_levels=50, generator=generator(1)).mean()
    train(model, "perceptron", 300)
    after = variational_bound(model, x, 0.01, n_levels=50, generator=generator(1)).mean()
    assert after < before - 20


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


@pytest.mark.cuda
@every_network
def test_cuda_agrees_with_the_cpu(name):
    on_cpu, on_cuda = build_denoiser(name), build_denoiser(name).cuda()
    y, sigma = sample_batch(name, 3), torch.logspace(-1, 1, 60)
    train(on_cpu, name, 3)
    on_cuda.load_state_dict(on_cpu.state_dict())
    images = on_cuda(y.cuda(), sigma.cuda()).cpu()
    assert torch.allclose(on_cpu(y, sigma), images, rtol=1e-3, atol=1e-4)
    start = 80 * torch.randn(3, *on_cuda.shape).cuda()
    assert SAMPLERS["heun"](on_cuda, start, PowerSchedule().steps(3)).is_cuda
