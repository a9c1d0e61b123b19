"""Flows of the installed package: training, inverses, draws, dtypes and devices."""

import pytest
import torch

from optgen.data.images import digits
from optgen.models.flow import Logit, dequantize, image_flow, maf, realnvp
from optgen.optim import Adam
from optgen.testing import generator
from optgen.training import checkpoint

BUILDERS = {
    "realnvp": lambda: realnvp(49, 3, (40,), preprocessing=[Logit(0.05)]),
    "maf": lambda: maf(49, 2, (60,), preprocessing=[Logit(0.05)]),
    "image_flow": lambda: image_flow((1, 8, 8), 2, 1, 8, 1, preprocessing=[Logit(0.05)]),
}
PIXELS = digits("train").images[:2000]
every_flow = pytest.mark.parametrize("name", BUILDERS)


def build_flow(name, seed=0):
    """Return the flow of a name with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BUILDERS[name]()


def sample_batch(name, seed, n=60):
    """Return n dequantized digits: flat 7 x 7 for flows of vectors, 8 x 8 images otherwise."""
    images = PIXELS[torch.randint(2000, (n,), generator=generator(seed))]
    if name == "image_flow":
        x = images[:, :, 2:26:3, 2:26:3]
    else:
        x = images[:, :, ::4, ::4].reshape(n, 49)
    return dequantize(x / 255, torch.rand(x.shape, generator=generator(seed + 1)))


def train(model, name, steps=30, bfloat16=False):
    """Calibrate and train a flow by Adam, and return the loss of each step."""
    like = next(model.parameters())
    optimizer = Adam(model.parameters(), lr=3e-3)
    model.calibrate(sample_batch(name, 1).to(like))
    losses = []
    for t in range(steps):
        x = sample_batch(name, 10 * t).to(like)
        with torch.autocast(like.device.type, torch.bfloat16, enabled=bfloat16):
            loss = -model.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("seed", [0, 1])
@every_flow
def test_training_lowers_the_loss_and_the_flow_stays_invertible(name, seed):
    model = build_flow(name, seed)
    losses = train(model, name)
    assert losses[-5:].mean() < losses[:5].mean() - 5
    x = sample_batch(name, 7)
    z, _ = model(x)
    assert (model.inverse(z) - x).abs().max() < 1e-3
    draws = model.sample(50, generator(seed))
    assert draws.shape == x[:50].shape
    # The logit's alpha lets draws leave [0, 1] a little.
    assert draws.min() > -0.06 and draws.max() < 1.06


@every_flow
def test_a_saved_flow_gives_the_same_densities(name, tmp_path):
    model, x = build_flow(name, 1), sample_batch(name, 7)
    train(model, name)
    checkpoint.save(tmp_path / "flow.pt", model.state_dict())
    loaded = build_flow(name, 5)
    loaded.load_state_dict(checkpoint.load(tmp_path / "flow.pt"))
    assert torch.equal(loaded.log_prob(x), model.log_prob(x))


@every_flow
def test_training_in_float32_follows_float64(name):
    single = train(build_flow(name), name, 20)
    double = train(build_flow(name).double(), name, 20)
    assert torch.allclose(single.double(), double, rtol=1e-3, atol=1e-2)


@every_flow
def test_training_under_bfloat16_autocast(name):
    losses = train(build_flow(name), name, 30, bfloat16=True)
    assert losses.dtype == torch.float32
    exact = train(build_flow(name), name, 30)
    assert torch.allclose(losses, exact, rtol=0.02, atol=1.0)


@pytest.mark.cuda
@every_flow
def test_cuda_agrees_with_the_cpu(name):
    on_cpu, on_cuda, x = build_flow(name), build_flow(name).cuda(), sample_batch(name, 3)
    log_prob = on_cuda.log_prob(x.cuda()).cpu()
    assert torch.allclose(on_cpu.log_prob(x), log_prob, rtol=1e-4)
    assert on_cuda.sample(3).is_cuda
    assert train(on_cuda, name, 20).isfinite().all()
