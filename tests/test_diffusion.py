"""Diffusion models of the installed package: training, draws, likelihoods, dtypes and devices."""

import pytest
import torch

from optgen.data.images import digits
from optgen.models.diffusion import (
    SAMPLERS,
    Denoiser,
    PerceptronDenoiser,
    UNet,
    ancestral,
    ddim,
    heun,
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
from optgen.testing import generator
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
    for sampler in (ancestral, ddim, heun):  # dopri5 chooses its steps by values
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
