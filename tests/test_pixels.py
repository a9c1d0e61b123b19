"Images pixel after pixel, of the installed package: they learn, draw and are moved between dtypes and devices."

import pytest
import torch
from conftest import rng

from optgen.data.images import digits
from optgen.models.pixels import MADE, PixelCNN, PixelLSTM
from optgen.optim import Adam

SHAPE, GREY = (1, 7, 7), digits("train").images[:600, :, ::4, ::4] / 255
KINDS = {
    "made": lambda levels: MADE(SHAPE, (60,), levels),
    "lstm": lambda levels: PixelLSTM(SHAPE, 24, levels=levels),
    "pixelcnn": lambda levels: PixelCNN(SHAPE, 8, 3, levels=levels),
}
everyone = pytest.mark.parametrize(
    ("name", "levels"), [(name, levels) for name in KINDS for levels in (2, 4)]
)


def make(name, levels, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KINDS[name](levels)


def images(levels):
    return (GREY * (levels - 1)).round() / (levels - 1)


def learn(model, levels, steps=60, bfloat16=False):
    x, optimizer, seen = (
        images(levels).to(next(model.parameters())),
        Adam(model.parameters(), lr=1e-2),
        [],
    )
    for t in range(steps):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
            loss = -model.log_prob(
                x[torch.randint(len(x), (50,), generator=rng(t)).to(x.device)]
            ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.detach())
    return torch.stack(seen)


@everyone
def test_it_learns_and_what_it_draws_is_likelier_than_noise(name, levels):
    for seed in (0, 1):
        model = make(name, levels, seed)
        losses = learn(model, levels)
        assert losses[-10:].mean() < 0.8 * losses[:3].mean()
        drawn = model.sample(64, rng(seed))
        noise = torch.randint(levels, (64, *SHAPE), generator=rng(seed)) / (levels - 1)
        assert drawn.shape == (64, *SHAPE) and set(
            ((levels - 1) * drawn).round().unique().tolist()
        ) <= set(range(levels))
        assert model.log_prob(drawn).mean() > model.log_prob(noise).mean() + 10


@everyone
def test_float32_follows_float64(name, levels):
    single, double = make(name, levels), make(name, levels).double()
    assert torch.allclose(learn(single, levels, 20).double(), learn(double, levels, 20), rtol=1e-3)


@everyone
def test_bfloat16_autocast_trains(name, levels):
    losses = learn(make(name, levels), levels, 20, bfloat16=True)
    assert losses.dtype == torch.float32 and losses.isfinite().all() and losses[-1] < losses[0]


@pytest.mark.cuda
@everyone
def test_cuda_as_on_the_cpu(name, levels):
    here, there, x = make(name, levels), make(name, levels).cuda(), images(levels)[:50]
    assert (
        torch.allclose(here.log_prob(x), there.log_prob(x.cuda()).cpu(), rtol=1e-4)
        and there.sample(3).is_cuda
    )
    assert learn(there, levels, 20).isfinite().all()
