"Flows of the installed package: they learn, can be undone, and are moved between dtypes and devices."

import pytest
import torch
from conftest import rng

from optgen.data.images import digits
from optgen.models.flow import Logit, dequantize, image_flow, maf, realnvp
from optgen.optim import Adam
from optgen.training import checkpoint

KINDS = {
    "realnvp": ((49,), lambda: realnvp(49, 3, (40,), before=[Logit(0.05)])),
    "maf": ((49,), lambda: maf(49, 2, (60,), before=[Logit(0.05)])),
    "image_flow": ((1, 8, 8), lambda: image_flow((1, 8, 8), 2, 1, 8, 1, before=[Logit(0.05)])),
}
GREY = digits("train").images[:2000]
everyone = pytest.mark.parametrize("name", KINDS)


def make(name, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KINDS[name][1]()


def batch(name, seed, n=60):
    grey = GREY[torch.randint(2000, (n,), generator=rng(seed))]
    x = grey[:, :, ::4, ::4].reshape(n, 49) if name != "image_flow" else grey[:, :, 2:26:3, 2:26:3]
    return dequantize(x / 255, torch.rand(x.shape, generator=rng(seed + 1)))


def learn(model, name, steps=30, bfloat16=False):
    like, seen = next(model.parameters()), []
    optimizer = Adam(model.parameters(), lr=3e-3)
    model.calibrate(batch(name, 1).to(like))
    for t in range(steps):
        with torch.autocast(like.device.type, torch.bfloat16, enabled=bfloat16):
            loss = -model.log_prob(batch(name, 10 * t).to(like)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.detach())
    return torch.stack(seen)


@everyone
def test_it_learns_and_is_undone(name, tmp_path):
    for seed in (0, 1):
        model = make(name, seed)
        losses = learn(model, name)
        assert losses[-5:].mean() < losses[:5].mean() - 5
        x = batch(name, 7)
        z, _ = model(x)
        assert (model.inverse(z) - x).abs().max() < 1e-3
        drawn = model.sample(50, rng(seed))
        assert (
            drawn.shape == x[:50].shape and -0.06 < drawn.min() and drawn.max() < 1.06
        )  # beyond [0, 1] by alpha
    checkpoint.save(tmp_path / "flow.pt", model.state_dict())
    other = make(name, 5)
    other.load_state_dict(checkpoint.load(tmp_path / "flow.pt"))
    assert torch.equal(other.log_prob(x), model.log_prob(x))


@everyone
def test_float32_follows_float64(name):
    assert torch.allclose(
        learn(make(name), name, 20).double(),
        learn(make(name).double(), name, 20),
        rtol=1e-3,
        atol=1e-2,
    )


@everyone
def test_bfloat16_autocast_trains(name):
    losses = learn(make(name), name, 30, bfloat16=True)
    assert (
        losses.dtype == torch.float32
        and losses.isfinite().all()
        and losses[-3:].mean() < losses[:3].mean()
    )


@pytest.mark.cuda
@everyone
def test_cuda_as_on_the_cpu(name):
    here, there, x = make(name), make(name).cuda(), batch(name, 3)
    assert (
        torch.allclose(here.log_prob(x), there.log_prob(x.cuda()).cpu(), rtol=1e-4)
        and there.sample(3).is_cuda
    )
    assert learn(there, name, 20).isfinite().all()
