"Diffusion models of the installed package: they learn, are sampled and measured, and are moved between dtypes and devices."

import pytest
import torch
from conftest import rng

from optgen.data.images import digits
from optgen.models.diffusion import (
    SAMPLERS,
    TARGETS,
    CosineSchedule,
    Denoiser,
    LogNormalSchedule,
    PerceptronDenoiser,
    PowerSchedule,
    UNet,
    ode_log_prob,
    training_target,
    variational_bound,
)
from optgen.optim import Adam
from optgen.training import checkpoint

KINDS = {
    "perceptron": lambda target: Denoiser(PerceptronDenoiser(49, 64, 1), (49,), target),
    "unet": lambda target: Denoiser(UNet((1, 8, 8), 8, (1, 2)), (1, 8, 8), target),
}
GREY = digits("train").images[:2000]
everyone = pytest.mark.parametrize("name", KINDS)


def make(name, seed=0, target="v"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KINDS[name](target)


def batch(name, seed, n=60):
    grey = GREY[torch.randint(2000, (n,), generator=rng(seed))] / 127.5 - 1
    return (
        grey[:, :, ::4, ::4].reshape(n, 49) if name == "perceptron" else grey[:, :, 2:26:3, 2:26:3]
    )


def learn(model, name, steps=None, bfloat16=False):
    steps = steps or (150 if name == "perceptron" else 40)
    optimizer, seen = Adam(model.parameters(), lr=3e-3), []
    for t in range(steps):
        x = batch(name, t).to(next(model.parameters()))
        noise = torch.randn(x.shape, generator=rng(t)).to(x)
        sigma = LogNormalSchedule()(torch.rand(len(x), generator=rng(t + 1000))).to(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            out = model.output(x + sigma.view(-1, *[1] * (x.ndim - 1)) * noise, sigma)
        loss = ((out - training_target(x, noise, sigma, model.target)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.detach())
    return torch.stack(seen)


@everyone
@pytest.mark.parametrize("target", ["eps", "v", "flow"])
def test_it_learns_and_is_sampled(name, target, tmp_path):
    for seed in (0, 1):
        model = make(name, seed, target)
        losses = learn(model, name)
        assert losses[-8:].mean() < 0.8 * losses[:3].mean()
    steps = PowerSchedule().steps(5)
    for sampler in SAMPLERS.values():
        drawn = sampler(model, steps[0] * torch.randn(3, *model.shape, generator=rng(2)), steps)
        assert drawn.shape == (3, *model.shape) and drawn.isfinite().all()
    checkpoint.save(tmp_path / "model.pt", model.state_dict())
    other = make(name, 5, target)
    other.load_state_dict(checkpoint.load(tmp_path / "model.pt"))
    y, sigma = batch(name, 1), torch.full((60,), 0.5)
    assert torch.equal(other(y, sigma), model(y, sigma))


@everyone
def test_float32_follows_float64(name):
    assert torch.allclose(
        learn(make(name), name, 20).double(), learn(make(name).double(), name, 20), rtol=2e-3
    )


@everyone
def test_bfloat16_autocast_trains(name):
    losses = learn(make(name), name, bfloat16=True)
    assert (
        losses.dtype == torch.float32
        and losses.isfinite().all()
        and losses[-8:].mean() < 0.8 * losses[:3].mean()
    )


@everyone
def test_nothing_waits_for_the_device(name):
    model = make(name).to("meta")
    y = torch.empty(4, *model.shape, device="meta")
    sigma = CosineSchedule()(torch.rand(4, device="meta"))
    for target in TARGETS:
        model.target = target
        ((model.output(y, sigma) - training_target(y, y, sigma, target)) ** 2).mean().backward()
    for sampler in SAMPLERS.values():
        assert sampler(model, y, PowerSchedule().steps(3)).is_meta
    assert (
        variational_bound(model, y, k=2).is_meta
        and ode_log_prob(model, y, steps=1, probes=1).is_meta
    )


def test_a_trained_model_explains_the_data_better():
    model = make("perceptron")
    x = batch("perceptron", 9) + 0.02 * torch.randn(60, 49, generator=rng(3))
    before = variational_bound(model, x, 0.01, k=50, generator=rng(1)).mean()
    learn(model, "perceptron", 300)
    after = variational_bound(model, x, 0.01, k=50, generator=rng(1)).mean()
    assert after < before - 20


@pytest.mark.cuda
@everyone
def test_cuda_as_on_the_cpu(name):
    here, there, y, sigma = make(name), make(name).cuda(), batch(name, 3), torch.logspace(-1, 1, 60)
    learn(here, name, 3)
    there.load_state_dict(here.state_dict())
    assert torch.allclose(here(y, sigma), there(y.cuda(), sigma.cuda()).cpu(), rtol=1e-3, atol=1e-4)
    assert SAMPLERS["heun"](
        there, 80 * torch.randn(3, *there.shape).cuda(), PowerSchedule().steps(3)
    ).is_cuda
