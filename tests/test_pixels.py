"""Pixel models of the installed package: training, draws, dtypes and devices."""

import pytest
import torch

from optgen.data.images import digits
from optgen.models.pixels import LSTM, MADE, PixelCNN, PixelLSTM
from optgen.models.tokens import TokenLSTM
from optgen.optim import Adam
from optgen.testing import generator

SHAPE = (1, 7, 7)
PIXELS = digits("train").images[:600, :, ::4, ::4] / 255
BUILDERS = {
    "made": lambda levels: MADE(SHAPE, (60,), levels),
    "lstm": lambda levels: PixelLSTM(SHAPE, 24, levels=levels),
    "pixelcnn": lambda levels: PixelCNN(SHAPE, 8, 3, levels=levels),
}
CASES = [(name, levels) for name in BUILDERS for levels in (2, 4)]
every_model = pytest.mark.parametrize(("name", "levels"), CASES)


def build_model(name, levels, seed=0):
    """Return the model of a name with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BUILDERS[name](levels)


def quantized_images(levels):
    """Return the digits rounded to `levels` gray levels in [0, 1]."""
    return (PIXELS * (levels - 1)).round() / (levels - 1)


def train(model, levels, steps=60, bfloat16=False):
    """Train a model by Adam and return the loss of each step."""
    images = quantized_images(levels).to(next(model.parameters()))
    optimizer = Adam(model.parameters(), lr=1e-2)
    losses = []
    for t in range(steps):
        chosen = torch.randint(len(images), (50,), generator=generator(t)).to(images.device)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
            loss = -model.log_prob(images[chosen]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("seed", [0, 1])
@every_model
def test_training_lowers_the_loss_and_draws_are_likelier_than_noise(name, levels, seed):
    model = build_model(name, levels, seed)
    losses = train(model, levels)
    assert losses[-10:].mean() < 0.8 * losses[:3].mean()
    draws = model.sample(64, generator(seed))
    noise = torch.randint(levels, (64, *SHAPE), generator=generator(seed)) / (levels - 1)
    assert draws.shape == (64, *SHAPE)
    assert set(((levels - 1) * draws).round().unique().tolist()) <= set(range(levels))
    assert model.log_prob(draws).mean() > model.log_prob(noise).mean() + 10


@every_model
def test_training_in_float32_follows_float64(name, levels):
    single = train(build_model(name, levels), levels, 20)
    double = train(build_model(name, levels).double(), levels, 20)
    assert torch.allclose(single.double(), double, rtol=1e-3)


@every_model
def test_training_under_bfloat16_autocast(name, levels):
    losses = train(build_model(name, levels), levels, 20, bfloat16=True)
    assert losses.dtype == torch.float32
    exact = train(build_model(name, levels), levels, 20)
    assert torch.allclose(losses, exact, rtol=0.02)


@pytest.mark.cuda
@every_model
def test_cuda_agrees_with_the_cpu(name, levels):
    on_cpu, on_cuda = build_model(name, levels), build_model(name, levels).cuda()
    x = quantized_images(levels)[:50]
    log_prob = on_cuda.log_prob(x.cuda()).cpu()
    assert torch.allclose(on_cpu.log_prob(x), log_prob, rtol=1e-4)
    assert on_cuda.sample(3).is_cuda
    assert train(on_cuda, levels, 20).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_lstm_keeps_the_precision_of_its_weights_under_autocast_on_a_cpu(dtype):
    "PyTorch asks oneDNN for an LSTM in the lower precision, which few processors have."
    lstm = LSTM(3, 5, 2, batch_first=True)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        x = torch.randn(2, 4, 3)
    out, state = torch.nn.LSTM.forward(lstm, x)
    with torch.autocast("cpu", dtype):
        found, found_state = lstm(x)
        after, _ = lstm(x.to(dtype), found_state)
    assert torch.equal(found, out) and all(map(torch.equal, found_state, state))
    expected = torch.nn.LSTM.forward(lstm, x.to(dtype).float(), state)[0]
    assert torch.equal(after, expected)


@pytest.mark.parametrize("build", [lambda: PixelLSTM((1, 4, 4), 6), lambda: TokenLSTM(2, 3, 6)])
def test_models_with_an_lstm_train_under_autocast(build):
    model = build()
    shape = (5, 1, 4, 4) if isinstance(model, PixelLSTM) else (5, 16)
    x = torch.zeros(shape, dtype=torch.float32 if len(shape) == 4 else torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = -model.log_prob(x).mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert torch.allclose(loss, -model.log_prob(x).mean(), rtol=0.03)
